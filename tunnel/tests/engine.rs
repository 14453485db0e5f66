//! Whole tunnels in memory: two or three engines, their datagrams carried by
//! hand, lost, repeated, reordered and spoiled on the way.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

mod memory;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use conet_dataplane::DropReason;
use conet_tunnel::{MemoryDatagram, Mode, PeerConfig, PeerError};
use conet_wire::ip::{Ecn, IpView};
use memory::*;

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
