//! What the process managers of two nodes say to each other.
//!
//! Carried in [`crate::peer::Ask::Process`], in postcard's encoding. The session has
//! authenticated the peer; grants are checked by the receiver.
//!
//! ```text
//! home                                     hosting node
//!  Host{ticket, secret, …}  ─────────────►  admits, waits for the link
//!  TCP: ticket, then sealed records ─────►  hands the socket to the sandbox
//!  Branch{ticket, …}        ─────────────►  as Host, for a child of one that is there
//!  Where{ticket}, Ring, Slice, Stop, … ──►
//!                        ◄─────────────── Ended{ticket, how}
//! ```

extern crate alloc;

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::peer::Malformed;

/// Names one stay of one process at one node. Sent in clear at the head of a link,
/// so it is a name and no secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ticket(pub [u8; 16]);

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The secret from which a link's keys derive.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root(pub [u8; 32]);

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Root(redacted)")
    }
}

/// What one process manager asks another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// Run a process of ours: [`Answer::Ready`] or [`Answer::Refused`].
    Host {
        /// Names the stay.
        ticket: Ticket,
        /// Secret of its link.
        root: Root,
        /// 0 AES-128-GCM, 1 ChaCha20-Poly1305.
        cipher: u8,
        /// Process id at home.
        pid: u32,
        /// Its owner at home.
        uid: u32,
        /// Its command's name.
        name: String,
        /// Vector components that home's processor saves (XCR0).
        components: u64,
        /// Bytes of its XSAVE area.
        xsave_size: u32,
    },
    /// A process of ours that runs there makes a child, which is to run in the same
    /// sandbox: [`Answer::Ready`] or [`Answer::Refused`].
    Branch {
        /// Its parent's stay.
        parent: Ticket,
        /// Names the child's stay.
        ticket: Ticket,
        /// Secret of its link.
        root: Root,
        /// As of [`Ask::Host`].
        cipher: u8,
    },
    /// Ring the remote's bell: [`Answer::Done`].
    Ring(Ticket),
    /// Stop the remote, as its home process is stopped: [`Answer::Done`].
    Stop(Ticket),
    /// Let it continue: [`Answer::Done`].
    Continue(Ticket),
    /// Where does it run? [`Answer::Running`].
    Where(Ticket),
    /// From the hosting node: the remote has ended. [`Answer::Done`].
    Ended {
        /// Which.
        ticket: Ticket,
        /// Its wait status (man 2 wait), if the node saw it end.
        status: Option<u32>,
    },
    /// Have it send home a slice of what the program has changed: [`Answer::Done`].
    Slice(Ticket),
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It has been done.
    Done,
    /// The link may come, to this node's port.
    Ready,
    /// It runs here, under this process id of the host.
    Running {
        /// As the host's machine counts.
        remote_pid: u32,
    },
    /// No such stay here.
    Unknown,
    /// It will not be hosted.
    Refused {
        /// Short and stable.
        code: String,
        /// A sentence for people.
        sentence: String,
    },
}

macro_rules! postcard_message {
    ($name:ident) => {
        impl $name {
            /// Reads a message, all of the bytes.
            ///
            /// # Errors
            ///
            /// [`Malformed`].
            pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
                match postcard::take_from_bytes(bytes) {
                    Ok((value, [])) => Ok(value),
                    _ => Err(Malformed),
                }
            }

            /// The bytes for it.
            #[must_use]
            pub fn to_bytes(&self) -> Vec<u8> {
                postcard::to_allocvec(self).unwrap_or_default()
            }
        }
    };
}
postcard_message!(Ask);
postcard_message!(Answer);

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::format;

    #[test]
    fn messages_go_round_and_secrets_do_not_show() {
        let ask = Ask::Host {
            ticket: Ticket([7; 16]),
            root: Root([0xab; 32]),
            cipher: 0,
            pid: 1,
            uid: 2,
            name: "sh".into(),
            components: 7,
            xsave_size: 832,
        };
        assert_eq!(Ask::parse(&ask.to_bytes()), Ok(ask.clone()));
        let shown = format!("{ask:?}");
        assert!(shown.contains("redacted") && !shown.contains("171"), "{shown}");
        assert_eq!(Ask::parse(&[9, 9]), Err(Malformed));
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
