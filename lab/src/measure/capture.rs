//! What a link carries, as an eavesdropper on it sees it.
//!
//! A packet socket on the LAN's bridge in promiscuous mode takes every frame
//! that the bridge forwards. Frames are kept up to 256 MiB; what came
//! after is counted, so a capture that is not whole says so.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::IntoRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pnet_datalink::{Channel, Config, DataLinkReceiver};
use pnet_packet::ethernet::{EtherTypes, EthernetPacket};
use pnet_packet::ip::{IpNextHeaderProtocol, IpNextHeaderProtocols};
use pnet_packet::ipv4::Ipv4Packet;

use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use socket2::{Domain, Protocol, Socket, Type};

use super::MeasureError;

/// Most bytes of frames that a capture keeps.
const MAX_BYTES: usize = 256 << 20;
/// Largest frame: a batch that the sender's kernel has not split yet
/// (64 KiB with its headers).
const MAX_FRAME: usize = 80 * 1024;
/// Bytes that may wait in the kernel. Its default, some 200 KiB, lost part of a
/// 2 MiB transfer in the clear, whose frames are not batched.
const QUEUE: usize = 64 << 20;
/// Every protocol (`linux/if_ether.h`).
const ETH_P_ALL: u16 = 0x0003;
/// How long the taking thread waits before it looks whether to stop.
const TICK: Duration = Duration::from_millis(20);
/// How long what was sent may take to be seen: it is seen at once, or never.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long after the last frame it is taken that no more come.
const SETTLE: Duration = Duration::from_millis(60);

/// A capture under way; stopped and given up when dropped.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    taken: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<Captured, io::Error>>>,
}

/// The frames that a link carried.
#[derive(Debug, Clone, Default)]
pub struct Captured {
    frames: Vec<Vec<u8>>,
    bytes: usize,
    /// Frames beyond what is kept.
    pub missed: u64,
}

impl Capture {
    /// Begins to take what the link carries, in the calling thread's namespace.
    ///
    /// # Errors
    ///
    /// [`MeasureError::NoLink`], [`MeasureError::Socket`].
    pub fn start(link: &str) -> Result<Self, MeasureError> {
        let interface = pnet_datalink::interfaces()
            .into_iter()
            .find(|interface| interface.name == link)
            .ok_or_else(|| MeasureError::NoLink { link: link.to_owned() })?;
        let config = Config {
            socket_fd: Some(socket()?),
            read_timeout: Some(TICK),
            read_buffer_size: MAX_FRAME,
            promiscuous: true,
            ..Config::default()
        };
        let opened = pnet_datalink::channel(&interface, config);
        let receiver = match opened.map_err(MeasureError::socket("watch the link"))? {
            Channel::Ethernet(_, receiver) => receiver,
            _ => return Err(MeasureError::NoLink { link: link.to_owned() }),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let taken = Arc::new(AtomicU64::new(0));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&taken));
        let thread = thread::Builder::new()
            .name("capture".to_owned())
            .spawn(move || take(receiver, &stopped, &counted))
            .map_err(MeasureError::socket("start the capture"))?;
        Ok(Self { stop, taken, thread: Some(thread) })
    }

    /// Waits until so many bytes have been taken since the start, a moment at most:
    /// what the kernel has dropped never comes.
    pub fn wait_for(&self, bytes: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.taken.load(Ordering::Relaxed) < bytes && Instant::now() < deadline {
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Ends it when the link has fallen silent, and gives what it saw.
    ///
    /// # Errors
    ///
    /// [`MeasureError::Socket`].
    pub fn stop(mut self) -> Result<Captured, MeasureError> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or(MeasureError::Thread)?;
        let captured = thread.join().map_err(|_| MeasureError::Thread)?;
        captured.map_err(MeasureError::socket("watch the link"))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A packet socket with room for a burst. The channel that is made on it owns it.
fn socket() -> Result<i32, MeasureError> {
    let all = Protocol::from(i32::from(ETH_P_ALL.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(all))
        .map_err(MeasureError::socket("open a packet socket"))?;
    // In a user namespace no more than the system's limit can be had; who sends while
    // it watches waits for it (`Capture::wait_for`).
    if set_socket_recv_buffer_size_force(&socket, QUEUE).is_err() {
        socket
            .set_recv_buffer_size(QUEUE)
            .map_err(MeasureError::socket("give the packet socket room"))?;
    }
    Ok(socket.into_raw_fd())
}

fn take(
    mut receiver: Box<dyn DataLinkReceiver>,
    stop: &AtomicBool,
    taken: &AtomicU64,
) -> io::Result<Captured> {
    let mut captured = Captured::default();
    let mut last = Instant::now();
    // On after the stop until the socket's queue is empty, yet not for ever.
    while !stop.load(Ordering::Relaxed) || last.elapsed() < SETTLE {
        match receiver.next() {
            Ok(frame) => {
                captured.push(frame);
                taken.fetch_add(frame.len() as u64, Ordering::Relaxed);
                if !stop.load(Ordering::Relaxed) {
                    last = Instant::now();
                }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(captured)
}

impl Captured {
    fn push(&mut self, frame: &[u8]) {
        if self.bytes + frame.len() > MAX_BYTES {
            self.missed += 1;
        } else {
            self.bytes += frame.len();
            self.frames.push(frame.to_vec());
        }
    }

    /// Frames kept.
    #[must_use]
    pub fn frames(&self) -> usize {
        self.frames.len()
    }

    /// Bytes of the frames kept.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Every address in the outermost IPv4 headers, with the frames it was in.
    #[must_use]
    pub fn addresses(&self) -> BTreeMap<Ipv4Addr, u64> {
        let mut addresses = BTreeMap::new();
        for packet in self.packets() {
            *addresses.entry(packet.get_source()).or_default() += 1;
            *addresses.entry(packet.get_destination()).or_default() += 1;
        }
        addresses
    }

    /// Every protocol in the outermost IPv4 headers, with the frames of it.
    #[must_use]
    pub fn protocols(&self) -> BTreeMap<String, u64> {
        let mut protocols = BTreeMap::new();
        for packet in self.packets() {
            let name = protocol_name(packet.get_next_level_protocol());
            *protocols.entry(name).or_default() += 1;
        }
        protocols
    }

    /// Frames that are neither IPv4 nor ARP.
    #[must_use]
    pub fn strangers(&self) -> usize {
        let known = |frame: &Vec<u8>| {
            EthernetPacket::new(frame).is_some_and(|ethernet| {
                matches!(ethernet.get_ethertype(), EtherTypes::Ipv4 | EtherTypes::Arp)
            })
        };
        self.frames.iter().filter(|frame| !known(frame)).count()
    }

    /// Frames that hold these bytes anywhere.
    #[must_use]
    pub fn holding(&self, needle: &[u8]) -> usize {
        let holds =
            |frame: &Vec<u8>| frame.windows(needle.len().max(1)).any(|window| window == needle);
        self.frames.iter().filter(|frame| holds(frame)).count()
    }

    fn packets(&self) -> impl Iterator<Item = Ipv4Packet<'_>> {
        self.frames.iter().filter_map(|frame| {
            let ethernet = EthernetPacket::new(frame)?;
            let header = EthernetPacket::minimum_packet_size();
            (ethernet.get_ethertype() == EtherTypes::Ipv4)
                .then(|| Ipv4Packet::new(frame.get(header..)?))?
        })
    }
}

fn protocol_name(protocol: IpNextHeaderProtocol) -> String {
    match protocol {
        IpNextHeaderProtocols::Udp => "udp".to_owned(),
        IpNextHeaderProtocols::Tcp => "tcp".to_owned(),
        IpNextHeaderProtocols::Icmp => "icmp".to_owned(),
        IpNextHeaderProtocols::Ipv4 => "ipip".to_owned(),
        IpNextHeaderProtocol(number) => format!("protocol {number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An Ethernet frame of an IPv4 packet between two addresses.
    fn frame(protocol: u8, from: [u8; 4], to: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(20 + payload.len()).unwrap();
        let mut frame = vec![0; 12];
        frame.extend([8, 0, 0x45, 0, 0, length, 0, 0, 0, 0, 64, protocol, 0, 0]);
        frame.extend(from);
        frame.extend(to);
        frame.extend(payload);
        frame
    }

    #[test]
    fn frames_are_read_for_addresses_protocols_and_bytes() {
        let mut captured = Captured::default();
        captured.push(&frame(17, [192, 0, 2, 1], [192, 0, 2, 2], b"sealed"));
        captured.push(&frame(4, [192, 0, 2, 2], [192, 0, 2, 1], b"inner"));
        captured.push(&[0; 60]);
        assert_eq!(captured.frames(), 3);
        assert_eq!(captured.strangers(), 1);
        let addresses: Vec<_> = captured.addresses().into_iter().collect();
        let (one, two) = (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2));
        assert_eq!(addresses, [(one, 2), (two, 2)]);
        assert_eq!(captured.protocols().into_keys().collect::<Vec<_>>(), ["ipip", "udp"]);
        assert_eq!(captured.holding(b"inner"), 1);
        assert_eq!(captured.holding(b"absent"), 0);
    }

    #[test]
    fn a_link_that_is_not_there_is_named() {
        let error = Capture::start("conet-none").unwrap_err();
        assert!(error.to_string().contains("conet-none"));
    }

    #[test]
    fn what_the_loopback_carries_is_seen() {
        conet_testkit::privileged!();
        let capture = Capture::start("lo").unwrap();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let marker = format!("conet capture test {}", std::process::id());
        socket.send_to(marker.as_bytes(), "127.0.0.1:9").unwrap();
        let captured = capture.stop().unwrap();
        assert!(captured.holding(marker.as_bytes()) >= 1);
        assert_eq!(captured.missed, 0);
    }
}
