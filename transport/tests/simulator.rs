//! The simulator: many seeds in a short time.
//!
//! The ordinary run takes a few seeds. `CONET_SEEDS=n` takes so many, `CONET_SEED=n` that
//! one alone and `CONET_TRACE=1` prints what happens in it;
//! `cargo run -p xtask -- simulate` sets these.

mod common;
mod sim;

use sim::{Tally, World};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Things that happen in one seed.
const STEPS: u64 = 60;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|number| number.parse().ok())
}

#[test]
fn whatever_happens_calls_run_at_most_once_and_end_once() {
    let first = number("CONET_SEED");
    let seeds = if first.is_some() { 1 } else { number("CONET_SEEDS").unwrap_or(120) };
    let started = Instant::now();
    let next = AtomicU64::new(0);
    let (all, failed) = (Mutex::new(Tally::default()), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= seeds {
                        return;
                    }
                    let seed = first.unwrap_or(n);
                    let story = catch_unwind(AssertUnwindSafe(|| {
                        let world = World::play(seed, STEPS);
                        if seed.is_multiple_of(16) {
                            let again = World::play(seed, STEPS);
                            assert_eq!(world.hash(), again.hash(), "seed {seed}: other trace");
                        }
                        world.tally
                    }));
                    match story {
                        Ok(tally) => all.lock().expect("whole").add(tally),
                        Err(_) => failed.lock().expect("whole").push(seed),
                    }
                }
            });
        }
    });
    let (all, failed) = (all.into_inner().expect("whole"), failed.into_inner().expect("whole"));
    eprintln!("{seeds} seeds in {:.1} s: {all:?}", started.elapsed().as_secs_f64());
    let remedy = "again: cargo run -p xtask -- simulate --seed";
    assert!(failed.is_empty(), "{} seeds failed: {failed:?}; {remedy} N", failed.len());
    if seeds >= 100 {
        // The links are bad, not hopeless.
        assert!(all.replies * 10 > all.calls * 5, "{all:?}");
        assert!(all.thaws > 0 && all.twins > 0 && all.superseded > 0 && all.rebinds > 0);
        assert!(all.pauses > 0 && all.streams > 0 && all.refused > 0);
    }
}
