//! What was changed away comes home in slices while the program runs, before it is
//! stopped: then little is left.
//!
//! Each slice is asked for, so the remote half stands still for short times only, with
//! times between them in which it runs. Where no slice comes (the program waits in a
//! call, the other node is older, its kernel cannot tell what has changed), nothing is
//! lost: what has not come comes with the program.

use super::out::{FEW_PAGES, MAX_ROUNDS};
use super::{MoveError, gone, status};
use crate::life;
use conet_deputy_core::boot::phase;
use rustix::process::Pid;
use std::time::{Duration, Instant};

/// How long a slice may take to begin, beside the way there and back. One takes some 0.5 ms
/// in all, and a short call of the program's ends before; the rest is for a busy machine.
const PATIENCE: Duration = Duration::from_millis(100);
/// Round trips that a slice takes at most before it begins: warden, remote half, link.
const TRIPS: u32 = 4;
/// How long one that has begun may take: half a megabyte, on a slow link.
const SLOW: Duration = Duration::from_secs(2);
/// How long all may take, whatever comes: the move waits, and the node may be hostile.
const LIMIT: Duration = Duration::from_secs(10);
/// How often it is looked whether one has.
const PERIOD: Duration = Duration::from_micros(100);

/// Has what the program has changed come home while it runs on, in rounds while they are
/// worth it. `ask` asks its warden for a slice ([`crate::hosting::Warden::slice`]); it is
/// called for each. Gives the pages that came.
///
/// # Errors
/// [`MoveError::Gone`] where the process has ended.
pub fn slices(pid: Pid, ask: impl FnMut()) -> Result<u64, MoveError> {
    slices_within(LIMIT, pid, ask)
}

/// As [`slices`], for so long at most.
pub(super) fn slices_within(
    limit: Duration,
    pid: Pid,
    mut ask: impl FnMut(),
) -> Result<u64, MoveError> {
    let (begin, begun) = (status(pid).map_err(gone)?, Instant::now());
    let trips = life::round_trip(pid).map_or(Duration::ZERO, |trip| trip * TRIPS);
    let to_begin = PATIENCE + trips.min(SLOW);
    let mut last = begin;
    // Where the round under way has begun, and how many came in the one before.
    let (mut from, mut before) = (begin, None);
    while last.phase == phase::SERVING
        && last.rounds.wrapping_sub(begin.rounds) < MAX_ROUNDS as u64
        && begun.elapsed() < limit
    {
        ask();
        let asked = Instant::now();
        let seen = loop {
            let seen = status(pid).map_err(gone)?;
            if seen.slices != last.slices || seen.phase != phase::SERVING {
                break seen;
            }
            let patience = if seen.receiving == 1 { SLOW } else { to_begin };
            if asked.elapsed() > patience || begun.elapsed() > limit {
                return Ok(seen.sliced.wrapping_sub(begin.sliced));
            }
            std::thread::sleep(PERIOD);
        };
        last = seen;
        if last.rounds != from.rounds {
            let pages = last.sliced.wrapping_sub(from.sliced);
            let makes_progress = before.is_none_or(|before| pages < before / 4 * 3);
            if pages < FEW_PAGES || !makes_progress {
                break;
            }
            (from, before) = (last, Some(pages));
        }
    }
    Ok(last.sliced.wrapping_sub(begin.sliced))
}
