//! Real sockets through a relay that loses, repeats, reorders and changes datagrams, and
//! under which both ends' addresses change: every call is answered, and runs once.
//!
//! ```text
//! client ◄──► [ relay: its socket towards each end, changed now and then ] ◄──► server
//! ```
//!
//! The ordinary run is short. `CONET_CALLS=n`, `CONET_REBINDS=n` and `CONET_SEED=n` say
//! otherwise; `cargo xtask relay` sets them, to a million calls and ten rebinds.

use conet_testkit::link::{Faults, Link};
use conet_testkit::random::Random;
use conet_transport::direct::{Direct, Wait};
use conet_transport::session::handshake::{PrivateKey, PublicKey};
use conet_transport::session::{Event, HubConfig};
use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// Calls under way at a time.
const WINDOW: u64 = 48;
const TURN: Duration = Duration::from_millis(5);
/// Generous: how long a call may take where the machine is busy and an address changes.
const LONG: Duration = Duration::from_secs(60);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|number| number.parse().ok())
}

fn key(n: u8) -> PrivateKey {
    PrivateKey::new([n; 32])
}

fn bind() -> UdpSocket {
    let socket = UdpSocket::bind(ANY).expect("bind");
    socket.set_nonblocking(true).expect("nonblocking");
    socket
}

/// What a call with this number says, and is answered with.
fn payload(serial: u64) -> Vec<u8> {
    let length = if serial.is_multiple_of(500) { 4000 } else { 8 + serial % 200 };
    let mut bytes = vec![0; usize::try_from(length).expect("small")];
    Random::new(serial).fill(&mut bytes);
    bytes[..8].copy_from_slice(&serial.to_le_bytes());
    bytes
}

fn answer(payload: &[u8]) -> Vec<u8> {
    payload.iter().map(|byte| byte ^ 0x5a).collect()
}

/// The two ends, by the relay's index of its socket towards each.
const CLIENT: usize = 0;
const SERVER: usize = 1;

struct Relay {
    sockets: [UdpSocket; 2],
    /// Where the ends were heard last.
    ends: [Option<SocketAddr>; 2],
    link: Link<usize>,
    started: Instant,
}

impl Relay {
    fn new(seed: u64, server: SocketAddr) -> Self {
        let delay = Duration::from_micros(30);
        let jitter = Duration::from_micros(20);
        let faults = Faults { lose: 10, duplicate: 5, reorder: 10, corrupt: 3, delay, jitter };
        let ends = [None, Some(server)];
        Self {
            sockets: [bind(), bind()],
            ends,
            link: Link::new(seed, faults),
            started: Instant::now(),
        }
    }

    /// Takes what is there and sends what is due; says whether there was anything.
    fn turn(&mut self, buf: &mut [u8]) -> bool {
        let mut busy = false;
        for side in [CLIENT, SERVER] {
            for _ in 0..64 {
                match self.sockets[side].recv_from(buf) {
                    Ok((length, from)) => {
                        busy = true;
                        self.ends[side] = Some(from);
                        let now = self.started.elapsed();
                        self.link.send(now, side, 1 - side, &buf[..length]);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // Of a datagram to an end whose address has changed.
                    Err(_) => {}
                }
            }
        }
        while let Some(delivery) = self.link.deliver(self.started.elapsed()) {
            busy = true;
            if let Some(to) = self.ends[delivery.to] {
                // What a full socket drops is lost.
                self.sockets[delivery.to].send_to(&delivery.bytes, to).ok();
            }
        }
        busy
    }

    /// The far end sees another address from now on, and the old one is deaf.
    fn rebind(&mut self, side: usize) {
        self.sockets[side] = bind();
    }
}

/// Ends the other threads, also where the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn serve(mut server: Direct, stop: &AtomicBool, calls: u64) -> Vec<u8> {
    let mut executions = vec![0u8; usize::try_from(calls).expect("fits")];
    while !stop.load(Ordering::Relaxed) {
        server.turn(TURN).expect("turns");
        while let Some(event) = server.hub.poll_event() {
            if let Event::Call { peer, id, payload, .. } = event {
                let serial = u64::from_le_bytes(*payload.first_chunk().expect("eight bytes"));
                executions[usize::try_from(serial).expect("fits")] += 1;
                let reply = answer(&payload);
                server.hub.reply(&peer, id, reply).expect("asked");
                server.hub.recycle(&peer, payload);
            }
        }
    }
    executions
}

/// Calls with a full window; `done` counts those that have ended.
fn ask(client: &mut Direct, peer: &PublicKey, calls: u64, done: &AtomicU64) {
    let (mut next, mut ended, mut open) = (0, 0, HashMap::new());
    while ended < calls {
        while next < calls && next - ended < WINDOW {
            let now = client.now();
            let id = client.hub.call(now, peer, payload(next), Some(now + LONG)).expect("taken");
            open.insert(id, next);
            next += 1;
        }
        client.turn(TURN).expect("turns");
        while let Some(event) = client.hub.poll_event() {
            match event {
                Event::Ended { call, result, .. } => {
                    let serial = open.remove(&call).expect("ends once");
                    let reply = result.unwrap_or_else(|error| panic!("call {serial}: {error}"));
                    assert!(reply == answer(&payload(serial)), "call {serial} differs");
                    ended += 1;
                }
                Event::Down(_, reason) => panic!("down: {reason:?}"),
                _ => {}
            }
        }
        done.store(ended, Ordering::Relaxed);
    }
}

#[test]
fn calls_run_once_through_a_bad_relay_while_addresses_change() {
    let calls = number("CONET_CALLS").unwrap_or(20_000);
    let rebinds = number("CONET_REBINDS").unwrap_or(4);
    let seed = number("CONET_SEED").unwrap_or(1);
    eprintln!("CONET_CALLS={calls} CONET_REBINDS={rebinds} CONET_SEED={seed}");
    let direct = |n| Direct::new(bind(), HubConfig::new(key(n)), Wait::Block).expect("entropy");
    let (mut server, mut client) = (direct(2), direct(1));
    let mut relay = Relay::new(seed, server.local_addr().expect("bound"));
    let (peer, now) = (server.hub.public_key(), client.now());
    server.hub.add_peer(now, client.hub.public_key(), None);
    let at = relay.sockets[CLIENT].local_addr().expect("bound");
    client.hub.add_peer(now, peer, Some(at));
    let (stop, done, begun) = (AtomicBool::new(false), AtomicU64::new(0), Instant::now());
    let (executions, counters) = thread::scope(|scope| {
        let _stop = Stop(&stop);
        let server = scope.spawn(|| serve(server, &stop, calls));
        let relay = scope.spawn(|| {
            let (mut buf, mut rebound) = (vec![0; 65_536], 0);
            while !stop.load(Ordering::Relaxed) {
                if rebound < rebinds
                    && done.load(Ordering::Relaxed) >= calls * (rebound + 1) / (rebinds + 1)
                {
                    relay.rebind(if rebound % 2 == 0 { SERVER } else { CLIENT });
                    rebound += 1;
                }
                if !relay.turn(&mut buf) {
                    thread::yield_now();
                }
            }
            (rebound, relay.link.counters())
        });
        ask(&mut client, &peer, calls, &done);
        stop.store(true, Ordering::Relaxed);
        (server.join().expect("server"), relay.join().expect("relay"))
    });
    let took = begun.elapsed();
    assert!(executions.iter().all(|count| *count == 1), "a call ran twice, or never");
    let (rebound, link) = counters;
    assert_eq!(rebound, rebinds);
    let peer = client.hub.status(client.now()).next().expect("one").counters;
    eprintln!(
        "{calls} calls in {took:?}, each ran once, no error; {rebound} rebinds, {} moves seen by \
         the client, {} repeats; relay: {link:?}",
        peer.moves, peer.repeats
    );
    assert!(link.lost > 0 && link.duplicated > 0 && link.reordered > 0 && link.corrupted > 0);
    // Where a rebind has gone unnoticed there was none.
    assert!(peer.moves >= rebinds / 2);
}
