//! One peer: who, where, how, and what went to and from it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use conet_dataplane::{DropCounts, DropReason};
use ipnet::IpNet;

use super::Destination;
use super::routes::Slot;
use crate::noise::{Identity, Tunn};
use crate::{Mode, PeerConfig, PublicKey};

/// What one batch of the outbox holds, in bytes; no link carries more.
const MAX_PATH_MTU: u16 = 65_000;

/// Least path MTU that is believed (Linux `net.ipv4.route.min_pmtu`).
pub(crate) const LEAST_PATH_MTU: u16 = 552;
/// Least MTU of IPv6 (RFC 8200 §5).
pub(crate) const LEAST_V6_MTU: u16 = 1280;

pub(crate) struct Peer {
    pub(crate) key: PublicKey,
    pub(crate) mode: Mode,
    /// Where the configuration says it is; the only place in ipip mode.
    pub(crate) configured: Option<SocketAddr>,
    /// Where it is: configured, or learned from its last authentic datagram.
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) allowed: Vec<IpNet>,
    /// What the configuration says that the way takes, and what is known to be less.
    configured_mtu: u16,
    learned_mtu: Option<u16>,
    /// Packets sent when the way was last asked about.
    asked_at: u64,
    /// The WireGuard session, kept in the other modes too so that a change back costs
    /// nothing. In ip-udp mode it tells where the peer is.
    pub(crate) tunn: Tunn,
    pub(crate) keepalive: Option<u16>,
    pub(crate) rx: Traffic,
    pub(crate) tx: Traffic,
    pub(crate) drops: DropCounts,
}

/// Packets and their inner bytes in one direction.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Traffic {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

impl Traffic {
    pub(crate) fn count(&mut self, packets: usize, bytes: usize) {
        self.packets += packets as u64;
        self.bytes += bytes as u64;
    }
}

impl Peer {
    pub(crate) fn new(config: &PeerConfig, us: &Identity, slot: Slot, now: Instant) -> Self {
        let key = config.public_key.0;
        Self {
            key: config.public_key,
            mode: config.mode,
            configured: config.endpoint,
            endpoint: config.endpoint.map(canonical),
            allowed: config.allowed.iter().map(IpNet::trunc).collect(),
            configured_mtu: config.path_mtu.clamp(LEAST_PATH_MTU, MAX_PATH_MTU),
            learned_mtu: None,
            asked_at: 0,
            tunn: Tunn::new(
                us,
                key,
                config.preshared_key.map(|k| k.0),
                config.keepalive,
                slot,
                now,
            ),
            keepalive: config.keepalive,
            rx: Traffic::default(),
            tx: Traffic::default(),
            drops: DropCounts::default(),
        }
    }

    /// Whether its handshakes and keepalives are heard.
    pub(crate) fn hears(&self) -> bool {
        self.mode != Mode::IpIp
    }

    /// Whether handshakes are begun, and keepalives sent, to it.
    pub(crate) fn speaks(&self) -> bool {
        match self.mode {
            Mode::WireGuard => true,
            Mode::IpUdp => self.keepalive.is_some(),
            Mode::IpIp => false,
        }
    }

    /// The address that stands for this peer in ipip mode.
    pub(crate) fn ipip_endpoint(&self) -> Option<Ipv4Addr> {
        match self.configured?.ip().to_canonical() {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        }
    }

    /// Largest inner packet that fits the path, in bytes.
    pub(crate) fn inner_mtu(&self) -> u16 {
        let outer_v6 = self.mode != Mode::IpIp
            && self.endpoint.is_some_and(|e| e.ip().to_canonical().is_ipv6());
        self.path_mtu().saturating_sub(self.mode.overhead(outer_v6))
    }

    /// Largest outer packet on the way, in bytes.
    pub(crate) fn path_mtu(&self) -> u16 {
        self.learned_mtu.unwrap_or(u16::MAX).min(self.configured_mtu)
    }

    /// What is now known of the way; `None` is nothing.
    pub(crate) fn set_path_mtu(&mut self, mtu: Option<u16>) {
        self.learned_mtu = mtu.map(|mtu| mtu.max(LEAST_PATH_MTU));
    }

    /// Where it is sent to, if something was since this was last asked.
    pub(crate) fn take_way(&mut self) -> Option<Destination> {
        if std::mem::replace(&mut self.asked_at, self.tx.packets) == self.tx.packets {
            return None;
        }
        match self.mode {
            Mode::IpIp => self.ipip_endpoint().map(Destination::Ip),
            Mode::WireGuard | Mode::IpUdp => self.endpoint.map(Destination::Udp),
        }
    }

    pub(crate) fn snapshot(&self, now: Instant) -> PeerSnapshot {
        PeerSnapshot {
            public_key: self.key,
            mode: self.mode,
            endpoint: match self.mode {
                Mode::WireGuard | Mode::IpUdp => self.endpoint,
                Mode::IpIp => self.configured,
            },
            allowed: self.allowed.clone(),
            path_mtu: self.path_mtu(),
            keepalive: self.keepalive,
            last_handshake: self.tunn.handshake_age(now),
            rx_packets: self.rx.packets,
            rx_bytes: self.rx.bytes,
            tx_packets: self.tx.packets,
            tx_bytes: self.tx.bytes,
            drops: self.drops,
            in_kernel: false,
        }
    }
}

/// An address as arrivals have it: IPv4 never mapped into IPv6.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// What is known about a peer at one moment.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PeerSnapshot {
    /// Who it is.
    pub public_key: PublicKey,
    /// How packets travel to it.
    pub mode: Mode,
    /// Where it is.
    pub endpoint: Option<SocketAddr>,
    /// Largest outer packet on the way to it, in bytes, as far as is known.
    pub path_mtu: u16,
    /// Seconds between keepalives to it.
    pub keepalive: Option<u16>,
    /// Its inner prefixes.
    pub allowed: Vec<IpNet>,
    /// Time since the last WireGuard handshake; `None` without a session.
    pub last_handshake: Option<Duration>,
    /// Inner packets received from it and forwarded.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Inner packets sent to it, or queued until the handshake is done.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Packets from or to it that were dropped.
    pub drops: DropCounts,
    /// Whether its packets pass by no process at this moment (mode `ipip`).
    pub in_kernel: bool,
}

impl PeerSnapshot {
    /// How often `reason` made a packet of this peer be dropped.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason]
    }
}
