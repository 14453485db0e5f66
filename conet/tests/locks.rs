//! What keeps a program at home, or brings it home, and how that is told.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use common::{
    CONET, Lab, Said, Shared, compiled, failed, migrate, ok, python, reconfigure, row, rows,
    take_out, try_migrate, wait_until, why,
};
use conet_testkit::Need;

const SOON: Duration = Duration::from_secs(5);

/// Runs a Python script that waits until its first argument exists, does something,
/// and goes on until the second does. Moved out before: it must have come home for
/// `code`, and have printed and returned what it does unmoved.
#[track_caller]
fn comes_home(lab: &Lab, what: &str, code: &str, sentence: &str) {
    let script = format!(
        "
import os, sys, threading, time
def wait(name):
    while not os.path.exists(name): time.sleep(0.01)
print('begin', flush=True)
wait(sys.argv[1])
{what}
print('done', flush=True)
wait(sys.argv[2])
sys.exit(3)
"
    );
    let (python, go, end) = (python(), Shared::new("go"), Shared::new("end"));
    let command = [python.as_str(), "-c", &script, go.path(), end.path()];
    let mut program = lab.run(&command);
    let (pid, said) = (program.pid(), Said::by(&mut program));
    said.wait_for("begin");
    take_out(pid);
    go.create();
    said.wait_for("done");
    wait_until("being at home", SOON, || row(pid)["place"] == "home");
    let home = row(pid);
    assert_eq!(home["hops_done"], 2, "{home}");
    assert_eq!(home["sent_home"], 1, "{home}");
    assert_eq!(home["reason"]["code"], code, "{home}");
    let told = home["reason"]["sentence"].as_str().unwrap();
    assert!(told.contains(sentence), "{told}");
    // With what it did behind it, it may go again.
    take_out(pid);
    migrate(pid, "home");
    end.create();
    let status = program.status_within(SOON);
    let expected = Command::new(command[0]).args(&command[1..]).output().unwrap();
    assert_eq!(status, expected.status);
    assert_eq!(said.text(), ok_text(&expected.stdout));
    assert_eq!(row(pid)["hops_done"], 4);
}

fn ok_text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn threads_and_other_calls_bring_a_program_home() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    let threads = "
found = []
ts = [threading.Thread(target=lambda i=i: found.append(i)) for i in range(3)]
for t in ts: t.start()
for t in ts: t.join()
print(sorted(found))";
    comes_home(&lab, threads, "call", "clone");
    let other = "print(os.sched_setaffinity(0, os.sched_getaffinity(0)))";
    comes_home(&lab, other, "call", "sched_setaffinity");
}

/// Starts a program that waits, and gives what `conet why` says of it.
#[track_caller]
fn stays(lab: &Lab, command: &[&str], expected: &str) {
    let program = lab.run(command);
    let pid = program.pid();
    let mut reasons = Vec::new();
    wait_until(expected, SOON, || {
        reasons = why(pid);
        reasons.iter().any(|reason| reason.starts_with(expected))
    });
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    let error = failed(&try_migrate(pid, "conet-h2"));
    let sentence = reasons[0].split_once(": ").unwrap().1;
    assert!(error.contains(sentence), "{error}");
    assert_eq!(row(pid)["place"], "home");
}

/// A program of 32 bits that waits: ELF header, one segment, and
/// `1: mov $29, %eax (pause); int $0x80; jmp 1b`.
fn elf32() -> Shared {
    let mut bytes = b"\x7fELF\x01\x01\x01".to_vec();
    bytes.resize(16, 0);
    let word = |bytes: &mut Vec<u8>, value: u32| bytes.extend_from_slice(&value.to_le_bytes());
    // ET_EXEC, EM_386; version; entry; program header; no sections; flags.
    for value in [0x0003_0002, 1, 0x0804_8054, 52, 0, 0] {
        word(&mut bytes, value);
    }
    for half in [52u16, 32, 1, 0, 0, 0] {
        bytes.extend_from_slice(&half.to_le_bytes());
    }
    for value in [1, 0, 0x0804_8000, 0x0804_8000, 0x5d, 0x5d, 5, 0x1000] {
        word(&mut bytes, value);
    }
    bytes.extend_from_slice(&[0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7]);
    let file = Shared::with("elf32", &bytes);
    fs::set_permissions(&file.0, fs::Permissions::from_mode(0o755)).unwrap();
    file
}

#[test]
fn why_names_what_keeps_a_program_at_home() {
    conet_testkit::privileged!(Need::Tun, Need::Program("cc"));
    let lab = Lab::up("wireguard");
    let program = compiled("locks", &["-w", "-pthread"]);
    for (what, code) in [
        ("shared", "shared-mapping: it has a writable mapping that others share"),
        ("threads", "threads: it has 2 threads"),
        ("io_uring", "io_uring: it has io_uring open"),
        ("mlock", "mlock: it has locked"),
        ("seccomp", "seccomp:"),
        ("realtime", "real-time:"),
    ] {
        stays(&lab, &[program.path(), what], code);
    }
    let elf32 = elf32();
    stays(&lab, &[elf32.path()], "32-bit: it is a 32-bit program");
    assert!(why(lab.run(&["sleep", "60"]).pid()).is_empty());
    reconfigure("conet-h1", "s/allow_root = true/allow_root = false/");
    stays(&lab, &["sleep", "60"], "privileged: it runs as root");
}

#[test]
fn a_program_of_another_user_moves_for_that_user_only() {
    conet_testkit::privileged!(Need::Tun, Need::Program("awk"), Need::Program("setpriv"));
    let lab = Lab::up("wireguard");
    reconfigure("conet-h1", "s/allow_root = true/allow_root = false/");
    let as_user = |uid: &str, command: &[&str]| {
        let drop = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups"];
        Lab::exec("conet-h1", &[&drop, command].concat())
    };
    let script = "BEGIN { while (1) { s++; if (s % 300000 == 0) { print s; fflush() } } }";
    let mut user = Command::new(CONET);
    user.args(["lab", "exec", "conet-h1", "--", "setpriv", "--reuid", "1000", "--regid", "1000"]);
    user.args(["--clear-groups", CONET, "run", "--", "awk", script]);
    user.stdout(std::process::Stdio::piped());
    let mut program = common::Program(Some(user.spawn().unwrap()));
    let (pid, said) = (program.pid(), Said::by(&mut program));
    said.wait_for("300000");
    let root = lab.run(&["sleep", "60"]);
    let listed = |uid: &str| {
        let rows = common::json(&ok(&as_user(uid, &[CONET, "ps", "--json"])));
        let rows = rows["processes"].as_array().unwrap().clone();
        rows.iter().map(|row| u32::try_from(row["pid"].as_u64().unwrap()).unwrap()).collect()
    };
    let (own, others): (Vec<u32>, Vec<u32>) = (listed("1000"), listed("1001"));
    assert_eq!(own, [pid]);
    assert!(others.is_empty(), "{others:?}");
    assert_eq!(rows().len(), 2, "root sees both");
    let move_as = |uid: &str, pid: u32, to: &str| {
        as_user(uid, &[CONET, "migrate", "--json", &pid.to_string(), to])
    };
    for (uid, pid) in [("1001", pid), ("1000", root.pid())] {
        let error = failed(&move_as(uid, pid, "conet-h2"));
        assert!(error.contains("is not one of yours"), "{error}");
        let error = failed(&as_user(uid, &[CONET, "why", &pid.to_string()]));
        assert!(error.contains("is not one of yours"), "{error}");
    }
    for _ in 0..2 {
        let moved = common::json(&ok(&move_as("1000", pid, "conet-h2")));
        let remote = u32::try_from(moved["remote_pid"].as_u64().unwrap()).unwrap();
        assert!(common::exists(remote));
        said.wait_for_more();
        let error = failed(&move_as("1001", pid, "home"));
        assert!(error.contains("is not one of yours"), "{error}");
        ok(&move_as("1000", pid, "home"));
        said.wait_for_more();
    }
    assert_eq!(row(pid)["hops_done"], 4);
}

#[test]
fn a_peer_without_the_grant_or_with_another_key_is_refused() {
    conet_testkit::privileged!(Need::Tun);
    let lab = Lab::up("wireguard");
    let program = lab.run(&["sleep", "60"]);
    let pid = program.pid();
    let refused = |with: &str| {
        let error = failed(&try_migrate(pid, "conet-h2"));
        assert!(error.contains(with), "{error}");
        assert_eq!(row(pid)["place"], "home");
    };
    let error = failed(&try_migrate(pid, "conet-h9"));
    assert!(error.contains("no peer is called conet-h9"), "{error}");

    reconfigure("conet-h1", "s/^host_for_us = .*/host_for_us = []/");
    refused("conet-h2 may not run processes of this node");
    reconfigure("conet-h1", "s/^host_for_us = .*/host_for_us = [\"conet-h2\"]/");
    take_out(pid);
    migrate(pid, "home");

    // The other side does not rely on it.
    reconfigure("conet-h2", "s/^guests_from = .*/guests_from = []/");
    refused("conet-h2 does not host");
    let log = fs::read_to_string("/run/conet-lab/conet-h2.log").unwrap();
    assert!(log.contains("not in guests_from"), "{log}");
    reconfigure("conet-h2", "s/^guests_from = .*/guests_from = [\"conet-h1\"]/");
    take_out(pid);
    migrate(pid, "home");

    // In the clear only where both say so.
    reconfigure("conet-h1", "s/^host_for_us = .*/&\\nplain_links = [\"conet-h2\"]/");
    refused("it takes no link in the clear");
    reconfigure("conet-h2", "s/^host_for_us = .*/&\\nplain_links = [\"conet-h1\"]/");
    take_out(pid);
    migrate(pid, "home");

    let key =
        ok(&Lab::exec("conet-h2", &["sh", "-c", &format!("{CONET} keygen | {CONET} pubkey")]));
    reconfigure("conet-h2", &format!("s|^public_key = .*|public_key = \"{}\"|", key.trim()));
    refused("conet-h2");
}

/// The kernel shows room for AMX's tiles in every process, and only those that have asked may
/// fill it. Without AMX the request fails, and both programs move.
#[test]
fn on_a_processor_with_amx_only_those_that_asked_for_it_stay() {
    conet_testkit::privileged!(Need::Tun);
    let lab = Lab::up("wireguard");
    let plain = lab.run(&["sleep", "60"]);
    take_out(plain.pid());
    migrate(plain.pid(), "home");
    // ARCH_REQ_XCOMP_PERM of tile data (Linux 5.16).
    let script = "
import ctypes, time
print('asked', ctypes.CDLL(None).syscall(158, 0x1023, 18), flush=True)
time.sleep(60)
";
    let mut asking = lab.run(&[&python(), "-c", script]);
    let (pid, said) = (asking.pid(), Said::by(&mut asking));
    wait_until("its answer", SOON, || said.text().contains('\n'));
    if said.text().starts_with("asked 0") {
        let error = failed(&try_migrate(pid, "conet-h2"));
        assert!(error.contains("(AMX)"), "{error}");
        assert_eq!(row(pid)["place"], "home");
    } else {
        take_out(pid);
    }
}
