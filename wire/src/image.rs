//! A process image: what moves when a process moves.
//!
//! ```text
//! image := round* HEAD part END          (frames of crate::link)
//! round := part ROUND                    (out only, while the program still runs)
//! part  := AREAS* (PAGES | GONE)*
//! ```
//!
//! Memory areas are described as ranges with a protection; which file lay behind a
//! range is known at home alone. Each list of areas replaces the one before: what is
//! in both keeps its pages. Pages that were never sent, or are gone, read as zero;
//! with [`head_flags::DELTA`], on the way home, what is not mentioned is as home has
//! it.
//!
//! Bound to x86-64 and 4 KiB pages. [`VERSION`] changes with every change here.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Version of this layout.
pub const VERSION: u32 = 2;
/// Bytes in a page.
pub const PAGE: u64 = 4096;
/// Most memory areas of one image: the kernel's own limit (`vm.max_map_count`) is
/// 65530 unless raised.
pub const MAX_AREAS: usize = 65_536;
/// Most areas in one [`crate::link::kind::AREAS`] frame.
pub const AREAS_PER_FRAME: usize = 4096;
/// Most pages in one [`crate::link::kind::PAGES`] frame.
pub const PAGES_PER_FRAME: u64 = 64;
/// Largest XSAVE area that is carried, in bytes. 2,696 with AVX-512 and PKRU;
/// AMX (11,008) is refused.
pub const MAX_XSAVE: usize = 4096;

/// First address of the region that conet keeps for itself in a process.
pub const REGION: u64 = 0x2000_0000_0000;
/// Length of that region in bytes.
pub const REGION_LEN: u64 = 0x0100_0000;
/// One past the highest address that a user process can map without asking for
/// more (47 bits).
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// General registers in the order of `struct user_regs_struct` (sys/user.h)
/// up to `ss`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
#[allow(missing_docs, reason = "the names are the processor's")]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rip: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub fs_base: u64,
    pub gs_base: u64,
}

/// Addresses that `prctl(PR_SET_MM_MAP)` sets (`struct prctl_mm_map`, Linux 3.18).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
#[allow(missing_docs, reason = "the names are the kernel's, man 2 PR_SET_MM")]
pub struct MemoryMap {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

/// Addresses of the entry points in the program's vDSO; 0 where it has none.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
#[allow(missing_docs, reason = "one per symbol, vdso(7)")]
pub struct VdsoEntries {
    pub clock_gettime: u64,
    pub gettimeofday: u64,
    pub time: u64,
    pub clock_getres: u64,
    pub getcpu: u64,
    pub getrandom: u64,
}

/// Why an image comes home; [`Head::reason`].
///
/// 0 when it goes out or was asked for.
pub mod reason {
    /// It was asked to come home.
    pub const ASKED: u32 = 0;
    /// A system call outside the table; the detail is its number.
    pub const CALL: u32 = 1;
    /// A fault; the detail is the signal.
    pub const FAULT: u32 = 2;
    /// A 32-bit system call (`int 0x80`); the detail is its number.
    pub const CALL_32: u32 = 3;
    /// A handled signal waits at home; the detail is the signal.
    pub const SIGNAL: u32 = 4;
    /// It makes a child, which cannot be made away; the detail is one of
    /// [`crate::family::why`].
    pub const FORK: u32 = 5;
}

/// Body of [`crate::link::kind::HEAD`]; `xsave_len` bytes of XSAVE area follow.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Head {
    /// [`VERSION`].
    pub version: u32,
    /// Length of the XSAVE area that follows, at most [`MAX_XSAVE`].
    pub xsave_len: u32,
    /// General registers.
    pub registers: Registers,
    /// Blocked signals, bit n−1 for signal n.
    pub blocked: u64,
    /// Signals for which the program has a handler, same bits.
    pub handled: u64,
    /// Addresses known to the kernel.
    pub memory_map: MemoryMap,
    /// Restartable sequence area (`rseq(2)`), 0 if none.
    pub rseq_addr: u64,
    /// Its length in bytes.
    pub rseq_len: u32,
    /// Its signature.
    pub rseq_signature: u32,
    /// Head of the robust futex list, 0 if none.
    pub robust_addr: u64,
    /// Its length in bytes.
    pub robust_len: u64,
    /// Entry points to patch, so that clocks read as at home.
    pub vdso: VdsoEntries,
    /// 1 if a call is pending in the home kernel, whose result completes the
    /// program's state.
    pub pending: u32,
    /// One of [`reason`].
    pub reason: u32,
    /// Detail of the reason.
    pub detail: u64,
    /// Bits of [`head_flags`].
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
    /// Command name, as in `prctl(PR_SET_NAME)`, NUL-padded.
    pub name: [u8; 16],
    /// Descriptors at home that the program must not touch: the link, the process's
    /// own `/proc/self/maps`, and the socket to its daemon.
    pub hidden_fds: [u64; 3],
    /// Processor time that the process has used at home, in nanoseconds.
    pub cpu_time: i64,
    /// Soft limits that the remote kernel enforces: `RLIMIT_STACK`,
    /// `RLIMIT_DATA`, `RLIMIT_AS`, in bytes.
    pub limits: [u64; 3],
    /// Home clocks as the program may last have read them; coming home waits
    /// until they are reached, so that time never goes back.
    pub clocks: Clocks,
}

/// Flags of a [`Head`].
pub mod head_flags {
    /// Only what has changed since the process left comes home: pages that are neither
    /// sent nor gone are as home has them.
    pub const DELTA: u32 = 1;
}

/// Flags of an [`Area`].
pub mod area_flags {
    /// Grows downwards (`MAP_GROWSDOWN`): the stack.
    pub const GROWS_DOWN: u32 = 1;
    /// A file lies behind it at home.
    pub const FILE: u32 = 2;
    /// Kept free at the remote node (mapped without access), because home has
    /// something there that does not travel (vvar).
    pub const HOLD: u32 = 4;
    /// The program's vDSO: its copy is patched at the remote node and does not
    /// travel home.
    pub const VDSO: u32 = 8;
    /// Mapped or moved since the last list, or since the process left. What memory the
    /// receiver has there is another area's; at home, what anonymous memory.
    pub const NEW: u32 = 16;
    /// In a delta: one mapping with the area that ends where this begins.
    pub const JOINED: u32 = 32;
}

/// One memory area: a range of whole pages with one protection.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Area {
    /// First address, a multiple of [`PAGE`].
    pub start: u64,
    /// One past the last address, a multiple of [`PAGE`].
    pub end: u64,
    /// `PROT_READ` 1, `PROT_WRITE` 2, `PROT_EXEC` 4.
    pub prot: u32,
    /// Bits of [`area_flags`].
    pub flags: u32,
}

/// Pages that lie together ([`crate::pages`]).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PageRun {
    /// Address of the first page.
    pub addr: u64,
    /// Number of pages, at least 1.
    pub count: u64,
}

impl PageRun {
    /// One past its last address; `None` where there is no such.
    #[must_use]
    pub const fn end(&self) -> Option<u64> {
        match self.count.checked_mul(PAGE) {
            Some(bytes) => self.addr.checked_add(bytes),
            None => None,
        }
    }
}

/// Body of [`crate::link::kind::END`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct End {
    /// Areas sent.
    pub areas: u64,
    /// Pages sent.
    pub pages: u64,
}

/// A node's clocks in nanoseconds, read one after the other.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Clocks {
    /// `CLOCK_REALTIME`.
    pub realtime: i64,
    /// `CLOCK_MONOTONIC`.
    pub monotonic: i64,
    /// `CLOCK_BOOTTIME`.
    pub boottime: i64,
    /// `CLOCK_MONOTONIC_RAW`.
    pub raw: i64,
}

/// Body of [`crate::link::kind::COMMIT`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Commit {
    /// What to add to the remote clocks to read the home clocks, in nanoseconds.
    pub offsets: Clocks,
}

/// Steps of a restore; [`crate::link::Refusal::step`].
pub mod step {
    /// A frame was malformed or out of order.
    pub const FRAME: u32 = 1;
    /// The layout's version or the vector state does not match.
    pub const VERSION: u32 = 2;
    /// `mmap` of an area.
    pub const MAP: u32 = 3;
    /// `mprotect` of an area.
    pub const PROTECT: u32 = 4;
    /// A page outside of the areas.
    pub const PAGE: u32 = 5;
    /// `prctl(PR_SET_MM_MAP)`.
    pub const MM_MAP: u32 = 6;
    /// The sandbox (capabilities, filter).
    pub const SANDBOX: u32 = 7;
    /// The local vDSO.
    pub const VDSO: u32 = 8;
}

impl Area {
    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it is empty, which a valid area never is.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.end == self.start
    }

    /// Whether it is a range that a program may have: page-aligned, not empty,
    /// below [`TASK_SIZE`], clear of [`REGION`].
    #[must_use]
    pub const fn is_valid(&self) -> bool {
        self.start.is_multiple_of(PAGE)
            && self.end.is_multiple_of(PAGE)
            && self.start < self.end
            && self.end <= TASK_SIZE
            && self.prot <= 7
            && !overlaps_region(self.start, self.end)
    }
}

/// Whether `start..end` touches conet's own [`REGION`].
#[must_use]
pub const fn overlaps_region(start: u64, end: u64) -> bool {
    start < REGION + REGION_LEN && end > REGION
}
