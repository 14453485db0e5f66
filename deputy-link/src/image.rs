//! From a stopped process to its image, apart from its pages.

use crate::locks::Seen;
use crate::procfs::{self, Facts, Mapping};
use crate::sys::processor::{self, ASKED_FOR, processor};
use crate::sys::ptrace::{self, Regs, Stopped, TraceError, robust_list};
use crate::vdso;
use conet_deputy_core::areas::Backing;
use conet_deputy_core::boot::{self, Pending};
use conet_wire::image::{
    Area, Head, MAX_XSAVE, MemoryMap, Registers, VERSION, area_flags, overlaps_region,
};
use conet_wire::link::{Desc, direction, mode};
use rustix::process::Pid;
use std::io;
use std::os::unix::fs::FileExt;
use zerocopy::FromBytes;

/// Why an image could not be taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    #[error("reading the process: {0}")]
    Read(#[from] io::Error),
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error("the vector state has {0} bytes, more than {MAX_XSAVE}")]
    Xsave(usize),
    #[error("it has asked for AMX")]
    Tiles,
}

/// A process's state apart from its pages.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) head: Head,
    pub(crate) xsave: Vec<u8>,
    pub(crate) pending: Pending,
}

/// Processor time that a process has used, in nanoseconds (man 3 clock_getcpuclockid:
/// the clock of a process is derived from its pid).
fn cpu_time(pid: Pid) -> i64 {
    const CPUCLOCK_SCHED: i32 = 2;
    let clock = (!pid.as_raw_nonzero().get() << 3) | CPUCLOCK_SCHED;
    ptrace::read_clock(clock).unwrap_or(0)
}

/// Whether the process has asked for AMX, which it may use at any moment then.
fn may_use_tiles(stopped: &mut Stopped) -> Result<bool, ImageError> {
    /// Linux 5.16, arch/x86/include/uapi/asm/prctl.h.
    const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
    if processor().is_none_or(|found| found.components & ASKED_FOR == 0) {
        return Ok(false);
    }
    // Below what a function may use without a frame (System V ABI for x86-64, §3.2.2).
    let at = stopped.regs().rsp.wrapping_sub(512) & !7;
    let mut before = [0; 8];
    let is_there = stopped.memory().read_exact_at(&mut before, at).is_ok();
    let asked =
        stopped.call("arch_prctl", libc::SYS_arch_prctl, [ARCH_GET_XCOMP_PERM, at, 0, 0, 0, 0]);
    let mut found = [0; 8];
    let told = stopped.memory().read_exact_at(&mut found, at);
    if is_there {
        stopped.memory().write_all_at(&before, at)?;
    }
    match asked {
        Ok(_) => told.map(|()| u64::from_le_bytes(found) & ASKED_FOR != 0).map_err(Into::into),
        // An older kernel, which knows no AMX.
        Err(TraceError::Injected { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Errors with which the kernel marks an interrupted call (include/linux/errno.h).
const ERESTARTSYS: u64 = (-512i64).cast_unsigned();
const ERESTARTNOINTR: u64 = (-513i64).cast_unsigned();
const ERESTARTNOHAND: u64 = (-514i64).cast_unsigned();
const ERESTART_RESTARTBLOCK: u64 = (-516i64).cast_unsigned();

/// Whether the process was interrupted in a call.
pub(crate) const fn is_in_call(regs: &Regs) -> bool {
    regs.orig_rax.cast_signed() >= 0
}

/// Whether that call is to be issued again.
pub(crate) const fn is_to_reissue(regs: &Regs) -> bool {
    is_in_call(regs) && matches!(regs.rax, ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND)
}

/// Whether that call is to be continued by `restart_syscall`.
pub(crate) const fn is_to_restart(regs: &Regs) -> bool {
    is_in_call(regs) && regs.rax == ERESTART_RESTARTBLOCK
}

impl Snapshot {
    /// Takes everything but the pages. Makes calls in the process's name.
    pub(crate) fn take(stopped: &mut Stopped, pid: Pid, seen: &Seen) -> Result<Self, ImageError> {
        let vdso = stopped.use_vdso(&seen.maps)?;
        let mut code = vec![0; usize::try_from(vdso.end - vdso.start).unwrap_or(0)];
        stopped.memory().read_exact_at(&mut code, vdso.start)?;
        let entries = vdso::entries(&code, vdso.start).unwrap_or_default();

        let mut snapshot = match Self::finishing(stopped)? {
            Some(snapshot) => snapshot,
            None => Self::running(stopped)?,
        };
        snapshot.describe(stopped, pid, &seen.facts)?;
        snapshot.head.vdso = entries;
        Ok(snapshot)
    }

    /// A process that runs its own code.
    fn running(stopped: &Stopped) -> Result<Self, ImageError> {
        let regs = *stopped.regs();
        let mut xsave = stopped.xsave()?;
        // The kernel gives room for what the process could ask for, too.
        xsave.truncate(processor::common_size());
        if xsave.len() > MAX_XSAVE {
            return Err(ImageError::Xsave(xsave.len()));
        }
        let mut registers = registers(&regs);
        let mut pending = Pending::default();
        if is_to_reissue(&regs) {
            registers.rip -= 2;
            registers.rax = regs.orig_rax;
        } else if is_to_restart(&regs) {
            pending = pending_of(&regs);
        }
        leave_critical_section(stopped, &mut registers);
        let head = Head { registers, blocked: stopped.mask(), ..Head::default() };
        Ok(Self { head, xsave, pending })
    }

    /// A process that is home, but still in a deputy's hands because a call of its
    /// has not ended: its state is what came home, and the call is still pending.
    fn finishing(stopped: &Stopped) -> Result<Option<Self>, ImageError> {
        let regs = stopped.regs();
        if !overlaps_region(regs.rip, regs.rip + 1) {
            return Ok(None);
        }
        let mut bytes = vec![0; size_of::<Head>()];
        stopped.memory().read_exact_at(&mut bytes, boot::STATE)?;
        let head = Head::read_from_bytes(&bytes).map_err(|_| malformed())?;
        let mut xsave = vec![0; (head.xsave_len as usize).clamp(512, MAX_XSAVE)];
        stopped.memory().read_exact_at(&mut xsave, boot::STATE + boot::STATE_XSAVE)?;
        let mut bytes = vec![0; size_of::<Pending>()];
        stopped.memory().read_exact_at(&mut bytes, boot::PENDING)?;
        let pending = Pending::read_from_bytes(&bytes).map_err(|_| malformed())?;
        Ok(Some(Self { head, xsave, pending }))
    }

    /// What does not depend on where the process was stopped.
    fn describe(
        &mut self,
        stopped: &mut Stopped,
        pid: Pid,
        facts: &Facts,
    ) -> Result<(), ImageError> {
        if may_use_tiles(stopped)? {
            return Err(ImageError::Tiles);
        }
        let brk = stopped.call("brk", libc::SYS_brk, [0; 6])?;
        let (rseq_addr, rseq_len, rseq_signature) = stopped.rseq()?;
        let (robust_addr, robust_len) = robust_list(pid);
        let mut name = [0; 16];
        let text = facts.name.as_bytes();
        let len = text.len().min(15);
        name[..len].copy_from_slice(&text[..len]);
        self.head = Head {
            version: VERSION,
            xsave_len: u32::try_from(self.xsave.len()).unwrap_or(0),
            handled: facts.handled,
            memory_map: MemoryMap { brk, ..facts.memory_map },
            cpu_time: cpu_time(pid),
            robust_addr,
            robust_len,
            pending: self.pending.present,
            name,
            limits: procfs::limits(pid)?,
            reason: 0,
            detail: 0,
            ..self.head
        };
        if rseq_addr != 0 {
            (self.head.rseq_addr, self.head.rseq_len) = (rseq_addr, rseq_len);
            self.head.rseq_signature = rseq_signature;
        }
        Ok(())
    }
}

/// A deputy's memory is not laid out as this build lays it out.
fn malformed() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

fn registers(r: &Regs) -> Registers {
    Registers {
        r15: r.r15,
        r14: r.r14,
        r13: r.r13,
        r12: r.r12,
        rbp: r.rbp,
        rbx: r.rbx,
        r11: r.r11,
        r10: r.r10,
        r9: r.r9,
        r8: r.r8,
        rax: r.rax,
        rcx: r.rcx,
        rdx: r.rdx,
        rsi: r.rsi,
        rdi: r.rdi,
        rip: r.rip,
        eflags: r.eflags,
        rsp: r.rsp,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
    }
}

/// The one output of a restartable call lies in the program's memory: the `pollfd`s
/// of `poll`. Sleeps write only when interrupted by a handler, which runs at home.
fn pending_of(regs: &Regs) -> Pending {
    let mut pending = Pending { present: 1, ..Pending::default() };
    if regs.orig_rax.cast_signed() == libc::SYS_poll
        && let Ok(len) = u32::try_from((regs.rsi & 0xffff_ffff) * 8)
    {
        pending.count = 1;
        pending.at[0] = regs.rdi;
        pending.descs[0] = Desc {
            addr: regs.rdi,
            len,
            direction: direction::OUT | direction::IN_PLACE,
            mode: mode::ON_SUCCESS,
            ..Desc::default()
        };
    }
    pending
}

/// A thread that is stopped inside of a restartable sequence goes on at its abort
/// handler (man 2 rseq, include/uapi/linux/rseq.h).
fn leave_critical_section(stopped: &Stopped, registers: &mut Registers) {
    let word = |at: u64| {
        let mut bytes = [0u8; 8];
        stopped.memory().read_exact_at(&mut bytes, at).ok().map(|()| u64::from_le_bytes(bytes))
    };
    let Ok((area, ..)) = stopped.rseq() else { return };
    let Some(section) = (area != 0).then(|| word(area + 8)).flatten().filter(|&s| s != 0) else {
        return;
    };
    if let (Some(start), Some(len), Some(abort)) =
        (word(section + 8), word(section + 16), word(section + 24))
        && registers.rip.wrapping_sub(start) < len
    {
        registers.rip = abort;
    }
}

/// A mapping as an area of an image; none where nothing of it travels.
pub(crate) fn area(mapping: &Mapping) -> Option<Area> {
    if mapping.backing == Backing::Vsyscall || overlaps_region(mapping.start, mapping.end) {
        return None;
    }
    let flags = match mapping.backing {
        Backing::Stack => area_flags::GROWS_DOWN,
        Backing::File => area_flags::FILE,
        Backing::Vvar => area_flags::HOLD,
        Backing::Vdso => area_flags::VDSO,
        Backing::Anonymous | Backing::Vsyscall => 0,
    };
    Some(Area { start: mapping.start, end: mapping.end, prot: mapping.prot, flags })
}
