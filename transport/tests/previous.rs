//! An exchange with the build before lanes, recorded from that build: what it sent, to
//! the millisecond, with this build at the other end.
//!
//! ```text
//! 20 v1 0301…        at 20 ms the earlier build sent this
//! 40 call 16 3000    at 40 ms this build called, with payloads of so many bytes
//! 21 ended 64        at 21 ms the earlier build had a reply of so many bytes
//! ```
//!
//! Randomness is the same as in the recording, whatever the order in which it is asked
//! for, so that the recorded packets open. A change that breaks this test breaks talking
//! to nodes that are not updated yet.

use conet_transport::session::handshake::{
    Entropy, EntropyFailed, FEATURES, PrivateKey, PublicKey,
};
use conet_transport::session::{Event, Hub, HubConfig, Limits};
use conet_transport::time::Instant;
use std::net::SocketAddr;
use std::time::Duration;

/// Bytes that depend on how many are asked for, and on nothing else.
struct Recorded(u8);

impl Entropy for Recorded {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), EntropyFailed> {
        let length = u8::try_from(bytes.len()).expect("keys and indices");
        for (at, byte) in (0u8..).zip(bytes) {
            *byte = self.0 ^ length.wrapping_mul(31) ^ at.wrapping_mul(7);
        }
        Ok(())
    }
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    digits
        .map(|pair| {
            let pair = std::str::from_utf8(pair).expect("ASCII");
            u8::from_str_radix(pair, 16).expect("hexadecimal")
        })
        .collect()
}

fn replay(recording: &str, previous_begins: bool) {
    let config = HubConfig {
        private_key: PrivateKey::new([2; 32]),
        limits: Limits::default(),
        started: Duration::from_secs(1),
        // Answers are bound to what was offered when they were recorded: AES, LANES, MOVE.
        features: if previous_begins { 1 | FEATURES } else { 13 },
        entropy: Box::new(Recorded(0x22)),
    };
    let mut hub = Hub::new(config).expect("entropy");
    let previous: PublicKey = PrivateKey::new([1; 32]).public();
    let address = SocketAddr::from(([192, 0, 2, 1], 7));
    hub.add_peer(Instant::START, previous, (!previous_begins).then_some(address));
    let (mut ran, mut replies, mut lines) = (Vec::new(), Vec::new(), recording.lines().peekable());
    let mut buf = Vec::new();
    for ms in 0..400u64 {
        let now = Instant::from_start(Duration::from_millis(ms));
        hub.handle_timeout(now);
        loop {
            while let Some(event) = hub.poll_event() {
                match event {
                    Event::Call { peer, id, mut payload, .. } => {
                        ran.push(payload.len());
                        payload.reverse();
                        payload[0] ^= 1;
                        hub.reply(&peer, id, payload).expect("waits");
                    }
                    Event::Ended { result, .. } => replies.push(result.expect("a reply")),
                    _ => {}
                }
            }
            while hub.poll_transmit(now, &mut buf).is_some() {}
            let is_due =
                |line: &&str| line.split(' ').next().and_then(|ms| ms.parse().ok()) == Some(ms);
            let Some(line) = lines.next_if(is_due) else { break };
            let words: Vec<&str> = line.split(' ').collect();
            match words[1..] {
                ["v1", packet] => hub.handle_datagram(now, address, &mut from_hex(packet)),
                ["call", ref sizes @ ..] => {
                    for size in sizes {
                        let size: usize = size.parse().expect("a size");
                        let payload = vec![size.to_le_bytes()[0]; size];
                        hub.call(now, &previous, payload, None).expect("taken");
                    }
                }
                ["ended", _] => {}
                ref other => panic!("{other:?} in a recording"),
            }
        }
    }
    assert_eq!(lines.next(), None, "all of it was replayed");
    assert_eq!(ran, [8, 64, 5000]);
    let expected: Vec<Vec<u8>> = [16usize, 3000]
        .map(|size| {
            let mut reply = vec![size.to_le_bytes()[0]; size];
            reply[0] ^= 3;
            reply
        })
        .into();
    assert_eq!(replies, expected);
    let status = hub.status(Instant::START).next().expect("one peer");
    let counters = status.counters;
    assert_eq!((counters.forged, counters.malformed, counters.handshakes), (0, 0, 1));
    let strays = hub.strays();
    assert_eq!((strays.malformed, strays.unknown_index, strays.forged), (0, 0, 0));
}

#[test]
fn the_build_before_lanes_is_answered() {
    replay(include_str!("data/v1-begins.txt"), true);
}

#[test]
fn the_build_before_lanes_answers() {
    replay(include_str!("data/v1-answers.txt"), false);
}
