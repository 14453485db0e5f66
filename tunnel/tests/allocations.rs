//! A warm tunnel allocates nothing per packet: counted by the allocator itself.
//!
//! Alone in its file: the allocator counts what the whole process does.

#![allow(unsafe_code, reason = "a global allocator is unsafe to implement")]
#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use conet_dataplane::{DropReason, PortError, Progress};
use conet_tunnel::{
    Arrival, Arrivals, Core, Destination, Device, Engine, Inner, Mode, Network, Origin, Outgoing,
    OwnAddresses, PeerConfig, PrivateKey, Transmit,
};
use conet_wire::ip::{Ecn, OuterV4};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are the system allocator's demands.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above; `alloc` has given the pointer.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// A device and a network of fixed buffers.
#[derive(Default)]
struct Fixed {
    packet: Vec<u8>,
    give: usize,
    taken: usize,
    bytes: Vec<u8>,
    places: Vec<Range<usize>>,
}

impl Device for Fixed {
    fn receive(
        &mut self,
        each: &mut dyn FnMut(Result<Outgoing<'_>, DropReason>),
    ) -> Result<Progress, PortError> {
        for _ in 0..std::mem::take(&mut self.give) {
            each(Outgoing::whole(&self.packet));
        }
        Ok(Progress::default())
    }

    fn send(&mut self, _: &[u8], packets: &[Inner]) -> Result<Progress, PortError> {
        self.taken += packets.len();
        Ok(Progress::default())
    }
}

impl Network for Fixed {
    fn receive(&mut self, into: &mut Arrivals) -> std::io::Result<bool> {
        for at in self.places.drain(..) {
            into.buffer[at.clone()].copy_from_slice(&self.bytes[at.clone()]);
            let origin = match self.packet[0] {
                0 => Origin::Ip,
                n => Origin::Udp(address(n)),
            };
            into.list.push(Arrival { origin, ecn: Ecn::NotEct, at });
        }
        self.bytes.clear();
        Ok(false)
    }

    fn send(&mut self, batch: &Transmit) -> usize {
        for datagram in batch.datagrams() {
            let start = self.bytes.len();
            self.bytes.extend_from_slice(datagram);
            self.places.push(start..self.bytes.len());
        }
        0
    }

    fn path_mtu(&mut self, _: Destination) -> Option<u16> {
        None
    }
}

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 51820))
}

fn engine(n: u8, mode: Mode) -> Engine<Fixed, Fixed> {
    let own = OwnAddresses { inner: vec![], outer: vec![] };
    let key = |n: u8| PrivateKey::from_bytes([n; 32]);
    let now = Instant::now();
    let mut core = Core::new(key(n), own, now, Duration::from_secs(1 << 30));
    let other = 3 - n;
    let allowed = vec![format!("10.77.{other}.0/24").parse().unwrap()];
    let peer = PeerConfig::new(key(other).public(), Some(address(other)), allowed);
    core.add_peer(&PeerConfig { mode, ..peer }).unwrap();
    let mut packet = vec![7; 1400];
    let header = OuterV4 {
        source: [10, 77, n, 2].into(),
        destination: [10, 77, other, 2].into(),
        protocol: 17,
        ttl: 64,
        ecn: Ecn::NotEct,
        dont_fragment: true,
        total_len: 1400,
    };
    header.emit(packet.first_chunk_mut().unwrap());
    let buffers = || (Vec::with_capacity(1 << 18), Vec::with_capacity(256));
    let (bytes, places) = buffers();
    let device = Fixed { packet, ..Fixed::default() };
    // Whom arrivals are from, or nobody for raw packets.
    let from = if mode == Mode::IpIp { 0 } else { other };
    let network = Fixed { packet: vec![from], bytes, places, ..Fixed::default() };
    Engine::new(core, device, network)
}

/// What one has sent is what the other has to receive.
fn carry(from: &mut Fixed, to: &mut Fixed, sender: u8, raw: bool) {
    std::mem::swap(&mut from.bytes, &mut to.bytes);
    std::mem::swap(&mut from.places, &mut to.places);
    if raw {
        for at in &to.places {
            to.bytes[at.clone()][12..16].copy_from_slice(&[192, 0, 2, sender]);
        }
    }
}

#[test]
fn a_warm_path_allocates_nothing() {
    for mode in [Mode::WireGuard, Mode::IpUdp, Mode::IpIp] {
        let (mut a, mut b) = (engine(1, mode), engine(2, mode));
        let mut round = |packets: usize| {
            a.device.give = packets;
            a.step_device().unwrap();
            carry(&mut a.network, &mut b.network, 1, mode == Mode::IpIp);
            b.step_network().unwrap();
            carry(&mut b.network, &mut a.network, 2, mode == Mode::IpIp);
            a.step_network().unwrap();
            carry(&mut a.network, &mut b.network, 1, mode == Mode::IpIp);
            b.step_network().unwrap();
            b.network.bytes.clear();
            b.network.places.clear();
            std::mem::take(&mut b.device.taken)
        };
        for _ in 0..20 {
            round(100);
        }
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        let carried: usize = (0..20).map(|_| round(100)).sum();
        let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert_eq!((carried, allocated), (2000, 0), "{mode}");
    }
}
