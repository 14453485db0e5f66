//! Nodes of one side of a scene, with an application each, and what happened at them.
//!
//! The first byte of a call says what its answer is; the rest follows from its length:
//!
//! ```text
//! e  argument and payload, reversed       s  the same, and the row stops
//! l  70,000 bytes                         w  as e, but a second and a half later
//! r  refused                              n  none
//! ```

use conet_transport::session::handshake::{Entropy, EntropyFailed, PrivateKey, PublicKey};
use conet_transport::session::{
    BATCH_BUFFER, BulkPort, CallError, CallId, Event, Hub, HubConfig, IncomingId, Lane, Limits,
    PeerStatus, Strays,
};
use conet_transport::time::Instant;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

/// Everything but payloads for bulk goes to this port.
pub(crate) const MAIN: u16 = 7;
const BULK: u16 = 8;
/// The longest datagram that a device for bulk takes.
const DEVICE: usize = 1472;
const LONG: usize = 70_000;
const PARKED: Duration = Duration::from_millis(1500);

#[derive(Clone, Debug)]
pub(crate) struct Datagram {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) bytes: Vec<u8>,
}

pub(crate) fn address(host: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, host], MAIN))
}

pub(crate) fn host_of(address: SocketAddr) -> u8 {
    match address {
        SocketAddr::V4(address) => address.ip().octets()[3],
        SocketAddr::V6(_) => panic!("hosts have IPv4 addresses"),
    }
}

pub(crate) fn key(number: u8) -> PublicKey {
    PrivateKey::new([number; 32]).public()
}

/// Bytes that depend on how many are asked for, and on nothing else.
struct Recorded(u8);

impl Entropy for Recorded {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), EntropyFailed> {
        let length = u8::try_from(bytes.len()).expect("keys and indices");
        for (at, byte) in (0u8..).zip(bytes) {
            *byte = self.0 ^ length.wrapping_mul(31) ^ at.wrapping_mul(7);
        }
        Ok(())
    }
}

fn payload(what: u8, length: usize) -> Vec<u8> {
    let bytes = (0..=250u8).cycle().map(|byte| byte ^ what);
    [what].into_iter().chain(bytes).take(length).collect()
}

fn answer(argument: &[u8], payload: &[u8]) -> Vec<u8> {
    if payload.first() == Some(&b'l') {
        return self::payload(b'l', LONG);
    }
    argument.iter().chain(payload).rev().copied().collect()
}

struct Node {
    hub: Hub,
    /// What each of our calls is to end with.
    calls: HashMap<CallId, (String, Result<Vec<u8>, CallError>)>,
    /// Answers to give, by time.
    parked: Vec<(Instant, PublicKey, IncomingId, Vec<u8>)>,
}

/// Nodes by host.
#[derive(Default)]
pub(crate) struct Side {
    nodes: BTreeMap<u8, Node>,
    pub(crate) notes: Vec<String>,
    /// Bytes sent.
    pub(crate) sent: usize,
    known: BTreeSet<(SocketAddr, SocketAddr)>,
    farewells: Vec<Datagram>,
    /// An image that is thawed a second time.
    kept: Vec<u8>,
}

impl Side {
    /// Starts the node of key `number` at `host`, with so many keys' features.
    pub(crate) fn start(&mut self, host: u8, number: u8, features: u32, limits: Limits) {
        let config = HubConfig {
            private_key: PrivateKey::new([number; 32]),
            limits,
            started: Duration::from_secs(host.into()),
            features,
            entropy: Box::new(Recorded(host * 0x11)),
        };
        let mut hub = Hub::new(config).expect("entropy");
        hub.set_bulk(Some(BulkPort { port: BULK, buffer: 1 << 20 }));
        self.nodes.insert(host, Node { hub, calls: HashMap::new(), parked: Vec::new() });
    }

    pub(crate) fn hub(&mut self, host: u8) -> &mut Hub {
        &mut self.nodes.get_mut(&host).expect("a node").hub
    }

    /// The node is no more, and nobody is told.
    pub(crate) fn crash(&mut self, host: u8) {
        self.nodes.remove(&host);
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = &dyn Counted> {
        self.nodes.values().map(|node| &node.hub as &dyn Counted)
    }

    pub(crate) fn call(
        &mut self,
        now: Instant,
        host: u8,
        to: u8,
        lane: Lane,
        what: u8,
        length: usize,
    ) {
        let node = self.nodes.get_mut(&host).expect("a node");
        let payload = payload(what, length);
        let result = match what {
            b'r' => Err(CallError::Refused),
            b'n' => Err(CallError::Unknown),
            _ => Ok(answer(&[], &payload)),
        };
        let id = node.hub.call_on(now, &key(to), lane, payload, None).expect("taken");
        node.calls.insert(id, (format!("{}{length}", char::from(what)), result));
    }

    /// Calls of a row, 40 bytes each: what they are, and whether they run also behind one that
    /// stopped.
    pub(crate) fn row(&mut self, now: Instant, host: u8, to: u8, row: &[(u8, bool)]) {
        let node = self.nodes.get_mut(&host).expect("a node");
        let (mut before, mut stopped) = (Ok(Vec::new()), false);
        let mut results = Vec::new();
        for (what, anyhow) in row {
            let argument = before.as_ref().ok().filter(|_| !stopped || *anyhow);
            before = match argument {
                Some(argument) => Ok(answer(argument, &payload(*what, 40))),
                None => Err(CallError::Aborted),
            };
            stopped = *what == b's';
            results.push((format!("{} of a row", char::from(*what)), before.clone()));
        }
        let calls = row.iter().map(|(what, anyhow)| (payload(*what, 40), *anyhow));
        let mut ids = Vec::new();
        node.hub.call_row(now, &key(to), Lane::Calls, calls, None, &mut ids).expect("taken");
        node.calls.extend(ids.into_iter().zip(results));
    }

    /// Gives up the calls that get no answer.
    pub(crate) fn cancel(&mut self, now: Instant, host: u8, to: u8) {
        let node = self.nodes.get_mut(&host).expect("a node");
        let ids = node.calls.iter().filter(|(_, (what, _))| what.starts_with('n'));
        for id in ids.map(|(id, _)| *id).collect::<Vec<_>>() {
            node.hub.cancel(now, &key(to), id).expect("known");
        }
    }

    /// The session of the node at `from` with `peer` goes on at the node at `to`, which has
    /// the same key, and its calls with it.
    pub(crate) fn thaw(&mut self, now: Instant, image: &[u8], from: Option<u8>, to: u8) {
        let node = self.nodes.get_mut(&to).expect("a node");
        node.hub.thaw(now, image, None).expect("ours");
        if let Some(old) = from.and_then(|from| self.nodes.get_mut(&from)) {
            let (calls, parked) = (std::mem::take(&mut old.calls), std::mem::take(&mut old.parked));
            let node = self.nodes.get_mut(&to).expect("a node");
            (node.calls, node.parked) = (calls, parked);
        }
    }

    /// The node says goodbye and is no more.
    pub(crate) fn leave(&mut self, now: Instant, host: u8) {
        let mut bytes = Vec::new();
        while let Some(to) = self.hub(host).poll_farewell(now, &mut bytes) {
            self.farewells.push(Datagram { from: address(host), to, bytes: bytes.clone() });
        }
        self.crash(host);
    }

    pub(crate) fn keep(&mut self, image: Vec<u8>) {
        self.kept = image;
    }

    pub(crate) fn kept(&self) -> Vec<u8> {
        self.kept.clone()
    }

    /// What comes to where nobody is is lost.
    pub(crate) fn take(&mut self, now: Instant, mut datagram: Datagram) {
        if let Some(node) = self.nodes.get_mut(&host_of(datagram.to)) {
            node.hub.handle_datagram(now, datagram.from, &mut datagram.bytes);
            self.turn_events(now);
        }
    }

    /// Lets time pass and gives what is sent.
    pub(crate) fn turn(&mut self, now: Instant) -> impl Iterator<Item = Datagram> {
        let mut sent = std::mem::take(&mut self.farewells);
        for (host, node) in &mut self.nodes {
            node.hub.handle_timeout(now);
            for (_, peer, id, answer) in node.parked.extract_if(.., |(at, ..)| *at <= now) {
                node.hub.reply(&peer, id, answer).expect("waits");
            }
            node.send(now, *host, &mut sent);
        }
        self.turn_events(now);
        for datagram in &sent {
            self.sent += datagram.bytes.len();
            if self.known.insert((datagram.from, datagram.to)) {
                let (from, to) = (datagram.from, datagram.to);
                let hosts = (host_of(from), host_of(to));
                self.notes.push(format!(
                    "{}:{} sends to {}:{}",
                    hosts.0,
                    from.port(),
                    hosts.1,
                    to.port()
                ));
            }
        }
        sent.into_iter()
    }

    fn turn_events(&mut self, now: Instant) {
        for (host, node) in &mut self.nodes {
            while let Some(event) = node.hub.poll_event() {
                self.notes.push(format!("{host} {}", node.on_event(now, event)));
            }
        }
    }
}

/// What a hub has counted.
pub(crate) trait Counted {
    fn status(&self, now: Instant) -> Vec<PeerStatus>;
    fn strays(&self) -> Strays;
}

impl Counted for Hub {
    fn status(&self, now: Instant) -> Vec<PeerStatus> {
        self.status(now).collect()
    }

    fn strays(&self) -> Strays {
        self.strays()
    }
}

fn name_of(peer: PublicKey) -> u8 {
    (1..9).find(|number| key(*number) == peer).expect("one of few")
}

impl Node {
    fn send(&mut self, now: Instant, host: u8, sent: &mut Vec<Datagram>) {
        let mut buf = vec![0; BATCH_BUFFER];
        while let Some(transmit) = self.hub.poll_batch(now, &mut buf, Some(16)) {
            if transmit.is_bulk && transmit.segment > DEVICE {
                self.hub.handle_too_long(&transmit);
                continue;
            }
            let port = if transmit.is_bulk { BULK } else { MAIN };
            let from = SocketAddr::new(address(host).ip(), port);
            sent.extend(buf[..transmit.length].chunks(transmit.segment).map(|bytes| Datagram {
                from,
                to: transmit.to,
                bytes: bytes.to_vec(),
            }));
        }
    }

    fn on_event(&mut self, now: Instant, event: Event) -> String {
        match event {
            Event::Up(peer) => format!("up {}", name_of(peer)),
            Event::Down(peer, reason) => format!("down {} {reason:?}", name_of(peer)),
            Event::Cancelled { peer, id } => {
                self.hub.refuse(&peer, id).expect("to be answered");
                "cancelled".to_owned()
            }
            Event::Call { peer, id, payload, argument, lane } => {
                self.answer(now, peer, id, &payload, argument.as_deref().unwrap_or_default());
                let what = payload[0];
                assert!(payload == self::payload(what, payload.len()), "another payload");
                let row = if argument.is_some() { " in a row" } else { "" };
                format!("called {lane:?} {}{}{row}", char::from(what), payload.len())
            }
            Event::Ended { call, result, .. } => {
                let Some((what, expected)) = self.calls.remove(&call) else {
                    return format!("{:?} for a second life", result.map(|reply| reply.len()));
                };
                let is_expected = result == expected;
                let result = result.map(|reply| reply.len());
                assert!(is_expected, "{what} ended as {result:?}");
                match result {
                    Ok(_) => format!("reply to {what}"),
                    Err(error) => format!("{error:?} {what}"),
                }
            }
        }
    }

    fn answer(
        &mut self,
        now: Instant,
        peer: PublicKey,
        id: IncomingId,
        payload: &[u8],
        argument: &[u8],
    ) {
        let answer = answer(argument, payload);
        match payload[0] {
            b'r' => self.hub.refuse(&peer, id),
            b's' => self.hub.reply_and_stop(&peer, id, answer),
            b'w' => {
                self.parked.push((now + PARKED, peer, id, answer));
                Ok(())
            }
            b'n' => Ok(()),
            _ => self.hub.reply(&peer, id, answer),
        }
        .expect("waits");
    }
}
