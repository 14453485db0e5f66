//! What two processors must have in common for a process to move between them.
//!
//! The dynamic loader sizes its save area for the vector state when a program
//! starts, and signal frames have the kernel's size, so both nodes must save the
//! same components in the same room (Intel SDM vol. 1 §13).

use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

/// The vector state that a processor and its kernel save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processor {
    /// Enabled components (XCR0).
    pub components: u64,
    /// Bytes of the XSAVE area for them.
    pub size: u32,
}

/// This machine's; `None` without XSAVE, where processes cannot move.
#[must_use]
pub fn processor() -> Option<Processor> {
    #[target_feature(enable = "xsave")]
    fn components() -> u64 {
        // SAFETY: register 0 exists where OSXSAVE is set.
        unsafe { _xgetbv(0) }
    }
    const OSXSAVE: u32 = 1 << 27;
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return None;
    }
    // SAFETY: OSXSAVE says that the instruction is there and enabled.
    let components = unsafe { components() };
    Some(Processor { components, size: __cpuid_count(0xd, 0).ebx })
}

/// Components that a process has only when it has asked for them: the data of AMX's tiles
/// (Linux 5.16, `Documentation/arch/x86/xstate.rst`).
pub(crate) const ASKED_FOR: u64 = 1 << 18;

/// Bytes of the XSAVE area, in its standard format, that the components of this machine end in
/// which every process has.
pub(crate) fn common_size() -> usize {
    /// The legacy area and the header.
    const LEAST: u32 = 576;
    let components = processor().map_or(0, |found| found.components) & !ASKED_FOR;
    let ends = (2..63).filter(|n| components >> n & 1 != 0).map(|n| {
        let found = __cpuid_count(0xd, n);
        found.ebx.saturating_add(found.eax)
    });
    ends.fold(LEAST, u32::max) as usize
}
