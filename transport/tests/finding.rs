//! Two nodes that move at once, with nobody left at their old places: who knows both helps.

mod common;

use conet_transport::session::handshake::{FEATURES, PrivateKey, PublicKey};
use conet_transport::session::{Event, Hub, HubConfig};
use conet_transport::time::Instant;
use conet_wire::session::handshake::FEATURE_FIND;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

fn hub(key: u8, seed: u64, features: u32) -> Hub {
    let config = HubConfig { features, ..common::config(key, seed) };
    Hub::new(config).expect("entropy")
}

fn key(n: u8) -> PublicKey {
    PrivateKey::new([n; 32]).public()
}

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 7))
}

/// Hubs by address; what goes to where nobody is is lost, as is what `lost` says.
struct Network {
    hubs: BTreeMap<SocketAddr, Hub>,
    now: Instant,
    /// Datagrams sent, by destination.
    sent: BTreeMap<SocketAddr, u32>,
}

impl Network {
    /// Hubs of keys 1, 2, … at the addresses of the same numbers; all know all.
    fn of(features: &[u32]) -> Self {
        let now = Instant::from_start(Duration::from_secs(1));
        let numbers = || (1u8..).zip(features).map(|(n, features)| (n, *features));
        let mut hubs = BTreeMap::new();
        for (n, features) in numbers() {
            let mut one = hub(n, n.into(), features);
            for (other, _) in numbers().filter(|(other, _)| *other != n) {
                one.add_peer(now, key(other), Some(address(other)));
            }
            hubs.insert(address(n), one);
        }
        let mut network = Self { hubs, now, sent: BTreeMap::new() };
        network.run(Duration::from_secs(2));
        network
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        let mut buf = Vec::new();
        while self.now < end {
            let mut under_way = Vec::new();
            for (from, hub) in &mut self.hubs {
                hub.handle_timeout(self.now);
                while let Some(to) = hub.poll_transmit(self.now, &mut buf) {
                    *self.sent.entry(to).or_default() += 1;
                    under_way.push((*from, to, buf.clone()));
                }
                while let Some(event) = hub.poll_event() {
                    if let Event::Call { peer, id, payload, .. } = event {
                        hub.reply(&peer, id, payload).expect("waits");
                    }
                }
            }
            self.now = self.now + Duration::from_millis(1);
            for (from, to, mut datagram) in under_way {
                if let Some(hub) = self.hubs.get_mut(&to) {
                    hub.handle_datagram(self.now, from, &mut datagram);
                }
            }
        }
    }

    fn is_up(&self, at: SocketAddr, peer: u8) -> bool {
        self.hubs[&at].is_up(&key(peer))
    }

    /// The node of this key goes to address `to`, with all its sessions; nobody stays behind.
    fn moves(&mut self, n: u8, to: u8, features: u32) {
        let mut old = self.hubs.remove(&address(n)).expect("there");
        let mut new = hub(n, u64::from(to) * 1000, features);
        let peers: Vec<_> = old.status(self.now).map(|peer| peer.key).collect();
        for peer in peers {
            let frozen = old.freeze(self.now, &peer).expect("stands");
            new.thaw(self.now, &frozen.image, None).expect("ours");
        }
        self.hubs.insert(address(to), new);
    }

    /// How long it takes until both ends have found each other, `limit` at most.
    fn until_up(&mut self, one: (u8, u8), two: (u8, u8), limit: Duration) -> Option<Duration> {
        let begun = self.now;
        while self.now.since(begun) < limit {
            self.run(Duration::from_millis(10));
            if self.is_up(address(one.1), two.0) && self.is_up(address(two.1), one.0) {
                return Some(self.now.since(begun));
            }
        }
        None
    }
}

const LONG: Duration = Duration::from_secs(30);

#[test]
fn two_that_move_at_once_find_each_other_by_a_third() {
    let mut network = Network::of(&[FEATURES; 3]);
    network.moves(1, 11, FEATURES);
    network.moves(2, 12, FEATURES);
    let took = network.until_up((1, 11), (2, 12), LONG).expect("found");
    println!("found after {took:?}");
    // The first attempt must have failed; one pause of 250 ms, and what the third needs itself.
    assert!(took < Duration::from_secs(3), "{took:?}");
    for (at, peer) in [(11, 2), (12, 1), (3, 1), (3, 2)] {
        assert!(network.is_up(address(at), peer), "{at} and {peer}");
    }
    let status = network.hubs[&address(11)].status(network.now).find(|one| one.key == key(2));
    let status = status.expect("known");
    assert_eq!((status.address, status.epochs), (Some(address(12)), (1, 1)), "the same session");
}

#[test]
fn without_a_third_who_tells_they_do_not() {
    let silent = FEATURES & !FEATURE_FIND;
    for features in [vec![FEATURES; 2], vec![FEATURES, FEATURES, silent]] {
        let mut network = Network::of(&features);
        network.moves(1, 11, FEATURES);
        network.moves(2, 12, FEATURES);
        assert_eq!(network.until_up((1, 11), (2, 12), LONG), None);
    }
}

/// A node that is gone for good is asked for ever more rarely.
#[test]
fn who_is_nowhere_is_not_sought_often() {
    let mut network = Network::of(&[FEATURES; 4]);
    network.hubs.remove(&address(2));
    network.run(Duration::from_secs(20));
    network.sent.clear();
    network.run(Duration::from_secs(20));
    let sent = &network.sent;
    // An attempt of each of three in 5 s.
    assert!(sent[&address(2)] <= 15, "{sent:?}");
    // From each of the others a PING and a PONG a second each way, and a question in 5 s.
    assert!(sent[&address(1)] <= 2 * (2 * 20 * 2 + 4 * 2), "{sent:?}");
}

/// A wrong answer costs an attempt for each of ours, and sends nobody away.
#[test]
fn a_wrong_answer_moves_nobody() {
    let mut network = Network::of(&[FEATURES; 3]);
    network.hubs.remove(&address(2));
    // To the third the second is at 66; who is there does not answer the first.
    let mut elsewhere = hub(2, 333, FEATURES);
    elsewhere.add_peer(network.now, key(3), Some(address(3)));
    network.hubs.insert(address(66), elsewhere);
    network.run(Duration::from_secs(8));
    assert!(network.is_up(address(3), 2) && !network.is_up(address(1), 2));
    network.sent.clear();
    network.run(Duration::from_secs(20));
    // From the third a PING and a PONG a second, from the first an attempt in 5 s.
    assert!(network.sent[&address(66)] <= 2 * 20 + 4, "{:?}", network.sent);
    let mut back = hub(2, 4444, FEATURES);
    back.add_peer(network.now, key(1), None);
    network.hubs.insert(address(2), back);
    network.run(Duration::from_secs(20));
    let status = network.hubs[&address(1)].status(network.now).find(|one| one.key == key(2));
    let status = status.expect("known");
    assert_eq!((status.up, status.address), (true, Some(address(2))));
}
