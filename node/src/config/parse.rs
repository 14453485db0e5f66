//! The keys of `conet.toml`: what each means, which must be there, and the
//! defaults of the others.

use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use conet_hostinject::{Rate, Rates};
use conet_tunnel::{Offloads, PresharedKey};
use conet_wire::ip;
use ipnet::IpNet;
use toml::Spanned;
use toml::de::DeValue;
use zeroize::Zeroizing;

use super::check;
use super::error::{ConfigError, Problem, Suggestion};
use super::reader::{Located, Section, Source};
use super::sharing;
use super::{
    ClockOffset, Config, DEFAULT_GUEST_UID_BASE, DEFAULT_LINK_TIMEOUT, DEFAULT_PORT,
    DEFAULT_STATE_DIR, DEFAULT_WIREGUARD_PORT, Grants, GuestConfig, GuestKind, Mode, NodeConfig,
    PeerConfig, PeerKey, SOCKET_NAME,
};
use crate::colinux::Line;
use crate::identity::{Identity, KeyError, X25519Public};

const SECTIONS: &[&str] = &["node", "peer", "guest"];
const NODE_KEYS: &[&str] = &[
    "name",
    "private_key",
    "private_key_file",
    "address",
    "port",
    "wireguard_port",
    "wireguard_private_key",
    "wireguard_private_key_file",
    "tunnel_addresses",
    "overlay",
    "mode",
    "state_dir",
    "socket",
    "guests_from",
    "host_for_us",
    "plain_links",
    "allow_root",
    "guest_uid_base",
    "link_timeout",
    "tcp_fallback",
    "clock_offset",
    "dns",
    "tun_offload",
    "udp_gso",
    "ipip_kernel",
    "udp_gro",
    "shared_address",
    "host_ports",
    "forwards",
];
const PEER_KEYS: &[&str] = &[
    "name",
    "public_key",
    "wireguard_key",
    "endpoint",
    "wireguard_endpoint",
    "allowed_ips",
    "mode",
    "persistent_keepalive",
    "preshared_key",
];
const GUEST_KEYS: &[&str] =
    &["name", "kind", "address", "addresses", "rate", "rate_from", "rate_to", "line", "queues"];

const A_NAME: &str = "1 to 63 letters, digits, `.`, `_` or `-`, the first a letter or digit";
const A_PORT: &str = "a port from 1 to 65535";
const AN_ENDPOINT: &str = "an address and port, as in \"192.0.2.2:47700\"";
const A_MODE: &str = "\"wireguard\", \"ip-udp\" or \"ipip\"";
const SOME_ADDRESSES: &str = "a list of addresses, as in [\"10.8.0.5\"]";
const PEER_NAMES: &str = "a list of names of peers, as in [\"a\", \"b\"]";

/// The whole file.
pub(super) fn config(source: Source<'_>) -> Result<Config, ConfigError> {
    let mut node = None;
    let mut peers = Vec::new();
    let mut guests = Vec::new();
    for (key, value) in source.table()?.into_inner() {
        let line = source.line(key.span());
        match key.get_ref().as_ref() {
            "node" => node = Some(Section::new(source, "node", value, NODE_KEYS)?),
            "peer" => peers = sections(source, "peer", value, PEER_KEYS)?,
            "guest" => guests = sections(source, "guest", value, GUEST_KEYS)?,
            other => {
                let suggestion = Suggestion::of(other, SECTIONS.iter().copied());
                return Err(source.wrong(line, other, Problem::UnknownSection(suggestion)));
            }
        }
    }
    let Some(mut section) = node else {
        let remedy = "add a [node] section with private_key_file, address and overlay";
        return Err(source.wrong(1, "node", Problem::Missing { remedy }));
    };
    let (node, default_mode) = read_node(&mut section)?;
    let mut config = Config { node, peers: Vec::new(), guests: Vec::new(), forwards: Vec::new() };
    for mut section in peers {
        let peer = read_peer(&mut section, default_mode, &config)?;
        config.peers.push(peer);
    }
    grant(&mut section, &mut config)?;
    for mut section in guests {
        let guest = read_guest(&mut section, &config)?;
        config.guests.push(guest);
        sharing::redirections(&section, &mut config)?;
    }
    sharing::forwards(&mut section, &mut config)?;
    Ok(config)
}

/// The tables of `[[name]]`.
fn sections<'a>(
    source: Source<'a>,
    name: &'static str,
    value: Spanned<DeValue<'a>>,
    known: &[&str],
) -> Result<Vec<Section<'a>>, ConfigError> {
    let line = source.line(value.span());
    match value.into_inner() {
        DeValue::Array(tables) => {
            tables.into_iter().map(|table| Section::new(source, name, table, known)).collect()
        }
        _ => {
            let expected =
                "each one as a section of its own, with two brackets: [[peer]], [[guest]]";
            let problem = Problem::Type { found: "not a list of sections", expected };
            Err(source.wrong(line, name, problem))
        }
    }
}

fn read_node(section: &mut Section<'_>) -> Result<(NodeConfig, Mode), ConfigError> {
    let name = match check::name(section, A_NAME)? {
        Some(name) => name.value,
        None => {
            host_name().ok_or_else(|| section.wrong(section.line, "name", Problem::NoHostName))?
        }
    };
    let identity = read_identity(section)?;
    let wireguard_private_key = read_secret(section, WIREGUARD_KEYS)?;
    let tunnel_addresses = section.list::<IpAddr>("tunnel_addresses", SOME_ADDRESSES)?;
    let an_address = "this host's address, as in \"192.0.2.1\"";
    let address = section.parsed::<IpAddr>("address", an_address)?.ok_or_else(|| {
        section.missing("address", "add this host's own address, as in address = \"192.0.2.1\"")
    })?;
    let prefixes = "a prefix, as in \"10.77.1.0/24\", or a list of one of IPv4 and one of IPv6";
    let prefixes = section.one_or_more::<IpNet>("overlay", prefixes)?;
    let overlay = check::overlay(section, &prefixes)?;
    let port = port(section, "port")?.map_or(DEFAULT_PORT, |port| port.value);
    let wireguard_port = port_for_wireguard(section, port)?;
    let mode = section.parsed("mode", A_MODE)?.map_or(Mode::WireGuard, |mode| mode.value);
    let a_path = "a path, as in \"/run/conet\"";
    let state_dir = section.string("state_dir", a_path)?;
    let state_dir = PathBuf::from(state_dir.map_or(DEFAULT_STATE_DIR.into(), |dir| dir.value));
    let socket = section.string("socket", a_path)?;
    let socket = socket.map_or_else(|| state_dir.join(SOCKET_NAME), |path| path.value.into());
    let a_uid = "a uid from 65536 to 4294901759";
    let guest_uid_base = section.integer("guest_uid_base", a_uid)?;
    let guest_uid_base = check::guest_uid_base(section, guest_uid_base, a_uid)?;
    let an_offset = "a signed number with ns, us, ms, s, m, h or d, as in \"-90s\"";
    let clock_offset = section.parsed::<ClockOffset>("clock_offset", an_offset)?;
    let link_timeout = link_timeout(section)?;
    let dns = read_dns(section)?;
    let offloads = Offloads {
        device: section.boolean("tun_offload")?.unwrap_or(true),
        send: section.boolean("udp_gso")?.unwrap_or(true),
        receive: section.boolean("udp_gro")?.unwrap_or(true),
        kernel: section.boolean("ipip_kernel")?.unwrap_or(true),
    };
    let node = NodeConfig {
        name,
        identity,
        address: address.value,
        port,
        wireguard_port,
        wireguard_private_key,
        tunnel_addresses: tunnel_addresses.into_iter().map(|address| address.value).collect(),
        overlay,
        state_dir,
        socket,
        allow_root: section.boolean("allow_root")?.unwrap_or(false),
        guest_uid_base: guest_uid_base.unwrap_or(DEFAULT_GUEST_UID_BASE),
        link_timeout,
        tcp_fallback: section.boolean("tcp_fallback")?.unwrap_or(true),
        dns,
        clock_offset: clock_offset.map(|offset| offset.value).unwrap_or_default(),
        offloads,
        shared_address: section.boolean("shared_address")?.unwrap_or(false),
        host_ports: sharing::host_ports(section)?,
    };
    Ok((node, mode))
}

/// None where nothing is said, which is not the same as an empty list.
fn read_dns(section: &mut Section<'_>) -> Result<Option<Vec<IpAddr>>, ConfigError> {
    let expected = "a list of addresses, as in [\"192.0.2.53\"]";
    if !section.has("dns") {
        return Ok(None);
    }
    let mut resolvers = Vec::new();
    for Located { value, line } in section.list::<IpAddr>("dns", expected)? {
        if !ip::is_unicast(value) {
            let problem = Problem::Value { value: value.to_string(), expected };
            return Err(section.wrong(line, "dns", problem));
        }
        resolvers.push(value);
    }
    Ok(Some(resolvers))
}

fn link_timeout(section: &mut Section<'_>) -> Result<Duration, ConfigError> {
    let expected = "seconds from 5 to 86400";
    match section.integer::<u32>("link_timeout", expected)? {
        None => Ok(DEFAULT_LINK_TIMEOUT),
        Some(Located { value, .. }) if (5..=86_400).contains(&value) => {
            Ok(Duration::from_secs(value.into()))
        }
        Some(Located { value, line }) => {
            let problem = Problem::Value { value: value.to_string(), expected };
            Err(section.wrong(line, "link_timeout", problem))
        }
    }
}

fn host_name() -> Option<String> {
    let uname = rustix::system::uname();
    let name = uname.nodename().to_str().ok()?;
    check::is_name(name).then(|| name.to_owned())
}

fn port(section: &mut Section<'_>, key: &str) -> Result<Option<Located<u16>>, ConfigError> {
    let port = section.integer::<u16>(key, A_PORT)?;
    match port {
        Some(Located { value: 0, line }) => {
            let problem = Problem::Value { value: "0".to_owned(), expected: A_PORT };
            Err(section.wrong(line, key, problem))
        }
        port => Ok(port),
    }
}

fn port_for_wireguard(section: &mut Section<'_>, sessions: u16) -> Result<u16, ConfigError> {
    match port(section, "wireguard_port")? {
        Some(port) if port.value == sessions => {
            Err(section.wrong(port.line, "wireguard_port", Problem::SamePort { port: sessions }))
        }
        Some(port) => Ok(port.value),
        None if sessions == DEFAULT_WIREGUARD_PORT => {
            let problem = Problem::SamePort { port: sessions };
            Err(section.wrong(section.line, "wireguard_port", problem))
        }
        None => Ok(DEFAULT_WIREGUARD_PORT),
    }
}

/// The node's private key.
fn read_identity(section: &mut Section<'_>) -> Result<Identity, ConfigError> {
    read_secret(section, IDENTITY_KEYS)?.ok_or_else(|| {
        section.missing(
            "private_key_file",
            "make a key with (umask 077; conet keygen > node.key), and add \
             private_key_file = \"node.key\"",
        )
    })
}

/// Keys for a secret itself, and for a file that has it.
const IDENTITY_KEYS: [&str; 2] = ["private_key", "private_key_file"];
const WIREGUARD_KEYS: [&str; 2] = ["wireguard_private_key", "wireguard_private_key_file"];

/// A secret, from the file itself or from the one it names; whichever holds it must be
/// readable by its owner alone.
fn read_secret<T: FromStr<Err = KeyError>>(
    section: &mut Section<'_>,
    [inline_key, file_key]: [&'static str; 2],
) -> Result<Option<T>, ConfigError> {
    let a_key = "a key, as `conet keygen` prints it";
    let inline = section.string(inline_key, a_key)?;
    let named = section.string(file_key, "a path, as in \"node.key\"")?;
    let parsed = match (inline, named) {
        (Some(key), None) => {
            let text = Zeroizing::new(key.value);
            check_own_file(section, key.line, inline_key)?;
            text.parse().map_err(|error: KeyError| section.wrong(key.line, inline_key, error))
        }
        (None, Some(path)) => {
            let key = file_key;
            let file = beside(section.source.file, &path.value);
            let (text, mode) = match read_key_file(&file) {
                Ok(read) => read,
                Err(source) => {
                    let problem = Problem::KeyFile { file, source };
                    return Err(section.wrong(path.line, key, problem));
                }
            };
            if is_exposed(mode) {
                return Err(section.wrong(path.line, key, Problem::Exposed { file, mode }));
            }
            text.parse().map_err(|error: KeyError| section.wrong(path.line, key, error))
        }
        (Some(_), Some(path)) => {
            let problem = Problem::Both { other: inline_key };
            Err(section.wrong(path.line, file_key, problem))
        }
        (None, None) => return Ok(None),
    };
    parsed.map(Some)
}

/// A path in the file is relative to the file.
fn beside(file: &Path, path: &str) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).join(path)
}

/// A key file's text and permission bits.
fn read_key_file(path: &Path) -> std::io::Result<(Zeroizing<String>, u32)> {
    let file = File::open(path)?;
    let mode = file.metadata()?.permissions().mode() & 0o7777;
    // A key has 44 characters; somebody's disk image is not read to its end.
    let mut text = Zeroizing::new(String::with_capacity(256));
    file.take(256).read_to_string(&mut text)?;
    Ok((text, mode))
}

/// Whether a file of these permission bits is open to its group or others.
fn is_exposed(mode: u32) -> bool {
    mode & 0o077 != 0
}

fn read_peer(
    section: &mut Section<'_>,
    default_mode: Mode,
    config: &Config,
) -> Result<PeerConfig, ConfigError> {
    let name = check::name(section, A_NAME)?
        .ok_or_else(|| section.missing("name", "add a name, as in name = \"a\""))?;
    let name = check::new_name(section, name, config)?;
    let (key, own_tunnel_key) = read_peer_key(section, config)?;
    let endpoint = section.parsed::<SocketAddr>("endpoint", AN_ENDPOINT)?.map(|at| at.value);
    let wireguard_endpoint = section.parsed("wireguard_endpoint", AN_ENDPOINT)?;
    let wireguard_endpoint = wireguard_endpoint
        .map(|at: Located<SocketAddr>| at.value)
        .or_else(|| endpoint.map(|at| SocketAddr::new(at.ip(), DEFAULT_WIREGUARD_PORT)));
    let prefixes = "a list of prefixes, as in [\"10.77.2.0/24\"]";
    let prefixes = section.list::<IpNet>("allowed_ips", prefixes)?;
    let allowed_ips = check::prefixes(section, prefixes, config)?;
    let mode = section.parsed("mode", A_MODE)?.map_or(default_mode, |mode| mode.value);
    let seconds = "seconds from 0 (off) to 65535";
    let keepalive = section.integer::<u16>("persistent_keepalive", seconds)?;
    let peer = PeerConfig {
        name,
        key,
        own_tunnel_key,
        endpoint,
        wireguard_endpoint,
        allowed_ips,
        mode,
        persistent_keepalive: keepalive
            .filter(|keepalive| keepalive.value > 0)
            .map(|keepalive| Duration::from_secs(keepalive.value.into())),
        preshared_key: read_preshared_key(section)?,
        grants: Grants::default(),
    };
    check::endpoints(section, &peer, config)?;
    Ok(peer)
}

/// A secret, in a file that must be readable by its owner alone. Its text does not
/// appear in the error for a wrong one.
fn read_preshared_key(section: &mut Section<'_>) -> Result<Option<PresharedKey>, ConfigError> {
    const KEY: &str = "preshared_key";
    let expected = "a key, as `wg genpsk` prints it";
    let Some(Located { value, line }) = section.string(KEY, expected)? else { return Ok(None) };
    let value = Zeroizing::new(value);
    check_own_file(section, line, KEY)?;
    let wrong = || Problem::Value { value: "what is there".to_owned(), expected };
    value.parse().map(Some).map_err(|_| section.wrong(line, KEY, wrong()))
}

/// Refuses a secret where the file itself is open to others.
fn check_own_file(section: &Section<'_>, line: usize, key: &str) -> Result<(), ConfigError> {
    let file = section.source.file.to_owned();
    let mode = std::fs::metadata(&file).map_or(0, |data| data.permissions().mode()) & 0o7777;
    match is_exposed(mode) {
        true => Err(section.wrong(line, key, Problem::Exposed { file, mode })),
        false => Ok(()),
    }
}

/// A peer's key, and its tunnel's where it has another.
fn read_peer_key(
    section: &mut Section<'_>,
    config: &Config,
) -> Result<(PeerKey, Option<X25519Public>), ConfigError> {
    let node = section.string("public_key", "a key, as `conet pubkey` prints it")?;
    let plain = section.string("wireguard_key", "a key, as `wg pubkey` prints it")?;
    let (line, name, key) = match (node, plain) {
        (Some(text), None) => (text.line, "public_key", text.value.parse().map(PeerKey::Node)),
        (None, Some(text)) => {
            (text.line, "wireguard_key", text.value.parse().map(PeerKey::WireGuard))
        }
        (Some(node), Some(text)) => {
            let wrong = |line, key: &str, error: KeyError| section.wrong(line, key, error);
            let key = node.value.parse().map(PeerKey::Node);
            let key = key.map_err(|error| wrong(node.line, "public_key", error))?;
            let own = text.value.parse::<X25519Public>();
            let own = own.map_err(|error| wrong(text.line, "wireguard_key", error))?;
            let located = Located { value: PeerKey::WireGuard(own), line: text.line };
            check::new_key(section, located, "wireguard_key", config)?;
            let key = Located { value: key, line: node.line };
            return Ok((check::new_key(section, key, "public_key", config)?, Some(own)));
        }
        (None, None) => {
            return Err(section.missing(
                "public_key",
                "add the key that `conet pubkey` prints there (or wireguard_key, for a peer \
                 that only tunnels)",
            ));
        }
    };
    let key = key.map_err(|error| section.wrong(line, name, error))?;
    Ok((check::new_key(section, Located { value: key, line }, name, config)?, None))
}

/// Carries `guests_from`, `host_for_us` and `plain_links` over to the peers that they name.
fn grant(node: &mut Section<'_>, config: &mut Config) -> Result<(), ConfigError> {
    for peer in node.list("guests_from", PEER_NAMES)? {
        check::granted(node, &peer, "guests_from", config)?.guests_from = true;
    }
    for peer in node.list("host_for_us", PEER_NAMES)? {
        check::granted(node, &peer, "host_for_us", config)?.host_for_us = true;
    }
    for peer in node.list("plain_links", PEER_NAMES)? {
        check::granted(node, &peer, "plain_links", config)?.plain_links = true;
    }
    Ok(())
}

fn read_guest(section: &mut Section<'_>, config: &Config) -> Result<GuestConfig, ConfigError> {
    let name = check::name(section, A_NAME)?
        .ok_or_else(|| section.missing("name", "add a name, as in name = \"web\""))?;
    let name = check::link_name(section, name)?;
    let name = check::new_name(section, name, config)?;
    let kind = section.parsed("kind", "\"netns\" or \"tap\"")?;
    let kind = kind.ok_or_else(|| section.missing("kind", "add kind = \"netns\""))?.value;
    let one = section.parsed("address", "an address, as in \"10.77.1.2\"")?;
    let many = section.list("addresses", "a list of addresses, as in [\"10.77.1.2\"]")?;
    let given = match (one, many.first()) {
        (Some(_), Some(second)) => {
            let problem = Problem::Both { other: "address" };
            return Err(section.wrong(second.line, "addresses", problem));
        }
        (Some(one), None) => vec![one],
        (None, Some(_)) => many,
        (None, None) => {
            let remedy = "add an address of the overlay, as in address = \"10.77.1.2\"";
            return Err(section.missing("address", remedy));
        }
    };
    let mut addresses = Vec::with_capacity(given.len());
    for address in given {
        let line = address.line;
        let address = check::guest_address(section, address, config)?;
        if addresses.contains(&address) {
            let problem = Problem::DuplicateAddress { address, other: name };
            return Err(section.wrong(line, "addresses", problem));
        }
        addresses.push(address);
    }
    let rates = read_rates(section, kind)?;
    let queues = section.integer("queues", "a number from 1 to 16")?;
    let queues = match queues {
        None => 1,
        Some(Located { value, line }) if !kind.may_have_queues(value) => {
            return Err(section.wrong(line, "queues", Problem::Queues));
        }
        Some(queues) => queues.value,
    };
    let line = read_line(section, kind)?;
    Ok(GuestConfig { name, kind, addresses, rates, line, queues })
}

/// A line of coLinux's, of a guest that is in place of one, and of no other.
fn read_line(section: &mut Section<'_>, kind: GuestKind) -> Result<Option<Line>, ConfigError> {
    const KEY: &str = "line";
    let text = section.string(KEY, "a line of coLinux's, as in 'eth0=tuntap,\"TAP\"'")?;
    match (text, kind) {
        (None, GuestKind::Colinux) => Err(section.missing(
            KEY,
            "add the card's line of its configuration, as in line = 'eth0=tuntap,\"TAP\"'",
        )),
        (None, _) => Ok(None),
        (Some(Located { value, line }), GuestKind::Colinux) => {
            let parsed = value.parse().map(Some);
            parsed.map_err(|problem| section.wrong(line, KEY, Problem::Colinux { value, problem }))
        }
        (Some(Located { line, .. }), _) => Err(section.wrong(line, KEY, Problem::LineOfOther)),
    }
}

/// How fast a guest may be: both ways, or each.
fn read_rates(section: &mut Section<'_>, kind: GuestKind) -> Result<Rates, ConfigError> {
    let expected = "a rate, as in \"100mbit\", \"10kpps\" or \"100mbit,10kpps\"";
    let both = section.parsed::<Rate>("rate", expected)?;
    let from = section.parsed::<Rate>("rate_from", expected)?;
    let to = section.parsed::<Rate>("rate_to", expected)?;
    let first = [("rate", &both), ("rate_from", &from), ("rate_to", &to)]
        .into_iter()
        .find_map(|(key, rate)| rate.as_ref().map(|rate| (key, rate.line)));
    if let Some((key, line)) = first.filter(|_| kind == GuestKind::Netns) {
        return Err(section.wrong(line, key, Problem::RateOfVeth));
    }
    let of = |one: Option<Located<Rate>>| one.map(|rate| rate.value);
    let both = of(both).unwrap_or_default();
    Ok(Rates { from_guest: of(from).unwrap_or(both), to_guest: of(to).unwrap_or(both) })
}
