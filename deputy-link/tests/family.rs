//! Programs that become others while they are away.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use common::*;
use std::process::Command;
use std::thread;
use std::time::Duration;

/// Runs `exec WAY` unmoved, and once more with a move before its `execve`: both print
/// the same. The program is its own successor when the other half has ended.
fn becomes_another(way: &str, meanwhile: impl Fn(u32)) {
    let (_directory, program) = compiled("exec", &[]);
    let expected = Command::new(&program).arg(way).env_clear().output().unwrap();
    let mut node = Node::new();
    let mut command = Command::new(&program);
    let child = Program::start(command.arg(way).env_clear());
    thread::sleep(Duration::from_millis(150));
    let away = node.take(child.id()).unwrap();
    meanwhile(child.id());
    wait_until("the remote half's end", || !exists(away.hosted.warden_pid));
    let output = child.finish();
    assert_eq!(String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&expected.stdout));
    assert_eq!((output.status, output.status.code()), (expected.status, Some(7)));
}

#[test]
fn a_program_becomes_another_with_a_megabyte_of_arguments() {
    conet_testkit::privileged!();
    becomes_another("big", |_| ());
}

#[test]
fn a_program_becomes_another_by_descriptor_or_without_arguments() {
    conet_testkit::privileged!();
    becomes_another("fexecve", |_| ());
    becomes_another("null", |_| ());
}

#[test]
fn an_execve_that_fails_leaves_all_as_it_was() {
    conet_testkit::privileged!();
    becomes_another("fails", |_| ());
}

#[test]
fn a_signal_in_the_midst_of_execve_is_handled_by_the_program() {
    conet_testkit::privileged!();
    let (_directory, program) = compiled("exec", &[]);
    for delay in [610, 630, 655, 690] {
        let mut node = Node::new();
        let mut command = Command::new(&program);
        let child = Program::start(command.arg("signals").env_clear());
        let begin = std::time::Instant::now();
        thread::sleep(Duration::from_millis(150));
        let away = node.take(child.id()).unwrap();
        thread::sleep(Duration::from_millis(delay).saturating_sub(begin.elapsed()));
        Command::new("kill").args(["-USR1", &child.id().to_string()]).status().unwrap();
        // As the daemon does when it sees a handled signal waiting.
        let came = away.bring_home(child.id());
        let output = child.finish();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("handled 10"), "{delay}: {came:?} {} {text}", output.status);
        assert_eq!(output.status.code(), Some(7), "{text}");
    }
}
