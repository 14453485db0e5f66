//! `conet up`: one process per host, one thread that owns the node's state.
//!
//! ```text
//!  control socket ─┐                                   ┌─ Tunnel (own thread)
//!  signals ────────┼──► control thread: peers, guests, ─┼─ GuestPorts (in the kernel)
//!  endpoint events ┤    processes; asks and answers     └─ Endpoint (own thread)
//!  threads' posts ─┘
//! ```
//!
//! The thread sleeps in one `poll` and never blocks elsewhere, save for short
//! questions to the endpoint's and the tunnel's threads.
//!
//! Start: lock of the state directory (one daemon each), endpoint, tunnel,
//! guests, and the control socket last: a daemon that answers is whole. End, on
//! SIGTERM, SIGINT or a request: the socket, the tunnel, and the guests in which
//! nothing runs are removed; guests with programs in them, and processes that
//! moved, stay for the next daemon. After a SIGKILL the kernel has removed the
//! tunnel's device, and all else is found again and taken over.
//!
//! What it is not: it neither encrypts nor moves anything itself.

mod forwards;
mod guests;
mod start;

use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use conet_dataplane::DropCounts;
use conet_transport::endpoint::{Endpoint, EndpointEvent, Ticket};
use conet_transport::session::handshake::PublicKey;
use conet_transport::session::ways::stream_number;
use conet_tunnel::Tunnel;
use conet_wire::control::{self, Failure, Request, Response};
use conet_wire::peer::{Answer, Ask, Hello, Refusal, VERSION};
use mio::{Events, Poll, Token, Waker};

use crate::caller::Caller;
use crate::config::{Config, Grants};
use crate::control::{ControlServer, Responder};
use crate::identity::X25519Public;
use crate::peers::{self, AskError, PeerResponder, Peers};
use crate::processes::Processes;

use forwards::Forwards;
pub use guests::SERVER_COMMAND;
use guests::{GuestEvent, Guests, Piece};
pub(crate) use start::chain;
pub use start::{DaemonError, run};

/// Wakes the thread for messages and answers.
const WAKE: Token = Token(0);
/// The read end of the signals' pipe.
const SIGNALS: Token = Token(1);
/// The control socket, and its connections from here upwards.
const CONTROL: usize = 2;
/// This program's version.
const CONET: &str = env!("CARGO_PKG_VERSION");

/// What reaches the control thread from others.
#[derive(Debug)]
enum Message<E> {
    Session(EndpointEvent),
    Process(E),
    Guest(Box<GuestEvent>),
}

/// What the process manager's threads hold of the daemon.
#[derive(Debug)]
pub struct NodeHandle<E> {
    config: Arc<Config>,
    endpoint: Endpoint,
    messages: Sender<Message<E>>,
    waker: Arc<Waker>,
}

impl<E> Clone for NodeHandle<E> {
    fn clone(&self) -> Self {
        Self {
            config: Arc::clone(&self.config),
            endpoint: self.endpoint.clone(),
            messages: self.messages.clone(),
            waker: Arc::clone(&self.waker),
        }
    }
}

impl<E> NodeHandle<E> {
    /// The node's configuration.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Tells the process manager something, on the control thread
    /// ([`Processes::handle_event`]). After the daemon's end nobody hears it.
    pub fn post(&self, event: E) {
        let sent = self.messages.send(Message::Process(event)).is_ok();
        if sent && let Err(error) = self.waker.wake() {
            tracing::warn!(%error, "cannot wake the control thread; the event waits");
        }
    }

    /// Hands over a connection that somebody made to the node's port and that is not a
    /// process's link: a session's, or a stranger's.
    pub(crate) fn accept_session(&self, stream: TcpStream) {
        if let Err(error) = self.endpoint.accept_stream(stream) {
            tracing::debug!(%error, "a connection came too late");
        }
    }

    /// Asks the process manager of the peer of this name
    /// ([`Processes::handle_peer_ask`] there) and waits, `limit` at most. Not for
    /// the control thread, which must not wait.
    ///
    /// # Errors
    ///
    /// [`AskError`], which tells whether the peer may have acted all the same.
    pub fn ask_peer(
        &self,
        peer: &str,
        message: Vec<u8>,
        limit: Duration,
    ) -> Result<Vec<u8>, AskError> {
        peers::ask(&self.endpoint, &self.config, peer, message, limit)
    }
}

/// A running daemon; `start` puts it together.
struct Daemon<P: Processes> {
    config: Arc<Config>,
    started: Instant,
    poll: Poll,
    signals: UnixStream,
    messages: Receiver<Message<P::Event>>,
    endpoint: Endpoint,
    tunnel: Tunnel,
    control: ControlServer,
    peers: Peers,
    guests: Guests,
    forwards: Forwards,
    processes: P,
    ending: bool,
}

impl<P: Processes> Daemon<P> {
    /// Serves until somebody asks to end.
    fn serve(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(256);
        while !self.ending {
            let timeout = [self.processes.poll_timeout(), self.forwards.poll_timeout()]
                .into_iter()
                .flatten()
                .min()
                .map(|at| at.saturating_duration_since(Instant::now()));
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            }
            let mut requests = Vec::new();
            for event in &events {
                match event.token() {
                    SIGNALS => self.on_signal()?,
                    token if self.control.owns(token) => {
                        requests.extend(self.control.handle_event(self.poll.registry(), event));
                    }
                    // The messages are looked for below, whatever the reason to wake.
                    _ => {}
                }
            }
            self.take_messages();
            self.answer_all(requests);
            let now = Instant::now();
            if self.processes.poll_timeout().is_some_and(|at| at <= now) {
                self.processes.handle_timeout(now);
            }
            self.forwards.handle_timeout(now, &self.guests);
        }
        Ok(())
    }

    fn on_signal(&mut self) -> io::Result<()> {
        let mut byte = [0; 16];
        match io::Read::read(&mut self.signals, &mut byte) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => {
                other?;
                tracing::info!("asked to end by a signal");
                self.ending = true;
            }
        }
        Ok(())
    }

    fn take_messages(&mut self) {
        while let Ok(message) = self.messages.try_recv() {
            match message {
                Message::Process(event) => self.processes.handle_event(event),
                Message::Guest(event) => {
                    self.guests.handle_event(*event);
                    self.forwards.on_change(&self.guests);
                }
                Message::Session(EndpointEvent::PeerUp(key)) => {
                    let hello = self.hello();
                    self.peers.on_up(&self.endpoint, key, hello);
                }
                Message::Session(EndpointEvent::PeerDown(key, _)) => self.peers.on_down(key),
                Message::Session(EndpointEvent::Call { ticket, payload, .. }) => {
                    self.on_peer_call(ticket, &payload);
                }
                // Whoever holds the ticket answers in any case.
                Message::Session(EndpointEvent::Cancelled(_)) => {}
            }
        }
    }

    fn hello(&self) -> Hello {
        Hello {
            protocol: VERSION,
            name: self.config.node.name.clone(),
            conet: CONET.to_owned(),
            processes: self.processes.hosts(),
        }
    }

    fn on_peer_call(&mut self, ticket: Ticket, payload: &[u8]) {
        let key: PublicKey = ticket.peer();
        let answer = PeerResponder::new(&self.endpoint, ticket);
        // A peer that has just been taken out of the configuration.
        let Some(peer) = self.peers.config(key) else { return };
        match Ask::parse(payload) {
            Ok(Ask::Hello(hello)) => {
                answer.answer(&Answer::Hello(self.hello()));
                self.peers.on_hello(key, hello);
            }
            Ok(Ask::Process(_)) if peer.grants == Grants::default() => {
                tracing::warn!(peer = peer.name, "refused: no grant in either direction");
                answer.answer(&Answer::Refused(Refusal::NotGranted));
            }
            Ok(Ask::Process(message)) => self.processes.handle_peer_ask(peer, message, answer),
            Err(_) => answer.answer(&Answer::Refused(Refusal::Malformed)),
        }
    }

    /// Answers requests, and those that waited behind them.
    fn answer_all(&mut self, mut requests: Vec<(Caller, Request, Responder)>) {
        loop {
            for (caller, request, answer) in requests.drain(..) {
                self.answer(caller, request, answer);
            }
            requests = self.control.handle_responses(self.poll.registry());
            if requests.is_empty() {
                return;
            }
        }
    }

    fn answer(&mut self, caller: Caller, request: Request, answer: Responder) {
        let Some((request, answer)) = self.answer_about_guests(caller, request, answer) else {
            return;
        };
        match request {
            Request::Status {} => answer.answer(self.status().map(Response::Status)),
            Request::Peers {} => {
                answer.answer(self.peer_rows().map(|peers| Response::Peers { peers }));
            }
            Request::Register { pid, node } => {
                let registered = self.processes.register(caller, pid, node.as_deref());
                let node = self.config.node.name.clone();
                answer.answer(registered.map(|()| Response::Registered { pid, node }));
            }
            Request::Ps {} => {
                let processes = self.processes.list(caller);
                answer.answer(Ok(Response::Processes { processes }));
            }
            Request::Migrate { pid, to, how } => {
                self.processes.migrate(caller, pid, &to, how, answer);
            }
            Request::Why { pid } => self.processes.why(caller, pid, answer),
            Request::Trace { pid, timed } => {
                let trace = self.processes.trace(caller, pid, timed);
                answer.answer(trace.map(Response::Trace));
            }
            Request::Shutdown {} if caller.administers => {
                tracing::info!(uid = caller.uid, "asked to end");
                self.ending = true;
                answer.answer(Ok(Response::Done {}));
            }
            Request::Shutdown {} => answer.answer(Err(Failure::new(
                "denied",
                "only root and members of group conet end the daemon",
                "ask one of them",
            ))),
            _ => answer.answer(Err(Failure::new("bug", "nobody answers that", "report it"))),
        }
    }

    /// Answers what is about guests and forwards, and gives back what is not.
    fn answer_about_guests(
        &mut self,
        caller: Caller,
        request: Request,
        answer: Responder,
    ) -> Option<(Request, Responder)> {
        match request {
            Request::Guests {} => {
                let guests = self.guests.list(&self.forwards.spoofed());
                answer.answer(Ok(Response::Guests { guests }));
            }
            Request::GuestRate { name, rates } => {
                let set = self.guests.set_rates(caller, &name, &rates);
                answer.answer(set.map(|()| Response::Done {}));
            }
            Request::GuestHold { name } => {
                answer.answer(self.guests.hold(caller, &name).map(Response::Held));
            }
            Request::GuestDrain { name } => answer.answer(self.guests.drain(caller, &name)),
            Request::GuestDrained { name } => {
                let confirmed = self.guests.confirm(caller, &name);
                answer.answer(confirmed.map(|()| Response::Done {}));
            }
            Request::GuestAccept { name, at, piece, last } => {
                let piece = Piece { at, text: &piece, is_last: last };
                answer.answer(self.guests.accept(caller, &name, piece));
            }
            Request::GuestRelease { name } => {
                answer.answer(self.guests.let_go(caller, &name).map(Response::Held));
            }
            Request::GuestAdd { name, kind, addresses, rates, queues } => {
                self.guests.add(caller, name, &kind, (addresses, &rates, queues), answer);
                // Its link is behind the rules before it is there.
                self.forwards.on_change(&self.guests);
            }
            Request::GuestRemove { name } => self.guests.remove(caller, &name, answer),
            Request::Forwards {} => {
                answer.answer(Ok(Response::Forwards { forwards: self.forwards.list() }));
            }
            Request::ForwardAdd { forward } => {
                self.forwards.add(caller, &forward, &self.guests, answer);
            }
            Request::ForwardRemove { forward } => {
                self.forwards.remove(caller, &forward, &self.guests, answer);
            }
            other => return Some((other, answer)),
        }
        None
    }

    fn status(&mut self) -> Result<control::Status, Failure> {
        let node = &self.config.node;
        let snapshot = self.tunnel.snapshot().map_err(gone)?;
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Ok(control::Status {
            name: node.name.clone(),
            version: CONET.to_owned(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            public_key: node.identity.public().to_string(),
            wireguard_key: X25519Public::of(&node.tunnel_secret()).to_string(),
            address: node.address.to_string(),
            port: node.port,
            wireguard_port: node.wireguard_port,
            overlay: node.overlay.to_string(),
            shared_address: node.shared_address,
            device: snapshot.device.as_str().to_owned(),
            peers: count(self.config.peers.len()),
            peers_up: count(self.peers.iter().filter(|(_, state)| state.up).count()),
            drops: {
                let of_peers = snapshot.peers.iter().map(|peer| peer.drops);
                by_reason(of_peers.chain([snapshot.drops]))
            },
            ipip: ipip_path(&snapshot.ipip),
            guests: self.guests.list(&self.forwards.spoofed()),
        })
    }

    fn peer_rows(&self) -> Result<Vec<control::Peer>, Failure> {
        let tunnel = self.tunnel.snapshot().map_err(gone)?;
        let sessions = self.endpoint.status().map_err(gone)?;
        let rows = self.peers.iter().map(|(peer, state)| {
            let key = peer.tunnel_key();
            let packets = tunnel.peer(conet_tunnel::PublicKey(key.0));
            let session = peers::session_key(peer)
                .and_then(|key| sessions.peers.iter().find(|session| session.key == key));
            let address = session.and_then(|session| session.address);
            let is_stream = address.is_some_and(|address| stream_number(address).is_some());
            let carrier = if is_stream { "tcp" } else { "udp" };
            let address = address.filter(|_| !is_stream).or(peer.endpoint);
            control::Peer {
                name: peer.name.clone(),
                public_key: peer.key.identity().map(|key| key.to_string()),
                wireguard_key: key.to_string(),
                mode: peer.mode.to_string(),
                endpoint: address.map(|address| address.to_string()),
                carrier: state.up.then(|| carrier.to_owned()),
                tunnel_endpoint: packets
                    .and_then(|packets| packets.endpoint)
                    .map(|address| address.to_string()),
                allowed_ips: peer.allowed_ips.iter().map(ToString::to_string).collect(),
                up: state.up,
                version: state.hello.as_ref().map(|hello| hello.conet.clone()),
                rtt_us: session
                    .and_then(|session| session.rtt)
                    .map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
                latest_handshake_s: packets
                    .and_then(|packets| packets.last_handshake)
                    .map(|age| age.as_secs()),
                rx_bytes: packets.map_or(0, |packets| packets.rx_bytes),
                tx_bytes: packets.map_or(0, |packets| packets.tx_bytes),
                drops: by_reason(packets.map(|packets| packets.drops)),
                in_kernel: packets.is_some_and(|packets| packets.in_kernel),
                path_mtu: packets.map(|packets| packets.path_mtu),
                keepalive_s: packets.and_then(|packets| packets.keepalive),
                preshared_key: peer.preshared_key.is_some(),
                guests_from: peer.grants.guests_from,
                host_for_us: peer.grants.host_for_us,
            }
        });
        Ok(rows.collect())
    }
}

/// Where mode `ipip` is carried, in words.
fn ipip_path(path: &conet_tunnel::IpipPath) -> Option<String> {
    use conet_tunnel::IpipPath;
    match path {
        IpipPath::Kernel => Some("kernel".to_owned()),
        IpipPath::SwitchedOff => Some("raw sockets: ipip_kernel is off".to_owned()),
        IpipPath::Refused(error) => Some(format!("raw sockets: {}", chain(&**error))),
        // No peer is in the mode.
        _ => None,
    }
}

/// Sums of counters, under the names of their reasons; those that are not 0.
fn by_reason(all: impl IntoIterator<Item = DropCounts>) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for (reason, count) in all.into_iter().flat_map(|drops| drops.nonzero().collect::<Vec<_>>()) {
        *sums.entry(reason.to_string()).or_default() += count;
    }
    sums
}

/// The failure where a thread of the daemon has died.
fn gone(error: impl std::fmt::Display) -> Failure {
    Failure::new("broken", error.to_string(), "restart the daemon: end it, then conet up")
}
