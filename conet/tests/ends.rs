//! Ends, signals and lost halves: whatever dies, nothing is left running, and
//! nothing that should run on is lost.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use common::{
    CONET, Lab, Program, Said, Shared, exists, migrate, python, row, rows, signal, state, take_out,
    wait_until,
};
use conet_testkit::Need;
use rustix::process::Signal;

const SOON: Duration = Duration::from_secs(5);
const SECOND: Duration = Duration::from_secs(1);

/// Computes and prints until its first argument exists.
const COUNT: &str = "
import os, sys
n = 0
while not os.path.exists(sys.argv[1]):
    for k in range(200000): pass
    n += 1
    print(n, flush=True)
print('end', flush=True)
sys.exit(6)
";
/// Computes without calls.
const COMPUTE: &str = "
import os
print('begin', flush=True)
while True: pass
";

fn run(lab: &Lab, script: &str, argument: &str) -> (Program, u32, Said) {
    let mut program = lab.run(&[&python(), "-c", script, argument]);
    let (pid, said) = (program.pid(), Said::by(&mut program));
    wait_until("its first line", SOON, || said.text().contains('\n'));
    (program, pid, said)
}

#[test]
fn a_killed_remote_ends_the_program_with_a_reason() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    let read = "
import os
print('begin', flush=True)
r, w = os.pipe()
os.read(r, 1)
";
    let sleep = "
import time
print('begin', flush=True)
time.sleep(100)
";
    for script in [COMPUTE, read, sleep] {
        let (mut program, pid, _said) = run(&lab, script, "");
        let remote = take_out(pid);
        std::thread::sleep(Duration::from_millis(300));
        signal(remote, Signal::KILL);
        let status = program.status_within(SOON);
        assert_eq!(status.signal(), Some(9), "{script}");
        let row = row(pid);
        assert_eq!(row["place"], "ended", "{row}");
        let code = row["reason"]["code"].as_str().unwrap();
        assert!(["lost", "remote-ended"].contains(&code), "{row}");
    }
    // The same when nobody is there to hear of it.
    let (mut program, pid, _said) = run(&lab, read, "");
    let remote = take_out(pid);
    Lab::kill_daemon("conet-h1");
    signal(remote, Signal::KILL);
    Lab::restart("conet-h1");
    let status = program.status_within(2 * SOON);
    assert_eq!(status.signal(), Some(9));
    assert!(row(pid)["reason"]["sentence"].is_string(), "{}", row(pid));
}

#[test]
fn a_killed_program_leaves_no_remote() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    for how in [Signal::KILL, Signal::TERM] {
        let (mut program, pid, _said) = run(&lab, COMPUTE, "");
        let remote = take_out(pid);
        assert!(exists(remote));
        signal(pid, how);
        wait_until("the remote's end", SECOND, || !exists(remote));
        assert_eq!(program.status_within(SECOND).signal(), Some(how.as_raw()));
        wait_until("the record's end", SECOND, || row(pid)["place"] == "ended");
    }
}

#[test]
fn stops_and_handled_signals_reach_a_program_that_is_away() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    let (mut program, pid, _said) = run(&lab, COMPUTE, "");
    let remote = take_out(pid);
    for _ in 0..3 {
        signal(pid, Signal::STOP);
        wait_until("the remote's stop", SECOND, || state(remote) == Some('T'));
        signal(pid, Signal::CONT);
        wait_until("the remote's going on", SECOND, || state(remote) == Some('R'));
    }
    // What was sent while no daemon looked is made up for.
    signal(pid, Signal::STOP);
    wait_until("the remote's stop", SECOND, || state(remote) == Some('T'));
    Lab::kill_daemon("conet-h1");
    signal(pid, Signal::CONT);
    Lab::restart("conet-h1");
    wait_until("the remote's going on", SOON, || state(remote) == Some('R'));
    migrate(pid, "home");
    signal(pid, Signal::TERM);
    assert_eq!(program.status_within(SECOND).signal(), Some(15));

    let handled = "
import os, signal, sys
def handler(number, frame): print('handled', number, flush=True)
signal.signal(signal.SIGUSR1, handler)
print('begin', flush=True)
try:
    while not os.path.exists(sys.argv[1]):
        for k in range(100000): pass
except KeyboardInterrupt:
    print('interrupted', flush=True)
    sys.exit(8)
";
    let (mut program, pid, said) = run(&lab, handled, "/nonexistent");
    take_out(pid);
    signal(pid, Signal::USR1);
    said.wait_for("handled 10");
    wait_until("being at home", SECOND, || row(pid)["place"] == "home");
    assert_eq!(row(pid)["reason"]["code"], "signal", "{}", row(pid));
    take_out(pid);
    signal(pid, Signal::INT);
    assert_eq!(program.status_within(SOON).code(), Some(8));
    assert_eq!(said.text(), "begin\nhandled 10\ninterrupted\n");
}

#[test]
fn a_program_outlives_either_daemon() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    let end = Shared::new("end");
    let (mut program, pid, said) = run(&lab, COUNT, end.path());
    for host in ["conet-h1", "conet-h2"] {
        let remote = take_out(pid);
        Lab::kill_daemon(host);
        for _ in 0..5 {
            said.wait_for_more();
        }
        assert!(exists(remote));
        Lab::restart(host);
        let row = row(pid);
        assert_eq!(row["place"], "away", "{row}");
        assert_eq!(row["remote_pid"], remote, "{row}");
        migrate(pid, "home");
        said.wait_for_more();
        take_out(pid);
        said.wait_for_more();
        migrate(pid, "home");
    }
    // Also at home.
    Lab::kill_daemon("conet-h1");
    said.wait_for_more();
    Lab::restart("conet-h1");
    assert_eq!(row(pid)["place"], "home");
    take_out(pid);
    end.create();
    assert_eq!(program.status_within(SOON).code(), Some(6));
    wait_until("all output", SECOND, || said.text().ends_with("end\n"));
    let lines = said.text();
    let count = lines.lines().count() - 1;
    let expected: String = (1..=count).map(|n| format!("{n}\n")).collect();
    assert_eq!(lines, expected + "end\n");
    assert_eq!(row(pid)["hops_done"], 9, "{}", row(pid));
    assert_eq!(row(pid)["sent_home"], 0);
    let ended = row(pid);
    Lab::restart("conet-h1");
    assert_eq!(row(pid), ended, "the record outlives the daemon");
}

#[test]
fn run_moves_where_it_is_told_and_ps_forgets_who_never_moved() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    let end = Shared::new("end");
    let mut program = lab.run_with(&["--node", "conet-h2"], &[&python(), "-c", COUNT, end.path()]);
    let (pid, said) = (program.pid(), Said::by(&mut program));
    wait_until("being there", SOON, || row(pid)["place"] == "away");
    assert_eq!(row(pid)["node"], "conet-h2");
    said.wait_for_more();
    // It is looked at now and then: what it did since the last look is not counted at its end.
    let calls = || row(pid)["calls_forwarded"].as_u64().unwrap();
    wait_until("calls that are counted", SOON, || calls() > 0);
    end.create();
    assert_eq!(program.status_within(SOON).code(), Some(6));
    wait_until("the record's end", SECOND, || row(pid)["place"] == "ended");
    assert!(calls() > 0);

    let unmoved = lab.run(&["true"]).finish();
    assert!(unmoved.status.success());
    wait_until("being forgotten", SECOND, || rows().len() == 1);

    let error = common::failed(&lab.command(&["--node", "conet-h7"], &["true"]).output().unwrap());
    assert!(error.contains("no peer is called conet-h7"), "{error}");
    assert!(CONET.starts_with('/'));
}
