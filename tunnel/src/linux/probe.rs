//! Whether this machine's kernel carries tunnels, found out by trying.
//!
//! What it is not: a judgement; without any of these but the device a tunnel still
//! works, slower or in one mode only.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use conet_netsys::IfName;
use conet_wire::ip::PROTO_IPV4;
use quinn_udp::{UdpSockRef, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

use super::tun::TunDevice;

/// What a TUN device of this kernel does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceOffloads {
    /// It hands over and takes TCP in large pieces.
    pub tcp: bool,
    /// And UDP (kernel 6.2).
    pub udp: bool,
}

/// Makes a TUN device with offloads in the network namespace of the calling
/// thread, and removes it.
///
/// # Errors
///
/// ENOENT where `/dev/net/tun` is not there, EACCES where it may not be opened,
/// EPERM without CAP_NET_ADMIN.
pub fn device(name: IfName) -> io::Result<DeviceOffloads> {
    let port = TunDevice::create(name, true, crate::DEFAULT_MTU)?;
    let (tcp, udp) = port.offloads();
    Ok(DeviceOffloads { tcp, udp })
}

/// What UDP sockets of this kernel do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpBatches {
    /// Datagrams that one send call takes (UDP_SEGMENT, kernel 4.18); 1 without.
    pub send: usize,
    /// Datagrams that one received buffer may hold (UDP_GRO, kernel 5.0); 1 without.
    pub receive: usize,
}

/// Asks a UDP socket for its batches.
///
/// # Errors
///
/// Where no socket can be made.
pub fn udp() -> io::Result<UdpBatches> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
    Ok(UdpBatches { send: state.max_gso_segments().max(1), receive: state.gro_segments().max(1) })
}

/// Opens the raw socket of mode `ipip`.
///
/// # Errors
///
/// EPERM without CAP_NET_RAW.
pub fn raw() -> io::Result<()> {
    let protocol = Protocol::from(i32::from(PROTO_IPV4));
    Socket::new(Domain::IPV4, Type::RAW, Some(protocol)).map(drop)
}
