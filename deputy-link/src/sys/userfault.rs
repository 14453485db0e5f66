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
    pub(crate) fn protect(&self, (start, end): (u64, u64)) -> io::Result<()> {
        let mut argument = [start, end - start, WRITEPROTECT_MODE_WP];
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
    use conet_deputy_core::scan::is;

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
