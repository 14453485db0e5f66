//! Addresses of links, IPv4 and IPv6.
//!
//! IPv6 addresses are added with `IFA_F_NODAD`: conet gives every address out
//! itself, so waiting a second for duplicate detection only delays.
//!
//! Source: `rtnetlink(7)`, Linux `net/ipv4/devinet.c`, `net/ipv6/addrconf.c`.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::{IfName, NetError, Netlink, Object, Op};

/// An address as the kernel lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct AddressEntry {
    /// Interface number of its link.
    pub index: u32,
    /// Address and prefix length.
    pub net: IpNet,
}

impl Netlink {
    /// Adds an address with its prefix length; the kernel adds the route to the
    /// prefix.
    ///
    /// # Errors
    /// EEXIST when the link has it, [`NetError::NoSuchLink`].
    pub fn add_address(&mut self, link: IfName, net: IpNet) -> Result<(), NetError> {
        let message = RouteNetlinkMessage::NewAddress(self.address_message(link, net)?);
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.change(Op::AddAddress, &Object::Address(net, link), message, flags)
    }

    /// Deletes an address; says whether it was there.
    ///
    /// # Errors
    /// [`NetError::NoSuchLink`].
    pub fn delete_address(&mut self, link: IfName, net: IpNet) -> Result<bool, NetError> {
        let message = RouteNetlinkMessage::DelAddress(self.address_message(link, net)?);
        match self.change(Op::DeleteAddress, &Object::Address(net, link), message, 0) {
            Ok(()) => Ok(true),
            Err(e) if e.is_missing() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// All addresses of the namespace, or those of one link.
    ///
    /// # Errors
    /// [`NetError::NoSuchLink`] for an absent link.
    pub fn addresses(&mut self, link: Option<IfName>) -> Result<Vec<AddressEntry>, NetError> {
        let only = link.map(|name| self.index(name)).transpose()?;
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answers = self.dump(Op::ListAddresses, &request)?;
        Ok(answers
            .iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewAddress(message) => read(message),
                _ => None,
            })
            .filter(|entry| only.is_none_or(|index| entry.index == index))
            .collect())
    }

    fn address_message(&mut self, link: IfName, net: IpNet) -> Result<AddressMessage, NetError> {
        let mut message = AddressMessage::default();
        message.header.index = self.index(link)?;
        message.header.prefix_len = net.prefix_len();
        message.header.scope = AddressScope::Universe;
        message.attributes.push(AddressAttribute::Address(net.addr()));
        message.attributes.push(AddressAttribute::Local(net.addr()));
        match net {
            IpNet::V4(v4) => {
                message.header.family = AddressFamily::Inet;
                // A prefix of 31 or 32 bits has no broadcast address (RFC 3021).
                if v4.prefix_len() < 31 {
                    message.attributes.push(AddressAttribute::Broadcast(v4.broadcast()));
                }
            }
            IpNet::V6(_) => {
                message.header.family = AddressFamily::Inet6;
                message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
        }
        Ok(message)
    }
}

fn read(message: &AddressMessage) -> Option<AddressEntry> {
    // IFA_LOCAL is the address itself; IFA_ADDRESS is the far end on a
    // point-to-point link and the same elsewhere. IPv6 sends only the latter.
    let local = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let address = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    });
    let ip: IpAddr = local.or(address)?;
    let net = IpNet::new(ip, message.header.prefix_len).ok()?;
    Some(AddressEntry { index: message.header.index, net })
}
