//! The single trials: what is tried, what for, and what to do where it fails.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use conet_deputy_link::{probe as processes, processor};
use conet_hostinject::{GuestLink, HostPorts, HostRules, PortForward, Ports, RuleTable};
use conet_migsock::{NftLock, probe as sockets};
use conet_netsys::{IfName, IpNet, IpipPrograms, Transport, probe as network, userns};
use conet_tunnel::probe as tunnel;

use super::{Finding, State};

/// The kernel that the oldest call of a move which has no replacement came with
/// (PTRACE_GET_RSEQ_CONFIGURATION).
const LEAST_KERNEL: (u32, u32) = (5, 13);

/// What cannot work at all where a check fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Moving programs.
    Moving,
    /// Tunnels and guests.
    Tunnelling,
    /// Either.
    Both,
    /// All works without it, slower or with less.
    Nothing,
}

/// How much a trial asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Privilege {
    /// Nothing.
    None,
    /// To be root; an ordinary user becomes so in a user namespace.
    Root,
    /// To be an ordinary user; root becomes nobody.
    Ordinary,
}

/// Something to try.
#[derive(Debug, Clone, Copy)]
pub struct Trial {
    /// Short and stable.
    pub name: &'static str,
    /// What of conet needs it.
    pub feature: &'static str,
    /// What to do where it is not all there.
    pub remedy: &'static str,
    /// What cannot work without it.
    pub need: Need,
    privilege: Privilege,
    attempt: fn() -> Finding,
}

const fn trial(
    name: &'static str,
    need: Need,
    privilege: Privilege,
    attempt: fn() -> Finding,
    feature: &'static str,
    remedy: &'static str,
) -> Trial {
    Trial { name, feature, remedy, need, privilege, attempt }
}

/// All trials, by importance.
pub const TRIALS: &[Trial] = &[
    trial(
        "kernel",
        Need::Moving,
        Privilege::None,
        kernel,
        "moving programs",
        "run Linux 5.13 or newer",
    ),
    trial(
        "processor",
        Need::Moving,
        Privilege::None,
        vector_state,
        "moving programs: both hosts must save the same vector state",
        "use an x86-64 processor with XSAVE; in a virtual machine, pass it through",
    ),
    trial(
        "user-namespaces",
        Need::Moving,
        Privilege::Root,
        sandbox,
        "hosting programs of others, in a sandbox",
        "raise user.max_user_namespaces with sysctl -w, or build a kernel with CONFIG_USER_NS",
    ),
    trial(
        "rootless",
        Need::Nothing,
        Privilege::Ordinary,
        rootless,
        "conet demo and conet lab by ordinary users",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 \
         kernel.unprivileged_userns_clone=1, as far as they are there; in a container, unhide \
         /proc; or run as root",
    ),
    trial(
        "network-namespaces",
        Need::Tunnelling,
        Privilege::Root,
        network_namespaces,
        "guests, the lab",
        "raise user.max_net_namespaces with sysctl -w, or build a kernel with CONFIG_NET_NS",
    ),
    trial(
        "tun",
        Need::Tunnelling,
        Privilege::Root,
        tun,
        "tunnels, guests of kind tap",
        "modprobe tun; in a container, pass /dev/net/tun in",
    ),
    trial(
        "tun-offloads",
        Need::Nothing,
        Privilege::Root,
        tun_offloads,
        "the tunnel's speed: TCP in large pieces",
        "run Linux 6.2 or newer, for UDP too",
    ),
    trial(
        "udp-batches",
        Need::Nothing,
        Privilege::None,
        udp_batches,
        "the tunnel's speed: many datagrams in one call",
        "run Linux 5.0 or newer",
    ),
    trial(
        "raw-sockets",
        Need::Nothing,
        Privilege::Root,
        raw_sockets,
        "tunnels in mode ipip",
        "run as root, or give CAP_NET_RAW",
    ),
    trial(
        "ptrace",
        Need::Moving,
        Privilege::Root,
        ptrace,
        "moving programs",
        "sysctl -w kernel.yama.ptrace_scope=1 (3 needs a reboot); in a container, give CAP_SYS_PTRACE",
    ),
    trial(
        "seccomp",
        Need::Moving,
        Privilege::None,
        || Finding::of(processes::trap().map(|()| "filters trap".to_owned())),
        "moving programs: forwarding their calls",
        "build a kernel with CONFIG_SECCOMP_FILTER",
    ),
    trial(
        "set-tid",
        Need::Moving,
        Privilege::Root,
        || {
            Finding::of(
                processes::chosen_pid().map(|()| "clone3 gives the id asked for".to_owned()),
            )
        },
        "hosting programs under the id that they have at home",
        "run Linux 5.5 or newer; in a container, allow clone3 in its seccomp profile",
    ),
    trial(
        "vdso",
        Need::Moving,
        Privilege::None,
        || Finding::of(processes::vdso().map(|()| "a vDSO can be mapped".to_owned())),
        "hosting programs: their clocks",
        "build a kernel with CONFIG_CHECKPOINT_RESTORE",
    ),
    trial(
        "userfaultfd",
        Need::Nothing,
        Privilege::Root,
        user_faults,
        "moving programs with a short freeze: pages are copied while they run",
        "run Linux 6.7 or newer, with CONFIG_USERFAULTFD; sysctl -w vm.unprivileged_userfaultfd=1",
    ),
    trial(
        "pagemap-scan",
        Need::Nothing,
        Privilege::None,
        || Finding::of(processes::pagemap_scan().map(|()| "finds pages".to_owned())),
        "moving programs with a short freeze: which pages have changed",
        "run Linux 6.7 or newer",
    ),
    trial(
        "tcp-repair",
        Need::Nothing,
        Privilege::Root,
        tcp_repair,
        "moving TCP connections",
        "build a kernel with CONFIG_CHECKPOINT_RESTORE",
    ),
    trial(
        "nf-tables",
        Need::Nothing,
        Privilege::Root,
        nf_tables,
        "moving TCP connections",
        "modprobe nf_tables; Linux 5.12 or newer",
    ),
    trial(
        "shared-address",
        Need::Nothing,
        Privilege::Root,
        shared_address,
        "guests with their host's address, forwards, what guests reach of their host",
        "modprobe nft_nat nft_masq nft_fib_inet nft_reject_inet; Linux 5.2 or newer",
    ),
    trial(
        "tcp-rto-max",
        Need::Nothing,
        Privilege::None,
        || Finding::of(sockets::rto_max().map(|()| "can be limited".to_owned())),
        "links of moved programs go on quickly after the LAN was away",
        "run Linux 6.15 or newer",
    ),
    trial(
        "time-namespaces",
        Need::Nothing,
        Privilege::Root,
        || Finding::of(network::time_namespace().map(|()| "can be made".to_owned())),
        "clocks of their own for the lab's hosts",
        "run Linux 5.6 or newer, with CONFIG_TIME_NS",
    ),
    trial(
        "ebpf",
        Need::Nothing,
        Privilege::Root,
        ebpf,
        "mode ipip in the kernel, with no process on the way",
        "run as root on Linux 6.6 or newer, with CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_ACT",
    ),
];

/// A part of the trial `rootless`, which makes it in namespaces of its own.
const OWN_PROC: &Trial = &trial(
    "own-proc",
    Need::Nothing,
    Privilege::None,
    || Finding::of(network::own_proc().map(|()| "can be mounted".to_owned())),
    "conet demo and conet lab by ordinary users",
    "run outside of containers that hide parts of /proc, or as root",
);

impl Trial {
    /// The trial of a name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        TRIALS.iter().chain([OWN_PROC]).find(|trial| trial.name == name)
    }

    /// Tries it in the calling process, which must have one thread and may be of no
    /// use for anything else afterwards.
    #[must_use]
    pub fn run(&self) -> Finding {
        let in_namespace = match self.privilege {
            Privilege::Root if !is_privileged() => {
                if let Err(error) = userns::become_root() {
                    return Finding::new(State::Missing, error.to_string());
                }
                true
            }
            Privilege::Ordinary => {
                if let Err(error) = become_ordinary() {
                    return Finding::new(State::Missing, format!("cannot be tried: {error}"));
                }
                false
            }
            _ => false,
        };
        let mut finding = (self.attempt)();
        if in_namespace && finding.state != State::Missing {
            finding.found.push_str(" (in a user namespace)");
        }
        finding
    }
}

fn is_privileged() -> bool {
    let admin = rustix::thread::CapabilitySet::SYS_ADMIN;
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(admin))
}

/// Root gives itself up for the user nobody; others are ordinary already. (A process
/// that changed its user is not dumpable, and so has no right to its own maps.)
fn become_ordinary() -> rustix::io::Result<()> {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    if !rustix::process::geteuid().is_root() || userns::has_one_id().unwrap_or(true) {
        return Ok(());
    }
    let (uid, gid) =
        (rustix::process::Uid::from_raw(65_534), rustix::process::Gid::from_raw(65_534));
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    set_dumpable_behavior(DumpableBehavior::Dumpable)
}

/// A file of one line under /proc, or nothing.
fn line(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn kernel() -> Finding {
    let system = rustix::system::uname();
    let release = system.release().to_string_lossy();
    let state = if version(&release) < LEAST_KERNEL { State::Missing } else { State::Ok };
    Finding::new(state, format!("Linux {release}"))
}

/// The first two numbers of a release; an odd one counts as new.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => (u32::MAX, 0),
    }
}

fn vector_state() -> Finding {
    /// Components 17 and 18 of XCR0 (Intel SDM vol. 1 §13.1).
    const AMX: u64 = 3 << 17;
    match processor() {
        Some(found) => {
            let text = format!("XSAVE, {} bytes, components {:#x}", found.size, found.components);
            if found.components & AMX == 0 {
                Finding::new(State::Ok, text)
            } else {
                Finding::new(State::Limited, format!("{text}: programs that use AMX stay home"))
            }
        }
        None => Finding::new(State::Missing, "no XSAVE"),
    }
}

fn sandbox() -> Finding {
    let most = line("/proc/sys/user/max_user_namespaces").unwrap_or_else(|| "unknown".to_owned());
    Finding::of(processes::sandbox().map(|()| format!("up to {most}")))
}

/// As `conet_lab::rootless` does it, step by step.
fn rootless() -> Finding {
    let result = become_root_with_processes().and_then(|()| {
        fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .map(|_| "a user namespace of one id, and /dev/net/tun".to_owned())
            .map_err(|error| format!("/dev/net/tun: {error}"))
    });
    let mut finding = Finding::of(result);
    for (file, wanted) in [
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "0"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "1"),
    ] {
        if finding.state == State::Missing
            && let Some(value) = line(file).filter(|value| value != wanted)
        {
            finding.found += &format!("; {file} is {value}");
        }
    }
    finding
}

fn become_root_with_processes() -> Result<(), String> {
    userns::become_root().map_err(|error| error.to_string())?;
    // Where a security module lets only the first step pass, this is what fails.
    network::process_namespace()
        .and_then(|()| network::network_namespace())
        .map_err(|error| format!("a user namespace without rights: {error}"))?;
    // Process 1 mounts a /proc; this process is not in its namespace.
    match super::try_apart(Path::new("/proc/self/exe"), OWN_PROC.name) {
        Finding { state: State::Missing, found } => Err(format!("no /proc of its own: {found}")),
        _ => Ok(()),
    }
}

fn network_namespaces() -> Finding {
    Finding::of(network::network_namespace().map(|()| {
        let most = line("/proc/sys/user/max_net_namespaces");
        format!("up to {}", most.unwrap_or_else(|| "unknown".to_owned()))
    }))
}

/// In a network namespace of its own, where no device can be in the way.
fn device() -> Result<tunnel::DeviceOffloads, String> {
    network::network_namespace().map_err(|error| format!("no network namespace: {error}"))?;
    let name = IfName::new("conet0").map_err(|error| error.to_string())?;
    tunnel::device(name).map_err(|error| error.to_string())
}

fn tun() -> Finding {
    Finding::of(device().map(|_| "/dev/net/tun makes devices".to_owned()))
}

fn tun_offloads() -> Finding {
    match device() {
        Ok(tunnel::DeviceOffloads { tcp: true, udp: true }) => Finding::new(State::Ok, "TCP, UDP"),
        Ok(tunnel::DeviceOffloads { tcp: true, udp: false }) => {
            Finding::new(State::Limited, "TCP, not UDP")
        }
        Ok(_) => Finding::new(State::Missing, "the device has none"),
        Err(error) => Finding::new(State::Missing, error),
    }
}

fn udp_batches() -> Finding {
    match tunnel::udp() {
        Ok(found) => {
            let state = match (found.send > 1, found.receive > 1) {
                (true, true) => State::Ok,
                (false, false) => State::Missing,
                _ => State::Limited,
            };
            Finding::new(state, format!("{} in a send, {} received", found.send, found.receive))
        }
        Err(error) => Finding::new(State::Missing, error.to_string()),
    }
}

fn raw_sockets() -> Finding {
    // A user namespace has no rights in the network namespace that it began in.
    let result = network::network_namespace().and_then(|()| tunnel::raw());
    Finding::of(result.map(|()| "protocol 4 can be opened".to_owned()))
}

fn ptrace() -> Finding {
    let scope = line("/proc/sys/kernel/yama/ptrace_scope");
    let scope = scope.map_or_else(|| "no Yama".to_owned(), |scope| format!("Yama scope {scope}"));
    match processes::trace() {
        Ok(()) => Finding::new(State::Ok, format!("a program can be stopped, {scope}")),
        Err(error) => Finding::new(State::Missing, format!("{error}, {scope}")),
    }
}

fn user_faults() -> Finding {
    match processes::user_faults() {
        Ok(found) => {
            let state = match (found.write_protect, found.asynchronous) {
                (true, true) => State::Ok,
                (false, _) => State::Missing,
                (true, false) => State::Limited,
            };
            let able = |what: bool| if what { "yes" } else { "no" };
            let mut text = format!(
                "write protection {}, asynchronous {}",
                able(found.write_protect),
                able(found.asynchronous)
            );
            if !found.in_calls {
                text += ", not within system calls";
            }
            Finding::new(state, text)
        }
        Err(error) => Finding::new(State::Missing, error.to_string()),
    }
}

fn tcp_repair() -> Finding {
    // As for raw sockets.
    let result = network::network_namespace().and_then(|()| sockets::repair());
    Finding::of(result.map(|()| "a socket can be repaired".to_owned()))
}

fn nf_tables() -> Finding {
    if let Err(error) = network::network_namespace() {
        return Finding::new(State::Missing, format!("no network namespace: {error}"));
    }
    Finding::of(NftLock::open().map(|_| "a table with an owner can be made".to_owned()).map_err(
        |error| match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        },
    ))
}

/// Every kind of rule that there is.
fn shared_address() -> Finding {
    let ports = Ports { transport: Transport::Tcp, first: 1, last: 1 };
    let (guest, tunnel) = (IpAddr::V4(Ipv4Addr::new(10, 77, 1, 2)), IfName::LOOPBACK);
    let rules = HostRules {
        guests: vec![GuestLink { link: tunnel, addresses: vec![guest] }],
        tunnel,
        overlays: vec![IpNet::from(guest)],
        shared_address: true,
        host_ports: HostPorts::Only(vec![ports]),
        forwards: vec![PortForward { bind: None, ports, to: guest, to_first: 2 }],
    };
    let tried = network::network_namespace().map_err(|error| error.to_string()).and_then(|()| {
        let made = RuleTable::open().and_then(|mut table| table.apply(&rules));
        made.map_err(|error| error.to_string())
    });
    Finding::of(tried.map(|()| "addresses are translated, ports led to guests".to_owned()))
}

/// Loads the programs and hangs them up, in a network namespace of its own.
fn ebpf() -> Finding {
    const LOOPBACK: u32 = 1;
    let tried = network::network_namespace().map_err(|error| error.to_string()).and_then(|()| {
        let made = IpipPrograms::load(IfName::LOOPBACK, LOOPBACK);
        made.map(drop).map_err(|error| crate::daemon::chain(&error))
    });
    Finding::of(tried.map(|()| "the programs load, links take them".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_their_numbers() {
        assert_eq!(version("6.18.44-fc-v657"), (6, 18));
        assert_eq!(version("5.4"), (5, 4));
        assert!(version("5.4.0") < LEAST_KERNEL && version("5.13.0") >= LEAST_KERNEL);
        assert!(version("unheard-of") >= LEAST_KERNEL);
    }

    #[test]
    fn every_trial_has_one_name_and_a_remedy() {
        for (index, trial) in TRIALS.iter().enumerate() {
            assert!(!trial.remedy.is_empty() && !trial.feature.is_empty());
            assert!(TRIALS[..index].iter().all(|other| other.name != trial.name));
            assert!(Trial::named(trial.name).is_some());
        }
    }
}
