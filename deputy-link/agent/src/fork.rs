//! A deputy that divides: the home side of [`crate::branch`].
//!
//! The process's child at home is made by the process, so that its parent, its files,
//! its terminal, process group and session are what they always are. Until it is made
//! everything can be undone, and is: the program comes home and forks there.
//!
//! ```text
//! FORK ─► room for two descriptors? ─► daemon: FORK ─► link, socket ─► BRANCH
//!      ─► READY on the new link | HEAD on the old (it leaves) | the new link ends
//!      ─► clone ─┬─ parent: REPLY
//!                └─ child: descriptors in place ─ daemon: BORN ─ NOTED ─► BORN ─► serves
//! ```

use crate::deputy::{Deputy, gated_receive, lost, status};
use crate::link::{self, Broken, Frame, Link};
use crate::sys;
use conet_deputy_core::boot::family::{ToDeputy, to_daemon};
use conet_deputy_core::boot::{PARKED, Pending, Status, fault, phase};
use conet_wire::family::{Born, Branch, Fork, NOT_FORKED, clone, why};
use conet_wire::image::{REGION, REGION_LEN};
use conet_wire::link::{ReplyHead, kind};
use linux_raw_sys::general as nr;
use zerocopy::FromBytes;

fn gated_wait(fd: i32, into: &mut [u8]) -> i64 {
    gated_receive(fd, into, 0)
}

/// The parent's process id; 1 where it is not to be seen.
fn parent() -> u32 {
    u32::try_from(sys::plain(nr::__NR_getppid, [0; 6])).unwrap_or(0).max(1)
}

/// Why no child was made.
enum Undone {
    /// The program makes it at home, because of one of [`why`].
    Impossible(u64),
    /// The program is wanted home.
    Wanted,
    /// It comes by itself, and this is the first frame.
    Leaves(Frame),
}

/// What came from the daemon for the child: closed unless it is used.
struct Given {
    link: i32,
    daemon: i32,
    answer: ToDeputy,
}

impl Drop for Given {
    fn drop(&mut self) {
        for fd in [self.link, self.daemon].into_iter().filter(|fd| *fd >= 0) {
            sys::close(fd);
        }
    }
}

impl Deputy {
    /// Makes a child, or tells why not.
    pub(crate) fn fork(&mut self, frame: &Frame) {
        let seq = frame.header.seq;
        if seq != self.done.wrapping_add(1) {
            lost(fault::PROTOCOL, u64::from(seq));
        }
        let body = sys::state().link.received(frame);
        let fork = match Fork::read_from_prefix(body) {
            Ok((fork, _)) if fork.is_possible() => fork,
            _ => lost(fault::PROTOCOL, 0),
        };
        status().last_call = u64::from(nr::__NR_clone);
        let result = match self.divide(&fork, seq) {
            Ok(0) => return, // the child; its state is its own
            Ok(result) => result,
            Err(Undone::Impossible(cause)) => NOT_FORKED + cause.cast_signed(),
            Err(Undone::Wanted) => self.come_home(false),
            Err(Undone::Leaves(frame)) => self.take_home(Some(&frame)),
        };
        status().calls += 1;
        self.done = seq;
        let link = &mut sys::state().link;
        if link.send_value(kind::REPLY, seq, &ReplyHead { result }).is_err() {
            lost(fault::END, 0);
        }
    }

    /// The child's id or −errno in the parent; 0 in the child.
    fn divide(&mut self, fork: &Fork, seq: u32) -> Result<i64, Undone> {
        self.has_room()?;
        let given = self.ask_daemon()?;
        let own = &mut sys::state().link;
        let mut link = Link::none();
        // Nothing is pending, so the other buffers are free.
        link.start(given.link, 1 - own.set, &given.answer.keys.into());
        if own.send_value(kind::BRANCH, seq, &Branch { ticket: given.answer.ticket }).is_err() {
            lost(fault::END, 0);
        }
        self.wait_for_child(&mut link)?;
        // Or the child would be without its deputy's code (marked by an earlier return).
        const MADV_DOFORK: u64 = 11;
        sys::plain(nr::__NR_madvise, [REGION, REGION_LEN, MADV_DOFORK, 0, 0, 0]);
        let pid = sys::fork_at_home(fork.flags, fork.child_tid);
        if pid == 0 {
            self.become_child(fork, link, given);
        }
        Ok(pid)
    }

    /// Whether a child could have what it needs: afterwards nothing could be undone.
    fn has_room(&self) -> Result<(), Undone> {
        const NO_FILES: Undone = Undone::Impossible(why::NO_FILES);
        if self.daemon < 0 {
            return Err(Undone::Impossible(why::NO_DAEMON));
        }
        let highest = sys::state().link.fd.max(sys::lists().maps).max(self.daemon);
        if u64::try_from(highest).map_or(true, |fd| fd >= sys::descriptor_limit()) {
            return Err(NO_FILES);
        }
        match i32::try_from(sys::open_maps()) {
            Ok(maps) if maps >= 0 => sys::close(maps),
            _ => return Err(NO_FILES),
        }
        Ok(())
    }

    fn ask_daemon(&self) -> Result<Given, Undone> {
        const NO_DAEMON: Undone = Undone::Impossible(why::NO_DAEMON);
        if sys::send(self.daemon, &[to_daemon::FORK]) != 1 {
            return Err(NO_DAEMON);
        }
        let mut bytes = [0; size_of::<ToDeputy>()];
        let beside = loop {
            let beside = sys::receive_message(self.daemon, &mut bytes, 0, sys::gate);
            if link::is_aborted(beside.len) {
                return Err(Undone::Wanted);
            }
            // A signal, or the daemon's interruption: the gate knows.
            if beside.len != -4 {
                break beside;
            }
        };
        let [link, daemon] = beside.fds;
        let answer = ToDeputy::read_from_bytes(&bytes).unwrap_or_default();
        bytes.fill(0);
        let given = Given { link, daemon, answer };
        if beside.len != bytes.len() as i64 {
            return Err(NO_DAEMON);
        }
        if given.answer.refused != 0 {
            return Err(Undone::Impossible(given.answer.refused.min(why::LAST)));
        }
        if given.link < 0 || given.daemon < 0 {
            return Err(Undone::Impossible(why::NO_FILES));
        }
        Ok(given)
    }

    /// Waits until the child's remote half is there, or its parent's leaves.
    fn wait_for_child(&self, link: &mut Link) -> Result<(), Undone> {
        const POLLIN: u16 = 1;
        let entry = |fd| sys::PollFd { fd, events: POLLIN, revents: 0 };
        let mut fds = [entry(sys::state().link.fd), entry(link.fd)];
        loop {
            let args = [fds.as_mut_ptr() as u64, fds.len() as u64, 0, 0, 0, 0];
            match sys::gate(nr::__NR_ppoll, &args) {
                n if link::is_aborted(n) || n == PARKED => return Err(Undone::Wanted),
                n if n < 0 && n != -4 => return Err(Undone::Impossible(why::LINK)),
                _ => {}
            }
            let [own, new] = core::hint::black_box(&fds).map(|fd| fd.revents != 0);
            if own {
                return Err(match sys::state().link.receive(gated_wait) {
                    Ok(frame) if frame.header.kind == kind::HEAD => Undone::Leaves(frame),
                    Ok(frame) => lost(fault::PROTOCOL, u64::from(frame.header.kind)),
                    Err(Broken::Interrupted) => Undone::Wanted,
                    Err(Broken::End) => lost(fault::END, 0),
                    Err(Broken::Forged) => lost(fault::FORGED, 0),
                });
            }
            if new {
                return match link.receive(gated_wait) {
                    Ok(frame) if frame.header.kind == kind::READY => Ok(()),
                    Err(Broken::Interrupted) => Err(Undone::Wanted),
                    Ok(_) | Err(_) => Err(Undone::Impossible(why::LINK)),
                };
            }
        }
    }

    /// In the child: a deputy of its own, whose remote half waits for it.
    fn become_child(&mut self, fork: &Fork, mut link: Link, mut given: Given) {
        let own = sys::state().link.fd;
        let (new_link, new_daemon) = (given.link, given.daemon);
        (given.link, given.daemon) = (-1, -1);
        let maps = sys::lists().maps;
        let is_placed = sys::put_hidden(new_link, own) && sys::put_hidden(new_daemon, self.daemon);
        let opened = i32::try_from(sys::open_maps()).unwrap_or(-1);
        if !is_placed || opened < 0 || !sys::put_hidden(opened, maps) {
            lost(fault::RESTORE, 0);
        }
        link.fd = own;
        sys::state().link = link;
        self.forget_counts();
        self.pending = Pending::default();
        if fork.shares == 1 {
            // As of every child that shares memory (man 2 rseq).
            self.rseq = (0, 0, 0);
        }
        let status = status();
        *status = Status {
            phase: phase::SERVING,
            blocked: status.blocked,
            link: status.link,
            shares: if fork.shares == 1 { parent() } else { 0 },
            ..Status::default()
        };
        if fork.flags & clone::CLEAR_SIGHAND != 0 {
            sys::set_mask(status.blocked);
        }
        let is_noted = self.is_noted();
        let pid = sys::plain(nr::__NR_getpid, [0; 6]);
        let born = Born { pid: u32::try_from(pid).unwrap_or(0), come_home: u32::from(!is_noted) };
        if sys::state().link.send_value(kind::BORN, 0, &born).is_err() {
            lost(fault::END, 0);
        }
        if !is_noted {
            self.take_home(None);
        }
    }

    /// Whether the daemon knows of this process, and will look after it.
    fn is_noted(&self) -> bool {
        let mut answer = [0];
        if sys::send(self.daemon, &[to_daemon::BORN]) != 1 {
            return false;
        }
        loop {
            match sys::receive(self.daemon, &mut answer, 0) {
                -4 => {}
                n => return n == 1 && answer[0] == to_daemon::NOTED,
            }
        }
    }
}
