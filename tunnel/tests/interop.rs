//! Other people's WireGuard as the peer: wireguard-go and `wg` from Debian,
//! `boringtun-cli` and `gotatun` as `cargo install` makes them. Needs root and
//! `/dev/net/tun`.
//!
//! What takes minutes to build or to wait for has the feature `peers`: `cargo xtask peers`.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::{self, Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Scratch, config, ifname, inner, key, net, transfer, wire};
use conet_netsys::{Route, Sysctl};
use conet_testkit::{Need, privileged};
use conet_tunnel::{Config, DEFAULT_MTU, Mode, PeerConfig, PresharedKey};

/// A foreign tunnel, ended with the test, also by a panic. Killed, it leaves its
/// control socket behind.
struct Foreign {
    process: Child,
    socket: PathBuf,
}

impl Drop for Foreign {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        drop(fs::remove_file(&self.socket));
    }
}

/// Base64 of 32 bytes of 2, and of 7.
const PRIVATE: &str = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=";
const PRESHARED: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";

/// Starts a program of somebody else's as the far end.
fn foreign(two: &Scratch, program: &str, arguments: &[&str], preshared: bool) -> Foreign {
    // The tests of this file run side by side.
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("wg{}n{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let mut command = two.command(program, &["-f", &name]);
    command.args(arguments).env("LOG_LEVEL", "error");
    let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let socket = PathBuf::from(format!("/var/run/wireguard/{name}.sock"));
    let foreign = Foreign { process, socket };
    let began = Instant::now();
    while !foreign.socket.exists() {
        assert!(began.elapsed() < Duration::from_secs(10), "{program} does not start");
        thread::sleep(Duration::from_millis(20));
    }
    let secret = |what: &str, text: &str| {
        let path = std::env::temp_dir().join(format!("conet-t{name}-{what}"));
        fs::write(&path, text).unwrap();
        path
    };
    let (private, shared) = (secret("key", PRIVATE), secret("psk", PRESHARED));
    let mut set = two.command("wg", &["set", &name, "listen-port", "51820", "private-key"]);
    set.arg(&private).args(["peer", &key(1).public().to_string()]);
    if preshared {
        set.arg("preshared-key").arg(&shared);
    }
    set.args(["endpoint", "192.0.2.1:51820", "allowed-ips", "10.77.1.0/24"]);
    let status = set.status();
    fs::remove_file(&private).unwrap();
    fs::remove_file(&shared).unwrap();
    assert!(status.unwrap().success());
    let (mut netlink, device) = (two.netlink(), ifname(&name));
    two.run(|| drop(Sysctl::DisableIpv6(Some(device)).write("1")));
    netlink.add_address(device, net("10.77.2.1/32")).unwrap();
    netlink.set_mtu(device, u32::from(DEFAULT_MTU)).unwrap();
    netlink.set_up(device).unwrap();
    netlink.add_route(&Route::on_link(net("10.77.1.0/24"), device)).unwrap();
    foreign
}

/// 100 MB each way, compared byte for byte; then both begin anew, which is a new
/// handshake, and go on.
fn works_with(program: &str, arguments: &[&str]) {
    for preshared in [true, false] {
        let [one, two] = wire();
        let mut ours = config(1, Mode::WireGuard);
        let shared = preshared.then_some(PresharedKey([7; 32]));
        ours.peers[0] = PeerConfig { preshared_key: shared, ..ours.peers[0].clone() };
        let megabytes = if preshared { 8 } else { 100 };
        let tunnel = one.start(Config { ..ours.clone() }).unwrap();
        let far = foreign(&two, program, arguments, preshared);
        let there = transfer(&one, &two, inner(2), megabytes);
        let back = transfer(&two, &one, inner(1), megabytes);
        println!("with {program}: {there:.0} and {back:.0} Mb/s");
        let snapshot = tunnel.snapshot().unwrap();
        let peer = &snapshot.peers[0];
        assert!(peer.last_handshake.is_some());
        assert!(peer.rx_bytes.min(peer.tx_bytes) > (megabytes as u64) << 20, "{peer:?}");
        let drops = peer.drops.total() + snapshot.drops.total();
        assert_eq!(drops, 0, "{snapshot:?}");
        if !preshared {
            // We begin anew, with a session of theirs still there; then they do.
            tunnel.stop();
            let tunnel = one.start(ours.clone()).unwrap();
            transfer(&one, &two, inner(2), 4);
            drop(far);
            let _far = foreign(&two, program, arguments, preshared);
            transfer(&two, &one, inner(1), 4);
            assert!(tunnel.snapshot().unwrap().peers[0].rx_bytes > 4 << 20);
        }
    }
}

#[test]
fn wireguard_go_is_a_peer_like_any_other() {
    privileged!(Need::Tun, Need::Program("wireguard-go"), Need::Program("wg"), Need::Program("ip"));
    works_with("wireguard-go", &[]);
}

#[cfg(feature = "peers")]
#[test]
fn boringtun_is_a_peer_like_any_other() {
    privileged!(
        Need::Tun,
        Need::Program("boringtun-cli"),
        Need::Program("wg"),
        Need::Program("ip")
    );
    works_with("boringtun-cli", &["--disable-drop-privileges"]);
}

#[cfg(feature = "peers")]
#[test]
fn gotatun_is_a_peer_like_any_other() {
    privileged!(Need::Tun, Need::Program("gotatun"), Need::Program("wg"), Need::Program("ip"));
    works_with("gotatun", &["--disable-drop-privileges"]);
}

/// It takes two minutes, the life of a session.
#[cfg(feature = "peers")]
#[test]
fn sessions_are_renewed_with_wireguard_go() {
    privileged!(Need::Tun, Need::Program("wireguard-go"), Need::Program("wg"), Need::Program("ip"));
    let [one, two] = wire();
    let tunnel = one.start(config(1, Mode::WireGuard)).unwrap();
    let _far = foreign(&two, "wireguard-go", &[], false);
    let began = Instant::now();
    let mut renewed = 0;
    let mut age = Duration::ZERO;
    while began.elapsed() < Duration::from_secs(128) {
        transfer(&one, &two, inner(2), 1);
        transfer(&two, &one, inner(1), 1);
        let snapshot = tunnel.snapshot().unwrap();
        let now = snapshot.peers[0].last_handshake.unwrap();
        renewed += u32::from(now < age);
        age = now;
        let drops = snapshot.peers[0].drops.total() + snapshot.drops.total();
        assert_eq!(drops, 0, "{snapshot:?}");
        thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(renewed, 1);
}
