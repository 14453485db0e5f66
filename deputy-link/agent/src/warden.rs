//! The warden: process 1 of the remotes' namespaces.
//!
//! It watches a process that came from elsewhere and its descendants, each with a link
//! of its own: reaps them, does what the daemon says, hands a remote that divides the
//! link for its child, and ends orphans: when a link is closed its remote has a moment
//! to end by itself, also if it computes without calls. It outlives the daemon; a later
//! one connects to the same socket and is told who is here. It ends with the last remote.
//!
//! ```text
//! BRANCH ─► coming (link, socket) ── the child says its name ─► here (its id) ── reaped ─► ended
//!              └─ nobody holds its socket any more ─────────────────────────────────────► ended
//! ```
//!
//! What remotes say is not trusted: a child is who first says a name that is expected on
//! the socket made for it, and its id is the kernel's word.

use crate::{remote, sys};
use conet_deputy_core::boot::family::{FromWarden, MAX_REMOTES, Ticket, ToWarden};
use conet_deputy_core::boot::{Launch, host_fd, warden as word};
use linux_raw_sys::general as nr;
use zerocopy::{FromBytes, IntoBytes};

const SIGKILL: u32 = 9;
const SIGCONT: u32 = 18;
const SIGSTOP: u32 = 19;
const SIGURG: u32 = 23;
const SIGWINCH: u32 = 28;
const WNOHANG: u32 = 1;
const POLLIN: u16 = 1;
const DONT_WAIT: u32 = 0x40;
/// Neither data nor room: only that the other side is gone.
const POLLRDHUP: u16 = 0x2000;
/// How long a remote may take to notice that its link is closed, in ms.
const GRACE_MS: i64 = 300;
/// How long a remote that divides waits for its child's link, in s: longer than a
/// daemon takes that lives, and short for one that does not.
const LINK_LIMIT_S: u64 = 5;

/// A remote, here or coming.
#[derive(Clone, Copy)]
struct Remote {
    ticket: Ticket,
    /// 0 while it is coming.
    pid: i32,
    /// −1 when it is closed.
    link: i32,
    /// To it; −1 when it is closed.
    socket: i32,
    /// When it must have ended, in ms, as its link is closed.
    ends_at: Option<i64>,
    /// It has ended, or will not come.
    is_over: bool,
}

const NOBODY: Remote =
    Remote { ticket: [0; 16], pid: 0, link: -1, socket: -1, ends_at: None, is_over: false };

struct Warden {
    remotes: [Remote; MAX_REMOTES],
    count: usize,
    children: i32,
    daemon: i32,
}

fn now_ms() -> i64 {
    sys::clock(nr::CLOCK_MONOTONIC) / 1_000_000
}

fn close_one(fd: &mut i32) {
    if *fd >= 0 {
        sys::close(*fd);
    }
    *fd = -1;
}

/// The two ends of what a remote and its warden talk over.
fn socket_pair() -> Option<[i32; 2]> {
    let [near, far] = sys::socket_pair()?;
    sys::ask_who_sends(near);
    sys::limit_receiving(far, LINK_LIMIT_S);
    Some([near, far])
}

/// Starts the first remote and watches; ends with the last.
pub(crate) fn run(launch: &Launch, proc_fd: i32) -> ! {
    let children = sys::child_signals();
    let Ok(children) = i32::try_from(children) else { sys::exit(70) };
    let Some([near, far]) = socket_pair() else { sys::exit(70) };
    match sys::fork(Some(launch.pid)) {
        0 => {
            sys::close(children);
            sys::close(near);
            remote::run(launch, proc_fd, far)
        }
        pid if pid > 0 => {
            for fd in [proc_fd, far, host_fd::CONTROL] {
                sys::close(fd);
            }
            let pid = i32::try_from(pid).unwrap_or(-1);
            let first =
                Remote { ticket: launch.ticket, pid, link: host_fd::LINK, socket: near, ..NOBODY };
            let mut remotes = [NOBODY; MAX_REMOTES];
            remotes[0] = first;
            let mut warden = Warden { remotes, count: 1, children, daemon: -1 };
            loop {
                warden.turn();
            }
        }
        error => {
            let errno = u8::try_from(-error).unwrap_or(0);
            sys::send(host_fd::CONTROL, &[b'E', 12, errno]);
            sys::exit(71)
        }
    }
}

impl Warden {
    fn remotes(&mut self) -> &mut [Remote] {
        &mut self.remotes[..self.count]
    }

    fn find(&mut self, ticket: &Ticket) -> Option<&mut Remote> {
        self.remotes().iter_mut().find(|remote| remote.ticket == *ticket)
    }

    /// Waits for something to happen and deals with it.
    fn turn(&mut self) {
        const OWN: usize = 3;
        let entry = |fd, events| sys::PollFd { fd, events, revents: 0 };
        let mut fds = [entry(-1, 0); OWN + 2 * MAX_REMOTES];
        fds[0] = entry(self.children, POLLIN);
        fds[1] = entry(host_fd::LISTEN, POLLIN);
        fds[2] = entry(self.daemon, POLLIN);
        for (pair, remote) in fds[OWN..].as_chunks_mut::<2>().0.iter_mut().zip(self.remotes()) {
            let link = if remote.ends_at.is_some() { -1 } else { remote.link };
            *pair = [entry(link, POLLRDHUP), entry(remote.socket, POLLIN)];
        }
        let end = OWN + 2 * self.count;
        sys::poll(&mut fds[..end], self.patience());
        let happened = core::hint::black_box(&fds);
        for (index, [link, socket]) in happened[OWN..end].as_chunks::<2>().0.iter().enumerate() {
            if link.revents != 0 {
                self.remotes[index].ends_at = Some(now_ms() + GRACE_MS);
            }
            if socket.revents != 0 {
                self.hear(index);
            }
        }
        self.end_orphans();
        if happened[0].revents != 0 {
            self.reap();
        }
        // Before a newer daemon takes the old one's place.
        if happened[2].revents != 0 {
            self.obey();
        }
        if happened[1].revents != 0 {
            self.meet();
        }
        self.forget();
    }

    /// How long nothing needs to be done, in ms.
    fn patience(&mut self) -> i32 {
        let first = self.remotes().iter().filter(|one| one.pid > 0).filter_map(|one| one.ends_at);
        first.min().map_or(-1, |at| i32::try_from((at - now_ms()).max(0)).unwrap_or(0))
    }

    fn end_orphans(&mut self) {
        let now = now_ms();
        for remote in self.remotes() {
            if remote.pid > 0 && remote.ends_at.is_some_and(|at| at <= now) {
                sys::kill(remote.pid, SIGKILL);
                // Until it is reaped; a second signal would do nothing.
                remote.ends_at = Some(now + GRACE_MS);
            }
        }
    }

    /// A remote says something, or nobody is left to.
    fn hear(&mut self, index: usize) {
        let remote = &mut self.remotes[index];
        let mut said: Ticket = [0; 16];
        let beside = sys::receive_beside(remote.socket, &mut said, DONT_WAIT);
        for fd in beside.fds.into_iter().filter(|fd| *fd >= 0) {
            sys::close(fd);
        }
        if matches!(beside.len, -4 | -11) {
            return;
        }
        if beside.len <= 0 {
            close_one(&mut remote.socket);
            // Its parent has let go of it, or ended, and it never was.
            remote.is_over |= remote.pid == 0;
        } else if remote.pid == 0 && said == remote.ticket && beside.pid > 1 {
            remote.pid = beside.pid;
            let remote = *remote;
            self.tell(word::HERE, 0, &remote);
        }
    }

    fn reap(&mut self) {
        let mut drain = [0u8; 128];
        sys::read(self.children, &mut drain);
        // Who has said its name and ended at once is to be known by it.
        for index in 0..self.count {
            if self.remotes[index].pid == 0 && self.remotes[index].socket >= 0 {
                self.hear(index);
            }
        }
        loop {
            let (pid, status) = sys::wait(-1, WNOHANG);
            if pid <= 0 {
                return;
            }
            let ended = self.remotes().iter_mut().find(|one| i64::from(one.pid) == pid);
            if let Some(ended) = ended.filter(|one| !one.is_over) {
                ended.is_over = true;
                let ended = *ended;
                self.tell(word::ENDED, status, &ended);
            }
        }
    }

    /// Lets go of those that are over; ends when nobody is left.
    fn forget(&mut self) {
        let mut index = 0;
        while index < self.count {
            let mut remote = self.remotes[index];
            if !remote.is_over {
                index += 1;
                continue;
            }
            if remote.pid == 0 {
                self.tell(word::ENDED, 0, &remote);
            }
            close_one(&mut remote.link);
            close_one(&mut remote.socket);
            self.count -= 1;
            self.remotes[index] = self.remotes[self.count];
        }
        if self.count == 0 {
            sys::exit(0);
        }
    }

    fn tell(&self, kind: u32, status: u32, remote: &Remote) {
        if self.daemon < 0 {
            return;
        }
        let pid = (kind == word::HERE && remote.pid > 0).then_some(remote.pid);
        let status = pid.map_or(status, |_| 1);
        let said = FromWarden { kind, status, ticket: remote.ticket };
        sys::send_beside(self.daemon, said.as_bytes(), &[], pid);
    }

    /// A daemon connects; the newest one counts.
    fn meet(&mut self) {
        let fd = sys::accept(host_fd::LISTEN);
        if let Ok(fd) = i32::try_from(fd)
            && fd >= 0
        {
            close_one(&mut self.daemon);
            self.daemon = fd;
            // Those that are coming, too: it must not take them for gone.
            for index in 0..self.count {
                let remote = self.remotes[index];
                self.tell(word::HERE, 0, &remote);
            }
            self.tell(word::ALL, 0, &NOBODY);
        }
    }

    fn obey(&mut self) {
        let mut bytes = [0; size_of::<ToWarden>()];
        let beside = sys::receive_beside(self.daemon, &mut bytes, 0);
        let [mut link, mut other] = beside.fds;
        close_one(&mut other);
        let command = ToWarden::read_from_bytes(&bytes).unwrap_or_default();
        bytes.fill(0);
        if beside.len != bytes.len() as i64 {
            close_one(&mut link);
            close_one(&mut self.daemon);
            return;
        }
        let signal = match command.kind {
            word::BELL => SIGURG,
            word::STOP => SIGSTOP,
            word::CONTINUE => SIGCONT,
            word::KILL => SIGKILL,
            word::SLICE => SIGWINCH,
            word::BRANCH if link >= 0 => {
                self.branch(&command, link);
                return;
            }
            _ => return close_one(&mut link),
        };
        if let Some(remote) = self.find(&command.ticket).filter(|one| one.pid > 0) {
            sys::kill(remote.pid, signal);
        }
    }

    /// Hands the link of a coming child to its parent. Where that fails the link is
    /// closed, and home makes the child by itself.
    fn branch(&mut self, command: &ToWarden, mut link: i32) {
        let parent = self.find(&command.ticket).map_or(-1, |one| one.socket);
        let pair = if parent < 0 || self.count == MAX_REMOTES { None } else { socket_pair() };
        let mut coming = Remote { ticket: command.child, link, ..NOBODY };
        if let Some([near, mut far]) = pair {
            coming.socket = near;
            let sent = sys::send_beside(parent, command.as_bytes(), &[link, far], None);
            close_one(&mut far);
            if sent > 0 {
                self.remotes[self.count] = coming;
                self.count += 1;
                return;
            }
            close_one(&mut coming.socket);
        }
        self.tell(word::ENDED, 0, &coming);
        close_one(&mut link);
    }
}
