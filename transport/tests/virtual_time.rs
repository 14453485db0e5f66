//! Two endpoints in virtual time over a link that does its worst.
//!
//! Every test says its seed when it fails; `CONET_SEED=n` runs the property with
//! that seed alone.

mod common;
mod world;

use conet_testkit::link::Faults;
use conet_testkit::random::Random;
use conet_transport::session::{CallError, DownReason, Hub, HubConfig, Limits};
use conet_transport::time::Instant;
use std::collections::BTreeMap;
use std::time::Duration;
use world::{World, address, private_key};

const GOOD: Duration = Duration::from_micros(50);
const SECOND: Duration = Duration::from_secs(1);

fn good(seed: u64) -> World {
    let mut world = World::new(seed, Faults::none(GOOD));
    world.run_while(world.now + SECOND, |world| !world.is_up());
    assert!(world.is_up());
    world
}

/// Random calls both ways, of random sizes, some given up, some with a deadline.
fn storm(seed: u64, calls: u64) -> (World, BTreeMap<u64, usize>) {
    let mut random = Random::new(seed ^ 0x5707);
    let mut world = World::new(seed, Faults::drawn_from(&mut random));
    world.think = Duration::from_micros(10 + random.below(20_000));
    let mut sizes = BTreeMap::new();
    for serial in 0..calls {
        let from = usize::try_from(random.below(2)).expect("small");
        let length = match random.below(20) {
            0 => random.below(120_000),
            1..=4 => random.below(6000),
            _ => random.below(300),
        };
        let length = usize::try_from(length.max(8)).expect("small");
        sizes.insert(serial, length);
        let timeout = random.chance(100).then(|| Duration::from_micros(random.below(2_000_000)));
        let id = world.call(from, serial, length, timeout);
        if random.chance(50) {
            world.run_for(Duration::from_micros(random.below(10_000)));
            world.cancel(from, id);
        }
        world.run_for(Duration::from_micros(random.below(3000)));
    }
    assert!(
        world.run_to_completion(SECOND * 600),
        "seed {seed}: calls hang: {}",
        world.unfinished()
    );
    // Whatever still travels must change nothing.
    world.run_for(SECOND * 3);
    (world, sizes)
}

fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("CONET_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (0..count).collect(),
    }
}

#[test]
fn every_call_ends_once_and_runs_at_most_once() {
    let (mut done, mut executed) = (0, 0);
    for seed in seeds(300) {
        let (world, sizes) = storm(seed, 40);
        world.check(&sizes);
        done += world.outcomes.values().filter(|outcome| outcome.results[0].is_ok()).count();
        executed += world.outcomes.values().filter(|outcome| outcome.executions == 1).count();
    }
    eprintln!("{} seeds: {executed} calls ran, {done} replies arrived", seeds(300).len());
    // The link is bad, not hopeless: most calls must come through.
    assert!(done * 10 > seeds(300).len() * 40 * 8, "{done} done, {executed} executed");
}

#[test]
fn same_seed_same_trace() {
    for seed in seeds(10) {
        assert_eq!(storm(seed, 20).0.trace, storm(seed, 20).0.trace, "seed {seed}");
    }
}

#[test]
fn a_good_link_needs_no_repeats() {
    let mut world = good(1);
    let mut sizes = BTreeMap::new();
    for serial in 0..200 {
        sizes.insert(serial, 64);
        world.think = Duration::from_micros(1);
        world.call(usize::from(serial % 2 == 0), serial, 64, None);
        assert!(world.run_to_completion(SECOND));
    }
    world.check(&sizes);
    for node in 0..2 {
        let counters = world.counters(node);
        assert_eq!((counters.repeats, counters.duplicates, counters.stale_replies), (0, 0, 0));
        assert_eq!((counters.forged, counters.replayed, counters.malformed), (0, 0, 0));
        assert_eq!((counters.executions, counters.handshakes), (100, 1));
        // A call is two packets; the rest is the handshake.
        assert!(counters.sent_packets <= 205, "{}", counters.sent_packets);
        let rtt = world.status(node).rtt.expect("measured");
        assert!(rtt >= GOOD * 2 && rtt < GOOD * 3, "{rtt:?}");
    }
}

#[test]
fn a_mebibyte_each_way_over_good_and_bad_links() {
    for lose in [0, 10, 100] {
        let mut world = good(9);
        world.link.set_faults(Faults { lose, ..Faults::none(GOOD) });
        let length = 1024 * 1024 - 1;
        let start = world.now;
        world.call(0, 5, length, None);
        assert!(world.run_to_completion(SECOND * 60), "{lose} per mille");
        let took = world.now.since(start);
        world.check(&BTreeMap::from([(5, length)]));
        let packets = world.counters(0).sent_packets + world.counters(1).sent_packets;
        if lose == 0 {
            assert_eq!(world.counters(0).repeats, 0);
            assert!(took < Duration::from_millis(10), "{took:?}");
        }
        assert!(packets < 5000, "{packets} packets at {lose} per mille");
    }
}

#[test]
fn a_blocked_call_is_asked_for_once_a_second() {
    let mut world = good(2);
    world.think = Duration::ZERO;
    let before = world.counters(0).sent_packets;
    world.link.set_faults(Faults::none(GOOD));
    world.think = SECOND * 120;
    world.call(0, 1, 100, None);
    world.run_while(world.now + SECOND * 120, |world| world.unfinished() > 0);
    let waited = world.outcomes[&1].results.len();
    let sent = world.counters(0).sent_packets - before;
    assert!(sent <= 3 * 120, "{sent} packets");
    assert_eq!((waited, world.outcomes[&1].executions), (1, 1));
}

/// Whichever of the two keys is the larger: the one that has asked into the void
/// does not sit out its pause when the other proves to be there.
#[test]
fn a_peer_that_starts_late_is_met_at_once() {
    for late in 0..2 {
        let mut world = World::new(11, Faults { lose: 1000, ..Faults::none(GOOD) });
        world.run_for(SECOND * 4);
        world.link.set_faults(Faults::none(GOOD));
        world.restart(late, 2);
        world.run_while(world.now + Duration::from_millis(1), |world| !world.is_up());
        assert!(world.is_up(), "node {late} came late");
    }
}

#[test]
fn calls_end_as_unknown_when_the_server_restarts() {
    let mut world = good(3);
    world.think = SECOND * 1000;
    world.call(0, 1, 100, None);
    world.run_for(SECOND);
    assert_eq!(world.outcomes[&1].executions, 1);
    world.restart(1, 2);
    world.run_for(SECOND * 2);
    assert_eq!(world.outcomes[&1].results, [Err(CallError::Unknown)]);
    assert!(world.trace.iter().any(|line| line.ends_with("down Restarted")));
    // The new life answers, and nothing of the old one is run again.
    world.think = Duration::from_millis(1);
    world.call(0, 2, 100, None);
    world.run_for(SECOND * 10);
    assert_eq!(world.outcomes[&1].executions, 1);
    world.check(&BTreeMap::from([(1, 100), (2, 100)]));
    assert_eq!(world.outcomes[&2].executions, 1);
    assert_eq!(world.counters(1).executions, 1);
}

#[test]
fn a_client_that_restarts_begins_anew() {
    let mut world = good(4);
    world.call(0, 1, 100, None);
    assert!(world.run_to_completion(SECOND));
    world.restart(0, 2);
    world.call(0, 2, 100, None);
    assert!(world.run_to_completion(SECOND * 5));
    world.check(&BTreeMap::from([(1, 100), (2, 100)]));
    assert_eq!(world.outcomes[&2].executions, 1);
}

#[test]
fn silence_ends_calls_and_the_session_comes_back() {
    let mut world = good(5);
    world.think = SECOND * 3600;
    world.call(0, 1, 100, None);
    world.run_for(Duration::from_millis(10));
    world.link.set_cut(true);
    let cut = world.now;
    world.call(0, 2, 100, None);
    world.run_while(world.now + SECOND * 20, |world| world.status(0).up);
    let took = world.now.since(cut);
    assert!(took >= SECOND * 4 && took <= SECOND * 6, "{took:?}");
    assert_eq!(world.outcomes[&1].results, [Err(CallError::Unknown)]);
    assert_eq!(world.outcomes[&2].results, [Err(CallError::Unknown)], "it was sent");
    // While down: a call without an answer in time never ran.
    world.call(0, 3, 100, Some(SECOND));
    world.run_for(SECOND * 2);
    assert_eq!(world.outcomes[&3].results, [Err(CallError::Unreachable)]);
    world.call(0, 4, 100, None);
    world.run_for(SECOND * 20);
    assert!(world.outcomes[&4].results.is_empty(), "waits for the peer");
    world.think = Duration::from_millis(1);
    world.link.set_cut(false);
    world.run_for(SECOND * 12);
    assert!(world.is_up());
    world.check(&BTreeMap::from([(1, 100), (2, 100), (3, 100), (4, 100)]));
    assert_eq!(world.outcomes[&4].executions, 1);
}

#[test]
fn an_idle_session_stays_up_for_a_packet_a_second() {
    let mut world = good(6);
    let before = world.counters(0).sent_packets + world.counters(1).sent_packets;
    world.run_for(SECOND * 100);
    assert!(world.is_up());
    let sent = world.counters(0).sent_packets + world.counters(1).sent_packets - before;
    assert!((100..=420).contains(&sent), "{sent}");
    assert!(!world.trace.iter().any(|line| line.contains("down")));
}

#[test]
fn keys_are_renewed_under_calls() {
    let limits = Limits { rekey_after: SECOND * 2, ..Limits::default() };
    let mut world = World::with_limits(7, Faults { lose: 50, ..Faults::none(GOOD) }, limits);
    world.think = Duration::from_millis(30);
    let mut sizes = BTreeMap::new();
    for serial in 0..400 {
        let length = if serial % 10 == 0 { 60_000 } else { 100 };
        sizes.insert(serial, length);
        world.call(usize::from(serial % 2 == 0), serial, length, None);
        world.run_for(Duration::from_millis(50));
    }
    assert!(world.run_to_completion(SECOND * 60));
    world.check(&sizes);
    assert!(world.outcomes.values().all(|outcome| outcome.results[0].is_ok()));
    assert!(world.counters(0).handshakes >= 9, "{}", world.counters(0).handshakes);
    assert!(!world.trace.iter().any(|line| line.contains("down")));
}

#[test]
fn the_newest_authenticated_packet_says_where_a_peer_is() {
    let mut world = good(8);
    world.think = Duration::from_millis(1);
    world.call(0, 1, 100, None);
    assert!(world.run_to_completion(SECOND));
    let new = address(77, 999);
    world.nodes[0].address = new;
    world.call(0, 2, 100, None);
    assert!(world.run_to_completion(SECOND));
    assert_eq!(world.status(1).address, Some(new));
    world.call(1, 3, 100, None);
    assert!(world.run_to_completion(SECOND));
    assert_eq!(world.counters(0).handshakes, 1);
    world.check(&BTreeMap::from([(1, 100), (2, 100), (3, 100)]));
}

#[test]
fn a_given_up_call_that_was_not_sent_never_runs() {
    let mut world = World::new(10, Faults::none(GOOD));
    world.link.set_cut(true);
    let call = world.call(0, 1, 100, None);
    world.run_for(SECOND);
    world.cancel(0, call);
    world.link.set_cut(false);
    world.run_for(SECOND * 10);
    assert!(world.is_up());
    assert_eq!(world.outcomes[&1].results, [Err(CallError::Cancelled)]);
    assert_eq!(world.outcomes[&1].executions, 0);
}

#[test]
fn more_calls_than_slots_wait_their_turn() {
    let mut world = good(11);
    let sizes: BTreeMap<u64, usize> = (0..500).map(|serial| (serial, 50)).collect();
    for &serial in sizes.keys() {
        world.call(0, serial, 50, None);
        assert!(world.status(0).calls_in_flight <= 64);
    }
    assert!(world.run_to_completion(SECOND * 10));
    world.check(&sizes);
    assert_eq!(world.counters(1).executions, 500);
}

#[test]
fn an_unknown_key_leaves_no_state() {
    let mut world = good(12);
    let stranger = private_key(7).public();
    world.nodes[0].hub.remove_peer(&world.nodes[1].key.clone()).expect("known");
    assert!(world.nodes[0].hub.call(world.now, &stranger, vec![], None).is_err());
    let before = world.nodes[0].hub.strays();
    // Node 1 still knows node 0, finds it silent and asks again.
    let end = world.now + SECOND * 20;
    world.nodes[1].hub.handle_timeout(world.now);
    while let Some(next) = world.nodes[1].hub.poll_timeout(world.now).filter(|next| *next < end) {
        world.now = next.max(world.now);
        world.nodes[1].hub.handle_timeout(world.now);
        let mut buf = Vec::new();
        while world.nodes[1].hub.poll_transmit(world.now, &mut buf).is_some() {
            let from = world.nodes[1].address;
            world.nodes[0].hub.handle_datagram(world.now, from, &mut buf);
        }
    }
    let after = world.nodes[0].hub.strays();
    assert!(after.unknown_key > before.unknown_key);
    assert!(after.unknown_index > before.unknown_index);
    let mut buf = Vec::new();
    assert!(world.nodes[0].hub.poll_transmit(world.now, &mut buf).is_none(), "no answer");
    assert_eq!(world.nodes[0].hub.poll_timeout(world.now), None, "no state");
}

#[test]
fn a_farewell_ends_the_session_at_once() {
    let mut world = good(13);
    let (from, now) = (world.nodes[1].address, world.now);
    let mut buf = Vec::new();
    while world.nodes[1].hub.poll_farewell(now, &mut buf).is_some() {
        world.nodes[0].hub.handle_datagram(now, from, &mut buf);
    }
    let reason = format!("down {:?}", DownReason::Closed);
    world.flush();
    assert!(world.trace.iter().any(|line| line.ends_with(&reason)), "{:?}", world.trace);
    assert!(!world.status(0).up);
}

/// A node whose clock went back over a restart is heard no more as the one that begins, but
/// its peers can begin; whichever of the two keys is the larger.
#[test]
fn a_node_whose_clock_went_back_is_met_by_its_peer() {
    for restarts in [1, 2] {
        let hub = |key: u8, started: u64| {
            let config = common::config(key, started ^ u64::from(key));
            let started = Duration::from_secs(started);
            Hub::new(HubConfig { started, ..config }).expect("entropy")
        };
        let mut hubs = [hub(1, 100_000), hub(2, 100_000)];
        let (keys, at) = (hubs.each_ref().map(Hub::public_key), [address(1, 7), address(2, 7)]);
        let mut now = Instant::START;
        hubs[0].add_peer(now, keys[1], Some(at[1]));
        hubs[1].add_peer(now, keys[0], Some(at[0]));
        let mut buf = Vec::new();
        for ms in 0..30_000 {
            // It is the first to begin, so the other end remembers when that was.
            if ms == 5000 {
                hubs[restarts - 1] = hub(u8::try_from(restarts).expect("small"), 90_000);
                hubs[restarts - 1].add_peer(now, keys[2 - restarts], Some(at[2 - restarts]));
            }
            now = now + Duration::from_millis(1);
            for n in [restarts - 1, 2 - restarts] {
                hubs[n].handle_timeout(now);
                while hubs[n].poll_transmit(now, &mut buf).is_some() {
                    hubs[1 - n].handle_datagram(now, at[n], &mut buf);
                }
            }
        }
        assert!(hubs[0].is_up(&keys[1]) && hubs[1].is_up(&keys[0]), "node {restarts}");
    }
}
