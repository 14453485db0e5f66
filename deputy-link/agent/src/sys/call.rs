//! System calls, by number (x86-64 syscall ABI, man 2 syscall).
//!
//! Results are as the kernel gives them: a value, or −errno.

use conet_deputy_core::scan::{
    PAGEMAP_SCAN, Purpose, REGISTER_MODE_WP, Region, UFFD_API, UFFD_FLAGS, UFFDIO_API,
    UFFDIO_REGISTER, UFFDIO_WRITEPROTECT, protect_arg, scan_arg,
};
use core::arch::asm;
use linux_raw_sys::general as nr;

/// Any call. The caller owns what it does to memory.
///
/// # Safety
/// The arguments must be right for `number`: pointers valid for what the kernel
/// does with them, and no memory unmapped that is still in use.
pub(super) unsafe fn raw(number: u32, args: [u64; 6]) -> i64 {
    let result;
    // SAFETY: as promised by the caller; the kernel clobbers rcx and r11 only.
    unsafe {
        asm!("syscall",
            inlateout("rax") i64::from(number) => result,
            in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
            in("r10") args[3], in("r8") args[4], in("r9") args[5],
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// A call without pointers into memory that Rust owns.
pub(crate) fn plain(number: u32, args: [u64; 6]) -> i64 {
    // SAFETY: callers pass numbers, descriptors and addresses of program memory or
    // of pages that this role does not use; the kernel checks the rest.
    unsafe { raw(number, args) }
}

fn out<T>(value: &mut T) -> u64 {
    core::ptr::from_mut(value) as u64
}

fn at<T>(value: &T) -> u64 {
    core::ptr::from_ref(value) as u64
}

fn fd(number: i32) -> u64 {
    u64::from(number.cast_unsigned())
}

pub(crate) fn exit(status: u64) -> ! {
    loop {
        plain(nr::__NR_exit_group, [status, 0, 0, 0, 0, 0]);
    }
}

/// Ends this process by `signal`, whatever its dispositions.
pub(crate) fn die(signal: u32) -> ! {
    let pid = plain(nr::__NR_getpid, [0; 6]);
    loop {
        plain(nr::__NR_kill, [pid.cast_unsigned(), u64::from(signal), 0, 0, 0, 0]);
        plain(nr::__NR_exit_group, [255, 0, 0, 0, 0, 0]);
    }
}

pub(crate) fn close(number: i32) {
    plain(nr::__NR_close, [fd(number), 0, 0, 0, 0, 0]);
}

pub(crate) fn read(number: i32, into: &mut [u8]) -> i64 {
    // SAFETY: the kernel writes at most `into.len()` bytes there.
    unsafe {
        raw(nr::__NR_read, [fd(number), into.as_mut_ptr() as u64, into.len() as u64, 0, 0, 0])
    }
}

pub(crate) fn pread(number: i32, into: &mut [u8], offset: u64) -> i64 {
    let args = [fd(number), into.as_mut_ptr() as u64, into.len() as u64, offset, 0, 0];
    // SAFETY: the kernel writes at most `into.len()` bytes there.
    unsafe { raw(nr::__NR_pread64, args) }
}

pub(crate) fn rewind(number: i32) -> i64 {
    plain(nr::__NR_lseek, [fd(number), 0, 0, 0, 0, 0])
}

pub(crate) fn open(path: &core::ffi::CStr, flags: u32) -> i64 {
    open_at(-100, path, flags)
}

pub(crate) fn open_at(directory: i32, path: &core::ffi::CStr, flags: u32) -> i64 {
    let args = [fd(directory), path.as_ptr() as u64, u64::from(flags), 0, 0, 0];
    // SAFETY: the path ends with a NUL.
    unsafe { raw(nr::__NR_openat, args) }
}

pub(crate) fn read_link(directory: i32, path: &core::ffi::CStr, into: &mut [u8]) -> i64 {
    let (at, len) = (into.as_mut_ptr() as u64, into.len() as u64);
    // SAFETY: the path ends with a NUL; the kernel writes at most `len` bytes.
    unsafe { raw(nr::__NR_readlinkat, [fd(directory), path.as_ptr() as u64, at, len, 0, 0]) }
}

/// Copies into this process's own memory at an address that may be wrong.
pub(crate) fn copy_to_program(addr: u64, bytes: &[u8]) -> i64 {
    let pid = plain(nr::__NR_getpid, [0; 6]).cast_unsigned();
    let from = [bytes.as_ptr() as u64, bytes.len() as u64];
    let to = [addr, bytes.len() as u64];
    let args = [pid, from.as_ptr() as u64, 1, to.as_ptr() as u64, 1, 0];
    // SAFETY: both vectors have one entry; the kernel checks `addr`, which is the
    // program's and not ours.
    unsafe { raw(nr::__NR_process_vm_writev, args) }
}

/// Copies this process's own memory at an address that may be wrong; whether all of
/// it could be read.
pub(crate) fn try_read(addr: u64, into: &mut [u8]) -> bool {
    let pid = plain(nr::__NR_getpid, [0; 6]).cast_unsigned();
    let to = [into.as_mut_ptr() as u64, into.len() as u64];
    let from = [addr, into.len() as u64];
    let args = [pid, to.as_ptr() as u64, 1, from.as_ptr() as u64, 1, 0];
    // SAFETY: both vectors have one entry; the kernel writes at most `into.len()`
    // bytes there and checks `addr`.
    let read = unsafe { raw(nr::__NR_process_vm_readv, args) };
    read == i64::try_from(into.len()).unwrap_or(-1)
}

/// `send(2)` with MSG_NOSIGNAL.
pub(crate) fn send(number: i32, bytes: &[u8]) -> i64 {
    let args = [fd(number), bytes.as_ptr() as u64, bytes.len() as u64, 0x4000, 0, 0];
    // SAFETY: the kernel reads `bytes.len()` bytes there.
    unsafe { raw(nr::__NR_sendto, args) }
}

/// `recv(2)`.
pub(crate) fn receive(number: i32, into: &mut [u8], flags: u32) -> i64 {
    let args = [fd(number), into.as_mut_ptr() as u64, into.len() as u64, u64::from(flags), 0, 0];
    // SAFETY: the kernel writes at most `into.len()` bytes there.
    unsafe { raw(nr::__NR_recvfrom, args) }
}

/// Maps anonymous private memory; `flags` are added to `MAP_PRIVATE|MAP_ANONYMOUS`.
pub(crate) fn map(addr: u64, len: u64, prot: u32, flags: u32) -> i64 {
    let flags = u64::from(flags | nr::MAP_PRIVATE | nr::MAP_ANONYMOUS);
    plain(nr::__NR_mmap, [addr, len, u64::from(prot), flags, u64::MAX, 0])
}

pub(crate) fn unmap(addr: u64, len: u64) -> i64 {
    plain(nr::__NR_munmap, [addr, len, 0, 0, 0, 0])
}

pub(crate) fn protect(addr: u64, len: u64, prot: u32) -> i64 {
    plain(nr::__NR_mprotect, [addr, len, u64::from(prot), 0, 0, 0])
}

/// Lets the mapping that ends at `end` grow by `len` bytes where it is.
pub(crate) fn grow(end: u64, len: u64) -> i64 {
    const PAGE: u64 = 4096;
    plain(nr::__NR_mremap, [end - PAGE, PAGE, PAGE + len, 0, 0, 0])
}

/// `madvise(MADV_DONTNEED)`.
pub(crate) fn discard(addr: u64, len: u64) -> i64 {
    plain(nr::__NR_madvise, [addr, len, 4, 0, 0, 0])
}

pub(crate) fn brk(addr: u64) -> u64 {
    plain(nr::__NR_brk, [addr, 0, 0, 0, 0, 0]).cast_unsigned()
}

/// `clock_gettime(2)` in nanoseconds; 0 for a clock that is not there.
pub(crate) fn clock(id: u32) -> i64 {
    let mut time = [0i64; 2];
    // SAFETY: `time` has the size of a timespec.
    let result =
        unsafe { raw(nr::__NR_clock_gettime, [u64::from(id), out(&mut time), 0, 0, 0, 0]) };
    if result < 0 { 0 } else { time[0].wrapping_mul(1_000_000_000).wrapping_add(time[1]) }
}

pub(crate) fn set_mask(mask: u64) {
    let args = [2, at(&mask), 0, 8, 0, 0];
    // SAFETY: the kernel reads 8 bytes.
    unsafe { raw(nr::__NR_rt_sigprocmask, args) };
}

pub(crate) fn signal_mask() -> u64 {
    let mut mask = 0u64;
    // SAFETY: the kernel writes 8 bytes.
    unsafe { raw(nr::__NR_rt_sigprocmask, [0, 0, out(&mut mask), 8, 0, 0]) };
    mask
}

/// `struct sigaltstack`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct AltStack {
    pub(crate) addr: u64,
    pub(crate) flags: u32,
    pub(crate) padding: u32,
    pub(crate) len: u64,
}

pub(crate) fn alt_stack(new: Option<&AltStack>) -> AltStack {
    let mut old = AltStack::default();
    let args = [new.map_or(0, at), out(&mut old), 0, 0, 0, 0];
    // SAFETY: both have the kernel's layout.
    unsafe { raw(nr::__NR_sigaltstack, args) };
    old
}

/// Kernel's `struct sigaction`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Action {
    pub(crate) handler: u64,
    pub(crate) flags: u64,
    pub(crate) restorer: u64,
    pub(crate) mask: u64,
}

/// Signals that wait for this process (man 2 rt_sigpending).
pub(crate) fn pending_signals() -> u64 {
    let mut set = 0u64;
    // SAFETY: the kernel writes 8 bytes.
    unsafe { raw(nr::__NR_rt_sigpending, [out(&mut set), 8, 0, 0, 0, 0]) };
    set
}

/// A signal's action.
pub(super) fn action_of(signal: u32) -> Action {
    let mut action = Action { handler: 0, flags: 0, restorer: 0, mask: 0 };
    let args = [u64::from(signal), 0, out(&mut action), 8, 0, 0];
    // SAFETY: `action` has the kernel's layout.
    unsafe { raw(nr::__NR_rt_sigaction, args) };
    action
}

/// Flags of a signal's action.
pub(crate) fn action_flags(signal: u32) -> u64 {
    action_of(signal).flags
}

pub(super) fn set_action(signal: u32, action: &Action) -> i64 {
    // SAFETY: `action` has the kernel's layout and names handlers of this program.
    unsafe { raw(nr::__NR_rt_sigaction, [u64::from(signal), at(action), 0, 8, 0, 0]) }
}

pub(crate) fn set_base(code: u32, base: u64) -> i64 {
    plain(nr::__NR_arch_prctl, [u64::from(code), base, 0, 0, 0, 0])
}

pub(crate) fn prctl(option: u32, args: [u64; 4]) -> i64 {
    plain(nr::__NR_prctl, [u64::from(option), args[0], args[1], args[2], args[3], 0])
}

/// `prctl(PR_SET_MM, PR_SET_MM_MAP)`, Linux 3.18.
pub(crate) fn set_memory_map(map: &conet_wire::image::MemoryMap) -> i64 {
    #[repr(C)]
    struct PrctlMmMap {
        map: conet_wire::image::MemoryMap,
        auxv: u64,
        auxv_size: u32,
        exe_fd: u32,
    }
    let full = PrctlMmMap { map: *map, auxv: 0, auxv_size: 0, exe_fd: u32::MAX };
    prctl(35, [14, at(&full), core::mem::size_of::<PrctlMmMap>() as u64, 0])
}

pub(crate) fn set_name(name: &[u8; 16]) {
    prctl(15, [name.as_ptr() as u64, 0, 0, 0]);
}

pub(crate) fn set_limit(resource: u32, soft: u64, hard: u64) -> i64 {
    let limit = [soft, hard];
    // SAFETY: the kernel reads two words.
    unsafe { raw(nr::__NR_setrlimit, [u64::from(resource), limit.as_ptr() as u64, 0, 0, 0, 0]) }
}

/// Drops every capability of this process, for good.
pub(crate) fn drop_capabilities() -> i64 {
    for capability in 0..64 {
        prctl(24, [capability, 0, 0, 0]); // PR_CAPBSET_DROP; EINVAL past the last one
    }
    prctl(47, [4, 0, 0, 0]); // PR_CAP_AMBIENT_CLEAR_ALL
    let header = [0x2008_0522u32, 0]; // _LINUX_CAPABILITY_VERSION_3
    let none = [0u32; 6];
    // SAFETY: header and data have the sizes of version 3.
    unsafe { raw(nr::__NR_capset, [header.as_ptr() as u64, none.as_ptr() as u64, 0, 0, 0, 0]) }
}

pub(crate) fn install_filter(program: &[conet_deputy_core::filter::Instruction]) -> i64 {
    #[repr(C)]
    struct Fprog {
        len: u16,
        filter: u64,
    }
    let Ok(len) = u16::try_from(program.len()) else { return -22 };
    let fprog = Fprog { len, filter: program.as_ptr() as u64 };
    let result = prctl(38, [1, 0, 0, 0]);
    if result < 0 {
        return result;
    }
    // SAFETY: `fprog` has the kernel's layout and points at `len` instructions.
    unsafe { raw(nr::__NR_seccomp, [1, 0, at(&fprog), 0, 0, 0]) }
}

/// `mount(2)` without data.
pub(crate) fn mount(kind: Option<&core::ffi::CStr>, target: &core::ffi::CStr, flags: u64) -> i64 {
    let kind = kind.map_or(0, |k| k.as_ptr() as u64);
    // SAFETY: the strings end with a NUL.
    unsafe { raw(nr::__NR_mount, [kind, target.as_ptr() as u64, kind, flags, 0, 0]) }
}

/// Makes the current directory the root and lets go of the old one.
pub(crate) fn pivot_here() -> i64 {
    let dot = c".".as_ptr() as u64;
    // SAFETY: the strings end with a NUL.
    let result = unsafe { raw(nr::__NR_pivot_root, [dot, dot, 0, 0, 0, 0]) };
    if result < 0 {
        return result;
    }
    // SAFETY: as above; MNT_DETACH.
    unsafe { raw(nr::__NR_umount2, [dot, 2, 0, 0, 0, 0]) }
}

pub(crate) fn change_directory(path: &core::ffi::CStr) -> i64 {
    // SAFETY: the path ends with a NUL.
    unsafe { raw(nr::__NR_chdir, [path.as_ptr() as u64, 0, 0, 0, 0, 0]) }
}

/// `clone3(2)`: a child like `fork`, whose id in this namespace is `pid` where given
/// (`set_tid`, Linux 5.5).
pub(crate) fn fork(pid: Option<i32>) -> i64 {
    let tid = pid.unwrap_or(0);
    let mut args = [0u64; 11];
    args[4] = 17; // exit_signal = SIGCHLD
    if pid.is_some() {
        args[8] = at(&tid);
        args[9] = 1;
    }
    // SAFETY: the layout of struct clone_args (88 bytes); no CLONE_VM, so the child
    // has memory of its own.
    unsafe { raw(nr::__NR_clone3, [args.as_ptr() as u64, 88, 0, 0, 0, 0]) }
}

/// `wait4(2)`; gives (pid or −errno, status).
pub(crate) fn wait(pid: i32, options: u32) -> (i64, u32) {
    let mut status = 0u32;
    let args = [fd(pid), out(&mut status), u64::from(options), 0, 0, 0];
    // SAFETY: the kernel writes one int.
    let result = unsafe { raw(nr::__NR_wait4, args) };
    (result, status)
}

pub(crate) fn kill(pid: i32, signal: u32) -> i64 {
    plain(nr::__NR_kill, [fd(pid), u64::from(signal), 0, 0, 0, 0])
}

/// `struct pollfd`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct PollFd {
    pub(crate) fd: i32,
    pub(crate) events: u16,
    pub(crate) revents: u16,
}

pub(crate) fn poll(fds: &mut [PollFd], timeout_ms: i32) -> i64 {
    let args = [fds.as_mut_ptr() as u64, fds.len() as u64, fd(timeout_ms), 0, 0, 0];
    // SAFETY: the kernel writes `revents` of `fds.len()` entries.
    unsafe { raw(nr::__NR_poll, args) }
}

pub(crate) fn accept(number: i32) -> i64 {
    plain(nr::__NR_accept4, [fd(number), 0, 0, 0x80000, 0, 0]) // SOCK_CLOEXEC
}

/// A descriptor that becomes readable with SIGCHLD.
pub(crate) fn child_signals() -> i64 {
    let mask = 1u64 << 16;
    set_mask(mask);
    // SAFETY: the kernel reads 8 bytes.
    unsafe { raw(nr::__NR_signalfd4, [u64::MAX, at(&mask), 8, 0x80800, 0, 0]) }
}

/// `ioctl(PAGEMAP_SCAN)`: regions that were filled in, or −errno, and how far it got.
pub(crate) fn scan(
    pagemap: i32,
    purpose: Purpose,
    range: (u64, u64),
    into: &mut [Region],
) -> (i64, u64) {
    let mut arg = scan_arg(purpose, range, into.as_mut_ptr() as u64, into.len() as u64);
    let args = [fd(pagemap), u64::from(PAGEMAP_SCAN), out(&mut arg), 0, 0, 0];
    // SAFETY: `arg` has the kernel's layout; it fills in at most `into.len()` regions.
    let found = unsafe { raw(nr::__NR_ioctl, args) };
    (found, arg.walk_end)
}

/// Protects and marks what is registered of a range, without telling what it was.
pub(crate) fn protect_written(pagemap: i32, range: (u64, u64)) -> i64 {
    let mut arg = protect_arg(range);
    let args = [fd(pagemap), u64::from(PAGEMAP_SCAN), out(&mut arg), 0, 0, 0];
    // SAFETY: `arg` has the kernel's layout and names no place for regions.
    unsafe { raw(nr::__NR_ioctl, args) }
}

/// A userfaultfd for asynchronous write protection, or −errno.
pub(crate) fn userfault() -> i64 {
    let uffd = plain(nr::__NR_userfaultfd, [UFFD_FLAGS, 0, 0, 0, 0, 0]);
    if uffd < 0 {
        return uffd;
    }
    let mut api = UFFD_API;
    let args = [uffd.cast_unsigned(), u64::from(UFFDIO_API), out(&mut api), 0, 0, 0];
    // SAFETY: `api` has the size of struct uffdio_api.
    let agreed = unsafe { raw(nr::__NR_ioctl, args) };
    if agreed < 0 {
        plain(nr::__NR_close, [uffd.cast_unsigned(), 0, 0, 0, 0, 0]);
        return agreed;
    }
    uffd
}

/// Registers all that is mapped in a range with a userfaultfd.
pub(crate) fn register(uffd: i32, start: u64, len: u64) -> i64 {
    let mut arg = [start, len, REGISTER_MODE_WP, 0];
    // SAFETY: `arg` has the size of struct uffdio_register.
    unsafe { raw(nr::__NR_ioctl, [fd(uffd), u64::from(UFFDIO_REGISTER), out(&mut arg), 0, 0, 0]) }
}

/// Takes protection and marks from a registered range.
pub(crate) fn release_written(uffd: i32, (start, end): (u64, u64)) -> i64 {
    let mut arg = [start, end - start, 0];
    let request = u64::from(UFFDIO_WRITEPROTECT);
    // SAFETY: `arg` has the size of struct uffdio_writeprotect.
    unsafe { raw(nr::__NR_ioctl, [fd(uffd), request, out(&mut arg), 0, 0, 0]) }
}

/// How often the kernel has taken the processor from this process for others.
pub(crate) fn switches() -> u64 {
    // ru_nivcsw is the last word of struct rusage.
    own_rusage()[17]
}

pub(crate) fn own_rusage() -> [u64; 18] {
    let mut usage = [0u64; 18];
    // SAFETY: struct rusage is 144 bytes.
    unsafe { raw(nr::__NR_getrusage, [0, out(&mut usage), 0, 0, 0, 0]) };
    usage
}
