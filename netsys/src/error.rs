//! What went wrong, with what, and whose fault it is.
//!
//! Every failure names the operation and the object (`add veth conet-h1-g1:
//! File exists (os error 17)`), keeps the errno as its source, and offers a
//! remedy where one is known. The kernel's own words (the extended
//! acknowledgement, `NETLINK_EXT_ACK`, Linux 4.12) are kept when it sent any.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use netlink_packet_core::DecodeError;
use rustix::io::Errno;

use crate::{IfName, NetnsName};

/// What was asked of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is its own sentence, see Display")]
pub enum Op {
    OpenNetlink,
    AddVeth,
    AddBridge,
    DeleteLink,
    LookUpLink,
    ListLinks,
    SetUp,
    SetDown,
    Rename,
    SetMaster,
    SetMtu,
    SetMac,
    MoveLink,
    AddAddress,
    DeleteAddress,
    ListAddresses,
    AddRoute,
    ReplaceRoute,
    DeleteRoute,
    ListRoutes,
    LookUpRoute,
    AddNeighbour,
    CreateNetns,
    OpenNetns,
    EnterNetns,
    DeleteNetns,
    ListNetns,
    StartThread,
    ReadSysctl,
    WriteSysctl,
    ReadRules,
    SetRules,
    ListSockets,
    ForgetConnections,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::OpenNetlink => "open netlink",
            Op::AddVeth => "add veth",
            Op::AddBridge => "add bridge",
            Op::DeleteLink => "delete link",
            Op::LookUpLink => "look up link",
            Op::ListLinks => "list links",
            Op::SetUp => "set up link",
            Op::SetDown => "set down link",
            Op::Rename => "rename link",
            Op::SetMaster => "set master of link",
            Op::SetMtu => "set MTU of link",
            Op::SetMac => "set MAC address of link",
            Op::MoveLink => "move to another namespace link",
            Op::AddAddress => "add address",
            Op::DeleteAddress => "delete address",
            Op::ListAddresses => "list addresses",
            Op::AddRoute => "add route",
            Op::ReplaceRoute => "replace route",
            Op::DeleteRoute => "delete route",
            Op::ListRoutes => "list routes",
            Op::LookUpRoute => "look up the route to",
            Op::AddNeighbour => "add neighbour",
            Op::CreateNetns => "create network namespace",
            Op::OpenNetns => "open network namespace",
            Op::EnterNetns => "enter network namespace",
            Op::DeleteNetns => "delete network namespace",
            Op::ListNetns => "list network namespaces",
            Op::StartThread => "start a thread in network namespace",
            Op::ReadSysctl => "read",
            Op::WriteSysctl => "write",
            Op::ReadRules => "look for nftables'",
            Op::SetRules => "set the rules of nftables'",
            Op::ListSockets => "list sockets",
            Op::ForgetConnections => "forget connections",
        })
    }
}

/// What it was asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// Nothing in particular: a listing, a socket.
    None,
    /// A link by name.
    Link(IfName),
    /// An address on a link.
    Address(IpNet, IfName),
    /// A route by destination.
    Route(IpNet),
    /// A neighbour entry by address.
    Neighbour(IpAddr),
    /// A namespace by name.
    Netns(NetnsName),
    /// The namespace of a process.
    Process(u32),
    /// A file.
    Path(PathBuf),
    /// A table of nftables.
    Table(Box<str>),
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Object::None => Ok(()),
            Object::Link(name) => write!(f, " {name}"),
            Object::Address(net, name) => write!(f, " {net} dev {name}"),
            Object::Route(net) => write!(f, " {net}"),
            Object::Neighbour(ip) => write!(f, " {ip}"),
            Object::Netns(name) => write!(f, " {name}"),
            Object::Process(pid) => write!(f, " of process {pid}"),
            Object::Path(path) => write!(f, " {}", path.display()),
            Object::Table(name) => write!(f, " table {name}"),
        }
    }
}

/// Whose fault a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The request does not fit the state: a name taken, a link absent, a value
    /// out of range, a missing privilege.
    Caller,
    /// The kernel lacks the facility or answered what it should not.
    Kernel,
    /// Memory, descriptors or interface numbers have run out.
    Resource,
}

/// A failed request.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The kernel refused.
    #[error("{op}{object}: {source}{}{}", Said(detail), Advice(remedy(*op, source)))]
    Refused {
        /// What was asked.
        op: Op,
        /// About what.
        object: Object,
        /// The kernel's own words, where it sent any.
        detail: Option<Box<str>>,
        /// The errno.
        source: io::Error,
    },
    /// The link named is not in this namespace.
    #[error("{op}: no link {name} in this namespace")]
    NoSuchLink {
        /// What was asked.
        op: Op,
        /// The absent link.
        name: IfName,
    },
    /// `/run/netns/NAME` is there but no namespace is mounted on it: a rest of a
    /// crash between creating and mounting.
    #[error("{op} {name}: the file is no namespace; delete it and create it anew")]
    NotANamespace {
        /// What was asked.
        op: Op,
        /// The name.
        name: NetnsName,
    },
    /// The answer could not be read.
    #[error("{op}{object}: the kernel's answer could not be read")]
    Answer {
        /// What was asked.
        op: Op,
        /// About what.
        object: Object,
        /// Where parsing ended.
        source: DecodeError,
    },
    /// The answer was of another kind than the question.
    #[error("{op}{object}: the kernel answered something else")]
    Unexpected {
        /// What was asked.
        op: Op,
        /// About what.
        object: Object,
    },
}

impl NetError {
    pub(crate) fn refused(op: Op, object: Object, source: impl Into<io::Error>) -> Self {
        NetError::Refused { op, object, detail: None, source: source.into() }
    }

    /// The errno, when the kernel gave one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            NetError::Refused { source, .. } => Errno::from_io_error(source),
            NetError::NoSuchLink { .. } => Some(Errno::NODEV),
            _ => None,
        }
    }

    /// Whether the object is already there.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(Errno::EXIST)
    }

    /// Whether the object is absent. A link answers ENODEV, a route ESRCH, an
    /// address EADDRNOTAVAIL, a file ENOENT.
    pub fn is_missing(&self) -> bool {
        matches!(
            self.errno(),
            Some(Errno::NODEV | Errno::SRCH | Errno::ADDRNOTAVAIL | Errno::NOENT | Errno::NXIO)
        )
    }

    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        match self {
            NetError::Answer { .. } | NetError::Unexpected { .. } => Fault::Kernel,
            NetError::NoSuchLink { .. } | NetError::NotANamespace { .. } => Fault::Caller,
            NetError::Refused { .. } => match self.errno() {
                Some(Errno::OPNOTSUPP | Errno::NOSYS | Errno::PROTONOSUPPORT | Errno::IO) => {
                    Fault::Kernel
                }
                Some(Errno::NOMEM | Errno::NOBUFS | Errno::MFILE | Errno::NFILE | Errno::NOSPC) => {
                    Fault::Resource
                }
                _ => Fault::Caller,
            },
        }
    }

    /// What to do about it, where that is known.
    pub fn remedy(&self) -> Option<&'static str> {
        match self {
            NetError::Refused { op, source, .. } => remedy(*op, source),
            _ => None,
        }
    }
}

fn remedy(op: Op, source: &io::Error) -> Option<&'static str> {
    Some(match (op, Errno::from_io_error(source)?) {
        (_, Errno::PERM | Errno::ACCESS) => {
            "run as root, or with CAP_NET_ADMIN and CAP_SYS_ADMIN in this namespace"
        }
        (Op::AddVeth | Op::AddBridge, Errno::EXIST) => "delete the old link or choose another name",
        (Op::AddVeth | Op::AddBridge, Errno::OPNOTSUPP) => {
            "this kernel lacks the kind of link; load its module"
        }
        (Op::CreateNetns, Errno::EXIST) => "delete the old namespace or choose another name",
        (Op::AddRoute | Op::ReplaceRoute, Errno::NETUNREACH) => {
            "give the gateway's link an address in its subnet, or mark the route onlink"
        }
        (Op::AddRoute | Op::ReplaceRoute, Errno::NETDOWN) => "set the link up first",
        (Op::SetRules | Op::ReadRules, Errno::NOENT | Errno::OPNOTSUPP | Errno::INVAL) => {
            "this kernel lacks a part of nftables; load nf_tables, nft_nat, nft_masq, nft_fib_inet \
             and nft_reject_inet"
        }
        (Op::ListSockets, Errno::NOENT) => "this kernel lacks inet_diag and udp_diag; load them",
        (Op::OpenNetns, Errno::NOENT) => "no such namespace; list them with `ip netns list`",
        _ => return None,
    })
}

struct Said<'a>(&'a Option<Box<str>>);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(text) => write!(f, " (kernel: {text})"),
            None => Ok(()),
        }
    }
}

struct Advice(Option<&'static str>);

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(text) => write!(f, "; {text}"),
            None => Ok(()),
        }
    }
}
