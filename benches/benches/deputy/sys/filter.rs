//! seccomp filters that catch the measured calls and nothing else, and those who
//! are told: a handler in the process, or a supervisor.
//!
//! Sources: man 2 seccomp, man 2 seccomp_unotify, linux/seccomp.h.

use super::check;
use crate::work::TARGET_FD;
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use std::ptr;
use std::sync::OnceLock;

/// What happens to a caught call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Catch {
    /// SIGSYS in the process.
    Trap,
    /// The process's tracer is told.
    Trace,
    /// The holder of a descriptor is told.
    Notify,
    /// Nothing: what a filter costs that looks and lets through.
    Allow,
}

/// Which calls are caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// getppid, and read and write of the target.
    Forwarded,
    /// The memory calls and sched_yield, sigprocmask, futex.
    Local,
}

const LOAD: u16 = 0x20;
const JEQ: u16 = 0x15;
const RETURN: u16 = 0x06;
const SECCOMP_RET_TRAP: u32 = 0x0003_0000;
const SECCOMP_RET_TRACE: u32 = 0x7ff0_0000;
const SECCOMP_RET_USER_NOTIF: u32 = 0x7fc0_0000;
const SECCOMP_RET_ALLOW: u32 = 0x7fff_0000;
// Offsets in struct seccomp_data.
const NUMBER: u32 = 0;
const POINTER_HIGH: u32 = 12;
const ARG0: u32 = 16;
/// Upper half of instruction pointers that are let through at once: nobody's, but
/// the comparison keeps the kernel from remembering a verdict by number alone, as
/// with every filter that knows its own code by the instruction pointer.
const NOBODY: u32 = 0xffff_fff0;

fn step(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

fn numbers(which: Which) -> &'static [libc::c_long] {
    match which {
        Which::Forwarded => &[libc::SYS_getppid],
        Which::Local => &[
            libc::SYS_munmap,
            libc::SYS_mprotect,
            libc::SYS_madvise,
            libc::SYS_brk,
            libc::SYS_mmap,
            libc::SYS_futex,
            libc::SYS_sched_yield,
            libc::SYS_rt_sigprocmask,
        ],
    }
}

/// Installs a filter in this process; gives the listener for [`Catch::Notify`].
/// With [`Catch::Trap`], calls made from the page of [`pass`] are let through.
pub(crate) fn install(which: Which, catch: Catch) -> Result<Option<OwnedFd>, Errno> {
    let verdict = match catch {
        Catch::Trap => SECCOMP_RET_TRAP,
        Catch::Trace => SECCOMP_RET_TRACE,
        Catch::Notify => SECCOMP_RET_USER_NOTIF,
        Catch::Allow => SECCOMP_RET_ALLOW,
    };
    let number = |n: libc::c_long| u32::try_from(n).unwrap_or(u32::MAX);
    let mut code = vec![
        step(LOAD, 0, 0, POINTER_HIGH),
        step(JEQ, 0, 1, if catch == Catch::Trap { pass_high()? } else { NOBODY }),
        step(RETURN, 0, 0, SECCOMP_RET_ALLOW),
        step(LOAD, 0, 0, NUMBER),
    ];
    for n in numbers(which) {
        code.push(step(JEQ, 0, 1, number(*n)));
        code.push(step(RETURN, 0, 0, verdict));
    }
    if which == Which::Forwarded {
        code.push(step(JEQ, 1, 0, number(libc::SYS_read)));
        code.push(step(JEQ, 0, 3, number(libc::SYS_write)));
        code.push(step(LOAD, 0, 0, ARG0));
        code.push(step(JEQ, 0, 1, TARGET_FD.unsigned_abs()));
        code.push(step(RETURN, 0, 0, verdict));
    }
    code.push(step(RETURN, 0, 0, SECCOMP_RET_ALLOW));
    let program = libc::sock_fprog {
        len: u16::try_from(code.len()).map_err(|_| Errno::INVAL)?,
        filter: code.as_mut_ptr(),
    };
    // SAFETY: a flag of this process, without pointers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    let flags = if catch == Catch::Notify { libc::SECCOMP_FILTER_FLAG_NEW_LISTENER } else { 0 };
    let at = ptr::from_ref(&program);
    // SAFETY: `program` points at `code`, both live; the kernel copies them.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, at) };
    let fd = i32::try_from(check(result)?).map_err(|_| Errno::BADF)?;
    // SAFETY: the kernel has just given this descriptor to us.
    Ok((catch == Catch::Notify).then(|| unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// What answers a trapped call: number and arguments to a result or −errno.
pub(crate) type Answer = fn(u32, &[u64; 6]) -> i64;

static ANSWER: OnceLock<Answer> = OnceLock::new();
static PASS: OnceLock<u64> = OnceLock::new();

/// Where calls may be made that the filter of [`Catch::Trap`] would catch.
const PASS_AT: u64 = 0x1000_0000_0000;

fn pass_high() -> Result<u32, Errno> {
    pass_page()?;
    u32::try_from(PASS_AT >> 32).map_err(|_| Errno::INVAL)
}

/// A page with a system call instruction, at an address that the filter knows.
fn pass_page() -> Result<u64, Errno> {
    if let Some(addr) = PASS.get() {
        return Ok(*addr);
    }
    // number in rdi, six arguments behind rsi: as conet's own gate
    const CODE: &[u8] = &[
        0x48, 0x89, 0xf8, // mov rax, rdi
        0x49, 0x89, 0xf3, // mov r11, rsi
        0x49, 0x8b, 0x3b, // mov rdi, [r11]
        0x49, 0x8b, 0x73, 0x08, // mov rsi, [r11 + 8]
        0x49, 0x8b, 0x53, 0x10, // mov rdx, [r11 + 16]
        0x4d, 0x8b, 0x53, 0x18, // mov r10, [r11 + 24]
        0x4d, 0x8b, 0x43, 0x20, // mov r8, [r11 + 32]
        0x4d, 0x8b, 0x4b, 0x28, // mov r9, [r11 + 40]
        0x0f, 0x05, // syscall
        0xc3, // ret
    ];
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new page where nothing is, or an error.
    let addr = unsafe { libc::mmap(PASS_AT as *mut _, 4096, prot, flags, -1, 0) };
    if addr as u64 != PASS_AT {
        return Err(Errno::NOMEM);
    }
    // SAFETY: the page is ours, writable, and longer than the code.
    unsafe { ptr::copy_nonoverlapping(CODE.as_ptr(), addr.cast(), CODE.len()) };
    // SAFETY: our own page again.
    check(unsafe { libc::mprotect(addr, 4096, libc::PROT_READ | libc::PROT_EXEC) }.into())?;
    Ok(*PASS.get_or_init(|| PASS_AT))
}

/// Makes a call that the filter lets through; a result or −errno.
pub(crate) fn pass(number: u32, args: &[u64; 6]) -> i64 {
    let Some(addr) = PASS.get() else { return -i64::from(libc::ENOSYS) };
    // SAFETY: the page holds a function of this signature (see CODE), which keeps the
    // C calling convention: it changes only registers that a callee may change.
    let call: extern "C" fn(u64, *const u64) -> i64 =
        unsafe { std::mem::transmute(*addr as *const ()) };
    call(u64::from(number), args.as_ptr())
}

/// Makes `answer` answer trapped calls of this process.
pub(crate) fn answer_traps(answer: Answer) -> Result<(), Errno> {
    ANSWER.set(answer).map_err(|_| Errno::ALREADY)?;
    // SAFETY: all zeros is an action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_trap as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler is of the kind that SA_SIGINFO says, and lives for ever.
    check(unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) }.into())
        .map(drop)
}

extern "C" fn on_trap(_: i32, info: *const u8, context: *mut libc::ucontext_t) {
    // SAFETY: siginfo of SIGSYS has si_syscall at byte 24 (linux/signal.h).
    let number = unsafe { ptr::read_unaligned(info.add(24).cast::<u32>()) };
    // SAFETY: the kernel's frame, ours until the handler returns.
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    let arg = |which: i32| registers[usize::try_from(which).unwrap_or(0)].cast_unsigned();
    let args =
        [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10, libc::REG_R8, libc::REG_R9]
            .map(arg);
    let result = ANSWER.get().map_or(-i64::from(libc::ENOSYS), |answer| answer(number, &args));
    registers[usize::try_from(libc::REG_RAX).unwrap_or(0)] = result;
}

// linux/seccomp.h: _IOWR('!', 0, 80), _IOWR('!', 1, 24), _IOW('!', 4, 8).
const NOTIF_RECV: libc::c_ulong = 0xc050_2100;
const NOTIF_SEND: libc::c_ulong = 0xc018_2101;
const NOTIF_SET_FLAGS: libc::c_ulong = 0x4008_2104;

/// A call that waits for its supervisor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Notified {
    pub(crate) id: u64,
    pub(crate) pid: i32,
    pub(crate) number: u32,
    pub(crate) args: [u64; 6],
}

/// Asks for SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (Linux 6.6), the faster hand-over on
/// one processor; older kernels go without.
pub(crate) fn wake_synchronously(listener: BorrowedFd<'_>) {
    // SAFETY: the argument is a value.
    let asked = unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_SET_FLAGS, 1u64) };
    if asked != 0 {
        eprintln!("seccomp notification: no synchronous wake-up on this kernel");
    }
}

/// Waits for the next call.
pub(crate) fn next_notified(listener: BorrowedFd<'_>) -> Result<Notified, Errno> {
    let mut words = [0u64; 10];
    // SAFETY: the kernel fills 80 bytes.
    check(unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_RECV, words.as_mut_ptr()) }.into())?;
    let [id, process, call, _pointer, args @ ..] = words;
    let low = |word: u64| u32::try_from(word & 0xffff_ffff).unwrap_or(0);
    Ok(Notified { id, pid: low(process).cast_signed(), number: low(call), args })
}

/// Gives a notified call its result or −errno.
pub(crate) fn answer_notified(listener: BorrowedFd<'_>, id: u64, result: i64) -> Result<(), Errno> {
    let (value, error) = if result < 0 { (0, result) } else { (result, 0) };
    let mut words = [id, value.cast_unsigned(), error.cast_unsigned() & 0xffff_ffff];
    // SAFETY: the kernel reads 24 bytes.
    check(unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_SEND, words.as_mut_ptr()) }.into())
        .map(drop)
}
