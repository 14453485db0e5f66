//! Pumps packets between a device, the core and a network.
//!
//! It knows no thread and no poll: whoever drives it calls the step of what is
//! ready and asks for the next deadline. Each step handles one bounded batch and
//! leaves nothing unsent, so the order of steps does not matter for correctness.
//!
//! Invariant: after warm-up a step allocates nothing.

use std::io;
use std::time::Instant;

use conet_dataplane::{DropReason, Packet, Port, PortError};

use crate::{Arrival, Core, Inbox, Network, Outbox};

/// A core between two ports.
#[derive(Debug)]
pub struct Engine<D, N> {
    /// The tunnel.
    pub core: Core,
    /// Inner packets.
    pub device: D,
    /// Outer datagrams.
    pub network: N,
    inbox: Inbox,
    outbox: Outbox,
    batch: Vec<Packet>,
}

/// Packets that a pool keeps: one network step may bring four GRO batches of 64.
const POOLED: usize = 512;

impl<D: Port, N: Network> Engine<D, N> {
    /// Joins the three. `capacity` is the longest datagram or packet in bytes
    /// that will be handled; a device that coalesces needs 64 KiB and some.
    pub fn new(core: Core, device: D, network: N, capacity: usize) -> Self {
        Self {
            core,
            device,
            network,
            inbox: Inbox::new(capacity, POOLED),
            outbox: Outbox::new(),
            batch: Vec::with_capacity(POOLED),
        }
    }

    /// Takes what the device has, once; says whether more may be waiting.
    ///
    /// # Errors
    /// When the device is of no use any more.
    pub fn step_device(&mut self) -> Result<bool, PortError> {
        let progress = self.device.receive(&mut self.inbox.pool, &mut self.batch)?;
        self.core.count_refused(DropReason::Device, progress.refused);
        for packet in self.batch.drain(..) {
            self.core.handle_device(packet.data(), &mut self.outbox, &mut self.inbox);
            self.inbox.pool.give(packet);
            if self.outbox.is_full() {
                flush(&mut self.core, &mut self.network, &mut self.outbox);
            }
        }
        self.flush()?;
        Ok(progress.more)
    }

    /// Takes what the network has, once; says whether more may be waiting.
    ///
    /// # Errors
    /// When the device or the network is of no use any more.
    pub fn step_network(&mut self) -> Result<bool, EngineError> {
        let (core, inbox, outbox) = (&mut self.core, &mut self.inbox, &mut self.outbox);
        let more = self.network.receive(&mut |arrival| match arrival {
            Arrival::Udp { from, ecn, bytes } => core.handle_udp(from, ecn, bytes, outbox, inbox),
            Arrival::Ip { bytes } => core.handle_ip(bytes, inbox),
        });
        self.flush()?;
        more.map_err(EngineError::Network)
    }

    /// Does what is due at `now` and gives the next deadline.
    ///
    /// # Errors
    /// When the device is of no use any more.
    pub fn step_time(&mut self, now: Instant) -> Result<Instant, PortError> {
        if now >= self.core.poll_timeout() {
            self.core.handle_timeout(now, &mut self.outbox);
            self.flush()?;
        }
        Ok(self.core.poll_timeout())
    }

    /// Packet buffers allocated so far.
    pub fn allocated(&self) -> u64 {
        self.inbox.pool.allocated()
    }

    fn flush(&mut self) -> Result<(), PortError> {
        flush(&mut self.core, &mut self.network, &mut self.outbox);
        if !self.inbox.packets.is_empty() {
            let progress = self.device.send(&mut self.inbox.packets, &mut self.inbox.pool)?;
            self.core.count_refused(DropReason::Device, progress.refused);
        }
        Ok(())
    }
}

/// Why an engine stopped.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] PortError),
    /// The network failed.
    #[error("the network failed")]
    Network(#[source] io::Error),
}

fn flush<N: Network>(core: &mut Core, network: &mut N, outbox: &mut Outbox) {
    for batch in outbox.transmits() {
        let refused = network.send(batch);
        core.count_refused(DropReason::Network, refused);
    }
    outbox.clear();
}
