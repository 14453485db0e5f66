//! Two peers in virtual time, and boringtun as the other one.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use boringtun::noise as original;
use conet_testkit::random::Random;
use x25519_dalek::StaticSecret;

use super::session::WINDOW;
use super::*;

const UNIX: Duration = Duration::from_secs(1_700_000_000);

/// One side, whose clock is the test's.
struct Side {
    us: Identity,
    tunn: Tunn,
    gate: Gate,
    port: u16,
}

fn side(
    n: u8,
    peer: u8,
    preshared: Option<[u8; 32]>,
    keepalive: Option<u16>,
    now: Instant,
) -> Side {
    let us = Identity::new(StaticSecret::from([n; 32]));
    let public = x25519_dalek::PublicKey::from(&StaticSecret::from([peer; 32])).to_bytes();
    let tunn = Tunn::new(&us, public, preshared, keepalive, u32::from(n), now);
    Side { us, tunn, gate: Gate::default(), port: 1 }
}

fn sides(now: Instant) -> [Side; 2] {
    [side(1, 2, None, None, now), side(2, 1, None, None, now)]
}

#[derive(Debug, PartialEq, Eq)]
enum Took {
    Nothing,
    Answer(Vec<u8>),
    Packet(Vec<u8>),
    Error(NoiseError),
}

impl Side {
    fn address(&self) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], self.port))
    }

    fn messages(&mut self, now: Instant, start: Instant) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        let mut out = [0; INITIATION];
        while self.tunn.has_message() {
            if let Some(len) = self.tunn.poll_message(&self.us, now, UNIX + (now - start), &mut out)
            {
                all.push(out[..len].to_vec());
            }
        }
        all
    }

    fn seal(&mut self, now: Instant, packet: &[u8]) -> Result<Vec<u8>, NoiseError> {
        let mut space = vec![0; DATA_HEADER + packet.len() + TAG];
        space[DATA_HEADER..DATA_HEADER + packet.len()].copy_from_slice(packet);
        self.tunn.seal(now, &mut space, packet.len()).map(|_| space)
    }

    fn take(&mut self, now: Instant, from: SocketAddr, datagram: &[u8]) -> Took {
        let Some(message) = Message::parse(datagram) else {
            return Took::Error(NoiseError::Handshake);
        };
        let result = match message {
            Message::Initiation(bytes) => match self.gate.judge(&self.us, now, from, bytes) {
                Verdict::Cookie(reply) => return Took::Answer(reply.to_vec()),
                Verdict::Welcome => Claim::read(&self.us, bytes).and_then(|claim| {
                    let mut out = [0; RESPONSE];
                    self.tunn.respond(now, claim, &mut out)?;
                    Ok(Took::Answer(out.to_vec()))
                }),
                _ => Err(NoiseError::Handshake),
            },
            Message::Response(bytes) => {
                self.tunn.finish(&self.us, now, bytes).map(|()| Took::Nothing)
            }
            Message::Cookie(bytes) => self.tunn.take_cookie(now, bytes).map(|()| Took::Nothing),
            Message::Data { receiver, counter } => {
                let mut bytes = datagram.to_vec();
                self.tunn.open(now, receiver, counter, &mut bytes).map(|opened| match opened.len {
                    0 => Took::Nothing,
                    len => Took::Packet(bytes[DATA_HEADER..DATA_HEADER + len].to_vec()),
                })
            }
        };
        result.unwrap_or_else(Took::Error)
    }
}

/// Delivers everything that the two have to say; the number of messages.
fn settle(sides: &mut [Side; 2], now: Instant, start: Instant) -> usize {
    let mut count = 0;
    for _ in 0..10 {
        let mut quiet = true;
        for i in [0, 1] {
            let mut waiting = sides[i].messages(now, start);
            let from = sides[i].address();
            while let Some(datagram) = waiting.pop() {
                (quiet, count) = (false, count + 1);
                if let Took::Answer(answer) = sides[1 - i].take(now, from, &datagram) {
                    count += 1;
                    let back = sides[1 - i].address();
                    sides[i].take(now, back, &answer);
                }
            }
        }
        if quiet {
            break;
        }
    }
    count
}

fn connected(now: Instant) -> [Side; 2] {
    let mut sides = sides(now);
    sides[0].tunn.enqueue(now, b"hello");
    settle(&mut sides, now, now);
    assert!(sides[0].tunn.is_ready(now) && !sides[1].tunn.is_ready(now));
    let queued = sides[0].tunn.dequeue().unwrap();
    let sealed = sides[0].seal(now, &queued).unwrap();
    let from = sides[0].address();
    assert_eq!(sides[1].take(now, from, &sealed), Took::Packet(b"hello".to_vec()));
    assert!(sides[1].tunn.is_ready(now));
    sides
}

/// Sends one packet from each side; says whether both arrive.
fn exchange(sides: &mut [Side; 2], now: Instant) -> bool {
    [0, 1].into_iter().all(|i| {
        let Ok(sealed) = sides[i].seal(now, b"packet") else { return false };
        let from = sides[i].address();
        sides[1 - i].take(now, from, &sealed) == Took::Packet(b"packet".to_vec())
    })
}

#[test]
fn sessions_are_made_and_renewed_in_time_under_traffic() {
    let start = Instant::now();
    let mut sides = connected(start);
    let mut handshakes = 0;
    for second in 1..1000 {
        let now = start + Duration::from_secs(second);
        let number = sides[0].tunn.current_mut().unwrap().local;
        for side in &mut sides {
            side.tunn.handle_timeout(now);
        }
        settle(&mut sides, now, start);
        assert!(exchange(&mut sides, now), "second {second}");
        handshakes += usize::from(sides[0].tunn.current_mut().unwrap().local != number);
    }
    // One each 120 s, begun by the initiator alone.
    assert!((7..=8).contains(&handshakes), "{handshakes}");
}

#[test]
fn a_session_ends_by_itself_and_its_packets_are_refused_then() {
    let start = Instant::now();
    let mut sides = connected(start);
    let late = sides[0].seal(start, b"late").unwrap();
    let now = start + Duration::from_secs(179);
    assert!(sides[0].tunn.is_ready(now));
    let now = start + Duration::from_secs(180);
    assert!(!sides[0].tunn.is_ready(now));
    assert_eq!(sides[0].seal(now, b"x"), Err(NoiseError::NoSession));
    let from = sides[0].address();
    assert_eq!(sides[1].take(now, from, &late), Took::Error(NoiseError::NoSession));
    let now = start + Duration::from_secs(541);
    sides[1].tunn.handle_timeout(now);
    assert!(sides[1].tunn.current_mut().is_none(), "keys are forgotten");
}

#[test]
fn counters_end_before_they_wrap() {
    let now = Instant::now();
    let mut sides = connected(now);
    sides[0].tunn.current_mut().unwrap().set_sent(REKEY_AFTER_MESSAGES);
    assert!(exchange(&mut sides, now));
    // A new handshake, but not within 5 s of the last.
    assert!(sides[0].messages(now, now).is_empty());
    sides[0].tunn.current_mut().unwrap().set_sent(REJECT_AFTER_MESSAGES - 1);
    let from = sides[0].address();
    let last = sides[0].seal(now, b"last").unwrap();
    assert_eq!(sides[1].take(now, from, &last), Took::Packet(b"last".to_vec()));
    assert_eq!(sides[0].seal(now, b"beyond"), Err(NoiseError::NoSession));
    for counter in [REJECT_AFTER_MESSAGES, u64::MAX - 1, u64::MAX] {
        let mut forged = last.clone();
        forged[8..16].copy_from_slice(&counter.to_le_bytes());
        assert_eq!(sides[1].take(now, from, &forged), Took::Error(NoiseError::Replay));
    }
}

#[test]
fn a_silent_peer_is_asked_18_times_with_jitter_and_then_left() {
    let start = Instant::now();
    let mut side = side(1, 2, None, None, start);
    for _ in 0..200 {
        side.tunn.enqueue(start, b"waits");
    }
    assert_eq!(side.tunn.take_lost(), 72, "128 wait");
    let (mut sent, mut now) = (vec![], start);
    loop {
        if !side.messages(now, start).is_empty() {
            sent.push(now);
        }
        match side.tunn.poll_timeout().filter(|at| *at < start + Duration::from_secs(300)) {
            None => break,
            Some(at) => now = at,
        }
        side.tunn.handle_timeout(now);
    }
    assert_eq!(sent.len(), 19);
    let gaps: Vec<_> = sent.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let limit = REKEY_TIMEOUT + Duration::from_millis(JITTER_MS.into());
    assert!(gaps.iter().all(|gap| (REKEY_TIMEOUT..limit).contains(gap)), "{gaps:?}");
    assert!(gaps.iter().any(|gap| *gap != gaps[0]), "{gaps:?}");
    assert_eq!((side.tunn.waiting(), side.tunn.take_lost()), (0, 128));
}

#[test]
fn keepalives_answer_data_and_persist_where_asked() {
    let start = Instant::now();
    let mut sides = connected(start);
    let now = start + Duration::from_secs(10);
    sides[1].tunn.handle_timeout(now - Duration::from_millis(1));
    assert!(!sides[1].tunn.has_message());
    sides[1].tunn.handle_timeout(now);
    let messages = sides[1].messages(now, start);
    assert_eq!(messages.iter().map(Vec::len).collect::<Vec<_>>(), [32]);
    let from = sides[1].address();
    assert_eq!(sides[0].take(now, from, &messages[0]), Took::Nothing);
    sides[0].tunn.set_keepalive(Some(25), now);
    for (after, expected) in [(0, 1), (24, 0), (25, 1), (49, 0), (50, 1)] {
        let now = now + Duration::from_secs(after);
        sides[0].tunn.handle_timeout(now);
        assert_eq!(sides[0].messages(now, start).len(), expected, "after {after} s");
    }
    sides[0].tunn.set_keepalive(None, now);
    sides[0].tunn.handle_timeout(now + Duration::from_secs(100));
    assert!(sides[0].messages(now + Duration::from_secs(100), start).is_empty());
}

#[test]
fn preshared_keys_must_be_the_same() {
    let start = Instant::now();
    for (one, other, works) in [(Some([7; 32]), Some([7; 32]), true), (Some([7; 32]), None, false)]
    {
        let mut sides = [side(1, 2, one, None, start), side(2, 1, other, None, start)];
        sides[0].tunn.enqueue(start, b"x");
        settle(&mut sides, start, start);
        assert_eq!(sides[0].tunn.is_ready(start), works);
        // And from the next handshake on, when it is changed.
        let us = &sides[1].us;
        sides[1].tunn.set_preshared(us, Some([7; 32]));
        let now = start + Duration::from_secs(6);
        sides[0].tunn.handle_timeout(now);
        settle(&mut sides, now, start);
        assert!(sides[0].tunn.is_ready(now));
    }
}

#[test]
fn replays_of_handshakes_and_packets_are_refused() {
    let start = Instant::now();
    let mut sides = sides(start);
    let from = sides[0].address();
    sides[0].tunn.enqueue(start, b"x");
    let first = sides[0].messages(start, start).remove(0);
    let Took::Answer(response) = sides[1].take(start, from, &first) else { panic!("no answer") };
    let now = start + Duration::from_secs(6);
    assert_eq!(sides[1].take(now, from, &first), Took::Error(NoiseError::Handshake));
    assert_eq!(sides[0].take(now, from, &response), Took::Nothing);
    assert_eq!(sides[0].take(now, from, &response), Took::Error(NoiseError::NoSession));
    let packets: Vec<_> = (0..100).map(|_| sides[0].seal(now, b"once").unwrap()).collect();
    for packet in packets.iter().rev() {
        assert_eq!(sides[1].take(now, from, packet), Took::Packet(b"once".to_vec()));
    }
    for packet in &packets {
        assert_eq!(sides[1].take(now, from, packet), Took::Error(NoiseError::Replay));
    }
    // A clock that went back: refused until it has caught up, as the whitepaper says.
    sides[0].tunn.current_mut().unwrap().set_sent(REJECT_AFTER_MESSAGES);
    sides[0].tunn.enqueue(now, b"x");
    let mut out = [0; INITIATION];
    let back = UNIX - Duration::from_secs(60);
    let len = sides[0].tunn.poll_message(&sides[0].us, now, back, &mut out).unwrap();
    assert_eq!(sides[1].take(now, from, &out[..len]), Took::Error(NoiseError::Handshake));
}

#[test]
fn packets_older_than_the_window_are_refused_and_younger_taken() {
    let now = Instant::now();
    let mut sides = connected(now);
    let from = sides[0].address();
    let count = usize::try_from(WINDOW).unwrap() + 10;
    let packets: Vec<_> = (0..count).map(|_| sides[0].seal(now, b"p").unwrap()).collect();
    assert_eq!(sides[1].take(now, from, packets.last().unwrap()), Took::Packet(b"p".to_vec()));
    assert_eq!(sides[1].take(now, from, &packets[9]), Took::Error(NoiseError::Replay));
    assert_eq!(sides[1].take(now, from, &packets[10]), Took::Packet(b"p".to_vec()));
}

#[test]
fn both_may_begin_at_once() {
    let now = Instant::now();
    let mut sides = sides(now);
    let mut initiations = Vec::new();
    for side in &mut sides {
        side.tunn.enqueue(now, b"x");
        initiations.extend(side.messages(now, now));
    }
    let from = sides[0].address();
    let answers: Vec<_> = [1, 0]
        .map(|i| match sides[i].take(now, from, &initiations[1 - i]) {
            Took::Answer(answer) => answer,
            other => panic!("{other:?}"),
        })
        .into();
    assert_eq!(sides[0].take(now, from, &answers[0]), Took::Nothing);
    assert_eq!(sides[1].take(now, from, &answers[1]), Took::Nothing);
    settle(&mut sides, now, now);
    assert!(exchange(&mut sides, now));
}

#[test]
fn under_load_a_cookie_is_asked_for_and_bound_to_address_and_port() {
    let start = Instant::now();
    let mut sides = sides(start);
    // A flood by somebody who knows the key.
    let mut other = side(3, 2, None, None, start);
    other.tunn.enqueue(start, b"x");
    let flood = other.messages(start, start).remove(0);
    let stranger = SocketAddr::from(([203, 0, 113, 9], 9));
    let mut cookies = 0;
    for _ in 0..300 {
        cookies += usize::from(
            matches!(sides[1].take(start, stranger, &flood), Took::Answer(a) if a.len() == COOKIE_REPLY),
        );
    }
    assert_eq!(cookies, 200, "100 a second without");
    sides[0].tunn.enqueue(start, b"x");
    let first = sides[0].messages(start, start).remove(0);
    let from = sides[0].address();
    let Took::Answer(cookie) = sides[1].take(start, from, &first) else { panic!("no cookie") };
    assert_eq!(cookie.len(), COOKIE_REPLY);
    assert_eq!(sides[0].take(start, from, &cookie), Took::Nothing);
    assert_eq!(sides[0].take(start, from, &cookie), Took::Error(NoiseError::Handshake));
    let now = sides[0].tunn.poll_timeout().unwrap();
    sides[0].tunn.handle_timeout(now);
    let second = sides[0].messages(now, start).remove(0);
    for _ in 0..300 {
        sides[1].take(now, stranger, &flood);
    }
    let elsewhere = SocketAddr::from(([192, 0, 2, 1], 2));
    assert!(
        matches!(sides[1].take(now, elsewhere, &second), Took::Answer(a) if a.len() == COOKIE_REPLY)
    );
    assert!(matches!(sides[1].take(now, from, &second), Took::Answer(a) if a.len() == RESPONSE));
    // And one address has a share only, cookie or not.
    let refused = (0..100)
        .filter(|_| sides[1].gate.judge(&sides[1].us, now, from, &second) == Verdict::Refused);
    assert_eq!(refused.count(), 81);
}

#[test]
fn whoever_does_not_know_our_key_is_a_stranger() {
    let now = Instant::now();
    let mut sides = sides(now);
    let mut wrong = side(1, 3, None, None, now);
    wrong.tunn.enqueue(now, b"x");
    let message = wrong.messages(now, now).remove(0);
    let from = wrong.address();
    assert_eq!(sides[1].gate.judge(&sides[1].us, now, from, &message), Verdict::Stranger);
    let mut random = Random::new(5);
    for len in 0..300 {
        let mut bytes = vec![0; len];
        random.fill(&mut bytes);
        assert_eq!(sides[1].gate.judge(&sides[1].us, now, from, &bytes), Verdict::Stranger);
    }
}

/// Any message, cut, stretched or changed in any byte, is refused and changes nothing.
#[test]
fn changed_messages_are_refused() {
    let now = Instant::now();
    let mut sides = sides(now);
    let from = sides[0].address();
    sides[0].tunn.enqueue(now, b"x");
    let initiation = sides[0].messages(now, now).remove(0);
    for at in 0..initiation.len() - 16 {
        let mut changed = initiation.clone();
        changed[at] ^= 1;
        assert!(matches!(sides[1].take(now, from, &changed), Took::Error(_)), "byte {at}");
        sides[1].gate = Gate::default();
    }
    let Took::Answer(response) = sides[1].take(now, from, &initiation) else { panic!("no answer") };
    // The sender's number, at 4, is protected by mac1 alone, which the gate looks at.
    for at in (0..4).chain(8..60) {
        let mut changed = response.clone();
        changed[at] ^= 1;
        assert!(matches!(sides[0].take(now, from, &changed), Took::Error(_)), "byte {at}");
    }
    assert_eq!(sides[0].take(now, from, &response), Took::Nothing);
    let sealed = sides[0].seal(now, b"some packet").unwrap();
    for at in 0..sealed.len() {
        let mut changed = sealed.clone();
        changed[at] ^= 1;
        assert!(matches!(sides[1].take(now, from, &changed), Took::Error(_)), "byte {at}");
        assert!(matches!(sides[1].take(now, from, &sealed[..at]), Took::Error(_)), "cut at {at}");
    }
    assert_eq!(sides[1].take(now, from, &sealed), Took::Packet(b"some packet".to_vec()));
}

/// The original, which reads its own clock.
#[test]
fn boringtun_is_a_peer_in_either_role() {
    let now = Instant::now();
    for preshared in [None, Some([9; 32])] {
        for we_begin in [true, false] {
            let mut ours = side(1, 2, preshared, None, now);
            let secret = boringtun::x25519::StaticSecret::from([2; 32]);
            let public = boringtun::x25519::PublicKey::from(ours.us.public.to_bytes());
            let mut theirs = original::Tunn::new(secret, public, preshared, None, 7, None);
            let from = ours.address();
            let mut buffer = [0; 2048];
            let mut datagrams = if we_begin {
                ours.tunn.enqueue(now, b"x");
                ours.tunn.dequeue();
                ours.messages(now, now)
            } else {
                match theirs.format_handshake_initiation(&mut buffer, false) {
                    original::TunnResult::WriteToNetwork(bytes) => vec![bytes.to_vec()],
                    other => panic!("{other:?}"),
                }
            };
            let mut to_them = we_begin;
            while let Some(datagram) = datagrams.pop() {
                if to_them {
                    match theirs.decapsulate(None, &datagram, &mut buffer) {
                        original::TunnResult::WriteToNetwork(bytes) => {
                            datagrams.push(bytes.to_vec())
                        }
                        original::TunnResult::Done => {}
                        other => panic!("{other:?}"),
                    }
                } else {
                    match ours.take(now, from, &datagram) {
                        Took::Answer(answer) => datagrams.push(answer),
                        Took::Nothing => datagrams.extend(ours.messages(now, now)),
                        other => panic!("{other:?}"),
                    }
                }
                to_them = !to_them;
            }
            // Both directions, padded and not.
            let mut packet =
                vec![0x45, 0, 0, 30, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
            packet.resize(32, 0);
            let sealed = ours.seal(now, &packet).unwrap();
            match theirs.decapsulate(None, &sealed, &mut buffer) {
                original::TunnResult::WriteToTunnelV4(inner, _) => assert_eq!(inner, &packet[..30]),
                other => panic!("{other:?}"),
            }
            match theirs.encapsulate(&packet, &mut buffer) {
                original::TunnResult::WriteToNetwork(bytes) => {
                    let bytes = bytes.to_vec();
                    assert_eq!(ours.take(now, from, &bytes), Took::Packet(packet));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

/// What the original panics on, so that nobody puts it back: a data message longer than
/// the buffer, once a session exists, whatever its tag.
#[test]
fn the_originals_remote_panic_is_not_ours() {
    let now = Instant::now();
    let mut sides = connected(now);
    let from = sides[0].address();
    let model = sides[0].seal(now, b"x").unwrap();
    for len in [32, 1500, 2000, 9000, 65_507, 65_535] {
        let mut garbage = vec![0xa5; len];
        garbage[..8].copy_from_slice(&model[..8]);
        garbage[8..16].copy_from_slice(&7u64.to_le_bytes());
        assert_eq!(sides[1].take(now, from, &garbage), Took::Error(NoiseError::Tag), "{len}");
    }
}
