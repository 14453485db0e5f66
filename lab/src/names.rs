//! What things in a lab are called, and their addresses.
//!
//! ```text
//! root namespace        bridge conet-lan ── one port per host: conet-h1, conet-h2, …
//! namespace conet-hH    eth0  192.0.2.H/24                    (RFC 5737 TEST-NET-1)
//! overlay of host H     10.77.H.0/24, gateway 10.77.H.1
//!   with IPv6           fd77:0:0:H::/64, gateway fd77:0:0:H::1        (RFC 4193)
//! guest conet-hH-gG     10.77.H.(G+1), fd77:0:0:H::(G+1)
//! ```

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use conet_netsys::{IfName, NameError, NetnsName};

/// The LAN's bridge, in the machine's own network namespace, so that a capture
/// there sees what the hosts say to each other.
pub const LAN: &str = "conet-lan";
/// The LAN's prefix length.
pub const LAN_PREFIX: u8 = 24;
/// A host's link to the LAN, inside its namespace.
pub const UPLINK: &str = "eth0";
/// Most hosts of a lab: above it one daemon per host is more than a machine
/// that needs a lab carries.
pub const MAX_HOSTS: u8 = 32;
/// Most guests of a host.
pub const MAX_GUESTS: u8 = 100;

/// A host of the lab, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostId(u8);

impl HostId {
    /// Hosts 1 to `count`.
    pub fn all(count: u8) -> impl Iterator<Item = Self> {
        (1..=count).map(Self)
    }

    /// The number, from 1.
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }

    /// Its address on the LAN.
    #[must_use]
    pub fn lan_address(self) -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, self.0)
    }

    /// The prefix of its guests, as text for the configuration.
    #[must_use]
    pub fn overlay(self) -> String {
        format!("10.77.{}.0/24", self.0)
    }

    /// The same of IPv6.
    #[must_use]
    pub fn overlay6(self) -> String {
        format!("fd77:0:0:{:x}::/64", self.0)
    }

    /// IPv6 address of its guest `number`, counted from 1.
    #[must_use]
    pub fn guest_address6(self, number: u8) -> Ipv6Addr {
        let last = u16::from(number).saturating_add(1);
        Ipv6Addr::new(0xfd77, 0, 0, self.0.into(), 0, 0, 0, last)
    }

    /// Address of its guest `number`, counted from 1.
    #[must_use]
    pub fn guest_address(self, number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.0, number.saturating_add(1))
    }

    /// Name of its guest `number`, counted from 1, and of the guest's namespace.
    #[must_use]
    pub fn guest_name(self, number: u8) -> String {
        format!("{self}-g{number}")
    }

    /// Its network namespace's name.
    ///
    /// # Errors
    ///
    /// None in practice: the name is short and plain.
    pub fn netns(self) -> Result<NetnsName, NameError> {
        NetnsName::new(&self.to_string())
    }

    /// Its port on the bridge.
    ///
    /// # Errors
    ///
    /// None in practice: the name is short and plain.
    pub fn port(self) -> Result<IfName, NameError> {
        IfName::new(&self.to_string())
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "conet-h{}", self.0)
    }
}

/// Whether a namespace or link of this name is the lab's to remove: all
/// `conet-*` but what tests name, `conet-t` and a number, which remove it
/// themselves and may be running.
#[must_use]
pub fn is_lab_name(name: &str) -> bool {
    let test = name.strip_prefix("conet-t").and_then(|rest| rest.bytes().next());
    name.starts_with("conet-") && !test.is_some_and(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_are_those_of_the_design() {
        let second = HostId::all(2).last().unwrap();
        assert_eq!(second.to_string(), "conet-h2");
        assert_eq!(second.lan_address(), Ipv4Addr::new(192, 0, 2, 2));
        assert_eq!(second.overlay(), "10.77.2.0/24");
        assert_eq!(second.guest_name(1), "conet-h2-g1");
        assert_eq!(second.guest_address(1), Ipv4Addr::new(10, 77, 2, 2));
    }

    #[test]
    fn every_host_has_a_valid_name() {
        for host in HostId::all(MAX_HOSTS) {
            assert!(host.netns().is_ok() && host.port().is_ok());
        }
    }

    #[test]
    fn a_lab_removes_its_own() {
        for name in ["conet-h1", "conet-h1-g1", "conet-lan", "conet-test", "conet-anything"] {
            assert!(is_lab_name(name), "{name}");
        }
        for name in ["conet-t4711", "conet", "eth0", "web"] {
            assert!(!is_lab_name(name), "{name}");
        }
    }
}
