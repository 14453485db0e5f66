//! `cargo run -p xtask -- simulate`: the transport's simulator over many seeds, or one of
//! them again.
//!
//! The seeds and what must hold are in `transport/tests/simulator.rs`; here is only how to
//! run them optimised.

const USAGE: &str = "usage: simulate [--seeds N] [--seed S]";
/// What the promise in SPECIFICATION.md is about.
const SEEDS: u64 = 10_000;

/// Runs the simulator; says whether it passed.
pub(crate) fn run(arguments: &[String]) -> Result<bool, String> {
    let mut command = crate::cargo();
    command.args(["test", "--release", "--package", "conet-transport", "--test", "simulator"]);
    command.args(["--", "--nocapture"]);
    command.env("CONET_SEEDS", SEEDS.to_string());
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let number = arguments.next().and_then(|number| number.parse::<u64>().ok());
        let number = number.ok_or(USAGE)?.to_string();
        match argument.as_str() {
            "--seeds" => command.env("CONET_SEEDS", number),
            // One seed, and what happens in it.
            "--seed" => command.env("CONET_SEED", number).env("CONET_TRACE", "1"),
            _ => return Err(USAGE.to_owned()),
        };
    }
    let status = command.status().map_err(|error| format!("cannot run cargo: {error}"))?;
    Ok(status.success())
}
