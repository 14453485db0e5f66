//! The measured calls, as a C program makes them: through the C library where it has
//! a function, so that the vDSO serves what it can.

use super::check;
use crate::work::timed;
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use std::fs::File;
use std::ptr;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

const PAGE: usize = 4096;

/// Duplicates a descriptor to a number.
pub(crate) fn duplicate_at(fd: BorrowedFd<'_>, number: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: the number is this benchmark's own; nothing else in this process has it.
    check(unsafe { libc::dup3(fd.as_raw_fd(), number, 0) }.into())?;
    // SAFETY: dup3 has just made it, and it is owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Wakes nobody: no one waits for `word`.
pub(crate) fn futex_wake(word: &AtomicU32) -> Result<(), Errno> {
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the kernel takes the address of a live word as a key.
    check(unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, 1) }).map(drop)
}

/// `sigprocmask` that changes nothing.
pub(crate) fn block_nothing() -> Result<(), Errno> {
    let none = 0u64;
    let (set, size) = (ptr::from_ref(&none), 8);
    let old = ptr::null_mut::<u64>();
    // SAFETY: the kernel reads 8 bytes of `none`.
    let result =
        unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, set, old, size) };
    check(result).map(drop)
}

/// `clock_gettime(CLOCK_MONOTONIC)`.
pub(crate) fn clock_gettime() -> Result<(), Errno> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is written.
    check(unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) }.into()).map(drop)
}

/// `gettimeofday`.
pub(crate) fn gettimeofday() -> Result<(), Errno> {
    let mut time = libc::timeval { tv_sec: 0, tv_usec: 0 };
    // SAFETY: `time` is written; no zone is asked for.
    check(unsafe { libc::gettimeofday(&raw mut time, ptr::null_mut()) }.into()).map(drop)
}

/// `time`.
pub(crate) fn time() -> Result<(), Errno> {
    // SAFETY: nothing is stored.
    check(unsafe { libc::time(ptr::null_mut()) }).map(drop)
}

unsafe extern "C" {
    /// glibc 2.29 and musl; the `libc` crate does not declare it.
    fn getcpu(cpu: *mut u32, node: *mut u32) -> i32;
}

/// `getcpu`, which the vDSO serves (`sched_getcpu` may read the rseq area instead).
pub(crate) fn get_cpu() -> Result<(), Errno> {
    let (mut cpu, mut node) = (0, 0);
    // SAFETY: both are written.
    check(unsafe { getcpu(&raw mut cpu, &raw mut node) }.into()).map(drop)
}

/// `clock_getres(CLOCK_MONOTONIC)`.
pub(crate) fn clock_getres() -> Result<(), Errno> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is written.
    check(unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC, &raw mut time) }.into()).map(drop)
}

/// Memory that the memory calls are made on.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// Two pages of this process's own that nobody else knows.
    pages: *mut libc::c_void,
    /// Where the heap ended when this was made. The C library's allocator may have
    /// taken more since, so each pair of `brk` begins from where it ends then.
    heap: u64,
    mapped: Vec<*mut libc::c_void>,
}

fn map(len: usize) -> Result<*mut libc::c_void, Errno> {
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: new memory where the kernel likes.
    let addr = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, -1, 0) };
    if addr == libc::MAP_FAILED { Err(Errno::NOMEM) } else { Ok(addr) }
}

impl Scratch {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self { pages: map(2 * PAGE)?, heap: 0, mapped: Vec::new() })
    }

    /// Maps `count` single pages.
    pub(crate) fn map_many(&mut self, count: u64) -> Result<Duration, Errno> {
        let mapped = &mut self.mapped;
        mapped.reserve(usize::try_from(count).unwrap_or(0));
        timed(count, || {
            mapped.push(map(PAGE)?);
            Ok(())
        })
    }

    /// Unmaps what [`Self::map_many`] mapped, the newest first.
    pub(crate) fn unmap_many(&mut self, count: u64) -> Result<Duration, Errno> {
        let mapped = &mut self.mapped;
        timed(count, || {
            let addr = mapped.pop().ok_or(Errno::INVAL)?;
            // SAFETY: a page that `map` gave and nobody uses.
            check(unsafe { libc::munmap(addr, PAGE) }.into()).map(drop)
        })
    }

    /// Makes the second page writable, or readable only.
    pub(crate) fn protect(&self, writable: bool) -> Result<(), Errno> {
        let prot = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: the second of this object's two pages, which nobody else uses.
        check(unsafe { libc::mprotect(self.pages.byte_add(PAGE), PAGE, prot) }.into()).map(drop)
    }

    /// Forgets the first page, which is empty.
    pub(crate) fn discard(&self) -> Result<(), Errno> {
        // SAFETY: the first of this object's two pages, which nobody else uses.
        check(unsafe { libc::madvise(self.pages, PAGE, libc::MADV_DONTNEED) }.into()).map(drop)
    }

    /// Moves the end of the heap up by a page, and back.
    pub(crate) fn brk(&mut self, grow: bool) -> Result<(), Errno> {
        let brk = |to: u64| {
            // SAFETY: the page above the heap's end is given back before anybody who
            // allocates could have been told of it.
            check(unsafe { libc::syscall(libc::SYS_brk, to) })
        };
        if self.heap == 0 {
            self.heap = brk(0)?;
        }
        let wanted = self.heap + if grow { PAGE as u64 } else { 0 };
        if brk(wanted)? == wanted { Ok(()) } else { Err(Errno::NOMEM) }
    }
}

/// This process's memory at an address that a trapped call of its own named.
pub(crate) fn own_bytes<'a>(addr: u64, len: usize) -> &'a mut [u8] {
    // SAFETY: only for the arguments of calls that `work::Program` makes: live buffers
    // whose owner waits for the call to return.
    unsafe { std::slice::from_raw_parts_mut(addr as *mut u8, len) }
}

/// `PAGEMAP_SCAN` (Linux 6.7) from `from` to `to` for pages that are swapped out and
/// written at once, of which there are none here: a look at each page, and no list.
pub(crate) fn scan_pages(pagemap: &File, from: u64, to: u64) -> Result<(), Errno> {
    const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
    const WRITTEN_AND_SWAPPED: u64 = 2 | 16;
    let mut region = [0u64; 3];
    // struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages,
    // category_inverted, category_mask, category_anyof_mask, return_mask
    let mut arg = [96, 0, from, to, 0, 0, 1, 0, 0, WRITTEN_AND_SWAPPED, 0, WRITTEN_AND_SWAPPED];
    arg[5] = region.as_mut_ptr() as u64;
    // SAFETY: the kernel writes one region of 24 bytes at most, and `walk_end`.
    check(unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, arg.as_mut_ptr()) }.into())
        .map(drop)
}

/// Copies another process's memory here.
pub(crate) fn read_process(pid: i32, addr: u64, into: &mut [u8]) -> Result<(), Errno> {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: addr as *mut _, iov_len: into.len() };
    // SAFETY: one local vector over `into`; the kernel checks the other.
    let done = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    if check(done.try_into().unwrap_or(-1))? == into.len() as u64 {
        Ok(())
    } else {
        Err(Errno::FAULT)
    }
}

/// Copies into another process's memory.
pub(crate) fn write_process(pid: i32, addr: u64, from: &[u8]) -> Result<(), Errno> {
    let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let remote = libc::iovec { iov_base: addr as *mut _, iov_len: from.len() };
    // SAFETY: one local vector over `from`, which is only read; the kernel checks the other.
    let done =
        unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) };
    if check(done.try_into().unwrap_or(-1))? == from.len() as u64 {
        Ok(())
    } else {
        Err(Errno::FAULT)
    }
}
