//! What lies where in conet's region of a process, and the words that the home
//! daemon and the deputy leave each other there.
//!
//! ```text
//! REGION + 0         the agent's program: code, constants, data, buffers
//!        + VDSO      the local kernel's vDSO (remote side only)
//!        + BOOT      Boot: written before the start; Status and the counts of
//!                    calls: written by the deputy
//!        + STATE     the program's Head and vector state while it is here
//! ```
//!
//! The daemon reads and writes through `/proc/PID/mem`, so each field is written
//! by one side only while the deputy runs; [`Status::interrupt`],
//! [`Status::is_timed`] and [`Status::hold`] are the daemon's.

pub mod family;

use conet_wire::image::REGION;
use conet_wire::link::{Desc, MAX_DESCS};
use family::Ticket;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Where the remote side maps the local vDSO.
pub const VDSO: u64 = REGION + 0x00a0_0000;
/// Where a deputy's stack begins; it grows downwards.
pub const STACK_TOP: u64 = REGION + 0x00d8_0000;
/// Scratch memory for the calls that the mover makes in the process's name.
pub const SCRATCH: u64 = REGION + 0x00d8_0000;
/// Where [`Boot`] lies.
pub const BOOT: u64 = REGION + 0x00e0_0000;
/// Where [`Status`] lies.
pub const STATUS: u64 = BOOT + 0x8000;
/// Where a deputy leaves the call ([`Pending`]) that it is finishing at home.
pub const PENDING: u64 = BOOT + 0xa000;
/// Where the deputy counts calls: one [`Count`] for each number below [`COUNTS_LEN`].
pub const COUNTS: u64 = BOOT + 0x1_0000;
/// How many there are; x86-64 has no call beyond.
pub const COUNTS_LEN: usize = 512;
/// Where [`conet_wire::image::Head`] and the vector state lie.
pub const STATE: u64 = REGION + 0x00f0_0000;
/// Offset of the vector state from [`STATE`].
pub const STATE_XSAVE: u64 = 0x1000;

/// Places in the agent's code, as offsets from its entry point.
///
/// ```text
/// gate:    load arguments
/// check:   if Status::interrupt is set, go to abort
/// syscall: syscall
/// end:     return
/// abort:   return ABORTED
/// parked:  return PARKED
/// finish:  restart_syscall; return
/// ```
pub mod entry {
    /// Start of a deputy.
    pub const DEPUTY: u64 = 64;
    /// First instruction of the check.
    pub const CHECK: u64 = 192;
    /// The system call instruction.
    pub const SYSCALL: u64 = 256;
    /// The instruction after it.
    pub const END: u64 = 258;
    /// Returns [`super::ABORTED`].
    pub const ABORT: u64 = 320;
    /// Returns [`super::PARKED`].
    pub const PARKED: u64 = 384;
    /// Runs `restart_syscall` when the process is home again.
    pub const FINISH: u64 = 448;
    /// The system call instruction there.
    pub const FINISH_SYSCALL: u64 = 453;
    /// The instruction after it.
    pub const FINISH_END: u64 = 455;
}

/// Result of a gated call that did not run because of [`Status::interrupt`].
pub const ABORTED: i64 = -4000;
/// Added to the kernel's mark (−512 to −514, `ERESTARTSYS` and its kin) of a gated call
/// that had begun, was interrupted without effect, and is to be issued again.
pub const BROKEN_OFF: i64 = -3500;
/// Result of a gated call that stays pending in the kernel
/// (`-ERESTART_RESTARTBLOCK`); `restart_syscall(2)` continues it.
pub const PARKED: i64 = -4001;

/// How long a program that is to go on to another node is held for its mover, in
/// milliseconds. A mover takes it within one or two; one that does not come has died.
pub const HOLD_MS: u32 = 1000;

/// [`Status::phase`].
pub mod phase {
    /// The region is being prepared; the program still runs here.
    pub const INSTALLING: u32 = 0;
    /// The deputy is about to begin.
    pub const STARTING: u32 = 7;
    /// Serving calls.
    pub const SERVING: u32 = 1;
    /// The image is coming in.
    pub const COMING: u32 = 2;
    /// The program runs here again.
    pub const HOME: u32 = 3;
    /// The program is here, and a call that was pending is being finished.
    pub const FINISHING: u32 = 4;
    /// The link ended or lied; the process ends itself in a moment.
    pub const LOST: u32 = 5;
    /// The program called `exit_group`.
    pub const EXITING: u32 = 6;
    /// The program is here, complete, and waits to be taken to another node. Its state
    /// is at [`super::STATE`]; where nobody takes it within [`super::HOLD_MS`] it runs.
    pub const HELD: u32 = 8;
}

/// Why a deputy gave up; [`Status::fault`].
pub mod fault {
    /// The link ended.
    pub const END: u32 = 1;
    /// A record was forged, replayed or malformed.
    pub const FORGED: u32 = 2;
    /// A request broke the protocol.
    pub const PROTOCOL: u32 = 3;
    /// The image could not be restored; `detail` is the step and the error.
    pub const RESTORE: u32 = 4;
}

/// A call that is pending in the home kernel.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Pending {
    /// 1 if there is one.
    pub present: u32,
    /// Valid entries of `descs`.
    pub count: u32,
    /// Buffer set of the deputy that holds its data.
    pub set: u32,
    /// Zero.
    pub reserved: u32,
    /// Its buffers; outputs are at [`Pending::at`] or in place.
    pub descs: [Desc; MAX_DESCS],
    /// Where in the deputy's memory each output lies.
    pub at: [u64; MAX_DESCS],
}

/// What a deputy needs to begin; at [`BOOT`].
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Boot {
    /// Descriptor of the link.
    pub link: u32,
    /// Descriptor of the process's own `/proc/self/maps`.
    pub maps: u32,
    /// 0 AES-128-GCM, 1 ChaCha20-Poly1305, 2 none.
    pub cipher: u32,
    /// Descriptor of the socket to the daemon.
    pub daemon: u32,
    /// Key of what this side seals; wiped by the deputy.
    pub seal_key: [u8; 32],
    /// Key of what the other side sealed; wiped by the deputy.
    pub open_key: [u8; 32],
    /// Number of the next record sealed here.
    pub seal_next: u64,
    /// Number of the next record opened here.
    pub open_next: u64,
    /// Registered `rseq` area, 0 if none.
    pub rseq_addr: u64,
    /// Its length.
    pub rseq_len: u32,
    /// Its signature.
    pub rseq_signature: u32,
    /// The program's mask, without what the deputy adds.
    pub blocked: u64,
    /// `clock_gettime` of the process's own vDSO, 0 if none.
    pub clock: u64,
    /// Body of COMMIT, which the deputy sends first of all.
    pub offsets: conet_wire::image::Clocks,
    /// The call that was pending when the process moved.
    pub pending: Pending,
}

impl core::fmt::Debug for Boot {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Boot").field("link", &self.link).finish_non_exhaustive()
    }
}

/// What the daemon of a hosting node sends to the host role over its control
/// socket, before anything else.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Launch {
    /// Id of the process at home, and so of the remote.
    pub pid: i32,
    /// As [`Boot::cipher`].
    pub cipher: u32,
    /// As [`Boot::seal_key`].
    pub seal_key: [u8; 32],
    /// As [`Boot::open_key`].
    pub open_key: [u8; 32],
    /// As [`Boot::seal_next`].
    pub seal_next: u64,
    /// As [`Boot::open_next`].
    pub open_next: u64,
    /// What to add to this node's real-time clock before anything else, in ns: 0,
    /// but in a lab, where hosts on one kernel are to have different clocks.
    pub clock_skew: i64,
    /// Names the stay.
    pub ticket: Ticket,
    /// 1 to follow what the program changes, where the kernel can; else all of its
    /// memory goes home.
    pub follows: u64,
}

impl core::fmt::Debug for Launch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Launch").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// Descriptors that the host role inherits.
pub mod host_fd {
    /// Stream to the daemon, for the launch only.
    pub const CONTROL: i32 = 3;
    /// The link.
    pub const LINK: i32 = 4;
    /// Where the daemon, also a later one, reaches the warden.
    pub const LISTEN: i32 = 5;
}

/// Kinds of [`family::ToWarden`] and [`family::FromWarden`].
pub mod warden {
    /// To the warden: ring the remote's bell, there is a frame on the link.
    pub const BELL: u32 = 1;
    /// To the warden: stop the remote.
    pub const STOP: u32 = 2;
    /// To the warden: let it continue.
    pub const CONTINUE: u32 = 3;
    /// To the warden: end it.
    pub const KILL: u32 = 4;
    /// To the warden: the remote is about to divide, and this is its child's link.
    pub const BRANCH: u32 = 5;
    /// To the warden: have the remote send home a slice of what the program has changed.
    pub const SLICE: u32 = 6;
    /// From the warden: the remote ended.
    pub const ENDED: u32 = 16;
    /// From the warden: this remote is here; on connection each of them, and each new one.
    pub const HERE: u32 = 17;
    /// From the warden, on connection: all that are here have been named.
    pub const ALL: u32 = 18;
}

/// What a deputy says of itself; at [`STATUS`].
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Status {
    /// One of [`phase`].
    pub phase: u32,
    /// Set by the daemon: ask the program to come home.
    pub interrupt: u32,
    /// Calls run for the remote side.
    pub calls: u64,
    /// Number of the call last begun.
    pub last_call: u64,
    /// The program's mask.
    pub blocked: u64,
    /// [`conet_wire::image::reason`] of coming home.
    pub reason: u32,
    /// One of [`fault`].
    pub fault: u32,
    /// Detail of reason or fault.
    pub detail: u64,
    /// Pages that came home.
    pub pages: u64,
    /// Pages of them that differed.
    pub changed: u64,
    /// The link's descriptor.
    pub link: u32,
    /// Set by the daemon: take the time of calls.
    pub is_timed: u32,
    /// 1 if only what had changed came home.
    pub is_delta: u32,
    /// Set by the daemon: it goes on to another node, so hold it when it has come.
    pub hold: u32,
    /// How long the program did not run when it came home, by the clocks of home as the
    /// remote half reads them, in nanoseconds.
    pub frozen: u64,
    /// Slices of what was changed away that have come while the program ran there.
    pub slices: u64,
    /// Pages in them.
    pub sliced: u64,
    /// How often a round of slices was complete.
    pub rounds: u64,
    /// While the other half shares its memory with another's, as after `vfork`: that
    /// one's process id, as the process sees it; else 0. It must not come home then,
    /// or it would share it no more.
    pub shares: u32,
    /// 1 while a slice is coming in.
    pub receiving: u32,
}

/// What is known of one system call, at [`COUNTS`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Count {
    /// How often it ran here.
    pub calls: u64,
    /// How many of these were timed here.
    pub timed: u64,
    /// How long they ran, in nanoseconds.
    pub ran: u64,
    /// How many were timed by the program's side.
    pub waited_for: u64,
    /// How long the program waited for them, in nanoseconds.
    pub waited: u64,
}
