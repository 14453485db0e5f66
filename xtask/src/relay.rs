//! `cargo xtask relay`: a million calls through a bad relay on real sockets, while both
//! ends' addresses change.
//!
//! The relay and what must hold are in `transport/tests/relay.rs`; here is only how to run
//! it optimised and in full.

use std::time::{SystemTime, UNIX_EPOCH};

const USAGE: &str = "usage: relay [--calls N] [--rebinds N] [--seed S]";
/// What the promise in SPECIFICATION.md is about.
const CALLS: u64 = 1_000_000;
const REBINDS: u64 = 10;

/// Runs it; says whether it passed.
pub(crate) fn run(arguments: &[String]) -> Result<bool, String> {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_secs());
    let mut command = crate::cargo();
    command.args(["test", "--release", "--package", "conet-transport", "--test", "relay"]);
    command.args(["--", "--nocapture"]);
    command.env("CONET_CALLS", CALLS.to_string()).env("CONET_REBINDS", REBINDS.to_string());
    command.env("CONET_SEED", seed.to_string());
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let number = arguments.next().and_then(|number| number.parse::<u64>().ok());
        let number = number.ok_or(USAGE)?.to_string();
        match argument.as_str() {
            "--calls" => command.env("CONET_CALLS", number),
            "--rebinds" => command.env("CONET_REBINDS", number),
            "--seed" => command.env("CONET_SEED", number),
            _ => return Err(USAGE.to_owned()),
        };
    }
    let status = command.status().map_err(|error| format!("cannot run cargo: {error}"))?;
    Ok(status.success())
}
