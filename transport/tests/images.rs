//! Frozen sessions: they go on elsewhere, and no bytes that are none do harm.

mod common;

use conet_testkit::random::Random;
use conet_transport::session::handshake::PublicKey;
use conet_transport::session::{
    CallError, DownReason, Event, FreezeError, Hub, HubConfig, ImageError, Lane,
};
use conet_transport::time::Instant;
use std::net::SocketAddr;
use std::time::Duration;

fn hub(key: u8, seed: u64) -> Hub {
    Hub::new(common::config(key, seed)).expect("entropy")
}

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 7))
}

/// Carries packets between two hubs for so long; gives what happened at each.
fn carry(hubs: [&mut Hub; 2], at: [SocketAddr; 2], now: &mut Instant, ms: u64) -> [Vec<Event>; 2] {
    let mut events = [Vec::new(), Vec::new()];
    let mut buf = Vec::new();
    let [one, two] = hubs;
    for _ in 0..ms {
        for hub in [&mut *one, &mut *two] {
            hub.handle_timeout(*now);
        }
        for _ in 0..10 {
            while one.poll_transmit(*now, &mut buf).is_some() {
                two.handle_datagram(*now, at[0], &mut buf);
            }
            while two.poll_transmit(*now, &mut buf).is_some() {
                one.handle_datagram(*now, at[1], &mut buf);
            }
        }
        events[0].extend(std::iter::from_fn(|| one.poll_event()));
        events[1].extend(std::iter::from_fn(|| two.poll_event()));
        *now = *now + Duration::from_millis(1);
    }
    events
}

/// Two hubs in the middle of everything: calls of each kind under way both ways.
fn busy() -> (Hub, Hub, [PublicKey; 2], Instant) {
    let (mut one, mut two) = (hub(1, 1), hub(2, 2));
    let keys = [one.public_key(), two.public_key()];
    let mut now = Instant::from_start(Duration::from_secs(1));
    one.add_peer(now, keys[1], Some(address(2)));
    two.add_peer(now, keys[0], None);
    carry([&mut one, &mut two], [address(1), address(2)], &mut now, 20);
    for (hub, to) in [(&mut one, keys[1]), (&mut two, keys[0])] {
        for (lane, length) in [(Lane::Calls, 10), (Lane::Bulk, 200_000), (Lane::Control, 3000)] {
            hub.call_on(now, &to, lane, vec![5; length], None).expect("taken");
        }
        let row = [(vec![1; 9], false), (vec![2; 9], true), (vec![3; 9], false)].into_iter();
        hub.call_row(now, &to, Lane::Pages, row, None, &mut Vec::new()).expect("taken");
    }
    // Some packets only, so that much is still under way.
    let mut buf = Vec::new();
    for n in 0..40 {
        if one.poll_transmit(now, &mut buf).is_some() && n % 3 != 0 {
            two.handle_datagram(now, address(1), &mut buf);
        }
        if two.poll_transmit(now, &mut buf).is_some() && n % 3 != 1 {
            one.handle_datagram(now, address(2), &mut buf);
        }
    }
    (one, two, keys, now)
}

#[test]
fn calls_go_on_where_the_session_is_thawed() {
    let (mut one, mut two, keys, mut now) = busy();
    let mut called: Vec<_> = std::iter::from_fn(|| one.poll_event()).collect();
    let frozen = one.freeze(now, &keys[1]).expect("stands");
    assert_eq!(
        one.freeze(now, &keys[1]),
        Err(FreezeError::Peer(conet_transport::session::UnknownPeer))
    );
    let mut elsewhere = hub(1, 77);
    let thawed = elsewhere.thaw(now, &frozen.image, None).expect("ours");
    assert_eq!(thawed.peer, keys[1]);
    let handed: Vec<_> = called
        .iter()
        .filter_map(|event| match event {
            Event::Call { id, .. } => Some(*id),
            _ => None,
        })
        .collect();
    assert!(thawed.running.iter().all(|(id, wanted)| handed.contains(id) && *wanted));
    let mut ended = [0, 0];
    for _ in 0..30 {
        let at = [address(3), address(2)];
        let [ours, theirs] = carry([&mut elsewhere, &mut two], at, &mut now, 100);
        for (n, events) in [(0, called.drain(..).chain(ours).collect()), (1, theirs)] {
            let events: Vec<Event> = events;
            for event in events {
                let hub = if n == 0 { &mut elsewhere } else { &mut two };
                match event {
                    Event::Call { peer, id, payload, .. } => {
                        hub.reply(&peer, id, payload).expect("waits");
                    }
                    Event::Ended { result, .. } => {
                        result.expect("a reply");
                        ended[n] += 1;
                    }
                    _ => {}
                }
            }
        }
    }
    assert_eq!(ended, [6, 6]);
    let status = two.status(now).next().expect("one peer");
    assert_eq!((status.epochs, status.address), ((0, 1), Some(address(3))));
}

#[test]
fn what_was_running_and_is_not_known_any_more_ends_as_unknown() {
    let (mut one, mut two, keys, mut now) = busy();
    let frozen = one.freeze(now, &keys[1]).expect("stands");
    // The process is gone, its answers with it.
    let mut elsewhere = hub(1, 78);
    let thawed = elsewhere.thaw(now, &frozen.image, None).expect("ours");
    assert!(!thawed.running.is_empty());
    for (id, _) in &thawed.running {
        elsewhere.disown(&thawed.peer, *id).expect("runs");
    }
    let at = [address(3), address(2)];
    let [_, theirs] = carry([&mut elsewhere, &mut two], at, &mut now, 500);
    let unknown =
        |event: &&Event| matches!(event, Event::Ended { result: Err(CallError::Unknown), .. });
    assert_eq!(theirs.iter().filter(unknown).count(), thawed.running.len());
}

#[test]
fn an_image_is_for_its_owner_and_shows_nothing_in_debug() {
    let (mut one, _, keys, now) = busy();
    let frozen = one.freeze(now, &keys[1]).expect("stands");
    assert_eq!(hub(3, 3).thaw(now, &frozen.image, None), Err(ImageError::Owner));
    assert!(format!("{frozen:?}").len() < 40);
    let mut late = frozen.image.clone();
    late[4] = 9;
    assert_eq!(hub(1, 3).thaw(now, &late, None), Err(ImageError::Version(9)));
}

/// Two lives of one image: what they send has nothing in common, not even the key.
#[test]
fn two_thaws_of_one_image_share_no_packet() {
    let (mut one, _, keys, now) = busy();
    let frozen = one.freeze(now, &keys[1]).expect("stands");
    let mut sent = Vec::new();
    for seed in [100, 101] {
        let (mut life, mut peer) = (hub(1, seed), busy().1);
        let mut buf = Vec::new();
        let mut now = now + Duration::from_millis(1);
        life.thaw(now, &frozen.image, None).expect("ours");
        for _ in 0..30 {
            life.handle_timeout(now);
            peer.handle_timeout(now);
            while life.poll_transmit(now, &mut buf).is_some() {
                sent.push(buf.clone());
                peer.handle_datagram(now, address(3), &mut buf);
            }
            while peer.poll_transmit(now, &mut buf).is_some() {
                life.handle_datagram(now, address(2), &mut buf);
            }
            now = now + Duration::from_millis(1);
        }
        assert!(life.status(now).next().expect("one peer").up);
    }
    for (n, packet) in sent.iter().enumerate() {
        let tail = &packet[packet.len() - 16..];
        assert!(!sent[..n].iter().any(|other| other.ends_with(tail)), "packet {n}");
    }
}

#[test]
fn any_bytes_thaw_to_an_error_or_to_a_session_that_does_no_harm() {
    let (mut one, _, keys, now) = busy();
    let frozen = one.freeze(now, &keys[1]).expect("stands");
    for length in (0..frozen.image.len()).step_by(997).chain(0..200) {
        assert!(hub(1, 5).thaw(now, &frozen.image[..length], None).is_err(), "{length} bytes");
    }
    let (seed, mut taken) = (7, 0);
    let mut random = Random::new(seed);
    // Most of the image is payload, where a change is none that can be found; so half of
    // the changes go to the first kilobyte and to the last.
    for _ in 0..1500 {
        let mut image = frozen.image.clone();
        for _ in 0..=random.below(3) {
            let length = image.len() as u64;
            let at = match random.below(4) {
                0 => random.below(1024),
                1 => length - 1 - random.below(1024),
                _ => random.below(length),
            };
            let [byte, value, ..] = random.number().to_le_bytes();
            let edge = [0, 1, 0xff, value][usize::from(byte % 4)];
            image[usize::try_from(at).expect("small")] = edge;
        }
        let mut life = hub(1, 6);
        if life.thaw(now, &image, Some(address(2))).is_err() {
            continue;
        }
        taken += 1;
        let (mut buf, mut now) = (Vec::new(), now);
        for _ in 0..5 {
            life.handle_timeout(now);
            while life.poll_transmit(now, &mut buf).is_some() {}
            while life.poll_event().is_some() {}
            now = now + Duration::from_secs(3);
        }
        life.call(now, &keys[1], vec![1], None).ok();
    }
    assert!(taken > 300, "seed {seed}: {taken} taken");
}

/// Clocks of hosts differ: a session that moves to one whose clock is behind is no recording
/// of the past to its peer.
#[test]
fn a_session_moves_to_a_host_whose_clock_is_behind() {
    let ahead = |key, seed| {
        let started = Duration::from_secs(100_000);
        Hub::new(HubConfig { started, ..common::config(key, seed) }).expect("entropy")
    };
    let (mut one, mut two) = (ahead(1, 1), ahead(2, 2));
    let (us, them) = (one.public_key(), two.public_key());
    let mut now = Instant::from_start(Duration::from_secs(1));
    one.add_peer(now, them, Some(address(2)));
    two.add_peer(now, us, None);
    carry([&mut one, &mut two], [address(1), address(2)], &mut now, 20);
    for seed in 77..80 {
        // A second image on the way, and the last life moves on from the same host.
        let frozen = one.freeze(now, &them).expect("stands");
        one = hub(1, seed);
        one.thaw(now, &frozen.image, None).expect("ours");
        carry([&mut one, &mut two], [address(3), address(2)], &mut now, 200);
        assert!(one.is_up(&them), "life {seed}");
        assert_eq!(two.address_of(&us), Some(address(3)));
    }
}

/// The second thaw of an image is told that it came too late, whatever its clock says.
#[test]
fn a_second_life_whose_clock_is_behind_is_told_that_it_is_superseded() {
    let ahead = |key, seed| {
        let started = Duration::from_secs(100_000);
        Hub::new(HubConfig { started, ..common::config(key, seed) }).expect("entropy")
    };
    let (mut one, mut two) = (hub(1, 1), hub(2, 2));
    let (us, them) = (one.public_key(), two.public_key());
    let mut now = Instant::from_start(Duration::from_secs(1));
    one.add_peer(now, them, Some(address(2)));
    two.add_peer(now, us, None);
    carry([&mut one, &mut two], [address(1), address(2)], &mut now, 20);
    one.call(now, &them, vec![1], None).expect("taken");
    carry([&mut one, &mut two], [address(1), address(2)], &mut now, 20);
    let frozen = one.freeze(now, &them).expect("stands");
    let (mut first, mut second) = (ahead(1, 3), hub(1, 4));
    first.thaw(now, &frozen.image, None).expect("ours");
    carry([&mut first, &mut two], [address(3), address(2)], &mut now, 20);
    assert!(first.is_up(&them));
    second.thaw(now, &frozen.image, None).expect("ours");
    let [events, _] = carry([&mut second, &mut two], [address(4), address(2)], &mut now, 2000);
    assert!(events.contains(&Event::Down(them, DownReason::Superseded)), "{events:?}");
    let ends =
        |event: &Event| matches!(event, Event::Ended { result: Err(CallError::Unknown), .. });
    assert!(events.iter().any(ends), "{events:?}");
    assert_eq!(two.address_of(&us), Some(address(3)));
}

/// Who forgets a session has forgotten what ran in it, and must not go on with it under the
/// same name: neither where the peer is added again, nor where its image is thawed too.
#[test]
fn a_peer_that_was_removed_and_added_runs_no_call_again() {
    for is_frozen in [false, true] {
        let (mut one, mut two) = (hub(1, 1), hub(2, 2));
        let (us, them) = (one.public_key(), two.public_key());
        let mut now = Instant::from_start(Duration::from_secs(1));
        let at = [address(1), address(2)];
        one.add_peer(now, them, Some(address(2)));
        two.add_peer(now, us, None);
        carry([&mut one, &mut two], at, &mut now, 20);
        one.call(now, &them, vec![1], None).expect("taken");
        let ran = |events: &[Event]| {
            events.iter().filter(|event| matches!(event, Event::Call { .. })).count()
        };
        let [_, events] = carry([&mut one, &mut two], at, &mut now, 20);
        assert_eq!(ran(&events), 1);
        if is_frozen {
            two.freeze(now, &us).expect("stands");
        } else {
            two.remove_peer(&us).expect("there");
        }
        two.add_peer(now, us, Some(address(1)));
        let [ended, events] = carry([&mut one, &mut two], at, &mut now, 1500);
        assert_eq!(ran(&events), 0, "frozen: {is_frozen}");
        let ends =
            |event: &Event| matches!(event, Event::Ended { result: Err(CallError::Unknown), .. });
        assert!(ended.iter().any(ends), "{ended:?}");
    }
}

/// A packet that was still on its way when both ends moved: the old node at its end answered with
/// MOVED, the other old node answered that with one, and so on; who looked for the sessions there
/// heard nothing, since an old node says little at a time.
#[test]
fn two_old_nodes_do_not_answer_each_other() {
    let (mut one, mut two, keys, mut now) = busy();
    let mut late = Vec::new();
    one.call(now, &keys[1], vec![5; 64], None).expect("taken");
    one.poll_transmit(now, &mut late).expect("a packet");
    one.freeze(now, &keys[1]).expect("stands");
    two.freeze(now, &keys[0]).expect("stands");
    one.set_moved(now, &keys[1], address(3)).expect("was frozen");
    two.set_moved(now, &keys[0], address(4)).expect("was frozen");
    let mut buf = Vec::new();
    while one.poll_transmit(now, &mut buf).is_some() {}
    while two.poll_transmit(now, &mut buf).is_some() {}
    two.handle_datagram(now, address(1), &mut late);
    let mut said = 0;
    for _ in 0..100 {
        now = now + Duration::from_millis(1);
        while two.poll_transmit(now, &mut buf).is_some() {
            said += 1;
            one.handle_datagram(now, address(2), &mut buf);
        }
        while one.poll_transmit(now, &mut buf).is_some() {
            said += 1;
            two.handle_datagram(now, address(1), &mut buf);
        }
    }
    assert_eq!(said, 1);
}
