//! A tunnel on a thread of its own: device, sockets, addresses, routes.
//!
//! The thread owns the engine and everything below it; the handle sends it
//! messages and gets copies back. mio's readiness is edge-triggered, so a source
//! stays *ready* until a step of it finds nothing.
//!
//! ```text
//! poll(0 if anything is ready, else until the core's deadline)
//!   → messages → device step → network step → what is due → again
//! ```
//!
//! Routes are what the peers' prefixes say, no more: after each change the
//! difference is applied. Each has a shadow, an *unreachable* route of the
//! highest metric: should this process be killed, the device and its routes go,
//! and without the shadow the guests' packets would take the host's default
//! route, in clear. An orderly end removes the shadows too.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use conet_netsys::{IfName, IpNet, NetError, Netlink, Route, Sysctl};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};

use super::kernel::Kernel;
use super::sockets::Sockets;
use super::tun::TunDevice;
use crate::engine::EngineError;
use crate::handle::{Edit, Message, Serve, take_messages, unix_time};
use crate::{Config, Core, Engine, Mode, OwnAddresses, Snapshot, StartError, TunnelError};

const DEVICE: Token = Token(0);
const NETWORK: Token = Token(1);
const MESSAGE: Token = Token(2);
/// Metric of the shadow routes: above whatever a person or a DHCP client sets.
const SHADOW_METRIC: u32 = u32::MAX - 1;

/// What the tunnel's thread owns.
pub(crate) struct Driver {
    engine: Engine<TunDevice, Sockets>,
    poll: Poll,
    messages: Receiver<Message>,
    netlink: Netlink,
    device: IfName,
    addresses: Vec<IpNet>,
    listen: SocketAddr,
    routed: BTreeSet<IpNet>,
    kernel: Kernel,
}

impl Driver {
    /// A tunnel in the network namespace of the calling thread, and what wakes its thread.
    pub(crate) fn new(
        config: &Config,
        messages: Receiver<Message>,
    ) -> Result<(Arc<Waker>, Self), StartError> {
        let poll = Poll::new().map_err(StartError::Thread)?;
        let waker = Arc::new(Waker::new(poll.registry(), MESSAGE).map_err(StartError::Thread)?);
        let mut netlink = Netlink::open()?;
        let own = own_addresses(&mut netlink, &config.addresses)?;
        let mut core = Core::new(config.private_key.clone(), own, Instant::now(), unix_time());
        for peer in &config.peers {
            core.add_peer(peer)?;
        }
        let sockets = Sockets::bind(config.listen, config.offloads)
            .map_err(|source| StartError::Listen { listen: config.listen, source })?;
        let listen = sockets
            .local_addr()
            .map_err(|source| StartError::Listen { listen: config.listen, source })?;
        let device = TunDevice::create(config.device, config.offloads.device, config.mtu)
            .map_err(|source| StartError::Device { device: config.device, source })?;
        watch(&poll, device.as_raw_fd(), DEVICE).map_err(StartError::Thread)?;
        watch(&poll, sockets.udp_fd(), NETWORK).map_err(StartError::Thread)?;

        netlink.set_mtu(config.device, u32::from(config.mtu))?;
        if !config.addresses.iter().any(|net| matches!(net, IpNet::V6(_))) {
            // Else the kernel would send router solicitations into the tunnel. A
            // kernel without IPv6 lacks the switch and the solicitations.
            drop(Sysctl::DisableIpv6(Some(config.device)).write("1"));
        }
        for &address in &config.addresses {
            netlink.add_address(config.device, address)?;
        }
        netlink.set_up(config.device)?;
        let mut driver = Self {
            engine: Engine::new(core, device, sockets),
            poll,
            messages,
            netlink,
            device: config.device,
            addresses: config.addresses.clone(),
            listen,
            routed: BTreeSet::new(),
            kernel: Kernel::new(config.offloads.kernel),
        };
        driver.open_raw().map_err(StartError::Raw)?;
        driver.sync_routes()?;
        driver.sync_kernel();
        Ok((waker, driver))
    }

    /// Carries packets until it is told to stop.
    pub(crate) fn serve(&mut self) -> Result<(), EngineError> {
        let mut events = Events::with_capacity(16);
        // What is readable before the first poll counts as ready.
        let (mut device, mut network) = (true, true);
        loop {
            let deadline = self.engine.step_time(Instant::now())?;
            self.kernel.look(&mut self.engine.core, &mut self.netlink);
            let wait = match device || network {
                true => Duration::ZERO,
                false => deadline.saturating_duration_since(Instant::now()),
            };
            match self.poll.poll(&mut events, Some(wait)) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => other.map_err(EngineError::Network)?,
            }
            for event in &events {
                match event.token() {
                    DEVICE => device = true,
                    NETWORK => network = true,
                    _ => {}
                }
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

    fn sync_kernel(&mut self) {
        self.kernel.change(&mut self.engine.core, &mut self.netlink, self.device);
    }

    fn open_raw(&mut self) -> io::Result<()> {
        if !self.engine.core.peers().iter().any(|peer| peer.mode == Mode::IpIp) {
            return Ok(());
        }
        for fd in self.engine.network.open_raw()?.into_iter().flatten() {
            watch(&self.poll, fd, NETWORK)?;
        }
        Ok(())
    }

    fn sync_routes(&mut self) -> Result<(), NetError> {
        let peers = self.engine.core.peers();
        let wanted: BTreeSet<IpNet> = peers.iter().flat_map(|p| p.allowed.clone()).collect();
        for &gone in self.routed.difference(&wanted) {
            self.netlink.delete_route(&Route::on_link(gone, self.device))?;
            self.netlink.delete_route(&Route::unreachable(gone, SHADOW_METRIC))?;
        }
        let new: Vec<IpNet> = wanted.difference(&self.routed).copied().collect();
        // Before the first of them is made, so that a failure half-way is undone.
        self.routed = wanted;
        for new in new {
            self.netlink.replace_route(&Route::unreachable(new, SHADOW_METRIC))?;
            let v6 = matches!(new, IpNet::V6(_));
            let source = self.addresses.iter().map(IpNet::addr).find(|a| a.is_ipv6() == v6);
            self.netlink.replace_route(&Route { source, ..Route::on_link(new, self.device) })?;
        }
        Ok(())
    }
}

impl Serve for Driver {
    fn messages(&self) -> &Receiver<Message> {
        &self.messages
    }

    fn device(&self) -> IfName {
        self.device
    }

    fn snapshot(&mut self) -> Snapshot {
        self.kernel.refresh(&mut self.engine.core, &mut self.netlink);
        let core = &self.engine.core;
        let carried = self.kernel.carried();
        let mut peers = core.peers();
        for peer in &mut peers {
            peer.in_kernel = carried.contains(&peer.public_key);
        }
        Snapshot {
            ipip: self.kernel.path(peers.iter().any(|peer| peer.mode == Mode::IpIp)),
            device: self.device,
            listen: self.listen,
            public_key: core.public_key(),
            peers,
            drops: core.drops(),
        }
    }

    fn change(&mut self, edit: Edit) -> Result<(), TunnelError> {
        edit(&mut self.engine.core)?;
        self.open_raw().map_err(TunnelError::Raw)?;
        self.sync_routes()?;
        let own = own_addresses(&mut self.netlink, &self.addresses)?;
        self.engine.core.set_own_addresses(own);
        self.sync_kernel();
        Ok(())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        for &prefix in &self.routed {
            let shadow = Route::unreachable(prefix, SHADOW_METRIC);
            if let Err(error) = self.netlink.delete_route(&shadow) {
                tracing::warn!(%error, "a route that refuses {prefix} is left");
            }
        }
    }
}

fn watch(poll: &Poll, fd: RawFd, token: Token) -> io::Result<()> {
    poll.registry().register(&mut SourceFd(&fd), token, Interest::READABLE)
}

/// Addresses of the device, and those of other links that are not among them.
fn own_addresses(netlink: &mut Netlink, device: &[IpNet]) -> Result<OwnAddresses, NetError> {
    let inner: Vec<_> = device.iter().map(IpNet::addr).collect();
    let all = netlink.addresses(None)?;
    let outer = all.iter().map(|a| a.net.addr()).filter(|a| !inner.contains(a)).collect();
    Ok(OwnAddresses { inner, outer })
}
