//! Entries for the fuzz targets of guests' ports: frames, rings and messages as a hostile
//! guest or its VMM makes them.
//!
//! Each takes bytes and returns whatever they are; what it asserts is what must hold then.

use conet_netsys::MacAddr;
use conet_wire::ip;
use pnet_packet::Packet as _;
use pnet_packet::ethernet::EthernetPacket;
use pnet_packet::icmpv6::{Icmpv6Packet, checksum};
use pnet_packet::ipv4::{self, Ipv4Packet};
use pnet_packet::ipv6::Ipv6Packet;
use pnet_packet::udp::{UdpPacket, ipv4_checksum, ipv6_checksum};

use crate::segment::{ANSWER_MAX, ETHERNET, OURS, Segment, Verdict};
use crate::services::Lease;

pub use crate::vhost::fuzz::{vhost_messages, vhost_rings};

const GUEST: MacAddr = MacAddr([2, 0, 10, 77, 1, 2]);

/// Gives a guest's frames to its port: `[how 1] frame`, where the bits of `how` choose what
/// the guest has (1: no IPv6, 2: a /32, 4: no resolvers, 8: the address that its card makes).
///
/// # Panics
/// When an answer is no whole frame of ours with right checksums, or a packet passes that
/// is longer than its frame: that is the finding.
pub fn guest_frame(input: &[u8]) -> Option<Vec<u8>> {
    let (how, frame) = input.split_first()?;
    let own = if how & 8 == 0 { "fd77:1::2" } else { "fd77:1::aff:fe4d:102" };
    let v6 = (how & 1 == 0).then_some([own, "fd77:1::1"]);
    let parse = |text: &str| text.parse().ok();
    let with = |first: &str, which: usize| {
        [Some(first), v6.map(|pair| pair[which])].into_iter().flatten().filter_map(parse).collect()
    };
    let dns = if how & 4 == 0 { &["9.9.9.9", "2620:fe::fe"][..] } else { &[] };
    let lease = Lease {
        addresses: with("10.77.1.2", 0),
        gateways: with("10.77.1.1", 1),
        prefix: if how & 2 == 0 { 24 } else { 32 },
        dns: dns.iter().copied().filter_map(parse).collect(),
        mtu: 1420,
    };
    let mut segment = Segment::new(OURS, GUEST, lease.addresses.clone()).with_services(lease);
    let mut answer = [0; ANSWER_MAX];
    match segment.handle_frame(frame, &mut answer) {
        Verdict::Answer(len) => {
            check(&answer[..len]);
            Some(answer[..len].to_vec())
        }
        Verdict::Packet(len) => {
            assert!(ETHERNET + len <= frame.len());
            None
        }
        Verdict::Drop(_) => None,
    }
}

/// Whether an answer is what a kernel takes.
fn check(frame: &[u8]) {
    let is_right = || {
        let ethernet = EthernetPacket::new(frame)?;
        assert_eq!(ethernet.get_source().octets(), OURS.0);
        let payload = ethernet.payload();
        match ethernet.get_ethertype().0 {
            0x0806 => Some(payload.len() == 28),
            0x0800 => {
                let packet = Ipv4Packet::new(payload)?;
                let udp = UdpPacket::new(packet.payload())?;
                let sum = ipv4_checksum(&udp, &packet.get_source(), &packet.get_destination());
                let is_right = ipv4::checksum(&packet) == packet.get_checksum();
                Some(is_right && udp.get_checksum() == sum)
            }
            0x86dd => {
                let packet = Ipv6Packet::new(payload)?;
                let (from, to) = (packet.get_source(), packet.get_destination());
                let body = packet.payload();
                Some(match packet.get_next_header().0 {
                    17 => {
                        let udp = UdpPacket::new(body)?;
                        udp.get_checksum() == ipv6_checksum(&udp, &from, &to)
                    }
                    _ => {
                        let icmp = Icmpv6Packet::new(body)?;
                        icmp.get_checksum() == checksum(&icmp, &from, &to)
                    }
                })
            }
            _ => Some(false),
        }
    };
    assert_eq!(is_right(), Some(true), "{frame:02x?}");
    let stated = ip::packet_length(frame.get(ETHERNET..).unwrap_or_default());
    assert!(stated.is_err() || stated.is_ok_and(|stated| ETHERNET + stated == frame.len()));
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Seeds that no longer ask anything would guard little.
    #[test]
    fn seeds_of_questions_are_answered() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/guest_frame");
        for (name, is_answered) in [
            ("arp", true),
            ("discover", true),
            ("discover-rapid", true),
            ("request", true),
            ("request-other", true),
            ("release", false),
            ("solicit", true),
            ("request6", true),
            ("confirm6", true),
            ("rebind6", true),
            ("release6", true),
            ("router-solicitation", true),
        ] {
            let seed = std::fs::read(corpus.join(name)).unwrap();
            assert_eq!(guest_frame(&seed).is_some(), is_answered, "{name}");
        }
    }
}
