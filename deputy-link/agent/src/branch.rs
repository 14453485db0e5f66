//! A remote that divides: `fork`, `vfork` and `clone` away from home.
//!
//! ```text
//! parent                          warden          deputy
//! FORK ─────────────────────────────────────────► has its daemon make a link
//!                                 link, keys ◄─── (over the two daemons)
//! takes them ◄─────────────────── hands them on
//!            ◄─────────────────────────────────── BRANCH: by this name
//! clone ─► child: its own maps ─► is here
//!                 READY on the new link ────────► forks: its child has that link
//! goes on ◄────────────────────────────────────── REPLY: the child's id
//!          child runs ◄────────────────────────── BORN, once its daemon has noted it
//! ```
//!
//! Nothing of this can be seen before the deputy forks: whatever fails until then takes
//! the parent home, where it makes its child itself, and the half-made child ends.
//!
//! A child by `vfork` shares its parent's memory, the agent's included. The parent
//! waits in the kernel meanwhile and keeps its state aside; the child has a stack and
//! buffers of its own, by its depth, enters the program by `rt_sigreturn` and returns
//! through none of the parent's frames.

use crate::capture::{self, Leave};
use crate::link;
use crate::sys::{self, Context, Program};
use crate::tracking;
use crate::trap::{Away, come_home, give_up, wait_for};
use conet_deputy_core::boot::family::{LinkKeys, Ticket, ToWarden, remote_fd};
use conet_deputy_core::boot::warden;
use conet_deputy_core::marshal::{Memory, Plan};
use conet_wire::family::{Born, Branch, Fork, clone, not_forked, why};
use conet_wire::image::{MAX_XSAVE, reason};
use conet_wire::link::{ReplyHead, Request, kind};
use linux_raw_sys::general as nr;
use zerocopy::{FromBytes, FromZeros};

const SIGCHLD: u64 = 17;

/// What a call asks for.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    flags: u64,
    /// Stack pointer of the child; its parent's where 0.
    stack: u64,
    parent_tid: u64,
    child_tid: u64,
}

impl Wanted {
    /// Reads a call's arguments; `None` for what is made at home only.
    fn of(number: u32, args: &[u64; 6]) -> Option<Self> {
        let wanted = match number {
            nr::__NR_fork => Self::default(),
            nr::__NR_vfork => Self { flags: clone::VM | clone::VFORK, ..Self::default() },
            nr::__NR_clone if args[0] & 0xff == SIGCHLD => Self {
                // The kernel takes 32 bits of them.
                flags: args[0] & 0xffff_ff00,
                stack: args[1],
                parent_tid: args[2],
                child_tid: args[3],
            },
            nr::__NR_clone3 => Self::of_clone3(args)?,
            _ => return None,
        };
        const KNOWN: u64 =
            clone::AT_HOME | clone::PARENT_SETTID | clone::CHILD_SETTID | clone::VM | clone::VFORK;
        // One of the two without the other is a thread, or waits for a copy.
        let is_whole = (wanted.flags & clone::VM == 0) == (wanted.flags & clone::VFORK == 0);
        (wanted.flags & !KNOWN == 0 && is_whole).then_some(wanted)
    }

    /// `clone3(args, size)`, man 2 clone.
    fn of_clone3(args: &[u64; 6]) -> Option<Self> {
        // Its sizes so far: Linux 5.3, 5.5, 5.7.
        let words = match args[1] {
            64 => 8,
            80 => 10,
            88 => 11,
            _ => return None,
        };
        let mut bytes = [0; 88];
        Program.read(args[0], &mut bytes[..8 * words]).ok()?;
        let mut word = [0; 11];
        for (word, bytes) in word.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        let [
            flags,
            _pidfd,
            child_tid,
            parent_tid,
            signal,
            stack,
            stack_len,
            tls,
            ids,
            id_count,
            cgroup,
        ] = word;
        let is_plain = signal == SIGCHLD && (tls, ids, id_count, cgroup) == (0, 0, 0, 0);
        // What is wrong about a stack, the kernel at home says.
        let is_stack = (stack == 0) == (stack_len == 0);
        (is_plain && is_stack).then_some(Self {
            flags,
            stack: stack.wrapping_add(stack_len),
            parent_tid,
            child_tid,
        })
    }

    const fn shares(&self) -> bool {
        self.flags & clone::VM != 0
    }
}

/// A child that is about to begin.
pub(crate) struct Child {
    wanted: Wanted,
    ticket: Ticket,
    keys: LinkKeys,
    /// Link and socket to the warden, where they came in.
    fds: [i32; 2],
    /// Where the parent's signal frame is.
    context: u64,
}

impl Child {
    /// The parent's copies are of no use to it.
    fn let_go(&mut self) {
        for fd in self.fds {
            sys::close(fd);
        }
        self.keys.zero();
    }
}

/// Divides the process: the child's id, or 0 in the child.
pub(crate) fn run(number: u32, args: &[u64; 6], context: &mut Context) -> Result<i64, Away> {
    let wanted = Wanted::of(number, args).ok_or(Away::GoHome)?;
    if wanted.shares() && sys::state().remote.depth == sys::MAX_DEPTH {
        return Err(Away::NotForked(why::DEPTH));
    }
    // A reply without outputs.
    let plan = Plan::with(Request::default(), &[], &[], sys::state().link.body());
    let plan = plan.map_err(|_| Away::GoHome)?;
    let seq = ask(&wanted)?;
    let ticket = branch(seq)?;
    let (keys, fds) = take(&ticket)?;
    let mut child = Child { wanted, ticket, keys, fds, context: context.addr() };
    let pid = if wanted.shares() {
        divide_shared(&mut child)
    } else {
        match sys::divide() {
            0 => {
                begin(&mut child);
                if wanted.stack != 0 {
                    context.rsp = wanted.stack;
                }
                return Ok(0);
            }
            pid => pid,
        }
    };
    child.let_go();
    if pid < 0 {
        return Err(Away::NotForked(why::LIMIT));
    }
    let result = wait_for(seq, Some(&plan))?;
    if let Some(cause) = not_forked(result) {
        return Err(Away::NotForked(cause));
    }
    if result > 0 && wanted.flags & clone::PARENT_SETTID != 0 {
        store_id(wanted.parent_tid, result.cast_unsigned());
    }
    Ok(result)
}

/// The kernel, too, does not mind where this fails.
fn store_id(addr: u64, id: u64) {
    Program.write(addr, &id.to_le_bytes()[..4]).ok();
}

fn ask(wanted: &Wanted) -> Result<u32, Away> {
    let state = sys::state();
    let fork = Fork {
        flags: wanted.flags & clone::AT_HOME,
        child_tid: wanted.child_tid,
        shares: u32::from(wanted.shares()),
        reserved: 0,
    };
    state.remote.seq = state.remote.seq.wrapping_add(1);
    let seq = state.remote.seq;
    if state.link.send_value(kind::FORK, seq, &fork).is_err() {
        give_up();
    }
    Ok(seq)
}

/// Waits for however long the other half is silent: that is its node's to judge.
fn wait(fd: i32, into: &mut [u8]) -> i64 {
    sys::receive(fd, into, 0)
}

/// Waits for the deputy's word that there is a link for the child.
fn branch(seq: u32) -> Result<Ticket, Away> {
    let Ok(frame) = sys::state().link.receive(wait) else { give_up() };
    if come_home(&frame).is_some() {
        sys::state().remote.asked = true;
        return Err(Away::Asked);
    }
    if frame.header.seq != seq {
        give_up();
    }
    let body: &[u8] = sys::state().link.received(&frame);
    match frame.header.kind {
        kind::BRANCH => match Branch::read_from_prefix(body) {
            Ok((branch, _)) => Ok(branch.ticket),
            Err(_) => give_up(),
        },
        kind::REPLY => {
            let result = ReplyHead::read_from_prefix(body).map_or(0, |(head, _)| head.result);
            Err(Away::NotForked(not_forked(result).unwrap_or_else(|| give_up())))
        }
        _ => give_up(),
    }
}

/// Takes the child's link from the warden.
fn take(ticket: &Ticket) -> Result<(LinkKeys, [i32; 2]), Away> {
    let mut bytes = [0; size_of::<ToWarden>()];
    let beside = loop {
        let beside = sys::receive_beside(remote_fd::WARDEN, &mut bytes, 0);
        if beside.len != -4 {
            break beside;
        }
    };
    let handed = ToWarden::read_from_bytes(&bytes).unwrap_or_default();
    bytes.fill(0);
    let is_ours = beside.len == bytes.len() as i64
        && handed.kind == warden::BRANCH
        && handed.child == *ticket
        && beside.fds.iter().all(|fd| *fd >= remote_fd::FREE);
    if is_ours {
        return Ok((handed.keys, beside.fds));
    }
    for fd in beside.fds.into_iter().filter(|fd| *fd >= remote_fd::FREE) {
        sys::close(fd);
    }
    Err(Away::NotForked(why::NO_LINK))
}

/// In the child: becomes a remote of its own, and waits until it is born.
fn begin(child: &mut Child) {
    let [link_fd, warden_fd] = child.fds;
    let is_placed = sys::put_in_place(link_fd, remote_fd::LINK)
        && sys::put_in_place(warden_fd, remote_fd::WARDEN);
    let own = sys::open_own(remote_fd::PROC).map(|fd| i32::try_from(fd).unwrap_or(-1));
    let [maps, pagemap] = own;
    if !is_placed || own.iter().any(|fd| *fd < 0) {
        give_up();
    }
    tracking::end(maps);
    if !sys::put_in_place(maps, remote_fd::MAPS) || !sys::put_in_place(pagemap, remote_fd::PAGEMAP)
    {
        give_up();
    }
    sys::send(remote_fd::WARDEN, &child.ticket);
    let state = sys::state();
    let set = state.link.set;
    state.link.start(remote_fd::LINK, set, &child.keys.into());
    child.keys.zero();
    let remote = &mut state.remote;
    remote.seq = 0;
    remote.cpu_time = 0;
    (remote.is_timed, remote.took) = (false, 0);
    if child.wanted.flags & clone::CLEAR_SIGHAND != 0 {
        remote.signals.handled = 0;
    }
    if state.link.send(kind::READY, 0, 0).is_err() {
        give_up();
    }
    let Ok(frame) = state.link.receive(wait) else { give_up() };
    let born = Born::read_from_prefix(state.link.received(&frame));
    let Ok((born, _)) = born else { give_up() };
    if frame.header.kind != kind::BORN {
        give_up();
    }
    remote.pid = u64::from(born.pid);
    remote.asked = born.come_home == 1;
    if child.wanted.flags & clone::CHILD_SETTID != 0 {
        store_id(child.wanted.child_tid, u64::from(born.pid));
    }
}

/// `vfork`: comes back, in the parent, when the child shares its memory no more.
fn divide_shared(child: &mut Child) -> i64 {
    let state = sys::state();
    let depth = state.remote.depth + 1;
    let mut remote = state.remote;
    remote.depth = depth;
    let keys = core::mem::take(&mut child.keys);
    let begun = Child { keys, ..*child };
    let mut link = link::Link::none();
    link.set = u32::try_from(depth).unwrap_or(0);
    let of_child = sys::State { link, remote, child: Some(begun) };
    let own = core::mem::replace(state, of_child);
    let pid = sys::divide_shared(depth);
    *sys::state() = own;
    sys::forget_return();
    pid
}

/// Where a child that shares its parent's memory begins, on a stack of its own.
pub(crate) fn begin_shared() -> ! {
    let depth = sys::state().remote.depth;
    // Faults of checked copies must not be handled on the parent's stack.
    let stack = sys::handler_stack(depth);
    sys::alt_stack(Some(&stack));
    let Some(mut child) = sys::state().child.take() else { give_up() };
    begin(&mut child);
    let context = Context::at(child.context);
    let mut registers = context.registers();
    registers.rax = 0;
    if child.wanted.stack != 0 {
        registers.rsp = child.wanted.stack;
    }
    let mut xsave = [0; MAX_XSAVE];
    let len = context.copy_xsave(&mut xsave);
    if sys::state().remote.asked {
        let leave = Leave { rewind: false, pending: false, reason: reason::ASKED, detail: 0 };
        capture::send_home(&registers, &xsave[..len], leave);
    }
    sys::resume(&registers, &xsave[..len], 0, &stack)
}
