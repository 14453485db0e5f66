//! What a rule is made of: expressions, which work on 16 registers of 4 bytes.
//!
//! A rule's expressions are evaluated in order; one that does not match ends the rule.
//! [`Expression`]s that match load what they compare into register [`KEY`] themselves,
//! so that a rule reads as nft(8) would print it.

use std::net::IpAddr;

use ipnet::IpNet;

use super::frame::Attributes;

/// `NFT_REG32_00`: what is compared and looked up.
const KEY: u32 = 8;
/// What comes behind a link's name of 16 bytes in a key.
const BEHIND_LINK: u32 = 12;
/// `NFT_META_IIFNAME`.
const IIFNAME: u32 = 6;
/// The port that packets are sent on to.
const PORT: u32 = 9;
/// The address, of 4 registers.
const ADDRESS: u32 = 12;

/// `NFT_CMP_EQ`, which is `NFT_RANGE_EQ` too, and `NFT_CMP_NEQ`.
const EQUAL: u32 = 0;
const OTHER: u32 = 1;
/// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
const IPV4: u8 = 2;
const IPV6: u8 = 10;
/// `RTN_LOCAL` (`linux/rtnetlink.h`).
const LOCAL: u32 = 2;

/// What becomes of a packet at a filter.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// It goes on (other chains may still drop it).
    Accept,
    /// It is gone, and nobody is told.
    Drop,
}

/// What the sender of a refused packet is told.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IcmpReject {
    /// That somebody forbids it, by either family's ICMP.
    Prohibited,
}

/// A part of a rule.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Expression<'a> {
    /// The packet came in by a link of this set.
    CameInByOneOf(&'a str),
    /// The packet came in by a link that is not in this set.
    CameInByNoneOf(&'a str),
    /// The link it came in by and its source are together in this set.
    LinkAndSourceIn {
        /// A set of [`super::SetKind::LinksAndIpv4`] or [`super::SetKind::LinksAndIpv6`].
        set: &'a str,
        /// Which of the two; the packet must be of that family.
        ipv4: bool,
    },
    /// It goes out by another link than this.
    GoesOutNotBy(&'a str),
    /// It is IPv4 (`true`) or IPv6.
    IsIpv4(bool),
    /// It is of this protocol, whatever extension headers come before.
    Protocol(u8),
    /// It is an ICMP message, of either family, of this type.
    IcmpType(u8),
    /// Its source (`true`) or destination is inside the prefix, or outside.
    Address {
        /// The source, not the destination.
        source: bool,
        /// The prefix.
        net: IpNet,
        /// Whether it must be inside.
        inside: bool,
    },
    /// Its destination is an address of this host's.
    ToThisHost,
    /// Its destination port (TCP, UDP) is between these, both included.
    PortFrom(u16, u16),
    /// It belongs to a connection that is known, or is an error about one.
    OfKnownConnection,
    /// Its destination port is a key of this map; [`Expression::SendOn`] takes the value.
    PortIn(&'a str),
    /// It is counted by the counter that this map has for the link it came in by; one
    /// that the map has not ends the rule.
    CountByLink(&'a str),
    /// A filter's decision.
    Decide(Verdict),
    /// It is refused.
    Refuse(IcmpReject),
    /// The connection goes to this address, and to the same port, or to that which
    /// [`Expression::PortIn`] has found.
    SendOn {
        /// Whither.
        to: IpAddr,
        /// Whether a port was found.
        to_port_found: bool,
    },
    /// The connection has the address of the link that it goes out by as its source.
    Masquerade,
}

/// That packets are of a prefix's family, and their source or destination is inside it,
/// or outside.
#[must_use]
pub fn match_address(source: bool, net: IpNet, inside: bool) -> [Expression<'static>; 2] {
    [Expression::IsIpv4(matches!(net, IpNet::V4(_))), Expression::Address { source, net, inside }]
}

/// That packets go to an address of this host's that others can reach, so none of
/// 127.0.0.0/8; IPv6 has one such, `::1`, which nobody else can send to.
#[must_use]
pub fn match_local_destination(ipv4: bool) -> [Expression<'static>; 3] {
    let loopback = match ipv4 {
        true => IpNet::V4(ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::new(127, 0, 0, 0), 8)),
        false => IpNet::V6(ipnet::Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128)),
    };
    let [family, address] = match_address(false, loopback, false);
    [family, address, Expression::ToThisHost]
}

impl Expression<'_> {
    /// Writes what asks; what acts is [`Expression::write_action`]'s.
    pub(super) fn write(self, m: &mut Attributes<'_>) {
        match self {
            Self::CameInByOneOf(set) => {
                meta(m, IIFNAME);
                lookup(m, set, Found::Goes);
            }
            Self::CameInByNoneOf(set) => {
                meta(m, IIFNAME);
                lookup(m, set, Found::Ends);
            }
            Self::LinkAndSourceIn { set, ipv4 } => {
                meta(m, IIFNAME);
                let (offset, bytes) = if ipv4 { (12, 4) } else { (8, 16) };
                load(m, BEHIND_LINK, 1, offset, bytes);
                lookup(m, set, Found::Goes);
            }
            Self::GoesOutNotBy(link) => {
                let mut name = [0; 16];
                for (to, from) in name.iter_mut().zip(link.bytes().take(15)) {
                    *to = from;
                }
                meta(m, 7);
                compare(m, OTHER, &name);
            }
            Self::IsIpv4(ipv4) => {
                meta(m, 15);
                compare(m, EQUAL, &[if ipv4 { IPV4 } else { IPV6 }]);
            }
            Self::Protocol(protocol) => {
                meta(m, 16);
                compare(m, EQUAL, &[protocol]);
            }
            Self::IcmpType(kind) => {
                load(m, KEY, 2, 0, 1);
                compare(m, EQUAL, &[kind]);
            }
            Self::Address { source, net, inside } => address(m, source, net, inside),
            Self::ToThisHost => {
                expression(m, "fib", |m| {
                    m.be32(1, KEY);
                    // NFT_FIB_RESULT_ADDRTYPE of NFTA_FIB_F_DADDR.
                    m.be32(2, 3);
                    m.be32(3, 2);
                });
                compare(m, EQUAL, &LOCAL.to_ne_bytes());
            }
            Self::PortFrom(first, last) => port_between(m, first, last),
            Self::OfKnownConnection => of_known_connection(m),
            Self::PortIn(map) => {
                load(m, KEY, 2, 2, 2);
                lookup(m, map, Found::Gives(PORT));
            }
            Self::CountByLink(map) => {
                meta(m, IIFNAME);
                expression(m, "objref", |m| {
                    m.be32(3, KEY);
                    m.string(4, map);
                });
            }
            Self::Decide(_) | Self::Refuse(_) | Self::SendOn { .. } | Self::Masquerade => {
                self.write_action(m);
            }
        }
    }

    fn write_action(self, m: &mut Attributes<'_>) {
        match self {
            Self::Decide(verdict) => expression(m, "immediate", |m| {
                // NFT_REG_VERDICT; NF_DROP 0, NF_ACCEPT 1.
                m.be32(1, 0);
                let code = if verdict == Verdict::Accept { 1 } else { 0 };
                m.nest(2, |m| m.nest(2, |m| m.be32(1, code)));
            }),
            Self::Refuse(IcmpReject::Prohibited) => expression(m, "reject", |m| {
                // NFT_REJECT_ICMPX_UNREACH, NFT_REJECT_ICMPX_ADMIN_PROHIBITED.
                m.be32(1, 2);
                m.put(2, &[3]);
            }),
            Self::SendOn { to, to_port_found } => {
                let (family, address) = match to {
                    IpAddr::V4(to) => (IPV4, to.octets().to_vec()),
                    IpAddr::V6(to) => (IPV6, to.octets().to_vec()),
                };
                expression(m, "immediate", |m| {
                    m.be32(1, ADDRESS);
                    m.nest(2, |m| m.put(1, &address));
                });
                expression(m, "nat", |m| {
                    // NFT_NAT_DNAT.
                    m.be32(1, 1);
                    m.be32(2, family.into());
                    m.be32(3, ADDRESS);
                    if to_port_found {
                        m.be32(5, PORT);
                    }
                });
            }
            Self::Masquerade => expression(m, "masq", |_| {}),
            // All others ask.
            _ => {}
        }
    }
}

fn port_between(m: &mut Attributes<'_>, first: u16, last: u16) {
    load(m, KEY, 2, 2, 2);
    expression(m, "range", |m| {
        m.be32(1, KEY);
        m.be32(2, EQUAL);
        m.nest(3, |m| m.put(1, &first.to_be_bytes()));
        m.nest(4, |m| m.put(1, &last.to_be_bytes()));
    });
}

fn of_known_connection(m: &mut Attributes<'_>) {
    // Established 2, related 4: NF_CT_STATE_BIT.
    let known = 0x06_u32.to_ne_bytes();
    expression(m, "ct", |m| {
        m.be32(1, KEY);
        m.be32(2, 0);
    });
    masked(m, 4, &known);
    compare(m, OTHER, &[0; 4]);
}

fn address(m: &mut Attributes<'_>, source: bool, net: IpNet, inside: bool) {
    let (offset, address, mask) = match net.trunc() {
        IpNet::V4(net) => (
            if source { 12 } else { 16 },
            net.addr().octets().to_vec(),
            net.netmask().octets().to_vec(),
        ),
        IpNet::V6(net) => (
            if source { 8 } else { 24 },
            net.addr().octets().to_vec(),
            net.netmask().octets().to_vec(),
        ),
    };
    let bytes = if address.len() == 4 { 4 } else { 16 };
    load(m, KEY, 1, offset, bytes);
    masked(m, bytes, &mask);
    compare(m, if inside { EQUAL } else { OTHER }, &address);
}

/// Keeps the bits of the mask.
fn masked(m: &mut Attributes<'_>, bytes: u32, mask: &[u8]) {
    expression(m, "bitwise", |m| {
        m.be32(1, KEY);
        m.be32(2, KEY);
        m.be32(3, bytes);
        m.nest(4, |m| m.put(1, mask));
        m.nest(5, |m| m.put(1, &[0; 16][..mask.len()]));
    });
}

fn expression(m: &mut Attributes<'_>, name: &str, data: impl FnOnce(&mut Attributes<'_>)) {
    m.nest(1, |m| {
        m.string(1, name);
        m.nest(2, data);
    });
}

fn meta(m: &mut Attributes<'_>, key: u32) {
    expression(m, "meta", |m| {
        m.be32(1, KEY);
        m.be32(2, key);
    });
}

fn compare(m: &mut Attributes<'_>, how: u32, with: &[u8]) {
    expression(m, "cmp", |m| {
        m.be32(1, KEY);
        m.be32(2, how);
        m.nest(3, |m| m.put(1, with));
    });
}

/// Loads a part of the packet, counted from the network (1) or transport header (2).
fn load(m: &mut Attributes<'_>, into: u32, base: u32, offset: u32, bytes: u32) {
    expression(m, "payload", |m| {
        m.be32(1, into);
        m.be32(2, base);
        m.be32(3, offset);
        m.be32(4, bytes);
    });
}

/// What it means that a key is in a set.
#[derive(Clone, Copy)]
enum Found {
    /// The rule goes on.
    Goes,
    /// The rule ends here (`NFT_LOOKUP_F_INV`).
    Ends,
    /// The rule goes on, with the map's value in this register.
    Gives(u32),
}

fn lookup(m: &mut Attributes<'_>, set: &str, found: Found) {
    expression(m, "lookup", |m| {
        m.string(1, set);
        m.be32(2, KEY);
        match found {
            Found::Goes => {}
            Found::Ends => m.be32(5, 1),
            Found::Gives(register) => m.be32(3, register),
        }
    });
}
