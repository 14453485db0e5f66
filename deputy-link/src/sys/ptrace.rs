//! A process stopped by ptrace, and calls made in its name.
//!
//! ptrace belongs to a thread: a [`Stopped`] is used on the thread that made it
//! (it is not `Send`). Dropping one restores registers and mask and lets the process
//! run. If the daemon dies, the kernel lets it run: between two calls the registers are
//! always the process's own, and within one the code that it runs restores them
//! ([`super::thunk`]).
//!
//! Sources: man 2 ptrace, especially "Attaching and detaching" and
//! PTRACE_EVENT_STOP; arch/x86/kernel/signal.c for the restart of calls.

use super::thunk;
use crate::procfs::{self, Mapping};
use conet_deputy_core::areas::Backing;
use rustix::process::Pid;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

pub(crate) use libc::user_regs_struct as Regs;

const NT_X86_XSTATE: usize = 0x202;
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;

/// Why a process could not be stopped, or a call not be made in it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TraceError {
    /// It ended.
    #[error("the process ended")]
    Gone,
    /// It is stopped by job control.
    #[error("the process is stopped")]
    JobStopped,
    /// A request failed.
    #[error("ptrace {request}: {source}")]
    Request {
        /// The request's name.
        request: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A call in the process failed.
    #[error("{call} in the process: {source}")]
    Injected {
        /// The call's name.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no system call instruction to borrow.
    #[error("the process has no vDSO")]
    NoVdso,
}

fn request(
    name: &'static str,
    code: libc::c_uint,
    pid: Pid,
    addr: usize,
    data: usize,
) -> Result<libc::c_long, TraceError> {
    // SAFETY: callers pass pointers that are valid for what the request transfers.
    let result = unsafe { libc::ptrace(code, pid.as_raw_nonzero().get(), addr, data) };
    if result >= 0 {
        return Ok(result);
    }
    let source = io::Error::last_os_error();
    Err(if source.raw_os_error() == Some(libc::ESRCH) {
        TraceError::Gone
    } else {
        TraceError::Request { request: name, source }
    })
}

/// Whether this process is the parent of one that ended.
fn is_ended_child(pid: Pid) -> bool {
    let options = libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT | libc::__WALL;
    let Ok(id) = libc::id_t::try_from(pid.as_raw_nonzero().get()) else { return false };
    // SAFETY: a zeroed record is a valid value to be overwritten.
    let mut info = unsafe { MaybeUninit::<libc::siginfo_t>::zeroed().assume_init() };
    // SAFETY: `info` is one record.
    while unsafe { libc::waitid(libc::P_PID, id, &raw mut info, options) } < 0 {
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return false;
        }
    }
    let has_ended = matches!(info.si_code, libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED);
    let me = i32::try_from(std::process::id()).unwrap_or(0);
    has_ended && procfs::facts(pid).is_ok_and(|facts| facts.parent == me)
}

/// `waitpid(pid, __WALL)` on this thread; the status of a child of our own is left to
/// whoever waits for it as its parent.
fn wait(pid: Pid) -> Result<libc::c_int, TraceError> {
    if is_ended_child(pid) {
        return Err(TraceError::Gone);
    }
    let mut status = 0;
    loop {
        // SAFETY: `status` is one int.
        let result =
            unsafe { libc::waitpid(pid.as_raw_nonzero().get(), &raw mut status, libc::__WALL) };
        if result >= 0 {
            break;
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return Err(TraceError::Gone);
        }
    }
    if libc::WIFSTOPPED(status) { Ok(status) } else { Err(TraceError::Gone) }
}

/// A `syscall` instruction to borrow.
#[derive(Clone, Copy, Debug)]
enum Gadget {
    /// One that is there; should the tracer die behind it, the process ends by SIGTRAP,
    /// since single step outlives the tracer.
    Found(u64),
    /// The first of a [`thunk`].
    Thunk(u64),
}

/// A process that this thread has stopped.
#[derive(Debug)]
pub(crate) struct Stopped {
    pid: Pid,
    memory: File,
    regs: Regs,
    mask: u64,
    /// A `syscall` instruction in the process.
    gadget: Option<Gadget>,
    is_detached: bool,
    /// A stop signal that came in the midst of a borrowed call.
    held_back: libc::c_int,
    _thread: PhantomData<*const ()>,
}

impl Stopped {
    /// Seizes and interrupts a process.
    ///
    /// # Errors
    /// [`TraceError`]; the process then runs as before.
    pub(crate) fn new(pid: Pid) -> Result<Self, TraceError> {
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{}/mem", pid.as_raw_nonzero()))
            .map_err(|source| match source.raw_os_error() {
                Some(libc::ESRCH | libc::ENOENT) => TraceError::Gone,
                _ => TraceError::Request { request: "memory", source },
            })?;
        let options = usize::try_from(libc::PTRACE_O_TRACESYSGOOD).unwrap_or(0);
        request("PTRACE_SEIZE", libc::PTRACE_SEIZE, pid, 0, options)?;
        // SAFETY: a zeroed register file is a valid value to be overwritten.
        let regs = unsafe { MaybeUninit::<Regs>::zeroed().assume_init() };
        let mut stopped = Self {
            pid,
            memory,
            regs,
            mask: 0,
            gadget: None,
            is_detached: false,
            held_back: 0,
            _thread: PhantomData,
        };
        stopped.interrupt()?;
        stopped.regs = stopped.read_regs()?;
        stopped.mask = stopped.read_mask()?;
        Ok(stopped)
    }

    fn interrupt(&self) -> Result<(), TraceError> {
        request("PTRACE_INTERRUPT", libc::PTRACE_INTERRUPT, self.pid, 0, 0)?;
        loop {
            let status = wait(self.pid)?;
            let signal = libc::WSTOPSIG(status);
            match status >> 16 {
                libc::PTRACE_EVENT_STOP if signal == libc::SIGTRAP => return Ok(()),
                libc::PTRACE_EVENT_STOP => return Err(TraceError::JobStopped),
                // A signal on its way in: let it pass, the interrupt is still due.
                _ => {
                    let signal = usize::try_from(signal).unwrap_or(0);
                    request("PTRACE_CONT", libc::PTRACE_CONT, self.pid, 0, signal)?;
                }
            }
        }
    }

    fn read_regs(&self) -> Result<Regs, TraceError> {
        let mut regs = MaybeUninit::<Regs>::zeroed();
        request("PTRACE_GETREGS", libc::PTRACE_GETREGS, self.pid, 0, regs.as_mut_ptr() as usize)?;
        // SAFETY: the kernel filled it in.
        Ok(unsafe { regs.assume_init() })
    }

    fn write_regs(&self, regs: &Regs) -> Result<(), TraceError> {
        let at = std::ptr::from_ref(regs) as usize;
        request("PTRACE_SETREGS", libc::PTRACE_SETREGS, self.pid, 0, at).map(|_| ())
    }

    fn read_mask(&self) -> Result<u64, TraceError> {
        let mut mask = 0u64;
        let at = &raw mut mask as usize;
        request("PTRACE_GETSIGMASK", PTRACE_GETSIGMASK, self.pid, 8, at)?;
        Ok(mask)
    }

    fn write_mask(&self, mask: u64) -> Result<(), TraceError> {
        let at = &raw const mask as usize;
        request("PTRACE_SETSIGMASK", PTRACE_SETSIGMASK, self.pid, 8, at).map(|_| ())
    }

    /// Registers with which the process will go on.
    pub(crate) const fn regs(&self) -> &Regs {
        &self.regs
    }

    /// Its signal mask.
    pub(crate) const fn mask(&self) -> u64 {
        self.mask
    }

    /// Its memory, as `/proc/PID/mem`.
    pub(crate) const fn memory(&self) -> &File {
        &self.memory
    }

    /// Its vector state (XSAVE layout, standard format).
    pub(crate) fn xsave(&self) -> Result<Vec<u8>, TraceError> {
        let mut area = vec![0u8; 16 * 1024];
        let mut iov = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
        let at = &raw mut iov as usize;
        request("PTRACE_GETREGSET", libc::PTRACE_GETREGSET, self.pid, NT_X86_XSTATE, at)?;
        area.truncate(iov.iov_len);
        Ok(area)
    }

    /// Its restartable sequence area: address, length, signature (Linux 5.13).
    pub(crate) fn rseq(&self) -> Result<(u64, u32, u32), TraceError> {
        #[repr(C)]
        #[derive(Default)]
        struct Configuration {
            addr: u64,
            len: u32,
            signature: u32,
            flags: u32,
            pad: u32,
        }
        let mut conf = Configuration::default();
        let at = &raw mut conf as usize;
        let size = size_of::<Configuration>();
        request(
            "PTRACE_GET_RSEQ_CONFIGURATION",
            PTRACE_GET_RSEQ_CONFIGURATION,
            self.pid,
            size,
            at,
        )?;
        Ok((conf.addr, conf.len, conf.signature))
    }

    /// Whether it dispatches its own system calls (Linux 6.4 tells; older: no).
    pub(crate) fn dispatches_calls(&self) -> bool {
        let mut conf = [0u64; 4];
        let at = conf.as_mut_ptr() as usize;
        let code = PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG;
        request("PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG", code, self.pid, 32, at).is_ok()
            && conf[0] != 0
    }

    /// Finds a `syscall` instruction in the vDSO; gives its place.
    pub(crate) fn use_vdso(&mut self, maps: &[Mapping]) -> Result<Range<u64>, TraceError> {
        let vdso = maps.iter().find(|mapping| mapping.backing == Backing::Vdso);
        let vdso = vdso.ok_or(TraceError::NoVdso)?;
        self.use_gadget(vdso.start, vdso.end)?;
        Ok(vdso.start..vdso.end)
    }

    /// Finds a `syscall` instruction in `start..end`, the vDSO, or makes one in the
    /// zeros behind it.
    pub(crate) fn use_gadget(&mut self, start: u64, end: u64) -> Result<(), TraceError> {
        let mut code = vec![0; usize::try_from(end - start).map_err(|_| TraceError::NoVdso)?];
        self.memory.read_exact_at(&mut code, start).map_err(|_| TraceError::NoVdso)?;
        if let Some(at) = thunk::place(&code)
            && let at = start + at as u64
            && self.memory.write_all_at(&thunk::bytes(&self.regs, self.mask), at).is_ok()
        {
            self.gadget = Some(Gadget::Thunk(at));
            return Ok(());
        }
        let at = code.windows(2).position(|w| w == [0x0f, 0x05]).ok_or(TraceError::NoVdso)?;
        self.gadget = Some(Gadget::Found(start + at as u64));
        Ok(())
    }

    /// Makes a call in the process's name and gives its result.
    ///
    /// # Errors
    /// [`TraceError::Injected`] when the call itself fails.
    pub(crate) fn call(
        &mut self,
        name: &'static str,
        number: libc::c_long,
        args: [u64; 6],
    ) -> Result<u64, TraceError> {
        self.borrow(name, |stopped, gadget| stopped.step(number, args, gadget))
    }

    /// Has the process make a descriptor, lets `use_it` have its number, and has it
    /// closed again; also where the tracer dies meanwhile.
    ///
    /// # Errors
    /// [`TraceError::Injected`] when the call itself fails.
    pub(crate) fn with_descriptor<T>(
        &mut self,
        name: &'static str,
        number: libc::c_long,
        args: [u64; 6],
        use_it: impl FnOnce(u64) -> T,
    ) -> Result<T, TraceError> {
        let mut used = None;
        self.borrow(name, |stopped, gadget| {
            stopped.set_close(gadget, true)?;
            let made = stopped.step(number, args, gadget);
            // Until it is closed the process stays behind the call, where by itself it
            // would close what the call has made.
            if let Ok(fd) = made
                && fd.cast_signed() >= 0
            {
                used = Some(use_it(fd));
                stopped.set_close(gadget, false)?;
                stopped.step(libc::SYS_close, [fd, 0, 0, 0, 0, 0], gadget)?;
            } else {
                stopped.set_close(gadget, false)?;
            }
            made
        })?;
        used.ok_or(TraceError::Gone)
    }

    fn set_close(&self, gadget: Gadget, close: bool) -> Result<(), TraceError> {
        let Gadget::Thunk(at) = gadget else { return Ok(()) };
        let written =
            self.memory.write_all_at(&u64::from(close).to_le_bytes(), at + thunk::CLOSE_AT);
        written.map_err(|source| TraceError::Request { request: "memory", source })
    }

    /// Lets `body` have the process make calls, and puts everything back; the value is
    /// a call's result.
    fn borrow(
        &mut self,
        name: &'static str,
        body: impl FnOnce(&mut Self, Gadget) -> Result<u64, TraceError>,
    ) -> Result<u64, TraceError> {
        let gadget = self.gadget.ok_or(TraceError::NoVdso)?;
        // No signal must be delivered in the midst of it. Blocking the one that tells of
        // the step's end would reset its action (force_sig in kernel/signal.c).
        self.write_mask(!(1 << (libc::SIGTRAP - 1)))?;
        let result = body(self, gadget);
        if thunk::is_restarting(&self.regs) {
            // On its way back from a call the kernel restarts another one only where
            // signals are due.
            request("PTRACE_INTERRUPT", libc::PTRACE_INTERRUPT, self.pid, 0, 0)?;
        }
        self.write_regs(&self.regs)?;
        self.write_mask(self.mask)?;
        let value = result?;
        match i32::try_from(value.cast_signed()) {
            Ok(error @ -4095..=-1) => Err(TraceError::Injected {
                call: name,
                source: io::Error::from_raw_os_error(-error),
            }),
            _ => Ok(value),
        }
    }

    fn step(
        &mut self,
        number: libc::c_long,
        args: [u64; 6],
        gadget: Gadget,
    ) -> Result<u64, TraceError> {
        const SYSCALL_STOP: libc::c_int = libc::SIGTRAP | 0x80;
        // Entry and exit, or one step.
        let (name, how, signal, mut stops) = match gadget {
            Gadget::Thunk(_) => ("PTRACE_SYSCALL", libc::PTRACE_SYSCALL, SYSCALL_STOP, 2),
            Gadget::Found(_) => ("PTRACE_SINGLESTEP", libc::PTRACE_SINGLESTEP, libc::SIGTRAP, 1),
        };
        let mut regs = self.regs;
        regs.rip = match gadget {
            Gadget::Found(at) | Gadget::Thunk(at) => at,
        };
        regs.rax = number.cast_unsigned();
        // Or the kernel restarts the interrupted call over these registers.
        regs.orig_rax = u64::MAX;
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        self.write_regs(&regs)?;
        loop {
            request(name, how, self.pid, 0, 0)?;
            let status = wait(self.pid)?;
            if libc::WSTOPSIG(status) == signal && status >> 16 == 0 {
                stops -= 1;
                if stops == 0 {
                    return Ok(self.read_regs()?.rax);
                }
            }
            if libc::WSTOPSIG(status) == libc::SIGSTOP {
                self.held_back = libc::SIGSTOP;
            }
        }
    }

    /// Lets the process run, instruction by instruction, until it has left `range`; says
    /// whether it did.
    ///
    /// Should the tracer die meanwhile (some 100 µs), the process ends by SIGTRAP: single
    /// step outlives it.
    ///
    /// # Errors
    /// [`TraceError::JobStopped`] where job control stops it first.
    pub(crate) fn step_out_of(&mut self, range: &Range<u64>) -> Result<bool, TraceError> {
        /// Some hundred times what a function of the vDSO takes.
        const MOST: u32 = 10_000;
        let mut signal = 0;
        for _ in 0..MOST {
            if !range.contains(&self.regs.rip) {
                self.mask = self.read_mask()?;
                return Ok(true);
            }
            request("PTRACE_SINGLESTEP", libc::PTRACE_SINGLESTEP, self.pid, 0, signal)?;
            let status = wait(self.pid)?;
            let stopped_by = libc::WSTOPSIG(status);
            signal = match (status >> 16, stopped_by) {
                (0, libc::SIGTRAP) | (libc::PTRACE_EVENT_STOP, libc::SIGTRAP) => 0,
                (libc::PTRACE_EVENT_STOP, _) => return Err(TraceError::JobStopped),
                // One that is being delivered: its handler is next.
                (_, signal) => usize::try_from(signal).unwrap_or(0),
            };
            self.regs = self.read_regs()?;
        }
        Ok(false)
    }

    /// Changes the registers with which the process will go on.
    pub(crate) fn set_regs(&mut self, regs: Regs) -> Result<(), TraceError> {
        // First what may fail: with the registers the process is what they make it.
        self.renew_thunk(&regs, self.mask)?;
        self.write_regs(&regs)?;
        self.regs = regs;
        Ok(())
    }

    /// Changes the mask with which the process will go on.
    pub(crate) fn set_mask(&mut self, mask: u64) -> Result<(), TraceError> {
        self.renew_thunk(&self.regs, mask)?;
        self.write_mask(mask)?;
        self.mask = mask;
        Ok(())
    }

    /// Has the thunk restore what now is to be restored.
    fn renew_thunk(&self, regs: &Regs, mask: u64) -> Result<(), TraceError> {
        let Some(Gadget::Thunk(at)) = self.gadget else { return Ok(()) };
        let written = self.memory.write_all_at(&thunk::bytes(regs, mask), at);
        written.map_err(|source| TraceError::Request { request: "memory", source })
    }

    /// Lets the process go on.
    pub(crate) fn release(mut self) -> Result<(), TraceError> {
        self.is_detached = true;
        let signal = usize::try_from(self.held_back).unwrap_or(0);
        request("PTRACE_DETACH", libc::PTRACE_DETACH, self.pid, 0, signal).map(|_| ())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if !self.is_detached {
            // Fails where the process is gone, which is as good.
            request("PTRACE_DETACH", libc::PTRACE_DETACH, self.pid, 0, 0).ok();
        }
    }
}

/// Head and length of a process's robust futex list (man 2 get_robust_list).
pub(crate) fn robust_list(pid: Pid) -> (u64, u64) {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: the kernel writes two words.
    let result = unsafe {
        libc::syscall(
            libc::SYS_get_robust_list,
            pid.as_raw_nonzero().get(),
            &raw mut head,
            &raw mut len,
        )
    };
    if result == 0 { (head, len) } else { (0, 0) }
}

/// Whether two processes share their memory (man 2 kcmp, KCMP_VM).
pub(crate) fn shares_memory(a: i32, b: i32) -> bool {
    const KCMP_VM: i32 = 1;
    // SAFETY: no pointers.
    unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) == 0 }
}

/// A copy of descriptor `fd` of process `pid` (Linux 5.6).
pub(crate) fn get_descriptor(pid: Pid, fd: u64) -> io::Result<OwnedFd> {
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let fd = i32::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: no pointers.
    let got = unsafe {
        libc::syscall(libc::SYS_pidfd_getfd, std::os::fd::AsRawFd::as_raw_fd(&pidfd), fd, 0)
    };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    let got = i32::try_from(got).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(got) })
}

/// Reads a clock by its kernel number, in nanoseconds; none where there is no such.
pub(crate) fn read_clock(clock: i32) -> Option<i64> {
    let mut time = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: the kernel writes one timespec.
    let result = unsafe { libc::clock_gettime(clock, time.as_mut_ptr()) };
    // SAFETY: zeroed at first, which is a valid value.
    let time = unsafe { time.assume_init() };
    (result == 0).then(|| time.tv_sec * 1_000_000_000 + time.tv_nsec)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever traces is asked first, also where it is the parent as well.
    #[test]
    fn the_status_of_a_child_that_ends_is_left_to_its_parent() {
        for _ in 0..1000 {
            let mut child = std::process::Command::new("false").spawn().unwrap();
            let pid = Pid::from_child(&child);
            while let Ok(stopped) = Stopped::new(pid) {
                stopped.release().ok();
            }
            assert_eq!(child.wait().unwrap().code(), Some(1));
        }
    }
}
