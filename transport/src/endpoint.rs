//! The UDP driver: one thread, one socket, one [`Hub`](crate::session::Hub), and TCP
//! connections where UDP is blocked, if it is told to.
//!
//! ```text
//! caller ──Command──► channel + waker ─► ┌────────┐ ◄──datagrams── socket
//! caller ◄──result─── channel ◄───────── │ thread │ ──datagrams──► socket
//! daemon ◄──Event──── channel ◄───────── └────────┘   sleeps until the hub's deadline
//! ```
//!
//! The thread owns the hub and the socket; everybody else sends it messages. A call
//! costs its caller one message and one wake-up each way. mio and not an async
//! runtime: tokio added 15 to 30 µs to a call on the reference machine.
//!
//! The socket is bound by the thread that calls [`Endpoint::start`], so it belongs
//! to that thread's network namespace for good.
//!
//! Locks: none, and the thread waits for nobody. Who does not read events is told later of
//! what has happened: some calls wait, more of them are refused, and of each peer it is told
//! how it is at last. The channels of commands and outcomes are unbounded, but hold at most
//! what the hub's limits admit per peer, as long as calls come from callers that wait for them.

mod backlog;
mod driver;

use crate::carrier::{Detour, Streams};
use crate::session::handshake::{HandshakeError, PrivateKey, PublicKey, local_features};
use crate::session::{
    CallError, CallRefused, DownReason, HubConfig, IncomingId, Lane, Limits, PeerStatus,
    ReplyFailed, Strays, UnknownPeer,
};
use driver::{Answer, Command, Driver};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

/// What an endpoint starts with.
#[derive(Debug)]
pub struct EndpointConfig {
    /// Our identity.
    pub private_key: PrivateKey,
    /// Peers from the start, with their addresses where known.
    pub peers: Vec<(PublicKey, Option<SocketAddr>)>,
    /// Bounds, the same for every peer.
    pub limits: Limits,
    /// Whether to go over to TCP where UDP is blocked.
    pub tcp_fallback: TcpFallback,
    /// Features to offer, as [`HubConfig::features`] has them: with
    /// [`FEATURE_PLAIN`](crate::session::handshake::FEATURE_PLAIN), packets to peers that offer
    /// it too are neither sealed nor signed.
    pub features: u32,
}

/// Whether a session goes over to a TCP connection where UDP is blocked (see
/// [`crate::session::ways`]). All addresses of peers then stand for both.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum TcpFallback {
    /// By UDP or not at all.
    #[default]
    Off,
    /// The endpoint takes connections at its UDP socket's address and port.
    Listen,
    /// That port is somebody else's, who brings what is not his by
    /// [`Endpoint::accept_stream`].
    Handed,
}

impl EndpointConfig {
    /// Without peers, with the default limits, over UDP alone, sealed.
    #[must_use]
    pub fn new(private_key: PrivateKey) -> Self {
        Self {
            private_key,
            peers: Vec::new(),
            limits: Limits::default(),
            tcp_fallback: TcpFallback::Off,
            features: local_features(),
        }
    }
}

/// Why an endpoint did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// `bind(2)` failed: the address is taken or not ours.
    #[error("bind the UDP socket to {1}")]
    Bind(#[source] io::Error, SocketAddr),
    /// No TCP socket could be had at the UDP socket's address: the port is taken.
    #[error("listen for TCP connections at {1}")]
    Listen(#[source] io::Error, SocketAddr),
    /// The socket's address could not be read, or it could not be made non-blocking.
    #[error("set up the UDP socket")]
    Socket(#[source] io::Error),
    /// `epoll_create1(2)`, `epoll_ctl(2)` or `eventfd(2)` failed.
    #[error("set up polling")]
    Poll(#[source] io::Error),
    /// `clone(2)` failed.
    #[error("start the endpoint's thread")]
    Thread(#[source] io::Error),
    /// No randomness.
    #[error(transparent)]
    Hub(#[from] HandshakeError),
}

/// Why a call brought no reply.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CallFailed {
    /// It was not taken; it never ran.
    #[error(transparent)]
    Refused(#[from] CallRefused),
    /// It ended without a reply.
    #[error(transparent)]
    Ended(#[from] CallError),
    /// The endpoint was closed while it waited.
    #[error("endpoint is closed; the call may have run")]
    Closed,
}

impl CallFailed {
    /// Whether the peer may have run the call, so that doing it again is not safe by
    /// itself.
    #[must_use]
    pub const fn may_have_run(&self) -> bool {
        matches!(self, Self::Ended(CallError::TimedOut | CallError::Unknown) | Self::Closed)
    }
}

/// The endpoint's thread has ended; see [`Endpoint::close`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("endpoint is closed")]
pub struct Closed;

/// Names a call of a peer's, to answer it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Ticket {
    pub(crate) peer: PublicKey,
    pub(crate) id: IncomingId,
}

impl Ticket {
    /// Who called.
    #[must_use]
    pub const fn peer(&self) -> PublicKey {
        self.peer
    }
}

/// What happened at an endpoint.
#[derive(Debug, Eq, PartialEq)]
pub enum EndpointEvent {
    /// A session with the peer stands.
    PeerUp(PublicKey),
    /// It stands no more.
    PeerDown(PublicKey, DownReason),
    /// A peer calls: answer with [`Endpoint::reply`] or [`Endpoint::refuse`].
    Call {
        /// To answer with.
        ticket: Ticket,
        /// How urgent it is; its reply is as urgent.
        lane: Lane,
        /// What it says.
        payload: Vec<u8>,
        /// In a row: the result of the call before it.
        argument: Option<Vec<u8>>,
    },
    /// The peer no longer waits for this call; it must still be answered.
    Cancelled(Ticket),
}

/// A call on its way; dropping it leaves the call running until its time is up.
#[derive(Debug)]
pub struct PendingCall {
    result: Receiver<Result<Vec<u8>, CallFailed>>,
    /// Of the endpoint, which it does not keep running, and the call's number there.
    endpoint: Weak<Shared>,
    number: u64,
}

impl PendingCall {
    /// Waits for the outcome; the call's own timeout bounds it.
    ///
    /// # Errors
    ///
    /// See [`CallFailed`].
    pub fn wait(self) -> Result<Vec<u8>, CallFailed> {
        self.result.recv().unwrap_or(Err(CallFailed::Closed))
    }

    /// Gives the call up: unless it has ended already, it ends at once, as
    /// [`CallError::Cancelled`] if it never ran and as [`CallError::Unknown`] if it may have,
    /// and the peer is told.
    pub fn cancel(&self) {
        if let Some(endpoint) = self.endpoint.upgrade() {
            // The endpoint is closed: it has ended by that.
            endpoint.tell(Command::Cancel { number: self.number }).ok();
        }
    }

    /// Waits `time` at most; `None` if the call has not ended by then.
    pub fn wait_timeout(&self, time: Duration) -> Option<Result<Vec<u8>, CallFailed>> {
        match self.result.recv_timeout(time) {
            Ok(result) => Some(result),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(CallFailed::Closed)),
        }
    }
}

/// What an endpoint looks like now.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct EndpointStatus {
    /// All peers, by key.
    pub peers: Vec<PeerStatus>,
    /// Datagrams that belonged to no peer.
    pub strays: Strays,
}

#[derive(Debug)]
struct Shared {
    commands: Sender<Command>,
    waker: Arc<mio::Waker>,
    /// Calls so far: what names one until the hub does.
    calls: AtomicU64,
}

impl Shared {
    fn tell(&self, command: Command) -> Result<(), Closed> {
        self.commands.send(command).map_err(|_| Closed)?;
        // A full eventfd means that a wake-up is on its way already.
        self.waker.wake().map_err(|_| Closed)
    }
}

/// A handle to a running endpoint; clones are handles to the same one.
///
/// The thread ends when the last handle is dropped, without waiting for it, or
/// when [`close`](Self::close) is called.
#[derive(Clone, Debug)]
pub struct Endpoint {
    shared: Arc<Shared>,
    address: SocketAddr,
    public_key: PublicKey,
}

/// The thread of an endpoint.
#[derive(Debug)]
pub struct EndpointThread(JoinHandle<()>);

impl EndpointThread {
    /// Waits until the thread has ended; says whether it ended well.
    pub fn join(self) -> bool {
        self.0.join().is_ok()
    }
}

/// What [`Endpoint::start`] gives.
#[derive(Debug)]
pub struct Started {
    /// To call and answer.
    pub endpoint: Endpoint,
    /// What peers do. Calls that are not read wait, [`Limits::slots`] of all peers beyond a
    /// thousand; more are refused.
    pub events: Receiver<EndpointEvent>,
    /// To wait for the end.
    pub thread: EndpointThread,
}

/// The way round where UDP is blocked, for a UDP socket at `address`.
fn detour(fallback: TcpFallback, address: SocketAddr) -> Result<Option<Detour>, StartError> {
    let failed = |error| StartError::Listen(error, address);
    if fallback == TcpFallback::Off {
        return Ok(None);
    }
    let mut streams = Streams::new().map_err(StartError::Poll)?;
    if fallback == TcpFallback::Listen {
        let listener = TcpListener::bind(address).map_err(failed)?;
        streams.listen_tcp(listener).map_err(failed)?;
    }
    Ok(Some(Detour::new(streams)))
}

impl Endpoint {
    /// Binds a UDP socket to `listen` and serves it on a thread of its own.
    ///
    /// # Errors
    ///
    /// See [`StartError`].
    pub fn start(listen: SocketAddr, config: EndpointConfig) -> Result<Started, StartError> {
        let socket = UdpSocket::bind(listen).map_err(|error| StartError::Bind(error, listen))?;
        Self::start_on(socket, config)
    }

    /// Serves a socket that is bound already, in whatever namespace.
    ///
    /// # Errors
    ///
    /// See [`StartError`].
    pub fn start_on(socket: UdpSocket, config: EndpointConfig) -> Result<Started, StartError> {
        let EndpointConfig { private_key, peers, limits, tcp_fallback, features } = config;
        let public_key = private_key.public();
        let hub = HubConfig { limits, features, ..HubConfig::new(private_key) };
        let address = socket.local_addr().map_err(StartError::Socket)?;
        let detour = detour(tcp_fallback, address)?;
        let (commands, inbox) = channel();
        let (events, outbox) = sync_channel(backlog::CHANNEL);
        let driver = Driver::new(socket, detour, hub, &peers, inbox, events)?;
        let waker = driver.waker();
        let thread = std::thread::Builder::new()
            .name("conet-endpoint".to_owned())
            .spawn(move || driver.run())
            .map_err(StartError::Thread)?;
        let shared = Arc::new(Shared { commands, waker, calls: AtomicU64::new(0) });
        let endpoint = Self { shared, address, public_key };
        Ok(Started { endpoint, events: outbox, thread: EndpointThread(thread) })
    }

    /// Our key.
    #[must_use]
    pub const fn public_key(&self) -> PublicKey {
        self.public_key
    }

    /// The address that the socket is bound to.
    #[must_use]
    pub const fn local_addr(&self) -> SocketAddr {
        self.address
    }

    fn tell(&self, command: Command) -> Result<(), Closed> {
        self.shared.tell(command)
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, Closed> {
        let (answer, result) = channel();
        self.tell(command(answer))?;
        result.recv().map_err(|_| Closed)
    }

    /// Calls `peer` and waits for the reply, `timeout` at most.
    ///
    /// # Errors
    ///
    /// See [`CallFailed`].
    pub fn call(
        &self,
        peer: PublicKey,
        payload: Vec<u8>,
        timeout: Duration,
    ) -> Result<Vec<u8>, CallFailed> {
        self.begin(peer, payload, timeout).wait()
    }

    /// Calls `peer` without waiting, on [`Lane::Calls`].
    #[must_use]
    pub fn begin(&self, peer: PublicKey, payload: Vec<u8>, timeout: Duration) -> PendingCall {
        self.begin_on(Lane::Calls, peer, payload, timeout)
    }

    /// Calls `peer` without waiting, on a lane.
    #[must_use]
    pub fn begin_on(
        &self,
        lane: Lane,
        peer: PublicKey,
        payload: Vec<u8>,
        timeout: Duration,
    ) -> PendingCall {
        let (pending, answer) = self.pending();
        let call = Command::Call { peer, lane, payload, timeout, answer: answer.clone() };
        if self.tell(call).is_err() {
            answer.end(Err(CallFailed::Closed));
        }
        pending
    }

    /// Calls `peer` in a row without waiting: each call has the result of the one before as an
    /// argument, and all go at once; see [`Hub::call_row`](crate::session::Hub::call_row). With
    /// `true` a call runs also when the one before it was answered by
    /// [`reply_and_stop`](Self::reply_and_stop). A row that is refused fails as a whole.
    #[must_use]
    pub fn begin_row(
        &self,
        lane: Lane,
        peer: PublicKey,
        row: Vec<(Vec<u8>, bool)>,
        timeout: Duration,
    ) -> Vec<PendingCall> {
        let (pending, answers): (Vec<_>, Vec<_>) = row.iter().map(|_| self.pending()).unzip();
        let call = Command::Row { peer, lane, row, timeout, answers: answers.clone() };
        if self.tell(call).is_err() {
            for answer in answers {
                answer.end(Err(CallFailed::Closed));
            }
        }
        pending
    }

    /// The two ends of a call that is to be made.
    fn pending(&self) -> (PendingCall, Answer) {
        let (sender, result) = channel();
        let number = self.shared.calls.fetch_add(1, Ordering::Relaxed);
        let endpoint = Arc::downgrade(&self.shared);
        (PendingCall { result, endpoint, number }, Answer { number, sender })
    }

    /// Answers a call of a peer's.
    ///
    /// # Errors
    ///
    /// [`AnswerFailed`].
    pub fn reply(&self, ticket: Ticket, payload: Vec<u8>) -> Result<(), AnswerFailed> {
        Ok(self.ask(|answer| Command::Reply { ticket, payload, stops: false, answer })??)
    }

    /// Answers a call that did not go well: to its caller this is a reply as any other, but
    /// calls of its row that want a good one do not run.
    ///
    /// # Errors
    ///
    /// [`AnswerFailed`].
    pub fn reply_and_stop(&self, ticket: Ticket, payload: Vec<u8>) -> Result<(), AnswerFailed> {
        Ok(self.ask(|answer| Command::Reply { ticket, payload, stops: true, answer })??)
    }

    /// Answers a call that was not run and will not be.
    ///
    /// # Errors
    ///
    /// [`AnswerFailed`].
    pub fn refuse(&self, ticket: Ticket) -> Result<(), AnswerFailed> {
        Ok(self.ask(|answer| Command::Refuse { ticket, answer })??)
    }

    /// Allows a peer, or changes the address of one; see
    /// [`Hub::add_peer`](crate::session::Hub::add_peer).
    ///
    /// # Errors
    ///
    /// [`Closed`].
    pub fn add_peer(&self, key: PublicKey, address: Option<SocketAddr>) -> Result<(), Closed> {
        self.tell(Command::AddPeer { key, address })
    }

    /// Takes a TCP connection that somebody made to us, and of which nothing has been
    /// read; whoever that is proves itself by its packets, as on a connection to our own
    /// port. Without a fallback it is closed.
    ///
    /// # Errors
    ///
    /// [`Closed`].
    pub fn accept_stream(&self, stream: TcpStream) -> Result<(), Closed> {
        self.tell(Command::AcceptStream(stream))
    }

    /// Forgets a peer; calls to it end as [`CallError::Unknown`].
    ///
    /// # Errors
    ///
    /// [`RemoveFailed`].
    pub fn remove_peer(&self, key: PublicKey) -> Result<(), RemoveFailed> {
        Ok(self.ask(|answer| Command::RemovePeer { key, answer })??)
    }

    /// A snapshot of all peers.
    ///
    /// # Errors
    ///
    /// [`Closed`].
    pub fn status(&self) -> Result<EndpointStatus, Closed> {
        self.ask(|answer| Command::Status { answer })
    }

    /// Says goodbye to all peers and ends the thread; further use fails as closed.
    pub fn close(&self) {
        // Closed already is as good.
        self.tell(Command::Close).ok();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Without a handle nobody can call any more; the thread may be gone already.
        self.commands.send(Command::Close).ok();
        self.waker.wake().ok();
    }
}

/// Why an answer was not taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AnswerFailed {
    /// See [`ReplyFailed`].
    #[error(transparent)]
    Reply(#[from] ReplyFailed),
    /// See [`Closed`].
    #[error(transparent)]
    Closed(#[from] Closed),
}

/// Why a peer was not removed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RemoveFailed {
    /// It was not there.
    #[error(transparent)]
    Unknown(#[from] UnknownPeer),
    /// See [`Closed`].
    #[error(transparent)]
    Closed(#[from] Closed),
}
