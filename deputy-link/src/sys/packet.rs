//! Messages between processes of this machine, with descriptors and the sender's
//! process id beside them (man 7 unix: SOCK_SEQPACKET, SCM_RIGHTS, SCM_CREDENTIALS).
//!
//! Not by rustix: it takes a process id to be never 0, which is what the kernel tells
//! of a sender that the receiver's pid namespace does not have.

use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
    socketpair,
};
use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

/// Most descriptors beside one message.
const MAX_FDS: usize = 2;
/// Room for them and one `struct ucred`.
const CONTROL: usize = 64;

/// Aligned as `struct cmsghdr`.
#[repr(C, align(8))]
struct Control([MaybeUninit<u8>; CONTROL]);

/// A message that has come.
#[derive(Debug)]
pub(crate) struct Packet {
    /// Its length in bytes; 0 where nobody is at the other end.
    pub(crate) len: usize,
    /// Descriptors beside it.
    pub(crate) fds: Vec<OwnedFd>,
    /// Who sent it, as this process counts; 0 where that is not told.
    pub(crate) pid: i32,
}

/// Two connected sockets; the first tells who sends to it.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (near, far) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    set_socket_passcred(&near, true)?;
    Ok((near, far))
}

fn new() -> io::Result<OwnedFd> {
    let kind = SocketType::SEQPACKET;
    Ok(socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?)
}

/// Listens at `path`, where nothing may be.
pub(crate) fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let socket = new()?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, 4)?;
    Ok(socket)
}

/// Connects to `path`; the socket tells who sends to it.
pub(crate) fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let socket = new()?;
    set_socket_passcred(&socket, true)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// A header for `bytes` with `control` beside them.
fn header(vector: &mut libc::iovec, control: &mut Control, len: usize) -> libc::msghdr {
    // SAFETY: all zeros is a valid value of this plain structure.
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_iov = vector;
    header.msg_iovlen = 1;
    if len > 0 {
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = len;
    }
    header
}

/// Sends one message, with at most two descriptors.
pub(crate) fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().take(MAX_FDS).map(AsRawFd::as_raw_fd).collect();
    let mut vector =
        libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = Control([MaybeUninit::zeroed(); CONTROL]);
    let data = size_of_val(raw.as_slice());
    let data_len = libc::c_uint::try_from(data).unwrap_or(0);
    // SAFETY: arithmetic only.
    let (space, len) = unsafe { (libc::CMSG_SPACE(data_len), libc::CMSG_LEN(data_len)) };
    let used = if raw.is_empty() { 0 } else { space as usize };
    let header = header(&mut vector, &mut control, used);
    if used > 0 {
        // SAFETY: the control buffer is aligned, zeroed and has room for this one.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = len as usize;
            std::ptr::copy_nonoverlapping(raw.as_ptr().cast(), libc::CMSG_DATA(first), data);
        }
    }
    // SAFETY: the header names `bytes` and the control buffer, both readable.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Receives one message.
pub(crate) fn receive(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Packet> {
    let mut vector = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let mut control = Control([MaybeUninit::zeroed(); CONTROL]);
    let mut header = header(&mut vector, &mut control, CONTROL);
    let len = loop {
        let flags = libc::MSG_CMSG_CLOEXEC;
        // SAFETY: the kernel writes at most what the header names.
        let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
        match usize::try_from(len) {
            Ok(len) => break len,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    };
    let mut packet = Packet { len, fds: Vec::new(), pid: 0 };
    // SAFETY: the kernel has written well-formed headers into the control buffer and
    // set its length; descriptors in it are new and ours.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(&raw const header);
        while !at.is_null() {
            let one = at.read_unaligned();
            let data = libc::CMSG_DATA(at);
            let data_len = one.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
            match (one.cmsg_level, one.cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    for i in 0..data_len / size_of::<RawFd>() {
                        let fd = data.cast::<RawFd>().add(i).read_unaligned();
                        packet.fds.push(OwnedFd::from_raw_fd(fd));
                    }
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS)
                    if data_len >= size_of::<libc::ucred>() =>
                {
                    packet.pid = data.cast::<libc::ucred>().read_unaligned().pid;
                }
                _ => {}
            }
            at = libc::CMSG_NXTHDR(&raw const header, at);
        }
    }
    Ok(packet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_message_brings_its_descriptors_and_its_sender() {
        let (near, far) = pair().unwrap();
        let (a, b) = pair().unwrap();
        send(far.as_fd(), b"hello", &[a.as_fd(), b.as_fd()]).unwrap();
        send(far.as_fd(), b"again", &[]).unwrap();
        let mut bytes = [0; 64];
        let packet = receive(near.as_fd(), &mut bytes).unwrap();
        assert_eq!((&bytes[..packet.len], packet.fds.len()), (&b"hello"[..], 2));
        assert_eq!(packet.pid.unsigned_abs(), std::process::id());
        send(packet.fds[0].as_fd(), b"x", &[]).unwrap();
        assert_eq!(receive(b.as_fd(), &mut [0; 4]).unwrap().len, 1);
        assert_eq!(receive(near.as_fd(), &mut bytes).unwrap().fds.len(), 0);
        drop(far);
        assert_eq!(receive(near.as_fd(), &mut bytes).unwrap().len, 0);
    }

    #[test]
    fn a_listener_is_met_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        assert!(connect_to(&path).is_err());
        let listener = listen_at(&path).unwrap();
        let theirs = connect_to(&path).unwrap();
        let ours = rustix::net::accept(&listener).unwrap();
        send(ours.as_fd(), b"!", &[]).unwrap();
        assert_eq!(receive(theirs.as_fd(), &mut [0; 4]).unwrap().len, 1);
    }
}
