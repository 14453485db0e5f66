//! The endpoint's thread: it alone touches the hub and the socket.

use super::backlog::{Backlog, RETRY};
use super::{CallFailed, EndpointEvent, EndpointStatus, StartError, Ticket};
use crate::carrier::udp::BulkSocket;
use crate::carrier::{Carrier, Detour, StreamTarget, receive_placed, with_parts};
use crate::session::handshake::PublicKey;
use crate::session::ways::stream_number;
use crate::session::{
    BATCH_BUFFER, CallError, CallId, Event, Hub, HubConfig, Lane, ReplyFailed, Transmit,
    UnknownPeer,
};
use crate::time::Instant;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError};
use std::time::Duration;

const SOCKET: Token = Token(0);
const WAKE: Token = Token(1);
const STREAMS: Token = Token(2);
const BULK: Token = Token(3);
/// Batches for bulk taken before calls, timers and transmissions get their turn.
const BULK_BATCHES: usize = 4;
/// Datagrams taken before timers and transmissions get their turn.
const BATCH: usize = 64;
/// Wanted socket buffers: 1 MiB in flight several times over. The kernel gives
/// `net.core.rmem_max` at most, which is enough for the flow's window.
const SOCKET_BUFFER: usize = 4 * 1024 * 1024;
/// Longest UDP datagram over IPv4.
const DATAGRAM: usize = 65_536;

type CallResult = Result<Vec<u8>, CallFailed>;

/// Who waits for a call, and by which number.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) number: u64,
    pub(super) sender: Sender<CallResult>,
}

impl Answer {
    /// Who asked may have gone: an outcome that nobody takes is no failure.
    pub(super) fn end(self, result: CallResult) {
        self.sender.send(result).ok();
    }
}

/// What handles ask of the thread.
#[derive(Debug)]
pub(super) enum Command {
    Call {
        peer: PublicKey,
        lane: Lane,
        payload: Vec<u8>,
        timeout: Duration,
        answer: Answer,
    },
    Row {
        peer: PublicKey,
        lane: Lane,
        row: Vec<(Vec<u8>, bool)>,
        timeout: Duration,
        answers: Vec<Answer>,
    },
    Cancel {
        number: u64,
    },
    Reply {
        ticket: Ticket,
        payload: Vec<u8>,
        /// The rest of its row does not run.
        stops: bool,
        answer: Sender<Result<(), ReplyFailed>>,
    },
    Refuse {
        ticket: Ticket,
        answer: Sender<Result<(), ReplyFailed>>,
    },
    AddPeer {
        key: PublicKey,
        address: Option<SocketAddr>,
    },
    RemovePeer {
        key: PublicKey,
        answer: Sender<Result<(), UnknownPeer>>,
    },
    AcceptStream(TcpStream),
    Status {
        answer: Sender<EndpointStatus>,
    },
    Close,
}

pub(super) struct Driver {
    poll: Poll,
    /// Kept here too: who rings and then drops the last handle would take the bell along before it
    /// was heard.
    waker: Arc<Waker>,
    socket: mio::net::UdpSocket,
    hub: Hub,
    started: std::time::Instant,
    inbox: Receiver<Command>,
    events: Backlog,
    waiting: HashMap<(PublicKey, CallId), Answer>,
    /// The calls that are waited for, by number.
    numbers: HashMap<u64, (PublicKey, CallId)>,
    out: Vec<u8>,
    /// What stands around payloads that are received where they belong.
    around: Vec<u8>,
    /// A datagram that the socket had no room for: its length and address.
    held: Option<(usize, SocketAddr)>,
    /// For large payloads; without it they go by the other one.
    bulk: Option<BulkSocket>,
    /// TCP connections to those whom UDP does not reach.
    detour: Option<Detour>,
    /// When the choice of ways is to be looked at.
    steer_at: Option<Instant>,
    closing: bool,
}

impl Driver {
    pub(super) fn new(
        socket: UdpSocket,
        mut detour: Option<Detour>,
        config: HubConfig,
        peers: &[(PublicKey, Option<SocketAddr>)],
        inbox: Receiver<Command>,
        events: SyncSender<EndpointEvent>,
    ) -> Result<Self, StartError> {
        socket.set_nonblocking(true).map_err(StartError::Socket)?;
        let buffers = socket2::SockRef::from(&socket);
        // Smaller buffers only cost speed.
        buffers.set_recv_buffer_size(SOCKET_BUFFER).ok();
        buffers.set_send_buffer_size(SOCKET_BUFFER).ok();
        let poll = Poll::new().map_err(StartError::Poll)?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE).map_err(StartError::Poll)?);
        let mut socket = mio::net::UdpSocket::from_std(socket);
        poll.registry()
            .register(&mut socket, SOCKET, Interest::READABLE | Interest::WRITABLE)
            .map_err(StartError::Poll)?;
        let started = std::time::Instant::now();
        let bulk = socket.local_addr().and_then(|at| BulkSocket::bind(at.ip())).ok();
        if let Some(bulk) = &bulk {
            let fd = bulk.socket().as_raw_fd();
            poll.registry()
                .register(&mut SourceFd(&fd), BULK, Interest::READABLE)
                .map_err(StartError::Poll)?;
        }
        let limits = config.limits.clamped();
        let events = Backlog::new(events, limits.slots, limits.unanswered_by_all);
        let mut hub = Hub::new(config)?;
        if let Some(detour) = &detour {
            let fd = detour.streams.as_fd().as_raw_fd();
            let mut source = SourceFd(&fd);
            poll.registry()
                .register(&mut source, STREAMS, Interest::READABLE)
                .map_err(StartError::Poll)?;
        }
        hub.set_bulk(bulk.as_ref().map(BulkSocket::port));
        for (key, address) in peers {
            hub.add_peer(Instant::START, *key, *address);
            if let (Some(detour), Some(address)) = (&mut detour, *address) {
                detour.add_peer(Instant::START, *key, address, StreamTarget::Tcp(address));
            }
        }
        Ok(Self {
            poll,
            waker,
            socket,
            hub,
            started,
            inbox,
            events,
            waiting: HashMap::new(),
            numbers: HashMap::new(),
            out: vec![0; BATCH_BUFFER],
            around: Vec::new(),
            held: None,
            detour,
            steer_at: None,
            bulk,
            closing: false,
        })
    }

    /// What wakes the thread when there is a command.
    pub(super) fn waker(&self) -> Arc<Waker> {
        self.waker.clone()
    }

    fn now(&self) -> Instant {
        Instant::from_start(self.started.elapsed())
    }

    pub(super) fn run(mut self) {
        let mut events = Events::with_capacity(8);
        let mut datagram = vec![0; DATAGRAM];
        let mut more = false;
        while !self.closing {
            let now = self.now();
            let room = self.events.waits().then(|| now + RETRY);
            let next = [self.hub.poll_timeout(now), self.steer_at, room];
            let next = next.into_iter().flatten().min();
            let timeout = match next {
                _ if more => Some(Duration::ZERO),
                // A full socket must not make the loop spin: writability wakes it.
                Some(_) if self.held.is_some() => Some(Duration::from_millis(1)),
                Some(at) => Some(at.since(now)),
                None => None,
            };
            match self.poll.poll(&mut events, timeout) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
            more = self.receive(&mut datagram);
            more |= self.receive_from_streams();
            more |= self.receive_bulk();
            self.obey();
            let now = self.now();
            self.hub.handle_timeout(now);
            self.steer_at = self.detour.as_mut().and_then(|one| one.steer(now, &mut self.hub));
            self.report();
            more |= self.transmit();
            self.flush_streams();
        }
        self.say_goodbye();
    }

    /// Takes up to [`BATCH`] datagrams; says whether there may be more.
    fn receive(&mut self, datagram: &mut [u8]) -> bool {
        for _ in 0..BATCH {
            let Ok((length, from)) = self.socket.recv_from(datagram) else {
                // Empty; or an error that concerns one datagram of the past.
                return false;
            };
            let now = self.now();
            // A network delivers nothing from the address of a stream: it is forged.
            if let Some(bytes) = datagram.get_mut(..length)
                && stream_number(from).is_none()
            {
                self.hub.handle_datagram(now, from, bytes);
            }
        }
        true
    }

    /// Takes what has come by streams; says whether there may be more. Their descriptor
    /// speaks up only when something new comes, so this goes on until there is nothing.
    fn receive_from_streams(&mut self) -> bool {
        let Some(detour) = &mut self.detour else { return false };
        let (hub, started) = (&mut self.hub, self.started);
        for _ in 0..BATCH {
            detour.streams.on_woken();
            let taken = detour.streams.receive(|incoming| {
                let now = Instant::from_start(started.elapsed());
                hub.handle_datagram(now, incoming.from, incoming.bytes);
                true
            });
            match taken {
                Ok(0) => return false,
                Ok(_) => {}
                Err(_) => {
                    // epoll itself has failed: what is left is UDP.
                    self.detour = None;
                    return false;
                }
            }
        }
        true
    }

    /// Takes some batches for bulk; says whether there may be more.
    fn receive_bulk(&mut self) -> bool {
        let now = self.now();
        let (Some(bulk), hub) = (&mut self.bulk, &mut self.hub) else { return false };
        if hub.bulk_expected() <= now {
            // Nothing is sent there before the first pieces have come by the other one; what
            // comes all the same waits for them.
            return false;
        }
        for _ in 0..BULK_BATCHES {
            let around = &mut self.around;
            match receive_placed(hub, around, |parts| bulk.receive_parts(parts), || now) {
                Ok(None) => {}
                Ok(Some(taken)) if taken > 0 => continue,
                Ok(Some(_)) | Err(_) => return false,
            }
            let taken = bulk.receive(|incoming| {
                hub.handle_marked_datagram(now, incoming.from, incoming.bytes, incoming.marked);
            });
            if !taken.is_ok_and(|taken| taken > 0) {
                return false;
            }
        }
        true
    }

    fn obey(&mut self) {
        loop {
            match self.inbox.try_recv() {
                Ok(Command::Close) | Err(TryRecvError::Disconnected) => {
                    self.closing = true;
                    return;
                }
                Ok(command) => self.obey_one(command),
                Err(TryRecvError::Empty) => return,
            }
        }
    }

    /// Whoever asked may have gone: an answer that nobody takes is no failure.
    fn obey_one(&mut self, command: Command) {
        let now = self.now();
        match command {
            Command::Call { peer, lane, payload, timeout, answer } => {
                match self.hub.call_on(now, &peer, lane, payload, Some(now + timeout)) {
                    Ok(id) => self.wait(peer, id, answer),
                    Err(error) => answer.end(Err(error.into())),
                }
            }
            Command::Row { peer, lane, row, timeout, answers } => {
                let (mut ids, until) = (Vec::new(), Some(now + timeout));
                match self.hub.call_row(now, &peer, lane, row.into_iter(), until, &mut ids) {
                    Ok(()) => {
                        ids.into_iter().zip(answers).for_each(|(id, its)| self.wait(peer, id, its));
                    }
                    Err(error) => answers.into_iter().for_each(|its| its.end(Err(error.into()))),
                }
            }
            Command::Cancel { number } => {
                // It may have ended, and its peer may have been removed.
                if let Some((peer, id)) = self.numbers.get(&number) {
                    self.hub.cancel(now, peer, *id).ok();
                }
            }
            Command::Reply { ticket, payload, stops, answer } => {
                let (peer, id) = (&ticket.peer, ticket.id);
                let replied = if stops {
                    self.hub.reply_and_stop(peer, id, payload)
                } else {
                    self.hub.reply(peer, id, payload)
                };
                answer.send(replied).ok();
            }
            Command::Refuse { ticket, answer } => {
                answer.send(self.hub.refuse(&ticket.peer, ticket.id)).ok();
            }
            Command::AddPeer { key, address } => {
                self.hub.add_peer(now, key, address);
                if let (Some(detour), Some(address)) = (&mut self.detour, address) {
                    detour.add_peer(now, key, address, StreamTarget::Tcp(address));
                }
            }
            Command::RemovePeer { key, answer } => {
                answer.send(self.remove_peer(key)).ok();
            }
            Command::AcceptStream(stream) => {
                if let Some(detour) = &mut self.detour {
                    // Out of memory or watches: the connection is dropped, and made again.
                    detour.streams.accept_tcp(stream).ok();
                }
            }
            Command::Status { answer } => {
                let peers = self.hub.status(now).collect();
                answer.send(EndpointStatus { peers, strays: self.hub.strays() }).ok();
            }
            Command::Close => self.closing = true,
        }
    }

    /// What waits for it ends.
    fn remove_peer(&mut self, key: PublicKey) -> Result<(), UnknownPeer> {
        // What it said before goes first.
        self.report();
        let removed = self.hub.remove_peer(&key);
        if let Some(detour) = &mut self.detour {
            detour.remove_peer(&key);
        }
        for (_, waiting) in self.waiting.extract_if(|(peer, _), _| *peer == key) {
            self.numbers.remove(&waiting.number);
            waiting.end(Err(CallError::Unknown.into()));
        }
        removed
    }

    fn wait(&mut self, peer: PublicKey, id: CallId, answer: Answer) {
        self.numbers.insert(answer.number, (peer, id));
        self.waiting.insert((peer, id), answer);
    }

    fn report(&mut self) {
        while let Some(event) = self.events.flush() {
            self.on_untaken(event);
        }
        while let Some(event) = self.hub.poll_event() {
            let event = match event {
                Event::Up(peer) => EndpointEvent::PeerUp(peer),
                Event::Down(peer, reason) => EndpointEvent::PeerDown(peer, reason),
                Event::Call { peer, id, lane, payload, argument } => {
                    EndpointEvent::Call { ticket: Ticket { peer, id }, lane, payload, argument }
                }
                Event::Cancelled { peer, id } => EndpointEvent::Cancelled(Ticket { peer, id }),
                Event::Ended { peer, call, result } => {
                    if let Some(answer) = self.waiting.remove(&(peer, call)) {
                        self.numbers.remove(&answer.number);
                        answer.end(result.map_err(CallFailed::from));
                    }
                    continue;
                }
            };
            if let Err(event) = self.events.push(event) {
                self.on_untaken(event);
            }
        }
    }

    /// Nobody listens, as at a pure client, or too many calls wait to be read.
    fn on_untaken(&mut self, event: EndpointEvent) {
        if let EndpointEvent::Call { ticket, .. } = event {
            self.hub.refuse(&ticket.peer, ticket.id).ok();
        }
    }

    /// Sends what there is to send, and one batch for bulk; says whether there may be more.
    fn transmit(&mut self) -> bool {
        let batch = self.bulk.as_ref().map(BulkSocket::batch);
        loop {
            let (length, to) = match self.held.take() {
                Some(held) => held,
                None => {
                    let now = self.now();
                    match self.hub.poll_parts(now, &mut self.out, batch) {
                        Some(transmit) if transmit.is_bulk => {
                            self.transmit_bulk(&transmit);
                            // Calls get a look between two batches.
                            return true;
                        }
                        Some(transmit) => (transmit.length, transmit.to),
                        None => return false,
                    }
                }
            };
            let Some(bytes) = self.out.get(..length) else { return false };
            if stream_number(to).is_some() {
                if let Some(detour) = &mut self.detour {
                    // An error is one of epoll, and is seen when it is asked.
                    detour.streams.send(to, bytes, length).ok();
                }
                continue;
            }
            match self.socket.send_to(bytes, to) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.held = Some((length, to));
                    return false;
                }
                // Unreachable, no buffers: to the session it is a lost packet.
                Ok(_) | Err(_) => {}
            }
        }
    }

    fn flush_streams(&mut self) {
        if let Some(detour) = &mut self.detour {
            // As when it is sent.
            detour.streams.flush().ok();
        }
    }

    fn transmit_bulk(&mut self, transmit: &Transmit) {
        let Some(bulk) = &mut self.bulk else { return };
        let sent = if transmit.in_parts {
            with_parts(&self.hub, transmit, &self.out, |parts| {
                bulk.send_parts(transmit.to, parts, transmit.segment)
            })
        } else {
            let Some(bytes) = self.out.get(..transmit.length) else { return };
            bulk.send(transmit.to, bytes, transmit.segment)
        };
        // An error of the socket is a lost packet as well: soon the other way is taken.
        if let Ok(false) = sent {
            self.hub.handle_too_long(transmit);
        }
    }

    fn say_goodbye(&mut self) {
        let now = self.now();
        while let Some(to) = self.hub.poll_farewell(now, &mut self.out) {
            // The peer finds out by itself if this is lost.
            if let Some(detour) = self.detour.as_mut().filter(|_| stream_number(to).is_some()) {
                detour.streams.send(to, &self.out, self.out.len()).ok();
            } else {
                self.socket.send_to(&self.out, to).ok();
            }
        }
        self.flush_streams();
        for (_, answer) in self.waiting.drain() {
            answer.end(Err(CallFailed::Closed));
        }
    }
}
