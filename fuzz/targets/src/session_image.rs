//! Frozen sessions, as another process hands them over.

use conet_transport::session::handshake::{
    Entropy, EntropyFailed, FEATURES, PrivateKey, PublicKey,
};
use conet_transport::session::{Event, Hub, HubConfig, Lane, Limits};
use conet_transport::time::Instant;
use std::net::SocketAddr;
use std::time::Duration;

/// Numbers that are always the same: findings must reproduce.
struct Counting(u8);

impl Entropy for Counting {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), EntropyFailed> {
        for byte in bytes {
            self.0 = self.0.wrapping_mul(5).wrapping_add(113);
            *byte = self.0;
        }
        Ok(())
    }
}

const OWNER: u8 = 1;

fn hub(key: u8) -> Option<Hub> {
    let config = HubConfig {
        private_key: PrivateKey::new([key; 32]),
        limits: Limits { payload: 64 * 1024, assembling: 128 * 1024, ..Limits::default() },
        started: Duration::from_secs(1),
        features: FEATURES,
        entropy: Box::new(Counting(key)),
    };
    Hub::new(config).ok()
}

fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 7))
}

/// Thaws the bytes. What thaws is used for a while, and what is frozen of it thaws.
///
/// # Panics
///
/// If a call of a thawed session is handed out twice, or its own image does not thaw:
/// findings.
pub fn session_image(data: &[u8]) {
    let Some(mut one) = hub(OWNER) else { return };
    let mut now = Instant::from_start(Duration::from_secs(2));
    let Ok(thawed) = one.thaw(now, data, Some(address(2))) else { return };
    let mut seen: Vec<_> = thawed.running.iter().map(|(id, _)| *id).collect();
    for (n, id) in seen.clone().into_iter().enumerate() {
        // Nothing sends packets, so an answer is all that can change.
        let done = match n % 3 {
            0 => one.reply(&thawed.peer, id, vec![7; 100 * n % 4000]),
            1 => one.disown(&thawed.peer, id),
            _ => one.refuse(&thawed.peer, id),
        };
        assert!(done.is_ok(), "an image's call cannot be answered");
    }
    // Refused where the image has filled the queue.
    one.call(now, &thawed.peer, vec![1; 50], None).ok();
    let mut buf = Vec::new();
    for _ in 0..200 {
        one.handle_timeout(now);
        for _ in 0..100 {
            if one.poll_transmit(now, &mut buf).is_none() {
                break;
            }
        }
        while let Some(event) = one.poll_event() {
            if let Event::Call { id, .. } = event {
                assert!(!seen.contains(&id), "handed out twice");
                seen.push(id);
            }
        }
        now = one.poll_timeout(now).unwrap_or(now).max(now) + Duration::from_millis(1);
    }
    if let Ok(frozen) = one.freeze(now, &thawed.peer) {
        let again = hub(OWNER).map(|mut hub| hub.thaw(now, &frozen.image, None).is_ok());
        assert!(again != Some(false), "what was frozen does not thaw");
    }
}

/// Real images: a quiet session, and one with calls of each kind under way.
#[must_use]
pub fn session_images() -> Vec<(&'static str, Vec<u8>)> {
    let mut images = Vec::new();
    for (name, calls) in [("quiet", 0), ("few", 1), ("busy", 6), ("full", 12)] {
        images.extend(image(calls).map(|image| (name, image)));
    }
    images
}

fn image(calls: usize) -> Option<Vec<u8>> {
    let (mut one, mut two) = (hub(OWNER)?, hub(2)?);
    let (us, them): (PublicKey, PublicKey) = (one.public_key(), two.public_key());
    let mut now = Instant::from_start(Duration::from_secs(1));
    one.add_peer(now, them, Some(address(2)));
    two.add_peer(now, us, None);
    carry(&mut one, &mut two, &mut now, 200);
    for n in 0..calls {
        for (hub, to) in [(&mut one, &them), (&mut two, &us)] {
            let lane = Lane::ALL[n % 4];
            hub.call_on(now, to, lane, vec![5; [10, 300, 4000][n % 3]], None).ok()?;
            let row = [(vec![1; 9], false), (vec![2; 9], true)].into_iter();
            hub.call_row(now, to, lane, row, None, &mut Vec::new()).ok()?;
        }
    }
    // So few packets that much is still under way.
    carry(&mut one, &mut two, &mut now, 4);
    one.freeze(now, &them).ok().map(|frozen| frozen.image)
}

fn carry(one: &mut Hub, two: &mut Hub, now: &mut Instant, packets: usize) {
    let mut buf = Vec::new();
    for _ in 0..packets {
        if one.poll_transmit(*now, &mut buf).is_some() {
            two.handle_datagram(*now, address(1), &mut buf);
        }
        if two.poll_transmit(*now, &mut buf).is_some() {
            one.handle_datagram(*now, address(2), &mut buf);
        }
        *now = *now + Duration::from_millis(1);
        one.handle_timeout(*now);
        two.handle_timeout(*now);
    }
}
