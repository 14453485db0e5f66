//! The way out: from a process at home to a deputy and its remote half.

use super::clocks::compare_clocks;
use super::install::{Install, close, deputy_regs, open_maps, pass, write_boot};
use super::{MoveError, Moved, expect, gone};
use crate::agent;
use crate::channel::{Channel, ChannelError, LinkSecret};
use crate::family::DeputyEnd;
use crate::image::{Snapshot, is_to_restart};
use crate::locks::{Lock, Policy, locks, locks_of_stopped};
use crate::procfs;
use crate::sys::ptrace::Stopped;
use conet_deputy_core::areas::Backing;
use conet_deputy_core::boot::entry;
use conet_wire::image::{End, overlaps_region};
use conet_wire::link::kind;
use rustix::process::Pid;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How long the other node may take for one step of a move.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);

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
    line: &DeputyEnd,
) -> Result<Moved, MoveError> {
    let begin = Instant::now();
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
    let end = match transfer(&mut snapshot, &mut stopped, pid, &mut channel, line) {
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

fn transfer(
    snapshot: &mut Snapshot,
    stopped: &mut Stopped,
    pid: Pid,
    channel: &mut Channel,
    line: &DeputyEnd,
) -> Result<End, MoveError> {
    let [link, daemon] = pass(stopped, pid, [channel.stream().as_fd(), line.as_fd()])?;
    let mut hidden = vec![link, daemon];
    let sent = open_maps(stopped).and_then(|maps| {
        hidden.push(maps);
        snapshot.head.hidden_fds = [link, maps, daemon];
        finish_transfer(snapshot, stopped, pid, channel)
    });
    if sent.is_err() {
        for fd in hidden {
            close(stopped, fd);
        }
    }
    sent
}

/// Sends the image and, when the other node has it, turns the process into its
/// deputy.
fn finish_transfer(
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
