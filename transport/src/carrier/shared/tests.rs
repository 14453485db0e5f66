use super::*;
use crate::direct::{Direct, Wait};
use crate::session::handshake::PrivateKey;
use crate::session::{Event, HubConfig, Limits};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

const LONG: Duration = Duration::from_secs(30);

fn pair() -> (Shared, Shared) {
    let (one, two) = UnixStream::pair().expect("socketpair");
    let offered = Shared::offer(one).expect("offers");
    (offered, Shared::accept(two).expect("accepts"))
}

fn config(n: u8) -> HubConfig {
    let limits = Limits { datagram: 60_000, ..Limits::default() };
    HubConfig { limits, ..HubConfig::new(PrivateKey::new([n; 32])) }
}

#[test]
fn datagrams_go_both_ways_and_sleepers_are_woken() {
    let (mut one, mut two) = pair();
    let thread = thread::spawn(move || {
        for n in 0..1000u32 {
            while !two.wait(LONG).expect("waits") {}
            let mut got = None;
            while got.is_none() {
                two.receive(|incoming| {
                    got = Some(incoming.bytes.to_vec());
                    false
                })
                .expect("receives");
            }
            assert_eq!(got.as_deref(), Some(&n.to_le_bytes()[..]));
            two.send(peer_address(), &n.to_be_bytes(), 4).expect("sends");
            two.flush().expect("flushes");
        }
        two
    });
    for n in 0..1000u32 {
        one.send(peer_address(), &n.to_le_bytes(), 4).expect("sends");
        one.flush().expect("flushes");
        let mut got = None;
        while got.is_none() {
            one.wait(LONG).expect("waits");
            one.receive(|incoming| {
                got = Some(incoming.bytes.to_vec());
                true
            })
            .expect("receives");
        }
        assert_eq!(got.as_deref(), Some(&n.to_be_bytes()[..]));
    }
    drop(thread.join().expect("no panic"));
    let gone = one.wait(LONG).expect_err("the other side has gone");
    assert_eq!(gone.kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn a_session_over_shared_memory() {
    let (one, two) = pair();
    let stop = AtomicBool::new(false);
    let mut server = Direct::over(two, config(2), Wait::Adaptive).expect("entropy");
    let mut client = Direct::over(one, config(1), Wait::Adaptive).expect("entropy");
    let (name, now) = (server.hub.public_key(), client.now());
    server.hub.add_peer(now, client.hub.public_key(), None);
    client.hub.add_peer(now, name, Some(peer_address()));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) && server.turn(Duration::from_millis(20)).is_ok() {
                while let Some(event) = server.hub.poll_event() {
                    if let Event::Call { peer, id, payload, .. } = event {
                        server.hub.reply(&peer, id, payload).expect("asked");
                    }
                }
            }
        });
        for size in [0, 64, 50_000, 8 * 1024 * 1024, 64] {
            let payload: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
            let now = client.now();
            client.hub.call(now, &name, payload.clone(), Some(now + LONG)).expect("taken");
            let mut reply = None;
            while reply.is_none() {
                client.turn(Duration::from_millis(20)).expect("turns");
                while let Some(event) = client.hub.poll_event() {
                    if let Event::Ended { result, .. } = event {
                        reply = Some(result.expect("a reply"));
                    }
                }
            }
            assert!(reply == Some(payload), "{size} bytes");
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_full_ring_loses_and_goes_on() {
    let (mut one, mut two) = pair();
    let datagram = vec![7; 60_000];
    for _ in 0..100 {
        one.send(peer_address(), &datagram, datagram.len()).expect("lost, that is all");
    }
    one.flush().expect("flushes");
    let mut got = 0;
    while two.receive(|incoming| incoming.bytes == datagram).expect("receives") > 0 {
        got += 1;
    }
    assert!(got < 20);
    one.send(peer_address(), b"again", 5).expect("sends");
    one.flush().expect("flushes");
    assert_eq!(two.receive(|incoming| incoming.bytes == b"again").expect("receives"), 1);
}

/// What is offered by somebody who wants our process to die of SIGBUS, or means another
/// protocol.
#[test]
fn only_sealed_memory_of_the_right_size_is_taken() {
    let offer = |bytes: u64, seals: Option<SealFlags>, hello: &[u8]| {
        let (one, two) = UnixStream::pair().expect("socketpair");
        let file = memfd_create("bad", MemfdFlags::ALLOW_SEALING).expect("memfd");
        ftruncate(&file, bytes).expect("grows");
        if let Some(seals) = seals {
            fcntl_add_seals(&file, seals).expect("seals");
        }
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&files));
        let slices = [IoSlice::new(hello)];
        sendmsg(&one, &slices, &mut ancillary, SendFlags::empty()).expect("sends");
        Shared::accept(two)
    };
    let (size, good) = (TOTAL as u64 * 8, SealFlags::SHRINK | SealFlags::GROW);
    assert!(offer(size, Some(good), &HELLO).is_ok());
    assert!(matches!(offer(size, None, &HELLO), Err(ShareError::Offer)));
    assert!(matches!(offer(size, Some(SealFlags::GROW), &HELLO), Err(ShareError::Offer)));
    assert!(matches!(offer(size / 2, Some(good), &HELLO), Err(ShareError::Offer)));
    assert!(matches!(offer(0, Some(good), &HELLO), Err(ShareError::Offer)));
    assert!(matches!(offer(size, Some(good), b"conetsm1"), Err(ShareError::Offer)));
    let (mut one, two) = UnixStream::pair().expect("socketpair");
    one.write_all(&HELLO).expect("writes");
    assert!(matches!(Shared::accept(two), Err(ShareError::Offer)), "no file");
}

#[test]
fn long_datagrams_come_out_as_they_went_in() {
    let (mut one, mut two) = pair();
    let mut left = 5 * 1024 * 1024;
    for length in (511..=LONGEST).step_by(4093).cycle() {
        let bytes: Vec<u8> = (0..=250).cycle().skip(length % 7).take(length).collect();
        one.send(peer_address(), &bytes, length).expect("sends");
        one.flush().expect("flushes");
        let mut came = 0;
        two.receive(|incoming| {
            assert!(incoming.bytes == bytes, "{length}");
            came += 1;
            true
        })
        .expect("receives");
        assert_eq!(came, 1);
        // Several times round the ring.
        left = match usize::checked_sub(left, length) {
            Some(left) => left,
            None => break,
        };
    }
}

/// A peer that rings faster than anybody can read wakes us for nothing, and that is all: a
/// turn takes some of it and leaves the rest.
#[test]
fn a_bell_that_is_rung_without_end_blocks_nobody() {
    let (mut one, two) = pair();
    let rung = rustix::net::send(&two.bell, &[1; 64 * 1024], SendFlags::DONTWAIT).expect("rings");
    assert!(rung > 32 * 1024, "{rung} bytes");
    assert!(one.wait(LONG).expect("waits"));
    let mut rest = vec![0; 64 * 1024];
    let (_, left) = rustix::net::recv(&one.bell, &mut rest[..], RecvFlags::DONTWAIT).expect("more");
    assert!(left >= rung - RINGS * 256, "{left} of {rung} are left");
    drop(two);
    let gone = one.wait(LONG).expect_err("the other side has gone");
    assert_eq!(gone.kind(), io::ErrorKind::ConnectionReset);
}

/// A receive with a time limit ends with EINTR where the process is stopped and continued, also
/// where no signal is handled (`man 7 signal`).
#[test]
fn a_process_that_is_stopped_in_between_takes_the_offer() {
    let (one, two) = UnixStream::pair().expect("socketpair");
    std::thread::scope(|scope| {
        let accepted = scope.spawn(|| Shared::accept(two));
        // Most likely it waits by then; if not, this shows nothing.
        std::thread::sleep(Duration::from_millis(100));
        let script = "kill -STOP $PPID; sleep 0.02; kill -CONT $PPID";
        let status = std::process::Command::new("sh").args(["-c", script]).status();
        assert!(status.expect("a shell").success());
        let offered = Shared::offer(one).expect("offers");
        accepted.join().expect("no panic").expect("takes it");
        drop(offered);
    });
}

/// The other process writes whatever it likes wherever it likes while this one works.
#[test]
fn a_process_that_rewrites_everything_does_no_harm() {
    for seed in 0..20 {
        let (one, other) = pair();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let stop = &stop;
            scope.spawn(move || {
                use super::ring::Memory;
                let mut random = conet_testkit::random::Random::new(seed);
                while !stop.load(Ordering::Relaxed) {
                    let at = usize::try_from(random.below(TOTAL as u64)).expect("small");
                    // Mostly where lengths and positions are.
                    let at = if random.chance(700) { at % 512 } else { at };
                    let at = if random.chance(500) { at } else { TOTAL / 2 + at % 512 };
                    let value = match random.below(4) {
                        0 => random.number(),
                        1 => random.below(70_000),
                        2 => 0,
                        _ => 1 + random.below(200),
                    };
                    other.memory.store(at, value, Ordering::Relaxed);
                    if random.chance(10) {
                        rustix::net::send(&other.bell, &[1], SendFlags::DONTWAIT).ok();
                    }
                }
            });
            let mut direct = Direct::over(one, config(1), Wait::Adaptive).expect("entropy");
            let now = direct.now();
            let peer = PrivateKey::new([2; 32]).public();
            direct.hub.add_peer(now, peer, Some(peer_address()));
            for _ in 0..300 {
                // It ends the carrier, or is lost.
                if direct.turn(Duration::from_micros(50)).is_err() {
                    break;
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
