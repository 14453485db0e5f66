//! The processor's time stamp counter.

#![allow(unsafe_code, reason = "RDTSC")]

/// Whether this kind of processor has one that is read here.
pub(super) const HAS_COUNTER: bool = cfg!(target_arch = "x86_64");

/// Its value; zero where there is none.
#[inline]
pub(super) fn counter() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has RDTSC; it reads no memory. Where a process has forbidden it to
    // itself (PR_SET_TSC, `man 2 prctl`), the C library's clock would end the process too.
    return unsafe { core::arch::x86_64::_rdtsc() };
    #[cfg(not(target_arch = "x86_64"))]
    0
}
