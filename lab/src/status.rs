//! What a lab that is up consists of.

use std::net::Ipv4Addr;

use conet_wire::control::Guest;
use serde::Serialize;

use crate::LabError;
use crate::state::LabState;
use crate::up::{ask_status, host_ids};

/// A lab and its hosts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LabReport {
    /// How packets between hosts travel: `wireguard`, `ip-udp` or `ipip`.
    pub mode: String,
    /// By number.
    pub hosts: Vec<HostReport>,
}

/// A host of the lab.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HostReport {
    /// Its name, and that of its network namespace.
    pub name: String,
    /// Its address on the LAN.
    pub address: Ipv4Addr,
    /// The prefix of its guests.
    pub overlay: String,
    /// The process that keeps its namespaces, while it runs.
    pub holder_pid: Option<u32>,
    /// Its daemon, while it answers.
    pub daemon_pid: Option<u32>,
    /// Peers that its daemon sees.
    pub peers_up: u32,
    /// Guests that its daemon has.
    pub guests: Vec<Guest>,
}

/// Describes the lab that is up.
///
/// # Errors
///
/// [`LabError::NotUp`].
pub fn status() -> Result<LabReport, LabError> {
    let state = LabState::load()?;
    let hosts = state.hosts.iter().zip(host_ids(&state)).map(|(host, id)| {
        let daemon = ask_status(host).ok();
        HostReport {
            name: host.name.clone(),
            address: id.lan_address(),
            overlay: daemon.as_ref().map_or_else(|| id.overlay(), |daemon| daemon.overlay.clone()),
            holder_pid: host.holder.is_alive().then_some(host.holder.pid),
            daemon_pid: daemon.as_ref().map(|daemon| daemon.pid),
            peers_up: daemon.as_ref().map_or(0, |daemon| daemon.peers_up),
            guests: daemon.map(|daemon| daemon.guests).unwrap_or_default(),
        }
    });
    let hosts = hosts.collect();
    Ok(LabReport { mode: state.mode, hosts })
}
