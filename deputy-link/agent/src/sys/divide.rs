//! Making children, and what only they and their makers need of the kernel.

use super::call::{plain, raw};
use super::statics;
use conet_deputy_core::filter::{DIVIDE, DIVIDE_SHARED};
use core::arch::naked_asm;
use core::ffi::CStr;
use linux_raw_sys::general as nr;

/// Names below `/proc`, read-only like all constants: the filter knows their addresses.
static OWN_MAPS: &CStr = c"self/maps";
static OWN_PAGEMAP: &CStr = c"self/pagemap";

const O_CLOEXEC: u64 = 0x8_0000;
const PR_SET_DUMPABLE: u64 = 4;
const RLIMIT_NOFILE: u64 = 7;

/// Addresses of the names that [`open_own`] opens.
pub(crate) fn own_names() -> [u64; 2] {
    [OWN_MAPS.as_ptr() as u64, OWN_PAGEMAP.as_ptr() as u64]
}

/// Opens this process's own maps and pagemap below `proc`; −errno where it fails.
pub(crate) fn open_own(proc: i32) -> [i64; 2] {
    let proc = u64::from(proc.cast_unsigned());
    // What changes users or is not to be dumped has its files of /proc given to root.
    plain(nr::__NR_prctl, [PR_SET_DUMPABLE, 1, 0, 0, 0, 0]);
    let opened = own_names().map(|name| plain(nr::__NR_openat, [proc, name, 0, 0, 0, 0]));
    plain(nr::__NR_prctl, [PR_SET_DUMPABLE, 0, 0, 0, 0, 0]);
    opened
}

/// Opens this process's own maps as a process of home sees them.
pub(crate) fn open_maps() -> i64 {
    let path = c"/proc/self/maps".as_ptr() as u64;
    // SAFETY: the path ends with a NUL.
    unsafe { raw(nr::__NR_openat, [(-100i64).cast_unsigned(), path, O_CLOEXEC, 0, 0, 0]) }
}

/// Puts descriptor `from` in the place of `to`, closing `from`.
pub(crate) fn put_in_place(from: i32, to: i32) -> bool {
    let (old, new) = (u64::from(from.cast_unsigned()), u64::from(to.cast_unsigned()));
    let put = plain(nr::__NR_dup2, [old, new, 0, 0, 0, 0]) >= 0;
    super::close(from);
    put
}

/// The same, closed by `execve`.
pub(crate) fn put_hidden(from: i32, to: i32) -> bool {
    let (old, new) = (u64::from(from.cast_unsigned()), u64::from(to.cast_unsigned()));
    let put = plain(nr::__NR_dup3, [old, new, O_CLOEXEC, 0, 0, 0]) >= 0;
    super::close(from);
    put
}

/// How many descriptors this process may have, now.
pub(crate) fn descriptor_limit() -> u64 {
    let mut limit = [0u64; 2];
    // SAFETY: the kernel writes two words.
    unsafe { raw(nr::__NR_getrlimit, [RLIMIT_NOFILE, limit.as_mut_ptr() as u64, 0, 0, 0, 0]) };
    core::hint::black_box(limit)[0]
}

/// Head and length of this process's robust futex list (man 2 get_robust_list).
pub(crate) fn robust_list() -> (u64, u64) {
    let (mut head, mut len) = (0u64, 0u64);
    let (head_at, len_at) = (core::ptr::from_mut(&mut head), core::ptr::from_mut(&mut len));
    // SAFETY: the kernel writes two words.
    let result =
        unsafe { raw(nr::__NR_get_robust_list, [0, head_at as u64, len_at as u64, 0, 0, 0]) };
    let list = core::hint::black_box((head, len));
    if result == 0 { list } else { (0, 0) }
}

/// `clone3(2)` of a deputy, with these flags: 0 in the child.
pub(crate) fn fork_at_home(flags: u64, child_tid: u64) -> i64 {
    const SIGCHLD: u64 = 17;
    // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, …
    let args = [flags, 0, child_tid, 0, SIGCHLD, 0, 0, 0];
    let len = size_of_val(&args) as u64;
    // SAFETY: the first version of struct clone_args; no CLONE_VM, so the child has
    // memory of its own.
    unsafe { raw(nr::__NR_clone3, [args.as_ptr() as u64, len, 0, 0, 0, 0]) }
}

/// Divides a remote: 0 in the child, which has memory of its own.
pub(crate) fn divide() -> i64 {
    plain(nr::__NR_clone, [DIVIDE, 0, 0, 0, 0, 0])
}

/// Divides a remote whose child shares its memory: the child begins in
/// [`crate::branch::begin_shared`] on the stack of its depth, and this comes back when
/// it has ended or become another program.
pub(crate) fn divide_shared(depth: usize) -> i64 {
    let stack = statics::alt_stack(depth);
    // SAFETY: the stack is the child's alone; the parent waits meanwhile.
    unsafe { conet_divide_shared(stack.addr + stack.len) }
}

#[unsafe(naked)]
unsafe extern "C" fn conet_divide_shared(stack_top: u64) -> i64 {
    naked_asm!(
        "mov rsi, rdi",
        "mov edi, {flags}",
        "xor edx, edx",
        "xor r10d, r10d",
        "xor r8d, r8d",
        "mov eax, 56",
        "syscall",
        "test rax, rax",
        "jz 2f",
        "ret",
        "2:",
        "xor ebp, ebp",
        "call {child}",
        "ud2",
        flags = const DIVIDE_SHARED,
        child = sym begin_shared,
    )
}

extern "C" fn begin_shared() -> ! {
    crate::branch::begin_shared()
}
