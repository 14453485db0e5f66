//! What is done in the kernel for one guest, on whichever thread.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use conet_hostinject::vhost::ServerSpec;
use conet_hostinject::{AttachError, GuestPort, GuestSpec, PortKind};
use conet_netsys::{IfName, NameError, NetError, Netns, NetnsName};
use conet_tunnel::DEFAULT_MTU;
use conet_wire::ip;
use resolv_conf::ScopedIp;
use thiserror::Error;

use crate::config::{Config, GuestConfig, GuestKind};

/// A guest that cannot be attached.
#[derive(Debug, Error)]
pub enum GuestError {
    /// Its name is none for a namespace and a link.
    #[error("guest {name}: {source}; give it another name")]
    Name {
        /// The guest.
        name: String,
        /// Why.
        source: NameError,
    },
    /// The kernel refused.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

/// The command of `conet` that is a machine's server, see
/// [`conet_hostinject::vhost::run_server`].
pub const SERVER_COMMAND: &str = "guest-server";

/// How a removal ended.
#[derive(Debug)]
pub(in crate::daemon) enum Removal {
    /// Nothing is left.
    Gone,
    /// These processes run in it; nothing was done.
    Busy(Option<GuestPort>, Vec<u32>),
    /// Some of it may be left.
    Failed(NetError),
}

/// Attaches a guest, or takes it over, in the calling thread's network namespace.
pub(super) fn attach(config: &Config, guest: &GuestConfig) -> Result<GuestPort, GuestError> {
    let port = GuestPort::attach(spec(config, guest)?)?;
    let adopted = port.is_adopted();
    tracing::info!(guest = guest.name, addresses = ?guest.addresses, adopted, "guest attached");
    Ok(port)
}

/// Makes a guest where nothing of its name is there.
pub(super) fn create(config: &Config, guest: &GuestConfig) -> Result<GuestPort, GuestError> {
    Ok(GuestPort::create(spec(config, guest)?)?)
}

fn spec(config: &Config, guest: &GuestConfig) -> Result<GuestSpec, GuestError> {
    let wrong = |source| GuestError::Name { name: guest.name.clone(), source };
    let card = guest.line.as_ref().map_or(0, |line| line.card);
    // Of the families that the guest has; on the link of another the host has none.
    let is_its = |gateway: &IpAddr| {
        guest.addresses.iter().any(|address| address.is_ipv4() == gateway.is_ipv4())
    };
    Ok(GuestSpec {
        host_link: IfName::new(&guest.name).map_err(wrong)?,
        guest_link: IfName::new(&format!("eth{card}")).map_err(wrong)?,
        name: NetnsName::new(&guest.name).map_err(wrong)?,
        addresses: guest.addresses.clone(),
        gateways: config.node.overlay.gateways().filter(is_its).collect(),
        // Ours, so that the gateway is in it: there are clients that need that.
        prefix: config.node.overlay.v4().map_or(32, |net| net.prefix_len()),
        rates: guest.rates,
        dns: config.node.dns.clone().unwrap_or_else(resolvers),
        mtu: DEFAULT_MTU,
        mac: guest.line.as_ref().and_then(|line| line.mac),
        kind: match guest.kind {
            GuestKind::Netns => PortKind::Veth,
            GuestKind::Tap | GuestKind::Colinux => PortKind::Tap,
            GuestKind::Qemu | GuestKind::Uml => PortKind::Vhost,
        },
        server: guest.kind.is_machine().then(|| server(config)),
        queues: guest.queues,
    })
}

/// Resolvers of this host's that a guest may use too: one that listens on loopback is
/// nobody's but the host's. systemd-resolved, which does, writes those that it asks itself
/// into a file of the same format.
fn resolvers() -> Vec<IpAddr> {
    let of = |file| resolvers_of(&fs::read(file).unwrap_or_default());
    let first = of("/etc/resolv.conf");
    if first.is_empty() { of("/run/systemd/resolve/resolv.conf") } else { first }
}

fn resolvers_of(file: &[u8]) -> Vec<IpAddr> {
    let Ok(config) = resolv_conf::Config::parse(file) else { return Vec::new() };
    let all = config.nameservers.into_iter().map(|server| match server {
        ScopedIp::V4(address) => IpAddr::V4(address),
        // One of the link's own is told by its scope, and is no guest's to reach.
        ScopedIp::V6(address, _) => IpAddr::V6(address),
    });
    let is_anybodys = |address: &IpAddr| match address {
        IpAddr::V4(address) => !address.is_link_local(),
        IpAddr::V6(address) => !address.is_unicast_link_local(),
    };
    all.filter(|address| ip::is_unicast(*address) && is_anybodys(address)).collect()
}

/// Where machines' ports are served: beside the control socket, by this very program.
pub(super) fn server(config: &Config) -> ServerSpec {
    let beside = config.node.socket.parent().unwrap_or(Path::new("/"));
    // Where it was replaced meanwhile, /proc still has the one that runs.
    let program = Path::new("/proc/self/exe");
    let program = fs::read_link(program).ok().filter(|path| path.exists());
    let program = program.unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
    ServerSpec {
        directory: beside.join("guests"),
        command: vec![program.into(), SERVER_COMMAND.into()],
    }
}

/// Removes a guest in which nothing runs.
pub(super) fn remove(port: GuestPort) -> Removal {
    let inside = match port.netns() {
        Some(netns) => users(netns),
        None => Ok(port.server().and_then(|server| server.vmm).into_iter().collect()),
    };
    match inside {
        Ok(pids) if pids.is_empty() => match port.detach() {
            Ok(()) => Removal::Gone,
            Err(error) => Removal::Failed(error),
        },
        Ok(pids) => Removal::Busy(Some(port), pids),
        Err(error) => Removal::Failed(error),
    }
}

/// Removes what is left of a guest of an earlier daemon, if nothing runs in it.
pub(super) fn remove_rest(config: &Config, guest: &GuestConfig) -> Removal {
    let (Ok(name), Ok(link)) = (NetnsName::new(&guest.name), IfName::new(&guest.name)) else {
        // No such thing can ever have been made.
        return Removal::Gone;
    };
    if guest.kind.is_machine() {
        // Its device went with its server, or is the server's still.
        return match attach(config, guest) {
            Ok(port) => remove(port),
            Err(GuestError::Attach(AttachError::Net { source, .. })) => Removal::Failed(source),
            // A link of that name is somebody else's.
            Err(_) => Removal::Gone,
        };
    }
    if let Ok(netns) = Netns::open(&name) {
        match users(&netns) {
            Ok(pids) if pids.is_empty() => {}
            Ok(pids) => return Removal::Busy(None, pids),
            Err(error) => return Removal::Failed(error),
        }
    } else if !Netns::list().is_ok_and(|names| names.contains(&name)) {
        // The namespace took the guest's link with it: one of this name is another's.
        return Removal::Gone;
    }
    let removed = match guest.kind {
        GuestKind::Netns => GuestPort::remove(&name, link).map(drop),
        // Its devices went with their daemon: a link of this name is somebody else's.
        _ => Netns::delete(&name).map(drop),
    };
    match removed {
        Ok(()) => Removal::Gone,
        Err(error) => Removal::Failed(error),
    }
}

/// The processes in the namespace.
fn users(netns: &Netns) -> Result<Vec<u32>, NetError> {
    let wanted = format!("net:[{}]", netns.id()?.inode);
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let inside = processes.filter(|entry| {
        fs::read_link(entry.path().join("ns/net"))
            .is_ok_and(|found| found.as_os_str() == wanted.as_str())
    });
    Ok(inside.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_told_of_resolvers_that_it_can_reach() {
        let file = b"# by hand\nnameserver 127.0.0.53\nsearch example.org\nnameserver 9.9.9.9\n\
            nameserver ::1\nnameserver fe80::1%eth0\nnameserver 2620:fe::fe\noptions edns0\n";
        let expected: [IpAddr; 2] = ["9.9.9.9", "2620:fe::fe"].map(|text| text.parse().unwrap());
        assert_eq!(resolvers_of(file), expected);
        assert_eq!(resolvers_of(b"nameserver nonsense\n\xff"), [] as [IpAddr; 0]);
        assert_eq!(resolvers_of(b""), [] as [IpAddr; 0]);
    }
}
