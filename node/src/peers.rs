//! The peers as the daemon knows them: configured, and what each has said.
//!
//! A session stands or falls in the transport's endpoint, which keeps it alive by
//! itself. When one stands, each side says [`Hello`]; what the other said is kept
//! until the session falls.
//!
//! Invariant: only peers with an identity have sessions, so nothing here is said
//! by one that the configuration does not name.

use std::sync::Arc;
use std::time::Duration;

use conet_transport::endpoint::{CallFailed, Endpoint, EndpointConfig, TcpFallback, Ticket};
use conet_transport::session::handshake::{PrivateKey, PublicKey};
use conet_wire::peer::{Answer, Ask, Hello, Refusal, VERSION};
use thiserror::Error;

use crate::config::{Config, PeerConfig};

/// How long a greeting may take. It is sent on a session that stands.
const HELLO_LIMIT: Duration = Duration::from_secs(10);

/// Why another node did not answer a process message.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AskError {
    /// The configuration has no such node.
    #[error("no peer of that name is a conet node; list them with conet peers")]
    NoSuchPeer,
    /// The call failed.
    #[error("the peer did not answer: {0}; see conet peers")]
    Call(#[from] CallFailed),
    /// The peer will not.
    #[error("the peer refuses: {0}")]
    Refused(#[from] Refusal),
    /// The peer answered something else.
    #[error("the peer's answer makes no sense; run one version of conet on both nodes")]
    Malformed,
}

impl AskError {
    /// Whether the peer may have acted on the message all the same.
    #[must_use]
    pub fn may_have_run(&self) -> bool {
        match self {
            Self::Call(failed) => failed.may_have_run(),
            Self::Malformed => true,
            Self::NoSuchPeer | Self::Refused(_) => false,
        }
    }
}

/// Answers one call of a peer, from whichever thread; dropped unused, it tells
/// the peer that the call was not run.
#[derive(Debug)]
pub struct PeerResponder {
    endpoint: Endpoint,
    ticket: Option<Ticket>,
}

impl PeerResponder {
    pub(crate) fn new(endpoint: &Endpoint, ticket: Ticket) -> Self {
        Self { endpoint: endpoint.clone(), ticket: Some(ticket) }
    }

    /// Answers.
    pub fn answer(mut self, answer: &Answer) {
        if let Some(ticket) = self.ticket.take()
            && let Err(error) = self.endpoint.reply(ticket, answer.to_bytes())
        {
            // The peer has given up, or the daemon is ending.
            tracing::debug!(%error, "an answer to a peer came too late");
        }
    }
}

impl Drop for PeerResponder {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take()
            && let Err(error) = self.endpoint.refuse(ticket)
        {
            tracing::debug!(%error, "a refusal to a peer came too late");
        }
    }
}

/// What is known of a peer beside its configuration.
#[derive(Debug, Clone, Default)]
pub(crate) struct PeerState {
    /// Whether a session with it stands.
    pub(crate) up: bool,
    /// What it said when the session came to stand.
    pub(crate) hello: Option<Hello>,
}

/// All peers, in the configuration's order.
#[derive(Debug)]
pub(crate) struct Peers {
    config: Arc<Config>,
    states: Vec<PeerState>,
}

impl Peers {
    pub(crate) fn new(config: Arc<Config>) -> Self {
        let states = vec![PeerState::default(); config.peers.len()];
        Self { config, states }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&PeerConfig, &PeerState)> {
        self.config.peers.iter().zip(&self.states)
    }

    /// The session with a peer stands: greets it.
    pub(crate) fn on_up(&mut self, endpoint: &Endpoint, key: PublicKey, hello: Hello) {
        if let Some(index) = self.index(key) {
            self.states[index].up = true;
            tracing::info!(peer = self.config.peers[index].name, "the session stands");
            // Its answer says what its own greeting says too: nobody waits for it.
            drop(endpoint.begin(key, Ask::Hello(hello).to_bytes(), HELLO_LIMIT));
        }
    }

    /// The session with a peer stands no more.
    pub(crate) fn on_down(&mut self, key: PublicKey) {
        if let Some(index) = self.index(key) {
            self.states[index] = PeerState::default();
            tracing::info!(peer = self.config.peers[index].name, "the session has ended");
        }
    }

    /// A peer has greeted.
    pub(crate) fn on_hello(&mut self, key: PublicKey, hello: Hello) {
        if let Some(index) = self.index(key) {
            if hello.protocol != VERSION {
                let peer = &self.config.peers[index].name;
                tracing::warn!(peer, theirs = hello.protocol, ours = VERSION, "other protocol");
            }
            self.states[index].hello = Some(hello);
        }
    }

    /// The configuration of a peer, by the key of its session.
    pub(crate) fn config(&self, key: PublicKey) -> Option<&PeerConfig> {
        self.index(key).map(|index| &self.config.peers[index])
    }

    fn index(&self, key: PublicKey) -> Option<usize> {
        self.config.peers.iter().position(|peer| session_key(peer) == Some(key))
    }
}

/// The key of a peer's session; none for a peer that only tunnels.
pub(crate) fn session_key(peer: &PeerConfig) -> Option<PublicKey> {
    peer.key.identity().map(|key| PublicKey(key.x25519().0))
}

/// What the endpoint is to start with.
pub(crate) fn endpoint_config(config: &Config) -> EndpointConfig {
    let secret = config.node.identity.x25519_secret();
    let mut endpoint = EndpointConfig::new(PrivateKey::new(*secret));
    if config.node.tcp_fallback {
        // The port is that of processes' links; see `moving::guests`.
        endpoint.tcp_fallback = TcpFallback::Handed;
    }
    endpoint.peers =
        config.peers.iter().filter_map(|peer| Some((session_key(peer)?, peer.endpoint))).collect();
    endpoint
}

/// Asks a peer's process manager, and waits for the answer.
pub(crate) fn ask(
    endpoint: &Endpoint,
    config: &Config,
    peer: &str,
    message: Vec<u8>,
    limit: Duration,
) -> Result<Vec<u8>, AskError> {
    let key = config.peer(peer).and_then(session_key).ok_or(AskError::NoSuchPeer)?;
    let answer = endpoint.call(key, Ask::Process(message).to_bytes(), limit)?;
    match Answer::parse(&answer) {
        Ok(Answer::Process(message)) => Ok(message),
        Ok(Answer::Refused(refusal)) => Err(refusal.into()),
        Ok(Answer::Hello(_)) | Err(_) => Err(AskError::Malformed),
    }
}
