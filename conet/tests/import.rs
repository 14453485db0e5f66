//! A file of wg-quick's, imported, beside wireguard-go that knows its key.
//!
//! ```text
//! one: conet up, 10.8.0.5 on conet0 ─ 192.0.2.1 ═ 192.0.2.2 ─ wireguard-go, 10.9.0.1 :two
//! ```
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use conet_netsys::{IfName, Netlink, Netns, NetnsName, Route, Veth};
use conet_testkit::Need;

/// Base64 of 32 bytes of 2 and of 3, and of 7.
const OURS: &str = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=";
const THEIRS: &str = "AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=";
const SHARED: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";
const LIMIT: Duration = Duration::from_secs(30);

/// A namespace that is deleted on drop.
struct Scratch(NetnsName, Netns);

impl Scratch {
    fn new(what: &str) -> Self {
        let name = NetnsName::new(&format!("conet-t{}-i{what}", std::process::id())).unwrap();
        Self(name.clone(), Netns::create(&name).unwrap())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.0.as_str(), program]);
        command
    }

    /// What a program says.
    fn said(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        Netns::delete(&self.0).unwrap();
    }
}

/// A process that does not outlive its test, and the socket that it leaves when killed.
struct Daemon(Child, PathBuf);

impl Drop for Daemon {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
        fs::remove_file(&self.1).ok();
    }
}

fn public(private: &str, directory: &Path) -> String {
    fs::write(directory.join("key"), private).unwrap();
    let key = fs::File::open(directory.join("key")).unwrap();
    let output = Command::new("wg").arg("pubkey").stdin(key).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn ifname(name: &str) -> IfName {
    IfName::new(name).unwrap()
}

/// The far end, with `wg`'s name for it, and our public key.
fn wireguard_go(two: &Scratch, far: &mut Netlink, directory: &Path) -> (Daemon, String, String) {
    let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    let name = format!("wgi{}", std::process::id());
    let mut go = two.command("wireguard-go");
    go.args(["-f", &name]).stdout(Stdio::null()).stderr(Stdio::null());
    let theirs = Daemon(go.spawn().unwrap(), format!("/var/run/wireguard/{name}.sock").into());
    let began = Instant::now();
    while far
        .link(ifname(&name))
        .unwrap()
        .is_none_or(|_| !Path::new(&format!("/var/run/wireguard/{name}.sock")).exists())
    {
        assert!(began.elapsed() < LIMIT, "wireguard-go does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    fs::write(path("theirs"), THEIRS).unwrap();
    fs::write(path("shared"), SHARED).unwrap();
    let us = public(OURS, directory);
    let set = ["set", &name, "listen-port", "51820", "private-key", &path("theirs"), "peer", &us];
    let peer = ["preshared-key", &path("shared"), "allowed-ips", "10.8.0.5/32"];
    two.said("wg", &[&set[..], &peer].concat());
    far.add_address(ifname(&name), "10.9.0.1/32".parse().unwrap()).unwrap();
    far.set_up(ifname(&name)).unwrap();
    far.add_route(&Route::on_link("10.8.0.0/24".parse().unwrap(), ifname(&name))).unwrap();
    (theirs, name, us)
}

#[test]
fn an_imported_node_is_known_by_its_key() {
    conet_testkit::privileged!(
        Need::Tun,
        Need::Program("wireguard-go"),
        Need::Program("wg"),
        Need::Program("ping"),
        Need::Program("ip")
    );
    let (one, two) = (Scratch::new("1"), Scratch::new("2"));
    let eth0 = ifname("eth0");
    let mut near = Netlink::open_in(&one.1).unwrap();
    let mut far = Netlink::open_in(&two.1).unwrap();
    let (mtu, mac, peer_mac) = (None, None, None);
    near.add_veth(&Veth { name: eth0, peer: eth0, peer_netns: Some(&two.1), mtu, mac, peer_mac })
        .unwrap();
    for (netlink, address) in [(&mut near, "192.0.2.1/24"), (&mut far, "192.0.2.2/24")] {
        netlink.add_address(eth0, address.parse().unwrap()).unwrap();
        netlink.set_up(eth0).unwrap();
        netlink.set_up(IfName::LOOPBACK).unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();

    let (_theirs, name, us) = wireguard_go(&two, &mut far, directory.path());
    let file = format!(
        "[Interface]\nPrivateKey = {OURS}\nAddress = 10.8.0.5/24\n[Peer]\nPublicKey = {}\n\
         PresharedKey = {SHARED}\nEndpoint = 192.0.2.2:51820\nAllowedIPs = 10.9.0.0/24\n",
        public(THEIRS, directory.path()),
    );
    fs::write(path("wg0.conf"), file).unwrap();
    let conet = env!("CARGO_BIN_EXE_conet");
    let to = path("conet.toml");
    let overlay = ["--overlay", "10.77.1.0/24", "--name", "one"];
    one.said(conet, &[&["import", &path("wg0.conf"), "--to", &to][..], &overlay].concat());
    // Beside what the machine may run itself.
    let text = fs::read_to_string(&to).unwrap();
    let state = format!("[node]\nstate_dir = \"{}\"", path("state"));
    fs::write(&to, text.replacen("[node]", &state, 1)).unwrap();
    let mut up = one.command(conet);
    let socket = path("state/control.sock");
    let up = up.args(["up", "-c", &to]).stderr(Stdio::null()).spawn().unwrap();
    let _ours = Daemon(up, socket.clone().into());
    let began = Instant::now();
    while !Path::new(&socket).exists() {
        assert!(began.elapsed() < LIMIT, "the daemon does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    one.said("ping", &["-c", "3", "-i", "0.1", "-W", "10", "-I", "10.8.0.5", "10.9.0.1"]);
    let show = |what: &str| {
        let shown = one.said(conet, &["--socket", &socket, what, "--json"]);
        serde_json::from_str::<serde_json::Value>(&shown).unwrap()
    };
    assert_eq!(show("status")["wireguard_key"], us);
    let peers = show("peers");
    let peer = &peers["peers"][0];
    assert_eq!((&peer["preshared_key"], &peer["name"]), (&true.into(), &"peer1".into()));
    assert!(peer["latest_handshake_s"].is_u64() && peer["rx_bytes"].as_u64() > Some(0), "{peer}");
    // As `wg show` has it at the far end.
    assert!(two.said("wg", &["show", &name, "latest-handshakes"]).contains(&us));
}
