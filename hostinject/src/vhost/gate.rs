//! Rates and the hold of a machine's port, as its server is told of them.
//!
//! ```text
//! "rates FROM TO"   →  "ok"            each as `100mbit,10kpps`, or `-`
//! "hold", "release" →  "ok"
//! "drain"           →  "held N", packets
//! "accept", packets →  "lost N"
//! ```
//!
//! While the guest is held, the asking thread empties the device, whether a VMM is connected
//! or not; the card does not touch it. A packet has its virtio header before it and its
//! length before that, in four bytes; a length of none ends them.

use std::fs::File;
use std::io::{self, BufRead, Write};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::{Counted, Device};
use crate::gate::{HOLD_PACKETS, Rate, Rates};

/// Longest packet with its header.
const LONGEST: usize = 65_545;
/// How long the card may take to hand back what it had in hand.
const SETTLE: Duration = Duration::from_millis(200);
/// Packets that are read before control is heard again: more than a queue of a TUN device
/// holds (500, `TUN_READQ_SIZE` of `drivers/net/tun.c`), so that one that is read before it is
/// detached is empty then.
const BATCH: usize = 512;

/// Waits until somebody asks, and keeps a held guest's packets meanwhile.
pub(super) fn wait(
    control: &impl AsFd,
    device: &Device,
    counted: &Mutex<Counted>,
) -> io::Result<()> {
    loop {
        let is_held = lock(counted).hold.is_held();
        let mut fds = vec![PollFd::new(control, PollFlags::IN)];
        let queues = device.queues().iter().map(|queue| PollFd::new(&**queue, PollFlags::IN));
        fds.extend(queues.filter(|_| is_held));
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            other => other?,
        };
        let (asked, packets) = fds.split_first().map_or((false, false), |(asked, queues)| {
            let is_set = |fd: &PollFd<'_>| !fd.revents().is_empty();
            (is_set(asked), queues.iter().any(is_set))
        });
        if packets && pull_all(device, counted).is_err() {
            // The device is gone; whoever serves it ends this process.
            thread::sleep(SETTLE);
        }
        if asked {
            return Ok(());
        }
    }
}

/// Keeps what the device has, in each queue.
fn pull_all(device: &Device, counted: &Mutex<Counted>) -> io::Result<()> {
    device.queues().iter().try_for_each(|queue| pull(queue, counted))
}

/// Keeps what one of its queues has.
pub(super) fn pull(device: &File, counted: &Mutex<Counted>) -> io::Result<()> {
    let mut room = vec![0; LONGEST + 1];
    for _ in 0..BATCH {
        match rustix::io::read(device, &mut room) {
            Ok(len) => {
                let mut counted = lock(counted);
                if let Err(reason) = counted.hold.keep(room.get(..len).unwrap_or_default()) {
                    counted.drops.count(reason);
                }
            }
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::INTR | Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Does what a line says; whether it was one of these.
pub(super) fn answer(
    line: &str,
    reader: &mut impl BufRead,
    mut writer: impl Write,
    device: &Device,
    counted: &Mutex<Counted>,
) -> io::Result<bool> {
    let mut words = line.split(' ');
    match (words.next(), words.next(), words.next()) {
        (Some("rates"), Some(from), Some(to)) => {
            let rates = Rates { from_guest: rate(from)?, to_guest: rate(to)? };
            lock(counted).set_rates(rates);
            writer.write_all(b"ok\n")?;
        }
        (Some("hold"), None, None) => {
            let mut counted = lock(counted);
            counted.hold.hold();
            counted.settled = 0;
            counted.wake();
            writer.write_all(b"ok\n")?;
        }
        (Some("release"), None, None) => {
            // What waits in the device has come before what comes now.
            pull_all(device, counted)?;
            let mut counted = lock(counted);
            counted.hold.release();
            counted.wake();
            writer.write_all(b"ok\n")?;
        }
        (Some("drain"), None, None) => {
            settle(counted);
            pull_all(device, counted)?;
            let packets = lock(counted).hold.drain();
            writer.write_all(format!("held {}\n", packets.len()).as_bytes())?;
            write_packets(&mut writer, &packets)?;
        }
        (Some("accept"), None, None) => {
            let packets = read_packets(reader)?;
            let mut counted = lock(counted);
            let lost = counted.hold.accept(packets);
            for _ in 0..lost {
                counted.drops.count(conet_dataplane::DropReason::HoldFull);
            }
            counted.wake();
            writer.write_all(format!("lost {lost}\n").as_bytes())?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Waits for the card to give back the frame that it has in hand, if there is a card.
fn settle(counted: &Mutex<Counted>) {
    let begin = Instant::now();
    while !lock(counted).is_settled() && begin.elapsed() < SETTLE {
        thread::sleep(Duration::from_millis(1));
    }
}

pub(super) fn write_packets(writer: &mut impl Write, packets: &[Vec<u8>]) -> io::Result<()> {
    let mut bytes = Vec::new();
    for packet in packets {
        let len = u32::try_from(packet.len()).map_err(|_| bad())?;
        bytes.extend(len.to_le_bytes());
        bytes.extend(packet);
    }
    bytes.extend([0; 4]);
    writer.write_all(&bytes)
}

pub(super) fn read_packets(reader: &mut impl BufRead) -> io::Result<Vec<Vec<u8>>> {
    let mut packets = Vec::new();
    loop {
        let mut len = [0; 4];
        reader.read_exact(&mut len)?;
        let len = usize::try_from(u32::from_le_bytes(len)).map_err(|_| bad())?;
        if len == 0 {
            return Ok(packets);
        }
        if len > LONGEST || packets.len() == HOLD_PACKETS {
            return Err(bad());
        }
        let mut packet = vec![0; len];
        reader.read_exact(&mut packet)?;
        packets.push(packet);
    }
}

/// As it is said: nothing is `-`.
fn rate(text: &str) -> io::Result<Rate> {
    if text == "-" { Ok(Rate::default()) } else { text.parse().map_err(|_| bad()) }
}

pub(super) fn rates_line(rates: Rates) -> String {
    let text = |rate: Rate| match rate == Rate::default() {
        true => "-".to_owned(),
        false => rate.to_string(),
    };
    format!("rates {} {}\n", text(rates.from_guest), text(rates.to_guest))
}

fn bad() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixDatagram, UnixListener};
    use std::sync::Arc;

    use conet_dataplane::DropReason;
    use conet_netsys::MacAddr;
    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

    use super::super::net::Card;
    use super::super::server::Server;
    use super::super::{server, tap, watch};
    use super::*;
    use crate::segment::{OURS, Segment};

    #[test]
    fn packets_are_written_and_read_back_and_half_of_them_are_none() {
        let packets = vec![vec![1; 20], vec![2; LONGEST], vec![3]];
        let mut bytes = Vec::new();
        write_packets(&mut bytes, &packets).unwrap();
        assert_eq!(read_packets(&mut &bytes[..]).unwrap(), packets);
        for cut in [0, 3, 4, 23, 100, bytes.len() - 1] {
            assert!(read_packets(&mut &bytes[..cut]).is_err(), "{cut}");
        }
        assert!(read_packets(&mut &u32::MAX.to_le_bytes()[..]).is_err());
    }

    /// A card with its guest's queue, and the host's end of its device.
    struct Scene {
        card: Card,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        queue: Queue,
        device: Device,
        host: UnixDatagram,
        counted: Arc<Mutex<Counted>>,
        given: u16,
    }

    const AVAILABLE: u64 = 0x1000;
    const USED: u64 = 0x2000;
    const BUFFERS: u64 = 0x4000;
    const SIZE: u16 = 64;

    impl Scene {
        fn new() -> Self {
            let region = (GuestAddress(0), 0x40000);
            let memory = GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges(&[region]).unwrap());
            let mut queue = Queue::new(1024).unwrap();
            queue.set_size(SIZE);
            queue.set_avail_ring_address(Some(0x1000), Some(0));
            queue.set_used_ring_address(Some(0x2000), Some(0));
            queue.set_ready(true);
            let guest = memory.memory();
            for at in 0..SIZE {
                // Address, length, flags (written by the device), next.
                let place = BUFFERS + 2048 * u64::from(at);
                let descriptor = u128::from(place) | 2048 << 64 | 2 << 96;
                let to = GuestAddress(16 * u64::from(at));
                guest.write_slice(&descriptor.to_le_bytes(), to).unwrap();
                let entry = GuestAddress(AVAILABLE + 4 + 2 * u64::from(at));
                guest.write_slice(&at.to_le_bytes(), entry).unwrap();
            }
            let (device, host) = UnixDatagram::pair().unwrap();
            device.set_nonblocking(true).unwrap();
            let device = Device::of([OwnedFd::from(device)]);
            let address = IpAddr::from([10, 77, 1, 2]);
            let segment = Segment::new(OURS, MacAddr([2; 6]), vec![address]);
            let counted = Arc::new(Mutex::new(Counted::default()));
            let first = Arc::clone(device.first());
            let card = Card::new(0, first, segment, 1420, Arc::clone(&counted));
            drop(guest);
            Self { card, memory, queue, device, host, counted, given: 0 }
        }

        /// What the guest has so many buffers for, by number.
        fn take(&mut self, buffers: u16) -> Vec<u16> {
            let guest = self.memory.memory();
            let used =
                |guest: &GuestMemoryMmap| guest.read_obj::<u16>(GuestAddress(USED + 2)).unwrap();
            let before = used(&guest);
            self.given += buffers;
            guest.write_obj(self.given, GuestAddress(AVAILABLE + 2)).unwrap();
            self.card.receive(&mut self.queue, &guest).unwrap();
            let number = |at: u16| {
                let slot = USED + 4 + 8 * u64::from(at % SIZE);
                let head = guest.read_obj::<u32>(GuestAddress(slot)).unwrap();
                let packet = BUFFERS + 2048 * u64::from(head) + 12 + 14;
                u16::from_be(guest.read_obj::<u16>(GuestAddress(packet + 20)).unwrap())
            };
            (before..used(&guest)).map(number).collect()
        }

        /// The host has packets for the guest.
        fn send(&self, numbers: std::ops::Range<u16>) {
            for number in numbers {
                let mut packet = [0; 32];
                packet[10] = 0x45;
                packet[30..].copy_from_slice(&number.to_be_bytes());
                self.host.send(&packet).unwrap();
            }
        }

        fn tell(&self, what: &[u8]) -> Vec<u8> {
            let (mut reader, mut said, mut line) = (what, Vec::new(), String::new());
            reader.read_line(&mut line).unwrap();
            let line = line.trim_end();
            assert!(answer(line, &mut reader, &mut said, &self.device, &self.counted).unwrap());
            said
        }

        fn pull(&self) {
            pull_all(&self.device, &self.counted).unwrap();
        }
    }

    #[test]
    fn a_guest_that_moves_gets_its_packets_once_and_in_order() {
        let mut here = Scene::new();
        here.send(0..4);
        // It has one buffer; the card has the second packet in hand.
        assert_eq!(here.take(1), [0]);
        assert_eq!(here.tell(b"hold\n"), b"ok\n");
        assert_eq!(here.take(1), [] as [u16; 0], "it is held");
        here.send(4..6);
        here.pull();
        let said = here.tell(b"drain\n");
        let packets = said.strip_prefix(b"held 5\n").expect("1 to 5").to_vec();
        // At the other host packets come already; those from here come first.
        let mut there = Scene::new();
        assert_eq!(there.tell(b"hold\n"), b"ok\n");
        there.send(6..9);
        there.pull();
        assert_eq!(there.tell(&[b"accept\n", &packets[..]].concat()), b"lost 0\n");
        there.send(9..11);
        assert_eq!(there.take(20), [] as [u16; 0]);
        assert_eq!(there.tell(b"release\n"), b"ok\n");
        there.send(11..13);
        assert_eq!(there.take(20), (1..13).collect::<Vec<_>>());
        assert_eq!(gate_drops(&there) + gate_drops(&here), 0);
        // And here, where it is let go again, there is nothing twice.
        here.tell(b"release\n");
        here.send(13..14);
        assert_eq!(here.take(20), [13]);
    }

    /// As the daemon does, over the control socket.
    #[test]
    fn a_server_holds_and_hands_out_what_it_kept() {
        let mut scene = Scene::new();
        let directory = tempfile::tempdir().unwrap();
        let [control, socket] =
            ["web.control", "web.vhost"].map(|name| directory.path().join(name));
        let listener = UnixListener::bind(&control).unwrap();
        let server = Server { control, socket: socket.clone() };
        let (device, counted) = (scene.device.clone(), Arc::clone(&scene.counted));
        thread::spawn(move || {
            while wait(&listener, &device, &counted).is_ok() {
                let (stream, _) = listener.accept().unwrap();
                server::answer(stream, &device, &counted, "x y").unwrap();
            }
        });
        assert_eq!(server.status().unwrap().serves, "x y");
        server.hold().unwrap();
        scene.send(0..6);
        let mut kept = Vec::new();
        let begin = Instant::now();
        while kept.len() < 6 {
            kept.extend(server.drain().unwrap());
            assert!(begin.elapsed() < Duration::from_secs(10), "{} are kept", kept.len());
        }
        scene.send(6..8);
        assert_eq!(server.accept(&kept).unwrap(), 0);
        server.set_rates(Rates { to_guest: "9kpps".parse().unwrap(), ..Rates::default() }).unwrap();
        // Somebody watches, and sees what the guest gets.
        let mut watched = watch(&socket).unwrap();
        assert!(tap::read(&mut watched).unwrap().2.is_empty(), "it is alive");
        server.release().unwrap();
        assert_eq!(scene.take(20), (0..8).collect::<Vec<_>>());
        assert_eq!(lock(&scene.counted).rates.to_guest.to_string(), "9kpps");
        for number in 0..8u16 {
            let (_, missed, frame) = tap::read(&mut watched).unwrap();
            assert_eq!((missed, frame.last_chunk()), (0, Some(&number.to_be_bytes())));
        }
        // When it has gone, nobody copies for it any more.
        drop(watched);
        let begin = Instant::now();
        while !lock(&scene.counted).taps.is_empty() {
            assert!(begin.elapsed() < Duration::from_secs(20), "it is still fed");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn gate_drops(scene: &Scene) -> u64 {
        lock(&scene.counted).drops.total()
    }

    #[test]
    fn a_limited_guest_loses_what_is_counted() {
        let mut scene = Scene::new();
        scene.tell(b"rates - 1pps\n");
        // No more at once than the device's queue holds.
        let passed: usize = (0..12)
            .map(|_| {
                scene.send(0..8);
                scene.take(8).len()
            })
            .sum();
        let limited = lock(&scene.counted).drops[DropReason::GuestRate];
        assert_eq!((passed as u64 + limited, limited > 0), (96, true));
        scene.tell(b"rates - -\n");
        scene.send(0..4);
        assert_eq!(scene.take(0), [0, 1, 2, 3]);
    }

    #[test]
    fn rates_pass_as_a_line() {
        for text in ["100mbit,3pps", "-", "7kpps"] {
            let rates = Rates { from_guest: rate(text).unwrap(), to_guest: rate("-").unwrap() };
            assert_eq!(rates_line(rates), format!("rates {text} -\n"));
        }
        assert!(rate("fast").is_err());
    }
}
