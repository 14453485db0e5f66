extern crate std;
use super::*;
use proptest::prelude::*;
use std::vec;
use std::vec::Vec;

const CIPHERS: [Cipher; 2] = [Cipher::Aes128Gcm, Cipher::ChaCha20Poly1305];

fn sealed(sealer: &mut Sealer, payload: &[u8]) -> Vec<u8> {
    let mut buf = vec![0; HEADER + payload.len() + TAG];
    buf[HEADER..HEADER + payload.len()].copy_from_slice(payload);
    let length = sealer.seal_in_place(Label::data(9), &mut buf, payload.len()).expect("room");
    assert_eq!(length, buf.len());
    buf
}

fn pair(cipher: Cipher, replay: Replay) -> (Sealer, Opener) {
    let key = Key::new([3; 32]);
    (Sealer::new(cipher, &key, 0), Opener::new(cipher, &key, replay))
}

#[test]
fn opens_what_was_sealed_once() {
    for cipher in CIPHERS {
        let (mut sealer, mut opener) = pair(cipher, Replay::window());
        for payload in [&b""[..], b"x", &[7; 2000]] {
            let number = sealer.next_number();
            let mut packet = sealed(&mut sealer, payload);
            let mut again = packet.clone();
            assert!(payload.is_empty() || packet[HEADER..HEADER + payload.len()] != *payload);
            let (header, range) = opener.open_in_place(&mut packet).expect("opens");
            assert_eq!(header, Header { kind: PacketKind::Data, flags: 0, session: 9, number });
            assert_eq!(packet[range], *payload);
            assert_eq!(opener.open_in_place(&mut again), Err(OpenError::Replayed));
            assert_eq!(opener.next_number(), sealer.next_number());
        }
    }
}

#[test]
fn window_takes_any_order_in_order_takes_one() {
    let (mut sealer, mut window) = pair(Cipher::Aes128Gcm, Replay::window());
    let mut in_order = Opener::new(Cipher::Aes128Gcm, &Key::new([3; 32]), Replay::in_order(0));
    let packets: Vec<_> = (0u8..3).map(|n| sealed(&mut sealer, &[n])).collect();
    for n in [2, 0, 1] {
        assert!(window.open_in_place(&mut packets[n].clone()).is_ok());
    }
    assert_eq!(in_order.open_in_place(&mut packets[1].clone()), Err(OpenError::Gap));
    assert!(in_order.open_in_place(&mut packets[0].clone()).is_ok());
    assert_eq!(in_order.open_in_place(&mut packets[0].clone()), Err(OpenError::Replayed));
    // Another opener goes on from the exported position.
    let at = Replay::in_order(in_order.next_number());
    let mut moved = Opener::new(Cipher::Aes128Gcm, &Key::new([3; 32]), at);
    assert!(moved.open_in_place(&mut packets[1].clone()).is_ok());
    assert!(moved.open_in_place(&mut packets[2].clone()).is_ok());
    assert_eq!(moved.next_number(), 3);
}

#[test]
fn forgeries_leave_no_trace() {
    for cipher in CIPHERS {
        let (mut sealer, mut opener) = pair(cipher, Replay::window());
        let packet = sealed(&mut sealer, b"payload");
        for bit in 0..packet.len() * 8 {
            let mut forged = packet.clone();
            forged[bit / 8] ^= 1 << (bit % 8);
            let error = opener.open_in_place(&mut forged).expect_err("forged");
            assert!(
                matches!(error, OpenError::Forged | OpenError::Header(_)),
                "bit {bit}: {error:?}"
            );
            assert_eq!(opener.next_number(), 0);
        }
        for length in 0..packet.len() {
            assert!(opener.open_in_place(&mut packet[..length].to_vec()).is_err());
        }
        assert!(opener.open_in_place(&mut packet.clone()).is_ok());
    }
}

#[test]
fn another_key_or_cipher_opens_nothing() {
    let (mut sealer, _) = pair(Cipher::ChaCha20Poly1305, Replay::window());
    let packet = sealed(&mut sealer, b"payload");
    let mut other = Opener::new(Cipher::ChaCha20Poly1305, &Key::new([4; 32]), Replay::window());
    assert_eq!(other.open_in_place(&mut packet.clone()), Err(OpenError::Forged));
    let mut other = Opener::new(Cipher::Aes128Gcm, &Key::new([3; 32]), Replay::window());
    assert_eq!(other.open_in_place(&mut packet.clone()), Err(OpenError::Forged));
}

#[test]
fn numbers_never_wrap() {
    let key = Key::new([1; 32]);
    let mut sealer = Sealer::new(Cipher::Aes128Gcm, &key, u64::MAX - 1);
    let mut opener = Opener::new(Cipher::Aes128Gcm, &key, Replay::in_order(u64::MAX - 1));
    let mut packet = sealed(&mut sealer, b"last");
    assert!(opener.open_in_place(&mut packet).is_ok());
    let mut buf = [0; 64];
    assert_eq!(sealer.seal_in_place(Label::data(0), &mut buf, 4), Err(SealError::Exhausted));
    assert_eq!(sealer.next_number(), u64::MAX);
}

#[test]
fn a_short_buffer_uses_up_no_number() {
    let (mut sealer, _) = pair(Cipher::Aes128Gcm, Replay::window());
    let mut buf = [0; HEADER + TAG + 3];
    assert_eq!(sealer.seal_in_place(Label::data(0), &mut buf, 4), Err(SealError::NoRoom));
    assert_eq!(sealer.seal_in_place(Label::data(0), &mut buf, usize::MAX), Err(SealError::NoRoom));
    assert_eq!(sealer.next_number(), 0);
}

#[test]
fn in_the_clear_numbers_still_count() {
    let (mut sealer, mut opener) = pair(Cipher::Plain, Replay::in_order(0));
    let packet = sealed(&mut sealer, b"clear");
    assert!(packet.windows(5).any(|bytes| bytes == b"clear"));
    assert!(opener.open_in_place(&mut packet.clone()).is_ok());
    assert_eq!(opener.open_in_place(&mut packet.clone()), Err(OpenError::Replayed));
    let mut damaged = sealed(&mut sealer, b"clear");
    *damaged.last_mut().expect("a tag") ^= 1;
    assert_eq!(opener.open_in_place(&mut damaged), Err(OpenError::Forged));
    // What was sealed is no packet in the clear, and the other way round.
    let (mut aes, mut aes_opener) = pair(Cipher::Aes128Gcm, Replay::in_order(0));
    let (_, mut plain_opener) = pair(Cipher::Plain, Replay::in_order(0));
    let mut packet = sealed(&mut aes, b"clear");
    assert_eq!(plain_opener.open_in_place(&mut packet), Err(OpenError::Forged));
    let mut packet = sealed(&mut sealer_at_zero(), b"clear");
    assert_eq!(aes_opener.open_in_place(&mut packet), Err(OpenError::Forged));
}

fn sealer_at_zero() -> Sealer {
    pair(Cipher::Plain, Replay::in_order(0)).0
}

/// Pins nonce, associated data and ciphertext: builds that differ cannot talk.
#[test]
fn golden_vectors() {
    for (cipher, golden) in CIPHERS.into_iter().zip(GOLDEN) {
        let mut sealer = Sealer::new(
            cipher,
            &Key::new(core::array::from_fn(|i| u8::try_from(i).expect("below 32"))),
            5,
        );
        assert_eq!(sealed(&mut sealer, b"conet"), golden, "{cipher:?}");
    }
}

/// Computed with OpenSSL (through Python's cryptography), apart from ring.
const GOLDEN: [[u8; 37]; 2] = [
    [
        3, 0, 0, 0, 9, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 141, 143, 84, 36, 144, 85, 22, 110, 224,
        76, 83, 132, 33, 124, 95, 118, 31, 82, 96, 244, 59,
    ],
    [
        3, 0, 0, 0, 9, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 64, 103, 248, 111, 49, 128, 235, 208, 133,
        143, 68, 59, 225, 234, 248, 125, 204, 151, 105, 97, 51,
    ],
];

proptest! {
    #[test]
    fn any_bytes_open_to_nothing(mut bytes in prop::collection::vec(any::<u8>(), 0..200), in_order: bool) {
        let replay = if in_order { Replay::in_order(0) } else { Replay::window() };
        let (_, mut opener) = pair(Cipher::Aes128Gcm, replay);
        prop_assert!(opener.open_in_place(&mut bytes).is_err());
    }
}
