//! What a UDP socket of Windows can, and no library wraps for every system.

use std::io;

use socket2::Socket;

use super::sys;

/// Socket buffers: 4 MiB is 3 ms at 10 Gb/s.
const SOCKET_BUFFER: usize = 4 << 20;
/// How long a full send queue may hold the thread up, in milliseconds.
const SEND_PATIENCE: i32 = 5;

/// Larger buffers. A small one only loses packets earlier.
pub(crate) fn enlarge(socket: &Socket) {
    socket.set_recv_buffer_size(SOCKET_BUFFER).ok();
    socket.set_send_buffer_size(SOCKET_BUFFER).ok();
}

/// Switches the joining of received datagrams off.
pub(crate) fn join_nothing(socket: &Socket) {
    // A system without it does not need to be told.
    sys::set_joined_size(socket, 0).ok();
}

/// Waits a moment for room in the send queue.
pub(crate) fn wait_writable(socket: &Socket) -> io::Result<()> {
    sys::wait_writable(socket, SEND_PATIENCE)
}

/// Whether datagrams may not be fragmented, of IPv4 and of IPv6 where the socket is one.
pub(crate) fn set_dont_fragment(socket: &Socket, is_v6: bool, on: bool) -> io::Result<()> {
    sys::set_dont_fragment(socket, is_v6, on)
}
