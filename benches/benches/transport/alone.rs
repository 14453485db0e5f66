//! The session without a carrier: two hubs in one thread that hand each other datagrams.
//!
//! What it takes is what a call costs beside its carrier, its clock and its wake-ups: the
//! two ends' work, one after the other, which nothing overlaps when both ends spin either.

use anyhow::{Result, ensure};
use conet_transport::session::handshake::{PrivateKey, PublicKey};
use conet_transport::session::{BATCH_BUFFER, CallId, Event, Hub, HubConfig, Lane};
use conet_transport::time::Instant;
use std::net::SocketAddr;
use std::time::Duration;

use crate::measure::{Turn, pin};
use crate::ours::Sealed;

/// Calls that are timed together: a clock costs as much as half of one.
const TOGETHER: usize = 16;

struct Two {
    client: Hub,
    server: Hub,
    /// Where each end is, as the other sees it.
    at: [SocketAddr; 2],
    name: PublicKey,
    now: Instant,
    datagram: Vec<u8>,
    ids: Vec<CallId>,
}

impl Two {
    fn new(sealed: Sealed) -> Result<Self> {
        let hub = |key: u8| {
            let config = HubConfig {
                features: sealed.features(),
                ..HubConfig::new(PrivateKey::new([key; 32]))
            };
            Hub::new(config)
        };
        let (client, server) = (hub(1)?, hub(2)?);
        let at = [SocketAddr::from(([192, 0, 2, 1], 1)), SocketAddr::from(([192, 0, 2, 2], 1))];
        let (name, datagram) = (server.public_key(), vec![0; BATCH_BUFFER]);
        let mut two =
            Self { client, server, at, name, now: Instant::START, datagram, ids: Vec::new() };
        two.server.add_peer(two.now, two.client.public_key(), None);
        two.client.add_peer(two.now, name, Some(two.at[1]));
        two.client.handle_timeout(two.now);
        for _ in 0..8 {
            two.forth();
            two.back();
        }
        for _ in 0..64 {
            two.call(64)?;
        }
        Ok(two)
    }

    fn forth(&mut self) {
        while let Some(sent) = self.client.poll_batch(self.now, &mut self.datagram, None) {
            let datagram = &mut self.datagram[..sent.length];
            self.server.handle_datagram(self.now, self.at[0], datagram);
        }
    }

    fn back(&mut self) {
        while let Some(sent) = self.server.poll_batch(self.now, &mut self.datagram, None) {
            let datagram = &mut self.datagram[..sent.length];
            self.client.handle_datagram(self.now, self.at[1], datagram);
        }
    }

    fn call(&mut self, size: usize) -> Result<()> {
        // As if time went by: nothing here reads a clock.
        self.now = self.now + Duration::from_micros(4);
        let payload = self.client.used_buffer(&self.name, size);
        self.client.call_on(self.now, &self.name, Lane::Calls, payload, None)?;
        self.answer(1)
    }

    /// Eight calls in a row, as `ours::Pair::row`.
    fn row(&mut self, size: usize) -> Result<()> {
        self.now = self.now + Duration::from_micros(4);
        let mut row: [(Vec<u8>, bool); 8] = Default::default();
        for (payload, _) in &mut row {
            *payload = self.client.used_buffer(&self.name, size);
        }
        let (row, mut ids) = (row.into_iter(), std::mem::take(&mut self.ids));
        ids.clear();
        self.client.call_row(self.now, &self.name, Lane::Calls, row, None, &mut ids)?;
        self.ids = ids;
        self.answer(8)
    }

    fn answer(&mut self, mut missing: usize) -> Result<()> {
        self.forth();
        while let Some(event) = self.server.poll_event() {
            if let Event::Call { peer, id, payload, argument, .. } = event {
                self.server.reply(&peer, id, payload)?;
                if let Some(argument) = argument {
                    self.server.recycle(&peer, argument);
                }
            }
        }
        self.back();
        while let Some(event) = self.client.poll_event() {
            if let Event::Ended { peer, result, .. } = event {
                self.client.recycle(&peer, result?);
                missing -= 1;
            }
        }
        ensure!(missing == 0, "{missing} calls without an answer");
        Ok(())
    }
}

/// Calls of `size` bytes, or rows of eight of them.
pub(crate) fn calls(
    processor: usize,
    sealed: Sealed,
    size: usize,
    in_rows: bool,
    calls: usize,
) -> Result<Turn> {
    pin(processor);
    let mut two = Two::new(sealed)?;
    let turn = Turn::of(calls.div_ceil(TOGETHER), || {
        (0..TOGETHER).try_for_each(|_| if in_rows { two.row(size) } else { two.call(size) })
    })?;
    Ok(Turn(turn.0.into_iter().map(|time| time / TOGETHER as f64).collect()))
}
