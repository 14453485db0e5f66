//! What is said when a process divides, apart from the link: between a deputy and its
//! daemon at home, and between daemon, warden and remotes at the hosting node.
//!
//! All of it goes over unix sockets that keep message boundaries (SOCK_SEQPACKET,
//! man 7 unix), between programs of one build on one machine.
//!
//! ```text
//! home:     deputy ── ToDaemon ──► daemon      daemon ── ToDeputy (link, socket) ──► deputy
//! hosting:  daemon ── ToWarden (link) ──► warden ── ToWarden (link, socket) ──► the parent
//!           child ── ticket ──► warden ── FromWarden ──► daemon
//! ```

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Names a stay, as `conet_wire::moving::Ticket`.
pub type Ticket = [u8; 16];

/// Keys of a link and the numbers of its next records.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LinkKeys {
    /// 0 AES-128-GCM, 1 ChaCha20-Poly1305.
    pub cipher: u32,
    /// Zero.
    pub reserved: u32,
    /// Key of what this side seals.
    pub seal: [u8; 32],
    /// Key of what the other side sealed.
    pub open: [u8; 32],
    /// Number of the next record sealed here.
    pub seal_next: u64,
    /// Number of the next record opened here.
    pub open_next: u64,
}

impl core::fmt::Debug for LinkKeys {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("LinkKeys").field("cipher", &self.cipher).finish_non_exhaustive()
    }
}

/// From a deputy to its daemon: one byte. The kernel adds who says it
/// (SCM_CREDENTIALS).
pub mod to_daemon {
    /// The process makes a child: [`super::ToDeputy`] is the answer.
    pub const FORK: u8 = b'F';
    /// From the child, first of all: it is there. One byte answers, [`NOTED`], when
    /// its record is kept.
    pub const BORN: u8 = b'B';
    /// The answer to [`BORN`].
    pub const NOTED: u8 = b'N';
}

/// A daemon's answer to [`to_daemon::FORK`]; with it come the descriptors of the
/// child's link and of the child's own socket to its daemon, in this order.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ToDeputy {
    /// 0, or one of `conet_wire::family::why`; then nothing comes with it.
    pub refused: u64,
    /// Names the child's stay.
    pub ticket: Ticket,
    /// Of its link.
    pub keys: LinkKeys,
}

/// A command to the warden, and what it hands to a remote that divides.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ToWarden {
    /// One of [`super::warden`].
    pub kind: u32,
    /// Zero.
    pub reserved: u32,
    /// The stay concerned.
    pub ticket: Ticket,
    /// With [`super::warden::BRANCH`]: the child's stay, whose link comes with this.
    pub child: Ticket,
    /// With [`super::warden::BRANCH`]: keys of the child's link.
    pub keys: LinkKeys,
}

/// What a warden says; with [`super::warden::HERE`] the kernel tells the remote's
/// process id as its receiver counts (SCM_CREDENTIALS).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FromWarden {
    /// One of [`super::warden`].
    pub kind: u32,
    /// With [`super::warden::ENDED`]: the wait status (man 2 wait). With
    /// [`super::warden::HERE`]: 1, or 0 for a child that is about to come, whose process
    /// id is not told.
    pub status: u32,
    /// The stay concerned.
    pub ticket: Ticket,
}

/// Most processes of one sandbox, the warden apart; a process that divides beyond it
/// goes home and does so there.
pub const MAX_REMOTES: usize = 128;

/// Descriptors of a remote. It has no others, but while it divides.
pub mod remote_fd {
    /// A userfaultfd of the memory that came here; where a standard input would be, which
    /// is not needed. A child has its maps there instead.
    pub const UFFD: i32 = 0;
    /// Its own `/proc/self/maps`.
    pub const MAPS: i32 = 3;
    /// The link.
    pub const LINK: i32 = super::super::host_fd::LINK;
    /// Its own `/proc/self/pagemap`.
    pub const PAGEMAP: i32 = 5;
    /// To the warden.
    pub const WARDEN: i32 = 6;
    /// The host's `/proc`, by O_PATH: a child opens its own maps through it, and the
    /// filter allows nothing else.
    pub const PROC: i32 = 7;
    /// The first number that is free.
    pub const FREE: i32 = 8;
    /// One past the last number that it may have (RLIMIT_NOFILE).
    pub const LIMIT: u64 = 12;
}
