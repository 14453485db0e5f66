//! Talking to a warden: commands for the remotes of its sandbox, and what it says of
//! them. Each is named by the ticket of its stay.

use super::{HostError, check_hello, failed};
use crate::channel::LinkSecret;
use crate::sys::packet;
use conet_deputy_core::boot::family::{FromWarden, LinkKeys, Ticket, ToWarden};
use conet_deputy_core::boot::warden;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

/// How long a link may take to prove its keys.
const HELLO_LIMIT: Duration = Duration::from_secs(5);

/// What a warden says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WardenEvent {
    /// It watches this remote.
    Here {
        /// Its stay.
        ticket: Ticket,
        /// Its process id on this host; none while it is about to come.
        pid: Option<u32>,
    },
    /// It has named all that it watches, since somebody connected.
    All,
    /// A remote ended.
    Ended {
        /// Its stay.
        ticket: Ticket,
        /// Its wait status (man 2 wait).
        status: u32,
    },
}

/// A connection to a warden.
#[derive(Debug)]
pub struct Warden {
    socket: OwnedFd,
}

impl Warden {
    /// Connects to the warden at `socket`, becoming its daemon.
    ///
    /// # Errors
    /// When there is none: the processes that it watched have ended.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        Ok(Self { socket: packet::connect_to(socket)? })
    }

    /// A second handle, for sending while another thread reads events.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { socket: self.socket.try_clone()? })
    }

    /// Waits for the next event; `None` when the warden is gone.
    ///
    /// # Errors
    /// When what it says is not understood.
    pub fn event(&mut self) -> io::Result<Option<WardenEvent>> {
        let mut bytes = [0; size_of::<FromWarden>()];
        let packet = match packet::receive(self.socket.as_fd(), &mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            other => other?,
        };
        let said = match packet.len {
            0 => return Ok(None),
            len if len == bytes.len() => FromWarden::read_from_bytes(&bytes).ok(),
            _ => None,
        };
        let said = said.ok_or(io::ErrorKind::InvalidData)?;
        let ticket = said.ticket;
        match said.kind {
            warden::HERE => {
                let pid = u32::try_from(packet.pid).ok().filter(|pid| said.status == 1 && *pid > 0);
                Ok(Some(WardenEvent::Here { ticket, pid }))
            }
            warden::ALL => Ok(Some(WardenEvent::All)),
            warden::ENDED => Ok(Some(WardenEvent::Ended { ticket, status: said.status })),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn command(&self, kind: u32, ticket: Ticket) -> io::Result<()> {
        let command = ToWarden { kind, ticket, ..ToWarden::default() };
        packet::send(self.socket.as_fd(), command.as_bytes(), &[])
    }

    /// Rings a remote's bell: there is a frame on its link.
    ///
    /// # Errors
    /// When the warden is gone.
    pub fn ring(&self, ticket: Ticket) -> io::Result<()> {
        self.command(warden::BELL, ticket)
    }

    /// Has a remote send home a slice of what its program has changed.
    ///
    /// # Errors
    /// When the warden is gone.
    pub fn slice(&self, ticket: Ticket) -> io::Result<()> {
        self.command(warden::SLICE, ticket)
    }

    /// Stops a remote, as its home process is stopped.
    ///
    /// # Errors
    /// When the warden is gone.
    pub fn stop(&self, ticket: Ticket) -> io::Result<()> {
        self.command(warden::STOP, ticket)
    }

    /// Lets a remote continue.
    ///
    /// # Errors
    /// When the warden is gone.
    pub fn resume(&self, ticket: Ticket) -> io::Result<()> {
        self.command(warden::CONTINUE, ticket)
    }

    /// Ends a remote.
    ///
    /// # Errors
    /// When the warden is gone.
    pub fn kill(&self, ticket: Ticket) -> io::Result<()> {
        self.command(warden::KILL, ticket)
    }

    /// Has the remote `parent` take this link for the child that it is about to make,
    /// whose stay is named `child`. The link must prove its keys first.
    ///
    /// # Errors
    /// When the link does not, or the warden is gone. That there is a child is told by
    /// [`WardenEvent::Here`], that there will be none by [`WardenEvent::Ended`].
    pub fn branch(
        &self,
        parent: Ticket,
        child: Ticket,
        mut link: TcpStream,
        secret: &LinkSecret,
    ) -> Result<(), HostError> {
        link.set_nodelay(true).map_err(failed("TCP_NODELAY"))?;
        link.set_read_timeout(Some(HELLO_LIMIT)).map_err(failed("SO_RCVTIMEO"))?;
        check_hello(&mut link, secret)?;
        link.set_read_timeout(None).map_err(failed("SO_RCVTIMEO"))?;
        let keys = LinkKeys {
            cipher: secret.cipher_number(),
            reserved: 0,
            seal: *secret.seal.expose(),
            open: *secret.open.expose(),
            seal_next: 0,
            // HELLO has been opened here.
            open_next: 1,
        };
        let kind = warden::BRANCH;
        let command = ToWarden { kind, ticket: parent, child, keys, ..ToWarden::default() };
        packet::send(self.socket.as_fd(), command.as_bytes(), &[link.as_fd()])
            .map_err(failed("talking to the warden"))
    }
}
