//! The home side of a move.
//!
//! ```text
//! move_out:   READY? ─ freeze ─ image ─ PREPARED? ─ clocks ─ the deputy's registers ─ let go, it sends COMMIT
//!             └──────────── anything fails: undo, the program goes on at home ──┘
//! bring_home: interrupt the deputy ─ it asks the remote half ─ image back ─ HOME ─ clean up
//! ```
//!
//! COMMIT is the point of no return: before it the process lives at home, after it
//! at the remote node, and it never runs at both. Between two borrowed calls the
//! stopped process always has its own registers, so if the daemon dies the kernel
//! lets it go on natively. Within one (some 10 µs) it would end by SIGTRAP: single
//! step outlives the tracer.
//!
//! Thread context: ptrace belongs to a thread, so each function does all of its
//! work on the caller's.

use crate::agent;
use crate::channel::{Channel, ChannelError, LinkSecret};
use crate::image::{ImageError, Snapshot, is_to_reissue, is_to_restart};
use crate::locks::{Lock, Policy, locks, locks_of_stopped};
use crate::procfs;
use crate::sys::keep_alive;
use crate::sys::ptrace::{Regs, Stopped, TraceError, get_descriptor};
use conet_deputy_core::areas::Backing;
use conet_deputy_core::boot::{self, BOOT, Boot, SCRATCH, STACK_TOP, STATUS, Status, entry, phase};
use conet_wire::image::{Clocks, End, REGION, REGION_LEN, overlaps_region, step};
use conet_wire::link::{Refusal, kind};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::Pid;
use rustix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::offset_of;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// How long the other node may take for one step of a move.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a program may take to come home once it is asked.
const HOME_TIMEOUT: Duration = Duration::from_secs(30);
/// How often the bell is rung until the image comes.
const BELL_PERIOD: Duration = Duration::from_millis(3);
/// Round trips by which clocks are compared; the shortest counts.
const CLOCK_ROUNDS: u32 = 5;
/// Where the deputy keeps the link, if the process may have so many descriptors:
/// away from those that the program is given.
const HIDDEN_FD_MIN: u64 = 900;

/// Why a process did not move. It goes on where it was, unless said otherwise.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// It is locked at home.
    #[error("it must stay at home: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Locked(Vec<Lock>),
    /// It ended.
    #[error("the process has ended")]
    Gone,
    /// The other node refused the image.
    #[error("the other node could not take the image: {} failed with error {errno} at {addr:#x}", step_name(*.step))]
    Refused {
        /// The step.
        step: u32,
        /// The error number.
        errno: u32,
        /// The address concerned.
        addr: u64,
    },
    /// The link failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The process could not be stopped or read.
    #[error("{0}")]
    Process(#[source] io::Error),
    /// It did not come home in time; it is still away.
    #[error("it did not come home within {} s; it is still away", HOME_TIMEOUT.as_secs())]
    Late,
    /// Its deputy gave up; the process ends.
    #[error("its other half was lost ({0})")]
    Lost(&'static str),
}

fn step_name(which: u32) -> &'static str {
    match which {
        step::FRAME => "reading the image",
        step::VERSION => "matching versions",
        step::MAP => "mapping memory",
        step::PROTECT => "protecting memory",
        step::PAGE => "placing a page",
        step::MM_MAP => "prctl(PR_SET_MM_MAP)",
        step::SANDBOX => "confining the process",
        step::VDSO => "mapping the vDSO",
        _ => "an unknown step",
    }
}

impl From<TraceError> for MoveError {
    fn from(error: TraceError) -> Self {
        match error {
            TraceError::Gone => Self::Gone,
            TraceError::JobStopped => Self::Locked(vec![Lock::Stopped]),
            other => Self::Process(io::Error::other(other.to_string())),
        }
    }
}

impl From<ImageError> for MoveError {
    fn from(error: ImageError) -> Self {
        match error {
            ImageError::Trace(error) => error.into(),
            ImageError::Channel(error) => error.into(),
            ImageError::Read(error) => Self::Process(error),
            ImageError::Xsave(_) => Self::Locked(vec![Lock::Processor]),
        }
    }
}

/// A process that has moved.
#[derive(Debug)]
pub struct Moved {
    /// How long it did not run.
    pub freeze: Duration,
    /// How long the move took.
    pub total: Duration,
    /// Memory areas sent.
    pub areas: u64,
    /// Pages sent, of 4 KiB.
    pub pages: u64,
}

/// A process that has come home.
#[derive(Clone, Copy, Debug)]
pub struct Returned {
    /// From asking until it was at home; of this it did not run for the transfer only.
    pub total: Duration,
    /// Pages that came.
    pub pages: u64,
    /// Pages of them that differed from what was at home.
    pub changed: u64,
    /// Calls that ran at home while it was away.
    pub calls: u64,
}

/// Moves a process out over a link whose other end is a host role that is starting.
///
/// `stream` carries the sealed HELLO already; nothing else may use it afterwards.
///
/// # Errors
/// [`MoveError`]; the process then goes on at home.
pub fn move_out(
    pid: Pid,
    stream: TcpStream,
    secret: LinkSecret,
    policy: Policy,
) -> Result<Moved, MoveError> {
    let begin = Instant::now();
    let mut channel = Channel::new(stream, secret);
    channel.stream().set_nodelay(true).map_err(ChannelError::from)?;
    keep_alive(channel.stream().as_fd()).map_err(ChannelError::from)?;
    channel.stream().set_read_timeout(Some(STEP_TIMEOUT)).map_err(ChannelError::from)?;
    // A peer that reads no more must not keep the process stopped.
    channel.stream().set_write_timeout(Some(STEP_TIMEOUT)).map_err(ChannelError::from)?;
    channel.send(kind::HELLO, 0, &[])?;
    expect(&mut channel, kind::READY)?;
    let found = locks(pid, policy).map_err(gone)?;
    if !found.is_empty() {
        return Err(MoveError::Locked(found));
    }
    let frozen = Instant::now();
    let mut stopped = stop_at_rest(pid)?;
    if stopped.dispatches_calls() {
        return Err(MoveError::Locked(vec![Lock::SyscallDispatch]));
    }
    // Between looking and stopping the program may have become another one.
    let found = locks_of_stopped(pid, policy).map_err(gone)?;
    if !found.is_empty() {
        return Err(MoveError::Locked(found));
    }
    let mut snapshot = Snapshot::take(&mut stopped, pid)?;
    let resident = Install::begin(&mut stopped, policy.is_deputy)?;
    let end = match transfer(&mut snapshot, &mut stopped, pid, &mut channel, resident) {
        Ok(end) => end,
        Err(error) => {
            resident.undo(&mut stopped);
            return Err(error);
        }
    };
    stopped.release()?;
    Ok(Moved {
        freeze: frozen.elapsed(),
        total: begin.elapsed(),
        areas: end.areas,
        pages: end.pages,
    })
}

/// Stops a process where its state can be told: in its own code, or in a deputy that
/// waits for a call to end. Not in the vDSO, whose data the other node does not have.
fn stop_at_rest(pid: Pid) -> Result<Stopped, MoveError> {
    let maps = procfs::maps(pid).map_err(gone)?;
    let vdso = maps.into_iter().find(|m| m.backing == Backing::Vdso);
    let in_vdso = |rip| vdso.as_ref().is_some_and(|vdso| (vdso.start..vdso.end).contains(&rip));
    for _ in 0..400 {
        let stopped = Stopped::new(pid)?;
        let regs = stopped.regs();
        let waits = regs.rip == agent::ENTRY + entry::FINISH_END && is_to_restart(regs)
            || regs.rip == agent::ENTRY + entry::FINISH_SYSCALL;
        if waits || !overlaps_region(regs.rip, regs.rip + 1) && !in_vdso(regs.rip) {
            return Ok(stopped);
        }
        stopped.release()?;
        std::thread::sleep(Duration::from_micros(500));
    }
    Err(MoveError::Locked(vec![Lock::Reserved]))
}

/// An error from `/proc`, which mostly means that the process is gone.
fn gone(error: io::Error) -> MoveError {
    match error.kind() {
        io::ErrorKind::NotFound => MoveError::Gone,
        _ if error.raw_os_error() == Some(libc::ESRCH) => MoveError::Gone,
        _ => MoveError::Process(error),
    }
}

fn transfer(
    snapshot: &mut Snapshot,
    stopped: &mut Stopped,
    pid: Pid,
    channel: &mut Channel,
    install: Install,
) -> Result<End, MoveError> {
    let link = install.pass_link(stopped, pid, channel.stream())?;
    let sent = open_maps(stopped).and_then(|maps| {
        snapshot.head.hidden_fds = [link, maps];
        let sent = install.finish_transfer(snapshot, stopped, pid, channel);
        if sent.is_err() {
            close(stopped, maps);
        }
        sent
    });
    if sent.is_err() {
        close(stopped, link);
    }
    sent
}

/// Closes a descriptor that the program did not open; fails where the process is
/// gone, which is as good.
fn close(stopped: &mut Stopped, fd: u64) {
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
fn open_maps(stopped: &mut Stopped) -> Result<u64, MoveError> {
    let write = stopped.memory().write_all_at(b"/proc/self/maps\0", SCRATCH);
    write.map_err(MoveError::Process)?;
    let flags = u64::from((libc::O_RDONLY | libc::O_CLOEXEC).unsigned_abs());
    match stopped.call("open", libc::SYS_open, [SCRATCH, flags, 0, 0, 0, 0]) {
        Ok(fd) => hide(stopped, fd),
        Err(TraceError::Injected { .. }) => Err(MoveError::Locked(vec![Lock::NoProc])),
        Err(error) => Err(error.into()),
    }
}

fn expect(channel: &mut Channel, wanted: u32) -> Result<(), MoveError> {
    let (header, body) = channel.receive()?;
    if header.kind == wanted {
        return Ok(());
    }
    if header.kind == kind::REFUSED
        && let Ok((Refusal { step, errno, addr }, _)) = Refusal::read_from_prefix(body)
    {
        return Err(MoveError::Refused { step, errno, addr });
    }
    Err(ChannelError::Unexpected(header.kind).into())
}

/// This node's clocks, in nanoseconds.
fn clocks() -> Clocks {
    let now = |id| {
        let time = clock_gettime(id);
        time.tv_sec.wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec)
    };
    Clocks {
        realtime: now(ClockId::Realtime),
        monotonic: now(ClockId::Monotonic),
        boottime: now(ClockId::Boottime),
        raw: now(ClockId::MonotonicRaw),
    }
}

/// What to add to the other node's clocks to read ours.
fn compare_clocks(channel: &mut Channel) -> Result<Clocks, MoveError> {
    let mut best: Option<(Duration, Clocks)> = None;
    for seq in 0..CLOCK_ROUNDS {
        let sent = Instant::now();
        let before = clocks();
        channel.send(kind::CLOCKS, seq, &[])?;
        let (header, body) = channel.receive()?;
        let (there, _) =
            Clocks::read_from_prefix(body).map_err(|_| ChannelError::Unexpected(header.kind))?;
        let after = clocks();
        let round = sent.elapsed();
        let middle = |a: i64, b: i64, there: i64| a + (b - a) / 2 - there;
        let offsets = Clocks {
            realtime: middle(before.realtime, after.realtime, there.realtime),
            monotonic: middle(before.monotonic, after.monotonic, there.monotonic),
            boottime: middle(before.boottime, after.boottime, there.boottime),
            raw: middle(before.raw, after.raw, there.raw),
        };
        if best.is_none_or(|(shortest, _)| round < shortest) {
            best = Some((round, offsets));
        }
    }
    best.map(|(_, offsets)| offsets).ok_or_else(|| ChannelError::Unexpected(0).into())
}

/// The agent's region in a process that is about to have a deputy.
#[derive(Clone, Copy, Debug)]
struct Install {
    /// It was there before, and holds data of a pending call.
    was_there: bool,
}

impl Install {
    /// Maps the region and writes the agent into it.
    fn begin(stopped: &mut Stopped, is_deputy: bool) -> Result<Self, MoveError> {
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
    fn undo(self, stopped: &mut Stopped) {
        if !self.was_there {
            // Fails only where the process is gone.
            stopped.call("munmap", libc::SYS_munmap, [REGION, REGION_LEN, 0, 0, 0, 0]).ok();
        }
    }

    /// Gives the process a descriptor of `link`, out of the program's way.
    fn pass_link(
        self,
        stopped: &mut Stopped,
        pid: Pid,
        link: &TcpStream,
    ) -> Result<u64, MoveError> {
        const SOCKETPAIR: [u64; 4] =
            [libc::AF_UNIX as u64, (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC) as u64, 0, SCRATCH];
        let [domain, kind, protocol, at] = SOCKETPAIR;
        stopped.call("socketpair", libc::SYS_socketpair, [domain, kind, protocol, at, 0, 0])?;
        let mut pair = [0u8; 8];
        stopped.memory().read_exact_at(&mut pair, SCRATCH).map_err(MoveError::Process)?;
        let pair = u64::from_le_bytes(pair);
        let (near, far) = (pair & 0xffff_ffff, pair >> 32);
        let passed = receive_link(stopped, pid, link, near, far);
        for fd in [near, far] {
            stopped.call("close", libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
        }
        hide(stopped, passed?)
    }

    /// Sends the image and, when the other node has it, turns the process into its
    /// deputy.
    fn finish_transfer(
        self,
        snapshot: &Snapshot,
        stopped: &mut Stopped,
        pid: Pid,
        channel: &mut Channel,
    ) -> Result<End, MoveError> {
        let end = snapshot.send(stopped, pid, channel)?;
        expect(channel, kind::PREPARED)?;
        let offsets = compare_clocks(channel)?;
        channel.stream().set_read_timeout(None).map_err(ChannelError::from)?;
        channel.stream().set_write_timeout(None).map_err(ChannelError::from)?;
        write_boot(snapshot, stopped, channel, offsets)?;
        let own_mask = stopped.mask();
        stopped.set_mask(snapshot.head.blocked | snapshot.head.handled)?;
        // The one step that decides: with these registers the process is its deputy,
        // which sends COMMIT before anything else, whatever becomes of this daemon.
        let regs = deputy_regs(stopped.regs());
        if let Err(error) = stopped.set_regs(regs) {
            stopped.set_mask(own_mask)?;
            return Err(error.into());
        }
        Ok(end)
    }
}

fn write_boot(
    snapshot: &Snapshot,
    stopped: &Stopped,
    channel: &Channel,
    offsets: Clocks,
) -> Result<(), MoveError> {
    let [link, maps] = snapshot.head.hidden_fds.map(|fd| u32::try_from(fd).unwrap_or(u32::MAX));
    let (sealed, opened) = channel.positions();
    let secret = channel.secret();
    let boot = Boot {
        link,
        maps,
        cipher: secret.cipher_number(),
        reserved: 0,
        seal_key: *secret.seal.expose(),
        open_key: *secret.open.expose(),
        seal_next: sealed,
        open_next: opened,
        rseq_addr: snapshot.head.rseq_addr,
        rseq_len: snapshot.head.rseq_len,
        rseq_signature: snapshot.head.rseq_signature,
        blocked: snapshot.head.blocked,
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
fn deputy_regs(own: &Regs) -> Regs {
    const DIRECTION_AND_TRAP: u64 = 0x500;
    Regs {
        rip: agent::ENTRY + entry::DEPUTY,
        rsp: STACK_TOP,
        orig_rax: u64::MAX,
        eflags: own.eflags & !DIRECTION_AND_TRAP,
        ..*own
    }
}

/// Sends `link` through the process's own socket pair and receives it there.
fn receive_link(
    stopped: &mut Stopped,
    pid: Pid,
    link: &TcpStream,
    near: u64,
    far: u64,
) -> Result<u64, MoveError> {
    let ours = get_descriptor(pid, near).map_err(MoveError::Process)?;
    let fds = [link.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(&ours, &[IoSlice::new(b"l")], &mut control, SendFlags::empty())
        .map_err(|error| MoveError::Process(error.into()))?;
    // struct msghdr, its iovec, one byte of data and 24 of control, in scratch memory.
    const IOV: u64 = SCRATCH + 64;
    const DATA: u64 = SCRATCH + 96;
    const CONTROL: u64 = SCRATCH + 128;
    const CMSG_LEN: u32 = 20;
    let message = [0, 0, IOV, 1, CONTROL, 24, 0, 0, DATA, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    stopped.memory().write_all_at(message.as_bytes(), SCRATCH).map_err(MoveError::Process)?;
    let flags = u64::from(libc::MSG_CMSG_CLOEXEC.unsigned_abs());
    stopped.call("recvmsg", libc::SYS_recvmsg, [far, SCRATCH, flags, 0, 0, 0])?;
    let mut control = [0u8; 20];
    stopped.memory().read_exact_at(&mut control, CONTROL).map_err(MoveError::Process)?;
    // Nothing came where the process may open no more.
    if control[..4] != CMSG_LEN.to_le_bytes() {
        return Err(MoveError::Process(io::Error::from_raw_os_error(libc::EMFILE)));
    }
    Ok(u64::from(u32::from_le_bytes([control[16], control[17], control[18], control[19]])))
}

/// Reads what the deputy in `pid` says of itself.
///
/// # Errors
/// When there is no such process, or no deputy in it.
pub fn status(pid: Pid) -> io::Result<Status> {
    read_status(&File::open(procfs::path(pid, "mem"))?)
}

fn read_status(memory: &File) -> io::Result<Status> {
    let mut bytes = [0; size_of::<Status>()];
    memory.read_exact_at(&mut bytes, STATUS)?;
    Status::read_from_bytes(&bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Brings a process home: interrupts its deputy and waits for the image. `ring` has
/// the remote's warden ring the bell, for a program that computes without calls; it
/// is called repeatedly until the image begins to come.
///
/// # Errors
/// [`MoveError::Gone`] when the process ended meanwhile; [`MoveError::Late`] when it
/// is still away.
pub fn bring_home(pid: Pid, mut ring: impl FnMut()) -> Result<Returned, MoveError> {
    let begin = Instant::now();
    interrupt(pid)?;
    let mut last_ring: Option<Instant> = None;
    loop {
        let status = status(pid).map_err(gone)?;
        match status.phase {
            phase::HOME | phase::FINISHING => {
                take_out(pid);
                return Ok(Returned {
                    total: begin.elapsed(),
                    pages: status.pages,
                    changed: status.changed,
                    calls: status.calls,
                });
            }
            phase::LOST => return Err(MoveError::Lost(fault_name(status.fault))),
            phase::SERVING if last_ring.is_none_or(|at| at.elapsed() > BELL_PERIOD) => {
                ring();
                last_ring = Some(Instant::now());
            }
            _ => {}
        }
        if begin.elapsed() > HOME_TIMEOUT {
            return Err(MoveError::Late);
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// What a deputy's [`Status::fault`] means.
#[must_use]
pub const fn fault_name(fault: u32) -> &'static str {
    match fault {
        boot::fault::END => "the link ended",
        boot::fault::FORGED => "a forged or replayed record came",
        boot::fault::PROTOCOL => "the protocol was broken",
        boot::fault::RESTORE => "the image could not be restored",
        _ => "unknown",
    }
}

/// Makes the deputy ask for the program, wherever it is in its loop.
fn interrupt(pid: Pid) -> Result<(), MoveError> {
    let mut stopped = Stopped::new(pid)?;
    let interrupt = STATUS + offset_of!(Status, interrupt) as u64;
    stopped.memory().write_all_at(&1u32.to_le_bytes(), interrupt).map_err(MoveError::Process)?;
    let regs = *stopped.regs();
    let at = regs.rip.wrapping_sub(agent::ENTRY);
    let target = match at {
        entry::CHECK..=entry::SYSCALL => Some(entry::ABORT),
        entry::END if is_to_reissue(&regs) => {
            // It had begun: the deputy is told how the kernel would go on.
            let rax = regs.rax.wrapping_add_signed(boot::BROKEN_OFF);
            stopped.set_regs(Regs { rax, orig_rax: u64::MAX, ..regs })?;
            None
        }
        entry::END if is_to_restart(&regs) => Some(entry::PARKED),
        _ => None,
    };
    if let Some(target) = target {
        let rip = agent::ENTRY + target;
        stopped.set_regs(Regs { rip, orig_rax: u64::MAX, ..regs })?;
    }
    stopped.release()?;
    Ok(())
}

/// Takes the agent's region out of a process that is home; best effort, since a
/// region that stays does no harm and the next move replaces it.
pub fn take_out(pid: Pid) {
    let in_region = |addr: u64| overlaps_region(addr, addr + 1);
    if !status(pid).is_ok_and(|status| status.phase == phase::HOME) {
        return;
    }
    let Ok(mut stopped) = Stopped::new(pid) else { return };
    let regs = *stopped.regs();
    if in_region(regs.rip) || in_region(regs.rsp) {
        return;
    }
    let vdso = procfs::maps(pid)
        .ok()
        .and_then(|maps| maps.into_iter().find(|m| m.backing == Backing::Vdso));
    if let Some(vdso) = vdso
        && stopped.use_gadget(vdso.start, vdso.end).is_ok()
        && let Err(error) =
            stopped.call("munmap", libc::SYS_munmap, [REGION, REGION_LEN, 0, 0, 0, 0])
    {
        tracing::debug!(%error, "the agent's region stays");
    }
}
