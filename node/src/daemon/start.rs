//! Putting a daemon together, and taking it apart.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use conet_netsys::{IfName, IpNet, NameError, NetError};
use conet_transport::endpoint::{Endpoint, EndpointEvent, StartError as SessionError};
use conet_tunnel::{DEFAULT_MTU, StartError as TunnelStartError, Tunnel};
use mio::unix::SourceFd;
use mio::{Interest, Poll, Waker};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use signal_hook::consts::{SIGINT, SIGTERM};
use thiserror::Error;

use super::forwards::Forwards;
use super::guests::{GuestError, Guests, Post};
use super::{CONTROL, Daemon, Message, NodeHandle, SIGNALS, WAKE};
use crate::config::{Config, PeerConfig};
use crate::control::ControlServer;
use crate::peers::{Peers, endpoint_config};
use crate::processes::Processes;

/// The tunnel's device. One daemon per network namespace has it.
const DEVICE: &str = "conet0";
/// The file whose lock is the daemon's.
const LOCK: &str = "daemon.lock";

/// Why a daemon does not start or go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// Another one has the state directory.
    #[error("a daemon runs already on {}; end it first: conet down", state_dir.display())]
    Running {
        /// The state directory.
        state_dir: PathBuf,
    },
    /// The state directory cannot be used.
    #[error("cannot use {} ({source}); run as root, or set state_dir in conet.toml", path.display())]
    State {
        /// The directory or a file in it.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The control socket cannot be made.
    #[error("cannot listen at {} ({source}); set socket in conet.toml", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The sessions cannot start.
    #[error("{}; see address and port in conet.toml", chain(.0))]
    Sessions(#[source] SessionError),
    /// The tunnel cannot start.
    #[error("{}; see address, wireguard_port and the peers in conet.toml", chain(.0))]
    Tunnel(#[source] TunnelStartError),
    /// A guest cannot be attached.
    #[error("{}", chain(.0))]
    Guest(#[from] GuestError),
    /// The rules for guests cannot be put in force.
    #[error("{}; or do without: shared_address = false, no forwards, host_ports = [\"all\"]", chain(.0))]
    Rules(#[source] NetError),
    /// A name that the kernel does not take.
    #[error("not a name for a link: {0}; this is a bug, report it")]
    Name(#[from] NameError),
    /// The machine is out of something that a daemon needs.
    #[error("cannot {step}: {source}; free memory or descriptors, and try again")]
    Resource {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        // Some errors show their cause themselves.
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

impl DaemonError {
    fn resource(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Resource { step, source }
    }
}

/// Runs a daemon in the calling thread's network namespace until it is asked to
/// end. `processes` makes the process manager, which keeps the handle for its
/// threads.
///
/// # Errors
///
/// [`DaemonError`]; then nothing that this call has made remains.
pub fn run<P: Processes>(
    config: Config,
    processes: impl FnOnce(NodeHandle<P::Event>) -> P,
) -> Result<(), DaemonError> {
    // A lab starts it by another name.
    if let Err(error) = rustix::thread::set_name(c"conet") {
        tracing::warn!(%error, "the process keeps its name");
    }
    let config = Arc::new(config);
    if config.peers.iter().any(|peer| peer.grants.guests_from)
        && conet_netsys::userns::has_one_id().unwrap_or(false)
    {
        tracing::warn!("there is one id here: programs of others run under this node's own");
    }
    let _lock = lock(&config.node.state_dir)?;
    let poll = Poll::new().map_err(DaemonError::resource("poll"))?;
    let waker = Waker::new(poll.registry(), WAKE).map_err(DaemonError::resource("poll"))?;
    let waker = Arc::new(waker);
    let signals = watch_signals(&poll).map_err(DaemonError::resource("watch for signals"))?;
    let (sender, messages) = channel();

    let listen = SocketAddr::new(config.node.address, config.node.port);
    let sessions =
        Endpoint::start(listen, endpoint_config(&config)).map_err(DaemonError::Sessions)?;
    forward(sessions.events, sender.clone(), Arc::clone(&waker))?;
    let tunnel = Tunnel::start(tunnel_config(&config)?).map_err(DaemonError::Tunnel)?;
    let post = poster(sender.clone(), Arc::clone(&waker));
    let (mut guests, forwards) = start_guests(&config, post)?;
    let control =
        ControlServer::bind(&config.node.socket, poll.registry(), CONTROL, Arc::clone(&waker));
    let control = match control {
        Ok(control) => control,
        Err(source) => {
            forwards.release(guests.release());
            return Err(DaemonError::Socket { path: config.node.socket.clone(), source });
        }
    };
    let handle = NodeHandle {
        config: Arc::clone(&config),
        endpoint: sessions.endpoint.clone(),
        messages: sender,
        waker,
    };
    let mut daemon = Daemon {
        peers: Peers::new(Arc::clone(&config)),
        config,
        started: Instant::now(),
        poll,
        signals,
        messages,
        endpoint: sessions.endpoint,
        tunnel,
        control,
        guests,
        forwards,
        processes: processes(handle),
        ending: false,
    };
    tracing::info!(node = daemon.config.node.name, %listen, "up");
    let served = daemon.serve().map_err(DaemonError::resource("poll"));
    daemon.control.close(daemon.poll.registry());
    daemon.endpoint.close();
    daemon.tunnel.stop();
    daemon.forwards.release(daemon.guests.release());
    if !sessions.thread.join() {
        tracing::error!("the endpoint's thread panicked");
    }
    tracing::info!("down");
    served
}

/// Attaches the guests, and puts the rules for them in force.
fn start_guests(config: &Arc<Config>, post: Post) -> Result<(Guests, Forwards), DaemonError> {
    let device = IfName::new(DEVICE)?;
    let mut guests = Guests::start(Arc::clone(config), post)?;
    match Forwards::start(Arc::clone(config), device, &guests) {
        Ok(forwards) => Ok((guests, forwards)),
        Err(error) => {
            guests.release();
            Err(DaemonError::Rules(error))
        }
    }
}

/// Takes the state directory for this daemon alone; the kernel gives it up with
/// the process, however that ends.
fn lock(state_dir: &Path) -> Result<File, DaemonError> {
    let state = |path: &Path| {
        let path = path.to_owned();
        move |source| DaemonError::State { path, source }
    };
    DirBuilder::new().recursive(true).mode(0o755).create(state_dir).map_err(state(state_dir))?;
    let path = state_dir.join(LOCK);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(state(&path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(DaemonError::Running { state_dir: state_dir.to_owned() }),
        Err(error) => Err(state(&path)(error.into())),
    }
}

/// A pipe that SIGTERM and SIGINT write to.
fn watch_signals(poll: &Poll) -> io::Result<UnixStream> {
    use std::os::fd::AsRawFd;
    let (read, write) = UnixStream::pair()?;
    read.set_nonblocking(true)?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
    }
    poll.registry().register(&mut SourceFd(&read.as_raw_fd()), SIGNALS, Interest::READABLE)?;
    Ok(read)
}

/// How threads that work on guests tell the control thread.
fn poster<E: Send + 'static>(sender: Sender<Message<E>>, waker: Arc<Waker>) -> Post {
    Arc::new(move |event| {
        // After the daemon's end nobody hears it; the next one finds the guest.
        if sender.send(Message::Guest(Box::new(event))).is_ok()
            && let Err(error) = waker.wake()
        {
            tracing::warn!(%error, "cannot wake the control thread; the event waits");
        }
    })
}

/// Passes the endpoint's events on to the control thread, until the endpoint ends.
fn forward<E: Send + 'static>(
    events: Receiver<EndpointEvent>,
    messages: Sender<Message<E>>,
    waker: Arc<Waker>,
) -> Result<(), DaemonError> {
    let pass = move || {
        for event in events {
            // The control thread has ended, or cannot be woken: nobody listens.
            if messages.send(Message::Session(event)).is_err() || waker.wake().is_err() {
                return;
            }
        }
    };
    let thread = thread::Builder::new().name("conet-events".to_owned()).spawn(pass);
    thread.map(drop).map_err(DaemonError::resource("start a thread"))
}

fn tunnel_config(config: &Config) -> Result<conet_tunnel::Config, DaemonError> {
    let node = &config.node;
    Ok(conet_tunnel::Config {
        device: IfName::new(DEVICE)?,
        private_key: conet_tunnel::PrivateKey::from_bytes(*node.tunnel_secret()),
        listen: SocketAddr::new(node.address, node.wireguard_port),
        addresses: node
            .overlay
            .gateways()
            .chain(node.tunnel_addresses.iter().copied())
            .map(IpNet::from)
            .collect(),
        mtu: DEFAULT_MTU,
        offloads: node.offloads,
        peers: config.peers.iter().map(tunnel_peer).collect(),
    })
}

fn tunnel_peer(peer: &PeerConfig) -> conet_tunnel::PeerConfig {
    use crate::config::Mode;
    let (mode, endpoint) = match peer.mode {
        Mode::WireGuard => (conet_tunnel::Mode::WireGuard, peer.wireguard_endpoint),
        Mode::IpUdp => (conet_tunnel::Mode::IpUdp, peer.wireguard_endpoint),
        Mode::IpIp => (conet_tunnel::Mode::IpIp, peer.endpoint.or(peer.wireguard_endpoint)),
    };
    let key = conet_tunnel::PublicKey(peer.tunnel_key().0);
    let seconds = |keepalive: std::time::Duration| u16::try_from(keepalive.as_secs()).ok();
    conet_tunnel::PeerConfig {
        mode,
        keepalive: peer.persistent_keepalive.and_then(seconds),
        preshared_key: peer.preshared_key,
        ..conet_tunnel::PeerConfig::new(key, endpoint, peer.allowed_ips.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_daemon_has_a_state_directory() {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().join("a/b");
        let held = lock(&state_dir).unwrap();
        let error = lock(&state_dir).unwrap_err();
        assert!(matches!(error, DaemonError::Running { .. }), "{error}");
        drop(held);
        lock(&state_dir).unwrap();
    }

    #[test]
    fn a_chain_of_causes_is_one_line() {
        let listen: SocketAddr = "192.0.2.1:1".parse().unwrap();
        let source = io::Error::from(io::ErrorKind::AddrInUse);
        let error = DaemonError::Tunnel(TunnelStartError::Listen { listen, source });
        assert_eq!(
            error.to_string(),
            "cannot listen for WireGuard on 192.0.2.1:1: address in use; see address, \
             wireguard_port and the peers in conet.toml"
        );
    }
}
