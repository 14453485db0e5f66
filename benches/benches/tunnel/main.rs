//! Tunnels beside each other: throughput, packets a second, round trips, and what they
//! cost.
//!
//! Each lane is two network namespaces on one wire (a veth pair) with a tunnel between
//! them; traffic is made and counted by this process, the same for all. Lanes take turns,
//! so that what else the machine does falls on all of them.
//!
//! | lane | is |
//! |---|---|
//! | `bare` | no tunnel: the wire itself |
//! | `wireguard`, `ip-udp`, `ipip` | ours, in each mode |
//! | `ipip-sockets` | ours, in mode `ipip` by raw sockets; `ipip` itself is in the kernel where that takes it |
//! | `wireguard-plain`, … | ours, with every offload switched off |
//! | `wireguard-go`, `boringtun-cli`, `gotatun` | where they are installed (PATH, or `CONET_BENCH_PEERS`, a list of directories) |
//! | `aead` | a bound: 1 GB in packets of 1,420 bytes sealed and opened by ring's ChaCha20-Poly1305, nothing else |
//! | `bound-sealed`, `bound-kernel` | bounds: the least that a sealed tunnel, and one in the kernel, can be (`bound`) |
//!
//! CPU is that of the tunnels' processes, both ends, by `/proc/PID/stat`; that of whoever
//! sends and receives is not in it. The kernel's share of a daemon's calls is, and what
//! of the wire's work it does in their context.
//!
//! The last case is in memory: what 10,000 peers cost a packet (`scale`).
//!
//! Not comparable: peers run with the threads that they have by default.
//!
//! `--json`, `--case TEXT`, `--lane NAME` (repeatable), `--rounds N`, `--seconds N`.

mod bound;
mod measure;
mod scale;
mod scene;
mod traffic;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use conet_benches::report::Format;

/// What is asked for on the command line.
pub(crate) struct Options {
    pub(crate) format: Format,
    pub(crate) case: Option<String>,
    pub(crate) lanes: Vec<String>,
    pub(crate) rounds: usize,
    pub(crate) duration: Duration,
}

impl Options {
    pub(crate) fn has(&self, lane: &str) -> bool {
        self.lanes.is_empty() || self.lanes.iter().any(|wanted| wanted == lane)
    }
}

fn options(args: &[String]) -> Result<Options> {
    let mut options = Options {
        format: Format::Table,
        case: None,
        lanes: vec![],
        rounds: 5,
        duration: Duration::from_secs(1),
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} wants a value"));
        match arg.as_str() {
            // Cargo's own.
            "--bench" => {}
            "--test" => (options.rounds, options.duration) = (1, Duration::from_millis(50)),
            "--json" => options.format = Format::Json,
            "--case" => options.case = Some(value()?.clone()),
            "--lane" => options.lanes.push(value()?.clone()),
            "--rounds" => options.rounds = value()?.parse().context("--rounds wants a number")?,
            "--seconds" => {
                let seconds: f64 = value()?.parse().context("--seconds wants a number")?;
                ensure!((0.01..=60.0).contains(&seconds), "--seconds wants 0.01 to 60");
                options.duration = Duration::from_secs_f64(seconds);
            }
            other => bail!("unknown option {other}; see the top of benches/tunnel/main.rs"),
        }
    }
    Ok(options)
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [first, role @ ..] = args.as_slice()
        && first == "--role"
    {
        return scene::serve(role);
    }
    let options = options(&args)?;
    ensure!(rustix::process::geteuid().is_root(), "tunnels need root: run it as root");
    measure::run(&options)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tunnel: {error:#}");
            ExitCode::FAILURE
        }
    }
}
