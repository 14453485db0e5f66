//! Added guests in the state directory: one small JSON file, replaced whole.

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::{GuestConfig, UnknownKind};
use crate::store;

/// The file's name.
pub(super) const FILE: &str = "guests.json";

/// An added guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    name: String,
    kind: String,
    addresses: Vec<Ipv4Addr>,
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
            is_going,
        }
    }

    /// The guest. The file may be another version's.
    pub(super) fn guest(self) -> Result<GuestConfig, UnknownKind> {
        let kind = self.kind.parse()?;
        Ok(GuestConfig { name: self.name, kind, addresses: self.addresses })
    }
}

/// What was added to earlier daemons.
pub(super) fn load(file: &Path) -> Vec<Record> {
    store::load(file).unwrap_or_default()
}

/// Writes all that is added.
pub(super) fn save(file: &Path, records: &[Record]) -> io::Result<()> {
    store::save(file, &records)
}
