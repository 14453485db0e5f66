//! The bytes of nftables' netlink messages.
//!
//! ```text
//! batch    BATCH_BEGIN │ message … │ BATCH_END      one transaction
//! message  nlmsghdr 16 │ nfgenmsg 4 │ attributes (u16 length, u16 type, data, padding)
//! ```
//!
//! netlink headers are in native byte order, everything of netfilter is big-endian,
//! but for the contents of registers, which are as the kernel's code stores them.
//! Sources: `linux/netlink.h`, `linux/netfilter/{nfnetlink,nf_tables}.h`.

use super::Expression;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
/// A rule goes behind those that there are.
const NLM_F_APPEND: u16 = 0x800;
const NLMSG_ERROR: u16 = 2;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
const NESTED: u16 = 0x8000;

const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const NEWRULE: u16 = 6;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;

const FAMILY_INET: u8 = 1;
/// `NFT_SET_MAP`.
const SET_MAP: u32 = 8;
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
}

impl SetKind {
    /// Key type and length, value type and length; types are those of nft(8), for it to
    /// print.
    fn layout(self) -> (u32, u32, Option<(u32, u32)>) {
        match self {
            Self::LinkNames => (41, 16, None),
            Self::PortsToPorts => (13, 2, Some((13, 2))),
        }
    }
}

/// One transaction about one table.
#[derive(Debug)]
pub struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
    /// Where the last message begins.
    last: usize,
    table: String,
    flags: TableFlags,
    sets: u32,
}

impl Batch {
    pub(super) fn new(table: &str, flags: TableFlags) -> Self {
        let mut batch = Self {
            bytes: Vec::new(),
            sequence: 0,
            last: 0,
            table: table.to_owned(),
            flags,
            sets: 0,
        };
        batch.message(BATCH_BEGIN, 0, 0, SUBSYSTEM, |_, _| {});
        batch
    }

    pub(super) fn delete_table(&mut self) {
        let kind = DELTABLE | SUBSYSTEM << 8;
        self.message(kind, 0, FAMILY_INET, 0, |m, table| m.string(1, table));
    }

    pub(super) fn add_table(&mut self) {
        let flags = match self.flags {
            TableFlags::Plain => 0,
            // NFT_TABLE_F_OWNER 2, NFT_TABLE_F_PERSIST 4.
            TableFlags::OwnedAndPersistent => 6,
        };
        self.make(NEWTABLE, |m, table| {
            m.string(1, table);
            m.be32(2, flags);
        });
    }

    /// Adds a chain.
    pub fn add_chain(&mut self, chain: Chain) {
        self.make(NEWCHAIN, |m, table| {
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
        let kind = NEWRULE | SUBSYSTEM << 8;
        let flags = NLM_F_CREATE | NLM_F_APPEND;
        self.message(kind, flags, FAMILY_INET, 0, |m, table| {
            m.string(1, table);
            m.string(2, chain);
            m.nest(4, |m| {
                for expression in expressions {
                    expression.write(m);
                }
            });
        });
    }

    /// Adds a set, with pairs of a key and, in a map, a value. An empty set is made too.
    pub fn add_set<'k>(
        &mut self,
        name: &str,
        kind: SetKind,
        elements: impl IntoIterator<Item = (&'k [u8], Option<&'k [u8]>)>,
    ) {
        self.sets += 1;
        let id = self.sets;
        let (key_type, key_bytes, data) = kind.layout();
        self.make(NEWSET, |m, table| {
            m.string(1, table);
            m.string(2, name);
            m.be32(3, if data.is_some() { SET_MAP } else { 0 });
            m.be32(4, key_type);
            m.be32(5, key_bytes);
            if let Some((data_type, data_bytes)) = data {
                m.be32(6, data_type);
                m.be32(7, data_bytes);
            }
            m.be32(10, id);
        });
        let elements: Vec<_> = elements.into_iter().collect();
        for some in elements.chunks(ELEMENTS_PER_MESSAGE) {
            self.make(NEWSETELEM, |m, table| {
                m.string(1, table);
                m.string(2, name);
                m.nest(3, |m| {
                    for (key, data) in some {
                        m.nest(1, |m| {
                            m.nest(1, |m| m.put(1, key));
                            if let Some(data) = data {
                                m.nest(2, |m| m.put(1, data));
                            }
                        });
                    }
                });
            });
        }
    }

    fn make(&mut self, kind: u16, attributes: impl FnOnce(&mut Attributes<'_>, &str)) {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.message(kind | SUBSYSTEM << 8, flags, FAMILY_INET, 0, attributes);
    }

    fn message(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        resource: u16,
        attributes: impl FnOnce(&mut Attributes<'_>, &str),
    ) {
        self.sequence += 1;
        self.last = self.bytes.len();
        let table = &self.table;
        write_message(&mut self.bytes, kind, flags, self.sequence, family, resource, |m| {
            attributes(m, table);
        });
    }

    /// The bytes to send, and the sequence number of the acknowledgement: that of the
    /// last message alone, since those of all would not fit the socket's buffer. Errors
    /// come unasked.
    pub(super) fn finish(mut self) -> (Vec<u8>, u32) {
        let last = self.sequence;
        if let Some(field) = self.bytes.get_mut(self.last + 6..self.last + 8) {
            let flags = u16::from_ne_bytes([field[0], field[1]]) | NLM_F_ACK;
            field.copy_from_slice(&flags.to_ne_bytes());
        }
        self.message(BATCH_END, 0, 0, SUBSYSTEM, |_, _| {});
        (self.bytes, last)
    }
}

/// The question whether there is a table. It is no part of a batch.
pub(super) fn get_table(name: &str) -> (Vec<u8>, u32) {
    let mut bytes = Vec::new();
    let kind = GETTABLE | SUBSYSTEM << 8;
    write_message(&mut bytes, kind, NLM_F_ACK, 1, FAMILY_INET, 0, |m| m.string(1, name));
    (bytes, 1)
}

fn write_message(
    bytes: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    resource: u16,
    attributes: impl FnOnce(&mut Attributes<'_>),
) {
    let start = bytes.len();
    bytes.extend([0; 4]);
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    attributes(&mut Attributes { bytes });
    let length = u32::try_from(bytes.len() - start).unwrap_or(u32::MAX);
    if let Some(field) = bytes.get_mut(start..start + 4) {
        field.copy_from_slice(&length.to_ne_bytes());
    }
}

/// Writes attributes behind each other.
pub(super) struct Attributes<'b> {
    bytes: &'b mut Vec<u8>,
}

impl Attributes<'_> {
    pub(super) fn put(&mut self, kind: u16, data: &[u8]) {
        self.with(kind, |m| m.bytes.extend_from_slice(data));
    }

    pub(super) fn string(&mut self, kind: u16, text: &str) {
        self.with(kind, |m| {
            m.bytes.extend_from_slice(text.as_bytes());
            m.bytes.push(0);
        });
    }

    pub(super) fn be32(&mut self, kind: u16, number: u32) {
        self.put(kind, &number.to_be_bytes());
    }

    pub(super) fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Attributes<'_>)) {
        self.with(kind | NESTED, inner);
    }

    fn with(&mut self, kind: u16, inner: impl FnOnce(&mut Attributes<'_>)) {
        let start = self.bytes.len();
        self.bytes.extend([0; 2]);
        self.bytes.extend(kind.to_ne_bytes());
        inner(&mut Attributes { bytes: self.bytes });
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        if let Some(field) = self.bytes.get_mut(start..start + 2) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }
}

/// The kernel's word on one message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Reply {
    /// Which message.
    pub(super) sequence: u32,
    /// `errno`, positive; zero for an acknowledgement.
    pub(super) error: i32,
}

impl Reply {
    /// Every error and acknowledgement in `bytes`, to the first that is cut short.
    pub(super) fn parse_all(mut bytes: &[u8]) -> impl Iterator<Item = Self> {
        std::iter::from_fn(move || {
            loop {
                let (&[l0, l1, l2, l3, t0, t1, _, _, s0, s1, s2, s3, ..], _) =
                    bytes.split_first_chunk::<16>()?;
                let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
                let message = bytes.get(..length).filter(|message| message.len() >= 16)?;
                bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
                // What is no error is the answer to a question, before its end.
                if u16::from_ne_bytes([t0, t1]) == NLMSG_ERROR {
                    let error = message.get(16..).and_then(<[u8]>::first_chunk)?;
                    let error = i32::from_ne_bytes(*error).saturating_neg();
                    let sequence = u32::from_ne_bytes([s0, s1, s2, s3]);
                    return Some(Self { sequence, error });
                }
            }
        })
    }
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
            assert_eq!(batch.sequence, 5);
            assert!(batch.bytes.len() / count <= 40 && 32 * ELEMENTS_PER_MESSAGE < 1 << 16);
        }
    }

    #[test]
    fn any_reply_ends_without_panic() {
        for length in 0..64u32 {
            for claimed in [0, 1, 15, 16, 17, 20, 36, 64, u32::MAX] {
                let mut bytes = vec![2; length as usize];
                if let Some(field) = bytes.get_mut(..4) {
                    field.copy_from_slice(&claimed.to_ne_bytes());
                }
                assert!(Reply::parse_all(&bytes).count() <= 4);
            }
        }
    }
}
