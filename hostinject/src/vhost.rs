//! Virtual machines by vhost-user: their network card's queues are served here, in
//! memory that they share with this process.
//!
//! ```text
//! QEMU, User-Mode Linux                   this process            host's kernel
//!   guest's queues ◄── shared memory ──► Card ◄── read, write ──► TUN device, routes
//!        │  call, kick (eventfd, pipe)     │
//!   VMM ─┴─ unix socket: memory, queues ───┘
//! ```
//!
//! The VMM does not run for a packet. Segments of up to 64 KiB and unfinished checksums pass
//! as they are, as far as the guest says that it takes them. A guest may have several pairs
//! of queues, each with a thread here and a queue of the device ([`Device`]).
//!
//! The process is the guest's alone ([`serve`] does not return while it goes well): what a
//! hostile guest brings down (a memory file that shrinks under our feet ends a process
//! with SIGBUS) is its own port. So it also outlives the daemon that started it.
//!
//! VMMs that share no memory bring frames instead, on other sockets of the same port
//! ([`Transport`]); whoever comes first is served.
//!
//! Not here: who may connect (the socket's directory decides), the host's end of the
//! device (as of every guest), the control queue (it is the VMM's, which tells by
//! `SET_VRING_ENABLE` which pairs are in use).
//!
//! Sources: QEMU `docs/interop/vhost-user.rst`; virtio 1.3 §5.1.

mod backend;
mod buffers;
mod device;
mod frames;
mod front;
pub(crate) mod fuzz;
mod gate;
mod header;
mod net;
mod receive;
mod ring;
mod server;
mod sys;
mod tap;

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use conet_dataplane::DropCounts;
use conet_netsys::MacAddr;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use vmm_sys_util::event::{EventFlag, EventNotifier, new_event_consumer_and_notifier};

use self::frames::FramesError;
use self::net::{Card, NetError};
use crate::gate::{Hold, Limit, Rates};
use crate::segment::Segment;
use crate::services::Lease;

pub use device::{Device, MAX_QUEUES, open_device};
pub use frames::Transport;
pub(crate) use server::{Server, watch};
pub use server::{ServerArguments, ServerSpec, ServerStatus, run_server};
pub(crate) use sys::packet_drops;
pub(crate) use tap::read as read_frame;

/// What is served.
#[derive(Debug, Clone)]
pub struct VhostSpec {
    /// The guest's Ethernet address, as its card is to have it.
    pub mac: MacAddr,
    /// The addresses that the guest may use, and what else it is told when it asks.
    pub lease: Lease,
    /// Pairs of queues that it may use: 1 to [`MAX_QUEUES`].
    pub queues: u16,
}

/// `MAC MTU ADDRESSES GATEWAYS/PREFIX RESOLVERS QUEUES`, each with commas between.
impl fmt::Display for VhostSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Lease { addresses, gateways, prefix, dns, mtu } = &self.lease;
        let [addresses, gateways, dns] = [addresses, gateways, dns]
            .map(|list| list.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(","));
        let (mac, queues) = (self.mac, self.queues);
        write!(f, "{mac} {mtu} {addresses} {gateways}/{prefix} {dns} {queues}")
    }
}

/// Why a port is no longer served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The library could not start a thread, or did not find the card's socket.
    #[error("{0}")]
    Start(#[source] io::Error),
    /// A socket or an event could not be made or waited for.
    #[error("{0}")]
    Event(#[from] io::Error),
    /// The host's end is gone.
    #[error("the host's device: {0}")]
    Device(#[source] io::Error),
}

/// What a port has to tell, and is told while it serves.
#[derive(Debug, Default)]
struct Counted {
    /// The VMM that is connected.
    vmm: Option<u32>,
    drops: DropCounts,
    rates: Rates,
    /// Those in force, from the guest and to it, whichever pair of queues it uses.
    limits: [Limit; 2],
    hold: Hold,
    taps: tap::Taps,
    /// Cards that have seen that they are held, and have nothing in hand: a bit each.
    settled: u32,
    /// Tell each card that something has changed here.
    wakers: Vec<EventNotifier>,
}

impl Counted {
    fn wake(&self) {
        for waker in &self.wakers {
            waker.notify().ok();
        }
    }

    fn set_rates(&mut self, rates: Rates) {
        if rates != self.rates {
            self.rates = rates;
            self.limits = [rates.from_guest, rates.to_guest].map(Limit::new);
            self.wake();
        }
    }

    fn settle(&mut self, card: usize, is_settled: bool) {
        let bit = 1 << card;
        self.settled = if is_settled { self.settled | bit } else { self.settled & !bit };
    }

    /// Whether no card has anything in hand.
    fn is_settled(&self) -> bool {
        (0..self.wakers.len()).all(|card| self.settled & (1 << card) != 0)
    }
}

/// Serves the guest whose VMM connects to `listener`, one connection after the other.
///
/// # Errors
/// [`ServeError`]. A VMM that says what it should not ends its connection only.
pub fn serve(
    listener: UnixListener,
    device: Device,
    spec: &VhostSpec,
) -> Result<std::convert::Infallible, ServeError> {
    serve_counted(&[(Transport::Vhost, listener)], &device, spec, &Arc::default())
}

/// As [`serve`], for VMMs that come by any of several transports, one at a time.
///
/// # Errors
/// As [`serve`].
pub fn serve_transports(
    listeners: &[(Transport, UnixListener)],
    device: Device,
    spec: &VhostSpec,
) -> Result<std::convert::Infallible, ServeError> {
    serve_counted(listeners, &device, spec, &Arc::default())
}

fn serve_counted(
    listeners: &[(Transport, UnixListener)],
    device: &Device,
    spec: &VhostSpec,
    counted: &Arc<Mutex<Counted>>,
) -> Result<std::convert::Infallible, ServeError> {
    let is = |vmm| gate::lock(counted).vmm = vmm;
    loop {
        let (transport, listener) = whoever(listeners)?;
        let vmm = match listener.accept() {
            Ok((vmm, _)) => vmm,
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error.into()),
        };
        let pid = socket_peercred(&vmm).ok();
        is(pid.and_then(|peer| u32::try_from(peer.pid.as_raw_nonzero().get()).ok()));
        match transport {
            Transport::Vhost => backend::connection(vmm, device, spec, counted)?,
            _ => frames_of(&vmm.into(), *transport, device, spec, counted)?,
        }
        is(None);
    }
}

/// Waits for a VMM.
fn whoever(
    listeners: &[(Transport, UnixListener)],
) -> Result<&(Transport, UnixListener), ServeError> {
    let waited = |(_, listener)| PollFd::new(listener, PollFlags::IN);
    loop {
        let mut fds: Vec<_> = listeners.iter().map(|(t, l)| (t, l)).map(waited).collect();
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            other => other.map_err(io::Error::from)?,
        };
        if let Some(at) = fds.iter().position(|fd| !fd.revents().is_empty()) {
            return Ok(&listeners[at]);
        }
    }
}

/// Serves one VMM that gives frames and takes them.
fn frames_of(
    vmm: &OwnedFd,
    transport: Transport,
    device: &Device,
    spec: &VhostSpec,
    counted: &Arc<Mutex<Counted>>,
) -> Result<(), ServeError> {
    // Whoever was here before may have taken more.
    device.set_offload(0)?;
    let mut card = Card::new(
        0,
        Arc::clone(device.first()),
        segment_of(spec),
        usize::from(spec.lease.mtu),
        Arc::clone(counted),
    );
    let (again, waker) = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
    gate::lock(counted).wakers = vec![waker];
    let again = sys::into_fd(again);
    let served = frames::serve(vmm, transport, &mut card, device.first(), &again);
    gate::lock(counted).wakers.clear();
    match served {
        Ok(()) => Ok(()),
        Err(FramesError::Card(NetError::Device(error))) => Err(ServeError::Device(error)),
        Err(error) => {
            tracing::warn!(%error, "the guest's VMM was let go");
            Ok(())
        }
    }
}

fn segment_of(spec: &VhostSpec) -> Segment {
    let segment = Segment::new(crate::segment::OURS, spec.mac, spec.lease.addresses.clone());
    segment.with_services(spec.lease.clone())
}
