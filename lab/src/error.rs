//! Why a lab cannot be made, entered or removed; each text ends with what to do.

use std::io;
use std::path::PathBuf;

use conet_netsys::userns::UserNamespaceError;
use conet_netsys::{NameError, NetError};
use thiserror::Error;

/// A failed request about the lab.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LabError {
    /// The caller is not root.
    #[error("a lab makes network namespaces, which needs root: run it with sudo")]
    NotRoot,
    /// An ordinary user cannot have namespaces.
    #[error(
        "without root a lab needs a user namespace: {0}; see conet doctor, or run it with sudo"
    )]
    NoNamespace(#[source] UserNamespaceError),
    /// A container hides parts of its /proc.
    #[error(
        "cannot mount a /proc of one's own ({0}): containers that hide parts of theirs forbid it; \
         run it outside of the container, or as root"
    )]
    NoProc(#[source] io::Error),
    /// An ordinary user's machine did not come up, as it said itself.
    #[error("{said}")]
    Machine {
        /// Its one line.
        said: String,
    },
    /// There is a lab already, or the rest of one.
    #[error("a lab is up already; remove it with: conet lab down")]
    AlreadyUp,
    /// There is no lab.
    #[error("no lab is up; make one with: conet lab up")]
    NotUp,
    /// More or fewer hosts or guests than a lab has.
    #[error("{what} must be {least} to {most}; give another number")]
    Range {
        /// Hosts or guests.
        what: &'static str,
        /// The least.
        least: u8,
        /// The most.
        most: u8,
    },
    /// No host of that name.
    #[error("no lab host is named {name}; there are {known}")]
    NoSuchHost {
        /// The name asked for.
        name: String,
        /// Those there are.
        known: String,
    },
    /// The process that keeps a host's namespaces is gone.
    #[error("the lab host {name} is gone; make the lab anew: conet lab down, then conet lab up")]
    HostGone {
        /// The host.
        name: String,
    },
    /// The command was run inside a lab host.
    #[error("a lab host cannot remove its own lab; run conet lab down outside of it")]
    Inside,
    /// The kernel's network refused.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A name that the kernel does not take.
    #[error("not a name for a link or namespace: {0}; this is a bug, report it")]
    Name(#[from] NameError),
    /// A step on a file or a process failed.
    #[error("cannot {step}: {source}{}", at(path.as_ref()))]
    Step {
        /// What was tried.
        step: &'static str,
        /// The file, where one was concerned.
        path: Option<PathBuf>,
        /// What the kernel said.
        source: io::Error,
    },
    /// The program to become cannot be started.
    #[error("cannot run {} on the lab host ({source}); give a program that is there", program.display())]
    Program {
        /// As it was given.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process that should keep a host's namespaces did not come up.
    #[error("the lab host {name} did not come up: {said}; see conet lab down, and try again")]
    Holder {
        /// The host.
        name: String,
        /// What it wrote.
        said: String,
    },
    /// A host's daemon did not come up.
    #[error("the daemon of {name} did not come up: {said}; its log is {}", log.display())]
    Daemon {
        /// The host.
        name: String,
        /// The last that its log says.
        said: String,
        /// Its log.
        log: PathBuf,
    },
    /// The daemons are up and do not find each other.
    #[error("{name} sees {seen} of {wanted} peers after {seconds} s; see its log {}", log.display())]
    Apart {
        /// The host.
        name: String,
        /// Peers that answered it.
        seen: u32,
        /// Peers that it has.
        wanted: u32,
        /// How long was waited.
        seconds: u64,
        /// Its log.
        log: PathBuf,
    },
    /// A process would not end.
    #[error("process {pid} does not end; kill it, then run conet lab down again")]
    StillRunning {
        /// The process.
        pid: u32,
    },
    /// Somebody asked to stop.
    #[error("interrupted; the lab has been removed")]
    Interrupted,
}

fn at(path: Option<&PathBuf>) -> String {
    path.map(|path| format!(" ({})", path.display())).unwrap_or_default()
}

impl LabError {
    /// For `map_err`: a step without a file.
    pub(crate) fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Step { step, path: None, source: source.into() }
    }

    /// For `map_err`: a step on a file.
    pub(crate) fn step_on<E: Into<io::Error>>(
        step: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        let path = Some(path.into());
        move |source| Self::Step { step, path, source: source.into() }
    }
}
