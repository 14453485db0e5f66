//! The tunnel as a whole in the running kernel: two namespaces joined by a veth
//! pair. Needs root and `/dev/net/tun`; one test needs Debian's `wireguard-go`
//! and `wg`, which are not conet's.
//!
//! Namespaces are named `conet-t<pid>-…` and removed on drop.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{self, Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use std::{fs, thread};

use conet_netsys::{IfName, IpNet, Netlink, Netns, NetnsName, Route, RouteKind, Sysctl, Veth};
use conet_testkit::{Need, privileged};
use conet_tunnel::{
    Config, DEFAULT_MTU, DEFAULT_PORT, Mode, Offloads, PeerConfig, PrivateKey, StartError, Tunnel,
    TunnelError,
};

struct Scratch {
    name: NetnsName,
    netns: Netns,
}

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = NetnsName::new(&format!("conet-t{}-{n}", process::id())).unwrap();
        let netns = Netns::create(&name).unwrap();
        Self { name, netns }
    }

    fn netlink(&self) -> Netlink {
        Netlink::open_in(&self.netns).unwrap()
    }

    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.netns.run(work).unwrap()
    }

    fn start(&self, config: Config) -> Result<Tunnel, StartError> {
        self.run(|| Tunnel::start(config))
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.name.as_str(), program]).args(arguments);
        command
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        Netns::delete(&self.name).unwrap();
    }
}

fn ifname(name: &str) -> IfName {
    IfName::new(name).unwrap()
}

fn key(n: u8) -> PrivateKey {
    PrivateKey::from_bytes([n; 32])
}

fn inner(n: u8) -> IpAddr {
    IpAddr::from([10, 77, n, 1])
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// Two namespaces with 192.0.2.1 and 192.0.2.2 on a wire.
fn wire() -> [Scratch; 2] {
    let ends = [Scratch::new(), Scratch::new()];
    let mut first = ends[0].netlink();
    first
        .add_veth(&Veth {
            name: ifname("eth0"),
            peer: ifname("eth0"),
            peer_netns: Some(&ends[1].netns),
            mtu: None,
            mac: None,
            peer_mac: None,
        })
        .unwrap();
    for (n, end) in ends.iter().enumerate() {
        let mut netlink = end.netlink();
        netlink.add_address(ifname("eth0"), net(&format!("192.0.2.{}/24", n + 1))).unwrap();
        netlink.set_up(ifname("eth0")).unwrap();
        netlink.set_up(IfName::LOOPBACK).unwrap();
    }
    ends
}

fn peer(n: u8, mode: Mode) -> PeerConfig {
    let endpoint = SocketAddr::from(([192, 0, 2, n], DEFAULT_PORT));
    let allowed = vec![net(&format!("10.77.{n}.0/24"))];
    PeerConfig { mode, ..PeerConfig::new(key(n).public(), Some(endpoint), allowed) }
}

fn config(n: u8, mode: Mode) -> Config {
    Config {
        device: ifname("conet0"),
        private_key: key(n),
        listen: SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)),
        addresses: vec![net(&format!("10.77.{n}.1/32"))],
        mtu: DEFAULT_MTU,
        offloads: Offloads::ALL,
        peers: vec![peer(3 - n, mode)],
    }
}

fn transfer(from: &Scratch, to: &Scratch, address: IpAddr, megabytes: usize) -> f64 {
    let listener = to.run(|| TcpListener::bind((address, 0)).unwrap());
    let at = listener.local_addr().unwrap();
    let bytes: Vec<u8> = (0..=250).cycle().take(megabytes << 20).collect();
    let began = Instant::now();
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut got = Vec::with_capacity(bytes.len());
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            stream.read_to_end(&mut got).unwrap();
            got
        });
        let connect = || TcpStream::connect_timeout(&at, Duration::from_secs(10)).unwrap();
        let mut stream = from.run(connect);
        stream.write_all(&bytes).unwrap();
        drop(stream);
        assert!(receiver.join().unwrap() == bytes);
    });
    (megabytes << 20) as f64 * 8e-6 / began.elapsed().as_secs_f64()
}

#[test]
fn a_tunnel_brings_its_device_and_routes_and_takes_them_away() {
    privileged!(Need::Tun);
    let [one, _two] = wire();
    let mut netlink = one.netlink();
    // IPv6 link-local routes come when the kernel is ready.
    let mut state = || {
        let links: Vec<_> = netlink.links().unwrap().iter().map(|l| l.name).collect();
        let mut routes = netlink.routes().unwrap();
        routes.retain(|r| matches!(r.destination, IpNet::V4(_)));
        (links, routes)
    };
    let before = state();
    let tunnel = one.start(config(1, Mode::WireGuard)).unwrap();
    let mut netlink = one.netlink();
    let device = netlink.link(ifname("conet0")).unwrap().unwrap();
    assert!(device.up);
    assert_eq!(device.mtu, u32::from(DEFAULT_MTU));
    assert_eq!(device.kind.as_deref(), Some("tun"));
    let routes = netlink.routes().unwrap();
    let route =
        routes.iter().find(|r| r.destination == net("10.77.2.0/24") && r.metric.is_none()).unwrap();
    assert_eq!((route.link, route.source), (Some(ifname("conet0")), Some(inner(1))));
    let snapshot = tunnel.snapshot().unwrap();
    assert_eq!(snapshot.listen.port(), DEFAULT_PORT);
    assert_eq!(snapshot.public_key, key(1).public());
    assert_eq!(snapshot.peers.len(), 1);
    assert!(tunnel.is_running());
    tunnel.stop();
    assert_eq!(state(), before);
}

#[test]
fn what_cannot_start_says_why_and_leaves_nothing() {
    privileged!(Need::Tun);
    let [one, _two] = wire();
    let mut netlink = one.netlink();
    let running = one.start(config(1, Mode::WireGuard)).unwrap();
    let elsewhere = SocketAddr::from(([0, 0, 0, 0], 4444));
    let busy = Config { listen: elsewhere, ..config(1, Mode::WireGuard) };
    let error = one.start(busy).unwrap_err();
    assert!(matches!(error, StartError::Device { .. }), "{error:?}");
    let taken = Config { device: ifname("conet1"), ..config(1, Mode::WireGuard) };
    let error = one.start(taken).unwrap_err();
    assert!(matches!(error, StartError::Listen { .. }), "{error:?}");
    let looping = {
        let mut config = config(1, Mode::WireGuard);
        config.peers[0].allowed.push(net("192.0.0.0/8"));
        config
    };
    let error = one.start(looping).unwrap_err();
    assert!(matches!(error, StartError::Peer(_)), "{error:?}");
    assert!(error.to_string().contains("192.0.0.0/8"), "{error}");
    assert_eq!(netlink.link(ifname("conet1")).unwrap(), None);
    // The first one is not concerned.
    running.snapshot().unwrap();
}

#[test]
fn peers_change_while_it_runs() {
    privileged!(Need::Tun);
    let ends = wire();
    let [one, two] = &ends;
    let tunnels = [
        one.start(config(1, Mode::WireGuard)).unwrap(),
        two.start(config(2, Mode::WireGuard)).unwrap(),
    ];
    transfer(one, two, inner(2), 1);
    for mode in [Mode::IpIp, Mode::WireGuard] {
        tunnels[0].set_mode(key(2).public(), mode).unwrap();
        tunnels[1].set_mode(key(1).public(), mode).unwrap();
        transfer(one, two, inner(2), 1);
        assert_eq!(tunnels[0].snapshot().unwrap().peers[0].mode, mode);
    }
    let mut netlink = one.netlink();
    let mut routed = |prefix: &str| {
        netlink.routes().unwrap().iter().any(|route| route.destination == net(prefix))
    };
    tunnels[0]
        .set_allowed(key(2).public(), vec![net("10.77.2.0/25"), net("10.99.0.0/16")])
        .unwrap();
    assert!(routed("10.77.2.0/25") && routed("10.99.0.0/16") && !routed("10.77.2.0/24"));
    tunnels[0].add_peer(peer(3, Mode::IpIp)).unwrap();
    assert!(routed("10.77.3.0/24"));
    let error = tunnels[0].add_peer(peer(3, Mode::IpIp)).unwrap_err();
    assert!(matches!(error, TunnelError::Peer(_)), "{error}");
    tunnels[0].remove_peer(key(3).public()).unwrap();
    assert!(!routed("10.77.3.0/24"));
    transfer(one, two, inner(2), 1);
}

#[test]
fn without_offloads_it_works_too() {
    privileged!(Need::Tun);
    for mode in [Mode::WireGuard, Mode::IpIp] {
        let [one, two] = wire();
        let plain = |n| Config { offloads: Offloads::NONE, ..config(n, mode) };
        let _tunnels = [one.start(plain(1)).unwrap(), two.start(plain(2)).unwrap()];
        let rate = transfer(&one, &two, inner(2), 4);
        println!("{mode} without offloads: {rate:.0} Mb/s");
    }
}

#[test]
fn a_deleted_device_ends_the_tunnel() {
    privileged!(Need::Tun);
    let [one, _two] = wire();
    let tunnel = one.start(config(1, Mode::WireGuard)).unwrap();
    assert!(one.netlink().delete_link(ifname("conet0")).unwrap());
    let began = Instant::now();
    while tunnel.is_running() {
        assert!(began.elapsed() < Duration::from_secs(5));
        thread::sleep(Duration::from_millis(10));
    }
    assert!(matches!(tunnel.snapshot().unwrap_err(), TunnelError::Stopped));
}

/// As when the process is killed: the device and its routes are gone, and the
/// host has a default route that would take the packets in clear.
#[test]
fn without_its_device_no_packet_takes_another_way() {
    privileged!(Need::Tun);
    let [one, two] = wire();
    let mut netlink = one.netlink();
    netlink.add_route(&Route::default_via(IpAddr::from([192, 0, 2, 2]))).unwrap();
    let tunnel = one.start(config(1, Mode::WireGuard)).unwrap();
    let connect = |to: IpAddr| {
        let patience = Duration::from_millis(200);
        one.run(|| TcpStream::connect_timeout(&(to, 9).into(), patience).unwrap_err().kind())
    };
    netlink.set_down(ifname("conet0")).unwrap();
    assert_eq!(connect(inner(2)), ErrorKind::HostUnreachable);
    // What is no peer's goes its way as before: the neighbour says that it has
    // no such route.
    assert_ne!(connect(IpAddr::from([10, 78, 0, 1])), ErrorKind::HostUnreachable);
    tunnel.stop();
    assert!(!netlink.routes().unwrap().iter().any(|r| r.kind == RouteKind::Unreachable));
    drop(two);
}

/// Datagrams to the open port and packets to the raw sockets, of every length
/// that a LAN carries, while a session is up.
#[test]
fn garbage_from_the_lan_does_not_disturb() {
    privileged!(Need::Tun);
    for mode in [Mode::WireGuard, Mode::IpIp] {
        let [one, two] = wire();
        let tunnels = [one.start(config(1, mode)).unwrap(), two.start(config(2, mode)).unwrap()];
        transfer(&one, &two, inner(2), 1);
        let socket = one.run(|| UdpSocket::bind("192.0.2.1:0").unwrap());
        let to = SocketAddr::from(([192, 0, 2, 2], DEFAULT_PORT));
        for len in 0..1473 {
            let mut bytes = vec![0xa5; len];
            if let Some(start) = bytes.first_chunk_mut() {
                // Data for session number 0 of peer 0, which may exist.
                *start = [4, 0, 0, 0, 1, 0, 0, 0];
            }
            socket.send_to(&bytes, to).unwrap();
        }
        transfer(&one, &two, inner(2), 1);
        let snapshot = tunnels[1].snapshot().unwrap();
        let counted = snapshot.drops.total() + snapshot.peers[0].drops.total();
        assert!(counted > 1000, "{mode} {snapshot:?}");
    }
}

/// wireguard-go, ended with the test, also by a panic. Killed, it leaves its
/// control socket behind.
struct WireGuardGo {
    process: Child,
    socket: PathBuf,
}

impl Drop for WireGuardGo {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        drop(fs::remove_file(&self.socket));
    }
}

#[test]
fn wireguard_go_is_a_peer_like_any_other() {
    privileged!(Need::Tun, Need::Program("wireguard-go"), Need::Program("wg"), Need::Program("ip"));
    let [one, two] = wire();
    let tunnel = one.start(config(1, Mode::WireGuard)).unwrap();
    let name = format!("wg{}", process::id());
    let mut go = two.command("wireguard-go", &["-f", &name]);
    let process = go.env("LOG_LEVEL", "error").spawn().unwrap();
    let socket = PathBuf::from(format!("/var/run/wireguard/{name}.sock"));
    let go = WireGuardGo { process, socket };
    let began = Instant::now();
    while !go.socket.exists() {
        assert!(began.elapsed() < Duration::from_secs(5), "wireguard-go does not start");
        thread::sleep(Duration::from_millis(20));
    }
    // wg wants base64; all 32 bytes of the key are 2.
    let private = std::env::temp_dir().join(format!("conet-t{}-key", process::id()));
    fs::write(&private, "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\n").unwrap();
    let set = two
        .command("wg", &["set", &name, "listen-port", "51820", "private-key"])
        .arg(&private)
        .args(["peer", &key(1).public().to_string()])
        .args(["endpoint", "192.0.2.1:51820", "allowed-ips", "10.77.1.0/24"])
        .status();
    fs::remove_file(&private).unwrap();
    assert!(set.unwrap().success());
    let mut netlink = two.netlink();
    let device = ifname(&name);
    two.run(|| drop(Sysctl::DisableIpv6(Some(device)).write("1")));
    netlink.add_address(device, net("10.77.2.1/32")).unwrap();
    netlink.set_mtu(device, u32::from(DEFAULT_MTU)).unwrap();
    netlink.set_up(device).unwrap();
    netlink.add_route(&Route::on_link(net("10.77.1.0/24"), device)).unwrap();

    let there = transfer(&one, &two, inner(2), 8);
    let back = transfer(&two, &one, inner(1), 8);
    println!("with wireguard-go: {there:.0} and {back:.0} Mb/s");
    let snapshot = tunnel.snapshot().unwrap();
    let peer = &snapshot.peers[0];
    assert!(peer.last_handshake.is_some());
    assert!(peer.rx_bytes > 8 << 20 && peer.tx_bytes > 8 << 20, "{peer:?}");
    assert_eq!(peer.drops.total() + snapshot.drops.total(), 0, "{snapshot:?}");
}
