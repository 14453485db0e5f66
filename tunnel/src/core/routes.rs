//! Which peer owns which inner addresses: longest-prefix match.
//!
//! A table of hashes for each length of a prefix that there is, the longest first: one
//! look for each length, whatever their number. Nearly all configurations have one to
//! three lengths; with all 33 of IPv4 a lookup takes some 33 short looks.
//!
//! *Rejected:* a binary trie, which follows a pointer for every bit in which prefixes
//! differ: with 100,000 prefixes that was half of what a packet cost.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::net::IpAddr;

use ipnet::IpNet;

/// Position of a peer in the core's table; also its number in sessions.
pub(crate) type Slot = u32;

/// Prefixes of all peers.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    v4: Table<u32>,
    v6: Table<u128>,
}

impl Routes {
    /// The peer whose longest prefix holds `address`.
    pub(crate) fn owner(&self, address: IpAddr) -> Option<Slot> {
        match address {
            IpAddr::V4(a) => self.v4.longest(a.into()).map(|(_, slot)| slot),
            IpAddr::V6(a) => self.v6.longest(a.into()).map(|(_, slot)| slot),
        }
    }

    /// The longest prefix that holds `address`.
    pub(crate) fn prefix_of(&self, address: IpAddr) -> Option<IpNet> {
        let length = match address {
            IpAddr::V4(a) => self.v4.longest(a.into())?.0,
            IpAddr::V6(a) => self.v6.longest(a.into())?.0,
        };
        IpNet::new(address, length).ok().map(|net| net.trunc())
    }

    /// The owner of exactly this prefix.
    pub(crate) fn owner_of_prefix(&self, prefix: IpNet) -> Option<Slot> {
        match prefix {
            IpNet::V4(p) => self.v4.get(p.addr().into(), p.prefix_len()),
            IpNet::V6(p) => self.v6.get(p.addr().into(), p.prefix_len()),
        }
    }

    pub(crate) fn insert(&mut self, prefix: IpNet, slot: Slot) {
        match prefix {
            IpNet::V4(p) => self.v4.insert(p.addr().into(), p.prefix_len(), slot),
            IpNet::V6(p) => self.v6.insert(p.addr().into(), p.prefix_len(), slot),
        }
    }

    pub(crate) fn remove(&mut self, prefix: IpNet) {
        match prefix {
            IpNet::V4(p) => self.v4.remove(p.addr().into(), p.prefix_len()),
            IpNet::V6(p) => self.v6.remove(p.addr().into(), p.prefix_len()),
        }
    }
}

/// An address as a number.
trait Bits: Copy + Eq + Hash {
    /// The first `length` bits, the others 0.
    fn first(self, length: u8) -> Self;
}

impl Bits for u32 {
    fn first(self, length: u8) -> Self {
        let rest = Self::BITS.saturating_sub(length.into());
        self & Self::MAX.checked_shl(rest).unwrap_or(0)
    }
}

impl Bits for u128 {
    fn first(self, length: u8) -> Self {
        let rest = Self::BITS.saturating_sub(length.into());
        self & Self::MAX.checked_shl(rest).unwrap_or(0)
    }
}

/// Prefixes of one family, by length, the longest first; none of them empty.
#[derive(Debug)]
struct Table<A>(Vec<(u8, Prefixes<A>)>);

type Prefixes<A> = HashMap<A, Slot, BuildHasherDefault<Fold>>;

impl<A> Default for Table<A> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<A: Bits> Table<A> {
    fn longest(&self, address: A) -> Option<(u8, Slot)> {
        self.0.iter().find_map(|(length, prefixes)| {
            prefixes.get(&address.first(*length)).map(|slot| (*length, *slot))
        })
    }

    fn at(&self, length: u8) -> Result<usize, usize> {
        self.0.binary_search_by(|(other, _)| length.cmp(other))
    }

    fn get(&self, address: A, length: u8) -> Option<Slot> {
        let (_, prefixes) = self.0.get(self.at(length).ok()?)?;
        prefixes.get(&address.first(length)).copied()
    }

    fn insert(&mut self, address: A, length: u8, slot: Slot) {
        let at = self.at(length).unwrap_or_else(|at| {
            self.0.insert(at, (length, Prefixes::default()));
            at
        });
        if let Some((_, prefixes)) = self.0.get_mut(at) {
            prefixes.insert(address.first(length), slot);
        }
    }

    fn remove(&mut self, address: A, length: u8) {
        let Ok(at) = self.at(length) else { return };
        if let Some((_, prefixes)) = self.0.get_mut(at) {
            prefixes.remove(&address.first(length));
            if prefixes.is_empty() {
                self.0.remove(at);
            }
        }
    }
}

/// A hash of a number, quick and plain: prefixes are the administrator's choice, not a
/// stranger's, so nobody can make them collide.
#[derive(Debug, Default, Clone, Copy)]
struct Fold(u64);

impl Hasher for Fold {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64((*byte).into());
        }
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(number.into());
    }

    fn write_u64(&mut self, number: u64) {
        // 2^64 over the golden ratio (Knuth 6.4); the upper half is the well mixed one.
        let product = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }

    fn write_u128(&mut self, number: u128) {
        for half in [number >> 64, number & u128::from(u64::MAX)] {
            self.write_u64(u64::try_from(half).unwrap_or_default());
        }
    }

    fn finish(&self) -> u64 {
        self.0
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

    /// Every lookup is that of a list that is gone through from end to end.
    #[test]
    fn any_prefixes_are_found_as_a_list_finds_them() {
        let mut random = conet_testkit::random::Random::new(7);
        let mut routes = Routes::default();
        let mut list: Vec<(IpNet, Slot)> = Vec::new();
        // Few bits, so that prefixes lie in each other.
        let mut address = |v6: bool| {
            let bits = random.below(64);
            match v6 {
                true => IpAddr::from((u128::from(bits) << 122).to_be_bytes()),
                false => IpAddr::from((u32::try_from(bits).unwrap() << 26).to_be_bytes()),
            }
        };
        let mut dice = conet_testkit::random::Random::new(8);
        for round in 0..20_000u32 {
            let at = address(round % 2 == 0);
            let longest = if at.is_ipv6() { 129 } else { 33 };
            let length = [dice.below(8), dice.below(longest)][usize::from(round % 3 == 0)];
            let net = IpNet::new(at, u8::try_from(length).unwrap()).unwrap();
            match dice.below(3) {
                0 => {
                    routes.insert(net, round);
                    list.retain(|(other, _)| *other != net.trunc());
                    list.push((net.trunc(), round));
                }
                1 => {
                    routes.remove(net);
                    list.retain(|(other, _)| *other != net.trunc());
                }
                _ => {}
            }
            let to = address(dice.below(2) == 0);
            let best = list.iter().filter(|(net, _)| net.contains(&to));
            let best = best.max_by_key(|(net, _)| net.prefix_len());
            assert_eq!(routes.owner(to), best.map(|(_, slot)| *slot));
            assert_eq!(routes.prefix_of(to), best.map(|(net, _)| *net));
            let exact = list.iter().find(|(other, _)| *other == net.trunc());
            assert_eq!(routes.owner_of_prefix(net), exact.map(|(_, slot)| *slot));
        }
    }
}
