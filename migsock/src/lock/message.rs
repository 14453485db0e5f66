//! What the packet lock says to nftables; how, is [`conet_netsys::nft::frame`]'s.
//!
//! Sources: `linux/netfilter/nf_tables.h`.

use conet_netsys::nft::frame::{Act, Attributes, Transaction};

/// Set of IPv4 flows.
pub(super) const SET_4: &str = "v4";
/// Set of IPv6 flows.
pub(super) const SET_6: &str = "v6";

const NEWTABLE: u16 = 0;
const NEWCHAIN: u16 = 3;
const NEWRULE: u16 = 6;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;
const DELSETELEM: u16 = 14;

/// `NFT_TABLE_F_OWNER`: the table lives as long as the socket that made it.
const TABLE_OWNER: u32 = 2;
const HOOK_INPUT: u32 = 1;
const HOOK_OUTPUT: u32 = 3;
/// Before everything else, `NF_IP_PRI_RAW`.
const PRIORITY: i32 = -300;
/// First 32-bit register; the key is put together from here on.
const REG: u32 = 8;

/// One transaction under construction.
#[derive(Debug, Default)]
pub(super) struct Batch(Transaction);

impl Batch {
    /// The table with its sets, chains and rules.
    pub(super) fn prepare(table: &str) -> Self {
        let mut batch = Self::default();
        batch.0.message(NEWTABLE, Act::Make, |m| {
            m.string(1, table);
            m.be32(2, TABLE_OWNER);
        });
        for (id, (set, key)) in (1..).zip([(SET_4, 4 + 4 + 4), (SET_6, 16 + 16 + 4)]) {
            batch.0.message(NEWSET, Act::Make, |m| {
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
            batch.0.message(NEWCHAIN, Act::Make, |m| {
                m.string(1, table);
                m.string(3, chain);
                m.nest(4, |m| {
                    m.be32(1, hook);
                    m.be32(2, PRIORITY.cast_unsigned());
                });
                m.string(7, "filter");
            });
            for (family, set) in [(2, SET_4), (10, SET_6)] {
                batch.0.message(NEWRULE, Act::Make, |m| {
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
        let mut batch = Self::default();
        batch.0.message(NEWSETELEM, Act::Make, |m| elements(m, table, set, keys));
        batch
    }

    /// Takes keys out of a set; refused as a whole if one is not there.
    pub(super) fn delete_elements(table: &str, set: &str, keys: &[&[u8]]) -> Self {
        let mut batch = Self::default();
        batch.0.message(DELSETELEM, Act::Other, |m| elements(m, table, set, keys));
        batch
    }

    /// The bytes to send, and the sequence number of the acknowledgement.
    pub(super) fn finish(self) -> (Vec<u8>, u32) {
        self.0.finish()
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
