//! `cargo xtask test`: every test of the workspace, counted.
//!
//! The last line reads `N passed, N failed, N skipped`. libtest counts a
//! privileged test that returned early as passed; such a test leaves a line in
//! the file that `CONET_TEST_SKIPPED` names (testkit's `privileged`), and is
//! counted here as what it is. Under root nothing may be skipped.
//!
//! The tests use real networks, clocks and kernels, several at once. A few that fail are
//! run once more by themselves; what passes then is named as unsteady and counted as
//! passed, with what it said the first time above. It is a defect all the same.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

/// Set for the tests; testkit writes the skipped ones to the file it names.
const SKIPPED_FILE: &str = "CONET_TEST_SKIPPED";

/// How many tests that failed are run again; where more fail, it is no accident.
const MOST_AGAIN: usize = 5;

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
    let mut failed = Vec::new();
    let counts = run_recording(extra, &record, &mut failed);
    let recorded = fs::read_to_string(&record).unwrap_or_default();
    fs::remove_file(&record).ok();
    let mut counts = counts?;
    counts.add_skips(&recorded);
    for line in recorded.lines() {
        println!("{line}");
    }
    if pass_again(counts, &failed, extra)? {
        counts.passed += counts.failed;
        counts.failed = 0;
        for name in failed {
            println!("UNSTEADY {name} (failed, and passed by itself)");
        }
    }
    println!("{counts}");
    Ok(counts)
}

/// Whether the tests that `failed` are few, and all pass when they run by themselves.
fn pass_again(counts: Counts, failed: &[String], extra: &[String]) -> Result<bool, String> {
    if counts.failed != failed.len() as u64 || !(1..=MOST_AGAIN).contains(&failed.len()) {
        return Ok(false);
    }
    println!("{counts}: once more {}", failed.join(", "));
    let before: Vec<_> = extra.iter().take_while(|argument| *argument != "--").cloned().collect();
    let only = ["--", "--exact", "--test-threads", "1"].map(str::to_owned);
    let again = [&before[..], &only[..], failed].concat();
    let counts = run_recording(&again, Path::new("/dev/null"), &mut Vec::new())?;
    Ok(counts.failed == 0 && counts.passed >= failed.len() as u64)
}

/// The test that a line such as `test lab::comes_up ... FAILED` is about.
fn failed_in(line: &str) -> Option<&str> {
    line.strip_prefix("test ")?.strip_suffix(" ... FAILED")
}

/// Counts what passes and fails; adds the names of what failed.
fn run_recording(
    extra: &[String],
    record: &Path,
    failed: &mut Vec<String>,
) -> Result<Counts, String> {
    let mut command = crate::cargo();
    command.args(["test", "--no-fail-fast"]);
    if !extra.iter().any(|argument| argument == "-p" || argument == "--package") {
        command.arg("--workspace");
    }
    command.args(extra).env(SKIPPED_FILE, record).env("PATH", crate::packages::path());
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
            failed.extend(failed_in(&line).map(str::to_owned));
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
    fn what_failed_is_known_by_name() {
        assert_eq!(failed_in("test lab::comes_up ... FAILED"), Some("lab::comes_up"));
        assert_eq!(failed_in("test lab::comes_up ... ok"), None);
        assert_eq!(failed_in("test result: FAILED. 1 passed; 1 failed"), None);
    }

    /// Many failures, or those of a build, are not an accident.
    #[test]
    fn only_a_few_that_are_known_have_a_second_chance() {
        let failed = |count| Counts { passed: 9, failed: count, skipped: 0 };
        let names = vec!["a".to_owned(); MOST_AGAIN + 1];
        assert_eq!(pass_again(failed(MOST_AGAIN as u64 + 1), &names, &[]), Ok(false));
        assert_eq!(pass_again(failed(1), &[], &[]), Ok(false));
        assert_eq!(pass_again(failed(0), &[], &[]), Ok(false));
    }

    #[test]
    fn a_run_without_tests_is_no_success() {
        assert!(!Counts::default().verdict());
    }
}
