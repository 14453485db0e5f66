//! The netlink messages of the packet lock, and nothing else of nftables.
//!
//! ```text
//! batch    BATCH_BEGIN │ message … │ BATCH_END      one transaction
//! message  nlmsghdr 16 │ nfgenmsg 4 │ attributes (u16 length, u16 type, data, padding)
//! ```
//!
//! netlink headers are in native byte order, everything of netfilter is big-endian.
//! Sources: `linux/netlink.h`, `linux/netfilter/{nfnetlink,nf_tables}.h`.

/// Set of IPv4 flows.
pub(super) const SET_4: &str = "v4";
/// Set of IPv6 flows.
pub(super) const SET_6: &str = "v6";

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const SUBSYSTEM: u16 = 10;
const NESTED: u16 = 0x8000;

const NEWTABLE: u16 = 0;
const NEWCHAIN: u16 = 3;
const NEWRULE: u16 = 6;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;
const DELSETELEM: u16 = 14;

const FAMILY_INET: u8 = 1;
/// `NFT_TABLE_F_OWNER`: the table lives as long as the socket that made it.
const TABLE_OWNER: u32 = 2;
const HOOK_INPUT: u32 = 1;
const HOOK_OUTPUT: u32 = 3;
/// Before everything else, `NF_IP_PRI_RAW`.
const PRIORITY: i32 = -300;
/// First 32-bit register; the key is put together from here on.
const REG: u32 = 8;

/// One transaction under construction.
#[derive(Debug)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    fn new() -> Self {
        let mut batch = Self { bytes: Vec::new(), sequence: 0 };
        batch.message(BATCH_BEGIN, 0, 0, SUBSYSTEM, |_| {});
        batch
    }

    /// The table with its sets, chains and rules.
    pub(super) fn prepare(table: &str) -> Self {
        let mut batch = Self::new();
        batch.make(NEWTABLE, |m| {
            m.string(1, table);
            m.be32(2, TABLE_OWNER);
        });
        for (id, (set, key)) in (1..).zip([(SET_4, 4 + 4 + 4), (SET_6, 16 + 16 + 4)]) {
            batch.make(NEWSET, |m| {
                m.string(1, table);
                m.string(2, set);
                m.be32(3, 0);
                // The key's type is for nft(8) to print; the kernel knows its length.
                m.be32(4, 0);
                m.be32(5, key);
                m.be32(10, id);
            });
        }
        for (chain, hook) in [("in", HOOK_INPUT), ("out", HOOK_OUTPUT)] {
            batch.make(NEWCHAIN, |m| {
                m.string(1, table);
                m.string(3, chain);
                m.nest(4, |m| {
                    m.be32(1, hook);
                    m.be32(2, PRIORITY.cast_unsigned());
                });
                m.string(7, "filter");
            });
            for (family, set) in [(2, SET_4), (10, SET_6)] {
                batch.make(NEWRULE, |m| {
                    m.string(1, table);
                    m.string(2, chain);
                    m.nest(4, |m| drop_members(m, family, set));
                });
            }
        }
        batch
    }

    /// Adds keys to a set; refused as a whole if one is there.
    pub(super) fn add_elements(table: &str, set: &str, keys: &[&[u8]]) -> Self {
        let mut batch = Self::new();
        batch.make(NEWSETELEM, |m| elements(m, table, set, keys));
        batch
    }

    /// Takes keys out of a set; refused as a whole if one is not there.
    pub(super) fn delete_elements(table: &str, set: &str, keys: &[&[u8]]) -> Self {
        let mut batch = Self::new();
        batch.message(DELSETELEM | SUBSYSTEM << 8, NLM_F_ACK, FAMILY_INET, 0, |m| {
            elements(m, table, set, keys);
        });
        batch
    }

    fn make(&mut self, kind: u16, attributes: impl FnOnce(&mut Attributes<'_>)) {
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        self.message(kind | SUBSYSTEM << 8, flags, FAMILY_INET, 0, attributes);
    }

    fn message(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        resource: u16,
        attributes: impl FnOnce(&mut Attributes<'_>),
    ) {
        let start = self.bytes.len();
        self.sequence += 1;
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        self.bytes.extend(self.sequence.to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        attributes(&mut Attributes { bytes: &mut self.bytes });
        let length = u32::try_from(self.bytes.len() - start).unwrap_or(u32::MAX);
        if let Some(field) = self.bytes.get_mut(start..start + 4) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
    }

    /// The bytes to send, and the sequence number of the last acknowledgement.
    pub(super) fn finish(mut self) -> (Vec<u8>, u32) {
        let last = self.sequence;
        self.message(BATCH_END, 0, 0, SUBSYSTEM, |_| {});
        (self.bytes, last)
    }
}

fn elements(m: &mut Attributes<'_>, table: &str, set: &str, keys: &[&[u8]]) {
    m.string(1, table);
    m.string(2, set);
    m.nest(3, |m| {
        for key in keys {
            // A list element holds a key, a key holds a value.
            m.nest(1, |m| m.nest(1, |m| m.put(1, key)));
        }
    });
}

/// `meta nfproto FAMILY meta l4proto tcp ADDRESSES . PORTS @SET drop`.
fn drop_members(m: &mut Attributes<'_>, family: u8, set: &str) {
    const NFPROTO: u32 = 15;
    const L4PROTO: u32 = 16;
    const NETWORK: u32 = 1;
    const TRANSPORT: u32 = 2;
    // Where the addresses lie in the header, and how many registers they fill.
    let (offset, length) = if family == 2 { (12, 8) } else { (8, 32) };
    for (key, value) in [(NFPROTO, family), (L4PROTO, 6)] {
        expression(m, "meta", |m| {
            m.be32(1, REG);
            m.be32(2, key);
        });
        expression(m, "cmp", |m| {
            m.be32(1, REG);
            m.be32(2, 0);
            m.nest(3, |m| m.put(1, &[value]));
        });
    }
    for (base, offset, length, register) in
        [(NETWORK, offset, length, REG), (TRANSPORT, 0, 4, REG + length / 4)]
    {
        expression(m, "payload", |m| {
            m.be32(1, register);
            m.be32(2, base);
            m.be32(3, offset);
            m.be32(4, length);
        });
    }
    expression(m, "lookup", |m| {
        m.string(1, set);
        m.be32(2, REG);
    });
    expression(m, "immediate", |m| {
        m.be32(1, 0);
        // NF_DROP is 0.
        m.nest(2, |m| m.nest(2, |m| m.be32(1, 0)));
    });
}

fn expression(m: &mut Attributes<'_>, name: &str, data: impl FnOnce(&mut Attributes<'_>)) {
    m.nest(1, |m| {
        m.string(1, name);
        m.nest(2, data);
    });
}

/// Writes attributes behind each other.
struct Attributes<'b> {
    bytes: &'b mut Vec<u8>,
}

impl Attributes<'_> {
    fn put(&mut self, kind: u16, data: &[u8]) {
        self.with(kind, |m| m.bytes.extend_from_slice(data));
    }

    fn string(&mut self, kind: u16, text: &str) {
        self.with(kind, |m| {
            m.bytes.extend_from_slice(text.as_bytes());
            m.bytes.push(0);
        });
    }

    fn be32(&mut self, kind: u16, number: u32) {
        self.put(kind, &number.to_be_bytes());
    }

    fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Attributes<'_>)) {
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
    /// Every reply in `bytes`; `None` for what is none.
    pub(super) fn parse_all(mut bytes: &[u8]) -> Vec<Option<Self>> {
        let mut replies = Vec::new();
        while let Some((&[l0, l1, l2, l3, t0, t1, _, _, s0, s1, s2, s3, ..], _)) =
            bytes.split_first_chunk::<16>()
        {
            let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
            let Some(message) = bytes.get(..length).filter(|message| message.len() >= 16) else {
                replies.push(None);
                break;
            };
            let error = message.get(16..).and_then(<[u8]>::first_chunk);
            let error = error.map(|error| i32::from_ne_bytes(*error).saturating_neg());
            let sequence = u32::from_ne_bytes([s0, s1, s2, s3]);
            let is_error = u16::from_ne_bytes([t0, t1]) == NLMSG_ERROR;
            replies.push(error.filter(|_| is_error).map(|error| Self { sequence, error }));
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        replies
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_element_message_is_laid_out_as_the_kernel_reads_it() {
        let (bytes, last) = Batch::add_elements("t", "v4", &[&[9; 12]]).finish();
        assert_eq!(last, 2);
        // BATCH_BEGIN, 20 bytes.
        assert_eq!(bytes[..4], 20u32.to_ne_bytes());
        assert_eq!(bytes[18..20], [0, 10]);
        let message = &bytes[20..];
        assert_eq!(message[4..6], (10u16 << 8 | 12).to_ne_bytes());
        assert_eq!(message[16..20], [1, 0, 0, 0]);
        // Table "t\0" of 6 bytes, padded to 8; set "v4\0" of 7, padded to 8.
        assert_eq!(message[20..28], [6, 0, 1, 0, b't', 0, 0, 0]);
        assert_eq!(message[28..36], [7, 0, 2, 0, b'v', b'4', 0, 0]);
        // Elements, element, key, value.
        assert_eq!(message[36..40], [28, 0, 3, 0x80]);
        assert_eq!(message[40..44], [24, 0, 1, 0x80]);
        assert_eq!(message[44..48], [20, 0, 1, 0x80]);
        assert_eq!(message[48..52], [16, 0, 1, 0]);
        assert_eq!(message[52..64], [9; 12]);
        assert_eq!(bytes.len(), 20 + 64 + 20);
    }

    proptest! {
        #[test]
        fn any_reply_ends_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(Reply::parse_all(&bytes).len() <= 7);
        }
    }
}
