//! Taking an established connection out of its kernel.
//!
//! ```text
//! freeze ──► Frozen ──commit──► Gone ──release──► (nothing left)
//!              │
//!              └── rollback, or drop ──► the connection lives on
//! ```
//!
//! The order is the one that loses nothing: lock, options, repair mode, state,
//! lengths, windows, queues. A packet that was past the lock's hook when it closed
//! may still be worked off by another CPU; so sequence numbers, windows and lengths
//! are read before and after the queues, and all is read again if they differ.
//!
//! Invariants: whatever fails, the socket leaves repair mode and the lock is
//! released; from [`Frozen::commit`] on, the socket exists nowhere in this kernel,
//! and no packet said so.

use crate::Host;
use crate::kernel::{CallFailed, Kernel, Queued, REPAIR_OFF, REPAIR_ON, RepairQueue, Socket, opt};
use crate::lock::{Flow, Held, Lock, LockError};
use crate::options::{CARRIED, SavedOption};
use crate::state::{Buffers, MAX_QUEUE, RepairWindow, SavedSocket, WindowScales};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

/// Rounds of reading before a socket counts as restless. One repetition was enough
/// whenever a packet was underway.
const ROUNDS: u32 = 8;

/// A TCP state, by its number in `net/tcp_states.h`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TcpState(pub u8);

impl TcpState {
    /// The only state that moves, so far.
    pub const ESTABLISHED: Self = Self(1);
}

impl fmt::Display for TcpState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 13] = [
            "none",
            "ESTABLISHED",
            "SYN_SENT",
            "SYN_RECV",
            "FIN_WAIT1",
            "FIN_WAIT2",
            "TIME_WAIT",
            "CLOSE",
            "CLOSE_WAIT",
            "LAST_ACK",
            "LISTEN",
            "CLOSING",
            "NEW_SYN_RECV",
        ];
        f.write_str(NAMES.get(usize::from(self.0)).unwrap_or(&"unknown"))
    }
}

/// Why a connection was not frozen, thawed or given away.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Not a TCP socket of IPv4 or IPv6; the caller's fault.
    #[error("not a TCP socket")]
    NotTcp,
    /// MPTCP keeps state in several sockets; it does not move.
    #[error("MPTCP connections do not move")]
    Mptcp,
    /// The kernel does TLS or another protocol on this socket; its keys and record
    /// state cannot be carried.
    #[error("a socket with TLS in the kernel does not move")]
    UpperLayer,
    /// TCP-AO (RFC 5925): its keys cannot be carried.
    #[error("a socket with TCP-AO keys does not move")]
    Ao,
    /// Only established connections move.
    #[error("a socket in state {0} does not move")]
    State(TcpState),
    /// Urgent data has no place in the saved queues.
    #[error("a socket with urgent data does not move")]
    Urgent,
    /// A link-local address means another link on another host.
    #[error("a connection of the link-local address {0} does not move")]
    LinkLocal(SocketAddr),
    /// More than [`MAX_QUEUE`] bytes wait in a queue.
    #[error("a queue of {0} bytes is too long to move")]
    QueueTooLong(usize),
    /// The socket kept changing under the lock.
    #[error("the socket does not come to rest")]
    Restless,
    /// See [`LockError`].
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The kernel refused a step.
    #[error(transparent)]
    Call(#[from] CallFailed),
}

/// What undoes the freezing.
#[derive(Debug)]
struct Undo {
    repair: bool,
    reuse_address: i32,
    peek_offset: i32,
}

/// A connection that is locked and saved, but still here.
#[must_use = "dropping it lets the connection live on"]
pub struct Frozen<'h, 'f, K: Kernel> {
    kernel: &'h K,
    fd: BorrowedFd<'f>,
    undo: Undo,
    state: SavedSocket,
    held: Option<Held<'h>>,
}

impl<K: Kernel> fmt::Debug for Frozen<'_, '_, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frozen").field("state", &self.state).finish_non_exhaustive()
    }
}

/// A connection that is no longer here, while its lock still keeps the kernel from
/// answering its packets with resets. Dropping it releases the lock.
#[derive(Debug)]
#[must_use = "dropping it releases the lock"]
pub struct Gone<'h> {
    held: Option<Held<'h>>,
}

impl Gone<'_> {
    /// Releases the lock, once the address or route has moved.
    ///
    /// # Errors
    ///
    /// See [`LockError`]; can be tried again.
    pub fn release(&mut self) -> Result<(), LockError> {
        self.held.as_mut().map_or(Ok(()), Held::release)
    }
}

impl<K: Kernel, L: Lock> Host<K, L> {
    /// Locks and saves the established connection `fd`.
    ///
    /// Other descriptors of the same socket may exist; whoever holds them must not
    /// use them until the connection has thawed here or there.
    ///
    /// # Errors
    ///
    /// See [`SaveError`]; the connection is as it was.
    pub fn freeze<'h, 'f>(&'h self, fd: BorrowedFd<'f>) -> Result<Frozen<'h, 'f, K>, SaveError> {
        let socket = Socket { kernel: &self.kernel, fd };
        let flow = admit(&socket)?;
        let held = Held::new(&self.lock, flow)?;
        // What the kernel sends from now on (paced, or repeated) runs into the lock:
        // the peer has not seen it. Restored as sent, it would wait a second for the
        // first retransmission timeout; restored as unsent, it goes out at once.
        // Asked for by TCP_INFO, which waits for the socket's own lock: a packet that had
        // passed the hook before is counted as sent by then. SIOCOUTQNSD does not wait;
        // with its answer such a packet would be sent again as new, the peer would
        // acknowledge more than this side had sent, and the connection would hang.
        let unsent_at_lock = info(&socket)?.unsent;
        let undo = Undo {
            repair: false,
            reuse_address: socket.get_i32(opt::REUSEADDR, "SO_REUSEADDR")?,
            peek_offset: peek_offset(&socket)?,
        };
        // From here on, dropping undoes.
        let state = empty(flow);
        let mut frozen = Frozen { kernel: &self.kernel, fd, undo, state, held: Some(held) };
        frozen.state.reuse_address = frozen.undo.reuse_address != 0;
        frozen.read_options()?;
        if frozen.undo.peek_offset >= 0 {
            socket.set_i32(opt::PEEK_OFF, "SO_PEEK_OFF", -1)?;
        }
        // Even a call that says it failed may have worked.
        frozen.undo.repair = true;
        socket.set_i32(opt::REPAIR, "TCP_REPAIR", REPAIR_ON)?;
        frozen.read_state()?;
        let unsent = frozen.state.unsent.max(unsent_at_lock);
        frozen.state.unsent = unsent.min(frozen.state.send.len());
        Ok(frozen)
    }
}

/// Refuses by name what does not move.
fn admit<K: Kernel>(socket: &Socket<'_, K>) -> Result<Flow, SaveError> {
    let domain = socket.get_i32(opt::DOMAIN, "SO_DOMAIN")?;
    let protocol = socket.get_i32(opt::PROTOCOL, "SO_PROTOCOL")?;
    match (domain, protocol) {
        (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_TCP) => {}
        (libc::AF_INET | libc::AF_INET6, libc::IPPROTO_MPTCP) => return Err(SaveError::Mptcp),
        _ => return Err(SaveError::NotTcp),
    }
    established(&info(socket)?)?;
    let mut name = [0; 16];
    let ulp = socket.kernel.getsockopt(socket.fd, opt::ULP, &mut name);
    match ulp {
        Ok(length) if length > 0 && name[0] != 0 => return Err(SaveError::UpperLayer),
        // Before 4.13 there were none.
        Ok(_) => {}
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {}
        Err(source) => return Err(failed("getsockopt", "TCP_ULP", source)),
    }
    let mut ao = [0; 48];
    match socket.kernel.getsockopt(socket.fd, opt::AO_INFO, &mut ao) {
        Ok(_) => return Err(SaveError::Ao),
        // No keys; or a kernel that knows none (before 6.7, or built without).
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOPROTOOPT)) => {}
        Err(source) => return Err(failed("getsockopt", "TCP_AO_INFO", source)),
    }
    let urgent = socket.kernel.has_urgent(socket.fd);
    if urgent.map_err(|source| failed("poll", "urgent data", source))? {
        return Err(SaveError::Urgent);
    }
    let local = socket.kernel.getsockname(socket.fd);
    let local = local.map_err(|source| failed("getsockname", "", source))?;
    let peer = socket.kernel.getpeername(socket.fd);
    let peer = peer.map_err(|source| failed("getpeername", "", source))?;
    for address in [local, peer] {
        if matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0) {
            return Err(SaveError::LinkLocal(address));
        }
    }
    Ok(Flow { local, peer })
}

fn failed(call: &'static str, what: &'static str, source: io::Error) -> SaveError {
    SaveError::Call(CallFailed { call, what, source })
}

/// TCP learned `SO_PEEK_OFF` in 6.9; where it has not, there is nothing to clear.
fn peek_offset<K: Kernel>(socket: &Socket<'_, K>) -> Result<i32, SaveError> {
    match socket.get_i32(opt::PEEK_OFF, "SO_PEEK_OFF") {
        Ok(offset) => Ok(offset),
        Err(error) if error.source.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(-1),
        Err(error) => Err(error.into()),
    }
}

/// Of `struct tcp_info`, whose first 148 bytes every kernel since 4.6 fills.
struct Info {
    state: TcpState,
    options: u8,
    scales: u8,
    /// Bytes in the send queue that were never sent (`tcpi_notsent_bytes`, Linux 4.6).
    unsent: usize,
}

/// Where `tcpi_notsent_bytes` lies in `struct tcp_info`.
const INFO_UNSENT: usize = 144;

const INFO_TIMESTAMPS: u8 = 1;
const INFO_SACK: u8 = 2;
const INFO_SCALES: u8 = 4;

fn info<K: Kernel>(socket: &Socket<'_, K>) -> Result<Info, SaveError> {
    let mut bytes = [0; INFO_UNSENT + 4];
    socket
        .kernel
        .getsockopt(socket.fd, opt::INFO, &mut bytes)
        .map_err(|source| failed("getsockopt", "TCP_INFO", source))?;
    let [state, _, _, _, _, options, scales, .., a, b, c, d] = bytes;
    let unsent = usize::try_from(u32::from_ne_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    Ok(Info { state: TcpState(state), options, scales, unsent })
}

fn established(info: &Info) -> Result<(), SaveError> {
    if info.state == TcpState::ESTABLISHED { Ok(()) } else { Err(SaveError::State(info.state)) }
}

fn empty(flow: Flow) -> SavedSocket {
    SavedSocket {
        flow,
        ipv6: flow.local.is_ipv6(),
        v6only: false,
        mss: 0,
        sack: false,
        scales: None,
        timestamp: None,
        window: RepairWindow::default(),
        recv_end: 0,
        send_end: 0,
        recv: Vec::new(),
        send: Vec::new(),
        unsent: 0,
        reuse_address: false,
        buffers: Buffers { send: 0, receive: 0, lock: 0 },
        congestion: String::new(),
        options: Vec::new(),
    }
}

/// What must not change while the queues are read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Position {
    recv_end: u32,
    send_end: u32,
    window: RepairWindow,
    unread: usize,
    unacknowledged: usize,
    unsent: usize,
}

impl<'h, K: Kernel> Frozen<'h, '_, K> {
    /// What was saved.
    #[must_use]
    pub const fn state(&self) -> &SavedSocket {
        &self.state
    }

    const fn socket(&self) -> Socket<'_, K> {
        Socket { kernel: self.kernel, fd: self.fd }
    }

    fn read_options(&mut self) -> Result<(), SaveError> {
        let socket = Socket { kernel: self.kernel, fd: self.fd };
        self.state.v6only =
            self.state.ipv6 && socket.get_i32(opt::IPV6_V6ONLY, "IPV6_V6ONLY")? != 0;
        self.state.buffers = Buffers {
            send: socket.get_u32(opt::SNDBUF, "SO_SNDBUF")?,
            receive: socket.get_u32(opt::RCVBUF, "SO_RCVBUF")?,
            lock: u8::try_from(socket.get_i32(opt::BUF_LOCK, "SO_BUF_LOCK")?).unwrap_or(0),
        };
        let mut name = [0; 16];
        let length = socket
            .kernel
            .getsockopt(socket.fd, opt::CONGESTION, &mut name)
            .map_err(|source| failed("getsockopt", "TCP_CONGESTION", source))?;
        let name = name.get(..length).unwrap_or(&name).split(|byte| *byte == 0).next();
        self.state.congestion = String::from_utf8_lossy(name.unwrap_or_default()).into_owned();
        for carried in CARRIED {
            let mut bytes = vec![0; carried.shape.length()];
            match socket.kernel.getsockopt(socket.fd, carried.option, &mut bytes) {
                Ok(_) => {}
                // An IPv6 option on an IPv4 socket, or an option of newer kernels.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP)
                    ) =>
                {
                    continue;
                }
                Err(source) => return Err(failed("getsockopt", carried.name, source)),
            }
            let value = carried.shape.parse(&bytes);
            let saved = value.map(|value| SavedOption { id: carried.id, value });
            self.state.options.extend(saved);
        }
        Ok(())
    }

    fn read_state(&mut self) -> Result<(), SaveError> {
        let info = info(&self.socket())?;
        established(&info)?;
        self.state.sack = info.options & INFO_SACK != 0;
        self.state.scales = (info.options & INFO_SCALES != 0)
            .then_some(WindowScales { send: info.scales & 15, receive: info.scales >> 4 });
        self.state.mss = self.socket().get_u32(opt::MAXSEG, "TCP_MAXSEG")?;
        self.state.timestamp = (info.options & INFO_TIMESTAMPS != 0)
            .then(|| self.socket().get_u32(opt::TIMESTAMP, "TCP_TIMESTAMP"))
            .transpose()?;
        for _ in 0..ROUNDS {
            let position = self.position()?;
            let recv = self.peek(RepairQueue::Recv, position.unread)?;
            let send = self.peek(RepairQueue::Send, position.unacknowledged)?;
            if let (Some(recv), Some(send)) = (recv, send)
                && self.position()? == position
            {
                self.state.window = position.window;
                self.state.recv_end = position.recv_end;
                self.state.send_end = position.send_end;
                self.state.unsent = position.unsent;
                (self.state.recv, self.state.send) = (recv, send);
                return Ok(());
            }
        }
        Err(SaveError::Restless)
    }

    fn position(&self) -> Result<Position, SaveError> {
        let socket = self.socket();
        let unacknowledged = socket.queued(Queued::Out)?;
        let unsent = socket.queued(Queued::OutNotSent)?;
        let unread = socket.queued(Queued::In)?;
        for length in [unacknowledged, unread] {
            if length > MAX_QUEUE {
                return Err(SaveError::QueueTooLong(length));
            }
        }
        let mut window = [0; RepairWindow::LEN];
        socket
            .kernel
            .getsockopt(socket.fd, opt::REPAIR_WINDOW, &mut window)
            .map_err(|source| failed("getsockopt", "TCP_REPAIR_WINDOW", source))?;
        socket.choose(RepairQueue::Recv)?;
        let recv_end = socket.get_u32(opt::QUEUE_SEQ, "TCP_QUEUE_SEQ")?;
        socket.choose(RepairQueue::Send)?;
        let send_end = socket.get_u32(opt::QUEUE_SEQ, "TCP_QUEUE_SEQ")?;
        let window = RepairWindow::from_kernel(&window);
        Ok(Position { recv_end, send_end, window, unread, unacknowledged, unsent })
    }

    /// The bytes of a queue, or `None` if it is no longer `length` long.
    fn peek(&self, queue: RepairQueue, length: usize) -> Result<Option<Vec<u8>>, SaveError> {
        self.socket().choose(queue)?;
        // One byte more than needed: with a buffer that is too short the kernel still
        // gives the whole queue's length, which no caller may believe.
        let mut bytes = vec![0; length + 1];
        match self.kernel.peek(self.fd, &mut bytes) {
            Ok(found) if found == length => {
                bytes.truncate(length);
                Ok(Some(bytes))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Ok((length == 0).then_some(Vec::new()))
            }
            Err(source) => Err(failed("recv", "a queue", source)),
        }
    }

    /// Lets the connection live on here.
    ///
    /// # Errors
    ///
    /// The first step that failed; the others were done all the same, and the lock
    /// is tried again as this returns.
    pub fn rollback(mut self) -> Result<(), SaveError> {
        self.thaw()
    }

    fn thaw(&mut self) -> Result<(), SaveError> {
        let Some(mut held) = self.held.take() else { return Ok(()) };
        // First released, so that the window probe gets out.
        let released = held.release().map_err(SaveError::from);
        let mut repaired = Ok(());
        if self.undo.repair {
            repaired = self.leave_repair();
        }
        let mut peeks = Ok(());
        if self.undo.peek_offset >= 0 {
            peeks = self.socket().set_i32(opt::PEEK_OFF, "SO_PEEK_OFF", self.undo.peek_offset);
        }
        released.and(repaired.map_err(SaveError::from)).and(peeks.map_err(SaveError::from))
    }

    fn leave_repair(&self) -> Result<(), CallFailed> {
        let off = || self.socket().set_i32(opt::REPAIR, "TCP_REPAIR", REPAIR_OFF);
        // A socket left in repair mode is lost to its owner, so this gets two chances.
        off().or_else(|_| off())?;
        let reuse = self.undo.reuse_address;
        self.socket().set_i32(opt::REUSEADDR, "SO_REUSEADDR", reuse)
    }

    /// Takes the connection out of this kernel, for all descriptors, without a
    /// packet. Only after the new side is [`Prepared`](crate::Prepared).
    ///
    /// # Errors
    ///
    /// The connection is still here and frozen: commit again, or roll back.
    #[expect(clippy::result_large_err, reason = "the connection is handed back")]
    pub fn commit(mut self) -> Result<Gone<'h>, (Self, SaveError)> {
        let gone = self.kernel.disconnect(self.fd);
        match gone {
            Ok(()) => Ok(Gone { held: self.held.take() }),
            Err(source) => Err((self, failed("connect", "AF_UNSPEC", source))),
        }
    }
}

impl<K: Kernel> Drop for Frozen<'_, '_, K> {
    fn drop(&mut self) {
        // `rollback` tells of failures; a drop has nobody to tell.
        self.thaw().ok();
    }
}
