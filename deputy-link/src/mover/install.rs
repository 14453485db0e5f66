//! The agent in a process that is about to have a deputy: its region, its descriptors,
//! and the registers with which it begins.
//!
//! Everything here is done in the process's name while it is stopped, and can be
//! undone until the registers are set.

use super::{MoveError, read_status};
use crate::agent;
use crate::channel::Channel;
use crate::image::Snapshot;
use crate::locks::Lock;
use crate::sys::packet;
use crate::sys::ptrace::{Regs, Stopped, TraceError, get_descriptor};
use conet_deputy_core::boot::{BOOT, Boot, SCRATCH, STACK_TOP, STATUS, Status, entry, phase};
use conet_wire::image::{Clocks, REGION, REGION_LEN, overlaps_region};
use rustix::process::Pid;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use zerocopy::{FromZeros, IntoBytes};

/// Where the deputy keeps the link, if the process may have so many descriptors:
/// away from those that the program is given.
const HIDDEN_FD_MIN: u64 = 900;

/// The agent's region in a process that is about to have a deputy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Install {
    /// It was there before, and holds data of a pending call.
    was_there: bool,
}

impl Install {
    /// Maps the region and writes the agent into it.
    pub(super) fn begin(stopped: &mut Stopped, is_deputy: bool) -> Result<Self, MoveError> {
        let regs = stopped.regs();
        let was_there = overlaps_region(regs.rip, regs.rip + 1);
        let is_finishing =
            is_deputy && read_status(stopped.memory()).is_ok_and(|s| s.phase == phase::FINISHING);
        if !was_there && (is_finishing || overlaps_region(regs.rsp, regs.rsp + 1)) {
            // A handler runs on top of a deputy that is finishing a call.
            return Err(MoveError::Locked(vec![Lock::Reserved]));
        }
        let install = Self { was_there };
        if was_there {
            return Ok(install);
        }
        const MAP_NEW: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u64;
        let fixed = if is_deputy { libc::MAP_FIXED } else { libc::MAP_FIXED_NOREPLACE };
        let flags = MAP_NEW | u64::from(fixed.unsigned_abs());
        stopped.call("mmap", libc::SYS_mmap, [REGION, REGION_LEN, 3, flags, u64::MAX, 0])?;
        install.write_agent(stopped).inspect_err(|_| install.undo(stopped))?;
        Ok(install)
    }

    fn write_agent(self, stopped: &mut Stopped) -> Result<(), MoveError> {
        const PAGE: u64 = conet_wire::image::PAGE;
        for segment in agent::segments() {
            stopped
                .memory()
                .write_all_at(segment.bytes, segment.addr)
                .map_err(MoveError::Process)?;
            if segment.prot & 2 == 0 {
                let start = segment.addr / PAGE * PAGE;
                let len = (segment.addr + segment.len).next_multiple_of(PAGE) - start;
                let args = [start, len, u64::from(segment.prot), 0, 0, 0];
                stopped.call("mprotect", libc::SYS_mprotect, args)?;
            }
        }
        Ok(())
    }

    /// Takes the region out again.
    pub(super) fn undo(self, stopped: &mut Stopped) {
        if !self.was_there {
            // Fails only where the process is gone.
            stopped.call("munmap", libc::SYS_munmap, [REGION, REGION_LEN, 0, 0, 0, 0]).ok();
        }
    }
}

/// Gives the process descriptors of ours, out of the program's way.
pub(super) fn pass(
    stopped: &mut Stopped,
    pid: Pid,
    fds: [BorrowedFd<'_>; 2],
) -> Result<[u64; 2], MoveError> {
    const SOCKETPAIR: [u64; 4] =
        [libc::AF_UNIX as u64, (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC) as u64, 0, SCRATCH];
    let [domain, kind, protocol, at] = SOCKETPAIR;
    stopped.call("socketpair", libc::SYS_socketpair, [domain, kind, protocol, at, 0, 0])?;
    let mut pair = [0u8; 8];
    stopped.memory().read_exact_at(&mut pair, SCRATCH).map_err(MoveError::Process)?;
    let pair = u64::from_le_bytes(pair);
    let (near, far) = (pair & 0xffff_ffff, pair >> 32);
    let passed = receive(stopped, pid, fds, near, far);
    for fd in [near, far] {
        stopped.call("close", libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
    }
    let [first, second] = passed?;
    let first = hide(stopped, first).inspect_err(|_| close(stopped, second))?;
    let second = hide(stopped, second).inspect_err(|_| close(stopped, first))?;
    Ok([first, second])
}

/// Closes a descriptor that the program did not open; fails where the process is
/// gone, which is as good.
pub(super) fn close(stopped: &mut Stopped, fd: u64) {
    stopped.call("close", libc::SYS_close, [fd, 0, 0, 0, 0, 0]).ok();
}

/// Moves a descriptor out of the program's way.
fn hide(stopped: &mut Stopped, fd: u64) -> Result<u64, MoveError> {
    let hidden = [HIDDEN_FD_MIN, 200, 0].into_iter().find_map(|least| {
        let args = [fd, libc::F_DUPFD_CLOEXEC as u64, least, 0, 0, 0];
        stopped.call("fcntl", libc::SYS_fcntl, args).ok()
    });
    close(stopped, fd);
    hidden.ok_or_else(|| MoveError::Process(io::Error::from_raw_os_error(libc::EMFILE)))
}

/// Has the process open its own maps, for the day when it comes home.
pub(super) fn open_maps(stopped: &mut Stopped) -> Result<u64, MoveError> {
    let write = stopped.memory().write_all_at(b"/proc/self/maps\0", SCRATCH);
    write.map_err(MoveError::Process)?;
    let flags = u64::from((libc::O_RDONLY | libc::O_CLOEXEC).unsigned_abs());
    match stopped.call("open", libc::SYS_open, [SCRATCH, flags, 0, 0, 0, 0]) {
        Ok(fd) => hide(stopped, fd),
        Err(TraceError::Injected { .. }) => Err(MoveError::Locked(vec![Lock::NoProc])),
        Err(error) => Err(error.into()),
    }
}

/// Sends `fds` through the process's own socket pair and receives them there.
fn receive(
    stopped: &mut Stopped,
    pid: Pid,
    fds: [BorrowedFd<'_>; 2],
    near: u64,
    far: u64,
) -> Result<[u64; 2], MoveError> {
    let ours = get_descriptor(pid, near).map_err(MoveError::Process)?;
    packet::send(ours.as_fd(), b"l", &fds).map_err(MoveError::Process)?;
    // struct msghdr, its iovec, one byte of data and 24 of control, in scratch memory.
    const IOV: u64 = SCRATCH + 64;
    const DATA: u64 = SCRATCH + 96;
    const CONTROL: u64 = SCRATCH + 128;
    const CMSG_LEN: u32 = 24;
    let message = [0, 0, IOV, 1, CONTROL, 24, 0, 0, DATA, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    stopped.memory().write_all_at(message.as_bytes(), SCRATCH).map_err(MoveError::Process)?;
    stopped.memory().write_all_at(&[0; 24], CONTROL).map_err(MoveError::Process)?;
    let flags = u64::from(libc::MSG_CMSG_CLOEXEC.unsigned_abs());
    stopped.call("recvmsg", libc::SYS_recvmsg, [far, SCRATCH, flags, 0, 0, 0])?;
    let mut control = [0u8; 24];
    stopped.memory().read_exact_at(&mut control, CONTROL).map_err(MoveError::Process)?;
    let word = |at: usize| {
        u32::from_le_bytes([control[at], control[at + 1], control[at + 2], control[at + 3]])
    };
    if word(0) == CMSG_LEN {
        return Ok([word(16).into(), word(20).into()]);
    }
    // One came, or none, where the process may open no more.
    if word(0) > 16 {
        close(stopped, word(16).into());
    }
    Err(MoveError::Process(io::Error::from_raw_os_error(libc::EMFILE)))
}

pub(super) fn write_boot(
    snapshot: &Snapshot,
    stopped: &Stopped,
    channel: &Channel,
    offsets: Clocks,
) -> Result<(), MoveError> {
    let [link, maps, daemon] =
        snapshot.head.hidden_fds.map(|fd| u32::try_from(fd).unwrap_or(u32::MAX));
    let (sealed, opened) = channel.positions();
    let secret = channel.secret();
    let boot = Boot {
        link,
        maps,
        cipher: secret.cipher_number(),
        daemon,
        seal_key: *secret.seal.expose(),
        open_key: *secret.open.expose(),
        seal_next: sealed,
        open_next: opened,
        rseq_addr: snapshot.head.rseq_addr,
        rseq_len: snapshot.head.rseq_len,
        rseq_signature: snapshot.head.rseq_signature,
        blocked: snapshot.head.blocked,
        clock: snapshot.head.vdso.clock_gettime,
        offsets,
        pending: snapshot.pending,
    };
    let status = Status { phase: phase::STARTING, ..Status::new_zeroed() };
    let write = |bytes: &[u8], at| stopped.memory().write_all_at(bytes, at);
    write(boot.as_bytes(), BOOT)
        .and_then(|()| write(status.as_bytes(), STATUS))
        .map_err(MoveError::Process)
}

/// Registers with which a deputy begins.
pub(super) fn deputy_regs(own: &Regs) -> Regs {
    const DIRECTION_AND_TRAP: u64 = 0x500;
    Regs {
        rip: agent::ENTRY + entry::DEPUTY,
        rsp: STACK_TOP,
        orig_rax: u64::MAX,
        eflags: own.eflags & !DIRECTION_AND_TRAP,
        ..*own
    }
}
