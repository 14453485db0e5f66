//! The raw calls of [`crate::probe`].

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::Pid;

use super::super::probe::UserFaults;

/// A number or a negative error, as `syscall(2)` gives it.
fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Makes the namespaces of agent/src/launch.rs.
pub(crate) fn unshare_sandbox() -> io::Result<()> {
    let flags = libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS;
    // SAFETY: no pointers; none of the flags splits what threads share.
    checked(unsafe { libc::unshare(flags) }.into()).map(drop)
}

/// The beginning of `struct clone_args` up to `set_tid_size` (`linux/sched.h`).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
}

/// As fork, with flags and, where wanted, an id; 0 in the child, which may do nothing
/// but raw calls: other threads' locks are as they were.
fn clone3(flags: i32, tid: Option<&libc::pid_t>) -> io::Result<libc::pid_t> {
    let args = CloneArgs {
        flags: u64::from(flags.unsigned_abs()),
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        set_tid: tid.map_or(0, |tid| std::ptr::from_ref(tid) as u64),
        set_tid_size: u64::from(tid.is_some()),
        ..CloneArgs::default()
    };
    // SAFETY: the kernel reads the structure and the id that it points to; without
    // CLONE_VM the child runs on a copy of this stack.
    let result =
        unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    Ok(libc::pid_t::try_from(checked(result)?).unwrap_or(-1))
}

/// Waits for a child's end; its exit status, or 128 and its signal.
fn wait(pid: libc::pid_t) -> io::Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is one int.
        if unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) } >= 0 {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        128 + libc::WTERMSIG(status)
    })
}

fn exit(status: i32) -> ! {
    // SAFETY: no pointers; it runs nothing of this process on its way.
    unsafe { libc::_exit(status) }
}

/// In new user and process namespaces, process 1 makes process 4711.
pub(crate) fn chosen_pid() -> io::Result<()> {
    const WANTED: libc::pid_t = 4711;
    let init = clone3(libc::CLONE_NEWUSER | libc::CLONE_NEWPID, None)?;
    if init == 0 {
        let error = match clone3(0, Some(&WANTED)) {
            Ok(0) => exit(0),
            Ok(pid) if pid == WANTED => wait(pid).map_or(libc::ECHILD, |_| 0),
            Ok(_) => libc::EINVAL,
            Err(error) => error.raw_os_error().unwrap_or(libc::EINVAL),
        };
        // Error numbers that these calls give fit (below 134).
        exit(error);
    }
    match wait(init)? {
        0 => Ok(()),
        error @ 1..128 => Err(io::Error::from_raw_os_error(error)),
        _ => Err(io::Error::other("the trial was killed")),
    }
}

/// A child that sleeps until this is dropped.
#[derive(Debug)]
pub(crate) struct Sleeper {
    pid: libc::pid_t,
}

impl Sleeper {
    pub(crate) fn start() -> io::Result<Self> {
        let pid = clone3(0, None)?;
        if pid == 0 {
            // SAFETY: no pointers. It ends with its parent: nobody else ends it.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            loop {
                // SAFETY: no pointers.
                unsafe { libc::pause() };
            }
        }
        Ok(Self { pid })
    }

    pub(crate) fn pid(&self) -> Pid {
        // A pid that the kernel gave is positive; 1 could not be traced.
        Pid::from_raw(self.pid).unwrap_or(Pid::INIT)
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // SAFETY: no pointers; the child is not waited for, so its id is its own.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        // It has just been killed; there is nothing else to learn.
        wait(self.pid).ok();
    }
}

static TRAPPED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_trap(_signal: libc::c_int) {
    TRAPPED.store(true, Ordering::SeqCst);
}

/// Filters this thread so that getpgid(2) traps, and calls it; whether it did.
pub(crate) fn trap() -> io::Result<bool> {
    const LOAD_NUMBER: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    let number = u32::try_from(libc::SYS_getpgid).map_err(io::Error::other)?;
    let line = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        line(LOAD_NUMBER, 0, 0, 0),
        line(JUMP_EQUAL, 0, 1, number),
        line(RETURN, 0, 0, libc::SECCOMP_RET_TRAP),
        line(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: the handler stores one atomic, which a handler may; the filter is read
    // during the call; getpgid(2) has no effect, whether it runs or traps.
    unsafe {
        if libc::signal(libc::SIGSYS, on_trap as *const () as libc::sighandler_t) == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
        checked(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        let mode = libc::SECCOMP_SET_MODE_FILTER;
        checked(libc::syscall(libc::SYS_seccomp, mode, 0, &raw const program))?;
        libc::syscall(libc::SYS_getpgid, 0);
    }
    Ok(TRAPPED.load(Ordering::SeqCst))
}

pub(crate) fn vdso() -> io::Result<()> {
    const ARCH_MAP_VDSO_64: libc::c_long = 0x2003;
    // SAFETY: no pointers; a process that has a vDSO gets no second one (EEXIST,
    // `map_vdso_once` in arch/x86/entry/vdso/vma.c), so nothing is mapped.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_MAP_VDSO_64, 0) };
    match checked(result) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

pub(crate) fn user_faults() -> io::Result<UserFaults> {
    const USER_MODE_ONLY: libc::c_int = 1;
    const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
    const UFFD_API: u64 = 0xaa;
    const PAGEFAULT_FLAG_WP: u64 = 1;
    const WP_ASYNC: u64 = 1 << 15;
    let open = |flags: libc::c_int| {
        // SAFETY: no pointers.
        let fd = checked(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | flags) })?;
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made it for us.
        Ok::<_, io::Error>(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    let (fd, in_calls) = match open(0) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => (open(USER_MODE_ONLY)?, false),
        other => (other?, true),
    };
    // struct uffdio_api: api, features, ioctls (linux/userfaultfd.h).
    let mut api = [UFFD_API, 0, 0];
    // SAFETY: the kernel reads and writes these three words.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
    checked(result.into())?;
    Ok(UserFaults {
        write_protect: api[1] & PAGEFAULT_FLAG_WP != 0,
        asynchronous: api[1] & WP_ASYNC != 0,
        in_calls,
    })
}

pub(crate) fn pagemap_scan() -> io::Result<()> {
    const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610;
    const PAGE_IS_PRESENT: u64 = 1 << 3;
    /// `struct pm_scan_arg`, `linux/fs.h`.
    #[repr(C)]
    #[derive(Default)]
    struct Scan {
        size: u64,
        flags: u64,
        start: u64,
        end: u64,
        walk_end: u64,
        vec: u64,
        vec_len: u64,
        max_pages: u64,
        category_inverted: u64,
        category_mask: u64,
        category_anyof_mask: u64,
        return_mask: u64,
    }
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut region = [0u64; 3];
    let page = (&raw const region as u64) & !0xfff;
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        start: page,
        end: page + 0x1000,
        vec: region.as_mut_ptr() as u64,
        vec_len: 1,
        category_mask: PAGE_IS_PRESENT,
        return_mask: PAGE_IS_PRESENT,
        ..Scan::default()
    };
    // SAFETY: the kernel reads the structure, writes its `walk_end` and at most one
    // `struct page_region` of three words, for which there is room.
    let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
    match checked(found.into())? {
        1 => Ok(()),
        _ => Err(io::Error::other("the scan does not find a page that is there")),
    }
}
