//! `conet bench`: what it finds, and what it says where there is nothing. That the
//! benchmarks themselves run is CI's `bench`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

/// `conet`, in a directory.
fn conet(executable: &Path, directory: &Path, arguments: &[&str]) -> Output {
    Command::new(executable).args(arguments).current_dir(directory).output().unwrap()
}

fn said(output: &Output) -> (i32, String) {
    let text = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    assert!(!text.contains('\n'), "one line: {text}");
    (output.status.code().unwrap(), text)
}

fn ours() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_conet"))
}

fn sources() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn a_checkout_lists_its_benchmarks_and_tells_of_each() {
    let output = conet(ours(), sources(), &["bench", "--json"]);
    assert!(output.status.success(), "{output:?}");
    let list: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let benches = list["benches"].as_array().unwrap();
    for bench in benches {
        assert!(bench["about"].is_string(), "benches/Cargo.toml says nothing of {bench}");
    }
    assert!(benches.iter().any(|bench| bench["name"] == "deputy" && bench["json"] == true));

    let table = conet(ours(), sources(), &["bench"]);
    let table = String::from_utf8(table.stdout).unwrap();
    assert_eq!(table.lines().count(), benches.len() + 1, "{table}");
}

#[test]
fn what_is_not_there_is_told_with_what_is() {
    let (status, text) = said(&conet(ours(), sources(), &["bench", "deputee"]));
    assert_eq!(status, 1);
    assert!(text.contains("no benchmark deputee; there are: call, deputy"), "{text}");
    let (status, text) = said(&conet(ours(), sources(), &["bench", "call", "--json"]));
    assert_eq!((status, text.contains("without --json")), (1, true), "{text}");
}

#[test]
fn outside_of_a_checkout_what_lies_beside_is_run() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("conet");
    fs::copy(ours(), &copy).unwrap();
    let (status, text) = said(&conet(&copy, dir.path(), &["bench", "deputy"]));
    assert_eq!(status, 1);
    assert!(text.ends_with("run it inside of a checkout"), "{text}");

    let bench = dir.path().join("conet-bench-deputy");
    fs::write(&bench, "#!/bin/sh\necho \"$@\"\nexit 7\n").unwrap();
    fs::set_permissions(&bench, fs::Permissions::from_mode(0o755)).unwrap();
    let output = conet(&copy, dir.path(), &["bench", "deputy", "--json", "--", "--case", "a b"]);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "--bench --json --case a b\n");
}
