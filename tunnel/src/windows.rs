//! A tunnel on Windows: an adapter of wintun, a UDP socket, netsh.
//!
//! What Linux has and this has not: mode `ipip` (protocols 4 and 41 are not for
//! programs), routes that refuse packets when the tunnel's process is killed (the adapter
//! goes with it, and packets follow the other routes), the MTU of the way to a peer (1500
//! is assumed), and the refusal of packets from the host's other addresses.

mod adapter;
mod driver;
mod netsh;
pub(crate) mod socket;
mod sys;
#[cfg(test)]
mod tests;

pub use adapter::AdapterName;
pub(crate) use driver::Driver;
pub use netsh::NetshError;
pub(crate) use sys::Event as Waker;
