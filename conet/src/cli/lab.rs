//! What can be typed behind `conet lab`.

use std::ffi::OsString;

use clap::Subcommand;

use super::{ModeName, Output, Program};

#[derive(Debug, Subcommand)]
pub(crate) enum LabCommand {
    /// Make a lab: hosts conet-h1, conet-h2, … on one LAN, each with its daemon.
    Up {
        /// Hosts.
        #[arg(long, value_name = "N", default_value_t = 2)]
        hosts: u8,
        /// Guests of each host.
        #[arg(long, value_name = "M", default_value_t = 1)]
        guests: u8,
        /// Guests have IPv6 addresses as well as IPv4 ones.
        #[arg(long)]
        ipv6: bool,
        /// How packets between hosts travel.
        #[arg(long, value_enum, default_value_t = ModeName::Wireguard)]
        mode: ModeName,
        #[command(flatten)]
        output: Output,
    },
    /// Remove the lab, also after a crash.
    Down {
        #[command(flatten)]
        output: Output,
    },
    /// Show the lab's hosts and guests.
    Status {
        #[command(flatten)]
        output: Output,
    },
    /// Run a program on a lab host; it has this command's pid.
    Exec {
        /// The host, as in conet-h1.
        host: String,
        #[command(flatten)]
        program: Program,
    },
    /// End a lab host's daemon and start it anew.
    Restart {
        /// The host, as in conet-h1.
        host: String,
    },
    /// Keep a lab host's namespaces; what `lab up` runs.
    #[command(hide = true)]
    Hold,
    /// Be process 1 of an ordinary user's machine; what `lab up` and `demo` run.
    #[command(hide = true)]
    Init {
        /// The process to end with.
        #[arg(long)]
        parent: Option<u32>,
        /// What to run in it.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Make an ordinary user's machine; what `lab up` runs.
    #[command(hide = true)]
    Machine,
    /// Become a lab host's daemon; what `lab up` runs.
    #[command(hide = true)]
    Daemon {
        /// The host.
        host: String,
    },
}
