//! The lab's LAN: a bridge in the machine's network namespace, and a veth pair
//! from it into each host.
//!
//! IPv6 is off on the bridge, its ports and the hosts' links to it: the kernel
//! would announce link-local addresses there, and a capture of the LAN is to show
//! what conet sends. Nor does the machine answer ARP there: an address of the lab's
//! may be one of its own, and the hosts would send to it instead of each other.

use std::net::{IpAddr, Ipv4Addr};

use conet_netsys::{IfName, IpNet, Netlink, Netns, Sysctl, Veth};

use crate::LabError;
use crate::names::{HostId, LAN, LAN_PREFIX, UPLINK};

/// Makes the bridge.
///
/// # Errors
///
/// [`LabError::Net`], also where it is there already.
pub(crate) fn make_bridge(netlink: &mut Netlink) -> Result<(), LabError> {
    let bridge = IfName::new(LAN)?;
    netlink.add_bridge(bridge)?;
    without_ipv6(bridge)?;
    Sysctl::ArpIgnore(Some(bridge)).write("8")?;
    Ok(netlink.set_up(bridge)?)
}

/// Joins a host's namespace to the bridge, and gives it its address.
///
/// # Errors
///
/// [`LabError::Net`].
pub(crate) fn join(netlink: &mut Netlink, host: HostId, netns: &Netns) -> Result<(), LabError> {
    join_as(netlink, host.port()?, host.lan_address(), netns)
}

/// Joins a namespace to the bridge by a port of this name, and gives it an address.
///
/// # Errors
///
/// [`LabError::Net`].
pub(crate) fn join_as(
    netlink: &mut Netlink,
    port: IfName,
    address: Ipv4Addr,
    netns: &Netns,
) -> Result<(), LabError> {
    let uplink = IfName::new(UPLINK)?;
    netlink.add_veth(&Veth {
        name: port,
        peer: uplink,
        peer_netns: Some(netns),
        mtu: None,
        mac: None,
        peer_mac: None,
    })?;
    without_ipv6(port)?;
    netlink.set_master(port, Some(IfName::new(LAN)?))?;
    netlink.set_up(port)?;

    netns.run(|| without_ipv6(uplink))??;
    let mut inside = Netlink::open_in(netns)?;
    inside.set_up(IfName::LOOPBACK)?;
    let address = IpNet::new_assert(IpAddr::V4(address), LAN_PREFIX);
    inside.add_address(uplink, address)?;
    Ok(inside.set_up(uplink)?)
}

/// Switches IPv6 off on a link of the calling thread's namespace.
fn without_ipv6(link: IfName) -> Result<(), LabError> {
    match Sysctl::DisableIpv6(Some(link)).write("1") {
        // A kernel without IPv6 has no such switch, and announces nothing.
        Err(error) if error.is_missing() => Ok(()),
        other => Ok(other?),
    }
}
