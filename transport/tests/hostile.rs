//! A peer with valid keys that keeps to no rule: what it says costs little, stays bounded and
//! harms nobody else.

mod common;

use conet_testkit::random::Random;
use conet_transport::session::handshake::{
    Established, FEATURES, Initiator, PrivateKey, PublicKey,
};
use conet_transport::session::protect::{Label, Opener, Replay, Sealer};
use conet_transport::session::{Event, Hub, HubConfig, IncomingId, Lane, Limits};
use conet_transport::time::Instant;
use conet_wire::session::frame::{
    Ack, After, Direction, Frame, Frames, Marks, SEEN_BYTES, SeenFrame, SlotHead, Status,
};
use conet_wire::session::handshake::{FEATURE_LANES, InitiationSecret, Response};
use conet_wire::session::{FLAG_BULK, FLAG_TRACKED, HEADER, PacketKind, TAG};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 7))
}

/// The hub that is attacked, the peer that does it, and an honest one beside.
struct Rig {
    hub: Hub,
    honest: Hub,
    now: Instant,
    raw: PrivateKey,
    keys: Option<(Established, Sealer, Opener)>,
    counter: u64,
    incarnation: u64,
    /// Calls that were handed out and not answered.
    running: Vec<(PublicKey, IncomingId)>,
    seen: HashSet<(PublicKey, IncomingId)>,
    /// What the hub has said to the raw peer, opened.
    said: Vec<Vec<u8>>,
    /// Bytes to each address, and from each.
    sent_to: std::collections::BTreeMap<SocketAddr, usize>,
    ended: usize,
    honest_ended: usize,
}

impl Rig {
    fn new(limits: Limits) -> Self {
        let config = HubConfig { limits, ..common::config(1, 1) };
        let mut hub = Hub::new(config).expect("entropy");
        let mut honest = Hub::new(common::config(3, 3)).expect("entropy");
        let raw = PrivateKey::new([2; 32]);
        let now = Instant::from_start(SECOND);
        hub.add_peer(now, raw.public(), None);
        hub.add_peer(now, honest.public_key(), None);
        honest.add_peer(now, hub.public_key(), Some(address(1)));
        let mut rig = Self {
            hub,
            honest,
            now,
            raw,
            keys: None,
            counter: 0,
            incarnation: 7,
            running: Vec::new(),
            seen: HashSet::new(),
            said: Vec::new(),
            sent_to: std::collections::BTreeMap::new(),
            ended: 0,
            honest_ended: 0,
        };
        rig.settle();
        rig
    }

    /// Makes keys, as the raw peer would after a while.
    fn shake_hands(&mut self, features: u32) {
        self.counter += 1;
        let secret = InitiationSecret {
            counter: self.counter,
            incarnation: self.incarnation,
            session: u32::try_from(self.counter).expect("few"),
        };
        let mut entropy = common::Seeded::boxed(self.counter + 999);
        let (mut initiator, mut packet) =
            Initiator::start(&self.raw, &self.hub.public_key(), features, secret, &mut *entropy)
                .expect("starts");
        self.hub.handle_datagram(self.now, address(2), &mut packet);
        let mut out = Vec::new();
        while let Some(to) = self.hub.poll_transmit(self.now, &mut out) {
            let Some(response) = Response::parse(&out).ok().filter(|_| to == address(2)) else {
                self.take(to, &mut out.clone());
                continue;
            };
            if let Ok(keys) = initiator.finish(&response) {
                let sealer = Sealer::new(keys.cipher, &keys.sealing, 0);
                let opener = Opener::new(keys.cipher, &keys.opening, Replay::window());
                self.keys = Some((keys, sealer, opener));
            }
        }
        self.say(&[Frame::Ping { token: 1 }]);
    }

    fn packet(&mut self, payload: &[u8], flags: u8) -> Vec<u8> {
        let (keys, sealer, _) = self.keys.as_mut().expect("shook hands");
        let mut packet = vec![0; HEADER + payload.len() + TAG];
        packet[HEADER..HEADER + payload.len()].copy_from_slice(payload);
        let label = Label { kind: PacketKind::Data, flags, session: keys.remote_session };
        sealer.seal_in_place(label, &mut packet, payload.len()).expect("room");
        packet
    }

    fn say_raw(&mut self, payload: &[u8], flags: u8, from: SocketAddr) {
        let mut packet = self.packet(payload, flags);
        self.hub.handle_datagram(self.now, from, &mut packet);
    }

    fn say(&mut self, frames: &[Frame<'_>]) {
        self.say_raw(&emit(frames), 0, address(2));
    }

    fn take(&mut self, to: SocketAddr, packet: &mut [u8]) {
        *self.sent_to.entry(to).or_default() += packet.len();
        if to == address(3) {
            self.honest.handle_datagram(self.now, address(1), packet);
        } else if let Some((_, _, opener)) = &mut self.keys
            && let Ok((_, range)) = opener.open_in_place(packet)
        {
            self.said.push(packet[range].to_vec());
        }
    }

    /// Takes events and packets until nothing more comes.
    fn settle(&mut self) {
        let mut buf = Vec::new();
        self.hub.handle_timeout(self.now);
        self.honest.handle_timeout(self.now);
        for _ in 0..100 {
            let mut moved = false;
            while let Some(event) = self.hub.poll_event() {
                self.on_event(event);
            }
            while let Some(to) = self.hub.poll_transmit(self.now, &mut buf) {
                moved = true;
                self.take(to, &mut buf);
            }
            while self.honest.poll_transmit(self.now, &mut buf).is_some() {
                moved = true;
                self.hub.handle_datagram(self.now, address(3), &mut buf);
            }
            while let Some(event) = self.honest.poll_event() {
                match event {
                    Event::Call { peer, id, payload, .. } => {
                        self.honest.reply(&peer, id, payload).expect("waits");
                    }
                    Event::Ended { result, .. } => {
                        result.expect("an answer");
                        self.honest_ended += 1;
                    }
                    _ => {}
                }
            }
            if !moved {
                return;
            }
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Call { peer, id, payload, .. } if peer == self.honest.public_key() => {
                self.hub.reply(&peer, id, payload).expect("waits");
            }
            Event::Call { peer, id, .. } => {
                assert!(self.seen.insert((peer, id)), "{id:?} runs twice");
                self.running.push((peer, id));
            }
            Event::Ended { .. } => self.ended += 1,
            _ => {}
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        for _ in 0..2000 {
            let next = [&self.hub, &self.honest];
            let next = next.iter().filter_map(|hub| hub.poll_timeout(self.now)).min();
            self.now = next.map_or(end, |next| next.max(self.now + Duration::from_micros(10)));
            self.now = self.now.min(end);
            self.settle();
            if self.now >= end {
                return;
            }
        }
    }

    /// The honest peer is served.
    fn check_honest(&mut self, seed: u64) {
        let (to, before) = (self.hub.public_key(), self.honest_ended);
        self.honest.call(self.now, &to, vec![3; 3000], None).expect("taken");
        for _ in 0..100 {
            self.pass(Duration::from_millis(100));
            if self.honest_ended > before {
                return;
            }
        }
        panic!("seed {seed}: an honest peer is not served");
    }
}

fn emit(frames: &[Frame<'_>]) -> Vec<u8> {
    let mut payload = Vec::new();
    for frame in frames {
        let mut bytes = vec![0; frame.wire_len()];
        frame.emit(&mut bytes).expect("room");
        payload.extend_from_slice(&bytes);
    }
    payload
}

/// What was set aside for a reply under some features was given back under others: a panic where
/// overflow is looked for, and no memory for any reply elsewhere.
#[test]
fn features_that_change_under_a_reply_in_part_change_no_account() {
    for (first, second) in [(FEATURES & !FEATURE_LANES, FEATURES), (FEATURES, 0)] {
        let mut rig = Rig::new(Limits::default());
        rig.shake_hands(first);
        let peer = rig.raw.public();
        let call = rig.hub.call(rig.now, &peer, b"?".to_vec(), None).expect("taken");
        rig.settle();
        let head = SlotHead { slot: 0, sequence: 1, total: 6400 };
        let (direction, lane) = (Direction::Reply, Lane::Calls);
        rig.say(&[Frame::Chunk { head, direction, lane, offset: 0, data: &[1; 64] }]);
        let aside = |rig: &Rig| rig.hub.status(rig.now).map(|one| one.set_aside.0).max();
        assert_eq!(aside(&rig), Some(6400));
        rig.shake_hands(second);
        rig.hub.cancel(rig.now, &peer, call).expect("a peer");
        rig.settle();
        assert_eq!((aside(&rig), rig.ended), (Some(0), 1));
        // There is still memory for the next one.
        rig.hub.call(rig.now, &peer, b"?".to_vec(), None).expect("taken");
        rig.settle();
        let head = SlotHead { slot: 1, sequence: 2, total: 64 };
        rig.say(&[Frame::Chunk { head, direction, lane, offset: 0, data: &[1; 64] }]);
        rig.settle();
        assert_eq!(rig.ended, 2);
    }
}

/// Each frame made the server look at all calls that wait for the same one.
#[test]
fn calls_that_wait_for_one_that_never_comes_cost_little() {
    let mut rig = Rig::new(Limits::default());
    rig.shake_hands(FEATURES);
    for slot in 1..16_000 {
        let after = Some(After { slot: 0, sequence: u64::MAX, anyhow: true });
        let head = SlotHead { slot, sequence: 1, total: 0 };
        rig.say(&[Frame::Marked { head, marks: Marks { lane: Lane::Calls, after }, data: &[] }]);
    }
    rig.settle();
    let frames = |from: u64| -> Vec<u8> {
        let cancels = (from..from + 1000).map(|sequence| Frame::Cancel { slot: 0, sequence });
        emit(&cancels.collect::<Vec<_>>())
    };
    let started = std::time::Instant::now();
    for n in 0..4 {
        let payload = frames(1 + n * 1000);
        rig.say_raw(&payload, 0, address(2));
    }
    let took = started.elapsed();
    eprintln!("4000 frames: {took:?}");
    assert!(took < SECOND, "4000 frames take {took:?}");
    rig.check_honest(0);
}

/// A number from the edges of its range, or near those in use.
fn edge(random: &mut Random, near: u64) -> u64 {
    match random.below(12) {
        0 => 0,
        1 => u64::MAX,
        2 => u64::MAX - 1,
        3 => 1 << 63,
        4 => u64::from(u32::MAX),
        5 => random.number(),
        6 => near,
        7 => near + 1,
        8 => near.wrapping_sub(1),
        _ => random.below(near + 4),
    }
}

#[allow(clippy::cast_possible_truncation, reason = "edges of smaller ranges too")]
fn narrow(random: &mut Random, near: u64) -> u32 {
    edge(random, near) as u32
}

#[allow(clippy::cast_possible_truncation, reason = "edges of smaller ranges too")]
fn slot(random: &mut Random) -> u16 {
    match random.below(8) {
        0 => edge(random, 64) as u16,
        1 => random.below(16 * 1024) as u16,
        _ => random.below(6) as u16,
    }
}

fn lane(random: &mut Random) -> Lane {
    Lane::ALL[usize::try_from(random.below(4)).expect("four")]
}

const STATUSES: [Status; 6] = [
    Status::Done,
    Status::Cancelled,
    Status::Refused,
    Status::Stopped,
    Status::Aborted,
    Status::Lost,
];

/// A frame of any kind with any fields that the layout allows.
fn frame<'a>(random: &mut Random, near: u64, data: &'a [u8; 1400]) -> Frame<'a> {
    let slot = slot(random);
    let sequence = edge(random, near);
    let most = if random.chance(100) { 1400 } else { 70 };
    let data = &data[..usize::try_from(random.below(most)).expect("small")];
    let direction = if random.chance(500) { Direction::Call } else { Direction::Reply };
    let total = match random.below(6) {
        0 => narrow(random, 16 * 1024 * 1024),
        1 => u32::try_from(random.below(200_000)).expect("small"),
        2 => 64,
        _ => u32::try_from(data.len()).expect("small"),
    };
    let total = total.max(u32::try_from(data.len()).expect("small"));
    let head = SlotHead { slot, sequence, total };
    let after = random.chance(800).then(|| After {
        slot: self::slot(random),
        sequence: edge(random, near),
        anyhow: random.chance(500),
    });
    let token = edge(random, 3);
    match random.below(22) {
        0 | 1 => Frame::Call { head, data },
        2 | 3 => Frame::Marked { head, marks: Marks { lane: lane(random), after }, data },
        4 | 5 => {
            let status = STATUSES[usize::try_from(random.below(6)).expect("six")];
            Frame::Reply { head, status, data }
        }
        6..=8 => {
            let units = data.len() / 64 * 64;
            let data = if random.chance(700) && units > 0 { &data[..units] } else { data };
            let room = total - u32::try_from(data.len()).expect("small");
            let offset = match random.below(3) {
                0 => 0,
                1 => room / 64 * 64,
                _ => narrow(random, u64::from(room)).min(room),
            };
            Frame::Chunk { head, direction, lane: lane(random), offset, data }
        }
        9 => Frame::Working { slot, sequence },
        10 => Frame::Cancel { slot, sequence },
        11 => {
            let mut bitmap = [0; 4];
            bitmap.fill_with(|| random.number());
            Frame::Ack(Ack { largest: sequence, delay_us: narrow(random, 100), bitmap })
        }
        12 => Frame::Seen(SeenFrame {
            largest: edge(random, near),
            delay_us: narrow(random, 100),
            marked: narrow(random, 3),
            bitmap: if random.chance(500) { &[0xff; SEEN_BYTES] } else { &[0; SEEN_BYTES] },
        }),
        13 => Frame::Ping { token },
        14 => Frame::Pong { token },
        15 => Frame::Grant { slot, sequence, direction, upto: total },
        16 => Frame::Slots { version: narrow(random, 3), count: narrow(random, 70) },
        17 => Frame::Release {
            version: narrow(random, 3),
            count: narrow(random, 70),
            floor: edge(random, near),
        },
        18 if random.chance(500) => Frame::Challenge { token },
        18 => Frame::Proof { token },
        19 => Frame::Bulk { port: slot, buffer: narrow(random, 65_536) },
        20 if random.chance(500) => Frame::Where { key: &[3; 32] },
        20 => Frame::There { key: &[3; 32], address: address(9) },
        _ if random.chance(10) => Frame::Close { reason: 1 },
        _ => Frame::Padding { length: u32::try_from(random.below(100)).expect("small") },
    }
}

impl Rig {
    /// Something that the hub's own application does.
    fn act(&mut self, random: &mut Random) {
        let peer = self.raw.public();
        let length = match random.below(10) {
            0 => random.below(3_000_000),
            1..=4 => random.below(5000),
            _ => random.below(100),
        };
        let length = usize::try_from(length).expect("small");
        match random.below(6) {
            0 => drop(self.hub.call_on(self.now, &peer, lane(random), vec![1; length], None)),
            1 => {
                let row = (0..1 + random.below(8)).map(|_| (vec![2; 50], true));
                let row: Vec<_> = row.collect();
                let (mut ids, lane) = (Vec::new(), lane(random));
                let until = Some(self.now + Duration::from_millis(random.below(100)));
                let hub = &mut self.hub;
                if hub.call_row(self.now, &peer, lane, row.into_iter(), until, &mut ids).is_ok()
                    && random.chance(500)
                {
                    let at = usize::try_from(random.below(ids.len() as u64)).expect("few");
                    self.hub.cancel(self.now, &peer, ids[at]).expect("a peer");
                }
            }
            _ => {
                for _ in 0..random.below(20) {
                    if self.running.is_empty() {
                        return;
                    }
                    let at = usize::try_from(random.below(self.running.len() as u64));
                    let (peer, id) = self.running.swap_remove(at.expect("few"));
                    let told = match random.below(5) {
                        0 => self.hub.refuse(&peer, id),
                        1 => self.hub.reply_and_stop(&peer, id, vec![4; length]),
                        2 => self.hub.disown(&peer, id),
                        _ => self.hub.reply(&peer, id, vec![4; length]),
                    };
                    // Nobody may wait for it any more.
                    told.ok();
                }
            }
        }
    }

    /// The session with the raw peer goes through an image.
    fn freeze_and_thaw(&mut self) {
        if let Ok(frozen) = self.hub.freeze(self.now, &self.raw.public()) {
            let thawed = self.hub.thaw(self.now, &frozen.image, None).expect("our own image");
            self.running.retain(|(peer, _)| *peer != thawed.peer);
            self.running.extend(thawed.running.into_iter().map(|(id, _)| (thawed.peer, id)));
        }
    }

    fn check(&self, seed: u64, limits: &Limits) {
        for status in self.hub.status(self.now) {
            let (ours, theirs) = status.set_aside;
            assert!(ours.max(theirs) <= limits.assembling, "seed {seed}: {status:?}");
            let (ours, theirs) = status.unanswered;
            let most = limits.unanswered.max(limits.payload);
            assert!(ours.max(theirs) <= most, "seed {seed}: {status:?}");
            let (ours, theirs) = status.slots;
            assert!(ours.max(theirs) <= limits.slots, "seed {seed}: {status:?}");
        }
    }
}

fn attack(seed: u64) -> Duration {
    let mut random = Random::new(seed);
    let limits = Limits {
        slots: 1 << (6 + random.below(8)),
        payload: 1 << (12 + random.below(12)),
        assembling: 1 << (10 + random.below(16)),
        unanswered: 1 << (10 + random.below(16)),
        ..Limits::default()
    }
    .clamped();
    let mut rig = Rig::new(limits);
    let features = [FEATURES, FEATURES | 1, FEATURES & !FEATURE_LANES, 0];
    rig.shake_hands(FEATURES);
    let mut data = [0; 1400];
    random.fill(&mut data);
    let (mut from_nine, mut slowest) = (0, Duration::ZERO);
    for _ in 0..300 {
        let near = 1 + random.below(40);
        match random.below(20) {
            0 => {
                if random.chance(200) {
                    rig.incarnation += 1;
                }
                let features = features[usize::try_from(random.below(4)).expect("four")];
                rig.shake_hands(features);
            }
            1..=3 => rig.act(&mut random),
            4 if random.chance(100) => rig.freeze_and_thaw(),
            4 => rig.pass(Duration::from_millis(1 << random.below(14))),
            _ => {
                let most = if random.chance(50) { 500 } else { 20 };
                let count = 1 + random.below(most);
                let frames: Vec<_> = (0..count).map(|_| frame(&mut random, near, &data)).collect();
                let payload = emit(&frames);
                let flags = match random.below(4) {
                    0 => FLAG_TRACKED,
                    1 => FLAG_TRACKED | FLAG_BULK,
                    _ => 0,
                };
                let from = if random.chance(50) { address(9) } else { address(2) };
                if from == address(9) {
                    from_nine += payload.len() + HEADER + TAG;
                }
                let started = std::time::Instant::now();
                rig.say_raw(&payload, flags, from);
                slowest = slowest.max(started.elapsed());
            }
        }
        rig.settle();
        rig.check(seed, &limits);
        // What is the peer's may be anywhere, but is told so only what was paid for.
        let to_nine = rig.sent_to.get(&address(9)).copied().unwrap_or(0);
        assert!(to_nine <= 3 * from_nine, "seed {seed}: {to_nine} bytes for {from_nine}");
        rig.said.clear();
    }
    rig.check_honest(seed);
    slowest
}

/// Every frame with every extreme field, keys and features that change, images in between.
#[test]
fn whatever_a_peer_says_under_its_keys_stays_bounded_and_harms_no_other() {
    let number = |name| std::env::var(name).ok().and_then(|n: String| n.parse::<u64>().ok());
    if let Some(seed) = number("CONET_SEED") {
        attack(seed);
        return;
    }
    let mut slowest = (Duration::ZERO, 0);
    for seed in 0..number("CONET_SEEDS").unwrap_or(40) {
        slowest = slowest.max((attack(seed), seed));
    }
    eprintln!("slowest packet: {slowest:?}");
}

/// Who says that it is of an earlier build was sent everything wherever its packets came from.
#[test]
fn a_peer_that_knows_no_challenge_has_to_show_where_it_is() {
    for features in [FEATURES & !FEATURE_LANES, FEATURES] {
        let mut rig = Rig::new(Limits::default());
        rig.shake_hands(features);
        let peer = rig.raw.public();
        let head = SlotHead { slot: 0, sequence: 1, total: 0 };
        rig.say_raw(&emit(&[Frame::Call { head, data: &[] }]), 0, address(9));
        rig.settle();
        let (peer_of, id) = rig.running.pop().expect("it was called");
        assert_eq!(peer_of, peer);
        rig.hub.reply(&peer, id, vec![1; 1_000_000]).expect("waits");
        rig.pass(Duration::from_millis(500));
        let to_nine = rig.sent_to.get(&address(9)).copied().unwrap_or(0);
        assert!(to_nine <= 3 * 56, "{to_nine} bytes");
        // Whoever is there answers, and is the peer.
        let token = rig.said.iter().flat_map(|payload| Frames::new(payload).flatten());
        let answers = token.filter_map(|frame| match frame {
            Frame::Ping { token } => Some((Frame::Pong { token }, token)),
            Frame::Challenge { token } => Some((Frame::Proof { token }, token)),
            _ => None,
        });
        let answers: Vec<_> = answers.filter(|(_, token)| *token > 99).collect();
        assert!(!answers.is_empty(), "it was not asked");
        let answers: Vec<_> = answers.into_iter().map(|(frame, _)| frame).collect();
        rig.say_raw(&emit(&answers), 0, address(9));
        rig.settle();
        let at = rig.hub.status(rig.now).find(|one| one.key == peer);
        assert_eq!(at.and_then(|one| one.address), Some(address(9)));
    }
}

/// Who gave slots back and said that it had used no number could use each again.
#[test]
fn a_slot_that_is_given_back_runs_no_number_again_whatever_is_said_of_it() {
    let mut rig = Rig::new(Limits::default());
    rig.shake_hands(FEATURES);
    let call =
        |slot, sequence| Frame::Call { head: SlotHead { slot, sequence, total: 0 }, data: &[] };
    for _ in 0..3 {
        rig.say(&[call(70, 5)]);
        rig.settle();
        while let Some((peer, id)) = rig.running.pop() {
            rig.hub.reply(&peer, id, Vec::new()).expect("waits");
        }
        rig.say(&[Frame::Release { version: 0, count: 64, floor: 0 }]);
        rig.settle();
    }
    // Each that runs twice is noticed as it is handed out.
    assert_eq!(rig.seen.len(), 1);
}

/// Frames beside thousands of long replies, which their client does not take.
#[test]
fn replies_that_are_not_taken_cost_later_frames_little() {
    let time = |count: u16| {
        let mut rig = Rig::new(Limits::default());
        rig.shake_hands(FEATURES);
        for slot in 0..count {
            let head = SlotHead { slot, sequence: 1, total: 0 };
            rig.say(&[Frame::Call { head, data: &[] }]);
        }
        rig.settle();
        for (peer, id) in std::mem::take(&mut rig.running) {
            rig.hub.reply(&peer, id, vec![1; 2000]).expect("waits");
        }
        rig.settle();
        let begun = std::time::Instant::now();
        for sequence in 1..300 {
            let cancels =
                [0, 1, 2, 3, 4].map(|slot| Frame::Cancel { slot: 16_000 + slot, sequence });
            rig.say(&cancels);
            rig.say(&[Frame::Ping { token: sequence }]);
            rig.settle();
        }
        begun.elapsed()
    };
    let (few, many) = (time(10), time(10_000));
    assert!(
        many < few * 8 + Duration::from_millis(50),
        "{few:?} beside 10, {many:?} beside 10,000"
    );
}
