//! Session packets: from a stranger, and from a peer that keeps to no rule.
//!
//! The input is a row of steps, each `kind u8, length u16 LE, bytes`:
//!
//! ```text
//! kind 0   a datagram as it is
//! kind 1   the same, with the session index of a standing session put in
//! kind 2   frames, sealed by the peer            kind 3   the same, tracked
//! kind 4   time passes: length ms, no bytes
//! other    the application answers its oldest call with the bytes
//! ```
//!
//! Bytes behind the last whole step are one more datagram.

use conet_transport::session::handshake::{
    Entropy, EntropyFailed, Established, FEATURES, Initiator, PrivateKey,
};
use conet_transport::session::protect::{Label, Sealer};
use conet_transport::session::{Event, Hub, HubConfig, IncomingId, Limits};
use conet_transport::time::Instant;
use conet_wire::session::frame::Frames;
use conet_wire::session::handshake::{Initiation, InitiationSecret, Response};
use conet_wire::session::{
    FLAG_TRACKED, HEADER, Header, PacketKind, TAG, emit_record_prefix, parse_record_prefix,
};
use std::collections::{HashSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

/// Feeds the steps to a hub with a standing session.
///
/// # Panics
///
/// If a call is handed out twice, or a layout is not read back as it was written:
/// findings.
pub fn session_packet(data: &[u8]) {
    layouts(data);
    let Some(mut rig) = Rig::new() else { return };
    let mut rest = data;
    while let Some((&[kind, low, high], after)) = rest.split_first_chunk::<3>() {
        let length = usize::from(u16::from_le_bytes([low, high]));
        if kind == 4 {
            rig.pass(Duration::from_millis(length as u64));
            rest = after;
            continue;
        }
        let Some((bytes, after)) = after.split_at_checked(length) else { break };
        rest = after;
        rig.step(kind, bytes);
    }
    rig.step(0, rest);
    rig.pass(Duration::from_secs(20));
}

/// Whatever parses, emits to the same bytes again.
fn layouts(data: &[u8]) {
    if let Ok(header) = Header::parse(data) {
        assert!(data.starts_with(&header.emit()));
    }
    if let Some(prefix) = data.first_chunk()
        && let Ok(length) = parse_record_prefix(*prefix)
    {
        assert_eq!(emit_record_prefix(length), Some(*prefix));
    }
    if let Ok(initiation) = Initiation::parse(data) {
        let clear = if initiation.resumes {
            Initiation::emit_clear_resumption(initiation.offered)
        } else {
            Initiation::emit_clear(initiation.offered)
        };
        assert_eq!(clear, *initiation.clear);
    }
    if let Ok(response) = Response::parse(data) {
        assert!(data.starts_with(&Response::emit_clear(response.session)));
    }
    let mut buf = vec![0; data.len()];
    for frame in Frames::new(data).flatten() {
        let length = frame.emit(&mut buf);
        let again = length.ok().and_then(|length| buf.get(..length));
        let again = again.and_then(|bytes| Frames::new(bytes).next());
        assert_eq!(again, Some(Ok(frame)));
    }
}

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

struct Rig {
    hub: Hub,
    now: Instant,
    peer_address: SocketAddr,
    keys: Established,
    sealer: Sealer,
    seen: HashSet<IncomingId>,
    open: VecDeque<IncomingId>,
    out: Vec<u8>,
}

impl Rig {
    fn new() -> Option<Self> {
        let (server, client) = (PrivateKey::new([1; 32]), PrivateKey::new([2; 32]));
        let (server_key, client_key) = (server.public(), client.public());
        let mut entropy = Counting(3);
        let config = HubConfig {
            limits: Limits {
                slots: 8,
                payload: 16 * 1024,
                assembling: 32 * 1024,
                ..Limits::default()
            },
            started: Duration::ZERO,
            features: FEATURES,
            entropy: Box::new(Counting(9)),
            ..HubConfig::new(server)
        };
        let mut hub = Hub::new(config).ok()?;
        let now = Instant::START;
        hub.add_peer(now, client_key, None);
        let secret = InitiationSecret { counter: 1, incarnation: 2, session: 3 };
        let (mut initiator, mut packet) =
            Initiator::start(&client, &server_key, FEATURES, secret, &mut entropy).ok()?;
        let peer_address = SocketAddr::from(([192, 0, 2, 2], 1));
        hub.handle_datagram(now, peer_address, &mut packet);
        let mut out = Vec::new();
        hub.poll_transmit(now, &mut out)?;
        let keys = initiator.finish(&Response::parse(&out).ok()?).ok()?;
        let sealer = Sealer::new(keys.cipher, &keys.sealing, 0);
        let (seen, open) = (HashSet::new(), VecDeque::new());
        let mut rig = Self { hub, now, peer_address, keys, sealer, seen, open, out };
        // The first packet confirms the keys.
        rig.step(2, &[]);
        rig.hub.call(now, &client_key, b"a call of ours".to_vec(), None).ok()?;
        rig.hub.call(now, &client_key, vec![7; 5000], None).ok()?;
        rig.settle();
        Some(rig)
    }

    fn step(&mut self, kind: u8, bytes: &[u8]) {
        let mut packet = bytes.to_vec();
        match kind {
            0 => {}
            1 => {
                if let Some(index) = packet.get_mut(4..8) {
                    index.copy_from_slice(&self.keys.remote_session.to_le_bytes());
                }
            }
            2 | 3 => {
                packet = [&[0; HEADER][..], bytes, &[0; TAG]].concat();
                let flags = if kind == 3 { FLAG_TRACKED } else { 0 };
                let session = self.keys.remote_session;
                let label = Label { kind: PacketKind::Data, flags, session };
                if self.sealer.seal_in_place(label, &mut packet, bytes.len()).is_err() {
                    return;
                }
            }
            _ => {
                if let Some(id) = self.open.pop_front() {
                    let peer = PrivateKey::new([2; 32]).public();
                    // A call may have died with its client's earlier life.
                    self.hub.reply(&peer, id, bytes.to_vec()).ok();
                }
                self.settle();
                return;
            }
        }
        self.hub.handle_datagram(self.now, self.peer_address, &mut packet);
        self.settle();
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        // Bounded: a hub that wants to act at every moment would hang here.
        for _ in 0..2000 {
            let Some(next) = self.hub.poll_timeout(self.now).filter(|next| *next <= end) else {
                break;
            };
            self.now = next.max(self.now);
            self.hub.handle_timeout(self.now);
            self.settle();
        }
        self.now = end;
    }

    fn settle(&mut self) {
        while let Some(event) = self.hub.poll_event() {
            if let Event::Call { id, .. } = event {
                assert!(self.seen.insert(id), "handed out twice");
                self.open.push_back(id);
            }
        }
        while self.hub.poll_transmit(self.now, &mut self.out).is_some() {
            assert!(self.out.len() <= Limits::default().datagram, "datagram too long");
        }
    }
}
