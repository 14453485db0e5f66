//! Putting a saved connection into a kernel.
//!
//! ```text
//! prepare ──► Prepared ──activate──► Activated: an ordinary connection
//!                │
//!                └── drop ──► nothing was there, no packet said otherwise
//! ```
//!
//! The order matters to the kernel: sequence numbers before connect (later: EPERM),
//! connect (in repair mode straight to ESTABLISHED), negotiated options, the
//! timestamp after connect (which resets it), the receive queue, of the send queue
//! only what was sent, windows. What was never sent is sent in the ordinary way
//! once the connection lives.
//!
//! Invariants: everything that can fail for lasting reasons is done in `prepare`;
//! the flow is locked before there is a socket, until `activate`.

use crate::Host;
use crate::kernel::{Buffer, CallFailed, Kernel, REPAIR_OFF, REPAIR_ON, RepairQueue, Socket, opt};
use crate::lock::{Held, Lock, LockError};
use crate::options::by_id;
use crate::state::{SavedSocket, StateError};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Most bytes for one `send(2)` into a queue: 17 pages, the most that a socket
/// buffer's fragments hold.
const PIECE: usize = 17 * 4096;
const LEAST_PIECE: usize = 4096;

/// Codes of `TCP_REPAIR_OPTIONS`: the TCP option numbers.
const CODE_MSS: u32 = 2;
const CODE_WINDOW: u32 = 3;
const CODE_SACK: u32 = 4;
const CODE_TIMESTAMP: u32 = 8;

/// Whether the connection's own address is on this host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Address {
    /// It is, or will be before [`Host::prepare`] is called.
    Here,
    /// It comes between the preparation and the activation. The socket is
    /// transparent meanwhile: free binding alone does not let it connect.
    Coming,
}

/// Why a connection was not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state is impossible; the sender's fault.
    #[error(transparent)]
    State(#[from] StateError),
    /// See [`LockError`].
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The kernel refused a step: the port is taken, no route to the peer, no such
    /// congestion control, no memory, no CAP_NET_ADMIN.
    #[error(transparent)]
    Call(#[from] CallFailed),
}

/// A connection that is complete, locked, and does not live yet.
///
/// Dropping it takes it away without a packet.
#[must_use = "dropping it takes the connection away"]
pub struct Prepared<'h, K: Kernel> {
    kernel: &'h K,
    // Closed before the lock is released: fields drop in this order.
    fd: Option<OwnedFd>,
    held: Held<'h>,
    address: Address,
    ending: Ending,
}

/// What is left to do after the connection lives.
#[derive(Debug, Default)]
struct Ending {
    ipv6: bool,
    unsent: Vec<u8>,
    reuse_address: bool,
    send_buffer: i32,
    receive_buffer: i32,
    buffer_lock: i32,
}

impl<K: Kernel> fmt::Debug for Prepared<'_, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared").field("held", &self.held).finish_non_exhaustive()
    }
}

/// A connection that lives here.
#[derive(Debug)]
pub struct Activated {
    /// The connection, in blocking mode, closed on exec.
    pub fd: OwnedFd,
    /// Bytes that must be written before anything else; empty unless the kernel
    /// took less than it once held.
    pub unsent: Vec<u8>,
    /// An option that could not be set at the end. The connection lives without it.
    pub trouble: Option<CallFailed>,
}

fn failed(call: &'static str, what: &'static str) -> impl FnOnce(io::Error) -> CallFailed {
    move |source| CallFailed { call, what, source }
}

impl<K: Kernel, L: Lock> Host<K, L> {
    /// Locks the flow of `state` and builds its socket, up to the last step. Call on
    /// a thread in the host's network namespace.
    ///
    /// # Errors
    ///
    /// See [`RestoreError`]; nothing is left behind, and no packet was sent.
    pub fn prepare<'h>(
        &'h self,
        state: &SavedSocket,
        address: Address,
    ) -> Result<Prepared<'h, K>, RestoreError> {
        state.check()?;
        let held = Held::new(&self.lock, state.flow)?;
        let kernel = &self.kernel;
        let fd = kernel.socket(state.ipv6).map_err(failed("socket", ""))?;
        let socket = Socket { kernel, fd: fd.as_fd() };
        // From here on the socket is closed in repair mode, whatever fails: silently.
        socket.set_i32(opt::REPAIR, "TCP_REPAIR", REPAIR_ON)?;
        connect(&socket, state, address)?;
        negotiated(&socket, state)?;
        queues(&socket, state)?;
        options(&socket, state)?;
        let (_, unsent) = state.send.split_at(state.send.len() - state.unsent);
        // The kernel doubles what it is given.
        let half = |size: u32| i32::try_from(size / 2).unwrap_or(i32::MAX);
        let ending = Ending {
            ipv6: state.ipv6,
            unsent: unsent.to_vec(),
            reuse_address: state.reuse_address,
            send_buffer: half(state.buffers.send),
            receive_buffer: half(state.buffers.receive),
            buffer_lock: state.buffers.lock.into(),
        };
        Ok(Prepared { kernel, fd: Some(fd), held, address, ending })
    }
}

/// From a fresh socket to ESTABLISHED.
fn connect<K: Kernel>(
    socket: &Socket<'_, K>,
    state: &SavedSocket,
    address: Address,
) -> Result<(), RestoreError> {
    // Room for both queues with the overhead of their buffers; doubled by the kernel.
    let room = |saved: u32, bytes: usize| {
        let saved = i32::try_from(saved / 2).unwrap_or(i32::MAX);
        saved.max(i32::try_from(bytes).unwrap_or(i32::MAX / 2).saturating_add(128 * 1024))
    };
    let send = room(state.buffers.send, state.send.len());
    let receive = room(state.buffers.receive, state.recv.len());
    socket.set_buffer(Buffer::Send, send)?;
    socket.set_buffer(Buffer::Receive, receive)?;
    if state.ipv6 {
        socket.set_i32(opt::IPV6_V6ONLY, "IPV6_V6ONLY", state.v6only.into())?;
    }
    if address == Address::Coming {
        transparent(socket, state.ipv6, true)?;
    }
    let (kernel, fd) = (socket.kernel, socket.fd);
    kernel.bind(fd, state.flow.local).map_err(failed("bind", "the connection's own address"))?;
    // Sequence numbers in front of the queues, whose bytes then count them up.
    for (queue, end, length) in [
        (RepairQueue::Recv, state.recv_end, state.recv.len()),
        (RepairQueue::Send, state.send_end, state.send.len()),
    ] {
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        socket.choose(queue)?;
        let start = end.wrapping_sub(length);
        socket.set(opt::QUEUE_SEQ, "TCP_QUEUE_SEQ", &start.to_ne_bytes())?;
    }
    kernel.connect(fd, state.flow.peer).map_err(failed("connect", "in repair mode"))?;
    Ok(())
}

fn transparent<K: Kernel>(socket: &Socket<'_, K>, ipv6: bool, on: bool) -> Result<(), CallFailed> {
    if ipv6 {
        socket.set_i32(opt::IPV6_TRANSPARENT, "IPV6_TRANSPARENT", on.into())
    } else {
        socket.set_i32(opt::IP_TRANSPARENT, "IP_TRANSPARENT", on.into())
    }
}

/// What the two ends agreed on when they connected.
fn negotiated<K: Kernel>(socket: &Socket<'_, K>, state: &SavedSocket) -> Result<(), RestoreError> {
    let scales = state
        .scales
        .map(|scales| (CODE_WINDOW, u32::from(scales.send) | u32::from(scales.receive) << 16));
    let pairs = [
        state.sack.then_some((CODE_SACK, 0)),
        scales,
        state.timestamp.map(|_| (CODE_TIMESTAMP, 0)),
        Some((CODE_MSS, state.mss)),
    ];
    let words = pairs.into_iter().flatten().flat_map(|(code, value)| [code, value]);
    let bytes: Vec<u8> = words.flat_map(u32::to_ne_bytes).collect();
    socket.set(opt::REPAIR_OPTIONS, "TCP_REPAIR_OPTIONS", &bytes)?;
    if let Some(timestamp) = state.timestamp {
        socket.set(opt::TIMESTAMP, "TCP_TIMESTAMP", &timestamp.to_ne_bytes())?;
    }
    Ok(())
}

fn queues<K: Kernel>(socket: &Socket<'_, K>, state: &SavedSocket) -> Result<(), RestoreError> {
    socket.choose(RepairQueue::Recv)?;
    fill(socket, "the receive queue", &state.recv)?;
    socket.choose(RepairQueue::Send)?;
    let (sent, _) = state.send.split_at(state.send.len() - state.unsent);
    fill(socket, "the send queue", sent)?;
    socket.choose(RepairQueue::None)?;
    let window: Vec<u8> = state.window.words().into_iter().flat_map(u32::to_ne_bytes).collect();
    // The send window was taken when the unsent bytes were part of the sequence; it
    // names sequence numbers of the peer only, so it holds.
    socket.set(opt::REPAIR_WINDOW, "TCP_REPAIR_WINDOW", &window)?;
    Ok(())
}

/// Why a queue does not take what it once held.
#[derive(Debug, thiserror::Error)]
#[error(
    "it is larger than this process may make it: raise net.core.wmem_max and rmem_max, or run      as root of the machine"
)]
struct TooSmall;

/// Sends `bytes` into the chosen queue.
fn fill<K: Kernel>(
    socket: &Socket<'_, K>,
    what: &'static str,
    mut bytes: &[u8],
) -> Result<(), CallFailed> {
    let mut piece = PIECE;
    while !bytes.is_empty() {
        let next = bytes.get(..piece.min(bytes.len())).unwrap_or(bytes);
        match socket.kernel.send(socket.fd, next) {
            Ok(0) => return Err(failed("send", what)(io::ErrorKind::WriteZero.into())),
            Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(failed("send", what)(io::Error::new(error.kind(), TooSmall)));
            }
            // Large buffers are scarce first.
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) && piece > LEAST_PIECE => {
                piece = (piece / 2).max(LEAST_PIECE);
            }
            Err(error) => return Err(failed("send", what)(error)),
        }
    }
    Ok(())
}

fn options<K: Kernel>(socket: &Socket<'_, K>, state: &SavedSocket) -> Result<(), RestoreError> {
    socket.set(opt::CONGESTION, "TCP_CONGESTION", state.congestion.as_bytes())?;
    for saved in &state.options {
        let wrong = StateError::Field("option");
        let carried = by_id(saved.id).ok_or(wrong)?;
        let bytes = carried.shape.to_kernel(saved.value).ok_or(wrong)?;
        socket.set(carried.option, carried.name, &bytes)?;
    }
    Ok(())
}

impl<K: Kernel> Prepared<'_, K> {
    /// Lets the connection live: after the old side has committed and the address or
    /// route has moved.
    ///
    /// # Errors
    ///
    /// The connection is still prepared: activate it again.
    #[expect(clippy::result_large_err, reason = "the connection is handed back")]
    pub fn activate(mut self) -> Result<Activated, (Self, RestoreError)> {
        let alive = match &self.fd {
            Some(fd) => {
                let socket = Socket { kernel: self.kernel, fd: fd.as_fd() };
                go_live(&socket, &mut self.held, self.address, self.ending.ipv6)
            }
            None => Ok(()),
        };
        match (alive, self.fd.take()) {
            (Ok(()), Some(fd)) => {
                let mut ending = std::mem::take(&mut self.ending);
                let socket = Socket { kernel: self.kernel, fd: fd.as_fd() };
                let trouble = finish(&socket, &mut ending).err();
                Ok(Activated { fd, unsent: ending.unsent, trouble })
            }
            (Err(error), fd) => {
                self.fd = fd;
                Err((self, error))
            }
            (Ok(()), None) => unreachable!("the descriptor goes only with success"),
        }
    }
}

fn go_live<K: Kernel>(
    socket: &Socket<'_, K>,
    held: &mut Held<'_>,
    address: Address,
    ipv6: bool,
) -> Result<(), RestoreError> {
    if address == Address::Coming {
        transparent(socket, ipv6, false)?;
    }
    held.release()?;
    // Sends a window probe, whose answer tells us what the peer has.
    socket.set_i32(opt::REPAIR, "TCP_REPAIR", REPAIR_OFF)?;
    Ok(())
}

/// What an ordinary connection may do: send the rest, take back its buffer sizes.
fn finish<K: Kernel>(socket: &Socket<'_, K>, ending: &mut Ending) -> Result<(), CallFailed> {
    let mut sent = 0;
    let mut result = Ok(());
    while let Some(rest) = ending.unsent.get(sent..).filter(|rest| !rest.is_empty()) {
        match socket.kernel.send(socket.fd, rest) {
            Ok(more) => sent += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => {
                result = Err(failed("send", "what was never sent")(error));
                break;
            }
        }
    }
    ending.unsent.drain(..sent);
    let reuse = ending.reuse_address.into();
    for set in [
        socket.set_i32(opt::REUSEADDR, "SO_REUSEADDR", reuse),
        socket.set_buffer(Buffer::Send, ending.send_buffer),
        socket.set_buffer(Buffer::Receive, ending.receive_buffer),
        socket.set_i32(opt::BUF_LOCK, "SO_BUF_LOCK", ending.buffer_lock),
    ] {
        result = result.and(set);
    }
    result
}
