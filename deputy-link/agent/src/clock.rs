//! Home time: the local clocks through the local vDSO, plus what the two nodes'
//! clocks differ by.
//!
//! The program's own copy of the home vDSO is patched so that each entry point jumps
//! here: the cost is that of a native reading. These functions run in the program's
//! context, on its stack, at any time; they read what was set before the start and
//! write nothing.

use crate::sys;
use conet_wire::image::Clocks;
use linux_raw_sys::general as nr;

/// Nanoseconds in a second.
pub(crate) const SECOND: i64 = 1_000_000_000;

/// What to add to local clock `id` to read home's; `None` for clocks that are not
/// time of the day (processor time and such).
pub(crate) fn offset(id: u32) -> Option<i64> {
    let offsets = &sys::state().remote.offsets;
    match id {
        nr::CLOCK_REALTIME
        | nr::CLOCK_REALTIME_COARSE
        | nr::CLOCK_REALTIME_ALARM
        | nr::CLOCK_TAI => Some(offsets.realtime),
        nr::CLOCK_MONOTONIC | nr::CLOCK_MONOTONIC_COARSE => Some(offsets.monotonic),
        nr::CLOCK_MONOTONIC_RAW => Some(offsets.raw),
        nr::CLOCK_BOOTTIME | nr::CLOCK_BOOTTIME_ALARM => Some(offsets.boottime),
        _ => None,
    }
}

/// Home's clock `id` as seconds and nanoseconds.
pub(crate) fn read(id: u32) -> Option<[i64; 2]> {
    let [more_seconds, more_nanos] = sys::offset(id)?;
    let [seconds, nanos] = sys::local_clock(id)?;
    let (seconds, nanos) = (seconds + more_seconds, nanos + more_nanos);
    Some(if nanos < SECOND { [seconds, nanos] } else { [seconds + 1, nanos - SECOND] })
}

/// What to add to clock `id`, as seconds and nanoseconds, of which there are 0 to
/// 999,999,999.
pub(crate) fn split_offset(id: u32) -> Option<[i64; 2]> {
    offset(id).map(|offset| [offset.div_euclid(SECOND), offset.rem_euclid(SECOND)])
}

/// Nanoseconds of the local `CLOCK_MONOTONIC`, to take times with.
pub(crate) fn ticks() -> u64 {
    let [seconds, nanos] = sys::local_clock(nr::CLOCK_MONOTONIC).unwrap_or_default();
    (seconds * SECOND + nanos).unsigned_abs()
}

/// Resolution of home's clock `id` in nanoseconds: what every x86-64 kernel with
/// high-resolution timers answers; `None` for clocks that are not time of the day.
pub(crate) const fn resolution(id: u32) -> Option<i64> {
    const TICK: i64 = 4_000_000;
    match id {
        nr::CLOCK_REALTIME_COARSE | nr::CLOCK_MONOTONIC_COARSE => Some(TICK),
        0..=nr::CLOCK_TAI => Some(1),
        _ => None,
    }
}

/// The local clocks, as the node's own.
pub(crate) fn local_clocks() -> Clocks {
    Clocks {
        realtime: sys::clock(nr::CLOCK_REALTIME),
        monotonic: sys::clock(nr::CLOCK_MONOTONIC),
        boottime: sys::clock(nr::CLOCK_BOOTTIME),
        raw: sys::clock(nr::CLOCK_MONOTONIC_RAW),
    }
}

/// Home's clocks, as the program may have read them last.
pub(crate) fn home_clocks() -> Clocks {
    let now = |id| read(id).map_or(0, |[s, n]| s.wrapping_mul(SECOND).wrapping_add(n));
    Clocks {
        realtime: now(nr::CLOCK_REALTIME),
        monotonic: now(nr::CLOCK_MONOTONIC),
        boottime: now(nr::CLOCK_BOOTTIME),
        raw: now(nr::CLOCK_MONOTONIC_RAW),
    }
}
