//! Ports of guests beside each other: round trips, streams, packets a second, and what
//! they cost.
//!
//! Each lane is a host (a network namespace) and a guest; traffic is made by this process
//! on the host, and answered by one program in the guest, the same for all. Lanes take
//! turns, so that what else the machine does falls on all of them.
//!
//! | lane | is |
//! |---|---|
//! | `netns`, `tap` | ours: a namespace guest by veth, and by TAP |
//! | `uml-vhost`, `qemu-vhost` | ours: User-Mode Linux and QEMU (TCG) by vhost-user |
//! | `uml-bess`, `qemu-stream` | ours: the same by frames on a unix socket |
//! | `replica` | coLinux's way: TAP → process → unix socket → process → guest (`replica`) |
//! | `bridge` | a Linux bridge, the guest by a veth pair on it |
//! | `netns-pair`, `bridge-pair` | the client is not the host but a second guest beside |
//! | `uml-tap`, `uml-raw` | User-Mode Linux's own transports |
//! | `uml-bound` | User-Mode Linux by vhost-user, served by the least that can (`bound`) |
//! | `passt`, `pasta`, `slirp4netns` | for QEMU; for a namespace; for a namespace |
//! | `passt-uml` | passt for User-Mode Linux, through a process that frames for it (`peers`) |
//!
//! CPU is that of everybody together: this process, the guest, what is between. What the
//! kernel does in threads of its own is in no lane's.
//!
//! Round trips are measured with all of a lane on one processor: what it takes to wake
//! another one is the machine's, and larger than most of them. Streams and floods have the
//! guest on one processor, and who talks to it and what is between on another; TCP is cubic.
//!
//! Then there are counts of system calls, wake-ups and copies (`counts`), and 64 guests that
//! come and go (`crowd`).
//!
//! Peers run with their own MTU (65,520), everything else with 1,500. A lane whose
//! programs or kernels are not there is named and left out; QEMU's kernel is found by
//! `CONET_PEERS_KERNEL`, which `cargo xtask peers` unpacks.
//!
//! `--json`, `--case TEXT`, `--lane NAME` (repeatable), `--rounds N`, `--seconds N`.

mod agent;
mod bound;
mod counts;
mod crowd;
mod kind;
mod lane;
mod machines;
mod measure;
mod peers;
mod replica;
mod sys;
mod traffic;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use conet_benches::report::Format;
use conet_hostinject::Lease;
use conet_hostinject::vhost::{ServerArguments, VhostSpec, run_server};

use crate::kind::Kind;

/// What is asked for on the command line.
pub(crate) struct Options {
    pub(crate) format: Format,
    pub(crate) case: Option<String>,
    pub(crate) lanes: Vec<String>,
    pub(crate) rounds: usize,
    pub(crate) duration: Duration,
    /// To see that it works, which measures nothing.
    pub(crate) is_smoke: bool,
}

impl Options {
    pub(crate) fn has(&self, kind: Kind) -> bool {
        self.lanes.is_empty() || self.lanes.iter().any(|wanted| wanted == kind.name())
    }
}

fn options(args: &[String]) -> Result<Options> {
    let mut options = Options {
        format: Format::Table,
        case: None,
        lanes: vec![],
        rounds: 5,
        duration: Duration::from_secs(1),
        is_smoke: false,
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} wants a value"));
        match arg.as_str() {
            // Cargo's own.
            "--bench" => {}
            "--test" => {
                (options.rounds, options.duration) = (1, Duration::from_millis(50));
                options.is_smoke = true;
            }
            "--json" => options.format = Format::Json,
            "--case" => options.case = Some(value()?.clone()),
            "--lane" => options.lanes.push(value()?.clone()),
            "--rounds" => options.rounds = value()?.parse().context("--rounds wants a number")?,
            "--seconds" => {
                let seconds: f64 = value()?.parse().context("--seconds wants a number")?;
                ensure!((0.01..=60.0).contains(&seconds), "--seconds wants 0.01 to 60");
                options.duration = Duration::from_secs_f64(seconds);
            }
            other => bail!("unknown option {other}; see the top of benches/hostinject/main.rs"),
        }
    }
    let is_known = |name: &&String| !Kind::ALL.iter().any(|kind| kind.name() == name.as_str());
    if let Some(name) = options.lanes.iter().find(is_known) {
        let all = Kind::ALL.map(Kind::name).join(", ");
        bail!("no lane {name}; there are: {all}");
    }
    Ok(options)
}

/// The server of a machine's port, as `conet guest-server` is one.
fn server(arguments: &[String]) -> Result<()> {
    let (mut mac, mut control) = ("02:00:00:00:00:00".parse()?, "".into());
    let mut queues = 1;
    let mut lease = Lease { addresses: vec![], gateways: vec![], prefix: 0, dns: vec![], mtu: 0 };
    for pair in arguments.chunks(2) {
        let [name, value] = pair else { bail!("{} wants a value", pair.concat()) };
        match name.as_str() {
            "--mac" => mac = value.parse()?,
            "--mtu" => lease.mtu = value.parse()?,
            "--address" => lease.addresses.push(value.parse()?),
            "--gateway" => lease.gateways.push(value.parse()?),
            "--dns" => lease.dns.push(value.parse()?),
            "--prefix" => lease.prefix = value.parse()?,
            "--control" => control = value.into(),
            "--queues" => queues = value.parse()?,
            other => bail!("a server knows no {other}"),
        }
    }
    match run_server(ServerArguments { spec: VhostSpec { mac, lease, queues }, control })? {}
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [first, role, rest @ ..] = args.as_slice()
        && first == "--role"
    {
        return match role.as_str() {
            "agent" => agent::run(),
            "replica" => replica::run(rest),
            "bound" => bound::run(rest),
            "server" => server(rest),
            "shim" => peers::shim(rest),
            other => bail!("no role {other}"),
        };
    }
    let options = options(&args)?;
    ensure!(rustix::process::geteuid().is_root(), "guests' ports need root: run it as root");
    measure::run(&options)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hostinject: {error:#}");
            ExitCode::FAILURE
        }
    }
}
