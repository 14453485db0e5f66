//! The remote side's part of rebuilding: an address space that follows home's.

use super::{FRAME, Incoming, READ, WRITE, area_of, head, map_new, refuse};
use crate::{sys, tracking};
use conet_deputy_core::areas;
use conet_wire::image::{Area, PageRun, area_flags, step};
use conet_wire::link::Refusal;

/// What makes two areas at one address different ones.
const KIND: u32 = area_flags::GROWS_DOWN | area_flags::HOLD | area_flags::VDSO;

impl Incoming {
    /// Writes pages where they belong.
    pub(super) fn place(&self, run: PageRun, bytes: &[u8]) -> Result<(), Refusal> {
        area_of(run)?;
        sys::slice_mut(run.addr, bytes.len()).copy_from_slice(bytes);
        // In a round its end does this, for all at once.
        if self.has_head && self.is_armed {
            tracking::arm_range(run.addr, run.addr + bytes.len() as u64);
        }
        Ok(())
    }

    /// Home's program runs on; what has come so far is in place.
    pub(crate) fn end_round(&mut self) -> Result<(), Refusal> {
        if self.has_head {
            return Err(FRAME);
        }
        self.shape()?;
        tracking::arm();
        self.is_armed = true;
        Ok(())
    }
}

/// Makes pages read as zero.
pub(super) fn discard(run: PageRun) -> Result<(), Refusal> {
    let end = run.end().ok_or(FRAME)?;
    area_of(run)?;
    match sys::discard(run.addr, end - run.addr) {
        result if result < 0 => Err(refuse(step::PAGE, result, run.addr)),
        _ => Ok(()),
    }
}

/// Maps and unmaps what the new list and the one before do not have in common.
pub(super) fn shape() -> Result<(), Refusal> {
    let lists = sys::lists();
    let areas = &lists.areas[..lists.area_count];
    let old = &lists.present[..lists.present_count];
    for area in areas {
        let first = old.partition_point(|have| have.end <= area.start);
        let mut here = old[first..].iter().take_while(|have| have.start < area.end);
        let is_kept = area.flags & area_flags::NEW == 0;
        if is_kept && here.any(|have| (have.flags ^ area.flags) & KIND != 0) {
            return Err(refuse(step::MAP, 0, area.start));
        }
    }
    let unmap = |start: u64, end: u64| match sys::unmap(start, end - start) {
        result if result < 0 => Err(refuse(step::MAP, result, start)),
        _ => Ok(()),
    };
    for have in old {
        for (start, end) in areas::gaps((have.start, have.end), areas) {
            unmap(start, end)?;
        }
    }
    // A mapping of the program stays one mapping, or its `mremap` of it would fail.
    let is_new = |area: &&Area| area.flags & area_flags::NEW != 0;
    for area in areas.iter().filter(is_new) {
        if areas::gaps((area.start, area.end), old).ne([(area.start, area.end)]) {
            unmap(area.start, area.end)?;
        }
    }
    for area in areas {
        let prot = if area.flags & area_flags::HOLD == 0 { READ | WRITE } else { 0 };
        if is_new(&area) {
            map_new((area.start, area.end), prot, area.flags)?;
            continue;
        }
        for (start, end) in areas::gaps((area.start, area.end), old) {
            map_new((start, end), prot, area.flags)?;
        }
    }
    lists.present[..areas.len()].copy_from_slice(areas);
    lists.present_count = areas.len();
    Ok(())
}

/// Patches the copy of home's vDSO, and notes what must not travel home.
pub(super) fn patch_vdso() -> Result<(), Refusal> {
    let lists = sys::lists();
    lists.present_count = 0;
    for area in &lists.areas[..lists.area_count] {
        if area.flags & (area_flags::VDSO | area_flags::HOLD) == 0 {
            continue;
        }
        if area.flags & area_flags::VDSO != 0 {
            let entries = head().vdso;
            for at in [
                entries.clock_gettime,
                entries.gettimeofday,
                entries.time,
                entries.clock_getres,
                entries.getcpu,
                entries.getrandom,
            ] {
                if at != 0 && !(area.start..area.end - 16).contains(&at) {
                    return Err(refuse(step::VDSO, 0, at));
                }
            }
            sys::patch(area.start, &entries);
        }
        lists.present[lists.present_count] = *area;
        lists.present_count += 1;
    }
    Ok(())
}
