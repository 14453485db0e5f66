//! Rebuilding a process from its image, around this very code.
//!
//! ```text
//! HEAD ─► AREAS… ─► (shape the address space) ─► PAGES… ─► END ─► (protections)
//! ```
//!
//! On the remote side the address space is empty and every page is new. At home
//! the process was already there: areas are kept where both sides have them, pages
//! are written where they differ, and what did not come is zero. Either way the
//! result is the same memory.
//!
//! A peer's image is checked before it is followed: areas sorted and clear of the
//! region, pages ascending and inside of areas.

use crate::capture::for_each_line;
use crate::link::Frame;
use crate::sys;
use conet_deputy_core::areas::{self, Backing};
use conet_deputy_core::boot;
use conet_wire::image::{
    Area, End, Head, MAX_XSAVE, PAGE, PAGES_PER_FRAME, PageRun, VERSION, area_flags,
    overlaps_region, step,
};
use conet_wire::link::{Refusal, kind};
use linux_raw_sys::errno;
use zerocopy::{FromBytes, IntoBytes};

/// A mapping at home that other processes share.
const SHARED: u32 = 1 << 16;
/// [`PAGE`], as a length.
const PAGE_LEN: usize = 4096;
const READ: u32 = 1;
const WRITE: u32 = 2;
const MAP_FIXED: u32 = 0x10;
const MAP_FIXED_NOREPLACE: u32 = 0x10_0000;
const MAP_NORESERVE: u32 = 0x4000;
const MAP_GROWSDOWN: u32 = 0x100;

/// Where the process is being rebuilt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Remote,
    Home,
}

/// An image on its way in.
#[derive(Debug)]
pub(crate) struct Incoming {
    side: Side,
    has_head: bool,
    is_shaped: bool,
    /// Everything below has been written or cleared.
    cursor: u64,
    /// The area that the cursor is in, and what is known of it.
    index: usize,
    can_read: bool,
    can_write: bool,
    pages: u64,
    changed: u64,
}

fn refuse(step: u32, result: i64, addr: u64) -> Refusal {
    Refusal { step, errno: u32::try_from(-result).unwrap_or(0), addr }
}

const FRAME: Refusal = Refusal { step: step::FRAME, errno: 0, addr: 0 };

/// The image's head, once it is complete.
pub(crate) fn head() -> Head {
    Head::read_from_prefix(sys::slice(boot::STATE, size_of::<Head>()))
        .map_or_else(|_| Head::default(), |(head, _)| head)
}

/// Its vector state.
pub(crate) fn xsave() -> &'static [u8] {
    let len = (head().xsave_len as usize).clamp(512, MAX_XSAVE);
    sys::slice(boot::STATE + boot::STATE_XSAVE, len)
}

impl Incoming {
    pub(crate) const fn new(side: Side) -> Self {
        Self {
            side,
            has_head: false,
            is_shaped: false,
            cursor: 0,
            index: 0,
            can_read: false,
            can_write: false,
            pages: 0,
            changed: 0,
        }
    }

    /// Pages that came, and how many of them differed from what was there.
    pub(crate) const fn pages(&self) -> (u64, u64) {
        (self.pages, self.changed)
    }

    /// Takes a frame; true when the image is complete.
    pub(crate) fn handle(&mut self, frame: &Frame) -> Result<bool, Refusal> {
        let body: &[u8] = sys::state().link.received(frame);
        match frame.header.kind {
            kind::HEAD if !self.has_head => self.take_head(body)?,
            kind::AREAS if self.has_head && !self.is_shaped => take_areas(body)?,
            kind::PAGES if self.has_head => self.take_pages(body)?,
            kind::END if self.has_head => {
                let (end, _) = End::read_from_prefix(body).map_err(|_| FRAME)?;
                self.finish(end)?;
                return Ok(true);
            }
            _ => return Err(FRAME),
        }
        Ok(false)
    }

    fn take_head(&mut self, body: &[u8]) -> Result<(), Refusal> {
        let (head, xsave) = Head::read_from_prefix(body).map_err(|_| FRAME)?;
        let len = head.xsave_len as usize;
        if head.version != VERSION || len != xsave.len() || !(512..=MAX_XSAVE).contains(&len) {
            return Err(refuse(step::VERSION, 0, u64::from(head.version)));
        }
        let bytes = head.as_bytes();
        sys::slice_mut(boot::STATE, bytes.len()).copy_from_slice(bytes);
        sys::slice_mut(boot::STATE + boot::STATE_XSAVE, len).copy_from_slice(xsave);
        sys::lists().area_count = 0;
        self.has_head = true;
        Ok(())
    }

    fn shape(&mut self) -> Result<(), Refusal> {
        if self.is_shaped {
            return Ok(());
        }
        self.is_shaped = true;
        let lists = sys::lists();
        let areas = &lists.areas[..lists.area_count];
        if areas.is_empty() || !areas::well_formed(areas) {
            return Err(FRAME);
        }
        self.cursor = areas[0].start;
        match self.side {
            Side::Remote => {
                lists.present_count = 0;
                areas.iter().try_for_each(|area| {
                    let prot = if area.flags & area_flags::HOLD == 0 { READ | WRITE } else { 0 };
                    map_new(area.start, area.end, prot, area.flags)
                })?;
            }
            Side::Home => shape_home()?,
        }
        self.enter_area();
        Ok(())
    }

    /// Learns what may be done to the pages of the current area.
    fn enter_area(&mut self) {
        let lists = sys::lists();
        let Some(area) = lists.areas[..lists.area_count].get(self.index) else { return };
        if self.side == Side::Remote {
            (self.can_read, self.can_write) = (true, true);
            return;
        }
        let here = present_in(area.start, area.end);
        (self.can_read, self.can_write) = here
            .fold((true, true), |(r, w), p| (r && p.prot & READ != 0, w && p.prot & WRITE != 0));
    }

    fn take_pages(&mut self, body: &[u8]) -> Result<(), Refusal> {
        self.shape()?;
        let (run, data) = PageRun::read_from_prefix(body).map_err(|_| FRAME)?;
        let bytes = run.count.checked_mul(PAGE).ok_or(FRAME)?;
        if run.count == 0
            || run.count > PAGES_PER_FRAME
            || data.len() as u64 != bytes
            || !run.addr.is_multiple_of(PAGE)
            || run.addr < self.cursor
        {
            return Err(refuse(step::PAGE, 0, run.addr));
        }
        self.skip_to(run.addr)?;
        let lists = sys::lists();
        let area = lists.areas[..lists.area_count].get(self.index).copied().unwrap_or_default();
        let end = run.addr.saturating_add(bytes);
        if run.addr < area.start || end > area.end || area.flags & area_flags::HOLD != 0 {
            return Err(refuse(step::PAGE, 0, run.addr));
        }
        match self.side {
            Side::Remote => sys::slice_mut(run.addr, data.len()).copy_from_slice(data),
            Side::Home => self.write_changed(&area, run.addr, data)?,
        }
        self.pages += run.count;
        self.cursor = end;
        Ok(())
    }

    /// Moves the cursor to `addr`; what it passes has not been sent and is zero.
    fn skip_to(&mut self, addr: u64) -> Result<(), Refusal> {
        let lists = sys::lists();
        while let Some(area) = lists.areas[..lists.area_count].get(self.index) {
            let until = addr.min(area.end);
            if self.cursor < until {
                if self.side == Side::Home {
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

    fn unlock(&mut self, area: &Area) -> Result<(), Refusal> {
        for part in present_in(area.start, area.end) {
            let prot = if part.flags & SHARED == 0 { READ | WRITE } else { READ };
            let (start, end) = (part.start.max(area.start), part.end.min(area.end));
            let result = sys::protect(start, end - start, prot);
            if result < 0 {
                return Err(refuse(step::PROTECT, result, start));
            }
        }
        (self.can_read, self.can_write) = (true, true);
        Ok(())
    }

    fn finish(&mut self, end: End) -> Result<(), Refusal> {
        self.shape()?;
        let lists = sys::lists();
        if end.areas != lists.area_count as u64 || end.pages != self.pages {
            return Err(FRAME);
        }
        self.skip_to(u64::MAX)?;
        if self.side == Side::Remote {
            patch_vdso()?;
        }
        for area in &lists.areas[..lists.area_count] {
            if area.flags & area_flags::HOLD != 0 {
                continue;
            }
            let result = sys::protect(area.start, area.len(), area.prot);
            let is_shared = self.side == Side::Home
                && present_in(area.start, area.end).any(|p| p.flags & SHARED != 0);
            if result < 0 && !is_shared {
                return Err(refuse(step::PROTECT, result, area.start));
            }
        }
        Ok(())
    }
}

fn take_areas(body: &[u8]) -> Result<(), Refusal> {
    let lists = sys::lists();
    let mut rest = body;
    while !rest.is_empty() {
        let (area, tail) = Area::read_from_prefix(rest).map_err(|_| FRAME)?;
        *lists.areas.get_mut(lists.area_count).ok_or(FRAME)? = area;
        lists.area_count += 1;
        rest = tail;
    }
    Ok(())
}

fn map_new(start: u64, end: u64, prot: u32, flags: u32) -> Result<(), Refusal> {
    let grows = if flags & area_flags::GROWS_DOWN != 0 { MAP_GROWSDOWN } else { 0 };
    let how = MAP_FIXED_NOREPLACE | MAP_NORESERVE | grows;
    let result = sys::map(start, end - start, prot, how);
    if result == start.cast_signed() {
        Ok(())
    } else {
        Err(refuse(step::MAP, if result < 0 { result } else { -i64::from(errno::EEXIST) }, start))
    }
}

/// Mappings of home that overlap a range.
fn present_in(start: u64, end: u64) -> impl Iterator<Item = &'static Area> {
    let lists = sys::lists();
    let present = &lists.present[..lists.present_count];
    let first = present.partition_point(|p| p.end <= start);
    present[first..].iter().take_while(move |p| p.start < end)
}

/// Makes home's address space have the image's areas, keeping what both have.
fn shape_home() -> Result<(), Refusal> {
    let wanted = head().memory_map.brk;
    if wanted != 0 && sys::brk(0) != wanted && sys::brk(wanted) != wanted {
        return Err(refuse(step::MAP, -i64::from(errno::ENOMEM), wanted));
    }
    read_present()?;
    let lists = sys::lists();
    let areas = &lists.areas[..lists.area_count];
    for have in &lists.present[..lists.present_count] {
        if have.flags & (area_flags::VDSO | area_flags::HOLD) != 0 {
            continue;
        }
        for (start, end) in areas::gaps((have.start, have.end), areas) {
            let result = sys::unmap(start, end - start);
            if result < 0 {
                return Err(refuse(step::MAP, result, start));
            }
        }
    }
    let mut added = false;
    for area in areas {
        for (start, end) in
            areas::gaps((area.start, area.end), &lists.present[..lists.present_count])
        {
            added = true;
            if area.flags & area_flags::GROWS_DOWN != 0 && end < area.end {
                // The stack grew: touch its new end, and the kernel grows it here.
                sys::slice_mut(start, 1)[0] = 0;
            } else {
                map_new(start, end, READ | WRITE, area.flags)?;
            }
        }
    }
    if added { read_present() } else { Ok(()) }
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

/// Patches the copy of home's vDSO, and notes what must not travel home.
fn patch_vdso() -> Result<(), Refusal> {
    let lists = sys::lists();
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
