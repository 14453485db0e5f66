//! Somebody on the path: sees every packet, and may keep, change, repeat, reorder, reflect
//! and send them from wherever it likes. It has no key.
//!
//! Each test lets it do one of these to everything it sees while two nodes call each
//! other, and looks at what must not happen: a path that moves, a call that runs twice, a
//! payload that can be read.

mod common;

use conet_transport::session::handshake::{FEATURE_PLAIN, PublicKey};
use conet_transport::session::{Event, Hub, HubConfig, Limits};
use conet_transport::time::Instant;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

/// What payloads say; nobody else may.
const SECRET: &[u8] = b"what nobody but the two may read";

#[derive(Clone)]
struct Datagram {
    from: SocketAddr,
    to: usize,
    bytes: Vec<u8>,
}

struct Net {
    hubs: Vec<Hub>,
    keys: Vec<PublicKey>,
    now: Instant,
    /// Everything that was sent.
    seen: Vec<Datagram>,
    /// How often each call ran.
    ran: BTreeMap<u64, u32>,
    replies: u64,
    calls: u64,
    /// Bytes that went to addresses of nobody.
    astray: usize,
}

fn address(n: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, u8::try_from(n).expect("small")], 7))
}

/// The attacker's own.
fn elsewhere() -> SocketAddr {
    SocketAddr::from(([198, 51, 100, 1], 9))
}

impl Net {
    fn new() -> Self {
        let hub = |n: u8| Hub::new(common::config(n, n.into())).expect("entropy");
        let mut hubs = vec![hub(1), hub(2)];
        let keys = vec![hubs[0].public_key(), hubs[1].public_key()];
        hubs[0].add_peer(Instant::START, keys[1], Some(address(1)));
        hubs[1].add_peer(Instant::START, keys[0], None);
        let (ran, now) = (BTreeMap::new(), Instant::START);
        Self { hubs, keys, now, seen: vec![], ran, replies: 0, calls: 0, astray: 0 }
    }

    /// What both want to send now.
    fn sent(&mut self) -> Vec<Datagram> {
        let mut sent = Vec::new();
        let mut buf = Vec::new();
        for n in 0..2 {
            while let Some(to) = self.hubs[n].poll_transmit(self.now, &mut buf) {
                if to == address(1 - n) {
                    sent.push(Datagram { from: address(n), to: 1 - n, bytes: buf.clone() });
                } else {
                    self.astray += buf.len();
                }
            }
        }
        self.seen.extend(sent.iter().cloned());
        sent
    }

    fn give(&mut self, datagram: &Datagram) {
        let mut bytes = datagram.bytes.clone();
        self.hubs[datagram.to].handle_datagram(self.now, datagram.from, &mut bytes);
        for n in 0..2 {
            while let Some(event) = self.hubs[n].poll_event() {
                match event {
                    Event::Call { peer, id, payload, .. } => {
                        let serial = u64::from_le_bytes(*payload.last_chunk().expect("serial"));
                        *self.ran.entry(serial).or_default() += 1;
                        self.hubs[n].reply(&peer, id, payload).expect("waits");
                    }
                    Event::Ended { result, .. } => {
                        assert!(result.expect("a reply").starts_with(SECRET));
                        self.replies += 1;
                    }
                    _ => {}
                }
            }
        }
    }

    fn call(&mut self, from: usize) {
        let payload = [SECRET, &self.calls.to_le_bytes()].concat();
        self.calls += 1;
        let to = self.keys[1 - from];
        self.hubs[from].call(self.now, &to, payload, None).expect("taken");
    }

    /// Lets time pass while the attacker makes of each datagram what it likes.
    fn run(
        &mut self,
        rounds: u32,
        mut attack: impl FnMut(&Datagram, &[Datagram]) -> Vec<Datagram>,
    ) {
        for _ in 0..rounds {
            self.now = self.now + Duration::from_micros(500);
            for hub in &mut self.hubs {
                hub.handle_timeout(self.now);
            }
            for datagram in self.sent() {
                for made in attack(&datagram, &self.seen) {
                    self.give(&made);
                }
            }
        }
    }

    /// Two nodes with a session, and calls both ways in the attacker's hands.
    fn attacked(attack: impl FnMut(&Datagram, &[Datagram]) -> Vec<Datagram>) -> Self {
        let mut net = Self::new();
        net.run(20, |datagram, _| vec![datagram.clone()]);
        for n in 0..40 {
            net.call(n % 2);
        }
        net.run(400, attack);
        net.run(4000, |datagram, _| vec![datagram.clone()]);
        net
    }

    /// What must hold after any attack: everything arrived, nothing ran twice, both ends
    /// are where they were, nothing was readable.
    fn check(&self) {
        assert_eq!((self.replies, self.ran.len()), (40, 40));
        assert!(self.ran.values().all(|&ran| ran == 1), "{:?}", self.ran);
        for n in 0..2 {
            let status = self.hubs[n].status(self.now).next().expect("one peer");
            assert_eq!(status.address, Some(address(1 - n)));
            assert_eq!(status.counters.moves, 0);
        }
        let readable = |bytes: &[u8]| bytes.windows(8).any(|window| SECRET.starts_with(window));
        assert!(!self.seen.iter().any(|datagram| readable(&datagram.bytes)));
    }
}

#[test]
fn who_replays_runs_no_call_again() {
    let mut count = 0usize;
    let net = Net::attacked(|datagram, seen| {
        count += 1;
        // The packet, itself again, and one of long ago.
        vec![datagram.clone(), datagram.clone(), seen[count * 7 % seen.len()].clone()]
    });
    net.check();
    let replayed: u64 = (0..2)
        .map(|n| net.hubs[n].status(net.now).next().expect("one peer").counters.replayed)
        .sum();
    assert!(replayed > 0);
}

#[test]
fn who_reflects_is_not_taken_for_the_peer() {
    let net = Net::attacked(|datagram, _| {
        let back = Datagram { to: 1 - datagram.to, from: address(datagram.to), ..datagram.clone() };
        vec![back, datagram.clone()]
    });
    net.check();
}

#[test]
fn who_truncates_gets_nothing_accepted() {
    let net = Net::attacked(|datagram, _| {
        let mut made = Vec::new();
        for length in 0..datagram.bytes.len() {
            let bytes = datagram.bytes[..length].to_vec();
            made.push(Datagram { bytes, ..datagram.clone() });
        }
        made.push(datagram.clone());
        made
    });
    net.check();
}

#[test]
fn who_reorders_changes_no_outcome() {
    let mut held: Vec<Datagram> = Vec::new();
    let net = Net::attacked(|datagram, _| {
        held.push(datagram.clone());
        if held.len() < 5 { Vec::new() } else { held.drain(..).rev().collect() }
    });
    net.check();
}

#[test]
fn who_alters_any_byte_gets_nothing_accepted() {
    let net = Net::attacked(|datagram, _| {
        let mut made = Vec::new();
        for at in 0..datagram.bytes.len() {
            let mut bytes = datagram.bytes.clone();
            bytes[at] ^= 1 << (at % 8);
            made.push(Datagram { bytes, ..datagram.clone() });
        }
        made.push(datagram.clone());
        made
    });
    net.check();
}

/// It takes each packet out of the path and sends it from its own address: the newest
/// authentic packet comes from there. Nobody there can prove to be the peer.
#[test]
fn who_sends_packets_from_elsewhere_moves_no_path() {
    let mut from_elsewhere = 0;
    let net = Net::attacked(|datagram, _| {
        from_elsewhere += datagram.bytes.len();
        // First from elsewhere, so that the true one is the replay.
        vec![Datagram { from: elsewhere(), ..datagram.clone() }, datagram.clone()]
    });
    net.check();
    assert!(net.astray > 0, "it was challenged");
    assert!(net.astray <= 3 * from_elsewhere, "{} for {from_elsewhere}", net.astray);
}

/// The same with one packet only: little is sent there, and that ends.
#[test]
fn one_packet_from_elsewhere_gets_little_back() {
    let mut sent = 0;
    let net = Net::attacked(|datagram, _| {
        if sent > 0 || datagram.to != 1 {
            return vec![datagram.clone()];
        }
        sent = datagram.bytes.len();
        vec![Datagram { from: elsewhere(), ..datagram.clone() }, datagram.clone()]
    });
    net.check();
    // None, where true packets came right after it.
    assert!(sent > 0 && net.astray <= 3 * sent, "{} for {sent}", net.astray);
}

/// Recorded initiations, from wherever: no state, no more bytes back than came.
#[test]
fn recorded_initiations_gain_nothing() {
    let net = Net::attacked(|datagram, seen| {
        let first = Datagram { from: elsewhere(), ..seen[0].clone() };
        vec![first, datagram.clone()]
    });
    net.check();
    let sent = net.seen[0].bytes.len() * 400;
    assert!(net.astray < sent, "{}", net.astray);
    let stale: u64 = (0..2)
        .map(|n| net.hubs[n].status(net.now).next().expect("one peer").counters.stale_initiations)
        .sum();
    assert!(stale > 0);
}

/// A flood of initiations that nobody made: most are not even opened, and those who come
/// back with their cookie get through.
#[test]
fn a_flood_of_initiations_does_not_shut_the_others_out() {
    let mut net = Net::new();
    // The session's own initiation is the pattern; the flood changes it.
    net.hubs[0].handle_timeout(net.now);
    let first = net.sent().remove(0);
    for n in 0..2000u32 {
        let mut bytes = first.bytes.clone();
        bytes[40..44].copy_from_slice(&n.to_le_bytes());
        net.give(&Datagram { from: elsewhere(), bytes, ..first.clone() });
    }
    assert!(net.hubs[1].strays().turned_away > 1000);
    // In the middle of it the peer connects.
    net.call(0);
    for n in 0..2000u32 {
        net.now = net.now + Duration::from_micros(500);
        for hub in &mut net.hubs {
            hub.handle_timeout(net.now);
        }
        for k in 0..4 {
            let mut bytes = first.bytes.clone();
            bytes[40..48].copy_from_slice(&(u64::from(n) << 8 | k).to_le_bytes());
            net.give(&Datagram { from: elsewhere(), bytes, ..first.clone() });
        }
        for datagram in net.sent() {
            net.give(&datagram);
        }
        if net.replies == 1 {
            return;
        }
    }
    panic!("shut out: {:?}", net.hubs[1].strays());
}

/// Both begin at once, one of them while the session of before still stands: whoever catches
/// the other's initiation and sends it from elsewhere must not have the session sent there.
#[test]
fn an_initiation_from_elsewhere_that_crosses_ours_moves_no_path() {
    let hub = |n: u8, seed: u64| {
        let config = common::config(n, seed);
        let rekey_after = Duration::from_secs(1);
        let limits = Limits { rekey_after, ..config.limits };
        Hub::new(HubConfig { limits, ..config }).expect("entropy")
    };
    // Of two that begin at once, the initiation of the larger key is answered.
    let (one, two) = if hub(1, 1).public_key() > hub(2, 1).public_key() { (1, 2) } else { (2, 1) };
    let (mut ours, mut theirs, mut now) = (hub(one, 1), hub(two, 2), Instant::START);
    let (us, them) = (ours.public_key(), theirs.public_key());
    ours.add_peer(now, them, Some(address(2)));
    theirs.add_peer(now, us, None);
    let mut buf = Vec::new();
    while now < Instant::from_start(Duration::from_millis(990)) {
        now = now + Duration::from_millis(1);
        ours.handle_timeout(now);
        theirs.handle_timeout(now);
        while ours.poll_transmit(now, &mut buf).is_some() {
            theirs.handle_datagram(now, address(1), &mut buf);
        }
        while theirs.poll_transmit(now, &mut buf).is_some() {
            ours.handle_datagram(now, address(2), &mut buf);
        }
    }
    assert!(ours.is_up(&them));
    // Ours renews its keys, and the peer begins anew after a restart; nothing else arrives.
    let (mut restarted, mut astray, mut sent) = (hub(two, 3), 0, 0);
    restarted.add_peer(now, us, Some(address(1)));
    for _ in 0..200 {
        now = now + Duration::from_millis(1);
        ours.call(now, &them, vec![7; 1000], None).ok();
        ours.handle_timeout(now);
        restarted.handle_timeout(now);
        while let Some(to) = ours.poll_transmit(now, &mut buf) {
            astray += if to == elsewhere() { buf.len() } else { 0 };
        }
        while now.since_start() > Duration::from_millis(1010)
            && restarted.poll_transmit(now, &mut buf).is_some()
        {
            sent += buf.len();
            ours.handle_datagram(now, elsewhere(), &mut buf);
        }
    }
    assert!(sent > 0);
    assert!(astray <= 3 * sent, "{astray} bytes for {sent}");
    assert_eq!(ours.address_of(&them), Some(address(2)));
}

/// Packets go in the clear where both ends offer that, and nobody else can bring it about.
#[test]
fn in_the_clear_only_where_both_ends_say_so() {
    let readable = |bytes: &[u8]| bytes.windows(SECRET.len()).any(|window| window == SECRET);
    for (ours, theirs) in [(false, false), (true, false), (false, true), (true, true)] {
        for meddles in [false, true] {
            let plain = |on: bool| if on { FEATURE_PLAIN } else { 0 };
            let mut net = Net::new();
            for (n, on) in [(0, ours), (1, theirs)] {
                let number = u8::try_from(n).expect("small") + 1;
                let config = common::config(number, number.into());
                let features = config.features | plain(on);
                net.hubs[n] = Hub::new(HubConfig { features, ..config }).expect("entropy");
            }
            net.hubs[0].add_peer(Instant::START, net.keys[1], Some(address(1)));
            net.hubs[1].add_peer(Instant::START, net.keys[0], None);
            // Whoever meddles says of both ends that they want it: each bit of the clear part.
            net.run(20, |datagram, _| {
                let mut made = Vec::new();
                for bit in (0..8 * 24).filter(|_| meddles && datagram.bytes.len() > 100) {
                    let mut changed = datagram.clone();
                    changed.bytes[bit / 8] |= 1 << (bit % 8);
                    made.push(changed);
                }
                made.push(datagram.clone());
                made
            });
            for n in 0..20 {
                net.call(n % 2);
            }
            net.run(200, |datagram, _| vec![datagram.clone()]);
            assert_eq!((net.replies, net.ran.len()), (20, 20));
            let seen = net.seen.iter().any(|datagram| readable(&datagram.bytes));
            assert_eq!(seen, ours && theirs, "offered by ours: {ours}, by theirs: {theirs}");
        }
    }
}
