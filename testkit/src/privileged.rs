//! The one place that decides whether a privileged test runs.
//!
//! A test that needs root, a device or a program opens with
//!
//! ```
//! # fn a_test() {
//! conet_testkit::privileged!();                          // root
//! conet_testkit::privileged!(conet_testkit::Need::Tun);  // root and /dev/net/tun
//! # }
//! ```
//!
//! and either goes on or returns at once, having said so on standard error
//! (past libtest's capture) and in the file that [`SKIPPED_FILE`] names, one
//! line each. `cargo xtask test` reads that file, subtracts the skipped from
//! the passed, and under root fails if there is one: what root can run, root
//! must run.
//!
//! What it is not: a way to leave out tests that fail, or a capability probe
//! for shipped code.
//!
//! [`exclusive`] serialises tests, across test binaries too, that make things
//! of which a machine has one (the lab, its bridge).

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// Environment variable that names the file in which skips are recorded.
pub const SKIPPED_FILE: &str = "CONET_TEST_SKIPPED";

/// Something that a test cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Effective user id 0; every use of [`crate::privileged!`] implies it.
    Root,
    /// A TUN/TAP device (`/dev/net/tun`).
    Tun,
    /// A program on `PATH`.
    Program(&'static str),
}

impl Need {
    /// Why this machine does not have it, or `None` where it does.
    fn missing(self) -> Option<String> {
        match self {
            Self::Root => (!rustix::process::geteuid().is_root()).then(|| "needs root".to_owned()),
            Self::Tun => (!Path::new("/dev/net/tun").exists())
                .then(|| "needs a TUN device, /dev/net/tun is not there".to_owned()),
            Self::Program(name) => (!on_path(name)).then(|| format!("needs the program {name}")),
        }
    }
}

/// Leaves the calling test, loudly, where the machine lacks root or one of the
/// [`Need`]s given.
#[macro_export]
macro_rules! privileged {
    ($($need:expr),* $(,)?) => {
        if $crate::privileged::skip(module_path!(), &[$crate::privileged::Need::Root, $($need),*]) {
            return;
        }
    };
}

/// Whether the calling test is to be left; what [`crate::privileged!`] asks.
///
/// `module` names the caller where the thread has no name of its own.
///
/// # Panics
///
/// Where the skip cannot be recorded: a skip that nobody counts is a silent one.
#[must_use]
pub fn skip(module: &str, needs: &[Need]) -> bool {
    let Some(reason) = needs.iter().find_map(|need| need.missing()) else {
        return false;
    };
    let thread = std::thread::current();
    let test = thread.name().unwrap_or(module);
    let line = format!("SKIPPED {module}::{test} ({reason})\n");
    // libtest captures what the print macros write, not a write to the stream.
    io::stderr().write_all(line.as_bytes()).ok();
    if let Some(path) = std::env::var_os(SKIPPED_FILE) {
        // One write of one line with O_APPEND: test binaries do not interleave.
        let recorded = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(line.as_bytes()));
        assert!(recorded.is_ok(), "cannot record the skip in {}", Path::new(&path).display());
    }
    true
}

/// Holds a lock that one test on this machine has at a time, until dropped.
#[derive(Debug)]
pub struct Exclusive {
    _locked: File,
}

/// Waits until no other test holds the lock, and takes it.
///
/// # Panics
///
/// Where the lock file cannot be opened or locked.
#[must_use]
pub fn exclusive() -> Exclusive {
    // Not in the lab's own state directory: a test may look whether that is gone.
    let path = std::env::temp_dir().join("conet-test.lock");
    let opened = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let locked = opened.and_then(|file| {
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
        Ok(file)
    });
    match locked {
        Ok(file) => Exclusive { _locked: file },
        Err(error) => panic!("cannot lock {}: {error}", path.display()),
    }
}

fn on_path(name: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_not_there_is_missing() {
        assert_eq!(Need::Program("sh").missing(), None);
        assert_eq!(
            Need::Program("no-such-program-of-conet").missing().as_deref(),
            Some("needs the program no-such-program-of-conet")
        );
    }

    #[test]
    fn nothing_missing_skips_nothing() {
        assert!(!skip("here", &[Need::Program("sh")]));
    }

    #[test]
    fn the_lock_is_exclusive() {
        let held = exclusive();
        let path = std::env::temp_dir().join("conet-test.lock");
        let other = File::open(path).unwrap();
        let try_lock = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        assert!(rustix::fs::flock(&other, try_lock).is_err());
        drop(held);
    }
}
