use proptest::prelude::*;

use super::*;

const OURS: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const GUEST: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);

fn segment() -> Segment {
    let addresses = ["10.77.1.2", "fd00:1::2"].map(|address| address.parse().unwrap());
    Segment::new(OURS, GUEST, addresses.to_vec())
}

fn frame(to: MacAddr, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = to.0.to_vec();
    frame.extend(GUEST.0);
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

fn arp(operation: u8, from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut bytes = vec![0, 1, 8, 0, 6, 4, 0, operation];
    bytes.extend(GUEST.0);
    bytes.extend(from);
    bytes.extend([0; 6]);
    bytes.extend(to);
    frame(MacAddr([0xff; 6]), 0x0806, &bytes)
}

/// A neighbour solicitation, to the solicited-node group of `target`.
fn solicit(from: &str, target: &str, hops: u8) -> Vec<u8> {
    let (from, target): (Ipv6Addr, Ipv6Addr) = (from.parse().unwrap(), target.parse().unwrap());
    let mut group = "ff02::1:ff00:0".parse::<Ipv6Addr>().unwrap().octets();
    group[13..].copy_from_slice(&target.octets()[13..]);
    let mut icmp = vec![135, 0, 0, 0, 0, 0, 0, 0];
    icmp.extend(target.octets());
    icmp.extend([1, 1]);
    icmp.extend(GUEST.0);
    let sum = checksum(&Icmpv6Packet::new(&icmp).unwrap(), &from, &group.into());
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0, 0, 32, 58, hops];
    packet.extend(from.octets());
    packet.extend(group);
    packet.extend(icmp);
    frame(MacAddr([0x33, 0x33, 0xff, group[13], group[14], group[15]]), 0x86dd, &packet)
}

fn ipv4(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 24, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(from);
    packet.extend(to);
    packet.extend(*b"data");
    let sum = ip::checksum(&packet[..20], 0);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

fn judge(frame: &[u8]) -> (Verdict, [u8; ANSWER_MAX]) {
    let mut answer = [0; ANSWER_MAX];
    (segment().handle_frame(frame, &mut answer), answer)
}

#[test]
fn everybody_but_the_guest_is_at_our_address() {
    for asked in [[10, 77, 1, 1], [10, 77, 1, 9], [8, 8, 8, 8]] {
        let (verdict, answer) = judge(&arp(1, [10, 77, 1, 2], asked));
        assert_eq!(verdict, Verdict::Answer(42));
        let mut expected = GUEST.0.to_vec();
        expected.extend(OURS.0);
        expected.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        expected.extend(OURS.0);
        expected.extend(asked);
        expected.extend(GUEST.0);
        expected.extend([10, 77, 1, 2]);
        assert_eq!(answer[..42], expected);
    }
}

#[test]
fn who_wants_to_hear_nothing_hears_nothing() {
    for (name, question) in [
        ("its own address", arp(1, [10, 77, 1, 2], [10, 77, 1, 2])),
        ("a probe", arp(1, [0; 4], [10, 77, 1, 1])),
        ("an answer", arp(2, [10, 77, 1, 2], [10, 77, 1, 1])),
        ("a group", arp(1, [10, 77, 1, 2], [224, 0, 0, 1])),
        ("its own address, IPv6", solicit("fd00:1::2", "fd00:1::2", 255)),
        ("duplicate address detection", solicit("::", "fd00:1::1", 255)),
    ] {
        assert_eq!(judge(&question).0, Verdict::Drop(DropReason::NotUnicast), "{name}");
    }
}

#[test]
fn a_solicitation_has_its_advertisement() {
    let (verdict, answer) = judge(&solicit("fd00:1::2", "fd00:1::1", 255));
    assert_eq!(verdict, Verdict::Answer(86));
    assert_eq!(answer[..6], GUEST.0);
    let ip = Ipv6Packet::new(&answer[14..86]).unwrap();
    let (from, to) = ("fd00:1::1".parse().unwrap(), "fd00:1::2".parse().unwrap());
    assert_eq!((ip.get_source(), ip.get_destination(), ip.get_hop_limit()), (from, to, 255));
    let icmp = &answer[54..86];
    // Router, solicited, override (RFC 4861 §4.4).
    assert_eq!((icmp[0], icmp[4]), (136, 0xe0));
    assert_eq!(icmp[8..24], from.octets());
    assert_eq!(icmp[24..26], [2, 1]);
    assert_eq!(icmp[26..32], OURS.0);
    let sum = checksum(&Icmpv6Packet::new(icmp).unwrap(), &from, &to);
    assert_eq!(icmp[2..4], sum.to_be_bytes());
}

#[test]
fn a_solicitation_from_afar_or_a_spoiled_one_is_none() {
    let far = solicit("fd00:1::2", "fd00:1::1", 254);
    let mut spoiled = solicit("fd00:1::2", "fd00:1::1", 255);
    *spoiled.last_mut().unwrap() ^= 1;
    for question in [far, spoiled] {
        assert!(matches!(judge(&question).0, Verdict::Drop(_)));
    }
}

#[test]
fn a_packet_passes_with_the_guests_source_alone() {
    let packet = ipv4([10, 77, 1, 2], [10, 77, 2, 2]);
    assert_eq!(judge(&frame(OURS, 0x0800, &packet)).0, Verdict::Packet(24));
    let padded = [packet.as_slice(), &[0; 20]].concat();
    assert_eq!(judge(&frame(OURS, 0x0800, &padded)).0, Verdict::Packet(24));
    let drops = [
        (frame(OURS, 0x0800, &ipv4([10, 77, 1, 3], [10, 77, 2, 2])), DropReason::SourceNotAllowed),
        (frame(OURS, 0x0800, &ipv4([10, 77, 1, 2], [224, 0, 0, 5])), DropReason::NotUnicast),
        (frame(MacAddr([0xff; 6]), 0x0800, &packet), DropReason::NotUnicast),
        (frame(OURS, 0x86dd, &packet), DropReason::Malformed),
        (frame(OURS, 0x0800, &packet[..23]), DropReason::Malformed),
        (frame(OURS, 0x88cc, &packet), DropReason::Malformed),
    ];
    for (frame, reason) in drops {
        assert_eq!(judge(&frame).0, Verdict::Drop(reason));
    }
}

#[test]
fn a_guest_that_takes_another_address_is_followed() {
    let mut segment = segment();
    let mut answer = [0; ANSWER_MAX];
    let mut question = arp(1, [10, 77, 1, 2], [10, 77, 1, 1]);
    question[6..12].copy_from_slice(&[2, 9, 9, 9, 9, 9]);
    segment.handle_frame(&question, &mut answer);
    let mut header = [0; ETHERNET];
    segment.address(&mut header, false);
    assert_eq!(header, [2, 9, 9, 9, 9, 9, 2, 0, 0, 0, 0, 1, 8, 0]);
    // A group is no sender: it is not believed.
    question[6] = 0x33;
    segment.handle_frame(&question, &mut answer);
    segment.address(&mut header, true);
    assert_eq!(header, [2, 9, 9, 9, 9, 9, 2, 0, 0, 0, 0, 1, 0x86, 0xdd]);
}

proptest! {
    #[test]
    fn any_bytes_have_a_verdict(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        judge(&bytes);
    }

    /// Every field of good frames, spoiled.
    #[test]
    fn a_changed_frame_has_a_verdict(at in 0usize..90, with: u8, cut in 0usize..90) {
        for mut good in [
            arp(1, [10, 77, 1, 2], [10, 77, 1, 1]),
            solicit("fd00:1::2", "fd00:1::1", 255),
            frame(OURS, 0x0800, &ipv4([10, 77, 1, 2], [10, 77, 2, 2])),
        ] {
            if let Some(byte) = good.get_mut(at) {
                *byte = with;
            }
            good.truncate(cut.max(1));
            let length = good.len();
            if let (Verdict::Packet(packet), _) = judge(&good) {
                prop_assert!(packet + ETHERNET <= length);
            }
        }
    }
}
