//! Slices: what the program has changed goes home bit by bit, while it runs.
//!
//! ```text
//! SLICE ─ AREAS (own maps) ─ PAGES, GONE (so many) ─ END ─ the program goes on
//! ```
//!
//! The warden asks, between two instructions of the program. Its deputy merges what
//! comes as it does when the program comes home, and from then on that is what home has:
//! less is left for the moment when the program leaves. Both halves agree on what home
//! has because there is one link, on which everything arrives once and in order; where
//! the link ends, so do both halves.
//!
//! A slice is small, since the program stands still for it (some 0.5 ms). It begins where
//! the one before has ended; pages are protected before they are read, so what the kernel
//! itself writes between the two counts as changed.

use crate::capture::{self, Outgoing};
use crate::link::Broken;
use crate::{sys, tracking};
use conet_deputy_core::scan::{Verdict, verdict};
use conet_wire::image::{Area, End, PAGE, PageRun};
use conet_wire::link::kind;

const READ: u32 = 1;
/// Most pages of a slice, and runs of gone pages.
const BUDGET: u64 = 128;

/// Sends the next slice.
pub(crate) fn send() -> Result<(), Broken> {
    let state = sys::state();
    if !state.remote.tracks {
        return Ok(());
    }
    // More areas than an image can have: they may be fewer when it leaves.
    let Some(count) = capture::list_areas() else { return Ok(()) };
    state.link.send_value(kind::SLICE, 0, &sys::brk(0))?;
    capture::send_areas(count)?;
    // What is new home maps as zeros; from now on it is known here, and all of it is
    // still to be sent.
    let lists = sys::lists();
    if !tracking::register_new(&lists.leaving[..count]) {
        // All of it goes home then, whatever it is.
        state.remote.tracks = false;
        return state.link.send_value(kind::END, 0, &End { areas: count as u64, pages: 0 });
    }
    lists.base[..count].copy_from_slice(&lists.leaving[..count]);
    lists.base_count = count;
    let mut out = Outgoing::new();
    let end = send_changes(&lists.leaving[..count], state.remote.slice_at, &mut out)?;
    out.flush()?;
    state.remote.slice_at = end.unwrap_or(0);
    let seq = u32::from(end.is_none());
    state.link.send_value(kind::END, seq, &End { areas: count as u64, pages: out.sent })
}

/// Sends what has changed from `at` on, as far as a slice goes; where the next begins,
/// none where nothing is left.
fn send_changes(areas: &[Area], at: u64, out: &mut Outgoing) -> Result<Option<u64>, Broken> {
    let mut left = BUDGET;
    // What may not be read keeps its changes until it may, or the program leaves.
    for area in areas.iter().filter(|area| area.end > at && area.prot & READ != 0) {
        let rest = Area { start: area.start.max(at), ..*area };
        let (mut result, mut next) = (Ok(()), area.end);
        out.batch.cut();
        // Where it cannot be told, as little.
        let _told = tracking::changes(&rest, |region| {
            let pages = (region.end - region.start) / PAGE;
            let (count, cost) = match verdict(region.categories) {
                Verdict::Keep => return Some(()),
                Verdict::Send => (pages.min(left), pages.min(left)),
                Verdict::Zero => (pages, 1),
            };
            let run = PageRun { addr: region.start, count };
            let end = region.start + count * PAGE;
            tracking::arm_range(region.start, end);
            let is_gone = verdict(region.categories) == Verdict::Zero;
            result = if is_gone { out.gone(run) } else { out.send(run) };
            left -= cost;
            if left == 0 {
                next = end;
            }
            (result.is_ok() && left > 0).then_some(())
        });
        result?;
        if left == 0 {
            return Ok(Some(next));
        }
    }
    Ok(None)
}
