//! What is named `conet*` on this machine: namespaces, links and processes.
//!
//! Whatever appears between two looks was left behind by the run between them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Every namespace, link and process named `conet*`, as `kind name`.
pub(crate) fn look() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (kind, dir) in [("namespace", "/run/netns"), ("link", "/sys/class/net")] {
        found.extend(named_conet(dir).map(|name| format!("{kind} {name}")));
    }
    for state in ["/run/conet", "/run/conet-lab"] {
        if Path::new(state).exists() {
            found.insert(format!("state {state}"));
        }
    }
    found.extend(processes());
    found
}

fn named_conet(dir: &str) -> impl Iterator<Item = String> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("conet"))
}

/// Running processes whose name starts with `conet`; a zombie runs no more,
/// only its parent has not looked yet.
fn processes() -> impl Iterator<Item = String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
        let running = !rest.trim_start().starts_with(['Z', 'X']);
        (running && name.starts_with("conet")).then(|| format!("process {name} (pid {pid})"))
    })
}
