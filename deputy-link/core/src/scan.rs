//! What the kernel tells of pages that may have changed, and what follows from it.
//!
//! Memory is registered with a userfaultfd in asynchronous write-protect mode
//! (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7): the kernel lifts the protection of a page
//! by itself when it is written, and `ioctl(PAGEMAP_SCAN)` tells which are still
//! protected, and can protect them again in the same step. Nobody waits for a fault.
//!
//! A page is what it was when it was last protected if it is there and still is. What
//! takes a page away without writing it (`MADV_DONTNEED`, `munmap`) leaves nothing in
//! anonymous memory: it is *gone*. What maps other memory in its place, or moves it
//! (`mremap`), leaves an area that is not registered, and all of which counts as
//! changed. So no call of the program has to be watched.
//!
//! Sources: Documentation/admin-guide/mm/{pagemap,userfaultfd}.rst, fs/proc/task_mmu.c
//! (`pagemap_page_category`; a page that is not there counts as written).

pub use linux_raw_sys::general::{page_region as Region, pm_scan_arg as ScanArg};

/// `PAGEMAP_SCAN`, `_IOWR('f', 16, struct pm_scan_arg)` (linux/fs.h).
pub const PAGEMAP_SCAN: u32 = 0xc060_6610;
/// `UFFDIO_API`.
pub const UFFDIO_API: u32 = 0xc018_aa3f;
/// `UFFDIO_REGISTER`.
pub const UFFDIO_REGISTER: u32 = 0xc020_aa00;
/// `UFFDIO_WRITEPROTECT`.
pub const UFFDIO_WRITEPROTECT: u32 = 0xc018_aa06;
/// `struct uffdio_api` that asks for what is needed here: the protocol's version and
/// `UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC`.
pub const UFFD_API: [u64; 3] = [0xaa, 1 << 13 | 1 << 15, 0];
/// Flags of `userfaultfd(2)`: `O_CLOEXEC | UFFD_USER_MODE_ONLY`, which needs no
/// privilege (Linux 5.11).
pub const UFFD_FLAGS: u64 = 0x8_0000 | 1;
/// `UFFDIO_REGISTER_MODE_WP`.
pub const REGISTER_MODE_WP: u64 = 2;
/// `UFFDIO_WRITEPROTECT_MODE_WP`.
pub const WRITEPROTECT_MODE_WP: u64 = 1;

/// Categories of pages (linux/fs.h, `PAGE_IS_*`).
pub mod is {
    /// In an area that is registered.
    pub const REGISTERED: u64 = 1;
    /// Written since it was last protected.
    pub const WRITTEN: u64 = 2;
    /// A file's own page, not a private copy.
    pub const FILE: u64 = 4;
    /// In memory.
    pub const PRESENT: u64 = 8;
    /// Swapped out, or only marked as protected.
    pub const SWAPPED: u64 = 16;
    /// The kernel's page of zeros.
    pub const ZERO: u64 = 32;
}

/// Which pages a scan is for, and whether it protects them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Those that are there and written; protects them. Tells whether they are a
    /// file's own.
    Arm,
    /// All that [`verdict`] would not keep.
    Changes,
    /// All; tells whether they are a file's own, which is slower.
    Everything,
    /// Those in areas that are not registered.
    Strange,
    /// Those that carry the mark of protection.
    Protected,
    /// One in an area that is, if there is any.
    Registered,
    /// One that [`verdict`] would keep, if there is any.
    Kept,
}

/// The argument of a scan of `start..end` into `len` regions at `regions`.
#[must_use]
pub fn scan_arg(purpose: Purpose, (start, end): (u64, u64), regions: u64, len: u64) -> ScanArg {
    const MATCHING: u64 = 1;
    const TOLD: u64 = is::REGISTERED | is::WRITTEN | is::PRESENT | is::SWAPPED | is::ZERO;
    let (inverted, mask, any, told) = match purpose {
        Purpose::Arm => {
            (0, is::REGISTERED | is::WRITTEN, is::PRESENT | is::SWAPPED, TOLD | is::FILE)
        }
        Purpose::Changes => {
            let inverted = is::REGISTERED | is::PRESENT;
            (inverted, 0, inverted | is::WRITTEN, TOLD)
        }
        Purpose::Everything => (0, 0, 0, TOLD | is::FILE),
        Purpose::Strange => (is::REGISTERED, is::REGISTERED, 0, is::REGISTERED),
        Purpose::Protected => (is::WRITTEN, is::REGISTERED | is::WRITTEN, 0, is::REGISTERED),
        Purpose::Registered => (0, is::REGISTERED, 0, is::REGISTERED),
        Purpose::Kept => {
            let mask = is::REGISTERED | is::WRITTEN;
            (is::WRITTEN, mask, is::PRESENT | is::SWAPPED, is::REGISTERED)
        }
    };
    ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: if purpose == Purpose::Arm { MATCHING } else { 0 },
        start,
        end,
        walk_end: 0,
        vec: regions,
        vec_len: len,
        max_pages: u64::from(matches!(purpose, Purpose::Registered | Purpose::Kept)),
        category_inverted: inverted,
        category_mask: mask,
        category_anyof_mask: any,
        return_mask: told,
    }
}

/// The argument of a scan that protects all of `start..end` that is registered, and
/// marks what is not there where the kernel has page tables; it tells nothing.
#[must_use]
pub fn protect_arg(range: (u64, u64)) -> ScanArg {
    ScanArg { category_anyof_mask: 0, vec: 0, vec_len: 0, ..scan_arg(Purpose::Arm, range, 0, 0) }
}

/// What a delta does with pages of anonymous memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They are what they were.
    Keep,
    /// Their bytes travel.
    Send,
    /// They read as zero.
    Zero,
}

/// What to do with anonymous pages of these categories.
#[must_use]
pub const fn verdict(categories: u64) -> Verdict {
    let is_there = categories & (is::PRESENT | is::SWAPPED) != 0;
    let is_same = categories & (is::REGISTERED | is::WRITTEN) == is::REGISTERED;
    if !is_there {
        Verdict::Zero
    } else if is_same {
        Verdict::Keep
    } else if categories & is::ZERO != 0 {
        Verdict::Zero
    } else {
        Verdict::Send
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use linux_raw_sys::{general as nr, ioctl};

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(UFFDIO_API, ioctl::UFFDIO_API);
        assert_eq!(UFFDIO_REGISTER, ioctl::UFFDIO_REGISTER);
        assert_eq!(UFFDIO_WRITEPROTECT, ioctl::UFFDIO_WRITEPROTECT);
        assert_eq!(size_of::<ScanArg>(), 0x60);
        let features = nr::UFFD_FEATURE_WP_ASYNC | nr::UFFD_FEATURE_WP_UNPOPULATED;
        assert_eq!(UFFD_API[1], u64::from(features));
        for (ours, theirs) in [
            (is::REGISTERED, nr::PAGE_IS_WPALLOWED),
            (is::WRITTEN, nr::PAGE_IS_WRITTEN),
            (is::FILE, nr::PAGE_IS_FILE),
            (is::PRESENT, nr::PAGE_IS_PRESENT),
            (is::SWAPPED, nr::PAGE_IS_SWAPPED),
            (is::ZERO, nr::PAGE_IS_PFNZERO),
        ] {
            assert_eq!(ours, u64::from(theirs));
        }
    }

    #[test]
    fn the_scan_for_what_is_kept_finds_it() {
        let arg = scan_arg(Purpose::Kept, (0, 4096), 0, 1);
        for categories in 0..64 {
            let seen = categories ^ arg.category_inverted;
            let is_found = seen & arg.category_mask == arg.category_mask
                && seen & arg.category_anyof_mask != 0;
            assert_eq!(is_found, verdict(categories) == Verdict::Keep, "{categories:#b}");
        }
    }

    /// A scan for changes finds exactly what is not kept, but for swapped pages.
    #[test]
    fn the_scan_for_changes_misses_nothing() {
        let arg = scan_arg(Purpose::Changes, (0, 4096), 0, 1);
        for categories in 0..64 {
            let seen = categories ^ arg.category_inverted;
            let is_found = seen & arg.category_mask == arg.category_mask
                && seen & arg.category_anyof_mask != 0;
            let is_swapped = categories & is::SWAPPED != 0;
            assert!(is_found || verdict(categories) == Verdict::Keep, "{categories:#b}");
            assert!(!is_found || verdict(categories) != Verdict::Keep || is_swapped);
        }
    }
}
