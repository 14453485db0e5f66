//! Entering a guest, by the command line's own process.
//!
//! The daemon is asked which guests there are, and takes no part in the entering:
//! the process itself joins the guest's network namespace and then becomes the
//! program, so its pid and its parent are those that the shell knows.
//!
//! It sees the guest's network alone. Files, `/sys` among them, and processes are
//! those of where it was started; `/proc/net` is the guest's.

use conet_netsys::{NameError, NetError, Netns, NetnsName};
use conet_wire::control::{Guest, Request, Response};
use rustix::io::Errno;
use thiserror::Error;

use crate::client::{Client, ClientError};

/// Why a guest cannot be entered.
#[derive(Debug, Error)]
pub enum EnterError {
    /// The daemon does not say.
    #[error(transparent)]
    Daemon(#[from] ClientError),
    /// It has no such guest.
    #[error("no guest is named {name}; see conet guest list ({known})")]
    NoSuchGuest {
        /// The name asked for.
        name: String,
        /// Those there are.
        known: String,
    },
    /// There is nothing to enter.
    #[error("guest {name} is {state}; see conet guest list")]
    NotUp {
        /// The guest.
        name: String,
        /// What it is instead.
        state: String,
    },
    /// The caller may not.
    #[error("only root enters guest {name}: the kernel lets nobody else in; run it with sudo")]
    NotRoot {
        /// The guest.
        name: String,
    },
    /// Its name is none for a namespace.
    #[error("{0}; use the conet of the daemon's version")]
    Name(#[from] NameError),
    /// The kernel refused.
    #[error("guest {name}: {source}; see conet guest list")]
    Net {
        /// The guest.
        name: String,
        /// What the kernel said.
        source: NetError,
    },
}

/// Moves the calling thread into the network namespace of a guest of the daemon.
///
/// # Errors
///
/// [`EnterError`]; then the thread is where it was.
pub fn enter(client: &mut Client, name: &str) -> Result<(), EnterError> {
    let Response::Guests { guests } = client.ask(&Request::Guests {})? else {
        return Err(ClientError::Unexpected.into());
    };
    let Some(guest) = guests.iter().find(|guest| guest.name == name) else {
        let known: Vec<_> = guests.iter().map(|guest| guest.name.as_str()).collect();
        let known = if known.is_empty() { "there is none".into() } else { known.join(", ") };
        return Err(EnterError::NoSuchGuest { name: name.to_owned(), known });
    };
    // A guest whose link is down has a namespace all the same.
    if !["up", "down"].contains(&guest.state.as_str()) {
        let Guest { name, state, .. } = guest.clone();
        return Err(EnterError::NotUp { name, state });
    }
    let entered = Netns::open(&NetnsName::new(name)?).and_then(|netns| netns.enter_for_good());
    entered.map_err(|source| match source.errno() {
        Some(Errno::PERM) => EnterError::NotRoot { name: name.to_owned() },
        _ => EnterError::Net { name: name.to_owned(), source },
    })
}
