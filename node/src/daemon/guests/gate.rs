//! What stands at a guest's port, as the command line asks for it: rates, and its packets
//! held, taken out, given and let go. `conet_hostinject` does it.
//!
//! What another host has kept comes in pieces, since a request is short. They are put
//! together here, of one guest at a time: whoever begins anew ends what somebody else has
//! begun, which is told so. Nothing reaches the port before all of it is there, is whole,
//! and is for that guest.
//!
//! What is taken out stays here until whoever took it says that it is safe. Where that is
//! never said, the next request about the guest's packets keeps it again, before what came
//! since: somebody may have it twice then, and nobody loses it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use conet_hostinject::{GateError, GuestPort, HOLD_BYTES, HOLD_PACKETS};
use conet_wire::control::{self, Failure, Held, Response};
use conet_wire::held;

use super::{Guests, State, may_change, read_rates};
use crate::caller::Caller;

// What one port keeps another one takes.
const _: () = assert!(HOLD_PACKETS == held::MAX_PACKETS && HOLD_BYTES == held::MAX_BYTES);

/// What has come so far of packets for a guest.
#[derive(Debug)]
pub(super) struct Pieces {
    name: String,
    bytes: Vec<u8>,
}

/// What was taken out of a guest's port and not confirmed.
#[derive(Debug)]
pub(super) struct Drained {
    name: String,
    packets: Vec<Vec<u8>>,
}

/// A piece of what another host has kept.
#[derive(Debug, Clone, Copy)]
pub(in crate::daemon) struct Piece<'a> {
    /// How many bytes came before.
    pub(in crate::daemon) at: u64,
    /// base64.
    pub(in crate::daemon) text: &'a str,
    pub(in crate::daemon) is_last: bool,
}

impl Guests {
    /// Changes how fast a guest may be. One of the configuration has its own again with the
    /// next daemon.
    pub(in crate::daemon) fn set_rates(
        &mut self,
        caller: Caller,
        name: &str,
        rates: &control::GuestRates,
    ) -> Result<(), Failure> {
        may_change(caller)?;
        let none = self.no_such(name);
        let guest = self.guests.iter_mut().find(|guest| guest.config.name == name).ok_or(none)?;
        let rates = read_rates(guest.config.kind, rates)?;
        let State::Up(port) = &mut guest.state else { return Err(not_there(name)) };
        port.set_rates(rates).map_err(|error| refused(name, &error))?;
        guest.config.rates = rates;
        self.store()
    }

    /// Keeps a guest's packets from now on.
    pub(in crate::daemon) fn hold(&mut self, caller: Caller, name: &str) -> Result<Held, Failure> {
        may_change(caller)?;
        self.keep_again(name);
        let port = self.port(name)?;
        port.hold().map_err(|error| refused(name, &error))?;
        Ok(held_of(port))
    }

    /// Lets them pass again, what is kept first; that is told.
    pub(in crate::daemon) fn let_go(
        &mut self,
        caller: Caller,
        name: &str,
    ) -> Result<Held, Failure> {
        may_change(caller)?;
        self.keep_again(name);
        let port = self.port(name)?;
        let kept = held_of(port);
        port.release().map_err(|error| refused(name, &error))?;
        Ok(kept)
    }

    /// Takes out what is kept.
    pub(in crate::daemon) fn drain(
        &mut self,
        caller: Caller,
        name: &str,
    ) -> Result<Response, Failure> {
        must_be_root(caller)?;
        if let Some(other) = self.drained.as_ref().map(|drained| drained.name.clone()) {
            self.keep_again(&other);
        }
        let port = self.port(name)?;
        must_be_held(name, port)?;
        let packets = port.drain().map_err(|error| refused(name, &error))?;
        let (held, bytes) = (counted(&packets), held::emit(&packets));
        self.drained = Some(Drained { name: name.to_owned(), packets });
        Ok(Response::Drained { held, packets: STANDARD.encode(bytes) })
    }

    /// What was taken out is safe.
    pub(in crate::daemon) fn confirm(&mut self, caller: Caller, name: &str) -> Result<(), Failure> {
        must_be_root(caller)?;
        match self.drained.take_if(|drained| drained.name == name) {
            Some(_) => Ok(()),
            None => {
                let message = format!("what was taken out of {name} is kept for it again");
                Err(Failure::new("interrupted", message, "throw it away, and drain anew"))
            }
        }
    }

    /// Keeps again what was taken out of a guest's port and may not have arrived anywhere.
    fn keep_again(&mut self, name: &str) {
        let Some(drained) = self.drained.take_if(|drained| drained.name == name) else { return };
        // One that is gone, or of another kind now, has nothing to keep.
        let kept = self.port(name).map(|port| port.accept(drained.packets));
        match kept {
            Ok(Ok(lost)) => tracing::info!(guest = name, lost, "drained packets are kept again"),
            other => tracing::warn!(guest = name, ?other, "drained packets are lost"),
        }
    }

    /// Takes a piece of what another host has kept, and gives it to the port when it is
    /// whole.
    pub(in crate::daemon) fn accept(
        &mut self,
        caller: Caller,
        name: &str,
        piece: Piece<'_>,
    ) -> Result<Response, Failure> {
        may_change(caller)?;
        self.keep_again(name);
        must_be_held(name, self.port(name)?)?;
        let mut pieces = match (piece.at, self.pieces.take()) {
            (0, _) => Pieces { name: name.to_owned(), bytes: Vec::new() },
            (at, Some(pieces)) if pieces.name == name && pieces.bytes.len() as u64 == at => pieces,
            _ => {
                let message = "somebody else gives packets at the same time";
                return Err(Failure::new("interrupted", message, "try again"));
            }
        };
        let bad = |text: String| Failure::new("bad-packets", text, "drain the other host's guest");
        let bytes = STANDARD.decode(piece.text).map_err(|error| bad(error.to_string()))?;
        pieces.bytes.extend(bytes);
        if pieces.bytes.len() > held::MAX_LENGTH {
            return Err(bad(held::HeldError::TooMany.to_string()));
        }
        if !piece.is_last {
            self.pieces = Some(pieces);
            return Ok(Response::Done {});
        }
        let packets = held::parse(&pieces.bytes).map_err(|error| bad(error.to_string()))?;
        let port = self.port(name)?;
        let own = &port.spec().addresses;
        let mut destinations = packets.iter().filter_map(|packet| held::destination(packet));
        if let Some(other) = destinations.find(|address| !own.contains(address)) {
            let message = format!("these packets are for {other}, which is no address of {name}");
            let remedy = "give them to the guest that has moved";
            return Err(Failure::new("bad-packets", message, remedy));
        }
        let held = counted(&packets);
        let lost = port.accept(packets).map_err(|error| refused(name, &error))? as u64;
        Ok(Response::Accepted { held, lost })
    }

    /// The port of a guest that is there.
    fn port(&self, name: &str) -> Result<&GuestPort, Failure> {
        let guest = self.guests.iter().find(|guest| guest.config.name == name);
        match &guest.ok_or_else(|| self.no_such(name))?.state {
            State::Up(port) => Ok(port),
            _ => Err(not_there(name)),
        }
    }
}

/// What a port keeps just now.
fn held_of(port: &GuestPort) -> Held {
    let (packets, bytes) = port.held().unwrap_or_default();
    Held { packets, bytes }
}

fn counted(packets: &[Vec<u8>]) -> Held {
    let bytes: usize = packets.iter().map(Vec::len).sum();
    Held { packets: packets.len() as u64, bytes: bytes as u64 }
}

fn must_be_held(name: &str, port: &GuestPort) -> Result<(), Failure> {
    if port.held().is_some() {
        return Ok(());
    }
    let message = format!("{name} is not held");
    Err(Failure::new("not-held", message, format!("hold it first: conet guest hold {name}")))
}

fn must_be_root(caller: Caller) -> Result<(), Failure> {
    if caller.uid == 0 {
        return Ok(());
    }
    Err(Failure::new("denied", "only root takes a guest's packets out", "ask root, as by sudo"))
}

fn not_there(name: &str) -> Failure {
    Failure::new("busy", format!("{name} is not there"), "see conet guest list")
}

fn refused(name: &str, error: &GateError) -> Failure {
    match error {
        GateError::Veth => Failure::new(
            "veth",
            format!("{name} is a guest by veth, whose packets no process sees"),
            "add it with --kind tap",
        ),
        GateError::Server(_) => {
            Failure::new("gate", crate::daemon::chain(error), "see conet guest list")
        }
    }
}
