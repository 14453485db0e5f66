//! What `/proc` says of a process, and processes by pid and start.
//!
//! A pid alone may have passed to another process; with the start time (field 22
//! of `/proc/PID/stat`, `man 5 proc`) it names one.

use std::fs;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// How often a wait looks again.
const POLL: Duration = Duration::from_millis(10);

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
        // A leader that has exited is a zombie while other threads of it still hold
        // its files and locks: it has ended when all have.
        let running = !stat.ended || !has_ended(pid);
        running.then_some(Self { pid, started: stat.started })
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

/// Whether all threads of a process have ended: then its descriptor polls readable
/// (`man 2 pidfd_open`, kernel 5.3). True where there is no such process.
fn has_ended(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return true };
    let Ok(descriptor) = pidfd_open(pid, PidfdFlags::empty()) else { return true };
    let mut waited = [PollFd::new(&descriptor, PollFlags::IN)];
    poll(&mut waited, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// What `/proc/PID/stat` and `/proc/PID/status` say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Its command's name, at most 15 bytes of it.
    pub command: String,
    /// Its parent's pid.
    pub parent: u32,
    /// Its start, in clock ticks since boot.
    pub started: u64,
    /// Whether it is a zombie, which runs no more.
    pub ended: bool,
}

impl Stat {
    /// Reads it; none where there is no such process.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// `pid (name) state ppid …`; the name may hold anything, also `)`.
    fn parse(text: &str) -> Option<Self> {
        let (head, rest) = text.rsplit_once(')')?;
        let (_, command) = head.split_once('(')?;
        let mut fields = rest.split_whitespace();
        let ended = matches!(fields.next()?, "Z" | "X");
        let parent = fields.next()?.parse().ok()?;
        // State is field 3 and the start field 22: 17 lie between the parent and it.
        let started = fields.nth(17)?.parse().ok()?;
        Some(Self { command: command.to_owned(), parent, started, ended })
    }
}

/// The uid whose processes this one belongs with: its own, or 0 where its real,
/// effective and saved uids differ, so that only who administers may act on it.
#[must_use]
pub fn owner(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let mut uids = line.split_whitespace().take(3).map(|uid| uid.parse::<u32>().ok());
    let real = uids.next()??;
    let rest: Option<Vec<u32>> = uids.collect();
    if rest?.into_iter().any(|uid| uid != real) { Some(0) } else { Some(real) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_is_read_past() {
        let text = "7 (a) b) S 3 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 99 100 1";
        let stat = Stat::parse(text).unwrap();
        assert_eq!(stat.command, "a) b");
        assert_eq!((stat.parent, stat.started, stat.ended), (3, 99, false));
    }

    #[test]
    fn we_own_ourselves() {
        let pid = std::process::id();
        assert_eq!(owner(pid), Some(rustix::process::geteuid().as_raw()));
        assert_eq!(owner(u32::MAX), None);
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
}
