//! The port to the kernel's sockets: the calls that saving and restoring make.
//!
//! One method per system call, so that a test can let each of them fail. The real
//! adapter is [`crate::Linux`].

use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};

/// A socket option: level and name, as in `setsockopt(2)`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Opt {
    /// `SOL_SOCKET`, `IPPROTO_TCP`, …
    pub level: i32,
    /// Its number.
    pub name: i32,
}

/// Which queue to ask for its length, bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Queued {
    /// Arrived and not read: `SIOCINQ`.
    In,
    /// Written and not acknowledged: `SIOCOUTQ`.
    Out,
    /// Written and not sent: `SIOCOUTQNSD`.
    OutNotSent,
}

/// What saving and restoring ask of a kernel. Errors are those of the system call.
#[expect(missing_docs, reason = "each is the system call of its name")]
#[expect(clippy::missing_errors_doc, reason = "each is the system call of its name")]
pub trait Kernel: Sync {
    fn socket(&self, ipv6: bool) -> io::Result<OwnedFd>;
    fn getsockname(&self, fd: BorrowedFd<'_>) -> io::Result<SocketAddr>;
    fn getpeername(&self, fd: BorrowedFd<'_>) -> io::Result<SocketAddr>;
    /// Fills `value`; gives the length of the kernel's answer.
    fn getsockopt(&self, fd: BorrowedFd<'_>, option: Opt, value: &mut [u8]) -> io::Result<usize>;
    fn setsockopt(&self, fd: BorrowedFd<'_>, option: Opt, value: &[u8]) -> io::Result<()>;
    /// `ioctl(2)` for the length of a queue.
    fn queued(&self, fd: BorrowedFd<'_>, queue: Queued) -> io::Result<usize>;
    /// `poll(2)`: whether urgent data waits.
    fn has_urgent(&self, fd: BorrowedFd<'_>) -> io::Result<bool>;
    /// `recv(2)` with `MSG_PEEK | MSG_DONTWAIT`.
    fn peek(&self, fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<usize>;
    /// `send(2)` with `MSG_DONTWAIT | MSG_NOSIGNAL`.
    fn send(&self, fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize>;
    fn bind(&self, fd: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()>;
    fn connect(&self, fd: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()>;
    /// `connect(2)` to `AF_UNSPEC`; in repair mode it sends no packet.
    fn disconnect(&self, fd: BorrowedFd<'_>) -> io::Result<()>;
}

/// A system call failed; says which, and for which option.
#[derive(Debug, thiserror::Error)]
#[error("{call} {what}")]
pub struct CallFailed {
    /// The system call.
    pub call: &'static str,
    /// Which option, queue or address it was about.
    pub what: &'static str,
    /// What it said.
    #[source]
    pub source: io::Error,
}

/// The options of repair mode; not all of them are in libc.
pub(crate) mod opt {
    use super::Opt;

    const fn tcp(name: i32) -> Opt {
        Opt { level: libc::IPPROTO_TCP, name }
    }

    const fn socket(name: i32) -> Opt {
        Opt { level: libc::SOL_SOCKET, name }
    }

    pub(crate) const MAXSEG: Opt = tcp(2);
    pub(crate) const INFO: Opt = tcp(11);
    pub(crate) const CONGESTION: Opt = tcp(13);
    pub(crate) const REPAIR: Opt = tcp(19);
    pub(crate) const REPAIR_QUEUE: Opt = tcp(20);
    pub(crate) const QUEUE_SEQ: Opt = tcp(21);
    pub(crate) const REPAIR_OPTIONS: Opt = tcp(22);
    pub(crate) const TIMESTAMP: Opt = tcp(24);
    pub(crate) const REPAIR_WINDOW: Opt = tcp(29);
    pub(crate) const ULP: Opt = tcp(31);
    pub(crate) const AO_INFO: Opt = tcp(40);
    pub(crate) const REUSEADDR: Opt = socket(2);
    pub(crate) const SNDBUF: Opt = socket(7);
    pub(crate) const RCVBUF: Opt = socket(8);
    pub(crate) const SNDBUFFORCE: Opt = socket(32);
    pub(crate) const RCVBUFFORCE: Opt = socket(33);
    pub(crate) const PROTOCOL: Opt = socket(38);
    pub(crate) const DOMAIN: Opt = socket(39);
    pub(crate) const PEEK_OFF: Opt = socket(42);
    pub(crate) const BUF_LOCK: Opt = socket(72);
    pub(crate) const IP_TRANSPARENT: Opt = Opt { level: libc::IPPROTO_IP, name: 19 };
    pub(crate) const IPV6_TRANSPARENT: Opt = Opt { level: libc::IPPROTO_IPV6, name: 75 };
    pub(crate) const IPV6_V6ONLY: Opt = Opt { level: libc::IPPROTO_IPV6, name: 26 };
}

/// One of a socket's two buffers.
#[derive(Clone, Copy)]
pub(crate) enum Buffer {
    Send,
    Receive,
}

/// The calls of one socket, with errors that say which.
pub(crate) struct Socket<'k, K> {
    pub(crate) kernel: &'k K,
    pub(crate) fd: BorrowedFd<'k>,
}

impl<K: Kernel> Socket<'_, K> {
    /// Sets a buffer's size beyond the system's limit or, without CAP_NET_ADMIN in the
    /// initial user namespace, up to it (`man 7 socket`).
    pub(crate) fn set_buffer(&self, which: Buffer, size: i32) -> Result<(), CallFailed> {
        let (forced, name, plain, plain_name) = match which {
            Buffer::Send => (opt::SNDBUFFORCE, "SO_SNDBUFFORCE", opt::SNDBUF, "SO_SNDBUF"),
            Buffer::Receive => (opt::RCVBUFFORCE, "SO_RCVBUFFORCE", opt::RCVBUF, "SO_RCVBUF"),
        };
        match self.set_i32(forced, name, size) {
            Err(error) if error.source.raw_os_error() == Some(libc::EPERM) => {
                self.set_i32(plain, plain_name, size)
            }
            other => other,
        }
    }

    pub(crate) fn get_i32(&self, option: Opt, what: &'static str) -> Result<i32, CallFailed> {
        let mut value = [0; 4];
        self.kernel.getsockopt(self.fd, option, &mut value).map_err(|source| CallFailed {
            call: "getsockopt",
            what,
            source,
        })?;
        Ok(i32::from_ne_bytes(value))
    }

    pub(crate) fn get_u32(&self, option: Opt, what: &'static str) -> Result<u32, CallFailed> {
        self.get_i32(option, what).map(i32::cast_unsigned)
    }

    pub(crate) fn set(
        &self,
        option: Opt,
        what: &'static str,
        value: &[u8],
    ) -> Result<(), CallFailed> {
        self.kernel.setsockopt(self.fd, option, value).map_err(|source| CallFailed {
            call: "setsockopt",
            what,
            source,
        })
    }

    pub(crate) fn set_i32(
        &self,
        option: Opt,
        what: &'static str,
        value: i32,
    ) -> Result<(), CallFailed> {
        self.set(option, what, &value.to_ne_bytes())
    }

    pub(crate) fn queued(&self, queue: Queued) -> Result<usize, CallFailed> {
        let what = match queue {
            Queued::In => "SIOCINQ",
            Queued::Out => "SIOCOUTQ",
            Queued::OutNotSent => "SIOCOUTQNSD",
        };
        self.kernel.queued(self.fd, queue).map_err(|source| CallFailed {
            call: "ioctl",
            what,
            source,
        })
    }

    /// Repair mode works on one queue at a time.
    pub(crate) fn choose(&self, queue: RepairQueue) -> Result<(), CallFailed> {
        self.set_i32(opt::REPAIR_QUEUE, "TCP_REPAIR_QUEUE", queue as i32)
    }
}

/// The queue that repair mode reads and writes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum RepairQueue {
    None = 0,
    Recv = 1,
    Send = 2,
}

/// Values of `TCP_REPAIR`; switching it off sends a window probe.
pub(crate) const REPAIR_ON: i32 = 1;
pub(crate) const REPAIR_OFF: i32 = 0;
