//! What can be typed. What it does is in `commands`.

mod guest;
mod lab;

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use conet_netsys::MacAddr;
use conet_node::config::{DEFAULT_PATH, Ipv4Net, Mode};

pub(crate) use guest::{GuestCommand, MachineOptions, PortName, RateOptions};
pub(crate) use lab::LabCommand;

/// conet joins machines into one: guests share their host's address over
/// WireGuard or IP-in-IP, and running processes move between machines.
#[derive(Debug, Parser)]
#[command(name = "conet", version, propagate_version = true, disable_help_subcommand = true)]
pub(crate) struct Cli {
    /// The daemon's control socket.
    #[arg(long, global = true, env = "CONET_SOCKET", value_name = "PATH", hide_env_values = true)]
    pub(crate) socket: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the main job, end to end, on this machine.
    ///
    /// Needs root, of the machine or of user namespaces: an ordinary user's runs in
    /// namespaces of its own. Steps that this machine cannot show are `unavailable`,
    /// with the reason.
    Demo {
        #[command(flatten)]
        output: Output,
    },
    /// Several conet hosts on this machine, to try things on.
    ///
    /// An ordinary user's lab is in namespaces of its own; there `lab exec` waits for
    /// the program, and process ids are those of inside.
    Lab {
        #[command(subcommand)]
        command: LabCommand,
    },
    /// Print a new private key, as `wg genkey`.
    Keygen,
    /// Print the public key of the private key on standard input, as `wg pubkey`.
    Pubkey {
        /// The key that plain WireGuard knows this node by.
        #[arg(long)]
        wireguard: bool,
    },
    /// Make a conet.toml of a file of wg-quick's.
    ///
    /// Every key is carried over, or refused by its name and line. The tunnel keeps its
    /// key; what comes out holds secrets and is readable by its owner alone.
    Import {
        /// As in /etc/wireguard/wg0.conf.
        #[arg(value_name = "FILE")]
        from: PathBuf,
        #[command(flatten)]
        options: ImportOptions,
    },
    /// Run the node's daemon, in the foreground.
    Up {
        /// The configuration.
        #[arg(short, long, env = "CONET_CONFIG", value_name = "FILE", default_value = DEFAULT_PATH)]
        config: PathBuf,
    },
    /// Show what this node is.
    Status {
        #[command(flatten)]
        output: Output,
    },
    /// Show the peers, as `wg show`.
    Peers {
        #[command(flatten)]
        output: Output,
    },
    /// The node's guests: add, list, remove, and run programs in them.
    Guest {
        #[command(subcommand)]
        command: GuestCommand,
    },
    /// The port of a guest that is a machine; the daemon starts it.
    #[command(name = conet_node::daemon::SERVER_COMMAND, hide = true)]
    GuestServer {
        #[arg(long)]
        mac: MacAddr,
        #[arg(long)]
        mtu: u16,
        #[arg(long)]
        control: PathBuf,
        #[arg(long)]
        prefix: u8,
        #[arg(long)]
        gateway: Vec<IpAddr>,
        #[arg(long)]
        dns: Vec<IpAddr>,
        #[arg(long)]
        address: Vec<IpAddr>,
        #[arg(long)]
        queues: u16,
    },
    /// Ports of this host's that lead to its guests: add, list, remove.
    Forward {
        #[command(subcommand)]
        command: ForwardCommand,
    },
    /// Start a program that may move; it has this command's pid.
    Run {
        /// Move it to this node as soon as it runs, and to no other.
        #[arg(long, value_name = "NODE")]
        node: Option<String>,
        #[command(flatten)]
        program: Program,
    },
    /// List the processes that may move, and where they are.
    Ps {
        #[command(flatten)]
        output: Output,
    },
    /// Move a process to a node, or `home`; returns when it runs there.
    Migrate {
        /// The process, as it is known at home.
        pid: u32,
        /// A peer's name, or `home`.
        #[arg(value_name = "NODE|home")]
        to: String,
        /// Send its memory ahead while it runs (the default, from Linux 6.7 on).
        #[arg(long, conflicts_with = "stop")]
        precopy: bool,
        /// Stop it and send all of its memory.
        #[arg(long)]
        stop: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Tell why a process may not move, came home or ended.
    Why {
        /// The process, as it is known at home.
        pid: u32,
        #[command(flatten)]
        output: Output,
    },
    /// Show which system calls of a process away are forwarded, how often, and how
    /// long they take.
    Trace {
        /// The process, as it is known at home.
        pid: u32,
        /// For how long to take times, in seconds.
        #[arg(long, value_name = "N", default_value_t = 2,
              value_parser = clap::value_parser!(u64).range(1..=3600))]
        seconds: u64,
        #[command(flatten)]
        output: Output,
    },
    /// Measure something beside its peers; without a name, list what can be measured.
    ///
    /// Runs `conet-bench-NAME` beside this executable, or builds the benchmark in the
    /// checkout of the sources that this directory or this executable is in.
    Bench {
        /// What to measure.
        name: Option<String>,
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
        /// Options of the benchmark's own.
        #[arg(last = true, requires = "name", value_name = "OPTIONS")]
        options: Vec<OsString>,
    },
    /// End the node's daemon; programs run on.
    Down,
    /// Tell what this machine can and cannot do for conet, and the remedy.
    ///
    /// Each line is a facility, found by trying it: ok, limited or missing, what was
    /// found, and where it is not ok what of conet that touches and what to do. Exits
    /// with 0 where programs can move and packets can travel; where only root can,
    /// an ordinary user's answer is about its own namespaces.
    Doctor {
        #[command(flatten)]
        output: Output,
        /// Make one trial in this process; what `doctor` runs.
        #[arg(long, hide = true, value_name = "NAME")]
        trial: Option<String>,
    },
    /// Be a program that `conet demo` moves.
    #[command(hide = true)]
    DemoProgram {
        #[command(subcommand)]
        program: DemoProgram,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DemoProgram {
    /// Compute, read a file over and over, write lines.
    Work {
        /// What to read.
        file: PathBuf,
        /// How many lines to write.
        lines: u32,
    },
    /// Time system calls.
    Calls,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ForwardCommand {
    /// Have ports of this host's lead to a guest.
    ///
    /// As in tcp:2222:web:22, udp:5000-5010:web, tcp:192.0.2.1:8000-8009:web:80-89 for
    /// one of the host's addresses, and auto:web or tcp:auto:web for whatever the guest
    /// listens on. It is there until it is removed, also for later daemons. Root and
    /// members of group conet may.
    Add {
        #[arg(help = "PROTOCOL:[ADDRESS:]PORTS:GUEST[:PORTS], or auto:GUEST")]
        forward: String,
        #[command(flatten)]
        output: Output,
    },
    /// Show the forwards.
    List {
        #[command(flatten)]
        output: Output,
    },
    /// Remove a forward that was added; connections under way go on.
    #[command(visible_aliases = ["del", "delete"])]
    Remove {
        /// As `conet forward list` shows it.
        forward: String,
    },
}

/// What `conet.toml` needs that wg-quick has not.
#[derive(Debug, Args)]
pub(crate) struct ImportOptions {
    /// The configuration to write; there must be none.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    pub(crate) to: PathBuf,
    /// The guests' prefix; that of Address where Address is its first address.
    #[arg(long, value_name = "PREFIX")]
    pub(crate) overlay: Option<Ipv4Net>,
    /// The host's own address, if it is not to listen on all.
    #[arg(long, value_name = "A", default_value = "0.0.0.0")]
    pub(crate) address: IpAddr,
    /// The node's name; the host's where there is none.
    #[arg(long, value_parser = node_name)]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// A name that `conet.toml` takes.
fn node_name(text: &str) -> Result<String, String> {
    match conet_node::config::is_name(text) {
        true => Ok(text.to_owned()),
        false => Err("give 1 to 63 letters, digits, `.`, `_` or `-`".to_owned()),
    }
}

/// How a command answers.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Output {
    /// Answer with one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is to be run, behind everything else.
#[derive(Debug, Args)]
pub(crate) struct Program {
    /// The program and its arguments.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    pub(crate) command: Vec<OsString>,
}

/// A tunnel's mode, as it is typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModeName {
    /// Encrypted, over UDP.
    Wireguard,
    /// In the clear, over UDP.
    IpUdp,
    /// In the clear, IP protocol 4.
    Ipip,
}

impl From<ModeName> for Mode {
    fn from(name: ModeName) -> Self {
        match name {
            ModeName::Wireguard => Self::WireGuard,
            ModeName::IpUdp => Self::IpUdp,
            ModeName::Ipip => Self::IpIp,
        }
    }
}

/// Reads the command line. What is not one is told in one line.
pub(crate) fn parse() -> Result<Cli, CommandLine> {
    Cli::try_parse().map_err(|error| {
        if error.use_stderr() {
            CommandLine::Wrong(one_line(&error))
        } else {
            CommandLine::Help(error)
        }
    })
}

/// Why there is nothing to do.
#[derive(Debug)]
pub(crate) enum CommandLine {
    /// Help or the version was asked for.
    Help(clap::Error),
    /// What is wrong, and what to type.
    Wrong(String),
}

/// clap's message without its usage and hints, which take many lines.
fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let said: Vec<_> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .filter(|line| !line.is_empty())
        .collect();
    let said = said.join(" ");
    // A bare `conet` prints the whole help: its first line says nothing wrong.
    match said.strip_prefix("error: ") {
        Some(said) => format!("{said}; see: conet --help"),
        None => "no command; see: conet --help".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn mistakes_take_one_line() {
        for arguments in [
            &["conet"][..],
            &["conet", "stauts"],
            &["conet", "migrate", "12"],
            &["conet", "migrate", "x", "home"],
            &["conet", "run"],
            &["conet", "lab"],
            &["conet", "lab", "up", "--mode", "fou"],
            &["conet", "guest", "add", "x", "--kind", "xen"],
            &["conet", "guest", "add", "x", "--address", "10.77.1.0/24"],
            &["conet", "guest", "exec", "x"],
            &["conet", "forward", "add"],
        ] {
            let line = one_line(&Cli::try_parse_from(arguments).unwrap_err());
            assert!(!line.contains('\n') && line.contains("conet --help"), "{line}");
        }
        let line = one_line(&Cli::try_parse_from(["conet", "stauts"]).unwrap_err());
        assert!(line.contains("'status'"), "{line}");
    }

    #[test]
    fn a_benchmarks_own_options_stand_behind_two_dashes() {
        let cli = Cli::try_parse_from(["conet", "bench", "x", "--json", "--", "--json", "--y"]);
        let Command::Bench { name, json, options } = cli.unwrap().command else { panic!() };
        assert_eq!((name.as_deref(), json), (Some("x"), true));
        assert_eq!(options, ["--json", "--y"]);
        for wrong in [&["conet", "bench", "x", "--y"][..], &["conet", "bench", "--", "--y"]] {
            one_line(&Cli::try_parse_from(wrong).unwrap_err());
        }
    }

    #[test]
    fn a_programs_own_options_are_its_own() {
        let cli = Cli::try_parse_from(["conet", "run", "--node", "b", "ls", "--json"]).unwrap();
        let Command::Run { node, program } = cli.command else { panic!("{cli:?}") };
        assert_eq!(node.as_deref(), Some("b"));
        assert_eq!(program.command, ["ls", "--json"]);
        let cli = Cli::try_parse_from(["conet", "lab", "exec", "conet-h1", "--", "a", "--", "b"]);
        let Command::Lab { command: LabCommand::Exec { program, .. } } = cli.unwrap().command
        else {
            panic!()
        };
        assert_eq!(program.command, ["a", "--", "b"]);
    }
}
