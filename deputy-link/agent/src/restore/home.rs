//! Home's part of rebuilding: what was here meets what comes.

use super::{
    FRAME, Incoming, MAP_FIXED, PAGE_LEN, READ, SHARED, WRITE, area_of, head, map_new, refuse,
};
use crate::capture::for_each_line;
use crate::sys;
use conet_deputy_core::areas::{self, Backing};
use conet_wire::image::{Area, PAGE, PageRun, area_flags, overlaps_region, step};
use conet_wire::link::Refusal;
use linux_raw_sys::errno;

/// Mappings of home that are not replaced by others.
const KEPT: u32 =
    area_flags::FILE | area_flags::GROWS_DOWN | area_flags::HOLD | area_flags::VDSO | SHARED;

impl Incoming {
    /// Writes what differs.
    pub(super) fn merge(&mut self, run: PageRun, bytes: &[u8]) -> Result<(), Refusal> {
        let area = self.advance(run)?;
        self.write_changed(&area, run.addr, bytes)
    }

    /// Makes pages read as zero.
    pub(super) fn merge_gone(&mut self, run: PageRun) -> Result<(), Refusal> {
        let area = self.advance(run)?;
        let end = run.end().ok_or(FRAME)?;
        for part in present_in(run.addr, end) {
            let (from, to) = (part.start.max(run.addr), part.end.min(end));
            if part.flags & (area_flags::FILE | SHARED) == 0 {
                clear(from, to)?;
                continue;
            }
            // What lies behind a file's end was never sent, and stays as it is.
            let mut copy = [0u8; PAGE_LEN];
            for at in (from..to).step_by(PAGE_LEN) {
                if sys::try_read(at, &mut copy) {
                    self.write_changed(&area, at, &[0; PAGE_LEN])?;
                }
            }
        }
        Ok(())
    }

    /// Goes to a run and over it.
    fn advance(&mut self, run: PageRun) -> Result<Area, Refusal> {
        if run.addr < self.cursor {
            return Err(refuse(step::PAGE, 0, run.addr));
        }
        let area = *area_of(run)?;
        self.skip_to(run.addr)?;
        self.cursor = run.end().ok_or(FRAME)?;
        Ok(area)
    }

    /// Learns what may be done to the pages of the current area.
    pub(super) fn enter_area(&mut self) {
        let lists = sys::lists();
        let Some(area) = lists.areas[..lists.area_count].get(self.index) else { return };
        let here = present_in(area.start, area.end);
        (self.can_read, self.can_write) = here
            .fold((true, true), |(r, w), p| (r && p.prot & READ != 0, w && p.prot & WRITE != 0));
    }

    /// Moves the cursor to `addr`; what it passes has not been mentioned, and is zero
    /// unless this is a delta.
    pub(super) fn skip_to(&mut self, addr: u64) -> Result<(), Refusal> {
        let lists = sys::lists();
        while let Some(area) = lists.areas[..lists.area_count].get(self.index) {
            let until = addr.min(area.end);
            if self.cursor < until {
                if !self.is_delta {
                    clear(self.cursor.max(area.start), until)?;
                }
                self.cursor = until;
            }
            if addr < area.end {
                break;
            }
            self.index += 1;
            if let Some(next) = lists.areas[..lists.area_count].get(self.index) {
                self.cursor = self.cursor.max(next.start);
            }
            self.enter_area();
        }
        Ok(())
    }

    fn write_changed(&mut self, area: &Area, addr: u64, data: &[u8]) -> Result<(), Refusal> {
        if !self.can_read {
            self.unlock(area)?;
        }
        let mut copy = [0u8; PAGE_LEN];
        for (i, page) in data.as_chunks::<PAGE_LEN>().0.iter().enumerate() {
            let at = addr + PAGE * i as u64;
            let here = present_in(at, at + PAGE).next().map_or(0, |p| p.flags);
            let is_file = here & (area_flags::FILE | SHARED) != 0;
            let is_same = if !is_file {
                sys::slice(at, page.len()) == page
            } else if sys::try_read(at, &mut copy) {
                &copy == page
            } else {
                // Behind the file's end, where the program has mapped memory of its own.
                let result = sys::map(at, PAGE, READ | WRITE, MAP_FIXED);
                if result < 0 {
                    return Err(refuse(step::MAP, result, at));
                }
                false
            };
            if is_same {
                continue;
            }
            if !self.can_write {
                // A shared file that somebody else has changed: home's is right.
                if here & SHARED != 0 {
                    continue;
                }
                self.unlock(area)?;
            }
            sys::slice_mut(at, page.len()).copy_from_slice(page);
            self.changed += 1;
        }
        Ok(())
    }

    /// Lets this side read and write an area, and all of the mappings that it lies in: the
    /// kernel accounts for what was writable, and would not join the parts again.
    fn unlock(&mut self, area: &Area) -> Result<(), Refusal> {
        for part in present_in(area.start, area.end) {
            let prot = if part.flags & SHARED == 0 { READ | WRITE } else { READ };
            let (start, end) = (part.start, part.end);
            let result = sys::protect(start, end - start, prot);
            if result < 0 {
                return Err(refuse(step::PROTECT, result, start));
            }
        }
        (self.can_read, self.can_write) = (true, true);
        Ok(())
    }
}

/// Whether other processes share part of what home has there.
pub(super) fn is_shared(area: &Area) -> bool {
    present_in(area.start, area.end).any(|part| part.flags & SHARED != 0)
}

/// Mappings of home that overlap a range.
fn present_in(start: u64, end: u64) -> impl Iterator<Item = &'static Area> {
    let lists = sys::lists();
    let present = &lists.present[..lists.present_count];
    let first = present.partition_point(|p| p.end <= start);
    present[first..].iter().take_while(move |p| p.start < end)
}

/// Makes home's address space have the image's areas, keeping what both have.
///
/// A mapping of the program stays one mapping, or a later `mremap` of it would fail:
/// what is new is mapped anew as a whole, and what has grown grows.
pub(super) fn shape(is_delta: bool) -> Result<(), Refusal> {
    let wanted = head().memory_map.brk;
    if wanted != 0 && sys::brk(0) != wanted && sys::brk(wanted) != wanted {
        return Err(refuse(step::MAP, -i64::from(errno::ENOMEM), wanted));
    }
    read_present()?;
    if !is_delta {
        renew_pieces();
    }
    unmap_others()?;
    let lists = sys::lists();
    let mut added = false;
    for area in &lists.areas[..lists.area_count] {
        for (start, end) in
            areas::gaps((area.start, area.end), &lists.present[..lists.present_count])
        {
            added = true;
            let is_grown = (start > area.start || area.flags & area_flags::JOINED != 0)
                && ends_anonymous(start);
            if area.flags & area_flags::GROWS_DOWN != 0 && end < area.end {
                // The stack grew: touch its new end, and the kernel grows it here.
                sys::slice_mut(start, 1)[0] = 0;
            } else if !is_grown || sys::grow(start, end - start) < 0 {
                map_new((start, end), READ | WRITE, area.flags)?;
            }
        }
    }
    if added { read_present() } else { Ok(()) }
}

/// Whether anonymous memory of home's ends at `addr`.
fn ends_anonymous(addr: u64) -> bool {
    const OTHER: u32 = area_flags::FILE | area_flags::HOLD | area_flags::VDSO | SHARED;
    addr >= PAGE && present_in(addr - PAGE, addr).any(|part| part.flags & OTHER == 0)
}

/// Where all pages come, it is not known what is new; an area that is here in pieces is
/// made anew.
fn renew_pieces() {
    let lists = sys::lists();
    for area in &mut lists.areas[..lists.area_count] {
        let (mut pieces, mut covered) = (0, 0);
        for part in present_in(area.start, area.end) {
            covered += part.end.min(area.end) - part.start.max(area.start);
            pieces += u32::from(part.flags & KEPT == 0);
        }
        if pieces > 1 || pieces == 1 && covered < area.len() {
            area.flags |= area_flags::NEW;
        }
    }
}

/// Unmaps what the image has not: also anonymous memory where it has another area.
fn unmap_others() -> Result<(), Refusal> {
    let unmap = |start: u64, end: u64| match sys::unmap(start, end - start) {
        result if result < 0 => Err(refuse(step::MAP, result, start)),
        _ => Ok(()),
    };
    let lists = sys::lists();
    let areas = &lists.areas[..lists.area_count];
    let mut changed = false;
    for have in &lists.present[..lists.present_count] {
        if have.flags & (area_flags::VDSO | area_flags::HOLD) != 0 {
            continue;
        }
        for (start, end) in areas::gaps((have.start, have.end), areas) {
            unmap(start, end)?;
            changed = true;
        }
        if have.flags & KEPT != 0 {
            continue;
        }
        let first = areas.partition_point(|area| area.end <= have.start);
        for area in areas[first..].iter().take_while(|area| area.start < have.end) {
            if area.flags & area_flags::NEW != 0 {
                unmap(have.start.max(area.start), have.end.min(area.end))?;
                changed = true;
            }
        }
    }
    if changed { read_present() } else { Ok(()) }
}

/// Lists home's mappings.
fn read_present() -> Result<(), Refusal> {
    let lists = sys::lists();
    lists.present_count = 0;
    let read = for_each_line(lists.maps, |line| {
        if overlaps_region(line.start, line.end) || line.backing == Backing::Vsyscall {
            return Some(());
        }
        let mut area = line.area();
        if line.shared {
            area.flags |= SHARED;
        }
        if line.backing == Backing::Vdso {
            area.flags |= area_flags::VDSO;
        }
        *lists.present.get_mut(lists.present_count)? = area;
        lists.present_count += 1;
        Some(())
    });
    read.ok_or_else(|| refuse(step::MAP, -i64::from(errno::E2BIG), 0))
}

/// Makes `start..end` of home's memory read as zero.
fn clear(start: u64, end: u64) -> Result<(), Refusal> {
    for part in present_in(start, end) {
        let (from, to) = (part.start.max(start), part.end.min(end));
        let result = if part.flags & (area_flags::FILE | SHARED) == 0 {
            sys::discard(from, to - from)
        } else {
            // Here lies a file, there anonymous memory that nobody has touched.
            sys::map(from, to - from, READ | WRITE, MAP_FIXED).min(0)
        };
        if result < 0 {
            return Err(refuse(step::MAP, result, from));
        }
    }
    Ok(())
}
