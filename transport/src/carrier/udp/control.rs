//! Control messages beside a batch: length of its datagrams, congestion mark.
//!
//! ```text
//! │ length usize │ level i32 │ type i32 │ value, padded to a usize │ next …    `man 3 cmsg`
//! ```
//!
//! Not here: what they mean, and the ones that are received.
//!
//! Invariants: what is written is whole messages, and never more than [`ROOM`] bytes.

use std::net::IpAddr;

/// `struct cmsghdr`.
const HEAD: usize = size_of::<usize>() + 8;
/// Two messages of a value each.
const ROOM: usize = 2 * (HEAD + size_of::<usize>());

/// `linux/in.h`, `linux/in6.h`, `linux/udp.h`.
const IPPROTO_IP: i32 = 0;
const IP_TOS: i32 = 1;
const IPPROTO_IPV6: i32 = 41;
const IPV6_TCLASS: i32 = 67;
const SOL_UDP: i32 = 17;
const UDP_SEGMENT: i32 = 103;
/// ECT(0) (RFC 3168 §5).
const ECT0: i32 = 2;

/// Control messages for one system call.
#[derive(Debug)]
pub(super) struct Control {
    bytes: [u8; ROOM],
    length: usize,
}

impl Control {
    /// For datagrams to `to` that may be marked; each `segment` bytes long, where there are
    /// several.
    pub(super) fn new(to: IpAddr, segment: Option<u16>) -> Self {
        let mut control = Self { bytes: [0; ROOM], length: 0 };
        let is_v4 = match to {
            IpAddr::V4(_) => true,
            IpAddr::V6(ip) => ip.to_ipv4_mapped().is_some(),
        };
        let (level, kind) = if is_v4 { (IPPROTO_IP, IP_TOS) } else { (IPPROTO_IPV6, IPV6_TCLASS) };
        control.push(level, kind, &ECT0.to_ne_bytes());
        if let Some(segment) = segment {
            control.push(SOL_UDP, UDP_SEGMENT, &segment.to_ne_bytes());
        }
        control
    }

    fn push(&mut self, level: i32, kind: i32, value: &[u8]) {
        let at = self.length;
        let (length, space) = (HEAD + value.len(), HEAD + size_of::<usize>());
        let Some(room) = self.bytes.get_mut(at..at + space) else { return };
        let (head, data) = room.split_at_mut(HEAD);
        let (first, rest) = head.split_at_mut(size_of::<usize>());
        first.copy_from_slice(&length.to_ne_bytes());
        let (first, rest) = rest.split_at_mut(4);
        first.copy_from_slice(&level.to_ne_bytes());
        rest.copy_from_slice(&kind.to_ne_bytes());
        if let Some(data) = data.get_mut(..value.len()) {
            data.copy_from_slice(value);
        }
        self.length += space;
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}
