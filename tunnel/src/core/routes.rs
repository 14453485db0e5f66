//! Which peer an inner address belongs to: longest prefix match, IPv4 and IPv6.

use std::net::IpAddr;

use conet_netsys::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

/// Position of a peer in the core's table; also boringtun's index.
pub(crate) type Slot = u32;

/// Prefixes and their owners. A prefix has one owner.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    v4: PrefixMap<Ipv4Net, Slot>,
    v6: PrefixMap<Ipv6Net, Slot>,
}

impl Routes {
    /// The owner of the longest prefix that holds `address`.
    pub(crate) fn owner(&self, address: IpAddr) -> Option<Slot> {
        match address {
            IpAddr::V4(a) => self.v4.get_lpm(&Ipv4Net::from(a)).map(|(_, &slot)| slot),
            IpAddr::V6(a) => self.v6.get_lpm(&Ipv6Net::from(a)).map(|(_, &slot)| slot),
        }
    }

    /// The longest prefix that holds `address`.
    pub(crate) fn prefix_of(&self, address: IpAddr) -> Option<IpNet> {
        match address {
            IpAddr::V4(a) => self.v4.get_lpm(&Ipv4Net::from(a)).map(|(p, _)| p.into()),
            IpAddr::V6(a) => self.v6.get_lpm(&Ipv6Net::from(a)).map(|(p, _)| p.into()),
        }
    }

    /// The owner of exactly this prefix.
    pub(crate) fn owner_of_prefix(&self, prefix: IpNet) -> Option<Slot> {
        match prefix.trunc() {
            IpNet::V4(p) => self.v4.get(&p).copied(),
            IpNet::V6(p) => self.v6.get(&p).copied(),
        }
    }

    pub(crate) fn insert(&mut self, prefix: IpNet, slot: Slot) {
        match prefix.trunc() {
            IpNet::V4(p) => drop(self.v4.insert(p, slot)),
            IpNet::V6(p) => drop(self.v6.insert(p, slot)),
        }
    }

    pub(crate) fn remove(&mut self, prefix: IpNet) {
        match prefix.trunc() {
            IpNet::V4(p) => drop(self.v4.remove(&p)),
            IpNet::V6(p) => drop(self.v6.remove(&p)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_owns_an_address() {
        let mut routes = Routes::default();
        for (prefix, slot) in [
            ("10.77.0.0/16", 1),
            ("10.77.2.0/24", 2),
            ("10.77.2.9/32", 3),
            ("fd00::/8", 4),
            ("fd00:2::/32", 5),
            ("0.0.0.0/0", 6),
        ] {
            routes.insert(prefix.parse().unwrap(), slot);
        }
        let owner = |a: &str| routes.owner(a.parse().unwrap());
        assert_eq!(owner("10.77.1.1"), Some(1));
        assert_eq!(owner("10.77.2.8"), Some(2));
        assert_eq!(owner("10.77.2.9"), Some(3));
        assert_eq!(owner("8.8.8.8"), Some(6));
        assert_eq!(owner("fd01::1"), Some(4));
        assert_eq!(owner("fd00:2::1"), Some(5));
        assert_eq!(owner("2001:db8::1"), None);
        // Host bits do not make another prefix.
        assert_eq!(routes.owner_of_prefix("10.77.2.1/24".parse().unwrap()), Some(2));
        routes.remove("10.77.2.77/24".parse().unwrap());
        assert_eq!(routes.owner("10.77.2.8".parse().unwrap()), Some(1));
    }
}
