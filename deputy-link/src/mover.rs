//! The home side of a move.
//!
//! ```text
//! move_out:   READY? ─ clocks ─ rounds ─ freeze ─ the rest ─ PREPARED? ─ the deputy's registers ─ let go, it sends COMMIT
//!             └──────────── anything fails: undo, the program goes on at home ─────────┘
//! bring_home: interrupt the deputy ─ it asks the remote half ─ image back ─ HOME ─ clean up
//! move_on:    rounds of the deputy's memory ─ as bring_home, but HELD ─ the rest ─ … as move_out
//! ```
//!
//! COMMIT is the point of no return: before it the process lives at home, after it
//! at the remote node, and it never runs at both. Between two borrowed calls the
//! stopped process always has its own registers, so if the daemon dies the kernel
//! lets it go on natively. Within one (some 10 µs) it would end by SIGTRAP: single
//! step outlives the tracer.
//!
//! Thread context: ptrace belongs to a thread, so each function does all of its
//! work on the caller's.

mod clocks;
mod home;
mod install;
mod mirror;
mod out;
mod relay;
mod slices;
mod tracker;

pub use home::{bring_home, take_out};
pub use out::{How, Method, Round, StopReason, move_out};
pub use relay::{Relayed, Wish, move_on};
pub use slices::slices;

use crate::channel::{Channel, ChannelError};
use crate::image::ImageError;
use crate::locks::Lock;
use crate::procfs;
use crate::sys::ptrace::TraceError;
use conet_deputy_core::boot::{self, STATUS, Status};
use conet_wire::image::step;
use conet_wire::link::{Refusal, kind};
use rustix::process::Pid;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use zerocopy::FromBytes;

/// How long a program may take to come home once it is asked.
const HOME_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a process did not move. It goes on where it was, unless said otherwise.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// It is locked at home.
    #[error("it must stay at home: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Locked(Vec<Lock>),
    /// It ended.
    #[error("the process has ended")]
    Gone,
    /// The other node refused the image.
    #[error("the other node could not take the image: {} failed with error {errno} at {addr:#x}", step_name(*.step))]
    Refused {
        /// The step.
        step: u32,
        /// The error number.
        errno: u32,
        /// The address concerned.
        addr: u64,
    },
    /// The link failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// It became another program again and again.
    #[error("it became another program while it was copied")]
    Replaced,
    /// The process could not be stopped or read.
    #[error("{0}")]
    Process(#[source] io::Error),
    /// It did not come home in time; it is still away.
    #[error("it did not come home within {} s; it is still away", HOME_TIMEOUT.as_secs())]
    Late,
    /// Its deputy gave up; the process ends.
    #[error("its other half was lost ({0})")]
    Lost(&'static str),
}

fn step_name(which: u32) -> &'static str {
    match which {
        step::FRAME => "reading the image",
        step::VERSION => "matching versions",
        step::MAP => "mapping memory",
        step::PROTECT => "protecting memory",
        step::PAGE => "placing a page",
        step::MM_MAP => "prctl(PR_SET_MM_MAP)",
        step::SANDBOX => "confining the process",
        step::VDSO => "mapping the vDSO",
        _ => "an unknown step",
    }
}

impl From<TraceError> for MoveError {
    fn from(error: TraceError) -> Self {
        match error {
            TraceError::Gone => Self::Gone,
            TraceError::JobStopped => Self::Locked(vec![Lock::Stopped]),
            other => Self::Process(io::Error::other(other.to_string())),
        }
    }
}

impl From<ImageError> for MoveError {
    fn from(error: ImageError) -> Self {
        match error {
            ImageError::Trace(error) => error.into(),
            ImageError::Read(error) => Self::Process(error),
            ImageError::Xsave(_) | ImageError::Tiles => Self::Locked(vec![Lock::Processor]),
        }
    }
}

/// A process that has moved.
#[derive(Debug)]
pub struct Moved {
    /// How it went.
    pub method: Method,
    /// How long it did not run between its last instruction at home and its first
    /// away.
    pub freeze: Duration,
    /// How long it was stopped before that, to make rounds possible.
    pub pause: Duration,
    /// How long the move took.
    pub total: Duration,
    /// Rounds of pre-copy.
    pub rounds: Vec<Round>,
    /// Memory areas sent.
    pub areas: u64,
    /// Pages sent, of 4 KiB.
    pub pages: u64,
    /// Of them, while it was stopped.
    pub frozen_pages: u64,
}

/// A process that has come home.
#[derive(Clone, Copy, Debug)]
pub struct Returned {
    /// From asking until it was at home.
    pub total: Duration,
    /// How much of this it did not run: from its last instruction away, by the clocks
    /// that the two nodes have compared.
    pub freeze: Duration,
    /// Pages that came with it.
    pub pages: u64,
    /// Pages that had come before, in slices.
    pub sliced: u64,
    /// Pages of them that differed from what was at home.
    pub changed: u64,
    /// Whether only pages that were changed away came; otherwise, all that it had.
    pub is_delta: bool,
    /// Calls that ran at home while it was away.
    pub calls: u64,
}

/// An error from `/proc`, which mostly means that the process is gone.
fn gone(error: io::Error) -> MoveError {
    match error.kind() {
        io::ErrorKind::NotFound => MoveError::Gone,
        _ if error.raw_os_error() == Some(libc::ESRCH) => MoveError::Gone,
        _ => MoveError::Process(error),
    }
}

fn expect(channel: &mut Channel, wanted: u32) -> Result<(), MoveError> {
    let (header, body) = channel.receive()?;
    if header.kind == wanted {
        return Ok(());
    }
    if header.kind == kind::REFUSED
        && let Ok((Refusal { step, errno, addr }, _)) = Refusal::read_from_prefix(body)
    {
        return Err(MoveError::Refused { step, errno, addr });
    }
    Err(ChannelError::Unexpected(header.kind).into())
}

/// Reads what the deputy in `pid` says of itself.
///
/// # Errors
/// When there is no such process, or no deputy in it.
pub fn status(pid: Pid) -> io::Result<Status> {
    read_status(&File::open(procfs::path(pid, "mem"))?)
}

fn read_status(memory: &File) -> io::Result<Status> {
    let mut bytes = [0; size_of::<Status>()];
    memory.read_exact_at(&mut bytes, STATUS)?;
    Status::read_from_bytes(&bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// What a deputy's [`Status::fault`] means.
#[must_use]
pub const fn fault_name(fault: u32) -> &'static str {
    match fault {
        boot::fault::END => "the link ended",
        boot::fault::FORGED => "a forged or replayed record came",
        boot::fault::PROTOCOL => "the protocol was broken",
        boot::fault::RESTORE => "the image could not be restored",
        _ => "unknown",
    }
}
