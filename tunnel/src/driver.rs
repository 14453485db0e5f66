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
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use conet_dataplane::DropCounts;
use conet_netsys::{IfName, IpNet, NetError, Netlink, Route, Sysctl};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};

use crate::engine::EngineError;
use crate::kernel::{IpipPath, Kernel};
use crate::sockets::Sockets;
use crate::tun::TunDevice;
use crate::{
    Config, Core, Engine, Mode, OwnAddresses, PeerConfig, PeerError, PeerSnapshot, PresharedKey,
    PublicKey,
};

const DEVICE: Token = Token(0);
const NETWORK: Token = Token(1);
const MESSAGE: Token = Token(2);
/// Metric of the shadow routes: above whatever a person or a DHCP client sets.
const SHADOW_METRIC: u32 = u32::MAX - 1;

/// Why a tunnel did not start. Nothing of it remains.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The TUN device could not be made; EBUSY means that the name is in use.
    #[error("cannot make TUN device {device}")]
    Device {
        /// Its name.
        device: IfName,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The UDP socket could not be bound.
    #[error("cannot listen for WireGuard on {listen}")]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The raw sockets for IP-in-IP could not be opened; they need CAP_NET_RAW.
    #[error("cannot open the raw sockets for ipip mode")]
    Raw(#[source] io::Error),
    /// An address or a route was refused.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A peer cannot be as configured.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// No thread or no poll descriptor.
    #[error("cannot start the tunnel's thread")]
    Thread(#[source] io::Error),
}

/// Why a running tunnel did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The peer cannot be so; nothing has changed.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The change is made, but a route was refused.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The raw sockets for ipip mode could not be opened.
    #[error("cannot open the raw sockets for ipip mode")]
    Raw(#[source] io::Error),
    /// The tunnel's thread has ended; its device is gone.
    #[error("the tunnel has stopped")]
    Stopped,
}

/// What is known about a tunnel at one moment.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Snapshot {
    /// Name of the device.
    pub device: IfName,
    /// Where WireGuard listens.
    pub listen: SocketAddr,
    /// Who we are.
    pub public_key: PublicKey,
    /// The peers.
    pub peers: Vec<PeerSnapshot>,
    /// Drops that concern no known peer.
    pub drops: DropCounts,
    /// Where packets of mode `ipip` are carried.
    pub ipip: IpipPath,
}

impl Snapshot {
    /// The peer of that key.
    pub fn peer(&self, key: PublicKey) -> Option<&PeerSnapshot> {
        self.peers.iter().find(|peer| peer.public_key == key)
    }
}

enum Message {
    Snapshot(SyncSender<Snapshot>),
    Change(Edit, Answer),
    Stop,
}

type Edit = Box<dyn FnOnce(&mut Core) -> Result<(), PeerError> + Send>;
type Answer = SyncSender<Result<(), TunnelError>>;

/// A running tunnel. Dropping it stops it.
#[derive(Debug)]
pub struct Tunnel {
    messages: Sender<Message>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl Tunnel {
    /// Starts a tunnel in the network namespace of the calling thread, where it
    /// stays.
    ///
    /// # Errors
    /// [`StartError`]; then nothing of it remains.
    pub fn start(config: Config) -> Result<Self, StartError> {
        let poll = Poll::new().map_err(StartError::Thread)?;
        let waker = Arc::new(Waker::new(poll.registry(), MESSAGE).map_err(StartError::Thread)?);
        let (messages, inbox) = mpsc::channel();
        let driver = Driver::new(&config, poll, inbox)?;
        let thread = thread::Builder::new()
            .name("conet-tunnel".into())
            .spawn(move || driver.run())
            .map_err(StartError::Thread)?;
        Ok(Self { messages, waker, thread: Some(thread) })
    }

    /// Copies of all counters and settings.
    ///
    /// # Errors
    /// [`TunnelError::Stopped`].
    pub fn snapshot(&self) -> Result<Snapshot, TunnelError> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Message::Snapshot(reply))?;
        answer.recv().map_err(|_| TunnelError::Stopped)
    }

    /// Adds a peer and its routes.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub fn add_peer(&self, peer: PeerConfig) -> Result<(), TunnelError> {
        self.change(move |core| core.add_peer(&peer))
    }

    /// Removes a peer, its session and its routes.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub fn remove_peer(&self, key: PublicKey) -> Result<(), TunnelError> {
        self.change(move |core| core.remove_peer(key))
    }

    /// Changes how packets travel to a peer; both ends must agree.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub fn set_mode(&self, key: PublicKey, mode: Mode) -> Result<(), TunnelError> {
        self.change(move |core| core.set_mode(key, mode))
    }

    /// Changes where a peer is.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub fn set_endpoint(&self, key: PublicKey, to: Option<SocketAddr>) -> Result<(), TunnelError> {
        self.change(move |core| core.set_endpoint(key, to))
    }

    /// Changes the inner prefixes of a peer, and the routes with them.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub fn set_allowed(&self, key: PublicKey, allowed: Vec<IpNet>) -> Result<(), TunnelError> {
        self.change(move |core| core.set_allowed(key, &allowed))
    }

    /// Changes the seconds between keepalives to a peer.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub fn set_keepalive(&self, key: PublicKey, to: Option<u16>) -> Result<(), TunnelError> {
        self.change(move |core| core.set_keepalive(key, to))
    }

    /// Changes the secret shared with a peer, from the next handshake on.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub fn set_preshared_key(
        &self,
        key: PublicKey,
        to: Option<PresharedKey>,
    ) -> Result<(), TunnelError> {
        self.change(move |core| core.set_preshared_key(key, to))
    }

    /// Whether its thread still runs; it ends when somebody deletes the device.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Stops the tunnel; when this returns, its device and routes are gone.
    pub fn stop(self) {
        drop(self);
    }

    fn change(
        &self,
        edit: impl FnOnce(&mut Core) -> Result<(), PeerError> + Send + 'static,
    ) -> Result<(), TunnelError> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Message::Change(Box::new(edit), reply))?;
        answer.recv().map_err(|_| TunnelError::Stopped)?
    }

    fn send(&self, message: Message) -> Result<(), TunnelError> {
        self.messages.send(message).map_err(|_| TunnelError::Stopped)?;
        self.waker.wake().map_err(|_| TunnelError::Stopped)
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        // A thread that has ended by itself takes no message; both are fine.
        drop(self.send(Message::Stop));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the tunnel's thread panicked");
        }
    }
}

struct Driver {
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
    fn new(config: &Config, poll: Poll, messages: Receiver<Message>) -> Result<Self, StartError> {
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
        let device = TunDevice::create(config.device, config.offloads.device)
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
        Ok(driver)
    }

    fn run(mut self) {
        if let Err(error) = self.serve() {
            tracing::error!(device = %self.device, error = &error as &dyn std::error::Error,
                "the tunnel has stopped");
        }
    }

    fn serve(&mut self) -> Result<(), EngineError> {
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
            if !self.take_messages() {
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

    /// Says whether to go on.
    fn take_messages(&mut self) -> bool {
        while let Ok(message) = self.messages.try_recv() {
            match message {
                Message::Stop => return false,
                // Whoever asked may have gone; that is no concern of ours.
                Message::Snapshot(reply) => drop(reply.send(self.snapshot())),
                Message::Change(edit, reply) => drop(reply.send(self.change(edit))),
            }
        }
        true
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

/// The time of day; before 1970 it is 1970.
fn unix_time() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
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
