//! What is done in the kernel for one guest, on whichever thread.

use std::fs;
use std::net::IpAddr;

use conet_hostinject::{AttachError, GuestPort, GuestSpec, PortKind};
use conet_netsys::{IfName, NameError, NetError, Netns, NetnsName};
use conet_tunnel::DEFAULT_MTU;
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
    let gateway = IpAddr::V4(config.node.gateway());
    Ok(GuestSpec {
        host_link: IfName::new(&guest.name).map_err(wrong)?,
        guest_link: IfName::new("eth0").map_err(wrong)?,
        name: NetnsName::new(&guest.name).map_err(wrong)?,
        addresses: guest.addresses.iter().copied().map(IpAddr::V4).collect(),
        gateways: vec![gateway],
        mtu: DEFAULT_MTU,
        mac: None,
        kind: match guest.kind {
            GuestKind::Netns => PortKind::Veth,
            GuestKind::Tap => PortKind::Tap,
        },
    })
}

/// Removes a guest in which nothing runs.
pub(super) fn remove(port: GuestPort) -> Removal {
    match users(port.netns()) {
        Ok(pids) if pids.is_empty() => match port.detach() {
            Ok(()) => Removal::Gone,
            Err(error) => Removal::Failed(error),
        },
        Ok(pids) => Removal::Busy(Some(port), pids),
        Err(error) => Removal::Failed(error),
    }
}

/// Removes what is left of a guest of an earlier daemon, if nothing runs in it.
pub(super) fn remove_rest(guest: &GuestConfig) -> Removal {
    let (Ok(name), Ok(link)) = (NetnsName::new(&guest.name), IfName::new(&guest.name)) else {
        // No such thing can ever have been made.
        return Removal::Gone;
    };
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
        GuestKind::Tap => Netns::delete(&name).map(drop),
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
