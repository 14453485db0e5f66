//! The tunnel itself, without clock, sockets or threads.
//!
//! Inputs: a packet from the device ([`Core::handle_device`]), a datagram from
//! the network ([`Core::handle_udp`], [`Core::handle_ip`]), the time
//! ([`Core::advance`], [`Core::handle_timeout`]), changes of peers. Outputs: datagrams
//! in an [`Outbox`], the place of an inner packet within its datagram, packets for
//! senders in [`Replies`], counters, the next deadline ([`Core::poll_timeout`]).
//!
//! Invariants: every packet that goes in comes out or is counted under one
//! [`DropReason`], either of its peer or, where no peer is known, of the core.
//! No input panics. A prefix has one owner; in ipip mode an outer address has
//! one peer, in ip-udp mode an address and port.

mod bare;
#[cfg(target_os = "linux")]
mod carried;
mod outbox;
mod peer;
mod replies;
mod routes;
mod wireguard;

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use conet_dataplane::{DropCounts, DropReason};
use conet_wire::ip::{self, IpView};
use ipnet::IpNet;

#[cfg(target_os = "linux")]
pub(crate) use self::carried::{Carried, IpipView};
pub use self::outbox::{Destination, Outbox, Transmit};
pub use self::peer::PeerSnapshot;
use self::peer::{LEAST_V6_MTU, Peer, canonical};
pub use self::replies::Replies;
use self::routes::{Routes, Slot};
use crate::noise::{Gate, Identity};
use crate::{Mode, Outgoing, PeerConfig, PeerError, PresharedKey, PrivateKey, PublicKey};

/// Session numbers have 24 bits for the peer.
const MAX_PEERS: Slot = 1 << 24;

impl OwnAddresses {
    /// Where an error about a packet comes from: the device. A host takes nothing from
    /// its own address that comes from outside, so it hears of its own packets from
    /// where they were going; and so does whoever speaks a family that the device does
    /// not.
    fn error_source(&self, packet: &IpView<&[u8]>) -> IpAddr {
        let own = self.inner.iter().find(|a| a.is_ipv6() == packet.is_v6());
        match own {
            Some(&own) if own != packet.source() => own,
            _ => packet.destination(),
        }
    }
}

/// Ways that are asked about at a time; each takes some microseconds.
const WAYS: usize = 256;
/// Longest inner packet: with any mode's overhead it is still one UDP datagram.
const LONGEST: usize = 65_000;

/// Addresses that are ours.
#[derive(Debug, Clone, Default)]
pub struct OwnAddresses {
    /// On the device: ICMP errors come from here.
    pub inner: Vec<IpAddr>,
    /// On other links: an inner packet from one of these would loop.
    pub outer: Vec<IpAddr>,
}

/// The sans-IO tunnel.
pub struct Core {
    us: Identity,
    gate: Gate,
    now: Instant,
    /// Time of day less `began`, for the timestamps of handshakes.
    unix: Duration,
    began: Instant,
    peers: Vec<Option<Peer>>,
    by_key: HashMap<PublicKey, Slot>,
    /// Peers in ipip mode.
    by_address: HashMap<Ipv4Addr, Slot>,
    /// Peers in ip-udp mode.
    by_endpoint: HashMap<SocketAddr, Slot>,
    /// All peers, by the address that the configuration has: to refuse prefixes that
    /// hold one, and to tell a peer in another mode from a stranger.
    by_host: BTreeSet<(IpAddr, Slot)>,
    /// Slots that were left.
    free: BTreeSet<Slot>,
    /// Where asking for ways goes on.
    asked: usize,
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
    /// A tunnel without peers; `unix` is the time of day at `now`.
    pub fn new(private: PrivateKey, own: OwnAddresses, now: Instant, unix: Duration) -> Self {
        Self {
            us: Identity::new(private.0),
            gate: Gate::default(),
            now,
            unix,
            began: now,
            peers: Vec::new(),
            by_key: HashMap::new(),
            by_address: HashMap::new(),
            by_endpoint: HashMap::new(),
            by_host: BTreeSet::new(),
            free: BTreeSet::new(),
            asked: 0,
            routes: Routes::default(),
            own,
            drops: DropCounts::default(),
            timers: wireguard::Timers::new(now),
        }
    }

    /// Our public key.
    pub fn public_key(&self) -> PublicKey {
        PublicKey(self.us.public.to_bytes())
    }

    /// Tells the time. It never goes back.
    pub fn advance(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    /// The time, as it was last told.
    pub fn now(&self) -> Instant {
        self.now
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
        let end = Slot::try_from(self.peers.len()).ok().filter(|&end| end < MAX_PEERS);
        let slot = self.free.first().copied().or(end).ok_or(PeerError::TooMany)?;
        let peer = Peer::new(config, &self.us, slot, self.now);
        self.check_endpoint(slot, &peer)?;
        self.check_prefixes(slot, &peer.allowed, peer.configured)?;
        if !self.free.remove(&slot) {
            self.peers.push(None);
        }
        self.by_key.insert(key, slot);
        self.index(slot, &peer);
        self.peers[slot as usize] = Some(peer);
        Ok(())
    }

    /// Removes a peer and its session.
    ///
    /// # Errors
    /// [`PeerError::Unknown`].
    pub fn remove_peer(&mut self, key: PublicKey) -> Result<(), PeerError> {
        let slot = self.by_key.remove(&key).ok_or(PeerError::Unknown(key))?;
        if let Some(peer) = self.peers.get_mut(slot as usize).and_then(Option::take) {
            self.unindex(slot, &peer);
            self.free.insert(slot);
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
            peer.endpoint = endpoint.map(canonical);
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

    /// Changes the seconds between keepalives to a peer; `None` is none.
    ///
    /// # Errors
    /// [`PeerError::Unknown`].
    pub fn set_keepalive(&mut self, key: PublicKey, to: Option<u16>) -> Result<(), PeerError> {
        let now = self.now;
        self.change(key, |peer| {
            peer.keepalive = to;
            peer.tunn.set_keepalive(to, now);
        })
    }

    /// Changes the secret shared with a peer, from the next handshake on.
    ///
    /// # Errors
    /// [`PeerError::Unknown`].
    pub fn set_preshared_key(
        &mut self,
        key: PublicKey,
        to: Option<PresharedKey>,
    ) -> Result<(), PeerError> {
        let slot = *self.by_key.get(&key).ok_or(PeerError::Unknown(key))?;
        let peer = self.peers.get_mut(slot as usize).and_then(Option::as_mut);
        peer.ok_or(PeerError::Unknown(key))?.tunn.set_preshared(&self.us, to.map(|key| key.0));
        Ok(())
    }

    /// Changes our own addresses.
    pub fn set_own_addresses(&mut self, own: OwnAddresses) {
        self.own = own;
    }

    /// Asks `path_mtu` about the ways to all peers that were sent to since the last
    /// time, some hundred at most; the next call goes on. What it does not know is what
    /// the configuration says.
    pub fn ask_ways(&mut self, mut path_mtu: impl FnMut(Destination) -> Option<u16>) {
        let (mut left, count) = (WAYS, self.peers.len());
        for _ in 0..count {
            self.asked = (self.asked + 1) % count;
            let Some(peer) = &mut self.peers[self.asked] else { continue };
            if let Some(way) = peer.take_way() {
                peer.set_path_mtu(path_mtu(way));
                left -= 1;
                if left == 0 {
                    return;
                }
            }
        }
    }

    /// All peers, in the order of their addition as far as none was removed.
    pub fn peers(&self) -> Vec<PeerSnapshot> {
        self.peers.iter().flatten().map(|peer| peer.snapshot(self.now)).collect()
    }

    /// Drops that concern no known peer.
    pub fn drops(&self) -> DropCounts {
        self.drops
    }

    /// Counts packets that a port refused.
    pub fn count_refused(&mut self, reason: DropReason, packets: usize) {
        self.drops[reason] += packets as u64;
    }

    /// A packet from the device, or many in one piece, to be sent to the peer that
    /// owns its destination. What its sender must be told goes into `back`.
    pub fn handle_device(&mut self, packet: &Outgoing<'_>, out: &mut Outbox, back: &mut Replies) {
        let packets = packet.count() as u64;
        match self.route(packet.view()) {
            Ok(slot) => {
                if let Err(reason) = self.encapsulate(slot, packet, out, back)
                    && let Some(peer) = self.peer_mut(slot)
                {
                    peer.drops[reason] += packets;
                }
            }
            Err(reason) => self.drops[reason] += packets,
        }
    }

    fn route(&self, view: &IpView<&[u8]>) -> Result<Slot, DropReason> {
        if !ip::is_unicast(view.source()) || !ip::is_unicast(view.destination()) {
            return Err(DropReason::NotUnicast);
        }
        self.routes.owner(view.destination()).ok_or(DropReason::NoRoute)
    }

    fn encapsulate(
        &mut self,
        slot: Slot,
        packet: &Outgoing<'_>,
        out: &mut Outbox,
        back: &mut Replies,
    ) -> Result<(), DropReason> {
        let (own, view) = (&self.own, packet.view());
        let peer = self.peers.get_mut(slot as usize).and_then(Option::as_mut);
        let peer = peer.ok_or(DropReason::NoRoute)?;
        // The kernel has counted the hop when it routed the packet to the device.
        if view.hops() == 0 {
            return Err(DropReason::NoHops);
        }
        let endpoint = peer.endpoint.map(|e| e.ip());
        if own.outer.contains(&view.source()) || endpoint == Some(view.destination()) {
            return Err(DropReason::Loop);
        }
        let (mtu, len) = (peer.inner_mtu(), packet.len_of(0));
        if len > LONGEST {
            return Err(DropReason::TooLong);
        }
        let told = if view.is_v6() { mtu.max(LEAST_V6_MTU) } else { mtu };
        // What may not be dropped (no DF, or the least that IPv6 promises) is
        // fragmented outside.
        let may_fragment = len > usize::from(mtu);
        if may_fragment && view.dont_fragment() && len > usize::from(told) {
            let from = own.error_source(view);
            back.push(|error| ip::too_big(view, from, told, error));
            return Err(DropReason::TooBig);
        }
        match peer.mode {
            Mode::WireGuard => {
                wireguard::encapsulate(peer, self.now, packet, may_fragment, out)?;
                self.speak(slot, out);
                Ok(())
            }
            Mode::IpUdp => bare::over_udp(peer, packet, may_fragment, out),
            Mode::IpIp => bare::over_ip(peer, packet, may_fragment, out),
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
        self.unindex(slot, &peer);
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
        if let Some(configured) = peer.configured {
            self.by_host.insert((configured.ip().to_canonical(), slot));
        }
        if let Some(address) = peer.ipip_endpoint().filter(|_| peer.mode == Mode::IpIp) {
            self.by_address.insert(address, slot);
        }
        if let Some(endpoint) = peer.endpoint.filter(|_| peer.mode == Mode::IpUdp) {
            self.by_endpoint.insert(endpoint, slot);
        }
    }

    fn unindex(&mut self, slot: Slot, peer: &Peer) {
        for &prefix in &peer.allowed {
            self.routes.remove(prefix);
        }
        if let Some(address) = peer.ipip_endpoint().filter(|_| peer.mode == Mode::IpIp) {
            self.by_address.remove(&address);
        }
        if let Some(configured) = peer.configured {
            self.by_host.remove(&(configured.ip().to_canonical(), slot));
        }
        self.forget_endpoint(slot, peer.endpoint);
    }

    /// Another peer may have been heard there since.
    fn forget_endpoint(&mut self, slot: Slot, endpoint: Option<SocketAddr>) {
        if let Some(endpoint) = endpoint.filter(|e| self.by_endpoint.get(e) == Some(&slot)) {
            self.by_endpoint.remove(&endpoint);
        }
    }

    /// The peer at `slot` was heard from `from`, authentically.
    fn learn_endpoint(&mut self, slot: Slot, from: SocketAddr) {
        let Some(peer) = self.peer_mut(slot).filter(|peer| peer.endpoint != Some(from)) else {
            return;
        };
        let (before, mode) = (peer.endpoint.replace(from), peer.mode);
        self.forget_endpoint(slot, before);
        if mode == Mode::IpUdp {
            self.by_endpoint.insert(from, slot);
        }
    }

    fn check_endpoint(&self, slot: Slot, peer: &Peer) -> Result<(), PeerError> {
        let (endpoint, taken) = match peer.mode {
            Mode::WireGuard => return Ok(()),
            Mode::IpUdp => match peer.endpoint {
                None => return Ok(()),
                Some(endpoint) => (endpoint.ip(), self.by_endpoint.get(&endpoint)),
            },
            Mode::IpIp => {
                let address = peer.ipip_endpoint().ok_or(PeerError::NeedsIpv4Endpoint(peer.key))?;
                (IpAddr::V4(address), self.by_address.get(&address))
            }
        };
        match taken.filter(|&&other| other != slot) {
            Some(&other) => Err(PeerError::EndpointTaken { endpoint, owner: self.key_of(other) }),
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
        let endpoint = endpoint.map(|e| e.ip().to_canonical());
        for &prefix in allowed {
            let (first, last) = (prefix.network(), prefix.broadcast());
            let within = self.by_host.range((first, 0)..=(last, Slot::MAX)).next();
            let within = within.map(|&(host, _)| host).filter(|host| prefix.contains(host));
            let own = endpoint.filter(|endpoint| prefix.contains(endpoint));
            if let Some(endpoint) = within.or(own) {
                return Err(PeerError::EndpointInside { prefix, endpoint });
            }
        }
        if let Some(endpoint) = endpoint
            && let Some(prefix) = self.routes.prefix_of(endpoint)
        {
            return Err(PeerError::EndpointInside { prefix, endpoint });
        }
        for &prefix in allowed {
            if let Some(other) = self.routes.owner_of_prefix(prefix).filter(|&o| o != slot) {
                return Err(PeerError::PrefixTaken { prefix, owner: self.key_of(other) });
            }
        }
        Ok(())
    }

    /// The peer whose configured address it is, in whatever mode.
    fn at_host(&self, host: IpAddr) -> Option<Slot> {
        self.by_host.range((host, 0)..=(host, Slot::MAX)).next().map(|&(_, slot)| slot)
    }

    fn key_of(&self, slot: Slot) -> PublicKey {
        let peer = self.peers.get(slot as usize).and_then(Option::as_ref);
        peer.map_or(self.public_key(), |p| p.key)
    }
}
