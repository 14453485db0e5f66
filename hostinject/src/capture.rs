//! What a guest's card carries, both ways, as somebody watches it.
//!
//! A namespace's card is watched by a packet socket within it, so that everything is seen
//! that its kernel sees, whatever plumbs it. A machine's is watched where its frames are
//! judged, in the process of its port. Both see ARP and DHCP, and what is refused.
//!
//! Nobody waits for who watches: what is not taken in time is counted as missed.
//!
//! Sources: `packet(7)`; [`crate::vhost`].

use std::io;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, SystemTime};

use pnet_datalink::{Channel, Config};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use socket2::{Domain, Protocol, Socket, Type};

use crate::vhost;

/// `linux/if_ether.h`.
const ETH_P_ALL: u16 = 3;
/// Bytes that may wait in the kernel.
const QUEUE: usize = 16 << 20;
/// Largest frame: a segment that is not split yet, with its headers.
const MAX_FRAME: usize = 80 * 1024;
/// Frames between the threads.
const ROW: usize = 1024;
/// How long a reader waits before it looks whether somebody still wants it.
const TICK: Duration = Duration::from_millis(100);

/// A frame, with its Ethernet header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Since 1970.
    pub time: Duration,
    /// All of it.
    pub bytes: Vec<u8>,
}

/// A card that is watched; until this is dropped.
#[derive(Debug)]
pub struct Capture {
    frames: Receiver<io::Result<Frame>>,
    stop: Arc<AtomicBool>,
    missed: Arc<AtomicU64>,
    /// Asked for what the kernel missed.
    socket: Option<OwnedFd>,
}

impl Capture {
    /// Watches a link of the calling thread's network namespace.
    ///
    /// # Errors
    /// ENODEV where there is no such link; EPERM for who may not.
    pub fn of_link(link: &str) -> io::Result<Self> {
        let found = pnet_datalink::interfaces().into_iter().find(|one| one.name == link);
        let found = found.ok_or_else(|| io::Error::from(rustix::io::Errno::NODEV))?;
        let all = Protocol::from(i32::from(ETH_P_ALL.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(all))?;
        // Beyond the system's limit where that is allowed.
        if set_socket_recv_buffer_size_force(&socket, QUEUE).is_err() {
            socket.set_recv_buffer_size(QUEUE)?;
        }
        let asked = OwnedFd::from(socket.try_clone()?);
        let config = Config {
            socket_fd: Some(socket.into_raw_fd()),
            read_timeout: Some(TICK),
            read_buffer_size: MAX_FRAME,
            promiscuous: true,
            ..Config::default()
        };
        let Channel::Ethernet(_, mut receiver) = pnet_datalink::channel(&found, config)? else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let next = move || match receiver.next() {
            Ok(bytes) => {
                let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
                Ok(Some(Frame { time: time.unwrap_or_default(), bytes: bytes.to_vec() }))
            }
            Err(error) => match error.kind() {
                io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            },
        };
        Self::start(next, Arc::default(), Some(asked))
    }

    /// Watches a machine's card, at the port whose socket for the VMM this is.
    ///
    /// # Errors
    /// As the port's process cannot be reached: EACCES for who may not.
    pub fn of_machine(socket: &Path) -> io::Result<Self> {
        let mut stream: UnixStream = vhost::watch(socket)?;
        let missed = Arc::<AtomicU64>::default();
        let count = Arc::clone(&missed);
        let next = move || {
            let (time, missed, bytes) = vhost::read_frame(&mut stream)?;
            count.store(missed, Ordering::Relaxed);
            Ok((!bytes.is_empty()).then_some(Frame { time, bytes }))
        };
        Self::start(next, missed, None)
    }

    /// A thread of its own, since a frame may be a long time coming.
    fn start(
        mut next: impl FnMut() -> io::Result<Option<Frame>> + Send + 'static,
        missed: Arc<AtomicU64>,
        socket: Option<OwnedFd>,
    ) -> io::Result<Self> {
        let (row, frames) = sync_channel(ROW);
        let stop = Arc::<AtomicBool>::default();
        let stopped = Arc::clone(&stop);
        let read = move || {
            while !stopped.load(Ordering::Relaxed) {
                let Some(frame) = next().transpose() else { continue };
                let is_last = frame.is_err();
                if row.send(frame).is_err() || is_last {
                    return;
                }
            }
        };
        thread::Builder::new().name("conet-capture".to_owned()).spawn(read)?;
        Ok(Self { frames, stop, missed, socket })
    }

    /// The next frame, or none within `patience`.
    ///
    /// # Errors
    /// When the card is gone.
    pub fn next(&self, patience: Duration) -> io::Result<Option<Frame>> {
        match self.frames.recv_timeout(patience) {
            Ok(frame) => frame.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Frames that were not taken in time so far.
    pub fn missed(&self) -> u64 {
        if let Some(socket) = &self.socket
            && let Ok(dropped) = vhost::packet_drops(socket)
        {
            // The kernel begins anew with each question.
            self.missed.fetch_add(dropped.into(), Ordering::Relaxed);
        }
        self.missed.load(Ordering::Relaxed)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
