//! The addresses of a node's guests: a prefix of IPv4, one of IPv6, or both.
//!
//! Invariants: at least one of them is there; each is a network without host bits, with
//! room for a gateway, which has the first address, and a guest.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use conet_hostinject::machine_mac;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Bits of a prefix of which a card makes an address of its own (RFC 4862 §5.5.3).
const AUTONOMOUS: u8 = 64;

/// The addresses of a node's guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overlay {
    v4: Option<Ipv4Net>,
    v6: Option<Ipv6Net>,
}

/// Why prefixes are no overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidOverlay {
    /// Host bits, or a length outside of the range; of this prefix.
    #[error("not a network that guests can have")]
    Network(usize),
    /// A second prefix of a family; this one.
    #[error("a second prefix of its family")]
    Second(usize),
    /// None at all.
    #[error("no prefix")]
    None,
}

impl Overlay {
    /// The overlay of these prefixes.
    ///
    /// # Errors
    ///
    /// [`InvalidOverlay`].
    pub fn new(prefixes: &[IpNet]) -> Result<Self, InvalidOverlay> {
        let mut overlay = Self { v4: None, v6: None };
        for (index, prefix) in prefixes.iter().enumerate() {
            if !can_be_guests(prefix) {
                return Err(InvalidOverlay::Network(index));
            }
            let before = match *prefix {
                IpNet::V4(net) => overlay.v4.replace(net).is_some(),
                IpNet::V6(net) => overlay.v6.replace(net).is_some(),
            };
            if before {
                return Err(InvalidOverlay::Second(index));
            }
        }
        if prefixes.is_empty() { Err(InvalidOverlay::None) } else { Ok(overlay) }
    }

    /// Its prefix of IPv4.
    #[must_use]
    pub fn v4(&self) -> Option<Ipv4Net> {
        self.v4
    }

    /// Its prefix of IPv6.
    #[must_use]
    pub fn v6(&self) -> Option<Ipv6Net> {
        self.v6
    }

    /// Its prefixes, that of IPv4 first.
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> + use<> {
        self.v4.map(IpNet::V4).into_iter().chain(self.v6.map(IpNet::V6))
    }

    /// The prefix of its that holds all of `prefix`.
    #[must_use]
    pub fn holding(&self, prefix: &IpNet) -> Option<IpNet> {
        self.prefixes().find(|own| own.contains(prefix))
    }

    /// The addresses that guests have as their gateways, the first of each prefix.
    pub fn gateways(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let v4 = self.v4.map(|net| IpAddr::V4(Ipv4Addr::from(u32::from(net.network()) + 1)));
        let v6 = self.v6.map(|net| IpAddr::V6(Ipv6Addr::from(u128::from(net.network()) + 1)));
        v4.into_iter().chain(v6)
    }

    /// Why no guest can have this address, as a remedy; none where one can.
    #[must_use]
    pub fn refuses_guest_at(&self, address: IpAddr) -> Option<&'static str> {
        let Some(prefix) = self.prefixes().find(|net| net.contains(&address)) else {
            let other_family =
                !self.prefixes().any(|net| net.addr().is_ipv4() == address.is_ipv4());
            return Some(match other_family {
                false => "take one of the overlay's",
                true => {
                    "take one of the overlay's, or give that a prefix of this family as well, as \
                     in overlay = [\"10.77.1.0/24\", \"fd77:1::/64\"]"
                }
            });
        };
        let of_v4 = prefix.addr().is_ipv4();
        if address == prefix.network() || self.gateways().any(|gateway| gateway == address) {
            Some(match of_v4 {
                true => "the first and the last are the network's, the second is the gateway's",
                false => "the first is the network's, the second is the gateway's",
            })
        } else if of_v4 && address == prefix.broadcast() {
            Some("the first and the last are the network's, the second is the gateway's")
        } else {
            None
        }
    }

    /// An address of each family for a guest that asks for none, the lowest that is not
    /// taken; nothing where a family is full. A machine has of IPv6 the one that its card
    /// makes of the prefix, where that can be: so a kernel that speaks no DHCPv6 has it too.
    #[must_use]
    pub fn free(&self, is_machine: bool, is_taken: impl Fn(IpAddr) -> bool) -> Vec<IpAddr> {
        let can =
            |address: &IpAddr| self.refuses_guest_at(*address).is_none() && !is_taken(*address);
        let v4 = self.v4.and_then(|net| net.hosts().map(IpAddr::V4).find(can));
        let v6 = self.v6.and_then(|net| {
            let of_card = v4.filter(|_| is_machine && net.prefix_len() <= AUTONOMOUS);
            let of_card = of_card.map(|v4| IpAddr::V6(of_card_at(net, v4)));
            of_card.filter(can).or_else(|| net.hosts().map(IpAddr::V6).find(can))
        });
        // One of a family that is full is none that could be reached as the others are.
        let is_full = self.v4.is_some() != v4.is_some() || self.v6.is_some() != v6.is_some();
        if is_full { Vec::new() } else { v4.into_iter().chain(v6).collect() }
    }
}

/// What the card of a machine with this first address makes of a prefix (RFC 4291,
/// appendix A).
fn of_card_at(net: Ipv6Net, first: IpAddr) -> Ipv6Addr {
    let [a, b, c, d, e, f] = machine_mac(&[first]).0;
    let mut octets = net.network().octets();
    octets[8..].copy_from_slice(&[a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    Ipv6Addr::from(octets)
}

fn can_be_guests(prefix: &IpNet) -> bool {
    let address = prefix.addr();
    let lengths = if address.is_ipv4() { 8..=30 } else { 16..=126 };
    let link_local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
    // The unspecified and loopback addresses are of ::/16, 0.0.0.0/8 and 127.0.0.0/8.
    let is_nobodys = match address {
        IpAddr::V4(address) => matches!(address.octets()[0], 0 | 127) || address.octets()[0] >= 224,
        IpAddr::V6(address) => address.segments()[0] == 0 || address.is_multicast(),
    };
    address == prefix.network()
        && lengths.contains(&prefix.prefix_len())
        && !link_local
        && !is_nobodys
}

impl fmt::Display for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, prefix) in self.prefixes().enumerate() {
            write!(f, "{}{prefix}", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(prefixes: &[&str]) -> Result<Overlay, InvalidOverlay> {
        Overlay::new(&prefixes.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>())
    }

    #[test]
    fn an_overlay_has_a_prefix_of_a_family_once() {
        let both = overlay(&["fd77:1::/64", "10.77.1.0/24"]).unwrap();
        assert_eq!(both.to_string(), "10.77.1.0/24, fd77:1::/64");
        let gateways: Vec<_> = both.gateways().map(|gateway| gateway.to_string()).collect();
        assert_eq!(gateways, ["10.77.1.1", "fd77:1::1"]);
        for (prefixes, error) in [
            (&[][..], InvalidOverlay::None),
            (&["10.77.1.0/24", "10.77.2.0/24"], InvalidOverlay::Second(1)),
            (&["fd77:1::/64", "fd77:2::/64"], InvalidOverlay::Second(1)),
            (&["10.77.1.0/24", "fd77:1::1/64"], InvalidOverlay::Network(1)),
            (&["fd77::/127"], InvalidOverlay::Network(0)),
            (&["fe80::/64"], InvalidOverlay::Network(0)),
            (&["ff05::/64"], InvalidOverlay::Network(0)),
            (&["::/96"], InvalidOverlay::Network(0)),
            (&["224.0.0.0/8"], InvalidOverlay::Network(0)),
            (&["127.0.0.0/8"], InvalidOverlay::Network(0)),
            (&["10.77.1.0/31"], InvalidOverlay::Network(0)),
        ] {
            assert_eq!(overlay(prefixes), Err(error), "{prefixes:?}");
        }
    }

    #[test]
    fn a_guest_is_given_a_free_address_of_each_family() {
        let both = overlay(&["10.77.1.0/30", "fd77:1::/64"]).unwrap();
        let free = |overlay: &Overlay, is_machine, taken: &[&str]| -> Vec<String> {
            let is_taken = |address: IpAddr| taken.contains(&address.to_string().as_str());
            overlay.free(is_machine, is_taken).iter().map(ToString::to_string).collect()
        };
        assert_eq!(free(&both, false, &[]), ["10.77.1.2", "fd77:1::2"]);
        assert_eq!(free(&both, false, &["fd77:1::2", "fd77:1::3"]), ["10.77.1.2", "fd77:1::4"]);
        assert_eq!(free(&both, true, &[]), ["10.77.1.2", "fd77:1::aff:fe4d:102"]);
        assert!(free(&both, false, &["10.77.1.2"]).is_empty(), "one is full");
        let narrow = overlay(&["10.77.1.0/24", "fd77:1::/112"]).unwrap();
        assert_eq!(free(&narrow, true, &[]), ["10.77.1.2", "fd77:1::2"]);
        let six = overlay(&["fd77:1::/126"]).unwrap();
        assert_eq!(free(&six, true, &["fd77:1::2"]), ["fd77:1::3"]);
        assert!(free(&six, false, &["fd77:1::2", "fd77:1::3"]).is_empty());
        for (address, said) in [
            ("fd77:1::", Some("the first is the network's")),
            ("fd77:1::1", Some("the second is the gateway's")),
            ("fd77:1::3", None),
            ("fd77:2::2", Some("take one of the overlay's")),
            ("10.77.1.2", Some("a prefix of this family")),
        ] {
            let refusal = six.refuses_guest_at(address.parse().unwrap());
            assert_eq!(refusal.is_some(), said.is_some(), "{address}");
            assert!(refusal.unwrap_or_default().contains(said.unwrap_or_default()), "{address}");
        }
    }
}
