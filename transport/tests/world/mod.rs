//! Two nodes in virtual time over a seeded link, and an application on each that
//! calls the other.
//!
//! The application of a node answers a call with [`answer`] after a random pause.
//! Every call's payload begins with a serial number, so that executions and
//! outcomes can be counted per call.

use crate::common::Seeded;
use conet_testkit::link::{Faults, Link};
use conet_testkit::random::Random;
use conet_transport::session::handshake::{PrivateKey, PublicKey};
use conet_transport::session::{
    CallError, CallId, Counters, Event, Hub, HubConfig, IncomingId, Limits,
};
use conet_transport::time::Instant;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

pub(crate) const FEATURES: u32 = 1 | conet_transport::session::handshake::FEATURES;

#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) executions: u32,
    pub(crate) results: Vec<Result<Vec<u8>, CallError>>,
}

pub(crate) struct Node {
    pub(crate) hub: Hub,
    pub(crate) key: PublicKey,
    pub(crate) address: SocketAddr,
    /// Answers to give, by time.
    pending: BTreeMap<(Instant, u64), (PublicKey, IncomingId, Vec<u8>)>,
    calls: BTreeMap<CallId, u64>,
}

pub(crate) struct World {
    pub(crate) now: Instant,
    pub(crate) nodes: [Node; 2],
    pub(crate) link: Link<SocketAddr>,
    pub(crate) random: Random,
    pub(crate) outcomes: BTreeMap<u64, Outcome>,
    pub(crate) trace: Vec<String>,
    pub(crate) think: Duration,
    pub(crate) limits: Limits,
    order: u64,
    seed: u64,
}

pub(crate) fn private_key(node: usize) -> PrivateKey {
    PrivateKey::new([u8::try_from(node).expect("few") + 1; 32])
}

pub(crate) fn address(host: u8, port: u16) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, host], port))
}

/// What a node answers to a payload: as long, twice or half as long, every byte
/// changed.
pub(crate) fn answer(payload: &[u8]) -> Vec<u8> {
    let length = match payload.first() {
        Some(n) if n % 3 == 0 => payload.len() / 2,
        Some(n) if n % 3 == 1 => payload.len().min(200_000) * 2,
        _ => payload.len(),
    };
    payload.iter().cycle().take(length).map(|byte| byte ^ 0xa5).collect()
}

pub(crate) fn payload(serial: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length.max(8)];
    Random::new(serial).fill(&mut bytes);
    bytes[..8].copy_from_slice(&serial.to_le_bytes());
    bytes
}

fn serial_of(payload: &[u8]) -> u64 {
    u64::from_le_bytes(*payload.first_chunk().expect("eight bytes at least"))
}

fn node(seed: u64, number: usize, life: u64, now: Instant, limits: Limits) -> Node {
    let key = private_key(number);
    let config = HubConfig {
        limits,
        started: Duration::from_secs(1_000_000 * life),
        features: FEATURES,
        entropy: Seeded::boxed(seed ^ (number as u64 + 2 * life) << 40),
        private_key: key,
    };
    let mut hub = Hub::new(config).expect("entropy");
    let other = 1 - number;
    let addresses = [address(1, 5000), address(2, 5000)];
    hub.add_peer(now, private_key(other).public(), Some(addresses[other]));
    let key = hub.public_key();
    Node { hub, key, address: addresses[number], pending: BTreeMap::new(), calls: BTreeMap::new() }
}

impl World {
    pub(crate) fn new(seed: u64, faults: Faults) -> Self {
        Self::with_limits(seed, faults, Limits::default())
    }

    pub(crate) fn with_limits(seed: u64, faults: Faults, limits: Limits) -> Self {
        let now = Instant::from_start(Duration::from_secs(1));
        let mut world = Self {
            now,
            nodes: [node(seed, 0, 1, now, limits), node(seed, 1, 1, now, limits)],
            link: Link::new(seed, faults),
            random: Random::new(seed.wrapping_add(1)),
            outcomes: BTreeMap::new(),
            trace: Vec::new(),
            think: Duration::from_micros(300),
            limits,
            order: 0,
            seed,
        };
        world.flush();
        world
    }

    /// The node starts anew, without memory, with the same key.
    pub(crate) fn restart(&mut self, number: usize, life: u64) {
        self.nodes[number] = node(self.seed, number, life, self.now, self.limits);
        self.flush();
    }

    pub(crate) fn call(
        &mut self,
        from: usize,
        serial: u64,
        length: usize,
        timeout: Option<Duration>,
    ) -> CallId {
        let to = self.nodes[1 - from].key;
        let deadline = timeout.map(|timeout| self.now + timeout);
        let bytes = payload(serial, length);
        let id = self.nodes[from].hub.call(self.now, &to, bytes, deadline).expect("taken");
        self.nodes[from].calls.insert(id, serial);
        self.outcomes.entry(serial).or_default();
        self.flush();
        id
    }

    pub(crate) fn cancel(&mut self, from: usize, call: CallId) {
        let to = self.nodes[1 - from].key;
        self.nodes[from].hub.cancel(self.now, &to, call).expect("known");
        self.flush();
    }

    pub(crate) fn counters(&self, number: usize) -> Counters {
        self.status(number).counters
    }

    pub(crate) fn status(&self, number: usize) -> conet_transport::session::PeerStatus {
        self.nodes[number].hub.status(self.now).next().expect("one peer")
    }

    pub(crate) fn is_up(&self) -> bool {
        self.status(0).up && self.status(1).up
    }

    pub(crate) fn unfinished(&self) -> usize {
        self.outcomes.values().filter(|outcome| outcome.results.is_empty()).count()
    }

    /// Runs until `end` or until nothing more can happen.
    pub(crate) fn run_until(&mut self, end: Instant) {
        self.run_while(end, |_| true);
    }

    pub(crate) fn run_for(&mut self, time: Duration) {
        self.run_until(self.now + time);
    }

    /// Runs until all calls have ended; `false` at `limit`.
    pub(crate) fn run_to_completion(&mut self, limit: Duration) -> bool {
        self.run_while(self.now + limit, |world| world.unfinished() > 0);
        self.unfinished() == 0
    }

    pub(crate) fn run_while(&mut self, end: Instant, go_on: impl Fn(&Self) -> bool) {
        while go_on(self) {
            let Some(next) = self.next_moment().filter(|next| *next <= end) else {
                self.now = end;
                return;
            };
            self.now = next.max(self.now);
            self.deliver();
            for number in 0..2 {
                self.nodes[number].hub.handle_timeout(self.now);
                self.answer_due(number);
            }
            self.flush();
        }
    }

    fn next_moment(&self) -> Option<Instant> {
        let arrival = self.link.next_arrival().map(Instant::from_start);
        let timeouts = self.nodes.iter().filter_map(|node| node.hub.poll_timeout(self.now));
        let answers =
            self.nodes.iter().filter_map(|node| Some(node.pending.first_key_value()?.0.0));
        timeouts.chain(answers).chain(arrival).min()
    }

    fn deliver(&mut self) {
        while let Some(delivery) = self.link.deliver(self.now.since_start()) {
            let Some(number) = self.nodes.iter().position(|node| node.address == delivery.to)
            else {
                continue;
            };
            let before = self.counters(number);
            let mut bytes = delivery.bytes;
            self.nodes[number].hub.handle_datagram(self.now, delivery.from, &mut bytes);
            if !delivery.intact {
                let after = self.counters(number);
                assert_eq!(
                    (before.received_packets, before.handshakes, before.executions),
                    (after.received_packets, after.handshakes, after.executions),
                    "seed {}: a damaged packet was taken",
                    self.seed
                );
            }
        }
    }

    fn answer_due(&mut self, number: usize) {
        let node = &mut self.nodes[number];
        while let Some(entry) = node.pending.first_entry().filter(|entry| entry.key().0 <= self.now)
        {
            let (peer, id, bytes) = entry.remove();
            // The client may have restarted meanwhile.
            node.hub.reply(&peer, id, bytes).ok();
        }
    }

    /// Takes events and sends what there is to send.
    pub(crate) fn flush(&mut self) {
        for number in 0..2 {
            while let Some(event) = self.nodes[number].hub.poll_event() {
                self.on_event(number, event);
            }
            let mut buf = Vec::new();
            while let Some(to) = self.nodes[number].hub.poll_transmit(self.now, &mut buf) {
                assert!(buf.len() <= self.limits.datagram, "{} bytes", buf.len());
                let from = self.nodes[number].address;
                self.link.send(self.now.since_start(), from, to, &buf);
            }
        }
    }

    fn on_event(&mut self, number: usize, event: Event) {
        let node = &mut self.nodes[number];
        let note = match event {
            Event::Up(_) => "up".to_owned(),
            Event::Down(_, reason) => format!("down {reason:?}"),
            Event::Cancelled { .. } => "cancelled".to_owned(),
            Event::Call { peer, id, payload, .. } => {
                let serial = serial_of(&payload);
                self.outcomes.entry(serial).or_default().executions += 1;
                let think = u64::try_from(self.think.as_nanos()).expect("short");
                let think = Duration::from_nanos(self.random.below(think));
                node.pending.insert((self.now + think, self.order), (peer, id, answer(&payload)));
                self.order += 1;
                format!("execute {serial}")
            }
            Event::Ended { call, result, .. } => {
                let serial = node.calls[&call];
                let note = format!("ended {serial} {:?}", result.as_ref().map(Vec::len));
                self.outcomes.entry(serial).or_default().results.push(result);
                note
            }
        };
        self.trace.push(format!("{:?} {number} {note}", self.now.since_start()));
    }

    /// What must hold for every call, whatever the link did. `sizes` gives each
    /// call's length.
    pub(crate) fn check(&self, sizes: &BTreeMap<u64, usize>) {
        for (serial, outcome) in &self.outcomes {
            let results: Vec<_> =
                outcome.results.iter().map(|result| result.as_ref().map(Vec::len)).collect();
            let ran = outcome.executions;
            let context = || format!("seed {}: call {serial} ran {ran}: {results:?}", self.seed);
            assert!(outcome.executions <= 1, "{}", context());
            assert_eq!(outcome.results.len(), 1, "{}", context());
            match &outcome.results[0] {
                Ok(reply) => {
                    assert_eq!(outcome.executions, 1, "{}", context());
                    let expected = answer(&payload(*serial, sizes[serial]));
                    assert!(*reply == expected, "seed {}: reply to {serial} differs", self.seed);
                }
                Err(
                    CallError::Unreachable
                    | CallError::Cancelled
                    | CallError::Refused
                    | CallError::Aborted,
                ) => {
                    assert_eq!(outcome.executions, 0, "{}", context());
                }
                Err(_) => {}
            }
        }
    }
}
