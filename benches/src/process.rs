//! Processor time, of this process and of others.

use std::fs;
use std::io;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// User and system time of a process so far, of its ended threads and the children that
/// it has waited for too.
///
/// # Errors
/// When there is no such process, or `/proc` is not as `proc_pid_stat(5)` has it.
pub fn cpu_of(pid: u32) -> io::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Fields 14 to 17; the first after the name is 3.
    let ticks: Option<u64> = (11..15).map(|at| field(&stat, at)).sum();
    let ticks = ticks.ok_or(io::ErrorKind::InvalidData)?;
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

fn field(stat: &str, at: usize) -> Option<u64> {
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    after.split_whitespace().nth(at)?.parse().ok()
}

/// User and system time of this process so far.
#[must_use]
pub fn own_cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let (seconds, nanoseconds) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    Duration::new(seconds.unwrap_or(0), nanoseconds.unwrap_or(0))
}

/// The threads of a process; none where it has ended.
#[must_use]
pub fn threads(pid: u32) -> Vec<u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Every process and its parent.
#[must_use]
pub fn all() -> Vec<(u32, u32)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let parent = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some((pid, u32::try_from(field(&stat, 1)?).ok()?))
    };
    pids.filter_map(parent).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_there_and_has_spent_time() {
        let own = std::process::id();
        assert!(all().iter().any(|(pid, parent)| *pid == own && *parent != own));
        assert!(own_cpu() > Duration::ZERO && cpu_of(own).is_ok());
        assert!(threads(own).contains(&own) && threads(u32::MAX).is_empty());
        assert!(cpu_of(u32::MAX).is_err());
    }
}
