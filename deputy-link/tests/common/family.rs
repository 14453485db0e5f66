//! What two daemons do for a process that divides, on threads of this test.

use super::*;
use conet_deputy_link::Ticket;
use conet_deputy_link::family::{DeputyEnd, Line, LineEvent, Refused};
use conet_deputy_link::hosting::{Warden, WardenEvent};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// Where a daemon fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fail {
    /// Home's daemon has died before the process divides.
    HomeAtFork,
    /// Home's daemon dies when it is asked.
    HomeAsked,
    /// The other node refuses.
    Refused,
    /// The other node's daemon dies before it hands the link on.
    NodeSilent,
    /// The link is cut once the deputy has it.
    LinkCut,
    /// Home's daemon dies before it has kept a record of the child.
    HomeAtBirth,
    /// The parent's remote half is killed when home's daemon is asked.
    RemoteKilled,
    /// The warden is killed when home's daemon is asked.
    WardenKilled,
}

#[derive(Default)]
struct Known {
    /// Children, by process id: their stays, in the order of their birth.
    children: Vec<(u32, Ticket)>,
    /// Remotes that are here, with their process ids.
    here: BTreeMap<Ticket, u32>,
    ended: Vec<(Ticket, u32)>,
}

/// A process and its descendants in one sandbox.
#[derive(Clone)]
pub(crate) struct Family {
    known: Arc<Mutex<Known>>,
    fail: Arc<Mutex<Option<Fail>>>,
    next: Arc<AtomicUsize>,
}

impl Family {
    pub(crate) fn new() -> Self {
        Self { known: Arc::default(), fail: Arc::default(), next: Arc::default() }
    }

    /// Fails from now on.
    pub(crate) fn fail(&self, fail: Fail) {
        *self.fail.lock().unwrap() = Some(fail);
    }

    fn fails(&self, fail: Fail) -> bool {
        *self.fail.lock().unwrap() == Some(fail)
    }

    /// Children that were made away, so far.
    pub(crate) fn children(&self) -> Vec<(u32, Ticket)> {
        self.known.lock().unwrap().children.clone()
    }

    /// Process ids of the remotes that are here.
    pub(crate) fn here(&self) -> Vec<u32> {
        self.known.lock().unwrap().here.values().copied().collect()
    }

    pub(crate) fn ended(&self) -> Vec<(Ticket, u32)> {
        self.known.lock().unwrap().ended.clone()
    }

    /// Hears what the warden says.
    pub(crate) fn follow(&self, mut warden: Warden) {
        let known = Arc::clone(&self.known);
        thread::spawn(move || {
            while let Ok(Some(event)) = warden.event() {
                let mut known = known.lock().unwrap();
                match event {
                    WardenEvent::Here { ticket, pid: Some(pid) } => {
                        known.here.insert(ticket, pid);
                    }
                    WardenEvent::Ended { ticket, status } => {
                        known.here.remove(&ticket);
                        known.ended.push((ticket, status));
                    }
                    _ => {}
                }
            }
        });
    }

    /// The line of one deputy, whose stay is `ticket`.
    pub(crate) fn line(
        &self,
        ticket: Ticket,
        hosted: Arc<Mutex<Option<(Warden, Hosted)>>>,
    ) -> DeputyEnd {
        let (line, end) = Line::new().unwrap();
        let family = self.clone();
        thread::spawn(move || family.serve(&line, ticket, &hosted));
        end
    }

    fn serve(&self, line: &Line, ticket: Ticket, hosted: &Arc<Mutex<Option<(Warden, Hosted)>>>) {
        if self.fails(Fail::HomeAtFork) {
            return;
        }
        while let Ok(Some(event)) = line.event() {
            match event {
                LineEvent::Fork if self.fails(Fail::HomeAsked) => return,
                LineEvent::Fork if self.fails(Fail::Refused) => {
                    line.refuse(Refused::ByNode).ok();
                }
                LineEvent::Fork => self.branch(line, ticket, hosted),
                LineEvent::Born { .. } if self.fails(Fail::HomeAtBirth) => return,
                LineEvent::Born { pid } => {
                    self.known.lock().unwrap().children.push((pid, ticket));
                    line.noted().ok();
                }
            }
        }
    }

    fn branch(&self, line: &Line, parent: Ticket, hosted: &Arc<Mutex<Option<(Warden, Hosted)>>>) {
        let number = 1000 + self.next.fetch_add(1, Ordering::SeqCst);
        let mut child = [0; 16];
        child[..8].copy_from_slice(&number.to_le_bytes());
        let keys = || link_keys(&Key::new([7; 32]), &child);
        let cipher = Cipher::preferred();
        let (home, remote) = (keys(), keys());
        let ours = LinkSecret { cipher, seal: home.home_to_remote, open: home.remote_to_home };
        let theirs =
            LinkSecret { cipher, seal: remote.remote_to_home, open: remote.home_to_remote };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let (warden, pids) = {
            let hosted = hosted.lock().unwrap();
            let (warden, hosted) = hosted.as_ref().unwrap();
            (warden.try_clone().unwrap(), (hosted.remote_pid, hosted.warden_pid))
        };
        let kill = |pid: u32| {
            rustix::process::kill_process(as_pid(pid), rustix::process::Signal::KILL).unwrap();
        };
        if self.fails(Fail::RemoteKilled) {
            kill(pids.0);
        }
        if self.fails(Fail::WardenKilled) {
            kill(pids.1);
        }
        let end = self.line(child, Arc::clone(hosted));
        if line.give(child, stream, ours, &end).is_err() {
            return;
        }
        if self.fails(Fail::LinkCut) {
            accepted.shutdown(std::net::Shutdown::Both).unwrap();
        } else if !self.fails(Fail::NodeSilent) {
            warden.branch(parent, child, accepted, &theirs).ok();
        } else {
            std::mem::forget(accepted);
        }
    }
}
