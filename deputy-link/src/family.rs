//! Processes that divide while they are away: what their home's daemon does for them.
//!
//! ```text
//! deputy            daemon                       the other node
//! FORK ───────────► asks for a further process ► admits it
//!                   connects, proves its keys ─► its warden has the link
//!      ◄─────────── link, keys, a line of its own for the child
//! forks
//! child: BORN ────► keeps a record
//!      ◄─────────── NOTED; only now the child's remote half runs
//! ```
//!
//! Each deputy has a [`Line`] to its daemon, given to it when the process moves out. It
//! ends with the daemon; then a process that divides comes home and does it there.

use crate::channel::{Channel, ChannelError, LinkSecret};
use crate::sys::packet;
use conet_deputy_core::boot::family::{LinkKeys, Ticket, ToDeputy, to_daemon};
use conet_wire::family::why;
use conet_wire::link::kind;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use zerocopy::IntoBytes;

/// How long a deputy waits for its daemon. One that lives takes less; where it takes
/// longer, nothing is lost: the process comes home.
const DAEMON_LIMIT: Duration = Duration::from_secs(10);

/// A daemon's end of what it and one deputy talk over.
#[derive(Debug)]
pub struct Line(OwnedFd);

/// The deputy's end.
#[derive(Debug)]
pub struct DeputyEnd(OwnedFd);

/// What a deputy says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineEvent {
    /// Its process makes a child: [`Line::give`] or [`Line::refuse`] answers.
    Fork,
    /// This child is there, and waits for [`Line::noted`].
    Born {
        /// Its process id; 0 where this daemon cannot see it.
        pid: u32,
    },
}

/// Why a child is not made away; what the process does then is [`why`] it comes home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The other node takes no further process, or was not reached.
    ByNode,
    /// As many as may be are there.
    Limit,
}

impl AsFd for DeputyEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Line {
    /// A line for one deputy.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new() -> io::Result<(Self, DeputyEnd)> {
        let (near, far) = packet::pair()?;
        set_socket_timeout(&far, Timeout::Recv, Some(DAEMON_LIMIT))?;
        Ok((Self(near), DeputyEnd(far)))
    }

    /// A second handle.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Waits for what the deputy says; `None` when it is gone, or its program is home.
    ///
    /// # Errors
    /// When what it says is not understood.
    pub fn event(&self) -> io::Result<Option<LineEvent>> {
        let mut byte = [0; 8];
        let packet = match packet::receive(self.0.as_fd(), &mut byte) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            other => other?,
        };
        match (packet.len, byte[0]) {
            (0, _) => Ok(None),
            (1, to_daemon::FORK) => Ok(Some(LineEvent::Fork)),
            (1, to_daemon::BORN) => {
                Ok(Some(LineEvent::Born { pid: u32::try_from(packet.pid).unwrap_or(0) }))
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Gives the deputy what its child needs: a link to the other node, whose keys are
    /// proven here, and the child's end of its own line.
    ///
    /// # Errors
    /// When the link ends or the deputy is gone; it makes its child at home then.
    pub fn give(
        &self,
        ticket: Ticket,
        link: TcpStream,
        secret: LinkSecret,
        line: &DeputyEnd,
    ) -> Result<(), ChannelError> {
        link.set_nodelay(true)?;
        let mut channel = Channel::new(link, secret);
        channel.send(kind::HELLO, 0, &[])?;
        let keys = channel.keys();
        let answer = ToDeputy { refused: 0, ticket, keys };
        let fds = [channel.stream().as_fd(), line.as_fd()];
        Ok(packet::send(self.0.as_fd(), answer.as_bytes(), &fds)?)
    }

    /// Tells the deputy that its child is to be made at home.
    ///
    /// # Errors
    /// When the deputy is gone.
    pub fn refuse(&self, refused: Refused) -> io::Result<()> {
        let refused = match refused {
            Refused::ByNode => why::REFUSED,
            Refused::Limit => why::LIMIT,
        };
        let answer = ToDeputy { refused, ..ToDeputy::default() };
        packet::send(self.0.as_fd(), answer.as_bytes(), &[])
    }

    /// Tells a child that its record is kept: now it may run.
    ///
    /// # Errors
    /// When it is gone.
    pub fn noted(&self) -> io::Result<()> {
        packet::send(self.0.as_fd(), &[to_daemon::NOTED], &[])
    }
}

impl Channel {
    /// Keys and positions, for whoever goes on with this link.
    pub(crate) fn keys(&self) -> LinkKeys {
        let (seal_next, open_next) = self.positions();
        let secret = self.secret();
        LinkKeys {
            cipher: secret.cipher_number(),
            reserved: 0,
            seal: *secret.seal.expose(),
            open: *secret.open.expose(),
            seal_next,
            open_next,
        }
    }
}
