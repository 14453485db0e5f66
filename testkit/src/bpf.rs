//! Committed eBPF objects, beside what their sources make.

use std::path::Path;
use std::process::Command;

/// The compiler that the committed objects were made by; others make others.
const CLANG: &str = "clang version 14.";

/// Compares `NAME.bpf.o` in `directory` with what clang makes of `NAME.bpf.c`, as that says
/// at its top. Where that compiler is not, it says so and compares nothing.
///
/// # Panics
/// When they differ, or the source does not compile without a warning.
pub fn assert_object_is_made_of_its_source(directory: &Path, name: &str) {
    let version = Command::new("clang").arg("--version").output();
    let version = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    if !version.as_ref().is_ok_and(|version| version.contains(CLANG)) {
        println!("SKIPPED: no {CLANG}x here, so {name}.bpf.o is not compared with its source");
        return;
    }
    // Debian has it under its version, too.
    let there = |name: &&&str| Command::new(name).arg("--version").output().is_ok();
    let Some(strip) = ["llvm-strip", "llvm-strip-14"].iter().find(there) else {
        println!("SKIPPED: no llvm-strip here, so {name}.bpf.o is not compared with its source");
        return;
    };
    let scratch = std::env::temp_dir().join(format!("conet-{name}-{}.o", std::process::id()));
    let options = ["-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fdebug-compilation-dir=."];
    let mut clang = Command::new("clang");
    clang.args(options).args(["-target", "bpf", "-mcpu=v3", "-c"]).arg(format!("{name}.bpf.c"));
    let made = clang.arg("-o").arg(&scratch).current_dir(directory).status();
    assert!(made.is_ok_and(|status| status.success()), "{name}.bpf.c does not compile");
    let stripped = Command::new(strip).arg("-g").arg(&scratch).status();
    let made = std::fs::read(&scratch);
    // Left behind in the system's own place for that where it cannot be removed.
    std::fs::remove_file(&scratch).ok();
    assert!(stripped.is_ok_and(|status| status.success()), "{strip} has failed");
    let committed = std::fs::read(directory.join(format!("{name}.bpf.o")));
    let (Ok(made), Ok(committed)) = (made, committed) else { panic!("no object of {name}") };
    assert!(made == committed, "make {name}.bpf.o anew, as {name}.bpf.c says at its top");
}
