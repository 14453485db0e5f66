//! Namespace guests by veth: packets stay in the kernel.
//!
//! Whether a found pair is the guest's own is decided by the peer index at both
//! ends, not by names. A guest that is complete is not touched, so a daemon takes it
//! over without a packet lost.
//!
//! Source: `veth(4)`.

use conet_netsys::{Link, NetError, Netlink, Netns, Veth};

use crate::{AttachError, GuestSpec};

fn is_veth(link: &Link) -> bool {
    link.kind.as_deref() == Some("veth")
}

/// Whether the two are the ends of one pair.
fn are_paired(outer: Option<&Link>, inner: Option<&Link>) -> bool {
    matches!((outer, inner), (Some(outer), Some(inner)) if is_veth(inner)
        && outer.other_end == Some(inner.index)
        && inner.other_end == Some(outer.index))
}

/// Makes the veth pair, unless both ends are there and belong together; says
/// whether they were.
pub(crate) fn pair(
    spec: &GuestSpec,
    netns: &Netns,
    host: &mut Netlink,
    guest: &mut Netlink,
) -> Result<bool, AttachError> {
    let fail = |source| AttachError::Net { name: spec.name.clone(), source };
    let outer = host.link(spec.host_link).map_err(fail)?;
    let inner = guest.link(spec.guest_link).map_err(fail)?;
    if outer.as_ref().is_some_and(|link| !is_veth(link)) {
        return Err(AttachError::LinkTaken { name: spec.name.clone(), link: spec.host_link });
    }
    if are_paired(outer.as_ref(), inner.as_ref()) {
        return Ok(true);
    }
    // Halves of something else, or of a making that was cut short.
    host.delete_link(spec.host_link).map_err(fail)?;
    guest.delete_link(spec.guest_link).map_err(fail)?;
    host.add_veth(&Veth {
        name: spec.host_link,
        peer: spec.guest_link,
        peer_netns: Some(netns),
        mtu: Some(u32::from(spec.mtu)),
        mac: None,
        peer_mac: spec.mac,
    })
    .map_err(fail)?;
    Ok(false)
}

/// Removes the guest's own pair, of a time when it was plumbed by one.
pub(crate) fn unpair(
    spec: &GuestSpec,
    host: &mut Netlink,
    guest: &mut Netlink,
) -> Result<(), AttachError> {
    let fail = |source: NetError| AttachError::Net { name: spec.name.clone(), source };
    let outer = host.link(spec.host_link).map_err(fail)?;
    let inner = guest.link(spec.guest_link).map_err(fail)?;
    if are_paired(outer.as_ref(), inner.as_ref()) {
        host.delete_link(spec.host_link).map_err(fail)?;
    }
    Ok(())
}
