//! What goes wrong ends well: by itself at home, or with a reason and nothing left.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use common::*;
use conet_deputy_link::locks::{Policy, describe_return, locks};
use conet_deputy_link::mover::How;
use conet_deputy_link::mover::MoveError;
use conet_deputy_link::{mover, phase};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

const BUSY: &str = "BEGIN { while (1) i++ }";

/// Starts a program, lets it begin, and moves it.
fn away(node: &mut Node, program: &str, args: &[&str]) -> (Program, Away) {
    let child = start(program, args);
    thread::sleep(Duration::from_millis(150));
    let away = node.take(child.id()).unwrap();
    (child, away)
}

/// A program that does something that only home can: it comes home by itself, and
/// its output and status are as unmoved.
fn comes_home_for(script: &str, reason: &str) {
    let expected = unmoved(&python(), &["-c", script]);
    let mut node = Node::new();
    let (child, _away) = away(&mut node, &python(), &["-c", script]);
    let status = wait_home(child.id());
    if status.phase == phase::HOME {
        let why = describe_return(status.reason, status.detail);
        assert!(why.contains(reason), "{why}");
    }
    let output = child.finish();
    assert_eq!(output.status, expected.status);
    assert_eq!(output.stdout, expected.stdout);
}

#[test]
fn threads_bring_a_program_home() {
    conet_testkit::privileged!();
    comes_home_for(
        "import threading, time; time.sleep(0.4); r = []
t = threading.Thread(target=lambda: r.append(42)); t.start(); t.join(); time.sleep(0.1); print(r)",
        "clone",
    );
}

#[test]
fn a_call_outside_the_table_brings_a_program_home() {
    conet_testkit::privileged!();
    comes_home_for(
        "import mmap, time; time.sleep(0.4); m = mmap.mmap(-1, 8192); m[0] = 7; time.sleep(0.1); print(m[0])",
        "mmap",
    );
}

#[test]
fn a_fault_happens_at_home() {
    conet_testkit::privileged!();
    comes_home_for("import ctypes, time; time.sleep(0.5); ctypes.string_at(8)", "fault");
}

#[test]
fn a_handled_signal_waits_for_the_program() {
    conet_testkit::privileged!();
    let script = "
import signal, time
signal.signal(signal.SIGUSR1, lambda *_: print('handled', flush=True))
for i in range(30): time.sleep(0.05)
print('end')
";
    let mut node = Node::new();
    let (child, away) = away(&mut node, &python(), &["-c", script]);
    Command::new("kill").args(["-USR1", &child.id().to_string()]).status().unwrap();
    thread::sleep(Duration::from_millis(100));
    // Whoever watches (the daemon) sees it pending, and brings the program home.
    let seen = conet_deputy_link::view(as_pid(child.id())).unwrap();
    assert_eq!(seen.handled_pending, 1 << 9);
    away.bring_home(child.id()).unwrap();
    let output = child.finish();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "handled\nend\n");
    assert!(output.status.success());
}

#[test]
fn a_signal_that_ends_the_home_process_ends_the_remote() {
    conet_testkit::privileged!();
    for signal in ["-TERM", "-KILL"] {
        let mut node = Node::new();
        let (mut child, away) = away(&mut node, "awk", &[BUSY]);
        Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        let took = wait_until("the remote's end", || !exists(away.hosted.remote_pid));
        assert!(took < Duration::from_secs(1), "{took:?}");
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(if signal == "-TERM" { 15 } else { 9 }));
        wait_until("the warden's end", || !exists(away.hosted.warden_pid));
    }
}

#[test]
fn a_killed_remote_ends_the_home_process_with_a_reason() {
    conet_testkit::privileged!();
    let mut node = Node::new();
    let (mut child, away) = away(&mut node, "awk", &[BUSY]);
    Command::new("kill").args(["-KILL", &away.hosted.remote_pid.to_string()]).status().unwrap();
    let mut last = None;
    let took = wait_until("the process's end", || {
        last = status_of(child.id()).or(last);
        child.try_wait().unwrap().is_some()
    });
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    let last = last.unwrap();
    assert_eq!((last.phase, mover::fault_name(last.fault)), (phase::LOST, "the link ended"));
}

#[test]
fn a_forged_record_ends_the_process_and_runs_no_call() {
    conet_testkit::privileged!();
    for forgery in [Forgery::Replay, Forgery::Alter, Forgery::Insert] {
        let mut node = Node::new();
        let relay = Relay::start(node.address(), forgery);
        let script = "import os, time
for i in range(200): time.sleep(0.02); os.write(1, b'%d\\n' % i)";
        let mut child = start(&python(), &["-c", script]);
        thread::sleep(Duration::from_millis(150));
        let _away = node.take_through(child.id(), relay.address).unwrap();
        let before = relay.passed.load(std::sync::atomic::Ordering::SeqCst);
        wait_until("some calls", || {
            relay.passed.load(std::sync::atomic::Ordering::SeqCst) > before + 500
        });
        relay.interfere();
        let mut last = None;
        wait_until("the process's end", || {
            last = status_of(child.id()).or(last);
            child.try_wait().unwrap().is_some()
        });
        assert_eq!(child.wait().unwrap().signal(), Some(9), "{forgery:?}");
        let fault = mover::fault_name(last.unwrap().fault);
        assert_eq!(fault, "a forged or replayed record came", "{forgery:?}");
        let output = child.finish().stdout;
        let text = String::from_utf8(output).unwrap();
        // Every line once and in order: nothing ran twice.
        for (i, line) in text.lines().enumerate() {
            assert_eq!(line, i.to_string(), "{forgery:?}");
        }
    }
}

#[test]
fn a_capture_of_the_link_shows_no_memory_and_no_file() {
    conet_testkit::privileged!();
    const SECRET: &str = "xyzzy-plugh-colossal-cave-adventure";
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), SECRET.repeat(100)).unwrap();
    let script = format!(
        "import time
keep = '{SECRET}' * 50; time.sleep(0.3)
for i in range(5): time.sleep(0.05); n = len(open('{}').read())
print(n)",
        file.path().display()
    );
    let mut node = Node::new();
    let relay = Relay::start(node.address(), Forgery::Alter);
    let child = start(&python(), &["-c", &script]);
    thread::sleep(Duration::from_millis(150));
    let _away = node.take_through(child.id(), relay.address).unwrap();
    let output = child.finish();
    assert_eq!(output.stdout, format!("{}\n", SECRET.len() * 100).as_bytes());
    let captured = relay.capture();
    assert!(captured.len() > 1_000_000, "{}", captured.len());
    let needle = &SECRET.as_bytes()[..16];
    assert!(!captured.windows(needle.len()).any(|window| window == needle));
}

#[test]
fn a_coroutine_on_two_kibibytes_survives_a_thousand_calls() {
    conet_testkit::privileged!();
    let (_directory, program) = compiled("coroutine", &[]);
    let mut node = Node::new();
    let (child, away) = away(&mut node, &program, &[]);
    let output = child.finish();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "1000 calls, guards intact\n");
    assert!(output.status.success());
    drop(away);
}

#[test]
fn attacks_from_inside_are_refused() {
    conet_testkit::privileged!();
    let (_directory, program) = compiled("attack", &[]);
    // A jump to the agent's own system call instruction: the kernel ends it.
    let mut node = Node::new();
    let (child, _) = away(&mut node, &program, &["jump"]);
    let output = child.finish();
    assert_eq!(output.status.signal(), Some(9));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    // Unmapping, remapping or unprotecting the agent fails, and the program goes on.
    let (child, _) = away(&mut node, &program, &["unmap"]);
    let output = child.finish();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "refused\n");
    assert!(output.status.success());
    // A 32-bit call is not run remotely: it takes the program home.
    let (child, _) = away(&mut node, &program, &["int80"]);
    let pid = child.id();
    let status = wait_home(pid);
    let output = child.finish();
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{pid}\n"));
    assert_eq!(status.reason, 3, "{status:?}");
}

#[test]
fn a_bad_pointer_is_efault_and_no_crash() {
    conet_testkit::privileged!();
    let (_directory, program) = compiled("pointers", &[]);
    let expected = unmoved(&program, &[]);
    let mut node = Node::new();
    let (child, _) = away(&mut node, &program, &[]);
    let output = child.finish();
    assert_eq!(String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&expected.stdout));
    assert_eq!(output.status, expected.status);
}

#[test]
fn a_host_that_fails_leaves_the_process_at_home() {
    conet_testkit::privileged!();
    let mut node = Node::new();
    let mut child = start("awk", &["BEGIN { for (i = 0; i < 20000000; i++) s += i; print s }"]);
    thread::sleep(Duration::from_millis(100));
    let (_line, end) = conet_deputy_link::family::Line::new().unwrap();
    // Wrong keys: the other side refuses HELLO.
    let (home, _) = node.secrets();
    let (_, other) = node.secrets();
    let host = node.host(child.id(), other);
    let stream = std::net::TcpStream::connect(node.address()).unwrap();
    let how = How::default();
    let error = mover::move_out(as_pid(child.id()), stream, home, POLICY, how, &end).unwrap_err();
    assert!(matches!(error, MoveError::Channel(_)), "{error}");
    assert!(host.join().unwrap().is_err());
    // Somebody who accepts, reads for a while and hangs up, at several lengths.
    for bytes in [0usize, 100, 5000, 300_000, 2_000_000] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let reader = thread::spawn(move || {
            let (mut link, _) = listener.accept().unwrap();
            let mut sink = vec![0; bytes.max(1)];
            std::io::Read::read(&mut link, &mut sink).ok();
        });
        let (home, _) = node.secrets();
        let stream = std::net::TcpStream::connect(address).unwrap();
        assert!(mover::move_out(as_pid(child.id()), stream, home, POLICY, how, &end).is_err());
        reader.join().unwrap();
        assert!(exists(child.id()));
    }
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", child.id())).unwrap();
    assert!(!maps.contains("200000000000-"), "{maps}");
    assert!(child.wait().unwrap().success());
}

#[test]
fn locks_have_their_reasons() {
    conet_testkit::privileged!();
    let (_directory, program) = compiled("locks", &["-pthread"]);
    for (case, code) in [
        ("none", None),
        ("shared", Some("shared-mapping")),
        ("threads", Some("threads")),
        ("mlock", Some("mlock")),
        ("io_uring", Some("io_uring")),
        ("seccomp", Some("seccomp")),
        ("realtime", Some("real-time")),
    ] {
        let mut child = start(&program, &[case]);
        thread::sleep(Duration::from_millis(150));
        let policy = Policy { allow_root: true, is_deputy: false, started: None };
        let found = locks(as_pid(child.id()), policy).unwrap();
        let codes: Vec<_> = found.iter().map(|lock| lock.code()).collect();
        match code {
            None => assert!(codes.is_empty(), "{codes:?}"),
            Some(code) => assert!(codes.contains(&code), "{case}: {codes:?}"),
        }
        let strict = locks(as_pid(child.id()), Policy::default()).unwrap();
        assert!(strict.iter().any(|lock| lock.code() == "privileged"), "{strict:?}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn a_program_without_a_free_descriptor_stays_at_home() {
    conet_testkit::privileged!();
    let script = "
import os, time, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
fds = []
try:
    while True: fds.append(os.dup(1))
except OSError: pass
print(len(fds) > 3, flush=True); time.sleep(1); print('end')
";
    let expected = unmoved(&python(), &["-c", script]);
    let mut node = Node::new();
    let child = start(&python(), &["-c", script]);
    thread::sleep(Duration::from_millis(300));
    assert!(node.take(child.id()).is_err());
    assert_eq!(child.finish().stdout, expected.stdout);
}

#[test]
fn a_program_without_proc_stays_at_home() {
    conet_testkit::privileged!();
    let (directory, program) = compiled("state", &["-static"]);
    let root = directory.path().to_str().unwrap();
    let child = start("chroot", &[root, "/state", "40"]);
    thread::sleep(Duration::from_millis(300));
    let mut node = Node::new();
    let error = node.take(child.id()).err().unwrap();
    assert!(error.to_string().contains("/proc/self/maps"), "{error}");
    let expected = unmoved(&program, &["40"]);
    let output = child.finish();
    assert_eq!((output.status, output.stdout), (expected.status, expected.stdout));
}

#[test]
fn a_breakpoint_is_met_at_home() {
    conet_testkit::privileged!();
    let (_directory, program) = compiled("breakpoint", &[]);
    let mut node = Node::new();
    let (child, _) = away(&mut node, &program, &[]);
    let output = child.finish();
    assert_eq!(output.status.signal(), Some(5));
}

/// The bell stopped ringing when the deputy had asked, though the frame was not there
/// yet: a program that made no calls then stayed away for good.
#[test]
fn the_bell_rings_until_the_image_comes() {
    conet_testkit::privileged!();
    let child = start("awk", &[BUSY]);
    thread::sleep(Duration::from_millis(100));
    let mut node = Node::new();
    for i in 0..40 {
        let away = node.take(child.id()).unwrap();
        thread::sleep(Duration::from_millis(i % 4 * 5));
        let returned = away.bring_home(child.id()).unwrap();
        assert!(returned.total < Duration::from_secs(5), "{returned:?}");
    }
}

/// A call that a handled signal interrupts ends with EINTR, also where the signal has to
/// fetch the program first; it was once begun anew, and waited for ever.
#[test]
fn an_interrupt_ends_a_call_that_waits_away() {
    conet_testkit::privileged!();
    let script = "
import os, signal, time
r, w = os.pipe()
print('ready', flush=True)
try: os.read(r, 1)
except KeyboardInterrupt: print('interrupted', flush=True)
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.pause()
print('woken')
";
    let mut node = Node::new();
    let (child, away) = away(&mut node, &python(), &["-c", script]);
    let kill = |signal: &str| {
        Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        thread::sleep(Duration::from_millis(50));
    };
    // In a call that waits, it is there a moment later still.
    let waits_in = |call: &str| {
        let look = || {
            let text = std::fs::read_to_string(format!("/proc/{}/syscall", child.id()));
            text.ok().filter(|text| text.starts_with(call))
        };
        wait_until("waiting", || {
            let before = look();
            thread::sleep(Duration::from_millis(50));
            before.is_some() && before == look()
        });
    };
    waits_in("0 "); // read
    kill("-INT");
    away.bring_home(child.id()).unwrap();
    waits_in("34 "); // pause
    let away = node.take(child.id()).unwrap();
    kill("-USR1");
    away.bring_home(child.id()).unwrap();
    let output = child.finish();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "ready\ninterrupted\nwoken\n");
    assert!(output.status.success());
}
