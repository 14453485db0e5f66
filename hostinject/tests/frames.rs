//! Guests by frames on a unix socket, as QEMU's `stream` and User-Mode Linux's `bess` bring
//! them: those that behave, and those that lie. Needs root.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use conet_hostinject::Lease;
use conet_hostinject::vhost::{self, Transport, VhostSpec};
use conet_netsys::{IfName, MacAddr, Netlink, Netns, NetnsName};
use conet_testkit::random::{Random, changed, seed};
use conet_testkit::{Need, privileged};
use conet_wire::ip::checksum;
use socket2::{Domain, SockAddr, Socket, Type};

const MAC: MacAddr = MacAddr([2, 0, 10, 77, 1, 10]);
const GUEST: [u8; 4] = [10, 77, 1, 10];
const HOST: [u8; 4] = [10, 77, 1, 1];
/// Both transports of frames.
const BOTH: [Transport; 2] = [Transport::Stream, Transport::Bess];
const SOON: Duration = Duration::from_secs(20);
/// A frame of 65,535 bytes behind its Ethernet header.
const LONGEST: usize = 65_549;

/// A port in a namespace of its own, served by a thread.
struct Port {
    name: NetnsName,
    netns: Netns,
    directory: tempfile::TempDir,
}

impl Port {
    fn new(name: &str) -> Self {
        let thread = thread::Builder::new().name(format!("port-{name}"));
        let name = NetnsName::new(&format!("conet-f{}-{name}", std::process::id())).unwrap();
        let netns = Netns::create(&name).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let listeners = Transport::ALL.map(|transport| {
            let path = transport.socket(&directory.path().join("port.vhost"));
            (transport, transport.bind(&path).unwrap())
        });
        let device = netns.run(|| {
            let link = IfName::new("vm").unwrap();
            let device = vhost::open_device(link, 1).unwrap();
            let mut netlink = Netlink::open().unwrap();
            netlink.set_up(link).unwrap();
            netlink.add_address(link, "10.77.1.1/24".parse().unwrap()).unwrap();
            device
        });
        let device = device.unwrap();
        let spec = VhostSpec {
            mac: MAC,
            queues: 1,
            lease: Lease {
                addresses: vec![GUEST.into()],
                gateways: vec![],
                prefix: 24,
                dns: vec![],
                mtu: 1420,
            },
        };
        thread.spawn(move || vhost::serve_transports(&listeners, device, &spec)).unwrap();
        Self { name, netns, directory }
    }

    fn path(&self, transport: Transport) -> PathBuf {
        self.directory.path().join("port").with_extension(transport.as_str())
    }

    fn guest(&self, transport: Transport) -> Guest {
        let kind = if transport == Transport::Bess { Type::SEQPACKET } else { Type::STREAM };
        let socket = Socket::new(Domain::UNIX, kind, None).unwrap();
        socket.connect(&SockAddr::unix(self.path(transport)).unwrap()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        Guest { socket, transport }
    }

    /// A socket of the host's that the guest may speak with.
    fn socket(&self) -> UdpSocket {
        let socket = self.netns.run(|| UdpSocket::bind("10.77.1.1:7000").unwrap()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        Netns::delete(&self.name).unwrap();
    }
}

/// A frame as the transport has it.
fn framed(transport: Transport, frame: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    if transport == Transport::Stream {
        bytes.extend(u32::try_from(frame.len()).unwrap().to_be_bytes());
    }
    bytes.extend(frame);
    bytes
}

/// A question for the gateway's Ethernet address.
fn question(transport: Transport) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC.0);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC.0);
    frame.extend(GUEST.iter().chain(&[0; 6]).chain(&HOST));
    framed(transport, &frame)
}

/// A VMM.
struct Guest {
    socket: Socket,
    transport: Transport,
}

impl Guest {
    fn send(&mut self, frame: &[u8]) {
        self.socket.write_all(&framed(self.transport, frame)).unwrap();
    }

    /// The next frame for which `is` holds.
    fn receive(&mut self, is: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let begin = Instant::now();
        while begin.elapsed() < SOON {
            let mut frame = vec![0; 2048];
            if self.transport == Transport::Stream {
                let mut len = [0; 4];
                self.socket.read_exact(&mut len).ok()?;
                frame.truncate(u32::from_be_bytes(len).try_into().unwrap());
                self.socket.read_exact(&mut frame).ok()?;
            } else {
                let len = self.socket.read(&mut frame).ok().filter(|len| *len > 0)?;
                frame.truncate(len);
            }
            if is(&frame) {
                return Some(frame);
            }
        }
        None
    }

    /// Asks for the gateway's Ethernet address; whether the answer comes.
    fn asks_and_is_answered(&mut self) -> bool {
        self.socket.write_all(&question(self.transport)).unwrap();
        self.receive(|frame| frame[..6] == MAC.0 && frame[12..14] == [8, 6] && frame[21] == 2)
            .is_some()
    }

    /// Whether the port has let it go.
    fn is_let_go(&mut self) -> bool {
        let (mut rest, begin) = ([0; 4096], Instant::now());
        while begin.elapsed() < SOON {
            match self.socket.read(&mut rest) {
                Ok(1..) => {}
                Ok(0) => return true,
                Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
        false
    }
}

/// A datagram from `source`, port 9, to the host's socket.
fn datagram(source: [u8; 4], text: &[u8]) -> Vec<u8> {
    let len = u16::try_from(28 + text.len()).unwrap();
    let mut packet = vec![0x45, 0];
    packet.extend(len.to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    packet.extend(source.iter().chain(&HOST));
    let sum = checksum(&packet, 0);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend([0, 9, 0x1b, 0x58]);
    packet.extend((len - 20).to_be_bytes());
    // No checksum.
    packet.extend([0, 0]);
    packet.extend(text);
    [b"\x02conet".as_slice(), &MAC.0, &[8, 0], &packet].concat()
}

#[test]
fn a_guest_by_frames_speaks_and_is_spoken_to() {
    privileged!(Need::Tun);
    let port = Port::new("well");
    let host = port.socket();
    for transport in [BOTH, BOTH].concat() {
        let mut guest = port.guest(transport);
        assert!(guest.asks_and_is_answered(), "{transport:?}");
        guest.send(&datagram(GUEST, b"from the guest"));
        let mut buffer = [0; 64];
        let (len, from) = host.recv_from(&mut buffer).unwrap();
        assert_eq!(
            (&buffer[..len], from.to_string().as_str()),
            (&b"from the guest"[..], "10.77.1.10:9")
        );
        // More than one turn's worth, in order and each whole; checksums are complete.
        for number in 0..200u8 {
            host.send_to(&[number; 1392], "10.77.1.10:9").unwrap();
            let is = |frame: &[u8]| frame.len() > 40 && frame[23] == 17 && frame[36..38] == [0, 9];
            let frame = guest.receive(is).unwrap();
            assert_eq!((frame.len(), &frame[42..]), (14 + 1420, &[number; 1392][..]));
            assert_eq!(checksum(&frame[14..34], 0), 0);
            let pseudo: Vec<u8> = [&frame[26..34], &[0, 17], &frame[38..40]].concat();
            assert_eq!(checksum(&[&pseudo, &frame[34..]].concat(), 0), 0);
        }
    }
}

#[test]
fn lengths_that_no_frame_has_end_the_connection_alone() {
    privileged!(Need::Tun);
    let port = Port::new("lengths");
    for len in [0, u32::try_from(LONGEST).unwrap() + 1, 1 << 24, u32::MAX] {
        let mut guest = port.guest(Transport::Stream);
        assert!(guest.asks_and_is_answered());
        guest.socket.write_all(&len.to_be_bytes()).unwrap();
        assert!(guest.is_let_go(), "{len}");
    }
    // Every length that a frame may have is one, however it comes.
    let mut guest = port.guest(Transport::Stream);
    for len in [1, 13, 14, 33, 2000, LONGEST - 1, LONGEST] {
        guest.send(&vec![0; len]);
    }
    for byte in [&4u32.to_be_bytes()[..], b"drip"].concat() {
        guest.socket.write_all(&[byte]).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
    assert!(guest.asks_and_is_answered());
    let mut guest = {
        drop(guest);
        port.guest(Transport::Bess)
    };
    for len in [1, 13, 14, LONGEST, LONGEST + 1, 140_000] {
        guest.send(&vec![0; len]);
    }
    assert!(guest.asks_and_is_answered());
}

#[test]
fn a_guest_by_frames_uses_its_own_addresses_only() {
    privileged!(Need::Tun);
    let port = Port::new("forged");
    let host = port.socket();
    for transport in BOTH {
        let mut guest = port.guest(transport);
        for source in [[10, 77, 1, 11], HOST, [127, 0, 0, 1], [224, 0, 0, 1], [0, 0, 0, 0]] {
            guest.send(&datagram(source, b"forged"));
        }
        // From a group, and to a station that is not there.
        let mut frame = datagram(GUEST, b"forged");
        frame[6] |= 1;
        guest.send(&frame);
        guest.send(&datagram(GUEST, b"own"));
        let mut buffer = [0; 64];
        let len = host.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"own", "{transport:?}");
    }
}

/// Neither side reads while both are flooded; then the guest does.
#[test]
fn floods_cost_the_flooded_port_alone() {
    privileged!(Need::Tun);
    let port = Port::new("flood");
    let host = port.socket();
    for transport in BOTH {
        let mut guest = port.guest(transport);
        guest.socket.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        let frame = datagram(GUEST, &[1; 1000]);
        let framed = match transport {
            Transport::Stream => {
                [&u32::try_from(frame.len()).unwrap().to_be_bytes()[..], &frame].concat()
            }
            _ => frame,
        };
        for _ in 0..5000 {
            host.send_to(&[2; 1000], "10.77.1.10:9").unwrap();
            // All of it, or it is not a frame that follows.
            if guest.socket.write_all(&framed).is_err() {
                break;
            }
        }
        drop(guest);
        let mut buffer = [0; 2048];
        host.set_nonblocking(true).unwrap();
        while host.recv(&mut buffer).is_ok() {}
        host.set_nonblocking(false).unwrap();
        assert!(port.guest(transport).asks_and_is_answered(), "{transport:?}");
    }
}

/// Processor time of the thread of that name (proc(5), `schedstat`).
fn spent_by(name: &str) -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let mut tasks = tasks.map(|task| task.unwrap().path());
    let is_it = |task: &PathBuf| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name)
    };
    let task = tasks.find(is_it).unwrap();
    let times = std::fs::read_to_string(task.join("schedstat")).unwrap();
    Duration::from_nanos(times.split(' ').next().unwrap().parse().unwrap())
}

#[test]
fn a_vmm_that_asks_and_does_not_read_costs_no_processor() {
    privileged!(Need::Tun);
    const WATCHED: Duration = Duration::from_millis(500);
    let port = Port::new("mute");
    for transport in [Transport::Stream, Transport::Bess] {
        let mut guest = port.guest(transport);
        assert!(guest.asks_and_is_answered());
        // More answers than the way back takes.
        let question = question(transport);
        (0..20_000).for_each(|_| guest.socket.write_all(&question).unwrap());
        // What is under way.
        thread::sleep(WATCHED);
        let before = spent_by("port-mute");
        thread::sleep(WATCHED);
        let spent = spent_by("port-mute") - before;
        assert!(spent < WATCHED / 2, "{transport:?}: {spent:?} of {WATCHED:?}");
        drop(guest);
        assert!(port.guest(transport).asks_and_is_answered(), "{transport:?}: the next one");
    }
}

#[test]
fn bytes_of_anything_leave_the_port_by_frames_alive() {
    privileged!(Need::Tun);
    let port = Port::new("any");
    let mut random = Random::new(seed());
    let seeds = [datagram(GUEST, b"so it was"), vec![0; 1500], 60u32.to_be_bytes().to_vec()];
    for round in 0..150 {
        for transport in BOTH {
            let mut guest = port.guest(transport);
            for _ in 0..random.below(20) {
                let bytes = changed(&mut random, &seeds);
                // It may have been let go already.
                if random.chance(500) && transport == Transport::Stream {
                    let len = u32::try_from(bytes.len()).unwrap().to_be_bytes();
                    guest.socket.write_all(&len).ok();
                }
                guest.socket.write_all(&bytes).ok();
            }
        }
        if round % 50 == 49 {
            assert!(
                BOTH.into_iter().all(|kind| port.guest(kind).asks_and_is_answered()),
                "{round}"
            );
        }
    }
}
