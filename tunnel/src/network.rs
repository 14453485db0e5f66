//! What carries outer datagrams, for real or in memory.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;

use conet_wire::ip::Ecn;

use crate::{Destination, Transmit};

/// Longest datagram or packet.
const LONGEST: usize = 65_536;

/// How a datagram came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Over UDP, from this address; the payload is given.
    Udp(SocketAddr),
    /// As an IPv4 packet of protocol 4 or 41, or an error of ICMP; its header is given
    /// too.
    Ip,
}

/// A datagram that has arrived: where it lies in [`Arrivals::buffer`].
#[derive(Debug, Clone)]
pub struct Arrival {
    /// How it came.
    pub origin: Origin,
    /// Congestion mark of the outer header, for UDP.
    pub ecn: Ecn,
    /// Its bytes.
    pub at: Range<usize>,
}

/// Datagrams that have arrived together, in one buffer where they are also opened.
#[derive(Debug)]
pub struct Arrivals {
    /// Their bytes.
    pub buffer: Vec<u8>,
    /// What lies where.
    pub list: Vec<Arrival>,
}

impl Arrivals {
    /// Room for `datagrams` of the greatest length.
    pub fn new(datagrams: usize) -> Self {
        Self { buffer: vec![0; datagrams * LONGEST], list: Vec::with_capacity(512) }
    }
}

/// The outer network, never blocking for long.
pub trait Network {
    /// Puts datagrams that have arrived into `into`, whose list is empty; says whether
    /// more may be waiting.
    ///
    /// # Errors
    /// When the network is of no use any more; errors about single datagrams
    /// are not reported.
    fn receive(&mut self, into: &mut Arrivals) -> io::Result<bool>;

    /// Sends a batch; gives the number of datagrams that were refused.
    fn send(&mut self, batch: &Transmit) -> usize;

    /// Largest packet that the way to `to` takes, as far as is known.
    fn path_mtu(&mut self, to: Destination) -> Option<u16>;
}

/// A network in memory: tests carry datagrams from one to another by hand, and
/// lose, repeat and spoil them on the way.
#[derive(Debug, Default)]
pub struct MemoryNetwork {
    /// What [`Network::receive`] will give, oldest first.
    pub incoming: VecDeque<MemoryDatagram>,
    /// What was sent, oldest first.
    pub outgoing: VecDeque<(Destination, MemoryDatagram)>,
    /// What [`Network::path_mtu`] says.
    pub path_mtu: Option<u16>,
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
    fn receive(&mut self, into: &mut Arrivals) -> io::Result<bool> {
        let mut used = 0;
        while let Some(datagram) = self.incoming.pop_front() {
            if used + datagram.bytes.len() > into.buffer.len() {
                self.incoming.push_front(datagram);
                break;
            }
            let at = used..used + datagram.bytes.len();
            used = at.end;
            into.buffer[at.clone()].copy_from_slice(&datagram.bytes);
            let origin = datagram.from.map_or(Origin::Ip, Origin::Udp);
            into.list.push(Arrival { origin, ecn: datagram.ecn, at });
        }
        Ok(!self.incoming.is_empty())
    }

    fn send(&mut self, batch: &Transmit) -> usize {
        for bytes in batch.datagrams() {
            let datagram = MemoryDatagram { from: None, ecn: batch.ecn(), bytes: bytes.to_vec() };
            self.outgoing.push_back((batch.to(), datagram));
        }
        0
    }

    fn path_mtu(&mut self, _: Destination) -> Option<u16> {
        self.path_mtu
    }
}
