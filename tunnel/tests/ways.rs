//! Ways to peers, in memory: marks, sizes, errors, places, and many of them.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

mod memory;

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use conet_dataplane::DropReason;
use conet_tunnel::{Destination, MemoryDatagram, Mode, PeerConfig, PublicKey};
use conet_wire::ip::{Ecn, IPV4_HEADER, IpView, checksum};
use memory::*;

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
