//! Switches of the network stack under `/proc/sys/net`, per namespace.
//!
//! They act on the namespace of the calling thread; use them inside
//! [`crate::Netns::run`] or under [`crate::Netns::enter`].
//!
//! Source: kernel `Documentation/networking/ip-sysctl.rst`.

use std::fs;
use std::path::PathBuf;

use crate::{IfName, NetError, Object, Op};

/// A switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sysctl {
    /// Forward IPv4 packets between links: 0 or 1.
    Ipv4Forward,
    /// Forward IPv6 packets between links: 0 or 1. With 1, router
    /// advertisements are no longer accepted.
    Ipv6Forward,
    /// Answer ARP for what is routed elsewhere: 0 or 1. `None` means all links.
    ProxyArp(Option<IfName>),
    /// Which ARP requests to answer: 0 for every address of the namespace, whatever
    /// link has it, to 8 for none. `None` means all links; the greater of both values
    /// counts.
    ArpIgnore(Option<IfName>),
    /// Check sources by the route back (RFC 3704): 0 no, 1 strict, 2 loose.
    /// `None` means all links; the greater of both values counts.
    RpFilter(Option<IfName>),
    /// Send redirects: 0 or 1. `None` means all links.
    SendRedirects(Option<IfName>),
    /// Switch IPv6 off: 0 or 1. `None` means all links.
    DisableIpv6(Option<IfName>),
    /// Duplicate address detection: 0 off, 1 on. `None` means all links.
    AcceptDad(Option<IfName>),
    /// Take the router advertisements of others: 0 no, 1 unless packets are forwarded, 2
    /// in any case. `None` means all links.
    AcceptRa(Option<IfName>),
    /// Groups whose members may make ICMP echo sockets: `low high`.
    PingGroupRange,
}

impl Sysctl {
    fn path(self) -> PathBuf {
        let on = |family: &str, link: Option<IfName>, leaf: &str| {
            let name = link.as_ref().map_or("all", IfName::as_str);
            PathBuf::from(format!("/proc/sys/net/{family}/conf/{name}/{leaf}"))
        };
        match self {
            Sysctl::Ipv4Forward => "/proc/sys/net/ipv4/ip_forward".into(),
            Sysctl::Ipv6Forward => "/proc/sys/net/ipv6/conf/all/forwarding".into(),
            Sysctl::ProxyArp(link) => on("ipv4", link, "proxy_arp"),
            Sysctl::ArpIgnore(link) => on("ipv4", link, "arp_ignore"),
            Sysctl::RpFilter(link) => on("ipv4", link, "rp_filter"),
            Sysctl::SendRedirects(link) => on("ipv4", link, "send_redirects"),
            Sysctl::DisableIpv6(link) => on("ipv6", link, "disable_ipv6"),
            Sysctl::AcceptDad(link) => on("ipv6", link, "accept_dad"),
            Sysctl::AcceptRa(link) => on("ipv6", link, "accept_ra"),
            Sysctl::PingGroupRange => "/proc/sys/net/ipv4/ping_group_range".into(),
        }
    }

    /// Sets the switch in the namespace of the calling thread.
    ///
    /// # Errors
    /// ENOENT when the kernel or the link lacks it, EINVAL for a bad value.
    pub fn write(self, value: &str) -> Result<(), NetError> {
        let path = self.path();
        fs::write(&path, value)
            .map_err(|e| NetError::refused(Op::WriteSysctl, Object::Path(path), e))
    }

    /// Reads the switch in the namespace of the calling thread, without the
    /// newline.
    ///
    /// # Errors
    /// ENOENT when the kernel or the link lacks it.
    pub fn read(self) -> Result<String, NetError> {
        let path = self.path();
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.trim_end().to_owned()),
            Err(e) => Err(NetError::refused(Op::ReadSysctl, Object::Path(path), e)),
        }
    }
}
