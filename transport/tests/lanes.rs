//! Lanes, rows of calls, parked calls and slots that grow and shrink, over a good link.

mod common;
#[allow(dead_code, reason = "shared with another test, which uses the rest")]
mod world;

use conet_testkit::link::Faults;
use conet_transport::session::handshake::PublicKey;
use conet_transport::session::{CallError, CallRefused, Event, Lane, Limits, NotTaken};
use std::time::Duration;
use world::World;

const GOOD: Duration = Duration::from_micros(50);
const SECOND: Duration = Duration::from_secs(1);

fn good() -> World {
    with_limits(Limits::default())
}

fn with_limits(limits: Limits) -> World {
    let mut world = World::with_limits(1, Faults::none(GOOD), limits);
    world.run_while(world.now + SECOND, |world| !world.is_up());
    world
}

fn other(world: &World) -> PublicKey {
    world.nodes[1].key
}

/// Carries packets for so long; gives the events of the calling node.
fn carry(
    world: &mut World,
    time: Duration,
    mut serve: impl FnMut(&mut conet_transport::session::Hub, Event),
) -> Vec<Event> {
    let mut ended = Vec::new();
    let end = world.now + time;
    let mut buf = Vec::new();
    while world.now < end {
        for n in 0..2 {
            world.nodes[n].hub.handle_timeout(world.now);
        }
        let mut moves = true;
        while moves {
            moves = false;
            for n in 0..2 {
                while world.nodes[n].hub.poll_transmit(world.now, &mut buf).is_some() {
                    moves = true;
                    let from = world.nodes[n].address;
                    world.nodes[1 - n].hub.handle_datagram(world.now, from, &mut buf);
                }
            }
            while let Some(event) = world.nodes[1].hub.poll_event() {
                serve(&mut world.nodes[1].hub, event);
            }
            while let Some(event) = world.nodes[0].hub.poll_event() {
                ended.push(event);
            }
        }
        world.now = world.now + Duration::from_micros(500);
    }
    ended
}

fn results(events: Vec<Event>) -> Vec<Result<Vec<u8>, CallError>> {
    let ended = events.into_iter().filter_map(|event| match event {
        Event::Ended { result, .. } => Some(result),
        _ => None,
    });
    ended.collect()
}

/// Each call of the row adds its payload to the result before it; `-` stops the row.
fn append(hub: &mut conet_transport::session::Hub, event: Event) {
    if let Event::Call { peer, id, payload, argument, .. } = event {
        let mut result = argument.unwrap_or_default();
        result.extend_from_slice(&payload);
        if payload == b"-" {
            hub.reply_and_stop(&peer, id, result).expect("waits");
        } else {
            hub.reply(&peer, id, result).expect("waits");
        }
    }
}

fn row(world: &mut World, calls: &[(&str, bool)]) -> Vec<Result<Vec<u8>, CallError>> {
    let (now, to) = (world.now, other(world));
    let row: Vec<_> =
        calls.iter().map(|(say, anyhow)| (say.as_bytes().to_vec(), *anyhow)).collect();
    let mut ids = Vec::new();
    let hub = &mut world.nodes[0].hub;
    hub.call_row(now, &to, Lane::Calls, row.into_iter(), None, &mut ids).expect("taken");
    assert_eq!(ids.len(), calls.len());
    results(carry(world, Duration::from_millis(5), append))
}

#[test]
fn a_row_goes_in_one_datagram_and_each_takes_the_result_before() {
    let mut world = good();
    let before = world.counters(0).sent_packets;
    let calls = ["a", "b", "c", "d", "e", "f", "g", "h"].map(|say| (say, false));
    let results = row(&mut world, &calls);
    assert_eq!(results.last(), Some(&Ok(b"abcdefgh".to_vec())));
    assert_eq!(world.counters(0).sent_packets - before, 1);
    assert_eq!(world.counters(1).executions, 8);
}

#[test]
fn a_stopped_row_aborts_or_goes_on_as_each_call_says() {
    let mut world = good();
    let results = row(&mut world, &[("a", false), ("-", false), ("b", false), ("c", true)]);
    let (a, stopped) = (Ok(b"a".to_vec()), Ok(b"a-".to_vec()));
    let aborted = Err(CallError::Aborted);
    assert_eq!(results, [a.clone(), stopped.clone(), aborted.clone(), aborted.clone()]);
    let results = row(&mut world, &[("a", false), ("-", false), ("b", true), ("c", false)]);
    assert_eq!(results, [a, stopped, Ok(b"a-b".to_vec()), Ok(b"a-bc".to_vec())]);
    assert_eq!(world.counters(1).executions, 2 + 4);
}

#[test]
fn what_is_no_row_is_refused() {
    let mut world = good();
    let (now, to) = (world.now, other(&world));
    let mut ids = Vec::new();
    for (length, bytes, error) in
        [(0, 8, NotTaken::RowLength), (9, 8, NotTaken::RowLength), (2, 5000, NotTaken::TooLong)]
    {
        let row = vec![(vec![0; bytes], false); length];
        let hub = &mut world.nodes[0].hub;
        let refused = hub.call_row(now, &to, Lane::Calls, row.into_iter(), None, &mut ids);
        assert_eq!(refused, Err(CallRefused::NotTaken(error)));
    }
    assert!(ids.is_empty());
}

#[test]
fn urgent_calls_overtake() {
    let mut world = good();
    let (now, to) = (world.now, other(&world));
    for lane in [Lane::Bulk, Lane::Pages, Lane::Calls, Lane::Control] {
        let hub = &mut world.nodes[0].hub;
        hub.call_on(now, &to, lane, vec![0; 1000], None).expect("taken");
    }
    let mut order = Vec::new();
    carry(&mut world, Duration::from_millis(2), |hub, event| {
        if let Event::Call { peer, id, lane, payload, .. } = event {
            order.push(lane);
            hub.reply(&peer, id, payload).expect("waits");
        }
    });
    assert_eq!(order, Lane::ALL);
}

/// Ten thousand calls that block leave room for others, and are hardly asked for.
#[test]
fn parked_calls_hold_up_nobody() {
    const PARKED: usize = 10_000;
    let limits = Limits { queued: 20_000, ..Limits::default() };
    let mut world = with_limits(limits);
    let to = other(&world);
    for _ in 0..PARKED {
        let now = world.now;
        world.nodes[0].hub.call(now, &to, b"blocks".to_vec(), None).expect("taken");
    }
    let mut blocked = Vec::new();
    carry(&mut world, SECOND * 3, |_, event| {
        if let Event::Call { id, .. } = event {
            blocked.push(id);
        }
    });
    assert_eq!((blocked.len(), world.status(1).parked), (PARKED, PARKED));
    // Others go through at once.
    let now = world.now;
    world.nodes[0].hub.call(now, &to, b"quick".to_vec(), None).expect("taken");
    let ended = carry(&mut world, Duration::from_millis(1), append);
    assert_eq!(results(ended), [Ok(b"quick".to_vec())]);
    // Who has waited for a while is hardly asked for.
    carry(&mut world, SECOND * 150, |_, _| {});
    let before = world.counters(0).sent_packets;
    carry(&mut world, SECOND * 60, |_, _| {});
    let sent = world.counters(0).sent_packets - before;
    assert!(sent < 1000, "{sent} packets a minute");
    // When they are answered, slots are given back.
    let (peer, slots) = (world.nodes[0].key, world.status(1).slots.1);
    assert!(slots >= PARKED);
    let mut ended = 0;
    for ids in blocked.chunks(500) {
        for id in ids {
            world.nodes[1].hub.reply(&peer, *id, b"at last".to_vec()).expect("waits");
        }
        ended += results(carry(&mut world, Duration::from_millis(50), append)).len();
    }
    carry(&mut world, SECOND * 5, append);
    assert_eq!((ended, world.status(1).parked), (PARKED, 0));
    let status = (world.status(0).slots.0, world.status(1).slots.1);
    assert!(status.0 <= 256 && status.1 <= 256, "{status:?}");
    // And what comes then still runs once.
    let now = world.now;
    for _ in 0..300 {
        world.nodes[0].hub.call(now, &to, b"again".to_vec(), None).expect("taken");
    }
    let ended = results(carry(&mut world, SECOND, append));
    assert_eq!(ended.len(), 300);
    assert!(ended.iter().all(Result::is_ok));
}

#[test]
fn sixteen_mebibytes_go_both_ways() {
    let mut world = good();
    let (now, to) = (world.now, other(&world));
    let payload: Vec<u8> = (0..16 * 1024 * 1024u32).map(|n| n.to_le_bytes()[1]).collect();
    let hub = &mut world.nodes[0].hub;
    hub.call_on(now, &to, Lane::Bulk, payload.clone(), None).expect("taken");
    let ended = results(carry(&mut world, SECOND * 2, append));
    assert!(ended == [Ok(payload)]);
}

/// With memory for one of them at a time, all large calls arrive, the small one first.
#[test]
fn large_calls_share_little_memory() {
    const LARGE: usize = 512 * 1024;
    let limits = Limits { payload: LARGE, assembling: 2 * LARGE, ..Limits::default() };
    let mut world = with_limits(limits);
    let (now, to) = (world.now, other(&world));
    for length in [LARGE, LARGE, LARGE, LARGE, 100 * 1024] {
        let hub = &mut world.nodes[0].hub;
        hub.call_on(now, &to, Lane::Bulk, vec![1; length], None).expect("taken");
    }
    let mut order = Vec::new();
    carry(&mut world, SECOND * 3, |hub, event| {
        if let Event::Call { peer, id, payload, .. } = event {
            order.push(payload.len());
            hub.reply(&peer, id, Vec::new()).expect("waits");
        }
    });
    assert_eq!(order.len(), 5);
    assert!(order.iter().position(|&length| length < LARGE) <= Some(1), "{order:?}");
}

/// Its slot was kept for the next one, but nobody had told the server that it never comes: the
/// next one waited for its result for ever.
#[test]
fn cancelling_the_first_of_a_row_that_was_not_sent_ends_the_others() {
    let mut world = good();
    let (now, to) = (world.now, other(&world));
    let row = [(b"a".to_vec(), false), (b"b".to_vec(), true), (b"c".to_vec(), false)];
    let mut ids = Vec::new();
    let hub = &mut world.nodes[0].hub;
    hub.call_row(now, &to, Lane::Calls, row.into_iter(), None, &mut ids).expect("taken");
    hub.cancel(now, &to, ids[0]).expect("a peer");
    let ended = results(carry(&mut world, Duration::from_millis(50), append));
    let (cancelled, aborted) = (Err(CallError::Cancelled), Err(CallError::Aborted));
    assert_eq!(ended, [cancelled, aborted.clone(), aborted]);
    assert_eq!(world.counters(1).executions, 0);
    // The slots are good for others.
    assert_eq!(row_of(&mut world, 8), 8);
}

/// A row of so many calls; gives how many went well.
fn row_of(world: &mut World, length: usize) -> usize {
    row(world, &vec![("x", false); length]).into_iter().filter(Result::is_ok).count()
}

/// The news of more slots was said once: lost, patient calls kept the others out for good.
#[test]
fn slots_whose_grant_was_lost_are_granted_again() {
    let mut world = good();
    let (now, to) = (world.now, other(&world));
    for _ in 0..64 {
        world.nodes[0].hub.call(now, &to, b"blocks".to_vec(), None).expect("taken");
    }
    // All of them run; of what the server then says nothing arrives for a while.
    let mut buf = Vec::new();
    let end = world.now + Duration::from_millis(100);
    while world.now < end {
        world.now = world.now + Duration::from_millis(1);
        let (now, from) = (world.now, world.nodes[0].address);
        world.nodes.iter_mut().for_each(|node| node.hub.handle_timeout(now));
        while world.nodes[0].hub.poll_transmit(now, &mut buf).is_some() {
            world.nodes[1].hub.handle_datagram(now, from, &mut buf);
        }
        while world.nodes[1].hub.poll_transmit(now, &mut buf).is_some() {}
        while world.nodes[1].hub.poll_event().is_some() {}
    }
    assert_eq!(world.status(1).parked, 64);
    let now = world.now;
    world.nodes[0].hub.call(now, &to, b"quick".to_vec(), None).expect("taken");
    let ended = carry(&mut world, SECOND * 3, append);
    assert_eq!(results(ended), [Ok(b"quick".to_vec())]);
}
