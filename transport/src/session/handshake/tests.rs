use super::*;
use crate::session::protect::{Label, Opener, Replay, Sealer};
use conet_wire::session::{HEADER, TAG};

const SECRET: InitiationSecret = InitiationSecret { counter: 7, incarnation: 8, session: 9 };

fn keys(byte: u8) -> (PrivateKey, PublicKey) {
    let private = PrivateKey::new([byte; 32]);
    let public = private.public();
    (private, public)
}

fn start(local: &PrivateKey, remote: &PublicKey, offered: u32) -> (Initiator, [u8; INITIATION]) {
    Initiator::start(local, remote, offered, SECRET, &mut SystemEntropy::default()).expect("starts")
}

fn open(local: &PrivateKey, packet: &[u8]) -> Result<Received, HandshakeError> {
    let initiation = Initiation::parse(packet).expect("layout");
    Received::open(local, &initiation, &mut SystemEntropy::default())
}

/// RFC 7748 §6.1.
#[test]
fn public_key_of_the_standards_example() {
    let alice: [u8; 32] = [
        0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2, 0x66,
        0x45, 0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5, 0x1d, 0xb9,
        0x2c, 0x2a,
    ];
    let public = PrivateKey::new(alice).public();
    assert_eq!(public.0[..4], [0x85, 0x20, 0xf0, 0x09]);
    assert_eq!(public.0[24..], [0xeb, 0xa4, 0xa9, 0x8e, 0xaa, 0x9b, 0x4e, 0x6a]);
}

#[test]
fn both_ends_hold_matching_keys() {
    for (offered, supported, cipher) in [
        (FEATURE_AES, FEATURE_AES, Cipher::Aes128Gcm),
        (0, FEATURE_AES, Cipher::ChaCha20Poly1305),
        (FEATURE_AES, 0, Cipher::ChaCha20Poly1305),
    ] {
        let ((a, a_public), (b, b_public)) = (keys(1), keys(2));
        let (mut initiator, packet) = start(&a, &b_public, offered);
        let received = open(&b, &packet).expect("opens");
        assert_eq!(received.remote(), a_public);
        assert_eq!(received.secret(), SECRET);
        let (at_b, response) = received.accept(77, 88, supported).expect("accepts");
        let response = Response::parse(&response).expect("layout");
        assert_eq!(response.session, 9);
        let at_a = initiator.finish(&response).expect("finishes");
        assert_eq!((at_a.remote_session, at_a.remote_incarnation), (77, 88));
        assert_eq!((at_b.remote_session, at_b.remote_incarnation), (9, 8));
        assert_eq!((at_a.cipher, at_b.cipher), (cipher, cipher));
        for (from, to) in [(&at_a, &at_b), (&at_b, &at_a)] {
            let mut buf = [0; HEADER + 4 + TAG];
            let mut sealer = Sealer::new(from.cipher, &from.sealing, 0);
            let mut opener = Opener::new(to.cipher, &to.opening, Replay::window());
            sealer.seal_in_place(Label::data(1), &mut buf, 4).expect("room");
            assert!(opener.open_in_place(&mut buf).is_ok());
        }
        assert_ne!(at_a.sealing.expose(), at_a.opening.expose());
    }
}

#[test]
fn every_changed_bit_of_an_initiation_is_refused() {
    let ((a, _), (b, b_public)) = (keys(1), keys(2));
    let (_, packet) = start(&a, &b_public, FEATURE_AES);
    for bit in 0..packet.len() * 8 {
        let mut forged = packet;
        forged[bit / 8] ^= 1 << (bit % 8);
        if let Ok(initiation) = Initiation::parse(&forged) {
            let opened = Received::open(&b, &initiation, &mut SystemEntropy::default());
            // X25519 ignores the top bit of a public key (RFC 7748 §5); the
            // transcript does not.
            assert!(opened.is_err(), "bit {bit}");
        }
    }
    assert!(open(&keys(3).0, &packet).is_err(), "made for another");
}

#[test]
fn a_forged_response_does_not_spoil_the_handshake() {
    let ((a, _), (b, b_public)) = (keys(1), keys(2));
    let (mut initiator, packet) = start(&a, &b_public, FEATURE_AES);
    let (_, response) = open(&b, &packet).expect("opens").accept(1, 2, 0).expect("accepts");
    for bit in HEADER * 8..response.len() * 8 {
        let mut forged = response;
        forged[bit / 8] ^= 1 << (bit % 8);
        let forged = Response::parse(&forged).expect("layout");
        assert!(matches!(initiator.finish(&forged), Err(HandshakeError::Forged)), "bit {bit}");
    }
    let response = Response::parse(&response).expect("layout");
    assert!(initiator.finish(&response).is_ok());
}

#[test]
fn without_randomness_nothing_is_sent() {
    struct Dry;
    impl Entropy for Dry {
        fn fill(&mut self, _: &mut [u8]) -> Result<(), EntropyFailed> {
            Err(EntropyFailed)
        }
    }
    let ((a, _), (_, b_public)) = (keys(1), keys(2));
    let started = Initiator::start(&a, &b_public, 0, SECRET, &mut Dry);
    assert!(matches!(started, Err(HandshakeError::Entropy(EntropyFailed))));
}
