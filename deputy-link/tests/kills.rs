//! A mover that is killed at any moment of a move: the program lives at home or away,
//! never on both, and goes on as it was.
//!
//! The mover runs in a process of its own, this test's executable with a variable in
//! its environment, so that killing it is what a daemon's death is.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{Node, Program, compiled, exists, status_of, unmoved, wait_until};
use conet_deputy_link::{mover, phase};
use conet_testkit::random::Random;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Names the process to move.
const ROLE: &str = "CONET_TEST_MOVES";

/// No test by itself: moves a process to and fro until it is killed.
#[test]
fn the_mover() {
    let Ok(pid) = std::env::var(ROLE) else { return };
    let pid: u32 = pid.parse().unwrap();
    let (mut node, mut other) = (Node::new(), Node::new());
    loop {
        println!("begin");
        match node.take(pid) {
            Ok(mut away) => {
                thread::sleep(Duration::from_micros(300));
                // Where it is not there it is at home, or where it was.
                if let Ok(Some(there)) = other.take_on(&away, pid).away {
                    away = there;
                    thread::sleep(Duration::from_micros(300));
                }
                if matches!(away.bring_home(pid), Err(mover::MoveError::Gone)) {
                    return;
                }
            }
            Err(mover::MoveError::Gone) => return,
            Err(_) => thread::sleep(Duration::from_micros(300)),
        }
    }
}

/// Processes of sandboxes.
fn remotes(of: u32) -> Vec<u32> {
    let status = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/status"));
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    // The remote half bears the same pid in its own namespace.
    pids.filter(|pid| {
        *pid != of
            && status(*pid).is_ok_and(|status| {
                let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
                ids.is_some_and(|ids| ids.split_whitespace().skip(1).any(|id| id == of.to_string()))
            })
    })
    .collect()
}

#[test]
fn a_mover_that_is_killed_leaves_the_program_in_one_place() {
    conet_testkit::privileged!();
    let seed = u64::from(std::process::id());
    eprintln!("seed {seed}");
    let mut random = Random::new(seed);
    let (_directory, path) = compiled("state", &["-O2", "-static"]);
    let arguments = ["200"];
    let expected = unmoved(&path, &arguments);
    let program = Program::start(Command::new(&path).args(arguments).stdout(Stdio::piped()));
    let pid = program.id();
    let (mut kills, mut away) = (0, 0);
    let begin = Instant::now();
    while exists(pid) && begin.elapsed() < Duration::from_secs(60) {
        let mut mover = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_mover", "--nocapture"])
            .env(ROLE, pid.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(mover.stdout.take().unwrap()).lines();
        // Some whole moves, then one that does not end.
        for _ in 0..=random.below(2) {
            if !said.by_ref().any(|line| line.is_ok_and(|line| line.contains("begin"))) {
                break;
            }
        }
        thread::sleep(Duration::from_micros(random.below(40_000)));
        mover.kill().unwrap();
        mover.wait().unwrap();
        kills += 1;
        if !exists(pid) {
            break;
        }
        let is_away = status_of(pid)
            .is_some_and(|s| matches!(s.phase, phase::STARTING | phase::SERVING | phase::COMING));
        if is_away {
            away += 1;
            // Somebody else brings it home, also without the bell: it makes calls.
            match mover::bring_home(common::as_pid(pid), || {}) {
                Ok(_) | Err(mover::MoveError::Gone) => {}
                Err(error) => panic!("kill {kills}: {error}"),
            }
        }
        wait_until("what it left to end", || remotes(pid).is_empty());
    }
    let output = program.finish();
    eprintln!("{kills} kills, {away} with the program away");
    assert_eq!(output.status, expected.status, "after {kills} kills");
    assert!(kills >= 8, "{kills}");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert_eq!(text(&output.stdout), text(&expected.stdout));
}
