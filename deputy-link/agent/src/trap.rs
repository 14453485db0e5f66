//! The agent on the remote side: what happens when the program traps.
//!
//! ```text
//! SIGSYS ── table ──┬─ local ───► answered here
//!                   ├─ forward ─► CALL on the link, wait for REPLY
//!                   └─ no line ─► go home; the call runs there
//! SIGURG ─ the warden rings: a frame is on the link
//! SIGWINCH ─ the warden asks for a slice: sent home, and the program goes on
//! SIGSEGV, … ─ go home; the fault happens again there, natively
//! ```
//!
//! Context: on the agent's own stack, all signals blocked but the two faults that a
//! checked copy may raise.

use crate::capture::{self, Leave};
use crate::link::{Broken, Frame};
use crate::sys::{self, Context, Program};
use crate::{branch, clock, local, slice};
use conet_deputy_core::marshal::{self, NotForwarded, Plan, Signals};
use conet_deputy_core::table::{self, Class, Local};
use conet_wire::image::{Clocks, reason};
use conet_wire::link::{CHUNK, ComeHome, Request, kind};
use linux_raw_sys::general as nr;
use zerocopy::FromBytes;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// What the remote side keeps besides the link.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Remote {
    /// Sequence of the last call.
    pub(crate) seq: u32,
    /// The program's signals.
    pub(crate) signals: Signals,
    /// Descriptors at home that the program does not see, in ascending order.
    pub(crate) hidden_fds: [u64; 3],
    /// `/proc/self/maps`.
    pub(crate) maps: i32,
    /// `/proc/self/pagemap`.
    pub(crate) pagemap: i32,
    /// Whether the kernel tells what has changed.
    pub(crate) tracks: bool,
    /// What to add to local clocks.
    pub(crate) offsets: Clocks,
    /// Home has asked for the program.
    pub(crate) asked: bool,
    /// Processor time used at home, in nanoseconds.
    pub(crate) cpu_time: i64,
    /// The process's id.
    pub(crate) pid: u64,
    /// How many of those whose child it is share its memory: `vfork` within `vfork`.
    pub(crate) depth: usize,
    /// Home wants to know how long calls take.
    pub(crate) is_timed: bool,
    /// How long the last one took, in nanoseconds, where it was timed.
    pub(crate) took: u64,
    /// Where the next slice begins.
    pub(crate) slice_at: u64,
}

impl Remote {
    pub(crate) const fn new() -> Self {
        Self {
            seq: 0,
            signals: Signals { blocked: 0, handled: 0 },
            hidden_fds: [0; 3],
            maps: 0,
            pagemap: 0,
            tracks: false,
            offsets: Clocks { realtime: 0, monotonic: 0, boottime: 0, raw: 0 },
            asked: false,
            cpu_time: 0,
            pid: 0,
            depth: 0,
            is_timed: false,
            took: 0,
            slice_at: 0,
        }
    }
}

/// Why a call has no result here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Away {
    /// It is not one that can be forwarded.
    GoHome,
    /// Home asked for the program, before the call ran.
    Asked,
    /// Home asked for the program; the call is pending there.
    AskedPending,
    /// No child is made away, because of one of [`conet_wire::family::why`].
    NotForked(u64),
}

/// Home asked for the program, and nothing is under way.
const ASKED: Leave = Leave { rewind: false, pending: false, reason: reason::ASKED, detail: 0 };

/// A system call trapped.
pub(crate) fn on_call(context: &mut Context, number: u32, arch: u32) {
    let detail = u64::from(number);
    if arch != AUDIT_ARCH_X86_64 {
        let leave = Leave { rewind: true, reason: reason::CALL_32, detail, ..ASKED };
        capture::go_home(context, leave);
    }
    let vdso = sys::inside(context.rip, true);
    if vdso.is_some() {
        sys::restore_return();
    }
    let args = context.args();
    let result = match table::lookup(detail) {
        // The deputy waits for the image and takes no more calls.
        _ if sys::state().remote.asked => Err(Away::Asked),
        None => Err(Away::GoHome),
        Some(Class::Local(Local::Fork)) => branch::run(number, &args, context),
        Some(Class::Local(which)) => local::run(which, number, &args),
        Some(class) => call(class, number, &args),
    };
    let leave = match result {
        Ok(value) => {
            context.rax = value.cast_unsigned();
            if !sys::state().remote.asked {
                return;
            }
            ASKED
        }
        Err(Away::GoHome) => Leave { rewind: true, reason: reason::CALL, detail, ..ASKED },
        Err(Away::NotForked(detail)) => {
            Leave { rewind: true, reason: reason::FORK, detail, ..ASKED }
        }
        Err(Away::Asked) => Leave { rewind: true, ..ASKED },
        Err(Away::AskedPending) => Leave { pending: true, ..ASKED },
    };
    match vdso {
        // The stub does not exist at home: there the function begins, or has ended.
        Some(sys::Inside::Begin(entry)) if leave.rewind => {
            context.rip = entry;
            capture::go_home(context, Leave { rewind: false, ..leave });
        }
        Some(_) if !sys::finish_return(context) => give_up(),
        _ => capture::go_home(context, leave),
    }
}

/// The warden rang.
pub(crate) fn on_bell(context: &mut Context) {
    if !sys::state().remote.asked && !has_asked() {
        return;
    }
    sys::state().remote.asked = true;
    match sys::inside(context.rip, false) {
        None => capture::go_home(context, ASKED),
        Some(sys::Inside::Begin(entry)) => {
            context.rip = entry;
            capture::go_home(context, ASKED);
        }
        Some(sys::Inside::Return) => {
            if sys::finish_return(context) {
                capture::go_home(context, ASKED);
            }
            give_up();
        }
        Some(sys::Inside::Midst) => sys::stop_at_return(context),
    }
}

/// The warden asks for a slice of what the program has changed.
pub(crate) fn on_slice() {
    // Whoever goes home takes all along.
    if !sys::state().remote.asked && slice::send().is_err() {
        give_up();
    }
}

/// Whether home's wish is on the link.
fn has_asked() -> bool {
    let link = &mut sys::state().link;
    // Only the first read may find nothing: the bell can be early, and rings again.
    let began = core::cell::Cell::new(link.has_begun());
    let read = |fd: i32, into: &mut [u8]| {
        let n = sys::receive(fd, into, if began.get() { 0 } else { 0x40 });
        if n > 0 {
            began.set(true);
        }
        if n == -11 { conet_deputy_core::boot::ABORTED } else { n }
    };
    match link.receive(read) {
        Ok(frame) if come_home(&frame).is_some() => true,
        Err(Broken::Interrupted) => false,
        Ok(_) | Err(_) => give_up(),
    }
}

/// The program faulted.
pub(crate) fn on_fault(context: &mut Context, signal: u32) {
    if sys::has_returned(context) {
        capture::go_home(context, ASKED);
    }
    // In a function of the vDSO: it faults again in home's.
    sys::undo(context);
    let leave =
        Leave { rewind: false, pending: false, reason: reason::FAULT, detail: u64::from(signal) };
    capture::go_home(context, leave);
}

/// Without a link, or with one that lies, this half has no business here; the
/// deputy has ended the process, or its node ends it.
pub(crate) fn give_up() -> ! {
    sys::exit(0)
}

pub(crate) fn come_home(frame: &Frame) -> Option<ComeHome> {
    let body = sys::state().link.received(frame);
    (frame.header.kind == kind::COME_HOME)
        .then(|| ComeHome::read_from_prefix(body).ok().map(|(come, _)| come))
        .flatten()
}

/// A call of the table, in as many pieces as it needs.
pub(crate) fn call(class: Class, number: u32, args: &[u64; 6]) -> Result<i64, Away> {
    let chunked =
        matches!(number, nr::__NR_read | nr::__NR_write | nr::__NR_pread64 | nr::__NR_pwrite64)
            || number == nr::__NR_sendto && args[4] == 0;
    if !chunked || args[2] <= CHUNK as u64 {
        return forward(class, number, args);
    }
    let mut done = 0u64;
    loop {
        let mut piece = *args;
        piece[1] = args[1].wrapping_add(done);
        piece[2] = args[2] - done;
        if matches!(number, nr::__NR_pread64 | nr::__NR_pwrite64) {
            piece[3] = args[3].wrapping_add(done);
        }
        match forward(class, number, &piece) {
            Ok(n) if n > 0 => {
                done += n.cast_unsigned();
                let full = n == CHUNK as i64;
                // More of a pipe may not come for long; more of a file is there.
                if !full
                    || done >= args[2]
                    || (number == nr::__NR_read && done == CHUNK as u64 && !is_seekable(args[0]))
                {
                    return Ok(done.cast_signed());
                }
            }
            // What was transferred is told; what follows the next call will tell.
            Ok(_) | Err(Away::Asked) if done > 0 => return Ok(done.cast_signed()),
            other => return other,
        }
    }
}

fn is_seekable(fd: u64) -> bool {
    const SEEK_CUR: u64 = 1;
    plain(nr::__NR_lseek, [fd, 0, SEEK_CUR, 0, 0, 0]).is_ok_and(|at| at >= 0)
}

/// Forwards a call whose arguments are values.
pub(crate) fn plain(number: u32, args: [u64; 6]) -> Result<i64, Away> {
    forward(Class::Forward(&[]), number, &args)
}

/// One request, one reply.
fn forward(class: Class, number: u32, args: &[u64; 6]) -> Result<i64, Away> {
    let state = sys::state();
    let body = state.link.body();
    match marshal::request(class, number, args, state.remote.signals, &Program, body) {
        Ok(plan) => exchange(&plan),
        Err(NotForwarded::Errno(error)) => Ok(-i64::from(error)),
        Err(NotForwarded::GoHome) => Err(Away::GoHome),
    }
}

/// A request with buffers of the agent's own; outputs are not stored.
pub(crate) fn with_inputs(
    request: Request,
    descs: &[conet_wire::link::Desc],
    inputs: &[&[u8]],
) -> Result<i64, Away> {
    let plan = Plan::with(request, descs, inputs, sys::state().link.body());
    exchange(&plan.map_err(|_| Away::GoHome)?)
}

/// Sends the request that lies in the link's body and takes the reply.
fn exchange(plan: &Plan) -> Result<i64, Away> {
    let state = sys::state();
    state.remote.seq = state.remote.seq.wrapping_add(1);
    let seq = state.remote.seq;
    let took = core::mem::take(&mut state.remote.took);
    let field = core::mem::offset_of!(Request, took);
    state.link.body()[field..field + 8].copy_from_slice(&took.to_le_bytes());
    let begin = state.remote.is_timed.then(clock::ticks);
    if state.link.send(kind::CALL, seq, plan.len).is_err() {
        give_up();
    }
    let result = wait_for(seq, Some(plan));
    if let Some(begin) = begin {
        sys::state().remote.took = clock::ticks().saturating_sub(begin);
    }
    result
}

/// Waits for the reply to call `seq`; without a plan, for one that another agent
/// began.
pub(crate) fn wait_for(seq: u32, plan: Option<&Plan>) -> Result<i64, Away> {
    let Ok(frame) = sys::state().link.expect(sys::receive) else { give_up() };
    if let Some(come) = come_home(&frame) {
        sys::state().remote.asked = true;
        return Err(if come.pending == 1 { Away::AskedPending } else { Away::Asked });
    }
    if !matches!(frame.header.kind, kind::REPLY | kind::REPLY_TIMED) || frame.header.seq != seq {
        give_up();
    }
    sys::state().remote.is_timed = frame.header.kind == kind::REPLY_TIMED;
    let body = sys::state().link.received(&frame);
    let result = match plan {
        Some(plan) => plan.store(body, &mut Program),
        None => crate::local::store_pending(body),
    };
    result.map_or_else(|_| give_up(), Ok)
}
