//! The warden: process 1 of the remote's namespaces.
//!
//! It reaps, does what the daemon says, and ends an orphan: when the link is closed
//! the remote has a moment to end by itself, also if it computes without calls. It
//! outlives the daemon; a later one connects to the same socket.

use crate::{remote, sys};
use conet_deputy_core::boot::{Launch, host_fd, warden as word};

const SIGKILL: u32 = 9;
const SIGCONT: u32 = 18;
const SIGSTOP: u32 = 19;
const SIGURG: u32 = 23;
const SIGWINCH: u32 = 28;
const WNOHANG: u32 = 1;
const POLLIN: u16 = 1;
/// Neither data nor room: only that the other side is gone.
const POLLRDHUP: u16 = 0x2000;
/// How long the remote may take to notice that its link is closed, in ms.
const GRACE_MS: i32 = 300;

struct Warden {
    remote: i32,
    children: i32,
    daemon: i32,
    /// The link is closed.
    is_orphan: bool,
}

/// Starts the remote and watches it; ends with it.
pub(crate) fn run(launch: &Launch, proc_fd: i32) -> ! {
    let children = sys::child_signals();
    let Ok(children) = i32::try_from(children) else { sys::exit(70) };
    match sys::fork(Some(launch.pid)) {
        0 => {
            sys::close(children);
            remote::run(launch, proc_fd)
        }
        remote if remote > 0 => {
            sys::close(proc_fd);
            sys::close(host_fd::CONTROL);
            let remote = i32::try_from(remote).unwrap_or(-1);
            let mut warden = Warden { remote, children, daemon: -1, is_orphan: false };
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
    /// Waits for something to happen and deals with it.
    fn turn(&mut self) {
        let entry = |fd, events| sys::PollFd { fd, events, revents: 0 };
        let mut fds = [
            entry(self.children, POLLIN),
            entry(host_fd::LISTEN, POLLIN),
            entry(self.daemon, POLLIN),
            entry(if self.is_orphan { -1 } else { host_fd::LINK }, POLLRDHUP),
        ];
        let timeout = if self.is_orphan { GRACE_MS } else { -1 };
        let ready = sys::poll(&mut fds, timeout);
        if ready == 0 && self.is_orphan {
            sys::kill(self.remote, SIGKILL);
        }
        if fds[0].revents != 0 {
            self.reap();
        }
        // Before a newer daemon takes the old one's place.
        if fds[2].revents != 0 {
            self.obey();
        }
        if fds[1].revents != 0 {
            self.meet();
        }
        if fds[3].revents != 0 {
            self.is_orphan = true;
        }
    }

    fn reap(&self) {
        let mut drain = [0u8; 128];
        sys::read(self.children, &mut drain);
        loop {
            let (pid, status) = sys::wait(-1, WNOHANG);
            if pid <= 0 {
                return;
            }
            if pid == i64::from(self.remote) {
                self.tell(word::ENDED, status);
                sys::exit(0);
            }
        }
    }

    fn tell(&self, what: u8, value: u32) {
        let [a, b, c, d] = value.to_le_bytes();
        if self.daemon >= 0 {
            sys::send(self.daemon, &[what, a, b, c, d]);
        }
    }

    /// A daemon connects; the newest one counts.
    fn meet(&mut self) {
        let fd = sys::accept(host_fd::LISTEN);
        if let Ok(fd) = i32::try_from(fd)
            && fd >= 0
        {
            if self.daemon >= 0 {
                sys::close(self.daemon);
            }
            self.daemon = fd;
            self.tell(word::HERE, self.remote.cast_unsigned());
        }
    }

    fn obey(&mut self) {
        let mut command = [0];
        if sys::receive(self.daemon, &mut command, 0) != 1 {
            sys::close(self.daemon);
            self.daemon = -1;
            return;
        }
        let signal = match command[0] {
            word::BELL => SIGURG,
            word::STOP => SIGSTOP,
            word::CONTINUE => SIGCONT,
            word::KILL => SIGKILL,
            word::SLICE => SIGWINCH,
            _ => return,
        };
        sys::kill(self.remote, signal);
    }
}
