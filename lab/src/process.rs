//! Processes by pid and start, and which of them are in a lab's namespaces.
//!
//! A pid alone may have passed to another process; with the start time (field 22
//! of `/proc/PID/stat`, `man 5 proc`) it names one.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// How often a wait looks again.
const POLL: Duration = Duration::from_millis(10);

/// The namespaces that tell a lab host from the machine.
const KINDS: [&str; 5] = ["net", "mnt", "uts", "ipc", "time"];

/// One process, now and later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessRef {
    /// Its pid, as the machine counts.
    pub pid: u32,
    /// Its start, in clock ticks since boot.
    pub started: u64,
}

impl ProcessRef {
    /// The running process of a pid; none where there is none, or only a zombie.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let stat = Stat::of(pid)?;
        (!stat.ended).then_some(Self { pid, started: stat.started })
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends it a signal; whether it was there to take it.
    pub fn signal(self, signal: Signal) -> bool {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return false };
        // The descriptor first: from then on the pid cannot pass to another.
        let Ok(descriptor) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
        self.is_alive() && pidfd_send_signal(descriptor, signal).is_ok()
    }

    /// Waits until it has ended; whether it did in time.
    #[must_use]
    pub fn wait_gone(self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.is_alive() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(POLL);
        }
        true
    }
}

/// What `/proc/PID/stat` says.
struct Stat {
    parent: u32,
    started: u64,
    ended: bool,
}

impl Stat {
    fn of(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// `pid (name) state ppid …`; the name may hold anything, also `)`.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        let ended = matches!(fields.next()?, "Z" | "X");
        let parent = fields.next()?.parse().ok()?;
        // State is field 3 and the start field 22: 17 lie between the parent and it.
        let started = fields.nth(17)?.parse().ok()?;
        Some(Self { parent, started, ended })
    }
}

/// The identities of namespaces, as `/proc/PID/ns/*` spells them.
pub(crate) type NamespaceIds = BTreeSet<String>;

/// The namespaces of `pid` that are not also the caller's own.
pub(crate) fn foreign_namespaces(pid: u32) -> NamespaceIds {
    namespaces(&pid.to_string()).difference(&own_namespaces()).cloned().collect()
}

/// The caller's namespaces.
pub(crate) fn own_namespaces() -> NamespaceIds {
    namespaces("self")
}

fn namespaces(process: &str) -> NamespaceIds {
    let link = |kind| fs::read_link(format!("/proc/{process}/ns/{kind}"));
    KINDS.iter().filter_map(|kind| link(kind).ok()?.into_os_string().into_string().ok()).collect()
}

/// Every running process in one of the namespaces, but the caller and its
/// ancestors.
pub(crate) fn inside(ids: &NamespaceIds) -> Vec<ProcessRef> {
    let spared = ancestors();
    let pids = all_pids().filter(|pid| !spared.contains(pid));
    pids.filter(|pid| !namespaces(&pid.to_string()).is_disjoint(ids))
        .filter_map(ProcessRef::of)
        .collect()
}

/// Every running process of this name; the kernel keeps 15 bytes of it.
pub(crate) fn named(matches: impl Fn(&str) -> bool) -> Vec<ProcessRef> {
    let spared = ancestors();
    let pids = all_pids().filter(|pid| !spared.contains(pid));
    pids.filter(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| matches(name.trim_end()))
    })
    .filter_map(ProcessRef::of)
    .collect()
}

fn all_pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn ancestors() -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    let mut next = std::process::id();
    while next != 0 && found.insert(next) {
        next = Stat::of(next).map_or(0, |stat| stat.parent);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_is_read_past() {
        let text = "7 (a) b) S 3 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 99 100 1";
        let stat = Stat::parse(text).unwrap();
        assert_eq!((stat.parent, stat.started, stat.ended), (3, 99, false));
    }

    #[test]
    fn a_process_is_alive_until_it_is_not() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessRef::of(child.id()).unwrap();
        assert!(process.is_alive());
        assert!(!ProcessRef { started: process.started + 1, ..process }.is_alive());
        assert!(process.signal(Signal::KILL));
        // A zombie runs no more, though nobody has waited for it.
        assert!(process.wait_gone(Duration::from_secs(5)));
        assert!(!process.signal(Signal::KILL));
        child.wait().unwrap();
    }

    #[test]
    fn we_are_not_in_foreign_namespaces() {
        assert!(foreign_namespaces(std::process::id()).is_empty());
        assert!(inside(&NamespaceIds::new()).is_empty());
    }
}
