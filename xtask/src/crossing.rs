//! `cargo xtask crossing` and `cargo xtask programs`: the crossing tests of `conet` in
//! full length, each program 20 s and 20 hops, or twenty programs with 100 hops each,
//! unless told otherwise.
//!
//! They print a line of figures for each program. As root; some minutes.

/// A test, and how it is asked to take long.
pub(crate) struct Long {
    usage: &'static str,
    file: &'static str,
    test: &'static str,
    /// Option, variable that the test reads, default.
    options: [(&'static str, &'static str, u64); 3],
}

/// `cargo xtask crossing`.
pub(crate) const CROSSING: Long = Long {
    usage: "usage: cargo xtask crossing [--seed N] [--hops N] [--seconds N]",
    file: "crossing",
    test: "ordinary_programs_cross_many_times",
    options: [
        ("--seed", "CONET_CROSSING_SEED", 1),
        ("--hops", "CONET_CROSSING_HOPS", 20),
        ("--seconds", "CONET_CROSSING_SECONDS", 20),
    ],
};

/// `cargo xtask programs`.
pub(crate) const PROGRAMS: Long = Long {
    usage: "usage: cargo xtask programs [--seed N] [--hops N] [--seconds N]",
    file: "twenty",
    test: "twenty_programs_cross_with_their_children",
    options: [
        ("--seed", "CONET_PROGRAMS_SEED", 1),
        ("--hops", "CONET_PROGRAMS_HOPS", 100),
        ("--seconds", "CONET_PROGRAMS_SECONDS", 20),
    ],
};

impl Long {
    /// Runs it; whether it passed.
    pub(crate) fn run(&self, arguments: &[String]) -> Result<bool, String> {
        if !crate::is_root() {
            return Err("a lab needs root".to_owned());
        }
        let values = self.parse(arguments)?;
        crate::packages::install()?;
        let mut command = crate::cargo();
        command.args(["test", "--release", "--package", "conet", "--test", self.file]);
        command.args(["--", "--nocapture", self.test]);
        for ((_, variable, _), value) in self.options.iter().zip(values) {
            command.env(variable, value.to_string());
        }
        let status = command.status().map_err(|error| format!("cannot run cargo: {error}"))?;
        Ok(status.success())
    }

    fn parse(&self, arguments: &[String]) -> Result<[u64; 3], String> {
        let mut values = self.options.map(|(_, _, default)| default);
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
        assert_eq!(CROSSING.parse(&[]), Ok([1, 20, 20]));
        assert_eq!(PROGRAMS.parse(&words("--hops 8 --seed 7")), Ok([7, 8, 20]));
        assert!(CROSSING.parse(&words("--hops")).is_err());
        assert!(CROSSING.parse(&words("--hops 0")).is_err());
        assert!(PROGRAMS.parse(&words("--jumps 8")).is_err());
    }
}
