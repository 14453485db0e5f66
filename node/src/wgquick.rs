//! What `wg-quick(8)` reads, and the `conet.toml` that does the same.
//!
//! Every key is carried over or refused, with its line and what to do instead: a
//! configuration of which a part were silently left out would be another one. The
//! tunnel keeps the WireGuard key, so that peers know it; the node's identity, which
//! `wg` has not, is made anew.
//!
//! What it is not: it opens no file and resolves no name. No error and no `Debug` shows
//! a secret, nor any value that could be one in the wrong place.
//!
//! Sources: `wg(8)` and `wg-quick(8)` of wireguard-tools 1.0.20210914, and their
//! `config.c` for what is taken beyond the manual: keys and sections in any case, `#`
//! to the end of a line, lists that go on in a second line of the same key.

#[cfg(test)]
mod tests;

use std::fmt::{self, Write};
use std::net::{IpAddr, SocketAddr};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use conet_tunnel::DEFAULT_MTU;
use ipnet::{IpNet, Ipv4Net};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::identity::{Identity, KEY_LEN, X25519Public, decode_key};

/// A file that cannot be carried over.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("line {line}: {key}: {problem}")]
pub struct ImportError {
    /// Counted from 1.
    pub line: usize,
    /// The key or section.
    pub key: String,
    /// What is wrong, and the remedy.
    pub problem: ImportProblem,
}

/// What is wrong with a line; the text ends with the remedy.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "each variant is its own sentence")]
pub enum ImportProblem {
    #[error("neither [Interface], [Peer] nor KEY = VALUE; is this a file of wg-quick's?")]
    Syntax,
    #[error("no key of wg-quick's; take it out")]
    UnknownKey,
    #[error("given twice; keep one")]
    Twice,
    #[error("missing; add it")]
    Missing,
    #[error("not {0}")]
    Value(&'static str),
    #[error("conet has no such thing; {0}")]
    Refused(&'static str),
    #[error("{prefix} is the prefix of two peers; give it to one")]
    SharedPrefix { prefix: IpNet },
    #[error("{prefix} contains the endpoint {endpoint}, whose packets would loop; leave it out")]
    Loop { prefix: IpNet, endpoint: IpAddr },
    #[error("two peers have this key; keep one")]
    SharedKey,
}

/// A file of `wg-quick`'s, understood.
pub struct WgQuick {
    private_key: Zeroizing<[u8; KEY_LEN]>,
    listen_port: Option<u16>,
    /// Addresses of the interface.
    pub addresses: Vec<IpNet>,
    /// Its peers.
    pub peers: Vec<WgPeer>,
}

impl fmt::Debug for WgQuick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WgQuick").field("peers", &self.peers).finish_non_exhaustive()
    }
}

/// A `[Peer]`.
pub struct WgPeer {
    public_key: X25519Public,
    preshared_key: Option<Zeroizing<[u8; KEY_LEN]>>,
    endpoint: Option<SocketAddr>,
    allowed_ips: Vec<IpNet>,
    keepalive: Option<u16>,
}

impl fmt::Debug for WgPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WgPeer").field("public_key", &self.public_key).finish_non_exhaustive()
    }
}

/// What a `conet.toml` needs that `wg-quick` has not.
#[derive(Debug, Clone)]
pub struct NodeChoice {
    /// The host's address, where it listens; unspecified for all, as `wg` does.
    pub address: IpAddr,
    /// The guests' prefix.
    pub overlay: Ipv4Net,
    /// The node's name.
    pub name: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Nowhere,
    Interface,
    Peer,
}

/// A peer as far as it has been read, and the line of its section.
struct Draft {
    line: usize,
    key: Option<X25519Public>,
    prefixes_line: usize,
    peer: WgPeer,
}

#[derive(Default)]
struct Reader {
    seen: Vec<String>,
    interface_line: usize,
    private_key: Option<Zeroizing<[u8; KEY_LEN]>>,
    listen_port: Option<u16>,
    addresses: Vec<IpNet>,
    drafts: Vec<Draft>,
}

/// Reads a file's text.
///
/// # Errors
///
/// [`ImportError`], for the first line that cannot be carried over.
pub fn parse(text: &str) -> Result<WgQuick, ImportError> {
    let mut reader = Reader::default();
    let mut place = Place::Nowhere;
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let wrong = |key: &str, problem| ImportError { line: number, key: key.to_owned(), problem };
        if line.eq_ignore_ascii_case("[interface]") {
            if reader.interface_line != 0 {
                return Err(wrong("[Interface]", ImportProblem::Twice));
            }
            reader.interface_line = number;
            (place, reader.seen) = (Place::Interface, Vec::new());
        } else if line.eq_ignore_ascii_case("[peer]") {
            (place, reader.seen) = (Place::Peer, Vec::new());
            reader.drafts.push(Draft::new(number));
        } else {
            // The line may hold a secret: it is not shown.
            let (key, value) =
                line.split_once('=').ok_or_else(|| wrong("(a line)", ImportProblem::Syntax))?;
            let (key, value) = (key.trim(), value.trim());
            let lower = key.to_ascii_lowercase();
            if !key.bytes().all(|byte| byte.is_ascii_alphanumeric()) || key.len() > 32 {
                return Err(wrong("(a line)", ImportProblem::Syntax));
            }
            let repeats = ["address", "allowedips"].contains(&lower.as_str());
            if !repeats && reader.seen.contains(&lower) {
                return Err(wrong(key, ImportProblem::Twice));
            }
            let taken = match place {
                Place::Nowhere => Err(ImportProblem::Syntax),
                Place::Interface => reader.interface(&lower, value),
                Place::Peer => reader.peer(&lower, value, number),
            };
            taken.map_err(|problem| wrong(key, problem))?;
            reader.seen.push(lower);
        }
    }
    reader.finish()
}

impl Draft {
    fn new(line: usize) -> Self {
        let peer = WgPeer {
            public_key: X25519Public([0; KEY_LEN]),
            preshared_key: None,
            endpoint: None,
            allowed_ips: Vec::new(),
            keepalive: None,
        };
        Self { line, key: None, prefixes_line: line, peer }
    }
}

impl Reader {
    fn interface(&mut self, key: &str, value: &str) -> Result<(), ImportProblem> {
        use ImportProblem::{Refused, UnknownKey, Value};
        match key {
            "privatekey" => self.private_key = Some(secret(value)?),
            "listenport" => {
                let port = value.parse().ok().filter(|port| *port != 0);
                self.listen_port = Some(port.ok_or(Value("a port from 1 to 65535"))?);
            }
            "address" => prefixes(value, &mut self.addresses)?,
            "fwmark" if ["off", "0", "0x0"].contains(&value) => {}
            "fwmark" => return Err(Refused("route by destination, and take it out")),
            "mtu" if value.parse() == Ok(DEFAULT_MTU) => {}
            "mtu" => return Err(Refused("its device has 1420, and learns the way's; take it out")),
            "table" if value == "auto" => {}
            "table" => return Err(Refused("routes are made for AllowedIPs; take it out")),
            "saveconfig" if value == "false" => {}
            "saveconfig" => return Err(Refused("conet.toml is yours alone; write false")),
            "dns" => return Err(Refused("set it for the host, as in /etc/resolv.conf")),
            "preup" | "postup" | "predown" | "postdown" => {
                return Err(Refused("run it where you start and end the daemon"));
            }
            _ => return Err(UnknownKey),
        }
        Ok(())
    }

    fn peer(&mut self, key: &str, value: &str, line: usize) -> Result<(), ImportProblem> {
        use ImportProblem::{Refused, SharedKey, UnknownKey, Value};
        let Some((draft, others)) = self.drafts.split_last_mut() else {
            return Err(ImportProblem::Syntax);
        };
        let peer = &mut draft.peer;
        match key {
            "publickey" => {
                let found = value.parse().map_err(|_| Value("a key, as `wg pubkey` prints it"))?;
                if others.iter().any(|other| other.key == Some(found)) {
                    return Err(SharedKey);
                }
                draft.key = Some(found);
                peer.public_key = found;
            }
            "presharedkey" => peer.preshared_key = Some(secret(value)?),
            "allowedips" => {
                draft.prefixes_line = line;
                prefixes(value, &mut peer.allowed_ips)?;
            }
            "endpoint" => match value.parse() {
                Ok(endpoint) => peer.endpoint = Some(endpoint),
                Err(_) if value.rsplit_once(':').is_some() => {
                    return Err(Refused("names are not resolved; write ADDRESS:PORT"));
                }
                Err(_) => return Err(Value("an address and a port")),
            },
            "persistentkeepalive" if value == "off" => {}
            "persistentkeepalive" => {
                let seconds: u16 =
                    value.parse().map_err(|_| Value("off or seconds from 0 to 65535"))?;
                peer.keepalive = (seconds != 0).then_some(seconds);
            }
            _ => return Err(UnknownKey),
        }
        Ok(())
    }

    fn finish(self) -> Result<WgQuick, ImportError> {
        let wrong = |line, key: &str, problem| ImportError { line, key: key.to_owned(), problem };
        if self.interface_line == 0 {
            return Err(wrong(1, "[Interface]", ImportProblem::Missing));
        }
        let private_key = self
            .private_key
            .ok_or_else(|| wrong(self.interface_line, "PrivateKey", ImportProblem::Missing))?;
        let endpoints: Vec<_> =
            self.drafts.iter().filter_map(|draft| Some(draft.peer.endpoint?.ip())).collect();
        let mut taken: Vec<IpNet> = Vec::new();
        for draft in &self.drafts {
            if draft.key.is_none() {
                return Err(wrong(draft.line, "PublicKey", ImportProblem::Missing));
            }
            for prefix in draft.peer.allowed_ips.iter().copied() {
                let at = |problem| wrong(draft.prefixes_line, "AllowedIPs", problem);
                if taken.contains(&prefix) {
                    return Err(at(ImportProblem::SharedPrefix { prefix }));
                }
                if let Some(&endpoint) = endpoints.iter().find(|at| prefix.contains(*at)) {
                    return Err(at(ImportProblem::Loop { prefix, endpoint }));
                }
            }
            taken.extend(&draft.peer.allowed_ips);
        }
        Ok(WgQuick {
            private_key,
            listen_port: self.listen_port,
            addresses: self.addresses,
            peers: self.drafts.into_iter().map(|draft| draft.peer).collect(),
        })
    }
}

fn secret(value: &str) -> Result<Zeroizing<[u8; KEY_LEN]>, ImportProblem> {
    decode_key(value).map_err(|_| ImportProblem::Value("a key, as `wg genkey` prints it"))
}

/// A list with commas; an address without a length is itself. Added each once.
fn prefixes(value: &str, to: &mut Vec<IpNet>) -> Result<(), ImportProblem> {
    let expected = ImportProblem::Value("addresses with prefix lengths, as in 10.0.0.1/24");
    for text in value.split(',').map(str::trim).filter(|text| !text.is_empty()) {
        let net = match text.parse::<IpNet>() {
            Ok(net) => net,
            Err(_) => IpNet::from(text.parse::<IpAddr>().map_err(|_| expected.clone())?),
        };
        if !to.contains(&net) {
            to.push(net);
        }
    }
    Ok(())
}

impl WgQuick {
    /// A prefix for guests that follows from the interface's address: its network,
    /// where the address is the first one of it, which is the guests' gateway then.
    #[must_use]
    pub fn overlay(&self) -> Option<Ipv4Net> {
        self.addresses.iter().find_map(|net| match net {
            IpNet::V4(net) if (8..=30).contains(&net.prefix_len()) => {
                let first = u32::from(net.network()) + 1;
                (u32::from(net.addr()) == first).then(|| net.trunc())
            }
            _ => None,
        })
    }

    /// The `conet.toml`, which holds secrets.
    #[must_use]
    pub fn to_toml(&self, identity: &Identity, choice: &NodeChoice) -> Zeroizing<String> {
        // As long as it can become: what grows leaves copies of secrets behind.
        let prefixes: usize = self.peers.iter().map(|peer| peer.allowed_ips.len() + 20).sum();
        let mut text = Zeroizing::new(String::with_capacity(4096 + prefixes * 64));
        // Writing to a string does not fail.
        self.write(&mut text, identity, choice).ok();
        text
    }

    fn write(&self, text: &mut String, identity: &Identity, choice: &NodeChoice) -> fmt::Result {
        writeln!(text, "# Made by conet import; it holds secrets.\n[node]")?;
        if let Some(name) = &choice.name {
            writeln!(text, "name = \"{name}\"")?;
        }
        writeln!(text, "private_key = \"{}\"", identity.seed_base64().as_str())?;
        let key = Zeroizing::new(BASE64.encode(*self.private_key));
        writeln!(text, "wireguard_private_key = \"{}\"", key.as_str())?;
        writeln!(text, "address = \"{}\"\noverlay = \"{}\"", choice.address, choice.overlay)?;
        if let Some(port) = self.listen_port {
            writeln!(text, "wireguard_port = {port}")?;
        }
        // The gateway is the device's own anyway.
        let own = self.addresses.iter().map(|net| net.addr());
        let gateway = std::net::Ipv4Addr::from(u32::from(choice.overlay.network()) + 1);
        let own: Vec<_> = own.filter(|address| *address != IpAddr::V4(gateway)).collect();
        if !own.is_empty() {
            writeln!(text, "tunnel_addresses = {}", list(&own))?;
        }
        for (number, peer) in (1..).zip(&self.peers) {
            writeln!(text, "\n[[peer]]\nname = \"peer{number}\"")?;
            writeln!(text, "wireguard_key = \"{}\"", peer.public_key)?;
            if let Some(key) = &peer.preshared_key {
                let key = Zeroizing::new(BASE64.encode(**key));
                writeln!(text, "preshared_key = \"{}\"", key.as_str())?;
            }
            if let Some(endpoint) = peer.endpoint {
                writeln!(text, "wireguard_endpoint = \"{endpoint}\"")?;
            }
            if let Some(seconds) = peer.keepalive {
                writeln!(text, "persistent_keepalive = {seconds}")?;
            }
            let nets: Vec<_> = peer.allowed_ips.iter().map(IpNet::trunc).collect();
            writeln!(text, "allowed_ips = {}", list(&nets))?;
        }
        Ok(())
    }
}

fn list(items: &[impl fmt::Display]) -> String {
    let items: Vec<_> = items.iter().map(|item| format!("\"{item}\"")).collect();
    format!("[{}]", items.join(", "))
}
