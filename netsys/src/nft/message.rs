//! A table, its chains, rules and sets, in nftables' netlink messages.
//!
//! Sources: `linux/netfilter/nf_tables.h`.

use super::Expression;
use super::frame::{Act, Attributes, Message, Transaction, attributes, dump, question};

const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const NEWRULE: u16 = 6;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;
const NEWOBJ: u16 = 18;
const GETOBJ: u16 = 19;

/// `NFT_SET_MAP`.
const SET_MAP: u32 = 8;
/// `NFT_SET_OBJECT`.
const SET_OBJECTS: u32 = 0x40;
/// `NFT_OBJECT_COUNTER`.
const COUNTER: u32 = 1;
/// Elements in one message: an attribute's length is 16 bits, and an element with an
/// interface's name takes 28 bytes, one of a map of ports as many.
const ELEMENTS_PER_MESSAGE: usize = 1024;

/// What a new table is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum TableFlags {
    /// Anybody's.
    Plain,
    /// `NFT_TABLE_F_OWNER | NFT_TABLE_F_PERSIST`.
    OwnedAndPersistent,
}

/// Where a chain's rules see packets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "the names are netfilter's")]
pub enum Hook {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

/// What a chain's rules may do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ChainKind {
    /// Let pass or drop.
    Filter,
    /// Translate addresses, asked once for each connection.
    Nat,
}

/// A chain at a hook; what no rule decides is accepted.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    /// Its name.
    pub name: &'static str,
    /// What it may do.
    pub kind: ChainKind,
    /// Where.
    pub hook: Hook,
    /// The lower the earlier (`NF_IP_PRI_*` in `linux/netfilter_ipv4.h`).
    pub priority: i32,
}

/// What a set's keys are, and a map's values.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SetKind {
    /// Names of links, 16 bytes with zeros behind.
    LinkNames,
    /// From port to port, 2 bytes each, big-endian.
    PortsToPorts,
    /// Names of links as above, and an IPv4 address behind each.
    LinksAndIpv4,
    /// The same with an IPv6 address.
    LinksAndIpv6,
    /// From names of links to names of counters, of [`Batch::add_counter`].
    LinksToCounters,
}

impl SetKind {
    /// Key type and length, value type and length; types are those of nft(8), for it to
    /// print, six bits for each part of a key.
    fn layout(self) -> (u32, u32, Option<(u32, u32)>) {
        const LINK: u32 = 41;
        match self {
            Self::LinkNames | Self::LinksToCounters => (LINK, 16, None),
            Self::PortsToPorts => (13, 2, Some((13, 2))),
            Self::LinksAndIpv4 => (LINK << 6 | 7, 20, None),
            Self::LinksAndIpv6 => (LINK << 6 | 8, 32, None),
        }
    }
}

/// What a counter says.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counted {
    /// Packets.
    pub packets: u64,
    /// Bytes of them.
    pub bytes: u64,
}

/// One transaction about one table.
#[derive(Debug)]
pub struct Batch {
    messages: Transaction,
    table: String,
    flags: TableFlags,
    sets: u32,
}

impl Batch {
    pub(super) fn new(table: &str, flags: TableFlags) -> Self {
        Self { messages: Transaction::default(), table: table.to_owned(), flags, sets: 0 }
    }

    pub(super) fn delete_table(&mut self) {
        self.message(DELTABLE, Act::Other, |m, table| m.string(1, table));
    }

    pub(super) fn add_table(&mut self) {
        let flags = match self.flags {
            TableFlags::Plain => 0,
            // NFT_TABLE_F_OWNER 2, NFT_TABLE_F_PERSIST 4.
            TableFlags::OwnedAndPersistent => 6,
        };
        self.message(NEWTABLE, Act::Make, |m, table| {
            m.string(1, table);
            m.be32(2, flags);
        });
    }

    /// Adds a chain.
    pub fn add_chain(&mut self, chain: Chain) {
        self.message(NEWCHAIN, Act::Make, |m, table| {
            m.string(1, table);
            m.string(3, chain.name);
            m.nest(4, |m| {
                m.be32(1, chain.hook as u32);
                m.be32(2, chain.priority.cast_unsigned());
            });
            m.string(7, if chain.kind == ChainKind::Nat { "nat" } else { "filter" });
        });
    }

    /// Adds a rule behind the chain's others.
    pub fn add_rule(&mut self, chain: &'static str, expressions: &[Expression<'_>]) {
        self.message(NEWRULE, Act::Append, |m, table| {
            m.string(1, table);
            m.string(2, chain);
            m.nest(4, |m| {
                for expression in expressions {
                    expression.write(m);
                }
            });
        });
    }

    /// Adds a counter, which has counted so much already.
    pub fn add_counter(&mut self, name: &str, counted: Counted) {
        self.message(NEWOBJ, Act::Make, |m, table| {
            m.string(1, table);
            m.string(2, name);
            m.be32(3, COUNTER);
            m.nest(4, |m| {
                m.put(1, &counted.bytes.to_be_bytes());
                m.put(2, &counted.packets.to_be_bytes());
            });
        });
    }

    /// Adds a set, with pairs of a key and, in a map, a value; a counter's name is one, as
    /// bytes. An empty set is made too.
    pub fn add_set<'k>(
        &mut self,
        name: &str,
        kind: SetKind,
        elements: impl IntoIterator<Item = (&'k [u8], Option<&'k [u8]>)>,
    ) {
        self.sets += 1;
        let id = self.sets;
        let (key_type, key_bytes, data) = kind.layout();
        self.message(NEWSET, Act::Make, |m, table| {
            m.string(1, table);
            m.string(2, name);
            m.be32(
                3,
                match (kind, data) {
                    (SetKind::LinksToCounters, _) => SET_OBJECTS,
                    (_, Some(_)) => SET_MAP,
                    _ => 0,
                },
            );
            m.be32(4, key_type);
            m.be32(5, key_bytes);
            if let Some((data_type, data_bytes)) = data {
                m.be32(6, data_type);
                m.be32(7, data_bytes);
            }
            m.be32(10, id);
            if kind == SetKind::LinksToCounters {
                m.be32(15, COUNTER);
            }
        });
        let elements: Vec<_> = elements.into_iter().collect();
        for some in elements.chunks(ELEMENTS_PER_MESSAGE) {
            self.message(NEWSETELEM, Act::Make, |m, table| {
                m.string(1, table);
                m.string(2, name);
                m.nest(3, |m| {
                    for (key, data) in some {
                        m.nest(1, |m| {
                            m.nest(1, |m| m.put(1, key));
                            match data {
                                Some(name) if kind == SetKind::LinksToCounters => {
                                    m.put(9, &[name, &[0][..]].concat());
                                }
                                Some(data) => m.nest(2, |m| m.put(1, data)),
                                None => {}
                            }
                        });
                    }
                });
            });
        }
    }

    fn message(&mut self, kind: u16, act: Act, says: impl FnOnce(&mut Attributes<'_>, &str)) {
        let table = &self.table;
        self.messages.message(kind, act, |m| says(m, table));
    }

    /// As [`Transaction::finish`].
    pub(super) fn finish(self) -> (Vec<u8>, u32) {
        self.messages.finish()
    }
}

/// The question whether there is a table. It is no part of a batch.
pub(super) fn get_table(name: &str) -> (Vec<u8>, u32) {
    question(GETTABLE, |m| m.string(1, name))
}

/// The question for all counters of a table.
pub(super) fn get_counters(table: &str) -> Vec<u8> {
    dump(GETOBJ, |m| {
        m.string(1, table);
        m.be32(3, COUNTER);
    })
}

/// A counter and its name, if that is what a message says.
pub(super) fn counter(message: Message<'_>) -> Option<(String, Counted)> {
    if message.kind != NEWOBJ {
        return None;
    }
    let name = message.attribute(2)?;
    let name = String::from_utf8(name.strip_suffix(&[0]).unwrap_or(name).to_vec()).ok()?;
    let number = |of: &[u8], kind| {
        let found = attributes(of).find(|(found, _)| *found == kind)?.1;
        found.first_chunk().copied().map(u64::from_be_bytes)
    };
    let data = message.attribute(4)?;
    Some((name, Counted { bytes: number(data, 1)?, packets: number(data, 2)? }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_laid_out_as_the_kernel_reads_it() {
        let mut batch = Batch::new("t", TableFlags::Plain);
        batch.add_set("m", SetKind::PortsToPorts, [(&[7, 208][..], Some(&[0, 22][..]))]);
        let (bytes, last) = batch.finish();
        assert_eq!(last, 3);
        // BATCH_BEGIN and the set, 20 and 20 + 8 + 8 + 7 × 8 − 8 bytes.
        let set = u32::from_ne_bytes(bytes[20..24].try_into().unwrap()) as usize;
        let message = &bytes[20 + set..];
        assert_eq!(message[4..6], (10u16 << 8 | 12).to_ne_bytes());
        assert_eq!(message[36..40], [32, 0, 3, 0x80], "elements");
        assert_eq!(message[40..44], [28, 0, 1, 0x80], "element");
        assert_eq!(message[44..56], [12, 0, 1, 0x80, 6, 0, 1, 0, 7, 208, 0, 0], "key");
        assert_eq!(message[56..68], [12, 0, 2, 0x80, 6, 0, 1, 0, 0, 22, 0, 0], "value");
    }

    #[test]
    fn the_most_elements_fit_an_attribute() {
        for bytes in [16, 2] {
            let key = vec![0; bytes];
            let value = (bytes == 2).then_some(&key[..]);
            let mut batch = Batch::new("t", TableFlags::Plain);
            let kind = if bytes == 2 { SetKind::PortsToPorts } else { SetKind::LinkNames };
            let count = 2 * ELEMENTS_PER_MESSAGE + 1;
            batch.add_set("m", kind, std::iter::repeat_n((&key[..], value), count));
            // BEGIN, the set, three messages.
            assert_eq!(batch.messages.count(), 5);
            assert!(batch.finish().0.len() / count <= 40 && 32 * ELEMENTS_PER_MESSAGE < 1 << 16);
        }
    }
}
