//! nftables by netlink: tables, chains, sets and rules, as transactions.
//!
//! ```text
//! Nft ── apply(Batch) ──► BATCH_BEGIN │ message … │ BATCH_END     all of it or nothing
//! ```
//!
//! What it is not: a firewall. Which rules there are is decided by the callers; and
//! it reads nothing back but whether a table is there.
//!
//! *Whose a table is.* [`Nft::replace_table`] asks for `NFT_TABLE_F_OWNER` and
//! `NFT_TABLE_F_PERSIST` where the kernel has both (Linux 6.9): somebody's `nft flush
//! ruleset` then spares the table as long as its [`Nft`] lives, and it outlives that,
//! until [`Nft::delete_table`] by whoever comes next. On older kernels the table is
//! an ordinary one.
//!
//! An [`Nft`] belongs to the network namespace in which it was opened, like
//! [`crate::Netlink`]. Sources: `linux/netfilter/{nfnetlink,nf_tables}.h`, `nft(8)`.
//! Least kernel: 5.2, for address translation in the family `inet`.

mod expression;
pub mod frame;
mod message;

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

pub use expression::{Expression, IcmpReject, Verdict, match_address, match_local_destination};
pub use message::{Batch, Chain, ChainKind, Counted, Hook, SetKind};

use crate::{NetError, Netns, Object, Op};
use frame::{Message, Reply};
use message::{TableFlags, counter, get_counters, get_table};

/// The kernel sends one reply for each message at most.
const RECV_BYTES: usize = 64 * 1024;

/// Hooks of one network namespace's packets.
pub struct Nft {
    socket: Socket,
    /// What new tables are.
    flags: TableFlags,
}

impl fmt::Debug for Nft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nft").field("flags", &self.flags).finish_non_exhaustive()
    }
}

impl Nft {
    /// Opens nftables of the calling thread's namespace.
    ///
    /// # Errors
    /// As `socket(2)`: descriptors exhausted, or no netfilter in the kernel.
    pub fn open() -> Result<Self, NetError> {
        let fail = |e| NetError::refused(Op::OpenNetlink, Object::None, e);
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(fail)?;
        socket.bind_auto().map_err(fail)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(fail)?;
        Ok(Self { socket, flags: TableFlags::OwnedAndPersistent })
    }

    /// Opens nftables of `netns`.
    ///
    /// # Errors
    /// As [`Nft::open`] and [`Netns::enter`].
    pub fn open_in(netns: &Netns) -> Result<Self, NetError> {
        let _inside = netns.enter()?;
        Self::open()
    }

    /// Whether the family `inet` has a table of this name.
    ///
    /// # Errors
    /// As the kernel refuses: no CAP_NET_ADMIN, no nftables.
    pub fn has_table(&mut self, name: &str) -> Result<bool, NetError> {
        match self.exchange(&get_table(name)) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(NetError::refused(Op::ReadRules, Object::Table(name.into()), error)),
        }
    }

    /// The table's counters by name; none where there is no such table.
    ///
    /// # Errors
    /// As the kernel refuses: no CAP_NET_ADMIN, no nftables.
    pub fn counters(&mut self, table: &str) -> Result<BTreeMap<String, Counted>, NetError> {
        let mut counters = BTreeMap::new();
        let mut outcome = None;
        let asked = self.send(&get_counters(table)).and_then(|()| {
            // The next part of the answer is made when one has been taken.
            self.drain(|bytes| {
                counters.extend(Message::parse_all(bytes).filter_map(counter));
                outcome = outcome.or(Reply::parse_all(bytes).next());
            })
        });
        let asked = asked.and_then(|()| match outcome.map(|reply| reply.error) {
            Some(0) => Ok(()),
            Some(error) => Err(io::Error::from_raw_os_error(error)),
            None => Err(io::Error::from_raw_os_error(libc::EBADMSG)),
        });
        match asked {
            Ok(()) => Ok(counters),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(counters),
            Err(error) => Err(NetError::refused(Op::ReadRules, Object::Table(table.into()), error)),
        }
    }

    /// Makes the table what `build` says, in place of the one of that name, at once.
    ///
    /// # Errors
    /// As the kernel refuses; then the old table, or none, is there as before.
    pub fn replace_table(
        &mut self,
        name: &str,
        build: impl Fn(&mut Batch),
    ) -> Result<(), NetError> {
        let fail = |error| NetError::refused(Op::SetRules, Object::Table(name.into()), error);
        let is_there = self.has_table(name)?;
        loop {
            let mut batch = Batch::new(name, self.flags);
            if is_there {
                batch.delete_table();
            }
            batch.add_table();
            build(&mut batch);
            match self.exchange(&batch.finish()) {
                // A kernel that has not heard of the flags.
                Err(error)
                    if self.flags == TableFlags::OwnedAndPersistent
                        && matches!(
                            error.raw_os_error(),
                            Some(libc::EINVAL | libc::EOPNOTSUPP)
                        ) =>
                {
                    self.flags = TableFlags::Plain;
                }
                other => return other.map_err(fail),
            }
        }
    }

    /// Removes a table with all that is in it; says whether it was there.
    ///
    /// # Errors
    /// As the kernel refuses: EPERM where it has another owner.
    pub fn delete_table(&mut self, name: &str) -> Result<bool, NetError> {
        if !self.has_table(name)? {
            return Ok(false);
        }
        let mut batch = Batch::new(name, self.flags);
        batch.delete_table();
        match self.exchange(&batch.finish()) {
            Ok(()) => Ok(true),
            // Somebody was quicker.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(NetError::refused(Op::SetRules, Object::Table(name.into()), error)),
        }
    }

    /// Sends a request, and gives the kernel's word on it: the first error, or that
    /// its last message was done.
    fn exchange(&mut self, (bytes, last): &(Vec<u8>, u32)) -> io::Result<()> {
        let mut refused = None;
        let mut done = false;
        if let Err(error) = self.send(bytes) {
            self.drain(|_| {})?;
            return Err(error);
        }
        // The kernel works a request off within sendmsg(2): its answers are there.
        self.drain(|bytes| {
            for reply in Reply::parse_all(bytes) {
                match reply {
                    Reply { error: 0, sequence } => done |= sequence == *last,
                    Reply { error, .. } => {
                        refused.get_or_insert(error);
                    }
                }
            }
        })?;
        match refused {
            Some(error) => Err(io::Error::from_raw_os_error(error)),
            None if done => Ok(()),
            None => Err(io::Error::from_raw_os_error(libc::EBADMSG)),
        }
    }

    /// A batch is one `sendmsg`, which the socket's buffer must hold.
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Err(error) = self.socket.send(bytes, 0) {
            if error.raw_os_error() != Some(libc::EMSGSIZE) {
                return Err(error);
            }
            // Bounded by net.core.wmem_max; what does not fit then is refused.
            rustix::net::sockopt::set_socket_send_buffer_size(&self.socket, bytes.len() * 2)?;
            self.socket.send(bytes, 0)?;
        }
        Ok(())
    }

    /// Reads all that waits.
    fn drain(&mut self, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut buffer = Vec::with_capacity(RECV_BYTES);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
                Ok(_) => each(&buffer),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // Replies were lost: more messages than the buffer holds. The
                // transaction's outcome is not known from them.
                Err(error) => return Err(error),
            }
        }
    }
}
