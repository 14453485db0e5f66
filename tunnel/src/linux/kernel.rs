//! Mode `ipip` in the kernel: what the programs of `netsys` are told, and when.
//!
//! A peer is carried in the kernel from when packets went to it or came from it until
//! none has for a minute; a few more travel by raw sockets, before and after. So neither
//! the maps nor the work of keeping them true grow with the number of peers, and a way
//! that has changed is followed while it matters. Twice a second, for each peer carried:
//! counters to the core, the way and its MTU from the kernel's routes to the maps.
//!
//! Whatever fails is no error of the tunnel: the programs go away, and the raw sockets,
//! which are open all the time, carry everything.
//!
//! Thread: the tunnel's, in its network namespace.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use conet_dataplane::DropReason;
use conet_netsys::{
    IPIP_PEERS, IfName, IpNet, IpipCounters, IpipDrop, IpipError, IpipPeer, IpipPrograms, NetError,
    Netlink, WayOut,
};

use crate::PublicKey;
use crate::core::{Carried, Core, IpipView};

/// How often counters are read and ways looked up.
const LOOK: Duration = Duration::from_millis(500);
/// A peer with which nothing was exchanged for so long leaves the kernel.
const IDLE: Duration = Duration::from_secs(60);

/// Where packets of mode `ipip` are carried.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub enum IpipPath {
    /// Nowhere: no peer is in the mode.
    #[default]
    Unused,
    /// In the kernel; what is irregular by raw sockets.
    Kernel,
    /// By raw sockets: the kernel's way is switched off.
    SwitchedOff,
    /// By raw sockets: the kernel's way is not to be had.
    Refused(Arc<KernelError>),
}

/// Why the kernel's way is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The programs or their maps were refused.
    #[error(transparent)]
    Programs(#[from] IpipError),
    /// Links or routes could not be looked up.
    #[error(transparent)]
    Net(#[from] NetError),
}

/// The programs, as long as they are of use.
#[derive(Debug)]
pub(crate) struct Kernel {
    wanted: bool,
    running: Option<Running>,
    refused: Option<Arc<KernelError>>,
    look_at: Option<Instant>,
}

impl Kernel {
    pub(crate) fn new(wanted: bool) -> Self {
        Self { wanted, running: None, refused: None, look_at: None }
    }

    /// How things stand; `used` says whether any peer is in the mode.
    pub(crate) fn path(&self, used: bool) -> IpipPath {
        match (&self.running, &self.refused) {
            _ if !used => IpipPath::Unused,
            (Some(_), _) => IpipPath::Kernel,
            (None, Some(error)) => IpipPath::Refused(Arc::clone(error)),
            (None, None) => IpipPath::SwitchedOff,
        }
    }

    /// Peers that are carried.
    pub(crate) fn carried(&self) -> HashSet<PublicKey> {
        let peers = self.running.iter().flat_map(|running| running.peers.values());
        peers.map(|peer| peer.view.key).collect()
    }

    /// After a change of peers: makes the maps true at once.
    pub(crate) fn change(&mut self, core: &mut Core, netlink: &mut Netlink, device: IfName) {
        let used = core.ipip_peers().next().is_some();
        self.look_at = None;
        if !used || !self.wanted || self.refused.is_some() {
            if let Some(mut running) = self.running.take() {
                self.note(running.fold_all(core));
            }
            return;
        }
        let began = match self.running.take() {
            Some(running) => Ok(running),
            None => Running::load(netlink, device),
        };
        let done = began.and_then(|mut running| {
            running.look(core, netlink, true)?;
            Ok(running)
        });
        match done {
            Ok(running) => {
                self.running = Some(running);
                self.look_at = Some(core.now() + LOOK);
            }
            Err(error) => self.note(Err(error)),
        }
    }

    /// Counts, and follows ways, when it is time to.
    pub(crate) fn look(&mut self, core: &mut Core, netlink: &mut Netlink) {
        let now = core.now();
        if self.look_at.is_none_or(|at| now < at) {
            return;
        }
        self.look_at = Some(now + LOOK);
        self.refresh(core, netlink);
    }

    /// Counts at once.
    pub(crate) fn refresh(&mut self, core: &mut Core, netlink: &mut Netlink) {
        let Some(running) = &mut self.running else { return };
        let done = running.look(core, netlink, false);
        if done.is_err() {
            // What is counted since the last look is lost with the maps.
            self.running = None;
            self.look_at = None;
        }
        self.note(done);
    }

    fn note(&mut self, done: Result<(), KernelError>) {
        if let Err(error) = done {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "ipip is carried by raw sockets, not in the kernel"
            );
            self.refused = Some(Arc::new(error));
        }
    }
}

#[derive(Debug)]
struct Running {
    programs: IpipPrograms,
    routes: BTreeMap<IpNet, u32>,
    own: BTreeSet<IpAddr>,
    peers: BTreeMap<u32, InKernel>,
    /// Packets of each peer when last looked at: who has more now is in use.
    packets: HashMap<u32, u64>,
}

/// A peer that the programs carry.
#[derive(Debug)]
struct InKernel {
    view: IpipView,
    way: IpipPeer,
    seen: IpipCounters,
    used_at: Instant,
}

impl Running {
    fn load(netlink: &mut Netlink, device: IfName) -> Result<Self, KernelError> {
        let index = netlink.index(device)?;
        Ok(Self {
            programs: IpipPrograms::load(device, index)?,
            routes: BTreeMap::new(),
            own: BTreeSet::new(),
            peers: BTreeMap::new(),
            packets: HashMap::new(),
        })
    }

    /// Makes core and maps agree; `changed` says that peers or addresses may have.
    fn look(
        &mut self,
        core: &mut Core,
        netlink: &mut Netlink,
        changed: bool,
    ) -> Result<(), KernelError> {
        self.fold_all(core)?;
        if changed {
            self.forget_changed(core)?;
            self.sync_own(core)?;
            self.sync_routes(core)?;
            let known: BTreeSet<u32> = core.ipip_peers().map(|peer| peer.slot).collect();
            self.packets.retain(|slot, _| known.contains(slot));
        }
        self.follow(core, netlink)
    }

    /// Brings the counters of all peers to the core.
    fn fold_all(&mut self, core: &mut Core) -> Result<(), KernelError> {
        for (&slot, peer) in &mut self.peers {
            let Some(now) = self.programs.counters(slot)? else { continue };
            let new = now.since(&peer.seen);
            peer.seen = now;
            let drops = IpipDrop::ALL.into_iter().zip(new.drops).filter(|&(_, count)| count > 0);
            let carried = Carried {
                tx: (new.out_packets, new.out_bytes),
                rx: (new.in_packets, new.in_bytes),
                drops: drops.map(|(why, count)| (reason(why), count)),
            };
            core.count_carried(slot, peer.view.key, carried);
        }
        Ok(())
    }

    /// Peers that are gone, elsewhere or in another mode.
    fn forget_changed(&mut self, core: &Core) -> Result<(), KernelError> {
        let now: HashMap<u32, IpipView> = core.ipip_peers().map(|peer| (peer.slot, peer)).collect();
        let is_other = |slot: &u32, peer: &InKernel| {
            now.get(slot).is_none_or(|n| (n.key, n.remote) != (peer.view.key, peer.view.remote))
        };
        let gone = self.peers.iter().filter(|(slot, peer)| is_other(slot, peer));
        let gone: Vec<u32> = gone.map(|(slot, _)| *slot).collect();
        gone.into_iter().try_for_each(|slot| self.leave(slot))
    }

    fn sync_own(&mut self, core: &Core) -> Result<(), KernelError> {
        let own: BTreeSet<IpAddr> = core.own_addresses().outer.iter().copied().collect();
        for &gone in self.own.difference(&own) {
            self.programs.set_own(gone, false)?;
        }
        for &new in own.difference(&self.own) {
            self.programs.set_own(new, true)?;
        }
        self.own = own;
        Ok(())
    }

    fn sync_routes(&mut self, core: &Core) -> Result<(), KernelError> {
        let wanted: BTreeMap<IpNet, u32> = core.prefixes().collect();
        for &gone in self.routes.keys().filter(|prefix| !wanted.contains_key(prefix)) {
            self.programs.set_route(gone, None)?;
        }
        for (&prefix, &slot) in &wanted {
            if self.routes.get(&prefix) != Some(&slot) {
                self.programs.set_route(prefix, Some(slot))?;
            }
        }
        self.routes = wanted;
        Ok(())
    }

    /// Carries who is in use, where it is now, and nobody else.
    fn follow(&mut self, core: &Core, netlink: &mut Netlink) -> Result<(), KernelError> {
        let now = core.now();
        let mut links = None;
        for view in core.ipip_peers() {
            let before = self.packets.insert(view.slot, view.packets).unwrap_or(0);
            let in_use = view.packets != before;
            let full = self.peers.len() >= IPIP_PEERS;
            match self.peers.get_mut(&view.slot) {
                Some(peer) if in_use => peer.used_at = now,
                Some(peer) if now.saturating_duration_since(peer.used_at) > IDLE => {
                    self.leave(view.slot)?;
                    continue;
                }
                Some(_) => {}
                None if !in_use || full => continue,
                None => {}
            }
            let way = netlink.way_to(view.remote)?;
            let watched = match way {
                Some(way) => self.watch(way.link, &mut links, netlink)?,
                None => false,
            };
            match way.filter(|_| watched) {
                Some(WayOut { link, source: local }) => {
                    let way = IpipPeer { remote: view.remote, local, link, mtu: view.mtu };
                    self.carry(view, way, now)?;
                }
                // No way, or not by Ethernet: user space has the words for it.
                None => self.leave(view.slot)?,
            }
        }
        let used: BTreeSet<u32> = self.peers.values().map(|peer| peer.way.link).collect();
        self.programs.watch_only(|link| used.contains(&link));
        Ok(())
    }

    /// Takes packets from that link, if it is an Ethernet one; `links` is filled when
    /// it is first asked for.
    fn watch(
        &mut self,
        link: u32,
        links: &mut Option<Links>,
        netlink: &mut Netlink,
    ) -> Result<bool, KernelError> {
        if self.programs.watches(link) {
            return Ok(true);
        }
        let links = match links {
            Some(links) => links,
            none => none.insert(Links::list(netlink)?),
        };
        let Some(name) = links.ethernet(link) else { return Ok(false) };
        let watched = self.programs.watch(name, link);
        if let Err(error) = &watched {
            // It may have gone this moment. That programs hang up at all is known.
            tracing::debug!(%link, error = error as &dyn std::error::Error, "not watched");
        }
        Ok(watched.is_ok())
    }

    fn carry(&mut self, view: IpipView, way: IpipPeer, now: Instant) -> Result<(), KernelError> {
        match self.peers.get_mut(&view.slot) {
            Some(peer) if peer.way == way => {}
            Some(peer) => {
                self.programs.set_peer(view.slot, &way)?;
                peer.way = way;
            }
            None => {
                self.programs.set_peer(view.slot, &way)?;
                let seen = IpipCounters::default();
                self.peers.insert(view.slot, InKernel { view, way, seen, used_at: now });
            }
        }
        Ok(())
    }

    fn leave(&mut self, slot: u32) -> Result<(), KernelError> {
        if let Some(peer) = self.peers.remove(&slot) {
            self.programs.remove_peer(slot, peer.way.remote)?;
        }
        Ok(())
    }
}

/// Names of the Ethernet links of a namespace, by number.
#[derive(Debug)]
struct Links(HashMap<u32, IfName>);

impl Links {
    fn list(netlink: &mut Netlink) -> Result<Self, NetError> {
        let links = netlink.links()?.into_iter();
        // What has no address of six bytes has no header of fourteen, either.
        let ethernet = links.filter(|link| link.mac.is_some() && link.name != IfName::LOOPBACK);
        Ok(Self(ethernet.map(|link| (link.index, link.name)).collect()))
    }

    fn ethernet(&self, index: u32) -> Option<IfName> {
        self.0.get(&index).copied()
    }
}

fn reason(why: IpipDrop) -> DropReason {
    match why {
        IpipDrop::Malformed => DropReason::Malformed,
        IpipDrop::Nested => DropReason::Nested,
        IpipDrop::NotUnicast => DropReason::NotUnicast,
        IpipDrop::NoHops => DropReason::NoHops,
        IpipDrop::SourceNotAllowed => DropReason::SourceNotAllowed,
        IpipDrop::Congestion => DropReason::Congestion,
        // As where the device refuses a packet of user space.
        IpipDrop::NoMemory => DropReason::Device,
    }
}
