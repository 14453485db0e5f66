use super::*;
use proptest::prelude::*;
extern crate std;
use std::{vec, vec::Vec};

const BITMAPS: [[u8; SEEN_BYTES]; 3] = [[0; SEEN_BYTES], [0xa5; SEEN_BYTES], [0xff; SEEN_BYTES]];

const KEYS: [[u8; KEY]; 2] = [[0x5a; KEY], [0xff; KEY]];

fn heads() -> impl Strategy<Value = SlotHead> {
    (any::<u16>(), any::<u64>(), 4096u32..).prop_map(|(slot, sequence, total)| SlotHead {
        slot,
        sequence,
        total,
    })
}

/// A frame apart from its borrowed data.
fn frames() -> impl Strategy<Value = Frame<'static>> {
    let status = prop_oneof![Just(Status::Done), Just(Status::Cancelled), Just(Status::Refused)];
    let direction = prop_oneof![Just(Direction::Call), Just(Direction::Reply)];
    prop_oneof![
        heads().prop_map(|head| Frame::Call { head, data: &[] }),
        (heads(), status).prop_map(|(head, status)| Frame::Reply { head, status, data: &[] }),
        (heads(), direction, 0u32..2000).prop_map(|(head, direction, offset)| Frame::Chunk {
            head,
            direction,
            lane: Lane::Pages,
            offset,
            data: &[]
        }),
        (heads(), any::<bool>(), any::<u16>(), any::<u64>(), any::<bool>(), 0usize..4).prop_map(
            |(head, waits, slot, sequence, anyhow, lane)| {
                let after = waits.then_some(After { slot, sequence, anyhow });
                Frame::Marked { head, marks: Marks { lane: Lane::ALL[lane], after }, data: &[] }
            }
        ),
        (any::<u16>(), any::<u64>(), any::<u32>()).prop_map(|(slot, sequence, upto)| {
            Frame::Grant { slot, sequence, direction: Direction::Reply, upto }
        }),
        (any::<u32>(), any::<u32>()).prop_map(|(version, count)| Frame::Slots { version, count }),
        (any::<u32>(), any::<u32>(), any::<u64>())
            .prop_map(|(version, count, floor)| Frame::Release { version, count, floor }),
        any::<u64>().prop_map(|token| Frame::Challenge { token }),
        any::<u64>().prop_map(|token| Frame::Proof { token }),
        (any::<u64>(), any::<u32>(), any::<u32>(), 0..BITMAPS.len()).prop_map(
            |(largest, delay_us, marked, bitmap)| {
                Frame::Seen(SeenFrame { largest, delay_us, marked, bitmap: &BITMAPS[bitmap] })
            }
        ),
        (any::<u16>(), any::<u64>()).prop_map(|(slot, sequence)| Frame::Working { slot, sequence }),
        (any::<u16>(), any::<u64>()).prop_map(|(slot, sequence)| Frame::Cancel { slot, sequence }),
        (any::<u64>(), any::<u32>(), any::<[u64; 4]>())
            .prop_map(|(largest, delay_us, bitmap)| Frame::Ack(Ack { largest, delay_us, bitmap })),
        any::<u64>().prop_map(|token| Frame::Ping { token }),
        any::<u64>().prop_map(|token| Frame::Pong { token }),
        any::<u32>().prop_map(|reason| Frame::Close { reason }),
        (0..KEYS.len()).prop_map(|key| Frame::Where { key: &KEYS[key] }),
        (0..KEYS.len(), any::<std::net::IpAddr>(), any::<u16>()).prop_map(|(key, ip, port)| {
            Frame::There { key: &KEYS[key], address: SocketAddr::new(ip, port) }
        }),
    ]
}

fn with_data<'a>(frame: Frame<'static>, bytes: &'a [u8]) -> Frame<'a> {
    match frame {
        Frame::Call { head, .. } => Frame::Call { head, data: bytes },
        Frame::Reply { head, status, .. } => Frame::Reply { head, status, data: bytes },
        Frame::Marked { head, marks, .. } => Frame::Marked { head, marks, data: bytes },
        Frame::Chunk { head, direction, lane, offset, .. } => {
            Frame::Chunk { head, direction, lane, offset, data: bytes }
        }
        other => other,
    }
}

proptest! {
    #[test]
    fn rows_of_frames_round_trip(
        row in prop::collection::vec((frames(), prop::collection::vec(any::<u8>(), 0..2000)), 0..6),
    ) {
        let mut buf = Vec::new();
        let row: Vec<_> = row.iter().map(|(frame, data)| with_data(*frame, data)).collect();
        for frame in &row {
            let at = buf.len();
            buf.resize(at + frame.wire_len(), 0);
            prop_assert_eq!(frame.emit(&mut buf[at..]), Ok(frame.wire_len()));
        }
        let parsed: Result<Vec<_>, _> = Frames::new(&buf).collect();
        prop_assert_eq!(parsed, Ok(row));
    }

    /// What it gives is what the iterator gives, and it leaves nothing out that is one.
    #[test]
    fn messages_are_frames(
        frame in frames(),
        data in prop::collection::vec(any::<u8>(), 0..200),
        change in (any::<prop::sample::Index>(), any::<u8>()),
        is_changed in any::<bool>(),
    ) {
        let frame = with_data(frame, &data);
        let mut buf = vec![0; frame.wire_len()];
        frame.emit(&mut buf).expect("room");
        if is_changed {
            let at = change.0.index(buf.len());
            buf[at] ^= change.1;
        }
        let mut frames = Frames::new(&buf);
        let message = frames.next_message().map(|Message { head, what, data }| match what {
            Says::Call(marks) if buf[0] == CALL => {
                assert_eq!(marks, Marks::default());
                Frame::Call { head, data }
            }
            Says::Call(marks) => Frame::Marked { head, marks, data },
            Says::Reply(status) => Frame::Reply { head, status, data },
        });
        let mut others = Frames::new(&buf);
        match (message, others.next()) {
            (Some(message), frame) => {
                prop_assert_eq!(Some(Ok(message)), frame);
                prop_assert_eq!(frames.next(), others.next());
            }
            (None, frame) => {
                let is_plain = buf[1] == MUST_KNOW;
                let is_message = matches!(
                    frame,
                    Some(Ok(Frame::Call { .. } | Frame::Marked { .. } | Frame::Reply { .. }))
                );
                prop_assert!(!is_plain || !is_message);
                prop_assert_eq!(frames.next(), frame);
            }
        }
    }

    #[test]
    fn any_bytes_end_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut errors = 0;
        for frame in Frames::new(&bytes) {
            errors += usize::from(frame.is_err());
        }
        prop_assert!(errors <= 1);
    }

    #[test]
    fn no_prefix_of_a_frame_is_a_frame(frame in frames(), cut in 0usize..80) {
        let mut buf = [0u8; 256];
        let length = frame.emit(&mut buf).expect("room");
        let cut = cut.min(length - 1).max(1);
        prop_assert_eq!(Frames::new(&buf[..cut]).next(), Some(Err(FrameError::Truncated)));
        prop_assert_eq!(frame.emit(&mut buf[..length - 1]), Err(NoRoom));
    }
}

#[test]
fn call_golden_vector() {
    let head = SlotHead { slot: 0x0201, sequence: 0x0e0d_0c0b_0a09_0807, total: 3 };
    let frame = Frame::Call { head, data: b"abc" };
    let mut buf = [0u8; 27];
    assert_eq!(frame.emit(&mut buf), Ok(27));
    let golden =
        [1, 1, 0, 0, 19, 0, 0, 0, 1, 2, 0, 0, 3, 0, 0, 0, 7, 8, 9, 10, 11, 12, 13, 14, 97, 98, 99];
    assert_eq!(buf, golden);
    let mut gathered = [0u8; 27];
    let at = Frame::Call { head, data: &[] }.emit_head(3, &mut gathered).expect("room");
    gathered[at..].copy_from_slice(b"abc");
    assert_eq!(gathered, golden);
}

/// Pins the layouts that every build has, beside CALL.
#[test]
fn golden_vectors_of_the_first_build() {
    let head = SlotHead { slot: 0x0201, sequence: 0x0a09_0807_0605_0403, total: 1 };
    let (slot, sequence) = (head.slot, head.sequence);
    let reply = |status| Frame::Reply { head, status, data: b"z" };
    let says = |kind, tag, total| {
        let mut bytes = vec![kind, 1, 0, 0, 16, 0, 0, 0, 1, 2, tag, 0, total, 0, 0, 0];
        bytes.extend([3, 4, 5, 6, 7, 8, 9, 10]);
        bytes
    };
    let replies = |tag| {
        let mut bytes = says(2, tag, 1);
        bytes[4] = 17;
        bytes.push(b'z');
        bytes
    };
    let number = |kind| vec![kind, 1, 0, 0, 8, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    let token = 0x0807_0605_0403_0201;
    let ack = Ack { largest: token, delay_us: 9, bitmap: [1, 2, 3, 1 << 63] };
    // The one that may be skipped.
    let mut pong = number(8);
    pong[1] = 0;
    let mut acked = number(6);
    acked[4] = 48;
    acked.extend([9, 0, 0, 0, 0, 0, 0, 0]);
    acked.extend(ack.bitmap.iter().flat_map(|word| word.to_le_bytes()));
    let golden = [
        (reply(Status::Done), replies(0)),
        (reply(Status::Cancelled), replies(1)),
        (reply(Status::Refused), replies(2)),
        (reply(Status::Stopped), replies(3)),
        (reply(Status::Aborted), replies(4)),
        (reply(Status::Lost), replies(5)),
        (Frame::Working { slot, sequence }, says(3, 0, 0)),
        (Frame::Cancel { slot, sequence }, says(4, 0, 0)),
        (Frame::Ack(ack), acked),
        (Frame::Ping { token }, number(7)),
        (Frame::Pong { token }, pong),
        (
            Frame::Close { reason: 0x0403_0201 },
            vec![9, 1, 0, 0, 8, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0],
        ),
    ];
    pinned(&golden);
}

/// Each frame is these bytes, and these bytes are the frame.
fn pinned(golden: &[(Frame<'_>, Vec<u8>)]) {
    for (frame, bytes) in golden {
        let mut buf = [0u8; 256];
        let length = frame.emit(&mut buf).expect("room");
        assert_eq!(buf[..length], bytes[..], "{frame:?}");
        assert_eq!(Frames::new(bytes).next(), Some(Ok(*frame)));
    }
}

/// Pins the answer to a challenge, and what is said of packets that have arrived.
#[test]
fn golden_vectors_of_proofs_and_seen() {
    let seen = Seen {
        largest: 0x0807_0605_0403_0201,
        delay_us: 0x0c0b_0a09,
        marked: 0x100f_0e0d,
        bitmap: core::array::from_fn(|word| 1 << word),
    };
    let bitmap = seen.bitmap_bytes();
    let mut bytes = vec![16, 1, 0, 0, 144, 0, 0, 0];
    bytes.extend(1..=16);
    bytes.extend((0..16u32).flat_map(|word| (1u64 << word).to_le_bytes()));
    let proof = vec![15, 1, 0, 0, 8, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    pinned(&[(seen.frame(&bitmap), bytes), (Frame::Proof { token: 0x0807_0605_0403_0201 }, proof)]);
}

/// Pins the layouts that came with `FEATURE_LANES`.
#[test]
fn golden_vectors_of_lanes() {
    let head = SlotHead { slot: 0x0201, sequence: 0x0a09_0807_0605_0403, total: 1 };
    let after = Some(After { slot: 0x0c0b, sequence: 0x1413_1211_100f_0e0d, anyhow: true });
    let marked = Frame::Marked { head, marks: Marks { lane: Lane::Bulk, after }, data: b"z" };
    let grant =
        Frame::Grant { slot: 0x0201, sequence: 3, direction: Direction::Reply, upto: 0x0403_0201 };
    let chunk =
        Frame::Chunk { head, direction: Direction::Reply, lane: Lane::Pages, offset: 0, data: b"" };
    let golden: [(Frame<'_>, &[u8]); 6] = [
        (
            marked,
            &[
                10, 1, 0, 0, 33, 0, 0, 0, 1, 2, 3, 3, 1, 0, 0, 0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                0, 0, 0, 0, 0, 0, 13, 14, 15, 16, 17, 18, 19, 20, 122,
            ],
        ),
        (grant, &[11, 1, 0, 0, 16, 0, 0, 0, 1, 2, 1, 0, 1, 2, 3, 4, 3, 0, 0, 0, 0, 0, 0, 0]),
        (Frame::Slots { version: 1, count: 2 }, &[12, 1, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]),
        (
            Frame::Release { version: 1, count: 2, floor: 3 },
            &[13, 1, 0, 0, 16, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0],
        ),
        (Frame::Challenge { token: 1 }, &[14, 1, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
        (
            chunk,
            &[
                5, 1, 0, 0, 24, 0, 0, 0, 1, 2, 1, 2, 1, 0, 0, 0, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0, 0,
                0, 0, 0, 0, 0,
            ],
        ),
    ];
    for (frame, bytes) in golden {
        let mut buf = [0u8; 64];
        let length = frame.emit(&mut buf).expect("room");
        assert_eq!(&buf[..length], bytes, "{frame:?}");
        assert_eq!(Frames::new(bytes).next(), Some(Ok(frame)));
    }
}

/// Pins the layouts that came with `FEATURE_BULK`.
#[test]
fn golden_vectors_of_bulk() {
    let bulk = Frame::Bulk { port: 0x0201, buffer: 0x0605_0403 };
    let mut buf = [0u8; 64];
    assert_eq!(bulk.emit(&mut buf), Ok(16));
    let golden = [17, 0, 0, 0, 8, 0, 0, 0, 1, 2, 0, 0, 3, 4, 5, 6];
    assert_eq!(buf[..16], golden);
    assert_eq!(Frames::new(&golden).next(), Some(Ok(bulk)));
    buf.fill(9);
    let padding = Frame::Padding { length: 5 };
    assert_eq!((padding.emit(&mut buf), padding.wire_len()), (Ok(13), 13));
    let golden = [18, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(buf[..13], golden);
    assert_eq!(Frames::new(&golden).next(), None, "padding says nothing");
    assert_eq!(padding.emit(&mut buf[..12]), Err(NoRoom));
}

/// Pins the layouts that came with `FEATURE_FIND`.
#[test]
fn golden_vectors_of_find() {
    let key = core::array::from_fn(|n| u8::try_from(n).expect("below 32"));
    let mut buf = [0u8; 64];
    let mut golden = [0; 64];
    golden[..8].copy_from_slice(&[19, 0, 0, 0, 32, 0, 0, 0]);
    golden[8..40].copy_from_slice(&key);
    let wanted = Frame::Where { key: &key };
    assert_eq!(wanted.emit(&mut buf), Ok(40));
    assert_eq!(buf[..40], golden[..40]);
    assert_eq!(Frames::new(&golden[..40]).next(), Some(Ok(wanted)));
    golden[..8].copy_from_slice(&[20, 0, 0, 0, 56, 0, 0, 0]);
    golden[40..].copy_from_slice(&[
        4, 0, 2, 1, 0, 0, 0, 0, 192, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    let address = SocketAddr::from(([192, 0, 2, 1], 0x0102));
    let there = Frame::There { key: &key, address };
    assert_eq!(there.emit(&mut buf), Ok(64));
    assert_eq!(buf, golden);
    assert_eq!(Frames::new(&golden).next(), Some(Ok(there)));
    golden[40] = 5;
    assert_eq!(Frames::new(&golden).next(), Some(Err(FrameError::Range(THERE))));
}

#[test]
fn marks_that_say_nothing_are_refused() {
    // Without an earlier call there is no slot of one, no sequence and no "anyhow".
    assert_eq!(Marks::from_wire(0, 1, 0), None);
    assert_eq!(Marks::from_wire(0, 0, 1), None);
    assert_eq!(Marks::from_wire(1 << 9, 0, 0), None);
    assert_eq!(Marks::from_wire(1 << 2, 0, 0), None);
    assert_eq!(Marks::from_wire(0, 0, 0), Some(Marks::default()));
}

#[test]
fn unknown_frames_are_skipped_unless_they_must_be_known() {
    let mut bytes = std::vec![200, 0, 0, 0, 2, 0, 0, 0, 9, 9];
    let mut ping = [0u8; 16];
    Frame::Ping { token: 5 }.emit(&mut ping).expect("room");
    bytes.extend(ping);
    assert_eq!(Frames::new(&bytes).next(), Some(Ok(Frame::Ping { token: 5 })));
    bytes[1] = MUST_KNOW;
    let mut frames = Frames::new(&bytes);
    assert_eq!(frames.next(), Some(Err(FrameError::Unknown(200))));
    assert_eq!(frames.next(), None, "nothing behind an error is believed");
    bytes[1] = 2;
    assert_eq!(Frames::new(&bytes).next(), Some(Err(FrameError::ReservedBits)));
}

#[test]
fn data_behind_the_payload_is_refused() {
    let head = SlotHead { slot: 0, sequence: 1, total: 10 };
    let mut buf = [0u8; 64];
    for (offset, data, good) in
        [(0u32, 10usize, true), (1, 10, false), (u32::MAX, 1, false), (10, 0, true), (11, 0, false)]
    {
        let data = &[0u8; 10][..data];
        let frame =
            Frame::Chunk { head, direction: Direction::Call, lane: Lane::Calls, offset, data };
        let length = frame.emit(&mut buf).expect("room");
        let parsed = Frames::new(&buf[..length]).next().expect("one");
        assert_eq!(parsed, if good { Ok(frame) } else { Err(FrameError::BehindEnd) });
    }
}

#[test]
fn ack_covers_largest_and_the_bits_below() {
    let ack = Ack { largest: 300, delay_us: 0, bitmap: [1, 1 << 63, 0, 1 << 63] };
    let covered: Vec<u64> = (0..400).filter(|&n| ack.covers(n)).collect();
    assert_eq!(covered, [44, 172, 299, 300]);
    assert!(!Ack { largest: 3, ..ack }.covers(u64::MAX));
}

proptest! {
    #[test]
    fn a_bitmap_reads_back_as_it_was(largest: u64, delay_us: u32, marked: u32, bitmap: [u64; 16]) {
        let seen = Seen { largest, delay_us, marked, bitmap };
        let bytes = seen.bitmap_bytes();
        let Frame::Seen(frame) = seen.frame(&bytes) else { unreachable!() };
        prop_assert_eq!(frame.to_seen(), seen);
        prop_assert_eq!(&bytes[..8], &bitmap[0].to_le_bytes()[..]);
    }
}
