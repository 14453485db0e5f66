//! From one node straight to another.
//!
//! ```text
//! runs at the first ─ (slices: what it has changed comes home) ─ rounds: what home has goes
//!        to the second ─ slices, rounds: what was changed meanwhile
//! stopped there ─ what it changed comes home, as if it came home itself ─ HELD
//! the deputy is stopped ─ what came goes to the second, and its state ─ PREPARED?
//!        ─ the deputy's registers ─ let go, it sends COMMIT ─ runs at the second
//! ```
//!
//! Home has the program's memory as it was when it left, in the deputy, and what comes
//! back is merged there; so the deputy's memory is what is followed and copied, by the
//! same means as a program's own ([`super::tracker`]), and a program that has come home
//! but has not been let run is a process to be moved like any other.
//!
//! Invariant: the program lives at one place. Until its image begins to come, that is
//! the first node, where it runs; then home, where it is stopped, and where it goes on
//! if the second node fails, its mover dies or a handled signal waits; after COMMIT the
//! second node. The first node needs to know nothing of this.

use super::home::{fetch, let_go};
use super::out::{How, MAX_BEGINNINGS, Method, Out, StopReason};
use super::slices::slices_within;
use super::tracker::Tracker;
use super::{MoveError, Moved, Returned, gone};
use crate::channel::LinkSecret;
use crate::family::DeputyEnd;
use crate::locks::Policy;
use crate::procfs;
use conet_deputy_core::boot::{STATE, phase};
use conet_wire::image::Head;
use rustix::process::Pid;
use rustix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use zerocopy::FromBytes;

/// How long slices may take while the second node waits.
const MEANWHILE: Duration = Duration::from_secs(1);

/// How a move from one node to another went.
#[derive(Debug)]
pub struct Relayed {
    /// How the program left the first node; none where it is still there.
    pub returned: Option<Returned>,
    /// How it came to the second.
    ///
    /// # Errors
    /// Where it left the first node it is at home.
    pub moved: Result<Moved, MoveError>,
    /// Whether it did not run in between.
    pub is_direct: bool,
}

/// What the warden of a program that is away is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// To ring the bell, as for [`super::bring_home`].
    Bell,
    /// A slice, as for [`super::slices`].
    Slice,
}

/// Moves a program that is away on to another node, without running at home in
/// between unless something goes wrong. `stream`, `secret` and `line` are as
/// for [`super::move_out`].
///
/// What it has changed since it left should come home before ([`super::slices`]), and
/// before the link is made, as the second node does not wait for long.
#[must_use]
pub fn move_on(
    pid: Pid,
    stream: TcpStream,
    secret: LinkSecret,
    policy: Policy,
    how: How,
    line: &DeputyEnd,
    mut ask: impl FnMut(Wish),
) -> Relayed {
    let begin = Instant::now();
    let mut relayed = Relayed { returned: None, moved: Err(MoveError::Late), is_direct: false };
    let begun = Out::begin(pid, stream, secret, policy, line);
    let moved = begun.and_then(|out| relay(out, how, &mut ask, &mut relayed));
    if moved.is_err() {
        let_go(pid);
    }
    relayed.moved = moved.map(|moved| Moved { total: begin.elapsed(), ..moved });
    relayed
}

fn relay(
    mut out: Out<'_>,
    how: How,
    ask: &mut impl FnMut(Wish),
    relayed: &mut Relayed,
) -> Result<Moved, MoveError> {
    let pid = out.pid;
    out.is_away = true;
    let (tracker, method) = ahead(&mut out, how, ask)?;
    out.is_away = false;
    let asked = Instant::now();
    let status = fetch(pid, true, &mut || ask(Wish::Bell))?;
    relayed.returned = Some(Returned::new(&status, asked.elapsed()));
    relayed.is_direct = status.phase != phase::HOME;
    out.frozen = relayed.is_direct.then(|| stopped_at(pid, asked));
    match out.freeze(&tracker, method) {
        Err(MoveError::Replaced) => out.stop_and_copy(StopReason::Replaced),
        other => other,
    }
}

/// Sends what home has, and what the first node changes meanwhile, while the program runs
/// there.
fn ahead(
    out: &mut Out<'_>,
    how: How,
    ask: &mut impl FnMut(Wish),
) -> Result<(Tracker, Method), MoveError> {
    let none = |out: &Out<'_>, reason| Ok((Tracker::none(out.pid), Method::Stop(reason)));
    if how == How::Stop {
        return none(out, StopReason::Asked);
    }
    for _ in 0..MAX_BEGINNINGS {
        let (mut tracker, files) = match out.track()? {
            Ok(both) => both,
            Err(reason) => return none(out, reason),
        };
        let mut sent = out.precopy(&mut tracker, &files);
        if matches!(sent, Ok(None)) && slices_within(MEANWHILE, out.pid, || ask(Wish::Slice))? > 0 {
            sent = out.precopy(&mut tracker, &files);
        }
        match sent {
            Ok(None) => return Ok((tracker, Method::Precopy)),
            Ok(Some(reason)) => return none(out, reason),
            // Or it has ended, which the next stop finds.
            Err(MoveError::Replaced) => {}
            Err(error) => return Err(error),
        }
    }
    none(out, StopReason::Replaced)
}

/// When the program ran its last instruction, as its image says by home's clock; not
/// before it was asked for, whatever the image says.
fn stopped_at(pid: Pid, asked: Instant) -> Instant {
    let now = Instant::now();
    let mut bytes = vec![0; size_of::<Head>()];
    let read = File::open(procfs::path(pid, "mem"))
        .map_err(gone)
        .and_then(|memory| memory.read_exact_at(&mut bytes, STATE).map_err(gone));
    let head = read.ok().and_then(|()| Head::read_from_bytes(&bytes).ok());
    let time = clock_gettime(ClockId::Monotonic);
    let ago = head.map_or(0, |head| {
        let nanos = time.tv_sec.wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec);
        nanos.wrapping_sub(head.clocks.monotonic)
    });
    let ago = Duration::from_nanos(u64::try_from(ago).unwrap_or(0));
    now.checked_sub(ago).map_or(asked, |at| at.max(asked))
}
