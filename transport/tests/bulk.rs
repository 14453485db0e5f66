//! The way for bulk between two hubs, over paths that carry less than their devices do.

use conet_transport::session::handshake::{FEATURES, PrivateKey, PublicKey};
use conet_transport::session::{
    BATCH_BUFFER, BulkPort, Event, Hub, HubConfig, Lane, Limits, Transmit,
};
use conet_transport::time::Instant;
use std::net::SocketAddr;
use std::time::Duration;

const HOP: Duration = Duration::from_micros(50);
const MAIN: u16 = 5000;
const BULK: u16 = 6000;
const FEATURE_BULK: u32 = 64;
const PAYLOAD: usize = 4 << 20;

/// What the path between the sockets for bulk does.
#[derive(Clone, Copy, Debug)]
struct Path {
    /// Longest datagram that the device takes.
    device: usize,
    /// Longest datagram that arrives.
    carries: usize,
}

const WIDE: Path = Path { device: 65_507, carries: 65_507 };

/// What went.
#[derive(Clone, Debug, Default)]
struct Went {
    by_calls: usize,
    by_bulk: usize,
    longest_arrived: usize,
    lost: Vec<usize>,
}

struct Pair {
    now: Instant,
    hubs: [Hub; 2],
    keys: [PublicKey; 2],
    path: Path,
    went: Went,
    buf: Vec<u8>,
    replies: Vec<Vec<u8>>,
    ran: Vec<Vec<u8>>,
}

fn address(n: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, u8::try_from(n).expect("small")], MAIN))
}

impl Pair {
    fn new(path: Path, features: [u32; 2]) -> Self {
        let hub = |n: usize| {
            let key = PrivateKey::new([u8::try_from(n).expect("small") + 1; 32]);
            let config = HubConfig {
                features: features[n],
                limits: Limits { rekey_after: Duration::from_secs(3), ..Limits::default() },
                ..HubConfig::new(key)
            };
            let mut hub = Hub::new(config).expect("entropy");
            hub.set_bulk(Some(BulkPort { port: BULK, buffer: 1 << 20 }));
            hub
        };
        let mut hubs = [hub(0), hub(1)];
        let keys = [hubs[0].public_key(), hubs[1].public_key()];
        hubs[0].add_peer(Instant::START, keys[1], Some(address(1)));
        hubs[1].add_peer(Instant::START, keys[0], None);
        let (now, went, buf) = (Instant::START, Went::default(), vec![0; BATCH_BUFFER]);
        Self { now, hubs, keys, path, went, buf, replies: Vec::new(), ran: Vec::new() }
    }

    fn good() -> Self {
        Self::new(WIDE, [FEATURES; 2])
    }

    fn carry_one(&mut self, from: usize, transmit: Transmit) {
        let mut sent = self.buf[..transmit.length].to_vec();
        if transmit.is_bulk && transmit.segment > self.path.device {
            self.hubs[from].handle_too_long(&transmit);
            return;
        }
        for datagram in sent.chunks_mut(transmit.segment) {
            let length = datagram.len();
            let port = if transmit.is_bulk {
                self.went.by_bulk += length;
                if length > self.path.carries {
                    self.went.lost.push(length);
                    continue;
                }
                self.went.longest_arrived = self.went.longest_arrived.max(length);
                BULK
            } else {
                self.went.by_calls += length;
                MAIN
            };
            assert_eq!(transmit.to.port(), port);
            // From the socket for bulk: that must not look like a move.
            let at = SocketAddr::new(address(from).ip(), port);
            self.hubs[1 - from].handle_datagram(self.now, at, datagram);
        }
    }

    /// Carries packets until `until`, for a minute at most.
    fn run(&mut self, until: impl Fn(&Self) -> bool) {
        let end = self.now + Duration::from_secs(60);
        while !until(self) {
            assert!(self.now < end, "{:?} {:?}", self.went, self.hubs[0].status(self.now).next());
            for n in 0..2 {
                self.hubs[n].handle_timeout(self.now);
                while let Some(transmit) =
                    self.hubs[n].poll_batch(self.now, &mut self.buf, Some(64))
                {
                    self.carry_one(n, transmit);
                }
                while let Some(event) = self.hubs[n].poll_event() {
                    match event {
                        Event::Call { peer, id, mut payload, .. } => {
                            self.ran.push(payload.clone());
                            payload.reverse();
                            self.hubs[n].reply(&peer, id, payload).expect("waits");
                        }
                        Event::Ended { result, .. } => self.replies.push(result.expect("a reply")),
                        _ => {}
                    }
                }
            }
            self.now = self.now + HOP;
        }
    }

    fn call(&mut self, size: usize) {
        let payload: Vec<u8> = (0..=250).cycle().take(size).collect();
        let mut reply = payload.clone();
        reply.reverse();
        let (now, to, replies) = (self.now, self.keys[1], self.replies.len());
        self.hubs[0].call_on(now, &to, Lane::Bulk, payload.clone(), None).expect("taken");
        self.run(|pair| pair.replies.len() > replies);
        assert_eq!(self.ran.last(), Some(&payload));
        assert_eq!(self.replies.last(), Some(&reply));
        for n in 0..2 {
            let status = self.hubs[n].status(self.now).next().expect("one");
            assert_eq!((status.counters.moves, status.counters.forged), (0, 0), "{n}");
        }
    }
}

#[test]
fn large_payloads_go_by_their_own_way_in_datagrams_as_long_as_it_carries() {
    let mut pair = Pair::good();
    pair.call(PAYLOAD);
    let Went { by_calls, by_bulk, longest_arrived, .. } = pair.went.clone();
    assert!(by_bulk > 2 * PAYLOAD * 9 / 10, "{:?}", pair.went);
    assert!(by_calls < PAYLOAD / 10, "{:?}", pair.went);
    assert_eq!(longest_arrived, 65_000);
    // A call goes by the other, and a small one is no burst.
    pair.went = Went::default();
    pair.call(100);
    assert_eq!(pair.went.by_bulk, 0);
}

#[test]
fn a_burst_begins_by_the_calls_way() {
    let mut pair = Pair::good();
    pair.call(PAYLOAD);
    pair.now = pair.now + Duration::from_millis(150);
    pair.went = Went::default();
    pair.call(20_000);
    assert!(pair.went.by_calls > 30_000, "{:?}", pair.went);
}

#[test]
fn sizes_that_a_device_or_a_hop_does_not_carry_are_found() {
    for (device, carries, found) in [
        (65_507, 9000, 8952),
        (65_507, 1480, 1472),
        (1472, 1472, 1472),
        (1472, 1460, 1452),
        (9000, 5000, 4048),
        (65_507, 1300, 1216),
    ] {
        let mut pair = Pair::new(Path { device, carries }, [FEATURES; 2]);
        for _ in 0..12 {
            pair.call(PAYLOAD);
            if pair.went.longest_arrived >= found && found > 1400 {
                break;
            }
        }
        assert_eq!(pair.went.longest_arrived, found, "{device} {carries} {:?}", pair.went);
        // Only probes were lost, twice each way and size at most.
        assert!(pair.went.lost.len() <= 6 * 2 * 2, "{:?}", pair.went);
    }
}

#[test]
fn a_way_that_carries_nothing_is_left_alone() {
    let mut pair = Pair::new(Path { device: 65_507, carries: 0 }, [FEATURES; 2]);
    pair.call(PAYLOAD);
    // Nothing but challenges was tried, no more than the peer asked for by BULK.
    assert!(pair.went.lost.iter().all(|length| *length < 64), "{:?}", pair.went);
    let packets = pair.hubs[1].status(pair.now).next().expect("one").counters.sent_packets;
    assert!(pair.went.lost.len() as u64 <= 2 * packets);
}

#[test]
fn a_way_that_closes_or_narrows_costs_probe_timeouts_and_no_call() {
    for carries in [0, 1400, 1472, 9000] {
        let mut pair = Pair::good();
        pair.call(PAYLOAD);
        assert_eq!(pair.went.longest_arrived, 65_000);
        pair.path.carries = carries;
        pair.went = Went::default();
        let before = pair.now;
        pair.call(PAYLOAD);
        assert!(pair.now.since(before) < Duration::from_secs(5), "{carries}");
        assert!(pair.went.longest_arrived <= carries);
        // And when it is open again, it is used again.
        pair.path = WIDE;
        pair.went = Went::default();
        pair.call(PAYLOAD);
        pair.call(PAYLOAD);
        assert!(pair.went.by_bulk > PAYLOAD, "{carries}: {:?}", pair.went);
    }
}

#[test]
fn a_device_that_takes_less_than_before_is_obeyed() {
    let mut pair = Pair::good();
    pair.call(PAYLOAD);
    pair.path = Path { device: 1472, carries: 1472 };
    pair.went = Went::default();
    pair.call(PAYLOAD);
    assert!(pair.went.longest_arrived <= 1472, "{:?}", pair.went);
    pair.call(PAYLOAD);
    assert!(pair.went.by_bulk > PAYLOAD, "{:?}", pair.went);
}

#[test]
fn a_peer_without_the_feature_is_sent_nothing_there() {
    for features in [[FEATURES & !FEATURE_BULK, FEATURES], [FEATURES, FEATURES & !FEATURE_BULK]] {
        let mut pair = Pair::new(WIDE, features);
        pair.call(PAYLOAD);
        assert_eq!(pair.went.by_bulk, 0);
    }
}

#[test]
fn the_way_is_proved_anew_under_new_keys() {
    let mut pair = Pair::good();
    pair.call(PAYLOAD);
    let handshakes =
        |pair: &Pair| pair.hubs[0].status(pair.now).next().expect("one").counters.handshakes;
    assert_eq!(handshakes(&pair), 1);
    for _ in 0..4 {
        pair.now = pair.now + Duration::from_millis(900);
        pair.call(100);
    }
    assert_eq!(handshakes(&pair), 2);
    pair.went = Went::default();
    pair.call(PAYLOAD);
    assert!(pair.went.by_bulk > PAYLOAD, "{:?}", pair.went);
}
