//! The kernel's network by netlink: links, addresses, routes, rules and namespaces.
//!
//! What `ip link`, `ip addr`, `ip route`, `ip neigh`, `ip netns`, `sysctl net.*`,
//! `nft` and `ss -l` do, as blocking calls, without running those programs. It holds no
//! policy: which links exist and why is decided by the callers.
//!
//! Three ideas carry the crate:
//!
//! * A [`Netns`] is an open file descriptor of a network namespace. Work in it
//!   happens on a thread that entered it: [`Netns::run`] takes a fresh thread,
//!   [`Netns::enter`] lends the calling one until the guard drops.
//! * A [`Netlink`] handle belongs to the namespace in which it was opened and
//!   stays there, whichever thread uses it afterwards (`netlink(7)`: a socket
//!   keeps the namespace of its creation).
//! * A [`Sysctl`] acts on the namespace of the calling thread, because
//!   `/proc/sys/net` shows the reader's own namespace.
//!
//! Each request is one system call pair with an acknowledgement; nothing is
//! cached, so two processes may change the same namespace at once and both see
//! the truth.
//!
//! Sources: `rtnetlink(7)`, `netlink(7)`, `network_namespaces(7)`, `setns(2)`,
//! iproute2 `ip/ipnetns.c` for the layout of `/run/netns`. Least kernel: 4.12
//! (extended acknowledgements); older ones work with poorer messages.

mod address;
mod conntrack;
mod error;
mod ipip;
mod link;
mod names;
mod netlink;
mod netns;
pub mod nft;
pub mod probe;
mod route;
mod sockets;
mod sys;
mod sysctl;
pub mod userns;

pub use address::AddressEntry;
pub use conntrack::{Connection, Conntrack};
pub use error::{Fault, NetError, Object, Op};
pub use ipip::{IPIP_PEERS, IpipCounters, IpipDrop, IpipError, IpipPeer, IpipPrograms};
pub use ipnet::{IpNet, Ipv4Net, Ipv6Net};
pub use link::{Link, Veth};
pub use names::{IfName, MacAddr, NameError, NetnsName};
pub use netlink::Netlink;
pub use netns::{Entered, NETNS_DIR, Netns, NetnsId};
pub use route::{Route, RouteKind, RouteScope, WayOut};
pub use sockets::{Listener, SocketDiag, Transport};
pub use sysctl::Sysctl;
