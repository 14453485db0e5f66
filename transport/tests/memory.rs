//! Memory that a peer makes us keep is bounded: what has no room waits or ends with an error,
//! and two ends that are both at their limit come out of it.

mod common;

use conet_transport::session::{
    CallError, CallId, Event, Hub, HubConfig, IncomingId, Limits, ReplyError, ReplyFailed,
};
use conet_transport::time::Instant;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

const MIB: usize = 1 << 20;
const ROOM: usize = 2 * MIB;
const LIMITS: Limits = Limits {
    datagram: 1400,
    slots: 1024,
    queued: 4096,
    payload: MIB,
    assembling: 4 * MIB,
    unanswered: ROOM,
    unanswered_by_all: 3 * MIB,
    keepalive: Duration::from_secs(1),
    dead_after: Duration::from_secs(5),
    rekey_after: Duration::from_secs(120),
    handshake_retry: Duration::from_millis(250),
};

fn address(n: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1 + u8::try_from(n).expect("two")], 7))
}

/// Two ends whose owners answer when the test says so.
struct Pair {
    hubs: [Hub; 2],
    now: Instant,
    asked: [Vec<(IncomingId, usize)>; 2],
    ended: [Vec<(CallId, Result<usize, CallError>)>; 2],
    /// Whether the second end is heard.
    heard: bool,
    most: usize,
}

impl Pair {
    fn new(features: u32) -> Self {
        let hub = |key: u8, features| {
            let config = HubConfig { limits: LIMITS, features, ..common::config(key, key.into()) };
            Hub::new(config).expect("entropy")
        };
        let now = Instant::from_start(Duration::from_secs(1));
        let mut hubs = [hub(1, common::config(1, 1).features), hub(2, features)];
        let keys = [hubs[0].public_key(), hubs[1].public_key()];
        hubs[0].add_peer(now, keys[1], Some(address(1)));
        hubs[1].add_peer(now, keys[0], None);
        let (asked, ended) = (Default::default(), Default::default());
        let mut pair = Self { hubs, now, asked, ended, heard: true, most: 0 };
        pair.run(20);
        pair
    }

    fn call(&mut self, from: usize, length: usize) -> CallId {
        let to = self.hubs[1 - from].public_key();
        self.hubs[from].call(self.now, &to, vec![7; length], None).expect("taken")
    }

    fn reply(&mut self, at: usize, id: IncomingId, length: usize) -> Result<(), ReplyFailed> {
        let to = self.hubs[1 - at].public_key();
        self.hubs[at].reply(&to, id, vec![9; length])
    }

    fn results(&self) -> Vec<Result<usize, CallError>> {
        self.ended[0].iter().map(|(_, result)| *result).collect()
    }

    fn unanswered(&self, at: usize) -> (usize, usize) {
        self.hubs[at].status(self.now).next().expect("a peer").unanswered
    }

    fn run(&mut self, ms: u64) {
        let mut buf = Vec::new();
        for _ in 0..ms {
            self.now = self.now + Duration::from_millis(1);
            let now = self.now;
            for hub in &mut self.hubs {
                hub.handle_timeout(now);
            }
            for from in [0, 1] {
                while self.hubs[from].poll_transmit(now, &mut buf).is_some() {
                    if from == 0 || self.heard {
                        self.hubs[1 - from].handle_datagram(now, address(from), &mut buf);
                    }
                }
            }
            for at in [0, 1] {
                while let Some(event) = self.hubs[at].poll_event() {
                    match event {
                        Event::Call { id, payload, .. } => self.asked[at].push((id, payload.len())),
                        Event::Ended { call, result, .. } => {
                            self.ended[at].push((call, result.map(|reply| reply.len())));
                        }
                        _ => {}
                    }
                }
                let (calls, replies) = self.unanswered(at);
                self.most = self.most.max(calls).max(replies);
            }
        }
    }
}

/// Builds of all features, and ones that know no grants.
fn all_features() -> [u32; 2] {
    [common::config(1, 1).features, 0]
}

#[test]
fn calls_wait_until_others_are_answered() {
    for features in all_features() {
        let mut pair = Pair::new(features);
        for n in 0..12 {
            pair.call(0, if n % 2 == 0 { MIB / 2 } else { 50_000 });
        }
        for _ in 0..12 {
            pair.run(1500);
            let (id, _) = pair.asked[1].pop().expect("one runs");
            pair.reply(1, id, 8).expect("waits");
        }
        pair.run(3000);
        assert_eq!(pair.results(), [Ok(8); 12]);
        assert!(pair.most <= ROOM, "{}", pair.most);
        assert_eq!(pair.unanswered(1), (0, 0));
    }
}

#[test]
fn calls_for_which_no_room_comes_are_refused_and_not_run() {
    let mut pair = Pair::new(all_features()[0]);
    for _ in 0..40 {
        pair.call(0, MIB / 2);
    }
    pair.run(60_000);
    assert_eq!(pair.asked[1].len(), 4, "as many as there is room for");
    assert_eq!(pair.results(), [Err(CallError::Refused); 36]);
    // Short ones are answered all the while.
    pair.call(0, 100);
    pair.run(100);
    let (id, _) = pair.asked[1].pop().expect("handed out");
    pair.reply(1, id, 8).expect("waits");
    for (id, _) in std::mem::take(&mut pair.asked[1]) {
        pair.reply(1, id, 8).expect("waits");
    }
    pair.run(2000);
    assert_eq!(pair.results()[36..], [Ok(8); 5]);
    assert_eq!((pair.unanswered(1), pair.most), ((0, 0), ROOM));
}

#[test]
fn a_peer_that_takes_no_reply_is_kept_few() {
    let mut pair = Pair::new(all_features()[0]);
    for _ in 0..64 {
        pair.call(0, 10);
    }
    pair.run(10);
    assert_eq!(pair.asked[1].len(), 64);
    pair.heard = false;
    let (mut kept, mut full) = (0, 0);
    for (id, _) in std::mem::take(&mut pair.asked[1]) {
        match pair.reply(1, id, MIB / 2) {
            Ok(()) => kept += 1,
            Err(ReplyFailed::Reply(ReplyError::Full)) => full += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!((kept, full), (4, 60));
    // It asks for more: nothing is begun that could not be answered.
    for _ in 0..64 {
        pair.call(0, 10);
    }
    pair.run(1000);
    assert_eq!(pair.asked[1].len(), 0);
    pair.heard = true;
    for _ in 0..64 {
        pair.run(500);
        for (id, _) in std::mem::take(&mut pair.asked[1]) {
            pair.reply(1, id, 8).expect("waits");
        }
    }
    let count = |result| pair.results().iter().filter(|ended| **ended == result).count();
    let counts = [count(Ok(MIB / 2)), count(Err(CallError::Unknown)), count(Ok(8))];
    assert_eq!(counts, [4, 60, 64], "each call ends once");
    assert_eq!((pair.unanswered(1), pair.most), ((0, 0), ROOM));
}

/// Each call makes one the other way before it is answered, and there is no room for any of
/// these: both ends wait for each other.
#[test]
fn two_ends_at_their_limit_do_not_wait_for_ever() {
    const LEAF: usize = MIB / 2 - 64;
    let mut pair = Pair::new(all_features()[0]);
    for from in [0, 1] {
        for _ in 0..8 {
            pair.call(from, MIB / 2);
        }
    }
    let mut open: [BTreeMap<CallId, IncomingId>; 2] = Default::default();
    let mut outcomes = [[0; 3]; 2];
    for _ in 0..120 {
        pair.run(500);
        for at in [0, 1] {
            for (id, length) in std::mem::take(&mut pair.asked[at]) {
                if length == LEAF {
                    pair.reply(at, id, 8).expect("waits");
                } else {
                    let leaf = pair.call(at, LEAF);
                    open[at].insert(leaf, id);
                }
            }
            for (call, result) in std::mem::take(&mut pair.ended[at]) {
                if let Some(id) = open[at].remove(&call) {
                    pair.reply(at, id, 8).expect("waits");
                }
                match result {
                    Ok(8) => outcomes[at][0] += 1,
                    Err(CallError::Refused) => outcomes[at][1] += 1,
                    _ => outcomes[at][2] += 1,
                }
            }
        }
    }
    for at in [0, 1] {
        let [good, refused, other] = outcomes[at];
        assert!(good >= 4 && other == 0 && open[at].is_empty(), "{outcomes:?}");
        // Each of the eight, and the ones made for those of the other end that ran.
        assert!(good + refused > 8, "{outcomes:?}");
        assert_eq!(pair.unanswered(at), (0, 0));
    }
    assert!(pair.most <= ROOM);
}

/// A reply to a call that was given up waited for its client to let it go on. With enough of
/// them no call was taken any more.
#[test]
fn replies_that_nobody_wants_any_more_keep_no_room() {
    for cancels_first in [true, false] {
        let mut pair = Pair::new(all_features()[0]);
        let calls: Vec<_> = (0..4).map(|_| pair.call(0, 10)).collect();
        pair.run(10);
        let to = pair.hubs[1].public_key();
        let asked = std::mem::take(&mut pair.asked[1]);
        for step in [cancels_first, !cancels_first] {
            if step {
                for call in &calls {
                    pair.hubs[0].cancel(pair.now, &to, *call).expect("a peer");
                }
                if !cancels_first {
                    // What says so is lost, and pieces come first.
                    let mut buf = Vec::new();
                    while pair.hubs[0].poll_transmit(pair.now, &mut buf).is_some() {}
                }
            } else {
                for (id, _) in &asked {
                    pair.reply(1, *id, MIB / 2).expect("waits");
                }
            }
            // The beginnings are there before anything is asked again.
            pair.run(2);
        }
        pair.run(3000);
        assert_eq!(pair.unanswered(1), (0, 0), "{cancels_first}");
        pair.call(0, 10);
        pair.run(100);
        assert_eq!(pair.asked[1].len(), 1, "{cancels_first}");
    }
}
