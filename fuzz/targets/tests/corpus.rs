//! Replays every committed corpus file of every target.

use conet_fuzz_targets::TARGETS;
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
