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
//! A packet from the host is copied once by us, into the guest's memory; the VMM does not
//! run for it. Segments of up to 64 KiB and unfinished checksums pass as they are, as far
//! as the guest says that it takes them.
//!
//! The process is the guest's alone ([`serve`] does not return while it goes well): what a
//! hostile guest brings down (a memory file that shrinks under our feet ends a process
//! with SIGBUS) is its own port. So it also outlives the daemon that started it.
//!
//! VMMs that share no memory bring frames instead, on other sockets of the same port
//! ([`Transport`]); whoever comes first is served.
//!
//! Not here: who may connect (the socket's directory decides), the host's end of the
//! device (as of every guest), several pairs of queues.
//!
//! Sources: QEMU `docs/interop/vhost-user.rst`; virtio 1.3 §5.1.

mod frames;
mod front;
pub(crate) mod fuzz;
mod gate;
mod net;
mod ring;
mod server;
mod sys;
mod tap;

use std::fmt;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Shutdown};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use conet_dataplane::DropCounts;
use conet_netsys::{IfName, MacAddr};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Backend, Error as MessageError};
use vhost_user_backend::{
    Error as DaemonError, VhostUserBackendMut, VhostUserDaemon, VringMutex, VringT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use self::frames::FramesError;
use self::net::{Card, NetError};
use crate::gate::{Hold, Rates};
use crate::segment::Segment;
use crate::services::{ADVERT_INTERVAL, Lease};

/// Queues: to the guest, from the guest.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUES: u16 = 2;
/// Other events: the device, and our own of work left over. The library's own comes between.
const DEVICE: u16 = QUEUES + 1;
const AGAIN: u16 = QUEUES + 2;
/// The router makes itself known.
const ADVERT: u16 = QUEUES + 3;
/// Most chains in a queue, as virtio has it.
const QUEUE_SIZE: usize = 1024;
/// Turns before others are heard: the socket, the end.
const TURNS: usize = 16;

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
}

/// `MAC MTU ADDRESSES GATEWAYS/PREFIX RESOLVERS`, each with commas between.
impl fmt::Display for VhostSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Lease { addresses, gateways, prefix, dns, mtu } = &self.lease;
        let [addresses, gateways, dns] = [addresses, gateways, dns]
            .map(|list| list.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(","));
        write!(f, "{} {mtu} {addresses} {gateways}/{prefix} {dns}", self.mac)
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
    hold: Hold,
    taps: tap::Taps,
    /// The card has seen that it is held, and has nothing in hand.
    is_settled: bool,
    /// Tells the card that something has changed here.
    waker: Option<EventNotifier>,
}

impl Counted {
    fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.notify().ok();
        }
    }
}

/// Makes the host's end of a port, down, in the namespace of the calling thread. It is
/// there as long as somebody has it open.
///
/// # Errors
/// As the kernel refuses (`/dev/net/tun`).
pub fn open_device(name: IfName) -> io::Result<OwnedFd> {
    let device = tun_rs::DeviceBuilder::new()
        .name(name.as_str())
        .enable(false)
        .with(|options| {
            options.offload(true);
        })
        .build_sync()?;
    device.set_nonblocking(true)?;
    // Until a guest has said what it takes.
    sys::set_offload(&device, 0)?;
    Ok(sys::into_fd(device))
}

/// Serves the guest whose VMM connects to `listener`, one connection after the other, with
/// `device`: a TUN device with virtio headers (`IFF_VNET_HDR`), not blocking.
///
/// # Errors
/// [`ServeError`]. A VMM that says what it should not ends its connection only.
pub fn serve(
    listener: UnixListener,
    device: OwnedFd,
    spec: &VhostSpec,
) -> Result<std::convert::Infallible, ServeError> {
    serve_counted(&[(Transport::Vhost, listener)], device, spec, &Arc::default())
}

/// As [`serve`], for VMMs that come by any of several transports, one at a time.
///
/// # Errors
/// As [`serve`].
pub fn serve_transports(
    listeners: &[(Transport, UnixListener)],
    device: OwnedFd,
    spec: &VhostSpec,
) -> Result<std::convert::Infallible, ServeError> {
    serve_counted(listeners, device, spec, &Arc::default())
}

fn serve_counted(
    listeners: &[(Transport, UnixListener)],
    device: OwnedFd,
    spec: &VhostSpec,
    counted: &Arc<Mutex<Counted>>,
) -> Result<std::convert::Infallible, ServeError> {
    let device = Arc::new(File::from(device));
    let is = |vmm| counted.lock().unwrap_or_else(PoisonError::into_inner).vmm = vmm;
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
            Transport::Vhost => connection(vmm, &device, spec, counted)?,
            _ => frames_of(&vmm.into(), *transport, &device, spec, counted)?,
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
    device: &Arc<File>,
    spec: &VhostSpec,
    counted: &Arc<Mutex<Counted>>,
) -> Result<(), ServeError> {
    // Whoever was here before may have taken more.
    sys::set_offload(&**device, 0)?;
    let mut card = card_of(device, spec, counted);
    let (again, waker) = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
    gate::lock(counted).waker = Some(waker);
    let again = sys::into_fd(again);
    let served = frames::serve(vmm, transport, &mut card, device, &again);
    gate::lock(counted).waker = None;
    match served {
        Ok(()) => Ok(()),
        Err(FramesError::Card(NetError::Device(error))) => Err(ServeError::Device(error)),
        Err(error) => {
            tracing::warn!(%error, "the guest's VMM was let go");
            Ok(())
        }
    }
}

fn card_of(device: &Arc<File>, spec: &VhostSpec, counted: &Arc<Mutex<Counted>>) -> Card {
    let segment = Segment::new(crate::segment::OURS, spec.mac, spec.lease.addresses.clone());
    let segment = segment.with_services(spec.lease.clone());
    Card::new(Arc::clone(device), segment, usize::from(spec.lease.mtu), Arc::clone(counted))
}

/// The library's errors can be shown, and no more.
fn start(error: DaemonError) -> ServeError {
    ServeError::Start(io::Error::other(error.to_string()))
}

/// Serves one connection to its end.
fn connection(
    vmm: UnixStream,
    device: &Arc<File>,
    spec: &VhostSpec,
    counted: &Arc<Mutex<Counted>>,
) -> Result<(), ServeError> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let again = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
    let again_fd = again.0.as_raw_fd();
    let end = new_event_consumer_and_notifier(EventFlag::CLOEXEC)?;
    gate::lock(counted).waker = Some(again.1.try_clone()?);
    let to_end = end.1.try_clone()?;
    let adverts = advert_timer()?;
    let (gone, is_gone) = mpsc::channel();
    let backend = Arc::new(Mutex::new(Net {
        card: card_of(device, spec, counted),
        device: Arc::clone(device),
        spec: spec.clone(),
        memory: memory.clone(),
        again,
        end,
        requests: None,
        vmm: vmm.try_clone()?,
        gone,
    }));
    let mut daemon =
        VhostUserDaemon::new("conet-vhost".to_owned(), backend, memory).map_err(start)?;
    for handler in daemon.get_epoll_handlers() {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        handler.register_listener(device.as_raw_fd(), edge, u64::from(DEVICE))?;
        handler.register_listener(again_fd, EventSet::IN, u64::from(AGAIN))?;
        handler.register_listener(adverts.as_raw_fd(), edge, u64::from(ADVERT))?;
    }
    // The library connects by path; nobody else gets at this one.
    let private = tempfile::tempdir()?;
    let path = private.path().join("vhost");
    let listener = UnixListener::bind(&path)?;
    daemon.start_client(&path.to_string_lossy()).map_err(start)?;
    let (library, _) = listener.accept()?;
    drop((listener, private));
    if let Err(error) = front::relay(vmm, library) {
        tracing::warn!(%error, "the guest's VMM was let go");
    }
    match daemon.wait() {
        Ok(()) | Err(DaemonError::HandleRequest(MessageError::Disconnected)) => {}
        Err(error) => tracing::warn!(%error, "the guest's VMM was let go"),
    }
    gate::lock(counted).waker = None;
    // Its thread has the device, which the next guest's is to have alone.
    to_end.notify()?;
    is_gone.try_recv().map_or(Ok(()), |error| Err(ServeError::Device(error)))
}

/// Readable anew each time that the router is to make itself known.
fn advert_timer() -> io::Result<OwnedFd> {
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
    let every = Timespec { tv_sec: ADVERT_INTERVAL.as_secs().cast_signed(), tv_nsec: 0 };
    let times = Itimerspec { it_interval: every, it_value: every };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &times)?;
    Ok(timer)
}

/// The device as the library sees it.
struct Net {
    card: Card,
    device: Arc<File>,
    spec: VhostSpec,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    again: (EventConsumer, EventNotifier),
    end: (EventConsumer, EventNotifier),
    /// None are made; to User-Mode Linux the end of this is the end of the card.
    requests: Option<Backend>,
    /// To end the connection with, and why.
    vmm: UnixStream,
    gone: mpsc::Sender<io::Error>,
}

fn bit(feature: u32) -> u64 {
    1 << feature
}

/// What a guest may take off the host's kernel, and the flag of the device for it.
const OFFLOADS: [(u32, u32); 4] = [
    // TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN
    (VIRTIO_NET_F_GUEST_CSUM, 1),
    (VIRTIO_NET_F_GUEST_TSO4, 2),
    (VIRTIO_NET_F_GUEST_TSO6, 4),
    (VIRTIO_NET_F_GUEST_ECN, 8),
];

/// The device's flags for what a guest has taken of [`OFFLOADS`].
fn offload_of(features: u64) -> u32 {
    let flags = OFFLOADS
        .iter()
        .filter(|(feature, _)| features & bit(*feature) != 0)
        .fold(0, |flags, (_, flag)| flags | flag);
    // Segments need checksums, and the one kind the other (virtio 1.3 §5.1.3.1).
    match flags {
        flags if flags & 1 == 0 => 0,
        flags if flags & 6 == 0 => flags & 1,
        flags => flags,
    }
}

impl Net {
    fn serve_queues(&mut self, vrings: &[VringMutex], events: u16) -> Result<(), NetError> {
        let memory = self.memory.memory();
        let mut to_do = [matches!(events, RECEIVE | DEVICE | ADVERT), events == TRANSMIT];
        if events == AGAIN {
            to_do = [true; 2];
        }
        for _ in 0..TURNS {
            // One that is not set up has nothing; it is kicked when it is.
            let [receive, transmit] = std::mem::take(&mut to_do);
            if transmit && let Some(vring) = ready(vrings, TRANSMIT) {
                let mut state = vring.get_mut();
                let queue = state.get_queue_mut();
                queue.disable_notification(&*memory)?;
                let turn = self.card.transmit(queue, &memory)?;
                to_do[1] = turn.more || queue.enable_notification(&*memory)?;
                if turn.call {
                    state.signal_used_queue().ok();
                }
            }
            let receive = receive || self.card.has_answer();
            if receive && let Some(vring) = ready(vrings, RECEIVE) {
                let mut state = vring.get_mut();
                let queue = state.get_queue_mut();
                let turn = self.card.receive(queue, &memory)?;
                // Where it had no buffers, it was asked to kick when it has.
                to_do[0] = turn.more;
                if turn.call {
                    state.signal_used_queue().ok();
                }
            }
            if to_do == [false; 2] {
                return Ok(());
            }
        }
        self.again.1.notify().map_err(NetError::Device)
    }
}

fn ready(vrings: &[VringMutex], index: u16) -> Option<&VringMutex> {
    vrings.get(usize::from(index)).filter(|vring| {
        let state = vring.get_ref();
        state.is_enabled() && state.get_queue().ready()
    })
}

impl VhostUserBackendMut for Net {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        usize::from(QUEUES)
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let net = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        ];
        net.into_iter()
            .chain(OFFLOADS.map(|(feature, _)| feature))
            .fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |features, feature| {
                features | bit(feature)
            })
    }

    fn acked_features(&mut self, features: u64) {
        self.card.merges = features & bit(VIRTIO_NET_F_MRG_RXBUF) != 0;
        let flags = offload_of(features);

        if let Err(error) = sys::set_offload(&*self.device, flags) {
            tracing::warn!(%error, flags, "the host's device refused the guest's offloads");
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // User-Mode Linux does without a card where the backend cannot make requests.
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::MTU
            | VhostUserProtocolFeatures::MQ
    }

    fn reset_device(&mut self) {
        self.card.reset();
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    /// `struct virtio_net_config`: mac, status (link up), pairs of queues, mtu.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = self.spec.mac.0.to_vec();
        config.extend(1u16.to_le_bytes());
        config.extend(1u16.to_le_bytes());
        config.extend(self.spec.lease.mtu.to_le_bytes());
        let at = |place: u32| usize::try_from(place).unwrap_or(usize::MAX);
        // What is asked for beyond is zero: the guest's structure may be a later one.
        config.resize(config.len().max(at(offset.saturating_add(size)).min(256)), 0);
        config.get(at(offset)..at(offset.saturating_add(size))).unwrap_or_default().to_vec()
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn set_backend_req_fd(&mut self, backend: Backend) {
        self.requests = Some(backend);
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (ended, end) = &self.end;
        ended.try_clone().ok().zip(end.try_clone().ok())
    }

    fn handle_event(
        &mut self,
        event: u16,
        _set: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        if event == AGAIN {
            self.again.0.consume().ok();
            self.card.attend();
        }
        if event == ADVERT {
            self.card.advertise();
        }
        match self.serve_queues(vrings, event) {
            Ok(()) => Ok(()),
            Err(NetError::Device(error)) => {
                self.gone.send(error).ok();
                self.vmm.shutdown(Shutdown::Both)
            }
            Err(error) => {
                // Its own queue does not go on; it may set it up anew.
                tracing::warn!(%error, "the guest's queue was given up");
                for vring in vrings {
                    vring.set_queue_ready(false);
                }
                Ok(())
            }
        }
    }
}
