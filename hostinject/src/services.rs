//! What a guest that knows nothing is told of its network, so that an image as it comes
//! has its address, its router, its MTU and its resolvers: DHCP, DHCPv6 and router
//! advertisements, frame in, frame out.
//!
//! ```text
//! guest                                    Services
//!   DISCOVER, REQUEST, INFORM  ─ UDP 67 ─►  OFFER, ACK, NAK          services/dhcp.rs
//!   SOLICIT, REQUEST, RENEW …  ─ UDP 547 ►  ADVERTISE, REPLY         services/dhcp6.rs
//!   router solicitation                  ►  router advertisement     services/advert.rs
//! ```
//!
//! There is nothing to remember: a guest's addresses are its own for as long as it is a
//! guest, so every answer follows from the question and the [`Lease`] alone, whichever host
//! gives it, also after a restart or a move. A lease ends only so that a guest hears of
//! changes.
//!
//! Left unanswered: relays (there is none on a segment of two stations), other servers'
//! clients, and what no client of the standards sends.
//!
//! Invariants: no bytes panic; an answer fits [`crate::segment::ANSWER_MAX`] and any link
//! of 576 (IPv6: 1280) bytes; checksums of UDP are not looked at, since a card that leaves
//! them to the host sends them unfinished.
//!
//! Sources: RFC 2131, RFC 2132, RFC 3442, RFC 8415, RFC 4861, RFC 8106.

mod advert;
mod dhcp;
mod dhcp6;
mod packet;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use conet_dataplane::DropReason;
use conet_netsys::MacAddr;

use self::packet::{Datagram, IPV4_UDP, IPV6_UDP};
use crate::segment::{ANSWER_MAX, ETHERNET};

/// Ports of servers: DHCP (RFC 2131 §4.1), DHCPv6 (RFC 8415 §7.2).
const DHCP: u16 = 67;
const DHCP6: u16 = 547;
/// Ports of clients.
const DHCP_CLIENT: u16 = 68;
const DHCP6_CLIENT: u16 = 546;
/// Longest question of DHCP that is read: what an Ethernet link carries.
const LONGEST: usize = 1500;
/// How long a lease is good: a guest hears within half of this what has changed.
const LEASE: Duration = Duration::from_secs(3600);
/// Most resolvers that a guest is told; those of libraries use three (`MAXNS`).
const MOST_RESOLVERS: usize = 3;
/// How often a router makes itself known unasked, its lifetime being 15 times that
/// (RFC 4861 §6.2.1: at most 1800 s, and 9000 s).
pub(crate) const ADVERT_INTERVAL: Duration = Duration::from_secs(600);

/// What a guest is told of its network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Its addresses. By DHCP it gets the first IPv4 one, by DHCPv6 up to four.
    pub addresses: Vec<IpAddr>,
    /// Its gateway, one of each family that it has.
    pub gateways: Vec<IpAddr>,
    /// Bits of its IPv4 netmask, 0 to 32. Every neighbour is found through us, so that it
    /// is of no account where packets go; one that has the gateway in it serves clients
    /// that know no RFC 3442.
    pub prefix: u8,
    /// Resolvers, the first three of each family.
    pub dns: Vec<IpAddr>,
    /// Longest packet in bytes.
    pub mtu: u16,
}

impl Lease {
    fn v4(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.addresses.iter().filter_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        })
    }

    fn v6(&self) -> impl Iterator<Item = Ipv6Addr> {
        self.addresses.iter().filter_map(|address| match address {
            IpAddr::V6(address) => Some(*address),
            IpAddr::V4(_) => None,
        })
    }

    fn gateway(&self) -> Option<Ipv4Addr> {
        self.gateways.iter().find_map(|gateway| match gateway {
            IpAddr::V4(gateway) => Some(*gateway),
            IpAddr::V6(_) => None,
        })
    }

    fn dns_v4(&self) -> impl Iterator<Item = Ipv4Addr> {
        let v4 = self.dns.iter().filter_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        });
        v4.take(MOST_RESOLVERS)
    }

    fn dns_v6(&self) -> impl Iterator<Item = Ipv6Addr> {
        let v6 = self.dns.iter().filter_map(|address| match address {
            IpAddr::V6(address) => Some(*address),
            IpAddr::V4(_) => None,
        });
        v6.take(MOST_RESOLVERS)
    }
}

/// A frame for a service: so many bytes of answer, or why there is none.
pub(crate) type Served = Result<usize, DropReason>;

/// The services of one guest.
#[derive(Debug, Clone)]
pub(crate) struct Services {
    ours: MacAddr,
    lease: Lease,
}

impl Services {
    pub(crate) fn new(ours: MacAddr, lease: Lease) -> Self {
        Self { ours, lease }
    }

    /// Takes an IPv4 packet of `guest`'s; none where it is for no service.
    pub(crate) fn handle_v4(
        &self,
        guest: MacAddr,
        packet: &[u8],
        answer: &mut [u8; ANSWER_MAX],
    ) -> Option<Served> {
        let server = self.lease.gateway()?;
        let question = Datagram::of_v4(packet, DHCP)?;
        let IpAddr::V4(to) = question.to else { return None };
        if to != server && !to.is_broadcast() {
            return None;
        }
        if question.payload.len() > LONGEST {
            return Some(Err(DropReason::TooBig));
        }
        let room = answer.get_mut(ETHERNET + IPV4_UDP..)?;
        Some(dhcp::answer(&self.lease, server, question.payload, room).and_then(|reply| {
            let to = if reply.to.is_broadcast() { MacAddr([0xff; 6]) } else { guest };
            packet::put_v4([self.ours, to], [server, reply.to], reply.len, answer)
                .ok_or(DropReason::TooBig)
        }))
    }

    /// The same for an IPv6 packet.
    pub(crate) fn handle_v6(
        &self,
        guest: MacAddr,
        packet: &[u8],
        answer: &mut [u8; ANSWER_MAX],
    ) -> Option<Served> {
        if let Some(asks) = advert::solicitation(packet) {
            return self.advert_to(asks, guest, answer).map(Ok);
        }
        self.lease.v6().next()?;
        let question = Datagram::of_v6(packet, DHCP6)?;
        let (IpAddr::V6(from), IpAddr::V6(to)) = (question.from, question.to) else { return None };
        if to != dhcp6::SERVERS || !from.is_unicast_link_local() {
            return None;
        }
        if question.payload.len() > LONGEST {
            return Some(Err(DropReason::TooBig));
        }
        let room = answer.get_mut(ETHERNET + IPV6_UDP..)?;
        Some(dhcp6::answer(&self.lease, self.ours, question.payload, room).and_then(|len| {
            let ours = packet::link_local(self.ours);
            packet::put_v6([self.ours, guest], [ours, from], len, answer).ok_or(DropReason::TooBig)
        }))
    }

    /// What the guest is to hear every [`ADVERT_INTERVAL`], where it has IPv6.
    pub(crate) fn advert(&self, guest: MacAddr, answer: &mut [u8; ANSWER_MAX]) -> Option<usize> {
        self.advert_to(Ipv6Addr::UNSPECIFIED, guest, answer)
    }

    fn advert_to(
        &self,
        asks: Ipv6Addr,
        guest: MacAddr,
        answer: &mut [u8; ANSWER_MAX],
    ) -> Option<usize> {
        self.lease.v6().next()?;
        advert::write(&self.lease, self.ours, (asks, guest), answer)
    }
}

#[cfg(test)]
mod tests;
