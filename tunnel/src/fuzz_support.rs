//! Entry for the fuzz target `tunnel_packet`; its seeds come from `tests/corpus.rs`.
//!
//! The first byte of an input says how the rest reaches a core that has one
//! WireGuard peer with a live session and one IP-in-IP peer:
//!
//! | byte mod 6 | the rest is |
//! |---|---|
//! | 0 | a UDP datagram, as is |
//! | 1 | a UDP data message whose session number is made valid |
//! | 2 | an inner packet, encrypted by the real peer |
//! | 3 | an IPv4 packet from the raw socket, as is |
//! | 4 | an inner packet, wrapped by the real IP-in-IP peer |
//! | 5 | a packet from the device |
//!
//! What must hold: no panic; nothing reaches the device unless it is one whole
//! IP packet with a source that its peer may use.

use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Instant;

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use conet_wire::ip::{Ecn, IPV4_HEADER, IpView, OuterV4, PROTO_IPV4, PROTO_IPV6};

use crate::{Core, Inbox, Mode, Outbox, OwnAddresses, PeerConfig, PrivateKey};

const WG_ADDRESS: [u8; 4] = [192, 0, 2, 2];
const IPIP_ADDRESS: [u8; 4] = [192, 0, 2, 3];
/// Longest input that is looked at: no datagram is longer.
const INPUT_MAX: usize = 65_000;

struct Target {
    core: Core,
    peer: Tunn,
    out: Outbox,
    inbox: Inbox,
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
        let forwarded = target.run(how, rest);
        // A live session ages: renew it well before it would expire.
        if target.is_stale() {
            *slot = None;
        }
        forwarded
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
        let mut core = Core::new(ours.clone(), own, Instant::now());
        let prefixes = |texts: [&str; 2]| texts.iter().filter_map(|t| t.parse().ok()).collect();
        let wireguard = PeerConfig::new(
            theirs.public(),
            Some(SocketAddr::from((WG_ADDRESS, 51820))),
            prefixes(["10.77.2.0/24", "fd00:2::/32"]),
        );
        let ipip = PeerConfig {
            mode: Mode::IpIp,
            ..PeerConfig::new(
                third.public(),
                Some(SocketAddr::from((IPIP_ADDRESS, 0))),
                prefixes(["10.77.3.0/24", "fd00:3::/32"]),
            )
        };
        for peer in [&wireguard, &ipip] {
            assert_eq!(core.add_peer(peer), Ok(()));
        }
        let public = x25519::PublicKey::from(ours.public().0);
        let peer = Tunn::new(theirs.0, public, None, None, 7, None);
        let inbox = Inbox::new(INPUT_MAX + 64, 16);
        let mut target = Self { core, peer, out: Outbox::new(), inbox, index: [0; 4] };
        target.handshake();
        target
    }

    /// Initiation from the peer, response from the core, first data back.
    fn handshake(&mut self) {
        let mut buffer = [0; 2048];
        let TunnResult::WriteToNetwork(init) =
            self.peer.format_handshake_initiation(&mut buffer, true)
        else {
            return;
        };
        let init = init.to_vec();
        self.udp(&init);
        let response: Vec<u8> = self.out.transmits().flat_map(|t| t.contents().to_vec()).collect();
        self.out.clear();
        let mut buffer = [0; 2048];
        if let TunnResult::WriteToNetwork(keepalive) =
            self.peer.decapsulate(None, &response, &mut buffer)
        {
            // The receiver's number in a data message is the core's.
            self.index.copy_from_slice(&keepalive[4..8]);
            let keepalive = keepalive.to_vec();
            self.udp(&keepalive);
        }
    }

    fn is_stale(&self) -> bool {
        self.peer.time_since_last_handshake().is_none_or(|age| age.as_secs() > 60)
    }

    fn udp(&mut self, datagram: &[u8]) {
        let from = SocketAddr::from((WG_ADDRESS, 51820));
        self.core.handle_udp(from, Ecn::NotEct, datagram, &mut self.out, &mut self.inbox);
    }

    fn run(&mut self, how: u8, rest: &[u8]) -> usize {
        match how % 6 {
            0 => self.udp(rest),
            1 => {
                let mut datagram = rest.to_vec();
                if let Some(number) = datagram.get_mut(4..8) {
                    number.copy_from_slice(&self.index);
                }
                self.udp(&datagram);
            }
            2 => {
                let mut buffer = vec![0; rest.len() + 256];
                if let TunnResult::WriteToNetwork(datagram) =
                    self.peer.encapsulate(rest, &mut buffer)
                {
                    let datagram = datagram.to_vec();
                    self.udp(&datagram);
                }
            }
            3 => self.core.handle_ip(rest, &mut self.inbox),
            4 => self.wrapped(rest),
            _ => self.core.handle_device(rest, &mut self.out, &mut self.inbox),
        }
        self.out.clear();
        let packets = std::mem::take(&mut self.inbox.packets);
        let forwarded = packets.len();
        for packet in packets {
            self.check(how, packet.data());
            self.inbox.pool.give(packet);
        }
        forwarded
    }

    fn wrapped(&mut self, inner: &[u8]) {
        let Ok(total_len) = u16::try_from(IPV4_HEADER + inner.len()) else { return };
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
        self.core.handle_ip(&datagram, &mut self.inbox);
    }

    /// What may reach the device.
    fn check(&self, how: u8, packet: &[u8]) {
        let view = IpView::new(packet);
        assert!(view.is_ok(), "no whole packet reached the device");
        let Ok(view) = view else { return };
        let source = view.source();
        let third_octets = match (how % 6, source) {
            // ICMP errors of our own.
            (5, IpAddr::V4(a)) => return assert_eq!(a, Ipv4Addr::new(10, 77, 1, 1)),
            (0..=2, IpAddr::V4(a)) => a.octets()[..3] == [10, 77, 2],
            (0..=2, IpAddr::V6(a)) => a.segments()[..2] == [0xfd00, 2],
            (_, IpAddr::V4(a)) => a.octets()[..3] == [10, 77, 3],
            (_, IpAddr::V6(a)) => a.segments()[..2] == [0xfd00, 3],
        };
        assert!(third_octets, "{source} is not the peer's to use");
    }
}
