//! The scene of two hosts: namespaces, LAN, tunnels, guests, capture, ping.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::process;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use conet_hostinject::{GuestPort, GuestSpec, PortKind, Rates};
use conet_netsys::{IfName, MacAddr, Netlink, Netns, NetnsName, Sysctl, Veth};
use conet_tunnel::{
    Config, DEFAULT_MTU, DEFAULT_PORT, Mode, Offloads, PeerConfig, PrivateKey, Tunnel,
};
use conet_wire::ip::{Ecn, IPV4_HEADER, IpView, OuterV4, checksum, packet_length};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Scenes are made one after the other: names carry the number of the scene.
static SCENE: AtomicU32 = AtomicU32::new(0);
static TURN: Mutex<()> = Mutex::new(());

pub(crate) fn ifname(name: &str) -> IfName {
    IfName::new(name).unwrap()
}

pub(crate) fn key(host: u8) -> PrivateKey {
    PrivateKey::from_bytes([host; 32])
}

fn prefix() -> String {
    format!("conet-t{}-{}-", process::id(), SCENE.load(Ordering::Relaxed))
}

fn name(what: &str) -> NetnsName {
    NetnsName::new(&format!("{}{what}", prefix())).unwrap()
}

pub(crate) fn guest_name(host: u8, guest: u8) -> NetnsName {
    name(&format!("h{host}g{guest}"))
}

pub(crate) fn guest_address(host: u8, guest: u8) -> IpAddr {
    IpAddr::from([10, 77, host, guest + 1])
}

pub(crate) fn guest_spec(host: u8, guest: u8) -> GuestSpec {
    GuestSpec {
        name: guest_name(host, guest),
        host_link: ifname(&format!("g{guest}")),
        guest_link: ifname("eth0"),
        addresses: vec![guest_address(host, guest)],
        gateways: vec![IpAddr::from([10, 77, host, 1])],
        rates: Rates::default(),
        prefix: 24,
        dns: vec![IpAddr::from([192, 0, 2, 53])],
        mtu: DEFAULT_MTU,
        mac: Some(MacAddr([2, 0, 10, 77, host, guest + 1])),
        kind: PortKind::Veth,
        server: None,
        queues: 1,
    }
}

/// A namespace that is deleted on drop.
pub(crate) struct Scratch {
    pub(crate) name: NetnsName,
    pub(crate) netns: Netns,
}

impl Scratch {
    fn new(what: &str) -> Self {
        let name = name(what);
        let netns = Netns::create(&name).unwrap();
        Self { name, netns }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        Netns::delete(&self.name).unwrap();
    }
}

pub(crate) struct Host {
    // Before its namespace in drop order.
    pub(crate) tunnel: Tunnel,
    pub(crate) scratch: Scratch,
}

pub(crate) struct Scene {
    pub(crate) hosts: [Host; 2],
    pub(crate) lan: Scratch,
    _turn: MutexGuard<'static, ()>,
}

impl Scene {
    pub(crate) fn new(mode: Mode) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        SCENE.fetch_add(1, Ordering::Relaxed);
        let lan = Scratch::new("lan");
        // No IPv6 of the kernel's own accord on the LAN.
        lan.netns.run(|| Sysctl::DisableIpv6(None).write("1").unwrap()).unwrap();
        let mut netlink = Netlink::open_in(&lan.netns).unwrap();
        netlink.add_bridge(ifname("br")).unwrap();
        netlink.set_up(ifname("br")).unwrap();
        let hosts = [1, 2].map(|h| Host::new(h, mode, &mut netlink));
        Self { hosts, lan, _turn: turn }
    }

    pub(crate) fn guest(&self, host: u8, guest: u8) -> GuestPort {
        self.hosts[usize::from(host) - 1].attach(guest_spec(host, guest))
    }

    pub(crate) fn guest_with(&self, host: u8, guest: u8, address: IpAddr) -> GuestPort {
        let spec = GuestSpec { addresses: vec![address], ..guest_spec(host, guest) };
        self.hosts[usize::from(host) - 1].attach(spec)
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // Guests outlive their ports; those of this scene do not outlive it.
        for left in Netns::list().unwrap() {
            let of_scene = left.as_str().strip_prefix(&prefix());
            if of_scene.is_some_and(|rest| rest.contains('g')) {
                Netns::delete(&left).unwrap();
            }
        }
    }
}

impl Host {
    fn new(h: u8, mode: Mode, lan: &mut Netlink) -> Self {
        let scratch = Scratch::new(&format!("h{h}"));
        let netns = &scratch.netns;
        let port = ifname(&format!("port{h}"));
        lan.add_veth(&Veth {
            name: port,
            peer: ifname("eth0"),
            peer_netns: Some(netns),
            mtu: None,
            mac: None,
            peer_mac: None,
        })
        .unwrap();
        lan.set_master(port, Some(ifname("br"))).unwrap();
        lan.set_up(port).unwrap();
        netns.run(|| Sysctl::DisableIpv6(Some(ifname("eth0"))).write("1").unwrap()).unwrap();
        let mut netlink = Netlink::open_in(netns).unwrap();
        netlink.set_up(IfName::LOOPBACK).unwrap();
        let outer = format!("192.0.2.{h}/24").parse().unwrap();
        netlink.add_address(ifname("eth0"), outer).unwrap();
        netlink.set_up(ifname("eth0")).unwrap();
        let tunnel = netns.run(|| Tunnel::start(config(h, mode)).unwrap()).unwrap();
        Self { tunnel, scratch }
    }

    pub(crate) fn netns(&self) -> &Netns {
        &self.scratch.netns
    }

    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.netns().run(work).unwrap()
    }

    pub(crate) fn netlink(&self) -> Netlink {
        Netlink::open_in(self.netns()).unwrap()
    }

    pub(crate) fn attach(&self, spec: GuestSpec) -> GuestPort {
        self.run(|| GuestPort::attach(spec).unwrap())
    }
}

fn config(h: u8, mode: Mode) -> Config {
    let other = 3 - h;
    let endpoint = SocketAddr::from(([192, 0, 2, other], DEFAULT_PORT));
    let allowed = vec![
        format!("10.77.{other}.0/24").parse().unwrap(),
        format!("fd00:{other}::/64").parse().unwrap(),
    ];
    let peer = PeerConfig::new(key(other).public(), Some(endpoint), allowed);
    Config {
        device: ifname("conet0"),
        private_key: key(h),
        listen: SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)),
        addresses: vec![
            format!("10.77.{h}.1/32").parse().unwrap(),
            format!("fd00:{h}::1/128").parse().unwrap(),
        ],
        mtu: DEFAULT_MTU,
        offloads: Offloads::ALL,
        peers: vec![PeerConfig { mode, ..peer }],
    }
}

/// What went over the LAN.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) packets: usize,
    /// Outer addresses other than the hosts', and what is neither IP nor ARP.
    pub(crate) foreign: Vec<String>,
    frames: Vec<Vec<u8>>,
}

impl Seen {
    pub(crate) fn contains(&self, pattern: &[u8]) -> bool {
        self.frames.iter().any(|frame| frame.windows(pattern.len()).any(|w| w == pattern))
    }

    fn frame(&mut self, frame: &[u8]) {
        self.packets += 1;
        let payload = &frame[14..];
        match frame[12..14] {
            [0x08, 0x00] => {
                let Ok(len) = packet_length(payload) else {
                    return self.foreign.push("a malformed packet".into());
                };
                let view = IpView::new(&payload[..len]).unwrap();
                // IGMP of the links themselves: no guest's packet.
                if view.protocol() == 2 {
                    return;
                }
                for address in [view.source(), view.destination()] {
                    if !matches!(address, IpAddr::V4(a) if a.octets()[..3] == [192, 0, 2]) {
                        self.foreign.push(address.to_string());
                    }
                }
            }
            // ARP: sender and target protocol addresses.
            [0x08, 0x06] => {
                for at in [14, 24] {
                    if payload[at..at + 3] != [192, 0, 2] {
                        self.foreign.push(format!("ARP {:?}", &payload[at..at + 4]));
                    }
                }
            }
            ref other => self.foreign.push(format!("protocol {other:02x?}")),
        }
        // A sample is enough for patterns, and keeps memory small.
        if self.frames.len() < 4000 {
            self.frames.push(frame.to_vec());
        }
    }
}

/// Everything that passes in a namespace, by a packet socket on all its links.
pub(crate) struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Seen>,
}

impl Capture {
    pub(crate) fn start(lan: &Scratch) -> Self {
        // ETH_P_ALL, in network order as packet(7) wants it.
        let all = Protocol::from(i32::from(3u16.to_be()));
        let open = || Socket::new(Domain::PACKET, Type::RAW, Some(all)).unwrap();
        let socket = lan.netns.run(open).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        socket.set_recv_buffer_size(8 << 20).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = thread::spawn(move || {
            let mut seen = Seen::default();
            let mut buffer = vec![0; 70_000];
            while !stopping.load(Ordering::Relaxed) {
                match (&socket).read(&mut buffer) {
                    Ok(len) => seen.frame(&buffer[..len]),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(e) => panic!("capture: {e}"),
                }
            }
            seen
        });
        Self { stop, thread }
    }

    pub(crate) fn stop(self) -> Seen {
        thread::sleep(Duration::from_millis(100));
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// One echo from inside a namespace; its round trip, or `None` after 2 seconds.
pub(crate) fn ping(from: &Netns, to: IpAddr) -> Option<Duration> {
    let icmp = Protocol::from(1);
    let socket = from.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(icmp)).unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut echo = [8, 0, 0, 0, 0x0c, 0x0e, 0, 1, b'p', b'i', b'n', b'g'];
    let sum = checksum(&echo, 0);
    echo[2..4].copy_from_slice(&sum.to_be_bytes());
    let began = Instant::now();
    socket.send_to(&echo, &SockAddr::from(SocketAddr::new(to, 0))).ok()?;
    let mut buffer = [0; 1500];
    while began.elapsed() < Duration::from_secs(2) {
        let Ok(len) = (&socket).read(&mut buffer) else { continue };
        let Ok(view) = IpView::new(&buffer[..len]) else { continue };
        if view.source() == to && view.payload()[0] == 0 && view.payload()[4..8] == echo[4..8] {
            return Some(began.elapsed());
        }
    }
    None
}

/// One UDP packet with a source of the sender's choice.
pub(crate) fn send_forged(from: &Netns, source: [u8; 4], to: [u8; 4]) {
    let raw = Protocol::from(255);
    let socket = from.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(raw)).unwrap()).unwrap();
    socket.set_header_included_v4(true).unwrap();
    let mut packet = vec![0; IPV4_HEADER + 12];
    let header = OuterV4 {
        source: source.into(),
        destination: to.into(),
        protocol: 17,
        ttl: 64,
        ecn: Ecn::NotEct,
        dont_fragment: true,
        total_len: 32,
    };
    header.emit(packet.first_chunk_mut().unwrap());
    packet[IPV4_HEADER..].copy_from_slice(&[0, 9, 0, 9, 0, 12, 0, 0, b'l', b'i', b'a', b'r']);
    socket.send_to(&packet, &SockAddr::from(SocketAddr::new(IpAddr::from(to), 9))).unwrap();
}
