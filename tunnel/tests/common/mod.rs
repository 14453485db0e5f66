//! Namespaces with a wire between them, tunnels in them, and bytes through them.
//!
//! Namespaces are named `conet-t<pid>-…` and removed on drop.

#![allow(dead_code, reason = "each test file uses some of it")]
#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

pub(crate) mod sys;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{self, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use conet_netsys::{IfName, IpNet, IpipPrograms, Netlink, Netns, NetnsName, Route, Veth};
use conet_tunnel::{
    Config, DEFAULT_MTU, DEFAULT_PORT, Mode, Offloads, PeerConfig, PrivateKey, StartError, Tunnel,
};

pub(crate) const MODES: [Mode; 3] = [Mode::WireGuard, Mode::IpUdp, Mode::IpIp];

pub(crate) struct Scratch {
    name: NetnsName,
    netns: Netns,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = NetnsName::new(&format!("conet-t{}-{n}", process::id())).unwrap();
        let netns = Netns::create(&name).unwrap();
        Self { name, netns }
    }

    pub(crate) fn netlink(&self) -> Netlink {
        Netlink::open_in(&self.netns).unwrap()
    }

    pub(crate) fn netns(&self) -> &Netns {
        &self.netns
    }

    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.netns.run(work).unwrap()
    }

    pub(crate) fn start(&self, config: Config) -> Result<Tunnel, StartError> {
        self.run(|| Tunnel::start(config))
    }

    pub(crate) fn command(&self, program: &str, arguments: &[&str]) -> Command {
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

pub(crate) fn ifname(name: &str) -> IfName {
    IfName::new(name).unwrap()
}

pub(crate) fn key(n: u8) -> PrivateKey {
    PrivateKey::from_bytes([n; 32])
}

pub(crate) fn inner(n: u8) -> IpAddr {
    IpAddr::from([10, 77, n, 1])
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// 192.0.2.1, a router, and 198.51.100.2 behind a link of `mtu` bytes.
pub(crate) fn routed(mtu: u32) -> [Scratch; 3] {
    let [one, router, two] = [Scratch::new(), Scratch::new(), Scratch::new()];
    for (end, at, host, gateway, mtu) in [
        (&one, "near", "192.0.2.1", "192.0.2.254", None),
        (&two, "far", "198.51.100.2", "198.51.100.254", Some(mtu)),
    ] {
        let veth = Veth {
            name: ifname("eth0"),
            peer: ifname(at),
            peer_netns: Some(&router.netns),
            mtu,
            mac: None,
            peer_mac: None,
        };
        let (mut netlink, mut middle) = (end.netlink(), router.netlink());
        netlink.add_veth(&veth).unwrap();
        netlink.add_address(ifname("eth0"), net(&format!("{host}/24"))).unwrap();
        middle.add_address(ifname(at), net(&format!("{gateway}/24"))).unwrap();
        if let Some(mtu) = mtu {
            middle.set_mtu(ifname(at), mtu).unwrap();
        }
        for (netlink, link) in [(&mut netlink, "eth0"), (&mut middle, at)] {
            netlink.set_up(ifname(link)).unwrap();
            netlink.set_up(IfName::LOOPBACK).unwrap();
        }
        netlink.add_route(&Route::default_via(gateway.parse().unwrap())).unwrap();
    }
    router.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap());
    [one, two, router]
}

/// Two namespaces with 192.0.2.1 and 192.0.2.2 on a wire.
pub(crate) fn wire() -> [Scratch; 2] {
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

pub(crate) fn peer(n: u8, mode: Mode) -> PeerConfig {
    let endpoint = SocketAddr::from(([192, 0, 2, n], DEFAULT_PORT));
    let allowed = vec![net(&format!("10.77.{n}.0/24"))];
    PeerConfig { mode, ..PeerConfig::new(key(n).public(), Some(endpoint), allowed) }
}

pub(crate) fn config(n: u8, mode: Mode) -> Config {
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

pub(crate) fn transfer(from: &Scratch, to: &Scratch, address: IpAddr, megabytes: usize) -> f64 {
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
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(&bytes).unwrap();
        drop(stream);
        assert!(receiver.join().unwrap() == bytes);
    });
    (megabytes << 20) as f64 * 8e-6 / began.elapsed().as_secs_f64()
}

/// Whether this machine's kernel takes the programs for mode `ipip`; says so if not.
pub(crate) fn kernel_carries() -> bool {
    const LOOPBACK: u32 = 1;
    let tried = Scratch::new().run(|| IpipPrograms::load(IfName::LOOPBACK, LOOPBACK).map(drop));
    if let Err(error) = &tried {
        println!("SKIPPED with ipip in the kernel: {error}: {error:?}");
    }
    tried.is_ok()
}

/// Sends small packets until each end carries the other in the kernel.
pub(crate) fn carried(ends: &[&Scratch; 2], tunnels: &[Tunnel; 2]) {
    let began = Instant::now();
    let in_kernel = |tunnel: &Tunnel| tunnel.snapshot().unwrap().peers[0].in_kernel;
    while !tunnels.iter().all(in_kernel) {
        assert!(began.elapsed() < Duration::from_secs(30), "not carried in the kernel");
        for (end, from, to) in [(ends[0], 1, 2), (ends[1], 2, 1)] {
            let socket = end.run(|| UdpSocket::bind((inner(from), 0)).unwrap());
            socket.send_to(b"small", (inner(to), 9)).unwrap();
        }
        thread::sleep(Duration::from_millis(50));
    }
}
