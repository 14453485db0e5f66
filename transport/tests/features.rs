//! Builds with any of the features talk to builds with any others: each pair does what both
//! know, and says nothing that one of them does not.

mod common;

use conet_transport::session::handshake::{FEATURE_PLAIN, PublicKey};
use conet_transport::session::{
    BATCH_BUFFER, BulkPort, CallError, Event, FreezeError, Hub, HubConfig, Lane,
};
use conet_transport::time::Instant;
use conet_wire::session::handshake::{
    FEATURE_AES, FEATURE_BULK, FEATURE_FIND, FEATURE_LANES, FEATURE_MOVE,
};
use conet_wire::session::{FLAG_BULK, HEADER, Header, PacketKind};
use std::net::SocketAddr;
use std::time::Duration;

/// All but the one that says which cipher is used.
const BITS: [u32; 5] = [FEATURE_PLAIN, FEATURE_LANES, FEATURE_MOVE, FEATURE_BULK, FEATURE_FIND];
const MAIN: u16 = 5000;
const BULK: u16 = 6000;
/// What a device for bulk takes.
const DEVICE: usize = 9000;
/// More than is sent unasked where payloads are granted.
const LARGE: usize = 80_000;
const HOP: Duration = Duration::from_micros(100);

fn subsets() -> impl Iterator<Item = u32> {
    (0..1u32 << BITS.len()).map(|chosen| {
        let is_in = |n: &usize| chosen >> n & 1 == 1;
        (0..BITS.len()).filter(is_in).map(|n| BITS[n]).sum()
    })
}

fn address(n: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, u8::try_from(n).expect("small")], MAIN))
}

struct Pair {
    offered: [u32; 2],
    hubs: [Hub; 2],
    keys: [PublicKey; 2],
    now: Instant,
    ended: Vec<Result<Vec<u8>, CallError>>,
    arguments: usize,
    by_bulk: usize,
}

impl Pair {
    fn new(offered: [u32; 2]) -> Self {
        let hub = |n: u8| {
            let features = offered[usize::from(n)];
            let config = HubConfig { features, ..common::config(n + 1, n.into()) };
            let mut hub = Hub::new(config).expect("entropy");
            hub.set_bulk(Some(BulkPort { port: BULK, buffer: 1 << 20 }));
            hub
        };
        let mut hubs = [hub(0), hub(1)];
        let keys = [hubs[0].public_key(), hubs[1].public_key()];
        hubs[0].add_peer(Instant::START, keys[1], Some(address(1)));
        hubs[1].add_peer(Instant::START, keys[0], None);
        let (now, ended) = (Instant::START, Vec::new());
        Self { offered, hubs, keys, now, ended, arguments: 0, by_bulk: 0 }
    }

    fn chosen(&self) -> u32 {
        self.offered[0] & self.offered[1]
    }

    fn has(&self, feature: u32) -> bool {
        self.chosen() & feature != 0
    }

    /// Every packet says only what both ends know.
    fn inspect(&self, datagram: &[u8]) {
        let header = Header::parse(datagram).expect("a packet");
        assert!(header.kind != PacketKind::Resumption, "{:?}", self.offered);
        assert!(header.flags & FLAG_BULK == 0 || self.has(FEATURE_BULK), "{:?}", self.offered);
        if header.kind != PacketKind::Data || !self.has(FEATURE_PLAIN) {
            return;
        }
        // In the clear: what the frames are can be seen.
        let mut rest = &datagram[HEADER..datagram.len() - conet_wire::session::TAG];
        while let Some((head, body)) = rest.split_first_chunk::<8>() {
            let [kind, _, _, _, l0, l1, l2, l3] = *head;
            let feature = match kind {
                1..=9 => None,
                10..=16 => Some(FEATURE_LANES),
                17..=18 => Some(FEATURE_BULK),
                19..=20 => Some(FEATURE_FIND),
                _ => panic!("frame {kind}"),
            };
            let is_known = feature.is_none_or(|feature| self.has(feature));
            assert!(is_known, "frame {kind} to {:?}", self.offered);
            let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).expect("small");
            rest = &body[length..];
        }
    }

    /// Carries packets until so many calls have ended, for ten seconds at most.
    fn run(&mut self, calls: usize) {
        let end = self.now + Duration::from_secs(10);
        let mut buf = vec![0; BATCH_BUFFER];
        while self.ended.len() < calls {
            assert!(self.now < end, "{:?}: {} of {calls}", self.offered, self.ended.len());
            for n in 0..2 {
                self.hubs[n].handle_timeout(self.now);
                while let Some(transmit) = self.hubs[n].poll_batch(self.now, &mut buf, Some(16)) {
                    if transmit.is_bulk && transmit.segment > DEVICE {
                        self.hubs[n].handle_too_long(&transmit);
                        continue;
                    }
                    let port = if transmit.is_bulk { BULK } else { MAIN };
                    let from = SocketAddr::new(address(n).ip(), port);
                    self.by_bulk += if transmit.is_bulk { transmit.length } else { 0 };
                    for datagram in buf[..transmit.length].chunks_mut(transmit.segment) {
                        self.inspect(datagram);
                        self.hubs[1 - n].handle_datagram(self.now, from, datagram);
                    }
                }
                while let Some(event) = self.hubs[n].poll_event() {
                    self.on_event(n, event);
                }
            }
            self.now = self.now + HOP;
        }
    }

    fn on_event(&mut self, n: usize, event: Event) {
        match event {
            Event::Call { peer, id, mut payload, argument, .. } => {
                self.arguments += usize::from(argument.is_some());
                payload.reverse();
                self.hubs[n].reply(&peer, id, payload).expect("waits");
            }
            Event::Ended { result, .. } => self.ended.push(result),
            Event::Up(_) => {}
            other => panic!("{other:?} of {:?}", self.offered),
        }
    }

    fn payload(length: usize) -> Vec<u8> {
        (0..=250).cycle().take(length).collect()
    }

    /// Calls of each kind from `n`; gives how many.
    fn call(&mut self, n: usize) -> usize {
        let to = self.keys[1 - n];
        for (lane, length) in [(Lane::Calls, 64), (Lane::Control, 3000), (Lane::Bulk, LARGE)] {
            let payload = Self::payload(length);
            self.hubs[n].call_on(self.now, &to, lane, payload, None).expect("taken");
        }
        let row = (0..3).map(|_| (Self::payload(40), false));
        let row = row.collect::<Vec<_>>().into_iter();
        let (now, mut ids) = (self.now, Vec::new());
        self.hubs[n].call_row(now, &to, Lane::Calls, row, None, &mut ids).expect("taken");
        3 + ids.len()
    }

    fn check(&mut self) {
        let calls = self.call(0) + self.call(1);
        self.run(calls);
        let refused = self.ended.iter().filter(|end| **end == Err(CallError::Refused)).count();
        // Rows are not run one after the other where they cannot go as one.
        let in_rows = if self.has(FEATURE_LANES) { (0, 4) } else { (6, 0) };
        assert_eq!((refused, self.arguments), in_rows, "{:?}", self.offered);
        for length in [64, 3000, LARGE] {
            let mut reply = Self::payload(length);
            reply.reverse();
            let replies = self.ended.iter().filter(|end| end.as_ref() == Ok(&reply)).count();
            assert_eq!(replies, 2, "{length} {:?}", self.offered);
        }
        // The way for bulk is proved by a challenge, a frame of those for lanes: without them
        // one was sent all the same.
        let has_way = self.has(FEATURE_BULK) && self.has(FEATURE_LANES);
        assert_eq!(self.by_bulk > LARGE, has_way, "{:?}", self.offered);
        for n in 0..2 {
            let status = self.hubs[n].status(self.now).next().expect("one peer");
            let counters = status.counters;
            let wrong = (counters.forged, counters.malformed, counters.moves);
            assert_eq!((wrong, counters.executions), ((0, 0, 0), counters.executions));
            let frozen = self.hubs[n].freeze(self.now, &self.keys[1 - n]);
            let is_refused = frozen == Err(FreezeError::NoSession);
            assert_eq!(!is_refused, self.has(FEATURE_MOVE), "{:?}", self.offered);
        }
    }
}

#[test]
fn builds_with_any_features_talk_to_builds_with_any_others() {
    for (n, ours) in (0..).zip(subsets()) {
        for (m, theirs) in (0..).zip(subsets()) {
            // Each of the four ways to agree on a cipher, in turn.
            let aes = [n & FEATURE_AES, m & FEATURE_AES];
            Pair::new([ours | aes[1], theirs | (aes[0] ^ aes[1])]).check();
        }
    }
}
