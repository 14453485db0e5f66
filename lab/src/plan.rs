//! What each host of a lab is given: keys, a `conet.toml` that knows all others,
//! a marker, and clocks of its own.

use std::path::PathBuf;

use conet_node::config::{DEFAULT_PORT, GuestKind, SOCKET_NAME};
use conet_node::identity::Identity;

use crate::holder::{Plan, PlannedFile};
use crate::names::HostId;
use crate::{LabError, Options};

/// The daemon's state directory inside a host.
pub(crate) const STATE_DIR: &str = "/run/conet";
/// The daemon's configuration inside a host.
pub(crate) const CONFIG: &str = "/run/conet/conet.toml";
/// A file of the host's private /tmp that holds the host's name.
pub const MARKER: &str = "/tmp/marker";

/// The daemon's control socket inside a host.
pub(crate) fn socket() -> PathBuf {
    PathBuf::from(STATE_DIR).join(SOCKET_NAME)
}

/// The plans of all hosts, which know each other.
pub(crate) fn plans(options: &Options) -> Result<Vec<(HostId, Plan)>, LabError> {
    let mut keys = Vec::new();
    for host in HostId::all(options.hosts) {
        let identity = Identity::generate()
            .map_err(std::io::Error::from)
            .map_err(LabError::step("make a key"))?;
        keys.push((host, identity));
    }
    Ok(keys.iter().map(|(host, identity)| (*host, plan(*host, identity, &keys, options))).collect())
}

fn plan(host: HostId, identity: &Identity, all: &[(HostId, Identity)], options: &Options) -> Plan {
    let file = |path: &str, mode, text| PlannedFile { path: path.into(), mode, text };
    Plan {
        name: host.to_string(),
        clock_s: u32::from(host.number()) * 1000,
        files: vec![
            file(MARKER, 0o644, format!("{host}\n")),
            file("/run/conet/node.key", 0o600, format!("{}\n", identity.seed_base64().as_str())),
            file(CONFIG, 0o600, config(host, all, options)),
        ],
    }
}

/// A host's `conet.toml`. All hosts are one person's, so they grant each other
/// all, and processes of root may move.
fn config(host: HostId, all: &[(HostId, Identity)], options: &Options) -> String {
    let Options { guests, ipv6, mode, .. } = *options;
    let list = |texts: [String; 2]| {
        let texts = texts.iter().take(if ipv6 { 2 } else { 1 });
        format!("[{}]", texts.map(|text| format!("\"{text}\"")).collect::<Vec<_>>().join(", "))
    };
    let prefixes = |host: HostId| list([host.overlay(), host.overlay6()]);
    let others: Vec<_> = all.iter().filter(|(other, _)| *other != host).collect();
    let names: Vec<_> = others.iter().map(|(other, _)| format!("\"{other}\"")).collect();
    let names = names.join(", ");
    // An ordinary user's lab shows the plain path, which needs no packet filter.
    let sharing = match crate::rootless::is_inside() {
        true => "host_ports = [\"all\"]\n",
        false => "shared_address = true\n",
    };
    let mut text = format!(
        "# Made by conet lab; this host is one of several on one machine.\n\
         [node]\n\
         name = \"{host}\"\n\
         private_key_file = \"node.key\"\n\
         address = \"{}\"\n\
         overlay = {}\n\
         mode = \"{mode}\"\n\
         state_dir = \"{STATE_DIR}\"\n\
         guests_from = [{names}]\n\
         host_for_us = [{names}]\n\
         allow_root = true\n\
         {sharing}\
         clock_offset = \"{}s\"\n",
        host.lan_address(),
        prefixes(host),
        clock_offset_s(host),
    );
    for (other, identity) in others {
        text += &format!(
            "\n[[peer]]\n\
             name = \"{other}\"\n\
             public_key = \"{}\"\n\
             endpoint = \"{}:{DEFAULT_PORT}\"\n\
             allowed_ips = {}\n",
            identity.public(),
            other.lan_address(),
            prefixes(*other),
        );
    }
    // An ordinary user's lab shows the plain path, which needs the least.
    let kind =
        if crate::rootless::is_inside() { GuestKind::Tap } else { GuestKind::Netns }.as_str();
    for guest in 1..=guests {
        text += &format!(
            "\n[[guest]]\n\
             name = \"{}\"\n\
             kind = \"{kind}\"\n\
             addresses = {}\n",
            host.guest_name(guest),
            list([host.guest_address(guest).to_string(), host.guest_address6(guest).to_string(),]),
        );
    }
    text
}

/// Minutes ahead for odd hosts, behind for even ones, more for later ones: no two
/// alike, and none like the machine's.
fn clock_offset_s(host: HostId) -> i64 {
    let seconds = i64::from(host.number()) * 1000;
    if host.number() % 2 == 1 { seconds } else { -seconds }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::net::IpAddr;
    use std::os::unix::fs::PermissionsExt;

    use conet_node::config::{Config, Mode};

    use super::*;

    #[test]
    fn every_host_has_a_configuration_that_its_daemon_takes() {
        let options = Options { hosts: 3, guests: 2, ipv6: false, mode: Mode::IpIp };
        let both = Options { ipv6: true, ..options };
        let plans = [options, both].map(|options| plans(&options).unwrap());
        for (host, plan) in plans.into_iter().flatten() {
            let dir = tempfile::tempdir().unwrap();
            for file in &plan.files {
                let path = dir.path().join(file.path.file_name().unwrap());
                fs::write(&path, &file.text).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(file.mode)).unwrap();
            }
            let config = Config::load(&dir.path().join("conet.toml")).unwrap();
            assert_eq!(config.node.name, host.to_string());
            assert_eq!(config.node.socket, socket());
            assert!(config.node.allow_root);
            assert_eq!(config.peers.len(), 2);
            assert!(config.peers.iter().all(|peer| peer.mode == Mode::IpIp
                && peer.grants.guests_from
                && peer.grants.host_for_us));
            assert_eq!(config.guests.len(), 2);
            let addresses: [IpAddr; 2] =
                [host.guest_address(2).into(), host.guest_address6(2).into()];
            let families = config.node.overlay.prefixes().count();
            assert_eq!(config.guests[1].addresses, addresses[..families]);
            assert!(config.peers.iter().all(|peer| peer.allowed_ips.len() == families));
        }
    }

    #[test]
    fn no_two_hosts_have_one_clock() {
        let offsets: std::collections::BTreeSet<_> = HostId::all(8).map(clock_offset_s).collect();
        assert_eq!(offsets.len(), 8);
        assert!(!offsets.contains(&0));
    }
}
