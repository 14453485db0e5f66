//! Mode `ipip` on real packets, by both implementations: the kernel's programs and the
//! raw sockets. One end is a tunnel, the other a wire on which packets are made and
//! looked at byte by byte. Needs root; the programs need Linux 6.6.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use common::{Scratch, config, ifname, inner, key, net, peer, wire};
use conet_dataplane::DropReason;
use conet_testkit::{Need, privileged};
use conet_tunnel::{Config, IpipPath, Mode, Offloads, PeerConfig, Tunnel};
use conet_wire::ip::{Ecn, IPV4_HEADER, IPV6_HEADER, IpView, OuterV4, checksum};
use rustix::net::{RecvFlags, SendFlags};
use socket2::{Domain, Protocol, Socket, Type};

/// Both implementations, where the kernel has the programs; each test runs with each.
fn both() -> Vec<Offloads> {
    let sockets = Offloads { kernel: false, ..Offloads::ALL };
    let kernel = common::kernel_carries().then_some(Offloads::ALL);
    kernel.into_iter().chain([sockets]).collect()
}

/// For what must come; what must not come is waited for by a packet behind it.
const PATIENCE: Duration = Duration::from_secs(20);
/// Protocol for experiments (RFC 3692): no socket and no rule knows it.
const EXPERIMENT: u8 = 253;

/// A tunnel in one namespace, with the bare wire in the other.
struct Scene {
    tunnel: Tunnel,
    one: Scratch,
    /// Sees and makes what is on the wire.
    wire: OwnedFd,
    /// Sees what comes out of the tunnel's device into its host.
    device: OwnedFd,
    two: Scratch,
    /// Open, so that the far kernel does not answer that it knows no tunnels.
    _silence: [Socket; 2],
    carried: bool,
}

impl Scene {
    fn new(offloads: Offloads) -> Self {
        Self::over(offloads, 1500)
    }

    /// The configuration says that the way takes packets of `path_mtu` bytes.
    fn over(offloads: Offloads, path_mtu: u16) -> Self {
        let [one, two] = wire();
        let mut with = Config { offloads, ..config(1, Mode::IpIp) };
        with.addresses.push(net("fd00:1::1/128"));
        with.peers[0].allowed.push(net("fd00:2::/32"));
        with.peers[0].path_mtu = path_mtu;
        // Whose addresses the other may not use.
        with.peers.push(PeerConfig { endpoint: Some(at(9)), ..peer(3, Mode::IpIp) });
        let tunnel = one.start(with).unwrap();
        let device = one.run(|| packet_socket("conet0"));
        let wire = two.run(|| packet_socket("eth0"));
        let silence = two.run(|| {
            let raw = |n| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(n))).unwrap();
            [raw(4), raw(41)]
        });
        let carried = offloads.kernel;
        let scene = Self { tunnel, one, wire, device, two, _silence: silence, carried };
        scene.warm();
        scene
    }

    /// Sends packets until they travel as they shall.
    fn warm(&self) {
        let socket = self.one.run(|| UdpSocket::bind((inner(1), 0)).unwrap());
        let began = Instant::now();
        loop {
            socket.send_to(b"warm", (inner(2), 9)).unwrap();
            let snapshot = self.tunnel.snapshot().unwrap();
            match (&snapshot.ipip, snapshot.peer(key(2).public()).unwrap().in_kernel) {
                (IpipPath::Kernel, true) if self.carried => break,
                (IpipPath::SwitchedOff, false) if !self.carried => break,
                (IpipPath::Refused(error), _) => panic!("{error}: {error:?}"),
                _ => assert!(began.elapsed() < PATIENCE, "{snapshot:?}"),
            }
            thread::sleep(Duration::from_millis(50));
        }
        drain(&self.wire);
    }

    /// Sends a packet of the host's own into the tunnel, as it is.
    fn send(&self, packet: &[u8]) {
        let (domain, to): (_, SocketAddr) = match packet[0] >> 4 {
            6 => (Domain::IPV6, "[fd00:2::2]:0".parse().unwrap()),
            _ => (Domain::IPV4, "10.77.2.2:0".parse().unwrap()),
        };
        // IPPROTO_RAW: the header is ours.
        let raw = Some(Protocol::from(255));
        let socket = self.one.run(|| Socket::new(domain, Type::RAW, raw)).unwrap();
        assert_eq!(socket.send_to(packet, &to.into()).unwrap(), packet.len());
    }

    /// The next packet that the device gives its host which is an error of ICMP.
    fn told(&self) -> Vec<u8> {
        // Of those about neighbours and routers there are none on a TUN device.
        next(&self.device, 0, is_icmp)
    }

    /// Puts an outer packet on the wire, from the peer.
    fn put(&self, outer: &[u8]) {
        let to = self.one.netlink().link(ifname("eth0")).unwrap().unwrap().mac.unwrap();
        let from = self.two.netlink().link(ifname("eth0")).unwrap().unwrap().mac.unwrap();
        let mut frame = [&to.0[..], &from.0, &[8, 0]].concat();
        frame.extend_from_slice(outer);
        rustix::net::send(&self.wire, &frame, SendFlags::empty()).unwrap();
    }

    /// The next outer packet of `protocol` on the wire that holds one of ours.
    fn on_wire(&self, protocol: u8) -> Vec<u8> {
        next(&self.wire, 14, |outer| {
            let of_inner = if protocol == 4 { 9 } else { 6 };
            outer.protocol() == protocol && outer.payload().get(of_inner) == Some(&EXPERIMENT)
        })
    }

    /// Puts packets on the wire, with two behind them that must arrive, and gives what
    /// has come out of the device before those. The two are padded, so that they go by
    /// user space and are the last ones in both implementations, by either protocol.
    fn through(&self, outer: &[Vec<u8>]) -> Vec<Vec<u8>> {
        outer.iter().for_each(|packet| self.put(packet));
        let mut marks = vec![good_v4(Ecn::NotEct, b"the last"), good_v6(Ecn::NotEct, b"the last")];
        for mark in &marks {
            self.put(&[&wrapped(Ecn::NotEct, mark)[..], &[0xee; 60]].concat());
        }
        let mut came = Vec::new();
        while !marks.is_empty() {
            let packet = next(&self.device, 0, |_| true);
            if let Some(mark) = marks.iter().position(|mark| *mark == packet) {
                marks.remove(mark);
                continue;
            }
            // Nothing of the kernel's own, such as multicast.
            if IpView::new(&packet[..]).is_ok_and(|p| p.protocol() == EXPERIMENT || is_icmp(&p)) {
                came.push(packet);
            }
        }
        came
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        self.tunnel.snapshot().unwrap().peer(key(2).public()).unwrap().dropped(reason)
    }
}

fn is_icmp(packet: &IpView<&[u8]>) -> bool {
    matches!(packet.protocol(), 1 | 58)
}

fn at(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 1))
}

/// Frames of a link with Ethernet headers, packets of one without; what comes in only.
fn packet_socket(link: &str) -> OwnedFd {
    common::sys::packet_socket(ifname(link))
}

fn drain(socket: &OwnedFd) {
    let mut buffer = [0; 2048];
    while rustix::net::recv(socket, &mut buffer, RecvFlags::DONTWAIT).is_ok() {}
}

fn next(socket: &OwnedFd, skip: usize, is: impl Fn(&IpView<&[u8]>) -> bool) -> Vec<u8> {
    let began = Instant::now();
    let mut buffer = vec![0; 70_000];
    loop {
        assert!(began.elapsed() < PATIENCE, "it does not come");
        match rustix::net::recv(socket, &mut buffer[..], RecvFlags::DONTWAIT) {
            Ok((len, _)) => {
                if let Some(packet) = buffer[..len].get(skip..)
                    && IpView::new(packet).is_ok_and(|view| is(&view))
                {
                    return packet.to_vec();
                }
            }
            Err(rustix::io::Errno::AGAIN) => thread::sleep(Duration::from_millis(2)),
            Err(error) => panic!("{error}"),
        }
    }
}

fn header(source: [u8; 4], destination: [u8; 4], protocol: u8, ecn: Ecn, total: usize) -> OuterV4 {
    OuterV4 {
        source: source.into(),
        destination: destination.into(),
        protocol,
        ttl: 63,
        ecn,
        dont_fragment: true,
        total_len: u16::try_from(total).unwrap(),
    }
}

fn packet_v4(source: [u8; 4], destination: [u8; 4], ecn: Ecn, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; IPV4_HEADER + payload.len()];
    let header = header(source, destination, EXPERIMENT, ecn, bytes.len());
    header.emit(bytes.first_chunk_mut().unwrap());
    bytes[IPV4_HEADER..].copy_from_slice(payload);
    bytes
}

fn packet_v6(source: &str, destination: &str, ecn: Ecn, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; IPV6_HEADER];
    (bytes[0], bytes[1]) = (0x60, (ecn as u8) << 4);
    bytes[4..6].copy_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
    (bytes[6], bytes[7]) = (EXPERIMENT, 63);
    for (start, address) in [(8, source), (24, destination)] {
        let address: std::net::Ipv6Addr = address.parse().unwrap();
        bytes[start..start + 16].copy_from_slice(&address.octets());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// From the peer to the tunnel's host.
fn wrapped(ecn: Ecn, inner: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; IPV4_HEADER];
    let protocol = if inner.first().is_some_and(|first| first >> 4 == 6) { 41 } else { 4 };
    let total = IPV4_HEADER + inner.len();
    header([192, 0, 2, 2], [192, 0, 2, 1], protocol, ecn, total)
        .emit(bytes.first_chunk_mut().unwrap());
    bytes.extend_from_slice(inner);
    bytes
}

fn good_v4(ecn: Ecn, payload: &[u8]) -> Vec<u8> {
    packet_v4([10, 77, 2, 2], [10, 77, 1, 1], ecn, payload)
}

fn good_v6(ecn: Ecn, payload: &[u8]) -> Vec<u8> {
    packet_v6("fd00:2::2", "fd00:1::1", ecn, payload)
}

/// RFC 6040 §4.2, figure 4, all sixteen pairs, with the checksum of the changed header.
#[test]
fn marks_go_inside_as_rfc_6040_has_it() {
    privileged!(Need::Tun);
    use Ecn::{Ce, Ect0, Ect1, NotEct};
    for offloads in both() {
        let scene = Scene::new(offloads);
        let mut dropped = 0;
        for (inner, results) in [
            (NotEct, [Some(NotEct), Some(NotEct), Some(NotEct), None]),
            (Ect0, [Some(Ect0), Some(Ect0), Some(Ect1), Some(Ce)]),
            (Ect1, [Some(Ect1), Some(Ect1), Some(Ect1), Some(Ce)]),
            (Ce, [Some(Ce), Some(Ce), Some(Ce), Some(Ce)]),
        ] {
            for (outer, expected) in [NotEct, Ect0, Ect1, Ce].into_iter().zip(results) {
                for packet in [good_v4(inner, b"marked"), good_v6(inner, b"marked")] {
                    let came = scene.through(&[wrapped(outer, &packet)]);
                    let expected = expected.map(|mark| {
                        let mut packet = packet.clone();
                        IpView::new(&mut packet[..]).unwrap().set_ecn(mark);
                        packet
                    });
                    assert_eq!(came, Vec::from_iter(expected), "{inner:?} under {outer:?}");
                    if let Some(four) = came.first().filter(|packet| packet[0] >> 4 == 4) {
                        assert_eq!(checksum(&four[..IPV4_HEADER], 0), 0);
                    }
                }
                dropped += 2 * u64::from(expected.is_none());
                assert_eq!(scene.dropped(DropReason::Congestion), dropped);
            }
        }
    }
}

/// Each with the counter that it moves, and no other.
#[test]
fn what_must_not_come_out_is_dropped_and_counted() {
    privileged!(Need::Tun);
    use DropReason::{Malformed, Nested, NoHops, NotUnicast, SourceNotAllowed};
    let four = |source, destination| packet_v4(source, destination, Ecn::NotEct, b"x");
    let six = |source, destination| packet_v6(source, destination, Ecn::NotEct, b"x");
    let changed = |mut packet: Vec<u8>, at: usize, to: u8| {
        packet[at] = to;
        packet
    };
    let (host, from) = ([10, 77, 1, 1], [10, 77, 2, 2]);
    let cases: Vec<(DropReason, Vec<u8>)> = vec![
        (SourceNotAllowed, four([10, 77, 3, 2], host)),
        (SourceNotAllowed, four([10, 77, 1, 9], host)),
        (SourceNotAllowed, four([192, 0, 2, 2], host)),
        (SourceNotAllowed, six("fd00:3::1", "fd00:1::1")),
        (NotUnicast, four([224, 0, 0, 1], host)),
        (NotUnicast, four([127, 0, 0, 1], host)),
        (NotUnicast, four([0, 0, 0, 0], host)),
        (NotUnicast, four([255, 255, 255, 255], host)),
        (NotUnicast, four(from, [239, 1, 1, 1])),
        (NotUnicast, four(from, [127, 0, 0, 1])),
        (NotUnicast, six("::1", "fd00:1::1")),
        (NotUnicast, six("::", "fd00:1::1")),
        (NotUnicast, six("ff02::1", "fd00:1::1")),
        (NotUnicast, six("fd00:2::2", "ff02::1")),
        (NoHops, changed(four(from, host), 8, 0)),
        (NoHops, changed(good_v6(Ecn::NotEct, b"x"), 7, 0)),
        (Nested, changed(four(from, host), 9, 4)),
        (Nested, changed(four(from, host), 9, 41)),
        (Nested, changed(good_v6(Ecn::NotEct, b"x"), 6, 41)),
        (Malformed, changed(four(from, host), 0, 0x44)),
        (Malformed, changed(four(from, host), 2, 1)),
        (Malformed, changed(four(from, host), 3, 3)),
        (Malformed, changed(good_v6(Ecn::NotEct, b"x"), 4, 1)),
        (Malformed, changed(changed(good_v6(Ecn::NotEct, b""), 6, 0), 5, 0)),
        (Malformed, four(from, host)[..12].to_vec()),
        (Malformed, changed(four(from, host), 0, 0x55)),
    ];
    for offloads in both() {
        let scene = Scene::new(offloads);
        for (n, (reason, packet)) in cases.iter().enumerate() {
            let before = scene.tunnel.snapshot().unwrap();
            let came = scene.through(&[wrapped(Ecn::NotEct, packet)]);
            assert!(came.is_empty(), "case {n}: {came:?}");
            let after = scene.tunnel.snapshot().unwrap();
            let peer = key(2).public();
            let total = |s: &conet_tunnel::Snapshot| s.peer(peer).unwrap().drops.total();
            assert_eq!(
                scene.dropped(*reason),
                before.peer(peer).unwrap().dropped(*reason) + 1,
                "case {n}: {reason}, {after:?}"
            );
            assert_eq!(total(&after), total(&before) + 1, "case {n}");
        }
        // From nobody we know, and with the wrong protocol outside.
        let mut stranger = wrapped(Ecn::NotEct, &good_v4(Ecn::NotEct, b"x"));
        header([192, 0, 2, 77], [192, 0, 2, 1], 4, Ecn::NotEct, stranger.len())
            .emit(stranger.first_chunk_mut().unwrap());
        assert!(scene.through(&[stranger]).is_empty());
        assert_eq!(scene.tunnel.snapshot().unwrap().drops[DropReason::UnknownPeer], 1);
        let mut four_in_41 = wrapped(Ecn::NotEct, &good_v4(Ecn::NotEct, b"x"));
        header([192, 0, 2, 2], [192, 0, 2, 1], 41, Ecn::NotEct, four_in_41.len())
            .emit(four_in_41.first_chunk_mut().unwrap());
        let before = scene.dropped(Malformed);
        assert!(scene.through(&[four_in_41]).is_empty());
        assert_eq!(scene.dropped(Malformed), before + 1);
        assert!(matches!(scene.tunnel.snapshot().unwrap().ipip, IpipPath::Kernel) == scene.carried);
    }
}

/// Padding of short frames, an outer packet in fragments, options outside: each arrives
/// as it was inside. A wrong outer checksum, or a packet to somebody else, does not.
#[test]
fn what_is_odd_outside_arrives_all_the_same() {
    privileged!(Need::Tun);
    for offloads in both() {
        let scene = Scene::new(offloads);
        let short = good_v4(Ecn::NotEct, b"x");
        let mut padded = wrapped(Ecn::NotEct, &short);
        padded.resize(60, 0xee);
        assert_eq!(scene.through(&[padded]), std::slice::from_ref(&short));

        let large = good_v4(Ecn::NotEct, &[7; 2600]);
        let whole = wrapped(Ecn::NotEct, &large);
        let mut parts = Vec::new();
        for (start, end) in [(0, 1400), (1400, whole.len() - IPV4_HEADER)] {
            let mut part = whole[..IPV4_HEADER].to_vec();
            part.extend_from_slice(&whole[IPV4_HEADER..][start..end]);
            let more = if end == 1400 { 0x2000 } else { 0 };
            let offset = u16::try_from(start / 8).unwrap() | more;
            let length = u16::try_from(part.len()).unwrap();
            part[2..4].copy_from_slice(&length.to_be_bytes());
            part[4..6].copy_from_slice(&7u16.to_be_bytes());
            part[6..8].copy_from_slice(&offset.to_be_bytes());
            part[10..12].copy_from_slice(&[0, 0]);
            let sum = checksum(&part[..IPV4_HEADER], 0);
            part[10..12].copy_from_slice(&sum.to_be_bytes());
            parts.push(part);
        }
        assert_eq!(scene.through(&parts), [large]);

        let mut options = wrapped(Ecn::NotEct, &short);
        let length = u16::try_from(options.len() + 4).unwrap();
        options[0] = 0x46;
        options[2..4].copy_from_slice(&length.to_be_bytes());
        options[10..12].copy_from_slice(&[0, 0]);
        // Three of no operation and the end.
        options.splice(IPV4_HEADER..IPV4_HEADER, [1, 1, 1, 0]);
        let sum = checksum(&options[..IPV4_HEADER + 4], 0);
        options[10..12].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(scene.through(&[options]), std::slice::from_ref(&short));

        let mut wrong = wrapped(Ecn::NotEct, &short);
        wrong[10] ^= 1;
        let mut elsewhere = wrapped(Ecn::NotEct, &short);
        header([192, 0, 2, 2], [192, 0, 2, 200], 4, Ecn::NotEct, elsewhere.len())
            .emit(elsewhere.first_chunk_mut().unwrap());
        assert!(scene.through(&[wrong, elsewhere]).is_empty());
    }
}

/// The outer header, field by field, and the inner packet as it was.
#[test]
fn the_outer_header_is_as_the_rules_have_it() {
    privileged!(Need::Tun);
    for offloads in both() {
        let scene = Scene::new(offloads);
        let mut idents = std::collections::BTreeSet::new();
        for ecn in [Ecn::NotEct, Ecn::Ect0, Ecn::Ect1, Ecn::Ce] {
            for (v6, df) in [(false, true), (false, false), (true, true)] {
                let mut packet = match v6 {
                    true => packet_v6("fd00:1::1", "fd00:2::2", ecn, &[7; 100]),
                    false => packet_v4([10, 77, 1, 1], [10, 77, 2, 2], ecn, &[7; 100]),
                };
                if !df {
                    // With an identification of its own, else the kernel gives it one.
                    packet[4..8].copy_from_slice(&[9, 9, 0, 0]);
                    packet[10..12].copy_from_slice(&[0, 0]);
                    let sum = checksum(&packet[..IPV4_HEADER], 0);
                    packet[10..12].copy_from_slice(&sum.to_be_bytes());
                }
                scene.send(&packet);
                let outer = scene.on_wire(if v6 { 41 } else { 4 });
                let view = IpView::new(&outer[..]).unwrap();
                assert_eq!(outer[0], 0x45);
                assert_eq!(outer[1], ecn as u8, "no class of service, the mark copied");
                assert_eq!(view.hops(), 64);
                assert_eq!(view.protocol(), if v6 { 41 } else { 4 });
                assert_eq!(view.dont_fragment(), df);
                assert!(!view.is_fragment());
                assert_eq!(view.source(), at(1).ip());
                assert_eq!(view.destination(), at(2).ip());
                assert_eq!(checksum(&outer[..IPV4_HEADER], 0), 0);
                assert_eq!(view.payload(), packet, "{ecn:?}, {v6} {df}");
                if !df {
                    assert!(idents.insert([outer[4], outer[5]]), "an identification twice");
                }
            }
        }
    }
}

/// What does not fit: the sender is told, or it goes in fragments, or is dropped silently
/// where nobody may be told. 1300 bytes outside, 1280 inside.
#[test]
fn what_does_not_fit_is_told_or_fragmented() {
    privileged!(Need::Tun);
    for offloads in both() {
        let scene = Scene::over(offloads, 1300);
        let of = |len: usize| packet_v4([10, 77, 1, 1], [10, 77, 2, 2], Ecn::NotEct, &vec![7; len]);
        // Just fits.
        scene.send(&of(1260));
        assert_eq!(scene.on_wire(4).len(), 1300);
        let before = scene.dropped(DropReason::TooBig);
        let over = of(1261);
        scene.send(&over);
        let told = scene.told();
        let view = IpView::new(&told[..]).unwrap();
        assert_eq!(view.destination(), inner(1));
        assert_eq!(view.payload()[..2], [3, 4], "fragmentation needed");
        assert_eq!(view.payload()[6..8], 1280u16.to_be_bytes());
        assert_eq!(view.payload()[8..8 + 100], over[..100]);
        assert_eq!(scene.dropped(DropReason::TooBig), before + 1);
        // The same by IPv6: 1280 is promised, what is more is told.
        scene.send(&packet_v6("fd00:1::1", "fd00:2::2", Ecn::NotEct, &[7; 1241]));
        let told = scene.told();
        let view = IpView::new(&told[..]).unwrap();
        assert!(view.is_v6());
        assert_eq!(view.payload()[..2], [2, 0], "packet too big");
        assert_eq!(view.payload()[4..8], 1280u32.to_be_bytes());
        scene.send(&packet_v6("fd00:1::1", "fd00:2::2", Ecn::NotEct, &[7; 1240]));
        assert_eq!(scene.on_wire(41).len(), 1300);
        // Without DF: fragments outside, where the link is what does not take it.
        let mut may = of(1300);
        may[6] = 0;
        may[10..12].copy_from_slice(&[0, 0]);
        let sum = checksum(&may[..IPV4_HEADER], 0);
        may[10..12].copy_from_slice(&sum.to_be_bytes());
        scene.send(&may);
        let outer = scene.on_wire(4);
        let view = IpView::new(&outer[..]).unwrap();
        assert!(!view.dont_fragment());
        assert_eq!(scene.dropped(DropReason::TooBig), before + 2);
        // A source that is ours outside would travel in a circle.
        scene.send(&packet_v4([192, 0, 2, 1], [10, 77, 2, 2], Ecn::NotEct, b"circle"));
        let began = Instant::now();
        while scene.dropped(DropReason::Loop) != 1 {
            assert!(began.elapsed() < PATIENCE);
            thread::sleep(Duration::from_millis(5));
        }
        // A tunnel inside the tunnel.
        let mut nested = of(40);
        nested[9] = 4;
        nested[10..12].copy_from_slice(&[0, 0]);
        let sum = checksum(&nested[..IPV4_HEADER], 0);
        nested[10..12].copy_from_slice(&sum.to_be_bytes());
        scene.send(&nested);
        let began = Instant::now();
        while scene.dropped(DropReason::Nested) != 1 {
            assert!(began.elapsed() < PATIENCE);
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Each rule of what becomes of an error about an outer packet (RFC 2003 §4).
#[test]
fn errors_from_the_way_are_told_inside() {
    privileged!(Need::Tun);
    for offloads in both() {
        let scene = Scene::new(offloads);
        let packet = packet_v4([10, 77, 1, 1], [10, 77, 2, 2], Ecn::NotEct, &[7; 900]);
        scene.send(&packet);
        let outer = scene.on_wire(4);
        let error = |kind: u8, code: u8, mtu: u16, quoted: &[u8]| {
            let mut icmp = vec![kind, code, 0, 0, 0, 0, 0, 0];
            icmp[6..8].copy_from_slice(&mtu.to_be_bytes());
            icmp.extend_from_slice(&quoted[..quoted.len().min(520)]);
            let sum = checksum(&icmp, 0);
            icmp[2..4].copy_from_slice(&sum.to_be_bytes());
            let mut bytes = vec![0; IPV4_HEADER];
            header([192, 0, 2, 2], [192, 0, 2, 1], 1, Ecn::NotEct, IPV4_HEADER + icmp.len())
                .emit(bytes.first_chunk_mut().unwrap());
            bytes.extend_from_slice(&icmp);
            bytes
        };
        for (sent, told) in [
            ((3, 1, 0), Some((3, 1, 0))),
            ((3, 13, 0), Some((3, 1, 0))),
            ((11, 0, 0), Some((3, 1, 0))),
            ((5, 1, 0), None),
            ((12, 0, 0), None),
            ((3, 4, 1280), Some((3, 4, 1260))),
        ] {
            let (kind, code, mtu) = sent;
            scene.put(&error(kind, code, mtu, &outer));
            match told {
                Some(told) => {
                    let packet = scene.told();
                    let view = IpView::new(&packet[..]).unwrap();
                    assert_eq!(view.destination(), inner(1));
                    let icmp = view.payload();
                    assert_eq!(checksum(icmp, 0), 0);
                    assert_eq!(icmp[8..48], outer[20..60], "what was sent is quoted");
                    let seen = (icmp[0], icmp[1], u16::from_be_bytes([icmp[6], icmp[7]]));
                    assert_eq!(seen, told, "{sent:?}");
                }
                None => assert!(scene.through(&[]).is_empty(), "{sent:?}"),
            }
        }
        // About a packet that cannot have gone to that peer.
        let mut forged = outer.clone();
        forged[20 + 18] = 9;
        scene.put(&error(3, 1, 0, &forged));
        assert!(scene.through(&[]).is_empty());
        let began = Instant::now();
        while scene.dropped(DropReason::BadError) != 1 {
            assert!(began.elapsed() < PATIENCE);
            thread::sleep(Duration::from_millis(5));
        }
        // And the way's MTU is known from now on: by kernel, core and programs.
        let began = Instant::now();
        let peer = key(2).public();
        while scene.tunnel.snapshot().unwrap().peer(peer).unwrap().path_mtu != 1280 {
            assert!(began.elapsed() < PATIENCE);
            scene.send(&packet);
            thread::sleep(Duration::from_millis(50));
        }
        drain(&scene.device);
        scene.send(&packet_v4([10, 77, 1, 1], [10, 77, 2, 2], Ecn::NotEct, &[7; 1241]));
        let told = scene.told();
        assert_eq!(IpView::new(&told[..]).unwrap().payload()[6..8], 1260u16.to_be_bytes());
    }
}
