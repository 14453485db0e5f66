//! Where inner packets come from and go to.

use std::ops::Range;

use conet_dataplane::{DropReason, MemoryPort, PortError, Progress};

use crate::Outgoing;

/// A packet from the network that may go to the device: where it lies in the buffer
/// of its datagrams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inner {
    /// Its bytes.
    pub at: Range<usize>,
    /// Whether it came as its sender's host made it: under a tag, or under an outer
    /// checksum that was verified.
    pub trusted: bool,
    /// What the outer header may tell of the payload of each, in bytes, should it be many
    /// packets in one that no wire has carried; 0 for nothing.
    pub segment: u16,
}

/// A source and sink of inner packets, never blocking. Unlike
/// [`conet_dataplane::Port`] it may hand over many packets of a flow as one, and takes
/// packets where they are.
pub trait Device {
    /// Gives packets that wait to `each`, a bounded number.
    ///
    /// # Errors
    /// [`PortError`] when the device is of no use any more.
    fn receive(
        &mut self,
        each: &mut dyn FnMut(Result<Outgoing<'_>, DropReason>),
    ) -> Result<Progress, PortError>;

    /// Sends packets that lie in `buffer`.
    ///
    /// # Errors
    /// As [`Device::receive`].
    fn send(&mut self, buffer: &[u8], packets: &[Inner]) -> Result<Progress, PortError>;
}

impl Device for MemoryPort {
    fn receive(
        &mut self,
        each: &mut dyn FnMut(Result<Outgoing<'_>, DropReason>),
    ) -> Result<Progress, PortError> {
        let packets = self.incoming.len();
        self.incoming.drain(..).for_each(|packet| each(Outgoing::whole(&packet)));
        Ok(Progress { packets, ..Progress::default() })
    }

    fn send(&mut self, buffer: &[u8], packets: &[Inner]) -> Result<Progress, PortError> {
        let copies = packets.iter().map(|packet| buffer[packet.at.clone()].to_vec());
        self.outgoing.extend(copies);
        Ok(Progress { packets: packets.len(), ..Progress::default() })
    }
}
