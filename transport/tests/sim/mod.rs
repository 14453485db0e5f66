//! Two nodes that call each other over the worst of links, move, restart and are thawed
//! from old images, all from one seed and in virtual time.
//!
//! What must hold is checked here: no call runs twice, each ends once, a reply is what
//! was answered, an argument is what the call before was answered with, an error that says
//! "never ran" tells the truth, memory stays within the limits.

use crate::common::Seeded;
use conet_testkit::link::{Delivery, Faults, Link};
use conet_testkit::random::Random;
use conet_transport::session::handshake::{FEATURES, PrivateKey, PublicKey};
use conet_transport::session::ways::{stream_address, stream_number};
use conet_transport::session::{
    CallError, CallId, DownReason, Event, Frozen, Hub, HubConfig, IncomingId, Lane, Limits,
};
use conet_transport::session::{ReplyError, ReplyFailed};
use conet_transport::time::Instant;
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

mod story;

/// Of a node that has enough of everything; others have less, see [`World::draw_limits`].
pub(crate) const LIMITS: Limits = Limits {
    datagram: 1400,
    slots: 256,
    queued: 4096,
    payload: 512 * 1024,
    assembling: 1024 * 1024,
    unanswered: 4 * 1024 * 1024,
    unanswered_by_all: 16 * 1024 * 1024,
    keepalive: Duration::from_secs(1),
    dead_after: Duration::from_secs(5),
    rekey_after: Duration::from_secs(20),
    handshake_retry: Duration::from_millis(250),
};

/// A call as the world sees it.
#[derive(Debug, Default)]
struct Fate {
    executions: u32,
    answer: Option<Vec<u8>>,
    ended: Vec<Result<Vec<u8>, CallError>>,
    /// The call before it in its row.
    before: Option<u64>,
    /// Who called has died without an end.
    orphan: bool,
    /// It was handed out and refused by its application.
    refused: bool,
}

/// What an application says to a call.
#[derive(Clone, Copy)]
enum Say {
    Answer,
    Stop,
    Refuse,
    Disown,
}

struct Due {
    peer: PublicKey,
    id: IncomingId,
    serial: u64,
    answer: Vec<u8>,
    say: Say,
}

/// One process of a node.
struct Process {
    hub: Hub,
    limits: Limits,
    address: SocketAddr,
    /// What it will answer, by time.
    due: BTreeMap<(Instant, u64), Due>,
    calls: HashMap<CallId, u64>,
    /// From an old image: its application does nothing, and nobody counts its ends.
    is_twin: bool,
    /// Its session has gone elsewhere.
    is_ghost: bool,
    /// It has not had the processor for a while: what comes waits in its socket.
    paused_until: Option<Instant>,
    socket: Vec<Delivery<SocketAddr>>,
}

pub(crate) struct World {
    seed: u64,
    now: Instant,
    random: Random,
    link: Link<SocketAddr>,
    processes: Vec<Process>,
    /// The process of each node that counts.
    at: [usize; 2],
    keys: [PublicKey; 2],
    limits: [Limits; 2],
    images: Vec<(usize, Frozen)>,
    /// Datagrams that are late by far more than the link makes them.
    late: BTreeMap<(Instant, u64), Delivery<SocketAddr>>,
    /// One in a thousand of these.
    strays: u32,
    /// The number of the stream that stands between the two, and whether it does.
    stream: u64,
    has_stream: bool,
    /// Applications answer all that comes.
    is_last: bool,
    fates: BTreeMap<u64, Fate>,
    order: u64,
    lives: u64,
    ports: u16,
    hash: u64,
    think: u64,
    /// Calls of a thousand that take long.
    parks: u32,
    pub(crate) tally: Tally,
}

/// What happened in all.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Tally {
    pub(crate) calls: u64,
    pub(crate) replies: u64,
    pub(crate) unknown: u64,
    pub(crate) aborted: u64,
    pub(crate) rebinds: u64,
    pub(crate) thaws: u64,
    pub(crate) twins: u64,
    pub(crate) superseded: u64,
    pub(crate) restarts: u64,
    pub(crate) pauses: u64,
    pub(crate) streams: u64,
    pub(crate) refused: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: Self) {
        self.calls += other.calls;
        self.replies += other.replies;
        self.unknown += other.unknown;
        self.aborted += other.aborted;
        self.rebinds += other.rebinds;
        self.thaws += other.thaws;
        self.twins += other.twins;
        self.superseded += other.superseded;
        self.restarts += other.restarts;
        self.pauses += other.pauses;
        self.streams += other.streams;
        self.refused += other.refused;
    }
}

fn private_key(node: usize) -> PrivateKey {
    PrivateKey::new([u8::try_from(node).expect("two") + 1; 32])
}

fn payload(serial: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length.max(8)];
    Random::new(serial).fill(&mut bytes);
    bytes[..8].copy_from_slice(&serial.to_le_bytes());
    bytes
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x51e1);
        let mut faults = Faults::drawn_from(&mut random);
        faults.lose = u32::try_from(random.below(301)).expect("small");
        let now = Instant::from_start(Duration::from_secs(1));
        let mut world = Self {
            seed,
            now,
            link: Link::new(seed, faults),
            processes: Vec::new(),
            at: [0, 1],
            keys: [private_key(0).public(), private_key(1).public()],
            limits: [Self::draw_limits(&mut random), Self::draw_limits(&mut random)],
            images: Vec::new(),
            late: BTreeMap::new(),
            strays: if random.chance(500) { 0 } else { 5 },
            stream: 0,
            has_stream: false,
            is_last: false,
            fates: BTreeMap::new(),
            order: 0,
            lives: 0,
            ports: 1000,
            hash: 0xcbf2_9ce4_8422_2325,
            think: 10 + random.below(20_000),
            parks: if random.chance(100) { 700 } else { 20 },
            random,
            tally: Tally::default(),
        };
        for node in 0..2 {
            let process = world.process(node, world.address_of(node, 0));
            world.processes.push(process);
        }
        for node in 0..2 {
            let (key, other) = (world.keys[1 - node], world.processes[1 - node].address);
            world.processes[node].hub.add_peer(now, key, Some(other));
        }
        world
    }

    /// Every second node has less of something, a few take what is long.
    fn draw_limits(random: &mut Random) -> Limits {
        if random.chance(5) {
            let (payload, unanswered) = (16 << 20, 64 << 20);
            return Limits { payload, unanswered, ..LIMITS }.clamped();
        }
        if random.chance(500) {
            return LIMITS;
        }
        let mut small = |most: u32| usize::try_from(random.below(u64::from(most))).expect("small");
        let limits = Limits {
            datagram: 1232 + small(169),
            slots: 8 << small(6),
            payload: (16 * 1024) << small(6),
            assembling: (32 * 1024) << small(6),
            unanswered: (32 * 1024) << small(8),
            rekey_after: Duration::from_millis(300 << small(7)),
            ..LIMITS
        };
        limits.clamped()
    }

    fn address_of(&self, node: usize, port: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, u8::try_from(node).expect("two") + 1], 5000 + port))
    }

    fn fresh_address(&mut self, node: usize) -> SocketAddr {
        self.ports += 1;
        self.address_of(node, self.ports)
    }

    fn process(&mut self, node: usize, address: SocketAddr) -> Process {
        self.lives += 1;
        let config = HubConfig {
            private_key: private_key(node),
            limits: self.limits[node],
            // A clock that goes on, whichever process looks at it.
            started: Duration::from_secs(1_000_000) + Duration::from_nanos(self.lives),
            features: FEATURES | u32::from(self.random.chance(500)),
            entropy: Seeded::boxed(self.seed ^ self.lives << 32 ^ 0xe17),
        };
        let hub = Hub::new(config).expect("entropy");
        let (due, calls) = (BTreeMap::new(), HashMap::new());
        let (limits, paused_until, socket) = (self.limits[node], None, Vec::new());
        let (is_twin, is_ghost) = (false, false);
        Process { hub, limits, address, due, calls, is_twin, is_ghost, paused_until, socket }
    }

    fn note(&mut self, what: &str) {
        let time = self.now.since_start().as_nanos().to_le_bytes();
        for byte in time.iter().chain(what.as_bytes()) {
            self.hash = (self.hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if std::env::var_os("CONET_TRACE").is_some() {
            eprintln!("{:?} {what}", self.now.since_start());
        }
    }

    pub(crate) const fn hash(&self) -> u64 {
        self.hash
    }

    fn unfinished(&self) -> usize {
        let open = |fate: &&Fate| fate.ended.is_empty() && !fate.orphan;
        self.fates.values().filter(open).count()
    }

    fn run_until(&mut self, end: Instant, go_on: impl Fn(&Self) -> bool) {
        let (mut last, mut turns) = (self.now, 0);
        while go_on(self) {
            turns = if self.now == last { turns + 1 } else { 0 };
            last = self.now;
            assert!(turns < 1000, "seed {}: time stands still at {last:?}", self.seed);
            let Some(next) = self.next_moment().filter(|next| *next <= end) else {
                self.now = end;
                return;
            };
            self.now = next.max(self.now);
            self.deliver();
            for at in 0..self.processes.len() {
                if !self.is_paused(at) {
                    self.processes[at].hub.handle_timeout(self.now);
                    self.answer_due(at);
                }
            }
            self.flush();
        }
    }

    fn run_for(&mut self, time: Duration) {
        self.run_until(self.now + time, |_| true);
    }

    fn next_moment(&self) -> Option<Instant> {
        let arrival = self.link.next_arrival().map(Instant::from_start);
        let runs = || self.processes.iter().filter(|process| process.paused_until.is_none());
        let timeouts = runs().filter_map(|p| p.hub.poll_timeout(self.now));
        // A frozen application answers when it is thawed.
        let alive = runs().filter(|process| !process.is_ghost);
        let answers = alive.filter_map(|p| Some(p.due.first_key_value()?.0.0));
        let resumes = self.processes.iter().filter_map(|process| process.paused_until);
        let late = self.late.first_key_value().map(|((at, _), _)| *at);
        timeouts.chain(answers).chain(arrival).chain(resumes).chain(late).min()
    }

    /// Whether a process has no processor now; what has come meanwhile is the first that it
    /// sees when it has one again.
    fn is_paused(&mut self, at: usize) -> bool {
        let Some(until) = self.processes[at].paused_until else { return false };
        if until > self.now {
            return true;
        }
        self.processes[at].paused_until = None;
        for delivery in core::mem::take(&mut self.processes[at].socket) {
            self.take(at, delivery);
        }
        false
    }

    fn deliver(&mut self) {
        while let Some(entry) = self.late.first_entry().filter(|one| one.key().0 <= self.now) {
            let delivery = entry.remove();
            self.arrive(delivery);
        }
        while let Some(delivery) = self.link.deliver(self.now.since_start()) {
            // What goes by a stream comes in its order, or the stream is no more.
            if stream_number(delivery.to).is_none() && self.random.chance(self.strays) {
                let at = self.now + Duration::from_micros(self.random.below(10_000_000));
                self.order += 1;
                self.late.insert((at, self.order), delivery);
            } else {
                self.arrive(delivery);
            }
        }
    }

    fn arrive(&mut self, delivery: Delivery<SocketAddr>) {
        let at = match stream_number(delivery.to) {
            None => self.processes.iter().position(|p| p.address == delivery.to),
            Some(number) => {
                let is_there = self.has_stream && number / 2 == self.stream;
                is_there.then(|| self.at[usize::from(number % 2 == 1)])
            }
        };
        let Some(at) = at else { return };
        if self.processes[at].paused_until.is_none() {
            self.take(at, delivery);
        } else if self.processes[at].socket.len() < 200 {
            self.processes[at].socket.push(delivery);
        }
    }

    fn take(&mut self, at: usize, delivery: Delivery<SocketAddr>) {
        let mut bytes = delivery.bytes;
        let marked = self.random.chance(3);
        let hub = &mut self.processes[at].hub;
        hub.handle_marked_datagram(self.now, delivery.from, &mut bytes, marked);
    }

    fn answer_due(&mut self, at: usize) {
        let now = self.now;
        if self.processes[at].is_ghost {
            return;
        }
        while let Some(entry) = self.processes[at].due.first_entry().filter(|e| e.key().0 <= now) {
            let Due { peer, id, serial, answer, say } = entry.remove();
            let hub = &mut self.processes[at].hub;
            let mut told = match say {
                Say::Answer => hub.reply(&peer, id, answer),
                Say::Stop => hub.reply_and_stop(&peer, id, answer),
                Say::Refuse => hub.refuse(&peer, id),
                Say::Disown => hub.disown(&peer, id),
            };
            if told == Err(ReplyFailed::Reply(ReplyError::TooLong)) {
                told = hub.disown(&peer, id);
            }
            // The client may have restarted meanwhile.
            self.note(&format!("{at} answers {serial} {}", told.is_ok()));
        }
    }

    /// Takes events, sends what there is to send, looks at what must hold at any time.
    fn flush(&mut self) {
        let mut buf = Vec::new();
        for at in 0..self.processes.len() {
            if self.processes[at].paused_until.is_some() {
                continue;
            }
            while let Some(event) = self.processes[at].hub.poll_event() {
                self.on_event(at, event);
            }
            let process = &mut self.processes[at];
            while let Some(to) = process.hub.poll_transmit(self.now, &mut buf) {
                assert!(buf.len() <= LIMITS.datagram, "seed {}: {} bytes", self.seed, buf.len());
                let now = self.now.since_start();
                match stream_number(to) {
                    None => self.link.send(now, process.address, to, &buf),
                    Some(number) => {
                        // Each end has a number of its own for it.
                        let there = stream_address(number ^ 1);
                        self.order += 1;
                        let at = (self.now + Duration::from_micros(300), self.order);
                        let (bytes, intact) = (buf.clone(), true);
                        self.late.insert(at, Delivery { from: there, to: there, bytes, intact });
                    }
                }
            }
            self.look_at(at);
        }
    }

    fn look_at(&self, at: usize) {
        let (process, seed) = (&self.processes[at], self.seed);
        let limits = process.limits;
        for status in process.hub.status(self.now) {
            let (calls, served) = status.slots;
            assert!(calls <= limits.slots && served <= limits.slots.max(64), "seed {seed}");
            let (replies, calls) = status.set_aside;
            assert!(replies.max(calls) <= limits.assembling, "seed {seed}: {status:?}");
            let (calls, replies) = status.unanswered;
            let most = limits.unanswered.max(limits.payload);
            assert!(calls.max(replies) <= most, "seed {seed}: {status:?}");
        }
    }

    fn on_event(&mut self, at: usize, event: Event) {
        let (is_twin, seed) = (self.processes[at].is_twin, self.seed);
        match event {
            Event::Up(_) => self.note(&format!("{at} up")),
            Event::Down(_, reason) => {
                self.note(&format!("{at} down {reason:?}"));
                self.tally.superseded += u64::from(reason == DownReason::Superseded);
            }
            Event::Cancelled { .. } => self.note(&format!("{at} cancelled")),
            Event::Call { peer, id, payload, argument, lane } => {
                let serial = u64::from_le_bytes(*payload.first_chunk().expect("eight bytes"));
                self.note(&format!("{at} runs {serial} {lane:?}"));
                let before = self.fates.get(&serial).expect("was called").before;
                let wanted = before.map(|before| self.fates[&before].answer.clone().expect("ran"));
                assert!(argument == wanted, "seed {seed}: wrong argument for {serial}");
                let fate = self.fates.get_mut(&serial).expect("was called");
                fate.executions += 1;
                assert_eq!(fate.executions, 1, "seed {seed}: call {serial} runs twice");
                let mut answer = payload;
                let length = match serial % 5 {
                    0 => answer.len() / 2,
                    1 if answer.len() < 4000 => answer.len() * 40,
                    _ => answer.len(),
                };
                // Results of a row are arguments, which fit a packet.
                let length = if before.is_some() || self.random.chance(700) {
                    answer.len().min(1000)
                } else {
                    length
                };
                answer = answer.iter().cycle().take(length).map(|byte| byte ^ 0x5a).collect();
                if let (Some(first), Some(argument)) = (answer.first_mut(), argument) {
                    *first ^= argument.first().copied().unwrap_or(1);
                }
                let say = match self.random.below(40) {
                    _ if self.is_last => Say::Answer,
                    0..=3 => Say::Stop,
                    4 => Say::Refuse,
                    5 => Say::Disown,
                    _ => Say::Answer,
                };
                fate.refused = matches!(say, Say::Refuse);
                self.tally.refused += u64::from(fate.refused);
                // Who takes the result of one that has none does not run.
                fate.answer = matches!(say, Say::Answer | Say::Stop).then(|| answer.clone());
                let parks = self.random.chance(self.parks);
                let think = self.random.below(if parks { 4_000_000 } else { self.think });
                let key = (self.now + Duration::from_micros(think), self.order);
                self.order += 1;
                self.processes[at].due.insert(key, Due { peer, id, serial, answer, say });
            }
            Event::Ended { call, result, .. } => {
                let Some(&serial) = self.processes[at].calls.get(&call) else {
                    assert!(is_twin, "seed {seed}: an end of nothing");
                    return;
                };
                self.note(&format!("{at} ended {serial} {:?}", result.as_ref().map(Vec::len)));
                self.fates.get_mut(&serial).expect("was called").ended.push(result);
            }
        }
    }

    /// What must hold in the end, for every call.
    fn check(&mut self) {
        for (serial, fate) in &self.fates {
            let seed = self.seed;
            let ran = fate.executions;
            let ends: Vec<_> = fate.ended.iter().map(|end| end.as_ref().map(Vec::len)).collect();
            assert!(ran <= 1, "seed {seed}: {serial} ran {ran}");
            if fate.orphan && ends.is_empty() {
                continue;
            }
            assert_eq!(ends.len(), 1, "seed {seed}: call {serial} ran {ran} ended {ends:?}");
            match &fate.ended[0] {
                Ok(reply) => {
                    assert!(Some(reply) == fate.answer.as_ref(), "seed {seed}: {serial} differs");
                    self.tally.replies += 1;
                }
                Err(CallError::Unknown | CallError::TimedOut) => self.tally.unknown += 1,
                Err(error) => {
                    let refused = *error == CallError::Refused && fate.refused;
                    assert!(ran == 0 || refused, "seed {seed}: {serial} ran: {error:?}");
                    self.tally.aborted += u64::from(*error == CallError::Aborted);
                }
            }
        }
    }
}
