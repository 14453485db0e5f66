//! WireGuard and IP-in-IP tunnels with longest-prefix routes between hosts.
//!
//! A sans-IO [`Core`] (peers, routes, encapsulation, counters, the next
//! deadline) between two ports: a [`Device`] that inner packets come out of and go
//! into, and a [`Network`] that carries outer datagrams. [`Engine`] pumps packets between
//! the three; [`Tunnel`] runs an engine on a thread: on Linux with a TUN device, a UDP
//! socket and raw sockets, on Windows with wintun's adapter and a UDP socket. Both ports
//! have adapters in memory, so that everything but the sockets runs in tests.
//!
//! ```text
//!            Tunnel (thread, mio, netsys: addresses and routes)
//!   TUN ─ Device ──► Engine ──► Network ── UDP (WireGuard, IP-in-UDP)
//!                    │  ▲                 raw 4, 41 (IP-in-IP)
//!                    ▼  │
//!                    Core: routes → peer → WireGuard | IP-in-UDP | IP-in-IP → Outbox
//!                          checks ◄─ peer ◄─ index or address
//! ```
//!
//! | mode | for | carrier |
//! |---|---|---|
//! | [`Mode::WireGuard`] | default; encrypted | UDP |
//! | [`Mode::IpUdp`] | a trusted network, also behind NAT | UDP |
//! | [`Mode::IpIp`] | a trusted network | protocol 4, and 41 for IPv6 inside |
//!
//! A packet from the network is forwarded only if the *longest match* of its
//! inner source over the addresses of **all** peers is the peer it came from. In
//! `ipip` and `ip-udp` mode the peer is known by its outer source address alone, which
//! anybody on that network can forge: they are for networks where nobody does.
//!
//! Limits: see `ARCHITECTURE.md`, section tunnel.

mod config;
mod core;
mod device;
mod engine;
pub mod fuzz_support;
mod handle;
#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
use linux as os;
mod network;
mod noise;
#[cfg_attr(windows, allow(dead_code, reason = "only Linux's device takes joined packets"))]
mod offload;
mod udp;
#[cfg(windows)]
mod windows;
#[cfg(windows)]
use windows as os;

pub use config::{
    Config, DEFAULT_MTU, DEFAULT_PATH_MTU, DEFAULT_PORT, Mode, NoKey, Offloads, PeerConfig,
    PeerError, PresharedKey, PrivateKey, PublicKey,
};
pub use core::{Core, Destination, Outbox, OwnAddresses, PeerSnapshot, Replies, Transmit};
pub use device::{Device, Inner};
pub use engine::{Engine, EngineError};
pub use handle::{Snapshot, StartError, Tunnel, TunnelError};
pub use network::{Arrival, Arrivals, MemoryDatagram, MemoryNetwork, Network, Origin};
pub use offload::Outgoing;

/// Name of a tunnel's device.
#[cfg(target_os = "linux")]
pub use conet_netsys::IfName as DeviceName;
/// Why an address or a route was refused.
#[cfg(target_os = "linux")]
pub use conet_netsys::NetError;
#[cfg(target_os = "linux")]
pub use linux::kernel::{IpipPath, KernelError};
#[cfg(target_os = "linux")]
pub use linux::probe;
#[cfg(windows)]
pub use windows::{AdapterName as DeviceName, NetshError as NetError};
