//! What a process that is away pays: its forwarded calls, its local calls, its moves.
//!
//! The program is an ordinary process ([`work`]) that deputy-link's own mover has moved
//! to a sandbox on this machine; the link is TCP over loopback. Beside it run, in turn
//! and in the same run, the program at home, the peers and the bounds ([`peers`]).
//! Batches of about a millisecond go round all of them; what is shown is the median of
//! the rounds, and how far the middle half of ours spreads.
//!
//! Not comparable: peers that send nothing over a network say so. Two processes on one
//! processor show what the code takes; on two, waking a sleeping processor takes most,
//! and in a virtual machine that is several times what it is on the metal.
//!
//! `--json`: one object a line. `--test`: two short rounds, to see that it works.
//! For looking closer: `--case TEXT`, `--lane NAME` (repeatable), `--rounds N`.

mod lanes;
mod measure;
mod moved;
mod moves;
mod peers;
mod roles;
mod sys;
mod work;

use anyhow::{Context as _, Result, bail, ensure};
use conet_benches::report::Format;
use std::process::ExitCode;

/// What was asked for.
#[derive(Clone, Debug)]
struct Options {
    format: Format,
    is_test: bool,
    /// Only cases whose name has this in it.
    case: Option<String>,
    /// Only lanes of this name; none: all.
    lanes: Vec<String>,
    /// How often each lane's turn comes.
    rounds: u32,
}

impl Options {
    fn wants(&self, case: &str) -> bool {
        self.case.as_ref().is_none_or(|wanted| case.contains(wanted))
    }

    fn has(&self, lane: &str) -> bool {
        self.lanes.is_empty() || self.lanes.iter().any(|wanted| wanted == lane)
    }
}

fn options(args: &[String]) -> Result<Options> {
    let mut options =
        Options { format: Format::Table, is_test: false, case: None, lanes: vec![], rounds: 61 };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} wants a value"));
        match arg.as_str() {
            // Cargo's own.
            "--bench" => {}
            "--test" => (options.is_test, options.rounds) = (true, 2),
            "--json" => options.format = Format::Json,
            "--case" => options.case = Some(value()?.clone()),
            "--lane" => options.lanes.push(value()?.clone()),
            "--rounds" => options.rounds = value()?.parse().context("--rounds wants a number")?,
            other => bail!("unknown option {other}; see the top of benches/deputy/main.rs"),
        }
    }
    Ok(options)
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [first, role @ ..] = args.as_slice()
        && first == "--role"
    {
        return roles::run(role);
    }
    let options = options(&args)?;
    ensure!(rustix::process::geteuid().is_root(), "moving programs needs root: run it as root");
    measure::run(&options)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("deputy: {error:#}");
            ExitCode::FAILURE
        }
    }
}
