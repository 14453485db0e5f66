//! Removing a lab: processes, namespaces, links, state; whole, half made or
//! crashed.
//!
//! It does not rely on what the lab remembers: whatever runs in a namespace that
//! a lab host has, or that bears a lab's name, is ended, and whatever bears a
//! lab's name is removed ([`is_lab_name`]).

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use conet_netsys::{Netlink, Netns};
use conet_node::procfs::ProcessRef;
use rustix::process::{Pid, Signal, WaitOptions, waitpid};

use crate::LabError;
use crate::names::is_lab_name;
use crate::process::{self, NamespaceIds};
use crate::state::{LabLock, LabState};

/// How long a daemon may take to clean up after itself.
const POLITE_LIMIT: Duration = Duration::from_secs(3);
/// How long a killed process may take to be gone: the kernel has to tear down
/// its memory.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Rounds of looking for processes: each can only find what the last one's
/// victims had started just before they died.
const ROUNDS: usize = 10;

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// Processes ended.
    pub processes: usize,
    /// Network namespaces, by name.
    pub namespaces: Vec<String>,
    /// Links of the machine's own namespace, by name.
    pub links: Vec<String>,
}

/// Removes whatever there is of a lab; nothing to remove is no failure.
///
/// # Errors
///
/// [`LabError::NotRoot`]; [`LabError::Inside`]; others for what would not go.
pub fn down() -> Result<Removed, LabError> {
    remove_all(LabLock::take()?)
}

pub(crate) fn remove_all(lock: LabLock) -> Result<Removed, LabError> {
    let namespaces: Vec<_> =
        Netns::list()?.into_iter().filter(|name| is_lab_name(name.as_str())).collect();
    let mut ids = NamespaceIds::new();
    for name in &namespaces {
        // A name without a living namespace has no processes either.
        if let Ok(data) = std::fs::metadata(Path::new("/run/netns").join(name.as_str())) {
            ids.insert(format!("net:[{}]", data.ino()));
        }
    }
    if !process::own_namespaces().is_disjoint(&ids) {
        return Err(LabError::Inside);
    }
    let mut removed = Removed { processes: end_processes(ids)?, ..Removed::default() };
    for name in namespaces {
        if Netns::delete(&name)? {
            removed.namespaces.push(name.as_str().to_owned());
        }
    }
    let mut netlink = Netlink::open()?;
    for link in netlink.links()?.into_iter().filter(|link| is_lab_name(link.name.as_str())) {
        // A veth port may have gone with its namespace meanwhile.
        if netlink.delete_link(link.name)? {
            removed.links.push(link.name.as_str().to_owned());
        }
    }
    lock.remove_state()?;
    Ok(removed)
}

/// Ends the daemons politely, then all that runs in a lab host's namespaces.
fn end_processes(mut ids: NamespaceIds) -> Result<usize, LabError> {
    let state = LabState::load().ok();
    let hosts = state.iter().flat_map(|state| &state.hosts);
    let mut daemons: Vec<_> = hosts.clone().filter_map(|host| host.daemon).collect();
    daemons.retain(|daemon| daemon.signal(Signal::TERM));
    for daemon in &daemons {
        // Whether it went by itself or not, the next step ends what is left.
        let _gone = daemon.wait_gone(POLITE_LIMIT);
    }
    reap(&daemons.iter().copied().collect());
    let mut holders: BTreeSet<_> = hosts.map(|host| host.holder).collect();
    holders.retain(|holder| holder.is_alive());
    // Holders of a lab whose state is lost still bear a host's name.
    holders.extend(process::named(|name| name.starts_with("conet-h")));
    for holder in &holders {
        ids.extend(process::foreign_namespaces(holder.pid));
    }
    let mut ended: BTreeSet<ProcessRef> = daemons.into_iter().collect();
    for _ in 0..ROUNDS {
        let mut found: BTreeSet<_> = process::inside(&ids).into_iter().collect();
        found.extend(holders.iter().filter(|holder| holder.is_alive()));
        if found.is_empty() {
            return Ok(ended.len());
        }
        for process in &found {
            process.signal(Signal::KILL);
        }
        for process in &found {
            if !process.wait_gone(KILL_LIMIT) {
                return Err(LabError::StillRunning { pid: process.pid });
            }
        }
        reap(&found);
        ended.extend(found);
    }
    match process::inside(&ids).first() {
        Some(process) => Err(LabError::StillRunning { pid: process.pid }),
        None => Ok(ended.len()),
    }
}

/// Takes the exit status of those that the caller itself had started, as the
/// demonstration does: they would stay zombies, with a lab's name, until it ends.
fn reap(processes: &BTreeSet<ProcessRef>) {
    for process in processes {
        if let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) {
            // ECHILD: somebody else's child, and theirs to wait for.
            waitpid(Some(pid), WaitOptions::NOHANG).ok();
        }
    }
}

/// Ends one daemon, politely first.
pub(crate) fn end(daemon: ProcessRef) -> Result<(), LabError> {
    if daemon.signal(Signal::TERM) && !daemon.wait_gone(POLITE_LIMIT) {
        daemon.signal(Signal::KILL);
        if !daemon.wait_gone(KILL_LIMIT) {
            return Err(LabError::StillRunning { pid: daemon.pid });
        }
    }
    Ok(())
}
