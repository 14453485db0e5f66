//! Whole labs, by the built program, in the running kernel.
//!
//! One at a time: a machine has one lab, and `conet lab down` removes whatever
//! lab there is. So a [`Lab`] removes only what its own `lab up` made: where a lab
//! of somebody else's is up, `lab up` refuses, the test fails, and that lab stays.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{CONET, Lab, conet, failed, json, nothing_remains, ok};
use conet_testkit::Need;
use conet_testkit::privileged::exclusive;
use serde_json::Value;

fn in_guest(guest: &str, command: &[&str]) -> Output {
    Command::new("ip").args(["netns", "exec", guest]).args(command).output().unwrap()
}

/// Names, addresses, ping and iperf3 both ways, and what the LAN carries.
fn carries_packets(mode: &str, carrier: &str) {
    let _lab = Lab::up(mode);
    let status = json(&ok(&conet(&["lab", "status", "--json"])));
    assert_eq!(status["mode"], mode);
    for (index, number) in [(0, 1), (1, 2)] {
        let host = &status["hosts"][index];
        let name = format!("conet-h{number}");
        assert_eq!(host["name"], name.as_str());
        assert_eq!(host["address"], format!("192.0.2.{number}"));
        assert_eq!(host["overlay"], format!("10.77.{number}.0/24"));
        assert_eq!(host["peers_up"], 1);
        assert_eq!(host["guests"][0]["name"], format!("{name}-g1"));
        assert_eq!(host["guests"][0]["address"], format!("10.77.{number}.2"));
        let read = Lab::exec(&name, &["sh", "-c", "uname -n; cat /tmp/marker"]);
        assert_eq!(ok(&read), format!("{name}\n{name}\n"));
    }
    // Each packet as it comes: a block of them is kept back for a second.
    let mut dump = Command::new("tcpdump")
        .args(["-n", "-i", "conet-lan", "--immediate-mode", "-U", "-w", "-", "not", "arp"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(dump.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("listening on") {
        line.clear();
        assert_ne!(said.read_line(&mut line).unwrap(), 0, "tcpdump does not listen");
    }
    let clear = "636f6e657420696e20636c656172";
    for (from, to) in [("conet-h1-g1", "10.77.2.2"), ("conet-h2-g1", "10.77.1.2")] {
        ok(&in_guest(from, &["ping", "-c", "5", "-i", "0.05", "-p", clear, "-s", "200", to]));
    }
    std::thread::sleep(Duration::from_secs(1));
    let pid = rustix::process::Pid::from_child(&dump);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let seen = dump.wait_with_output().unwrap().stdout;
    let shown = read_capture(&seen);
    assert!(shown.lines().count() >= 20, "{shown}");
    for line in shown.lines() {
        assert!(line.contains("192.0.2.1") && line.contains("192.0.2.2"), "{line}");
    }
    assert!(shown.contains(carrier), "{shown}");
    let in_clear = seen.windows(14).filter(|bytes| *bytes == b"conet in clear").count();
    // In the clear it must be found: that is how it is known that looking finds it.
    assert_eq!(in_clear == 0, mode == "wireguard", "{in_clear} times in {mode}");

    for reverse in [&[][..], &["-R"]] {
        let mut server = Command::new("ip")
            .args(["netns", "exec", "conet-h2-g1", "iperf3", "-s", "-1"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let client = [&["iperf3", "-J", "-t", "1", "-c", "10.77.2.2"], reverse].concat();
        let report = json(&ok(&in_guest("conet-h1-g1", &client)));
        assert!(report["end"]["sum_received"]["bytes"].as_u64().unwrap() > 1 << 20);
        assert!(server.wait().unwrap().success());
    }
}

/// What is no message of any kind, sent to a host's tunnel.
#[test]
fn dropped_packets_are_told_by_their_reason() {
    conet_testkit::privileged!(Need::Tun, Need::Program("bash"));
    let _lab = Lab::up("wireguard");
    let send = "for i in 1 2 3; do echo zeros > /dev/udp/192.0.2.2/51820; done";
    ok(&Lab::exec("conet-h1", &["bash", "-c", send]));
    let began = std::time::Instant::now();
    loop {
        let status =
            json(&ok(&Lab::exec("conet-h2", &[env!("CARGO_BIN_EXE_conet"), "status", "--json"])));
        if status["drops"]["malformed"] == 3 {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{status}");
        std::thread::sleep(Duration::from_millis(100));
    }
    let shown = ok(&Lab::exec("conet-h2", &[env!("CARGO_BIN_EXE_conet"), "status"]));
    assert!(shown.contains("malformed 3"), "{shown}");
    let peers =
        json(&ok(&Lab::exec("conet-h2", &[env!("CARGO_BIN_EXE_conet"), "peers", "--json"])));
    assert_eq!(peers["peers"][0]["path_mtu"], 1500, "{peers}");
}

/// tcpdump's own words for what it wrote, outer headers only.
fn read_capture(bytes: &[u8]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let read = Command::new("tcpdump").args(["-n", "-t", "-r"]).arg(file.path()).output().unwrap();
    ok(&read)
}

#[test]
fn wireguard_carries_packets_and_shows_none() {
    conet_testkit::privileged!(
        Need::Tun,
        Need::Program("ping"),
        Need::Program("iperf3"),
        Need::Program("tcpdump")
    );
    carries_packets("wireguard", "UDP");
}

#[test]
fn ipip_carries_packets_between_host_addresses() {
    conet_testkit::privileged!(
        Need::Tun,
        Need::Program("ping"),
        Need::Program("iperf3"),
        Need::Program("tcpdump")
    );
    carries_packets("ipip", "IP 10.77.");
}

/// In the kernel where doctor says that it can be, else by raw sockets and with a reason.
#[test]
fn ipip_says_where_it_is_carried() {
    conet_testkit::privileged!(Need::Tun, Need::Program("ping"));
    let _lab = Lab::up("ipip");
    let report = json(&conet_stdout(&["doctor", "--json"]));
    let checks = report["checks"].as_array().unwrap();
    let ebpf = checks.iter().find(|check| check["name"] == "ebpf").unwrap();
    let ask = |what| json(&ok(&Lab::exec("conet-h1", &[CONET, what, "--json"])));
    let status = ask("status");
    let shown = ok(&Lab::exec("conet-h1", &[CONET, "status"]));
    if ebpf["state"] != "ok" {
        assert!(status["ipip"].as_str().unwrap().starts_with("raw sockets: "), "{status}");
        assert!(shown.contains("by raw sockets: "), "{shown}");
        return;
    }
    assert_eq!(status["ipip"], "kernel", "{status}");
    assert!(shown.contains("by kernel"), "{shown}");
    let began = Instant::now();
    while ask("peers")["peers"][0]["in_kernel"] != true {
        assert!(began.elapsed() < Duration::from_secs(30));
        ok(&in_guest("conet-h1-g1", &["ping", "-c", "1", "-W", "5", "10.77.2.2"]));
    }
    ok(&in_guest("conet-h1-g1", &["ping", "-c", "2", "-W", "5", "10.77.2.2"]));
    assert!(ok(&Lab::exec("conet-h1", &[CONET, "peers"])).contains("in the kernel"));
}

#[test]
fn ip_udp_carries_packets_between_host_addresses() {
    conet_testkit::privileged!(
        Need::Tun,
        Need::Program("ping"),
        Need::Program("iperf3"),
        Need::Program("tcpdump")
    );
    carries_packets("ip-udp", "UDP");
}

#[test]
fn a_second_lab_is_refused_and_the_first_stays() {
    conet_testkit::privileged!(Need::Tun);
    let _lab = Lab::up("wireguard");
    let error = failed(&conet(&["lab", "up"]));
    assert_eq!(error.trim_end(), "conet: a lab is up already; remove it with: conet lab down");
    let report = json(&conet_stdout(&["demo", "--json"]));
    assert_eq!(report["ok"], false);
    assert_eq!(json(&ok(&conet(&["lab", "status", "--json"])))["hosts"][1]["peers_up"], 1);
}

fn conet_stdout(arguments: &[&str]) -> String {
    String::from_utf8(conet(arguments).stdout).unwrap()
}

#[test]
fn run_has_the_pid_that_the_shell_knows_and_a_user_sees_its_own() {
    conet_testkit::privileged!(Need::Tun);
    let _lab = Lab::up("wireguard");
    let mut program = Command::new(CONET)
        .args(["lab", "exec", "conet-h1", "--", CONET, "run", "--", "sleep", "60"])
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let listed = loop {
        let rows = json(&ok(&Lab::exec("conet-h1", &[CONET, "ps", "--json"])));
        let row = rows["processes"].as_array().unwrap().first().cloned();
        match row.filter(|row| row["command"] == "sleep") {
            Some(row) => break row,
            None => assert!(Instant::now() < deadline, "{rows}"),
        }
    };
    assert_eq!(listed["pid"], program.id());
    let as_other = |command: &[&str]| {
        let drop = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];
        Lab::exec("conet-h1", &[&drop, command].concat())
    };
    let rows = json(&ok(&as_other(&[CONET, "ps", "--json"])));
    assert_eq!(rows["processes"], Value::Array(Vec::new()));
    let pid = program.id().to_string();
    let error = failed(&as_other(&[CONET, "migrate", &pid, "conet-h2"]));
    assert!(error.contains("is not one of yours"), "{error}");
    let error = failed(&as_other(&[CONET, "down"]));
    assert!(error.contains("only root and members of group conet"), "{error}");
    program.kill().unwrap();
    program.wait().unwrap();
}

#[test]
fn a_killed_daemon_finds_its_guests_again() {
    conet_testkit::privileged!(Need::Tun, Need::Program("ping"));
    let _lab = Lab::up("wireguard");
    let before = Lab::daemon("conet-h1");
    let killed = common::as_pid(before);
    rustix::process::kill_process(killed, rustix::process::Signal::KILL).unwrap();
    ok(&conet(&["lab", "restart", "conet-h1"]));
    assert_ne!(Lab::daemon("conet-h1"), before);
    ok(&in_guest("conet-h1-g1", &["ping", "-c", "2", "-W", "5", "10.77.2.2"]));
    let log = std::fs::read_to_string("/run/conet-lab/conet-h1.log").unwrap();
    assert!(log.contains("adopted=true"), "{log}");
}

#[test]
fn a_lab_whose_state_is_lost_is_removed() {
    conet_testkit::privileged!(Need::Tun);
    let _lab = Lab::up("ipip");
    std::fs::remove_file("/run/conet-lab/lab.json").unwrap();
    ok(&conet(&["lab", "down"]));
    nothing_remains();
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    conet_testkit::privileged!(Need::Tun);
    let _alone = exclusive();
    let demo = Command::new(CONET)
        .args(["demo", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let pid = rustix::process::Pid::from_child(&demo);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = demo.wait_with_output().unwrap();
    let report = json(&String::from_utf8(output.stdout).unwrap());
    assert!(!output.status.success());
    assert_eq!(report["interrupted"], true, "{report}");
    nothing_remains();
}
