//! `cargo xtask crossing`, `programs` and `moves`: tests of `conet` that move programs,
//! in full length, each program 20 s and 20 hops, twenty programs with 100 hops each, or
//! one of 256 MB among three hosts 50 times, unless told otherwise.
//!
//! They print their seed and a line of figures for each program or move; `moves` with
//! `--json` one object alone, and it fails where the freeze at p90 is over 10 ms. As
//! root; some minutes.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

/// A test, and how it is asked to take long.
pub(crate) struct Long {
    usage: &'static str,
    file: &'static str,
    test: &'static str,
    /// Option, variable that the test reads, default.
    options: &'static [(&'static str, &'static str, u64)],
    /// The variable by which it prints one object, where it can.
    json: Option<&'static str>,
}

/// `cargo xtask crossing`.
pub(crate) const CROSSING: Long = Long {
    usage: "usage: cargo xtask crossing [--seed N] [--hops N] [--seconds N]",
    file: "crossing",
    test: "ordinary_programs_cross_many_times",
    options: &[
        ("--seed", "CONET_CROSSING_SEED", 1),
        ("--hops", "CONET_CROSSING_HOPS", 20),
        ("--seconds", "CONET_CROSSING_SECONDS", 20),
    ],
    json: None,
};

/// `cargo xtask programs`.
pub(crate) const PROGRAMS: Long = Long {
    usage: "usage: cargo xtask programs [--seed N] [--hops N] [--seconds N]",
    file: "twenty",
    test: "twenty_programs_cross_with_their_children",
    options: &[
        ("--seed", "CONET_PROGRAMS_SEED", 1),
        ("--hops", "CONET_PROGRAMS_HOPS", 100),
        ("--seconds", "CONET_PROGRAMS_SECONDS", 20),
    ],
    json: None,
};

/// `cargo xtask moves`.
pub(crate) const MOVES: Long = Long {
    usage: "usage: cargo xtask moves [--moves N] [--megabytes M] [--pages-per-second P] [--seed S] [--limit MS] [--json]",
    file: "direct",
    test: "a_program_moves_among_three_hosts",
    options: &[
        ("--seed", "CONET_MOVES_SEED", 1),
        ("--moves", "CONET_MOVES_COUNT", 50),
        ("--megabytes", "CONET_MOVES_MEGABYTES", 256),
        ("--pages-per-second", "CONET_MOVES_RATE", 100),
        ("--limit", "CONET_MOVES_LIMIT", 10),
    ],
    json: Some("CONET_MOVES_JSON"),
};

impl Long {
    /// Runs it; whether it passed.
    pub(crate) fn run(&self, arguments: &[String]) -> Result<bool, String> {
        if !crate::is_root() {
            return Err("a lab needs root".to_owned());
        }
        let json = self.json.filter(|_| arguments.iter().any(|argument| argument == "--json"));
        let others: Vec<String> =
            arguments.iter().filter(|word| json.is_none() || *word != "--json").cloned().collect();
        let values = self.parse(&others)?;
        crate::packages::install()?;
        let mut command = crate::cargo();
        command.args(["test", "--release", "--package", "conet", "--test", self.file]);
        command.args(["--", "--nocapture", self.test]);
        for ((_, variable, _), value) in self.options.iter().zip(values) {
            command.env(variable, value.to_string());
        }
        let failed = |error| format!("cannot run cargo: {error}");
        if let Some(variable) = json {
            command.env(variable, "1").stdout(Stdio::piped());
        }
        let mut child = command.spawn().map_err(failed)?;
        if let Some(out) = child.stdout.take() {
            // Of what the test prints, and what is printed of the test, the object alone.
            let lines = BufReader::new(out).lines().map_while(Result::ok);
            lines.filter(|line| line.starts_with('{')).for_each(|line| println!("{line}"));
        }
        Ok(child.wait().map_err(failed)?.success())
    }

    fn parse(&self, arguments: &[String]) -> Result<Vec<u64>, String> {
        let mut values: Vec<u64> = self.options.iter().map(|(_, _, default)| *default).collect();
        for pair in arguments.chunks(2) {
            let [option, value] = pair else { return Err(self.usage.to_owned()) };
            let found = self.options.iter().position(|(name, ..)| name == option);
            let (Some(at), Ok(number @ 1..)) = (found, value.parse()) else {
                return Err(self.usage.to_owned());
            };
            values[at] = number;
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_others_refused() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(CROSSING.parse(&[]), Ok(vec![1, 20, 20]));
        assert_eq!(PROGRAMS.parse(&words("--hops 8 --seed 7")), Ok(vec![7, 8, 20]));
        assert_eq!(MOVES.parse(&words("--megabytes 64")), Ok(vec![1, 50, 64, 100, 10]));
        assert!(CROSSING.parse(&words("--hops")).is_err());
        assert!(CROSSING.parse(&words("--hops 0")).is_err());
        assert!(PROGRAMS.parse(&words("--jumps 8")).is_err());
    }
}
