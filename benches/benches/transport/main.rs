//! A call between two threads over loopback: ours beside what the kernel alone takes.
//!
//! Each contender is a client and a server that are started for a turn, pinned, measured
//! and ended, and all get their turns in every round: a server that spins would otherwise
//! take its processor from the next. A call carries `size` bytes and is answered with as
//! many up to 64.
//!
//! | contender | what it is |
//! |---|---|
//! | `plain`, `aes`, `chacha` | ours over UDP, `Direct` in both threads, unsealed and sealed |
//! | `tcp_…`, `shared_…` | ours over a TCP connection, and over rings in shared memory |
//! | `row_of_8` | eight calls in one datagram, without a carrier |
//! | `least_…` | no code of ours: the same bytes, copies and AEAD, no protocol: the bound (`bound.rs`) |
//! | `udp_spin`, `udp_block` | one connected socket a side, no protocol: the least that is possible |
//! | `tcp_nodelay` | one connection, blocking |
//! | `unix`, `unix_datagram` | a pair of sockets, blocking |
//! | `quinn_proto`, `quinn_tokio` | QUIC over one stream, AES-128-GCM: in a loop that spins, and on tokio |
//! | `tarpc` | over TCP with bincode, on tokio |
//! | `tcp`, `udp_1400`, `udp_65000` | bulk: what the kernel carries without a protocol, GSO and GRO |
//! | `udp_…_copy`, `udp_…_aes` | the same, copied in and out; and sealed and opened: the least that bulk takes |
//! | `adaptive`, `blocking` | ours beside busy loops and idle: spinning before sleeping, or sleeping at once |
//! | `none_parked` | ours, while no call waits at the server |
//!
//! `--case TEXT` measures only cases with that in their name, `--only NAME,…` only contenders of
//! these names (a rule over one that is not there is `null`), `--rounds N` so many rounds.

#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

mod alone;
mod bound;
mod cases;
mod loss;
mod measure;
mod ours;
mod quic;
mod raw;
mod rpc;
mod stream;
mod waiting;

use anyhow::{Context as _, Result, bail};
use conet_benches::report::Format;
use std::process::ExitCode;

/// What was asked for.
#[derive(Clone, Debug)]
struct Options {
    format: Format,
    is_test: bool,
    case: Option<String>,
    only: Option<String>,
    rounds: usize,
}

fn options() -> Result<Options> {
    let mut options =
        Options { format: Format::Table, is_test: false, case: None, only: None, rounds: 11 };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} wants a value"));
        match arg.as_str() {
            // Cargo's own.
            "--bench" => {}
            "--test" => (options.is_test, options.rounds) = (true, 1),
            "--json" => options.format = Format::Json,
            "--case" => options.case = Some(value()?),
            "--only" => options.only = Some(value()?),
            "--rounds" => options.rounds = value()?.parse().context("--rounds wants a number")?,
            other => bail!("unknown option {other}; see the top of benches/transport/main.rs"),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    match options().and_then(|options| cases::run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("transport: {error:#}");
            ExitCode::FAILURE
        }
    }
}
