//! How a process is to move, and how it did.

extern crate alloc;

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

/// A completed move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// At home.
    pub pid: u32,
    /// The node it runs on now.
    pub node: String,
    /// The remote's pid as that host's machine counts; none at home.
    pub remote_pid: Option<u32>,
    /// How long the process was held, in microseconds.
    pub freeze_us: u64,
    /// From request to answer, in microseconds.
    pub total_us: u64,
    /// How its memory moved; none where it was there already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryMoved>,
}

/// How a process's memory is to go to another node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// Ahead of it, while it runs, where the kernel can tell what it changes.
    #[default]
    Precopy,
    /// All of it while it is stopped.
    Stop,
}

impl How {
    // What serde calls has this signature.
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How a process's memory moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoveMethod {
    /// Out: in rounds while it ran, then the rest.
    Precopy,
    /// Out: all of it while it was stopped.
    Stop,
    /// Home: what was changed away.
    Changes,
    /// Home: all that was there.
    All,
}

/// The memory of a completed move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMoved {
    /// How it went.
    pub method: MoveMethod,
    /// Why there were no rounds, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Rounds while it ran.
    #[serde(default)]
    pub rounds: Vec<MoveRound>,
    /// Pages of 4 KiB that were sent, in all.
    pub pages: u64,
    /// Of them, while it was held.
    pub held_pages: u64,
    /// How long it was stopped before that, to make rounds possible, in microseconds.
    #[serde(default)]
    pub pause_us: u64,
}

/// One round of a [`MoveMethod::Precopy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveRound {
    /// Pages that were sent.
    pub pages: u64,
    /// How long it took, in microseconds.
    pub time_us: u64,
}
