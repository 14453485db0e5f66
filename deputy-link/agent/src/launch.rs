//! The host role's first half: from the daemon's child to a warden in namespaces.
//!
//! ```text
//! daemon ── Launch, keys ──►  unshare ── 'U' ──► daemon writes the id maps ── 'M' ──►
//!           become root of the new user namespace ─► empty root file system ─►
//!           fork: the warden is process 1 ── its id ──► daemon; this process ends
//! ```
//!
//! Nothing of the host is left: no file, no descriptor but the three that
//! [`conet_deputy_core::boot::host_fd`] names, no process, no network, no capability
//! outside. The one exception is closed by the remote before it takes a byte of the
//! program: the host's `/proc`, to open its own maps.

use crate::{sys, warden};
use conet_deputy_core::boot::{Launch, host_fd};
use linux_raw_sys::general as nr;
use zerocopy::FromBytes;

const EPERM: i64 = 1;
const CLONE_NEWNS: u64 = 0x0002_0000;
const CLONE_NEWUTS: u64 = 0x0400_0000;
const CLONE_NEWIPC: u64 = 0x0800_0000;
const CLONE_NEWUSER: u64 = 0x1000_0000;
const CLONE_NEWPID: u64 = 0x2000_0000;
const CLONE_NEWNET: u64 = 0x4000_0000;
const MS_REC: u64 = 0x4000;
const MS_PRIVATE: u64 = 0x4_0000;
const MS_LIMITS: u64 = 1 | 2 | 4 | 8 | 32; // ro, nosuid, nodev, noexec, remount
const O_PATH_DIRECTORY: u32 = 0x20_0000 | 0x1_0000 | 0x8_0000;

/// Tells the daemon which step failed, and ends.
fn fail(step: u8, result: i64) -> ! {
    let errno = u8::try_from(-result).unwrap_or(0);
    sys::send(host_fd::CONTROL, &[b'E', step, errno]);
    sys::exit(u64::from(step))
}

fn must(step: u8, result: i64) -> i64 {
    if result < 0 { fail(step, result) } else { result }
}

/// Entry of the host role; `role` is `argv[1]`.
pub(crate) fn run(role: &core::ffi::CStr) -> ! {
    if role != c"host" {
        sys::exit(64);
    }
    let mut bytes = [0u8; size_of::<Launch>()];
    let mut filled = 0;
    while filled < bytes.len() {
        let n = sys::receive(host_fd::CONTROL, &mut bytes[filled..], 0);
        if n <= 0 {
            sys::exit(65);
        }
        filled += usize::try_from(n).unwrap_or(0);
    }
    let Ok(launch) = Launch::read_from_bytes(&bytes) else { sys::exit(65) };
    let all =
        CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS;
    sys::set_name(b"conet-warden\0\0\0\0");
    must(1, sys::plain(nr::__NR_unshare, [all, 0, 0, 0, 0, 0]));
    sys::send(host_fd::CONTROL, b"U");
    let mut answer = [0];
    if sys::receive(host_fd::CONTROL, &mut answer, 0) != 1 || answer != *b"M" {
        sys::exit(66);
    }
    // Denied within a user namespace of one id, whose maker had to give it up
    // (user_namespaces(7)): the groups are then that ordinary user's own.
    let groups = sys::plain(nr::__NR_setgroups, [0; 6]);
    if groups != -EPERM {
        must(2, groups);
    }
    must(3, sys::plain(nr::__NR_setresgid, [0; 6]));
    must(4, sys::plain(nr::__NR_setresuid, [0; 6]));
    let proc_fd = must(5, sys::open(c"/proc", O_PATH_DIRECTORY));
    must(6, sys::mount(None, c"/", MS_REC | MS_PRIVATE));
    must(7, sys::mount(Some(c"tmpfs"), c"/tmp", 0));
    must(8, sys::change_directory(c"/tmp"));
    must(9, sys::pivot_here());
    must(10, sys::mount(None, c"/", MS_LIMITS));
    sys::plain(nr::__NR_setsid, [0; 6]);
    match must(11, sys::fork(None)) {
        0 => warden::run(&launch, i32::try_from(proc_fd).unwrap_or(-1)),
        pid => {
            let pid = u32::try_from(pid).unwrap_or(0).to_le_bytes();
            sys::send(host_fd::CONTROL, &[b'W', pid[0], pid[1], pid[2], pid[3]]);
            sys::exit(0)
        }
    }
}
