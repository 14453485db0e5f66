//! Programs that make children while they are away.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use common::*;
use conet_deputy_link::locks::describe_return;
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
        loop {
            match status_of(pid) {
                Some(status) if status.phase == conet_deputy_link::phase::SERVING => {}
                _ => return,
            }
            let seen = conet_deputy_link::view(as_pid(pid));
            if seen.is_ok_and(|seen| seen.handled_pending != 0) {
                away.bring_home(pid).ok();
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
    let _ = describe_return;
}
