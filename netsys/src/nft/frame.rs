//! nftables' netlink messages, whatever they say.
//!
//! ```text
//! batch    BATCH_BEGIN │ message … │ BATCH_END      one transaction
//! message  nlmsghdr 16 │ nfgenmsg 4 │ attributes (u16 length, u16 type, data, padding)
//! ```
//!
//! netlink headers are in native byte order, everything of netfilter is big-endian,
//! but for the contents of registers, which are as the kernel's code stores them. What a
//! message says is its user's: [`super::Batch`], and the packet lock of moved connections.
//!
//! Sources: `linux/netlink.h`, `linux/netfilter/{nfnetlink,nf_tables}.h`.

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
/// It goes behind those that there are.
const NLM_F_APPEND: u16 = 0x800;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
const NESTED: u16 = 0x8000;
const FAMILY_INET: u8 = 1;

/// What a message does with its object.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Act {
    /// Makes one that must not be there.
    Make,
    /// Adds one behind its like.
    Append,
    /// Removes one that must be there, or asks about it.
    Other,
}

/// One transaction about objects of family `inet`.
#[derive(Debug)]
pub struct Transaction {
    bytes: Vec<u8>,
    sequence: u32,
    /// Where the last message begins.
    last: usize,
}

impl Default for Transaction {
    fn default() -> Self {
        let mut begun = Self { bytes: Vec::new(), sequence: 0, last: 0 };
        begun.write(BATCH_BEGIN, 0, 0, SUBSYSTEM, |_| {});
        begun
    }
}

impl Transaction {
    /// Adds a message; `kind` is one of `NFT_MSG_…`.
    pub fn message(&mut self, kind: u16, act: Act, says: impl FnOnce(&mut Attributes<'_>)) {
        let flags = match act {
            Act::Make => NLM_F_CREATE | NLM_F_EXCL,
            Act::Append => NLM_F_CREATE | NLM_F_APPEND,
            Act::Other => 0,
        };
        self.write(kind | SUBSYSTEM << 8, flags, FAMILY_INET, 0, says);
    }

    /// Messages so far, the beginning included.
    #[must_use]
    pub const fn count(&self) -> u32 {
        self.sequence
    }

    fn write(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        resource: u16,
        says: impl FnOnce(&mut Attributes<'_>),
    ) {
        self.sequence += 1;
        self.last = self.bytes.len();
        write_message(&mut self.bytes, kind, flags, self.sequence, family, resource, says);
    }

    /// The bytes to send, and the sequence number of the acknowledgement: that of the
    /// last message alone, since those of all would not fit the socket's buffer. Errors
    /// come unasked.
    #[must_use]
    pub fn finish(mut self) -> (Vec<u8>, u32) {
        let last = self.sequence;
        if let Some(field) = self.bytes.get_mut(self.last + 6..self.last + 8) {
            let flags = u16::from_ne_bytes([field[0], field[1]]) | NLM_F_ACK;
            field.copy_from_slice(&flags.to_ne_bytes());
        }
        self.write(BATCH_END, 0, 0, SUBSYSTEM, |_| {});
        (self.bytes, last)
    }
}

/// A question outside of a transaction, as [`Transaction::finish`] gives it.
pub(super) fn question(kind: u16, says: impl FnOnce(&mut Attributes<'_>)) -> (Vec<u8>, u32) {
    let mut bytes = Vec::new();
    write_message(&mut bytes, kind | SUBSYSTEM << 8, NLM_F_ACK, 1, FAMILY_INET, 0, says);
    (bytes, 1)
}

/// A question that has many answers, and an end.
pub(super) fn dump(kind: u16, says: impl FnOnce(&mut Attributes<'_>)) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_message(&mut bytes, kind | SUBSYSTEM << 8, NLM_F_DUMP, 1, FAMILY_INET, 0, says);
    bytes
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
#[derive(Debug)]
pub struct Attributes<'b> {
    bytes: &'b mut Vec<u8>,
}

impl Attributes<'_> {
    /// A piece of bytes.
    pub fn put(&mut self, kind: u16, data: &[u8]) {
        self.with(kind, |m| m.bytes.extend_from_slice(data));
    }

    /// A text, with a zero behind.
    pub fn string(&mut self, kind: u16, text: &str) {
        self.with(kind, |m| {
            m.bytes.extend_from_slice(text.as_bytes());
            m.bytes.push(0);
        });
    }

    /// A number.
    pub fn be32(&mut self, kind: u16, number: u32) {
        self.put(kind, &number.to_be_bytes());
    }

    /// Attributes within one.
    pub fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Attributes<'_>)) {
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

/// One of the answers to a question, or its end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Message<'b> {
    /// `NFT_MSG_…`.
    pub(super) kind: u16,
    attributes: &'b [u8],
}

impl<'b> Message<'b> {
    /// All in `bytes`, to the first that is cut short; no errors, and not the end.
    pub(super) fn parse_all(mut bytes: &'b [u8]) -> impl Iterator<Item = Self> {
        std::iter::from_fn(move || {
            loop {
                let (&[l0, l1, l2, l3, kind, subsystem, ..], _) =
                    bytes.split_first_chunk::<16>()?;
                let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
                let message = bytes.get(..length).filter(|message| message.len() >= 16)?;
                bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
                let [low, high] = u16::from_ne_bytes([kind, subsystem]).to_le_bytes();
                if u16::from(high) == SUBSYSTEM {
                    let attributes = message.get(20..)?;
                    return Some(Self { kind: low.into(), attributes });
                }
            }
        })
    }

    /// The data of the first attribute of this kind.
    pub(super) fn attribute(self, kind: u16) -> Option<&'b [u8]> {
        attributes(self.attributes).find(|(found, _)| *found == kind).map(|(_, data)| data)
    }
}

/// Attributes behind each other, to the first that is cut short.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (&[l0, l1, k0, k1], _) = bytes.split_first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let data = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & !NESTED, data))
    })
}

/// The kernel's word on one message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Reply {
    /// Which message.
    pub sequence: u32,
    /// `errno`, positive; zero for an acknowledgement.
    pub error: i32,
}

impl Reply {
    /// Every error and acknowledgement in `bytes`, to the first that is cut short.
    pub fn parse_all(mut bytes: &[u8]) -> impl Iterator<Item = Self> {
        std::iter::from_fn(move || {
            loop {
                let (&[l0, l1, l2, l3, t0, t1, _, _, s0, s1, s2, s3, ..], _) =
                    bytes.split_first_chunk::<16>()?;
                let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
                let message = bytes.get(..length).filter(|message| message.len() >= 16)?;
                bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
                // What is no error is the answer to a question, before its end.
                if [NLMSG_ERROR, NLMSG_DONE].contains(&u16::from_ne_bytes([t0, t1])) {
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
    fn any_reply_ends_without_panic() {
        for length in 0..64u32 {
            for claimed in [0, 1, 15, 16, 17, 20, 36, 64, u32::MAX] {
                let mut bytes = vec![2; length as usize];
                if let Some(field) = bytes.get_mut(..4) {
                    field.copy_from_slice(&claimed.to_ne_bytes());
                }
                assert!(Reply::parse_all(&bytes).count() <= 4);
                for kind in [0, u8::try_from(SUBSYSTEM).unwrap()] {
                    if let Some(field) = bytes.get_mut(4..6) {
                        field.copy_from_slice(&(u16::from(kind) << 8).to_ne_bytes());
                    }
                    for message in Message::parse_all(&bytes) {
                        assert!(attributes(message.attributes).count() <= 16);
                        assert_eq!(message.attribute(77), None);
                    }
                }
            }
        }
    }
}
