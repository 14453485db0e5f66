//! Namespace guests by TAP: a thread of this process carries their packets.
//!
//! ```text
//! guest: eth0 (TAP) ─ frames ─► TapPort ─ packets ─► HostPort ─► NAME (TUN): host's kernel
//!                     ARP, NDP ◄┘ answered here      (routes, TTL, reverse path, firewall)
//! ```
//!
//! What leaves here is routed by the host's kernel as a veth guest's packets are: the
//! same rules, the same ICMP errors, one more copy and a wake-up. Both devices are
//! tun-tap's, plain: no offloads, one packet a call. They live as long as the thread;
//! where this process dies, the kernel removes them, and the namespace stays.
//!
//! Thread: the pump owns both ports. It sleeps in one `poll`; a waker ends it. mio's
//! readiness is edge-triggered, so a port stays *ready* until it gives nothing.
//!
//! Sources: Linux `Documentation/networking/tuntap.rst`.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use conet_dataplane::{DropCounts, DropReason, HEAD_ROOM, Packet, Pool, Port, PortError, Progress};
use conet_netsys::{IfName, MacAddr, Netlink, Netns};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use rustix::io::Errno;
use tun_tap::{Iface, Mode};

use crate::gate::{Hold, Limit, Rates};
use crate::segment::{ANSWER_MAX, ETHERNET, OURS, Segment, Verdict};
use crate::services::ADVERT_INTERVAL;
use crate::{AttachError, GuestSpec};

/// Packets taken from one device before the other has its turn.
const BATCH: usize = 64;
const GUEST: Token = Token(0);
const HOST: Token = Token(1);
const STOP: Token = Token(2);
/// Length of the virtio header that a packet has before it while it is kept.
const VIRTIO: usize = 10;

// The Ethernet header is put into the head room of a packet.
const _: () = assert!(ETHERNET <= HEAD_ROOM);

/// Both devices of a guest, not yet pumped.
#[derive(Debug)]
pub(crate) struct Devices {
    tap: Iface,
    host: Iface,
    /// What the guest's kernel gave its end; frames tell soon, but ours may be first.
    guest: MacAddr,
}

impl Devices {
    /// Makes them, down.
    pub(crate) fn open(
        spec: &GuestSpec,
        netns: &Netns,
        host: &mut Netlink,
        guest: &mut Netlink,
    ) -> Result<Self, AttachError> {
        let fail = |source| AttachError::Net { name: spec.name.clone(), source };
        let device =
            |link| move |source| AttachError::Device { name: spec.name.clone(), link, source };
        // To open a TUN device by name is to take it over, if somebody left one.
        if host.link(spec.host_link).map_err(fail)?.is_some() {
            return Err(AttachError::LinkTaken { name: spec.name.clone(), link: spec.host_link });
        }
        let tap = netns.run(|| open(spec.guest_link, Mode::Tap)).map_err(fail)?;
        let tap = tap.map_err(device(spec.guest_link))?;
        let link = guest.link(spec.guest_link).map_err(fail)?;
        let given = spec.mac.or_else(|| link.and_then(|link| link.mac));
        Ok(Self {
            tap,
            host: open(spec.host_link, Mode::Tun).map_err(device(spec.host_link))?,
            // Everybody's address, until the guest has spoken.
            guest: given.unwrap_or(MacAddr([0xff; 6])),
        })
    }

    /// Starts to carry packets.
    pub(crate) fn start(self, spec: &GuestSpec) -> Result<Pump, AttachError> {
        let thread = |source| AttachError::Thread { name: spec.name.clone(), source };
        let tap = TapPort::new(self.tap, self.guest, spec);
        let host = HostPort::new(self.host, spec.mtu);
        Pump::start(spec.name.to_string(), tap, host, spec.rates).map_err(thread)
    }
}

fn open(link: IfName, mode: Mode) -> io::Result<Iface> {
    let device = Iface::without_packet_info(link.as_str(), mode)?;
    device.set_non_blocking()?;
    Ok(device)
}

/// The thread between a guest's devices; dropping it ends both.
#[derive(Debug)]
pub(crate) struct Pump {
    stop: Arc<AtomicBool>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
    drops: Arc<Mutex<DropCounts>>,
    gate: Arc<Mutex<Gate>>,
}

/// What a pump is told while it runs.
#[derive(Debug, Default)]
struct Gate {
    rates: Rates,
    hold: Hold,
    /// Lost before they were kept.
    lost: u64,
}

impl Pump {
    fn start(name: String, tap: TapPort, host: HostPort, rates: Rates) -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), STOP)?);
        for (fd, token) in [(tap.as_raw_fd(), GUEST), (host.as_raw_fd(), HOST)] {
            poll.registry().register(&mut SourceFd(&fd), token, Interest::READABLE)?;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let drops = Arc::new(Mutex::new(DropCounts::default()));
        let gate = Arc::new(Mutex::new(Gate { rates, ..Gate::default() }));
        let mut carrier = Carrier {
            poll,
            tap,
            host,
            stop: Arc::clone(&stop),
            drops: Arc::clone(&drops),
            gate: Arc::clone(&gate),
            limits: Limits::default(),
        };
        let pump = move || {
            if let Err(error) = carrier.carry() {
                tracing::error!(
                    guest = name,
                    error = &error as &dyn std::error::Error,
                    "the guest's port has stopped"
                );
            }
            carrier.end();
        };
        let thread = thread::Builder::new().name("conet-tap".to_owned()).spawn(pump)?;
        Ok(Self { stop, waker, thread: Some(thread), drops, gate })
    }

    fn tell(&self, what: impl FnOnce(&mut Gate)) {
        what(&mut self.gate.lock().unwrap_or_else(PoisonError::into_inner));
        // As for its end.
        self.waker.wake().ok();
    }

    /// Keeps the guest's packets from now on.
    pub(crate) fn hold(&self) {
        self.tell(|gate| gate.hold.hold());
    }

    /// How much is kept, where they are.
    pub(crate) fn held(&self) -> Option<(u64, u64)> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner).hold.held()
    }

    /// Lets them pass again, what is kept first.
    pub(crate) fn release(&self) {
        self.tell(|gate| gate.hold.release());
    }

    /// How fast the guest may be from now on.
    pub(crate) fn set_rates(&self, rates: Rates) {
        self.tell(|gate| gate.rates = rates);
    }

    /// What is kept, with a virtio header before it as every port has.
    pub(crate) fn drain(&self) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        self.tell(|gate| packets = gate.hold.drain());
        packets
    }

    /// Takes what another host has kept; how many did not fit.
    pub(crate) fn accept(&self, packets: Vec<Vec<u8>>) -> usize {
        let mut lost = 0;
        self.tell(|gate| {
            lost = gate.hold.accept(packets);
            gate.lost += lost as u64;
        });
        lost
    }

    pub(crate) fn drops(&self) -> DropCounts {
        *self.drops.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its thread still runs; it ends where somebody deletes a device.
    pub(crate) fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Writes one word to an eventfd of ours, which cannot fail.
        self.waker.wake().ok();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a guest's port panicked");
        }
    }
}

/// What the pump's thread owns.
struct Carrier {
    poll: Poll,
    tap: TapPort,
    host: HostPort,
    stop: Arc<AtomicBool>,
    drops: Arc<Mutex<DropCounts>>,
    gate: Arc<Mutex<Gate>>,
    limits: Limits,
}

/// [`Rates`] in force.
#[derive(Debug, Default)]
struct Limits {
    rates: Rates,
    from_guest: Limit,
    to_guest: Limit,
}

/// Leaves those that may pass; how many may not.
fn limit(limit: &mut Limit, batch: &mut Vec<Packet>, pool: &mut Pool) -> u64 {
    if !limit.is_set() {
        return 0;
    }
    let now = Instant::now();
    let mut refused = 0;
    for packet in std::mem::take(batch) {
        if limit.admits(now, packet.data().len(), 1) {
            batch.push(packet);
        } else {
            refused += 1;
            pool.give(packet);
        }
    }
    refused
}

impl Carrier {
    /// Ends both devices at once: for each the kernel waits until nobody can be using it.
    fn end(self) {
        let Self { tap, host, .. } = self;
        thread::scope(|scope| {
            scope.spawn(|| drop(tap));
            drop(host);
        });
    }

    /// Sees what was told meanwhile; whether the guest is held.
    fn attend(&mut self) -> bool {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        if gate.rates != self.limits.rates {
            let rates = gate.rates;
            let [from_guest, to_guest] = [rates.from_guest, rates.to_guest].map(Limit::new);
            self.limits = Limits { rates, from_guest, to_guest };
        }
        self.tap.drops[DropReason::HoldFull] += std::mem::take(&mut gate.lost);
        gate.hold.is_held()
    }

    /// Puts what came for a guest that is held behind what is kept.
    fn keep(&mut self, batch: &mut Vec<Packet>, pool: &mut Pool) {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        for packet in batch.drain(..) {
            let bytes = [&[0; VIRTIO][..], packet.data()].concat();
            if let Err(reason) = gate.hold.keep(&bytes) {
                self.tap.drops.count(reason);
            }
            pool.give(packet);
        }
    }

    /// Takes what is kept of a guest that is not held any more; whether there was any.
    fn take_kept(&mut self, batch: &mut Vec<Packet>, pool: &mut Pool) -> bool {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        let mut has_kept = false;
        while batch.len() < BATCH
            && let Some(bytes) = gate.hold.next()
        {
            has_kept = true;
            let (header, data) = bytes.split_at(VIRTIO.min(bytes.len()));
            // Segments and unfinished checksums are of a port that has them.
            if header.iter().any(|byte| *byte != 0) || data.is_empty() {
                self.tap.drops.count(DropReason::Device);
                continue;
            }
            if data.len() >= self.tap.room {
                self.tap.drops.count(DropReason::TooBig);
                continue;
            }
            let mut packet = pool.take();
            packet.set_len(data.len());
            packet.data_mut().copy_from_slice(data);
            batch.push(packet);
        }
        has_kept
    }

    /// Carries packets both ways until told to stop.
    fn carry(&mut self) -> Result<(), PortError> {
        let mut pool = Pool::new(self.tap.room, 2 * BATCH);
        let mut batch = Vec::with_capacity(BATCH);
        let mut events = Events::with_capacity(8);
        // What is readable before the first poll counts as ready.
        let (mut from_guest, mut from_host) = (true, true);
        let mut advert = Instant::now() + ADVERT_INTERVAL;
        loop {
            let now = Instant::now();
            if advert <= now {
                advert = now + ADVERT_INTERVAL;
                self.tap.advertise();
            }
            let is_ready = from_guest || from_host;
            let wait = Some(if is_ready { Duration::ZERO } else { advert - now });
            match self.poll.poll(&mut events, wait) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => other.map_err(PortError::Kernel)?,
            }
            if self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            for event in &events {
                from_guest |= event.token() == GUEST;
                // Whoever woke us has perhaps released the guest.
                from_host |= event.token() != GUEST;
            }
            let is_held = self.attend();
            if from_guest {
                from_guest = self.tap.receive(&mut pool, &mut batch)?.more;
                let refused = limit(&mut self.limits.from_guest, &mut batch, &mut pool);
                self.tap.drops[DropReason::GuestRate] += refused;
                let refused = self.host.send(&mut batch, &mut pool)?.refused;
                self.tap.refused_elsewhere(refused);
            }
            if from_host && !is_held && self.take_kept(&mut batch, &mut pool) {
                // Before what is in the device.
                self.tap.send(&mut batch, &mut pool)?;
            } else if from_host {
                let taken = self.host.receive(&mut pool, &mut batch)?;
                from_host = taken.more;
                self.tap.refused_elsewhere(taken.refused);
                if is_held {
                    self.keep(&mut batch, &mut pool);
                }
                let refused = limit(&mut self.limits.to_guest, &mut batch, &mut pool);
                self.tap.drops[DropReason::GuestRate] += refused;
                self.tap.send(&mut batch, &mut pool)?;
            }
            *self.drops.lock().unwrap_or_else(PoisonError::into_inner) = self.tap.drops;
        }
    }
}

/// A guest's TAP device as a [`Port`] of IP packets: Ethernet ends here.
///
/// What the guest asks about its neighbours is answered while receiving. Packets
/// with a source that is not the guest's are refused.
pub(crate) struct TapPort {
    device: Iface,
    segment: Segment,
    /// Longest packet, and what a buffer holds: one byte more tells longer ones.
    mtu: usize,
    room: usize,
    drops: DropCounts,
}

impl std::fmt::Debug for TapPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TapPort").field("device", &self.device).finish_non_exhaustive()
    }
}

impl TapPort {
    fn new(device: Iface, guest: MacAddr, spec: &GuestSpec) -> Self {
        let mtu = usize::from(spec.mtu);
        Self {
            device,
            segment: Segment::new(OURS, guest, spec.addresses.clone()).with_services(spec.lease()),
            mtu,
            room: mtu + 1,
            drops: DropCounts::default(),
        }
    }

    fn refused_elsewhere(&mut self, packets: usize) {
        self.drops[DropReason::Device] += packets as u64;
    }

    /// Lets the router make itself known. A guest whose link is down hears of it when it
    /// comes up and asks.
    fn advertise(&self) {
        let mut answer = [0; ANSWER_MAX];
        if let Some(len) = self.segment.advert(&mut answer) {
            self.device.send(&answer[..len]).ok();
        }
    }

    /// Judges the frame of `len` bytes in a packet's buffer; whether it is a packet.
    fn take(&mut self, packet: &mut Packet, len: usize) -> Result<bool, DropReason> {
        if len > ETHERNET + self.mtu {
            return Err(DropReason::TooBig);
        }
        let frame = packet.backing_mut().get(HEAD_ROOM - ETHERNET..).unwrap_or_default();
        let mut answer = [0; ANSWER_MAX];
        match self.segment.handle_frame(frame.get(..len).unwrap_or_default(), &mut answer) {
            Verdict::Packet(len) => {
                packet.set_len(len);
                Ok(true)
            }
            Verdict::Answer(len) => match self.device.send(&answer[..len]) {
                Ok(_) => Ok(false),
                Err(_) => Err(DropReason::Device),
            },
            Verdict::Drop(reason) => Err(reason),
        }
    }
}

impl AsRawFd for TapPort {
    fn as_raw_fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }
}

impl Port for TapPort {
    fn receive(&mut self, pool: &mut Pool, into: &mut Vec<Packet>) -> Result<Progress, PortError> {
        let mut progress = Progress::default();
        for _ in 0..BATCH {
            let mut packet = pool.take();
            packet.set_len(self.room);
            let buffer = packet.backing_mut().get_mut(HEAD_ROOM - ETHERNET..).unwrap_or_default();
            let len = match self.device.recv(buffer) {
                Ok(len) => len,
                Err(error) => {
                    pool.give(packet);
                    return ended(error, progress);
                }
            };
            match self.take(&mut packet, len) {
                Ok(true) => {
                    into.push(packet);
                    progress.packets += 1;
                    continue;
                }
                Ok(false) => {}
                Err(reason) => {
                    self.drops.count(reason);
                    progress.refused += 1;
                }
            }
            pool.give(packet);
        }
        Ok(Progress { more: true, ..progress })
    }

    fn send(&mut self, packets: &mut Vec<Packet>, pool: &mut Pool) -> Result<Progress, PortError> {
        let mut progress = Progress::default();
        for mut packet in packets.drain(..) {
            let is_v6 = packet.data().first().is_some_and(|byte| byte >> 4 == 6);
            let too_big = packet.data().len() > self.mtu;
            let frame = packet.backing_mut().get_mut(HEAD_ROOM - ETHERNET..).unwrap_or_default();
            self.segment.address(frame, is_v6);
            let sent = if too_big { Ok(0) } else { self.device.send(frame) };
            pool.give(packet);
            match sent {
                Ok(0) => {
                    self.drops.count(DropReason::TooBig);
                    progress.refused += 1;
                }
                Ok(_) => progress.packets += 1,
                Err(error) if is_gone(&error) => return Err(PortError::Gone),
                // The guest has set its link down (EIO), or its queue is full.
                Err(_) => {
                    self.drops.count(DropReason::Device);
                    progress.refused += 1;
                }
            }
        }
        Ok(progress)
    }
}

/// The host's end of a guest by TAP: a TUN device, as a [`Port`].
#[derive(Debug)]
pub(crate) struct HostPort {
    device: Iface,
    room: usize,
}

impl HostPort {
    fn new(device: Iface, mtu: u16) -> Self {
        Self { device, room: usize::from(mtu) + 1 }
    }
}

impl AsRawFd for HostPort {
    fn as_raw_fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }
}

impl Port for HostPort {
    fn receive(&mut self, pool: &mut Pool, into: &mut Vec<Packet>) -> Result<Progress, PortError> {
        let mut progress = Progress::default();
        for _ in 0..BATCH {
            let mut packet = pool.take();
            packet.set_len(self.room);
            match self.device.recv(packet.data_mut()) {
                // Somebody raised the device's MTU: what was cut off is no packet.
                Ok(len) if len == self.room => {
                    pool.give(packet);
                    progress.refused += 1;
                }
                Ok(len) => {
                    packet.set_len(len);
                    into.push(packet);
                    progress.packets += 1;
                }
                Err(error) => {
                    pool.give(packet);
                    return ended(error, progress);
                }
            }
        }
        Ok(Progress { more: true, ..progress })
    }

    fn send(&mut self, packets: &mut Vec<Packet>, pool: &mut Pool) -> Result<Progress, PortError> {
        let mut progress = Progress::default();
        for packet in packets.drain(..) {
            match self.device.send(packet.data()) {
                Ok(_) => progress.packets += 1,
                Err(error) if is_gone(&error) => return Err(PortError::Gone),
                Err(_) => progress.refused += 1,
            }
            pool.give(packet);
        }
        Ok(progress)
    }
}

/// What a read that brought nothing means.
fn ended(error: io::Error, progress: Progress) -> Result<Progress, PortError> {
    match error.kind() {
        io::ErrorKind::WouldBlock => Ok(progress),
        io::ErrorKind::Interrupted => Ok(Progress { more: true, ..progress }),
        _ if is_gone(&error) => Err(PortError::Gone),
        _ => Err(PortError::Kernel(error)),
    }
}

/// The device was deleted (EBADFD, from `tun_chr_read_iter` and its kin).
fn is_gone(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::BADFD)
}
