//! The calls of this crate that need `unsafe`: leaving namespaces for new ones,
//! and loading an eBPF program.

#![allow(unsafe_code, reason = "unshare(2) is unsafe in rustix since 1.1, bpf(2) is raw")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Gives the calling thread a new, empty network namespace (`unshare(2)`).
///
/// Needs CAP_SYS_ADMIN; kernel 2.6.24.
pub(crate) fn unshare_net() -> rustix::io::Result<()> {
    unshare(UnshareFlags::NEWNET)
}

/// Gives the calling process, which must have one thread, a new user namespace
/// in which it has all capabilities and, until it is mapped, no id (`unshare(2)`,
/// kernel 3.8).
pub(crate) fn unshare_user() -> rustix::io::Result<()> {
    unshare(UnshareFlags::NEWUSER)
}

/// Moves the calling process into a new mount namespace, and its children into a new
/// process namespace (kernel 3.8).
pub(crate) fn unshare_processes() -> rustix::io::Result<()> {
    unshare(UnshareFlags::NEWNS | UnshareFlags::NEWPID)
}

/// Makes a new time namespace for the calling process's children (kernel 5.6).
pub(crate) fn unshare_time() -> rustix::io::Result<()> {
    unshare(UnshareFlags::NEWTIME)
}

fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: the callee is unsafe for the sake of CLONE_FILES, which would give
    // this thread a descriptor table of its own behind the back of owners of
    // descriptors on other threads. No caller here passes it.
    unsafe { unshare_unsafe(flags) }
}

/// Loads the shortest program for a traffic-control hook, `return 0`
/// (`bpf(2)`, BPF_PROG_LOAD; kernel 4.1).
pub(crate) fn load_bpf_program() -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
    /// The beginning of `union bpf_attr` for BPF_PROG_LOAD (`linux/bpf.h`); what
    /// follows counts as zero.
    #[repr(C)]
    struct ProgLoad {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
    }
    // r0 = 0; exit (each instruction is one little-endian u64).
    let program: [u64; 2] = [0xb7, 0x95];
    let license = c"GPL";
    let attributes = ProgLoad {
        prog_type: BPF_PROG_TYPE_SCHED_CLS,
        insn_cnt: 2,
        insns: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: the kernel reads `size` bytes of the structure, and through it two
    // instructions and a NUL-terminated text, all of which outlive the call; it
    // writes nothing, for there is no log.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attributes, size_of::<ProgLoad>())
    };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
