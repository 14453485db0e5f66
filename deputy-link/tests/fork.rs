//! Programs that make children while they are away.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use common::*;
use conet_deputy_link::mover::MoveError;
use conet_testkit::random::Random;
use std::os::unix::process::ExitStatusExt;
use std::process::Output;
use std::thread;
use std::time::Duration;

/// How many children a run made away, and what is known of its return.
struct Ran {
    away: Away,
    output: Output,
}

/// Runs `fork WAY` unmoved, and once more with a move before it begins: both print the
/// same. `meanwhile` may disturb it.
fn makes_children(args: &[&str], meanwhile: impl Fn(u32, &Away)) -> Ran {
    let (_directory, program) = compiled("fork", &[]);
    let expected = unmoved(&program, args);
    let mut node = Node::new();
    let child = start(&program, args);
    thread::sleep(Duration::from_millis(150));
    let away = node.take(child.id()).unwrap();
    meanwhile(child.id(), &away);
    let output = finish(child, args);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&expected.stdout),
        "{args:?}"
    );
    assert_eq!((output.status, output.status.code()), (expected.status, expected.status.code()));
    wait_until("the warden's end", || !exists(away.hosted.warden_pid));
    Ran { away, output }
}

/// The program's end, for a minute at most.
fn finish(mut child: Program, args: &[&str]) -> Output {
    let begin = std::time::Instant::now();
    while child.try_wait().unwrap().is_none() {
        let status = status_of(child.id());
        assert!(begin.elapsed() < Duration::from_secs(60), "{args:?} hangs: {status:?}");
        thread::sleep(Duration::from_millis(5));
    }
    child.finish()
}

#[test]
fn a_tree_of_processes_grows_away() {
    conet_testkit::privileged!();
    let ran = makes_children(&["tree"], |_, _| ());
    assert_eq!(ran.away.family.children().len(), 3 * 14);
    assert!(!ran.output.stdout.is_empty());
}

#[test]
fn children_die_as_they_do() {
    conet_testkit::privileged!();
    let ran = makes_children(&["deaths"], |_, _| ());
    assert_eq!(ran.away.family.children().len(), 10);
}

#[test]
fn a_daemon_is_made_away() {
    conet_testkit::privileged!();
    let ran = makes_children(&["daemon"], |_, _| ());
    assert_eq!(ran.away.family.children().len(), 2);
}

#[test]
fn ids_and_signals_are_as_clone_says() {
    conet_testkit::privileged!();
    let ran = makes_children(&["ids"], |_, _| ());
    assert!(ran.away.family.children().len() >= 3);
}

#[test]
fn a_handler_of_sigchld_runs_at_home() {
    conet_testkit::privileged!();
    makes_children(&["handled"], |pid, away| {
        // As the daemon does when it sees a handled signal waiting.
        while let Some(status) = status_of(pid) {
            let seen = conet_deputy_link::view(as_pid(pid));
            if status.phase == conet_deputy_link::phase::SERVING
                && seen.is_ok_and(|seen| seen.handled_pending != 0)
                && away.bring_home(pid).is_ok()
            {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
    });
}

#[test]
fn spawns_find_their_program_or_say_so() {
    conet_testkit::privileged!();
    let ran = makes_children(&["spawns"], |_, _| ());
    assert_eq!(ran.away.family.children().len(), 12);
}

#[test]
fn a_vfork_shares_its_parents_memory() {
    conet_testkit::privileged!();
    let ran = makes_children(&["vforks"], |_, _| ());
    assert_eq!(ran.away.family.children().len(), 12 + 3);
}

#[test]
fn groups_siblings_waits_and_orphans_are_as_at_home() {
    conet_testkit::privileged!();
    for (way, children) in
        [("groups", 4), ("siblings", 4), ("waits", 4), ("pipes", 5), ("execs", 4), ("reaper", 2)]
    {
        let ran = makes_children(&[way], |_, _| ());
        assert_eq!(ran.away.family.children().len(), children, "{way}");
    }
}

#[test]
fn a_program_calls_the_shell() {
    conet_testkit::privileged!();
    let ran = makes_children(&["shells"], |_, _| ());
    assert_eq!(ran.away.family.children().len(), 3);
}

#[test]
fn what_cannot_be_made_away_is_made_at_home() {
    conet_testkit::privileged!();
    for fail in [Fail::HomeAsked, Fail::Refused, Fail::LinkCut, Fail::NodeSilent, Fail::HomeAtBirth]
    {
        let ran = makes_children(&["one"], |_, away| away.family.fail(fail));
        assert_eq!(ran.away.family.children().len(), 0, "{fail:?}");
    }
}

/// What a run of `fork one` prints where this happens to the birth of its first child.
#[derive(Debug, PartialEq)]
enum Outcome {
    /// Nothing of it is seen.
    AsUnmoved,
    /// The first child ends by SIGKILL, and the rest is as it was.
    ChildKilled,
    /// The program ends by SIGKILL.
    ParentKilled,
}

/// Disturbs the birth of a child; whatever is left ends by itself.
fn disturbed(phase: Phase, blow: Blow) -> (Outcome, usize) {
    let context = format!("{phase:?} {blow:?}");
    let (_directory, program) = compiled("fork", &[]);
    let expected = unmoved(&program, &["one"]);
    let mut node = Node::new();
    let child = start(&program, &["one"]);
    thread::sleep(Duration::from_millis(150));
    let away = node.take(child.id()).unwrap();
    away.family.fail(Fail::At(phase, blow));
    let output = finish(child, &["one", &context]);
    assert_eq!(away.family.struck(), 1, "{context}");
    let text = String::from_utf8(output.stdout).unwrap();
    let unmoved = String::from_utf8(expected.stdout).unwrap();
    let outcome = if text == unmoved && output.status == expected.status {
        Outcome::AsUnmoved
    } else if output.status.signal() == Some(9) {
        Outcome::ParentKilled
    } else {
        assert_eq!(text, unmoved.replacen("one exited 77", "one signal 9 core 0", 1), "{context}");
        Outcome::ChildKilled
    };
    wait_until(&format!("{context}: the warden's end"), || !exists(away.hosted.warden_pid));
    let children = away.family.children();
    for (pid, _) in &children {
        wait_until(&format!("{context}: a child's end"), || !exists(*pid));
    }
    (outcome, children.len())
}

#[test]
fn whoever_dies_at_a_birth_there_is_one_child_or_none() {
    use Outcome::{AsUnmoved, ChildKilled, ParentKilled};
    conet_testkit::privileged!();
    // How the run goes on, and how many of two children are made away.
    for (phase, blow, outcome, made) in [
        (Phase::Asked, Blow::ParentRemote, ParentKilled, 0),
        (Phase::Asked, Blow::Warden, ParentKilled, 0),
        (Phase::Asked, Blow::ParentHome, ParentKilled, 0),
        (Phase::Asked, Blow::Stall, AsUnmoved, 2),
        (Phase::Ready, Blow::ChildRemote, ChildKilled, 2),
        (Phase::Ready, Blow::Cut, AsUnmoved, 0),
        (Phase::Ready, Blow::Stall, AsUnmoved, 2),
        (Phase::Ready, Blow::ParentRemote, ParentKilled, 0),
        (Phase::Ready, Blow::ParentHome, ParentKilled, 0),
        (Phase::Ready, Blow::Warden, ParentKilled, 0),
        (Phase::Born, Blow::ChildRemote, ChildKilled, 2),
        (Phase::Born, Blow::ChildHome, ChildKilled, 2),
        (Phase::Born, Blow::Cut, ChildKilled, 2),
        (Phase::Born, Blow::Stall, AsUnmoved, 2),
        (Phase::Born, Blow::ParentRemote, ParentKilled, 1),
        (Phase::Born, Blow::ParentHome, ParentKilled, 1),
        (Phase::Born, Blow::Warden, ParentKilled, 1),
    ] {
        assert_eq!(disturbed(phase, blow), (outcome, made), "{phase:?} {blow:?}");
    }
}

/// A process and its descendants.
fn descendants(root: u32) -> Vec<u32> {
    let mut found = vec![root];
    let mut at = 0;
    while at < found.len() {
        let one = found[at];
        let children = std::fs::read_to_string(format!("/proc/{one}/task/{one}/children"));
        let children = children.unwrap_or_default();
        found.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        at += 1;
    }
    found
}

/// What a daemon knows of those that are away, and the moves that a test makes.
struct Hopper {
    node: Node,
    /// Each sandbox, and the process for which it was made.
    sandboxes: Vec<(u32, Away)>,
    out: u32,
    home: u32,
    of_children: u32,
}

impl Hopper {
    fn is_away(pid: u32) -> bool {
        status_of(pid).is_some_and(|status| status.phase == conet_deputy_link::phase::SERVING)
    }

    /// Brings home those for whom a signal waits that has a handler, as the daemon does.
    fn attend(&mut self, pids: &[u32]) {
        for pid in pids.iter().copied().filter(|pid| Self::is_away(*pid)) {
            let blocked = status_of(pid).map_or(0, |status| status.blocked);
            let seen = conet_deputy_link::view(as_pid(pid));
            if seen.is_ok_and(|seen| seen.handled_pending & !blocked != 0 && !seen.is_stopped) {
                self.fetch(pid);
            }
        }
    }

    fn fetch(&mut self, pid: u32) {
        // The newest that knows it: ids may come again.
        let found = self.sandboxes.iter().rev().find_map(|(first, away)| {
            let children = away.family.children();
            let child = children.into_iter().rev().find(|(child, _)| *child == pid);
            (*first == pid || child.is_some()).then_some((away, child))
        });
        let Some((away, child)) = found else { return };
        let returned = match child {
            Some(child) => away.bring_child_home(child),
            None => away.bring_home(pid),
        };
        match returned {
            Ok(_) => self.home += 1,
            // It ended or became another program, or shares memory by vfork.
            Err(MoveError::Gone | MoveError::Process(_) | MoveError::Locked(_)) => {}
            Err(error) => panic!("process {pid} did not come home: {error}"),
        }
    }

    fn hop(&mut self, root: u32, pid: u32) {
        if Self::is_away(pid) {
            return self.fetch(pid);
        }
        match self.node.take(pid) {
            Ok(away) => {
                self.sandboxes.push((pid, away));
                self.out += 1;
                self.of_children += u32::from(pid != root);
            }
            Err(
                MoveError::Gone
                | MoveError::Process(_)
                | MoveError::Locked(_)
                | MoveError::Replaced,
            ) => {}
            Err(error) => panic!("process {pid} did not move: {error}"),
        }
    }
}

#[test]
fn a_family_hops_at_random_times() {
    conet_testkit::privileged!();
    let seed = std::env::var("CONET_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 7);
    println!("CONET_SEED={seed}");
    let mut random = Random::new(seed);
    let (_directory, program) = compiled("fork", &[]);
    let args = ["all", "2"];
    let expected = unmoved(&program, &args);
    let mut child = start(&program, &args);
    let root = child.id();
    let node = Node::new();
    let mut hopper = Hopper { node, sandboxes: Vec::new(), out: 0, home: 0, of_children: 0 };
    let begin = std::time::Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(begin.elapsed() < Duration::from_secs(120), "seed {seed}: {:?}", status_of(root));
        let all = descendants(root);
        hopper.attend(&all);
        let one = all[usize::try_from(random.below(all.len() as u64)).unwrap()];
        hopper.hop(root, one);
        thread::sleep(Duration::from_millis(random.below(12)));
    }
    let output = child.finish();
    let away: usize = hopper.sandboxes.iter().map(|(_, away)| away.family.children().len()).sum();
    println!(
        "{} moves out, {} of children, {} home, {away} made away",
        hopper.out, hopper.of_children, hopper.home
    );
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&expected.stdout),
        "seed {seed}"
    );
    assert_eq!(output.status, expected.status, "seed {seed}");
    assert!(hopper.out > 10 && hopper.of_children > 0 && away > 0, "seed {seed}");
    for (_, away) in &hopper.sandboxes {
        wait_until("a warden's end", || !exists(away.hosted.warden_pid));
    }
}
