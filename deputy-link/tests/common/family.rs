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
    /// This happens, once.
    At(Phase, Blow),
}

/// A phase of a birth, before what is named reaches the other half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The deputy has asked its daemon for a link.
    Asked,
    /// The child is there remotely, and has said READY.
    Ready,
    /// The child is there at home, and has said BORN.
    Born,
}

/// What happens then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blow {
    ChildRemote,
    ParentRemote,
    Warden,
    ChildHome,
    ParentHome,
    /// The child's link is cut.
    Cut,
    /// Its network is away for half a second.
    Stall,
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
#[derive(Clone, Default)]
pub(crate) struct Family {
    root: u32,
    known: Arc<Mutex<Known>>,
    fail: Arc<Mutex<Option<Fail>>>,
    /// Blows that were struck.
    struck: Arc<AtomicUsize>,
    next: Arc<AtomicUsize>,
}

impl Family {
    /// The family of this process, which moves.
    pub(crate) fn of(root: u32) -> Self {
        Self { root, ..Self::default() }
    }

    /// Fails from now on.
    pub(crate) fn fail(&self, fail: Fail) {
        *self.fail.lock().unwrap() = Some(fail);
    }

    fn fails(&self, fail: Fail) -> bool {
        *self.fail.lock().unwrap() == Some(fail)
    }

    pub(crate) fn struck(&self) -> usize {
        self.struck.load(Ordering::SeqCst)
    }

    /// The blow for this phase: given out once.
    fn blow_at(&self, phase: Phase) -> Option<Blow> {
        let mut fail = self.fail.lock().unwrap();
        match *fail {
            Some(Fail::At(at, blow)) if at == phase => {
                *fail = None;
                self.struck.fetch_add(1, Ordering::SeqCst);
                Some(blow)
            }
            _ => None,
        }
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
        let (warden, victims) = {
            let hosted = hosted.lock().unwrap();
            let (warden, hosted) = hosted.as_ref().unwrap();
            (warden.try_clone().unwrap(), self.victims(parent, child, *hosted))
        };
        if let Some(blow) = self.blow_at(Phase::Asked) {
            self.strike(blow, &victims, &[]);
        }
        let accepted = self.relay(accepted, victims);
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

    fn victims(&self, parent: Ticket, child: Ticket, hosted: Hosted) -> Victims {
        let known = self.known.lock().unwrap();
        let home = known.children.iter().find(|(_, ticket)| *ticket == parent);
        Victims {
            child,
            parent_home: home.map_or(self.root, |(pid, _)| *pid),
            parent_remote: known.here.get(&parent).copied().unwrap_or(hosted.remote_pid),
            warden: hosted.warden_pid,
        }
    }

    fn strike(&self, blow: Blow, victims: &Victims, links: &[&TcpStream]) {
        let kill = |pid: u32| {
            // Some have gone by themselves.
            rustix::process::kill_process(as_pid(pid), rustix::process::Signal::KILL).ok();
        };
        match blow {
            Blow::ChildRemote => {
                let mut pid = None;
                wait_until("the child's remote", || {
                    pid = self.known.lock().unwrap().here.get(&victims.child).copied();
                    pid.is_some()
                });
                kill(pid.unwrap());
            }
            Blow::ChildHome => {
                let children = self.children();
                let child = children.iter().find(|(_, ticket)| *ticket == victims.child);
                kill(child.unwrap().0);
            }
            Blow::ParentRemote => kill(victims.parent_remote),
            Blow::ParentHome => kill(victims.parent_home),
            Blow::Warden => kill(victims.warden),
            Blow::Cut => {
                for link in links {
                    // The other end may have been faster.
                    link.shutdown(std::net::Shutdown::Both).ok();
                }
            }
            Blow::Stall => thread::sleep(Duration::from_millis(500)),
        }
        // What follows from it may come first.
        thread::sleep(Duration::from_millis(20));
    }

    /// A link in the place of `link`, on whose way blows are struck. From home come
    /// HELLO and, after READY, BORN.
    fn relay(&self, link: TcpStream, victims: Victims) -> TcpStream {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (near, _) = listener.accept().unwrap();
        // Whether READY has come by, and BORN.
        let passed = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
        let pump = |mut from: TcpStream, mut to: TcpStream, outward: bool| {
            let (family, passed) = (self.clone(), Arc::clone(&passed));
            thread::spawn(move || {
                let mut buffer = vec![0; 65536];
                while let Ok(n @ 1..) = from.read(&mut buffer) {
                    let [ready, born] = &*passed;
                    let first = |flag: &AtomicBool| !flag.swap(true, Ordering::SeqCst);
                    let phase = if outward {
                        (ready.load(Ordering::SeqCst) && first(born)).then_some(Phase::Born)
                    } else {
                        first(ready).then_some(Phase::Ready)
                    };
                    if let Some(blow) = phase.and_then(|phase| family.blow_at(phase)) {
                        family.strike(blow, &victims, &[&from, &to]);
                    }
                    if to.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                }
                to.shutdown(std::net::Shutdown::Write).ok();
                from.shutdown(std::net::Shutdown::Read).ok();
            })
        };
        pump(link.try_clone().unwrap(), near.try_clone().unwrap(), true);
        pump(near, link, false);
        far
    }
}

/// Who may be struck at a birth.
#[derive(Clone, Copy)]
struct Victims {
    child: Ticket,
    parent_home: u32,
    parent_remote: u32,
    warden: u32,
}
