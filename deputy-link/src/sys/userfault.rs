//! Asynchronous write protection of another process's memory, and the scan that tells
//! what was written ([`conet_deputy_core::scan`]).

use conet_deputy_core::scan::{
    PAGEMAP_SCAN, Purpose, REGISTER_MODE_WP, Region, UFFD_API, UFFDIO_API, UFFDIO_REGISTER,
    UFFDIO_WRITEPROTECT, WRITEPROTECT_MODE_WP, scan_arg,
};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Regions taken from the kernel at a time.
const BATCH: usize = 4096;

fn ioctl<T>(fd: &impl AsRawFd, request: u32, argument: &mut T) -> io::Result<usize> {
    // SAFETY: callers pair each request with the argument that it names.
    let result = unsafe {
        libc::ioctl(fd.as_raw_fd(), libc::c_ulong::from(request), std::ptr::from_mut(argument))
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// A userfaultfd of another process. Closing it ends all that it registered.
#[derive(Debug)]
pub(crate) struct Userfault(OwnedFd);

impl Userfault {
    /// Takes a fresh descriptor into use.
    ///
    /// # Errors
    /// `EINVAL` where the kernel has no asynchronous protection (before Linux 6.7).
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        ioctl(&fd, UFFDIO_API, &mut UFFD_API.clone())?;
        Ok(Self(fd))
    }

    /// Registers what is mapped in a range.
    ///
    /// # Errors
    /// `ESRCH` when the address space is no more; others when the range cannot be.
    pub(crate) fn register(&self, (start, end): (u64, u64)) -> io::Result<()> {
        let mut argument = [start, end - start, REGISTER_MODE_WP, 0];
        ioctl(&self.0, UFFDIO_REGISTER, &mut argument).map(|_| ())
    }

    /// Protects all of a registered range, and marks what is not there.
    ///
    /// # Errors
    /// As [`Self::register`].
    pub(crate) fn protect(&self, range: (u64, u64)) -> io::Result<()> {
        self.set_protection(range, WRITEPROTECT_MODE_WP)
    }

    /// Takes protection and marks from a registered range.
    ///
    /// # Errors
    /// As [`Self::register`].
    pub(crate) fn release(&self, range: (u64, u64)) -> io::Result<()> {
        self.set_protection(range, 0)
    }

    fn set_protection(&self, (start, end): (u64, u64), mode: u64) -> io::Result<()> {
        let mut argument = [start, end - start, mode];
        ioctl(&self.0, UFFDIO_WRITEPROTECT, &mut argument).map(|_| ())
    }
}

/// Calls `each` for every region of a range that serves the purpose (Linux 6.7).
///
/// # Errors
/// `ENOTTY` where the kernel has no such scan.
pub(crate) fn scan(
    pagemap: &File,
    purpose: Purpose,
    (start, end): (u64, u64),
    mut each: impl FnMut(&Region),
) -> io::Result<()> {
    const NONE: Region = Region { start: 0, end: 0, categories: 0 };
    let mut regions = Vec::with_capacity(BATCH);
    regions.resize(BATCH, NONE);
    let mut at = start;
    while at < end {
        let place = regions.as_mut_ptr() as u64;
        let mut argument = scan_arg(purpose, (at, end), place, BATCH as u64);
        let found = ioctl(pagemap, PAGEMAP_SCAN, &mut argument)?;
        regions.iter().take(found).for_each(&mut each);
        if argument.walk_end <= at {
            return Err(io::ErrorKind::InvalidData.into());
        }
        at = argument.walk_end;
    }
    Ok(())
}

/// Whether anything in a range is registered with any userfaultfd of this mode.
pub(crate) fn has_registered(pagemap: &File, range: (u64, u64)) -> bool {
    let mut region = Region { start: 0, end: 0, categories: 0 };
    let place = &raw mut region as u64;
    // It stops at the first page.
    let mut argument = scan_arg(Purpose::Registered, range, place, 1);
    ioctl(pagemap, PAGEMAP_SCAN, &mut argument).is_ok_and(|found| found > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use conet_deputy_core::scan::{UFFD_FLAGS, is};
    use std::os::fd::FromRawFd;

    /// What the kernel does with marks, on which the tracker's care rests.
    #[test]
    fn a_mapping_that_mremap_joins_keeps_old_marks_until_they_are_taken() {
        const PAGE: usize = 4096;
        // SAFETY: flags alone; the descriptor is ours.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, UFFD_FLAGS) };
        let Ok(fd) = i32::try_from(fd).map_err(|_| ()).and_then(|fd| {
            // SAFETY: fresh from the kernel, where it is not -1.
            if fd < 0 { Err(()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
        }) else {
            return;
        };
        let Ok(userfault) = Userfault::new(fd) else { return };
        let map = |place: usize, len| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let fixed = if place == 0 { 0 } else { libc::MAP_FIXED };
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a place of the kernel's choice, or within what it gave us.
            let at = unsafe { libc::mmap(place as *mut _, len, prot, flags | fixed, -1, 0) };
            assert_ne!(at, libc::MAP_FAILED);
            at as usize
        };
        // Room for two neighbours, with others around that cannot join them.
        let room = map(0, 64 * PAGE);
        // SAFETY: the room is ours.
        unsafe { libc::mprotect(room as *mut _, 64 * PAGE, libc::PROT_NONE) };
        let (first, far) = (map(room + 8 * PAGE, 8 * PAGE), map(room + 40 * PAGE, 8 * PAGE));
        let write = |page: usize| {
            // SAFETY: mapped and ours.
            unsafe { ((first + page * PAGE) as *mut u8).write_volatile(7) }
        };
        (0..8).for_each(write);
        let whole = |at: usize, pages: usize| (at as u64, (at + pages * PAGE) as u64);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let protected = || {
            let mut pages = 0;
            let range = whole(first, 8);
            scan(&pagemap, Purpose::Protected, range, |r| pages += (r.end - r.start) / 4096)
                .unwrap();
            pages
        };
        userfault.register(whole(first, 8)).unwrap();
        userfault.register(whole(far, 8)).unwrap();
        userfault.protect(whole(first, 8)).unwrap();
        assert_eq!(protected(), 8);
        // SAFETY: both places are ours, and the new one holds nothing.
        let moved = unsafe {
            let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let to = (first + 8 * PAGE) as *mut libc::c_void;
            libc::mremap(far as *mut _, 8 * PAGE, 8 * PAGE, how, to)
        };
        assert_eq!(moved as usize, first + 8 * PAGE);
        if has_registered(&pagemap, whole(first, 8)) {
            return; // A kernel that does not join them.
        }
        write(3);
        userfault.register(whole(first, 16)).unwrap();
        let stale = protected();
        write(3);
        assert_eq!(protected(), stale, "this kernel sees the write: good");
        userfault.release(whole(first, 8)).unwrap();
        assert_eq!(protected(), 0);
        userfault.protect(whole(first, 8)).unwrap();
        write(3);
        assert_eq!((stale, protected()), (8, 7));
    }

    #[test]
    fn this_very_process_is_scanned_where_the_kernel_can() {
        let page = vec![1u8; 1 << 20];
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let start = (page.as_ptr() as u64).next_multiple_of(4096);
        let mut there = 0;
        let scanned = scan(&pagemap, Purpose::Everything, (start, start + (1 << 19)), |region| {
            if region.categories & is::PRESENT != 0 {
                there += region.end - region.start;
            }
        });
        match scanned {
            Ok(()) => assert_eq!(there, 1 << 19),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOTTY)),
        }
    }
}
