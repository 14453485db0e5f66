//! What can be wrong with a `conet.toml`: each problem with its place and remedy.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use thiserror::Error;

use super::overlay::Overlay;
use crate::colinux::LineError;
use crate::forward::ForwardProblem;
use crate::identity::KeyError;

/// A `conet.toml` that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot be read ({source}): write one, or name it with -c", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file was read and is wrong.
    #[error("{}:{line}: {key}: {problem}", file.display())]
    Wrong {
        /// The file.
        file: PathBuf,
        /// The line, counted from 1, of the key or of the section that lacks it.
        line: usize,
        /// The key, with its section: `node.port`.
        key: String,
        /// What is wrong, and the remedy.
        problem: Box<Problem>,
    },
}

/// What is wrong with a key; the text ends with the remedy.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Problem {
    /// The text is not TOML.
    #[error("not valid TOML: {0}")]
    Syntax(#[source] TomlMessage),
    /// A key that conet does not know.
    #[error("unknown key; {0}")]
    UnknownKey(Suggestion),
    /// A section that conet does not know.
    #[error("unknown section; {0}")]
    UnknownSection(Suggestion),
    /// A key that must be there is not.
    #[error("missing; {remedy}")]
    Missing {
        /// What to add.
        remedy: &'static str,
    },
    /// Two keys of which there may be one.
    #[error("given together with {other}; keep one of the two")]
    Both {
        /// The other key.
        other: &'static str,
    },
    /// A value of another type.
    #[error("is {found}; write {expected}")]
    Type {
        /// The TOML type found.
        found: &'static str,
        /// What a right value looks like.
        expected: &'static str,
    },
    /// A value of the right type that means nothing here.
    #[error("`{value}` is not valid; write {expected}")]
    Value {
        /// The value.
        value: String,
        /// What a right value looks like.
        expected: &'static str,
    },
    /// A key text that is none.
    #[error("{0}")]
    Key(#[from] KeyError),
    /// A secret that others than its owner can read.
    #[error("{} has mode {mode:04o}, so others can read the secret in it; run: chmod 600 {}", file.display(), file.display())]
    Exposed {
        /// The file with the secret.
        file: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The private key's file cannot be read.
    #[error("{} cannot be read ({source}); make one: (umask 077; conet keygen > {})", file.display(), file.display())]
    KeyFile {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Two sections of one name.
    #[error("`{name}` is already the name of {other}; give each its own")]
    DuplicateName {
        /// The name.
        name: String,
        /// What bears it already: `a peer`, `this node`, `a guest`.
        other: &'static str,
    },
    /// Two peers of one key.
    #[error("the key is already that of peer `{other}`; each peer has its own")]
    DuplicateKey {
        /// The peer that has it.
        other: String,
    },
    /// A peer that has this node's own key.
    #[error("the key is this node's own; give the peer's")]
    OwnKey,
    /// A grant to a peer that is not in the file.
    #[error("no [[peer]] is named `{name}`; {suggestion}")]
    UnknownPeer {
        /// The name.
        name: String,
        /// A name that is there.
        suggestion: Suggestion,
    },
    /// A grant to a peer without an identity.
    #[error(
        "peer `{name}` has only a wireguard_key, which grants tunnelling alone; give its public_key"
    )]
    NotANode {
        /// The peer's name.
        name: String,
    },
    /// The same prefix for two peers.
    #[error("{prefix} is already routed to peer `{other}`; a prefix belongs to one peer")]
    DuplicatePrefix {
        /// The prefix.
        prefix: IpNet,
        /// The peer that has it.
        other: String,
    },
    /// A prefix that would take this node's own addresses away.
    #[error("{prefix} lies in this node's own overlay {overlay}; name the peer's own prefix")]
    OwnPrefix {
        /// The prefix.
        prefix: IpNet,
        /// This node's prefix.
        overlay: IpNet,
    },
    /// A limit for a guest whose packets nobody sees.
    #[error("a guest by veth has nobody to limit its packets; give it kind = \"tap\"")]
    RateOfVeth,
    /// More pairs of queues than such a guest's card can have.
    #[error("a guest has 1 pair of queues; one of kind = \"qemu\" may have up to 16")]
    Queues,
    /// A line that is none of coLinux's about a card.
    #[error("`{value}`: {problem}")]
    Colinux {
        /// The line.
        value: String,
        /// What is wrong with it, and the remedy.
        problem: LineError,
    },
    /// A line of coLinux's for a guest of another kind.
    #[error("is for a guest in place of coLinux; give it kind = \"colinux\", or leave this out")]
    LineOfOther,
    /// A guest outside the overlay, or at an address of it that no guest can have.
    #[error("{address} is not a guest's address in overlay {overlay}; {remedy}")]
    GuestAddress {
        /// The address.
        address: IpAddr,
        /// This node's overlay.
        overlay: Overlay,
        /// Which addresses are.
        remedy: &'static str,
    },
    /// Two guests at one address.
    #[error("{address} is already the address of guest `{other}`; give each its own")]
    DuplicateAddress {
        /// The address.
        address: IpAddr,
        /// The guest that has it.
        other: String,
    },
    /// A guest's name that its link cannot bear.
    #[error("`{name}` is longer than 15 bytes, the most for a link; give a shorter name")]
    LongName {
        /// The name.
        name: String,
    },
    /// Packets to a peer would be routed into the tunnel that they carry.
    #[error(
        "{prefix} contains the endpoint {endpoint} of peer `{peer}`, whose packets would loop; leave it out"
    )]
    Loop {
        /// The prefix.
        prefix: IpNet,
        /// The address inside it.
        endpoint: IpAddr,
        /// Whose it is.
        peer: String,
    },
    /// An IP-in-IP peer without an IPv4 address to send to.
    #[error(
        "missing or not IPv4; mode ipip needs the peer's address, as in endpoint = \"192.0.2.2:47700\""
    )]
    NeedsEndpoint,
    /// Two IP-in-IP peers at one address.
    #[error("{endpoint} is already the address of peer `{other}`; in mode ipip each needs its own")]
    SameEndpoint {
        /// The address.
        endpoint: IpAddr,
        /// The peer that has it.
        other: String,
    },
    /// Two services of this node on one UDP port.
    #[error("{port} is already the port for sessions; give WireGuard another")]
    SamePort {
        /// The port.
        port: u16,
    },
    /// A forward to a guest that is not in the file.
    #[error("no [[guest]] is named `{name}`; {suggestion}")]
    UnknownGuest {
        /// The name.
        name: String,
        /// A name that is there.
        suggestion: Suggestion,
    },
    /// A forward to a guest that it cannot reach.
    #[error(
        "guest `{guest}` has no IPv4 address, and forwards need one; give it one of the overlay's"
    )]
    NoIpv4 {
        /// The guest.
        guest: String,
    },
    /// A forward that the node cannot have.
    #[error("{0}; {remedy}", remedy = .0.remedy())]
    Forward(#[from] ForwardProblem),
    /// The host has no name to take.
    #[error("missing, and the host's own name is no valid one; add name = \"…\"")]
    NoHostName,
}

/// What the TOML reader says.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct TomlMessage(pub(super) String);

/// A nearby name, or the names that there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suggestion {
    near: Option<String>,
    known: Vec<String>,
}

impl Suggestion {
    /// What somebody may have meant who wrote `name`.
    pub(super) fn of<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Self {
        let known: Vec<String> = known.into_iter().map(str::to_owned).collect();
        let distance = |other: &&String| strsim::damerau_levenshtein(name, other);
        // Two slips in a short word, more in a long one.
        let near = known.iter().min_by_key(distance);
        let near = near.filter(|other| distance(other) <= 2.max(name.len() / 3)).cloned();
        Self { near, known }
    }
}

impl fmt::Display for Suggestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.near {
            Some(near) => write!(f, "did you mean `{near}`?"),
            None if self.known.is_empty() => f.write_str("there is none"),
            None => write!(f, "known are: {}", self.known.join(", ")),
        }
    }
}
