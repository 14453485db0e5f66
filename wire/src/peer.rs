//! What two daemons say to each other in the calls of their session.
//!
//! One call carries one [`Ask`], its reply one [`Answer`], both in postcard's
//! encoding (postcard 1.0 wire format): small, and a byte string costs its
//! length. The session has authenticated the peer already; whether it may ask is
//! for the daemon to decide.
//!
//! What it is not: the movement of processes. That is opaque here: bytes from
//! one node's process manager to the other's.

extern crate alloc;

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The protocol version of this module. Nodes of different versions tunnel,
/// and refuse each other's process messages.
pub const VERSION: u32 = 1;

/// A node says who it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`] of the sender.
    pub protocol: u32,
    /// The sender's name for itself; its key is what counts.
    pub name: String,
    /// Version of conet that it is.
    pub conet: String,
    /// Whether it can run processes of others at all.
    pub processes: bool,
}

/// What one daemon asks another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// Who are you? [`Answer::Hello`].
    Hello(Hello),
    /// For the process manager: [`Answer::Process`].
    Process(Vec<u8>),
}

/// What the other daemon answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// To [`Ask::Hello`].
    Hello(Hello),
    /// To [`Ask::Process`].
    Process(Vec<u8>),
    /// To what will not be done.
    Refused(Refusal),
}

/// Why a daemon will not do what another asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum Refusal {
    /// The bytes are not an [`Ask`] of this version.
    #[error("it does not understand the request; run one version of conet on both nodes")]
    Malformed,
    /// The peer has no grant, in either direction, to speak of processes.
    #[error("it does not grant this; name this node in guests_from or host_for_us there")]
    NotGranted,
    /// It moves no processes.
    #[error("it moves no processes")]
    NoProcesses,
}

/// Bytes that are no message of this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("not a message between nodes")]
pub struct Malformed;

impl Ask {
    /// Reads a call's payload, all of it.
    ///
    /// # Errors
    ///
    /// [`Malformed`].
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        whole(postcard::take_from_bytes(bytes))
    }

    /// The payload for it.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        postcard::to_allocvec(self).unwrap_or_default()
    }
}

impl Answer {
    /// Reads a reply's payload, all of it.
    ///
    /// # Errors
    ///
    /// [`Malformed`].
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        whole(postcard::take_from_bytes(bytes))
    }

    /// The payload for it.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        postcard::to_allocvec(self).unwrap_or_default()
    }
}

fn whole<T>(taken: postcard::Result<(T, &[u8])>) -> Result<T, Malformed> {
    match taken {
        Ok((value, [])) => Ok(value),
        _ => Err(Malformed),
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_go_round() {
        let hello =
            Hello { protocol: VERSION, name: "a".into(), conet: "0.1.0".into(), processes: true };
        for ask in [Ask::Hello(hello.clone()), Ask::Process(vec![1, 2, 3])] {
            assert_eq!(Ask::parse(&ask.to_bytes()), Ok(ask));
        }
        for answer in
            [Answer::Hello(hello), Answer::Process(vec![]), Answer::Refused(Refusal::NotGranted)]
        {
            assert_eq!(Answer::parse(&answer.to_bytes()), Ok(answer));
        }
    }

    #[test]
    fn the_layout_is_this() {
        let hello = Hello { protocol: 1, name: "a".into(), conet: "b".into(), processes: true };
        assert_eq!(Ask::Hello(hello).to_bytes(), [0, 1, 1, b'a', 1, b'b', 1]);
        assert_eq!(Ask::Process(vec![9, 8]).to_bytes(), [1, 2, 9, 8]);
        assert_eq!(Answer::Refused(Refusal::NotGranted).to_bytes(), [2, 1]);
    }

    #[test]
    fn a_length_beyond_the_end_and_bytes_after_it_are_refused() {
        assert_eq!(Ask::parse(&[1, 0xff, 0xff, 0xff, 0xff, 0x0f]), Err(Malformed));
        assert_eq!(Ask::parse(&[1, 1, 9, 9]), Err(Malformed));
        assert_eq!(Ask::parse(&[]), Err(Malformed));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(ask) = Ask::parse(&bytes) {
                prop_assert_eq!(Ask::parse(&ask.to_bytes()), Ok(ask));
            }
            if let Ok(answer) = Answer::parse(&bytes) {
                prop_assert_eq!(Answer::parse(&answer.to_bytes()), Ok(answer));
            }
        }
    }
}
