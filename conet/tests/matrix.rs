//! Whoever dies, or whatever is cut, at whichever phase of a move: the program lives
//! in one place and goes on, or has ended with a stored reason; nothing remains.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::time::Duration;

use common::Lab;
use common::scene::{Blow, Scene};
use conet_testkit::Need;
use conet_testkit::random::Random;

const BLOWS: [Blow; 7] = [
    Blow::Daemon("conet-h1"),
    Blow::Daemon("conet-h2"),
    Blow::Remote,
    Blow::Warden,
    Blow::Program,
    Blow::Lan("conet-h2", Duration::from_millis(300)),
    Blow::Lan("conet-h2", Duration::from_secs(12)),
];

/// Of moves there and back; in the freeze and before the commit is heard they are held.
const PHASES: [(&str, &str); 5] = [
    ("conet-h2", "prepare"),
    ("conet-h2", "copy"),
    ("conet-h2", "freeze"),
    ("conet-h2", "commit"),
    ("home", "home"),
];

#[test]
fn a_program_lives_in_one_place_whatever_dies_in_a_move() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let seed = std::env::var("CONET_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("seed {seed}");
    let mut random = Random::new(seed);
    let mut scene = Scene::start(Lab::up("wireguard"));
    let (mut ended, mut moved, mut stayed) = (0, 0, 0);
    for blow in BLOWS {
        for (to, phase) in PHASES {
            let from = if to == "home" { "away" } else { "home" };
            if scene.place() == "ended" {
                scene = Scene::start(scene.finish());
            }
            if scene.place() != from {
                let start = if to == "home" { "conet-h2" } else { "home" };
                scene.get_to(start);
            }
            let after = Duration::from_micros(random.below(20_000));
            match scene.case(to, phase, blow, after).as_str() {
                "ended" => ended += 1,
                place if place == from => stayed += 1,
                _ => moved += 1,
            }
        }
    }
    drop(scene.finish());
    eprintln!("{moved} moved, {stayed} stayed, {ended} ended");
    assert!(moved > 0 && ended >= 3, "{moved} {ended}");
}
