//! What no library has safe. All unsafe code of the benchmark is here.
#![allow(unsafe_code, reason = "taking over a raw descriptor, and perf_event_open")]

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{FromRawFd, IntoRawFd};

/// A device as a file: to be read, written and waited for as one.
pub(crate) fn into_file(device: impl IntoRawFd) -> File {
    // SAFETY: the device gives up its descriptor, which is open and nobody else's.
    unsafe { File::from_raw_fd(device.into_raw_fd()) }
}

/// Counts how often a thread passes a tracepoint.
#[derive(Debug)]
pub(crate) struct Counter(File);

impl Counter {
    /// `PERF_TYPE_TRACEPOINT`.
    const TRACEPOINT: u64 = 2;
    /// `PERF_ATTR_SIZE_VER0`: the first published version of the structure.
    const SIZE: u64 = 64;
    /// `PERF_FLAG_FD_CLOEXEC`.
    const CLOEXEC: u32 = 8;

    /// Starts to count `event`, a tracepoint's number in tracefs, of one thread.
    ///
    /// # Errors
    /// As `perf_event_open(2)`: no such thread, or it is forbidden.
    pub(crate) fn of(thread: u32, event: u64) -> io::Result<Self> {
        // struct perf_event_attr: type and size, config; nothing is sampled, nothing off.
        let attributes: [u64; 8] = [Self::TRACEPOINT | Self::SIZE << 32, event, 0, 0, 0, 0, 0, 0];
        // SAFETY: the kernel reads the 64 bytes that their size says, which live until it
        // returns; the other arguments are numbers.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                attributes.as_ptr(),
                thread,
                -1,
                -1,
                Self::CLOEXEC,
            )
        };
        let fd =
            i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the descriptor is new, and nobody else's.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// How often so far.
    pub(crate) fn read(&self) -> u64 {
        let mut count = [0; 8];
        // A counter whose thread has ended can still be read; nothing else fails.
        (&self.0).read_exact(&mut count).ok();
        u64::from_ne_bytes(count)
    }
}
