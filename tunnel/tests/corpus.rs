//! The committed corpus of the fuzz target `tunnel_packet`: complete, and
//! harmless when replayed.
//!
//! `CONET_WRITE_CORPUS=1` writes the seeds anew after a change of the generator.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

use std::collections::BTreeMap;
use std::path::Path;
use std::{env, fs};

use conet_testkit::random::{self, Random};
use conet_tunnel::fuzz_support::tunnel_packet;
use conet_wire::ip::{Ecn, IPV4_HEADER, OuterV4};

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/tunnel_packet");

/// How the rest of an input reaches the core; see `fuzz_support`.
const UDP: u8 = 0;
const KNOWN_SESSION: u8 = 1;
const ENCRYPTED: u8 = 2;
const RAW: u8 = 3;
const WRAPPED: u8 = 4;
const DEVICE: u8 = 5;
const FRAME: u8 = 6;
const BARE: u8 = 7;

const WIREGUARD_PEER: [u8; 4] = [192, 0, 2, 2];
const IPIP_PEER: [u8; 4] = [192, 0, 2, 3];

fn v4(source: [u8; 4], destination: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; IPV4_HEADER + payload.len()];
    let header = OuterV4 {
        source: source.into(),
        destination: destination.into(),
        protocol,
        ttl: 64,
        ecn: Ecn::Ect0,
        dont_fragment: true,
        total_len: u16::try_from(bytes.len()).unwrap(),
    };
    header.emit(bytes.first_chunk_mut().unwrap());
    bytes[IPV4_HEADER..].copy_from_slice(payload);
    bytes
}

fn v6(site: u8) -> Vec<u8> {
    let mut bytes = vec![0; 48];
    bytes[0] = 0x60;
    bytes[5] = 8;
    bytes[6] = 58;
    bytes[7] = 64;
    bytes[8] = 0xfd;
    bytes[11] = site;
    bytes[23] = 2;
    bytes[24] = 0xfd;
    bytes[27] = 1;
    bytes[39] = 2;
    bytes
}

fn edited(bytes: &[u8], edit: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut copy = bytes.to_vec();
    edit(&mut copy);
    copy
}

/// Inner packets by name, as the peer whose addresses end in `site` would send.
fn inner_packets(site: u8) -> Vec<(&'static str, Vec<u8>)> {
    let (source, us) = ([10, 77, site, 2], [10, 77, 1, 2]);
    let good = v4(source, us, 17, b"payload");
    vec![
        ("allowed-v6", v6(site)),
        ("foreign-v6", v6(9)),
        ("foreign-source", v4([10, 77, 9, 9], us, 17, b"payload")),
        ("multicast-source", v4([224, 0, 0, 1], us, 17, b"")),
        ("loopback-source", v4([127, 0, 0, 1], us, 17, b"")),
        ("unspecified-source", v4([0, 0, 0, 0], us, 17, b"")),
        ("broadcast-destination", v4(source, [255; 4], 17, b"")),
        ("nested-4", v4(source, us, 4, &good)),
        ("nested-41", v4(source, us, 41, &v6(site))),
        ("length-too-long", edited(&good, |p| p[2] = 0xff)),
        ("length-too-short", edited(&good, |p| p[3] = 3)),
        ("header-too-short", edited(&good, |p| p[0] = 0x41)),
        ("header-too-long", edited(&good, |p| p[0] = 0x4f)),
        ("version-9", edited(&good, |p| p[0] = 0x95)),
        ("no-hops", edited(&good, |p| p[8] = 0)),
        ("trailing-bytes", edited(&good, |p| p.extend_from_slice(&[0; 6]))),
        ("jumbo-v6", edited(&v6(site), |p| (p[5], p[6]) = (0, 0))),
        ("fragment", edited(&good, |p| p[6] = 0x20)),
        ("allowed-v4", good),
    ]
}

fn seeds() -> BTreeMap<String, Vec<u8>> {
    let mut seeds = BTreeMap::new();
    let mut add = |name: String, how: u8, bytes: &[u8]| {
        let mut input = vec![how];
        input.extend_from_slice(bytes);
        assert!(seeds.insert(name, input).is_none());
    };
    add("udp-empty".into(), UDP, b"");
    for (kind, len) in [(1, 148), (2, 92), (3, 64), (4, 31), (4, 32), (4, 1452), (4, 9000), (5, 32)]
    {
        let message = edited(&vec![0; len], |m| m[0] = kind);
        add(format!("udp-type-{kind}-{len}-bytes"), UDP, &message);
        add(format!("session-type-{kind}-{len}-bytes"), KNOWN_SESSION, &message);
    }
    let last = edited(&[0xff; 64], |m| m[..4].copy_from_slice(&[4, 0, 0, 0]));
    add("session-last-counter".into(), KNOWN_SESSION, &last);
    for (name, packet) in inner_packets(2) {
        add(format!("wireguard-{name}"), ENCRYPTED, &packet);
    }
    for (name, packet) in inner_packets(3) {
        add(format!("ipip-{name}"), WRAPPED, &packet);
    }
    let good = v4([10, 77, 3, 2], [10, 77, 1, 2], 17, b"payload");
    let us = [192, 0, 2, 1];
    let outer = v4(IPIP_PEER, us, 4, &good);
    add("raw-stranger".into(), RAW, &v4([192, 0, 2, 99], us, 4, &good));
    add("raw-wrong-mode".into(), RAW, &v4(WIREGUARD_PEER, us, 4, &good));
    add("raw-fragment".into(), RAW, &edited(&outer, |p| p[6] = 0x20));
    add("raw-congested".into(), RAW, &edited(&outer, |p| p[1] |= 3));
    add("raw-protocol-contradicts".into(), RAW, &v4(IPIP_PEER, us, 41, &good));
    add("raw-good".into(), RAW, &outer);
    for (name, to) in [("wireguard", 2), ("ipip", 3), ("nobody", 9)] {
        for len in [0, 100, 1400, 1600] {
            let packet = v4([10, 77, 1, 2], [10, 77, to, 2], 6, &vec![7; len]);
            add(format!("device-to-{name}-{len}-bytes"), DEVICE, &packet);
        }
    }
    for (name, packet) in inner_packets(4) {
        add(format!("bare-{name}"), BARE, &packet);
    }
    let tcp = edited(&v4([10, 77, 1, 2], [10, 77, 2, 2], 6, &vec![7; 4020]), |p| p[32] = 0x50);
    let udp = v4([10, 77, 1, 2], [10, 77, 2, 2], 17, &vec![7; 4008]);
    // flags, type, header length, size, checksum from and at.
    for (name, header, packet) in [
        ("plain", [0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &udp[..100]),
        ("tcp", [1, 1, 40, 0, 0xe8, 3, 20, 0, 16, 0], &tcp),
        ("tcp-ecn", [1, 0x81, 40, 0, 0xe8, 3, 20, 0, 16, 0], &tcp),
        ("udp", [1, 5, 28, 0, 0xe8, 3, 20, 0, 6, 0], &udp),
        ("size-0", [1, 1, 40, 0, 0, 0, 20, 0, 16, 0], &tcp),
        ("size-65535", [1, 1, 40, 0, 0xff, 0xff, 20, 0, 16, 0], &tcp),
        ("tcp-as-v6", [1, 4, 40, 0, 0xe8, 3, 20, 0, 16, 0], &tcp),
        ("checksum-beyond", [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], &tcp),
        ("transport-beyond", [1, 1, 40, 0, 0xe8, 3, 0xff, 0xff, 16, 0], &tcp),
        ("unknown-type", [1, 3, 40, 0, 0xe8, 3, 20, 0, 16, 0], &tcp),
    ] {
        let mut frame = header.to_vec();
        frame.extend_from_slice(packet);
        add(format!("frame-{name}"), FRAME, &frame);
    }
    add("device-loop".into(), DEVICE, &v4(us, [10, 77, 2, 2], 6, b"payload"));
    seeds
}

#[test]
fn the_corpus_holds_every_seed_and_replays_without_harm() {
    let corpus = Path::new(CORPUS);
    if env::var_os("CONET_WRITE_CORPUS").is_some() {
        fs::create_dir_all(corpus).unwrap();
        for (name, bytes) in seeds() {
            fs::write(corpus.join(name), bytes).unwrap();
        }
    }
    for (name, bytes) in seeds() {
        let stored = fs::read(corpus.join(&name)).unwrap_or_default();
        assert_eq!(stored, bytes, "{name} is missing or old; write the corpus anew");
    }
    let mut replayed = 0;
    for entry in fs::read_dir(corpus).unwrap() {
        tunnel_packet(&fs::read(entry.unwrap().path()).unwrap());
        replayed += 1;
    }
    assert!(replayed >= seeds().len());
}

#[test]
fn the_seeds_reach_the_device_where_they_should_and_only_there() {
    let through = ["allowed-v4", "allowed-v6", "fragment"];
    for (name, input) in seeds() {
        let forwarded = tunnel_packet(&input);
        let (how, what) = name.split_once('-').unwrap();
        let expected = match how {
            // WireGuard does not look for tunnels inside, and what follows a packet
            // is padding.
            "wireguard" => {
                through.contains(&what)
                    || ["nested-4", "nested-41", "trailing-bytes"].contains(&what)
            }
            "ipip" | "bare" => through.contains(&what) || what == "trailing-bytes",
            "raw" => what == "good" || what == "congested",
            // The error for a packet that does not fit.
            "device" => ["to-wireguard-1600-bytes", "to-ipip-1600-bytes"].contains(&what),
            "frame" => what == "size-65535",
            _ => false,
        };
        assert_eq!(forwarded == 1, expected, "{name}");
    }
}

/// Seeds changed in a few bytes, cut and stretched.
#[test]
fn changed_seeds_harm_nothing() {
    let rounds = env::var("CONET_ROUNDS").ok().and_then(|s| s.parse().ok()).unwrap_or(20_000);
    let mut random = Random::new(random::seed());
    let seeds: Vec<_> = seeds().into_values().collect();
    for _ in 0..rounds {
        tunnel_packet(&random::changed(&mut random, &seeds));
    }
}
