//! Packet buffers, ports and drop reasons shared by the tunnel and the guest ports.
//!
//! Three things that every packet path needs and none should define alone:
//!
//! * [`Packet`] and [`Pool`]: a buffer with room before its data, recycled so
//!   that a running path allocates nothing;
//! * [`Port`]: something that IP packets come out of and go into, in batches;
//! * [`DropReason`] and [`DropCounts`]: every packet that is not forwarded is
//!   counted under the one reason why.
//!
//! It knows no protocol and no kernel facility.

#![forbid(unsafe_code)]

mod drops;
mod packet;
mod port;

pub use drops::{DropCounts, DropReason};
pub use packet::{HEAD_ROOM, Packet, Pool};
pub use port::{MemoryPort, Port, PortError, Progress};
