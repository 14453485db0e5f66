//! Processes that move.
//!
//! A moving process splits in two, as in MOSIX: its memory and registers go to the
//! *remote* node; the original process stays as its *deputy*, with its pid, files,
//! working directory, credentials, children, timers and terminal. System calls that
//! need those are forwarded over a link directly between the two. Programs are not
//! changed and do not notice.
//!
//! This crate is mechanism: who may move what to where is decided above it.
//!
//! - [`mover`]: the home side. [`mover::move_out`] freezes a process, streams its
//!   image and turns it into a deputy; [`mover::bring_home`] brings it home again.
//! - [`hosting`]: the remote side's node. [`hosting::start`] makes the sandbox and
//!   leaves a warden in it; [`hosting::Warden`] talks to one, also after a restart.
//! - [`family`]: processes that divide while they are away.
//! - [`life`]: whether the other half can be reached.
//! - [`locks`]: why a process cannot move.
//! - [`trace`]: which calls are forwarded.
//!
//! The code that runs inside processes is the embedded agent (`agent/`), and what it
//! decides is in `conet-deputy-core`.

mod agent;
mod channel;
pub mod family;
pub mod hosting;
mod image;
pub mod life;
pub mod locks;
pub mod mover;
pub mod probe;
mod procfs;
mod ranges;
mod sys;
pub mod trace;
mod vdso;

pub use channel::{ChannelError, LinkSecret};
pub use conet_deputy_core::boot::family::Ticket;
pub use conet_deputy_core::boot::{Status, phase};
pub use procfs_view::{ProcessView, view};
pub use sys::processor::{Processor, processor};

mod procfs_view {
    use crate::procfs;
    use rustix::process::Pid;
    use std::io;

    /// What others want to know of a process.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct ProcessView {
        /// Command name.
        pub name: String,
        /// Real user.
        pub uid: u32,
        /// Parent process.
        pub parent: i32,
        /// Stopped by job control.
        pub is_stopped: bool,
        /// Ended, but not waited for.
        pub is_zombie: bool,
        /// Clock ticks since boot at which it began: with the pid, its identity.
        pub start_time: u64,
        /// Signals that are pending and have a handler, bit n−1 for signal n.
        pub handled_pending: u64,
    }

    /// Looks at `pid`.
    ///
    /// # Errors
    /// When there is no such process, or `/proc` is not readable.
    pub fn view(pid: Pid) -> io::Result<ProcessView> {
        let facts = procfs::facts(pid)?;
        Ok(ProcessView {
            uid: facts.uids[0],
            parent: facts.parent,
            is_stopped: facts.state == 'T',
            is_zombie: matches!(facts.state, 'Z' | 'X'),
            start_time: facts.start_time,
            handled_pending: facts.pending & facts.handled,
            name: facts.name,
        })
    }
}
