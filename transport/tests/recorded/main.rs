//! What the build with `FEATURE_FIND` sends, recorded from it, against the build under test:
//! calls on all lanes, rows, parked calls, large payloads both ways with grants and by the way
//! for bulk, new keys, moved sessions of either end and of both, a cookie, a peer that is found
//! by another. Each recording has one side; the build under test is the other one.
//!
//! ```text
//! 20 1:7 2:7 0301…     at 20 ms this came from port 7 of host 1 to port 7 of host 2
//! ```
//!
//! Randomness is the same as in the recording, whatever the order in which it is asked for,
//! and so is the time at which a node asks for a session: so the recorded packets open. A
//! change that breaks a test here breaks talking to nodes that are not updated yet.
//!
//! A recording stays as it is for as long as its build is to be understood. A later build
//! that says something new gets scenes of its own, in files of their own, by
//!
//! ```text
//! CONET_RECORD=1 cargo test -p conet-transport --test recorded this_build
//! ```
//!
//! which writes those that are not there, with this build as both sides.

mod node;
mod scenes;

use conet_transport::time::Instant;
use node::{Datagram, Side};
use scenes::{SCENES, Scene};
use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

fn path(scene: &Scene) -> PathBuf {
    let data = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    data.join(scene.name).with_extension("txt")
}

fn to_text(ms: u64, datagram: &Datagram) -> String {
    let at = |address: SocketAddr| format!("{}:{}", node::host_of(address), address.port());
    let bytes: String = datagram.bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{ms} {} {} {bytes}\n", at(datagram.from), at(datagram.to))
}

fn from_text(line: &str) -> (u64, Datagram) {
    let words: Vec<&str> = line.split(' ').collect();
    let [ms, from, to, bytes] = words[..] else { panic!("{line}") };
    let at = |text: &str| {
        let (host, port) = text.split_once(':').expect("host:port");
        SocketAddr::new(
            node::address(host.parse().expect("a host")).ip(),
            port.parse().expect("a port"),
        )
    };
    let bytes = bytes.as_bytes().chunks(2).map(|pair| {
        let pair = std::str::from_utf8(pair).expect("ASCII");
        u8::from_str_radix(pair, 16).expect("hexadecimal")
    });
    (ms.parse().expect("a time"), Datagram { from: at(from), to: at(to), bytes: bytes.collect() })
}

fn moment(ms: u64) -> Instant {
    Instant::from_start(Duration::from_millis(ms))
}

/// Both sides are this build: gives what one of them sent.
fn record(scene: &Scene) -> (Side, String) {
    let (mut ours, mut theirs) = (Side::default(), Side::default());
    let (mut recording, mut to_ours, mut to_theirs) = (String::new(), Vec::new(), Vec::new());
    for ms in 0..scene.ms {
        let now = moment(ms);
        for datagram in std::mem::take(&mut to_ours) {
            recording += &to_text(ms, &datagram);
            ours.take(now, datagram);
        }
        for datagram in std::mem::take(&mut to_theirs) {
            theirs.take(now, datagram);
        }
        (scene.ours)(&mut ours, now, ms);
        (scene.theirs)(&mut theirs, now, ms);
        to_theirs.extend(ours.turn(now));
        for datagram in theirs.turn(now) {
            let is_own = scene.recorded.contains(&node::host_of(datagram.to));
            if is_own { &mut to_theirs } else { &mut to_ours }.push(datagram);
        }
    }
    (ours, recording)
}

fn replay(scene: &Scene, recording: &str) -> Side {
    let mut ours = Side::default();
    let mut lines = recording.lines().map(from_text).peekable();
    for ms in 0..scene.ms {
        let now = moment(ms);
        while let Some((_, datagram)) = lines.next_if(|(at, _)| *at == ms) {
            ours.take(now, datagram);
        }
        (scene.ours)(&mut ours, now, ms);
        ours.turn(now).for_each(drop);
    }
    assert!(lines.next().is_none(), "{}: all of it was replayed", scene.name);
    ours
}

/// What happened at our side is what had to, in whatever order, and nothing was refused.
fn check(scene: &Scene, ours: &Side) {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for note in &ours.notes {
        *counts.entry(note).or_default() += 1;
    }
    let expected: BTreeMap<&str, usize> =
        scene.expected.iter().map(|(times, note)| (*note, *times)).collect();
    assert_eq!(counts, expected, "{}", scene.name);
    // A large payload went on behind what is sent unasked.
    assert!(ours.sent >= scene.sends, "{}: {} bytes sent", scene.name, ours.sent);
    for node in ours.nodes() {
        for status in node.status(moment(scene.ms)) {
            let counters = status.counters;
            assert_eq!((counters.forged, counters.malformed), (0, 0), "{}", scene.name);
        }
        let strays = node.strays();
        let refused = (strays.malformed, strays.other_version, strays.forged, strays.unknown_key);
        assert_eq!(refused, (0, 0, 0, 0), "{}", scene.name);
    }
}

fn understands(name: &str) {
    let scene = SCENES.iter().find(|scene| scene.name == name).expect("a scene");
    let recording = fs::read_to_string(path(scene)).expect("was recorded");
    check(scene, &replay(scene, &recording));
}

#[test]
fn the_build_with_find_is_answered() {
    understands("v1-find-begins");
}

#[test]
fn the_build_with_find_answers() {
    understands("v1-find-answers");
}

#[test]
fn a_session_of_the_build_with_find_moves() {
    understands("v1-find-moves");
}

#[test]
fn a_session_with_the_build_with_find_moves() {
    understands("v1-find-is-moved");
}

#[test]
fn this_end_and_the_build_with_find_move_at_once() {
    understands("v1-find-both-move");
}

#[test]
fn a_peer_is_found_by_the_build_with_find() {
    understands("v1-find-finds");
}

#[test]
fn the_build_with_find_asks_for_a_cookie() {
    understands("v1-find-cookie");
}

/// A scene says the same with both sides of one build, so a recording can be made of it: where
/// `CONET_RECORD` is set, those that are not there are.
#[test]
fn this_build_plays_all_scenes_with_itself() {
    let records = std::env::var_os("CONET_RECORD").is_some();
    for scene in SCENES {
        let (ours, recording) = record(scene);
        check(scene, &ours);
        check(scene, &replay(scene, &recording));
        if records && !path(scene).exists() {
            fs::write(path(scene), recording).expect("written");
        }
    }
}
