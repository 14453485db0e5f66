//! Tunnels in memory whose datagrams are carried by hand.

#![allow(dead_code, reason = "each test file uses some of it")]
#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use conet_dataplane::MemoryPort;
use conet_testkit::random::Random;
use conet_tunnel::{
    Core, Destination, Engine, MemoryDatagram, MemoryNetwork, Mode, OwnAddresses, PeerConfig,
    PrivateKey, PublicKey,
};
use conet_wire::ip::{Ecn, IPV4_HEADER, OuterV4};

pub(crate) type Node = Engine<MemoryPort, MemoryNetwork>;

/// Randomness of a seed that is printed, so that a failure can be repeated.
pub(crate) fn random() -> Random {
    Random::new(conet_testkit::random::seed())
}

pub(crate) const MODES: [Mode; 3] = [Mode::WireGuard, Mode::IpUdp, Mode::IpIp];

pub(crate) fn below(random: &mut Random, bound: usize) -> usize {
    usize::try_from(random.below(bound as u64)).unwrap()
}

pub(crate) fn key(n: u8) -> PrivateKey {
    PrivateKey::from_bytes([n; 32])
}

pub(crate) fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 51820))
}

pub(crate) fn node(n: u8) -> Node {
    let own =
        OwnAddresses { inner: vec![IpAddr::from([10, 77, n, 1])], outer: vec![address(n).ip()] };
    let core = Core::new(key(n), own, Instant::now(), Duration::from_secs(1 << 30));
    Engine::new(core, MemoryPort::default(), MemoryNetwork::default())
}

pub(crate) fn peer(n: u8, mode: Mode) -> PeerConfig {
    let allowed =
        vec![format!("10.77.{n}.0/24").parse().unwrap(), format!("fd00:{n}::/32").parse().unwrap()];
    PeerConfig { mode, ..PeerConfig::new(key(n).public(), Some(address(n)), allowed) }
}

pub(crate) fn pair(mode: Mode) -> [Node; 2] {
    let (mut a, mut b) = (node(1), node(2));
    a.core.add_peer(&peer(2, mode)).unwrap();
    b.core.add_peer(&peer(1, mode)).unwrap();
    [a, b]
}

pub(crate) fn packet_from(
    source: [u8; 4],
    destination: [u8; 4],
    ecn: Ecn,
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes = vec![0; IPV4_HEADER + payload.len()];
    let header = OuterV4 {
        source: source.into(),
        destination: destination.into(),
        protocol: 17,
        ttl: 63,
        ecn,
        dont_fragment: true,
        total_len: u16::try_from(bytes.len()).unwrap(),
    };
    header.emit(bytes.first_chunk_mut().unwrap());
    bytes[IPV4_HEADER..].copy_from_slice(payload);
    bytes
}

pub(crate) fn packet(from: u8, to: u8, payload: &[u8]) -> Vec<u8> {
    packet_from([10, 77, from, 2], [10, 77, to, 2], Ecn::NotEct, payload)
}

/// Takes what node `from` has sent, as its receivers would see it.
pub(crate) fn sent(node: &mut Node, from: u8) -> Vec<(u8, MemoryDatagram)> {
    let outgoing = node.network.outgoing.drain(..);
    outgoing
        .map(|(to, mut datagram)| match to {
            Destination::Udp(to) => {
                datagram.from = Some(address(from));
                let IpAddr::V4(to) = to.ip() else { panic!("no IPv6 here") };
                (to.octets()[3], datagram)
            }
            Destination::Ip(to) => {
                // What the kernel does to a raw packet: its source.
                datagram.bytes[12..16].copy_from_slice(&[192, 0, 2, from]);
                (to.octets()[3], datagram)
            }
        })
        .collect()
}

/// Carries everything to and fro until nothing moves.
pub(crate) fn settle(nodes: &mut [Node]) {
    for _ in 0..20 {
        let mut moved = false;
        for i in 0..nodes.len() {
            nodes[i].step_device().unwrap();
            nodes[i].step_network().unwrap();
            for (to, datagram) in sent(&mut nodes[i], u8::try_from(i + 1).unwrap()) {
                moved = true;
                nodes[usize::from(to) - 1].network.incoming.push_back(datagram);
            }
        }
        if !moved {
            return;
        }
    }
    panic!("the nodes never fall silent");
}

pub(crate) fn give(node: &mut Node, packet: Vec<u8>) {
    node.device.incoming.push_back(packet);
}

pub(crate) fn taken(node: &mut Node) -> Vec<Vec<u8>> {
    node.device.outgoing.drain(..).collect()
}

pub(crate) fn drops_of(node: &Node, peer: u8) -> conet_dataplane::DropCounts {
    let key: PublicKey = key(peer).public();
    node.core.peers().iter().find(|p| p.public_key == key).unwrap().drops
}
