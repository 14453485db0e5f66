//! What IP packets come out of and go into.

use std::collections::VecDeque;
use std::io;

use crate::{Packet, Pool};

/// Why a port can no longer be used.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The device was deleted under us.
    #[error("the device is gone")]
    Gone,
    /// The kernel refused to read or write.
    #[error("the device failed")]
    Kernel(#[source] io::Error),
}

/// What a call to a port achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Packets moved.
    pub packets: usize,
    /// Packets that the port refused one by one; they are gone.
    pub refused: usize,
    /// More may be waiting: call again before sleeping.
    pub more: bool,
}

/// A two-way source and sink of IP packets, never blocking.
///
/// The tunnel's TUN device is one, a guest's ring is another, and tests use
/// [`MemoryPort`]. A port is owned by one thread.
pub trait Port {
    /// Appends packets that have arrived to `into`, taking buffers from `pool`.
    ///
    /// # Errors
    /// [`PortError`] when the port is of no use any more; single bad packets are
    /// counted as refused instead.
    fn receive(&mut self, pool: &mut Pool, into: &mut Vec<Packet>) -> Result<Progress, PortError>;

    /// Sends all of `packets` and gives their buffers back to `pool`.
    ///
    /// # Errors
    /// As [`Port::receive`].
    fn send(&mut self, packets: &mut Vec<Packet>, pool: &mut Pool) -> Result<Progress, PortError>;
}

/// A port in memory: tests put packets in and look at what came out.
#[derive(Debug, Default)]
pub struct MemoryPort {
    /// What [`Port::receive`] will give, oldest first.
    pub incoming: VecDeque<Vec<u8>>,
    /// What [`Port::send`] was given, oldest first.
    pub outgoing: VecDeque<Vec<u8>>,
}

impl Port for MemoryPort {
    fn receive(&mut self, pool: &mut Pool, into: &mut Vec<Packet>) -> Result<Progress, PortError> {
        let mut progress = Progress::default();
        for bytes in self.incoming.drain(..) {
            if bytes.len() > pool.capacity() {
                progress.refused += 1;
                continue;
            }
            let mut packet = pool.take();
            packet.set_len(bytes.len());
            packet.data_mut().copy_from_slice(&bytes);
            into.push(packet);
            progress.packets += 1;
        }
        Ok(progress)
    }

    fn send(&mut self, packets: &mut Vec<Packet>, pool: &mut Pool) -> Result<Progress, PortError> {
        let progress = Progress { packets: packets.len(), ..Progress::default() };
        for packet in packets.drain(..) {
            self.outgoing.push_back(packet.data().to_vec());
            pool.give(packet);
        }
        Ok(progress)
    }
}
