//! What the command line and the daemon say to each other.
//!
//! Newline-delimited JSON over a unix stream socket. A client sends one
//! [`Request`] a line; the daemon answers each with any number of
//! [`Response::Progress`] lines and then one other [`Response`].
//!
//! ```text
//! → {"request":"migrate","pid":4711,"to":"conet-h2"}
//! ← {"response":"progress","phase":"copy","detail":"21 MB"}
//! ← {"response":"moved","pid":4711,"node":"conet-h2","freeze_us":1900,"total_us":80000}
//! ```
//!
//! What it is not: it carries no secret and no authority. Who asks is what the
//! kernel says of the socket's other end (`SO_PEERCRED`, `man 7 unix`).
//!
//! A request is at most [`MAX_REQUEST`] bytes; whatever the bytes are, the
//! answer is a request or an error, never a panic. Fields that a request does
//! not have are refused, fields that a response gains later are ignored by
//! older clients.

extern crate alloc;

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::net::IpAddr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

mod guests;
mod moves;

pub use guests::{Forward, Guest, GuestRates, Held, Machine};
pub use moves::{How, MemoryMoved, MoveMethod, MoveRound, Moved};

/// Longest request line in bytes, without its newline. The longest names and
/// numbers that a request can hold fit many times.
pub const MAX_REQUEST: usize = 4096;

/// Longest response line in bytes that a client takes: a listing of some ten
/// thousand processes.
pub const MAX_RESPONSE: usize = 16 << 20;

/// What is asked of a daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What this node is: [`Response::Status`].
    Status {},
    /// Whom it knows: [`Response::Peers`].
    Peers {},
    /// `pid` is a program that may move from now on: [`Response::Registered`].
    /// Asked by the process itself, which then becomes the program by `execve`.
    Register {
        /// The process, as the daemon's pid namespace counts.
        pid: u32,
        /// Move it to this node, and to no other, once it runs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        node: Option<String>,
    },
    /// The processes that the caller may see: [`Response::Processes`].
    Ps {},
    /// Move a process: progress, then [`Response::Moved`].
    Migrate {
        /// The process at home.
        pid: u32,
        /// The peer's name, or `home`.
        to: String,
        /// How its memory goes there.
        #[serde(default, skip_serializing_if = "How::is_default")]
        how: How,
    },
    /// Why a process may not move: [`Response::Why`].
    Why {
        /// The process at home.
        pid: u32,
    },
    /// The node's guests: [`Response::Guests`].
    Guests {},
    /// Make a guest: [`Response::Guest`].
    GuestAdd {
        /// Its name, for a namespace also that of the namespace.
        name: String,
        /// How it is plumbed: `netns`, `tap`, `qemu` or `uml`.
        kind: String,
        /// Its addresses in the overlay; a free one of each family where there are none.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        addresses: Vec<IpAddr>,
        /// How fast it may be.
        #[serde(default, skip_serializing_if = "GuestRates::are_unlimited")]
        rates: GuestRates,
        /// Pairs of queues of a machine's card; one where it is not said.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        queues: Option<u16>,
    },
    /// Change how fast a guest may be: [`Response::Done`].
    GuestRate {
        /// Its name.
        name: String,
        /// How fast it may be from now on.
        rates: GuestRates,
    },
    /// Keep a guest's packets from now on, in order: [`Response::Held`].
    GuestHold {
        /// Its name.
        name: String,
    },
    /// Take out what is kept of a guest that is held, and stays so: [`Response::Drained`].
    /// It is root's alone, since packets are in it. What [`Request::GuestDrained`] does not
    /// confirm is kept again by the next request about the guest's packets.
    GuestDrain {
        /// Its name.
        name: String,
    },
    /// What was taken out is safe: [`Response::Done`].
    GuestDrained {
        /// Its name.
        name: String,
    },
    /// Give a guest that is held what another host has kept, before what is kept here, in
    /// pieces: [`Response::Done`], and [`Response::Accepted`] to the last.
    GuestAccept {
        /// Its name.
        name: String,
        /// How many bytes came before this piece; 0 begins anew.
        at: u64,
        /// The next bytes of [`crate::held`]'s layout, base64.
        piece: String,
        /// Whether it is the last.
        last: bool,
    },
    /// Let a guest's packets pass again, what is kept first: [`Response::Held`].
    GuestRelease {
        /// Its name.
        name: String,
    },
    /// Remove a guest that was added: [`Response::Done`].
    GuestRemove {
        /// Its name.
        name: String,
    },
    /// The ports that lead to guests: [`Response::Forwards`].
    Forwards {},
    /// Have ports lead to a guest: [`Response::Forward`].
    ForwardAdd {
        /// As in `tcp:2222:web:22`.
        forward: String,
    },
    /// Take such ports back that were added: [`Response::Done`].
    ForwardRemove {
        /// As [`Forward::forward`] has it.
        forward: String,
    },
    /// Which of a process's calls are forwarded: [`Response::Trace`].
    Trace {
        /// The process at home.
        pid: u32,
        /// Whether to take times from now on; that ends by itself after seconds.
        timed: bool,
    },
    /// End the daemon, and leave moved processes running: [`Response::Done`].
    Shutdown {},
}

/// Why a line is no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RequestError {
    /// Longer than [`MAX_REQUEST`].
    #[error("a request has at most {MAX_REQUEST} bytes")]
    TooLong,
    /// Not a JSON object that is one of the requests.
    #[error("not a request; send one JSON object a line, as in {{\"request\":\"status\"}}")]
    Malformed,
}

impl Request {
    /// Reads a line, with or without its newline.
    ///
    /// # Errors
    ///
    /// [`RequestError`], for whatever bytes are not a request.
    pub fn parse(line: &[u8]) -> Result<Self, RequestError> {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        if line.len() > MAX_REQUEST {
            return Err(RequestError::TooLong);
        }
        serde_json::from_slice(line).map_err(|_| RequestError::Malformed)
    }

    /// The line for it, newline included.
    #[must_use]
    pub fn to_line(&self) -> Vec<u8> {
        line_of(self)
    }
}

/// What a daemon answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case")]
pub enum Response {
    /// To [`Request::Status`].
    Status(Status),
    /// To [`Request::Peers`].
    Peers {
        /// In the configuration's order.
        peers: Vec<Peer>,
    },
    /// To [`Request::Register`].
    Registered {
        /// The process.
        pid: u32,
        /// This node's name.
        node: String,
    },
    /// To [`Request::Ps`].
    Processes {
        /// By pid.
        processes: Vec<Process>,
    },
    /// One step of what was asked is done, or begins.
    Progress(Progress),
    /// To [`Request::Migrate`]: the process runs there.
    Moved(Moved),
    /// To [`Request::Why`].
    Why(Why),
    /// To [`Request::Guests`].
    Guests {
        /// The configuration's first, then in the order of their addition.
        guests: Vec<Guest>,
    },
    /// To [`Request::GuestAdd`].
    Guest(Guest),
    /// To [`Request::GuestHold`] and [`Request::GuestRelease`]: what is kept at that moment.
    Held(Held),
    /// To [`Request::GuestDrain`].
    Drained {
        /// How much it is.
        held: Held,
        /// In [`crate::held`]'s layout, base64.
        packets: String,
    },
    /// To [`Request::GuestAccept`].
    Accepted {
        /// How much was given.
        held: Held,
        /// Packets that did not fit, the newest of all.
        lost: u64,
    },
    /// To [`Request::Forwards`].
    Forwards {
        /// The configuration's first, then in the order of their addition.
        forwards: Vec<Forward>,
    },
    /// To [`Request::ForwardAdd`].
    Forward(Forward),
    /// To [`Request::Trace`].
    Trace(Trace),
    /// To [`Request::Shutdown`], [`Request::GuestRemove`] and [`Request::ForwardRemove`].
    Done {},
    /// To any request that could not be carried out.
    Error(Failure),
}

/// Why a line is no response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("not a response that this version knows; use the conet of the daemon's version")]
pub struct ResponseError;

impl Response {
    /// Reads a line, with or without its newline.
    ///
    /// # Errors
    ///
    /// [`ResponseError`].
    pub fn parse(line: &[u8]) -> Result<Self, ResponseError> {
        serde_json::from_slice(line).map_err(|_| ResponseError)
    }

    /// The line for it, newline included.
    #[must_use]
    pub fn to_line(&self) -> Vec<u8> {
        line_of(self)
    }
}

/// A node, as it describes itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The node's name.
    pub name: String,
    /// Version of conet that the daemon is.
    pub version: String,
    /// The daemon's process.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// The node's Ed25519 public key, base64.
    pub public_key: String,
    /// The tunnel's X25519 public key, base64: what `wg show` would print.
    #[serde(default)]
    pub wireguard_key: String,
    /// The host's own address.
    pub address: String,
    /// UDP port of sessions, TCP port of process links.
    pub port: u16,
    /// UDP port of WireGuard.
    pub wireguard_port: u16,
    /// The guests' prefix.
    pub overlay: String,
    /// Whether guests use the host's address outside it.
    #[serde(default)]
    pub shared_address: bool,
    /// The tunnel's device.
    pub device: String,
    /// Peers in the configuration.
    pub peers: u32,
    /// Peers that have answered on their session.
    pub peers_up: u32,
    /// Packets that the tunnel dropped, of all peers and of strangers, by reason.
    #[serde(default)]
    pub drops: BTreeMap<String, u64>,
    /// Where packets of peers in mode `ipip` are carried: `kernel`, or `raw sockets` and
    /// why; absent where no peer is in the mode.
    #[serde(default)]
    pub ipip: Option<String>,
    /// The node's guests.
    pub guests: Vec<Guest>,
}

/// A peer, as the daemon sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Its Ed25519 public key, base64; none for a peer that only tunnels.
    pub public_key: Option<String>,
    /// Its X25519 public key, base64: what `wg show` would print.
    pub wireguard_key: String,
    /// How packets to it travel: `wireguard` or `ipip`.
    pub mode: String,
    /// Where its sessions are.
    pub endpoint: Option<String>,
    /// How its session's packets go while it stands: `udp`, or `tcp` where UDP is blocked.
    pub carrier: Option<String>,
    /// Where its packets go.
    pub tunnel_endpoint: Option<String>,
    /// Inner addresses that are routed to it.
    pub allowed_ips: Vec<String>,
    /// Whether it has answered on its session, and not fallen silent since.
    pub up: bool,
    /// Version of conet that it said it is.
    pub version: Option<String>,
    /// Smoothed round trip of its session in microseconds.
    pub rtt_us: Option<u64>,
    /// Seconds since the last WireGuard handshake.
    pub latest_handshake_s: Option<u64>,
    /// Inner bytes received from it.
    pub rx_bytes: u64,
    /// Inner bytes sent to it.
    pub tx_bytes: u64,
    /// Packets from or to it that were dropped, by reason.
    #[serde(default)]
    pub drops: BTreeMap<String, u64>,
    /// Whether its packets pass by no process at this moment (mode `ipip`).
    #[serde(default)]
    pub in_kernel: bool,
    /// Largest outer packet on the way to it, as far as is known.
    #[serde(default)]
    pub path_mtu: Option<u16>,
    /// Seconds between keepalives to it.
    #[serde(default)]
    pub keepalive_s: Option<u16>,
    /// Whether a secret is shared with it beforehand.
    #[serde(default)]
    pub preshared_key: bool,
    /// Whether its processes may run here.
    pub guests_from: bool,
    /// Whether it may run ours.
    pub host_for_us: bool,
}

/// Where a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// On its own node, native.
    Home,
    /// On its way.
    Moving,
    /// On another node; the pid at home is its deputy.
    Away,
    /// On another node that has not been heard of for seconds. It waits, and so does
    /// what it calls at home.
    Unreachable,
    /// It has ended; kept for a while for its reason.
    Ended,
}

/// A process that may move, as its home sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// At home.
    pub pid: u32,
    /// Its owner's uid.
    pub uid: u32,
    /// Its command's name.
    pub command: String,
    /// Where it is.
    pub place: Place,
    /// The node it runs on.
    pub node: String,
    /// The remote's pid as that host's machine counts, while away.
    pub remote_pid: Option<u32>,
    /// Moves that were completed, out and home.
    pub hops_done: u64,
    /// Times that it was brought home because of what it did.
    pub sent_home: u64,
    /// Calls that ran at home for it while it was away, as of the last look at it, which
    /// there are twenty of in a second: what it does just before its end is not in it.
    pub calls_forwarded: u64,
    /// How long the last move held it, in microseconds.
    pub freeze_us: Option<u64>,
    /// How its memory moved then.
    #[serde(default)]
    pub memory: Option<MemoryMoved>,
    /// For how long, in all, its other half could not be reached, in microseconds.
    #[serde(default)]
    pub waited_us: u64,
    /// The latest thing worth telling: why it was brought home, or ended.
    pub reason: Option<Reason>,
}

/// The calls that are forwarded for a process, since it went out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// At home.
    pub pid: u32,
    /// Its command's name.
    pub command: String,
    /// The node it runs on.
    pub node: String,
    /// By number.
    pub calls: Vec<TracedCall>,
}

/// A system call in a [`Trace`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedCall {
    /// Its number in the x86-64 table.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// How often it was forwarded.
    pub calls: u64,
    /// How many of these were timed at home.
    pub timed: u64,
    /// How long those ran at home, in all, in nanoseconds.
    pub ran_ns: u64,
    /// How many were timed by the program's side.
    pub waited_for: u64,
    /// How long the program waited for those, in all, in nanoseconds.
    pub waited_ns: u64,
}

/// Why a process stays, came home or ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// Short and stable: `threads`, `shared-memory`, `privileged`.
    pub code: String,
    /// A sentence for people.
    pub sentence: String,
    /// Whether it may pass by itself.
    pub passing: bool,
}

/// What is being done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Short and stable.
    pub phase: String,
    /// For people.
    pub detail: String,
}

/// Whether a process may move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    /// At home.
    pub pid: u32,
    /// Its command's name.
    pub command: String,
    /// Whether it may move now.
    pub movable: bool,
    /// What keeps it; also what ended it.
    pub reasons: Vec<Reason>,
}

/// A request that could not be carried out.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{message}; {remedy}")]
pub struct Failure {
    /// Short and stable: `denied`, `no-such-process`, `no-such-peer`.
    pub code: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub remedy: String,
}

impl Failure {
    /// A failure of these texts.
    #[must_use]
    pub fn new(
        code: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { code: code.into(), message: message.into(), remedy: remedy.into() }
    }
}

fn line_of(value: &impl Serialize) -> Vec<u8> {
    // These types have string keys and no failing serializer: it cannot fail.
    // Were that ever wrong, an empty line is refused by the other side.
    let mut line = serde_json::to_vec(value).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Takes any bytes as a request and, where they are one, checks that its line
/// reads back as the same request. What the fuzz target `control_request` and
/// the replay of its corpus call.
///
/// # Panics
///
/// Where a request does not survive its own line.
pub fn fuzz_request(bytes: &[u8]) {
    if let Ok(request) = Request::parse(bytes) {
        assert_eq!(Request::parse(&request.to_line()), Ok(request));
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::borrow::ToOwned;
    use std::vec;
    use std::{fs, println};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_have_these_lines() {
        let added = Request::GuestAdd {
            name: "web".into(),
            kind: "tap".into(),
            addresses: vec![IpAddr::from([10, 77, 1, 9])],
            rates: GuestRates::default(),
            queues: None,
        };
        let rates = GuestRates { from: Some("1mbit".into()), to: None };
        let table: [(Request, &str); 14] = [
            (
                Request::GuestRate { name: "web".into(), rates },
                r#"{"request":"guest-rate","name":"web","rates":{"from":"1mbit"}}"#,
            ),
            (Request::Guests {}, r#"{"request":"guests"}"#),
            (
                added,
                r#"{"request":"guest-add","name":"web","kind":"tap","addresses":["10.77.1.9"]}"#,
            ),
            (
                Request::GuestRemove { name: "web".into() },
                r#"{"request":"guest-remove","name":"web"}"#,
            ),
            (Request::Forwards {}, r#"{"request":"forwards"}"#),
            (
                Request::ForwardAdd { forward: "tcp:2222:web:22".into() },
                r#"{"request":"forward-add","forward":"tcp:2222:web:22"}"#,
            ),
            (
                Request::ForwardRemove { forward: "auto:web".into() },
                r#"{"request":"forward-remove","forward":"auto:web"}"#,
            ),
            (Request::Status {}, r#"{"request":"status"}"#),
            (Request::Peers {}, r#"{"request":"peers"}"#),
            (Request::Register { pid: 7, node: None }, r#"{"request":"register","pid":7}"#),
            (Request::Ps {}, r#"{"request":"ps"}"#),
            (
                Request::Migrate { pid: 7, to: "home".into(), how: How::Precopy },
                r#"{"request":"migrate","pid":7,"to":"home"}"#,
            ),
            (Request::Why { pid: 7 }, r#"{"request":"why","pid":7}"#),
            (Request::Shutdown {}, r#"{"request":"shutdown"}"#),
        ];
        for (request, line) in table {
            assert_eq!(request.to_line(), [line.as_bytes(), b"\n"].concat());
            assert_eq!(Request::parse(line.as_bytes()), Ok(request));
        }
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for line in [
            "",
            "{}",
            "null",
            r#"{"request":"format"}"#,
            r#"{"request":"status","pid":1}"#,
            r#"{"request":"why"}"#,
            r#"{"request":"why","pid":-1}"#,
            r#"{"request":"why","pid":4294967296}"#,
            r#"{"request":"why","pid":1,"pid":2}"#,
            r#"{"request":"why","pid":1} x"#,
        ] {
            assert_eq!(Request::parse(line.as_bytes()), Err(RequestError::Malformed), "{line}");
        }
        let deep = "[".repeat(MAX_REQUEST);
        assert_eq!(Request::parse(deep.as_bytes()), Err(RequestError::Malformed));
        let long = vec![b' '; MAX_REQUEST + 1];
        assert_eq!(Request::parse(&long), Err(RequestError::TooLong));
    }

    #[test]
    fn responses_go_round() {
        let moved = Moved {
            pid: 7,
            node: "b".to_owned(),
            remote_pid: Some(9),
            freeze_us: 1900,
            total_us: 80_000,
            memory: Some(MemoryMoved {
                method: MoveMethod::Precopy,
                why: None,
                rounds: vec![MoveRound { pages: 65_000, time_us: 70_000 }],
                pages: 65_010,
                held_pages: 10,
                pause_us: 300,
            }),
        };
        for response in [
            Response::Moved(moved),
            Response::Done {},
            Response::Processes { processes: vec![] },
            Response::Error(Failure::new("denied", "not yours", "ask root")),
        ] {
            assert_eq!(Response::parse(&response.to_line()), Ok(response));
        }
    }

    #[test]
    fn the_corpus_is_answered() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/control_request");
        let mut replayed = 0;
        for entry in fs::read_dir(corpus).unwrap() {
            fuzz_request(&fs::read(entry.unwrap().path()).unwrap());
            replayed += 1;
        }
        println!("replayed {replayed} inputs");
        assert!(replayed >= 16, "the corpus in {corpus} is not there");
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            fuzz_request(&bytes);
        }

        #[test]
        fn any_migration_goes_round(pid: u32, to in "\\PC{0,80}") {
            let how = if pid % 2 == 0 { How::Stop } else { How::Precopy };
            let request = Request::Migrate { pid, to, how };
            prop_assert_eq!(Request::parse(&request.to_line()), Ok(request));
        }
    }
}
