//! Shared memory: the one place of this crate that needs `unsafe`.
//!
//! The memory is seen as atomic words and as nothing else, so whatever the other process
//! does to it, and whenever, is a value that was read and no undefined behaviour. It
//! cannot be made shorter: that is sealed, and looked at, before it is mapped.

#![allow(unsafe_code, reason = "mmap(2), and a slice of what it gives")]

use super::ring::Memory;
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// A sealed file that is mapped, shared and writable.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping belongs to this value alone, and is only used through atomics,
// which any thread may use.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps a file of exactly `words` words that can become neither shorter nor longer
    /// (`F_SEAL_SHRINK`, `F_SEAL_GROW`; kernel 3.17).
    pub(super) fn new(file: BorrowedFd<'_>, words: usize) -> Result<Self, Errno> {
        // Not a memfd: EINVAL.
        let seals = fcntl_get_seals(file)?;
        let bytes = words.checked_mul(8).ok_or(Errno::INVAL)?;
        let is_sealed = seals.contains(SealFlags::SHRINK | SealFlags::GROW);
        if !is_sealed || u64::try_from(fstat(file)?.st_size) != Ok(bytes as u64) || bytes == 0 {
            return Err(Errno::INVAL);
        }
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: without MAP_FIXED the kernel chooses a place where nothing is mapped, so
        // no memory that anybody uses changes. The length is not zero.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, protection, flags, file, 0)? };
        let start = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { start, words })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `start` is page-aligned and the start of `words` words that stay mapped,
        // readable and writable until `self` is dropped; the file cannot be shortened, so
        // none of them faults. Any bits are an `AtomicU64`, and nothing here or in the
        // other process is seen but through atomics. `words * 8` was checked to fit.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the whole of what `mmap` gave, and no borrow outlives `self`.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.words * 8) };
        // It was mapped, so it can be unmapped.
        unmapped.ok();
    }
}

impl Memory for Mapping {
    #[inline]
    fn load(&self, at: usize, ordering: Ordering) -> u64 {
        // Places are within the layout, which is within the file.
        self.words().get(at).map_or(0, |word| word.load(ordering))
    }

    #[inline]
    fn store(&self, at: usize, value: u64, ordering: Ordering) {
        if let Some(word) = self.words().get(at) {
            word.store(value, ordering);
        }
    }

    #[inline]
    fn store_all(&self, at: usize, words: &[[u8; 8]]) {
        // One check for all of them.
        let places = self.words().get(at..at + words.len()).unwrap_or_default();
        for (place, word) in places.iter().zip(words) {
            place.store(u64::from_le_bytes(*word), Ordering::Relaxed);
        }
    }

    #[inline]
    fn load_all(&self, at: usize, words: &mut [[u8; 8]]) {
        let places = self.words().get(at..at + words.len()).unwrap_or_default();
        for (place, word) in places.iter().zip(words) {
            *word = place.load(Ordering::Relaxed).to_le_bytes();
        }
    }

    #[inline]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    #[inline]
    fn hand_over(&self, at: usize) {
        #[cfg(target_arch = "x86_64")]
        if let Some(word) = self.words().get(at) {
            // SAFETY: CLDEMOTE is a hint about a cache line and changes no memory, no register and
            // no flag; processors without it take it as one of the no-operations that it was made
            // from (Intel SDM 2A, CLDEMOTE), and no address makes it fault.
            unsafe {
                core::arch::asm!("cldemote [{}]", in(reg) word, options(nostack, preserves_flags))
            }
        }
    }
}
