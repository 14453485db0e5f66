//! What many peers and routes cost a packet: a core with 10,000 peers and 100,000
//! prefixes beside one with one peer, in memory.
//!
//! ```text
//! hub ── peer 0 … peer N−1, each with ten prefixes of /28
//! ```
//!
//! Packets of 1,400 bytes go to and come from random prefixes: in `ip-udp` mode of all
//! peers; in `wireguard` mode of 64 spread among them that have a session. Only what the
//! hub does is timed, in batches, the two hubs in turns.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use conet_benches::report::{Report, Row, Rule};
use conet_benches::stats::{median, spread};
use conet_testkit::random::Random;
use conet_tunnel::{Core, Mode, Outbox, Outgoing, OwnAddresses, PeerConfig, PrivateKey, Replies};
use conet_wire::ip::{Ecn, OuterV4};

use crate::Options;

pub(crate) const CASE: &str = "10,000 peers, 100,000 routes";

const PEERS: u32 = 10_000;
const PREFIXES: u32 = 10;
/// Sessions, and packets in a batch.
const LIVE: u32 = 64;
const LENGTH: u16 = 1400;
const BATCHES: u32 = 100;
const PORT: u16 = 51_820;
const HUB: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), PORT);

/// Measures both directions in both modes.
pub(crate) fn run(report: &mut Report, options: &Options) -> Result<()> {
    for mode in [Mode::IpUdp, Mode::WireGuard] {
        report.progress(&format!("{CASE}, {mode}"));
        let mut one = Hub::new(1, mode)?;
        let mut many = Hub::new(PEERS, mode)?;
        let mut random = Random::new(1);
        // Out and in, of many and of one.
        let mut values = [const { Vec::new() }; 4];
        for _ in 0..options.rounds.max(1) {
            let mut spent = [Duration::ZERO; 4];
            for _ in 0..BATCHES {
                for (index, hub) in [&mut many, &mut one].into_iter().enumerate() {
                    spent[index] += hub.send(&mut random)?;
                    spent[index + 2] += hub.receive(&mut random)?;
                }
            }
            for (all, spent) in values.iter_mut().zip(spent) {
                all.push(spent.as_nanos() as f64 / f64::from(BATCHES * LIVE));
            }
        }
        for (metric, at) in [("out", 0), ("in", 2)] {
            report.add(Row {
                case: CASE.to_owned(),
                metric: format!("a packet {metric}, {mode}"),
                unit: "ns",
                ours: median(&values[at]),
                peers: vec![("one peer".to_owned(), median(&values[at + 1]))],
                rule: Some(Rule::times(2.0, "one peer")),
                bound: None,
                pin: "not pinned".to_owned(),
                runs: values[at].len(),
                spread: spread(&values[at]),
            })?;
        }
    }
    Ok(())
}

/// One end of a tunnel, and what it has to say.
struct End {
    core: Core,
    out: Outbox,
    back: Replies,
}

impl End {
    fn new(key: PrivateKey, inner: Ipv4Addr, outer: IpAddr, now: Instant) -> Self {
        let own = OwnAddresses { inner: vec![inner.into()], outer: vec![outer] };
        let core = Core::new(key, own, now, Duration::from_secs(1 << 30));
        Self { core, out: Outbox::new(), back: Replies::default() }
    }

    fn takes(&mut self, from: SocketAddr, mut datagram: Vec<u8>) -> bool {
        self.core.handle_udp(from, Ecn::NotEct, &mut datagram, &mut self.out).is_some()
    }

    fn sends(&mut self, packet: &[u8]) -> Result<()> {
        let packet = Outgoing::whole(packet).map_err(|reason| anyhow!("{reason}"))?;
        self.core.handle_device(&packet, &mut self.out, &mut self.back);
        Ok(())
    }

    /// What it has to say, which is then said.
    fn said(&mut self) -> Vec<Vec<u8>> {
        let all = self
            .out
            .transmits()
            .flat_map(|transmit| transmit.datagrams().map(<[u8]>::to_vec).collect::<Vec<_>>());
        let all = all.collect();
        self.out.clear();
        all
    }
}

struct Hub {
    end: End,
    mode: Mode,
    peers: u32,
    /// With a session, and which each is.
    live: Vec<(u32, End)>,
}

fn key(number: u32) -> PrivateKey {
    let mut bytes = [7; 32];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    PrivateKey::from_bytes(bytes)
}

fn endpoint(peer: u32) -> SocketAddr {
    (Ipv4Addr::from(0x6440_0001 + peer), PORT).into()
}

fn prefix(peer: u32, number: u32) -> u32 {
    0x0a00_0000 + (peer * PREFIXES + number) * 16
}

/// An address of the hub's own.
const INSIDE: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 2);

fn packet(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    let mut bytes = vec![7; usize::from(LENGTH)];
    let header = OuterV4 {
        source,
        destination,
        protocol: 17,
        ttl: 64,
        ecn: Ecn::NotEct,
        dont_fragment: true,
        total_len: LENGTH,
    };
    if let Some(space) = bytes.first_chunk_mut() {
        header.emit(space);
    }
    bytes
}

impl Hub {
    fn new(peers: u32, mode: Mode) -> Result<Self> {
        let now = Instant::now();
        let mut end = End::new(key(u32::MAX), Ipv4Addr::new(172, 16, 0, 1), HUB.ip(), now);
        for peer in 0..peers {
            let prefixes = (0..PREFIXES)
                .map(|number| format!("{}/28", Ipv4Addr::from(prefix(peer, number))).parse());
            let prefixes = prefixes.collect::<Result<_, _>>().context("a prefix")?;
            let config = PeerConfig::new(key(peer).public(), Some(endpoint(peer)), prefixes);
            end.core.add_peer(&PeerConfig { mode, ..config })?;
        }
        let mut hub = Self { end, mode, peers, live: Vec::new() };
        if mode == Mode::WireGuard {
            for number in 0..LIVE.min(peers) {
                hub.connect(number * (peers / LIVE.min(peers)), now)?;
            }
        }
        Ok(hub)
    }

    /// A handshake with a peer, begun by the hub.
    fn connect(&mut self, peer: u32, now: Instant) -> Result<()> {
        let at = endpoint(peer);
        let own = Ipv4Addr::from(prefix(peer, 0) + 1);
        let mut end = End::new(key(peer), own, at.ip(), now);
        let all = vec!["172.16.0.0/12".parse().context("a prefix")?];
        end.core.add_peer(&PeerConfig::new(key(u32::MAX).public(), Some(HUB), all))?;
        self.end.sends(&packet(INSIDE, own))?;
        for _ in 0..3 {
            for datagram in self.end.said() {
                end.takes(HUB, datagram);
            }
            for datagram in end.said() {
                self.end.takes(at, datagram);
            }
        }
        end.sends(&packet(own, INSIDE))?;
        let arrived = end.said().into_iter().filter(|one| self.end.takes(at, one.clone())).count();
        ensure!(arrived == 1, "no session with peer {peer}");
        self.live.push((peer, end));
        Ok(())
    }

    /// A peer that can be sent to, and an address of its.
    fn choose(&self, random: &mut Random, turn: u32) -> (usize, u32, Ipv4Addr) {
        let below = |random: &mut Random, bound: u32| {
            u32::try_from(random.below(bound.into())).unwrap_or_default()
        };
        let (at, peer) = match self.live.len() {
            0 => (0, below(random, self.peers)),
            live => {
                let at = turn as usize % live;
                (at, self.live[at].0)
            }
        };
        let address = prefix(peer, below(random, PREFIXES)) + below(random, 16);
        (at, peer, Ipv4Addr::from(address))
    }

    /// A batch from the device.
    fn send(&mut self, random: &mut Random) -> Result<Duration> {
        let packets: Vec<_> =
            (0..LIVE).map(|turn| packet(INSIDE, self.choose(random, turn).2)).collect();
        self.end.out.clear();
        let began = Instant::now();
        for packet in &packets {
            self.end.sends(packet)?;
            // A driver sends when there is nothing more, or the space is used up.
            if self.end.out.is_full() {
                self.end.out.clear();
            }
        }
        let spent = began.elapsed();
        self.end.out.clear();
        Ok(spent)
    }

    /// A batch from the network.
    fn receive(&mut self, random: &mut Random) -> Result<Duration> {
        let mut datagrams = Vec::new();
        for turn in 0..LIVE {
            let (at, peer, address) = self.choose(random, turn);
            let packet = packet(address, INSIDE);
            match self.mode {
                Mode::WireGuard => {
                    let (_, end) = &mut self.live[at];
                    end.sends(&packet)?;
                    datagrams.extend(end.said().into_iter().map(|said| (endpoint(peer), said)));
                }
                _ => datagrams.push((endpoint(peer), packet)),
            }
        }
        let began = Instant::now();
        let mut arrived = 0;
        for (from, datagram) in &mut datagrams {
            let inner = self.end.core.handle_udp(*from, Ecn::NotEct, datagram, &mut self.end.out);
            arrived += usize::from(inner.is_some());
        }
        let spent = began.elapsed();
        self.end.out.clear();
        ensure!(arrived == LIVE as usize, "{arrived} of {LIVE} packets were taken");
        Ok(spent)
    }
}
