//! Pumps packets between a device, the core and a network.
//!
//! It knows no thread and no poll: whoever drives it calls the step of what is
//! ready and asks for the next deadline. Each step handles one bounded batch and
//! leaves nothing unsent, so the order of steps does not matter for correctness.
//!
//! ```text
//! device ─ one read: up to 64 KiB of a flow ─ cut and sealed in its datagrams' places ─ one send
//! network ─ one receive: 4 × up to 64 datagrams ─ opened where they lie ─ one write a flow
//! ```
//!
//! Invariant: after warm-up a step allocates nothing, but for packets that wait for a
//! session.

use std::io;
use std::time::{Duration, Instant};

use conet_dataplane::{DropReason, PortError};

use crate::{Arrivals, Core, Device, Inner, Network, Origin, Outbox, Replies};

/// A core between two ports.
#[derive(Debug)]
pub struct Engine<D, N> {
    /// The tunnel.
    pub core: Core,
    /// Inner packets.
    pub device: D,
    /// Outer datagrams.
    pub network: N,
    arrivals: Arrivals,
    inner: Vec<Inner>,
    replies: Replies,
    outbox: Outbox,
    ask_at: Instant,
}

/// How often the ways to peers are asked about: the kernel learns their MTU from ICMP
/// errors, and forgets it (`net.ipv4.route.mtu_expires`).
const ASK: Duration = Duration::from_millis(500);
/// Datagrams of the greatest length that fit at a time: four GRO batches and room for
/// raw packets.
const DATAGRAMS: usize = 7;
/// Inner packets that one receive may bring.
const PACKETS: usize = 512;

impl<D: Device, N: Network> Engine<D, N> {
    /// Joins the three.
    pub fn new(core: Core, device: D, network: N) -> Self {
        let now = core.now();
        Self {
            core,
            device,
            network,
            arrivals: Arrivals::new(DATAGRAMS),
            inner: Vec::with_capacity(PACKETS),
            replies: Replies::default(),
            outbox: Outbox::new(),
            ask_at: now,
        }
    }

    /// Takes what the device has; says whether more may be waiting.
    ///
    /// # Errors
    /// When the device is of no use any more.
    pub fn step_device(&mut self) -> Result<bool, PortError> {
        let Self { core, device, network, replies, outbox, .. } = self;
        let progress = device.receive(&mut |packet| {
            match packet {
                Ok(packet) => core.handle_device(&packet, outbox, replies),
                Err(reason) => core.count_refused(reason, 1),
            }
            if outbox.is_full() {
                flush(core, network, outbox);
            }
        })?;
        self.core.count_refused(DropReason::Device, progress.refused);
        flush(&mut self.core, &mut self.network, &mut self.outbox);
        self.reply()?;
        Ok(progress.more)
    }

    /// Takes what the network has, once; says whether more may be waiting.
    ///
    /// # Errors
    /// When the device or the network is of no use any more.
    pub fn step_network(&mut self) -> Result<bool, EngineError> {
        let Self { core, device, network, arrivals, inner, outbox, replies, .. } = self;
        arrivals.list.clear();
        let more = network.receive(arrivals).map_err(EngineError::Network)?;
        for arrival in &arrivals.list {
            let bytes = &mut arrivals.buffer[arrival.at.clone()];
            let found = match arrival.origin {
                Origin::Udp(from) => core.handle_udp(from, arrival.ecn, bytes, outbox),
                Origin::Ip => core.handle_ip(bytes, replies),
            };
            let Some(found) = found else { continue };
            let base = arrival.at.start;
            inner.push(Inner { at: base + found.at.start..base + found.at.end, ..found });
        }
        flush(core, network, outbox);
        if !inner.is_empty() {
            let progress = device.send(&arrivals.buffer, inner)?;
            core.count_refused(DropReason::Device, progress.refused);
            inner.clear();
        }
        self.reply()?;
        Ok(more)
    }

    /// Does what is due at `now` and gives the next deadline.
    ///
    /// # Errors
    /// When the device is of no use any more.
    pub fn step_time(&mut self, now: Instant) -> Result<Instant, PortError> {
        self.core.advance(now);
        if now >= self.ask_at {
            self.ask_at = now + ASK;
            let Self { core, network, .. } = self;
            core.ask_ways(|way| network.path_mtu(way));
        }
        if now >= self.core.poll_timeout() {
            self.core.handle_timeout(now, &mut self.outbox);
            flush(&mut self.core, &mut self.network, &mut self.outbox);
        }
        Ok(self.core.poll_timeout())
    }

    /// Gives the device what was made for its senders.
    fn reply(&mut self) -> Result<(), PortError> {
        if !self.replies.packets().is_empty() {
            let progress = self.device.send(self.replies.buffer(), self.replies.packets())?;
            self.core.count_refused(DropReason::Device, progress.refused);
            self.replies.clear();
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
