//! The way home: asking for the program, and tidying up when it is there.

use super::{HOME_TIMEOUT, MoveError, Returned, fault_name, gone, status};
use crate::agent;
use crate::image::{is_to_reissue, is_to_restart};
use crate::locks::Lock;
use crate::procfs;
use crate::sys::ptrace::{Regs, Stopped};
use conet_deputy_core::areas::Backing;
use conet_deputy_core::boot::{self, STATUS, Status, entry, phase};
use conet_wire::image::{REGION, REGION_LEN, overlaps_region};
use rustix::process::Pid;
use std::fs::File;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How often the bell is rung until the image comes.
const BELL_PERIOD: Duration = Duration::from_millis(3);
/// How often it is looked whether a program has come home.
const HOME_PERIOD: Duration = Duration::from_micros(200);
/// The same of one that is held and does not run until that is noticed.
const HELD_PERIOD: Duration = Duration::from_micros(50);

/// Brings a process home: interrupts its deputy and waits for the image. `ring` has
/// the remote's warden ring the bell, for a program that computes without calls; it
/// is called repeatedly until the image begins to come.
///
/// # Errors
/// [`MoveError::Gone`] when the process ended meanwhile; [`MoveError::Late`] when it
/// is still away; [`MoveError::Locked`] while it shares another's memory, after `vfork`.
pub fn bring_home(pid: Pid, mut ring: impl FnMut()) -> Result<Returned, MoveError> {
    let begin = Instant::now();
    let status = fetch(pid, false, &mut ring)?;
    let returned = Returned::new(&status, begin.elapsed());
    take_out(pid);
    Ok(returned)
}

impl Returned {
    /// What the deputy says of a program that took `total` to come.
    pub(super) fn new(status: &Status, total: Duration) -> Self {
        Self {
            total,
            // The other node has a part in it, so it is not taken at its word.
            freeze: Duration::from_nanos(status.frozen).min(total),
            pages: status.pages,
            sliced: status.sliced,
            changed: status.changed,
            is_delta: status.is_delta == 1,
            calls: status.calls,
        }
    }
}

/// Has the program come home, where it is held if it is to go on; what its deputy then
/// says. It may also run, where it was not to be held or could not.
pub(super) fn fetch(pid: Pid, hold: bool, ring: &mut impl FnMut()) -> Result<Status, MoveError> {
    let begin = Instant::now();
    if let Ok(Status { phase: phase::SERVING, shares: other @ 1.., .. }) = status(pid) {
        let other = i32::try_from(other).unwrap_or(0);
        return Err(MoveError::Locked(vec![Lock::SharedMemory(other)]));
    }
    interrupt(pid, hold)?;
    // A program that makes calls comes without a bell, and asking for one can take long.
    let mut last_ring = Instant::now();
    loop {
        let status = status(pid).map_err(gone)?;
        match status.phase {
            phase::HOME | phase::FINISHING | phase::HELD => return Ok(status),
            phase::LOST => return Err(MoveError::Lost(fault_name(status.fault))),
            phase::SERVING if last_ring.elapsed() > BELL_PERIOD => {
                ring();
                last_ring = Instant::now();
            }
            _ => {}
        }
        if begin.elapsed() > HOME_TIMEOUT {
            let_go(pid);
            return Err(MoveError::Late);
        }
        std::thread::sleep(if hold { HELD_PERIOD } else { HOME_PERIOD });
    }
}

/// Has a program run at home that is held there, or would be when it comes.
pub(super) fn let_go(pid: Pid) {
    let hold = STATUS + offset_of!(Status, hold) as u64;
    let memory = File::options().write(true).open(procfs::path(pid, "mem"));
    // Where this fails it has ended. It would not be held for long in any case.
    memory.and_then(|memory| memory.write_all_at(&0u32.to_le_bytes(), hold)).ok();
}

/// Makes the deputy ask for the program, wherever it is in its loop.
fn interrupt(pid: Pid, hold: bool) -> Result<(), MoveError> {
    let mut stopped = Stopped::new(pid)?;
    let write = |field: usize, value: u32| {
        let at = STATUS + field as u64;
        stopped.memory().write_all_at(&value.to_le_bytes(), at).map_err(MoveError::Process)
    };
    write(offset_of!(Status, hold), u32::from(hold))?;
    write(offset_of!(Status, interrupt), 1)?;
    let regs = *stopped.regs();
    let at = regs.rip.wrapping_sub(agent::ENTRY);
    let target = match at {
        // A signal or another stop had interrupted it, and the kernel is about to go on.
        entry::SYSCALL if regs.rax.cast_signed() == libc::SYS_restart_syscall => {
            Some(entry::PARKED)
        }
        entry::CHECK..=entry::SYSCALL => Some(entry::ABORT),
        entry::END if is_to_reissue(&regs) => {
            // It had begun: the deputy is told how the kernel would go on.
            let rax = regs.rax.wrapping_add_signed(boot::BROKEN_OFF);
            stopped.set_regs(Regs { rax, orig_rax: u64::MAX, ..regs })?;
            None
        }
        entry::END if is_to_restart(&regs) => Some(entry::PARKED),
        _ => None,
    };
    if let Some(target) = target {
        let rip = agent::ENTRY + target;
        stopped.set_regs(Regs { rip, orig_rax: u64::MAX, ..regs })?;
    }
    stopped.release()?;
    Ok(())
}

/// Takes the agent's region out of a process that is home; best effort, since a
/// region that stays does no harm and the next move replaces it.
pub fn take_out(pid: Pid) {
    let in_region = |addr: u64| overlaps_region(addr, addr + 1);
    if !status(pid).is_ok_and(|status| status.phase == phase::HOME) {
        return;
    }
    let Ok(mut stopped) = Stopped::new(pid) else { return };
    let regs = *stopped.regs();
    if in_region(regs.rip) || in_region(regs.rsp) {
        return;
    }
    let vdso = procfs::maps(pid)
        .ok()
        .and_then(|maps| maps.into_iter().find(|m| m.backing == Backing::Vdso));
    if let Some(vdso) = vdso
        && stopped.use_gadget(vdso.start, vdso.end).is_ok()
        && let Err(error) =
            stopped.call("munmap", libc::SYS_munmap, [REGION, REGION_LEN, 0, 0, 0, 0])
    {
        tracing::debug!(%error, "the agent's region stays");
    }
}
