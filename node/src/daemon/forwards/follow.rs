//! What guests listen on, and what the host does.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use conet_hostinject::{GuestPort, Ports};
use conet_netsys::{Listener, NetError, Netns, NetnsId, SocketDiag, Transport};

use crate::config::NodeConfig;
use crate::forward::{Forward, own_ports};

/// Most ports of one guest that are followed: each may be a rule.
const MAX_FOLLOWED: usize = 256;
/// Ports for sockets that did not ask for one, where the guest does not say.
const EPHEMERAL: (u16, u16) = (32_768, 60_999);

/// What a forward comes to now.
#[derive(Debug, Default)]
pub(super) struct Followed {
    /// Nothing leads to the guest, for the reason of the problem.
    pub(super) unusable: bool,
    pub(super) problem: Option<String>,
    pub(super) ports: Vec<Ports>,
}

/// Why the sockets of a machine are not looked at.
const A_MACHINE: &str = "the guest is a machine, whose sockets are not seen; name its ports";

/// Looks at guests' sockets; holds a socket in each guest that it looks at.
#[derive(Debug, Default)]
pub(super) struct Follower {
    guests: BTreeMap<String, Watched>,
}

#[derive(Debug)]
struct Watched {
    netns: NetnsId,
    sockets: SocketDiag,
    ephemeral: (u16, u16),
    used: bool,
}

impl Watched {
    fn open(netns: &Netns) -> Result<Self, NetError> {
        let (sockets, ephemeral) = netns.run(|| (SocketDiag::open(), ephemeral()))?;
        Ok(Self { netns: netns.id()?, sockets: sockets?, ephemeral, used: true })
    }
}

impl Follower {
    /// The ports that `forward` takes from what its guest, at `to`, listens on, one by
    /// one as far as each is `free`, joined to ranges.
    pub(super) fn follow(
        &mut self,
        forward: &Forward,
        port: &GuestPort,
        to: IpAddr,
        node: &NodeConfig,
        free: impl Fn(Ports) -> bool,
    ) -> Followed {
        // What a machine listens on is its own affair.
        let Some(netns) = port.netns() else {
            return Followed {
                unusable: true,
                problem: Some(A_MACHINE.to_owned()),
                ports: Vec::new(),
            };
        };
        match self.listeners(&forward.guest, netns) {
            Ok((listeners, ephemeral)) => {
                let wanted = wanted(forward, to, &listeners, ephemeral);
                let own = own_ports(node);
                choose(&wanted, |ports| free(ports) && !own.iter().any(|(own, _)| own.meets(ports)))
            }
            Err(error) => Followed {
                unusable: true,
                problem: Some(crate::daemon::start::chain(&error)),
                ports: Vec::new(),
            },
        }
    }

    fn listeners(
        &mut self,
        name: &str,
        netns: &Netns,
    ) -> Result<(Vec<Listener>, (u16, u16)), NetError> {
        let id = netns.id()?;
        // Another guest of the same name, or a socket that answers no more.
        if self.guests.get(name).is_some_and(|guest| guest.netns != id) {
            self.guests.remove(name);
        }
        let watched = match self.guests.entry(name.to_owned()) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                entry.insert(Watched::open(netns)?)
            }
        };
        watched.used = true;
        let ephemeral = watched.ephemeral;
        let listeners = watched.sockets.listeners();
        if listeners.is_err() {
            self.guests.remove(name);
        }
        Ok((listeners?, ephemeral))
    }

    /// Lets go of guests that nobody asked for since the last time: a socket keeps a
    /// namespace alive.
    pub(super) fn forget_unused(&mut self) {
        self.guests.retain(|_, guest| std::mem::take(&mut guest.used));
    }
}

/// `ip_local_port_range` of the calling thread's namespace.
fn ephemeral() -> (u16, u16) {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ports = text.split_whitespace().map(str::parse);
    match (ports.next(), ports.next()) {
        (Some(Ok(first)), Some(Ok(last))) => (first, last),
        _ => EPHEMERAL,
    }
}

/// Ports that the guest listens on for others, sorted, each once. A UDP socket on an
/// ephemeral port is a client's, as far as one can tell: those are left out.
fn wanted(
    forward: &Forward,
    to: IpAddr,
    listeners: &[Listener],
    ephemeral: (u16, u16),
) -> Vec<(Transport, u16)> {
    let is_client = |listener: &Listener| {
        listener.transport == Transport::Udp && (ephemeral.0..=ephemeral.1).contains(&listener.port)
    };
    let wanted = listeners.iter().filter(|listener| {
        forward.transport.is_none_or(|transport| transport == listener.transport)
            && listener.takes(to)
            && !is_client(listener)
    });
    let mut wanted: Vec<_> = wanted.map(|listener| (listener.transport, listener.port)).collect();
    wanted.sort_unstable();
    wanted.dedup();
    wanted
}

/// Those that are free, joined to ranges, and a word on the others.
fn choose(wanted: &[(Transport, u16)], free: impl Fn(Ports) -> bool) -> Followed {
    let mut followed = Followed::default();
    let mut left_out = Vec::new();
    for &(transport, port) in &wanted[..wanted.len().min(MAX_FOLLOWED)] {
        let one = Ports { transport, first: port, last: port };
        if !free(one) {
            left_out.push(format!("{transport} {port}"));
            continue;
        }
        match followed.ports.last_mut() {
            Some(last) if last.transport == transport && last.last.checked_add(1) == Some(port) => {
                last.last = port;
            }
            _ => followed.ports.push(one),
        }
    }
    if wanted.len() > MAX_FOLLOWED {
        left_out.push(format!("{} more than {MAX_FOLLOWED}", wanted.len() - MAX_FOLLOWED));
    }
    if !left_out.is_empty() {
        followed.problem = Some(format!("taken already: {}", left_out.join(", ")));
    }
    followed
}

/// A socket of the host's that takes what comes to one of the forward's ports.
pub(super) fn taken_by_host(forward: &Forward, listeners: &[Listener]) -> Option<Listener> {
    let ports = forward.fixed()?;
    let takes = |listener: &&Listener| {
        let own = listener.address.to_canonical();
        let meets = match forward.bind {
            Some(bind) => listener.takes(bind),
            // Loopback addresses lead to no guest, and so are nobody's rivals.
            None => !own.is_loopback() && is_ipv4(own),
        };
        let port =
            Ports { transport: listener.transport, first: listener.port, last: listener.port };
        meets && ports.meets(port)
    };
    listeners.iter().find(takes).copied()
}

/// Whether a socket bound there may take IPv4 packets.
fn is_ipv4(address: IpAddr) -> bool {
    matches!(address, IpAddr::V4(_) | IpAddr::V6(Ipv6Addr::UNSPECIFIED))
        && address != IpAddr::V4(Ipv4Addr::BROADCAST)
}
