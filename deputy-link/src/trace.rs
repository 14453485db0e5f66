//! Which calls are forwarded for a program that is away, how often, and how long they
//! take.
//!
//! The deputy counts always, and takes times only while it is asked to: that costs
//! some 0.1 us a call.

use crate::procfs;
use conet_deputy_core::boot::{COUNTS, COUNTS_LEN, Count, STATUS, Status};
use conet_deputy_core::table;
use rustix::process::Pid;
use std::fs::OpenOptions;
use std::io;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::time::Duration;
use zerocopy::FromBytes;

/// What is known of one system call since the program went out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracedCall {
    /// Its number in the x86-64 table.
    pub number: u32,
    /// Its name.
    pub name: &'static str,
    /// How often it was forwarded.
    pub calls: u64,
    /// How many of these were timed at home.
    pub timed: u64,
    /// How long those ran at home, in all.
    pub ran: Duration,
    /// How many were timed by the program's side.
    pub waited_for: u64,
    /// How long the program waited for those, in all.
    pub waited: Duration,
}

/// Reads what the deputy in `pid` has counted, by number.
///
/// # Errors
/// When there is no such process, or no deputy in it.
pub fn read(pid: Pid) -> io::Result<Vec<TracedCall>> {
    let memory = OpenOptions::new().read(true).open(procfs::path(pid, "mem"))?;
    let mut bytes = vec![0; COUNTS_LEN * size_of::<Count>()];
    memory.read_exact_at(&mut bytes, COUNTS)?;
    let counts = <[Count]>::ref_from_bytes(&bytes).map_err(|_| io::ErrorKind::InvalidData)?;
    let calls = (0u32..).zip(counts).filter(|(_, count)| count.calls > 0);
    Ok(calls
        .map(|(number, count)| TracedCall {
            number,
            name: table::name(number.into()).unwrap_or("unknown"),
            calls: count.calls,
            timed: count.timed,
            ran: Duration::from_nanos(count.ran),
            waited_for: count.waited_for,
            waited: Duration::from_nanos(count.waited),
        })
        .collect())
}

/// Has the deputy in `pid` take the time of calls, or no longer.
///
/// # Errors
/// When there is no such process, or no deputy in it.
pub fn take_times(pid: Pid, wanted: bool) -> io::Result<()> {
    let memory = OpenOptions::new().write(true).open(procfs::path(pid, "mem"))?;
    let at = STATUS + offset_of!(Status, is_timed) as u64;
    memory.write_all_at(&u32::from(wanted).to_le_bytes(), at)
}
