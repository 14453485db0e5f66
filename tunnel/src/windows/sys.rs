//! Calls of Windows that no library wraps: events, readiness, options of sockets.

#![allow(unsafe_code, reason = "handles and pointers of the system")]

use std::io;
use std::mem::size_of;
use std::os::windows::io::{AsRawHandle, AsRawSocket, FromRawHandle, OwnedHandle};
use std::path::Path;
use std::ptr;
use std::time::Duration;

use socket2::Socket;
use windows_sys::Win32::Foundation::{HANDLE, WAIT_FAILED};
use windows_sys::Win32::Networking::WinSock::{
    FD_READ, IP_DONTFRAGMENT, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_UDP, IPV6_DONTFRAG, POLLWRNORM,
    SOCKET, UDP_RECV_MAX_COALESCED_SIZE, WSAEventSelect, WSAGetLastError, WSAPOLLFD, WSAPoll,
    setsockopt,
};
use windows_sys::Win32::System::Threading::{
    CreateEventW, INFINITE, ResetEvent, SetEvent, WaitForMultipleObjects,
};

/// Loads wintun's library.
///
/// # Errors
/// Where it is not, or lacks a function.
pub(super) fn load(library: &Path) -> io::Result<wintun::Wintun> {
    // SAFETY: whatever lies at this absolute path is run; it is named by the program's own
    // place, which only its owner may write to.
    let loaded = unsafe { wintun::load_from_path(library) };
    loaded.map_err(|error| {
        io::Error::other(format!(
            "{}: {error}; get wintun.dll for this processor from wintun.net",
            library.display()
        ))
    })
}

/// A handle that others own, to be waited for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Signal(HANDLE);

impl Signal {
    /// From a handle as a number, which is how older bindings have it.
    pub(super) fn of(handle: isize) -> Self {
        Self(ptr::with_exposed_provenance_mut(handle.cast_unsigned()))
    }
}

/// An event of our own.
#[derive(Debug)]
pub(crate) struct Event(OwnedHandle);

impl Event {
    /// One that falls back by itself when a wait has seen it, or that stays.
    pub(super) fn new(stays: bool) -> io::Result<Self> {
        // SAFETY: null pointers mean no security attributes and no name.
        let handle = unsafe { CreateEventW(ptr::null(), i32::from(stays), 0, ptr::null()) };
        if handle.is_null() {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the handle is new and nobody else's.
        Ok(Self(unsafe { OwnedHandle::from_raw_handle(handle) }))
    }

    /// Ends a wait for it, this one or the next.
    pub(crate) fn wake(&self) -> io::Result<()> {
        // SAFETY: the handle is open as long as `self` is.
        check(unsafe { SetEvent(self.0.as_raw_handle()) })
    }

    /// Takes a signal back.
    pub(super) fn reset(&self) -> io::Result<()> {
        // SAFETY: as in `wake`.
        check(unsafe { ResetEvent(self.0.as_raw_handle()) })
    }

    pub(super) fn signal(&self) -> Signal {
        Signal(self.0.as_raw_handle())
    }
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits until one of `signals` is there, or for `timeout`.
pub(super) fn wait(signals: &[Signal; 3], timeout: Duration) -> io::Result<()> {
    let handles = signals.map(|signal| signal.0);
    // Rounded up: what is due in half a millisecond is not asked for a thousand times.
    let millis = u32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(INFINITE - 1);
    // SAFETY: three handles, which the caller holds open while it waits.
    let result = unsafe { WaitForMultipleObjects(3, handles.as_ptr(), 0, millis) };
    if result == WAIT_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets `event` be signalled whenever the socket has something to read.
pub(super) fn announce(socket: &Socket, event: &Event) -> io::Result<()> {
    let (socket, event) = (raw(socket)?, event.signal().0.addr().cast_signed());
    // SAFETY: both handles are open; the system keeps a reference of its own to the event.
    let result = unsafe { WSAEventSelect(socket, event, FD_READ as i32) };
    if result == 0 { Ok(()) } else { Err(last_socket_error()) }
}

/// Waits until the socket takes a datagram, at most `millis` milliseconds.
pub(super) fn wait_writable(socket: &Socket, millis: i32) -> io::Result<()> {
    let mut waiting = WSAPOLLFD { fd: raw(socket)?, events: POLLWRNORM, revents: 0 };
    // SAFETY: one entry, which lives as long as the call.
    let result = unsafe { WSAPoll(&raw mut waiting, 1, millis) };
    if result < 0 { Err(last_socket_error()) } else { Ok(()) }
}

/// Longest batch that received datagrams are joined to (UDP_RECV_MAX_COALESCED_SIZE,
/// Windows 10 2004); 0 for none.
pub(super) fn set_joined_size(socket: &Socket, bytes: u32) -> io::Result<()> {
    set_option(socket, IPPROTO_UDP, UDP_RECV_MAX_COALESCED_SIZE, bytes)
}

pub(super) fn set_dont_fragment(socket: &Socket, is_v6: bool, on: bool) -> io::Result<()> {
    if is_v6 {
        set_option(socket, IPPROTO_IPV6, IPV6_DONTFRAG, u32::from(on))
    } else {
        set_option(socket, IPPROTO_IP, IP_DONTFRAGMENT, u32::from(on))
    }
}

fn set_option(socket: &Socket, level: i32, name: i32, value: u32) -> io::Result<()> {
    let len = i32::try_from(size_of::<u32>()).unwrap_or(0);
    let socket = raw(socket)?;
    // SAFETY: the pointer is to a live value of the length given, which the system only
    // reads; the socket is open as long as it is borrowed.
    let result = unsafe { setsockopt(socket, level, name, (&raw const value).cast(), len) };
    if result == 0 { Ok(()) } else { Err(last_socket_error()) }
}

fn raw(socket: &Socket) -> io::Result<SOCKET> {
    SOCKET::try_from(socket.as_raw_socket()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn last_socket_error() -> io::Error {
    // SAFETY: it reads a value of this thread.
    io::Error::from_raw_os_error(unsafe { WSAGetLastError() })
}
