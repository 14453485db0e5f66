//! The tunnel itself, without clock, sockets or threads.
//!
//! Inputs: a packet from the device ([`Core::handle_device`]), a datagram from
//! the network ([`Core::handle_udp`], [`Core::handle_ip`]), the time
//! ([`Core::handle_timeout`]), changes of peers. Outputs: datagrams in an
//! [`Outbox`], inner packets in an [`Inbox`], counters, the next deadline
//! ([`Core::poll_timeout`]).
//!
//! Invariants: every packet that goes in comes out or is counted under one
//! [`DropReason`], either of its peer or, where no peer is known, of the core.
//! No input panics. A prefix has one owner; in ipip mode an outer address has
//! one peer.
//!
//! One clock is not given from outside: boringtun reads its own for session
//! ages and cookies.

mod ipip;
mod outbox;
mod peer;
mod routes;
mod wireguard;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::x25519;
use conet_dataplane::{DropCounts, DropReason, Packet, Pool};
use conet_netsys::IpNet;
use conet_wire::ip::{self, ICMP_ERROR_MAX, IpView};

pub use self::outbox::{Destination, Outbox, Transmit};
use self::peer::Peer;
pub use self::peer::PeerSnapshot;
use self::routes::{Routes, Slot};
use crate::{Mode, PeerConfig, PeerError, PrivateKey, PublicKey};

/// Handshake messages per second, from everybody together, before cookies are
/// asked for. Each initiation is checked twice (here, to find its peer, and in
/// boringtun), so this is 100 a second, the figure of boringtun's own device.
const HANDSHAKES_PER_SECOND: u64 = 200;
/// Session numbers have 24 bits for the peer.
const MAX_PEERS: usize = 1 << 24;

/// Addresses that are ours.
#[derive(Debug, Clone, Default)]
pub struct OwnAddresses {
    /// On the device: ICMP errors come from here.
    pub inner: Vec<IpAddr>,
    /// On other links: an inner packet from one of these would loop.
    pub outer: Vec<IpAddr>,
}

/// Inner packets on their way to the device, and the buffers for them.
#[derive(Debug)]
pub struct Inbox {
    /// Buffers; their capacity bounds the datagrams that are accepted.
    pub pool: Pool,
    /// The packets.
    pub packets: Vec<Packet>,
}

impl Inbox {
    /// An empty inbox whose packets hold up to `capacity` bytes, at least 1,500.
    pub fn new(capacity: usize, keep: usize) -> Self {
        Self { pool: Pool::new(capacity.max(1500), keep), packets: Vec::with_capacity(keep) }
    }
}

/// The sans-IO tunnel.
pub struct Core {
    private: PrivateKey,
    public: x25519::PublicKey,
    limiter: Arc<RateLimiter>,
    peers: Vec<Option<Peer>>,
    by_key: HashMap<PublicKey, Slot>,
    by_address: HashMap<Ipv4Addr, Slot>,
    routes: Routes,
    own: OwnAddresses,
    drops: DropCounts,
    timers: wireguard::Timers,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core")
            .field("public", &self.public_key())
            .field("peers", &self.by_key.len())
            .field("drops", &self.drops)
            .finish_non_exhaustive()
    }
}

impl Core {
    /// A tunnel without peers.
    pub fn new(private: PrivateKey, own: OwnAddresses, now: Instant) -> Self {
        let public = x25519::PublicKey::from(&private.0);
        let limiter = Arc::new(RateLimiter::new(&public, HANDSHAKES_PER_SECOND));
        Self {
            private,
            public,
            limiter,
            peers: Vec::new(),
            by_key: HashMap::new(),
            by_address: HashMap::new(),
            routes: Routes::default(),
            own,
            drops: DropCounts::default(),
            timers: wireguard::Timers::new(now),
        }
    }

    /// Our public key.
    pub fn public_key(&self) -> PublicKey {
        PublicKey(self.public.to_bytes())
    }

    /// Adds a peer.
    ///
    /// # Errors
    /// [`PeerError`]; then nothing has changed.
    pub fn add_peer(&mut self, config: &PeerConfig) -> Result<(), PeerError> {
        let key = config.public_key;
        if key == self.public_key() {
            return Err(PeerError::Ourselves(key));
        }
        if self.by_key.contains_key(&key) {
            return Err(PeerError::Duplicate(key));
        }
        let free = self.peers.iter().position(Option::is_none).unwrap_or(self.peers.len());
        let slot = Slot::try_from(free).ok().filter(|_| free < MAX_PEERS);
        let slot = slot.ok_or(PeerError::TooMany)?;
        let peer = Peer::new(config, &self.private, slot, self.limiter.clone());
        self.check_endpoint(slot, &peer)?;
        self.check_prefixes(slot, &peer.allowed, peer.configured)?;
        if free == self.peers.len() {
            self.peers.push(None);
        }
        self.by_key.insert(key, slot);
        self.index(slot, &peer);
        self.peers[free] = Some(peer);
        Ok(())
    }

    /// Removes a peer and its session.
    ///
    /// # Errors
    /// [`PeerError::Unknown`].
    pub fn remove_peer(&mut self, key: PublicKey) -> Result<(), PeerError> {
        let slot = self.by_key.remove(&key).ok_or(PeerError::Unknown(key))?;
        if let Some(peer) = self.peers.get_mut(slot as usize).and_then(Option::take) {
            self.unindex(&peer);
        }
        Ok(())
    }

    /// Changes how packets travel to a peer. Its session is kept.
    ///
    /// # Errors
    /// [`PeerError`]; then nothing has changed.
    pub fn set_mode(&mut self, key: PublicKey, mode: Mode) -> Result<(), PeerError> {
        self.change(key, |peer| peer.mode = mode)
    }

    /// Changes where a peer is.
    ///
    /// # Errors
    /// [`PeerError`]; then nothing has changed.
    pub fn set_endpoint(
        &mut self,
        key: PublicKey,
        endpoint: Option<SocketAddr>,
    ) -> Result<(), PeerError> {
        self.change(key, |peer| {
            peer.configured = endpoint;
            peer.endpoint = endpoint;
        })
    }

    /// Changes the inner prefixes of a peer.
    ///
    /// # Errors
    /// [`PeerError`]; then nothing has changed.
    pub fn set_allowed(&mut self, key: PublicKey, allowed: &[IpNet]) -> Result<(), PeerError> {
        let allowed: Vec<IpNet> = allowed.iter().map(IpNet::trunc).collect();
        self.change(key, |peer| peer.allowed = allowed)
    }

    /// Changes our own addresses.
    pub fn set_own_addresses(&mut self, own: OwnAddresses) {
        self.own = own;
    }

    /// All peers, in the order of their addition as far as none was removed.
    pub fn peers(&self) -> Vec<PeerSnapshot> {
        self.peers.iter().flatten().map(Peer::snapshot).collect()
    }

    /// Drops that concern no known peer.
    pub fn drops(&self) -> DropCounts {
        self.drops
    }

    /// Counts packets that a port refused.
    pub fn count_refused(&mut self, reason: DropReason, packets: usize) {
        self.drops[reason] += packets as u64;
    }

    /// A packet from the device, to be sent to the peer that owns its
    /// destination. What its sender must be told goes into `back`.
    pub fn handle_device(&mut self, packet: &[u8], out: &mut Outbox, back: &mut Inbox) {
        match self.route(packet) {
            Ok((slot, view)) => {
                if let Err(reason) = self.encapsulate(slot, &view, out, back)
                    && let Some(peer) = self.peer_mut(slot)
                {
                    peer.drops.count(reason);
                }
            }
            Err(reason) => self.drops.count(reason),
        }
    }

    fn route<'a>(&self, packet: &'a [u8]) -> Result<(Slot, IpView<&'a [u8]>), DropReason> {
        let view = IpView::new(packet).map_err(|_| DropReason::Malformed)?;
        if !ip::is_unicast(view.source()) || !ip::is_unicast(view.destination()) {
            return Err(DropReason::NotUnicast);
        }
        let slot = self.routes.owner(view.destination()).ok_or(DropReason::NoRoute)?;
        Ok((slot, view))
    }

    fn encapsulate(
        &mut self,
        slot: Slot,
        view: &IpView<&[u8]>,
        out: &mut Outbox,
        back: &mut Inbox,
    ) -> Result<(), DropReason> {
        let own = &self.own;
        let peer = self.peers.get_mut(slot as usize).and_then(Option::as_mut);
        let peer = peer.ok_or(DropReason::NoRoute)?;
        // The kernel has counted the hop when it routed the packet to the device.
        if view.hops() == 0 {
            return Err(DropReason::NoHops);
        }
        let endpoint = peer.endpoint.map(|e| e.ip().to_canonical());
        if own.outer.contains(&view.source()) || endpoint == Some(view.destination()) {
            return Err(DropReason::Loop);
        }
        let mtu = peer.inner_mtu();
        if view.bytes().len() > usize::from(mtu) {
            // Without DF the kernel fragments to the MTU of the device; what
            // still does not fit here cannot be sent, and says so if it may.
            let told = if view.is_v6() { mtu.max(1280) } else { mtu };
            let from = own.inner.iter().find(|a| a.is_ipv6() == view.is_v6());
            if let Some(&from) = from.filter(|_| view.dont_fragment()) {
                let mut error = [0; ICMP_ERROR_MAX];
                if let Some(len) = ip::too_big(view, from, told, &mut error) {
                    let mut packet = back.pool.take();
                    packet.set_len(len);
                    packet.data_mut().copy_from_slice(&error[..len]);
                    back.packets.push(packet);
                }
            }
            return Err(DropReason::TooBig);
        }
        match peer.mode {
            Mode::WireGuard => wireguard::encapsulate(peer, view, out),
            Mode::IpIp => ipip::encapsulate(peer, view, out),
        }
    }

    /// Checks an inner packet that came from the peer at `slot`.
    fn check_inner<T: AsRef<[u8]>>(&self, slot: Slot, view: &IpView<T>) -> Result<(), DropReason> {
        if !ip::is_unicast(view.source()) || !ip::is_unicast(view.destination()) {
            return Err(DropReason::NotUnicast);
        }
        if view.hops() == 0 {
            return Err(DropReason::NoHops);
        }
        // The longest match over all peers, not this peer's prefixes alone: a
        // peer with a wide prefix may not speak for one with a narrow one.
        match self.routes.owner(view.source()) {
            Some(owner) if owner == slot => Ok(()),
            _ => Err(DropReason::SourceNotAllowed),
        }
    }

    fn peer_mut(&mut self, slot: Slot) -> Option<&mut Peer> {
        self.peers.get_mut(slot as usize).and_then(Option::as_mut)
    }

    /// Counts a drop for the peer at `slot`, or for nobody when there is none.
    fn drop_from(&mut self, slot: Slot, reason: DropReason) {
        match self.peers.get_mut(slot as usize).and_then(Option::as_mut) {
            Some(peer) => peer.drops.count(reason),
            None => self.drops.count(reason),
        }
    }

    /// Applies `edit` to a peer, or puts everything back if the result is not
    /// permitted.
    fn change(&mut self, key: PublicKey, edit: impl FnOnce(&mut Peer)) -> Result<(), PeerError> {
        let slot = *self.by_key.get(&key).ok_or(PeerError::Unknown(key))?;
        let peer = self.peers.get_mut(slot as usize).and_then(Option::take);
        let mut peer = peer.ok_or(PeerError::Unknown(key))?;
        self.unindex(&peer);
        let before = (peer.mode, peer.configured, peer.endpoint, peer.allowed.clone());
        edit(&mut peer);
        let checked = self
            .check_endpoint(slot, &peer)
            .and_then(|()| self.check_prefixes(slot, &peer.allowed, peer.configured));
        if checked.is_err() {
            (peer.mode, peer.configured, peer.endpoint, peer.allowed) = before;
        }
        self.index(slot, &peer);
        self.peers[slot as usize] = Some(peer);
        checked
    }

    fn index(&mut self, slot: Slot, peer: &Peer) {
        for &prefix in &peer.allowed {
            self.routes.insert(prefix, slot);
        }
        if let Some(address) = peer.ipip_endpoint().filter(|_| peer.mode == Mode::IpIp) {
            self.by_address.insert(address, slot);
        }
    }

    fn unindex(&mut self, peer: &Peer) {
        for &prefix in &peer.allowed {
            self.routes.remove(prefix);
        }
        if let Some(address) = peer.ipip_endpoint().filter(|_| peer.mode == Mode::IpIp) {
            self.by_address.remove(&address);
        }
    }

    fn check_endpoint(&self, slot: Slot, peer: &Peer) -> Result<(), PeerError> {
        if peer.mode != Mode::IpIp {
            return Ok(());
        }
        let address = peer.ipip_endpoint().ok_or(PeerError::NeedsIpv4Endpoint(peer.key))?;
        match self.by_address.get(&address).filter(|&&other| other != slot) {
            Some(&other) => Err(PeerError::EndpointTaken {
                endpoint: IpAddr::V4(address),
                owner: self.key_of(other),
            }),
            None => Ok(()),
        }
    }

    /// A prefix must be free, and no endpoint may lie inside one: its packets
    /// would be routed into the tunnel that they carry.
    fn check_prefixes(
        &self,
        slot: Slot,
        allowed: &[IpNet],
        endpoint: Option<SocketAddr>,
    ) -> Result<(), PeerError> {
        let others = || self.peers.iter().flatten();
        let endpoints = others().filter_map(|p| p.configured).chain(endpoint);
        for endpoint in endpoints.map(|e| e.ip().to_canonical()) {
            if let Some(&prefix) = allowed.iter().find(|p| p.contains(&endpoint)) {
                return Err(PeerError::EndpointInside { prefix, endpoint });
            }
        }
        if let Some(endpoint) = endpoint.map(|e| e.ip().to_canonical()) {
            let taken = others().flat_map(|p| &p.allowed).find(|p| p.contains(&endpoint));
            if let Some(&prefix) = taken {
                return Err(PeerError::EndpointInside { prefix, endpoint });
            }
        }
        for &prefix in allowed {
            if let Some(other) = self.routes.owner_of_prefix(prefix).filter(|&o| o != slot) {
                return Err(PeerError::PrefixTaken { prefix, owner: self.key_of(other) });
            }
        }
        Ok(())
    }

    fn key_of(&self, slot: Slot) -> PublicKey {
        let peer = self.peers.get(slot as usize).and_then(Option::as_ref);
        peer.map_or(self.public_key(), |p| p.key)
    }
}
