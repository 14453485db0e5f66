//! A guest that lies: rings, descriptors and messages as no driver writes them. Its port
//! lives, and serves the next guest. Needs root.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

#[path = "hostile/queues.rs"]
mod queues;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ::vhost::VhostBackend;
use conet_hostinject::Lease;
use conet_hostinject::vhost::{self, VhostSpec};
use conet_netsys::{IfName, MacAddr, Netlink, Netns, NetnsName, Sysctl};
use conet_testkit::random::{Random, seed};
use conet_testkit::{Need, privileged};
use rustix::fs::{MemfdFlags, memfd_create};

const MEMORY: u64 = 1 << 20;
const SIZE: u16 = 64;
/// Descriptors, what is available, what was used: of a queue, and buffers beyond.
const fn rings(queue: u64) -> [u64; 3] {
    [0x1000 + queue * 0x4000, 0x2000 + queue * 0x4000, 0x3000 + queue * 0x4000]
}
const BUFFERS: u64 = 0x8_0000;
/// A driver writes and may be written to.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// What the guest is told.
fn lease() -> Lease {
    let [addresses, gateways] =
        ["10.77.1.10", "10.77.1.1"].map(|address| vec![address.parse().unwrap()]);
    Lease { addresses, gateways, prefix: 24, dns: Vec::new(), mtu: 1420 }
}

/// A guest's side of a connection.
struct Guest {
    /// The connection.
    frontend: front::Frontend,
    memory: File,
    kicks: Vec<vmm_sys_util::eventfd::EventFd>,
    available: Vec<u16>,
}

mod front {
    pub(super) use ::vhost::vhost_user::{Frontend, VhostUserFrontend};
    pub(super) use ::vhost::{VhostUserMemoryRegionInfo, VringConfigData};
}

use front::VhostUserFrontend as _;

impl Guest {
    /// Connects as a driver does, with these features of the card's.
    fn connect(path: &Path, wanted: u64) -> Self {
        Self::connect_by(path, wanted, &[0, 1])
    }

    /// The same with several pairs of queues, which are switched on in this order.
    fn connect_by(path: &Path, wanted: u64, order: &[usize]) -> Self {
        let queues = order.len();
        let mut frontend = front::Frontend::connect(path, queues as u64).unwrap();
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap() & (wanted | 1 << 30 | 1 << 32);
        frontend.get_protocol_features().unwrap();
        frontend.set_features(features).unwrap();
        let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(MEMORY).unwrap();
        let region = front::VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: 0,
            mmap_offset: 0,
            mmap_handle: memory.as_raw_fd(),
        };
        frontend.set_mem_table(&[region]).unwrap();
        let kick = |_| vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        let kicks: Vec<_> = (0..queues).map(kick).collect();
        for (queue, kick) in kicks.iter().enumerate() {
            let [desc, avail, used] = rings(queue as u64);
            let call = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
            frontend.set_vring_num(queue, SIZE).unwrap();
            frontend.set_vring_base(queue, 0).unwrap();
            let config = front::VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                flags: 0,
                desc_table_addr: desc,
                used_ring_addr: used,
                avail_ring_addr: avail,
                log_addr: None,
            };
            frontend.set_vring_addr(queue, &config).unwrap();
            frontend.set_vring_call(queue, &call).unwrap();
            frontend.set_vring_kick(queue, kick).unwrap();
        }
        for queue in order {
            frontend.set_vring_enable(*queue, true).unwrap();
        }
        Self { frontend, memory, kicks, available: vec![0; queues] }
    }

    fn descriptor(&self, queue: usize, at: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let table = rings(queue as u64)[0];
        self.memory.write_all_at(&bytes, table + u64::from(at) * 16).unwrap();
    }

    /// Makes a chain available that begins at `head`.
    fn offer(&mut self, queue: usize, head: u16) {
        let avail = rings(queue as u64)[1];
        let slot = u64::from(self.available[queue] % SIZE);
        self.memory.write_all_at(&head.to_le_bytes(), avail + 4 + slot * 2).unwrap();
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.memory.write_all_at(&self.available[queue].to_le_bytes(), avail + 2).unwrap();
    }

    fn used(&self, queue: usize) -> u16 {
        let mut index = [0; 2];
        self.memory.read_exact_at(&mut index, rings(queue as u64)[2] + 2).unwrap();
        u16::from_le_bytes(index)
    }

    fn kick(&self, queue: usize) {
        self.kicks[queue].write(1).unwrap();
    }

    /// Asks for the gateway's Ethernet address by ARP; whether the answer comes.
    fn asks_and_is_answered(&mut self) -> bool {
        self.is_answered_by(0)
    }

    /// The same by one of its pairs of queues.
    fn is_answered_by(&mut self, pair: usize) -> bool {
        let (receive, transmit) = (2 * pair, 2 * pair + 1);
        let [question, answer] =
            [2 * transmit, 2 * receive].map(|page| BUFFERS + 0x1000 * page as u64);
        let sent = self.used(transmit);
        let mut frame = vec![0; 12];
        frame.extend([0xff; 6]);
        frame.extend(MAC.0);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(MAC.0);
        frame.extend([10, 77, 1, 10, 0, 0, 0, 0, 0, 0, 10, 77, 1, 1]);
        self.memory.write_all_at(&frame, question).unwrap();
        self.descriptor(transmit, 0, question, u32::try_from(frame.len()).unwrap(), 0, 0);
        self.offer(transmit, 0);
        self.kick(transmit);
        // The host's kernel has things to say as well.
        let is_answer = |frame: &[u8]| {
            frame[12..18] == MAC.0 && frame[24..26] == [8, 6] && frame[32..34] == [0, 2]
        };
        for _ in 0..50 {
            let before = self.used(receive);
            self.descriptor(receive, 0, answer, 2048, WRITE, 0);
            self.offer(receive, 0);
            self.kick(receive);
            if !self.waits_for(receive, before.wrapping_add(1)) {
                return false;
            }
            let mut frame = [0; 12 + 42];
            self.memory.read_exact_at(&mut frame, answer).unwrap();
            if is_answer(&frame) {
                return self.used(transmit) == sent.wrapping_add(1);
            }
        }
        false
    }

    /// Whether the port has used so many chains of a queue, at last.
    fn waits_for(&self, queue: usize, used: u16) -> bool {
        let begin = Instant::now();
        while self.used(queue) != used {
            if begin.elapsed() > Duration::from_secs(10) {
                return false;
            }
            thread::sleep(Duration::from_micros(100));
        }
        true
    }

    /// Offers a queue all of its buffers, without a kick.
    fn offer_all(&mut self, queue: usize, buffers: u64) {
        for slot in 0..SIZE {
            self.descriptor(queue, slot, buffers + u64::from(slot) * 2048, 2048, WRITE, 0);
            self.offer(queue, slot);
        }
    }
}

const MAC: MacAddr = MacAddr([2, 0, 10, 77, 1, 10]);

/// A port in a namespace of its own.
struct Port {
    name: NetnsName,
    directory: tempfile::TempDir,
}

impl Port {
    fn new(name: &str) -> Self {
        Self::of(name, 1)
    }

    /// With so many pairs of queues.
    fn of(name: &str, queues: u16) -> Self {
        let name = NetnsName::new(&format!("conet-v{}-{name}", std::process::id())).unwrap();
        let netns = Netns::create(&name).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vhost")).unwrap();
        let link = IfName::new("vm").unwrap();
        let device = netns.run(|| {
            let device = vhost::open_device(link, queues).unwrap();
            if queues > 1 {
                // Whose packets are counted: nothing but what is said to it.
                Sysctl::DisableIpv6(Some(link)).write("1").unwrap();
            }
            Netlink::open().unwrap().set_up(link).unwrap();
            device
        });
        let device = device.unwrap();
        let spec = VhostSpec { mac: MAC, lease: lease(), queues };
        thread::spawn(move || vhost::serve(listener, device, &spec));
        Self { name, directory }
    }

    fn path(&self) -> std::path::PathBuf {
        self.directory.path().join("vhost")
    }

    /// Whether a guest that behaves is served.
    fn serves(&self) -> bool {
        Guest::connect(&self.path(), u64::MAX).asks_and_is_answered()
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        Netns::delete(&self.name).unwrap();
    }
}

#[test]
fn a_guest_that_behaves_is_served_again_and_again() {
    privileged!(Need::Tun);
    let port = Port::new("well");
    let mut guest = Guest::connect(&port.path(), u64::MAX);
    for _ in 0..200 {
        assert!(guest.asks_and_is_answered());
    }
    drop(guest);
    // Without the newer features too.
    assert!(Guest::connect(&port.path(), 0).asks_and_is_answered());
    assert!(port.serves());
}

type Lie = fn(&mut Guest);

/// One lie at a time, each beside a frame that is as it should be.
#[test]
fn each_lie_of_a_guest_hurts_itself_alone() {
    privileged!(Need::Tun);
    let port = Port::new("lies");
    let lies: [(&str, Lie); 9] = [
        ("a loop of descriptors", |guest| {
            guest.descriptor(1, 3, BUFFERS, 64, NEXT, 4);
            guest.descriptor(1, 4, BUFFERS, 64, NEXT, 3);
            guest.offer(1, 3);
        }),
        ("a head beyond the table", |guest| guest.offer(1, SIZE + 7)),
        ("a next beyond the table", |guest| {
            guest.descriptor(1, 3, BUFFERS, 64, NEXT, 1000);
            guest.offer(1, 3);
        }),
        ("an address beyond its memory", |guest| {
            guest.descriptor(1, 3, MEMORY - 8, 4096, 0, 0);
            guest.offer(1, 3);
            guest.descriptor(0, 3, u64::MAX - 8, 4096, WRITE, 0);
            guest.offer(0, 3);
        }),
        ("four gigabytes", |guest| {
            guest.descriptor(1, 3, 0, u32::MAX, NEXT, 4);
            guest.descriptor(1, 4, 0, u32::MAX, 0, 0);
            guest.offer(1, 3);
        }),
        ("nothing at all", |guest| {
            guest.descriptor(1, 3, BUFFERS, 0, 0, 0);
            guest.offer(1, 3);
        }),
        ("a frame to write into for one to read", |guest| {
            guest.descriptor(1, 3, BUFFERS, 2048, WRITE, 0);
            guest.offer(1, 3);
            guest.descriptor(0, 3, BUFFERS, 2048, 0, 0);
            guest.offer(0, 3);
        }),
        ("an indirect table of one and a half", |guest| {
            guest.descriptor(1, 3, BUFFERS, 24, 4, 0);
            guest.offer(1, 3);
        }),
        ("segments of nothing, with a checksum beyond the end", |guest| {
            let mut frame = vec![1, 1, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0];
            frame.extend([2, b'c', b'o', b'n', b'e', b't']);
            frame.extend(MAC.0);
            frame.extend([8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 77, 1, 10]);
            frame.extend([10, 77, 2, 2]);
            frame.extend([0; 20]);
            guest.memory.write_all_at(&frame, BUFFERS + 8192).unwrap();
            let len = u32::try_from(frame.len()).unwrap();
            guest.descriptor(1, 3, BUFFERS + 8192, len, 0, 0);
            guest.offer(1, 3);
        }),
    ];
    for (what, lie) in lies {
        let mut guest = Guest::connect(&port.path(), u64::MAX);
        lie(&mut guest);
        guest.kick(1);
        guest.kick(0);
        thread::sleep(Duration::from_millis(5));
        drop(guest);
        assert!(port.serves(), "after {what}");
    }
}

/// Rings and descriptors of anything, from a seed.
#[test]
fn rings_of_anything_leave_the_port_alive() {
    privileged!(Need::Tun);
    let port = Port::new("any");
    let mut random = Random::new(seed());
    for round in 0..150 {
        let guest = Guest::connect(&port.path(), random.number());
        for _ in 0..random.below(20) {
            let [desc, avail, used] = rings(random.below(2));
            let place = [desc, avail, used][usize::try_from(random.below(3)).unwrap()];
            let mut bytes = vec![0; usize::try_from(random.below(1024)).unwrap()];
            random.fill(&mut bytes);
            // Small numbers are more often within bounds.
            if random.chance(500) {
                bytes.iter_mut().for_each(|byte| *byte &= 0x0f);
            }
            guest.memory.write_all_at(&bytes, place).unwrap();
            guest.kick(usize::try_from(random.below(2)).unwrap());
        }
        drop(guest);
        if round % 10 == 9 {
            assert!(port.serves(), "round {round}");
        }
    }
}

/// Messages of anything: the connection ends, or not; the next one is served.
#[test]
fn messages_of_anything_end_a_connection_at_most() {
    privileged!(Need::Tun);
    let port = Port::new("words");
    let mut random = Random::new(seed());
    for round in 0..300 {
        let mut stream = UnixStream::connect(port.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        for _ in 0..random.below(6) {
            let mut message = Vec::new();
            message.extend(u32::try_from(random.below(45)).unwrap().to_ne_bytes());
            let flags = if random.chance(900) { 1 } else { random.number() };
            message.extend(u32::try_from(flags & 0xffff_ffff).unwrap().to_ne_bytes());
            let mut body = vec![0; usize::try_from(random.below(100)).unwrap()];
            random.fill(&mut body);
            let stated = if random.chance(900) { body.len() as u64 } else { random.number() };
            message.extend(u32::try_from(stated & 0xffff_ffff).unwrap().to_ne_bytes());
            message.extend(body);
            if stream.write_all(&message).is_err() {
                break;
            }
        }
        let _answer = stream.read(&mut [0; 64]);
        drop(stream);
        if round % 20 == 19 {
            assert!(port.serves(), "round {round}");
        }
    }
}

/// A guest that ran out of buffers while the device filled up kicks only when it is asked
/// to, as a driver with event indices does, and is served on.
#[test]
fn a_queue_that_ran_dry_under_a_flood_goes_on() {
    privileged!(Need::Tun);
    let port = Port::new("dry");
    let netns = Netns::open(&port.name).unwrap();
    let mut guest = Guest::connect(&port.path(), u64::MAX);
    let socket = netns.run(|| {
        let link = IfName::new("vm").unwrap();
        Netlink::open().unwrap().add_address(link, "10.77.1.1/24".parse().unwrap()).unwrap();
        std::net::UdpSocket::bind("10.77.1.1:0").unwrap()
    });
    let socket = socket.unwrap();
    for slot in 0..SIZE {
        let place = BUFFERS + u64::from(slot) * 2048;
        guest.descriptor(0, slot, place, 2048, WRITE, 0);
    }
    guest.offer(0, 0);
    guest.kick(0);
    // More than the device holds (500), and then silence.
    for _ in 0..3000 {
        socket.send_to(b"flood", "10.77.1.10:9").unwrap();
    }
    let (mut kicks, begin) = (0, Instant::now());
    for slot in 1..SIZE {
        while guest.used(0) < slot {
            assert!(begin.elapsed() < Duration::from_secs(20), "stuck at {slot}, {kicks} kicks");
            thread::sleep(Duration::from_micros(100));
        }
        let old = guest.available[0];
        guest.offer(0, slot);
        let mut event = [0; 2];
        let place = rings(0)[2] + 4 + 8 * u64::from(SIZE);
        guest.memory.read_exact_at(&mut event, place).unwrap();
        // `vring_need_event` of virtio 1.3 §2.7.10.1.
        if u16::from_le_bytes(event) == old {
            kicks += 1;
            guest.kick(0);
        }
    }
    while guest.used(0) < SIZE {
        assert!(begin.elapsed() < Duration::from_secs(20), "stuck at the end, {kicks} kicks");
        thread::sleep(Duration::from_micros(100));
    }
}
