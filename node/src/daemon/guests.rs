//! The node's guests: made or taken over at the start, and at the end removed
//! where nothing runs in them.

use std::fs;
use std::net::IpAddr;

use conet_hostinject::{AttachError, GuestPort, GuestSpec};
use conet_netsys::{NameError, NetError, Netns, NetnsName};
use conet_tunnel::DEFAULT_MTU;
use thiserror::Error;

use crate::config::{Config, GuestConfig};

/// A guest that cannot be attached.
#[derive(Debug, Error)]
pub enum GuestError {
    /// Its name is none for a namespace and a link.
    #[error("guest {name}: {source}; give it another name in conet.toml")]
    Name {
        /// The guest.
        name: String,
        /// Why.
        source: NameError,
    },
    /// The kernel refused.
    #[error("guest {name}")]
    Attach {
        /// The guest.
        name: String,
        /// Why.
        source: AttachError,
    },
}

/// Attaches all guests of the configuration, in the calling thread's network
/// namespace as their host.
pub(super) fn attach(config: &Config) -> Result<Vec<GuestPort>, GuestError> {
    let mut ports = Vec::with_capacity(config.guests.len());
    for guest in &config.guests {
        let port = attach_one(config, guest)?;
        tracing::info!(
            guest = guest.name,
            address = %guest.address,
            adopted = port.is_adopted(),
            "guest attached"
        );
        ports.push(port);
    }
    Ok(ports)
}

fn attach_one(config: &Config, guest: &GuestConfig) -> Result<GuestPort, GuestError> {
    let wrong = |source| GuestError::Name { name: guest.name.clone(), source };
    let name = NetnsName::new(&guest.name).map_err(wrong)?;
    let gateway = IpAddr::V4(config.node.gateway());
    let spec = GuestSpec::new(name, IpAddr::V4(guest.address), gateway, DEFAULT_MTU)
        .map_err(wrong)?;
    GuestPort::attach(spec)
        .map_err(|source| GuestError::Attach { name: guest.name.clone(), source })
}

/// Removes the guests in which nothing runs; the others stay for the next daemon.
pub(super) fn release(ports: Vec<GuestPort>) {
    for port in ports {
        let name = port.spec().name.as_str().to_owned();
        match is_used(port.netns()) {
            Ok(true) => tracing::info!(guest = name, "guest stays: programs run in it"),
            Ok(false) => match port.detach() {
                Ok(()) => tracing::info!(guest = name, "guest removed"),
                Err(error) => tracing::warn!(guest = name, %error, "guest not removed"),
            },
            Err(error) => tracing::warn!(guest = name, %error, "guest not removed"),
        }
    }
}

/// Whether a process is in the namespace.
fn is_used(netns: &Netns) -> Result<bool, NetError> {
    let wanted = format!("net:[{}]", netns.id()?.inode);
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    Ok(processes
        .filter_map(|entry| fs::read_link(entry.path().join("ns/net")).ok())
        .any(|found| found.as_os_str() == wanted.as_str()))
}
