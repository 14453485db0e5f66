//! A tunnel on Linux: TUN device, UDP and raw sockets, netlink, programs in the kernel.

pub(crate) mod driver;
pub(crate) mod kernel;
pub mod probe;
pub(crate) mod socket;
pub(crate) mod sockets;
mod sys;
mod tun;

pub(crate) use driver::Driver;
pub(crate) use mio::Waker;
