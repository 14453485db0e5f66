//! Which processes are in a lab's namespaces.

use std::collections::BTreeSet;
use std::fs;

use conet_node::procfs::{ProcessRef, Stat};

/// The namespaces that tell a lab host from the machine.
const KINDS: [&str; 5] = ["net", "mnt", "uts", "ipc", "time"];

/// The identities of namespaces, as `/proc/PID/ns/*` spells them.
pub(crate) type NamespaceIds = BTreeSet<String>;

/// The namespaces of `pid` that are not also the caller's own.
pub(crate) fn foreign_namespaces(pid: u32) -> NamespaceIds {
    namespaces(&pid.to_string()).difference(&own_namespaces()).cloned().collect()
}

/// The caller's namespaces.
pub(crate) fn own_namespaces() -> NamespaceIds {
    namespaces("self")
}

fn namespaces(process: &str) -> NamespaceIds {
    let link = |kind| fs::read_link(format!("/proc/{process}/ns/{kind}"));
    KINDS.iter().filter_map(|kind| link(kind).ok()?.into_os_string().into_string().ok()).collect()
}

/// Every running process in one of the namespaces, but the caller and its
/// ancestors.
pub(crate) fn inside(ids: &NamespaceIds) -> Vec<ProcessRef> {
    let spared = ancestors();
    let pids = all_pids().filter(|pid| !spared.contains(pid));
    pids.filter(|pid| !namespaces(&pid.to_string()).is_disjoint(ids))
        .filter_map(ProcessRef::of)
        .collect()
}

/// Every running process of this name; the kernel keeps 15 bytes of it.
pub(crate) fn named(matches: impl Fn(&str) -> bool) -> Vec<ProcessRef> {
    let spared = ancestors();
    let pids = all_pids().filter(|pid| !spared.contains(pid));
    pids.filter(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| matches(name.trim_end()))
    })
    .filter_map(ProcessRef::of)
    .collect()
}

fn all_pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn ancestors() -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    let mut next = std::process::id();
    while next != 0 && found.insert(next) {
        next = Stat::of(next).map_or(0, |stat| stat.parent);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_are_not_in_foreign_namespaces() {
        assert!(foreign_namespaces(std::process::id()).is_empty());
        assert!(inside(&NamespaceIds::new()).is_empty());
    }
}
