//! Going home: the program's state is the signal frame, its memory is all around.
//!
//! ```text
//! HEAD (frame, vector state, why) ─ AREAS (own maps) ─ PAGES (those present) ─ END
//! ```
//!
//! From HEAD on there is no way back: this half ends when home has closed the link.

use crate::link::Broken;
use crate::sys::{self, Context};
use crate::{clock, trap};
use conet_deputy_core::areas::{self, Backing};
use conet_wire::image::{
    AREAS_PER_FRAME, Area, End, Head, MAX_AREAS, MAX_XSAVE, MemoryMap, PAGE, PAGES_PER_FRAME,
    PageRun, Registers, VERSION, overlaps_region,
};
use conet_wire::link::kind;
use zerocopy::IntoBytes;

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
    let (state, lists) = (sys::state(), sys::lists());
    for chunk in lists.leaving[..count].chunks(AREAS_PER_FRAME) {
        let bytes = chunk.as_bytes();
        state.link.body()[..bytes.len()].copy_from_slice(bytes);
        state.link.send(kind::AREAS, 0, bytes.len())?;
    }
    let mut pages = 0;
    for area in &lists.leaving[..count] {
        pages += send_pages(area)?;
    }
    state.link.send_value(kind::END, 0, &End { areas: count as u64, pages })
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

/// Lists what of this address space is the program's, into the state's areas.
fn list_areas() -> Option<usize> {
    let maps = sys::state().remote.maps;
    let lists = sys::lists();
    let held = &lists.present[..lists.present_count];
    let out = &mut lists.leaving;
    let mut count = 0;
    for_each_line(maps, |line| {
        if overlaps_region(line.start, line.end) || line.backing == Backing::Vsyscall {
            return Some(());
        }
        // What is held here for home may have merged with its neighbours.
        for (start, end) in areas::gaps((line.start, line.end), held) {
            *out.get_mut(count)? = Area { start, end, ..line.area() };
            count += 1;
        }
        Some(())
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

fn send_pages(area: &Area) -> Result<u64, Broken> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const BATCH: usize = 512;
    let pagemap = sys::state().remote.pagemap;
    let readable = area.prot & 1 != 0;
    let mut entries = [0u8; 8 * BATCH];
    let mut sent = 0;
    let mut at = area.start;
    let mut run: Option<PageRun> = None;
    while at < area.end {
        let want = usize::try_from((area.end - at) / PAGE).unwrap_or(BATCH).min(BATCH);
        let got = sys::pread(pagemap, &mut entries[..8 * want], at / PAGE * 8);
        if got != 8 * want as i64 {
            return Err(Broken::End);
        }
        for entry in entries[..8 * want].as_chunks::<8>().0 {
            let there = u64::from_le_bytes(*entry) & (PRESENT | SWAPPED) != 0;
            match &mut run {
                Some(r) if there && r.count < PAGES_PER_FRAME => r.count += 1,
                _ => {
                    if let Some(r) = run.take() {
                        sent += send_run(r, area, readable)?;
                    }
                    run = there.then_some(PageRun { addr: at, count: 1 });
                }
            }
            at += PAGE;
        }
    }
    if let Some(r) = run {
        sent += send_run(r, area, readable)?;
    }
    if sent > 0 && !readable {
        // This memory may be another's, too.
        sys::protect(area.start, area.len(), area.prot);
    }
    Ok(sent)
}

fn send_run(run: PageRun, area: &Area, readable: bool) -> Result<u64, Broken> {
    if !readable {
        sys::protect(area.start, area.len(), 1);
    }
    let link = &mut sys::state().link;
    let body = link.body();
    let head = run.as_bytes();
    let len = usize::try_from(run.count * PAGE).unwrap_or(0);
    body[..head.len()].copy_from_slice(head);
    body[head.len()..head.len() + len].copy_from_slice(sys::slice(run.addr, len));
    link.send(kind::PAGES, 0, head.len() + len)?;
    Ok(run.count)
}
