//! Datagrams blocked and unblocked under a session, in virtual time: it goes over to a
//! stream and back, and no call notices.
//!
//! `CONET_SEED=n` runs the property with that seed alone.

mod common;

use common::Seeded;
use conet_testkit::link::{Faults, Link};
use conet_testkit::random::Random;
use conet_transport::session::handshake::{PrivateKey, PublicKey};
use conet_transport::session::ways::{Want, Ways, stream_address, stream_number};
use conet_transport::session::{Event, Hub, HubConfig};
use conet_transport::time::Instant;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

struct Node {
    hub: Hub,
    ways: Ways,
    address: SocketAddr,
    /// Of connections that it began.
    dialled: BTreeMap<PublicKey, u64>,
}

/// What is on its way over streams: arrival, to which node, by which connection.
type OnStream = VecDeque<(Instant, usize, u64, Vec<u8>)>;

struct World {
    now: Instant,
    nodes: [Node; 2],
    link: Link<SocketAddr>,
    streams: OnStream,
    /// Connections that stand, and those that are being made, with the node that began.
    standing: Vec<u64>,
    pending: Vec<(Instant, usize, u64)>,
    refuses: bool,
    next: u64,
    delay: Duration,
    executions: BTreeMap<u64, u32>,
    ended: BTreeMap<u64, u32>,
    serial: u64,
}

fn key(node: usize) -> PrivateKey {
    PrivateKey::new([u8::try_from(node).expect("two") + 1; 32])
}

impl World {
    /// Nodes that know each other's addresses; those in `dialling` may begin streams.
    fn new(seed: u64, faults: Faults, dialling: [bool; 2]) -> Self {
        let now = Instant::from_start(Duration::from_secs(1));
        let address = |node: u8| SocketAddr::from(([192, 0, 2, node + 1], 5000));
        let addresses = [address(0), address(1)];
        let nodes = [0, 1].map(|node| {
            let entropy = Seeded::boxed(seed ^ (node as u64) << 40);
            let started = Duration::from_secs(1_000_000);
            let features = conet_transport::session::handshake::FEATURES;
            let limits = conet_transport::session::Limits::default();
            let config = HubConfig { private_key: key(node), limits, started, features, entropy };
            let mut hub = Hub::new(config).expect("entropy");
            let (other, to) = (key(1 - node).public(), addresses[1 - node]);
            hub.add_peer(now, other, Some(to));
            let mut ways = Ways::default();
            if dialling[node] {
                ways.add(now, other, to);
            }
            Node { hub, ways, address: addresses[node], dialled: BTreeMap::new() }
        });
        let (link, streams) = (Link::new(seed, faults), VecDeque::new());
        Self {
            now,
            nodes,
            link,
            streams,
            standing: Vec::new(),
            pending: Vec::new(),
            refuses: false,
            next: 0,
            delay: faults.delay,
            executions: BTreeMap::new(),
            ended: BTreeMap::new(),
            serial: 0,
        }
    }

    fn call(&mut self, from: usize) {
        self.serial += 1;
        let peer = key(1 - from).public();
        let mut payload = self.serial.to_le_bytes().to_vec();
        payload.resize(8 + usize::try_from(self.serial * 37 % 3000).expect("small"), 7);
        self.nodes[from].hub.call(self.now, &peer, payload, None).expect("taken");
    }

    fn on_stream(&self, node: usize) -> bool {
        let address = self.nodes[node].hub.address_of(&key(1 - node).public());
        address.is_some_and(|address| stream_number(address).is_some())
    }

    fn close(&mut self, number: u64) {
        self.standing.retain(|standing| *standing != number);
        self.streams.retain(|(_, _, on, _)| *on != number);
        for node in &mut self.nodes {
            node.ways.on_closed(self.now, stream_address(number), &mut node.hub);
        }
    }

    fn step(&mut self, end: Instant) {
        let mut next = end;
        for node in &self.nodes {
            let hub = node.hub.poll_timeout(self.now);
            next = hub
                .into_iter()
                .chain(node.ways.poll_timeout(self.now, &node.hub))
                .fold(next, Instant::min);
        }
        next =
            self.link.next_arrival().map(Instant::from_start).into_iter().fold(next, Instant::min);
        next = self.streams.front().map(|one| one.0).into_iter().fold(next, Instant::min);
        next = self.pending.iter().map(|one| one.0).fold(next, Instant::min);
        self.now = next.max(self.now);
        self.deliver();
        for at in 0..2 {
            self.nodes[at].hub.handle_timeout(self.now);
            self.events(at);
            self.steer(at);
            self.transmit(at);
        }
    }

    fn deliver(&mut self) {
        while let Some(mut delivery) = self.link.deliver(self.now.since_start()) {
            let node = self.nodes.iter_mut().find(|node| node.address == delivery.to);
            let hub = &mut node.expect("an address of a node").hub;
            hub.handle_datagram(self.now, delivery.from, &mut delivery.bytes);
        }
        while self.streams.front().is_some_and(|one| one.0 <= self.now) {
            let (_, to, number, mut bytes) = self.streams.pop_front().expect("looked");
            self.nodes[to].hub.handle_datagram(self.now, stream_address(number), &mut bytes);
        }
        let (now, ready) = (self.now, std::mem::take(&mut self.pending));
        for (at, node, number) in ready {
            let peer = key(1 - node).public();
            if at > now {
                self.pending.push((at, node, number));
            } else if self.refuses {
                self.nodes[node].ways.on_refused(now, &peer);
            } else {
                self.standing.push(number);
                self.nodes[node].dialled.insert(peer, number);
                self.nodes[node].ways.on_connected(&peer, stream_address(number));
            }
        }
    }

    fn events(&mut self, at: usize) {
        while let Some(event) = self.nodes[at].hub.poll_event() {
            match event {
                Event::Call { peer, id, payload, .. } => {
                    let serial = u64::from_le_bytes(*payload.first_chunk().expect("eight"));
                    *self.executions.entry(serial).or_default() += 1;
                    self.nodes[at].hub.reply(&peer, id, payload).expect("asked");
                }
                Event::Ended { result, .. } => {
                    let reply = result.expect("no call fails");
                    let serial = u64::from_le_bytes(*reply.first_chunk().expect("eight"));
                    *self.ended.entry(serial).or_default() += 1;
                }
                Event::Up(_) | Event::Down(..) | Event::Cancelled { .. } => {}
            }
        }
    }

    fn steer(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        let mut closed = Vec::new();
        while let Some(want) = node.ways.poll(self.now, &mut node.hub) {
            match want {
                Want::Dial(_) => {
                    self.next += 1;
                    self.pending.push((self.now + self.delay * 2, at, self.next));
                }
                Want::HangUp(peer) => closed.extend(node.dialled.remove(&peer)),
            }
        }
        for number in closed {
            self.close(number);
        }
    }

    fn transmit(&mut self, at: usize) {
        let mut out = Vec::new();
        while let Some(to) = self.nodes[at].hub.poll_transmit(self.now, &mut out) {
            match stream_number(to) {
                None => self.link.send(self.now.since_start(), self.nodes[at].address, to, &out),
                Some(number) if self.standing.contains(&number) => {
                    self.streams.push_back((self.now + self.delay, 1 - at, number, out.clone()));
                }
                Some(_) => {}
            }
        }
    }

    fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        self.run_until(end, |_| false);
    }

    /// Runs until `done`; gives how long that took.
    fn run_until(&mut self, end: Instant, done: impl Fn(&Self) -> bool) -> Duration {
        let (begun, mut turns) = (self.now, 0);
        while self.now < end && !done(self) {
            let was = self.now;
            self.step(end);
            turns = if was == self.now { turns + 1 } else { 0 };
            assert!(turns < 1000, "time stands still");
        }
        self.now.since(begun)
    }

    fn all_ended(&self) -> bool {
        self.ended.len() as u64 == self.serial
    }

    fn check(&self) {
        assert!(self.all_ended());
        assert!(self.executions.values().chain(self.ended.values()).all(|count| *count == 1));
    }
}

const LAN: Duration = Duration::from_micros(100);
const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn blocked_from_the_start_the_stream_is_chosen_within_half_a_second() {
    for delay in [LAN, Duration::from_millis(5), Duration::from_millis(25)] {
        let mut world = World::new(1, Faults::none(delay), [true, false]);
        world.link.set_cut(true);
        world.call(0);
        let took = world.run_until(world.now + MINUTE, World::all_ended);
        assert!(took < Duration::from_millis(500), "{delay:?}: {took:?}");
        assert!(world.on_stream(0) && world.on_stream(1));
        world.check();
    }
}

#[test]
fn blocked_in_the_middle_slots_are_kept_and_the_way_back_is_found() {
    let mut world = World::new(2, Faults::none(LAN), [true, false]);
    world.call(0);
    world.run_until(world.now + MINUTE, World::all_ended);
    assert!(!world.on_stream(0));
    let handshakes = world.nodes[0].hub.status(world.now).next().expect("peer").counters.handshakes;
    world.link.set_cut(true);
    for _ in 0..20 {
        world.call(0);
        world.call(1);
    }
    let took = world.run_until(world.now + MINUTE, World::all_ended);
    assert!(took < Duration::from_millis(500), "{took:?}");
    assert!(world.on_stream(0) && world.on_stream(1));
    world.run_for(Duration::from_secs(20));
    assert!(world.on_stream(0), "nothing has changed");
    world.link.set_cut(false);
    let back = |world: &World| !world.on_stream(0) && !world.on_stream(1);
    let took = world.run_until(world.now + MINUTE, back);
    assert!(took <= Duration::from_secs(31), "{took:?}");
    world.call(0);
    world.run_for(Duration::from_secs(10));
    assert!(world.standing.is_empty(), "the stream is not needed any more");
    let status = world.nodes[0].hub.status(world.now).next().expect("peer");
    assert_eq!(status.counters.handshakes, handshakes, "the session is the same");
    world.check();
}

#[test]
fn over_a_stream_nothing_is_repeated() {
    let mut world = World::new(3, Faults::none(Duration::from_millis(20)), [true, false]);
    world.link.set_cut(true);
    world.call(0);
    world.run_until(world.now + MINUTE, World::all_ended);
    let repeats = |world: &World| {
        world
            .nodes
            .iter()
            .flat_map(|node| node.hub.status(world.now))
            .map(|one| one.counters.repeats)
            .sum::<u64>()
    };
    let before = repeats(&world);
    for _ in 0..200 {
        world.call(0);
        world.call(1);
        world.run_for(Duration::from_micros(700));
    }
    world.run_until(world.now + MINUTE, World::all_ended);
    assert_eq!(repeats(&world), before);
    world.check();
}

#[test]
fn good_datagrams_need_no_stream_and_refused_ones_are_tried_ever_more_rarely() {
    let mut world = World::new(4, Faults::none(LAN), [true, true]);
    for _ in 0..100 {
        world.call(0);
        world.run_for(Duration::from_secs(1));
    }
    assert_eq!(world.next, 0);
    world.refuses = true;
    world.link.set_cut(true);
    world.nodes[1].hub.remove_peer(&key(0).public()).expect("there");
    world.run_for(MINUTE * 5);
    assert!((3..20).contains(&world.next), "{} attempts", world.next);
}

/// Both ends begin one: they agree on one of them, and do not follow each other in circles.
#[test]
fn two_streams_at_once_become_one() {
    for seed in 0..20 {
        let mut world = World::new(seed, Faults::none(LAN), [true, true]);
        world.call(0);
        world.run_for(Duration::from_secs(1));
        // As if both had dialled at the same moment.
        world.link.set_cut(true);
        for node in 0..2 {
            world.next += 1;
            world.standing.push(world.next);
            let (peer, number) = (key(1 - node).public(), world.next);
            world.nodes[node].dialled.insert(peer, number);
            world.nodes[node].ways.on_connected(&peer, stream_address(number));
        }
        for _ in 0..200 {
            world.call(0);
            world.call(1);
            world.run_for(Duration::from_millis(10));
        }
        assert!(world.on_stream(0) && world.on_stream(1), "seed {seed}");
        let moves = |world: &World| {
            world.nodes[0].hub.status(world.now).next().expect("one").counters.moves
        };
        let before = moves(&world);
        assert!(before < 20, "seed {seed}: {before} moves");
        world.run_for(MINUTE);
        assert_eq!(moves(&world), before, "seed {seed}");
        world.run_until(world.now + MINUTE, World::all_ended);
        world.check();
    }
}

#[test]
fn whatever_is_blocked_and_broken_calls_run_once() {
    let one = std::env::var("CONET_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    for seed in one.map_or(0..60, |seed| seed..seed + 1) {
        eprintln!("seed {seed}");
        let mut random = Random::new(seed ^ 0x3a7);
        let mut faults = Faults::drawn_from(&mut random);
        faults.delay = faults.delay.min(Duration::from_millis(2));
        let dialling = if random.chance(500) { [true, true] } else { [true, false] };
        let mut world = World::new(seed, faults, dialling);
        for _ in 0..40 {
            for _ in 0..random.below(5) {
                let from = usize::try_from(random.below(2)).expect("small");
                world.call(from);
            }
            match random.below(8) {
                0 => world.link.set_cut(true),
                1 => world.link.set_cut(false),
                2 => {
                    if let Some(number) = world.standing.first().copied() {
                        world.close(number);
                    }
                }
                3 => world.refuses = random.chance(300),
                _ => {}
            }
            world.run_for(Duration::from_micros(random.below(400_000)));
        }
        world.refuses = false;
        world.link.set_cut(false);
        world.run_until(world.now + MINUTE * 10, World::all_ended);
        assert!(world.all_ended(), "seed {seed}: {} of {}", world.ended.len(), world.serial);
        world.check();
    }
}
