//! What wakes a process that waits for another: the end of a child, or somebody who
//! asks it to end.
//!
//! A Ctrl-C goes to the terminal's whole foreground group, the child included: it is
//! not passed on, or an interpreter that only interrupts its line would be ended. One
//! that somebody sends to this process alone is.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Signal, getpgrp};
use rustix::termios::tcgetpgrp;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};

use crate::LabError;

/// Watched signals. Not undone: a process does so for its whole life.
pub(super) struct Signals {
    wakes: UnixStream,
    /// SIGINT has come.
    interrupted: Arc<AtomicBool>,
    /// SIGTERM or SIGHUP has come.
    asked: Arc<AtomicBool>,
    terminal: Option<File>,
}

impl Signals {
    /// Watches for a process of the outside.
    pub(super) fn watch() -> Result<Self, LabError> {
        Self::make(true).map_err(LabError::step("watch for signals"))
    }

    /// Watches for process 1: a terminal's SIGINT is not for it, and the kernel keeps
    /// it away from a process 1 that has no handler.
    pub(super) fn watch_as_init() -> Result<Self, LabError> {
        Self::make(false).map_err(LabError::step("watch for signals"))
    }

    fn make(interrupts: bool) -> io::Result<Self> {
        let (wakes, written) = UnixStream::pair()?;
        let interrupted = Arc::new(AtomicBool::new(false));
        let asked = Arc::new(AtomicBool::new(false));
        let mut flags = vec![(SIGTERM, &asked), (SIGHUP, &asked)];
        if interrupts {
            flags.push((SIGINT, &interrupted));
        }
        for (signal, flag) in flags {
            // Before what wakes: who is woken is to find it set.
            signal_hook::flag::register(signal, Arc::clone(flag))?;
            signal_hook::low_level::pipe::register(signal, written.try_clone()?)?;
        }
        signal_hook::low_level::pipe::register(SIGCHLD, written)?;
        // None without a controlling terminal.
        let terminal = File::open("/dev/tty").ok().filter(|_| interrupts);
        Ok(Self { wakes, interrupted, asked, terminal })
    }

    /// Waits for the next signal; one that came since the last wait counts.
    pub(super) fn sleep(&self) -> Result<(), LabError> {
        let mut bytes = [0; 64];
        loop {
            match (&self.wakes).read(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LabError::step("wait for a signal")(error)),
                Ok(_) => return Ok(()),
            }
        }
    }

    /// What a child is to be told, since the last look.
    pub(super) fn take_request(&self) -> Option<Signal> {
        if self.asked.swap(false, Ordering::Relaxed) {
            return Some(Signal::TERM);
        }
        let interrupted = self.interrupted.swap(false, Ordering::Relaxed);
        (interrupted && !self.is_in_foreground()).then_some(Signal::INT)
    }

    /// Whether what is typed at the terminal reaches the child as well.
    fn is_in_foreground(&self) -> bool {
        self.terminal
            .as_ref()
            .is_some_and(|terminal| tcgetpgrp(terminal).is_ok_and(|group| group == getpgrp()))
    }
}
