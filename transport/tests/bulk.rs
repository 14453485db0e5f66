//! The way for bulk between two hubs, over paths that carry less than their devices do.

use conet_transport::session::handshake::{FEATURES, PrivateKey, PublicKey};
use conet_transport::session::ways::stream_address;
use conet_transport::session::{
    BATCH_BUFFER, BulkPort, Event, Hub, HubConfig, Lane, Limits, MOST_AROUND, MOST_PARTS,
    Scattered, Transmit,
};
use conet_transport::time::Instant;
use std::net::SocketAddr;
use std::time::Duration;

const HOP: Duration = Duration::from_micros(50);
const MAIN: u16 = 5000;
const BULK: u16 = 6000;
const FEATURE_BULK: u32 = 64;
const FEATURE_PLAIN: u32 = 2;
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

type Change = Box<dyn FnMut(&mut Vec<u8>)>;

struct Pair {
    now: Instant,
    hubs: [Hub; 2],
    keys: [PublicKey; 2],
    path: Path,
    went: Went,
    buf: Vec<u8>,
    /// Where pieces are left where they are, and received where they belong: what is done
    /// between a place and its use to the bytes of a batch.
    placed: Option<Change>,
    /// Batches that came so.
    came_placed: usize,
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
        let (placed, came_placed) = (None, 0);
        let (replies, ran) = (Vec::new(), Vec::new());
        Self { now, hubs, keys, path, went, buf, placed, came_placed, replies, ran }
    }

    fn good() -> Self {
        Self::new(WIDE, [FEATURES; 2])
    }

    fn carry_one(&mut self, from: usize, transmit: Transmit) {
        let mut sent = Vec::new();
        let mut parts = 0;
        self.hubs[from].parts(&transmit, &self.buf, |part| {
            sent.extend_from_slice(part);
            parts += 1;
        });
        assert!(sent.len() == transmit.length && parts <= MOST_PARTS);
        if transmit.is_bulk && transmit.segment > self.path.device {
            self.hubs[from].handle_too_long(&transmit);
            return;
        }
        if transmit.is_bulk
            && transmit.segment <= self.path.carries
            && self.place(from, transmit, &sent)
        {
            self.went.by_bulk += sent.len();
            self.went.longest_arrived = self.went.longest_arrived.max(transmit.segment);
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

    /// Puts a batch where its receiver wants it, if it does.
    fn place(&mut self, from: usize, transmit: Transmit, sent: &[u8]) -> bool {
        let Some(change) = &mut self.placed else { return false };
        let Some(place) = self.hubs[1 - from].place() else { return false };
        let (mut sent, mut around) = (sent.to_vec(), vec![0xee; MOST_AROUND]);
        change(&mut sent);
        let (mut rest, mut parts) = (&sent[..], 0);
        place.parts(&mut around, |part| {
            let (here, later) = rest.split_at(rest.len().min(part.len()));
            part[..here.len()].copy_from_slice(here);
            rest = later;
            parts += 1;
        });
        assert!(rest.is_empty() && parts <= MOST_PARTS);
        let at = SocketAddr::new(address(from).ip(), BULK);
        let (length, segment) = (sent.len(), transmit.segment);
        let scattered = Scattered { from: at, length, segment, marked: false };
        let count = self.hubs[1 - from].handle_scattered(self.now, &scattered, &around);
        assert_eq!(count, length.div_ceil(segment));
        // Nothing is planned any more.
        assert_eq!(self.hubs[1 - from].handle_scattered(self.now, &scattered, &around), 0);
        self.came_placed += 1;
        true
    }

    /// Carries packets until `until`, for a minute at most.
    fn run(&mut self, until: impl Fn(&Self) -> bool) {
        let end = self.now + Duration::from_secs(60);
        while !until(self) {
            assert!(self.now < end, "{:?} {:?}", self.went, self.hubs[0].status(self.now).next());
            for n in 0..2 {
                self.hubs[n].handle_timeout(self.now);
                let is_placed = self.placed.is_some();
                while let Some(transmit) = {
                    let (hub, buf) = (&mut self.hubs[n], &mut self.buf);
                    if is_placed {
                        hub.poll_parts(self.now, buf, Some(64))
                    } else {
                        hub.poll_batch(self.now, buf, Some(64))
                    }
                } {
                    assert!(is_placed || !transmit.in_parts);
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
            assert_eq!(status.counters.moves, 0, "{n}");
            assert!(status.counters.forged == 0 || self.placed.is_some(), "{n}");
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

const PLAIN: [u32; 2] = [FEATURES | FEATURE_PLAIN; 2];

#[test]
fn pieces_in_the_clear_are_left_where_they_are_and_received_where_they_belong() {
    for carries in [65_507, 1480] {
        let mut pair = Pair::new(Path { device: 65_507, carries }, PLAIN);
        pair.placed = Some(Box::new(|_| ()));
        for _ in 0..12 {
            pair.call(PAYLOAD);
            // Sizes that are no multiple of anything.
            pair.call(777_777);
        }
        assert!(pair.came_placed > 100, "{carries}: {}", pair.came_placed);
        let counters = pair.hubs[1].status(pair.now).next().expect("one").counters;
        assert_eq!((counters.replayed, counters.malformed), (0, 0));
    }
}

#[test]
fn what_is_sealed_is_neither() {
    let mut pair = Pair::good();
    pair.placed = Some(Box::new(|_| ()));
    pair.call(PAYLOAD);
    assert!(pair.went.by_bulk > PAYLOAD && pair.came_placed == 0);
}

/// One batch in three is not as planned: whatever stands in the place by then, no payload is
/// another one for it.
#[test]
fn what_is_not_as_planned_changes_no_payload() {
    let is_third = |sent: &[u8]| sent[8].is_multiple_of(3);
    let changes: [fn(&mut Vec<u8>); 6] = [
        // Header: kind, tracked, session.
        |sent| sent[0] ^= 0x40,
        |sent| sent[1] ^= 1,
        |sent| sent[4] ^= 1,
        // The payload's length.
        |sent| sent[29] ^= 1,
        |sent| *sent.last_mut().expect("long") ^= 1,
        |sent| sent.truncate(sent.len() - 70),
    ];
    for (n, change) in changes.into_iter().enumerate() {
        let mut pair = Pair::new(WIDE, PLAIN);
        pair.call(PAYLOAD);
        pair.placed = Some(Box::new(move |sent| {
            if is_third(sent) {
                change(sent);
            }
        }));
        pair.call(PAYLOAD);
        assert!(pair.came_placed > 0, "{n}");
    }
}

/// A batch that comes once more is no second piece, though it is as planned.
#[test]
fn a_batch_that_is_repeated_counts_once() {
    let mut pair = Pair::new(WIDE, PLAIN);
    pair.call(PAYLOAD);
    let mut before = Vec::new();
    pair.placed = Some(Box::new(move |sent| {
        if sent[8].is_multiple_of(3) && before.len() == sent.len() {
            sent.clone_from(&before);
        }
        before.clone_from(sent);
    }));
    pair.call(PAYLOAD);
    let counters = pair.hubs[1].status(pair.now).next().expect("one").counters;
    assert!(pair.came_placed > 0 && counters.replayed > 0, "{counters:?}");
}

/// On a stream what has no room is lost, and length costs nothing.
#[test]
fn on_a_stream_pieces_are_long_and_not_more_than_it_holds() {
    let hub = |n: u8| Hub::new(HubConfig::new(PrivateKey::new([n; 32]))).expect("entropy");
    let (mut hubs, at) = ([hub(1), hub(2)], stream_address(7));
    let [one, two] = [hubs[0].public_key(), hubs[1].public_key()];
    // Long after any call.
    let mut now = Instant::START + Duration::from_secs(1);
    hubs[0].add_peer(now, two, Some(at));
    hubs[1].add_peer(now, one, None);
    hubs[0].call_on(now, &two, Lane::Bulk, vec![7; PAYLOAD], None).expect("taken");
    let (mut buf, mut longest, mut most) = (vec![0; BATCH_BUFFER], 0, 0);
    let mut has_come = false;
    for _ in 0..2000 {
        for from in [0, 1] {
            hubs[from].handle_timeout(now);
            let mut sent = Vec::new();
            while let Some(transmit) = hubs[from].poll_batch(now, &mut buf, Some(64)) {
                assert!(!transmit.is_bulk && transmit.to == at);
                longest = longest.max(transmit.length);
                sent.push(buf[..transmit.length].to_vec());
            }
            most = most.max(sent.iter().map(Vec::len).sum());
            for mut datagram in sent {
                hubs[1 - from].handle_datagram(now, at, &mut datagram);
            }
        }
        while let Some(event) = hubs[1].poll_event() {
            if let Event::Call { payload, .. } = event {
                assert_eq!(payload, vec![7; PAYLOAD]);
                has_come = true;
            }
        }
        now = now + HOP;
    }
    assert!(has_come && longest > 30_000 && most < 1 << 20, "{has_come} {longest} {most}");
}
