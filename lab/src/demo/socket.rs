//! The step about a connection that moves: it goes from one lab host to the other
//! and back, with its address, while both ends write and read without a pause.
//!
//! ```text
//!           conet-h1  192.0.2.200 ┐
//!                                 ├─ LAN ── conet-peer 192.0.2.250: the other end
//!           conet-h2  (its turn)  ┘
//! ```
//!
//! A byte's content follows from its place in its stream, so each that is missing,
//! doubled or changed is seen.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use conet_migsock::{
    Activated, Address, Host, LockError, RestoreError, SaveError, SavedSocket, StateError,
};
use conet_netsys::{IfName, IpNet, Netlink, Netns, NetnsName, Route};
use socket2::{Domain, Socket, Type};
use thiserror::Error;

use super::process::milliseconds;
use super::random::Random;
use super::{Figure, Figures, Raised, StepError};
use crate::measure::MeasureError;
use crate::names::UPLINK;
use crate::up::host_ids;
use crate::{LabError, Watch, lan};

/// Name of the other end's namespace, and of its port on the LAN.
const PEER: &str = "conet-peer";
/// The other end's address.
const PEER_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 250);
/// The address that moves with the connection.
const MOVING: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 200);
/// Moves: there and back three times.
const MOVES: usize = 6;
/// Bytes that go each way.
const TOTAL: usize = 12_000_000;
/// Most bytes that are written or read at once.
const PIECE: usize = 64 * 1024;
/// Half of the default limit of a socket's buffers (`net.core.wmem_max`): the kernel
/// doubles what it is given, and a queue that is put in needs room beside its bytes.
const SMALL_BUFFER: usize = 106_496;
/// How long the moving end writes without reading before a move, so that both
/// its queues hold something.
const FILL: Duration = Duration::from_millis(3);
/// Between two looks at a socket that is not ready.
const NAP: Duration = Duration::from_micros(200);
/// How long all may take.
const LIMIT: Duration = Duration::from_secs(20);

/// Why a connection did not move whole.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SocketError {
    /// The flow's packets cannot be held back.
    #[error("cannot hold a connection's packets: {0}; a kernel with nf_tables is needed")]
    Lock(#[from] LockError),
    /// It cannot be taken out.
    #[error("cannot take a connection out: {0}; Linux 5.14 or later is needed")]
    Save(#[from] SaveError),
    /// It cannot be put in.
    #[error("cannot put a connection in: {0}; Linux 5.14 or later is needed")]
    Restore(#[from] RestoreError),
    /// What was saved does not read back.
    #[error("a saved connection does not read back: {0}; this is a bug, report it")]
    State(#[from] StateError),
    /// A byte is not the one that was sent.
    #[error("the byte at {at} is not the one that was sent; this is a bug, report it")]
    Changed {
        /// Where in the stream.
        at: usize,
    },
    /// The connection does not go on.
    #[error("{read} of {TOTAL} bytes arrived, then no more; this is a bug, report it")]
    Stalled {
        /// Bytes that arrived.
        read: usize,
    },
    /// The connection broke.
    #[error("the connection broke after {read} bytes: {source}; this is a bug, report it")]
    Broken {
        /// Bytes that arrived.
        read: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// Nothing was on its way when it moved.
    #[error("nothing was in flight when it moved, which shows nothing; try again")]
    NoneInFlight,
}

/// The bytes of stream `seed` from `from` on.
fn content(seed: u64, from: usize, bytes: &mut [u8]) {
    let (mut place, mut filled) = (from, 0);
    while filled < bytes.len() {
        let word = Random::new(seed ^ (place as u64 / 8)).number().to_le_bytes();
        let piece = &word[place % 8..];
        let length = piece.len().min(bytes.len() - filled);
        bytes[filled..filled + length].copy_from_slice(&piece[..length]);
        place += length;
        filled += length;
    }
}

/// One end's share of both streams, over a socket that does not block.
struct Pump {
    sends: u64,
    gets: u64,
    written: usize,
    read: usize,
    buffer: Vec<u8>,
    expected: Vec<u8>,
    last_read: Instant,
    longest_pause: Duration,
}

impl Pump {
    fn new(sends: u64, gets: u64) -> Self {
        Self {
            sends,
            gets,
            written: 0,
            read: 0,
            buffer: vec![0; PIECE],
            expected: vec![0; PIECE],
            last_read: Instant::now(),
            longest_pause: Duration::ZERO,
        }
    }

    /// Writes what the socket takes now; whether it took anything.
    fn write(&mut self, stream: &mut TcpStream) -> Result<bool, SocketError> {
        let length = PIECE.min(TOTAL - self.written);
        if length == 0 {
            return Ok(false);
        }
        content(self.sends, self.written, &mut self.buffer[..length]);
        let wrote = stream.write(&self.buffer[..length]);
        let wrote = self.ready(wrote)?;
        self.written += wrote;
        Ok(wrote > 0)
    }

    /// Reads what has arrived, and checks it; whether there was anything.
    fn read(&mut self, stream: &mut TcpStream) -> Result<bool, SocketError> {
        if self.read == TOTAL {
            return Ok(false);
        }
        let got = match stream.read(&mut self.buffer) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            other => other,
        };
        let got = self.ready(got)?;
        if got == 0 {
            return Ok(false);
        }
        content(self.gets, self.read, &mut self.expected[..got]);
        let pairs = self.buffer[..got].iter().zip(&self.expected[..got]);
        if let Some(differs) = pairs.into_iter().position(|(got, expected)| got != expected) {
            return Err(SocketError::Changed { at: self.read + differs });
        }
        self.read += got;
        let now = Instant::now();
        if self.read > got {
            self.longest_pause = self.longest_pause.max(now - self.last_read);
        }
        self.last_read = now;
        Ok(true)
    }

    fn ready(&self, result: io::Result<usize>) -> Result<usize, SocketError> {
        match result {
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                Ok(0)
            }
            other => other.map_err(|source| SocketError::Broken { read: self.read, source }),
        }
    }

    /// Writes and reads until `goal` bytes have gone each way; `stopped` ends it
    /// early.
    fn run(
        &mut self,
        stream: &mut TcpStream,
        goal: usize,
        stopped: impl Fn() -> bool,
    ) -> Result<(), SocketError> {
        let deadline = Instant::now() + LIMIT;
        while self.written.min(self.read) < goal && !stopped() {
            let wrote = self.write(stream)?;
            if !self.read(stream)? && !wrote {
                if Instant::now() >= deadline {
                    return Err(SocketError::Stalled { read: self.read });
                }
                thread::sleep(NAP);
            }
        }
        Ok(())
    }
}

/// The namespace of the other end; removed when dropped.
struct Peer {
    netns: Netns,
}

impl Peer {
    fn make() -> Result<Self, LabError> {
        let name = NetnsName::new(PEER)?;
        let peer = Self { netns: Netns::create(&name)? };
        lan::join_as(&mut Netlink::open()?, IfName::new(PEER)?, PEER_ADDRESS, &peer.netns)?;
        Ok(peer)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // What cannot be removed now, `lab down` removes: it bears a lab's name.
        if let Ok(name) = NetnsName::new(PEER) {
            Netns::delete(&name).ok();
        }
        if let (Ok(mut netlink), Ok(port)) = (Netlink::open(), IfName::new(PEER)) {
            netlink.delete_link(port).ok();
        }
    }
}

/// The hosts that the connection moves between, and the other end.
struct Scene {
    hosts: [Netns; 2],
    gateways: [Ipv4Addr; 2],
    peer: Peer,
    /// The host that has it.
    at: usize,
}

impl Scene {
    fn make(lab: &Raised) -> Result<Self, StepError> {
        let ids = host_ids(&lab.state);
        let [one, two] = ids[..] else { return Err(LabError::NotUp.into()) };
        let open = |name: NetnsName| Netns::open(&name).map_err(LabError::from);
        let hosts = [
            open(one.netns().map_err(LabError::from)?)?,
            open(two.netns().map_err(LabError::from)?)?,
        ];
        let gateways = [one.lan_address(), two.lan_address()];
        let scene = Self { hosts, gateways, peer: Peer::make()?, at: 0 };
        scene.place()?;
        Ok(scene)
    }

    /// Puts the moving address on the host that has the connection, and the other
    /// end's route to it.
    fn place(&self) -> Result<(), LabError> {
        let address = IpNet::new_assert(IpAddr::V4(MOVING), 32);
        let uplink = IfName::new(UPLINK)?;
        Netlink::open_in(&self.hosts[1 - self.at])?.delete_address(uplink, address)?;
        Netlink::open_in(&self.hosts[self.at])?.add_address(uplink, address)?;
        let route = Route::via(address, IpAddr::V4(self.gateways[self.at]));
        Netlink::open_in(&self.peer.netns)?.replace_route(&route).map_err(LabError::from)
    }

    /// A connection from the moving address to the other end.
    fn connect(&self) -> Result<(TcpStream, TcpStream), StepError> {
        let at = SocketAddrV4::new(PEER_ADDRESS, 0);
        let failed = |step| MeasureError::socket(step);
        let listener = self.peer.netns.run(|| TcpListener::bind(at)).map_err(LabError::from)?;
        let listener = listener.map_err(failed("listen"))?;
        let to = listener.local_addr().map_err(failed("listen"))?;
        let socket = self.hosts[self.at].run(|| Socket::new(Domain::IPV4, Type::STREAM, None));
        let socket = socket.map_err(LabError::from)?.map_err(failed("open a socket"))?;
        let from = SocketAddr::from((MOVING, 0));
        socket.bind(&from.into()).map_err(failed("bind to the moving address"))?;
        socket.connect_timeout(&to.into(), LIMIT).map_err(failed("connect"))?;
        let stream = TcpStream::from(socket);
        let (other, _) = listener.accept().map_err(failed("accept"))?;
        for stream in [&stream, &other] {
            stream.set_nonblocking(true).map_err(failed("set an option"))?;
            limit_buffers(stream).map_err(failed("set a buffer's size"))?;
        }
        Ok((stream, other))
    }

    /// Moves the connection to the other host.
    fn move_over(
        &mut self,
        migsock: &[Host; 2],
        stream: TcpStream,
    ) -> Result<(Activated, SavedSocket, Duration), StepError> {
        let begin = Instant::now();
        let (from, to) = (&migsock[self.at], &migsock[1 - self.at]);
        let frozen = from.freeze(stream.as_fd()).map_err(SocketError::from)?;
        // As bytes, as between two machines.
        let state = SavedSocket::decode(&frozen.state().encode()).map_err(SocketError::from)?;
        let prepared = self.hosts[1 - self.at]
            .run(|| to.prepare(&state, Address::Coming))
            .map_err(LabError::from)?
            .map_err(SocketError::from)?;
        let mut gone = frozen.commit().map_err(|(_, error)| SocketError::from(error))?;
        self.at = 1 - self.at;
        self.place()?;
        let activated = prepared.activate().map_err(|(_, error)| SocketError::from(error))?;
        let held = begin.elapsed();
        gone.release().map_err(SocketError::from)?;
        Ok((activated, state, held))
    }
}

/// Where a socket cannot be given buffers beyond the system's limit, which is so in a
/// user namespace, its queues must not outgrow what the other host can put in again.
fn limit_buffers(stream: &TcpStream) -> io::Result<()> {
    // Tried on another: a size that is set stops the kernel from adapting it.
    let trial = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    match rustix::net::sockopt::set_socket_send_buffer_size_force(&trial, SMALL_BUFFER) {
        Err(rustix::io::Errno::PERM) => {
            let socket = socket2::SockRef::from(stream);
            socket.set_send_buffer_size(SMALL_BUFFER)?;
            socket.set_recv_buffer_size(SMALL_BUFFER)
        }
        _ => Ok(()),
    }
}

/// What the moves found.
#[derive(Default)]
struct Found {
    held: Vec<Duration>,
    unread: usize,
    unacknowledged: usize,
    unsent: usize,
}

/// Moves a connection with bytes in flight, there and back, until both streams
/// have arrived whole.
pub(super) fn moves(lab: &Raised, watch: Watch<'_>) -> Figures {
    let mut scene = Scene::make(lab)?;
    let open = |netns: &Netns| netns.run(Host::open).map_err(LabError::from);
    let migsock = [
        open(&scene.hosts[0])?.map_err(SocketError::from)?,
        open(&scene.hosts[1])?.map_err(SocketError::from)?,
    ];
    let (stream, mut other) = scene.connect()?;
    let stopped = AtomicBool::new(false);
    let is_stopped =
        || stopped.load(Ordering::Relaxed) || watch.interrupted.load(Ordering::Relaxed);
    let (outcome, answered) = thread::scope(|scope| {
        let peer = scope.spawn(|| {
            let mut pump = Pump::new(2, 1);
            let done = pump.run(&mut other, TOTAL, is_stopped);
            done.map(|()| pump)
        });
        let outcome = there_and_back(&mut scene, &migsock, stream, watch);
        stopped.store(outcome.is_err(), Ordering::Relaxed);
        (outcome, peer.join())
    });
    let (found, pump) = outcome?;
    let peer = answered.map_err(|_| MeasureError::Thread)??;
    watch.check()?;
    report(found, &pump, &peer)
}

/// The moving end's part.
fn there_and_back(
    scene: &mut Scene,
    migsock: &[Host; 2],
    mut stream: TcpStream,
    watch: Watch<'_>,
) -> Result<(Found, Pump), StepError> {
    let interrupted = || watch.interrupted.load(Ordering::Relaxed);
    let mut pump = Pump::new(1, 2);
    let mut found = Found::default();
    for number in 1..=MOVES {
        pump.run(&mut stream, TOTAL * number / (MOVES + 1), interrupted)?;
        watch.check()?;
        let filled = Instant::now() + FILL;
        while Instant::now() < filled {
            pump.write(&mut stream)?;
        }
        let (activated, state, held) = scene.move_over(migsock, stream)?;
        // What the new kernel did not take is written again.
        pump.written -= activated.unsent.len();
        stream = TcpStream::from(activated.fd);
        stream.set_nonblocking(true).map_err(MeasureError::socket("set an option"))?;
        found.held.push(held);
        found.unread += state.recv.len();
        found.unacknowledged += state.send.len() - state.unsent;
        found.unsent += state.unsent;
    }
    pump.run(&mut stream, TOTAL, interrupted)?;
    Ok((found, pump))
}

fn report(mut found: Found, pump: &Pump, peer: &Pump) -> Figures {
    let in_flight = found.unread + found.unacknowledged + found.unsent;
    if in_flight == 0 {
        return Err(SocketError::NoneInFlight.into());
    }
    found.held.sort_unstable();
    // The same byte may be carried by several moves: so per move, not as a sum.
    let per_move = |bytes: usize| bytes / found.held.len().max(1);
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    Ok(vec![
        Figure::new("moves", found.held.len(), ""),
        Figure::new("gap_p50", milliseconds(micros(found.held[found.held.len() / 2])), "ms"),
        Figure::new("gap_max", milliseconds(micros(found.held[found.held.len() - 1])), "ms"),
        Figure::new("peer_waited_max", milliseconds(micros(peer.longest_pause)), "ms"),
        Figure::new("in_flight_per_move", per_move(in_flight), "bytes"),
        Figure::new("unread_per_move", per_move(found.unread), "bytes"),
        Figure::new("unacknowledged_per_move", per_move(found.unacknowledged), "bytes"),
        Figure::new("unsent_per_move", per_move(found.unsent), "bytes"),
        Figure::new("checked", pump.read + peer.read, "bytes"),
        Figure::new("lost", 2 * TOTAL - pump.read - peer.read, "bytes"),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_depends_on_the_place_only() {
        let mut whole = [0; 100];
        content(7, 0, &mut whole);
        for (from, to) in [(0, 100), (1, 9), (8, 16), (13, 14), (50, 100)] {
            let mut part = vec![0; to - from];
            content(7, from, &mut part);
            assert_eq!(part, whole[from..to]);
        }
        let mut other = [0; 100];
        content(8, 0, &mut other);
        assert_ne!(whole, other);
    }
}
