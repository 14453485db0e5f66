//! What came out of the device: a packet, or many of one flow in one piece.
//!
//! Invariant: after [`Outgoing::gso`] the lengths of headers and pieces are known and
//! within the packet; nothing after it can fail.

use conet_dataplane::DropReason;
use conet_wire::ip::IpView;

use super::checksum::{Sum, pseudo};
use super::{
    CWR, ECN, FIN, HEADER, Header, NEEDS_CHECKSUM, PROTO_TCP, PROTO_UDP, PSH, TCP_HEADER, TCP_V4,
    TCP_V6, UDP, UDP_HEADER, put16, u16_at, u32_at,
};

/// A packet from the device, to be sent in one or many datagrams.
#[derive(Debug, Clone, Copy)]
pub struct Outgoing<'a> {
    view: IpView<&'a [u8]>,
    plan: Plan,
}

#[derive(Debug, Clone, Copy)]
enum Plan {
    /// As it is.
    Whole,
    /// One packet whose checksum is to be made: from, and where it is put.
    Checksum { from: usize, at: usize },
    /// Pieces of `size` bytes behind headers of `headers`; the transport's begins at
    /// `transport`.
    Pieces { is_tcp: bool, transport: usize, headers: usize, size: usize },
}

impl<'a> Outgoing<'a> {
    /// A packet that is complete.
    ///
    /// # Errors
    /// [`DropReason::Malformed`] when it is no whole IP packet.
    pub fn whole(packet: &'a [u8]) -> Result<Self, DropReason> {
        let view = IpView::new(packet).map_err(|_| DropReason::Malformed)?;
        Ok(Self { view, plan: Plan::Whole })
    }

    /// A virtio-net header and what follows it.
    ///
    /// # Errors
    /// [`DropReason::Malformed`] when the two contradict each other.
    pub fn gso(frame: &'a [u8]) -> Result<Self, DropReason> {
        let (header, packet) = frame.split_first_chunk::<HEADER>().ok_or(DropReason::Malformed)?;
        let whole = Self::whole(packet)?;
        let plan = plan(&Header::parse(header), &whole.view).ok_or(DropReason::Malformed)?;
        Ok(Self { plan, ..whole })
    }

    /// The packet; of many, with headers and lengths of their sum.
    pub fn view(&self) -> &IpView<&'a [u8]> {
        &self.view
    }

    /// How many packets it is.
    pub fn count(&self) -> usize {
        match self.plan {
            Plan::Pieces { headers, size, .. } => {
                (self.view.bytes().len() - headers).div_ceil(size).max(1)
            }
            _ => 1,
        }
    }

    /// Bytes of the packet of that number; none is longer than the first.
    pub fn len_of(&self, index: usize) -> usize {
        let whole = self.view.bytes().len();
        match self.plan {
            Plan::Pieces { headers, size, .. } => {
                headers + (whole - headers).saturating_sub(index * size).min(size)
            }
            _ => whole,
        }
    }

    /// Writes the packet of that number to the beginning of `out`, which is at least
    /// [`Outgoing::len_of`] it.
    pub fn write(&self, index: usize, out: &mut [u8]) {
        let bytes = self.view.bytes();
        let out = &mut out[..self.len_of(index)];
        match self.plan {
            Plan::Whole => out.copy_from_slice(bytes),
            Plan::Checksum { from, at } => {
                out.copy_from_slice(bytes);
                // The field holds the sum of the pseudo-header; UDP has no checksum 0.
                let sum = Sum::default().add(&out[from..]).finish();
                let is_udp = self.view.protocol() == PROTO_UDP;
                put16(out, from + at, if sum == 0 && is_udp { 0xffff } else { sum });
            }
            Plan::Pieces { is_tcp, transport, headers, size } => {
                let start = headers + index * size;
                let (head, body) = out.split_at_mut(headers);
                head.copy_from_slice(&bytes[..headers]);
                body.copy_from_slice(&bytes[start..start + body.len()]);
                let is_last = start + body.len() == bytes.len();
                if is_tcp {
                    finish_tcp(head, transport, index, size, is_last);
                } else {
                    let len = UDP_HEADER + body.len();
                    // No longer than the packet, whose length has 16 bits.
                    put16(head, transport + 4, u16::try_from(len).unwrap_or(u16::MAX));
                }
                finish_ip(out, self.view.is_v6(), transport, index);
                finish_checksum(out, self.view.is_v6(), is_tcp, transport);
            }
        }
    }
}

/// What a header asks for, if that can be.
fn plan(header: &Header, view: &IpView<&[u8]>) -> Option<Plan> {
    let packet = view.bytes();
    let needs_checksum = header.flags & NEEDS_CHECKSUM != 0;
    let (from, at) = (usize::from(header.checksum_from), usize::from(header.checksum_at));
    if header.kind == 0 {
        if !needs_checksum {
            return Some(Plan::Whole);
        }
        let fits = from >= view.header_len() && from + at + 2 <= packet.len();
        return fits.then_some(Plan::Checksum { from, at });
    }
    let is_tcp = match (header.kind & !ECN, view.is_v6()) {
        (TCP_V4, false) | (TCP_V6, true) => true,
        (UDP, _) => false,
        _ => return None,
    };
    // With IPv6 extensions, where the checksum begins says where the transport does.
    let transport = if needs_checksum { from } else { view.header_len() };
    if transport < view.header_len() || view.is_fragment() || header.size == 0 {
        return None;
    }
    let plain = transport == view.header_len();
    let protocol = if is_tcp { PROTO_TCP } else { PROTO_UDP };
    if plain && view.protocol() != protocol || !plain && !view.is_v6() {
        return None;
    }
    let minimum = if is_tcp { TCP_HEADER } else { UDP_HEADER };
    let own = packet.get(transport..).filter(|own| own.len() >= minimum)?;
    let own_len = if is_tcp { usize::from(own[12] >> 4) * 4 } else { UDP_HEADER };
    let headers = transport + own_len;
    let fits = own_len >= minimum && headers < packet.len();
    let size = usize::from(header.size);
    fits.then_some(Plan::Pieces { is_tcp, transport, headers, size })
}

fn finish_tcp(head: &mut [u8], transport: usize, index: usize, size: usize, is_last: bool) {
    let tcp = &mut head[transport..];
    let offset = u32::try_from(index * size).unwrap_or(u32::MAX);
    let sequence = u32_at(tcp, 4).wrapping_add(offset);
    tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
    if !is_last {
        tcp[13] &= !(FIN | PSH);
    }
    if index > 0 {
        tcp[13] &= !CWR;
    }
}

fn finish_ip(packet: &mut [u8], is_v6: bool, transport: usize, index: usize) {
    let len = u16::try_from(packet.len()).unwrap_or(u16::MAX);
    if is_v6 {
        put16(packet, 4, len.saturating_sub(40));
        return;
    }
    put16(packet, 2, len);
    let identification = u16_at(packet, 4).wrapping_add(u16::try_from(index).unwrap_or(0));
    put16(packet, 4, identification);
    put16(packet, 10, 0);
    let sum = Sum::default().add(&packet[..transport]).finish();
    put16(packet, 10, sum);
}

fn finish_checksum(packet: &mut [u8], is_v6: bool, is_tcp: bool, transport: usize) {
    let (protocol, at) = if is_tcp { (PROTO_TCP, 16) } else { (PROTO_UDP, 6) };
    put16(packet, transport + at, 0);
    let len = u16::try_from(packet.len() - transport).unwrap_or(u16::MAX);
    let sum = pseudo(packet, is_v6, protocol, len).add(&packet[transport..]).finish();
    // UDP's 0 would mean that there is none (RFC 768).
    put16(packet, transport + at, if sum == 0 && !is_tcp { 0xffff } else { sum });
}
