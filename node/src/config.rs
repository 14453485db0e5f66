//! `conet.toml`: `wg.conf` in spirit, and refused whole where a part is wrong.
//!
//! ```toml
//! [node]
//! private_key_file = "node.key"     # or private_key = "…", then this file is the secret
//! address = "192.0.2.1"             # the host's own address, for tunnels and sessions
//! overlay = "10.77.1.0/24"          # the addresses of this node's guests; also one of IPv6, or
//! #                                 both: ["10.77.1.0/24", "fd77:1::/64"]
//! # name = "…"                      the host's name where absent
//! # port = 47700                    UDP for sessions, TCP for the links of processes
//! # tcp_fallback = true             and for sessions where UDP is blocked
//! # wireguard_port = 51820
//! # wireguard_private_key = "…"     as `wg genkey` prints it, or wireguard_private_key_file:
//! #                                 the tunnel's own key, where it is not to be the node's;
//! #                                 peers need it as wireguard_key beside public_key
//! # tunnel_addresses = ["10.8.0.5"] more addresses of the tunnel's device
//! # mode = "wireguard"              or "ip-udp" or "ipip": how peers are reached that
//! #                                 do not say
//! # tun_offload = true              TCP and UDP pass the tunnel's device in large pieces
//! # udp_gso = true                  datagrams are sent many at a time
//! # udp_gro = true                  and received so
//! # ipip_kernel = true              peers in mode ipip are carried in the kernel, by eBPF
//! # state_dir = "/run/conet"
//! # socket = "…"                    state_dir/control.sock where absent
//! # guests_from = ["a"]             whose processes may run here
//! # host_for_us = ["a"]             who may run ours
//! # plain_links = ["a"]             between whom and us links of processes go in the
//! #                                 clear, where both nodes say so
//! # allow_root = false              whether processes of uid 0 may leave
//! # guest_uid_base = 1879048192     first host uid for processes of others
//! # link_timeout = 60               seconds that a process waits for a node out of reach
//! # dns = ["192.0.2.53"]            resolvers that guests are told of; those of the host's
//! #                                 own that are not on loopback where absent
//! # clock_offset = "-90s"           a lab host's clock against the machine's
//! # shared_address = false          guests use this host's address outside the overlay
//! # host_ports = ["tcp:8000"]       ports of this host's own that its guests reach, none
//! #                                 where absent; or ["all"]. They may ping it in any case
//! # forwards = ["tcp:2222:web:22"]  ports of this host's that lead to a guest; also
//! #                                 "udp:5000-5010:web", "tcp:192.0.2.1:80:web", and
//! #                                 "auto:web" for whatever it listens on
//!
//! [[peer]]
//! name = "a"
//! public_key = "…"                  # or wireguard_key: a peer that only tunnels; both for a
//! #                                 node whose tunnel has a key of its own
//! endpoint = "192.0.2.2:47700"
//! # wireguard_endpoint = "…"        endpoint's address, port 51820, where absent
//! # mode = "ipip"
//! # persistent_keepalive = 25       seconds
//! # preshared_key = "…"             as `wg genpsk` prints it; then this file is a secret
//! allowed_ips = ["10.77.2.0/24"]
//!
//! [[guest]]
//! name = "web"
//! kind = "netns"                    # or "tap", "qemu", "uml", "colinux"
//! address = "10.77.1.2"             # or addresses = ["10.77.1.2", "fd77:1::2"]
//! # rate = "100mbit,10kpps"         how fast it may send and receive; also rate_from and
//! #                                 rate_to, for one way; not for netns
//! # line = 'eth0=tuntap,"TAP",00:ff:12:34:56:78'   of coLinux's configuration, for kind
//! #                                 colinux: a guest by tap whose card is as the line says
//! ```
//!
//! A `[[peer]]` may tunnel and nothing else. To run processes is granted apart,
//! in each direction, by name.
//!
//! What it is not: it opens nothing but the two files and keeps no state.
//!
//! Invariants of a [`Config`]: names and keys are unique; a prefix has one
//! peer, and none lies in the node's own overlay; grants name peers that have
//! an identity; guests have distinct addresses in the overlay; the private key
//! was readable by its owner alone.

mod check;
mod error;
mod overlay;
mod parse;
mod reader;
mod sharing;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use conet_hostinject::{HostPorts, Rates};
use conet_tunnel::{Offloads, PresharedKey};
use ipnet::IpNet;
use zeroize::Zeroizing;

pub use check::is_name;
pub use error::{ConfigError, Problem, Suggestion, TomlMessage};
pub use ipnet::Ipv4Net;
pub use overlay::{InvalidOverlay, Overlay};

use crate::colinux::Line;
use crate::forward::Forward;
use crate::identity::{Identity, KEY_LEN, KeyError, PublicKey, X25519Public, decode_key};

/// Where `conet up` looks where it is not told.
pub const DEFAULT_PATH: &str = "/etc/conet/conet.toml";
/// UDP port of sessions and TCP port of process links where none is given.
pub const DEFAULT_PORT: u16 = 47_700;
/// WireGuard's own port (its documentation's example port).
pub const DEFAULT_WIREGUARD_PORT: u16 = 51_820;
/// First uid for processes of other nodes where none is given: above what
/// distributions hand out (subordinate uids end below 2^29 in shadow's
/// defaults, systemd's dynamic and container uids below 0x7000_0000), and
/// below 2^31, from where on some programs take a uid for negative.
pub const DEFAULT_GUEST_UID_BASE: u32 = 0x7000_0000;
/// How long the halves of a process wait for each other where nothing is said.
pub const DEFAULT_LINK_TIMEOUT: Duration = Duration::from_secs(60);
/// Where the daemon keeps its state where it is not told.
pub const DEFAULT_STATE_DIR: &str = "/run/conet";
/// The control socket's name in the state directory.
pub const SOCKET_NAME: &str = "control.sock";

/// A whole `conet.toml`, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// `[node]`.
    pub node: NodeConfig,
    /// Each `[[peer]]`, in the file's order.
    pub peers: Vec<PeerConfig>,
    /// Each `[[guest]]`, in the file's order.
    pub guests: Vec<GuestConfig>,
    /// Ports of this host's that lead to guests; none overlaps another.
    pub forwards: Vec<Forward>,
}

/// `[node]`: this host.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// This node's name: 1 to 63 of letters, digits, `.`, `_`, `-`.
    pub name: String,
    /// Its keys.
    pub identity: Identity,
    /// The host's own address, which tunnels and sessions use.
    pub address: IpAddr,
    /// UDP port of sessions, TCP port of process links.
    pub port: u16,
    /// UDP port of WireGuard.
    pub wireguard_port: u16,
    /// The tunnel's private key, where it is not the one that derives from the identity.
    pub wireguard_private_key: Option<Secret>,
    /// Addresses of the tunnel's device beside the gateway's.
    pub tunnel_addresses: Vec<IpAddr>,
    /// The addresses of this node's guests.
    pub overlay: Overlay,
    /// Directory for what must survive a restart.
    pub state_dir: PathBuf,
    /// The control socket.
    pub socket: PathBuf,
    /// Whether processes of uid 0 may leave this node.
    pub allow_root: bool,
    /// First uid of this host that processes of other nodes run under.
    pub guest_uid_base: u32,
    /// How long the halves of a process wait for each other when the network is away;
    /// whole seconds, 5 to 86,400.
    pub link_timeout: Duration,
    /// Whether sessions go over to TCP where UDP is blocked.
    pub tcp_fallback: bool,
    /// Added to the machine's clock to make this host's.
    pub clock_offset: ClockOffset,
    /// Resolvers that guests are told of; the host's own where nothing is said.
    pub dns: Option<Vec<IpAddr>>,
    /// Batches of the kernel's that the tunnel uses.
    pub offloads: Offloads,
    /// Whether guests use this host's address outside the overlay.
    pub shared_address: bool,
    /// Which of the host's own ports its guests reach.
    pub host_ports: HostPorts,
}

/// A private X25519 key, zeroed when dropped.
#[derive(Clone)]
pub struct Secret(Zeroizing<[u8; KEY_LEN]>);

impl Deref for Secret {
    type Target = [u8; KEY_LEN];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl FromStr for Secret {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode_key(text).map(Self)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl NodeConfig {
    /// The private key of the tunnel.
    #[must_use]
    pub fn tunnel_secret(&self) -> Zeroizing<[u8; KEY_LEN]> {
        match &self.wireguard_private_key {
            Some(key) => key.0.clone(),
            None => self.identity.x25519_secret(),
        }
    }
}

/// How packets to a peer travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Encrypted, over UDP.
    WireGuard,
    /// In the clear, over UDP, for trusted networks, also behind NAT.
    IpUdp,
    /// In the clear, IP protocol 4 (RFC 2003), for trusted networks.
    IpIp,
}

impl Mode {
    /// As the configuration spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::WireGuard => "wireguard",
            Self::IpUdp => "ip-udp",
            Self::IpIp => "ipip",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that names no mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a mode; write wireguard, ip-udp or ipip")]
pub struct UnknownMode;

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        match text {
            "wireguard" => Ok(Self::WireGuard),
            "ip-udp" => Ok(Self::IpUdp),
            "ipip" => Ok(Self::IpIp),
            _ => Err(UnknownMode),
        }
    }
}

/// By which key a peer is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerKey {
    /// A conet node.
    Node(PublicKey),
    /// Plain WireGuard: it gets tunnelling only.
    WireGuard(X25519Public),
}

impl PeerKey {
    /// The key that WireGuard and the session handshake know the peer by.
    #[must_use]
    pub fn x25519(self) -> X25519Public {
        match self {
            Self::Node(key) => key.x25519(),
            Self::WireGuard(key) => key,
        }
    }

    /// The peer's identity, if it is a conet node.
    #[must_use]
    pub fn identity(self) -> Option<PublicKey> {
        match self {
            Self::Node(key) => Some(key),
            Self::WireGuard(_) => None,
        }
    }
}

/// What a peer may do beside tunnelling; both off by default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Grants {
    /// Its processes may run here (`guests_from`).
    pub guests_from: bool,
    /// It may run ours (`host_for_us`).
    pub host_for_us: bool,
    /// Links of processes to and from it go in the clear (`plain_links`), if it says
    /// the same.
    pub plain_links: bool,
}

/// `[[peer]]`: another host.
#[derive(Debug, Clone)]
pub struct PeerConfig {
    /// Its name here.
    pub name: String,
    /// Its key.
    pub key: PeerKey,
    /// Its tunnel's key, where that is not the one that derives from its identity.
    pub own_tunnel_key: Option<X25519Public>,
    /// Where its sessions are, if it can be called.
    pub endpoint: Option<SocketAddr>,
    /// Where its WireGuard is, if it can be called.
    pub wireguard_endpoint: Option<SocketAddr>,
    /// Inner addresses that are routed to it and that it may use as sources.
    pub allowed_ips: Vec<IpNet>,
    /// How packets to it travel.
    pub mode: Mode,
    /// Interval of WireGuard's keepalive, if it keeps one.
    pub persistent_keepalive: Option<Duration>,
    /// Secret shared with it beforehand, for WireGuard.
    pub preshared_key: Option<PresharedKey>,
    /// What it may do beside tunnelling.
    pub grants: Grants,
}

impl PeerConfig {
    /// The key that its tunnel has.
    #[must_use]
    pub fn tunnel_key(&self) -> X25519Public {
        self.own_tunnel_key.unwrap_or_else(|| self.key.x25519())
    }
}

/// How a guest is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestKind {
    /// A network namespace, made by the daemon where it is not there, by veth.
    Netns,
    /// The same by a TAP device and a thread of the daemon.
    Tap,
    /// A QEMU machine that somebody starts, by vhost-user.
    Qemu,
    /// A User-Mode Linux that somebody starts, by vhost-user.
    Uml,
    /// A namespace by TAP whose card is as a line of coLinux's configuration says.
    Colinux,
}

impl GuestKind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Netns, Self::Tap, Self::Qemu, Self::Uml, Self::Colinux];

    /// Whether it is a machine of its own, not a namespace of this one.
    #[must_use]
    pub fn is_machine(self) -> bool {
        matches!(self, Self::Qemu | Self::Uml)
    }

    /// Whether its card can have so many pairs of queues. User-Mode Linux has one processor,
    /// and its driver no control queue to switch others on with.
    #[must_use]
    pub fn may_have_queues(self, queues: u16) -> bool {
        let most = if self == Self::Qemu { conet_hostinject::vhost::MAX_QUEUES } else { 1 };
        (1..=most).contains(&queues)
    }

    /// As the configuration spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Netns => "netns",
            Self::Tap => "tap",
            Self::Qemu => "qemu",
            Self::Uml => "uml",
            Self::Colinux => "colinux",
        }
    }
}

/// A word that names no kind of guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a kind of guest; write netns, tap, qemu, uml or colinux")]
pub struct UnknownKind;

impl FromStr for GuestKind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or(UnknownKind)
    }
}

/// `[[guest]]`: a machine on this host with an address in the overlay.
#[derive(Debug, Clone)]
pub struct GuestConfig {
    /// Its name, for a namespace guest also that of the namespace.
    pub name: String,
    /// How it is run.
    pub kind: GuestKind,
    /// Its addresses in the node's overlay, at least one.
    pub addresses: Vec<IpAddr>,
    /// How fast it may be; none for [`GuestKind::Netns`].
    pub rates: Rates,
    /// Pairs of queues of its card; more than one for [`GuestKind::Qemu`] alone.
    pub queues: u16,
    /// What it was told to coLinux; there for [`GuestKind::Colinux`], and no other.
    pub line: Option<Line>,
}

/// A host's clock against its machine's, in nanoseconds; positive is ahead.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClockOffset {
    /// Added to the machine's clock.
    pub nanoseconds: i64,
}

/// A text that is no clock offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an offset; write a signed number with ns, us, ms, s, m, h or d, as in -90s")]
pub struct InvalidOffset;

impl FromStr for ClockOffset {
    type Err = InvalidOffset;

    fn from_str(text: &str) -> Result<Self, InvalidOffset> {
        let split = text.find(|c: char| c.is_ascii_alphabetic()).ok_or(InvalidOffset)?;
        let (number, unit) = text.split_at(split);
        let number: i64 = number.parse().map_err(|_| InvalidOffset)?;
        let unit: i64 = match unit {
            "ns" => 1,
            "us" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            "d" => 86_400_000_000_000,
            _ => return Err(InvalidOffset),
        };
        let nanoseconds = number.checked_mul(unit).ok_or(InvalidOffset)?;
        Ok(Self { nanoseconds })
    }
}

impl Config {
    /// Reads and checks a file, and the private key's file that it names.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], with the file, the line, the key and the remedy.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(file)
            .map_err(|source| ConfigError::Read { file: file.to_owned(), source })?;
        parse::config(reader::Source { file, text: &text })
    }

    /// The peer of a name.
    #[must_use]
    pub fn peer(&self, name: &str) -> Option<&PeerConfig> {
        self.peers.iter().find(|peer| peer.name == name)
    }
}
