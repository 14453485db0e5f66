//! TCP sockets that move: an established connection is taken out of one kernel and
//! put into another, and the peer does not notice.
//!
//! ```text
//! old host                                new host
//! ────────                                ────────
//! freeze: lock, repair on, read state
//!        ────────── SavedSocket ─────────►
//!                                         prepare: lock, socket, queues, options
//!        ◄───────────── ready ────────────
//! commit: the old socket is gone, silently
//!                    the address or route moves
//!                                         activate: release, repair off, send the rest
//! Gone::release: the lock goes
//! ```
//!
//! Until [`Frozen::commit`] everything can be undone: dropping a [`Frozen`] lets the
//! old socket live on, dropping a [`Prepared`] takes the new one away without a
//! packet. After it, [`Prepared::activate`] can be tried again until it succeeds;
//! what can fail there for lasting reasons was done in the preparation.
//! So the connection is alive on one side, never on both and never on neither.
//!
//! *Lock first.* A socket in repair mode goes on acknowledging data that arrives
//! (1000 bytes sent to one moved `rcv_nxt` and were acknowledged): data that the
//! peer then believes delivered and nobody has. So the [`lock`] drops the flow's
//! packets both ways before anything is read, and on the new side before there is
//! a socket, where the kernel would answer the peer with a reset.
//!
//! *What is carried:* both queues (unread; sent and not acknowledged; not sent
//! yet), sequence numbers, windows and scales, MSS, SACK, timestamps, congestion
//! control, and the options in [`options`]. *What is not:* the congestion window,
//! round-trip time, out-of-order data and `ts_recent`, for which the kernel has no
//! interface; the file status flags (`O_NONBLOCK`), which belong to the descriptor
//! and its owner. *What is refused, by name:* every state but ESTABLISHED, TLS in
//! the kernel, MPTCP, TCP-AO, urgent data, link-local addresses.
//!
//! Sources: `tcp(7)`, `net/ipv4/tcp.c` (`do_tcp_setsockopt`, `tcp_disconnect`), CRIU
//! `soccr/soccr.c`, passt `tcp.c`. Least kernel: 5.14 (`SO_BUF_LOCK`). Needs
//! CAP_NET_ADMIN in the user namespace that owns the network namespace.

mod kernel;
pub mod lock;
pub mod options;
pub mod probe;
mod restore;
mod save;
pub mod state;
mod sys;

pub use kernel::{CallFailed, Kernel, Opt, Queued};
pub use lock::{Flow, Lock, LockError, NftLock};
pub use restore::{Activated, Address, Prepared, RestoreError};
pub use save::{Frozen, Gone, SaveError, TcpState};
pub use state::{SavedSocket, StateError};
pub use sys::Linux;

/// Where sockets are saved and restored: a kernel, and a lock in one of its
/// network namespaces.
#[derive(Debug)]
pub struct Host<K = Linux, L = NftLock> {
    kernel: K,
    lock: L,
}

impl Host {
    /// In the network namespace of the calling thread. Only [`Host::prepare`] needs
    /// a thread in that namespace afterwards.
    ///
    /// # Errors
    ///
    /// See [`LockError`].
    pub fn open() -> Result<Self, LockError> {
        Ok(Self { kernel: Linux, lock: NftLock::open()? })
    }
}

impl<K: Kernel, L: Lock> Host<K, L> {
    /// On ports of the caller's, such as ones that fail on purpose.
    pub const fn with_ports(kernel: K, lock: L) -> Self {
        Self { kernel, lock }
    }
}
