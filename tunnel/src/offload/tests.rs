//! Against packets built by hand, a model of the kernel's cutting, and random bytes.

use std::ops::Range;

use conet_testkit::random::Random;
use conet_wire::ip::{IpView, checksum as slow_checksum};
use pnet_packet::{tcp, udp};

use super::*;

type Edit = &'static dyn Fn(&mut Vec<u8>);

#[derive(Debug, Clone, Copy, PartialEq)]
struct Flow {
    is_v6: bool,
    is_tcp: bool,
    port: u16,
}

const FLOWS: [Flow; 4] = [
    Flow { is_v6: false, is_tcp: true, port: 1 },
    Flow { is_v6: true, is_tcp: true, port: 1 },
    Flow { is_v6: false, is_tcp: false, port: 1 },
    Flow { is_v6: true, is_tcp: false, port: 1 },
];

fn below(random: &mut Random, bound: usize) -> usize {
    usize::try_from(random.below(bound as u64)).unwrap()
}

fn transport(flow: Flow) -> usize {
    if flow.is_v6 { 40 } else { 20 }
}

/// A packet with right checksums; TCP with 12 bytes of options.
fn packet(flow: Flow, sequence: u32, id: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let at = transport(flow);
    let own = if flow.is_tcp { 32 } else { 8 };
    let mut bytes = vec![0; at + own];
    bytes.extend_from_slice(payload);
    let len = u16::try_from(bytes.len()).unwrap();
    if flow.is_v6 {
        bytes[0] = 0x60;
        put16(&mut bytes, 4, len - 40);
        (bytes[6], bytes[7]) = (if flow.is_tcp { 6 } else { 17 }, 63);
        bytes[8..24].fill(0xfd);
        bytes[24..40].fill(0xfe);
    } else {
        bytes[0] = 0x45;
        put16(&mut bytes, 2, len);
        put16(&mut bytes, 4, id);
        bytes[6] = 0x40;
        (bytes[8], bytes[9]) = (63, if flow.is_tcp { 6 } else { 17 });
        bytes[12..16].copy_from_slice(&[10, 77, 1, 2]);
        bytes[16..20].copy_from_slice(&[10, 77, 2, 2]);
        let sum = slow_checksum(&bytes[..20], 0);
        put16(&mut bytes, 10, sum);
    }
    put16(&mut bytes, at, flow.port);
    put16(&mut bytes, at + 2, 5201);
    if flow.is_tcp {
        bytes[at + 4..at + 8].copy_from_slice(&sequence.to_be_bytes());
        bytes[at + 8..at + 12].copy_from_slice(&77u32.to_be_bytes());
        (bytes[at + 12], bytes[at + 13]) = (0x80, flags);
        put16(&mut bytes, at + 14, 500);
        bytes[at + 20..at + 24].copy_from_slice(&[1, 1, 8, 10]);
    } else {
        put16(&mut bytes, at + 4, len - u16::try_from(at).unwrap());
    }
    let sum = proper_checksum(flow, &bytes);
    put16(&mut bytes, at + if flow.is_tcp { 16 } else { 6 }, sum);
    bytes
}

/// By somebody else's code.
fn proper_checksum(flow: Flow, bytes: &[u8]) -> u16 {
    let own = &bytes[transport(flow)..];
    let v4 = |at: usize| std::net::Ipv4Addr::from(u32_at(bytes, at));
    let v6 = |at: usize| {
        let octets: [u8; 16] = bytes[at..at + 16].try_into().unwrap();
        std::net::Ipv6Addr::from(octets)
    };
    match (flow.is_tcp, flow.is_v6) {
        (true, false) => tcp::ipv4_checksum(&tcp::TcpPacket::new(own).unwrap(), &v4(12), &v4(16)),
        (true, true) => tcp::ipv6_checksum(&tcp::TcpPacket::new(own).unwrap(), &v6(8), &v6(24)),
        (false, false) => udp::ipv4_checksum(&udp::UdpPacket::new(own).unwrap(), &v4(12), &v4(16)),
        (false, true) => udp::ipv6_checksum(&udp::UdpPacket::new(own).unwrap(), &v6(8), &v6(24)),
    }
}

/// What the joiner writes, as frames.
fn joined(packets: &[Vec<u8>], trusted: bool, may: (bool, bool)) -> Vec<Vec<u8>> {
    let mut buffer = vec![0xee; 7];
    let mut places: Vec<Range<usize>> = Vec::new();
    for packet in packets {
        places.push(buffer.len()..buffer.len() + packet.len());
        buffer.extend_from_slice(packet);
    }
    let mut frames = Vec::new();
    let mut emit = |joined: Joined<'_>| -> Result<(), ()> {
        let mut frame = joined.head.to_vec();
        if frame.is_empty() {
            frame.resize(HEADER, 0);
        }
        joined.pieces.iter().for_each(|at| frame.extend_from_slice(&buffer[at.clone()]));
        frames.push(frame);
        Ok(())
    };
    let mut joiner = Joiner::default();
    for at in places {
        joiner.push(&buffer, at, trusted, may, &mut emit).unwrap();
    }
    joiner.finish(&mut emit).unwrap();
    frames
}

fn split(frame: &[u8]) -> Vec<Vec<u8>> {
    let outgoing = Outgoing::gso(frame).unwrap();
    let cut = (0..outgoing.count()).map(|index| {
        let mut out = vec![0xcc; outgoing.len_of(index)];
        outgoing.write(index, &mut out);
        out
    });
    cut.collect()
}

#[test]
fn what_is_joined_is_cut_into_the_same_packets_again() {
    for flow in FLOWS {
        for (size, count, last) in [(1368, 45, 1368), (1000, 10, 1), (1, 64, 1), (1400, 2, 700)] {
            let mut packets = Vec::new();
            for i in 0..count {
                let len = if i + 1 == count { last } else { size };
                let payload: Vec<u8> =
                    (0..len).map(|b| u8::try_from((b + i) % 251).unwrap()).collect();
                let sequence = (u32::MAX - 5000).wrapping_add(u32::try_from(size * i).unwrap());
                let flags = if i + 1 == count { ACK | PSH } else { ACK };
                packets.push(packet(flow, sequence, u16::try_from(i).unwrap(), flags, &payload));
            }
            for trusted in [true, false] {
                let frames = joined(&packets, trusted, (true, true));
                assert_eq!(frames.len(), 1, "{flow:?} {size} {count}");
                assert_eq!(split(&frames[0]), packets, "{flow:?} {size} {count}");
            }
            let may = (!flow.is_tcp, flow.is_tcp);
            assert_eq!(joined(&packets, true, may).len(), count, "switched off");
        }
    }
}

#[test]
fn each_thing_that_a_joined_packet_could_not_say_stands_alone() {
    let tcp = FLOWS[0];
    let first = packet(tcp, 1000, 5, ACK, &[1; 100]);
    let next = packet(tcp, 1100, 6, ACK, &[2; 100]);
    assert_eq!(joined(&[first.clone(), next.clone()], true, (true, true)).len(), 1);
    let edits: [(&str, Edit); 12] = [
        ("class", &|p| p[1] = 2),
        ("hops", &|p| p[8] = 9),
        ("acknowledgement", &|p| p[31] = 9),
        ("window", &|p| p[35] = 9),
        ("urgent", &|p| p[39] = 9),
        ("options", &|p| p[51] = 9),
        ("sequence", &|p| p[27] ^= 1),
        ("syn", &|p| p[33] |= 2),
        ("fin", &|p| p[33] |= FIN),
        ("cwr", &|p| p[33] |= CWR),
        ("identification without DF", &|p| (p[4], p[5], p[6]) = (9, 9, 0)),
        ("longer", &|p| {
            p.push(0);
            let len = u16::try_from(p.len()).unwrap();
            put16(p, 2, len);
        }),
    ];
    for (name, edit) in edits {
        let mut other = next.clone();
        edit(&mut other);
        let frames = joined(&[first.clone(), other.clone()], true, (true, true));
        assert_eq!(frames.len(), 2, "{name}");
        assert_eq!(
            (&frames[0][HEADER..], &frames[1][HEADER..]),
            (&first[..], &other[..]),
            "{name}"
        );
    }
    // A fragment tells no flow: it may overtake.
    let mut fragment = next.clone();
    fragment[6] = 0x20;
    assert_eq!(joined(&[first.clone(), fragment], true, (true, true)).len(), 2);
    // A wrong checksum must stay wrong, unless a tag says that it came so.
    let mut wrong = next;
    *wrong.last_mut().unwrap() ^= 1;
    assert_eq!(joined(&[first.clone(), wrong.clone()], false, (true, true)).len(), 2);
    // An acknowledgement without data overtakes nothing.
    let ack = packet(tcp, 1100, 6, ACK, &[]);
    let frames = joined(
        &[first.clone(), ack.clone(), packet(tcp, 1100, 7, ACK, &[3; 100])],
        true,
        (true, true),
    );
    assert_eq!(frames.len(), 3);
    assert_eq!((&frames[0][HEADER..], &frames[1][HEADER..]), (&first[..], &ack[..]));
}

/// Whatever arrives comes out once, whole, and in order within its flow.
#[test]
fn no_packet_is_lost_repeated_or_overtaken_by_its_flow() {
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let mut next = [1u32; 80];
        let mut packets = Vec::new();
        for i in 0..200u16 {
            let which = below(&mut random, 80);
            let flow = Flow { port: u16::try_from(which).unwrap(), ..FLOWS[which % 4] };
            let len = [0, 1, 100, 100, 100, 100, 40][below(&mut random, 7)];
            let flags = [ACK, ACK, ACK, ACK, ACK | PSH, ACK | FIN, 2][below(&mut random, 7)];
            let mut payload = vec![0; len];
            random.fill(&mut payload);
            let mut made = packet(flow, next[which], i, flags, &payload);
            next[which] += u32::try_from(len).unwrap();
            if below(&mut random, 20) == 0 {
                *made.last_mut().unwrap() ^= 0xff;
            }
            packets.push(made);
        }
        let cut: Vec<_> =
            joined(&packets, false, (true, true)).iter().flat_map(|f| split(f)).collect();
        assert_eq!(cut.len(), packets.len());
        for which in 0..80 {
            let flow = Flow { port: which, ..FLOWS[usize::from(which) % 4] };
            let of = |all: &[Vec<u8>]| -> Vec<Vec<u8>> {
                let at = transport(flow);
                let mine = all.iter().filter(|p| {
                    IpView::new(p).unwrap().is_v6() == flow.is_v6 && u16_at(p, at) == which
                });
                // Cut again, identifications are counted from the first: not with DF.
                mine.map(|p| {
                    let mut p = p.clone();
                    if !flow.is_v6 {
                        p[4..6].fill(0);
                        p[10..12].fill(0);
                    }
                    p
                })
                .collect()
            };
            assert_eq!(of(&cut), of(&packets), "seed {seed}, flow {which}");
        }
    }
}

#[test]
fn partial_checksums_are_completed() {
    for flow in FLOWS {
        let whole = packet(flow, 1, 1, ACK, &[5; 333]);
        let (from, at) = (transport(flow), if flow.is_tcp { 16 } else { 6 });
        let mut partial = whole.clone();
        let len = u16::try_from(whole.len() - from).unwrap();
        let sum = checksum::pseudo(&whole, flow.is_v6, if flow.is_tcp { 6 } else { 17 }, len);
        put16(&mut partial, from + at, sum.folded());
        let header = Header {
            flags: NEEDS_CHECKSUM,
            checksum_from: u16::try_from(from).unwrap(),
            checksum_at: u16::try_from(at).unwrap(),
            ..Header::default()
        };
        let mut frame = header.emit().to_vec();
        frame.extend_from_slice(&partial);
        assert_eq!(split(&frame), [whole], "{flow:?}");
    }
}

#[test]
fn sums_agree_with_the_plain_ones() {
    let mut random = Random::new(3);
    for len in 0..400 {
        let mut bytes = vec![0; len];
        random.fill(&mut bytes);
        let sum = checksum::Sum::default().add(&bytes);
        assert_eq!(sum.finish(), slow_checksum(&bytes, 0), "{len}");
        let half = (len / 2) & !1;
        let in_two = checksum::Sum::default().add(&bytes[..half]).add(&bytes[half..]);
        assert_eq!(in_two.folded(), sum.folded());
    }
    assert_eq!(checksum::Sum::default().add(&[0xff; 64]).finish(), 0);
}

/// Any frame and any packet: refused, or cut within its bounds.
#[test]
fn any_bytes_are_cut_or_refused() {
    let mut random = Random::new(7);
    let mut cut = 0;
    for round in 0..40_000 {
        let flow = FLOWS[round % 4];
        let mut payload = vec![0; below(&mut random, 3000)];
        random.fill(&mut payload);
        let mut frame = vec![0; HEADER];
        random.fill(&mut frame);
        if round % 3 > 0 {
            (frame[0], frame[1]) = (1, [0, 1, 4, 5, 0x81][below(&mut random, 5)]);
            (frame[5], frame[7]) = (0, 0);
            frame[6] = if flow.is_v6 { 40 } else { 20 };
            (frame[8], frame[9]) = (16, 0);
        }
        frame.extend_from_slice(&packet(flow, 1, 1, ACK, &payload));
        for _ in 0..below(&mut random, 4) {
            let at = below(&mut random, frame.len().min(80));
            frame[at] ^= 1 << below(&mut random, 8);
        }
        frame.truncate(frame.len() - below(&mut random, 2) * below(&mut random, frame.len()));
        let Ok(outgoing) = Outgoing::gso(&frame) else { continue };
        let longest = outgoing.len_of(0);
        let mut out = vec![0; longest];
        for index in 0..outgoing.count() {
            assert!(outgoing.len_of(index) <= longest);
            outgoing.write(index, &mut out);
        }
        cut += 1;
    }
    assert!(cut > 1000, "{cut}");
}

/// The packets' flow in one packet whose checksum is left to do, without a word of it.
fn unsaid(frame: &[u8]) -> Vec<u8> {
    frame[HEADER..].to_vec()
}

#[test]
fn what_no_wire_has_finished_is_finished_and_cut() {
    for flow in FLOWS {
        let payload: Vec<u8> = (0..9000u16).map(|i| i.to_le_bytes()[0]).collect();
        let packets: Vec<_> = payload
            .chunks(1200)
            .scan(7u32, |sequence, part| {
                let at = *sequence;
                *sequence += 1200;
                let flags = if at >= 8 * 1000 { ACK | PSH } else { ACK };
                Some(packet(flow, at, 0, flags, part))
            })
            .collect();
        let frames = joined(&packets, true, (true, true));
        let [frame] = &frames[..] else { panic!("{flow:?}: one frame") };
        let whole = unsaid(frame);
        let Unfinished::Behind(header) = unfinished(&whole, 1200, 1420) else {
            panic!("{flow:?} is unfinished")
        };
        let cut = split(&[&header[..], &whole].concat());
        // Numbered anew, which means nothing beside Don't Fragment.
        let same = |a: &[u8], b: &[u8]| a[20..] == b[20..] && a[12..20] == b[12..20];
        assert_eq!(cut.len(), packets.len(), "{flow:?}");
        assert!(cut.iter().zip(&packets).all(|(a, b)| same(a, b)), "{flow:?}");
        // Where nobody says how long, only TCP can be cut.
        for unknown in [0, 1401, u16::MAX] {
            match unfinished(&whole, unknown, 1420) {
                Unfinished::Behind(header) if flow.is_tcp => {
                    let cut = split(&[&header[..], &whole].concat());
                    assert!(cut.iter().all(|p| p.len() <= 1420 && proper(flow, p)));
                }
                Unfinished::Lost if !flow.is_tcp => {}
                other => panic!("{flow:?} {unknown}: {other:?}"),
            }
        }
    }
}

fn proper(flow: Flow, packet: &[u8]) -> bool {
    let at = transport(flow) + if flow.is_tcp { 16 } else { 6 };
    proper_checksum(flow, packet) == u16_at(packet, at)
}

#[test]
fn one_packet_is_finished_and_a_finished_or_spoilt_one_is_left_alone() {
    let mut random = Random::new(11);
    for round in 0..4000 {
        let flow = FLOWS[round % 4];
        let mut payload = vec![0; below(&mut random, 1300) + 1];
        random.fill(&mut payload);
        let whole = packet(flow, 1, 0, ACK, &payload);
        let at = transport(flow) + if flow.is_tcp { 16 } else { 6 };
        let segment = u16::try_from(below(&mut random, 65_536)).unwrap();
        assert_eq!(unfinished(&whole, segment, 1420), Unfinished::No, "{flow:?}");
        let mut spoilt = whole.clone();
        let place = below(&mut random, payload.len());
        spoilt[whole.len() - payload.len() + place] ^= 0x10;
        assert_eq!(unfinished(&spoilt, segment, 1420), Unfinished::No, "{flow:?}");
        let mut left = whole.clone();
        let own_len = u16::try_from(whole.len() - transport(flow)).unwrap();
        let protocol = if flow.is_tcp { PROTO_TCP } else { PROTO_UDP };
        let sum = checksum::pseudo(&whole, flow.is_v6, protocol, own_len).folded();
        put16(&mut left, at, sum);
        let Unfinished::Behind(header) = unfinished(&left, segment, 1420) else {
            panic!("{flow:?} is unfinished")
        };
        assert_eq!(split(&[&header[..], &left].concat()), [whole]);
    }
}
