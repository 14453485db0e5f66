//! ptrace, as far as the peers need it.
//!
//! Sources: man 2 ptrace; arch/x86/entry: a call that a seccomp stop turns into
//! number −1 is skipped and returns what `rax` holds.

use super::check;
use rustix::io::Errno;
use std::ptr;

pub(crate) use libc::user_regs_struct as Regs;

/// A process that this thread traces.
#[derive(Debug)]
pub(crate) struct Traced {
    pid: i32,
}

/// Why a traced process stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// A call met SECCOMP_RET_TRACE.
    Call,
    /// A single step was done, or any other SIGTRAP.
    Step,
    /// Another stop; the signal to pass on, if any.
    Other(i32),
    /// It ended.
    Gone,
}

impl Traced {
    /// Traces a process from now on; it runs on.
    pub(crate) fn seize(pid: i32) -> Result<Self, Errno> {
        let traced = Self { pid };
        let options = libc::PTRACE_O_TRACESECCOMP | libc::PTRACE_O_EXITKILL;
        traced.request(libc::PTRACE_SEIZE, 0, options.unsigned_abs().into())?;
        Ok(traced)
    }

    fn request(&self, code: libc::c_uint, addr: u64, data: u64) -> Result<(), Errno> {
        // SAFETY: for these requests the kernel takes values, or (registers) a pointer
        // that the two callers below own.
        check(unsafe { libc::ptrace(code, self.pid, addr, data) }).map(drop)
    }

    /// Stops it.
    pub(crate) fn interrupt(&self) -> Result<Stop, Errno> {
        self.request(libc::PTRACE_INTERRUPT, 0, 0)?;
        self.wait()
    }

    /// Lets it run.
    pub(crate) fn go_on(&self, signal: i32) -> Result<(), Errno> {
        self.request(libc::PTRACE_CONT, 0, signal.unsigned_abs().into())
    }

    /// Lets it run, and traces it no more.
    pub(crate) fn detach(self) -> Result<(), Errno> {
        self.request(libc::PTRACE_DETACH, 0, 0)
    }

    /// Lets it execute one instruction.
    pub(crate) fn step(&self) -> Result<Stop, Errno> {
        self.request(libc::PTRACE_SINGLESTEP, 0, 0)?;
        self.wait()
    }

    /// Waits until it stops.
    pub(crate) fn wait(&self) -> Result<Stop, Errno> {
        let mut status = 0;
        // SAFETY: the status is written.
        check(unsafe { libc::waitpid(self.pid, &raw mut status, libc::__WALL) }.into())?;
        if !libc::WIFSTOPPED(status) {
            return Ok(Stop::Gone);
        }
        Ok(match (status >> 16, libc::WSTOPSIG(status)) {
            (libc::PTRACE_EVENT_SECCOMP, _) => Stop::Call,
            (0, libc::SIGTRAP) => Stop::Step,
            (0, signal) => Stop::Other(signal),
            _ => Stop::Other(0),
        })
    }

    /// Its registers.
    pub(crate) fn regs(&self) -> Result<Regs, Errno> {
        // SAFETY: all zeros are registers.
        let mut regs: Regs = unsafe { std::mem::zeroed() };
        self.request(libc::PTRACE_GETREGS, 0, ptr::from_mut(&mut regs) as u64)?;
        Ok(regs)
    }

    /// Changes its registers.
    pub(crate) fn set_regs(&self, regs: &Regs) -> Result<(), Errno> {
        self.request(libc::PTRACE_SETREGS, 0, ptr::from_ref(regs) as u64)
    }
}
