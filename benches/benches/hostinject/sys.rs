//! What no library has safe. All unsafe code of the benchmark is here.
#![allow(unsafe_code, reason = "raw descriptors, perf_event_open, a guest's memory, a TAP device")]

use std::fs::File;
use std::io::{self, Read as _};
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::io::Errno;

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

/// Memory that a guest shares, which writes there as it likes: no reference is made to it.
#[derive(Debug)]
pub(crate) struct Shared {
    base: *mut u8,
    len: usize,
}

impl Shared {
    /// Maps so many bytes of a file; until the process ends.
    ///
    /// # Errors
    /// As `mmap(2)`.
    pub(crate) fn map(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping, where the kernel likes; nothing else is there.
        let base = unsafe {
            libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), offset)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { base: base.cast(), len })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// So many bytes of it.
    ///
    /// # Panics
    /// Where they are not within it.
    pub(crate) fn part(&self, at: usize, len: usize) -> Part<'_> {
        assert!(
            at.checked_add(len).is_some_and(|end| end <= self.len),
            "beyond the guest's memory"
        );
        // SAFETY: within the mapping, as was just seen.
        Part { base: unsafe { self.base.add(at) }, len, of: PhantomData }
    }
}

/// A piece of [`Shared`]; it is mapped and within.
#[derive(Debug, Clone)]
pub(crate) struct Part<'a> {
    base: *mut u8,
    len: usize,
    of: PhantomData<&'a Shared>,
}

impl Part<'_> {
    fn word(&self) -> &AtomicU16 {
        assert!(self.len >= 2 && self.base.addr().is_multiple_of(2), "no word");
        // SAFETY: two aligned bytes of a mapping that stays; the guest's accesses to the
        // words of its rings are atomic as well (virtio 1.3 §2.7).
        unsafe { AtomicU16::from_ptr(self.base.cast()) }
    }

    pub(crate) fn load(&self) -> u16 {
        u16::from_le(self.word().load(Ordering::Acquire))
    }

    pub(crate) fn store(&self, value: u16) {
        self.word().store(value.to_le(), Ordering::Release);
    }

    pub(crate) fn read_into(&self, bytes: &mut [u8]) {
        assert!(bytes.len() <= self.len, "too long");
        // SAFETY: both are that long; whatever the guest writes meanwhile, these are bytes.
        unsafe { ptr::copy_nonoverlapping(self.base, bytes.as_mut_ptr(), bytes.len()) };
    }

    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len, "too long");
        // SAFETY: as of `read_into`.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(at), bytes.len()) };
    }

    fn vectors(parts: &[Self]) -> (Vec<libc::iovec>, libc::c_int) {
        let vector = |part: &Self| libc::iovec { iov_base: part.base.cast(), iov_len: part.len };
        let vectors: Vec<_> = parts.iter().map(vector).collect();
        let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
        (vectors, count)
    }

    /// Reads once.
    pub(crate) fn read(from: &OwnedFd, parts: &[Self]) -> rustix::io::Result<usize> {
        let (vectors, count) = Self::vectors(parts);
        // SAFETY: the vectors are parts of a mapping that stays, to which nobody has references.
        let done = unsafe { libc::readv(from.as_raw_fd(), vectors.as_ptr(), count) };
        usize::try_from(done).map_err(|_| last())
    }

    /// Writes once.
    pub(crate) fn write_all(to: &OwnedFd, parts: &[Self]) -> rustix::io::Result<()> {
        let (vectors, count) = Self::vectors(parts);
        // SAFETY: as of `read`; the kernel only reads them.
        let done = unsafe { libc::writev(to.as_raw_fd(), vectors.as_ptr(), count) };
        if done < 0 { Err(last()) } else { Ok(()) }
    }
}

fn last() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// A TAP device that has the guest's header of 12 bytes before each frame, and takes all
/// that the guest does off the host's kernel; not blocking.
///
/// # Errors
/// As `/dev/net/tun`.
pub(crate) fn tap(name: &str) -> io::Result<OwnedFd> {
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK;
    let device = rustix::fs::open("/dev/net/tun", flags, rustix::fs::Mode::empty())?;
    let mut request = [0u8; 40];
    request[..name.len().min(15)].copy_from_slice(&name.as_bytes()[..name.len().min(15)]);
    // IFF_TAP, IFF_NO_PI, IFF_VNET_HDR.
    request[16..18].copy_from_slice(&0x5002u16.to_ne_bytes());
    let (fd, size) = (device.as_raw_fd(), 12i32);
    // TUNSETIFF, TUNSETVNETHDRSZ, TUNSETOFFLOAD: checksums, TCP over both, ECN.
    // SAFETY: the kernel takes and gives a `struct ifreq` of 40 bytes, reads an int, and
    // takes a number; all live until the calls return.
    let done = unsafe {
        [
            libc::ioctl(fd, 0x4004_54ca, request.as_mut_ptr()),
            libc::ioctl(fd, 0x4004_54d8, ptr::from_ref(&size)),
            libc::ioctl(fd, 0x4004_54d0, 0xfusize),
        ]
    };
    if done == [0; 3] { Ok(device) } else { Err(io::Error::last_os_error()) }
}
