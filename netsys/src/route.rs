//! Routes, and permanent neighbour entries.
//!
//! Source: `rtnetlink(7)`, `ip-route(8)`, Linux `net/ipv4/fib_frontend.c`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol,
    RouteScope as KernelScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::{IfName, MacAddr, NetError, Netlink, Object, Op};

/// How far away a destination is (`ip-route(8)`, `scope`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RouteScope {
    /// Behind a gateway, or anywhere.
    #[default]
    Universe,
    /// On the link itself.
    Link,
    /// This host.
    Host,
}

/// What becomes of a packet on a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RouteKind {
    /// It is sent on.
    #[default]
    Unicast,
    /// It is refused, and its sender told (ICMP destination unreachable).
    Unreachable,
}

/// A route to be made, changed or matched, or one that the kernel lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Destination prefix; host bits are cut off.
    pub destination: IpNet,
    /// What becomes of packets to it.
    pub kind: RouteKind,
    /// Next hop; the destination is on the link when absent.
    pub gateway: Option<IpAddr>,
    /// Outgoing link; the kernel finds it by the gateway when absent.
    pub link: Option<IfName>,
    /// Source address that the host prefers on this route.
    pub source: Option<IpAddr>,
    /// Routing table; 254 is `main`.
    pub table: u32,
    /// Scope; IPv6 ignores it.
    pub scope: RouteScope,
    /// The gateway counts as reachable although no address says so.
    pub onlink: bool,
    /// Preference, less is better; the kernel's default when absent (0 for IPv4,
    /// 1024 for IPv6).
    pub metric: Option<u32>,
}

impl Route {
    /// The routing table `main` (`linux/rtnetlink.h`, RT_TABLE_MAIN).
    pub const MAIN: u32 = 254;

    /// A route to a prefix on a link, in table `main`.
    pub fn on_link(destination: IpNet, link: IfName) -> Self {
        Self {
            destination,
            kind: RouteKind::Unicast,
            gateway: None,
            link: Some(link),
            source: None,
            table: Self::MAIN,
            scope: RouteScope::Link,
            onlink: false,
            metric: None,
        }
    }

    /// A route to a prefix through a gateway, in table `main`.
    pub fn via(destination: IpNet, gateway: IpAddr) -> Self {
        Self {
            destination,
            kind: RouteKind::Unicast,
            gateway: Some(gateway),
            link: None,
            source: None,
            table: Self::MAIN,
            scope: RouteScope::Universe,
            onlink: false,
            metric: None,
        }
    }

    /// A route that refuses packets to a prefix, in table `main`, unless a route
    /// of lesser metric takes them.
    pub fn unreachable(destination: IpNet, metric: u32) -> Self {
        Self {
            destination,
            kind: RouteKind::Unreachable,
            gateway: None,
            link: None,
            source: None,
            table: Self::MAIN,
            scope: RouteScope::Universe,
            onlink: false,
            metric: Some(metric),
        }
    }

    /// The default route of the gateway's family, in table `main`.
    pub fn default_via(gateway: IpAddr) -> Self {
        let any = match gateway {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        Self::via(IpNet::new_assert(any, 0), gateway)
    }
}

/// How packets to an address leave the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WayOut {
    /// Number of the link.
    pub link: u32,
    /// Source address that the host chooses.
    pub source: Ipv4Addr,
}

impl Netlink {
    /// Adds a route.
    ///
    /// # Errors
    /// EEXIST when one with that destination, metric and table is there;
    /// ENETUNREACH when the gateway is not reachable.
    pub fn add_route(&mut self, route: &Route) -> Result<(), NetError> {
        let message = RouteNetlinkMessage::NewRoute(self.route_message(Op::AddRoute, route)?);
        let object = Object::Route(route.destination.trunc());
        self.change(Op::AddRoute, &object, message, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Adds a route, or puts it in the place of one with the same destination,
    /// metric and table.
    ///
    /// # Errors
    /// ENETUNREACH when the gateway is not reachable.
    pub fn replace_route(&mut self, route: &Route) -> Result<(), NetError> {
        let message = RouteNetlinkMessage::NewRoute(self.route_message(Op::ReplaceRoute, route)?);
        let object = Object::Route(route.destination.trunc());
        self.change(Op::ReplaceRoute, &object, message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Deletes a route; says whether it was there. Of the fields other than
    /// destination and table, those given must match.
    ///
    /// # Errors
    /// As the kernel refuses; an absent link means an absent route.
    pub fn delete_route(&mut self, route: &Route) -> Result<bool, NetError> {
        let message = match self.route_message(Op::DeleteRoute, route) {
            Ok(mut message) => {
                // RT_SCOPE_NOWHERE matches every scope (fib_table_delete).
                message.header.scope = KernelScope::NoWhere;
                RouteNetlinkMessage::DelRoute(message)
            }
            Err(e) if e.is_missing() => return Ok(false),
            Err(e) => return Err(e),
        };
        let object = Object::Route(route.destination.trunc());
        match self.change(Op::DeleteRoute, &object, message, 0) {
            Ok(()) => Ok(true),
            Err(e) if e.is_missing() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// The unicast and unreachable routes of table `main`, IPv4 then IPv6, without
    /// those that the kernel keeps as a cache.
    ///
    /// # Errors
    /// As the kernel refuses.
    pub fn routes(&mut self) -> Result<Vec<Route>, NetError> {
        let links = self.links()?;
        let name_of = |index| links.iter().find(|l| l.index == index).map(|l| l.name);
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            let answers = self.dump(Op::ListRoutes, &RouteNetlinkMessage::GetRoute(request))?;
            routes.extend(answers.iter().filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRoute(message) => read(message, name_of),
                _ => None,
            }));
        }
        Ok(routes)
    }

    /// Which way the host would send to `to` now; `None` where it would not, or to
    /// itself.
    ///
    /// # Errors
    /// As the kernel refuses; having no route is none.
    pub fn way_to(&mut self, to: Ipv4Addr) -> Result<Option<WayOut>, NetError> {
        let mut request = RouteMessage::default();
        request.header.address_family = AddressFamily::Inet;
        request.header.destination_prefix_length = 32;
        request.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(to)));
        let object = Object::Route(IpAddr::V4(to).into());
        let request = RouteNetlinkMessage::GetRoute(request);
        let answer = match self.one(Op::LookUpRoute, &object, request) {
            Ok(Some(RouteNetlinkMessage::NewRoute(answer))) => answer,
            Ok(_) => return Ok(None),
            // ENETUNREACH, or EHOSTUNREACH, EACCES and EINVAL of routes that refuse.
            Err(NetError::Refused { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        if answer.header.kind != RouteType::Unicast {
            return Ok(None);
        }
        let (mut link, mut source) = (None, None);
        for attribute in &answer.attributes {
            match attribute {
                RouteAttribute::Oif(index) => link = Some(*index),
                RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => source = Some(*v4),
                _ => {}
            }
        }
        Ok(link.zip(source).map(|(link, source)| WayOut { link, source }))
    }

    /// Sets a permanent neighbour entry: `ip` on `link` is at `mac`, with no ARP
    /// or NDP. Replaces an existing one.
    ///
    /// # Errors
    /// [`NetError::NoSuchLink`].
    pub fn set_neighbour(
        &mut self,
        link: IfName,
        ip: IpAddr,
        mac: MacAddr,
    ) -> Result<(), NetError> {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = self.index(link)?;
        message.header.state = NeighbourState::Permanent;
        let address = match ip {
            IpAddr::V4(v4) => {
                message.header.family = AddressFamily::Inet;
                NeighbourAddress::Inet(v4)
            }
            IpAddr::V6(v6) => {
                message.header.family = AddressFamily::Inet6;
                NeighbourAddress::Inet6(v6)
            }
        };
        message.attributes.push(NeighbourAttribute::Destination(address));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        let message = RouteNetlinkMessage::NewNeighbour(message);
        self.change(Op::AddNeighbour, &Object::Neighbour(ip), message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn route_message(&mut self, op: Op, route: &Route) -> Result<RouteMessage, NetError> {
        let mut message = RouteMessage::default();
        let net = route.destination.trunc();
        message.header.address_family = match net {
            IpNet::V4(_) => AddressFamily::Inet,
            IpNet::V6(_) => AddressFamily::Inet6,
        };
        message.header.destination_prefix_length = net.prefix_len();
        // The header holds one byte; the attribute below carries the number.
        message.header.table = RouteHeader::RT_TABLE_UNSPEC;
        message.header.protocol = RouteProtocol::Static;
        message.header.scope = match route.scope {
            RouteScope::Universe => KernelScope::Universe,
            RouteScope::Link => KernelScope::Link,
            RouteScope::Host => KernelScope::Host,
        };
        message.header.kind = match route.kind {
            RouteKind::Unicast => RouteType::Unicast,
            RouteKind::Unreachable => RouteType::Unreachable,
        };
        if route.onlink {
            message.header.flags = RouteFlags::Onlink;
        }
        let attributes = &mut message.attributes;
        attributes.push(RouteAttribute::Destination(net.addr().into()));
        attributes.push(RouteAttribute::Table(route.table));
        attributes.extend(route.gateway.map(|ip| RouteAttribute::Gateway(ip.into())));
        attributes.extend(route.source.map(|ip| RouteAttribute::PrefSource(ip.into())));
        attributes.extend(route.metric.map(RouteAttribute::Priority));
        if let Some(name) = route.link {
            let link = self.link(name)?.ok_or(NetError::NoSuchLink { op, name })?;
            attributes.push(RouteAttribute::Oif(link.index));
        }
        Ok(message)
    }
}

fn read(message: &RouteMessage, name_of: impl Fn(u32) -> Option<IfName>) -> Option<Route> {
    let header = &message.header;
    let kind = match header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::Unreachable => RouteKind::Unreachable,
        _ => return None,
    };
    if header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let any = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let mut route = Route::default_via(any);
    (route.kind, route.gateway) = (kind, None);
    route.table = u32::from(header.table);
    route.onlink = header.flags.contains(RouteFlags::Onlink);
    route.scope = match header.scope {
        KernelScope::Link => RouteScope::Link,
        KernelScope::Host => RouteScope::Host,
        _ => RouteScope::Universe,
    };
    let mut destination = any;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::Gateway(address) => route.gateway = ip(address),
            RouteAttribute::PrefSource(address) => route.source = ip(address),
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Oif(index) => route.link = name_of(*index),
            RouteAttribute::Priority(metric) => route.metric = Some(*metric),
            _ => {}
        }
    }
    route.destination = IpNet::new(destination, header.destination_prefix_length).ok()?;
    (route.table == Route::MAIN).then_some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}
