//! Links: made, changed, listed, deleted.
//!
//! Changes address a link by its name; the kernel resolves it within the one
//! request, so no other process can rename it in between. Only a rename itself
//! goes by index.
//!
//! Source: `rtnetlink(7)`, Linux `net/core/rtnetlink.c` and `drivers/net/veth.c`.

use std::os::fd::{AsFd, AsRawFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoBridge, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};

use crate::{IfName, MacAddr, NetError, Netlink, Netns, Object, Op};

/// A veth pair to be made: two Ethernet links joined back to back.
#[derive(Debug, Clone, Copy)]
pub struct Veth<'a> {
    /// Name of the end in this namespace.
    pub name: IfName,
    /// Name of the other end.
    pub peer: IfName,
    /// Where the other end is born; here when absent.
    pub peer_netns: Option<&'a Netns>,
    /// MTU of both ends in bytes without Ethernet header, 68 to 65535; 1500 when
    /// absent.
    pub mtu: Option<u32>,
    /// Address of this end; random when absent.
    pub mac: Option<MacAddr>,
    /// Address of the other end; random when absent.
    pub peer_mac: Option<MacAddr>,
}

/// A link as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Link {
    /// Interface number, unique in its namespace and not reused soon.
    pub index: u32,
    /// Name.
    pub name: IfName,
    /// Administratively up (IFF_UP).
    pub up: bool,
    /// Up and with a carrier (IFF_RUNNING).
    pub running: bool,
    /// Largest packet in bytes without link header.
    pub mtu: u32,
    /// Ethernet address; absent on links without one, such as TUN.
    pub mac: Option<MacAddr>,
    /// Driver, as `ip -d link` names it (`veth`, `bridge`, `tun`); absent for
    /// hardware and loopback.
    pub kind: Option<Box<str>>,
    /// Index of the bridge or bond that this link belongs to.
    pub master: Option<u32>,
    /// Index of the link below, or of the other end of a veth pair; it counts in
    /// the namespace of that link (IFLA_LINK).
    pub other_end: Option<u32>,
}

impl Netlink {
    /// Makes a veth pair, both ends down.
    ///
    /// # Errors
    /// EEXIST when either name is taken.
    pub fn add_veth(&mut self, veth: &Veth<'_>) -> Result<(), NetError> {
        let mut peer = named(veth.peer);
        peer.attributes.extend(veth.mtu.map(LinkAttribute::Mtu));
        peer.attributes.extend(veth.peer_mac.map(|m| LinkAttribute::Address(m.0.to_vec())));
        peer.attributes
            .extend(veth.peer_netns.map(|ns| LinkAttribute::NetNsFd(ns.as_fd().as_raw_fd())));
        let mut message = named(veth.name);
        message.attributes.extend(veth.mtu.map(LinkAttribute::Mtu));
        message.attributes.extend(veth.mac.map(|m| LinkAttribute::Address(m.0.to_vec())));
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        self.create_link(Op::AddVeth, veth.name, message)
    }

    /// Makes a bridge, down and without ports, that says nothing of its own: it does
    /// not snoop on multicast, for which it would join 224.0.0.106 (RFC 4286).
    ///
    /// # Errors
    /// EEXIST when the name is taken.
    pub fn add_bridge(&mut self, name: IfName) -> Result<(), NetError> {
        let mut message = named(name);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Bridge),
            LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::MulticastSnooping(false)])),
        ]));
        self.create_link(Op::AddBridge, name, message)
    }

    /// Deletes a link; says whether it was there. Deleting one end of a veth
    /// pair deletes both.
    ///
    /// # Errors
    /// EOPNOTSUPP for hardware and loopback.
    pub fn delete_link(&mut self, name: IfName) -> Result<bool, NetError> {
        let message = RouteNetlinkMessage::DelLink(named(name));
        match self.change(Op::DeleteLink, &Object::Link(name), message, 0) {
            Ok(()) => Ok(true),
            Err(e) if e.is_missing() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Deletes this link and no other that has got its name meanwhile; whether it was there.
    ///
    /// # Errors
    /// As the kernel refuses.
    pub fn delete_this_link(&mut self, link: &Link) -> Result<bool, NetError> {
        let mut message = LinkMessage::default();
        message.header.index = link.index;
        let message = RouteNetlinkMessage::DelLink(message);
        match self.change(Op::DeleteLink, &Object::Link(link.name), message, 0) {
            Ok(()) => Ok(true),
            Err(e) if e.is_missing() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// The link of that name, if there is one.
    ///
    /// # Errors
    /// As the kernel refuses.
    pub fn link(&mut self, name: IfName) -> Result<Option<Link>, NetError> {
        let message = RouteNetlinkMessage::GetLink(named(name));
        match self.one(Op::LookUpLink, &Object::Link(name), message) {
            Ok(Some(RouteNetlinkMessage::NewLink(message))) => Ok(read(&message)),
            Ok(_) => Ok(None),
            Err(e) if e.is_missing() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Interface number of the link of that name.
    ///
    /// # Errors
    /// [`NetError::NoSuchLink`].
    pub fn index(&mut self, name: IfName) -> Result<u32, NetError> {
        match self.link(name)? {
            Some(link) => Ok(link.index),
            None => Err(NetError::NoSuchLink { op: Op::LookUpLink, name }),
        }
    }

    /// All links, in the kernel's order.
    ///
    /// # Errors
    /// As the kernel refuses.
    pub fn links(&mut self) -> Result<Vec<Link>, NetError> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.dump(Op::ListLinks, &request)?;
        Ok(answers
            .iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(message) => read(message),
                _ => None,
            })
            .collect())
    }

    /// Sets a link up.
    ///
    /// # Errors
    /// ENODEV when there is none.
    pub fn set_up(&mut self, name: IfName) -> Result<(), NetError> {
        self.set_flags(Op::SetUp, name, LinkFlags::Up)
    }

    /// Sets a link down; its routes vanish.
    ///
    /// # Errors
    /// ENODEV when there is none.
    pub fn set_down(&mut self, name: IfName) -> Result<(), NetError> {
        self.set_flags(Op::SetDown, name, LinkFlags::empty())
    }

    /// Gives a link another name. Kernels before 6.2 demand that it be down.
    ///
    /// # Errors
    /// EEXIST when the name is taken, EBUSY when an old kernel sees it up.
    pub fn rename(&mut self, from: IfName, to: IfName) -> Result<(), NetError> {
        let mut message = named(to);
        message.header.index = self.index(from)?;
        self.change(Op::Rename, &Object::Link(from), RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Makes a link a port of a bridge, or frees it with `None`.
    ///
    /// # Errors
    /// [`NetError::NoSuchLink`] for the bridge, ENODEV for the link.
    pub fn set_master(&mut self, name: IfName, bridge: Option<IfName>) -> Result<(), NetError> {
        let index = bridge.map(|b| self.index(b)).transpose()?.unwrap_or(0);
        self.set_attribute(Op::SetMaster, name, LinkAttribute::Controller(index))
    }

    /// Sets the largest packet in bytes.
    ///
    /// # Errors
    /// EINVAL outside what the driver allows.
    pub fn set_mtu(&mut self, name: IfName, mtu: u32) -> Result<(), NetError> {
        self.set_attribute(Op::SetMtu, name, LinkAttribute::Mtu(mtu))
    }

    /// Sets the Ethernet address.
    ///
    /// # Errors
    /// EADDRNOTAVAIL for a multicast address.
    pub fn set_mac(&mut self, name: IfName, mac: MacAddr) -> Result<(), NetError> {
        self.set_attribute(Op::SetMac, name, LinkAttribute::Address(mac.0.to_vec()))
    }

    /// Moves a link to another namespace; it arrives down, without addresses.
    ///
    /// # Errors
    /// EEXIST when its name is taken there.
    pub fn move_link(&mut self, name: IfName, to: &Netns) -> Result<(), NetError> {
        self.set_attribute(Op::MoveLink, name, LinkAttribute::NetNsFd(to.as_fd().as_raw_fd()))
    }

    fn create_link(&mut self, op: Op, name: IfName, message: LinkMessage) -> Result<(), NetError> {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.change(op, &Object::Link(name), RouteNetlinkMessage::NewLink(message), flags)
    }

    fn set_flags(&mut self, op: Op, name: IfName, flags: LinkFlags) -> Result<(), NetError> {
        let mut message = named(name);
        message.header.flags = flags;
        message.header.change_mask = LinkFlags::Up;
        self.change(op, &Object::Link(name), RouteNetlinkMessage::SetLink(message), 0)
    }

    fn set_attribute(
        &mut self,
        op: Op,
        name: IfName,
        attribute: LinkAttribute,
    ) -> Result<(), NetError> {
        let mut message = named(name);
        message.attributes.push(attribute);
        self.change(op, &Object::Link(name), RouteNetlinkMessage::SetLink(message), 0)
    }
}

fn named(name: IfName) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.as_str().into()));
    message
}

/// `None` for a message without a name that we can hold (there is none such in
/// practice: the kernel checks names by the same rule).
fn read(message: &LinkMessage) -> Option<Link> {
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: IfName::LOOPBACK,
        up: flags.contains(LinkFlags::Up),
        running: flags.contains(LinkFlags::Running),
        mtu: 0,
        mac: None,
        kind: None,
        master: None,
        other_end: None,
    };
    let mut name = None;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = IfName::new(text).ok(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(bytes) => {
                link.mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddr);
            }
            LinkAttribute::Controller(index) => link.master = Some(*index),
            LinkAttribute::Link(index) => link.other_end = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string().into()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link.name = name?;
    Some(link)
}
