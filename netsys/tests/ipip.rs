//! The eBPF object is what its source says. The programs' work is tested where the rules
//! are, in the crate `tunnel`.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

use std::path::Path;
use std::process::Command;

/// The compiler that the committed object was made by; others make others.
const CLANG: &str = "clang version 14.";

/// As `bpf/ipip.bpf.c` says at its top. Skipped, loudly, without that compiler.
#[test]
fn the_committed_object_is_what_clang_makes_of_its_source() {
    let version = Command::new("clang").arg("--version").output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    if !version.as_ref().is_ok_and(|version| version.contains(CLANG)) {
        println!("SKIPPED: no {CLANG}x here, so the object is not compared with its source");
        return;
    }
    // Debian has it under its version, too.
    let there = |name: &&&str| Command::new(name).arg("--version").output().is_ok();
    let Some(strip) = ["llvm-strip", "llvm-strip-14"].iter().find(there) else {
        println!("SKIPPED: no llvm-strip here, so the object is not compared with its source");
        return;
    };
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("bpf");
    let scratch = std::env::temp_dir().join(format!("conet-ipip-{}.o", std::process::id()));
    let options = ["-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fdebug-compilation-dir=."];
    let mut clang = Command::new("clang");
    let clang = clang.args(options).args(["-target", "bpf", "-mcpu=v3", "-c", "ipip.bpf.c", "-o"]);
    assert!(clang.arg(&scratch).current_dir(&sources).status().unwrap().success());
    assert!(Command::new(strip).arg("-g").arg(&scratch).status().unwrap().success());
    let made = std::fs::read(&scratch).unwrap();
    std::fs::remove_file(&scratch).unwrap();
    let committed = std::fs::read(sources.join("ipip.bpf.o")).unwrap();
    assert!(made == committed, "make it anew, as ipip.bpf.c says at its top");
}
