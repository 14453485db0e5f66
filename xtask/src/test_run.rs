//! `cargo xtask test`: every test of the workspace, counted.
//!
//! The last line reads `N passed, N failed, N skipped`. libtest counts a
//! privileged test that returned early as passed; such a test leaves a line in
//! the file that `CONET_TEST_SKIPPED` names (testkit's `privileged`), and is
//! counted here as what it is. Under root nothing may be skipped.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

/// Set for the tests; testkit writes the skipped ones to the file it names.
const SKIPPED_FILE: &str = "CONET_TEST_SKIPPED";

/// What a run ended with.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Counts {
    /// Whether the run is good: no failure, and under root no skip either.
    pub(crate) fn verdict(self) -> bool {
        self.failed == 0 && self.passed > 0 && !(crate::is_root() && self.skipped > 0)
    }

    /// Adds a line such as
    /// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; …`.
    fn add_result_line(&mut self, line: &str) {
        let Some(rest) = line.strip_prefix("test result: ") else { return };
        let (_, counts) = rest.split_once(". ").unwrap_or_default();
        for part in counts.split(';') {
            let mut words = part.split_whitespace();
            let number: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            match words.next() {
                Some("passed") => self.passed += number,
                Some("failed") => self.failed += number,
                Some("ignored") => self.skipped += number,
                _ => {}
            }
        }
    }

    fn add_skips(&mut self, recorded: &str) {
        let skips = u64::try_from(recorded.lines().count()).unwrap_or(u64::MAX);
        self.passed = self.passed.saturating_sub(skips);
        self.skipped += skips;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Runs the tests, by default of the whole workspace, and prints the counts.
pub(crate) fn run(extra: &[String]) -> Result<Counts, String> {
    crate::packages::install()?;
    let record = std::env::temp_dir().join(format!("conet-skipped-{}", std::process::id()));
    let counts = run_recording(extra, &record);
    let recorded = fs::read_to_string(&record).unwrap_or_default();
    fs::remove_file(&record).ok();
    let mut counts = counts?;
    counts.add_skips(&recorded);
    for line in recorded.lines() {
        println!("{line}");
    }
    println!("{counts}");
    Ok(counts)
}

fn run_recording(extra: &[String], record: &Path) -> Result<Counts, String> {
    let mut command = crate::cargo();
    command.args(["test", "--no-fail-fast"]);
    if !extra.iter().any(|argument| argument == "-p" || argument == "--package") {
        command.arg("--workspace");
    }
    command.args(extra).env(SKIPPED_FILE, record).env("PATH", crate::packages::path());
    command.env(crate::peers::KERNEL, crate::peers::kernel());
    // A test that reads what a terminal has for it would wait for ever.
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("cannot run cargo: {error}"))?;
    let mut counts = Counts::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line.map_err(|error| format!("cannot read the tests' output: {error}"))?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            counts.add_result_line(&line);
        }
    }
    let status = child.wait().map_err(|error| format!("cannot wait for cargo: {error}"))?;
    if !status.success() && counts.failed == 0 {
        // A build that failed, or a test binary that died before its result.
        counts.failed = 1;
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_add_up_and_skips_are_not_passes() {
        let mut counts = Counts::default();
        counts.add_result_line("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s");
        counts.add_result_line(
            "test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out",
        );
        counts.add_result_line("test lab ... ok");
        counts.add_skips("SKIPPED a (needs root)\nSKIPPED b (needs root)\n");
        assert_eq!(counts.to_string(), "11 passed, 2 failed, 3 skipped");
        assert!(!counts.verdict());
    }

    #[test]
    fn a_run_without_tests_is_no_success() {
        assert!(!Counts::default().verdict());
    }
}
