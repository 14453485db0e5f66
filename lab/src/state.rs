//! What a lab remembers of itself, in `/run/conet-lab`.
//!
//! ```text
//! /run/conet-lab/           its lock is the lab's lock: one lab at a time
//!     lab.json              written anew and renamed, so it is whole or absent
//!     conet-h1.log          the daemon's log
//! ```
//!
//! The state is written before the first thing is made and after each step, so
//! that a lab whose maker died half way can be removed by what it says.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use conet_node::config::Mode;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::LabError;
use conet_node::procfs::ProcessRef;

/// Where the lab keeps its state.
pub const STATE_DIR: &str = "/run/conet-lab";

/// A lab, as its file describes it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabState {
    /// How packets between hosts travel: `wireguard`, `ip-udp` or `ipip`.
    pub mode: String,
    /// Guests of each host.
    pub guests: u8,
    /// The hosts that have been made so far.
    pub hosts: Vec<HostState>,
}

/// One host of a lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostState {
    /// Its number, from 1.
    pub number: u8,
    /// Its name.
    pub name: String,
    /// The process that keeps its namespaces.
    pub holder: ProcessRef,
    /// Its daemon, as it was last started.
    pub daemon: Option<ProcessRef>,
}

impl HostState {
    /// A path inside the host, as it is reached from outside.
    #[must_use]
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.holder.pid))
    }

    /// Its daemon's log.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        Path::new(STATE_DIR).join(format!("{}.log", self.name))
    }
}

impl LabState {
    /// A lab without hosts.
    #[must_use]
    pub fn new(mode: Mode, guests: u8) -> Self {
        Self { mode: mode.as_str().to_owned(), guests, hosts: Vec::new() }
    }

    /// The lab that is up, also one that is being made.
    ///
    /// # Errors
    ///
    /// [`LabError::NotUp`] where there is none, [`LabError::Step`] where its file
    /// cannot be read.
    pub fn load() -> Result<Self, LabError> {
        let path = file();
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(LabError::NotUp),
            other => other.map_err(LabError::step_on("read the lab's state", &path))?,
        };
        serde_json::from_slice(&bytes)
            .map_err(io::Error::from)
            .map_err(LabError::step_on("read the lab's state", &path))
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    ///
    /// [`LabError::Step`].
    pub fn save(&self) -> Result<(), LabError> {
        let path = file();
        let new = path.with_extension("new");
        let bytes = serde_json::to_vec_pretty(self).map_err(io::Error::from);
        let saved = bytes.and_then(|bytes| {
            fs::write(&new, bytes)?;
            fs::rename(&new, &path)
        });
        saved.map_err(LabError::step_on("write the lab's state", &path))
    }

    /// The host of a name.
    ///
    /// # Errors
    ///
    /// [`LabError::NoSuchHost`].
    pub fn host(&self, name: &str) -> Result<&HostState, LabError> {
        self.hosts.iter().find(|host| host.name == name).ok_or_else(|| {
            let known: Vec<_> = self.hosts.iter().map(|host| host.name.as_str()).collect();
            LabError::NoSuchHost { name: name.to_owned(), known: known.join(", ") }
        })
    }
}

fn file() -> PathBuf {
    Path::new(STATE_DIR).join("lab.json")
}

/// The right to change the lab; given up when dropped.
#[derive(Debug)]
pub(crate) struct LabLock {
    _directory: File,
}

impl LabLock {
    /// Waits for the right, making the state directory where it is not there.
    ///
    /// # Errors
    ///
    /// [`LabError::NotRoot`], [`LabError::Step`].
    pub(crate) fn take() -> Result<Self, LabError> {
        if !rustix::process::geteuid().is_root() {
            return Err(LabError::NotRoot);
        }
        loop {
            match DirBuilder::new().mode(0o755).create(STATE_DIR) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(LabError::step_on("make the lab's directory", STATE_DIR)(error));
                }
                _ => {}
            }
            let directory = match File::open(STATE_DIR) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(LabError::step_on("open the lab's directory", STATE_DIR))?,
            };
            loop {
                match flock(&directory, FlockOperation::LockExclusive) {
                    Err(Errno::INTR) => {}
                    other => {
                        other.map_err(LabError::step_on("lock the lab", STATE_DIR))?;
                        break;
                    }
                }
            }
            // Whoever held it may have removed the directory: then this lock is of
            // no use.
            let inode = |data: fs::Metadata| (data.dev(), data.ino());
            let same =
                fs::metadata(STATE_DIR).map(inode).ok() == directory.metadata().map(inode).ok();
            if same {
                return Ok(Self { _directory: directory });
            }
        }
    }

    /// Removes the state, and with it the lock.
    ///
    /// # Errors
    ///
    /// [`LabError::Step`].
    pub(crate) fn remove_state(self) -> Result<(), LabError> {
        fs::remove_dir_all(STATE_DIR).map_err(LabError::step_on("remove", STATE_DIR))
    }
}
