//! Rebuilding a process from its image, around this very code.
//!
//! ```text
//! remote: (AREAS… ─► PAGES, GONE… ─► ROUND)* ─► HEAD ─► AREAS… ─► PAGES, GONE… ─► END
//! home:   HEAD ─► AREAS… ─► PAGES, GONE… ─► END
//! ```
//!
//! On the remote side ([`remote`]) the address space is empty at first, follows home's
//! round by round, and what was never sent is zero. At home ([`home`]) the process was
//! already there: areas are kept where both sides have them, and pages are written
//! where they differ; what did not come is zero, or, in a delta, what it was. Either
//! way the result is the same memory.
//!
//! A peer's image is checked before it is followed: areas sorted and clear of the
//! region, pages inside of areas; at home also ascending.

mod home;
mod remote;

use crate::link::Frame;
use crate::{sys, tracking};
use conet_deputy_core::areas;
use conet_deputy_core::boot;
use conet_wire::image::{
    Area, End, Head, MAX_XSAVE, PageRun, VERSION, area_flags, head_flags, step,
};
use conet_wire::link::{Refusal, kind};
use conet_wire::pages::{BadPages, parse_gone, parse_pages};
use linux_raw_sys::errno;
use zerocopy::{FromBytes, IntoBytes};

/// A mapping at home that other processes share.
const SHARED: u32 = 1 << 16;
/// Bytes of a page.
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
    /// A list of areas is coming in: its sequence.
    list: Option<u32>,
    /// The address space has the shape of a list.
    is_shaped: bool,
    /// What is not mentioned is as it is here.
    is_delta: bool,
    /// Remote: what came in earlier rounds is protected.
    is_armed: bool,
    /// Home: everything below has been dealt with.
    cursor: u64,
    /// Home: the area that the cursor is in, and what is known of it.
    index: usize,
    can_read: bool,
    can_write: bool,
    pages: u64,
    changed: u64,
}

fn refuse(step: u32, result: i64, addr: u64) -> Refusal {
    Refusal { step, errno: u32::try_from(-result).unwrap_or(0), addr }
}

fn bad_pages(bad: BadPages) -> Refusal {
    refuse(step::PAGE, -i64::from(errno::EINVAL), bad.addr)
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
            list: None,
            is_shaped: false,
            is_delta: false,
            is_armed: false,
            cursor: 0,
            index: 0,
            can_read: false,
            can_write: false,
            pages: 0,
            changed: 0,
        }
    }

    /// A slice of what has changed, which has no head of its own.
    pub(crate) const fn slice() -> Self {
        Self { has_head: true, is_delta: true, ..Self::new(Side::Home) }
    }

    /// Pages that came, and how many of them differed from what was there.
    pub(crate) const fn pages(&self) -> (u64, u64) {
        (self.pages, self.changed)
    }

    /// Whether only what has changed came.
    pub(crate) const fn is_delta(&self) -> bool {
        self.is_delta
    }

    /// Takes a frame; true when the image is complete.
    pub(crate) fn handle(&mut self, frame: &Frame) -> Result<bool, Refusal> {
        let body: &[u8] = sys::state().link.received(frame);
        if self.side == Side::Home && !self.has_head && frame.header.kind != kind::HEAD {
            return Err(FRAME);
        }
        match frame.header.kind {
            kind::HEAD if !self.has_head => self.take_head(body)?,
            kind::AREAS => self.take_areas(frame.header.seq, body)?,
            kind::PAGES => {
                self.shape()?;
                for (run, bytes) in parse_pages(body).map_err(bad_pages)? {
                    match self.side {
                        Side::Remote => self.place(run, bytes)?,
                        Side::Home => self.merge(run, bytes)?,
                    }
                    self.pages += run.count;
                }
            }
            kind::GONE => {
                self.shape()?;
                for run in parse_gone(body).map_err(bad_pages)? {
                    match self.side {
                        Side::Remote => remote::discard(run)?,
                        Side::Home => self.merge_gone(run)?,
                    }
                }
            }
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
        self.is_delta = self.side == Side::Home && head.flags & head_flags::DELTA != 0;
        self.has_head = true;
        Ok(())
    }

    fn take_areas(&mut self, seq: u32, body: &[u8]) -> Result<(), Refusal> {
        if self.side == Side::Home && self.is_shaped {
            return Err(FRAME);
        }
        if self.list.is_some_and(|list| list != seq) {
            self.shape()?;
        }
        let lists = sys::lists();
        if self.list.is_none() {
            lists.area_count = 0;
            self.list = Some(seq);
        }
        let mut rest = body;
        while !rest.is_empty() {
            let (area, tail) = Area::read_from_prefix(rest).map_err(|_| FRAME)?;
            *lists.areas.get_mut(lists.area_count).ok_or(FRAME)? = area;
            lists.area_count += 1;
            rest = tail;
        }
        Ok(())
    }

    /// Gives the address space the shape of the list that has come in, if one has.
    fn shape(&mut self) -> Result<(), Refusal> {
        if self.list.take().is_none() {
            return if self.is_shaped { Ok(()) } else { Err(FRAME) };
        }
        self.is_shaped = true;
        let lists = sys::lists();
        let areas = &lists.areas[..lists.area_count];
        if areas.is_empty() || !areas::well_formed(areas) {
            return Err(FRAME);
        }
        match self.side {
            Side::Remote => {
                remote::shape()?;
                if self.is_armed {
                    tracking::register();
                }
                Ok(())
            }
            Side::Home => {
                self.cursor = areas[0].start;
                home::shape(self.is_delta)?;
                self.enter_area();
                Ok(())
            }
        }
    }

    fn finish(&mut self, end: End) -> Result<(), Refusal> {
        self.shape()?;
        let lists = sys::lists();
        if end.areas != lists.area_count as u64 || end.pages != self.pages {
            return Err(FRAME);
        }
        match self.side {
            Side::Remote => {
                // What is patched does not go home, so it need not be tracked.
                if !self.is_armed {
                    tracking::arm();
                }
                remote::patch_vdso()?;
                lists.base[..lists.area_count].copy_from_slice(&lists.areas[..lists.area_count]);
                lists.base_count = lists.area_count;
            }
            Side::Home => self.skip_to(u64::MAX)?,
        }
        for area in &lists.areas[..lists.area_count] {
            if area.flags & area_flags::HOLD != 0 {
                continue;
            }
            let result = sys::protect(area.start, area.len(), area.prot);
            let is_shared = self.side == Side::Home && home::is_shared(area);
            if result < 0 && !is_shared {
                return Err(refuse(step::PROTECT, result, area.start));
            }
        }
        Ok(())
    }
}

/// The area of the list that a run lies in, all of it; none that is held free.
fn area_of(run: PageRun) -> Result<&'static Area, Refusal> {
    let lists = sys::lists();
    let areas = &lists.areas[..lists.area_count];
    let end = run.end().ok_or(FRAME)?;
    let index = areas.partition_point(|area| area.end <= run.addr);
    areas
        .get(index)
        .filter(|area| area.start <= run.addr && end <= area.end)
        .filter(|area| area.flags & area_flags::HOLD == 0)
        .ok_or_else(|| refuse(step::PAGE, -i64::from(errno::EFAULT), run.addr))
}

/// Maps zeros; `flags` are an area's.
fn map_new((start, end): (u64, u64), prot: u32, flags: u32) -> Result<(), Refusal> {
    let grows = if flags & area_flags::GROWS_DOWN != 0 { MAP_GROWSDOWN } else { 0 };
    let how = MAP_FIXED_NOREPLACE | grows;
    let mut result = sys::map(start, end - start, prot, how);
    if result == -i64::from(errno::ENOMEM) {
        // More than the kernel would promise: the program reserves more than it uses.
        result = sys::map(start, end - start, prot, how | MAP_NORESERVE);
    }
    if result == start.cast_signed() {
        Ok(())
    } else {
        Err(refuse(step::MAP, if result < 0 { result } else { -i64::from(errno::EEXIST) }, start))
    }
}
