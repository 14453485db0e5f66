//! The packet lock: while it is held, a flow's packets are dropped both ways.
//!
//! One nftables table per [`NftLock`], made once:
//!
//! ```text
//! table inet conet-sock-PID-N (owner)
//!   set v4 { saddr . daddr . ports }     set v6 { … }
//!   chain in   hook input,  priority -300:  key in @v4 / @v6 → drop
//!   chain out  hook output, priority -300:  key in @v4 / @v6 → drop
//! ```
//!
//! Locking a flow adds its two directions to a set, releasing it takes them out:
//! one netlink transaction each, without running a program: 6 µs on the reference
//! machine (the test `locking_is_quick`), where running `nft` and `ip` took tens
//! of milliseconds.
//!
//! *Why nftables.* A socket filter (`SO_ATTACH_FILTER`) is as quick, but knows no
//! outgoing packets, and does nothing where there is no socket yet, or no longer:
//! just there the kernel would answer the peer with a reset. A tc or XDP program
//! needs a loader, a device, and CAP_BPF. The `input` hook and not `prerouting`: a
//! host that has given a flow away may already forward its packets to the new one.
//!
//! *Owner.* The table belongs to the netlink socket (`NFT_TABLE_F_OWNER`, Linux
//! 5.12): nobody else's `flush ruleset` releases a lock, and a holder that dies
//! leaves nothing behind. A lock thus lives as long as its holder. That is right
//! before the commit, when the original must live on; a holder that dies after it
//! has lost the connection's new half too.
//!
//! Invariants: a locked flow passes no packet in either direction, whichever socket
//! it has; other flows are not touched. Sources: `linux/netfilter/nf_tables.h`,
//! `nft(8)`.

mod message;

use conet_netsys::nft::frame::Reply;
use message::Batch;
use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

/// The two ends of a TCP connection, seen from the end that moves.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Flow {
    /// The end that moves.
    pub local: SocketAddr,
    /// The end that stays.
    pub peer: SocketAddr,
}

impl Flow {
    /// The flow as packets show it: IPv4 addresses that an IPv6 socket sees as
    /// mapped (RFC 4291 §2.5.5.2) become IPv4 addresses.
    #[must_use]
    pub fn on_the_wire(self) -> Self {
        let plain =
            |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        Self { local: plain(self.local), peer: plain(self.peer) }
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ↔ {}", self.local, self.peer)
    }
}

/// Why a flow was not locked or released.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// A netlink socket could not be made or used; the kernel's fault, or no
    /// CAP_NET_ADMIN.
    #[error("{call} for nftables")]
    Netlink {
        /// The system call.
        call: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// The kernel refused the transaction: no nftables, no CAP_NET_ADMIN, no memory.
    #[error("nftables refused to {what}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// The kernel's answer made no sense; a bug.
    #[error("nftables answered with something else than an acknowledgement")]
    Answer,
    /// One end is IPv4, the other IPv6; the caller's fault.
    #[error("flow {0} mixes IPv4 and IPv6")]
    Mixed(Flow),
    /// The flow is locked already, by this lock; the caller's fault.
    #[error("flow {0} is locked already")]
    Held(Flow),
}

/// Something that locks flows; a port, so that tests can let it fail.
pub trait Lock: Sync {
    /// Drops the packets of `flow` both ways from now on.
    ///
    /// # Errors
    ///
    /// See [`LockError`]; nothing is locked then.
    fn lock(&self, flow: Flow) -> Result<(), LockError>;

    /// Lets them pass again.
    ///
    /// # Errors
    ///
    /// See [`LockError`]; the flow stays locked then.
    fn release(&self, flow: Flow) -> Result<(), LockError>;
}

/// A table of locks in one network namespace.
pub struct NftLock {
    table: String,
    socket: Mutex<Socket>,
}

impl fmt::Debug for NftLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NftLock").field("table", &self.table).finish_non_exhaustive()
    }
}

impl NftLock {
    /// Makes the table in the network namespace of the calling thread; it stays
    /// there, whichever thread uses it. Takes milliseconds once, so that locking
    /// does not.
    ///
    /// # Errors
    ///
    /// See [`LockError`].
    pub fn open() -> Result<Self, LockError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let table = format!("conet-sock-{}-{number}", std::process::id());
        let failed = |call| move |source| LockError::Netlink { call, source };
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(failed("socket"))?;
        socket.bind_auto().map_err(failed("bind"))?;
        let lock = Self { table, socket: Mutex::new(socket) };
        lock.run("make a table", Batch::prepare(&lock.table))?;
        Ok(lock)
    }

    fn run(&self, what: &'static str, batch: Batch) -> Result<(), LockError> {
        let (bytes, sequence) = batch.finish();
        let failed = |call| move |source| LockError::Netlink { call, source };
        // The socket holds no state that a panic could leave half done.
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        socket.send(&bytes, 0).map_err(failed("send"))?;
        // The kernel works a batch off within sendmsg(2), so its answers are there:
        // errors for what it refused, and one acknowledgement for the last message.
        let mut refused = None;
        let mut buf = Vec::with_capacity(8192);
        loop {
            buf.clear();
            match socket.recv(&mut buf, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(source) => return Err(LockError::Netlink { call: "recv", source }),
            }
            for Reply { sequence: found, error } in Reply::parse_all(&buf) {
                match error {
                    0 if found == sequence => {
                        refused.get_or_insert(0);
                    }
                    // Of the commit; or stale, of an earlier batch.
                    0 => {}
                    error => {
                        if refused.is_none_or(|refused| refused == 0) {
                            refused = Some(error);
                        }
                    }
                }
            }
        }
        match refused {
            Some(0) => Ok(()),
            Some(error) => {
                let source = io::Error::from_raw_os_error(error);
                Err(LockError::Refused { what, source })
            }
            None => Err(LockError::Answer),
        }
    }

    fn keys(flow: Flow) -> Result<Keys, LockError> {
        let Flow { local, peer } = flow.on_the_wire();
        let key = |from: SocketAddr, to: SocketAddr| {
            let mut key = match (from.ip(), to.ip()) {
                (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
                (IpAddr::V6(from), IpAddr::V6(to)) => [from.octets(), to.octets()].concat(),
                _ => return Err(LockError::Mixed(flow)),
            };
            key.extend(from.port().to_be_bytes());
            key.extend(to.port().to_be_bytes());
            Ok(key)
        };
        let set = if local.is_ipv4() { message::SET_4 } else { message::SET_6 };
        Ok(Keys { set, out: key(local, peer)?, back: key(peer, local)? })
    }
}

struct Keys {
    set: &'static str,
    out: Vec<u8>,
    back: Vec<u8>,
}

impl Lock for NftLock {
    fn lock(&self, flow: Flow) -> Result<(), LockError> {
        let Keys { set, out, back } = Self::keys(flow)?;
        let batch = Batch::add_elements(&self.table, set, &[&out, &back]);
        self.run("lock a flow", batch).map_err(|error| match error {
            LockError::Refused { source, .. } if source.raw_os_error() == Some(libc::EEXIST) => {
                LockError::Held(flow)
            }
            other => other,
        })
    }

    fn release(&self, flow: Flow) -> Result<(), LockError> {
        let Keys { set, out, back } = Self::keys(flow)?;
        self.run("release a flow", Batch::delete_elements(&self.table, set, &[&out, &back]))
    }
}

/// A locked flow; dropping it releases the flow, as well as it can.
#[must_use = "dropping it releases the flow"]
pub struct Held<'l> {
    lock: &'l dyn Lock,
    flow: Option<Flow>,
}

impl fmt::Debug for Held<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("flow", &self.flow).finish_non_exhaustive()
    }
}

impl<'l> Held<'l> {
    /// Locks `flow`.
    ///
    /// # Errors
    ///
    /// See [`LockError`].
    pub fn new(lock: &'l dyn Lock, flow: Flow) -> Result<Self, LockError> {
        lock.lock(flow)?;
        Ok(Self { lock, flow: Some(flow) })
    }

    /// Releases the flow.
    ///
    /// # Errors
    ///
    /// See [`LockError`]; the flow stays locked and may be released again.
    pub fn release(&mut self) -> Result<(), LockError> {
        if let Some(flow) = self.flow {
            self.lock.release(flow)?;
            self.flow = None;
        }
        Ok(())
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // Nobody is left to tell; the table goes with its lock at the latest.
        self.release().ok();
    }
}
