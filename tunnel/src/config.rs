//! What a tunnel is told: its keys, its device, its peers.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use ipnet::IpNet;
use x25519_dalek as x25519;

use crate::DeviceName;

/// MTU of the device unless told otherwise: 1500 less the 80 bytes of WireGuard
/// over IPv6, as `wg-quick(8)` chooses; it also suits IP-in-IP, so a peer's mode
/// can change at run time.
pub const DEFAULT_MTU: u16 = 1420;
/// MTU of the path to a peer unless told otherwise: Ethernet's.
pub const DEFAULT_PATH_MTU: u16 = 1500;
/// UDP port for WireGuard unless told otherwise: the one in its documentation.
pub const DEFAULT_PORT: u16 = 51820;

/// How packets travel to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Encrypted, over UDP.
    #[default]
    WireGuard,
    /// Bare, over UDP.
    IpUdp,
    /// Bare, as protocol 4 (RFC 2003) or 41 (RFC 4213).
    IpIp,
}

impl Mode {
    /// The name in configuration and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::WireGuard => "wireguard",
            Mode::IpUdp => "ip-udp",
            Mode::IpIp => "ipip",
        }
    }

    /// Bytes that the mode adds to a packet, over an outer IPv6 or IPv4 header.
    pub fn overhead(self, outer_v6: bool) -> u16 {
        let outer = if outer_v6 { 40 } else { 20 };
        match self {
            // UDP 8; WireGuard's header 16 and tag 16.
            Mode::WireGuard => outer + 8 + 32,
            Mode::IpUdp => outer + 8,
            Mode::IpIp => outer,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// An X25519 public key: who a peer is. Shown as base64, as `wg` does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey(pub [u8; 32]);

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&BASE64_STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An X25519 private key; wiped from memory when dropped, never shown.
#[derive(Clone)]
pub struct PrivateKey(pub(crate) x25519::StaticSecret);

impl PrivateKey {
    /// A key from its 32 bytes; clamping happens when it is used (RFC 7748 §5).
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(x25519::StaticSecret::from(bytes))
    }

    /// The public key that belongs to it.
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519::PublicKey::from(&self.0).to_bytes())
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

/// A secret that two peers share beforehand, mixed into each handshake; never shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PresharedKey(pub [u8; 32]);

/// A text that is no key of 32 bytes in base64, as `wg genpsk` prints it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not 32 bytes in base64")]
pub struct NoKey;

impl FromStr for PresharedKey {
    type Err = NoKey;

    fn from_str(text: &str) -> Result<Self, NoKey> {
        key_of(text).map(Self)
    }
}

impl FromStr for PublicKey {
    type Err = NoKey;

    fn from_str(text: &str) -> Result<Self, NoKey> {
        key_of(text).map(Self)
    }
}

impl FromStr for PrivateKey {
    type Err = NoKey;

    fn from_str(text: &str) -> Result<Self, NoKey> {
        key_of(text).map(Self::from_bytes)
    }
}

/// Keys are 32 bytes in base64, as `wg(8)` has them.
fn key_of(text: &str) -> Result<[u8; 32], NoKey> {
    BASE64_STANDARD.decode(text.trim()).map_err(|_| NoKey)?.try_into().map_err(|_| NoKey)
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(..)")
    }
}

/// A peer.
#[derive(Debug, Clone)]
pub struct PeerConfig {
    /// Who it is.
    pub public_key: PublicKey,
    /// Secret shared with it beforehand, mixed into each handshake.
    pub preshared_key: Option<PresharedKey>,
    /// How packets travel to it.
    pub mode: Mode,
    /// Where it is. WireGuard learns it from the peer when absent, and follows
    /// the peer when it moves, as does IP-in-UDP by the handshakes and keepalives of
    /// a peer with `keepalive`; IP-in-IP needs it, uses its address and ignores its
    /// port.
    pub endpoint: Option<SocketAddr>,
    /// Inner addresses that it may use as sources, and that are routed to it.
    pub allowed: Vec<IpNet>,
    /// Seconds between empty packets that keep a NAT open; none when absent.
    pub keepalive: Option<u16>,
    /// Largest outer packet on the way to it, in bytes.
    pub path_mtu: u16,
}

impl PeerConfig {
    /// A peer with the defaults: WireGuard, no keepalive, Ethernet's MTU.
    pub fn new(public_key: PublicKey, endpoint: Option<SocketAddr>, allowed: Vec<IpNet>) -> Self {
        Self {
            public_key,
            preshared_key: None,
            mode: Mode::WireGuard,
            endpoint,
            allowed,
            keepalive: None,
            path_mtu: DEFAULT_PATH_MTU,
        }
    }
}

/// Batches that a tunnel uses where the kernel has them. Each is given up by itself
/// when the kernel refuses it at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloads {
    /// The device hands over and takes TCP, and UDP from Linux 6.2 on, in pieces of up
    /// to 64 KiB (IFF_VNET_HDR, TUNSETOFFLOAD).
    pub device: bool,
    /// Up to 64 datagrams a send call (UDP_SEGMENT, Linux 4.18).
    pub send: bool,
    /// Up to 64 datagrams a received buffer (UDP_GRO, Linux 5.0).
    pub receive: bool,
    /// Packets of mode `ipip` pass in the kernel, by eBPF programs, where they may (Linux
    /// 6.6); those of the raw sockets are the few that are irregular.
    pub kernel: bool,
}

impl Offloads {
    /// All of them.
    pub const ALL: Self = Self { device: true, send: true, receive: true, kernel: true };
    /// None of them.
    pub const NONE: Self = Self { device: false, send: false, receive: false, kernel: false };
}

impl Default for Offloads {
    fn default() -> Self {
        Self::ALL
    }
}

/// A tunnel.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of the TUN device to be made.
    pub device: DeviceName,
    /// Who we are.
    pub private_key: PrivateKey,
    /// Where WireGuard listens. An unspecified IPv6 address serves IPv4 too.
    pub listen: SocketAddr,
    /// Addresses of the device, which is also where ICMP errors come from.
    pub addresses: Vec<IpNet>,
    /// MTU of the device; [`DEFAULT_MTU`] suits every mode.
    pub mtu: u16,
    /// What of the kernel's batches is used.
    pub offloads: Offloads,
    /// The peers at the start.
    pub peers: Vec<PeerConfig>,
}

/// Why a peer cannot be as asked; the caller's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// No such peer.
    #[error("there is no peer {0}")]
    Unknown(PublicKey),
    /// The key is in use.
    #[error("there is already a peer {0}")]
    Duplicate(PublicKey),
    /// The key is our own.
    #[error("peer {0} bears our own key; give it its own public key")]
    Ourselves(PublicKey),
    /// Two peers would own the same prefix.
    #[error("{prefix} belongs to peer {owner} already; a prefix has one owner")]
    PrefixTaken {
        /// The prefix.
        prefix: IpNet,
        /// Who has it.
        owner: PublicKey,
    },
    /// Packets to the peer's endpoint would be routed into the tunnel.
    #[error("{prefix} contains the endpoint {endpoint} of a peer: its packets would loop")]
    EndpointInside {
        /// The prefix.
        prefix: IpNet,
        /// The endpoint inside it.
        endpoint: IpAddr,
    },
    /// IP-in-IP needs to know the peer by an IPv4 address.
    #[error("peer {0} in ipip mode needs an IPv4 endpoint")]
    NeedsIpv4Endpoint(PublicKey),
    /// Without keys a peer is known by where it is: by its address in ipip mode, with
    /// its port in ip-udp mode.
    #[error("{endpoint} is the endpoint of peer {owner} already; in its mode each needs its own")]
    EndpointTaken {
        /// The address.
        endpoint: IpAddr,
        /// Who has it.
        owner: PublicKey,
    },
    /// More peers than session numbers have room for (2^24).
    #[error("too many peers")]
    TooMany,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preshared_keys_are_read_as_wg_prints_them_and_do_not_show() {
        let text = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";
        let key: PresharedKey = text.parse().unwrap();
        assert_eq!(key, PresharedKey([7; 32]));
        for wrong in ["", "BwcH", "no key", &text[1..], &format!("{text}{text}")] {
            assert_eq!(wrong.parse::<PresharedKey>(), Err(NoKey), "{wrong}");
            assert_eq!(wrong.parse::<PublicKey>(), Err(NoKey), "{wrong}");
            assert!(wrong.parse::<PrivateKey>().is_err(), "{wrong}");
        }
        let public = PrivateKey::from_bytes([7; 32]).public();
        assert_eq!(text.parse::<PrivateKey>().unwrap().public(), public);
        assert_eq!(public.to_string().parse(), Ok(public));
        let peer = PeerConfig::new(PublicKey([1; 32]), None, vec![]);
        let shown = format!("{:?}", PeerConfig { preshared_key: Some(key), ..peer });
        assert!(shown.contains("PresharedKey(..)") && !shown.contains("7, 7"), "{shown}");
    }
}
