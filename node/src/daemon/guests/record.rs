//! Added guests in the state directory: one small JSON file, replaced whole.

use std::io;
use std::net::IpAddr;
use std::path::Path;

use conet_hostinject::{InvalidRate, Rate, Rates};
use conet_wire::control::GuestRates;
use serde::{Deserialize, Serialize};

use crate::config::{GuestConfig, GuestKind, UnknownKind};
use crate::store;

/// The file's name.
pub(super) const FILE: &str = "guests.json";

/// An added guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    name: String,
    kind: String,
    addresses: Vec<IpAddr>,
    #[serde(default)]
    rates: GuestRates,
    #[serde(default)]
    queues: Option<u16>,
    /// Its removal has begun.
    #[serde(default)]
    pub(super) is_going: bool,
}

impl Record {
    pub(super) fn of(guest: &GuestConfig, is_going: bool) -> Self {
        Self {
            name: guest.name.clone(),
            kind: guest.kind.as_str().to_owned(),
            addresses: guest.addresses.clone(),
            rates: rate_texts(guest.rates),
            queues: (guest.queues != 1).then_some(guest.queues),
            is_going,
        }
    }

    /// The guest. The file may be another version's.
    pub(super) fn guest(self) -> Result<GuestConfig, UnknownKind> {
        let kind: GuestKind = self.kind.parse()?;
        // Of a later version: unlimited rather than no guest.
        let rates = rates_of(&self.rates).unwrap_or_default();
        let queues = self.queues.filter(|queues| kind.may_have_queues(*queues)).unwrap_or(1);
        Ok(GuestConfig {
            name: self.name,
            kind,
            addresses: self.addresses,
            rates,
            line: None,
            queues,
        })
    }
}

/// As the command line has them.
pub(super) fn rate_texts(rates: Rates) -> GuestRates {
    let text = |rate: Rate| (rate != Rate::default()).then(|| rate.to_string());
    GuestRates { from: text(rates.from_guest), to: text(rates.to_guest) }
}

/// The opposite.
pub(super) fn rates_of(texts: &GuestRates) -> Result<Rates, InvalidRate> {
    let rate = |text: &Option<String>| text.as_deref().map_or(Ok(Rate::default()), str::parse);
    Ok(Rates { from_guest: rate(&texts.from)?, to_guest: rate(&texts.to)? })
}

/// What was added to earlier daemons.
pub(super) fn load(file: &Path) -> Vec<Record> {
    store::load(file).unwrap_or_default()
}

/// Writes all that is added.
pub(super) fn save(file: &Path, records: &[Record]) -> io::Result<()> {
    store::save(file, &records)
}
