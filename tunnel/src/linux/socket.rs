//! What a UDP socket of Linux can, and no library wraps for every system.

use std::io;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery as V4, Ipv6PathMtuDiscovery as V6, set_ip_mtu_discover,
    set_ipv6_mtu_discover, set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force,
};
use socket2::Socket;

use super::sys::set_udp_gro;

/// Socket buffers: 4 MiB is 3 ms at 10 Gb/s.
const SOCKET_BUFFER: usize = 4 << 20;
/// How long a full send queue may hold the thread up before datagrams are lost.
/// It throttles the sender, whose packets wait in the device meanwhile.
const SEND_PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

/// Larger buffers where we may: beyond the system's limit with CAP_NET_ADMIN,
/// else up to it. A small buffer only loses packets earlier.
pub(crate) fn enlarge(socket: &Socket) {
    if set_socket_recv_buffer_size_force(socket, SOCKET_BUFFER).is_err() {
        drop(socket.set_recv_buffer_size(SOCKET_BUFFER));
    }
    if set_socket_send_buffer_size_force(socket, SOCKET_BUFFER).is_err() {
        drop(socket.set_send_buffer_size(SOCKET_BUFFER));
    }
}

/// Switches the joining of received datagrams off.
pub(crate) fn join_nothing(socket: &Socket) {
    // A kernel without it does not need to be told.
    set_udp_gro(socket, false).ok();
}

/// Waits a moment for room in the send queue.
pub(crate) fn wait_writable(socket: &Socket) -> io::Result<()> {
    poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&SEND_PATIENCE))?;
    Ok(())
}

/// As quinn-udp sets it: DF always, never what the kernel believes of the path. Or not.
pub(crate) fn set_dont_fragment(socket: &Socket, is_v6: bool, on: bool) -> io::Result<()> {
    if is_v6 {
        set_ipv6_mtu_discover(socket, if on { V6::PROBE } else { V6::DONT })?;
    }
    set_ip_mtu_discover(socket, if on { V4::PROBE } else { V4::DONT })?;
    Ok(())
}
