//! The way out: from a process at home to a deputy and its remote half.

use super::clocks::compare_clocks;
use super::install::{Install, close, deputy_regs, open_maps, pass, write_boot};
use super::mirror::Mirror;
use super::tracker::{Files, Target, Tracker};
use super::{MoveError, Moved, expect, gone, read_status};
use crate::agent;
use crate::channel::{Channel, ChannelError, LinkSecret};
use crate::family::DeputyEnd;
use crate::image::{Snapshot, is_to_restart};
use crate::locks::{Lock, Policy, Seen, locks, locks_of_stopped};
use crate::sys::ptrace::{Stopped, TraceError, get_descriptor};
use crate::sys::userfault::Userfault;
use conet_deputy_core::areas::Backing;
use conet_deputy_core::boot::{entry, phase};
use conet_deputy_core::scan::UFFD_FLAGS;
use conet_wire::image::{Clocks, End, overlaps_region};
use conet_wire::link::kind;
use rustix::process::Pid;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// How long the other node may take for one step of a move.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// Most rounds of pre-copy.
pub(super) const MAX_ROUNDS: usize = 5;
/// With so few pages, 256 KiB, another round is not worth it.
pub(super) const FEW_PAGES: u64 = 64;
/// How often pre-copy begins anew where the program becomes another one (`execve`).
pub(super) const MAX_BEGINNINGS: u32 = 3;

/// How a process is to be moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum How {
    /// Its memory goes ahead while it runs, where the kernel can tell what it changes.
    #[default]
    Precopy,
    /// It is stopped, and all of its memory goes.
    Stop,
}

/// Why a process was moved without rounds of pre-copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StopReason {
    /// It was asked for.
    #[error("it was asked for")]
    Asked,
    /// The kernel has no asynchronous write protection (before Linux 6.7).
    #[error("this kernel cannot tell what a program changes (Linux 6.7 can)")]
    Kernel,
    /// The process could not be given a userfaultfd.
    #[error("the process could have no userfaultfd (error {0})")]
    Userfault(i32),
    /// It has a file open for direct input and output.
    #[error("it has a file open with O_DIRECT, whose reads are not seen")]
    DirectIo,
    /// It became another program again and again.
    #[error("it became another program while its memory was copied")]
    Replaced,
}

/// How a process was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// In rounds while it ran, then the rest.
    Precopy,
    /// Stopped for all of it.
    Stop(StopReason),
}

/// One round of pre-copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Pages sent, of 4 KiB.
    pub pages: u64,
    /// How long it took.
    pub time: Duration,
}

/// Moves a process out over a link whose other end is a host role that is starting.
///
/// `stream` is not used by anybody else from now on. `line` is given to the deputy, to
/// reach its daemon by.
///
/// # Errors
/// [`MoveError`]; the process then goes on at home.
pub fn move_out(
    pid: Pid,
    stream: TcpStream,
    secret: LinkSecret,
    policy: Policy,
    how: How,
    line: &DeputyEnd,
) -> Result<Moved, MoveError> {
    let begin = Instant::now();
    let mut out = Out::begin(pid, stream, secret, policy, line)?;
    let moved = out.run(how)?;
    Ok(Moved { total: begin.elapsed(), ..moved })
}

/// A move under way.
pub(super) struct Out<'a> {
    pub(super) pid: Pid,
    policy: Policy,
    line: &'a DeputyEnd,
    channel: Channel,
    /// What to add to the other node's clocks to read ours.
    offsets: Clocks,
    mirror: Mirror,
    rounds: Vec<Round>,
    /// Stops other than the freeze.
    pause: Duration,
    /// The program is at another node still, and it is its deputy that is stopped.
    pub(super) is_away: bool,
    /// When the program was stopped, where that was at another node.
    pub(super) frozen: Option<Instant>,
}

impl<'a> Out<'a> {
    /// Meets the other node.
    pub(super) fn begin(
        pid: Pid,
        stream: TcpStream,
        secret: LinkSecret,
        policy: Policy,
        line: &'a DeputyEnd,
    ) -> Result<Self, MoveError> {
        let mut channel = Channel::new(stream, secret);
        channel.stream().set_nodelay(true).map_err(ChannelError::from)?;
        channel.stream().set_read_timeout(Some(STEP_TIMEOUT)).map_err(ChannelError::from)?;
        // A peer that reads no more must not keep the process stopped.
        channel.stream().set_write_timeout(Some(STEP_TIMEOUT)).map_err(ChannelError::from)?;
        channel.send(kind::HELLO, 0, &[])?;
        expect(&mut channel, kind::READY)?;
        let found = locks(pid, policy).map_err(gone)?;
        if !found.is_empty() {
            return Err(MoveError::Locked(found));
        }
        let offsets = compare_clocks(&mut channel)?;
        Ok(Self {
            pid,
            policy,
            line,
            channel,
            offsets,
            mirror: Mirror::new(),
            rounds: Vec::new(),
            pause: Duration::ZERO,
            is_away: false,
            frozen: None,
        })
    }

    fn run(&mut self, how: How) -> Result<Moved, MoveError> {
        if how == How::Stop {
            return self.freeze(&Tracker::none(self.pid), Method::Stop(StopReason::Asked));
        }
        for _ in 0..MAX_BEGINNINGS {
            let (mut tracker, files) = match self.track()? {
                Ok(both) => both,
                Err(reason) => return self.stop_and_copy(reason),
            };
            match self.precopy(&mut tracker, &files) {
                Ok(None) => {}
                Ok(Some(reason)) => return self.stop_and_copy(reason),
                Err(MoveError::Replaced) => continue,
                Err(error) => return Err(error),
            }
            match self.freeze(&tracker, Method::Precopy) {
                Err(MoveError::Replaced) => {}
                // The userfaultfd is closed here, when the process runs elsewhere.
                other => return other,
            }
        }
        self.stop_and_copy(StopReason::Replaced)
    }

    pub(super) fn stop_and_copy(&mut self, reason: StopReason) -> Result<Moved, MoveError> {
        tracing::debug!(pid = self.pid.as_raw_nonzero(), %reason, "no rounds of pre-copy");
        self.freeze(&Tracker::none(self.pid), Method::Stop(reason))
    }

    /// Stops the process for a moment and gives it a userfaultfd, of which it keeps
    /// nothing.
    pub(super) fn track(&mut self) -> Result<Result<(Tracker, Files), StopReason>, MoveError> {
        let (mut stopped, seen, begin) = self.stop()?;
        stopped.use_vdso(&seen.maps)?;
        let files = Files::open(self.pid)?;
        let (flags, pid) = ([UFFD_FLAGS, 0, 0, 0, 0, 0], self.pid);
        let number = libc::SYS_userfaultfd;
        let made =
            stopped.with_descriptor("userfaultfd", number, flags, |fd| get_descriptor(pid, fd));
        let ours = match made {
            Ok(ours) => ours,
            Err(TraceError::Injected { source, .. }) => {
                stopped.release()?;
                return Ok(Err(StopReason::Userfault(source.raw_os_error().unwrap_or(0))));
            }
            Err(error) => return Err(error.into()),
        };
        stopped.release()?;
        self.pause += begin.elapsed();
        let userfault = match ours.map(Userfault::new) {
            Ok(Ok(userfault)) => userfault,
            Ok(Err(_)) => return Ok(Err(StopReason::Kernel)),
            Err(error) => {
                return Ok(Err(StopReason::Userfault(error.raw_os_error().unwrap_or(0))));
            }
        };
        Ok(Ok((Tracker::new(self.pid, userfault), files)))
    }

    /// Sends rounds while they are worth it; a reason where they cannot be trusted.
    pub(super) fn precopy(
        &mut self,
        tracker: &mut Tracker,
        files: &Files,
    ) -> Result<Option<StopReason>, MoveError> {
        let mut before: Option<u64> = None;
        for number in 0..MAX_ROUNDS {
            // Before and after pages are protected: what is read in between is missed.
            if let Some(reason) = tracker.obstacle() {
                return Ok(Some(reason));
            }
            let begin = Instant::now();
            let mut target = Target { mirror: &mut self.mirror, channel: &mut self.channel };
            let pages = tracker.round(files, &mut target)?;
            self.pause += std::mem::take(&mut tracker.pause);
            // What is still on its way would otherwise be waited for in the freeze.
            self.channel.send(kind::ROUND, u32::try_from(number).unwrap_or(0), &[])?;
            expect(&mut self.channel, kind::ROUND)?;
            if let Some(reason) = tracker.obstacle() {
                return Ok(Some(reason));
            }
            self.rounds.push(Round { pages, time: begin.elapsed() });
            let makes_progress = before.is_none_or(|before| pages < before / 4 * 3);
            if pages < FEW_PAGES || !makes_progress {
                break;
            }
            before = Some(pages);
        }
        Ok(None)
    }

    /// Stops the process where its state can be told: in its own code, or in a deputy
    /// that waits for a call to end, or holds it. Not in the vDSO, whose data the other
    /// node does not have. Gives what it is, and when it was stopped.
    fn stop(&self) -> Result<(Stopped, Seen, Instant), MoveError> {
        /// A program that reads clocks all the time is found in the vDSO every time on
        /// processors that take interrupts at RDTSC: then it is led out.
        const CHANCES: u32 = 10;
        let mut in_vdso = 0;
        for _ in 0..400 {
            let begin = Instant::now();
            let mut stopped = Stopped::new(self.pid)?;
            let regs = stopped.regs();
            let waits = regs.rip == agent::ENTRY + entry::FINISH_END && is_to_restart(regs)
                || regs.rip == agent::ENTRY + entry::FINISH_SYSCALL
                || is_held(&stopped);
            if self.is_away {
                let seen = self.look(&stopped)?;
                return Ok((stopped, seen, begin));
            }
            if waits || !overlaps_region(regs.rip, regs.rip + 1) {
                let seen = self.look(&stopped)?;
                let vdso = seen.maps.iter().find(|mapping| mapping.backing == Backing::Vdso);
                let vdso = vdso.map_or(0..0, |vdso| vdso.start..vdso.end);
                if !vdso.contains(&stopped.regs().rip)
                    || in_vdso >= CHANCES && stopped.step_out_of(&vdso)?
                {
                    return Ok((stopped, seen, begin));
                }
                in_vdso += 1;
            }
            stopped.release()?;
            std::thread::sleep(Duration::from_micros(500));
        }
        Err(MoveError::Locked(vec![Lock::Reserved]))
    }

    /// Whether the stopped process may move, and what it is.
    fn look(&self, stopped: &Stopped) -> Result<Seen, MoveError> {
        if stopped.dispatches_calls() {
            return Err(MoveError::Locked(vec![Lock::SyscallDispatch]));
        }
        // Between looking and stopping the program may have become another one.
        let (found, seen) = locks_of_stopped(self.pid, self.policy).map_err(gone)?;
        if found.is_empty() { Ok(seen) } else { Err(MoveError::Locked(found)) }
    }

    /// Stops the process, sends the rest, and makes it the deputy of its remote half.
    pub(super) fn freeze(&mut self, tracker: &Tracker, method: Method) -> Result<Moved, MoveError> {
        let (mut stopped, seen, frozen) = self.stop()?;
        let files = Files::open(self.pid)?;
        if method == Method::Precopy && !files.is_registered() {
            return Err(MoveError::Replaced);
        }
        self.channel.hurry();
        let before = self.mirror.pages();
        // First, so that the other node takes it while calls are made here.
        let mut target = Target { mirror: &mut self.mirror, channel: &mut self.channel };
        tracker.rest(&files, &seen.maps, &mut target)?;
        let mut snapshot = Snapshot::take(&mut stopped, self.pid, &seen)?;
        let resident = Install::begin(&mut stopped, self.policy.is_deputy)?;
        let end = match self.transfer(&mut snapshot, &mut stopped) {
            Ok(end) => end,
            Err(error) => {
                resident.undo(&mut stopped);
                return Err(error);
            }
        };
        stopped.release()?;
        Ok(Moved {
            method,
            freeze: self.frozen.map_or(frozen, |at| at.min(frozen)).elapsed(),
            pause: self.pause,
            total: Duration::ZERO,
            rounds: std::mem::take(&mut self.rounds),
            areas: end.areas,
            pages: end.pages,
            frozen_pages: end.pages - before,
        })
    }

    fn transfer(
        &mut self,
        snapshot: &mut Snapshot,
        stopped: &mut Stopped,
    ) -> Result<End, MoveError> {
        let ours = [self.channel.stream().as_fd(), self.line.as_fd()];
        let [link, daemon] = pass(stopped, self.pid, ours)?;
        let mut hidden = vec![link, daemon];
        let sent = open_maps(stopped).and_then(|maps| {
            hidden.push(maps);
            snapshot.head.hidden_fds = [link, maps, daemon];
            self.finish(snapshot, stopped)
        });
        if sent.is_err() {
            for fd in hidden {
                close(stopped, fd);
            }
        }
        sent
    }

    /// Completes the image and, when the other node has it, turns the process into its
    /// deputy.
    fn finish(&mut self, snapshot: &Snapshot, stopped: &mut Stopped) -> Result<End, MoveError> {
        let channel = &mut self.channel;
        channel.send(kind::HEAD, 0, &[snapshot.head.as_bytes(), &snapshot.xsave])?;
        let end = End { areas: self.mirror.areas().len() as u64, pages: self.mirror.pages() };
        channel.send(kind::END, 0, &[end.as_bytes()])?;
        expect(channel, kind::PREPARED)?;
        channel.stream().set_read_timeout(None).map_err(ChannelError::from)?;
        channel.stream().set_write_timeout(None).map_err(ChannelError::from)?;
        write_boot(snapshot, stopped, channel, self.offsets)?;
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

/// Whether a deputy holds the program, which has come from one node and goes to another.
fn is_held(stopped: &Stopped) -> bool {
    let rip = stopped.regs().rip;
    overlaps_region(rip, rip + 1)
        && read_status(stopped.memory()).is_ok_and(|status| status.phase == phase::HELD)
}
