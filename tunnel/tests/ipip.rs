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

/// Both implementations; each test runs with each.
const BOTH: [Offloads; 2] = [Offloads::ALL, Offloads { kernel: false, ..Offloads::ALL }];
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
        let [one, two] = wire();
        let mut with = Config { offloads, ..config(1, Mode::IpIp) };
        with.addresses.push(net("fd00:1::1/128"));
        with.peers[0].allowed.push(net("fd00:2::/32"));
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

    /// Puts an outer packet on the wire, from the peer.
    fn put(&self, outer: &[u8]) {
        let to = self.one.netlink().link(ifname("eth0")).unwrap().unwrap().mac.unwrap();
        let from = self.two.netlink().link(ifname("eth0")).unwrap().unwrap().mac.unwrap();
        let mut frame = [&to.0[..], &from.0, &[8, 0]].concat();
        frame.extend_from_slice(outer);
        rustix::net::send(&self.wire, &frame, SendFlags::empty()).unwrap();
    }

    /// The next outer packet on the wire of which `is` says yes.
    fn on_wire(&self, is: impl Fn(&IpView<&[u8]>) -> bool) -> Vec<u8> {
        next(&self.wire, 14, is)
    }

    /// Puts packets on the wire, with one behind them that must arrive, and gives what
    /// has come out of the device before that.
    fn through(&self, outer: &[Vec<u8>]) -> Vec<Vec<u8>> {
        outer.iter().for_each(|packet| self.put(packet));
        let mark = packet_v4([10, 77, 2, 2], [10, 77, 1, 1], Ecn::NotEct, b"the last one");
        self.put(&wrapped(Ecn::NotEct, &mark));
        let mut came = Vec::new();
        loop {
            let packet = next(&self.device, 0, |_| true);
            if packet == mark {
                return came;
            }
            // Nothing of the kernel's own, such as multicast.
            if IpView::new(&packet[..]).is_ok_and(|p| p.protocol() == EXPERIMENT || is_icmp(&p)) {
                came.push(packet);
            }
        }
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        self.tunnel.snapshot().unwrap().peer(key(2).public()).unwrap().dropped(reason)
    }
}

fn is_icmp<T: AsRef<[u8]>>(packet: &IpView<T>) -> bool {
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
    for offloads in BOTH {
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
    for offloads in BOTH {
        let scene = Scene::new(offloads);
        for (n, (reason, packet)) in cases.iter().enumerate() {
            let before = scene.tunnel.snapshot().unwrap();
            let came = scene.through(&[wrapped(Ecn::NotEct, packet)]);
            assert!(came.is_empty(), "case {n}: {came:?}");
            let after = scene.tunnel.snapshot().unwrap();
            let peer = key(2).public();
            let total = |s: &conet_tunnel::Snapshot| s.peer(peer).unwrap().drops.total();
            assert_eq!(scene.dropped(*reason), before.peer(peer).unwrap().dropped(*reason) + 1,
                "case {n}: {reason}, {after:?}");
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
    for offloads in BOTH {
        let scene = Scene::new(offloads);
        let short = good_v4(Ecn::NotEct, b"x");
        let mut padded = wrapped(Ecn::NotEct, &short);
        padded.resize(60, 0xee);
        assert_eq!(scene.through(&[padded]), [short.clone()]);

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
        assert_eq!(scene.through(&[options]), [short.clone()]);

        let mut wrong = wrapped(Ecn::NotEct, &short);
        wrong[10] ^= 1;
        let mut elsewhere = wrapped(Ecn::NotEct, &short);
        header([192, 0, 2, 2], [192, 0, 2, 200], 4, Ecn::NotEct, elsewhere.len())
            .emit(elsewhere.first_chunk_mut().unwrap());
        assert!(scene.through(&[wrong, elsewhere]).is_empty());
    }
}
