//! A tunnel on a thread of its own, on Windows.
//!
//! ```text
//! wait (adapter's event, socket's event, the handle's event; until the core's deadline)
//!   → messages → device step → network step → what is due → again
//! ```
//!
//! A wait says only that something has come: both sources are tried, which costs a call
//! each where there is nothing.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use conet_dataplane::PortError;
use ipnet::IpNet;

use super::adapter::{Adapter, AdapterName};
use super::netsh::{self, NetshError};
use super::sys::{self, Event, Signal};
use crate::engine::EngineError;
use crate::handle::{Edit, Message, Serve, take_messages, unix_time};
use crate::udp::Udp;
use crate::{
    Arrivals, Config, Core, Destination, Engine, Mode, Network, OwnAddresses, Snapshot, StartError,
    Transmit, TunnelError,
};

/// What Windows calls the library.
const LIBRARY: &str = "wintun.dll";

/// The UDP socket as a [`Network`].
#[derive(Debug)]
pub(super) struct Sockets {
    pub(super) udp: Udp,
}

impl Network for Sockets {
    fn receive(&mut self, into: &mut Arrivals) -> io::Result<bool> {
        self.udp.receive(into)
    }

    fn send(&mut self, batch: &Transmit) -> usize {
        match batch.to() {
            Destination::Udp(to) => self.udp.send(to, batch),
            Destination::Ip(_) => batch.datagrams().len(),
        }
    }

    fn path_mtu(&mut self, _: Destination) -> Option<u16> {
        None
    }
}

/// What the tunnel's thread owns.
pub(crate) struct Driver {
    engine: Engine<Adapter, Sockets>,
    messages: Receiver<Message>,
    waker: Arc<Event>,
    arrived: Event,
    device: AdapterName,
    listen: SocketAddr,
    routed: BTreeSet<IpNet>,
}

impl Driver {
    /// A tunnel, and what wakes its thread. wintun's library lies beside the program.
    pub(crate) fn new(
        config: &Config,
        messages: Receiver<Message>,
    ) -> Result<(Arc<Event>, Self), StartError> {
        let own = OwnAddresses {
            inner: config.addresses.iter().map(IpNet::addr).collect(),
            outer: Vec::new(),
        };
        let mut core = Core::new(config.private_key.clone(), own, Instant::now(), unix_time());
        for peer in &config.peers {
            core.add_peer(peer)?;
        }
        no_raw(&core).map_err(StartError::Raw)?;
        let listening = |source| StartError::Listen { listen: config.listen, source };
        let udp = Udp::bind(config.listen, config.offloads).map_err(listening)?;
        let listen = udp.local_addr().map_err(listening)?;
        let waker = Arc::new(Event::new(false).map_err(StartError::Thread)?);
        let arrived = Event::new(true).map_err(StartError::Thread)?;
        sys::announce(&udp.socket, &arrived).map_err(StartError::Thread)?;
        let making = |source| StartError::Device { device: config.device.clone(), source };
        let library = library().map_err(making)?;
        let adapter = Adapter::create(&library, &config.device).map_err(making)?;
        for call in netsh::set_up(adapter.index(), config.mtu, &config.addresses) {
            netsh::run(&call)?;
        }
        let mut driver = Self {
            engine: Engine::new(core, adapter, Sockets { udp }),
            messages,
            waker: Arc::clone(&waker),
            arrived,
            device: config.device.clone(),
            listen,
            routed: BTreeSet::new(),
        };
        driver.sync_routes()?;
        Ok((waker, driver))
    }

    /// Carries packets until it is told to stop.
    pub(crate) fn serve(&mut self) -> Result<(), EngineError> {
        let ready = self.engine.device.ready().map_err(PortError::Kernel)?;
        let signals: [Signal; 3] = [ready, self.arrived.signal(), self.waker.signal()];
        // What waits before the first wait counts as come.
        let (mut device, mut network) = (true, true);
        loop {
            let deadline = self.engine.step_time(Instant::now())?;
            if !device && !network {
                let left = deadline.saturating_duration_since(Instant::now());
                sys::wait(&signals, left.min(Duration::from_secs(60)))
                    .map_err(EngineError::Network)?;
                // Before what it has announced is read: what comes meanwhile sets it anew.
                self.arrived.reset().map_err(EngineError::Network)?;
                (device, network) = (true, true);
            }
            if !take_messages(self) {
                return Ok(());
            }
            if device {
                device = self.engine.step_device()?;
            }
            if network {
                network = self.engine.step_network()?;
            }
        }
    }

    fn sync_routes(&mut self) -> Result<(), NetshError> {
        let index = self.engine.device.index();
        let peers = self.engine.core.peers();
        let wanted: BTreeSet<IpNet> = peers.iter().flat_map(|p| p.allowed.clone()).collect();
        for &gone in self.routed.difference(&wanted) {
            netsh::run(&netsh::route("delete", index, gone))?;
        }
        let new: Vec<IpNet> = wanted.difference(&self.routed).copied().collect();
        // Before the first of them is made: it goes with the adapter in any case.
        self.routed = wanted;
        new.into_iter().try_for_each(|new| netsh::run(&netsh::route("add", index, new)))
    }
}

impl Serve for Driver {
    fn messages(&self) -> &Receiver<Message> {
        &self.messages
    }

    fn device(&self) -> AdapterName {
        self.device.clone()
    }

    fn snapshot(&mut self) -> Snapshot {
        let core = &self.engine.core;
        Snapshot {
            device: self.device.clone(),
            listen: self.listen,
            public_key: core.public_key(),
            peers: core.peers(),
            drops: core.drops(),
        }
    }

    fn change(&mut self, edit: Edit) -> Result<(), TunnelError> {
        edit(&mut self.engine.core)?;
        no_raw(&self.engine.core).map_err(TunnelError::Raw)?;
        self.sync_routes()?;
        Ok(())
    }
}

fn no_raw(core: &Core) -> io::Result<()> {
    if core.peers().iter().any(|peer| peer.mode == Mode::IpIp) {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "Windows carries no ipip; choose mode wireguard or ip-udp for the peer",
        ));
    }
    Ok(())
}

/// Beside the program, as wintun's own documentation wants it.
fn library() -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(LIBRARY))
}
