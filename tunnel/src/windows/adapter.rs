//! wintun's adapter as a [`Device`].
//!
//! Its two rings are shared with the driver: what waits is handed over where it lies, what
//! is sent is copied into the ring's own place. Whatever is allocated there is sent at
//! once: a place that is not would hold up all that come after it.
//!
//! Sources: `wintun.h` 0.14; the crate `wintun`.

use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use conet_dataplane::{DropReason, PortError, Progress};
use wintun::Session;

use super::sys;
use crate::{Device, Inner, Outgoing};

/// Bytes of each ring: a millisecond of 10 Gb/s is 1.2 MB.
const RING: u32 = 4 << 20;
/// Packets before other work has its turn.
const READS: usize = 256;
/// What Windows calls the kind of the adapter.
const KIND: &str = "conet";
/// The longest name, in UTF-16 units (`MAX_ADAPTER_NAME` less its end, `wintun.h`).
const NAME_UNITS: usize = 127;
/// The adapter was removed (`ERROR_HANDLE_EOF`, winerror.h).
const GONE: i32 = 38;

/// Name of an adapter, 1 to 127 UTF-16 units without control characters or quotes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterName(Box<str>);

/// It cannot be the name of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an adapter's name has 1 to 127 characters and no quotation mark")]
pub struct NoAdapterName;

impl AdapterName {
    /// Checks `name`.
    ///
    /// # Errors
    /// [`NoAdapterName`].
    pub fn new(name: &str) -> Result<Self, NoAdapterName> {
        let units = name.encode_utf16().count();
        let is_odd = |c: char| c.is_control() || c == '"';
        if !(1..=NAME_UNITS).contains(&units) || name.contains(is_odd) {
            return Err(NoAdapterName);
        }
        Ok(Self(name.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for AdapterName {
    type Err = NoAdapterName;

    fn from_str(text: &str) -> Result<Self, NoAdapterName> {
        Self::new(text)
    }
}

impl fmt::Display for AdapterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// An adapter, removed when this is dropped.
pub(crate) struct Adapter {
    session: Arc<Session>,
    index: u32,
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adapter").field("index", &self.index).finish_non_exhaustive()
    }
}

impl Adapter {
    /// Makes an adapter by the library at `library`, an absolute path.
    pub(crate) fn create(library: &Path, name: &AdapterName) -> io::Result<Self> {
        let wintun = sys::load(library)?;
        let adapter = wintun::Adapter::create(&wintun, name.as_str(), KIND, None)?;
        let index = adapter.get_adapter_index()?;
        Ok(Self { session: Arc::new(adapter.start_session(RING)?), index })
    }

    /// The number by which netsh knows it.
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// Is signalled when packets wait.
    pub(crate) fn ready(&self) -> io::Result<sys::Signal> {
        Ok(sys::Signal::of(self.session.get_read_wait_event()?))
    }
}

/// What has become of the adapter.
fn failed(error: wintun::Error) -> PortError {
    let error = io::Error::from(error);
    if error.raw_os_error() == Some(GONE) { PortError::Gone } else { PortError::Kernel(error) }
}

impl Device for Adapter {
    fn receive(
        &mut self,
        each: &mut dyn FnMut(Result<Outgoing<'_>, DropReason>),
    ) -> Result<Progress, PortError> {
        let mut progress = Progress { more: true, ..Progress::default() };
        for _ in 0..READS {
            let Some(packet) = self.session.try_receive().map_err(failed)? else {
                progress.more = false;
                break;
            };
            each(Outgoing::whole(packet.bytes()));
            progress.packets += 1;
        }
        Ok(progress)
    }

    fn send(&mut self, buffer: &[u8], packets: &[Inner]) -> Result<Progress, PortError> {
        let mut progress = Progress::default();
        for Inner { at, .. } in packets {
            let bytes = &buffer[at.clone()];
            let place = u16::try_from(bytes.len())
                .ok()
                .map(|len| self.session.allocate_send_packet(len).map_err(failed));
            match place {
                Some(Ok(mut packet)) => {
                    packet.bytes_mut().copy_from_slice(bytes);
                    self.session.send_packet(packet);
                    progress.packets += 1;
                }
                Some(Err(PortError::Gone)) => return Err(PortError::Gone),
                // The ring is full (ERROR_BUFFER_OVERFLOW): nobody reads so fast.
                _ => progress.refused += 1,
            }
        }
        Ok(progress)
    }
}
