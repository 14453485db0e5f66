//! Moves, on threads of their own.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use conet_deputy_link::family::DeputyEnd;
use conet_deputy_link::locks::{Lock, Policy};
use conet_deputy_link::mover::{self, Method, MoveError, Moved, Returned, Round, Wish};
use conet_deputy_link::{LinkSecret, life, processor};
use conet_transport::session::protect::{Cipher, Key, link_keys};
use conet_wire::control::{Failure, How, MemoryMoved, MoveMethod, MoveRound, Reason};
use conet_wire::moving::{Answer, Ask, Root, Ticket};
use rustix::process::Pid;

use super::home::Record;
use super::{Event, direct, family};
use crate::config::{Config, PeerConfig};
use crate::control::Responder;
use crate::daemon::NodeHandle;

/// How long the other node may take to answer.
const ASK_LIMIT: Duration = Duration::from_secs(5);
/// How long a ring may take; the next one comes soon.
const RING_LIMIT: Duration = Duration::from_millis(300);
/// How long a link may take to come to stand.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long the remote's pid may take to be known.
const WHERE_LIMIT: Duration = Duration::from_secs(2);

/// What a thread is to do.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) pid: u32,
    pub(super) turn: Arc<Mutex<()>>,
    pub(super) record: Record,
    /// The node to move to; home where none is named.
    pub(super) to: Option<String>,
    pub(super) how: How,
    pub(super) policy: Policy,
    pub(super) name: String,
    pub(super) ticket: Ticket,
    /// Why it is brought home, where nobody has asked for it.
    pub(super) why: Option<Reason>,
}

/// A completed move to another node.
#[derive(Debug)]
pub(super) struct Out {
    pub(super) node: String,
    pub(super) ticket: Ticket,
    pub(super) remote_pid: Option<u32>,
    pub(super) moved: Moved,
}

/// How a job went.
#[derive(Debug)]
pub struct Outcome {
    /// It came home, first or only.
    pub(super) returned: Option<Returned>,
    /// It went out.
    pub(super) out: Option<Out>,
    /// It went from one node straight to another.
    pub(super) is_direct: bool,
    /// It is where it was, away.
    pub(super) is_still_away: bool,
    pub(super) why: Option<Reason>,
    /// Nobody waits for the answer.
    pub(super) is_unasked: bool,
    pub(super) failure: Option<Failure>,
    pub(super) total: Duration,
}

pub(super) fn as_pid(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// How memory moved out, as it is told.
pub(super) fn memory_out(moved: &Moved) -> MemoryMoved {
    let round = |round: &Round| MoveRound { pages: round.pages, time_us: micros(round.time) };
    let (method, why) = match moved.method {
        Method::Precopy => (MoveMethod::Precopy, None),
        Method::Stop(reason) => (MoveMethod::Stop, Some(reason.to_string())),
    };
    MemoryMoved {
        method,
        why,
        rounds: moved.rounds.iter().map(round).collect(),
        pages: moved.pages,
        held_pages: moved.frozen_pages,
        pause_us: micros(moved.pause),
    }
}

/// How memory came home, as it is told.
pub(super) fn memory_home(pages: u64, sliced: u64, is_delta: bool) -> MemoryMoved {
    MemoryMoved {
        method: if is_delta { MoveMethod::Changes } else { MoveMethod::All },
        why: (!is_delta).then(|| "it is not known what was changed there".to_owned()),
        rounds: Vec::new(),
        pages: pages.saturating_add(sliced),
        held_pages: pages,
        pause_us: 0,
    }
}

/// A name for a stay that nobody has used.
pub(super) fn new_ticket() -> Ticket {
    Ticket(random())
}

/// A secret for a link.
pub(super) fn new_root() -> [u8; 32] {
    random()
}

/// A cipher's number in [`Ask`].
pub(super) const fn cipher_number(cipher: Cipher) -> u8 {
    match cipher {
        Cipher::Aes128Gcm => 0,
        Cipher::ChaCha20Poly1305 => 1,
        Cipher::Plain => 2,
    }
}

/// # Panics
/// Where the kernel has no randomness, which it never lacks after boot.
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let filled = getrandom::fill(&mut bytes);
    assert!(filled.is_ok(), "getrandom(2) failed");
    bytes
}

/// Runs `body` on a named thread. Where the machine has no thread left, what the
/// body holds is dropped, and its responder answers.
pub(super) fn thread(name: &str, body: impl FnOnce() + Send + 'static) {
    if let Err(error) = thread::Builder::new().name(name.to_owned()).spawn(body) {
        tracing::error!(%error, "cannot start a thread");
    }
}

/// The peer of this name, if it may run ours.
pub(super) fn peer_that_hosts<'a>(
    config: &'a Config,
    name: &str,
) -> Result<&'a PeerConfig, Failure> {
    let Some(peer) = config.peer(name) else {
        return Err(Failure::new(
            "no-such-peer",
            format!("no peer is called {name}"),
            "list them with conet peers",
        ));
    };
    if !peer.grants.host_for_us {
        return Err(Failure::new(
            "not-granted",
            format!("{name} may not run processes of this node"),
            "name it in host_for_us in conet.toml, if it is trusted to act for their owners",
        ));
    }
    Ok(peer)
}

/// Whether the process runs another program than this daemon's own.
pub(super) fn is_another_program(pid: u32) -> bool {
    let file = |who: &str| fs::metadata(format!("/proc/{who}/exe")).map(|m| (m.dev(), m.ino()));
    match (file(&pid.to_string()), file("self")) {
        (Ok(theirs), Ok(ours)) => theirs != ours,
        _ => false,
    }
}

/// Whether the process has given its memory back already: it has ended but for the
/// kernel's own work, and its executable is no longer known (`proc_pid_exe(5)`).
pub(super) fn is_ending(pid: u32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe")).is_err()
}

/// Takes the agent out of a process that is home again.
pub(super) fn take_out(pid: u32, turn: Arc<Mutex<()>>) {
    thread("conet-tidy", move || {
        // A move that is under way takes it out, or makes use of it.
        if let (Some(pid), Ok(_turn)) = (as_pid(pid), turn.try_lock()) {
            mover::take_out(pid);
        }
    });
}

/// Asks a peer's manager something; `then` is told its answer, if it gave one.
pub(super) fn ask(
    node: NodeHandle<Event>,
    peer: String,
    ask: Ask,
    then: impl FnOnce(Option<Answer>) -> Option<Event> + Send + 'static,
) {
    thread("conet-tell", move || {
        let answer = match node.ask_peer(&peer, ask.to_bytes(), ASK_LIMIT) {
            Ok(answer) => Answer::parse(&answer).ok(),
            Err(error) => {
                tracing::warn!(peer, %error, "a peer could not be told");
                None
            }
        };
        if let Some(event) = then(answer) {
            node.post(event);
        }
    });
}

pub(super) fn reason_of(lock: &Lock) -> Reason {
    Reason { code: lock.code().to_owned(), sentence: lock.to_string(), passing: lock.is_passing() }
}

/// Starts a job.
pub(super) fn start(node: NodeHandle<Event>, job: Job, answer: Option<Responder>) {
    thread("conet-mover", move || {
        let pid = job.pid;
        let turn = Arc::clone(&job.turn);
        // It guards no data: a panic elsewhere leaves nothing half done.
        let turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = run(&node, job, answer.as_ref());
        drop(turn);
        node.post(Event::Worked { pid, outcome: Box::new(outcome), answer });
    });
}

fn run(node: &NodeHandle<Event>, job: Job, answer: Option<&Responder>) -> Outcome {
    let begin = Instant::now();
    let mut outcome = Outcome {
        returned: None,
        out: None,
        is_direct: false,
        is_still_away: false,
        why: job.why.clone(),
        is_unasked: answer.is_none(),
        failure: None,
        total: Duration::ZERO,
    };
    let result = (|| {
        if let (true, Some(to)) = (is_away(job.pid), &job.to) {
            return direct::move_on(node, &job, to, answer, &mut outcome);
        }
        if is_away(job.pid) {
            tell_progress(answer, "home", "asking it home");
            match bring_home(node, &job) {
                Ok(returned) => outcome.returned = Some(returned),
                Err(error) => return Err(failure(job.pid, &error)),
            }
        }
        if let Some(to) = &job.to {
            outcome.out = Some(move_out(node, &job, to, answer)?);
        }
        Ok(())
    })();
    outcome.is_still_away = result.is_err() && is_away(job.pid);
    outcome.failure = result.err();
    outcome.total = begin.elapsed();
    outcome
}

/// Whether the process is a deputy, whose program is away: it says so itself.
pub(super) fn is_away(pid: u32) -> bool {
    use conet_deputy_link::phase;
    as_pid(pid).and_then(|pid| mover::status(pid).ok()).is_some_and(|status| {
        matches!(status.phase, phase::STARTING | phase::SERVING | phase::COMING)
    })
}

pub(super) fn tell_progress(answer: Option<&Responder>, phase: &str, detail: impl Into<String>) {
    if let Some(answer) = answer {
        answer.progress(phase, detail);
    }
}

/// What a failed move is to the user.
pub(super) fn failure(pid: u32, error: &MoveError) -> Failure {
    let (code, remedy) = match error {
        MoveError::Locked(locks) => {
            (locks.first().map_or("locked", Lock::code), format!("see conet why {pid}"))
        }
        MoveError::Gone => ("ended", "its output and status are as if it had not moved".to_owned()),
        MoveError::Refused { .. } => ("refused", "see conet doctor on the other node".to_owned()),
        MoveError::Channel(_) => {
            ("link", "see conet peers, and the log of the other node".to_owned())
        }
        MoveError::Process(_) => ("failed", "see the daemon's log".to_owned()),
        MoveError::Replaced => ("replaced", "try again".to_owned()),
        MoveError::Late => ("late", "try again".to_owned()),
        MoveError::Lost(_) => ("lost", format!("see conet ps for process {pid}")),
    };
    Failure::new(code, format!("process {pid} did not move: {error}"), remedy)
}

/// What the user is told of a program that left one node and did not come to the other.
pub(super) fn came_home_instead(pid: u32, to: &str, error: &MoveError) -> Failure {
    if matches!(error, MoveError::Gone | MoveError::Lost(_)) {
        return failure(pid, error);
    }
    Failure::new(
        "came-home",
        format!("process {pid} came home and did not go on to {to}: {error}"),
        "try again; see the log of that node",
    )
}

fn bring_home(node: &NodeHandle<Event>, job: &Job) -> Result<Returned, MoveError> {
    let pid = as_pid(job.pid).ok_or(MoveError::Gone)?;
    // A signal that waits for it should not wait for them.
    if job.how == How::Precopy && job.why.is_none() {
        mover::slices(pid, || ask_warden(node, job, Wish::Slice))?;
    }
    mover::bring_home(pid, || ask_warden(node, job, Wish::Bell))
}

/// Asks the warden of a program that is away for something.
pub(super) fn ask_warden(node: &NodeHandle<Event>, job: &Job, wish: Wish) {
    let Some((peer, ticket)) = &job.record.stay else { return };
    let ask = match wish {
        Wish::Bell => Ask::Ring(*ticket),
        Wish::Slice => Ask::Slice(*ticket),
    };
    if let Err(error) = node.ask_peer(peer, ask.to_bytes(), RING_LIMIT) {
        // A program that makes calls comes without the bell, and needs no slices.
        tracing::debug!(%error, peer, ?wish, "a warden could not be asked");
    }
}

/// What a mover needs to take a program to another node.
#[derive(Debug)]
pub(super) struct Passage {
    pub(super) pid: Pid,
    pub(super) stream: TcpStream,
    pub(super) secret: LinkSecret,
    pub(super) policy: Policy,
    pub(super) how: mover::How,
    /// For the deputy, to reach this daemon by.
    pub(super) line: DeputyEnd,
}

fn move_out(
    node: &NodeHandle<Event>,
    job: &Job,
    to: &str,
    answer: Option<&Responder>,
) -> Result<Out, Failure> {
    let Passage { pid, stream, secret, policy, how, line } = prepare(node, job, to, answer)?;
    let moved = mover::move_out(pid, stream, secret, policy, how, &line)
        .map_err(|error| failure(job.pid, &error))?;
    Ok(arrived(node, job, to, moved))
}

/// Asks a node to host the program, and makes its link.
pub(super) fn prepare(
    node: &NodeHandle<Event>,
    job: &Job,
    to: &str,
    answer: Option<&Responder>,
) -> Result<Passage, Failure> {
    let config = node.config();
    let peer = peer_that_hosts(config, to)?;
    let Some(address) = peer.endpoint else {
        return Err(Failure::new(
            "no-endpoint",
            format!("where {to} is, is not known"),
            "give its endpoint in conet.toml",
        ));
    };
    let pid = as_pid(job.pid).ok_or_else(|| failure(job.pid, &MoveError::Gone))?;
    tell_progress(answer, "prepare", format!("asking {to}"));
    let root = new_root();
    ask_to_host(node, job, to, Root(root))?;
    let stream = connect(address, job.ticket, config.node.link_timeout, CONNECT_LIMIT);
    let stream = stream.map_err(|error| {
        Failure::new(
            "link",
            format!("no link to {to} at {address}: {error}"),
            "let TCP pass to the port of its conet.toml",
        )
    })?;
    tell_progress(answer, "copy", "moving memory");
    let keys = link_keys(&Key::new(root), &job.ticket.0);
    let secret = LinkSecret {
        cipher: cipher_for(peer),
        seal: keys.home_to_remote,
        open: keys.remote_to_home,
    };
    let how = match job.how {
        How::Precopy => mover::How::Precopy,
        How::Stop => mover::How::Stop,
    };
    let policy =
        Policy { is_deputy: job.policy.is_deputy || job.record.stay.is_some(), ..job.policy };
    let line = family::attend(node, (to.to_owned(), job.ticket)).map_err(|error| {
        Failure::new("failed", format!("process {} did not move: {error}", job.pid), "try again")
    })?;
    Ok(Passage { pid, stream, secret, policy, how, line })
}

/// It is at the other node.
pub(super) fn arrived(node: &NodeHandle<Event>, job: &Job, to: &str, moved: Moved) -> Out {
    let remote_pid = where_is(node, to, job);
    Out { node: to.to_owned(), ticket: job.ticket, remote_pid, moved }
}

/// What protects the links of processes that go to `peer`.
pub(super) fn cipher_for(peer: &PeerConfig) -> Cipher {
    if peer.grants.plain_links { Cipher::Plain } else { Cipher::preferred() }
}

fn ask_to_host(node: &NodeHandle<Event>, job: &Job, to: &str, root: Root) -> Result<(), Failure> {
    let local = processor().ok_or_else(|| {
        Failure::new("processor", "this processor has no XSAVE", "use a newer machine")
    })?;
    let ask = Ask::Host {
        ticket: job.ticket,
        root,
        cipher: cipher_number(cipher_for(peer_that_hosts(node.config(), to)?)),
        pid: job.pid,
        uid: job.record.uid,
        name: job.name.clone(),
        components: local.components,
        xsave_size: local.size,
    };
    let reply = node.ask_peer(to, ask.to_bytes(), ASK_LIMIT).map_err(|error| {
        Failure::new("peer", format!("{to} does not host: {error}"), "see conet peers")
    })?;
    match Answer::parse(&reply) {
        Ok(Answer::Ready) => Ok(()),
        Ok(Answer::Refused { code, sentence }) => {
            Err(Failure::new(code, format!("{to} does not host it: {sentence}"), "choose another"))
        }
        _ => Err(Failure::new(
            "peer",
            format!("{to} answered something else"),
            "run one version of conet on both nodes",
        )),
    }
}

/// A link that names its stay; `patience` is how long it may be silent later.
pub(super) fn connect(
    address: SocketAddr,
    ticket: Ticket,
    patience: Duration,
    limit: Duration,
) -> io::Result<TcpStream> {
    let mut stream = life::connect(address, limit)?;
    life::keep_alive(&stream, patience)?;
    io::Write::write_all(&mut stream, &ticket.0)?;
    Ok(stream)
}

/// The remote's pid; the hosting node learns it a moment before the process runs. None
/// where it is over already, as for a shell that goes home for a signal.
fn where_is(node: &NodeHandle<Event>, peer: &str, job: &Job) -> Option<u32> {
    let begin = Instant::now();
    while begin.elapsed() < WHERE_LIMIT && is_away(job.pid) {
        match node.ask_peer(peer, Ask::Where(job.ticket).to_bytes(), ASK_LIMIT) {
            Ok(reply) => match Answer::parse(&reply) {
                Ok(Answer::Running { remote_pid }) => return Some(remote_pid),
                Ok(Answer::Unknown | Answer::Done) => thread::sleep(Duration::from_millis(5)),
                _ => return None,
            },
            Err(error) => {
                tracing::warn!(%error, peer, "the remote's pid is not known yet");
                thread::sleep(Duration::from_millis(50));
            }
        }
    }
    None
}
