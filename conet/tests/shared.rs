//! The shared address in a lab: guests on the LAN under their host's address, and
//! ports of the host that lead to them.
//!
//! ```text
//! conet-h1-g1 ─ conet-h1 192.0.2.1 ─ LAN ─ conet-h2 192.0.2.2
//! ```
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use common::{
    CONET, Lab, conet, exists, failed, json, nothing_remains, ok, reconfigure, wait_until,
};
use conet_netsys::{Netns, NetnsName};
use conet_testkit::Need;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(20);
const H1: &str = "192.0.2.1";
const H2: &str = "192.0.2.2";

fn netns(name: &str) -> Netns {
    Netns::open(&NetnsName::new(name).unwrap()).unwrap()
}

fn forward(arguments: &[&str]) -> Output {
    Lab::exec("conet-h1", &[&[CONET, "forward"], arguments].concat())
}

fn rows() -> Vec<Value> {
    json(&ok(&forward(&["list", "--json"])))["forwards"].as_array().unwrap().clone()
}

fn row(text: &str) -> Value {
    rows().into_iter().find(|row| row["forward"] == text).unwrap_or_default()
}

fn ruleset() -> String {
    ok(&Lab::exec("conet-h1", &["nft", "list", "ruleset"]))
}

/// Rules, links, addresses and routes of the first host.
fn state() -> String {
    let shown = "nft list ruleset; ip -o link; ip -o address; ip route show table all; ip rule";
    // Counters and lifetimes are no state of ours.
    let text = ok(&Lab::exec("conet-h1", &["sh", "-c", shown]));
    text.lines().filter(|line| !line.contains("multicast")).collect::<Vec<_>>().join("\n")
}

fn listen(at: &str, port: u16) -> TcpListener {
    netns(at).run(|| TcpListener::bind(("0.0.0.0", port)).unwrap()).unwrap()
}

/// Whom a server in `at` on `port` takes a client in `from` for that asks `to`.
#[track_caller]
fn fetched(at: &str, port: u16, from: &str, to: (&str, u16)) -> IpAddr {
    let listener = listen(at, port);
    thread::scope(|scope| {
        let served = scope.spawn(|| {
            let (mut stream, peer) = listener.accept().unwrap();
            stream.write_all(&[7; 100_000]).unwrap();
            peer.ip()
        });
        let to = SocketAddr::new(to.0.parse().unwrap(), to.1);
        let fetch = || {
            let mut stream = TcpStream::connect_timeout(&to, LIMIT).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            assert!(got == [7; 100_000]);
        };
        netns(from).run(fetch).unwrap();
        served.join().unwrap()
    })
}

#[track_caller]
fn refused(from: &str, to: (&str, u16)) {
    let to = SocketAddr::new(to.0.parse().unwrap(), to.1);
    let connect = || TcpStream::connect_timeout(&to, LIMIT).map(drop);
    let error = netns(from).run(connect).unwrap().unwrap_err();
    assert_ne!(error.kind(), std::io::ErrorKind::TimedOut, "{to}: it is told");
}

fn pings(from: &str, to: &str) -> bool {
    let ping = ["netns", "exec", from, "ping", "-c", "2", "-i", "0.1", "-W", "5", to];
    Command::new("ip").args(ping).stdout(Stdio::null()).status().unwrap().success()
}

#[test]
fn guests_fetch_from_the_lan_with_their_hosts_address() {
    conet_testkit::privileged!(Need::Tun, Need::Program("ping"));
    let _lab = Lab::up("wireguard");
    let guest = "conet-h1-g1";
    assert_eq!(fetched("conet-h2", 8000, guest, (H2, 8000)).to_string(), H1);
    assert!(pings(guest, H2) && pings(guest, H1) && pings(guest, "10.77.2.2"));
    // By the tunnel it has its own address still.
    assert_eq!(fetched("conet-h2-g1", 80, guest, ("10.77.2.2", 80)).to_string(), "10.77.1.2");
    let udp = netns("conet-h2").run(|| UdpSocket::bind((H2, 5000)).unwrap()).unwrap();
    udp.set_read_timeout(Some(LIMIT)).unwrap();
    let client = netns(guest).run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    client.send_to(b"x", (H2, 5000)).unwrap();
    assert_eq!(udp.recv_from(&mut [0; 8]).unwrap().1.ip().to_string(), H1);

    // Its own host by the host's address: what it is told, and nothing else.
    let _server = listen("conet-h1", 8000);
    refused(guest, (H1, 8000));
    refused(guest, ("10.77.1.1", 8000));
    reconfigure("conet-h1", "s/^shared_address.*/&\\nhost_ports = [\"tcp:8000\"]/");
    drop(_server);
    assert_eq!(fetched("conet-h1", 8000, guest, (H1, 8000)).to_string(), "10.77.1.2");
    refused(guest, (H1, 47_700));
}

#[test]
fn ports_lead_to_guests_as_they_are_told_at_run_time() {
    conet_testkit::privileged!(Need::Tun, Need::Program("nft"));
    let lab = Lab::up("wireguard");
    let guest = "conet-h1-g1";
    assert_eq!(ok(&forward(&["add", "tcp:2222:conet-h1-g1:22"])), "tcp:2222:conet-h1-g1:22 (up)\n");
    let added = json(&ok(&forward(&["add", "tcp:192.0.2.1:8000-8009:conet-h1-g1", "--json"])));
    assert_eq!(added["ports"], serde_json::json!(["tcp 8000-8009"]));
    ok(&forward(&["add", "udp:5000:conet-h1-g1:53"]));
    for from in ["conet-h2", "conet-h2-g1", "conet-h1"] {
        fetched(guest, 22, from, (H1, 2222));
        fetched(guest, 8009, from, (H1, 8009));
    }
    assert_eq!(fetched(guest, 22, "conet-h2", (H1, 2222)).to_string(), H2);
    assert_eq!(fetched(guest, 22, guest, (H1, 2222)).to_string(), "10.77.1.1");
    let inside = netns(guest).run(|| UdpSocket::bind("0.0.0.0:53").unwrap()).unwrap();
    inside.set_read_timeout(Some(LIMIT)).unwrap();
    let client = netns("conet-h2").run(|| UdpSocket::bind((H2, 0)).unwrap()).unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    client.connect((H1, 5000)).unwrap();
    client.send(b"there").unwrap();
    let (_, from) = inside.recv_from(&mut [0; 8]).unwrap();
    inside.send_to(b"back", from).unwrap();
    assert_eq!(client.recv(&mut [0; 8]).unwrap(), 4);
    // UDP has no beginning: who sends all the time goes the new way as well.
    let inside_too = netns(guest).run(|| UdpSocket::bind("0.0.0.0:54").unwrap()).unwrap();
    inside_too.set_read_timeout(Some(LIMIT)).unwrap();
    ok(&forward(&["remove", "udp:5000:conet-h1-g1:53"]));
    // Refused by the host now, which the socket may tell at the next call.
    client.send(b"lost").ok();
    client.send(b"lost").ok();
    ok(&forward(&["add", "udp:5000:conet-h1-g1:54"]));
    client.send(b"again").or_else(|_| client.send(b"again")).unwrap();
    assert_eq!(inside_too.recv(&mut [0; 8]).unwrap(), 5);
    ok(&forward(&["remove", "udp:5000:conet-h1-g1:54"]));
    ok(&forward(&["add", "udp:5000:conet-h1-g1:53"]));

    let _host = listen("conet-h1", 9000);
    for (text, said) in [
        ("tcp:9000:conet-h1-g1", "tcp port 9000 is in use by a program of this host's"),
        ("tcp:8990-9010:conet-h1-g1:90-110", "tcp port 9000 is in use"),
        ("tcp:8005:conet-h1-g1:1", "takes ports that tcp:192.0.2.1:8000-8009:conet-h1-g1 takes"),
        ("tcp:2222:conet-h1-g1:22", "tcp:2222:conet-h1-g1:22 is there"),
        ("tcp:80:conet-x", "no guest is named conet-x"),
        ("tcp:192.0.2.9:80:conet-h1-g1", "192.0.2.9 is no address of this host's"),
        ("udp:51820:conet-h1-g1", "this node's own for the tunnel"),
        ("80:conet-h1-g1", "is not a forward, as in tcp:2222:web:22"),
    ] {
        let text = failed(&forward(&["add", text]));
        assert!(text.contains(said), "{text}");
    }
    let text = failed(&forward(&["remove", "tcp:1:conet-h1-g1"]));
    assert!(text.contains("there is no forward tcp:1:conet-h1-g1"), "{text}");
    assert_eq!(rows().len(), 3);
    ok(&conet(&["lab", "down"]));
    nothing_remains();
    drop(lab);
}

#[test]
fn forwards_are_there_for_the_next_daemon_and_whoever_was_first_has_a_port() {
    conet_testkit::privileged!(Need::Tun);
    let _lab = Lab::up("wireguard");
    let guest = "conet-h1-g1";
    for forward in ["tcp:2222:conet-h1-g1:22", "udp:5000:conet-h1-g1:53"] {
        ok(&self::forward(&["add", forward]));
    }
    Lab::kill_daemon("conet-h1");
    fetched(guest, 22, "conet-h2", (H1, 2222));
    Lab::restart("conet-h1");
    assert_eq!(rows().len(), 2);
    fetched(guest, 22, "conet-h2", (H1, 2222));
    ok(&forward(&["del", "tcp:2222:conet-h1-g1:22"]));
    refused("conet-h2", (H1, 2222));
    // One that the host has taken meanwhile waits until it is given back.
    ok(&forward(&["remove", "udp:5000:conet-h1-g1:53"]));
    ok(&forward(&["add", "tcp:3000:conet-h1-g1"]));
    Lab::kill_daemon("conet-h1");
    let taken = listen("conet-h1", 3000);
    Lab::restart("conet-h1");
    assert_eq!(row("tcp:3000:conet-h1-g1")["state"], "unusable");
    drop(taken);
    let port = "tcp:3000:conet-h1-g1";
    wait_until("the port is free", LIMIT, || row(port)["state"] == "up");
    // Who listens there now gets nothing, whatever else changes.
    let _too_late = listen("conet-h1", 3000);
    ok(&forward(&["add", "tcp:3001:conet-h1-g1"]));
    assert_eq!(row(port)["state"], "up");
    assert!(row(port)["problem"].as_str().unwrap().contains("which gets nothing"));
    fetched(guest, 3000, "conet-h2", (H1, 3000));
}

#[test]
fn what_a_guest_listens_on_is_followed() {
    conet_testkit::privileged!(Need::Tun);
    let _lab = Lab::up("wireguard");
    let guest = "conet-h1-g1";
    ok(&Lab::exec("conet-h1", &[CONET, "guest", "add", "conet-a"]));
    for forward in ["auto:conet-h1-g1", "tcp:auto:conet-a", "tcp:7000:conet-a:7001"] {
        ok(&self::forward(&["add", forward]));
    }
    assert!(failed(&forward(&["add", "udp:auto:conet-h1-g1"])).contains("takes ports that"));
    let ports = |text: &str| row(text)["ports"].clone();
    assert_eq!(ports("auto:conet-h1-g1"), serde_json::json!([]));
    {
        let _more = [8000, 8001, 7000].map(|port| listen(guest, port));
        let udp = || {
            let bound = ["0.0.0.0:5353", "0.0.0.0:0", "127.0.0.1:99"];
            bound.map(|at| UdpSocket::bind(at).unwrap())
        };
        let _udp = netns(guest).run(udp).unwrap();
        let _only_itself = netns(guest).run(|| TcpListener::bind("127.0.0.1:81").unwrap()).unwrap();
        let _same = listen("conet-a", 8000);
        let wanted = serde_json::json!(["tcp 8000-8001", "udp 5353"]);
        wait_until("ports are followed", LIMIT, || ports("auto:conet-h1-g1") == wanted);
        let shown = row("auto:conet-h1-g1");
        assert_eq!(shown["problem"], "taken already: tcp 7000", "{shown}");
        assert_eq!(row("tcp:auto:conet-a")["problem"], "taken already: tcp 8000");
        let to = SocketAddr::new(H1.parse().unwrap(), 8001);
        netns("conet-h2").run(|| TcpStream::connect_timeout(&to, LIMIT).unwrap()).unwrap();
    }
    wait_until("ports are given back", LIMIT, || {
        ports("auto:conet-h1-g1") == serde_json::json!([])
    });
    refused("conet-h2", (H1, 8001));
    // A guest that goes is waited for.
    ok(&Lab::exec("conet-h1", &[CONET, "guest", "remove", "conet-a"]));
    assert_eq!(row("tcp:7000:conet-a:7001")["state"], "waiting");
    refused("conet-h2", (H1, 7000));
    ok(&Lab::exec("conet-h1", &[CONET, "guest", "add", "conet-a"]));
    assert_eq!(row("tcp:7000:conet-a:7001")["state"], "up");
}

#[test]
fn ends_and_kills_leave_no_rule() {
    conet_testkit::privileged!(Need::Tun, Need::Program("nft"));
    let _lab = Lab::up("wireguard");
    ok(&Lab::exec("conet-h1", &["nft", "add", "table", "inet", "somebodys"]));
    let down = || {
        let daemon = Lab::daemon("conet-h1");
        ok(&Lab::exec("conet-h1", &[CONET, "down"]));
        wait_until("the daemon's end", LIMIT, || !exists(daemon));
    };
    down();
    let before = state();
    assert!(!before.contains("table inet conet "), "{before}");
    Lab::restart("conet-h1");
    let up = state();
    assert!(up.contains("masquerade") && up.contains("table inet somebodys"));
    // Killed, and found again: as after the first start.
    Lab::kill_daemon("conet-h1");
    assert!(ruleset().contains("masquerade"), "its guests have their address still");
    Lab::restart("conet-h1");
    ok(&forward(&["add", "tcp:1-99:conet-h1-g1:1001-1099"]));
    assert!(ruleset().contains("dnat"));
    ok(&forward(&["remove", "tcp:1-99:conet-h1-g1:1001-1099"]));
    ok(&forward(&["add", "auto:conet-h1-g1"]));
    Lab::kill_daemon("conet-h1");
    Lab::restart("conet-h1");
    assert!(ruleset().matches("table inet conet ").count() == 1);
    // Somebody empties the packet filter: ours is its owner's, where the kernel
    // knows owners whose tables outlive them (6.9).
    let owned = ruleset().contains("flags owner");
    Lab::exec("conet-h1", &["nft", "flush", "ruleset"]);
    assert!(!owned || ruleset().contains("masquerade"), "{}", ruleset());
    down();
    ok(&Lab::exec("conet-h1", &["nft", "add", "table", "inet", "somebodys"]));
    assert_eq!(state(), before);
    Lab::restart("conet-h1");
}

#[test]
fn ordinary_users_list_forwards_and_change_none() {
    conet_testkit::privileged!(Need::Tun);
    let _lab = Lab::up("wireguard");
    ok(&forward(&["add", "tcp:2222:conet-h1-g1:22"]));
    let program = common::Shared::new("forward");
    std::fs::copy(CONET, &program.0).unwrap();
    let as_user = |arguments: &str| {
        let script = format!("{} forward {arguments}", program.path());
        let user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c"];
        Lab::exec("conet-h1", &[&user[..], &[script.as_str()]].concat())
    };
    assert!(ok(&as_user("list")).contains("tcp:2222:conet-h1-g1:22"));
    for change in ["add tcp:1:conet-h1-g1", "remove tcp:2222:conet-h1-g1:22"] {
        let text = failed(&as_user(change));
        assert!(text.contains("only root and members of group conet"), "{text}");
    }
    assert_eq!(rows().len(), 1);
}
