//! A program that moves among three hosts, between two of them without running at home.
//!
//! Short by default. `cargo xtask moves` sets the variables by which it runs in full:
//! `CONET_MOVES_SEED`, `CONET_MOVES_COUNT`, `CONET_MOVES_MEGABYTES`, `CONET_MOVES_RATE`,
//! `CONET_MOVES_LIMIT` (of the freeze at p90, in ms) and `CONET_MOVES_JSON`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::scene::{Blow, SECOND, Scene};
use common::{Lab, Said, Shared, migrate, python, row, wait_until};
use conet_testkit::Need;
use conet_testkit::random::Random;

/// Has so many MB, and changes so many pages a second, each of which it checks before;
/// what it prints depends on the seed and on how far it came.
const CHANGES: &str = "
import array, os, random, sys, time, zlib
megabytes, rate, seed, steps, stop = *map(int, sys.argv[1:5]), sys.argv[5]
page, count, draw = 4096, megabytes * 256, random.Random(seed)
memory = bytearray(draw.randbytes(1 << 20) * megabytes)
for i in range(count): memory[i * page:i * page + 8] = i.to_bytes(8, 'little')
sums = array.array('L', (zlib.crc32(memoryview(memory)[i * page:(i + 1) * page]) for i in range(count)))
print('begin', flush=True)
begin, n, digest = time.monotonic(), 0, 0
while n < steps if steps else n == 0 or n % 10 or not os.path.exists(stop):
    i = draw.randrange(count)
    old = memory[i * page:(i + 1) * page]
    if zlib.crc32(old) != sums[i]:
        print('step', n, 'page', i, 'differs', flush=True)
        sys.exit(1)
    digest = zlib.crc32(old, digest)
    new = draw.randbytes(64) + old[64:]
    memory[i * page:(i + 1) * page] = new
    sums[i] = zlib.crc32(new)
    n += 1
    if n % 50 == 0: print(n, digest, flush=True)
    if rate and not steps:
        wait = begin + n / rate - time.monotonic()
        if wait > 0: time.sleep(wait)
whole = [i for i in range(count) if zlib.crc32(memoryview(memory)[i * page:(i + 1) * page]) != sums[i]]
print('end', n, digest, zlib.crc32(memory), whole, flush=True)
sys.exit(7)
";

/// A number that `cargo xtask moves` may set.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// The least value that so many hundredths do not exceed.
fn percentile(sorted: &[u64], hundredths: usize) -> u64 {
    sorted[(sorted.len() * hundredths).div_ceil(100).saturating_sub(1)]
}

#[test]
fn a_program_moves_among_three_hosts() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let seed = setting("CONET_MOVES_SEED", u64::from(std::process::id()));
    let moves = setting("CONET_MOVES_COUNT", 12);
    let [megabytes, rate] =
        [("CONET_MOVES_MEGABYTES", 32), ("CONET_MOVES_RATE", 100)].map(|(n, d)| setting(n, d));
    println!("seed {seed}: {moves} moves of {megabytes} MB, {rate} pages changed a second");
    let mut random = Random::new(seed);
    let lab = Lab::of(3, "wireguard");
    let stop = Shared::new("moves.stop");
    let arguments = |steps: u64| {
        let numbers = [megabytes, rate, seed, steps].map(|number| number.to_string());
        [&["-c".to_owned(), CHANGES.to_owned()], &numbers[..], &[stop.path().to_owned()]].concat()
    };
    let line = [vec![python()], arguments(0)].concat();
    let mut program = lab.run(&line.iter().map(String::as_str).collect::<Vec<_>>());
    let (pid, said) = (program.pid(), Said::by(&mut program));
    wait_until("its beginning", 60 * SECOND, || said.text().contains("begin"));
    let places = ["home", "conet-h2", "conet-h3"];
    let (mut at, mut direct, mut freezes) = (0, 0, Vec::new());
    let begin = Instant::now();
    for number in 1..=moves {
        let to = (at + 1 + usize::from(random.chance(500))) % places.len();
        thread::sleep(Duration::from_millis(50 + random.below(300)));
        let moved = migrate(pid, places[to]);
        let freeze = moved["freeze_us"].as_u64().unwrap();
        let row = row(pid);
        // A move that passes by home is two.
        assert_eq!(row["hops_done"], number, "{} to {}: {row}", places[at], places[to]);
        assert_eq!(row["place"], if to == 0 { "home" } else { "away" }, "{row}");
        direct += u64::from(at != 0 && to != 0);
        if std::env::var_os("CONET_MOVES_JSON").is_none() {
            let total = moved["total_us"].as_u64().unwrap();
            let (from, to) = (places[at], places[to]);
            let held = &moved["memory"]["held_pages"];
            println!(
                "{number:3} {from:>8} to {to:8} freeze {freeze:6} µs of {total:7}, {held} pages in it"
            );
        }
        freezes.push(freeze);
        at = to;
    }
    let total = begin.elapsed();
    fs::write(&stop.0, b"").unwrap();
    let status = program.status_within(120 * SECOND);
    let text = said.text();
    assert_eq!(status.code(), Some(7), "{text}");
    let end = text.lines().find_map(|line| line.strip_prefix("end ")).unwrap();
    let steps: u64 = end.split(' ').next().unwrap().parse().unwrap();
    let mut unmoved = Command::new(python());
    let unmoved = unmoved.args(arguments(steps)).stdin(Stdio::null()).output().unwrap();
    assert_eq!(unmoved.status.code(), Some(7));
    assert!(text == String::from_utf8_lossy(&unmoved.stdout), "the output differs:\n{text}");
    assert!(moves < 12 || direct > 0, "no direct moves");
    freezes.sort_unstable();
    let [p50, p90, max] = [50, 90, 100].map(|hundredths| percentile(&freezes, hundredths));
    if std::env::var_os("CONET_MOVES_JSON").is_some() {
        let figures = serde_json::json!({
            "seed": seed, "moves": moves, "direct": direct, "megabytes": megabytes,
            "pages_per_second": rate, "freeze_p50_us": p50, "freeze_p90_us": p90,
            "freeze_max_us": max, "total_ms": u64::try_from(total.as_millis()).unwrap(),
            "steps": steps,
        });
        println!("{figures}");
    } else {
        let total = total.as_secs_f64();
        println!(
            "{direct} direct; freeze p50 {p50} µs, p90 {p90} µs, at most {max} µs; {total:.1} s in all; {steps} pages changed"
        );
    }
    // On a machine that does other things at once only `cargo xtask moves` asks for it.
    let limit = setting("CONET_MOVES_LIMIT", u64::MAX / 1000);
    assert!(p90 <= limit * 1000, "freeze at p90: {p90} µs, more than {limit} ms (seed {seed})");
}

/// From the second host to the third, whoever dies and whatever is cut.
#[test]
fn a_program_lives_in_one_place_whatever_dies_in_a_direct_move() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let seed = std::env::var("CONET_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("seed {seed}");
    let mut random = Random::new(seed);
    let mut scene = Scene::start(Lab::of(3, "wireguard"));
    let (moment, long) = (Duration::from_millis(300), 12 * SECOND);
    let blows = [
        Blow::Daemon("conet-h1"),
        Blow::Daemon("conet-h2"),
        Blow::Daemon("conet-h3"),
        Blow::Remote,
        Blow::OldRemote,
        Blow::Warden,
        Blow::Program,
        Blow::Lan("conet-h2", moment),
        Blow::Lan("conet-h3", moment),
        Blow::Lan("conet-h2", long),
        Blow::Lan("conet-h3", long),
    ];
    let (mut ended, mut moved, mut stayed, mut home) = (0, 0, 0, 0);
    for blow in blows {
        for phase in ["copy", "freeze", "commit"] {
            // Waited for once, where it matters most.
            if matches!(blow, Blow::Lan(_, time) if time == long) && phase != "freeze" {
                continue;
            }
            if scene.place() == "ended" {
                scene = Scene::start(scene.finish());
            }
            scene.get_to("conet-h2");
            // Its copy takes some 40 ms, and then it is stopped.
            let after = Duration::from_micros(random.below(70_000));
            let place = scene.case("conet-h3", phase, blow, after);
            match (place.as_str(), row(scene.pid)["node"].as_str()) {
                ("ended", _) => ended += 1,
                ("home", _) => home += 1,
                (_, Some("conet-h2")) => stayed += 1,
                _ => moved += 1,
            }
        }
    }
    drop(scene.finish());
    eprintln!("{moved} moved, {stayed} stayed, {home} came home, {ended} ended");
    assert!(moved > 0 && ended >= 2, "{moved} {ended}");
}
