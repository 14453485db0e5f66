//! The adapter's rings against a library that stands in for wintun's, whose driver no test
//! machine has; sockets, events and calls as they are. `cargo xtask windows` runs them.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use conet_dataplane::{MemoryPort, PortError};

use super::adapter::{Adapter, AdapterName};
use super::driver::Sockets;
use super::netsh;
use super::socket::{set_dont_fragment, wait_writable};
use super::sys::{self, Event};
use crate::udp::Udp;
use crate::{Core, Device, Engine, Inner, Mode, Offloads, OwnAddresses, PeerConfig, PrivateKey};

/// The stand-in gives back what was sent; its ring takes so many packets (`wintun.c`).
const RING: usize = 64;

fn adapter() -> Adapter {
    let library = std::env::var_os("CONET_FAKE_WINTUN").expect("set by cargo xtask windows");
    // An alias that the system knows, since the adapter itself is none.
    let name = std::env::var("CONET_FAKE_ADAPTER").expect("set by cargo xtask windows");
    Adapter::create(&PathBuf::from(library), &AdapterName::new(&name).unwrap()).unwrap()
}

fn send(adapter: &mut Adapter, packets: &[&[u8]]) -> Result<(usize, usize), PortError> {
    let buffer = packets.concat();
    let mut at = 0;
    let inner = packets.iter().map(|packet| {
        at += packet.len();
        Inner { at: at - packet.len()..at, trusted: true, segment: 0 }
    });
    let progress = adapter.send(&buffer, &inner.collect::<Vec<_>>())?;
    Ok((progress.packets, progress.refused))
}

fn received(adapter: &mut Adapter) -> Result<Vec<Vec<u8>>, PortError> {
    let mut packets = Vec::new();
    adapter.receive(&mut |packet| packets.push(packet.unwrap().view().bytes().to_vec()))?;
    Ok(packets)
}

#[test]
fn packets_pass_the_rings_in_order_and_a_full_one_refuses() {
    let mut adapter = adapter();
    assert!(received(&mut adapter).unwrap().is_empty());
    for round in 0..3u8 {
        let packets = [packet(round, 2, 1400), packet(2, round, 0), packet(1, round, 65_515)];
        let [first, least, longest] = &packets;
        assert_eq!(send(&mut adapter, &[first, least, longest]).unwrap(), (3, 0));
        sys::wait(&[adapter.ready().unwrap(); 3], Duration::from_secs(10)).unwrap();
        assert_eq!(received(&mut adapter).unwrap(), packets);
    }
    let one = packet(1, 2, 10);
    let many = vec![&one[..]; RING + 5];
    assert_eq!(send(&mut adapter, &many).unwrap(), (RING, 5));
    assert_eq!(received(&mut adapter).unwrap().len(), RING);
    assert_eq!(send(&mut adapter, &[&one]).unwrap(), (1, 0));
    assert_eq!(received(&mut adapter).unwrap(), [one]);
    // A packet of this length says to the stand-in: be removed.
    assert_eq!(send(&mut adapter, &[&[0; 13]]).unwrap(), (1, 0));
    assert!(matches!(received(&mut adapter), Err(PortError::Gone)));
    assert!(matches!(send(&mut adapter, &[b"late"]), Err(PortError::Gone)));
}

#[test]
fn a_library_that_is_not_there_is_named_with_the_remedy() {
    let nowhere = PathBuf::from("C:\\nowhere\\wintun.dll");
    let error = Adapter::create(&nowhere, &AdapterName::new("x").unwrap()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("nowhere") && text.contains("wintun.net"), "{text}");
}

#[test]
fn names_that_windows_would_misread_are_refused() {
    for good in ["conet0", "my tunnel", "tünnel", &"x".repeat(127)] {
        assert!(AdapterName::new(good).is_ok(), "{good}");
    }
    for bad in ["", "a\"b", "a\nb", &"x".repeat(128)] {
        assert!(AdapterName::new(bad).is_err(), "{bad}");
    }
}

#[test]
fn netsh_is_asked_for_addresses_mtu_and_routes() {
    let addresses = ["10.77.0.1/24".parse().unwrap(), "fd00::1/64".parse().unwrap()];
    let calls: Vec<_> =
        netsh::set_up(12, 1420, &addresses).iter().map(|call| call.join(" ")).collect();
    assert_eq!(
        calls,
        [
            "interface ipv4 set subinterface 12 mtu=1420 store=active",
            "interface ipv6 set subinterface 12 mtu=1420 store=active",
            "interface ipv4 add address name=12 address=10.77.0.1 mask=255.255.255.0 store=active",
            "interface ipv6 add address interface=12 address=fd00::1/64 store=active",
        ]
    );
    let route = netsh::route("add", 12, "10.78.3.9/16".parse().unwrap()).join(" ");
    assert_eq!(route, "interface ipv4 add route prefix=10.78.0.0/16 interface=12 store=active");
    let gone = netsh::route("delete", 12, "fd01::/48".parse().unwrap()).join(" ");
    assert_eq!(gone, "interface ipv6 delete route prefix=fd01::/48 interface=12 store=active");
}

#[test]
fn a_wait_ends_by_an_event_of_another_thread_and_by_time() {
    let event = Arc::new(Event::new(false).unwrap());
    let began = Instant::now();
    sys::wait(&[event.signal(); 3], Duration::from_millis(30)).unwrap();
    assert!(began.elapsed() >= Duration::from_millis(20));
    let waker = Arc::clone(&event);
    let thread = std::thread::spawn(move || waker.wake().unwrap());
    sys::wait(&[event.signal(); 3], Duration::from_secs(60)).unwrap();
    assert!(began.elapsed() < Duration::from_secs(50));
    thread.join().unwrap();
}

type Node = Engine<MemoryPort, Sockets>;

/// One that speaks IPv4 by mapped addresses: wine's IPv4 sockets lack what quinn-udp asks.
fn socket(offloads: Offloads) -> Udp {
    Udp::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)), offloads).unwrap()
}

fn node(n: u8) -> Node {
    let udp = socket(Offloads::ALL);
    let own = OwnAddresses { inner: vec![[10, 77, n, 1].into()], outer: vec![] };
    let unix = Duration::from_secs(1 << 30);
    let core = Core::new(PrivateKey::from_bytes([n; 32]), own, Instant::now(), unix);
    Engine::new(core, MemoryPort::default(), Sockets { udp })
}

fn packet(from: u8, to: u8, fill: usize) -> Vec<u8> {
    let mut bytes = vec![0; 20];
    let length = u16::try_from(20 + fill).unwrap().to_be_bytes();
    bytes[..10].copy_from_slice(&[0x45, 0, length[0], length[1], 0, 0, 0x40, 0, 63, 17]);
    bytes[12..20].copy_from_slice(&[10, 77, from, 2, 10, 77, to, 2]);
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes.resize(20 + fill, from);
    bytes
}

#[test]
fn two_tunnels_speak_over_sockets_of_windows() {
    for mode in [Mode::WireGuard, Mode::IpUdp] {
        let mut nodes = [node(1), node(2)];
        let port = |node: &Node| node.network.udp.local_addr().unwrap().port();
        let at = nodes.each_ref().map(|n| SocketAddr::from((Ipv4Addr::LOCALHOST, port(n))));
        for (i, n) in [(0, 2u8), (1, 1)] {
            let allowed = vec![format!("10.77.{n}.0/24").parse().unwrap()];
            let key = PrivateKey::from_bytes([n; 32]).public();
            let peer = PeerConfig::new(key, Some(at[usize::from(n) - 1]), allowed);
            nodes[i].core.add_peer(&PeerConfig { mode, ..peer }).unwrap();
        }
        let arrived = Event::new(true).unwrap();
        for node in &nodes {
            sys::announce(&node.network.udp.socket, &arrived).unwrap();
        }
        let sent: Vec<_> = (0..40).map(|i| packet(1, 2, 1300 - i)).collect();
        for packet in &sent {
            nodes[0].device.incoming.push_back(packet.clone());
        }
        let began = Instant::now();
        while nodes[1].device.outgoing.len() < sent.len() {
            assert!(began.elapsed() < Duration::from_secs(30), "{mode}: nothing comes");
            for node in &mut nodes {
                node.step_device().unwrap();
                while node.step_network().unwrap() {}
                node.step_time(Instant::now()).unwrap();
            }
            sys::wait(&[arrived.signal(); 3], Duration::from_millis(10)).unwrap();
            arrived.reset().unwrap();
        }
        assert_eq!(Vec::from(nodes[1].device.outgoing.clone()), sent, "{mode}");
    }
}

#[test]
fn a_socket_waits_for_room_and_fragments_when_it_must() {
    let udp = socket(Offloads::NONE).socket;
    wait_writable(&udp).unwrap();
    for (is_v6, on) in [(false, false), (false, true), (true, false), (true, true)] {
        set_dont_fragment(&udp, is_v6, on).unwrap();
    }
}
