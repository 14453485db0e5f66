//! Two ends that allow different amounts: what one has not room for ends with an error, and
//! holds up nothing else.

mod common;

use conet_transport::session::{CallError, Event, Hub, HubConfig, Limits};
use conet_transport::time::Instant;
use std::net::SocketAddr;
use std::time::Duration;

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 7))
}

/// A client and a server that answers each call with so many bytes, after each round.
struct Pair {
    client: Hub,
    server: Hub,
    now: Instant,
    answer: usize,
    ran: usize,
    /// How each call has ended, with the length of its reply.
    ended: Vec<Result<usize, CallError>>,
}

impl Pair {
    fn new(ours: Limits, theirs: Limits, features: u32) -> Self {
        let hub = |key: u8, limits, features| {
            let config = HubConfig { limits, features, ..common::config(key, key.into()) };
            Hub::new(config).expect("entropy")
        };
        let all = common::config(1, 1).features;
        let (mut client, mut server) = (hub(1, ours, all), hub(2, theirs, features));
        let now = Instant::from_start(Duration::from_secs(1));
        client.add_peer(now, server.public_key(), Some(address(2)));
        server.add_peer(now, client.public_key(), None);
        let mut pair = Self { client, server, now, answer: 8, ran: 0, ended: Vec::new() };
        pair.run(20);
        pair
    }

    fn call(&mut self, length: usize) {
        let to = self.server.public_key();
        self.client.call(self.now, &to, vec![7; length], None).expect("taken");
    }

    fn run(&mut self, ms: u64) {
        let mut buf = Vec::new();
        for _ in 0..ms {
            self.now = self.now + Duration::from_millis(1);
            let now = self.now;
            self.client.handle_timeout(now);
            self.server.handle_timeout(now);
            while self.client.poll_transmit(now, &mut buf).is_some() {
                self.server.handle_datagram(now, address(1), &mut buf);
            }
            while let Some(event) = self.server.poll_event() {
                if let Event::Call { peer, id, .. } = event {
                    self.ran += 1;
                    self.server.reply(&peer, id, vec![9; self.answer]).expect("waits");
                }
            }
            while self.server.poll_transmit(now, &mut buf).is_some() {
                self.client.handle_datagram(now, address(2), &mut buf);
            }
            while let Some(event) = self.client.poll_event() {
                if let Event::Ended { result, .. } = event {
                    self.ended.push(result.map(|reply| reply.len()));
                }
            }
        }
    }

    /// Packets of both ends in a while in which nothing is asked.
    fn packets_at_rest(&mut self) -> u64 {
        let count = |pair: &Self| {
            let status = [&pair.client, &pair.server].map(|hub| hub.status(pair.now).next());
            status.into_iter().flatten().map(|peer| peer.counters.sent_packets).sum::<u64>()
        };
        let before = count(self);
        self.run(3000);
        count(self) - before
    }
}

#[test]
fn many_calls_at_once_end_at_a_server_with_few_slots() {
    let theirs = Limits { slots: 8, ..Limits::default() };
    let mut pair = Pair::new(Limits::default(), theirs, common::config(1, 1).features);
    for _ in 0..200 {
        pair.call(10);
    }
    pair.run(5000);
    assert_eq!((pair.ran, pair.ended.len()), (200, 200));
    assert!(pair.ended.iter().all(Result::is_ok));
}

#[test]
fn a_call_too_long_for_its_server_is_refused() {
    for features in [common::config(1, 1).features, 0] {
        let theirs = Limits { payload: 1000, ..Limits::default() };
        let mut pair = Pair::new(Limits::default(), theirs, features);
        for length in [1001, 1100, 5000, 1_000_000] {
            pair.call(length);
            pair.call(1000);
            pair.run(3000);
            let ended: Vec<_> = pair.ended.drain(..).collect();
            assert!(ended.contains(&Err(CallError::Refused)), "{length}: {ended:?}");
            assert!(ended.contains(&Ok(8)), "{length}: {ended:?}");
        }
        assert_eq!(pair.ran, 4);
        let packets = pair.packets_at_rest();
        assert!(packets < 40, "{packets} packets about nothing");
    }
}

#[test]
fn a_call_whose_reply_is_too_long_for_its_client_ends_as_unknown() {
    for features in [common::config(1, 1).features, 0] {
        let ours = Limits { payload: 1000, ..Limits::default() };
        let mut pair = Pair::new(ours, Limits::default(), features);
        for length in [1001, 1100, 5000, 1_000_000] {
            pair.answer = length;
            pair.call(10);
            pair.run(3000);
            let ended: Vec<_> = pair.ended.drain(..).collect();
            assert_eq!(ended, [Err(CallError::Unknown)], "{length}");
        }
        assert_eq!(pair.ran, 4);
        let packets = pair.packets_at_rest();
        assert!(packets < 40, "{packets} packets about nothing");
    }
}

/// A driver asked for its next deadline got the present again and again.
#[test]
fn no_times_at_all_leave_a_session_that_rests_between_packets() {
    let times = Duration::ZERO;
    let limits = Limits {
        keepalive: times,
        rekey_after: times,
        handshake_retry: times,
        ..Limits::default()
    };
    let mut pair = Pair::new(limits, limits, common::config(1, 1).features);
    pair.call(10);
    pair.run(100);
    assert_eq!(pair.ended.len(), 1);
    let packets = pair.packets_at_rest();
    assert!(packets < 3000 * 2, "{packets} packets in 3 s");
    // The other one is gone: it is looked for now and then.
    let mut buf = Vec::new();
    let (mut turns, end) = (0, pair.now + Duration::from_secs(20));
    while pair.now < end {
        turns += 1;
        assert!(turns < 20_000, "time stands still");
        pair.client.handle_timeout(pair.now);
        while pair.client.poll_transmit(pair.now, &mut buf).is_some() {}
        pair.now = pair.client.poll_timeout(pair.now).map_or(end, |at| at.max(pair.now));
    }
}
