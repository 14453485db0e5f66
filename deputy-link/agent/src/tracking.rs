//! What the program changes while it is away, so that only that goes home
//! ([`conet_deputy_core::scan`]).
//!
//! The userfaultfd is made before the filter, and stays open for as long as this half
//! lives: closing it ends the registration. Where the kernel has none of this, all
//! that is present goes home instead.

use crate::sys;
use conet_deputy_core::areas;
use conet_deputy_core::boot::family::remote_fd::UFFD;
use conet_deputy_core::scan::{Purpose, Region};
use conet_wire::image::{Area, REGION, REGION_LEN, TASK_SIZE, area_flags};
use linux_raw_sys::general as nr;

/// What a program may have mapped: all but the region.
const SPACE: [(u64, u64); 2] = [(0x1000, REGION), (REGION + REGION_LEN, TASK_SIZE)];
/// Regions taken from the kernel at a time.
const BATCH: usize = 256;

/// Makes the userfaultfd; whether this kernel can tell what has changed.
pub(crate) fn begin() -> bool {
    let Ok(uffd) = i32::try_from(sys::userfault()) else { return false };
    if uffd < 0 {
        return false;
    }
    let args = [u64::from(uffd.cast_unsigned()), u64::from(UFFD.cast_unsigned()), 0, 0, 0, 0];
    let moved = uffd == UFFD || sys::plain(nr::__NR_dup2, args) == i64::from(UFFD);
    if uffd != UFFD {
        sys::close(uffd);
    }
    // A kernel without the scan says so here, where nothing is mapped.
    moved && sys::protect_written(sys::state().remote.pagemap, (0x1000, 0x2000)) == 0
}

/// In a child: what it changes is not followed. Its memory is not registered, and marks
/// of a parent's that it shares are the parent's. `maps` takes the userfaultfd's place,
/// so that what is received has numbers of its own.
pub(crate) fn end(maps: i32) {
    let args = [u64::from(maps.cast_unsigned()), u64::from(UFFD.cast_unsigned()), 0, 0, 0, 0];
    sys::plain(nr::__NR_dup2, args);
    sys::state().remote.tracks = false;
}

/// Registers all that is mapped.
pub(crate) fn register() {
    if sys::state().remote.tracks {
        for (start, end) in SPACE {
            // A range in which nothing is mapped is an error, and no harm; what could
            // not be registered counts as changed.
            sys::register(UFFD, start, end - start);
        }
    }
}

/// Registers what is new, among these areas; false where what it holds could not be told
/// from what it held before.
pub(crate) fn register_new(areas: &[Area]) -> bool {
    const TRIES: u32 = 3;
    register();
    let new = areas.iter().filter(|area| area.flags & area_flags::NEW != 0);
    new.copied().all(|area| {
        (0..TRIES).any(|_| {
            let mut is_clean = true;
            let told = scan(Purpose::Protected, &area, |region| {
                is_clean = false;
                sys::release_written(UFFD, (region.start, region.end));
                Some(())
            });
            told.is_some() && is_clean
        })
    })
}

/// From here on, what all areas hold is what they held now.
pub(crate) fn arm() {
    register();
    for (start, end) in SPACE {
        arm_range(start, end);
    }
}

/// As [`arm`], for a part, of what was registered before.
pub(crate) fn arm_range(start: u64, end: u64) {
    let remote = &sys::state().remote;
    if remote.tracks {
        sys::protect_written(remote.pagemap, (start, end));
    }
}

/// Calls `each` for what may have changed in an area; `None` if that is not known, or
/// `each` gives up.
pub(crate) fn changes(area: &Area, each: impl FnMut(&Region) -> Option<()>) -> Option<()> {
    scan(Purpose::Changes, area, each)
}

fn scan(purpose: Purpose, area: &Area, mut each: impl FnMut(&Region) -> Option<()>) -> Option<()> {
    let pagemap = sys::state().remote.pagemap;
    let mut regions = [Region { start: 0, end: 0, categories: 0 }; BATCH];
    let mut at = area.start;
    while at < area.end {
        let (found, reached) = sys::scan(pagemap, purpose, (at, area.end), &mut regions);
        let found = usize::try_from(found).ok()?;
        regions.get(..found)?.iter().try_for_each(&mut each)?;
        if reached <= at {
            return None;
        }
        at = reached;
    }
    Some(())
}

fn has_any(purpose: Purpose, range: (u64, u64)) -> bool {
    let pagemap = sys::state().remote.pagemap;
    let mut region = [Region { start: 0, end: 0, categories: 0 }];
    sys::scan(pagemap, purpose, range, &mut region).0 > 0
}

/// Whether an area is the one that came here, as far as its pages are tracked.
pub(crate) fn is_known(range: (u64, u64)) -> bool {
    has_any(Purpose::Registered, range)
}

/// Calls `each` with the parts of a mapping that is known, and flags of them; `None` if
/// that gives up.
///
/// A mapping that has grown may have come to where another one was that home still
/// has: that makes room there for the one that grew.
pub(crate) fn parts(
    range: (u64, u64),
    mut each: impl FnMut(u64, u64, u32) -> Option<()>,
) -> Option<()> {
    let lists = sys::lists();
    let base = &lists.base[..lists.base_count];
    let mut at = range.0;
    let mut joined = 0;
    for (start, end) in areas::gaps(range, base) {
        // Nothing that is kept may be taken for grown, whatever the list says.
        if start == range.0 || has_any(Purpose::Kept, (start, end)) {
            continue;
        }
        each(at, start, joined)?;
        each(start, end, area_flags::NEW | area_flags::JOINED)?;
        (at, joined) = (end, area_flags::JOINED);
    }
    if at < range.1 { each(at, range.1, joined) } else { Some(()) }
}

/// What came here is no more in `start..end`: it was unmapped, moved or replaced.
pub(crate) fn forget(start: u64, end: u64) {
    let lists = sys::lists();
    lists.base_count = areas::remove(&mut lists.base, lists.base_count, (start, end));
}
