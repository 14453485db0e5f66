//! Test and CI runners of the workspace: `cargo xtask test`, `cargo xtask ci`,
//! `cargo xtask crossing`, `cargo xtask programs`, `cargo xtask moves`,
//! `cargo xtask simulate`, `cargo xtask relay`, `cargo xtask peers`,
//! `cargo xtask windows`.
//!
//! What it is not: part of what is shipped. It needs the Rust toolchain; as
//! root on Debian it installs the programs that the tests use.

mod ci;
mod crossing;
mod leftovers;
mod packages;
mod peers;
mod relay;
mod simulate;
mod test_run;
mod windows;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

const USAGE: &str = "usage: cargo xtask test [CARGO TEST ARGUMENTS…] | cargo xtask ci
       cargo xtask crossing|programs [--seed N] [--hops N] [--seconds N]
       cargo xtask moves [--moves N] [--megabytes M] [--pages-per-second P] [--seed S] [--json]
       cargo xtask simulate [--seeds N] [--seed S]
       cargo xtask relay [--calls N] [--rebinds N] [--seed S]
       cargo xtask peers|windows";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let outcome = match args.next().as_deref() {
        Some("test") => test_run::run(&args.collect::<Vec<_>>()).map(|counts| counts.verdict()),
        Some("ci") => ci::run(),
        Some("crossing") => crossing::CROSSING.run(&args.collect::<Vec<_>>()),
        Some("moves") => crossing::MOVES.run(&args.collect::<Vec<_>>()),
        Some("programs") => crossing::PROGRAMS.run(&args.collect::<Vec<_>>()),
        Some("peers") => peers::run(),
        Some("relay") => relay::run(&args.collect::<Vec<_>>()),
        Some("simulate") => simulate::run(&args.collect::<Vec<_>>()),
        Some("windows") => windows::prepare().and_then(|()| windows::run()),
        _ => Err(USAGE.to_owned()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

/// The cargo that runs us, at the workspace's root.
fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace_root());
    command
}

/// The directory of the workspace.
fn workspace_root() -> PathBuf {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    root
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
