//! The handle of a tunnel that runs on a thread of its own.
//!
//! The thread owns the engine and everything below it; the handle sends it messages and
//! gets copies back. What the thread does is the driver's of the system (`os`).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use conet_dataplane::DropCounts;
use ipnet::IpNet;

use crate::os::{Driver, Waker};
use crate::{
    Config, Core, DeviceName, Mode, NetError, PeerConfig, PeerError, PeerSnapshot, PresharedKey,
    PublicKey,
};

/// Why a tunnel did not start. Nothing of it remains.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The TUN device could not be made; EBUSY means that the name is in use.
    #[error("cannot make TUN device {device}")]
    Device {
        /// Its name.
        device: DeviceName,
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
    /// The raw sockets for IP-in-IP could not be opened; they need CAP_NET_RAW. Windows
    /// has none of use.
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
    pub device: DeviceName,
    /// Where WireGuard listens.
    pub listen: SocketAddr,
    /// Who we are.
    pub public_key: PublicKey,
    /// The peers.
    pub peers: Vec<PeerSnapshot>,
    /// Drops that concern no known peer.
    pub drops: DropCounts,
    /// Where packets of mode `ipip` are carried.
    #[cfg(target_os = "linux")]
    pub ipip: crate::IpipPath,
}

impl Snapshot {
    /// The peer of that key.
    pub fn peer(&self, key: PublicKey) -> Option<&PeerSnapshot> {
        self.peers.iter().find(|peer| peer.public_key == key)
    }
}

/// What the handle asks of the thread.
pub(crate) enum Message {
    Snapshot(SyncSender<Snapshot>),
    Change(Edit, Answer),
    Stop,
}

pub(crate) type Edit = Box<dyn FnOnce(&mut Core) -> Result<(), PeerError> + Send>;
pub(crate) type Answer = SyncSender<Result<(), TunnelError>>;

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
        let (messages, inbox) = mpsc::channel();
        let (waker, driver) = Driver::new(&config, inbox)?;
        let thread = thread::Builder::new()
            .name("conet-tunnel".into())
            .spawn(move || run(driver))
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

/// What a driver does besides carrying packets.
pub(crate) trait Serve {
    /// What the handle has sent.
    fn messages(&self) -> &Receiver<Message>;
    /// Whose packets it carries.
    fn device(&self) -> DeviceName;
    /// Copies of all counters and settings.
    fn snapshot(&mut self) -> Snapshot;
    /// Makes a change, and what follows from it.
    fn change(&mut self, edit: Edit) -> Result<(), TunnelError>;
}

/// Does what the handle has asked for; says whether to go on.
pub(crate) fn take_messages(driver: &mut impl Serve) -> bool {
    while let Ok(message) = driver.messages().try_recv() {
        match message {
            Message::Stop => return false,
            // Whoever asked may have gone; that is no concern of ours.
            Message::Snapshot(reply) => drop(reply.send(driver.snapshot())),
            Message::Change(edit, reply) => drop(reply.send(driver.change(edit))),
        }
    }
    true
}

fn run(mut driver: Driver) {
    if let Err(error) = driver.serve() {
        tracing::error!(device = %driver.device(), error = &error as &dyn std::error::Error,
            "the tunnel has stopped");
    }
}

/// The time of day; before 1970 it is 1970.
pub(crate) fn unix_time() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}
