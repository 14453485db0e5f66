//! Which forwards a node can have beside each other.

use std::net::IpAddr;

use conet_hostinject::{MAX_CHANGED_PORTS, Ports};
use conet_netsys::Transport;
use thiserror::Error;

use super::{Forward, Which};
use crate::config::NodeConfig;

/// Most forwards of a node: each is a rule that packets of new connections are
/// compared with.
pub const MAX_FORWARDS: usize = 256;

/// Why a node cannot have a forward.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ForwardProblem {
    /// Another one takes the same ports.
    #[error("{forward} takes ports that {other} takes")]
    Overlap {
        /// The forward.
        forward: String,
        /// The one that is there.
        other: String,
    },
    /// The node itself listens there.
    #[error("{forward} takes {transport} port {port}, which is this node's own for {what}")]
    Own {
        /// The forward.
        forward: String,
        /// The protocol.
        transport: Transport,
        /// The port.
        port: u16,
        /// `sessions`, `links of processes` or `the tunnel`.
        what: &'static str,
    },
    /// The address cannot be one of the host's that others reach.
    #[error("{forward} is bound to {bind}, {why}")]
    Bind {
        /// The forward.
        forward: String,
        /// The address.
        bind: IpAddr,
        /// Why not.
        why: &'static str,
    },
    /// More than there can be.
    #[error("there are {MAX_FORWARDS} forwards already")]
    TooMany,
    /// More ports than a table holds.
    #[error("{forward} changes ports, of which forwards may change {MAX_CHANGED_PORTS} in all")]
    TooManyChanged {
        /// The forward.
        forward: String,
    },
}

impl ForwardProblem {
    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Overlap { .. } | Self::Own { .. } => "take other ports of the host",
            Self::Bind { .. } => "give an IPv4 address of this host's, or none for all",
            Self::TooMany => "remove some, or write a range as one",
            Self::TooManyChanged { .. } => "use the same ports inside, or fewer",
        }
    }
}

/// Whether the node can have `forward` beside `others`.
///
/// # Errors
///
/// [`ForwardProblem`].
pub fn check<'a>(
    forward: &Forward,
    node: &NodeConfig,
    others: impl Iterator<Item = &'a Forward> + Clone,
) -> Result<(), ForwardProblem> {
    if others.clone().count() >= MAX_FORWARDS {
        return Err(ForwardProblem::TooMany);
    }
    if let Some(bind) = forward.bind {
        let why = match bind {
            IpAddr::V6(_) => Some("and forwards are IPv4's"),
            bind if bind.is_loopback() => Some("from where nothing goes to a guest"),
            bind if bind.is_unspecified() || bind.is_multicast() => Some("which no host has"),
            _ => None,
        };
        if let Some(why) = why {
            return Err(ForwardProblem::Bind { forward: forward.to_string(), bind, why });
        }
    }
    if let Some(other) = others.clone().find(|other| other.overlaps(forward)) {
        let (forward, other) = (forward.to_string(), other.to_string());
        return Err(ForwardProblem::Overlap { forward, other });
    }
    for (ports, what) in own_ports(node) {
        if let Some(taken) = forward.fixed().filter(|taken| taken.meets(ports)) {
            let forward = forward.to_string();
            let (transport, port) = (taken.transport, ports.first);
            return Err(ForwardProblem::Own { forward, transport, port, what });
        }
    }
    let changed: usize = others.map(Forward::changed_ports).sum();
    if forward.ports != Which::Auto && changed + forward.changed_ports() > MAX_CHANGED_PORTS {
        return Err(ForwardProblem::TooManyChanged { forward: forward.to_string() });
    }
    Ok(())
}

/// Ports that the node itself listens on.
pub fn own_ports(node: &NodeConfig) -> [(Ports, &'static str); 3] {
    let one = |transport, port| Ports { transport, first: port, last: port };
    [
        (one(Transport::Udp, node.port), "sessions"),
        (one(Transport::Tcp, node.port), "links of processes"),
        (one(Transport::Udp, node.wireguard_port), "the tunnel"),
    ]
}
