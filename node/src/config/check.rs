//! What the keys of `conet.toml` mean for each other: names, keys, prefixes and
//! addresses are unique, and grants name somebody.

use std::net::IpAddr;

use ipnet::IpNet;

use super::error::{ConfigError, Problem, Suggestion};
use super::overlay::{InvalidOverlay, Overlay};
use super::reader::{Located, Section};
use super::{Config, Grants, Mode, PeerConfig, PeerKey};
use crate::identity::X25519Public;

/// A host's or guest's name: what a file name, a host name and a namespace can
/// all bear.
pub fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    name.len() <= 63
        && name.bytes().all(allowed)
        && name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
}

/// The section's `name`. `home` is none: `conet migrate PID home` means the
/// process's own node.
pub(super) fn name(
    section: &mut Section<'_>,
    expected: &'static str,
) -> Result<Option<Located<String>>, ConfigError> {
    match section.string("name", expected)? {
        Some(name) if !is_name(&name.value) || name.value == "home" => {
            let expected = if name.value == "home" {
                "another name: `home` is where a process comes from"
            } else {
                expected
            };
            let problem = Problem::Value { value: name.value, expected };
            Err(section.wrong(name.line, "name", problem))
        }
        name => Ok(name),
    }
}

/// A name that nothing else in the file bears.
pub(super) fn new_name(
    section: &Section<'_>,
    name: Located<String>,
    config: &Config,
) -> Result<String, ConfigError> {
    let other = if config.node.name == name.value {
        Some("this node")
    } else if config.peers.iter().any(|peer| peer.name == name.value) {
        Some("a peer")
    } else if config.guests.iter().any(|guest| guest.name == name.value) {
        Some("a guest")
    } else {
        None
    };
    match other {
        Some(other) => {
            let problem = Problem::DuplicateName { name: name.value, other };
            Err(section.wrong(name.line, "name", problem))
        }
        None => Ok(name.value),
    }
}

/// A guest's name, which its link on the host bears too (IFNAMSIZ less its NUL,
/// `man 7 netdevice`).
pub(super) fn link_name(
    section: &Section<'_>,
    name: Located<String>,
) -> Result<Located<String>, ConfigError> {
    if name.value.len() <= 15 {
        return Ok(name);
    }
    let problem = Problem::LongName { name: name.value };
    Err(section.wrong(name.line, "name", problem))
}

/// Where a peer's packets go: not into a tunnel, and in `ipip` mode to an IPv4
/// address by which it alone is known.
pub(super) fn endpoints(
    section: &Section<'_>,
    peer: &PeerConfig,
    config: &Config,
) -> Result<(), ConfigError> {
    let all = || config.peers.iter().chain([peer]);
    for (from, to) in all().map(|other| (peer, other)).chain(all().map(|other| (other, peer))) {
        for endpoint in addresses(to) {
            if let Some(prefix) = from.allowed_ips.iter().find(|net| net.contains(&endpoint)) {
                let problem = Problem::Loop { prefix: *prefix, endpoint, peer: to.name.clone() };
                return Err(section.wrong(section.line, "allowed_ips", problem));
            }
        }
    }
    if peer.mode != Mode::IpIp {
        return Ok(());
    }
    let Some(endpoint) = tunnel_address(peer).filter(IpAddr::is_ipv4) else {
        return Err(section.wrong(section.line, "endpoint", Problem::NeedsEndpoint));
    };
    let same =
        |other: &&PeerConfig| other.mode == Mode::IpIp && tunnel_address(other) == Some(endpoint);
    match config.peers.iter().find(same) {
        Some(other) => {
            let problem = Problem::SameEndpoint { endpoint, other: other.name.clone() };
            Err(section.wrong(section.line, "endpoint", problem))
        }
        None => Ok(()),
    }
}

fn addresses(peer: &PeerConfig) -> impl Iterator<Item = IpAddr> {
    peer.endpoint.into_iter().chain(peer.wireguard_endpoint).map(|at| at.ip())
}

fn tunnel_address(peer: &PeerConfig) -> Option<IpAddr> {
    peer.endpoint.or(peer.wireguard_endpoint).map(|at| at.ip())
}

/// A key that neither this node nor another peer has.
pub(super) fn new_key(
    section: &Section<'_>,
    key: Located<PeerKey>,
    spelled: &str,
    config: &Config,
) -> Result<PeerKey, ConfigError> {
    let own = config.node.identity.public().x25519();
    let tunnel = X25519Public::of(&config.node.tunnel_secret());
    if [own, tunnel].contains(&key.value.x25519()) {
        return Err(section.wrong(key.line, spelled, Problem::OwnKey));
    }
    let is_its =
        |peer: &&PeerConfig| [peer.key.x25519(), peer.tunnel_key()].contains(&key.value.x25519());
    match config.peers.iter().find(is_its) {
        Some(peer) => {
            let problem = Problem::DuplicateKey { other: peer.name.clone() };
            Err(section.wrong(key.line, spelled, problem))
        }
        None => Ok(key.value),
    }
}

/// Prefixes of a peer, each of which no other peer has and none of which takes
/// addresses of our own guests. A wider prefix beside a narrower one is fine:
/// the longest match decides.
pub(super) fn prefixes(
    section: &Section<'_>,
    prefixes: Vec<Located<IpNet>>,
    config: &Config,
) -> Result<Vec<IpNet>, ConfigError> {
    let mut checked = Vec::with_capacity(prefixes.len());
    for Located { value, line } in prefixes {
        let prefix = value.trunc();
        if let Some(overlay) = config.node.overlay.holding(&prefix) {
            let problem = Problem::OwnPrefix { prefix, overlay };
            return Err(section.wrong(line, "allowed_ips", problem));
        }
        if let Some(peer) = config.peers.iter().find(|peer| peer.allowed_ips.contains(&prefix)) {
            let problem = Problem::DuplicatePrefix { prefix, other: peer.name.clone() };
            return Err(section.wrong(line, "allowed_ips", problem));
        }
        if !checked.contains(&prefix) {
            checked.push(prefix);
        }
    }
    Ok(checked)
}

/// The grants of the peer that a list names.
pub(super) fn granted<'a>(
    section: &Section<'_>,
    name: &Located<String>,
    key: &str,
    config: &'a mut Config,
) -> Result<&'a mut Grants, ConfigError> {
    let Some(index) = config.peers.iter().position(|peer| peer.name == name.value) else {
        let known = config.peers.iter().map(|peer| peer.name.as_str());
        let suggestion = Suggestion::of(&name.value, known);
        let problem = Problem::UnknownPeer { name: name.value.clone(), suggestion };
        return Err(section.wrong(name.line, key, problem));
    };
    let peer = &mut config.peers[index];
    if peer.key.identity().is_none() {
        let problem = Problem::NotANode { name: name.value.clone() };
        return Err(section.wrong(name.line, key, problem));
    }
    Ok(&mut peer.grants)
}

/// The guests' prefixes: as networks, with room for a gateway and a guest.
pub(super) fn overlay(
    section: &Section<'_>,
    prefixes: &[Located<IpNet>],
) -> Result<Overlay, ConfigError> {
    let values: Vec<_> = prefixes.iter().map(|prefix| prefix.value).collect();
    let (index, expected) = match Overlay::new(&values) {
        Ok(overlay) => return Ok(overlay),
        Err(InvalidOverlay::None) => {
            let remedy = "add the guests' prefix, as in overlay = \"10.77.1.0/24\"";
            return Err(section.missing("overlay", remedy));
        }
        Err(InvalidOverlay::Second(index)) => (index, "one prefix of IPv4 and one of IPv6 at most"),
        Err(InvalidOverlay::Network(index)) => (
            index,
            match values.get(index) {
                Some(IpNet::V6(_)) => {
                    "a network of /16 to /126 that guests can have, without host bits, as in \
                 \"fd77:1::/64\""
                }
                _ => "a network of /8 to /30 without host bits, as in \"10.77.1.0/24\"",
            },
        ),
    };
    let place = prefixes.get(index);
    let value = place.map(|prefix| prefix.value.to_string()).unwrap_or_default();
    let line = place.map_or(section.line, |prefix| prefix.line);
    Err(section.wrong(line, "overlay", Problem::Value { value, expected }))
}

/// An address that a guest can have: of the overlay, but not the network's, the
/// gateway's, IPv4's broadcast's or another guest's.
pub(super) fn guest_address(
    section: &Section<'_>,
    address: Located<IpAddr>,
    config: &Config,
) -> Result<IpAddr, ConfigError> {
    let Located { value: address, line } = address;
    let overlay = config.node.overlay;
    if let Some(remedy) = overlay.refuses_guest_at(address) {
        let problem = Problem::GuestAddress { address, overlay, remedy };
        return Err(section.wrong(line, "address", problem));
    }
    match config.guests.iter().find(|guest| guest.addresses.contains(&address)) {
        Some(guest) => {
            let problem = Problem::DuplicateAddress { address, other: guest.name.clone() };
            Err(section.wrong(line, "address", problem))
        }
        None => Ok(address),
    }
}

/// A first uid above the system's and users' own, with 2^16 uids above it.
pub(super) fn guest_uid_base(
    section: &Section<'_>,
    base: Option<Located<u32>>,
    expected: &'static str,
) -> Result<Option<u32>, ConfigError> {
    match base {
        Some(Located { value, line }) if !(65_536..=u32::MAX - 65_536).contains(&value) => {
            let problem = Problem::Value { value: value.to_string(), expected };
            Err(section.wrong(line, "guest_uid_base", problem))
        }
        base => Ok(base.map(|base| base.value)),
    }
}
