//! One node with many peers, most of which say nothing.

mod common;

use conet_transport::session::handshake::PrivateKey;
use conet_transport::session::{Event, Hub, HubConfig};
use conet_transport::time::Instant;
use conet_wire::session::handshake::{COOKIE, CookiePacket};
use std::net::SocketAddr;
use std::time::Duration;

/// A node, and peers of its that are all up.
struct Star {
    centre: Hub,
    peers: Vec<Hub>,
    now: Instant,
    buf: Vec<u8>,
}

fn address(n: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1], u16::try_from(n).expect("a port")))
}

impl Star {
    fn new(peers: usize) -> Self {
        let hub = |n: usize| {
            let mut key = [1; 32];
            // The lowest bits of the first byte do not count (RFC 7748 §5).
            key[8..16].copy_from_slice(&n.to_le_bytes());
            let private_key = PrivateKey::new(key);
            let config = HubConfig { private_key, ..common::config(1, n as u64) };
            Hub::new(config).expect("entropy")
        };
        let now = Instant::from_start(Duration::from_secs(1));
        let mut centre = hub(70_000);
        let mut peers: Vec<_> = (0..peers).map(hub).collect();
        for (n, peer) in peers.iter_mut().enumerate() {
            centre.add_peer(now, peer.public_key(), Some(address(1 + n)));
            peer.add_peer(now, centre.public_key(), None);
        }
        let mut star = Self { centre, peers, now, buf: Vec::new() };
        star.pass(Duration::ZERO);
        let up = star.centre.status(star.now).filter(|peer| peer.up).count();
        assert_eq!(up, star.peers.len());
        star
    }

    /// Lets time pass, and hands over what is sent, until nothing is.
    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
        let now = self.now;
        self.centre.handle_timeout(now);
        for peer in &mut self.peers {
            peer.handle_timeout(now);
        }
        loop {
            let mut none = true;
            while let Some(to) = self.centre.poll_transmit(now, &mut self.buf) {
                none = false;
                let at = usize::from(to.port()) - 1;
                self.peers[at].handle_datagram(now, address(70), &mut self.buf);
            }
            for (n, peer) in self.peers.iter_mut().enumerate() {
                while peer.poll_transmit(now, &mut self.buf).is_some() {
                    none = false;
                    self.centre.handle_datagram(now, address(1 + n), &mut self.buf);
                }
            }
            if none {
                return;
            }
        }
    }

    /// A call of one peer's, driven as by a carrier's driver.
    fn call(&mut self, from: usize) {
        self.now = self.now + Duration::from_micros(4);
        let (now, to) = (self.now, self.centre.public_key());
        let peer = &mut self.peers[from];
        peer.call(now, &to, vec![7; 64], None).expect("taken");
        while peer.poll_transmit(now, &mut self.buf).is_some() {
            self.centre.handle_datagram(now, address(1 + from), &mut self.buf);
        }
        self.centre.handle_timeout(now);
        while let Some(event) = self.centre.poll_event() {
            if let Event::Call { peer, id, payload, .. } = event {
                self.centre.reply(&peer, id, payload).expect("waits");
            }
        }
        while self.centre.poll_transmit(now, &mut self.buf).is_some() {
            peer.handle_datagram(now, address(70), &mut self.buf);
        }
        assert!(self.centre.poll_timeout(now).is_some_and(|at| at > now));
        let ended = std::iter::from_fn(|| peer.poll_event());
        assert_eq!(ended.filter(|event| matches!(event, Event::Ended { .. })).count(), 1);
    }

    /// Least time of a thousand calls of one peer's, of several.
    fn thousand(&mut self) -> Duration {
        let time = |_| {
            let begun = std::time::Instant::now();
            (0..1000).for_each(|_| self.call(0));
            begun.elapsed()
        };
        (0..7).map(time).min().expect("seven")
    }
}

/// Whoever is asleep is woken for what becomes due: all are heard, and stay.
#[test]
fn a_thousand_peers_stay_up() {
    let mut star = Star::new(1000);
    for n in 0..200 {
        star.pass(Duration::from_millis(100));
        star.call(n * 7 % 1000);
    }
    let status: Vec<_> = star.centre.status(star.now).collect();
    assert!(status.iter().all(|peer| peer.up && peer.counters.handshakes == 1));
    // Each is asked whether it is there once a second, by one end or the other.
    let least = status.iter().map(|peer| peer.counters.sent_packets).min();
    let most = status.iter().map(|peer| peer.counters.sent_packets).max();
    assert!(least.is_some_and(|n| n >= 15) && most.is_some_and(|n| n < 100), "{least:?} {most:?}");
    // And those that are silent are given up.
    star.peers.truncate(10);
    for _ in 0..20 {
        star.now = star.now + Duration::from_millis(500);
        let now = star.now;
        star.centre.handle_timeout(now);
        while star.centre.poll_transmit(now, &mut star.buf).is_some() {}
    }
    assert!(star.centre.status(star.now).all(|peer| !peer.up));
}

/// It was a hundred times as much beside a thousand.
#[test]
fn a_call_costs_the_same_beside_a_thousand_idle_peers() {
    let (mut few, mut many) = (Star::new(1), Star::new(1000));
    let (alone, beside) = (few.thousand(), many.thousand());
    eprintln!("a thousand calls: {alone:?} alone, {beside:?} beside a thousand peers");
    assert!(beside < alone * 8, "{alone:?} {beside:?}");
}

/// Anybody can send a cookie; each was shown to all peers.
#[test]
fn a_cookie_of_nobodys_costs_the_same_beside_a_thousand_peers() {
    let cookies = |star: &mut Star| {
        let time = |_| {
            let begun = std::time::Instant::now();
            for digest in 1..10_000 {
                let mut packet = CookiePacket { digest, cookie: [7; COOKIE] }.emit();
                star.centre.handle_datagram(star.now, address(9), &mut packet);
            }
            begun.elapsed()
        };
        (0..5).map(time).min().expect("five")
    };
    let (mut few, mut many) = (Star::new(1), Star::new(1000));
    let (alone, beside) = (cookies(&mut few), cookies(&mut many));
    eprintln!("ten thousand cookies: {alone:?} alone, {beside:?} beside a thousand peers");
    assert!(beside < alone * 8, "{alone:?} {beside:?}");
    assert_eq!(many.centre.strays().unknown_index, 5 * 9999);
}
