//! Ours over sockets that lose: the same core in a loop of this bench's own.

use anyhow::{Result, bail, ensure};
use conet_transport::session::handshake::{FEATURES, PrivateKey, PublicKey};
use conet_transport::session::{Event, Hub, HubConfig};
use conet_transport::time;
use conet_wire::session::handshake::FEATURE_PLAIN;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::measure::{Place, Turn, pin};

const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const PATIENCE: Duration = Duration::from_secs(20);
/// A call is repeated after this or after four round trips, what is longer.
pub(crate) const LEAST_TIMEOUT_NS: f64 = 200_000.0;

/// A hub whose socket loses `loss` of ten thousand datagrams.
struct Lossy {
    hub: Hub,
    socket: UdpSocket,
    started: Instant,
    loss: u64,
    chance: u64,
    out: Vec<u8>,
    incoming: Vec<u8>,
}

impl Lossy {
    fn new(key: u8, loss: u64) -> Result<Self> {
        let features = FEATURES | FEATURE_PLAIN;
        let hub = Hub::new(HubConfig { features, ..HubConfig::new(PrivateKey::new([key; 32])) })?;
        let socket = UdpSocket::bind(ANY)?;
        socket.set_nonblocking(true)?;
        let (out, incoming) = (Vec::new(), vec![0; 65_536]);
        let chance = 0x9E37_79B9_7F4A_7C15 ^ u64::from(key);
        Ok(Self { hub, socket, started: Instant::now(), loss, chance, out, incoming })
    }

    fn now(&self) -> time::Instant {
        time::Instant::from_start(self.started.elapsed())
    }

    /// Xorshift: the same losses in every run.
    fn is_lost(&mut self) -> bool {
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        self.chance % 10_000 < self.loss
    }

    fn turn(&mut self) {
        let now = self.now();
        while let Some(to) = self.hub.poll_transmit(now, &mut self.out) {
            if !self.is_lost() {
                self.socket.send_to(&self.out, to).ok();
            }
        }
        if let Ok((length, from)) = self.socket.recv_from(&mut self.incoming) {
            let now = self.now();
            self.hub.handle_datagram(now, from, &mut self.incoming[..length]);
        }
        let now = self.now();
        if self.hub.poll_timeout(now).is_some_and(|at| at <= now) {
            self.hub.handle_timeout(now);
        }
    }

    fn serve(mut self, stop: &AtomicBool) -> Result<()> {
        while !stop.load(Ordering::Relaxed) {
            self.turn();
            while let Some(event) = self.hub.poll_event() {
                if let Event::Call { peer, id, payload, .. } = event {
                    self.hub.reply(&peer, id, payload)?;
                }
            }
        }
        Ok(())
    }

    fn call(&mut self, server: &PublicKey) -> Result<()> {
        let mut payload = self.hub.buffer(server, 64);
        payload.resize(64, 7);
        let now = self.now();
        self.hub.call(now, server, payload, None)?;
        let start = Instant::now();
        loop {
            self.turn();
            while let Some(event) = self.hub.poll_event() {
                if let Event::Ended { peer, result, .. } = event {
                    self.hub.recycle(&peer, result?);
                    return Ok(());
                }
            }
            ensure!(start.elapsed() < PATIENCE, "a call over a bad link has not ended");
        }
    }
}

/// Calls of 64 bytes in clear, both threads spinning.
pub(crate) fn calls(place: Place, calls: usize, loss: u64) -> Result<Turn> {
    let (mut client, mut server) = (Lossy::new(1, loss)?, Lossy::new(2, loss)?);
    let (name, address) = (server.hub.public_key(), server.socket.local_addr()?);
    let now = server.now();
    server.hub.add_peer(now, client.hub.public_key(), None);
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let thread = std::thread::spawn(move || {
        pin(place.server);
        server.serve(&stopped)
    });
    pin(place.client);
    let now = client.now();
    client.hub.add_peer(now, name, Some(address));
    client.hub.handle_timeout(now);
    let turn = Turn::of(calls, || client.call(&name));
    stop.store(true, Ordering::Relaxed);
    match thread.join() {
        Ok(result) => result?,
        Err(_) => bail!("the server's thread has failed"),
    }
    turn
}
