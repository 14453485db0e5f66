//! Why a process cannot move: the answer to `conet why`.
//!
//! A lock is hard when it lies in what the program is, and passing when it may be
//! gone in a moment. Everything is read from `/proc`; the process is not touched.

use crate::procfs::{self, Facts, Mapping};
use crate::sys::ptrace::shares_memory;
use conet_deputy_core::table;
use conet_wire::family::why;
use conet_wire::image::{MAX_AREAS, overlaps_region, reason};
use rustix::process::Pid;
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::time::{Duration, Instant};

/// How long a process may take from its new memory to its new stack, in `execve`.
const EXECVE_LIMIT: Duration = Duration::from_secs(1);

/// Something that keeps a process at home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lock {
    /// A writable mapping shared with others; its name.
    SharedMapping(String),
    /// System V shared memory.
    SharedSegment,
    /// Memory of a device; its name.
    DeviceMapping(String),
    /// Huge pages of hugetlbfs.
    HugePages,
    /// Memory with protection keys.
    ProtectionKeys,
    /// More areas than an image can have.
    TooManyAreas(usize),
    /// Locked memory, in KiB.
    LockedMemory(u64),
    /// More than one thread.
    Threads(u64),
    /// Memory shared with another process (vfork, CLONE_VM).
    SharedMemory(i32),
    /// A descriptor whose kernel object is bound to this process.
    Descriptor(&'static str),
    /// A 32-bit program.
    Bits32,
    /// A real-time scheduling policy.
    RealTime,
    /// Another process traces it.
    Traced(i32),
    /// It has a seccomp filter of its own.
    Seccomp,
    /// It has a shadow stack.
    ShadowStack,
    /// It dispatches its own system calls.
    SyscallDispatch,
    /// It uses the addresses that the agent needs.
    Reserved,
    /// It runs as root, or with capabilities.
    Privileged,
    /// It is stopped by job control.
    Stopped,
    /// It is ending, or a kernel thread.
    NotRunning,
    /// It sees no `/proc`, which its return needs.
    NoProc,
    /// It has processor state that does not move: AMX's tiles, for which it has asked.
    Processor,
}

impl Lock {
    /// A short name that does not change, for programs.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::SharedMapping(_) => "shared-mapping",
            Self::SharedSegment => "sysv-shm",
            Self::DeviceMapping(_) => "device-mapping",
            Self::HugePages => "huge-pages",
            Self::ProtectionKeys => "protection-keys",
            Self::TooManyAreas(_) => "too-many-areas",
            Self::LockedMemory(_) => "mlock",
            Self::Threads(_) => "threads",
            Self::SharedMemory(_) => "shared-memory",
            Self::Descriptor(kind) => kind,
            Self::Bits32 => "32-bit",
            Self::RealTime => "real-time",
            Self::Traced(_) => "traced",
            Self::Seccomp => "seccomp",
            Self::ShadowStack => "shadow-stack",
            Self::SyscallDispatch => "syscall-dispatch",
            Self::Reserved => "reserved-range",
            Self::Privileged => "privileged",
            Self::Stopped => "stopped",
            Self::NotRunning => "not-running",
            Self::NoProc => "no-proc",
            Self::Processor => "processor",
        }
    }

    /// Whether it may be gone in a moment.
    #[must_use]
    pub const fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Threads(_)
                | Self::SharedMemory(_)
                | Self::Traced(_)
                | Self::Stopped
                | Self::LockedMemory(_)
                | Self::Descriptor(_)
                | Self::RealTime
        )
    }
}

impl fmt::Display for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SharedMapping(name) => {
                write!(f, "it has a writable mapping that others share ({name})")
            }
            Self::SharedSegment => f.write_str("it has System V shared memory attached"),
            Self::DeviceMapping(name) => write!(f, "it maps memory of a device ({name})"),
            Self::HugePages => f.write_str("it uses huge pages of hugetlbfs"),
            Self::ProtectionKeys => f.write_str("it uses memory protection keys"),
            Self::TooManyAreas(n) => write!(f, "it has {n} memory areas, more than {MAX_AREAS}"),
            Self::LockedMemory(kib) => write!(f, "it has locked {kib} KiB of memory (mlock)"),
            Self::Threads(n) => write!(f, "it has {n} threads"),
            Self::SharedMemory(pid) => write!(f, "it shares its memory with process {pid}"),
            Self::Descriptor(kind) => write!(f, "it has {kind} open"),
            Self::Bits32 => f.write_str("it is a 32-bit program"),
            Self::RealTime => f.write_str("it has a real-time scheduling policy"),
            Self::Traced(pid) => write!(f, "process {pid} traces it"),
            Self::Seccomp => f.write_str("it has a seccomp filter of its own"),
            Self::ShadowStack => f.write_str("it has a shadow stack (CET)"),
            Self::SyscallDispatch => f.write_str("it dispatches its own system calls"),
            Self::Reserved => f.write_str("it uses addresses that conet needs (0x200000000000)"),
            Self::Privileged => f.write_str(
                "it runs as root or with capabilities, and allow_root is not set in conet.toml",
            ),
            Self::Stopped => f.write_str("it is stopped (continue it with kill -CONT)"),
            Self::NotRunning => f.write_str("it is ending, or is a kernel thread"),
            Self::NoProc => {
                f.write_str("it cannot open /proc/self/maps (chroot, or no descriptor left)")
            }
            Self::Processor => {
                f.write_str("it has asked for vector state that does not move (AMX)")
            }
        }
    }
}

/// What the node's owner allows, and knows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policy {
    /// Processes of uid 0 or with capabilities may move.
    pub allow_root: bool,
    /// What lies at the agent's addresses is a deputy of ours, which has not been
    /// taken out yet.
    pub is_deputy: bool,
    /// When the process began, in clock ticks since boot: with its pid, its identity.
    /// Not compared where it is not given.
    pub started: Option<u64>,
}

/// Lists what keeps `pid` at home; empty if nothing does.
///
/// # Errors
/// When `/proc/PID` cannot be read: mostly, because the process has ended.
pub fn locks(pid: Pid, policy: Policy) -> io::Result<Vec<Lock>> {
    let mut facts = procfs::facts(pid)?;
    let begin = Instant::now();
    while facts.is_becoming_another() && begin.elapsed() < EXECVE_LIMIT {
        std::thread::sleep(Duration::from_millis(1));
        facts = procfs::facts(pid)?;
    }
    let maps = procfs::maps(pid)?;
    let mut locks = Vec::new();
    of_kind(pid, &facts, policy, &mut locks);
    if matches!(locks.as_slice(), [Lock::NotRunning]) {
        return Ok(locks);
    }
    of_sharing(pid, &facts, &mut locks);
    of_memory(pid, &maps, policy, &mut locks)?;
    of_descriptors(pid, &mut locks);
    locks.dedup();
    Ok(locks)
}

/// What was read of a stopped process.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) facts: Facts,
    pub(crate) maps: Vec<Mapping>,
}

/// As [`locks`], of a process that the calling thread has stopped: what can have changed
/// since, without what only `smaps` and the descriptors tell.
pub(crate) fn locks_of_stopped(pid: Pid, policy: Policy) -> io::Result<(Vec<Lock>, Seen)> {
    let facts = procfs::facts(pid)?;
    if policy.started.is_some_and(|started| started != facts.start_time) {
        return Err(io::ErrorKind::NotFound.into());
    }
    let maps = procfs::maps(pid)?;
    let mut locks = Vec::new();
    of_kind(pid, &facts, policy, &mut locks);
    of_sharing(pid, &facts, &mut locks);
    of_maps(&maps, policy, &mut locks);
    locks.retain(|lock| !matches!(lock, Lock::Traced(_)));
    Ok((locks, Seen { facts, maps }))
}

fn of_kind(pid: Pid, facts: &Facts, policy: Policy, locks: &mut Vec<Lock>) {
    if matches!(facts.state, 'Z' | 'X') || facts.memory_map.start_stack == 0 {
        locks.push(Lock::NotRunning);
        return;
    }
    if facts.state == 'T' {
        locks.push(Lock::Stopped);
    }
    if facts.threads > 1 {
        locks.push(Lock::Threads(facts.threads));
    }
    if facts.tracer != 0 {
        locks.push(Lock::Traced(facts.tracer));
    }
    if facts.seccomp != 0 {
        locks.push(Lock::Seccomp);
    }
    if facts.shadow_stack {
        locks.push(Lock::ShadowStack);
    }
    if facts.locked_kib > 0 {
        locks.push(Lock::LockedMemory(facts.locked_kib));
    }
    // SCHED_FIFO, SCHED_RR, SCHED_DEADLINE
    if matches!(facts.policy, 1 | 2 | 6) {
        locks.push(Lock::RealTime);
    }
    if !policy.allow_root && (facts.uids.contains(&0) || facts.capabilities != 0) {
        locks.push(Lock::Privileged);
    }
    if is_32_bit(pid) {
        locks.push(Lock::Bits32);
    }
}

fn is_32_bit(pid: Pid) -> bool {
    const ELFCLASS32: u8 = 1;
    let mut head = [0u8; 5];
    fs::File::open(procfs::path(pid, "exe"))
        .and_then(|mut file| file.read_exact(&mut head))
        .is_ok_and(|()| head == [0x7f, b'E', b'L', b'F', ELFCLASS32])
}

fn of_sharing(pid: Pid, facts: &Facts, locks: &mut Vec<Lock>) {
    let me = pid.as_raw_nonzero().get();
    let children = fs::read_to_string(procfs::path(pid, &format!("task/{me}/children")));
    let children = children.unwrap_or_default();
    let relatives = children.split_whitespace().filter_map(|text| text.parse().ok());
    for other in relatives.chain([facts.parent]) {
        if other > 0 && shares_memory(me, other) {
            locks.push(Lock::SharedMemory(other));
        }
    }
}

fn of_memory(pid: Pid, maps: &[Mapping], policy: Policy, locks: &mut Vec<Lock>) -> io::Result<()> {
    of_maps(maps, policy, locks);
    of_flags(pid, locks)
}

fn of_maps(maps: &[Mapping], policy: Policy, locks: &mut Vec<Lock>) {
    if maps.len() > MAX_AREAS {
        locks.push(Lock::TooManyAreas(maps.len()));
    }
    for mapping in maps {
        if overlaps_region(mapping.start, mapping.end) {
            if !policy.is_deputy {
                locks.push(Lock::Reserved);
            }
        } else if mapping.is_shared && mapping.prot & 2 != 0 {
            let lock = if mapping.name.starts_with("/SYSV") {
                Lock::SharedSegment
            } else if is_device(&mapping.name) {
                Lock::DeviceMapping(mapping.name.clone())
            } else if mapping.name.contains("io_uring") {
                Lock::Descriptor("io_uring")
            } else {
                Lock::SharedMapping(mapping.name.clone())
            };
            locks.push(lock);
        }
    }
}

/// Whether a shared mapping of this name is of a device. Shared memory without a file
/// is shown as `/dev/zero (deleted)`.
fn is_device(name: &str) -> bool {
    name.starts_with("/dev/") && !name.starts_with("/dev/shm/") && !name.starts_with("/dev/zero")
}

/// Flags of mappings that only `smaps` tells.
fn of_flags(pid: Pid, locks: &mut Vec<Lock>) -> io::Result<()> {
    let smaps = fs::read_to_string(procfs::path(pid, "smaps"))?;
    let mut name = "";
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let has = |flag: &str| flags.split_whitespace().any(|f| f == flag);
            if has("ht") {
                locks.push(Lock::HugePages);
            }
            let is_kernels = name.starts_with("[v");
            if !is_kernels && (has("io") || has("pf")) {
                locks.push(Lock::DeviceMapping(name.to_owned()));
            }
        } else if let Some(key) = line.strip_prefix("ProtectionKey:") {
            if key.trim() != "0" {
                locks.push(Lock::ProtectionKeys);
            }
        } else if line.split(' ').next().is_some_and(|range| range.contains('-')) {
            name = line.splitn(6, ' ').nth(5).unwrap_or_default().trim();
        }
    }
    Ok(())
}

fn of_descriptors(pid: Pid, locks: &mut Vec<Lock>) {
    const BOUND: &[(&str, &str)] = &[
        ("anon_inode:[io_uring]", "io_uring"),
        ("anon_inode:[userfaultfd]", "userfaultfd"),
        ("anon_inode:[perf_event]", "perf_event"),
        ("anon_inode:kvm-vm", "kvm"),
        ("/secretmem", "memfd_secret"),
        ("/dev/kvm", "kvm"),
        ("/dev/userfaultfd", "userfaultfd"),
    ];
    let Ok(entries) = fs::read_dir(procfs::path(pid, "fd")) else { return };
    for entry in entries.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let target = target.to_string_lossy();
        if let Some((_, kind)) = BOUND.iter().find(|(prefix, _)| target.starts_with(prefix)) {
            locks.push(Lock::Descriptor(kind));
        }
    }
}

/// A sentence for why a program came home by itself: [`reason`] and its detail.
#[must_use]
pub fn describe_return(why: u32, detail: u64) -> String {
    match why {
        reason::ASKED => "it was asked to".to_owned(),
        reason::CALL => match table::name(detail) {
            Some(name) => format!("system call {name} runs at home only"),
            None => format!("system call {detail} runs at home only"),
        },
        reason::CALL_32 => format!("32-bit system call {detail} (int 0x80) runs at home only"),
        reason::FAULT => format!("a fault (signal {detail}) is handled at home"),
        reason::FORK => format!("it makes a child, and {}", describe_fork(detail)),
        reason::SIGNAL => format!("signal {detail} has a handler, which runs at home"),
        other => format!("reason {other}, detail {detail}"),
    }
}

/// Why a child is not made away: one of [`why`].
const fn describe_fork(cause: u64) -> &'static str {
    match cause {
        why::NO_DAEMON => "no daemon answers at home",
        why::REFUSED => "the other node takes no further process",
        why::NO_FILES => "it may not open so many files, or sees no /proc",
        why::LINK => "the child's link ended",
        why::LIMIT => "there are as many as there may be",
        why::NO_LINK => "the other node has not handed out the child's link",
        why::DEPTH => "it is a vfork within a vfork within a vfork",
        _ => "this one runs at home only",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_has_threads_and_perhaps_root() {
        let found = locks(rustix::process::getpid(), Policy::default()).unwrap();
        assert!(found.iter().any(|lock| lock.code() == "threads"), "{found:?}");
        assert!(found.iter().all(|lock| !lock.to_string().is_empty()));
    }

    #[test]
    fn shared_memory_is_no_device() {
        assert!(is_device("/dev/mem") && is_device("/dev/dri/card0"));
        assert!(!is_device("/dev/zero (deleted)") && !is_device("/dev/shm/x"));
    }

    #[test]
    fn returns_are_named() {
        assert_eq!(describe_return(reason::CALL, 56), "system call clone runs at home only");
        assert!(describe_return(reason::CALL, 9999).contains("9999"));
    }
}
