//! What can be typed behind `conet guest`.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use conet_hostinject::Rate;
use conet_node::config::GuestKind;

use super::{Output, Program};

#[derive(Debug, Subcommand)]
pub(crate) enum GuestCommand {
    /// Make a guest, with addresses in the overlay: a network namespace, or the port of a
    /// machine that you start.
    ///
    /// It is there until it is removed, also for later daemons. Root and members of
    /// group conet may.
    Add {
        /// Its name, and that of its namespace: 1 to 15 letters, digits, `.`, `_`, `-`.
        name: String,
        /// An address in this node's overlay, IPv4 or IPv6; may be repeated, or be a list
        /// with commas. The lowest free one of each family that the overlay has where there
        /// is none.
        #[arg(long, value_name = "A", value_delimiter = ',')]
        address: Vec<IpAddr>,
        /// How its packets reach the host.
        #[arg(long, value_enum, default_value_t = KindName::Netns)]
        kind: KindName,
        /// Pairs of queues of a machine's card, for one of several processors (kind qemu).
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16))]
        queues: Option<u16>,
        #[command(flatten)]
        rates: RateOptions,
        #[command(flatten)]
        output: Output,
    },
    /// Change how fast a guest may send and receive; without options it is unlimited.
    ///
    /// One of conet.toml has its own rates again when the daemon starts anew. Root and
    /// members of group conet may.
    Rate {
        /// The guest.
        name: String,
        #[command(flatten)]
        rates: RateOptions,
    },
    /// Show the guests.
    List {
        #[command(flatten)]
        output: Output,
    },
    /// Print what to start a guest that is a machine with: QEMU's or User-Mode Linux's.
    ///
    /// Of a guest of kind colinux it is the line of coLinux's configuration that conet.toml
    /// has for it.
    Args {
        /// The guest.
        name: String,
        #[command(flatten)]
        machine: MachineOptions,
        #[command(flatten)]
        output: Output,
    },
    /// Start a guest that is a machine, with its card; it has this command's pid (needs root).
    ///
    /// As in: conet guest start vm --port dgram -- -kernel vmlinuz -initrd initrd
    Start {
        /// The guest.
        name: String,
        #[command(flatten)]
        machine: MachineOptions,
        /// What to start in place of qemu-system-x86_64 or linux.uml.
        #[arg(long, value_name = "CMD")]
        program: Option<OsString>,
        /// What else the machine is told, behind --.
        #[arg(last = true, value_name = "ARG")]
        arguments: Vec<OsString>,
    },
    /// Write what a guest's card carries, both ways, as pcapng; Ctrl-C ends it (needs root).
    ///
    /// ARP and DHCP are in it, and what is refused. As in: conet guest capture web -w
    /// web.pcapng, or conet guest capture web | tcpdump -r -
    Capture {
        /// The guest.
        name: String,
        /// Where to; standard output where absent.
        #[arg(short, long, value_name = "FILE")]
        write: Option<PathBuf>,
        /// Ends after so many seconds.
        #[arg(long, value_name = "N")]
        seconds: Option<u32>,
        /// Ends after so many packets.
        #[arg(long, value_name = "N")]
        packets: Option<u64>,
    },
    /// Keep a guest's packets from now on, in order: up to 4096, and 8 MiB.
    ///
    /// What does not fit is dropped, and counted as hold_full. Not for a namespace by veth,
    /// whose packets no process sees. Root and members of group conet may.
    Hold {
        /// The guest.
        name: String,
        #[command(flatten)]
        output: Output,
    },
    /// Take out what is kept of a guest that is held, for another host (needs root).
    ///
    /// The guest stays held. As in: conet guest drain web --to web.held, or conet guest drain
    /// web --to - | ssh other conet guest release web --from -
    Drain {
        /// The guest.
        name: String,
        /// A file that is not there yet; - for standard output.
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
        #[command(flatten)]
        output: Output,
    },
    /// Let a guest's packets pass again, those that were kept first.
    ///
    /// Root and members of group conet may.
    Release {
        /// The guest, which need not be held.
        name: String,
        /// Before them, what was kept for it on another host; - for standard input.
        #[arg(long, value_name = "FILE")]
        from: Option<PathBuf>,
        #[command(flatten)]
        output: Output,
    },
    /// Remove a guest that was added, if no program runs in it and no machine is there.
    Remove {
        /// Its name.
        name: String,
    },
    /// Run a program in a guest's network; it has this command's pid (needs root).
    Exec {
        /// The guest.
        name: String,
        #[command(flatten)]
        program: Program,
    },
}

/// What a machine is to be.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct MachineOptions {
    /// Its memory, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 512,
          value_parser = clap::value_parser!(u32).range(32..=1_048_576))]
    pub(crate) memory: u32,
    /// How it reaches its port.
    #[arg(long, value_enum, default_value_t = PortName::Vhost)]
    pub(crate) port: PortName,
}

/// How fast a guest may be.
#[derive(Debug, Clone, Args)]
pub(crate) struct RateOptions {
    /// How fast it may be, each way: as 100mbit, 10kpps or 100mbit,10kpps. What is faster is
    /// dropped. Not for a namespace by veth, whose packets no process sees.
    #[arg(long, value_name = "RATE")]
    pub(crate) rate: Option<Rate>,
    /// How fast it may send, if not as --rate.
    #[arg(long, value_name = "RATE")]
    pub(crate) rate_from: Option<Rate>,
    /// How fast it may receive, if not as --rate.
    #[arg(long, value_name = "RATE")]
    pub(crate) rate_to: Option<Rate>,
}

/// A guest's kind, as it is typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KindName {
    /// By veth: packets stay in the kernel.
    Netns,
    /// By a TAP device and a thread of the daemon.
    Tap,
    /// A QEMU machine that you start, by vhost-user; see conet guest args.
    Qemu,
    /// A User-Mode Linux that you start, by vhost-user; see conet guest args.
    Uml,
}

/// How a machine reaches its port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PortName {
    /// vhost-user: queues in the machine's memory, with offloads.
    Vhost,
    /// Frames in a stream, for QEMU where it cannot share its memory.
    Stream,
    /// Frames as messages, for a User-Mode Linux without virtio.
    Bess,
    /// The same, by a descriptor that a User-Mode Linux inherits; by conet guest start.
    Fd,
    /// Frames as messages, for QEMU, by a descriptor that it inherits; by conet guest start.
    Dgram,
}

impl PortName {
    /// As it is typed.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Vhost => "vhost",
            Self::Stream => "stream",
            Self::Bess => "bess",
            Self::Fd => "fd",
            Self::Dgram => "dgram",
        }
    }

    /// Whether it is a descriptor that somebody passes on.
    pub(crate) fn is_inherited(self) -> bool {
        matches!(self, Self::Fd | Self::Dgram)
    }
}

impl KindName {
    /// As the daemon spells it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Netns => GuestKind::Netns.as_str(),
            Self::Tap => GuestKind::Tap.as_str(),
            Self::Qemu => GuestKind::Qemu.as_str(),
            Self::Uml => GuestKind::Uml.as_str(),
        }
    }
}
