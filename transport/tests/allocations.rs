//! A call allocates nothing, once buffers have grown to their size.
//!
//! Every allocation of this process is counted; the only test here, so that no other
//! one's are.

#![allow(unsafe_code, reason = "a counting allocator is one")]

mod common;

use conet_transport::session::handshake::PublicKey;
use conet_transport::session::{Event, Hub, Lane};
use conet_transport::time::Instant;
use std::alloc::{GlobalAlloc, Layout, System};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Pair {
    hubs: [Hub; 2],
    keys: [PublicKey; 2],
    now: Instant,
    buf: Vec<u8>,
    ended: u64,
}

fn address(n: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, u8::try_from(n).expect("small")], 1))
}

impl Pair {
    fn new() -> Self {
        let hub = |n: u8| Hub::new(common::config(n, n.into())).expect("entropy");
        let mut hubs = [hub(1), hub(2)];
        let keys = [hubs[0].public_key(), hubs[1].public_key()];
        let now = Instant::START;
        hubs[0].add_peer(now, keys[1], Some(address(1)));
        hubs[1].add_peer(now, keys[0], Some(address(0)));
        Self { hubs, keys, now, buf: Vec::new(), ended: 0 }
    }

    /// Carries packets, and answers calls with what they say, until nothing moves.
    fn settle(&mut self) {
        let mut moves = true;
        while moves {
            moves = false;
            for from in 0..2 {
                while self.hubs[from].poll_transmit(self.now, &mut self.buf).is_some() {
                    moves = true;
                    self.hubs[1 - from].handle_datagram(self.now, address(from), &mut self.buf);
                }
            }
            for n in 0..2 {
                while let Some(event) = self.hubs[n].poll_event() {
                    match event {
                        Event::Call { peer, id, payload, .. } => {
                            self.hubs[n].reply(&peer, id, payload).expect("waits");
                        }
                        Event::Ended { peer, result, .. } => {
                            self.ended += 1;
                            let reply = result.expect("good link");
                            self.hubs[n].recycle(&peer, reply);
                        }
                        _ => {}
                    }
                }
            }
        }
    }

    fn call(&mut self, lane: Lane, length: usize) {
        let peer = self.keys[1];
        let mut payload = self.hubs[0].buffer(&peer, length);
        payload.resize(length, 7);
        let deadline = Some(self.now + Duration::from_secs(5));
        self.hubs[0].call_on(self.now, &peer, lane, payload, deadline).expect("taken");
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
        for hub in &mut self.hubs {
            hub.handle_timeout(self.now);
        }
        self.settle();
    }

    /// `rounds` times ten calls at once.
    fn work(&mut self, rounds: u32, length: usize) {
        for _ in 0..rounds {
            for lane in [Lane::Calls, Lane::Control, Lane::Pages, Lane::Bulk, Lane::Calls] {
                self.call(lane, length);
                self.call(lane, 0);
            }
            self.settle();
            self.pass(Duration::from_micros(100));
        }
    }
}

#[test]
fn a_call_allocates_nothing_after_warm_up() {
    let mut pair = Pair::new();
    pair.pass(Duration::ZERO);
    for length in [0, 64, 1100] {
        // The timers of calls that have ended stay for a while, within a bound.
        pair.work(6_000, length);
        let (before, calls) = (ALLOCATIONS.load(Ordering::Relaxed), pair.ended);
        pair.work(1_000, length);
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert_eq!(pair.ended - calls, 10_000);
        assert_eq!(allocations, 0, "{length} bytes");
    }
}
