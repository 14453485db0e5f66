//! The WireGuard protocol: handshake, sessions, cookies, timers. No clock, no
//! sockets, no locks.
//!
//! A fork of the protocol part of boringtun 0.7.1 (`src/noise`), whose notice is
//! kept in `LICENSE-boringtun`; the layout of states follows it, the rules of
//! timers and sessions follow Linux. It differs where the original could not be
//! mended from outside:
//!
//! | boringtun 0.7.1 | here |
//! |---|---|
//! | panics on a datagram longer than its buffer, before any key is checked | sealed and opened in place: there is no second buffer |
//! | reads the clock | the time is an argument: ages are tested in virtual time |
//! | no padding | to 16 bytes, as far as the path's MTU allows |
//! | replay window 1,024 | 8,192 |
//! | sends without limit | Reject-After-Messages, Rekey-After-Messages |
//! | retries every 5 s exactly | with up to 333 ms of jitter |
//! | cookie binds the address | address and port; its secret changes every 2 minutes |
//! | key agreement twice per initiation | once; found peers go on from there |
//! | zero shared secrets accepted | refused |
//! | initiations of one peer at any rate | 50 a second at most, timestamps rounded so |
//! | packets wait for ever | 128, the oldest lost first, all lost with the attempt |
//!
//! ```text
//!            initiation ─► Claim ─► Tunn::respond ─► next ─ first data ─► current
//!  initiate ─► response ─────────────────────────────────────────────► current ─► previous
//! ```
//!
//! Sources: "WireGuard: Next Generation Kernel Network Tunnel" (whitepaper) §5, §6;
//! Linux 6.18 `drivers/net/wireguard/{noise,timers,cookie,send,receive}.c`.

mod cookie;
mod crypto;
mod handshake;
mod session;
mod tunn;

use std::time::Duration;

pub(crate) use cookie::{Gate, Verdict};
pub(crate) use handshake::{Claim, Identity};
pub(crate) use tunn::{Opened, Tunn};

/// Bytes before the encrypted packet: type 4, receiver 4, counter 8.
pub(crate) const DATA_HEADER: usize = 16;
/// Bytes of the authentication tag.
pub(crate) const TAG: usize = 16;
/// Length of a handshake initiation, the longest message without a packet.
pub(crate) const INITIATION: usize = 148;
/// Length of a handshake response.
pub(crate) const RESPONSE: usize = 92;
/// Length of a cookie reply.
pub(crate) const COOKIE_REPLY: usize = 64;
/// Packets are padded to a multiple of this (whitepaper §5.4.6).
pub(crate) const PADDING: usize = 16;

/// Whitepaper §6.1, table 1.
const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
const REKEY_ATTEMPTS: u32 = 90 / 5;
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most jitter on a retry, in milliseconds (Linux REKEY_TIMEOUT_JITTER_MAX_JIFFIES).
const JITTER_MS: u32 = 333;
/// How long a cookie and its secret live, and how long before that the initiator
/// stops using it (Linux COOKIE_SECRET_MAX_AGE, COOKIE_SECRET_LATENCY).
const COOKIE_AGE: Duration = Duration::from_secs(120);
const COOKIE_LATENCY: Duration = Duration::from_secs(5);
/// Least time between two initiations of a peer that are answered (Linux
/// INITIATIONS_PER_SECOND 50).
const INITIATION_GAP: Duration = Duration::from_millis(20);

/// Why a message was not taken; the peer's fault or a stranger's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoiseError {
    /// There is no such session, or it is too old.
    NoSession,
    /// The counter was used, is too old or beyond Reject-After-Messages.
    Replay,
    /// The tag is wrong.
    Tag,
    /// A handshake that does not follow, is old, or comes too fast.
    Handshake,
    /// No randomness from the system.
    Entropy,
}

/// A message by its form alone.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Message<'a> {
    Initiation(&'a [u8; INITIATION]),
    Response(&'a [u8; RESPONSE]),
    Cookie(&'a [u8; COOKIE_REPLY]),
    Data { receiver: u32, counter: u64 },
}

impl<'a> Message<'a> {
    /// What a datagram claims to be.
    pub(crate) fn parse(datagram: &'a [u8]) -> Option<Self> {
        let (kind, rest) = datagram.split_first_chunk::<4>()?;
        match u32::from_le_bytes(*kind) {
            1 => datagram.try_into().ok().map(Message::Initiation),
            2 => datagram.try_into().ok().map(Message::Response),
            3 => datagram.try_into().ok().map(Message::Cookie),
            4 if datagram.len() >= DATA_HEADER + TAG => {
                let (receiver, rest) = rest.split_first_chunk::<4>()?;
                let (counter, _) = rest.split_first_chunk::<8>()?;
                Some(Message::Data {
                    receiver: u32::from_le_bytes(*receiver),
                    counter: u64::from_le_bytes(*counter),
                })
            }
            _ => None,
        }
    }
}

/// The four bytes at `at`, little endian; 0 beyond the end.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

/// Bytes nobody can guess.
fn random<const N: usize>() -> Result<[u8; N], NoiseError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|_| NoiseError::Entropy)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
