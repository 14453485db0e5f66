//! The table: which system call of a remote process goes where.
//!
//! One line per call. A call that has no line takes the process home, where it
//! runs natively: the net under everything else. Calls that never trap
//! ([`crate::filter`]) have no line either.
//!
//! A line says which arguments point to buffers, which way these go and how
//! long they are. Numbers and layouts are those of Linux on x86-64
//! (arch/x86/entry/syscalls/syscall_64.tbl, checked against 6.18); structures
//! keep their size for ever by the kernel's own rule.

use conet_wire::link::mode;
use linux_raw_sys::general as nr;
use linux_raw_sys::ioctl as io;

/// Where a call runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// At home, by the deputy.
    Forward(&'static [Buffer]),
    /// At home; the second argument chooses among [`IOCTLS`].
    Ioctl,
    /// At home; the second argument chooses among [`FCNTLS`].
    Fcntl,
    /// At home or here; the first argument chooses among [`PRCTLS`].
    Prctl,
    /// At home as one contiguous transfer: `readv` and its kin.
    Vector {
        /// The call that does it with one buffer.
        plain: u32,
        /// Whether the program's memory is the source.
        write: bool,
    },
    /// At home, with a `struct msghdr`.
    Message {
        /// `sendmsg` as opposed to `recvmsg`.
        send: bool,
    },
    /// In the agent.
    Local(Local),
}

/// Calls that the agent answers itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the call of that name")]
pub enum Local {
    RtSigprocmask,
    RtSigaction,
    ArchPrctl,
    ClockGettime,
    Gettimeofday,
    Time,
    Getrandom,
    Getcpu,
    Getrusage,
    Times,
    /// `mmap` that the filter does not let through: files, fixed addresses.
    Mmap,
    /// `munmap`, `mprotect`, `mremap`, `madvise`, `mincore`, `mlock`-free memory
    /// calls near conet's own region.
    Memory,
    /// Calls that take a descriptor which may be the hidden link.
    Close,
    CloseRange,
    Dup2,
    Kill,
    Futex,
    ClockGetres,
    /// `execve` and `execveat`.
    Exec,
    /// `fork`, `vfork`, `clone` and `clone3`.
    Fork,
    Exit,
}

/// How long a buffer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Len {
    /// So many bytes.
    Fixed(u32),
    /// As many bytes as the argument of this index says.
    Arg(u8),
    /// The argument of this index, times so many bytes.
    Times(u8, u32),
    /// As the 32-bit value says to which the argument of this index points (`socklen_t *`).
    At(u8),
    /// Up to and including the NUL, at most `PATH_MAX`.
    Text,
    /// A `fd_set` for as many descriptors as argument 0 says.
    FdSet,
    /// A signal mask for the time of the call.
    Mask,
    /// `pselect6`'s last argument: a pointer to a mask, and its length.
    MaskPair,
}

/// One buffer of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Index of the argument that points to it.
    pub arg: u8,
    /// Whether the kernel reads it.
    pub input: bool,
    /// Whether the kernel writes it.
    pub output: bool,
    /// Its length.
    pub len: Len,
    /// How much of an output is meaningful; [`mode`].
    pub mode: u8,
    /// Bytes per unit of the result with [`mode::BY_RESULT`].
    pub unit: u8,
}

const fn input(arg: u8, len: Len) -> Buffer {
    Buffer { arg, input: true, output: false, len, mode: mode::ON_SUCCESS, unit: 1 }
}
const fn output(arg: u8, len: Len) -> Buffer {
    Buffer { arg, input: false, output: true, len, mode: mode::ON_SUCCESS, unit: 1 }
}
/// An output of which the result says how much is there.
const fn result(arg: u8, len: Len, unit: u8) -> Buffer {
    Buffer { arg, input: false, output: true, len, mode: mode::BY_RESULT, unit }
}
const fn both(arg: u8, len: Len) -> Buffer {
    Buffer { arg, input: true, output: true, len, mode: mode::ON_SUCCESS, unit: 1 }
}
/// Written also when the call fails (remaining time after EINTR).
const fn always(arg: u8, len: Len) -> Buffer {
    Buffer { arg, input: true, output: true, len, mode: mode::ALWAYS, unit: 1 }
}
const fn text(arg: u8) -> Buffer {
    input(arg, Len::Text)
}

const STAT: Len = Len::Fixed(144);
const STATX: Len = Len::Fixed(256);
const STATFS: Len = Len::Fixed(120);
const TIMESPEC: Len = Len::Fixed(16);
const ITIMER: Len = Len::Fixed(32);
const RLIMIT: Len = Len::Fixed(16);
const SIGINFO: Len = Len::Fixed(128);
const INT: Len = Len::Fixed(4);
const LONG: Len = Len::Fixed(8);

/// Number, name, and where it runs.
#[derive(Debug)]
pub struct Line(pub u32, pub &'static str, pub Class);

use Class::{Forward, Message, Vector};

/// The table. Order is by subject, for the reader; [`lookup`] does not mind.
#[rustfmt::skip]
pub const TABLE: &[Line] = &[
    // Reading and writing.
    Line(nr::__NR_read, "read", Forward(&[result(1, Len::Arg(2), 1)])),
    Line(nr::__NR_write, "write", Forward(&[input(1, Len::Arg(2))])),
    Line(nr::__NR_pread64, "pread64", Forward(&[result(1, Len::Arg(2), 1)])),
    Line(nr::__NR_pwrite64, "pwrite64", Forward(&[input(1, Len::Arg(2))])),
    Line(nr::__NR_readv, "readv", Vector { plain: nr::__NR_read, write: false }),
    Line(nr::__NR_writev, "writev", Vector { plain: nr::__NR_write, write: true }),
    Line(nr::__NR_preadv, "preadv", Vector { plain: nr::__NR_pread64, write: false }),
    Line(nr::__NR_pwritev, "pwritev", Vector { plain: nr::__NR_pwrite64, write: true }),
    Line(nr::__NR_lseek, "lseek", Forward(&[])),
    Line(nr::__NR_sendfile, "sendfile", Forward(&[both(2, LONG)])),
    Line(nr::__NR_splice, "splice", Forward(&[both(1, LONG), both(3, LONG)])),
    Line(nr::__NR_tee, "tee", Forward(&[])),
    Line(nr::__NR_copy_file_range, "copy_file_range", Forward(&[both(1, LONG), both(3, LONG)])),
    Line(nr::__NR_fsync, "fsync", Forward(&[])),
    Line(nr::__NR_fdatasync, "fdatasync", Forward(&[])),
    Line(nr::__NR_sync, "sync", Forward(&[])),
    Line(nr::__NR_syncfs, "syncfs", Forward(&[])),
    Line(nr::__NR_sync_file_range, "sync_file_range", Forward(&[])),
    Line(nr::__NR_readahead, "readahead", Forward(&[])),
    Line(nr::__NR_fadvise64, "fadvise64", Forward(&[])),
    Line(nr::__NR_fallocate, "fallocate", Forward(&[])),
    Line(nr::__NR_ftruncate, "ftruncate", Forward(&[])),
    Line(nr::__NR_truncate, "truncate", Forward(&[text(0)])),

    // Descriptors.
    Line(nr::__NR_open, "open", Forward(&[text(0)])),
    Line(nr::__NR_openat, "openat", Forward(&[text(1)])),
    Line(nr::__NR_openat2, "openat2", Forward(&[text(1), input(2, Len::Arg(3))])),
    Line(nr::__NR_creat, "creat", Forward(&[text(0)])),
    Line(nr::__NR_close, "close", Class::Local(Local::Close)),
    Line(nr::__NR_close_range, "close_range", Class::Local(Local::CloseRange)),
    Line(nr::__NR_dup, "dup", Forward(&[])),
    Line(nr::__NR_dup2, "dup2", Class::Local(Local::Dup2)),
    Line(nr::__NR_dup3, "dup3", Class::Local(Local::Dup2)),
    Line(nr::__NR_pipe, "pipe", Forward(&[output(0, LONG)])),
    Line(nr::__NR_pipe2, "pipe2", Forward(&[output(0, LONG)])),
    Line(nr::__NR_fcntl, "fcntl", Class::Fcntl),
    Line(nr::__NR_ioctl, "ioctl", Class::Ioctl),
    Line(nr::__NR_flock, "flock", Forward(&[])),
    Line(nr::__NR_eventfd, "eventfd", Forward(&[])),
    Line(nr::__NR_eventfd2, "eventfd2", Forward(&[])),
    Line(nr::__NR_memfd_create, "memfd_create", Forward(&[text(0)])),
    Line(nr::__NR_pidfd_open, "pidfd_open", Forward(&[])),
    Line(nr::__NR_signalfd, "signalfd", Forward(&[input(1, Len::Arg(2))])),
    Line(nr::__NR_signalfd4, "signalfd4", Forward(&[input(1, Len::Arg(2))])),
    Line(nr::__NR_inotify_init, "inotify_init", Forward(&[])),
    Line(nr::__NR_inotify_init1, "inotify_init1", Forward(&[])),
    Line(nr::__NR_inotify_add_watch, "inotify_add_watch", Forward(&[text(1)])),
    Line(nr::__NR_inotify_rm_watch, "inotify_rm_watch", Forward(&[])),

    // Files by name.
    Line(nr::__NR_stat, "stat", Forward(&[text(0), output(1, STAT)])),
    Line(nr::__NR_lstat, "lstat", Forward(&[text(0), output(1, STAT)])),
    Line(nr::__NR_fstat, "fstat", Forward(&[output(1, STAT)])),
    Line(nr::__NR_newfstatat, "newfstatat", Forward(&[text(1), output(2, STAT)])),
    Line(nr::__NR_statx, "statx", Forward(&[text(1), output(4, STATX)])),
    Line(nr::__NR_statfs, "statfs", Forward(&[text(0), output(1, STATFS)])),
    Line(nr::__NR_fstatfs, "fstatfs", Forward(&[output(1, STATFS)])),
    Line(nr::__NR_access, "access", Forward(&[text(0)])),
    Line(nr::__NR_faccessat, "faccessat", Forward(&[text(1)])),
    Line(nr::__NR_faccessat2, "faccessat2", Forward(&[text(1)])),
    Line(nr::__NR_getdents, "getdents", Forward(&[result(1, Len::Arg(2), 1)])),
    Line(nr::__NR_getdents64, "getdents64", Forward(&[result(1, Len::Arg(2), 1)])),
    Line(nr::__NR_getcwd, "getcwd", Forward(&[result(0, Len::Arg(1), 1)])),
    Line(nr::__NR_chdir, "chdir", Forward(&[text(0)])),
    Line(nr::__NR_fchdir, "fchdir", Forward(&[])),
    Line(nr::__NR_rename, "rename", Forward(&[text(0), text(1)])),
    Line(nr::__NR_renameat, "renameat", Forward(&[text(1), text(3)])),
    Line(nr::__NR_renameat2, "renameat2", Forward(&[text(1), text(3)])),
    Line(nr::__NR_mkdir, "mkdir", Forward(&[text(0)])),
    Line(nr::__NR_mkdirat, "mkdirat", Forward(&[text(1)])),
    Line(nr::__NR_rmdir, "rmdir", Forward(&[text(0)])),
    Line(nr::__NR_link, "link", Forward(&[text(0), text(1)])),
    Line(nr::__NR_linkat, "linkat", Forward(&[text(1), text(3)])),
    Line(nr::__NR_symlink, "symlink", Forward(&[text(0), text(1)])),
    Line(nr::__NR_symlinkat, "symlinkat", Forward(&[text(0), text(2)])),
    Line(nr::__NR_unlink, "unlink", Forward(&[text(0)])),
    Line(nr::__NR_unlinkat, "unlinkat", Forward(&[text(1)])),
    Line(nr::__NR_readlink, "readlink", Forward(&[text(0), result(1, Len::Arg(2), 1)])),
    Line(nr::__NR_readlinkat, "readlinkat", Forward(&[text(1), result(2, Len::Arg(3), 1)])),
    Line(nr::__NR_chmod, "chmod", Forward(&[text(0)])),
    Line(nr::__NR_fchmod, "fchmod", Forward(&[])),
    Line(nr::__NR_fchmodat, "fchmodat", Forward(&[text(1)])),
    Line(nr::__NR_chown, "chown", Forward(&[text(0)])),
    Line(nr::__NR_lchown, "lchown", Forward(&[text(0)])),
    Line(nr::__NR_fchown, "fchown", Forward(&[])),
    Line(nr::__NR_fchownat, "fchownat", Forward(&[text(1)])),
    Line(nr::__NR_utime, "utime", Forward(&[text(0), input(1, TIMESPEC)])),
    Line(nr::__NR_utimes, "utimes", Forward(&[text(0), input(1, Len::Fixed(32))])),
    Line(nr::__NR_futimesat, "futimesat", Forward(&[text(1), input(2, Len::Fixed(32))])),
    Line(nr::__NR_utimensat, "utimensat", Forward(&[text(1), input(2, Len::Fixed(32))])),
    Line(nr::__NR_umask, "umask", Forward(&[])),
    Line(nr::__NR_mknod, "mknod", Forward(&[text(0)])),
    Line(nr::__NR_mknodat, "mknodat", Forward(&[text(1)])),
    Line(nr::__NR_getxattr, "getxattr", Forward(&[text(0), text(1), result(2, Len::Arg(3), 1)])),
    Line(nr::__NR_lgetxattr, "lgetxattr", Forward(&[text(0), text(1), result(2, Len::Arg(3), 1)])),
    Line(nr::__NR_fgetxattr, "fgetxattr", Forward(&[text(1), result(2, Len::Arg(3), 1)])),
    Line(nr::__NR_listxattr, "listxattr", Forward(&[text(0), result(1, Len::Arg(2), 1)])),
    Line(nr::__NR_llistxattr, "llistxattr", Forward(&[text(0), result(1, Len::Arg(2), 1)])),
    Line(nr::__NR_flistxattr, "flistxattr", Forward(&[result(1, Len::Arg(2), 1)])),
    Line(nr::__NR_setxattr, "setxattr", Forward(&[text(0), text(1), input(2, Len::Arg(3))])),
    Line(nr::__NR_lsetxattr, "lsetxattr", Forward(&[text(0), text(1), input(2, Len::Arg(3))])),
    Line(nr::__NR_fsetxattr, "fsetxattr", Forward(&[text(1), input(2, Len::Arg(3))])),
    Line(nr::__NR_removexattr, "removexattr", Forward(&[text(0), text(1)])),
    Line(nr::__NR_lremovexattr, "lremovexattr", Forward(&[text(0), text(1)])),
    Line(nr::__NR_fremovexattr, "fremovexattr", Forward(&[text(1)])),

    // Waiting for descriptors and time.
    Line(nr::__NR_poll, "poll", Forward(&[both(0, Len::Times(1, 8))])),
    Line(nr::__NR_ppoll, "ppoll", Forward(&[both(0, Len::Times(1, 8)), always(2, TIMESPEC), input(3, Len::Mask)])),
    Line(nr::__NR_select, "select", Forward(&[both(1, Len::FdSet), both(2, Len::FdSet), both(3, Len::FdSet), always(4, TIMESPEC)])),
    Line(nr::__NR_pselect6, "pselect6", Forward(&[both(1, Len::FdSet), both(2, Len::FdSet), both(3, Len::FdSet), always(4, TIMESPEC), input(5, Len::MaskPair)])),
    Line(nr::__NR_epoll_create, "epoll_create", Forward(&[])),
    Line(nr::__NR_epoll_create1, "epoll_create1", Forward(&[])),
    Line(nr::__NR_epoll_ctl, "epoll_ctl", Forward(&[input(3, Len::Fixed(12))])),
    Line(nr::__NR_epoll_wait, "epoll_wait", Forward(&[result(1, Len::Times(2, 12), 12)])),
    Line(nr::__NR_epoll_pwait, "epoll_pwait", Forward(&[result(1, Len::Times(2, 12), 12), input(4, Len::Mask)])),
    Line(nr::__NR_nanosleep, "nanosleep", Forward(&[input(0, TIMESPEC), always(1, TIMESPEC)])),
    Line(nr::__NR_clock_nanosleep, "clock_nanosleep", Forward(&[input(2, TIMESPEC), always(3, TIMESPEC)])),
    Line(nr::__NR_pause, "pause", Forward(&[])),
    Line(nr::__NR_alarm, "alarm", Forward(&[])),
    Line(nr::__NR_getitimer, "getitimer", Forward(&[output(1, ITIMER)])),
    Line(nr::__NR_setitimer, "setitimer", Forward(&[input(1, ITIMER), output(2, ITIMER)])),
    Line(nr::__NR_timerfd_create, "timerfd_create", Forward(&[])),
    Line(nr::__NR_timerfd_settime, "timerfd_settime", Forward(&[input(2, ITIMER), output(3, ITIMER)])),
    Line(nr::__NR_timerfd_gettime, "timerfd_gettime", Forward(&[output(1, ITIMER)])),
    Line(nr::__NR_timer_delete, "timer_delete", Forward(&[])),
    Line(nr::__NR_timer_settime, "timer_settime", Forward(&[input(2, ITIMER), output(3, ITIMER)])),
    Line(nr::__NR_timer_gettime, "timer_gettime", Forward(&[output(1, ITIMER)])),
    Line(nr::__NR_timer_getoverrun, "timer_getoverrun", Forward(&[])),

    // Sockets: they are made and stay at home.
    Line(nr::__NR_socket, "socket", Forward(&[])),
    Line(nr::__NR_socketpair, "socketpair", Forward(&[output(3, LONG)])),
    Line(nr::__NR_bind, "bind", Forward(&[input(1, Len::Arg(2))])),
    Line(nr::__NR_listen, "listen", Forward(&[])),
    Line(nr::__NR_connect, "connect", Forward(&[input(1, Len::Arg(2))])),
    Line(nr::__NR_accept, "accept", Forward(&[output(1, Len::At(2)), both(2, INT)])),
    Line(nr::__NR_accept4, "accept4", Forward(&[output(1, Len::At(2)), both(2, INT)])),
    Line(nr::__NR_getsockname, "getsockname", Forward(&[output(1, Len::At(2)), both(2, INT)])),
    Line(nr::__NR_getpeername, "getpeername", Forward(&[output(1, Len::At(2)), both(2, INT)])),
    Line(nr::__NR_sendto, "sendto", Forward(&[input(1, Len::Arg(2)), input(4, Len::Arg(5))])),
    Line(nr::__NR_recvfrom, "recvfrom", Forward(&[result(1, Len::Arg(2), 1), output(4, Len::At(5)), both(5, INT)])),
    Line(nr::__NR_sendmsg, "sendmsg", Message { send: true }),
    Line(nr::__NR_recvmsg, "recvmsg", Message { send: false }),
    Line(nr::__NR_shutdown, "shutdown", Forward(&[])),
    Line(nr::__NR_setsockopt, "setsockopt", Forward(&[input(3, Len::Arg(4))])),
    Line(nr::__NR_getsockopt, "getsockopt", Forward(&[both(3, Len::At(4)), both(4, INT)])),

    // Processes and identity.
    Line(nr::__NR_getpid, "getpid", Forward(&[])),
    Line(nr::__NR_gettid, "gettid", Forward(&[])),
    Line(nr::__NR_getppid, "getppid", Forward(&[])),
    Line(nr::__NR_getpgrp, "getpgrp", Forward(&[])),
    Line(nr::__NR_getpgid, "getpgid", Forward(&[])),
    Line(nr::__NR_setpgid, "setpgid", Forward(&[])),
    Line(nr::__NR_getsid, "getsid", Forward(&[])),
    Line(nr::__NR_setsid, "setsid", Forward(&[])),
    Line(nr::__NR_getuid, "getuid", Forward(&[])),
    Line(nr::__NR_geteuid, "geteuid", Forward(&[])),
    Line(nr::__NR_getgid, "getgid", Forward(&[])),
    Line(nr::__NR_getegid, "getegid", Forward(&[])),
    Line(nr::__NR_getresuid, "getresuid", Forward(&[output(0, INT), output(1, INT), output(2, INT)])),
    Line(nr::__NR_getresgid, "getresgid", Forward(&[output(0, INT), output(1, INT), output(2, INT)])),
    Line(nr::__NR_getgroups, "getgroups", Forward(&[result(1, Len::Times(0, 4), 4)])),
    Line(nr::__NR_wait4, "wait4", Forward(&[output(1, INT), output(3, Len::Fixed(144))])),
    Line(nr::__NR_waitid, "waitid", Forward(&[output(2, SIGINFO), output(4, Len::Fixed(144))])),
    Line(nr::__NR_kill, "kill", Class::Local(Local::Kill)),
    Line(nr::__NR_tkill, "tkill", Class::Local(Local::Kill)),
    Line(nr::__NR_tgkill, "tgkill", Class::Local(Local::Kill)),
    Line(nr::__NR_getpriority, "getpriority", Forward(&[])),
    Line(nr::__NR_setpriority, "setpriority", Forward(&[])),
    Line(nr::__NR_sched_getaffinity, "sched_getaffinity", Forward(&[result(2, Len::Arg(1), 1)])),
    Line(nr::__NR_sched_getscheduler, "sched_getscheduler", Forward(&[])),
    Line(nr::__NR_sched_getparam, "sched_getparam", Forward(&[output(1, INT)])),
    Line(nr::__NR_sched_get_priority_max, "sched_get_priority_max", Forward(&[])),
    Line(nr::__NR_sched_get_priority_min, "sched_get_priority_min", Forward(&[])),
    Line(nr::__NR_getrlimit, "getrlimit", Forward(&[output(1, RLIMIT)])),
    Line(nr::__NR_setrlimit, "setrlimit", Forward(&[input(1, RLIMIT)])),
    Line(nr::__NR_prlimit64, "prlimit64", Forward(&[input(2, RLIMIT), output(3, RLIMIT)])),
    Line(nr::__NR_capget, "capget", Forward(&[always(0, LONG), output(1, Len::Fixed(24))])),
    Line(nr::__NR_prctl, "prctl", Class::Prctl),

    // Signals. Handlers run at home only, so what is pending stays there.
    Line(nr::__NR_rt_sigprocmask, "rt_sigprocmask", Class::Local(Local::RtSigprocmask)),
    Line(nr::__NR_rt_sigaction, "rt_sigaction", Class::Local(Local::RtSigaction)),
    Line(nr::__NR_rt_sigpending, "rt_sigpending", Forward(&[output(0, Len::Arg(1))])),
    Line(nr::__NR_rt_sigtimedwait, "rt_sigtimedwait", Forward(&[input(0, Len::Arg(3)), output(1, SIGINFO), input(2, TIMESPEC)])),
    Line(nr::__NR_rt_sigqueueinfo, "rt_sigqueueinfo", Forward(&[input(2, SIGINFO)])),
    Line(nr::__NR_sigaltstack, "sigaltstack", Forward(&[input(0, Len::Fixed(24)), output(1, Len::Fixed(24))])),

    // The machine.
    Line(nr::__NR_uname, "uname", Forward(&[output(0, Len::Fixed(390))])),
    Line(nr::__NR_sysinfo, "sysinfo", Forward(&[output(0, Len::Fixed(112))])),
    Line(nr::__NR_syslog, "syslog", Forward(&[result(1, Len::Arg(2), 1)])),

    // Answered by the agent.
    Line(nr::__NR_arch_prctl, "arch_prctl", Class::Local(Local::ArchPrctl)),
    Line(nr::__NR_clock_gettime, "clock_gettime", Class::Local(Local::ClockGettime)),
    Line(nr::__NR_clock_getres, "clock_getres", Class::Local(Local::ClockGetres)),
    Line(nr::__NR_futex, "futex", Class::Local(Local::Futex)),
    Line(nr::__NR_gettimeofday, "gettimeofday", Class::Local(Local::Gettimeofday)),
    Line(nr::__NR_time, "time", Class::Local(Local::Time)),
    Line(nr::__NR_getrandom, "getrandom", Class::Local(Local::Getrandom)),
    Line(nr::__NR_getcpu, "getcpu", Class::Local(Local::Getcpu)),
    Line(nr::__NR_set_tid_address, "set_tid_address", Forward(&[])),
    Line(nr::__NR_getrusage, "getrusage", Class::Local(Local::Getrusage)),
    Line(nr::__NR_times, "times", Class::Local(Local::Times)),
    Line(nr::__NR_mmap, "mmap", Class::Local(Local::Mmap)),
    Line(nr::__NR_munmap, "munmap", Class::Local(Local::Memory)),
    Line(nr::__NR_mprotect, "mprotect", Class::Local(Local::Memory)),
    Line(nr::__NR_mremap, "mremap", Class::Local(Local::Memory)),
    Line(nr::__NR_madvise, "madvise", Class::Local(Local::Memory)),
    Line(nr::__NR_brk, "brk", Class::Local(Local::Memory)),
    Line(nr::__NR_mincore, "mincore", Class::Local(Local::Memory)),
    Line(nr::__NR_execve, "execve", Class::Local(Local::Exec)),
    Line(nr::__NR_execveat, "execveat", Class::Local(Local::Exec)),
    Line(nr::__NR_fork, "fork", Class::Local(Local::Fork)),
    Line(nr::__NR_vfork, "vfork", Class::Local(Local::Fork)),
    Line(nr::__NR_clone, "clone", Class::Local(Local::Fork)),
    Line(nr::__NR_clone3, "clone3", Class::Local(Local::Fork)),
    Line(nr::__NR_exit, "exit", Class::Local(Local::Exit)),
    Line(nr::__NR_exit_group, "exit_group", Class::Local(Local::Exit)),
];

/// `ioctl` requests that are forwarded, by their second argument.
#[rustfmt::skip]
pub const IOCTLS: &[(u32, &[Buffer])] = &[
    (io::TCGETS, &[output(2, Len::Fixed(36))]),
    (io::TCSETS, &[input(2, Len::Fixed(36))]),
    (io::TCSETSW, &[input(2, Len::Fixed(36))]),
    (io::TCSETSF, &[input(2, Len::Fixed(36))]),
    (io::TCGETS2, &[output(2, Len::Fixed(44))]),
    (io::TCSETS2, &[input(2, Len::Fixed(44))]),
    (io::TCSETSW2, &[input(2, Len::Fixed(44))]),
    (io::TCSETSF2, &[input(2, Len::Fixed(44))]),
    (io::TCSBRK, &[]),
    (io::TCXONC, &[]),
    (io::TCFLSH, &[]),
    (io::TIOCGWINSZ, &[output(2, LONG)]),
    (io::TIOCSWINSZ, &[input(2, LONG)]),
    (io::TIOCGPGRP, &[output(2, INT)]),
    (io::TIOCSPGRP, &[input(2, INT)]),
    (io::TIOCGSID, &[output(2, INT)]),
    (io::TIOCSCTTY, &[]),
    (io::TIOCNOTTY, &[]),
    (io::TIOCOUTQ, &[output(2, INT)]),
    (io::TIOCGPTN, &[output(2, INT)]),
    (io::FIONREAD, &[output(2, INT)]),
    (io::FIONBIO, &[input(2, INT)]),
    (io::FIOCLEX, &[]),
    (io::FIONCLEX, &[]),
    (0x4004_9409, &[]), // FICLONE
];

/// `fcntl` commands that are forwarded, by their second argument.
#[rustfmt::skip]
pub const FCNTLS: &[(u32, &[Buffer])] = &[
    (nr::F_DUPFD, &[]),
    (nr::F_DUPFD_CLOEXEC, &[]),
    (nr::F_GETFD, &[]),
    (nr::F_SETFD, &[]),
    (nr::F_GETFL, &[]),
    (nr::F_SETFL, &[]),
    (nr::F_GETLK, &[both(2, Len::Fixed(32))]),
    (nr::F_SETLK, &[input(2, Len::Fixed(32))]),
    (nr::F_SETLKW, &[input(2, Len::Fixed(32))]),
    (36, &[both(2, Len::Fixed(32))]),  // F_OFD_GETLK, Linux 3.15
    (37, &[input(2, Len::Fixed(32))]), // F_OFD_SETLK
    (38, &[input(2, Len::Fixed(32))]), // F_OFD_SETLKW
    (nr::F_GETOWN, &[]),
    (nr::F_SETOWN, &[]),
    (nr::F_SETPIPE_SZ, &[]),
    (nr::F_GETPIPE_SZ, &[]),
    (nr::F_ADD_SEALS, &[]),
    (nr::F_GET_SEALS, &[]),
];

/// `prctl` options that are forwarded, by their first argument.
#[rustfmt::skip]
pub const PRCTLS: &[(u32, &[Buffer])] = &[
    (1, &[]),                           // PR_SET_PDEATHSIG
    (2, &[output(1, INT)]),             // PR_GET_PDEATHSIG
    (3, &[]),                           // PR_GET_DUMPABLE
    (29, &[]),                          // PR_SET_TIMERSLACK
    (30, &[]),                          // PR_GET_TIMERSLACK
    (15, &[text(1)]),                   // PR_SET_NAME
    (16, &[output(1, Len::Fixed(16))]), // PR_GET_NAME
    (23, &[]),                          // PR_CAPBSET_READ
    (36, &[]),                          // PR_SET_CHILD_SUBREAPER
    (37, &[output(1, INT)]),            // PR_GET_CHILD_SUBREAPER
    (38, &[]),                          // PR_SET_NO_NEW_PRIVS
    (39, &[]),                          // PR_GET_NO_NEW_PRIVS
    (0x4155_5856, &[result(1, Len::Arg(2), 1)]), // PR_GET_AUXV
];

const SLOTS: usize = 512;

/// Line index + 1 for each call number; 0 where there is none.
const INDEX: [u8; SLOTS] = {
    let mut index = [0u8; SLOTS];
    let mut line = 0;
    while line < TABLE.len() {
        let number = TABLE[line].0 as usize;
        assert!(index[number] == 0, "a call has two lines");
        #[allow(clippy::cast_possible_truncation, reason = "checked by the assertion below")]
        {
            index[number] = line as u8 + 1;
        }
        line += 1;
    }
    assert!(TABLE.len() < 256);
    index
};

/// Finds where call `number` runs; `None` takes the process home.
#[must_use]
pub fn lookup(number: u64) -> Option<Class> {
    let line = *INDEX.get(usize::try_from(number).ok()?)?;
    TABLE.get(usize::from(line.checked_sub(1)?)).map(|line| line.2)
}

/// Finds the buffers of `key` in [`IOCTLS`], [`FCNTLS`] or [`PRCTLS`].
#[must_use]
pub fn lookup_in(list: &'static [(u32, &'static [Buffer])], key: u64) -> Option<&'static [Buffer]> {
    list.iter().find(|entry| u64::from(entry.0) == key).map(|entry| entry.1)
}

/// The name of call `number`, for messages.
#[must_use]
pub fn name(number: u64) -> Option<&'static str> {
    TABLE.iter().find(|line| u64::from(line.0) == number).map(|line| line.1).or_else(|| {
        UNSUPPORTED.iter().find(|entry| u64::from(entry.0) == number).map(|entry| entry.1)
    })
}

/// Names of calls that take a process home, so that the reason can be read.
#[rustfmt::skip]
const UNSUPPORTED: &[(u32, &str)] = &[
    (nr::__NR_shmget, "shmget"), (nr::__NR_shmat, "shmat"), (nr::__NR_ptrace, "ptrace"),
    (nr::__NR_io_uring_setup, "io_uring_setup"), (nr::__NR_io_setup, "io_setup"),
    (nr::__NR_userfaultfd, "userfaultfd"), (nr::__NR_bpf, "bpf"),
    (nr::__NR_perf_event_open, "perf_event_open"), (nr::__NR_mlock, "mlock"),
    (nr::__NR_mlock2, "mlock2"), (nr::__NR_mlockall, "mlockall"),
    (nr::__NR_sched_setscheduler, "sched_setscheduler"),
    (nr::__NR_sched_setaffinity, "sched_setaffinity"), (nr::__NR_pkey_alloc, "pkey_alloc"),
    (nr::__NR_seccomp, "seccomp"), (nr::__NR_setuid, "setuid"), (nr::__NR_setgid, "setgid"),
    (nr::__NR_unshare, "unshare"), (nr::__NR_setns, "setns"), (nr::__NR_mount, "mount"),
    (nr::__NR_chroot, "chroot"), (nr::__NR_rt_sigreturn, "rt_sigreturn"),
    (nr::__NR_rt_sigsuspend, "rt_sigsuspend"), (nr::__NR_msync, "msync"), (nr::__NR_timer_create, "timer_create"),
    (nr::__NR_sendmmsg, "sendmmsg"), (nr::__NR_recvmmsg, "recvmmsg"),
    (nr::__NR_process_vm_readv, "process_vm_readv"), (nr::__NR_membarrier, "membarrier"),
    (nr::__NR_personality, "personality"), (nr::__NR_setresuid, "setresuid"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_found_by_its_number() {
        for line in TABLE {
            assert_eq!(lookup(u64::from(line.0)), Some(line.2), "{}", line.1);
            assert_eq!(name(u64::from(line.0)), Some(line.1));
        }
    }

    #[test]
    fn what_has_no_line_goes_home() {
        for number in [nr::__NR_setns, nr::__NR_unshare, nr::__NR_io_uring_setup, nr::__NR_shmat] {
            assert_eq!(lookup(u64::from(number)), None);
        }
        for number in [511, 512, 1 << 30, u64::MAX] {
            assert_eq!(lookup(number), None);
        }
    }

    #[test]
    fn buffers_name_real_arguments() {
        let lists = [IOCTLS, FCNTLS, PRCTLS];
        let in_lists = lists.iter().flat_map(|list| list.iter()).flat_map(|entry| entry.1.iter());
        let in_table = TABLE.iter().flat_map(|line| match line.2 {
            Class::Forward(buffers) => buffers.iter(),
            _ => [].iter(),
        });
        for buffer in in_lists.chain(in_table) {
            assert!(buffer.arg < 6 && (buffer.input || buffer.output), "{buffer:?}");
        }
    }
}
