//! Segmentation and joining between a TUN device and packets of the path's MTU.
//!
//! A device with a virtio-net header hands over up to 64 KiB of a flow as one packet
//! ([`Outgoing`], cut by [`Outgoing::write`] straight into the place of its datagram)
//! and takes such a packet in pieces ([`Joiner`], which copies headers only). Neither
//! knows a descriptor; both take bytes that anybody may have made.
//!
//! ```text
//! virtio-net header, little endian   IP   TCP/UDP   payload of count × size bytes
//! 0 flags  1 type  2 header length  4 size  6 checksum from  8 checksum at
//! ```
//!
//! Sources: virtio 1.3 §5.1.6, Linux `include/linux/virtio_net.h`,
//! `net/ipv4/tcp_offload.c`, `net/ipv4/udp_offload.c`.

mod checksum;
mod join;
mod split;
#[cfg(any(target_os = "linux", test))]
mod unfinished;

#[cfg(any(target_os = "linux", test))]
pub(crate) use join::{Joined, Joiner};
pub use split::Outgoing;
#[cfg(any(target_os = "linux", test))]
pub(crate) use unfinished::{Unfinished, unfinished};

/// Bytes of the virtio-net header of a TUN device, without `num_buffers`.
pub(crate) const HEADER: usize = 10;

const NEEDS_CHECKSUM: u8 = 1;
const TCP_V4: u8 = 1;
const TCP_V6: u8 = 4;
const UDP: u8 = 5;
/// The flow has negotiated ECN; the rest of the type says what it is.
const ECN: u8 = 0x80;

const PROTO_TCP: u8 = 6;
const PROTO_UDP: u8 = 17;
const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
/// Longest IPv4 or IPv6 header without extensions, and TCP header.
const HEADERS_MAX: usize = 60 + 60;

const FIN: u8 = 1;
const PSH: u8 = 8;
const ACK: u8 = 0x10;
const CWR: u8 = 0x80;

/// A virtio-net header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Header {
    flags: u8,
    kind: u8,
    header_len: u16,
    size: u16,
    checksum_from: u16,
    checksum_at: u16,
}

impl Header {
    fn parse(bytes: &[u8; HEADER]) -> Self {
        let field = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            kind: bytes[1],
            header_len: field(2),
            size: field(4),
            checksum_from: field(6),
            checksum_at: field(8),
        }
    }

    fn emit(&self) -> [u8; HEADER] {
        let mut bytes = [self.flags, self.kind, 0, 0, 0, 0, 0, 0, 0, 0];
        let fields = [self.header_len, self.size, self.checksum_from, self.checksum_at];
        for (place, field) in bytes[2..].chunks_exact_mut(2).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests;
