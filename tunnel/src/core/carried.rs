//! Peers whose packets somebody else carries by the core's rules: the kernel.
//!
//! The core says what must be known of them, and counts what was done with theirs.

use std::net::Ipv4Addr;

use conet_dataplane::DropReason;
use ipnet::IpNet;

use super::routes::Slot;
use super::{Core, OwnAddresses};
use crate::{Mode, PublicKey};

/// A peer in mode `ipip`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IpipView {
    pub(crate) slot: Slot,
    pub(crate) key: PublicKey,
    /// Its outer address.
    pub(crate) remote: Ipv4Addr,
    /// Longest inner packet that fits, in bytes.
    pub(crate) mtu: u16,
    /// Packets exchanged with it so far, whoever carried them.
    pub(crate) packets: u64,
}

/// What was done with packets of a peer: packets and their bytes, drops by reason.
#[derive(Debug)]
pub(crate) struct Carried<D> {
    pub(crate) tx: (u64, u64),
    pub(crate) rx: (u64, u64),
    pub(crate) drops: D,
}

impl Core {
    /// Peers in mode `ipip`.
    pub(crate) fn ipip_peers(&self) -> impl Iterator<Item = IpipView> + '_ {
        let peers = self.peers.iter().zip(0..);
        let peers = peers.filter_map(|(peer, slot)| Some((slot, peer.as_ref()?)));
        let ipip = peers.filter(|(_, peer)| peer.mode == Mode::IpIp);
        ipip.filter_map(|(slot, peer)| {
            Some(IpipView {
                slot,
                key: peer.key,
                remote: peer.ipip_endpoint()?,
                mtu: peer.inner_mtu(),
                packets: peer.rx.packets + peer.tx.packets,
            })
        })
    }

    /// Prefixes of all peers, in whatever mode, with their owners.
    pub(crate) fn prefixes(&self) -> impl Iterator<Item = (IpNet, Slot)> + '_ {
        let peers = self.peers.iter().zip(0..);
        peers.flat_map(|(peer, slot)| {
            let allowed = peer.iter().flat_map(|peer| &peer.allowed);
            allowed.map(move |&prefix| (prefix, slot))
        })
    }

    /// Our own addresses.
    pub(crate) fn own_addresses(&self) -> &OwnAddresses {
        &self.own
    }

    /// Counts what was carried for the peer at `slot`, if it is still that one.
    pub(crate) fn count_carried(
        &mut self,
        slot: Slot,
        key: PublicKey,
        carried: Carried<impl Iterator<Item = (DropReason, u64)>>,
    ) {
        let Some(peer) = self.peer_mut(slot).filter(|peer| peer.key == key) else { return };
        for (traffic, (packets, bytes)) in [(&mut peer.tx, carried.tx), (&mut peer.rx, carried.rx)]
        {
            traffic.packets += packets;
            traffic.bytes += bytes;
        }
        for (reason, count) in carried.drops {
            peer.drops[reason] += count;
        }
    }
}
