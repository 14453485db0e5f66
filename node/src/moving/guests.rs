//! Programs of other nodes that run here.
//!
//! ```text
//! Host ─► admitted (a ticket, for 30 s) ─► a link brings the ticket ─► sandbox ─► runs ─► ended
//! ```
//!
//! A link is known by its ticket; what it brings is checked against the link's keys before
//! anything is made. The port is shared (`arrivals`): a connection that begins with no
//! ticket of ours is left, unread, to the sessions, which go that way where UDP is blocked.
//! Each stay has a file, and each sandbox its warden's socket, in the state directory, so
//! that a later daemon finds them. A sandbox holds a process and its descendants, each with
//! a stay of its own (`Branch`); its warden says who is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use conet_deputy_link::hosting::{self, Hosting, MAX_REMOTES, Warden, WardenEvent};
use conet_deputy_link::{LinkSecret, life, processor};
use conet_transport::session::protect::{Cipher, Key, link_keys};
use conet_wire::moving::{Answer, Ask, Root, Ticket};
use serde::{Deserialize, Serialize};

use super::{Event, arrivals, store, work};
use crate::config::PeerConfig;
use crate::daemon::NodeHandle;

/// How long an admitted process may take to come.
const ADMISSION: Duration = Duration::from_secs(30);
/// How long the home of a process that is coming may be silent.
const HOME_PATIENCE: Duration = Duration::from_secs(30);
/// Most processes admitted and not yet there, of all peers.
const MAX_ADMITTED: usize = 256;

/// A process that may come.
#[derive(Debug)]
struct Admitted {
    stay: Stay,
    secret: LinkSecret,
    /// Where it is made by its parent: the warden, and the parent's stay.
    parent: Option<(Warden, Ticket)>,
    until: Instant,
}

/// A process that runs here; what is kept of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Stay {
    ticket: Ticket,
    peer: String,
    /// At home.
    pid: u32,
    /// At home.
    uid: u32,
    /// Of this host, as whom it runs.
    guest_uid: u32,
    name: String,
    remote_pid: Option<u32>,
    /// The stay of the process for which its sandbox was made, where it is another's.
    #[serde(default)]
    sandbox: Option<Ticket>,
    /// Found in the state directory; its warden has not named it yet.
    #[serde(skip)]
    is_unconfirmed: bool,
}

impl Stay {
    fn sandbox(&self) -> Ticket {
        self.sandbox.unwrap_or(self.ticket)
    }
}

type AdmittedByTicket = Arc<Mutex<BTreeMap<Ticket, Admitted>>>;

/// Programs of others.
#[derive(Debug)]
pub(super) struct Guests {
    node: NodeHandle<Event>,
    directory: PathBuf,
    admitted: AdmittedByTicket,
    stays: BTreeMap<Ticket, Stay>,
    /// Of each sandbox.
    wardens: BTreeMap<Ticket, Warden>,
}

fn lock(admitted: &AdmittedByTicket) -> std::sync::MutexGuard<'_, BTreeMap<Ticket, Admitted>> {
    // A panic elsewhere leaves the map whole: single inserts and removals.
    admitted.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refuse(code: &str, sentence: &str) -> Answer {
    Answer::Refused { code: code.to_owned(), sentence: sentence.to_owned() }
}

fn remove(file: &Path) {
    if let Err(error) = fs::remove_file(file)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, file = %file.display(), "cannot remove");
    }
}

impl Guests {
    /// Finds the stays that an earlier daemon left, and listens for links.
    pub(super) fn new(node: NodeHandle<Event>, directory: PathBuf) -> Self {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory);
        if let Err(error) = made {
            tracing::error!(%error, directory = %directory.display(), "cannot host processes");
        }
        let admitted = AdmittedByTicket::default();
        let mut guests =
            Self { node, directory, admitted, stays: BTreeMap::new(), wardens: BTreeMap::new() };
        guests.find_again();
        guests.listen();
        guests
    }

    fn socket(&self, ticket: Ticket) -> PathBuf {
        self.directory.join(format!("{ticket}.sock"))
    }

    fn file(&self, ticket: Ticket) -> PathBuf {
        self.directory.join(format!("{ticket}.json"))
    }

    fn find_again(&mut self) {
        let Ok(entries) = fs::read_dir(&self.directory) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let Some(mut stay) = store::load::<Stay>(&path) else { continue };
            stay.is_unconfirmed = true;
            self.stays.insert(stay.ticket, stay);
        }
        let sandboxes: BTreeSet<Ticket> = self.stays.values().map(Stay::sandbox).collect();
        for sandbox in sandboxes {
            match watch(&self.node, &self.socket(sandbox), sandbox) {
                Some(warden) => drop(self.wardens.insert(sandbox, warden)),
                // Their homes may still wait for them.
                None => self.on_gone(sandbox),
            }
        }
    }

    fn listen(&self) {
        let node = &self.node.config().node;
        let address = SocketAddr::new(node.address, node.port);
        let listener = match life::listen(address) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(%error, %address, "no process can come: cannot listen for links");
                return;
            }
        };
        let (node, admitted) = (self.node.clone(), Arc::clone(&self.admitted));
        let directory = self.directory.clone();
        work::thread("conet-links", move || {
            let served = arrivals::serve(listener, |first, stream| {
                arrive(Ticket(first), stream, &node, &admitted, &directory);
            });
            if let Err(error) = served {
                tracing::error!(%error, "no process can come any more");
            }
        });
    }

    /// Does what a granted peer asks.
    pub(super) fn handle_ask(&mut self, peer: &PeerConfig, ask: Ask) -> Answer {
        let ticket = match &ask {
            Ask::Host { .. } => return self.admit(peer, ask),
            Ask::Branch { parent, ticket, root, cipher } => {
                return self.admit_child(peer, *parent, *ticket, root, *cipher);
            }
            Ask::Ring(ticket)
            | Ask::Slice(ticket)
            | Ask::Stop(ticket)
            | Ask::Continue(ticket)
            | Ask::Where(ticket) => *ticket,
            Ask::Ended { ticket, .. } => *ticket,
        };
        let Some(stay) = self.stays.get(&ticket).filter(|stay| stay.peer == peer.name) else {
            return Answer::Unknown;
        };
        let told = match (&ask, self.wardens.get(&stay.sandbox())) {
            (Ask::Where(_), _) => {
                // Done: it is here, or about to be, and its pid is not known.
                return stay
                    .remote_pid
                    .map_or(Answer::Done, |remote_pid| Answer::Running { remote_pid });
            }
            (_, None) => return Answer::Unknown,
            (Ask::Ring(_), Some(warden)) => warden.ring(ticket.0),
            (Ask::Slice(_), Some(warden)) => warden.slice(ticket.0),
            (Ask::Stop(_), Some(warden)) => warden.stop(ticket.0),
            (Ask::Continue(_), Some(warden)) => warden.resume(ticket.0),
            _ => return Answer::Unknown,
        };
        told.map_or(Answer::Unknown, |()| Answer::Done)
    }

    fn admit(&mut self, peer: &PeerConfig, ask: Ask) -> Answer {
        let Ask::Host { ticket, root, cipher, pid, uid, name, components, xsave_size } = ask else {
            return Answer::Unknown;
        };
        if work::as_pid(pid).is_none() {
            return refuse("pid", "it names no process");
        }
        let Some(local) = processor() else {
            return refuse("processor", "its processor has no XSAVE");
        };
        if (local.components, local.size) != (components, xsave_size) {
            return refuse("processor", "its processor saves another vector state");
        }
        let stay = Stay {
            ticket,
            peer: peer.name.clone(),
            pid,
            uid,
            guest_uid: self.guest_uid(&peer.name, uid),
            name,
            remote_pid: None,
            sandbox: None,
            is_unconfirmed: false,
        };
        self.expect(peer, stay, &root, cipher, None)
    }

    /// A child of a process that is here may come.
    fn admit_child(
        &mut self,
        peer: &PeerConfig,
        parent: Ticket,
        ticket: Ticket,
        root: &Root,
        cipher: u8,
    ) -> Answer {
        let Some(stay) = self.stays.get(&parent).filter(|stay| stay.peer == peer.name) else {
            return Answer::Unknown;
        };
        let sandbox = stay.sandbox();
        if self.stays.values().filter(|stay| stay.sandbox() == sandbox).count() >= MAX_REMOTES {
            return refuse("limit", "as many processes as may be are in that sandbox");
        }
        let Some(Ok(warden)) = self.wardens.get(&sandbox).map(Warden::try_clone) else {
            return refuse("busy", "its warden is not heard");
        };
        let stay =
            Stay { ticket, remote_pid: None, sandbox: Some(sandbox), pid: 0, ..stay.clone() };
        self.expect(peer, stay, root, cipher, Some((warden, parent)))
    }

    /// Expects the link of a stay.
    fn expect(
        &mut self,
        peer: &PeerConfig,
        stay: Stay,
        root: &Root,
        cipher: u8,
        parent: Option<(Warden, Ticket)>,
    ) -> Answer {
        let cipher = match cipher {
            0 => Cipher::Aes128Gcm,
            1 => Cipher::ChaCha20Poly1305,
            2 if peer.grants.plain_links => Cipher::Plain,
            2 => return refuse("plain", "it takes no link in the clear (plain_links)"),
            _ => return refuse("cipher", "it does not know the cipher"),
        };
        let ticket = stay.ticket;
        let mut admitted = lock(&self.admitted);
        admitted.retain(|_, one| one.until > Instant::now());
        if admitted.len() >= MAX_ADMITTED || self.stays.contains_key(&ticket) {
            return refuse("busy", "too many processes are on their way to it");
        }
        let keys = link_keys(&Key::new(root.0), &ticket.0);
        let secret = LinkSecret { cipher, seal: keys.remote_to_home, open: keys.home_to_remote };
        self.stays.insert(ticket, stay.clone());
        let until = Instant::now() + ADMISSION;
        admitted.insert(ticket, Admitted { stay, secret, parent, until });
        Answer::Ready
    }

    /// The user of this host for an owner elsewhere: one each, never shared, but where
    /// this host has one id only: in an ordinary user's own namespaces.
    fn guest_uid(&self, peer: &str, uid: u32) -> u32 {
        if conet_netsys::userns::has_one_id().unwrap_or(false) {
            return rustix::process::geteuid().as_raw();
        }
        let stays = || self.stays.values();
        if let Some(same) = stays().find(|stay| stay.peer == peer && stay.uid == uid) {
            return same.guest_uid;
        }
        let base = self.node.config().node.guest_uid_base;
        (base..).find(|uid| stays().all(|stay| stay.guest_uid != *uid)).unwrap_or(base)
    }

    pub(super) fn on_runs(&mut self, ticket: Ticket, remote_pid: u32) {
        let Some(warden) = watch(&self.node, &self.socket(ticket), ticket) else {
            // It has ended already; its home may not have noticed.
            return self.on_ended(ticket, None);
        };
        self.wardens.insert(ticket, warden);
        self.is_here(ticket, remote_pid);
    }

    /// A remote runs, under this process id.
    fn is_here(&mut self, ticket: Ticket, remote_pid: u32) {
        let file = self.file(ticket);
        let Some(stay) = self.stays.get_mut(&ticket) else { return };
        if stay.remote_pid == Some(remote_pid) {
            return;
        }
        stay.remote_pid = Some(remote_pid);
        if let Err(error) = store::save(&file, stay) {
            tracing::error!(%error, "a restarted daemon will not find this process");
        }
        tracing::info!(peer = stay.peer, pid = stay.pid, remote_pid, name = stay.name, "hosting");
    }

    /// What the warden of a sandbox says; nothing, when it is gone.
    pub(super) fn on_warden(&mut self, sandbox: Ticket, said: Option<WardenEvent>) {
        match said {
            Some(WardenEvent::Here { ticket, pid }) => {
                let ticket = Ticket(ticket);
                if let Some(stay) = self.stays.get_mut(&ticket) {
                    stay.is_unconfirmed = false;
                } else if let Some(warden) = self.wardens.get(&sandbox)
                    && let Err(error) = warden.kill(ticket.0)
                {
                    // Nobody could stop it, or ring for it.
                    tracing::warn!(%error, %ticket, "a process that is not known stays");
                }
                if let Some(pid) = pid {
                    self.is_here(ticket, pid);
                }
            }
            Some(WardenEvent::Ended { ticket, status }) => {
                self.on_ended(Ticket(ticket), Some(status));
            }
            Some(WardenEvent::All) => {
                let missing = |stay: &&Stay| stay.sandbox() == sandbox && stay.is_unconfirmed;
                for ticket in self.tickets(missing) {
                    self.on_ended(ticket, None);
                }
            }
            None => self.on_gone(sandbox),
        }
    }

    fn tickets(&self, which: impl Fn(&&Stay) -> bool) -> Vec<Ticket> {
        self.stays.values().filter(which).map(|stay| stay.ticket).collect()
    }

    /// A warden is gone, and with it all of its sandbox.
    fn on_gone(&mut self, sandbox: Ticket) {
        self.wardens.remove(&sandbox);
        for ticket in self.tickets(|stay| stay.sandbox() == sandbox) {
            self.on_ended(ticket, None);
        }
        remove(&self.socket(sandbox));
    }

    pub(super) fn on_ended(&mut self, ticket: Ticket, status: Option<u32>) {
        let stay = self.stays.remove(&ticket);
        // The socket first: a daemon that comes after a crash knows it by the file. Its
        // warden ends with the last of a sandbox.
        if let Some(sandbox) = stay.as_ref().map(Stay::sandbox)
            && !self.stays.values().any(|other| other.sandbox() == sandbox)
        {
            remove(&self.socket(sandbox));
        }
        // Also where it is not known any more: its link may have come as its sandbox went.
        remove(&self.file(ticket));
        let Some(stay) = stay else { return };
        tracing::info!(peer = stay.peer, pid = stay.pid, ?status, "hosted process ended");
        work::ask(self.node.clone(), stay.peer, Ask::Ended { ticket, status }, |_| None);
    }

    /// Forgets who was admitted and did not come.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        let mut admitted = lock(&self.admitted);
        let late: Vec<Ticket> =
            admitted.iter().filter(|(_, one)| one.until <= now).map(|(t, _)| *t).collect();
        for ticket in late {
            admitted.remove(&ticket);
            self.stays.remove(&ticket);
        }
    }
}

/// Connects to a sandbox's warden and follows it on a thread; none where it is gone.
fn watch(node: &NodeHandle<Event>, socket: &Path, sandbox: Ticket) -> Option<Warden> {
    let mut warden = Warden::connect(socket).ok()?;
    let ours = warden.try_clone().ok()?;
    let node = node.clone();
    work::thread("conet-warden", move || {
        loop {
            let said = warden.event().unwrap_or_default();
            node.post(Event::Warden { sandbox, said });
            if said.is_none() {
                return;
            }
        }
    });
    Some(ours)
}

/// A connection that is a link if it begins with a ticket of ours.
fn arrive(
    ticket: Ticket,
    stream: TcpStream,
    node: &NodeHandle<Event>,
    admitted: &AdmittedByTicket,
    directory: &Path,
) {
    let Some(guest) = lock(admitted).remove(&ticket) else {
        return node.accept_session(stream);
    };
    let (node, directory) = (node.clone(), directory.to_owned());
    work::thread("conet-link", move || begin(guest, ticket, stream, &node, &directory));
}

/// Makes the sandbox for what a link brings.
fn begin(
    guest: Admitted,
    ticket: Ticket,
    mut stream: TcpStream,
    node: &NodeHandle<Event>,
    directory: &Path,
) {
    let Admitted { stay, secret, parent, .. } = guest;
    // Whatever fails here fails in what follows.
    if let Err(error) = stream.read_exact(&mut [0; arrivals::FIRST]) {
        tracing::debug!(%error, "a link is gone");
    }
    if let Err(error) = life::keep_alive(&stream, node.config().node.link_timeout) {
        tracing::warn!(%error, "a link will not notice that its other end is gone");
    }
    let socket = directory.join(format!("{ticket}.sock"));
    let failed = || node.post(Event::GuestFailed { ticket });
    let Ok(pid) = i32::try_from(stay.pid) else { return failed() };
    // Before it runs: a daemon that comes after a crash must know of it.
    if let Err(error) = store::save(&directory.join(format!("{ticket}.json")), &stay) {
        tracing::error!(%error, "a restarted daemon will not find this process");
    }
    if let Some((warden, parent)) = parent {
        if let Err(error) = warden.branch(parent.0, ticket.0, stream, &secret) {
            tracing::error!(%error, peer = stay.peer, "cannot host a child");
            failed();
        }
        return;
    }
    let hosting = Hosting {
        pid,
        ticket: ticket.0,
        secret: &secret,
        uid: stay.guest_uid,
        clock_skew: node.config().node.clock_offset.nanoseconds,
        follows: true,
        socket: &socket,
        patience: HOME_PATIENCE,
    };
    match hosting::start(stream, &hosting) {
        Ok(hosted) => node.post(Event::GuestRuns { ticket, remote_pid: hosted.remote_pid }),
        Err(error) => {
            tracing::error!(%error, peer = stay.peer, pid = stay.pid, "cannot host");
            failed();
        }
    }
}
