//! What the daemon tells of its guests, and of ports that lead to them.

extern crate alloc;

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::net::IpAddr;

use serde::{Deserialize, Serialize};

/// A guest of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// How it is plumbed: `netns` (by veth), `tap` or `colinux` (by TAP), or by vhost-user
    /// `qemu` or `uml`.
    pub kind: String,
    /// Its first overlay address.
    pub address: String,
    /// All of them.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// Who asked for it: `config` or `added`.
    #[serde(default)]
    pub origin: String,
    /// `up`, `down`, `adding`, `removing` or `unusable`.
    #[serde(default)]
    pub state: String,
    /// Why it is down or unusable, for people.
    #[serde(default)]
    pub problem: Option<String>,
    /// Packets that its port has dropped; the kernel counts a veth's.
    #[serde(default)]
    pub drops: u64,
    /// The same, by reason.
    #[serde(default)]
    pub drop_reasons: BTreeMap<String, u64>,
    /// How fast it may be.
    #[serde(default)]
    pub rates: GuestRates,
    /// What is kept for it, where it is held.
    #[serde(default)]
    pub held: Option<Held>,
    /// What coLinux was told of the card of a guest in its place.
    #[serde(default)]
    pub line: Option<String>,
    /// What a machine needs to be started with; none where it is a namespace.
    #[serde(default)]
    pub machine: Option<Machine>,
}

/// How fast a guest may be, each way as in `100mbit,10kpps`; nothing is unlimited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRates {
    /// What it sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// What it receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
}

impl GuestRates {
    /// Whether nothing is limited.
    #[must_use]
    pub fn are_unlimited(&self) -> bool {
        *self == Self::default()
    }
}

/// What a daemon has that does not say.
const fn one() -> u16 {
    1
}

/// Packets that are kept for a guest that is held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// How many.
    pub packets: u64,
    /// Their bytes, with ten of a header before each.
    pub bytes: u64,
}

/// The card of a guest that is a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The vhost-user socket.
    pub socket: String,
    /// Its Ethernet address, as `02:00:0a:4d:01:02`.
    pub mac: String,
    /// Longest packet in bytes.
    pub mtu: u16,
    /// Pairs of queues of its card.
    #[serde(default = "one")]
    pub queues: u16,
    /// Its gateways, the host, one of each family that the overlay has.
    #[serde(default)]
    pub gateways: Vec<IpAddr>,
    /// The VMM that is connected.
    pub vmm: Option<u32>,
}

/// Ports of the host that lead to a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// Its text, which names it: `tcp:2222:web:22`.
    pub forward: String,
    /// The guest's name.
    pub guest: String,
    /// Who asked for it: `config` or `added`.
    pub origin: String,
    /// `up`, `waiting` (for its guest) or `unusable`.
    pub state: String,
    /// Why it is unusable, or what of it is, for people.
    #[serde(default)]
    pub problem: Option<String>,
    /// Ports that lead to the guest now, as in `tcp 2222` and `udp 5000-5010`.
    #[serde(default)]
    pub ports: Vec<String>,
}
