//! Going home: the program's state is the signal frame, its memory is all around.
//!
//! ```text
//! HEAD (frame, vector state, why) ─ AREAS (own maps) ─ PAGES, GONE (what has changed) ─ END
//! ```
//!
//! Where the kernel cannot tell what has changed ([`crate::tracking`]), all pages that
//! are present go home, and the rest is zero.
//!
//! From HEAD on there is no way back: this half ends when home has closed the link.

use crate::link::Broken;
use crate::sys::{self, Context};
use crate::{clock, tracking, trap};
use conet_deputy_core::areas::{self, Backing};
use conet_deputy_core::scan::{self, Verdict};
use conet_wire::image::{
    AREAS_PER_FRAME, Area, End, Head, MAX_AREAS, MAX_XSAVE, MemoryMap, PAGE, PageRun, Registers,
    VERSION, area_flags, head_flags, overlaps_region,
};
use conet_wire::link::kind;
use conet_wire::pages::PageBatch;
use zerocopy::IntoBytes;

const READ: u32 = 1;
/// Runs of gone pages that share a frame.
const GONE_BATCH: usize = 256;

/// How the program leaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leave {
    /// Whether its system call (two bytes long) is to be issued again at home.
    pub(crate) rewind: bool,
    /// Whether its system call is pending at home.
    pub(crate) pending: bool,
    /// One of [`conet_wire::image::reason`].
    pub(crate) reason: u32,
    /// Its detail.
    pub(crate) detail: u64,
}

/// Sends the program home from a handler; this process ends.
pub(crate) fn go_home(context: &Context, leave: Leave) -> ! {
    let mut xsave = [0; MAX_XSAVE];
    let len = context.copy_xsave(&mut xsave);
    let mut registers = context.registers();
    if leave.rewind {
        registers.rip = registers.rip.wrapping_sub(2);
    }
    send_home(&registers, &xsave[..len], leave)
}

/// Sends the program home in this state; this process ends.
pub(crate) fn send_home(registers: &Registers, xsave: &[u8], leave: Leave) -> ! {
    if send_all(registers, xsave, leave).is_ok() {
        // Home closes when it has everything.
        let mut byte = [0];
        while sys::receive(sys::state().link.fd, &mut byte, 0) > 0 {}
    }
    trap::give_up()
}

fn send_all(registers: &Registers, xsave: &[u8], leave: Leave) -> Result<(), Broken> {
    send_head(registers, xsave, leave)?;
    let count = list_areas().ok_or(Broken::Forged)?;
    send_areas(count)?;
    let (state, lists) = (sys::state(), sys::lists());
    let mut out = Outgoing::new();
    for area in &lists.leaving[..count] {
        let is_hidden = area.prot & READ == 0;
        if is_hidden {
            sys::protect(area.start, area.len(), READ);
        }
        out.batch.cut();
        if state.remote.tracks {
            send_changes(area, &mut out)?;
        } else {
            send_present(area, &mut out)?;
        }
        if is_hidden {
            // What was gathered is read as it is sent; and the memory may be a parent's,
            // too, that stays.
            out.flush()?;
            sys::protect(area.start, area.len(), area.prot);
        }
    }
    out.flush()?;
    state.link.send_value(kind::END, 0, &End { areas: count as u64, pages: out.sent })
}

fn send_head(registers: &Registers, xsave: &[u8], leave: Leave) -> Result<(), Broken> {
    let state = sys::state();
    let len = xsave.len();
    let (robust_addr, robust_len) = sys::robust_list();
    let head = Head {
        version: VERSION,
        xsave_len: u32::try_from(len).unwrap_or(0),
        registers: *registers,
        blocked: state.remote.signals.blocked,
        handled: state.remote.signals.handled,
        memory_map: MemoryMap { brk: sys::brk(0), ..MemoryMap::default() },
        pending: u32::from(leave.pending),
        reason: leave.reason,
        detail: leave.detail,
        flags: if state.remote.tracks { head_flags::DELTA } else { 0 },
        clocks: clock::home_clocks(),
        robust_addr,
        robust_len,
        ..Head::default()
    };
    let body = state.link.body();
    let head = head.as_bytes();
    body[..head.len()].copy_from_slice(head);
    body[head.len()..head.len() + len].copy_from_slice(xsave);
    state.link.send(kind::HEAD, 0, head.len() + len)
}

/// Sends the list that [`list_areas`] has made.
pub(crate) fn send_areas(count: usize) -> Result<(), Broken> {
    let link = &mut sys::state().link;
    for chunk in sys::lists().leaving[..count].chunks(AREAS_PER_FRAME) {
        let bytes = chunk.as_bytes();
        link.body()[..bytes.len()].copy_from_slice(bytes);
        link.send(kind::AREAS, 0, bytes.len())?;
    }
    Ok(())
}

/// Lists what of this address space is the program's, into the state's list of what is leaving.
pub(crate) fn list_areas() -> Option<usize> {
    let (maps, tracks) = (sys::state().remote.maps, sys::state().remote.tracks);
    let lists = sys::lists();
    let held = &lists.present[..lists.present_count];
    let out = &mut lists.leaving;
    let mut count = 0;
    for_each_line(maps, |line| {
        if overlaps_region(line.start, line.end) || line.backing == Backing::Vsyscall {
            return Some(());
        }
        let area = line.area();
        let mut add = |start, end, more| {
            // What is held here for home may have merged with its neighbours.
            for (start, end) in areas::gaps((start, end), held) {
                let flags = area.flags | more;
                *out.get_mut(count)? = Area { start, end, flags, ..area };
                count += 1;
            }
            Some(())
        };
        let range = (line.start, line.end);
        if !tracks || line.backing == Backing::Stack {
            add(line.start, line.end, 0)
        } else if tracking::is_known(range) {
            tracking::parts(range, add)
        } else {
            add(line.start, line.end, area_flags::NEW)
        }
    })?;
    (count <= MAX_AREAS).then_some(count)
}

/// Calls `each` for every line of a maps file; `None` if one is not understood or
/// `each` gives up.
pub(crate) fn for_each_line(
    maps: i32,
    mut each: impl FnMut(areas::Line<'_>) -> Option<()>,
) -> Option<()> {
    sys::rewind(maps);
    let mut buffer = [0u8; 8192];
    let mut filled = 0;
    loop {
        let n = usize::try_from(sys::read(maps, &mut buffer[filled..])).ok()?;
        if n == 0 {
            return (filled == 0).then_some(());
        }
        filled += n;
        let mut rest = &buffer[..filled];
        while let Some(end) = rest.iter().position(|&b| b == b'\n') {
            each(areas::parse_line(&rest[..end])?)?;
            rest = &rest[end + 1..];
        }
        let left = rest.len();
        buffer.copy_within(filled - left..filled, 0);
        filled = left;
    }
}

/// Sends an area's pages that are there.
fn send_present(area: &Area, out: &mut Outgoing) -> Result<(), Broken> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const BATCH: usize = 512;
    let pagemap = sys::state().remote.pagemap;
    let mut entries = [0u8; 8 * BATCH];
    let mut at = area.start;
    while at < area.end {
        let want = usize::try_from((area.end - at) / PAGE).unwrap_or(BATCH).min(BATCH);
        let got = sys::pread(pagemap, &mut entries[..8 * want], at / PAGE * 8);
        if got != 8 * want as i64 {
            return Err(Broken::End);
        }
        for entry in entries[..8 * want].as_chunks::<8>().0 {
            if u64::from_le_bytes(*entry) & (PRESENT | SWAPPED) != 0 {
                out.send(PageRun { addr: at, count: 1 })?;
            }
            at += PAGE;
        }
    }
    Ok(())
}

/// Sends what has changed of an area.
fn send_changes(area: &Area, out: &mut Outgoing) -> Result<(), Broken> {
    let mut result = Ok(());
    let known = tracking::changes(area, |region| {
        let run = PageRun { addr: region.start, count: (region.end - region.start) / PAGE };
        result = match scan::verdict(region.categories) {
            Verdict::Keep => Ok(()),
            Verdict::Send => out.send(run),
            Verdict::Zero => out.gone(run),
        };
        result.ok()
    });
    result.and(known.ok_or(Broken::End))
}

/// Pages on their way: gathered until a frame is full.
pub(crate) struct Outgoing {
    pub(crate) batch: PageBatch,
    gone: [PageRun; GONE_BATCH],
    gone_count: usize,
    pub(crate) sent: u64,
}

impl Outgoing {
    pub(crate) const fn new() -> Self {
        let none = PageRun { addr: 0, count: 0 };
        Self { batch: PageBatch::new(), gone: [none; GONE_BATCH], gone_count: 0, sent: 0 }
    }

    pub(crate) fn send(&mut self, mut run: PageRun) -> Result<(), Broken> {
        self.flush_gone()?;
        while run.count > 0 {
            let taken = self.batch.push(run);
            run = PageRun { addr: run.addr + taken * PAGE, count: run.count - taken };
            if self.batch.room() == 0 {
                self.flush_pages()?;
            }
        }
        Ok(())
    }

    pub(crate) fn gone(&mut self, run: PageRun) -> Result<(), Broken> {
        self.flush_pages()?;
        if self.gone_count == GONE_BATCH {
            self.flush_gone()?;
        }
        self.gone[self.gone_count] = run;
        self.gone_count += 1;
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<(), Broken> {
        self.flush_gone()?;
        self.flush_pages()
    }

    fn flush_gone(&mut self) -> Result<(), Broken> {
        if self.gone_count == 0 {
            return Ok(());
        }
        let link = &mut sys::state().link;
        let bytes = self.gone[..self.gone_count].as_bytes();
        link.body()[..bytes.len()].copy_from_slice(bytes);
        self.gone_count = 0;
        link.send(kind::GONE, 0, bytes.len())
    }

    fn flush_pages(&mut self) -> Result<(), Broken> {
        if self.batch.pages() == 0 {
            return Ok(());
        }
        let link = &mut sys::state().link;
        let body = link.body();
        let mut end = 0;
        let mut put = |bytes: &[u8]| {
            body[end..end + bytes.len()].copy_from_slice(bytes);
            end += bytes.len();
        };
        put(self.batch.head().as_bytes());
        put(self.batch.runs().as_bytes());
        for run in self.batch.runs() {
            put(sys::slice(run.addr, usize::try_from(run.count * PAGE).unwrap_or(0)));
        }
        self.sent += self.batch.pages();
        self.batch.clear();
        link.send(kind::PAGES, 0, end)
    }
}
