//! `cargo xtask ci`: what decides whether a change lands.
//!
//! The stages run in order and the first that fails ends the run; each prints
//! its name and time. The machine must be left as it was found: whatever is
//! named `conet*` at the end and was not there at the start fails the run.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::{leftovers, packages, test_run, windows};

/// The only target there is.
const AGENT_TARGET: &str = "x86_64-unknown-linux-gnu";

type Stage = (&'static str, fn() -> Result<(), String>);

const STAGES: &[Stage] = &[
    ("packages", packages),
    ("fmt", fmt),
    ("clippy", clippy),
    ("doc", doc),
    ("test", test),
    ("agent", agent),
    ("fuzz", fuzz),
    ("bench", bench),
    ("demo", demo),
    ("windows", windows),
];

/// Runs all stages.
pub(crate) fn run() -> Result<bool, String> {
    if !crate::is_root() {
        return Err("CI runs the privileged tests: run it as root".to_owned());
    }
    let before = leftovers::look();
    let started = Instant::now();
    for (name, stage) in STAGES {
        let stage_started = Instant::now();
        eprintln!("ci: {name} …");
        let outcome = stage().and_then(|()| nothing_left(&before));
        let seconds = stage_started.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => eprintln!("ci: {name} ok ({seconds:.1} s)"),
            Err(message) => {
                eprintln!("ci: {name} FAILED ({seconds:.1} s): {message}");
                return Ok(false);
            }
        }
    }
    eprintln!("ci: all {} stages ok ({:.1} s)", STAGES.len(), started.elapsed().as_secs_f64());
    Ok(true)
}

/// Beside what the tests run, what makes the eBPF objects that are committed.
fn packages() -> Result<(), String> {
    packages::install()?;
    packages::install_more(&[("clang", "clang"), ("llvm-strip", "llvm")])
}

fn fmt() -> Result<(), String> {
    succeed(crate::cargo().args(["fmt", "--all", "--check"]))
}

fn clippy() -> Result<(), String> {
    succeed(crate::cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

fn doc() -> Result<(), String> {
    let mut command = crate::cargo();
    succeed(command.args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))
}

fn test() -> Result<(), String> {
    let counts = test_run::run(&[])?;
    if counts.verdict() { Ok(()) } else { Err(counts.to_string()) }
}

/// The program that enters processes stands outside the workspace. It is looked at
/// as it is built, optimised and for the host's own target.
fn agent() -> Result<(), String> {
    let dir = crate::workspace_root().join("deputy-link/agent");
    succeed(crate::cargo().current_dir(&dir).args(["fmt", "--check"]))?;
    let mut command = crate::cargo();
    command.current_dir(&dir).args(["clippy", "--release", "--locked", "--target", AGENT_TARGET]);
    // In a target directory of the workspace: nothing is built among the sources.
    command.arg("--target-dir").arg(target_dir().join("agent-lints"));
    succeed(command.args(["--", "-D", "warnings"]))
}

/// The binaries around the fuzz targets want a fuzzing runtime, and are not built.
fn fuzz() -> Result<(), String> {
    let mut command = crate::cargo();
    succeed(command.current_dir(crate::workspace_root().join("fuzz")).args(["fmt", "--check"]))
}

fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| crate::workspace_root().join("target"), PathBuf::from)
}

/// Runs each benchmark once, to see that it still works.
fn bench() -> Result<(), String> {
    let benches = std::fs::read_dir(crate::workspace_root().join("benches/benches"));
    if benches.map(|mut entries| entries.next().is_none()).unwrap_or(true) {
        return Ok(());
    }
    succeed(crate::cargo().args(["bench", "--package", "conet-benches", "--", "--test"]))
}

fn demo() -> Result<(), String> {
    let mut command = crate::cargo();
    command.args(["run", "--release", "--package", "conet", "--", "demo", "--json"]);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot run the demo: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let failed = failed_steps(&text)?;
    if failed.is_empty() && output.status.success() {
        Ok(())
    } else {
        Err(format!("the demo ended with {}; failed steps: {failed:?}", output.status))
    }
}

/// The tunnel for Windows, where Debian's tools for that are to be had.
fn windows() -> Result<(), String> {
    if let Err(reason) = windows::prepare() {
        eprintln!("ci: NOT RUN: the tunnel's tests for Windows: {reason}");
        return Ok(());
    }
    if windows::run()? { Ok(()) } else { Err("tests failed".to_owned()) }
}

/// The names of the steps that are not ok in the demo's report.
fn failed_steps(report: &str) -> Result<Vec<String>, String> {
    let report: Value = serde_json::from_str(report)
        .map_err(|error| format!("the demo's report is not JSON ({error}): {report}"))?;
    let steps = report["steps"].as_array().filter(|steps| !steps.is_empty());
    let steps = steps.ok_or_else(|| "the demo's report has no steps".to_owned())?;
    let failed = steps.iter().filter(|step| step["ok"] != Value::Bool(true));
    Ok(failed.map(|step| step["name"].to_string()).collect())
}

fn nothing_left(before: &BTreeSet<String>) -> Result<(), String> {
    let now = leftovers::look();
    let left: Vec<_> = now.difference(before).cloned().collect();
    if left.is_empty() { Ok(()) } else { Err(format!("left behind: {}", left.join(", "))) }
}

fn succeed(command: &mut Command) -> Result<(), String> {
    let status = command.status().map_err(|error| format!("cannot run {command:?}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?} ended with {status}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_for_its_failed_steps() {
        let report = r#"{"steps":[{"name":"ping","ok":true},{"name":"tcp","ok":false}]}"#;
        assert_eq!(failed_steps(report), Ok(vec!["\"tcp\"".to_owned()]));
        assert!(failed_steps(r#"{"steps":[]}"#).is_err());
        assert!(failed_steps("no report").is_err());
    }
}
