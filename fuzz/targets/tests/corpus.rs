//! Replays every committed corpus file of every target.

use conet_fuzz_targets::TARGETS;
use conet_testkit::random::Random;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus")
}

#[test]
fn every_corpus_file_of_every_target_returns() {
    for (name, target) in TARGETS {
        let files: Vec<_> = std::fs::read_dir(corpus().join(name))
            .unwrap_or_else(|error| panic!("corpus of {name}: {error}"))
            .map(|entry| entry.expect("readable").path())
            .collect();
        assert!(files.len() >= 8, "corpus of {name} has {} files only", files.len());
        for file in files {
            eprintln!("{}", file.display());
            target(&std::fs::read(&file).expect("readable"));
        }
    }
}

/// A corpus that no target reads, or a binary that is no target, guards nothing.
#[test]
fn corpora_binaries_and_targets_belong_together() {
    let names: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let listed = |dir: &str, suffix: &str| -> BTreeSet<String> {
        std::fs::read_dir(corpus().join(dir))
            .expect("readable")
            .map(|entry| entry.expect("readable").file_name().into_string().expect("UTF-8"))
            .map(|name| name.trim_end_matches(suffix).to_owned())
            .collect()
    };
    assert_eq!(listed(".", ""), names);
    assert_eq!(listed("../fuzz_targets", ".rs"), names);
}

/// Mutations of the corpus, for machines without a fuzzing runtime: some in the ordinary
/// run, `CONET_MUTATIONS` of each file where it is set, from `CONET_SEED`.
#[test]
fn mutations_of_the_corpus_return() {
    let number = |name| std::env::var(name).ok().and_then(|number| number.parse::<u64>().ok());
    let (rounds, seed) = (number("CONET_MUTATIONS"), number("CONET_SEED").unwrap_or(1));
    eprintln!("CONET_SEED={seed}");
    let mut random = Random::new(seed);
    for (name, target) in TARGETS.iter().filter(|(name, _)| NEW.contains(name) || rounds.is_some())
    {
        let mut files: Vec<_> = std::fs::read_dir(corpus().join(name))
            .expect("a corpus")
            .map(|entry| entry.expect("readable").path())
            .collect();
        files.sort();
        for file in files {
            let bytes = std::fs::read(&file).expect("readable");
            for round in 0..rounds.unwrap_or(20) {
                let mutated = mutate(&bytes, &mut random);
                let done = std::panic::catch_unwind(|| target(&mutated));
                assert!(done.is_ok(), "{name}: {} round {round}, seed {seed}", file.display());
            }
        }
    }
}

/// Targets whose mutations belong to the ordinary run.
const NEW: &[&str] =
    &["guest_frame", "hostile_ring", "session_image", "vhost_messages", "vhost_rings"];

fn mutate(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let below = |random: &mut Random, n: usize| {
        usize::try_from(random.below(n.max(1) as u64)).expect("small")
    };
    for _ in 0..=random.below(6) {
        let at = below(random, bytes.len());
        let Some(byte) = bytes.get_mut(at) else { continue };
        match random.below(6) {
            0 => *byte ^= 1 << random.below(8),
            1 => *byte = u8::try_from(random.below(256)).expect("a byte"),
            2 => *byte = [0, 1, 0x7f, 0x80, 0xff][below(random, 5)],
            3 => bytes.truncate(at),
            4 => {
                let length = below(random, 40).min(bytes.len() - at);
                let piece = bytes[at..at + length].to_vec();
                let to = below(random, bytes.len());
                bytes.splice(to..to, piece);
            }
            _ => drop(bytes.drain(at..(at + below(random, 20)).min(bytes.len()))),
        }
    }
    bytes
}
