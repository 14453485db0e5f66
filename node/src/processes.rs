//! What the daemon needs of whoever moves processes, and what it offers in return.
//!
//! ```text
//!   control socket ──► register, list, migrate, why ──►┌───────────┐
//!   peers' sessions ──► handle_peer_ask ──────────────►│ Processes │
//!   time ─────────────► handle_timeout ───────────────►└───────────┘
//!                                                        │      ▲ handle_event
//!                                        starts threads ─┘      │
//!                              mover threads ── NodeHandle::post┘
//!                                            └─ NodeHandle::ask_peer ──► peers
//! ```
//!
//! All methods run on the control thread, which owns the process table; none may
//! block there. What takes time (a move, a look through `/proc`) runs on a thread
//! of its own, which holds the [`Responder`], asks peers by
//! [`NodeHandle::ask_peer`](crate::daemon::NodeHandle::ask_peer), and sends what
//! it learned to the table by [`NodeHandle::post`](crate::daemon::NodeHandle::post).
//!
//! Invariant: a process is acted on only for a [`Caller`] that may act for its
//! owner, and never for a peer that lacks the grant.

use std::time::Instant;

use conet_wire::control::{Failure, How, Process, Trace};

use crate::caller::Caller;
use crate::config::PeerConfig;
use crate::control::Responder;
use crate::peers::PeerResponder;

/// The processes of this node that may move, and those of others that run here.
pub trait Processes {
    /// What threads tell the table.
    type Event: Send + 'static;

    /// Whether processes of others can run here at all; told to peers.
    fn hosts(&self) -> bool;

    /// `pid` may move from now on, where `node` is given to that node only and as
    /// soon as it has become its program. It asks this itself, just before its
    /// `execve`.
    ///
    /// # Errors
    ///
    /// What the caller is told.
    fn register(&mut self, caller: Caller, pid: u32, node: Option<&str>) -> Result<(), Failure>;

    /// The processes that the caller may see, by pid.
    fn list(&mut self, caller: Caller) -> Vec<Process>;

    /// Moves `pid` to the peer named `to`, or `home`.
    fn migrate(&mut self, caller: Caller, pid: u32, to: &str, how: How, answer: Responder);

    /// Tells whether and why `pid` may not move.
    fn why(&mut self, caller: Caller, pid: u32, answer: Responder);

    /// Which calls of `pid` are forwarded; takes their times for some seconds from now
    /// on where that is wanted.
    ///
    /// # Errors
    ///
    /// What the caller is told.
    fn trace(&mut self, caller: Caller, pid: u32, timed: bool) -> Result<Trace, Failure>;

    /// Another node's process manager asks. Its session has authenticated it and
    /// it has at least one grant; which one it needs is decided here.
    fn handle_peer_ask(&mut self, peer: &PeerConfig, message: Vec<u8>, answer: PeerResponder);

    /// A thread of this manager tells something.
    fn handle_event(&mut self, event: Self::Event);

    /// The time that [`Self::poll_timeout`] named has come.
    fn handle_timeout(&mut self, now: Instant);

    /// When [`Self::handle_timeout`] is wanted next.
    fn poll_timeout(&self) -> Option<Instant>;
}

/// The failure for a process that is not there, or not the caller's to see:
/// which of the two is not told.
#[must_use]
pub fn no_such_process(pid: u32) -> Failure {
    Failure::new(
        "no-such-process",
        format!("process {pid} is not one of yours that conet runs"),
        "list them with conet ps, or start one with conet run",
    )
}
