//! What a host's packet filter does for its guests: which sources they may use, one
//! address for all, ports that lead to guests, and which of the host's own ports guests
//! reach.
//!
//! ```text
//! table inet conet
//!   set guests                  links that guests are behind
//!   set sources4, sources6      each with its guest's addresses
//!   map spoofed                 each with its counter of what the next chain drops
//!   chain sources      filter   from @guests: another's source is dropped and counted,
//!                               before anything else sees the packet
//!   map portsN                  from port to port, of a forward that changes them
//!   chain input        filter   from @guests: known connections, echo, NDP, named
//!                               ports; else refused
//!   chain prerouting   nat      to this host, a forward's port → its guest
//!   chain output       nat      the same, for the host's own programs
//!   chain postrouting  nat      from the guests' prefix, not to it and not into the
//!                               tunnel: by the address of the link that it leaves by;
//!                               from a guest to itself: by the gateway's
//! ```
//!
//! All of it is one table that is replaced as a whole, in one transaction, so packets
//! meet the old rules or the new ones. Connections under way are not touched: what they
//! are translated to is in the kernel's table of connections, not in the rules.
//!
//! What a guest may say without an address of its own is IPv6's: from `::`, while it looks
//! whether its address is free, and from its link's own address, which no host forwards.
//!
//! What it is not: a firewall for the host. It drops nothing that does not come from a
//! guest, and cannot let pass what another table of the host's drops.
//!
//! Counters go over from table to table when the rules change, and to the next daemon; what
//! is dropped between the reading and the change is not counted.
//!
//! *Why by link and not by source* for what guests reach: the source is the guest's word
//! where reverse-path checks are loose. *Why a guest to itself is masked*: a kernel takes
//! nothing from its own address; other guests see each other's addresses.
//!
//! Limits: loopback addresses of the host lead nowhere (a packet to a guest with a
//! source of 127.0.0.1 is not sent), so a forward has none to bind.
//!
//! Sources: `nft(8)`, `conet_netsys::nft`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use conet_netsys::nft::{
    Batch, Chain, ChainKind, Counted, Expression, Hook, IcmpReject, Nft, SetKind, Verdict,
    match_address, match_local_destination,
};
use conet_netsys::{IfName, IpNet, NetError, Netns, Transport};
use ipnet::Ipv6Net;

/// The table's name, in family `inet`. One daemon per network namespace has it.
pub const TABLE: &str = "conet";
/// Most ports in all that forwards may lead to other ports: each is an element of a
/// map, and all are made in one `sendmsg` of at most `net.core.wmem_max` bytes.
pub const MAX_CHANGED_PORTS: usize = 4096;

const GUESTS: &str = "guests";
const SPOOFED: &str = "spoofed";
/// Begins the name of a link's counter.
const COUNTER: &str = "spoofed-";
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// Echo request (RFC 792).
const ECHO: u8 = 8;
/// Echo request (RFC 4443), neighbour solicitation and advertisement (RFC 4861).
const ECHO_AND_NEIGHBOURS: [u8; 3] = [128, 135, 136];
/// Of a link alone (RFC 4291 §2.5.6), and of who has no address yet.
const LINK_LOCAL: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10);
const UNSPECIFIED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 128);
/// `NF_IP_PRI_RAW`: before connections are tracked.
const RAW: i32 = -300;
/// `NF_IP_PRI_NAT_DST`, `NF_IP_PRI_FILTER`, `NF_IP_PRI_NAT_SRC`.
const DESTINATION_NAT: i32 = -100;
const FILTER: i32 = 0;
const SOURCE_NAT: i32 = 100;

/// Ports of one protocol, the last included.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Ports {
    /// TCP or UDP.
    pub transport: Transport,
    /// 1 to 65535.
    pub first: u16,
    /// Not below the first.
    pub last: u16,
}

impl Ports {
    /// Whether there is a port that both have.
    #[must_use]
    pub fn meets(self, other: Self) -> bool {
        self.transport == other.transport && self.first <= other.last && other.first <= self.last
    }

    /// How many they are.
    #[must_use]
    pub fn count(self) -> usize {
        usize::from(self.last.saturating_sub(self.first)) + 1
    }
}

/// Ports of the host that lead to a guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PortForward {
    /// The host's address, no loopback one; all of the guest's family where there is
    /// none.
    pub bind: Option<IpAddr>,
    /// The host's ports.
    pub ports: Ports,
    /// The guest's address, of the same family as `bind`.
    pub to: IpAddr,
    /// The guest's port for the first of the host's; the others follow.
    pub to_first: u16,
}

impl PortForward {
    fn changes_ports(&self) -> bool {
        self.ports.first != self.to_first
    }
}

/// Which of the host's own ports guests reach.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum HostPorts {
    /// Every one; nothing is filtered.
    All,
    /// These. Echo requests are answered in any case.
    Only(Vec<Ports>),
}

/// A guest as its host sees it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GuestLink {
    /// The link at the host's end.
    pub link: IfName,
    /// Sources that it may use.
    pub addresses: Vec<IpAddr>,
}

/// All that the table says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HostRules {
    /// The guests.
    pub guests: Vec<GuestLink>,
    /// The tunnel's device: what goes into it keeps its source.
    pub tunnel: IfName,
    /// The guests' prefixes.
    pub overlays: Vec<IpNet>,
    /// Whether guests use the host's address outside the overlay.
    pub shared_address: bool,
    /// What guests reach of the host itself.
    pub host_ports: HostPorts,
    /// Ports that lead to guests. Where two have a port in common the first counts.
    pub forwards: Vec<PortForward>,
}

impl HostRules {
    /// Whether what is wanted cannot be had without a table. That guests use their own
    /// sources only is seen to by other means as well, if less well.
    #[must_use]
    pub fn is_needed(&self) -> bool {
        self.shared_address || !self.forwards.is_empty() || self.host_ports != HostPorts::All
    }

    fn write(&self, batch: &mut Batch, counted: &BTreeMap<String, Counted>) {
        let names: Vec<_> = self.guests.iter().map(|guest| padded(&guest.link)).collect();
        batch.add_set(GUESTS, SetKind::LinkNames, names.iter().map(|name| (&name[..], None)));
        self.check_sources(batch, &names, counted);
        if let HostPorts::Only(ports) = &self.host_ports {
            input(batch, ports);
        }
        self.destinations(batch);
        self.sources(batch);
    }

    /// `names` are those of the guests' links.
    fn check_sources(
        &self,
        batch: &mut Batch,
        names: &[[u8; 16]],
        counted: &BTreeMap<String, Counted>,
    ) {
        const CHAIN: &str = "sources";
        if self.guests.is_empty() {
            return;
        }
        for (set, kind, ipv4) in SOURCES {
            let pairs = self.guests.iter().zip(names).flat_map(|(guest, name)| {
                let own = guest.addresses.iter().filter(move |address| address.is_ipv4() == ipv4);
                own.map(move |address| match address {
                    IpAddr::V4(address) => [&name[..], &address.octets()].concat(),
                    IpAddr::V6(address) => [&name[..], &address.octets()].concat(),
                })
            });
            // Whoever names an address twice has it once.
            let pairs: BTreeSet<_> = pairs.collect();
            batch.add_set(set, kind, pairs.iter().map(|pair| (&pair[..], None)));
        }
        let counters: Vec<_> = self.guests.iter().map(|guest| counter(guest.link)).collect();
        for name in &counters {
            batch.add_counter(name, counted.get(name).copied().unwrap_or_default());
        }
        let pairs = names.iter().zip(&counters);
        let pairs = pairs.map(|(link, counter)| (&link[..], Some(counter.as_bytes())));
        batch.add_set(SPOOFED, SetKind::LinksToCounters, pairs);

        let accept = Expression::Decide(Verdict::Accept);
        let kind = ChainKind::Filter;
        batch.add_chain(Chain { name: CHAIN, kind, hook: Hook::Prerouting, priority: RAW });
        batch.add_rule(CHAIN, &[Expression::CameInByNoneOf(GUESTS), accept]);
        for (set, _, ipv4) in SOURCES {
            let is_own = Expression::LinkAndSourceIn { set, ipv4 };
            batch.add_rule(CHAIN, &[Expression::IsIpv4(ipv4), is_own, accept]);
        }
        let [family, link_local] = match_address(true, LINK_LOCAL.into(), true);
        batch.add_rule(CHAIN, &[family, link_local, accept]);
        let [family, nobody] = match_address(true, UNSPECIFIED.into(), true);
        batch.add_rule(CHAIN, &[family, nobody, Expression::Protocol(ICMPV6), accept]);
        batch.add_rule(CHAIN, &[Expression::CountByLink(SPOOFED)]);
        batch.add_rule(CHAIN, &[Expression::Decide(Verdict::Drop)]);
    }

    fn destinations(&self, batch: &mut Batch) {
        for (index, forward) in self.forwards.iter().enumerate() {
            if forward.changes_ports() {
                let pairs: Vec<_> = (forward.ports.first..=forward.ports.last)
                    .zip(forward.to_first..=u16::MAX)
                    .map(|(from, to)| (from.to_be_bytes(), to.to_be_bytes()))
                    .collect();
                let pairs = pairs.iter().map(|(from, to)| (&from[..], Some(&to[..])));
                batch.add_set(&map(index), SetKind::PortsToPorts, pairs);
            }
        }
        for (chain, hook) in [("prerouting", Hook::Prerouting), ("output", Hook::Output)] {
            if self.forwards.is_empty() {
                return;
            }
            batch.add_chain(Chain {
                name: chain,
                kind: ChainKind::Nat,
                hook,
                priority: DESTINATION_NAT,
            });
            for (index, forward) in self.forwards.iter().enumerate() {
                let mut rule = match forward.bind {
                    Some(bind) => match_address(false, bind.into(), true).to_vec(),
                    None => match_local_destination(forward.to.is_ipv4()).to_vec(),
                };
                let Ports { transport, first, last } = forward.ports;
                rule.push(Expression::Protocol(transport.number()));
                let map = map(index);
                rule.push(match forward.changes_ports() {
                    true => Expression::PortIn(&map),
                    false => Expression::PortFrom(first, last),
                });
                let to_port_found = forward.changes_ports();
                rule.push(Expression::SendOn { to: forward.to, to_port_found });
                batch.add_rule(chain, &rule);
            }
        }
    }

    fn sources(&self, batch: &mut Batch) {
        const CHAIN: &str = "postrouting";
        let to: BTreeSet<IpAddr> = self.forwards.iter().map(|forward| forward.to).collect();
        if to.is_empty() && !self.shared_address {
            return;
        }
        let kind = ChainKind::Nat;
        batch.add_chain(Chain { name: CHAIN, kind, hook: Hook::Postrouting, priority: SOURCE_NAT });
        for guest in to {
            let [family, source] = match_address(true, guest.into(), true);
            let [_, destination] = match_address(false, guest.into(), true);
            batch.add_rule(CHAIN, &[family, source, destination, Expression::Masquerade]);
        }
        for overlay in self.overlays.iter().filter(|_| self.shared_address) {
            let [family, source] = match_address(true, *overlay, true);
            let [_, destination] = match_address(false, *overlay, false);
            let out = Expression::GoesOutNotBy(self.tunnel.as_str());
            batch.add_rule(CHAIN, &[family, source, destination, out, Expression::Masquerade]);
        }
    }
}

fn input(batch: &mut Batch, open: &[Ports]) {
    const CHAIN: &str = "input";
    let accept = Expression::Decide(Verdict::Accept);
    let from_guest = Expression::CameInByOneOf(GUESTS);
    let kind = ChainKind::Filter;
    batch.add_chain(Chain { name: CHAIN, kind, hook: Hook::Input, priority: FILTER });
    batch.add_rule(CHAIN, &[from_guest, Expression::OfKnownConnection, accept]);
    let icmp = ECHO_AND_NEIGHBOURS.map(|kind| (ICMPV6, kind));
    for (protocol, kind) in [(ICMP, ECHO)].into_iter().chain(icmp) {
        let is = [Expression::Protocol(protocol), Expression::IcmpType(kind)];
        batch.add_rule(CHAIN, &[from_guest, is[0], is[1], accept]);
    }
    for ports in open {
        let protocol = Expression::Protocol(ports.transport.number());
        let ports = Expression::PortFrom(ports.first, ports.last);
        batch.add_rule(CHAIN, &[from_guest, protocol, ports, accept]);
    }
    batch.add_rule(CHAIN, &[from_guest, Expression::Refuse(IcmpReject::Prohibited)]);
}

/// The sets of sources, and whether each is of IPv4.
const SOURCES: [(&str, SetKind, bool); 2] =
    [("sources4", SetKind::LinksAndIpv4, true), ("sources6", SetKind::LinksAndIpv6, false)];

/// The name of a link's counter.
fn counter(link: IfName) -> String {
    format!("{COUNTER}{link}")
}

fn map(index: usize) -> String {
    format!("ports{index}")
}

fn padded(name: &IfName) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().zip(name.as_str().bytes()) {
        *to = from;
    }
    bytes
}

/// The table in one host's network namespace.
#[derive(Debug)]
pub struct RuleTable {
    nft: Nft,
    now: Option<HostRules>,
}

impl RuleTable {
    /// Takes the table of the calling thread's namespace, whoever made what is there.
    ///
    /// # Errors
    /// As [`Nft::open`].
    pub fn open() -> Result<Self, NetError> {
        Ok(Self { nft: Nft::open()?, now: None })
    }

    /// Takes the table of `netns`.
    ///
    /// # Errors
    /// As [`Nft::open_in`].
    pub fn open_in(netns: &Netns) -> Result<Self, NetError> {
        Ok(Self { nft: Nft::open_in(netns)?, now: None })
    }

    /// Makes the table what `rules` say, at once; without a table where there would be
    /// nothing in it.
    ///
    /// # Errors
    /// As the kernel refuses; then what was there before is.
    pub fn apply(&mut self, rules: &HostRules) -> Result<(), NetError> {
        if self.now.as_ref() == Some(rules) {
            return Ok(());
        }
        if rules.is_needed() || !rules.guests.is_empty() {
            let counted = self.nft.counters(TABLE)?;
            self.nft.replace_table(TABLE, |batch| rules.write(batch, &counted))?;
        } else {
            // A kernel without nftables has no table either.
            match self.nft.delete_table(TABLE) {
                Err(error) if self.now.is_none() => tracing::debug!(%error, "no rules"),
                other => other.map(drop)?,
            }
        }
        self.now = Some(rules.clone());
        Ok(())
    }

    /// What each link's guest has sent from addresses that are not its own, and was
    /// dropped for it; of earlier tables' time too.
    ///
    /// # Errors
    /// As the kernel refuses.
    pub fn spoofed(&mut self) -> Result<BTreeMap<String, u64>, NetError> {
        let counters = self.nft.counters(TABLE)?.into_iter();
        let of_link = |(name, counted): (String, Counted)| {
            Some((name.strip_prefix(COUNTER)?.to_owned(), counted.packets))
        };
        Ok(counters.filter_map(of_link).collect())
    }

    /// The forwards in force, as far as this value has put them there.
    #[must_use]
    pub fn forwards(&self) -> &[PortForward] {
        self.now.as_ref().map_or(&[], |rules| &rules.forwards)
    }

    /// Removes the table; says whether it was there.
    ///
    /// # Errors
    /// As the kernel refuses.
    pub fn remove(&mut self) -> Result<bool, NetError> {
        self.now = None;
        self.nft.delete_table(TABLE)
    }
}
