//! Entry for the fuzz target `tunnel_packet`; its seeds come from `tests/corpus.rs`.
//!
//! The first byte of an input says how the rest reaches a core that has one
//! WireGuard peer with a live session, one IP-in-IP and one IP-in-UDP peer:
//!
//! | byte mod 8 | the rest is |
//! |---|---|
//! | 0 | a UDP datagram, as is |
//! | 1 | a UDP data message whose session number is made valid |
//! | 2 | an inner packet, encrypted by the real peer |
//! | 3 | an IPv4 packet from the raw socket, as is |
//! | 4 | an inner packet, wrapped by the real IP-in-IP peer |
//! | 5 | a packet from the device |
//! | 6 | a frame from the device, with its virtio header |
//! | 7 | a datagram from the IP-in-UDP peer |
//!
//! What must hold: no panic; nothing reaches the device unless it is one whole
//! IP packet with a source that its peer may use.

mod ways;

use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use conet_wire::ip::{Ecn, IPV4_HEADER, IpView, OuterV4, PROTO_IPV4, PROTO_IPV6};

use crate::noise::{DATA_HEADER, INITIATION, Identity, TAG, Tunn};
pub use ways::tunnel_errors;

use crate::{
    Core, Destination, Mode, Outbox, Outgoing, OwnAddresses, PeerConfig, PrivateKey, PublicKey,
    Replies,
};

const WG_ADDRESS: [u8; 4] = [192, 0, 2, 2];
const IPIP_ADDRESS: [u8; 4] = [192, 0, 2, 3];
const IP_UDP_ADDRESS: [u8; 4] = [192, 0, 2, 4];
/// Longest input that is looked at: no datagram is longer.
const INPUT_MAX: usize = 65_000;

struct Target {
    core: Core,
    them: Identity,
    peer: Tunn,
    now: Instant,
    out: Outbox,
    replies: Replies,
    /// Session number by which the peer addresses the core.
    index: [u8; 4],
}

thread_local! {
    static TARGET: RefCell<Option<Target>> = const { RefCell::new(None) };
}

/// Gives one input to a tunnel; see the module. Says how many packets reached
/// the device.
///
/// # Panics
/// When the tunnel does something that it must not: that is the finding.
pub fn tunnel_packet(input: &[u8]) -> usize {
    let Some((&how, rest)) = input.split_first() else { return 0 };
    let rest = &rest[..rest.len().min(INPUT_MAX)];
    TARGET.with_borrow_mut(|slot| {
        let target = slot.get_or_insert_with(Target::new);
        target.run(how, rest)
    })
}

impl Target {
    fn new() -> Self {
        let ours = PrivateKey::from_bytes([1; 32]);
        let theirs = PrivateKey::from_bytes([2; 32]);
        let third = PrivateKey::from_bytes([3; 32]);
        let own = OwnAddresses {
            inner: vec![IpAddr::from([10, 77, 1, 1])],
            outer: vec![IpAddr::from([192, 0, 2, 1])],
        };
        let now = Instant::now();
        let mut core = Core::new(ours.clone(), own, now, Duration::from_secs(1 << 30));
        let prefixes = |texts: [&str; 2]| texts.iter().filter_map(|t| t.parse().ok()).collect();
        let at = |address: [u8; 4], port| Some(SocketAddr::from((address, port)));
        let wireguard = PeerConfig::new(
            theirs.public(),
            at(WG_ADDRESS, 51820),
            prefixes(["10.77.2.0/24", "fd00:2::/32"]),
        );
        let ipip = PeerConfig {
            mode: Mode::IpIp,
            ..PeerConfig::new(
                third.public(),
                at(IPIP_ADDRESS, 0),
                prefixes(["10.77.3.0/24", "fd00:3::/32"]),
            )
        };
        let ip_udp = PeerConfig {
            mode: Mode::IpUdp,
            ..PeerConfig::new(
                PublicKey([4; 32]),
                at(IP_UDP_ADDRESS, 51820),
                prefixes(["10.77.4.0/24", "fd00:4::/32"]),
            )
        };
        for peer in [&wireguard, &ipip, &ip_udp] {
            assert_eq!(core.add_peer(peer), Ok(()));
        }
        let them = Identity::new(theirs.0);
        let peer = Tunn::new(&them, ours.public().0, None, None, 7, now);
        let (out, replies) = (Outbox::new(), Replies::default());
        let mut target = Self { core, them, peer, now, out, replies, index: [0; 4] };
        target.handshake();
        target
    }

    /// Initiation from the peer, response from the core, first data back.
    fn handshake(&mut self) {
        self.peer.enqueue(self.now, b"x");
        self.speak();
        let response: Vec<u8> = self.out.transmits().flat_map(|t| t.contents().to_vec()).collect();
        self.out.clear();
        // The receiver's number in a data message is the core's.
        if let Ok(response) = response.as_slice().try_into()
            && self.peer.finish(&self.them, self.now, response).is_ok()
        {
            self.index.copy_from_slice(&response[4..8]);
        }
        // A keepalive confirms the session, so that the core may use it.
        if let Some(keepalive) = self.sealed(&[]) {
            self.udp(&keepalive);
        }
        self.out.clear();
    }

    fn speak(&mut self) {
        let mut message = [0; INITIATION];
        let unix = Duration::from_secs(1 << 30);
        while self.peer.has_message() {
            if let Some(len) = self.peer.poll_message(&self.them, self.now, unix, &mut message) {
                self.udp(&message[..len]);
            }
        }
    }

    fn udp(&mut self, datagram: &[u8]) -> Vec<Vec<u8>> {
        self.udp_from(WG_ADDRESS, datagram)
    }

    fn udp_from(&mut self, from: [u8; 4], datagram: &[u8]) -> Vec<Vec<u8>> {
        let from = SocketAddr::from((from, 51820));
        let mut bytes = datagram.to_vec();
        let inner = self.core.handle_udp(from, Ecn::NotEct, &mut bytes, &mut self.out);
        inner.map(|inner| bytes[inner.at].to_vec()).into_iter().collect()
    }

    fn ip(&mut self, datagram: &[u8]) -> Vec<Vec<u8>> {
        let mut bytes = datagram.to_vec();
        let inner = self.core.handle_ip(&mut bytes, &mut self.replies);
        inner.map(|inner| bytes[inner.at].to_vec()).into_iter().collect()
    }

    fn device(&mut self, outgoing: Option<Outgoing<'_>>) -> Vec<Vec<u8>> {
        if let Some(outgoing) = outgoing {
            self.core.handle_device(&outgoing, &mut self.out, &mut self.replies);
        }
        Vec::new()
    }

    fn sealed(&mut self, inner: &[u8]) -> Option<Vec<u8>> {
        let mut space = vec![0; DATA_HEADER + inner.len() + TAG];
        space[DATA_HEADER..DATA_HEADER + inner.len()].copy_from_slice(inner);
        self.peer.seal(self.now, &mut space, inner.len()).ok().map(|_| space)
    }

    fn run(&mut self, how: u8, rest: &[u8]) -> usize {
        let mut packets = match how % 8 {
            0 => self.udp(rest),
            1 => {
                let mut datagram = rest.to_vec();
                if let Some(number) = datagram.get_mut(4..8) {
                    number.copy_from_slice(&self.index);
                }
                self.udp(&datagram)
            }
            2 => match self.sealed(rest) {
                Some(datagram) => self.udp(&datagram),
                None => Vec::new(),
            },
            3 => self.ip(rest),
            4 => self.wrapped(rest),
            5 => self.device(Outgoing::whole(rest).ok()),
            6 => self.device(Outgoing::gso(rest).ok()),
            _ => self.udp_from(IP_UDP_ADDRESS, rest),
        };
        self.out.clear();
        let buffer = self.replies.buffer();
        packets.extend(self.replies.packets().iter().map(|p| buffer[p.at.clone()].to_vec()));
        self.replies.clear();
        for packet in &packets {
            self.check(how % 8, packet);
        }
        packets.len()
    }

    fn wrapped(&mut self, inner: &[u8]) -> Vec<Vec<u8>> {
        let Ok(total_len) = u16::try_from(IPV4_HEADER + inner.len()) else { return Vec::new() };
        let v6 = inner.first().is_some_and(|b| b >> 4 == 6);
        let header = OuterV4 {
            source: IPIP_ADDRESS.into(),
            destination: Ipv4Addr::new(192, 0, 2, 1),
            protocol: if v6 { PROTO_IPV6 } else { PROTO_IPV4 },
            ttl: 64,
            ecn: Ecn::NotEct,
            dont_fragment: false,
            total_len,
        };
        let mut outer = [0; IPV4_HEADER];
        header.emit(&mut outer);
        let mut datagram = outer.to_vec();
        datagram.extend_from_slice(inner);
        self.ip(&datagram)
    }

    /// What may reach the device.
    fn check(&self, how: u8, packet: &[u8]) {
        let view = IpView::new(packet);
        assert!(view.is_ok(), "no whole packet reached the device");
        let Ok(view) = view else { return };
        let source = view.source();
        let third_octets = match (how, source) {
            // ICMP errors, from the device or from where the packet was going.
            (5 | 6, _) => return,
            (0..=2, IpAddr::V4(a)) => a.octets()[..3] == [10, 77, 2],
            (0..=2, IpAddr::V6(a)) => a.segments()[..2] == [0xfd00, 2],
            (7, IpAddr::V4(a)) => a.octets()[..3] == [10, 77, 4],
            (7, IpAddr::V6(a)) => a.segments()[..2] == [0xfd00, 4],
            (_, IpAddr::V4(a)) => a.octets()[..3] == [10, 77, 3],
            (_, IpAddr::V6(a)) => a.segments()[..2] == [0xfd00, 3],
        };
        assert!(third_octets, "{source} is not the peer's to use");
    }
}
