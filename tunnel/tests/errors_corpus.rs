//! The committed corpus of the fuzz target `tunnel_errors`: complete, and harmless when
//! replayed; and its seeds changed.
//!
//! `CONET_WRITE_CORPUS=1` writes the seeds anew after a change of the generator.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

use std::collections::BTreeMap;
use std::path::Path;
use std::{env, fs};

use conet_testkit::random::{self, Random};
use conet_tunnel::fuzz_support::tunnel_errors;

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/tunnel_errors");

/// The beginning of a packet of `length` bytes; the target makes the rest right.
fn packet(v6: bool, dont_fragment: bool, protocol: u8, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    match v6 {
        true => (bytes[0], bytes[6]) = (0x60, protocol),
        false => {
            (bytes[0], bytes[9]) = (0x45, protocol);
            bytes[6] = if dont_fragment { 0x40 } else { 0 };
            // In ICMP, unreachable.
            bytes[20] = 3;
        }
    }
    bytes
}

fn seeds() -> BTreeMap<String, Vec<u8>> {
    let mut seeds = BTreeMap::new();
    let mut add = |name: String, how: u8, mtu: u16, rest: &[u8]| {
        let input = [&[how][..], &mtu.to_be_bytes(), rest].concat();
        assert!(seeds.insert(name, input).is_none());
    };
    for (how, mode, overhead) in [(0, "wireguard", 60), (1, "ipip", 20), (2, "ip-udp", 28)] {
        for (mtu, over) in [(1500, 0), (1500, 1), (1280, 1), (100, 1), (65_535, 1)] {
            let fits = usize::from(mtu.clamp(552, 1500)) - overhead;
            let at = format!("{mode}-{mtu}-{over}-over");
            add(format!("{at}-df"), how, mtu, &packet(false, true, 6, fits + over));
            add(format!("{at}-v6"), how, mtu, &packet(true, true, 6, fits.max(1280) + over));
        }
        add(format!("{mode}-no-df"), how, 1280, &packet(false, false, 6, 1400));
        add(format!("{mode}-error"), how, 1280, &packet(false, true, 1, 1400));
        add(format!("{mode}-v6-error"), how, 1280, &packet(true, true, 58, 1400));
        add(format!("{mode}-v6-least"), how, 1000, &packet(true, true, 6, 1280));
    }
    add("any".into(), 3, 600, &packet(false, true, 6, 700));
    let (four, six) = (packet(false, true, 6, 60), packet(true, true, 6, 60));
    for (kind, code) in [(3, 4), (3, 1), (3, 13), (11, 0), (5, 1), (12, 0), (8, 0)] {
        let error = |inner: &[u8]| [&[kind, code], inner].concat();
        add(format!("relay-{kind}-{code}-v4"), 7, 1280, &error(&four));
        add(format!("relay-{kind}-{code}-v6"), 7, 1280, &error(&six));
    }
    add("relay-mtu-0".into(), 7, 0, &[&[3, 4][..], &four].concat());
    add("relay-foreign".into(), 5, 1280, &[&[3, 4][..], &four].concat());
    add("relay-other-family".into(), 6, 1280, &[&[3, 4][..], &four].concat());
    add("relay-8-bytes".into(), 5, 1280, &[3, 4, 0x45, 0, 0, 20, 0, 0, 0, 0]);
    add("raw-nothing".into(), 4, 1280, &[]);
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
    for entry in fs::read_dir(corpus).unwrap() {
        tunnel_errors(&fs::read(entry.unwrap().path()).unwrap());
    }
}

#[test]
fn the_seeds_tell_senders_what_they_should() {
    for (name, input) in seeds() {
        let tells = match name.split_once('-').unwrap_or(("any", "")) {
            ("any", _) => false,
            ("relay", what) => {
                let relayed = what.starts_with("3-") || what.starts_with("11-");
                relayed || what == "mtu-0"
            }
            ("raw", _) => false,
            _ => name.contains("-1-over"),
        };
        assert_eq!(tunnel_errors(&input) == 1, tells, "{name}");
    }
}

#[test]
fn changed_seeds_harm_nothing() {
    let rounds = env::var("CONET_ROUNDS").ok().and_then(|s| s.parse().ok()).unwrap_or(20_000);
    let mut random = Random::new(random::seed());
    let seeds: Vec<_> = seeds().into_values().collect();
    for _ in 0..rounds {
        tunnel_errors(&random::changed(&mut random, &seeds));
    }
}
