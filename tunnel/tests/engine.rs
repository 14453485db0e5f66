//! Whole tunnels in memory: two or three engines, their datagrams carried by
//! hand, lost, repeated, reordered and spoiled on the way.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use conet_dataplane::{DropReason, MemoryPort};
use conet_testkit::random::Random;
use conet_tunnel::{
    Core, Destination, Engine, MemoryDatagram, MemoryNetwork, Mode, OwnAddresses, PeerConfig,
    PeerError, PrivateKey, PublicKey,
};
use conet_wire::ip::{Ecn, IPV4_HEADER, IpView, OuterV4, checksum};

type Node = Engine<MemoryPort, MemoryNetwork>;

/// Randomness from `CONET_SEED`, or from the clock; printed, so that a failure
/// can be repeated.
fn random() -> Random {
    let seed = std::env::var("CONET_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        u64::try_from(now.as_micros()).unwrap()
    });
    println!("CONET_SEED={seed}");
    Random::new(seed)
}

const MODES: [Mode; 3] = [Mode::WireGuard, Mode::IpUdp, Mode::IpIp];

fn below(random: &mut Random, bound: usize) -> usize {
    usize::try_from(random.below(bound as u64)).unwrap()
}

fn key(n: u8) -> PrivateKey {
    PrivateKey::from_bytes([n; 32])
}

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 51820))
}

fn node(n: u8) -> Node {
    let own =
        OwnAddresses { inner: vec![IpAddr::from([10, 77, n, 1])], outer: vec![address(n).ip()] };
    let core = Core::new(key(n), own, Instant::now(), Duration::from_secs(1 << 30));
    Engine::new(core, MemoryPort::default(), MemoryNetwork::default())
}

fn peer(n: u8, mode: Mode) -> PeerConfig {
    let allowed =
        vec![format!("10.77.{n}.0/24").parse().unwrap(), format!("fd00:{n}::/32").parse().unwrap()];
    PeerConfig { mode, ..PeerConfig::new(key(n).public(), Some(address(n)), allowed) }
}

fn pair(mode: Mode) -> [Node; 2] {
    let (mut a, mut b) = (node(1), node(2));
    a.core.add_peer(&peer(2, mode)).unwrap();
    b.core.add_peer(&peer(1, mode)).unwrap();
    [a, b]
}

fn packet_from(source: [u8; 4], destination: [u8; 4], ecn: Ecn, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; IPV4_HEADER + payload.len()];
    let header = OuterV4 {
        source: source.into(),
        destination: destination.into(),
        protocol: 17,
        ttl: 63,
        ecn,
        dont_fragment: true,
        total_len: u16::try_from(bytes.len()).unwrap(),
    };
    header.emit(bytes.first_chunk_mut().unwrap());
    bytes[IPV4_HEADER..].copy_from_slice(payload);
    bytes
}

fn packet(from: u8, to: u8, payload: &[u8]) -> Vec<u8> {
    packet_from([10, 77, from, 2], [10, 77, to, 2], Ecn::NotEct, payload)
}

/// Takes what node `from` has sent, as its receivers would see it.
fn sent(node: &mut Node, from: u8) -> Vec<(u8, MemoryDatagram)> {
    let outgoing = node.network.outgoing.drain(..);
    outgoing
        .map(|(to, mut datagram)| match to {
            Destination::Udp(to) => {
                datagram.from = Some(address(from));
                let IpAddr::V4(to) = to.ip() else { panic!("no IPv6 here") };
                (to.octets()[3], datagram)
            }
            Destination::Ip(to) => {
                // What the kernel does to a raw packet: its source.
                datagram.bytes[12..16].copy_from_slice(&[192, 0, 2, from]);
                (to.octets()[3], datagram)
            }
        })
        .collect()
}

/// Carries everything to and fro until nothing moves.
fn settle(nodes: &mut [Node]) {
    for _ in 0..20 {
        let mut moved = false;
        for i in 0..nodes.len() {
            nodes[i].step_device().unwrap();
            nodes[i].step_network().unwrap();
            for (to, datagram) in sent(&mut nodes[i], u8::try_from(i + 1).unwrap()) {
                moved = true;
                nodes[usize::from(to) - 1].network.incoming.push_back(datagram);
            }
        }
        if !moved {
            return;
        }
    }
    panic!("the nodes never fall silent");
}

fn give(node: &mut Node, packet: Vec<u8>) {
    node.device.incoming.push_back(packet);
}

fn taken(node: &mut Node) -> Vec<Vec<u8>> {
    node.device.outgoing.drain(..).collect()
}

fn drops_of(node: &Node, peer: u8) -> conet_dataplane::DropCounts {
    let key: PublicKey = key(peer).public();
    node.core.peers().iter().find(|p| p.public_key == key).unwrap().drops
}

#[test]
fn packets_cross_both_ways_in_both_modes_and_families() {
    for mode in MODES {
        let mut nodes = pair(mode);
        let there = packet(1, 2, b"there");
        let back = packet(2, 1, b"back again");
        let mut six = vec![0x60, 0, 0, 0, 0, 3, 17, 64];
        six.extend_from_slice(&[0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        six.extend_from_slice(&[0xfd, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        six.extend_from_slice(b"six");
        // The first packets wait for the handshake and are not lost.
        for packet in [&there, &six] {
            give(&mut nodes[0], packet.clone());
        }
        settle(&mut nodes);
        give(&mut nodes[1], back.clone());
        settle(&mut nodes);
        assert_eq!(taken(&mut nodes[1]), [there, six], "{mode}");
        assert_eq!(taken(&mut nodes[0]), [back], "{mode}");
        for node in &nodes {
            let peer = &node.core.peers()[0];
            assert_eq!(peer.drops.total() + node.core.drops().total(), 0, "{mode} {peer:?}");
            assert_eq!(peer.last_handshake.is_some(), mode == Mode::WireGuard);
        }
        let (a, b) = (&nodes[0].core.peers()[0], &nodes[1].core.peers()[0]);
        assert_eq!((a.tx_packets, a.tx_bytes), (b.rx_packets, b.rx_bytes));
        assert_eq!((a.rx_packets, a.rx_bytes), (b.tx_packets, b.tx_bytes));
    }
}

#[test]
fn wireguard_shows_no_inner_byte_and_ipip_shows_a_proper_outer_header() {
    let pattern = b"a recognisable pattern, thirty-two";
    for mode in MODES {
        let mut nodes = pair(mode);
        give(&mut nodes[0], packet(1, 2, b"open the session"));
        settle(&mut nodes);
        give(&mut nodes[0], packet_from([10, 77, 1, 2], [10, 77, 2, 2], Ecn::Ect0, pattern));
        nodes[0].step_device().unwrap();
        let [(to, datagram)]: [_; 1] = sent(&mut nodes[0], 1).try_into().unwrap();
        assert_eq!(to, 2);
        let clear = datagram.bytes.windows(pattern.len()).any(|w| w == pattern);
        assert_eq!(clear, mode != Mode::WireGuard);
        match mode {
            Mode::WireGuard | Mode::IpUdp => {
                assert_eq!(datagram.ecn, Ecn::Ect0, "the mark is copied out");
            }
            Mode::IpIp => {
                let outer = IpView::new(&datagram.bytes).unwrap();
                assert_eq!((outer.hops(), outer.protocol(), outer.ecn()), (64, 4, Ecn::Ect0));
                assert!(outer.dont_fragment());
            }
        }
    }
}

/// What boringtun 0.7.1 panics on is among it: a data datagram longer than its buffer.
/// Every length, every type, known session or not.
#[test]
fn garbage_of_every_length_is_counted_and_panics_nothing() {
    let mut random = random();
    for mode in MODES {
        let mut nodes = pair(mode);
        give(&mut nodes[0], packet(1, 2, b"open the session"));
        settle(&mut nodes);
        give(&mut nodes[0], packet(1, 2, b"learn the session number"));
        nodes[0].step_device().unwrap();
        let (_, model) = sent(&mut nodes[0], 1).pop().unwrap();
        taken(&mut nodes[1]);
        let lengths = (0..2200).chain([9000, 16_000, 65_507, 65_535]);
        let mut given = 0;
        for len in lengths {
            for kind in 0..6 {
                let mut bytes = vec![0; len];
                random.fill(&mut bytes);
                match (mode, bytes.len()) {
                    (Mode::WireGuard, 8..) => {
                        bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
                        bytes[4..8].copy_from_slice(&model.bytes[4..8]);
                    }
                    (Mode::IpUdp, 20..) => {
                        // A credible header of somebody else's, or none.
                        bytes[..20].copy_from_slice(&model.bytes[..20]);
                        bytes[13] ^= 0xff;
                        bytes[0] = [0x45, 0x60, 0x4f, 0x6f, 0x40, 0x95][usize::from(kind)];
                    }
                    (Mode::IpIp, 20..) => {
                        // A credible outer header and random insides.
                        bytes[..20].copy_from_slice(&model.bytes[..20]);
                        let total = u16::try_from(bytes.len()).unwrap();
                        bytes[2..4].copy_from_slice(&total.to_be_bytes());
                        bytes[9] = [4, 41, 4, 41, 2, 0][usize::from(kind)];
                        if let Some(first) = bytes.get_mut(20) {
                            *first = [0x45, 0x60, 0x4f, 0x6f, 0x40, 0x95][usize::from(kind)];
                        }
                    }
                    _ => {}
                }
                let from = (mode != Mode::IpIp).then_some(address(1));
                nodes[1].network.incoming.push_back(MemoryDatagram {
                    from,
                    ecn: Ecn::NotEct,
                    bytes,
                });
                given += 1;
            }
            nodes[1].step_network().unwrap();
        }
        assert!(taken(&mut nodes[1]).is_empty());
        let counted = drops_of(&nodes[1], 1).total() + nodes[1].core.drops().total();
        assert_eq!(counted, given, "{mode}: each is counted once");
        // And the tunnel still works.
        give(&mut nodes[0], packet(1, 2, b"after the storm"));
        settle(&mut nodes);
        assert_eq!(taken(&mut nodes[1]), [packet(1, 2, b"after the storm")], "{mode}");
    }
}

#[test]
fn a_link_that_loses_repeats_reorders_and_spoils_delivers_only_what_was_sent() {
    let mut random = random();
    for mode in MODES {
        let mut nodes = pair(mode);
        give(&mut nodes[0], packet(1, 2, b"open the session"));
        settle(&mut nodes);
        taken(&mut nodes[1]);
        let mut genuine = BTreeSet::new();
        let mut on_the_way: Vec<MemoryDatagram> = Vec::new();
        let (mut lost, mut spoiled, mut repeated) = (0, 0, 0);
        for i in 0..3000u32 {
            let mut payload = i.to_be_bytes().to_vec();
            payload.resize(4 + below(&mut random, 1300), 0xaa);
            let packet = packet(1, 2, &payload);
            genuine.insert(packet.clone());
            give(&mut nodes[0], packet);
            nodes[0].step_device().unwrap();
            for (_, datagram) in sent(&mut nodes[0], 1) {
                on_the_way.push(datagram);
            }
            while on_the_way.len() > 8 {
                let mut datagram = on_the_way.swap_remove(below(&mut random, 8));
                match below(&mut random, 10) {
                    0 => lost += 1,
                    1 => {
                        on_the_way.push(datagram.clone());
                        repeated += 1;
                        nodes[1].network.incoming.push_back(datagram);
                    }
                    2 if mode == Mode::WireGuard => {
                        let at = below(&mut random, datagram.bytes.len());
                        datagram.bytes[at] ^= 1 << below(&mut random, 8);
                        spoiled += 1;
                        nodes[1].network.incoming.push_back(datagram);
                    }
                    _ => nodes[1].network.incoming.push_back(datagram),
                }
            }
            nodes[1].step_network().unwrap();
        }
        for datagram in on_the_way {
            nodes[1].network.incoming.push_back(datagram);
        }
        nodes[1].step_network().unwrap();
        let arrived = taken(&mut nodes[1]);
        assert!(arrived.iter().all(|p| genuine.contains(p)), "{mode}: only what was sent");
        let distinct: BTreeSet<_> = arrived.iter().collect();
        assert!(lost > 100 && repeated > 100);
        let drops = drops_of(&nodes[1], 1);
        let strangers = nodes[1].core.drops();
        if mode == Mode::WireGuard {
            assert_eq!(distinct.len(), arrived.len(), "nothing arrives twice");
            assert!(spoiled > 100);
            // A repeated datagram is a replay unless one of the two was spoiled
            // or lost later; a spoiled one fails its tag, or names nobody.
            assert!(drops[DropReason::Replay] > 0, "{drops:?}");
            assert_eq!(
                arrived.len() as u64 + drops.total() + strangers.total() + lost,
                3000 + repeated,
                "{drops:?} {strangers:?}"
            );
        } else {
            assert_eq!(drops.total() + strangers.total(), 0, "{drops:?}");
            assert_eq!(arrived.len() as u64 + lost, 3000 + repeated);
        }
    }
}

#[test]
fn an_inner_source_that_the_peer_may_not_use_is_refused_and_counted() {
    for mode in MODES {
        let mut nodes = pair(mode);
        // Three owns one address inside two's prefix: the longest match wins.
        let narrow = PeerConfig { allowed: vec!["10.77.1.9/32".parse().unwrap()], ..peer(3, mode) };
        nodes[1].core.add_peer(&narrow).unwrap();
        give(&mut nodes[0], packet(1, 2, b"allowed"));
        settle(&mut nodes);
        assert_eq!(taken(&mut nodes[1]).len(), 1);
        let to = [10, 77, 2, 2];
        for source in [[10, 77, 3, 3], [10, 77, 1, 9], [192, 0, 2, 7]] {
            give(&mut nodes[0], packet_from(source, to, Ecn::NotEct, b"forged"));
        }
        settle(&mut nodes);
        assert!(taken(&mut nodes[1]).is_empty(), "{mode}");
        let drops = drops_of(&nodes[1], 1);
        assert_eq!(drops[DropReason::SourceNotAllowed], 3, "{drops:?}");
        assert_eq!(drops.total(), 3, "{drops:?}");
    }
}

#[test]
fn what_must_not_enter_a_tunnel_is_counted_by_its_reason() {
    for mode in MODES {
        let mut nodes = pair(mode);
        let (us, them) = ([10, 77, 1, 2], [10, 77, 2, 2]);
        for (reason, packet) in [
            (DropReason::Malformed, b"not a packet".to_vec()),
            (DropReason::NoRoute, packet_from(us, [10, 78, 0, 1], Ecn::NotEct, b"")),
            (DropReason::NotUnicast, packet_from(us, [224, 0, 0, 251], Ecn::NotEct, b"")),
            (DropReason::NotUnicast, packet_from([127, 0, 0, 1], them, Ecn::NotEct, b"")),
            (DropReason::Loop, packet_from([192, 0, 2, 1], them, Ecn::NotEct, b"")),
            (DropReason::NoHops, {
                let mut packet = packet(1, 2, b"");
                packet[8] = 0;
                packet
            }),
        ] {
            let before = nodes[0].core.drops()[reason] + nodes[0].core.peers()[0].dropped(reason);
            give(&mut nodes[0], packet);
            settle(&mut nodes);
            let after = nodes[0].core.drops()[reason] + nodes[0].core.peers()[0].dropped(reason);
            assert_eq!(after, before + 1, "{mode} {reason}");
        }
        assert!(taken(&mut nodes[1]).is_empty());
        let total = nodes[0].core.drops().total() + nodes[0].core.peers()[0].drops.total();
        assert_eq!(total, 6, "no other reason was counted");
    }
}

#[test]
fn the_sender_of_a_packet_that_does_not_fit_is_told_the_mtu() {
    for (mode, mtu) in [(Mode::WireGuard, 1440), (Mode::IpUdp, 1472), (Mode::IpIp, 1480)] {
        let mut nodes = pair(mode);
        let fits = packet(1, 2, &vec![7; mtu - IPV4_HEADER]);
        let over = packet(1, 2, &vec![7; mtu - IPV4_HEADER + 1]);
        give(&mut nodes[0], fits.clone());
        give(&mut nodes[0], over.clone());
        let mut may_fragment = over.clone();
        may_fragment[6] = 0;
        give(&mut nodes[0], may_fragment.clone());
        settle(&mut nodes);
        // Without DF it may not be dropped: it is fragmented outside.
        assert_eq!(taken(&mut nodes[1]), [fits, may_fragment], "{mode}");
        assert_eq!(drops_of(&nodes[0], 2)[DropReason::TooBig], 1);
        let [error]: [_; 1] = taken(&mut nodes[0]).try_into().unwrap();
        let view = IpView::new(&error).unwrap();
        assert_eq!(view.source(), IpAddr::from([10, 77, 1, 1]));
        assert_eq!(view.destination(), IpAddr::from([10, 77, 1, 2]));
        assert_eq!(view.payload()[..2], [3, 4]);
        assert_eq!(view.payload()[6..8], u16::try_from(mtu).unwrap().to_be_bytes());
        assert_eq!(view.payload()[8..8 + 100], over[..100]);
    }
}

/// RFC 6040, figure 4, and that the outer mark is the inner one (§4.1).
#[test]
fn congestion_outside_is_told_inside_or_the_packet_is_dropped() {
    use Ecn::{Ce, Ect0, Ect1, NotEct};
    for mode in MODES {
        let mut nodes = pair(mode);
        give(&mut nodes[0], packet(1, 2, b"open the session"));
        settle(&mut nodes);
        taken(&mut nodes[1]);
        let mut dropped = 0;
        for (inner, results) in [
            (NotEct, [Some(NotEct), Some(NotEct), Some(NotEct), None]),
            (Ect0, [Some(Ect0), Some(Ect0), Some(Ect1), Some(Ce)]),
            (Ect1, [Some(Ect1), Some(Ect1), Some(Ect1), Some(Ce)]),
            (Ce, [Some(Ce), Some(Ce), Some(Ce), Some(Ce)]),
        ] {
            for (outer, expected) in [NotEct, Ect0, Ect1, Ce].into_iter().zip(results) {
                give(&mut nodes[0], packet_from([10, 77, 1, 2], [10, 77, 2, 2], inner, b"x"));
                nodes[0].step_device().unwrap();
                let (_, mut datagram) = sent(&mut nodes[0], 1).pop().unwrap();
                if mode == Mode::IpIp {
                    let mut view = IpView::new(&mut datagram.bytes[..]).unwrap();
                    assert_eq!(view.ecn(), inner, "copied out");
                    view.set_ecn(outer);
                } else {
                    assert_eq!(datagram.ecn, inner, "copied out");
                    datagram.ecn = outer;
                }
                nodes[1].network.incoming.push_back(datagram);
                nodes[1].step_network().unwrap();
                let arrived = taken(&mut nodes[1]);
                let marks: Vec<_> = arrived.iter().map(|p| IpView::new(p).unwrap().ecn()).collect();
                assert_eq!(marks, Vec::from_iter(expected), "{mode} {inner:?} under {outer:?}");
                if let Some(packet) = arrived.first() {
                    assert_eq!(checksum(&packet[..IPV4_HEADER], 0), 0, "the header's checksum");
                }
                dropped += u64::from(expected.is_none());
                assert_eq!(drops_of(&nodes[1], 1)[DropReason::Congestion], dropped);
            }
        }
    }
}

/// An error of ICMP from a router between the hosts, about `quoted`.
fn router_error(kind: u8, code: u8, mtu: u16, quoted: &[u8]) -> MemoryDatagram {
    let mut icmp = vec![kind, code, 0, 0, 0, 0, 0, 0];
    icmp[6..8].copy_from_slice(&mtu.to_be_bytes());
    icmp.extend_from_slice(&quoted[..quoted.len().min(520)]);
    let mut bytes = packet_from([198, 51, 100, 1], [192, 0, 2, 1], Ecn::NotEct, &icmp);
    bytes[9] = 1;
    MemoryDatagram { from: None, ecn: Ecn::NotEct, bytes }
}

#[test]
fn errors_about_the_outer_packet_are_told_to_the_inner_sender() {
    let mut nodes = pair(Mode::IpIp);
    give(&mut nodes[0], packet(1, 2, &[7; 1400]));
    nodes[0].step_device().unwrap();
    let (_, outer) = sent(&mut nodes[0], 1).pop().unwrap();
    let outer = outer.bytes;
    // Kind, code and MTU in the router's error, and in what the sender is told.
    for (error, told) in [
        ((3, 4, 1280), Some((3, 4, 1260))),
        ((3, 4, 0), Some((3, 4, 532))),
        ((3, 1, 0), Some((3, 1, 0))),
        ((3, 13, 0), Some((3, 1, 0))),
        ((11, 0, 0), Some((3, 1, 0))),
        ((5, 1, 0), None),
        ((12, 0, 0), None),
        ((0, 0, 0), None),
    ] {
        let (kind, code, mtu) = error;
        nodes[0].network.incoming.push_back(router_error(kind, code, mtu, &outer));
        nodes[0].step_network().unwrap();
        let relayed = taken(&mut nodes[0]);
        let seen: Vec<_> = relayed
            .iter()
            .map(|packet| {
                let view = IpView::new(&packet[..]).unwrap();
                assert_eq!(view.destination(), IpAddr::from([10, 77, 1, 2]));
                assert_eq!(view.source(), IpAddr::from([10, 77, 1, 1]));
                let icmp = view.payload();
                assert_eq!(checksum(icmp, 0), 0);
                // The quoted packet is the sender's own.
                assert_eq!(icmp[8..48], outer[20..60]);
                (icmp[0], icmp[1], u16::from_be_bytes([icmp[6], icmp[7]]))
            })
            .collect();
        assert_eq!(seen, Vec::from_iter(told), "{error:?}");
    }
    // Forged: about a packet to somebody who is not this peer's, or to no peer.
    let mut forged = outer.clone();
    forged[20 + 18] = 9;
    let mut stranger = outer.clone();
    stranger[19] = 99;
    // Cut before the inner header ends: nobody can be told.
    let cut = &outer[..30];
    for quoted in [&forged[..], &stranger[..], cut, &outer[20..], b""] {
        nodes[0].network.incoming.push_back(router_error(3, 4, 600, quoted));
    }
    // An error about an error is never sent.
    let mut about_error = outer.clone();
    (about_error[20 + 9], about_error[40]) = (1, 3);
    nodes[0].network.incoming.push_back(router_error(3, 1, 0, &about_error));
    nodes[0].step_network().unwrap();
    assert!(taken(&mut nodes[0]).is_empty());
    assert_eq!(drops_of(&nodes[0], 2)[DropReason::BadError], 1);
    assert_eq!(drops_of(&nodes[0], 2).total() + nodes[0].core.drops().total(), 1);
}

#[test]
fn the_mtu_of_the_way_is_soft_state_of_the_peer() {
    for (mode, overhead) in [(Mode::WireGuard, 60), (Mode::IpUdp, 28), (Mode::IpIp, 20)] {
        let mut nodes = pair(mode);
        give(&mut nodes[0], packet(1, 2, &[7; 1300]));
        settle(&mut nodes);
        assert_eq!(taken(&mut nodes[1]).len(), 1);
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        nodes[0].network.path_mtu = Some(1280);
        nodes[0].step_time(later(1)).unwrap();
        assert_eq!(nodes[0].core.peers()[0].path_mtu, 1280);
        give(&mut nodes[0], packet(1, 2, &[7; 1300]));
        settle(&mut nodes);
        assert!(taken(&mut nodes[1]).is_empty());
        let [error]: [_; 1] = taken(&mut nodes[0]).try_into().unwrap();
        let told = IpView::new(&error[..]).unwrap().payload()[6..8].to_vec();
        assert_eq!(told, u16::to_be_bytes(1280 - overhead), "{mode}");
        // What just fits comes through; a silly claim is not believed.
        let fits = packet(1, 2, &vec![7; 1280 - usize::from(overhead) - IPV4_HEADER]);
        give(&mut nodes[0], fits.clone());
        settle(&mut nodes);
        assert_eq!(taken(&mut nodes[1]), [fits]);
        nodes[0].network.path_mtu = Some(1);
        nodes[0].step_time(later(2)).unwrap();
        assert_eq!(nodes[0].core.peers()[0].path_mtu, 552);
        // The least that IPv6 promises goes on, fragmented outside.
        let mut six = vec![0x60, 0, 0, 0, 4, 216, 17, 64];
        six.extend_from_slice(&[0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        six.extend_from_slice(&[0xfd, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        six.resize(1280, 0);
        give(&mut nodes[0], six.clone());
        settle(&mut nodes);
        assert_eq!(taken(&mut nodes[1]), [six], "{mode}");
        // Forgotten by the kernel, forgotten here, once packets go there again.
        nodes[0].network.path_mtu = None;
        nodes[0].step_time(later(3)).unwrap();
        assert_eq!(nodes[0].core.peers()[0].path_mtu, 1500);
    }
}

/// In ip-udp mode a peer behind a NAT is found by what it sends under its keys.
#[test]
fn an_ip_udp_peer_with_keepalives_is_found_wherever_it_is() {
    let [mut a, mut b] = pair(Mode::IpUdp);
    let (one, two) = (key(1).public(), key(2).public());
    b.core.set_endpoint(one, None).unwrap();
    let elsewhere = SocketAddr::from(([203, 0, 113, 5], 4711));
    a.core.set_keepalive(two, Some(25)).unwrap();
    a.step_time(Instant::now() + Duration::from_secs(1)).unwrap();
    // Initiation, response, keepalive, through a NAT.
    for _ in 0..2 {
        for (_, mut datagram) in sent(&mut a, 1) {
            datagram.from = Some(elsewhere);
            b.network.incoming.push_back(datagram);
        }
        b.step_network().unwrap();
        for (to, mut datagram) in b.network.outgoing.drain(..) {
            assert_eq!(to, Destination::Udp(elsewhere));
            datagram.from = Some(address(2));
            a.network.incoming.push_back(datagram);
        }
        a.step_network().unwrap();
    }
    give(&mut a, packet(1, 2, b"bare"));
    a.step_device().unwrap();
    let mut bare = sent(&mut a, 1);
    let (_, datagram) = bare.pop().unwrap();
    assert_eq!(datagram.bytes, packet(1, 2, b"bare"));
    for (from, expected) in [(elsewhere, 1), (address(1), 0), (address(7), 0)] {
        let datagram = MemoryDatagram { from: Some(from), ..datagram.clone() };
        b.network.incoming.push_back(datagram);
        b.step_network().unwrap();
        assert_eq!(taken(&mut b).len(), expected, "from {from}");
    }
    give(&mut b, packet(2, 1, b"back"));
    b.step_device().unwrap();
    let (to, _) = b.network.outgoing.pop_front().unwrap();
    assert_eq!(to, Destination::Udp(elsewhere));
}

#[test]
fn a_peer_is_heard_in_its_own_mode_only_and_changes_it_live() {
    let mut nodes = pair(Mode::WireGuard);
    give(&mut nodes[0], packet(1, 2, b"open the session"));
    settle(&mut nodes);
    taken(&mut nodes[1]);
    let (one, two) = (key(1).public(), key(2).public());
    nodes[0].core.set_mode(two, Mode::IpIp).unwrap();
    give(&mut nodes[0], packet(1, 2, b"bare"));
    settle(&mut nodes);
    assert!(taken(&mut nodes[1]).is_empty());
    assert_eq!(drops_of(&nodes[1], 1)[DropReason::WrongMode], 1);

    nodes[1].core.set_mode(one, Mode::IpIp).unwrap();
    give(&mut nodes[0], packet(1, 2, b"bare"));
    settle(&mut nodes);
    assert_eq!(taken(&mut nodes[1]), [packet(1, 2, b"bare")]);

    // And back, with the session that was kept.
    nodes[0].core.set_mode(two, Mode::WireGuard).unwrap();
    give(&mut nodes[0], packet(1, 2, b"sealed"));
    settle(&mut nodes);
    assert_eq!(drops_of(&nodes[1], 1)[DropReason::WrongMode], 2);
    nodes[1].core.set_mode(one, Mode::WireGuard).unwrap();
    give(&mut nodes[0], packet(1, 2, b"sealed"));
    settle(&mut nodes);
    assert_eq!(taken(&mut nodes[1]), [packet(1, 2, b"sealed")]);
}

#[test]
fn an_authentic_datagram_moves_the_endpoint_and_nothing_else_does() {
    let mut nodes = pair(Mode::WireGuard);
    give(&mut nodes[0], packet(1, 2, b"open the session"));
    settle(&mut nodes);
    give(&mut nodes[0], packet(1, 2, b"from elsewhere"));
    nodes[0].step_device().unwrap();
    let (_, datagram) = sent(&mut nodes[0], 1).pop().unwrap();
    let elsewhere = SocketAddr::from(([192, 0, 2, 200], 4444));
    let endpoint = |node: &Node| node.core.peers()[0].endpoint;

    let mut forged = datagram.clone();
    forged.from = Some(elsewhere);
    *forged.bytes.last_mut().unwrap() ^= 1;
    nodes[1].network.incoming.push_back(forged);
    nodes[1].step_network().unwrap();
    assert_eq!(endpoint(&nodes[1]), Some(address(1)));
    assert_eq!(drops_of(&nodes[1], 1)[DropReason::BadTag], 1);

    let moved = MemoryDatagram { from: Some(elsewhere), ..datagram.clone() };
    nodes[1].network.incoming.push_back(moved);
    nodes[1].step_network().unwrap();
    assert_eq!(endpoint(&nodes[1]), Some(elsewhere));

    // The same bytes again, from a third place: a replay moves nothing.
    let replay = MemoryDatagram { from: Some(address(77)), ..datagram };
    nodes[1].network.incoming.push_back(replay);
    nodes[1].step_network().unwrap();
    assert_eq!(endpoint(&nodes[1]), Some(elsewhere));
    assert_eq!(drops_of(&nodes[1], 1)[DropReason::Replay], 1);

    // In ipip mode the configured place counts, not the learned one.
    nodes[1].core.set_mode(key(1).public(), Mode::IpIp).unwrap();
    assert_eq!(endpoint(&nodes[1]), Some(address(1)));
}

#[test]
fn a_stranger_gets_no_answer_and_a_flood_of_handshakes_gets_cookies() {
    let [mut a, mut b] = pair(Mode::WireGuard);
    let mut stranger = node(3);
    stranger.core.add_peer(&peer(2, Mode::WireGuard)).unwrap();
    give(&mut stranger, packet(3, 2, b"let me in"));
    stranger.step_device().unwrap();
    let (_, init) = sent(&mut stranger, 3).pop().unwrap();
    b.network.incoming.push_back(init.clone());
    b.step_network().unwrap();
    assert!(sent(&mut b, 2).is_empty(), "an unknown key is not answered");
    assert_eq!(b.core.drops()[DropReason::UnknownPeer], 1);

    for _ in 0..300 {
        b.network.incoming.push_back(init.clone());
    }
    b.step_network().unwrap();
    let cookies = sent(&mut b, 2);
    assert!(!cookies.is_empty() && cookies.iter().all(|(_, d)| d.bytes.len() == 64));
    assert_eq!(b.core.drops()[DropReason::RateLimited], cookies.len() as u64);

    // When a second has passed without, the count begins anew and a friend comes in.
    for node in [&mut a, &mut b] {
        node.step_time(Instant::now() + Duration::from_secs(3)).unwrap();
    }
    give(&mut a, packet(1, 2, b"friend"));
    let mut nodes = [a, b];
    settle(&mut nodes);
    assert_eq!(taken(&mut nodes[1]), [packet(1, 2, b"friend")]);
}

/// The last counter of a session would overflow a careless window.
#[test]
fn a_counter_beyond_the_last_is_a_replay_before_any_key_is_tried() {
    let mut nodes = pair(Mode::WireGuard);
    give(&mut nodes[0], packet(1, 2, b"open the session"));
    settle(&mut nodes);
    give(&mut nodes[0], packet(1, 2, b"a model"));
    nodes[0].step_device().unwrap();
    let (_, mut datagram) = sent(&mut nodes[0], 1).pop().unwrap();
    datagram.bytes[8..16].fill(0xff);
    nodes[1].network.incoming.push_back(datagram);
    nodes[1].step_network().unwrap();
    let drops = drops_of(&nodes[1], 1);
    assert_eq!((drops[DropReason::Replay], drops[DropReason::BadTag]), (1, 0));
}

#[test]
fn a_handshake_answered_by_a_cookie_moves_no_endpoint() {
    let [mut a, mut b] = pair(Mode::WireGuard);
    let mut stranger = node(3);
    stranger.core.add_peer(&peer(2, Mode::WireGuard)).unwrap();
    give(&mut stranger, packet(3, 2, b"flood"));
    stranger.step_device().unwrap();
    let (_, init) = sent(&mut stranger, 3).pop().unwrap();
    for _ in 0..300 {
        b.network.incoming.push_back(init.clone());
    }
    give(&mut b, packet(2, 1, b"our own initiation"));
    b.step_device().unwrap();
    let (_, init) = sent(&mut b, 2).pop().unwrap();
    b.step_network().unwrap();
    sent(&mut b, 2);
    a.network.incoming.push_back(init);
    a.step_network().unwrap();
    let (_, mut response) = sent(&mut a, 1).pop().unwrap();
    response.from = Some(SocketAddr::from(([192, 0, 2, 200], 4444)));
    b.network.incoming.push_back(response);
    b.step_network().unwrap();
    let [(to, cookie)]: [_; 1] = sent(&mut b, 2).try_into().unwrap();
    assert_eq!((to, cookie.bytes[0]), (200, 3));
    assert_eq!(drops_of(&b, 1)[DropReason::RateLimited], 1);
    assert_eq!(b.core.peers()[0].endpoint, Some(address(1)));
}

#[test]
fn peers_that_would_contradict_each_other_are_refused_whole() {
    let mut core = node(1).core;
    core.add_peer(&peer(2, Mode::IpIp)).unwrap();
    let two = key(2).public();
    assert_eq!(core.add_peer(&peer(2, Mode::IpIp)), Err(PeerError::Duplicate(two)));
    assert_eq!(core.add_peer(&peer(1, Mode::IpIp)), Err(PeerError::Ourselves(key(1).public())));
    let three = key(3).public();
    let with = |edit: &dyn Fn(&mut PeerConfig)| {
        let mut config = peer(3, Mode::IpIp);
        edit(&mut config);
        config
    };
    let prefix = "10.77.2.0/24".parse().unwrap();
    let clash = with(&|c| c.allowed = vec![prefix]);
    assert_eq!(core.add_peer(&clash), Err(PeerError::PrefixTaken { prefix, owner: two }));
    let clash = with(&|c| c.endpoint = Some(address(2)));
    let taken = PeerError::EndpointTaken { endpoint: address(2).ip(), owner: two };
    assert_eq!(core.add_peer(&clash), Err(taken));
    let nowhere = with(&|c| c.endpoint = None);
    assert_eq!(core.add_peer(&nowhere), Err(PeerError::NeedsIpv4Endpoint(three)));
    let everything = "0.0.0.0/0".parse().unwrap();
    let looping = with(&|c| c.allowed = vec![everything]);
    assert!(matches!(core.add_peer(&looping), Err(PeerError::EndpointInside { .. })));
    assert_eq!(core.peers().len(), 1, "nothing of the refused remains");

    core.add_peer(&with(&|_| {})).unwrap();
    assert_eq!(
        core.set_allowed(three, &[prefix]),
        Err(PeerError::PrefixTaken { prefix, owner: two })
    );
    assert_eq!(core.set_endpoint(three, Some(address(2))), Err(taken));
    let after = core.peers();
    assert_eq!(after[1].endpoint, Some(address(3)));
    assert_eq!(after[1].allowed, peer(3, Mode::IpIp).allowed);

    // A prefix that is given up can be had.
    core.set_allowed(two, &[]).unwrap();
    core.set_allowed(three, &[prefix]).unwrap();
    core.remove_peer(two).unwrap();
    assert_eq!(core.remove_peer(two), Err(PeerError::Unknown(two)));
    core.set_endpoint(three, Some(address(2))).unwrap();
}

/// 10,000 peers with 100,000 prefixes: each packet finds its own, both ways.
#[test]
fn ten_thousand_peers_are_told_apart() {
    const PEERS: u32 = 10_000;
    let mut node = node(1);
    let public = |n: u32| {
        let mut bytes = [9; 32];
        bytes[..4].copy_from_slice(&n.to_le_bytes());
        PublicKey(bytes)
    };
    let endpoint = |n: u32| SocketAddr::from((std::net::Ipv4Addr::from(0xc633_0000 + n), 51820));
    let prefix = |n: u32, i: u32| std::net::Ipv4Addr::from(0x0b00_0000 + (n * 10 + i) * 16);
    let began = Instant::now();
    for n in 0..PEERS {
        let allowed = (0..10).map(|i| format!("{}/28", prefix(n, i)).parse().unwrap()).collect();
        let peer = PeerConfig::new(public(n), Some(endpoint(n)), allowed);
        node.core.add_peer(&PeerConfig { mode: Mode::IpUdp, ..peer }).unwrap();
    }
    println!("added in {:?}", began.elapsed());
    let began = Instant::now();
    for n in (0..PEERS).step_by(97) {
        let there = prefix(n, n % 10).octets();
        give(&mut node, packet_from([10, 77, 1, 2], there, Ecn::NotEct, b"x"));
        node.step_device().unwrap();
        let (to, _) = node.network.outgoing.pop_front().unwrap();
        assert_eq!(to, Destination::Udp(endpoint(n)));
        for (from, arrives) in [(n, 1), (n + 1, 0)] {
            let bytes = packet_from(there, [10, 77, 1, 2], Ecn::NotEct, b"x");
            let from = Some(endpoint(from % PEERS));
            node.network.incoming.push_back(MemoryDatagram { from, ecn: Ecn::NotEct, bytes });
            node.step_network().unwrap();
            assert_eq!(taken(&mut node).len(), arrives);
        }
    }
    println!("used in {:?}", began.elapsed());
    node.step_time(Instant::now() + Duration::from_secs(1)).unwrap();
    for n in (0..PEERS).step_by(2) {
        node.core.remove_peer(public(n)).unwrap();
    }
    assert_eq!(node.core.peers().len(), 5000);
}
