//! What carries outer datagrams, for real or in memory.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;

use conet_wire::ip::Ecn;

use crate::{Destination, Transmit};

/// A datagram that has arrived.
#[derive(Debug, Clone, Copy)]
pub enum Arrival<'a> {
    /// Over UDP.
    Udp {
        /// Sender.
        from: SocketAddr,
        /// Congestion mark of the outer header.
        ecn: Ecn,
        /// Payload.
        bytes: &'a [u8],
    },
    /// An IPv4 packet of protocol 4 or 41, with its header.
    Ip {
        /// The packet.
        bytes: &'a [u8],
    },
}

/// The outer network, never blocking for long.
pub trait Network {
    /// Hands some datagrams that have arrived to `each`; says whether more may
    /// be waiting. It hands over a bounded number, so that other work is not
    /// starved.
    ///
    /// # Errors
    /// When the network is of no use any more; errors about single datagrams
    /// are not reported.
    fn receive(&mut self, each: &mut dyn FnMut(Arrival<'_>)) -> io::Result<bool>;

    /// Sends a batch; gives the number of datagrams that were refused.
    fn send(&mut self, batch: &Transmit) -> usize;
}

/// A network in memory: tests carry datagrams from one to another by hand, and
/// lose, repeat and spoil them on the way.
#[derive(Debug, Default)]
pub struct MemoryNetwork {
    /// What [`Network::receive`] will give, oldest first.
    pub incoming: VecDeque<MemoryDatagram>,
    /// What was sent, oldest first.
    pub outgoing: VecDeque<(Destination, MemoryDatagram)>,
}

/// A datagram in a [`MemoryNetwork`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryDatagram {
    /// Sender of a UDP datagram; `None` for an IP packet.
    pub from: Option<SocketAddr>,
    /// Congestion mark.
    pub ecn: Ecn,
    /// Payload, or packet with header.
    pub bytes: Vec<u8>,
}

impl Network for MemoryNetwork {
    fn receive(&mut self, each: &mut dyn FnMut(Arrival<'_>)) -> io::Result<bool> {
        for datagram in self.incoming.drain(..) {
            let bytes = datagram.bytes.as_slice();
            each(match datagram.from {
                Some(from) => Arrival::Udp { from, ecn: datagram.ecn, bytes },
                None => Arrival::Ip { bytes },
            });
        }
        Ok(false)
    }

    fn send(&mut self, batch: &Transmit) -> usize {
        for bytes in batch.datagrams() {
            let datagram = MemoryDatagram { from: None, ecn: batch.ecn(), bytes: bytes.to_vec() };
            self.outgoing.push_back((batch.to(), datagram));
        }
        0
    }
}
