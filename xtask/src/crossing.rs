//! `cargo xtask crossing`: the crossing test of `conet/tests/crossing.rs` in full
//! length, each program 20 s and 20 hops unless told otherwise.
//!
//! It prints a line of figures for each program. As root; some minutes.

const USAGE: &str = "usage: cargo xtask crossing [--seed N] [--hops N] [--seconds N]";

/// Option, variable that the test reads, default.
const OPTIONS: [(&str, &str, u64); 3] = [
    ("--seed", "CONET_CROSSING_SEED", 1),
    ("--hops", "CONET_CROSSING_HOPS", 20),
    ("--seconds", "CONET_CROSSING_SECONDS", 20),
];

/// Runs it; whether it passed.
pub(crate) fn run(arguments: &[String]) -> Result<bool, String> {
    if !crate::is_root() {
        return Err("a lab needs root".to_owned());
    }
    let values = parse(arguments)?;
    crate::packages::install()?;
    let mut command = crate::cargo();
    command.args(["test", "--release", "--package", "conet", "--test", "crossing"]);
    command.args(["--", "--nocapture", "ordinary_programs_cross_many_times"]);
    for ((_, variable, _), value) in OPTIONS.iter().zip(values) {
        command.env(variable, value.to_string());
    }
    let status = command.status().map_err(|error| format!("cannot run cargo: {error}"))?;
    Ok(status.success())
}

fn parse(arguments: &[String]) -> Result<[u64; 3], String> {
    let mut values = OPTIONS.map(|(_, _, default)| default);
    for pair in arguments.chunks(2) {
        let [option, value] = pair else { return Err(USAGE.to_owned()) };
        let found = OPTIONS.iter().position(|(name, ..)| name == option);
        let (Some(at), Ok(number @ 1..)) = (found, value.parse()) else {
            return Err(USAGE.to_owned());
        };
        values[at] = number;
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_others_refused() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(parse(&[]), Ok([1, 20, 20]));
        assert_eq!(parse(&words("--hops 8 --seed 7")), Ok([7, 8, 20]));
        assert!(parse(&words("--hops")).is_err());
        assert!(parse(&words("--hops 0")).is_err());
        assert!(parse(&words("--jumps 8")).is_err());
    }
}
