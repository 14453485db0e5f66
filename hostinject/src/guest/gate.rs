//! Holding a guest's packets, and limiting them, whoever carries them; see [`crate::gate`].

use std::io;

use super::{GuestEnd, GuestPort};
use crate::gate::Rates;
use crate::tap::Pump;
use crate::vhost::Server;

/// Why a port cannot hold its guest's packets or limit them.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// No process sees a veth's packets.
    #[error("a guest by veth has nobody to hold or limit its packets; attach it by TAP")]
    Veth,
    /// The port's process does not do it.
    #[error("the guest's port does not answer")]
    Server(#[from] io::Error),
}

impl GuestPort {
    /// Keeps packets for the guest from now on, in order, up to [`crate::HOLD_PACKETS`] and
    /// [`crate::HOLD_BYTES`]; what does not fit is counted.
    ///
    /// # Errors
    /// [`GateError`].
    pub fn hold(&self) -> Result<(), GateError> {
        match self.gate()? {
            Ok(pump) => pump.hold(),
            Err(server) => server.hold()?,
        }
        Ok(())
    }

    /// What is kept, where the guest is held: packets, and their bytes with headers. None
    /// for one by veth, and where there is nobody to ask.
    #[must_use]
    pub fn held(&self) -> Option<(u64, u64)> {
        match &self.end {
            GuestEnd::Namespace(_, pump) => pump.as_ref().and_then(Pump::held),
            GuestEnd::Machine(server) => server.status().ok().and_then(|status| status.held),
        }
    }

    /// Lets packets for the guest pass again, those that were kept first.
    ///
    /// # Errors
    /// [`GateError`].
    pub fn release(&self) -> Result<(), GateError> {
        match self.gate()? {
            Ok(pump) => pump.release(),
            Err(server) => server.release()?,
        }
        Ok(())
    }

    /// Takes out what is kept, in order; the guest stays held. Each is an IP packet behind
    /// a virtio header (virtio 1.3 §5.1.6, the first ten bytes).
    ///
    /// # Errors
    /// [`GateError`].
    pub fn drain(&self) -> Result<Vec<Vec<u8>>, GateError> {
        match self.gate()? {
            Ok(pump) => Ok(pump.drain()),
            Err(server) => Ok(server.drain()?),
        }
    }

    /// Keeps what another port of this guest's had kept, before its own. Says how many did
    /// not fit: the newest of all.
    ///
    /// # Errors
    /// [`GateError`].
    pub fn accept(&self, packets: Vec<Vec<u8>>) -> Result<usize, GateError> {
        match self.gate()? {
            Ok(pump) => Ok(pump.accept(packets)),
            Err(server) => Ok(server.accept(&packets)?),
        }
    }

    /// How fast the guest may be from now on.
    ///
    /// # Errors
    /// [`GateError`].
    pub fn set_rates(&mut self, rates: Rates) -> Result<(), GateError> {
        match self.gate()? {
            Ok(pump) => pump.set_rates(rates),
            Err(server) => server.set_rates(rates)?,
        }
        self.spec.rates = rates;
        Ok(())
    }

    fn gate(&self) -> Result<Result<&Pump, &Server>, GateError> {
        match &self.end {
            GuestEnd::Namespace(_, pump) => Ok(Ok(pump.as_ref().ok_or(GateError::Veth)?)),
            GuestEnd::Machine(server) => Ok(Err(server)),
        }
    }
}
