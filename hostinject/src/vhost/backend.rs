//! A guest's card as the library has it that speaks the protocol: a thread for each pair of
//! queues.
//!
//! ```text
//! VMM ── messages ─► front ─► library ─► Net: features, memory, what the card is
//! thread of a pair ── kicks, the device's queue, what was told ─► Pair: Card, its turns
//! ```
//!
//! Invariants: a queue is touched by its pair's thread alone, under the library's lock, which
//! a turn holds from its beginning to its end; a pair that the VMM has switched off has no
//! queue of the device ([`Device`]), and what was in that is given by the first pair.
//!
//! Sources: QEMU `docs/interop/vhost-user.rst`; virtio 1.3 §5.1.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Backend, Error as MessageError};
use vhost_user_backend::{
    Error as DaemonError, VhostUserBackend, VhostUserDaemon, VringMutex, VringT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::device::MAX_QUEUES;
use super::gate::{self, lock};
use super::net::{Card, NetError};
use super::{Counted, Device, ServeError, VhostSpec, front, segment_of};
use crate::services::ADVERT_INTERVAL;

/// Queues of a pair, as its thread counts them: to the guest, from the guest.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const OF_PAIR: usize = 2;
/// Other events: the device, and our own of work left over. The library's own comes between.
const DEVICE: u16 = 2 * MAX_QUEUES + 1;
const AGAIN: u16 = DEVICE + 1;
/// The router makes itself known.
const ADVERT: u16 = DEVICE + 2;
/// Most chains in a queue, as virtio has it.
const QUEUE_SIZE: usize = 1024;
/// Turns before others are heard: the socket, the end.
const TURNS: usize = 16;

/// The library's errors can be shown, and no more.
fn start(error: DaemonError) -> ServeError {
    ServeError::Start(io::Error::other(error.to_string()))
}

/// Serves one connection to its end.
pub(super) fn connection(
    vmm: UnixStream,
    device: &Device,
    spec: &VhostSpec,
    counted: &Arc<Mutex<Counted>>,
) -> Result<(), ServeError> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let end = new_event_consumer_and_notifier(EventFlag::CLOEXEC)?;
    let to_end = end.1.try_clone()?;
    let adverts = advert_timer()?;
    let (gone, is_gone) = mpsc::channel();
    let pairs = pairs(device, spec, counted)?;
    let again: Vec<_> = pairs.iter().map(|pair| pair.again.0.as_raw_fd()).collect();
    let wakers = pairs.iter().map(|pair| pair.again.1.try_clone()).collect::<io::Result<_>>()?;
    gate::lock(counted).wakers = wakers;
    let net = Arc::new(Net {
        pairs,
        device: device.clone(),
        spec: spec.clone(),
        memory: memory.clone(),
        end,
        requests: Mutex::new(None),
        vmm: vmm.try_clone()?,
        gone,
    });
    let mut daemon =
        VhostUserDaemon::new("conet-vhost".to_owned(), Arc::clone(&net), memory).map_err(start)?;
    for (at, handler) in daemon.get_epoll_handlers().iter().enumerate() {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let queue = device.queues().get(at).unwrap_or(device.first());
        handler.register_listener(queue.as_raw_fd(), edge, u64::from(DEVICE))?;
        let again = again.get(at).copied().unwrap_or(-1);
        handler.register_listener(again, EventSet::IN, u64::from(AGAIN))?;
        if at == 0 {
            handler.register_listener(adverts.as_raw_fd(), edge, u64::from(ADVERT))?;
        }
    }
    // The library connects by path; nobody else gets at this one.
    let private = tempfile::tempdir()?;
    let path = private.path().join("vhost");
    let listener = UnixListener::bind(&path)?;
    daemon.start_client(&path.to_string_lossy()).map_err(start)?;
    let (library, _) = listener.accept()?;
    drop((listener, private));
    let switched = |queue: usize, is_on| net.switch(queue, is_on, counted);
    if let Err(error) = front::relay(vmm, library, switched) {
        tracing::warn!(%error, "the guest's VMM was let go");
    }
    match daemon.wait() {
        Ok(()) | Err(DaemonError::HandleRequest(MessageError::Disconnected)) => {}
        Err(error) => tracing::warn!(%error, "the guest's VMM was let go"),
    }
    gate::lock(counted).wakers.clear();
    device.rest();
    // Its threads have the device, which the next guest's are to have alone.
    to_end.notify()?;
    is_gone.try_recv().map_or(Ok(()), |error| Err(ServeError::Device(error)))
}

fn pairs(
    device: &Device,
    spec: &VhostSpec,
    counted: &Arc<Mutex<Counted>>,
) -> io::Result<Vec<Pair>> {
    // They share what they learn.
    let segment = segment_of(spec);
    let pair = |(index, queue): (usize, &Arc<_>)| {
        let mtu = usize::from(spec.lease.mtu);
        let (device, segment) = (Arc::clone(queue), segment.clone());
        let again = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
        let card = Mutex::new(Card::new(index, device, segment, mtu, Arc::clone(counted)));
        Ok(Pair { card, again, is_on: AtomicBool::new(true) })
    };
    device.queues().iter().enumerate().map(pair).collect()
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
    pairs: Vec<Pair>,
    device: Device,
    spec: VhostSpec,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    end: (EventConsumer, EventNotifier),
    /// None are made; to User-Mode Linux the end of this is the end of the card.
    requests: Mutex<Option<Backend>>,
    /// To end the connection with, and why.
    vmm: UnixStream,
    gone: mpsc::Sender<io::Error>,
}

/// A pair of queues.
struct Pair {
    card: Mutex<Card>,
    again: (EventConsumer, EventNotifier),
    /// Whether the guest receives by it; a VMM that says nothing has one pair.
    is_on: AtomicBool,
}

impl Net {
    /// The VMM switches one of a card's queues; only where a pair receives there is anything
    /// to do, and the first is always left as it is.
    fn switch(&self, queue: usize, is_on: bool, counted: &Mutex<Counted>) {
        let (at, is_receiving) = (queue / OF_PAIR, queue.is_multiple_of(OF_PAIR));
        let Some(pair) = self.pairs.get(at).filter(|_| is_receiving && at > 0) else { return };
        // Its thread is between two turns, and has no other before this is done.
        let mut card = lock(&pair.card);
        if pair.is_on.swap(is_on, Ordering::Relaxed) && !is_on {
            // The first pair gives what is here; its flows go to others from now on.
            card.hand_over();
            self.device.set_attached(at, false);
        } else if is_on {
            self.device.set_attached(at, true);
        }
        drop(card);
        gate::lock(counted).wake();
    }
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

impl Pair {
    fn serve(
        &self,
        card: &mut Card,
        memory: &GuestMemoryAtomic<GuestMemoryMmap>,
        vrings: &[VringMutex],
    ) -> Result<(), NetError> {
        let memory = memory.memory();
        // Whatever it was woken for: what one side has brought, the other answers at once, and
        // to look is cheaper than to be woken again.
        let mut to_do = [true; 2];
        for _ in 0..TURNS {
            // One that is not set up has nothing; it is kicked when it is.
            let [receive, transmit] = std::mem::take(&mut to_do);
            if transmit && let Some(vring) = ready(vrings, TRANSMIT) {
                let mut state = vring.get_mut();
                let queue = state.get_queue_mut();
                queue.disable_notification(&*memory)?;
                let turn = card.transmit(queue, &memory)?;
                to_do[1] = turn.more || queue.enable_notification(&*memory)?;
                if turn.call {
                    state.signal_used_queue().ok();
                }
            }
            let is_on = self.is_on.load(Ordering::Relaxed);
            let receive = is_on && (receive || card.has_answer());
            if receive && let Some(vring) = ready(vrings, RECEIVE) {
                let mut state = vring.get_mut();
                let queue = state.get_queue_mut();
                let turn = card.receive(queue, &memory)?;
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

impl VhostUserBackend for Net {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        OF_PAIR * self.pairs.len()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.pairs.len()).map(|pair| 0b11 << (OF_PAIR * pair)).collect()
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
        // A driver does without a card that has several pairs and no control queue, which is
        // the VMM's to have; so who wants one pair is offered one (Linux `virtnet_validate`).
        let several = (self.pairs.len() > 1).then_some(VIRTIO_NET_F_MQ);
        net.into_iter()
            .chain(several)
            .chain(OFFLOADS.map(|(feature, _)| feature))
            .fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |features, feature| {
                features | bit(feature)
            })
    }

    fn acked_features(&self, features: u64) {
        for pair in &self.pairs {
            lock(&pair.card).merges = features & bit(VIRTIO_NET_F_MRG_RXBUF) != 0;
        }
        let flags = offload_of(features);
        if let Err(error) = self.device.set_offload(flags) {
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

    fn reset_device(&self) {
        for pair in &self.pairs {
            lock(&pair.card).reset();
        }
    }

    fn set_event_idx(&self, _enabled: bool) {}

    /// `struct virtio_net_config`: mac, status (link up), pairs of queues, mtu.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = self.spec.mac.0.to_vec();
        config.extend(1u16.to_le_bytes());
        config.extend(self.spec.queues.to_le_bytes());
        config.extend(self.spec.lease.mtu.to_le_bytes());
        let at = |place: u32| usize::try_from(place).unwrap_or(usize::MAX);
        // What is asked for beyond is zero: the guest's structure may be a later one.
        config.resize(config.len().max(at(offset.saturating_add(size)).min(256)), 0);
        config.get(at(offset)..at(offset.saturating_add(size))).unwrap_or_default().to_vec()
    }

    fn update_memory(&self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        // It is the one that was given to the library, with other regions in it.
        Ok(())
    }

    fn set_backend_req_fd(&self, backend: Backend) {
        *lock(&self.requests) = Some(backend);
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (ended, end) = &self.end;
        ended.try_clone().ok().zip(end.try_clone().ok())
    }

    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        vrings: &[VringMutex],
        thread: usize,
    ) -> io::Result<()> {
        let Some(pair) = self.pairs.get(thread) else { return Ok(()) };
        let mut card = lock(&pair.card);
        if event == AGAIN {
            pair.again.0.consume().ok();
            card.attend();
        }
        if event == ADVERT {
            card.advertise();
        }
        match pair.serve(&mut card, &self.memory, vrings) {
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
