//! State that survives the daemon: small JSON files, replaced whole.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Writes `value` so that a reader finds the old file or the new one, never a part:
/// beside it, then renamed over it (man 2 rename).
pub(crate) fn save(file: &Path, value: &impl Serialize) -> io::Result<()> {
    let next = file.with_extension("next");
    let bytes = serde_json::to_vec(value)?;
    let mut open = OpenOptions::new();
    open.create(true).truncate(true).write(true).mode(0o600);
    open.open(&next)?.write_all(&bytes)?;
    fs::rename(&next, file)
}

/// Reads what [`save`] wrote; none where there is no such file, or where it is
/// damaged, which is told in the log.
pub(crate) fn load<T: DeserializeOwned>(file: &Path) -> Option<T> {
    let bytes = fs::read(file).ok()?;
    serde_json::from_slice(&bytes)
        .inspect_err(|error| tracing::error!(%error, file = %file.display(), "not understood"))
        .ok()
}
