//! What wakes a process that waits for another: the end of a child, or somebody who
//! asks it to end.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};

use crate::LabError;

/// Watched signals. Not undone: a process does so for its whole life.
pub(super) struct Signals {
    wakes: UnixStream,
    asked: Arc<AtomicBool>,
}

impl Signals {
    pub(super) fn watch() -> Result<Self, LabError> {
        let make = || -> io::Result<Self> {
            let (wakes, written) = UnixStream::pair()?;
            let asked = Arc::new(AtomicBool::new(false));
            for signal in [SIGINT, SIGTERM, SIGHUP] {
                // Before what wakes: who is woken is to find it set.
                signal_hook::flag::register(signal, Arc::clone(&asked))?;
            }
            for signal in [SIGCHLD, SIGINT, SIGTERM, SIGHUP] {
                signal_hook::low_level::pipe::register(signal, written.try_clone()?)?;
            }
            Ok(Self { wakes, asked })
        };
        make().map_err(LabError::step("watch for signals"))
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

    /// Whether somebody has asked this process to end, since the last look.
    pub(super) fn take_request(&self) -> bool {
        self.asked.swap(false, Ordering::Relaxed)
    }
}
