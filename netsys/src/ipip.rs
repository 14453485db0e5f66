//! The programs that carry IP in IP within the kernel, and their maps.
//!
//! What the programs do is said in `bpf/ipip.bpf.c`; here they are loaded, hung up and
//! told what they must know. No policy: which peers there are and where they are is
//! decided by the caller, who also handles whatever the programs leave alone.
//!
//! They hang by links of tcx, which are descriptors of this process and pinned nowhere:
//! when it ends, in whatever way, the kernel takes programs and maps away. So there is
//! nothing to clean up after a crash, and no older way (a `clsact` discipline, which
//! outlives its maker) is used.
//!
//! Invariant: a peer's counters exist before it is in `peers`, and `peers` before
//! `senders`, so a program that finds one finds the others.
//!
//! Sources: `bpf(2)`, Linux `kernel/bpf/tcx.c`. Least kernel: 6.6.

mod sys;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, MapData, MapError, PerCpuHashMap, PerCpuValues};
use aya::programs::links::LinkOrder;
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfError, EbpfLoader};

use crate::{IfName, IpNet};

pub use self::sys::IpipCounters;
use self::sys::RawPeer;

/// Made from `bpf/ipip.bpf.c`, as it says there; `tests/ipip.rs` compares.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../bpf/ipip.bpf.o");

/// Most peers that the programs carry at a time (`max_entries` in the C file).
pub const IPIP_PEERS: usize = 1024;

/// Why a packet was dropped in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpipDrop {
    /// No IP packet inside, or one whose lengths contradict each other.
    Malformed,
    /// A tunnel inside.
    Nested,
    /// An inner address that names no single interface.
    NotUnicast,
    /// No hop left inside.
    NoHops,
    /// The inner source belongs to another peer, or to none.
    SourceNotAllowed,
    /// Congestion was marked on a packet that cannot say so (RFC 6040 §4.2).
    Congestion,
    /// No memory for a changed packet, in either direction.
    NoMemory,
}

impl IpipDrop {
    /// All, in the order of the counters (`enum drop` in the C file).
    pub const ALL: [Self; 7] = [
        Self::Malformed,
        Self::Nested,
        Self::NotUnicast,
        Self::NoHops,
        Self::SourceNotAllowed,
        Self::Congestion,
        Self::NoMemory,
    ];
}

/// Where a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpipPeer {
    /// Its outer address.
    pub remote: Ipv4Addr,
    /// Ours towards it.
    pub local: Ipv4Addr,
    /// Number of the link that leads there.
    pub link: u32,
    /// Longest inner packet that fits, in bytes.
    pub mtu: u16,
}

/// Why IP in IP is not carried in the kernel.
#[derive(Debug, thiserror::Error)]
pub enum IpipError {
    /// No BPF in the kernel, no right to it (CAP_BPF and CAP_NET_ADMIN in the first user
    /// namespace), or a verifier that refuses them.
    #[error("the kernel does not take the eBPF programs")]
    Load(#[from] EbpfError),
    /// As [`IpipError::Load`].
    #[error("the kernel does not take the eBPF program {name}")]
    Program {
        /// Its name.
        name: &'static str,
        /// What it says.
        source: Box<ProgramError>,
    },
    /// The programs cannot hang from a link; Linux before 6.6 has no tcx.
    #[error("an eBPF program cannot be attached to {link} (Linux 6.6 or newer is needed)")]
    Attach {
        /// The link.
        link: IfName,
        /// What it says.
        source: Box<ProgramError>,
    },
    /// A map is full, or out of memory.
    #[error("the eBPF map {name} takes no more")]
    Map {
        /// Its name.
        name: &'static str,
        /// What it says.
        source: MapError,
    },
    /// The object lacks what it should have: our mistake.
    #[error("the eBPF object has no {0}")]
    Absent(&'static str),
}

/// The programs, hung from a tunnel's device and from links. Dropping it takes them away.
#[derive(Debug)]
pub struct IpipPrograms {
    ebpf: Ebpf,
    device: u32,
    /// Held for their drop.
    _out: SchedClassifierLink,
    inward: BTreeMap<u32, SchedClassifierLink>,
}

impl IpipPrograms {
    /// Loads the programs and hangs them from `device`, whose number is `index`, in the
    /// network namespace of the calling thread. They do nothing before they know a peer.
    ///
    /// # Errors
    /// [`IpipError`]; then nothing of it remains.
    pub fn load(device: IfName, index: u32) -> Result<Self, IpipError> {
        let mut ebpf = EbpfLoader::new().load(OBJECT)?;
        for name in [OUT, IN] {
            let failed = |source| IpipError::Program { name, source: Box::new(source) };
            program(&mut ebpf, name)?.load().map_err(failed)?;
        }
        let out = attach(&mut ebpf, OUT, device, TcAttachType::Egress)?;
        Ok(Self { ebpf, device: index, _out: out, inward: BTreeMap::new() })
    }

    /// Takes packets of peers from this Ethernet link, too; `index` is its number.
    ///
    /// # Errors
    /// [`IpipError::Attach`].
    pub fn watch(&mut self, link: IfName, index: u32) -> Result<(), IpipError> {
        if !self.inward.contains_key(&index) {
            let new = attach(&mut self.ebpf, IN, link, TcAttachType::Ingress)?;
            self.inward.insert(index, new);
        }
        Ok(())
    }

    /// Whether packets of peers are taken from the link of that number.
    pub fn watches(&self, index: u32) -> bool {
        self.inward.contains_key(&index)
    }

    /// Leaves all links alone of which `keep` says no.
    pub fn watch_only(&mut self, keep: impl Fn(u32) -> bool) {
        self.inward.retain(|&index, _| keep(index));
    }

    /// Says whose `prefix` is, or that it is nobody's.
    ///
    /// # Errors
    /// [`IpipError::Map`] beyond 262,144 prefixes of a family.
    pub fn set_route(&mut self, prefix: IpNet, peer: Option<u32>) -> Result<(), IpipError> {
        let length = prefix.prefix_len().into();
        match prefix.trunc() {
            IpNet::V4(p) => {
                let key = Key::new(length, p.addr().octets());
                change_route(&mut self.ebpf, "routes4", &key, peer)
            }
            IpNet::V6(p) => {
                let key = Key::new(length, p.addr().octets());
                change_route(&mut self.ebpf, "routes6", &key, peer)
            }
        }
    }

    /// Says whether `address` is one of the host's outside the tunnel.
    ///
    /// # Errors
    /// [`IpipError::Map`] beyond 1024 of them.
    pub fn set_own(&mut self, address: IpAddr, is: bool) -> Result<(), IpipError> {
        let key = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        put(&mut self.ebpf, "own", key, is.then_some(1u8))
    }

    /// Carries packets of the peer of that number.
    ///
    /// # Errors
    /// [`IpipError::Map`] beyond [`IPIP_PEERS`].
    pub fn set_peer(&mut self, number: u32, peer: &IpipPeer) -> Result<(), IpipError> {
        if self.counters(number)?.is_none() {
            self.reset_counters(number)?;
            put(&mut self.ebpf, "idents", number, Some(0u32))?;
        }
        let raw = RawPeer {
            remote: peer.remote.octets(),
            local: peer.local.octets(),
            link: peer.link,
            device: self.device,
            mtu: peer.mtu.into(),
        };
        put(&mut self.ebpf, "peers", number, Some(raw))?;
        put(&mut self.ebpf, "senders", peer.remote.octets(), Some(number))
    }

    /// Leaves packets of the peer of that number, which was at `remote`, to user space.
    /// A program that runs at this moment may still carry one, uncounted.
    ///
    /// # Errors
    /// [`IpipError::Map`] when the kernel refuses.
    pub fn remove_peer(&mut self, number: u32, remote: Ipv4Addr) -> Result<(), IpipError> {
        put(&mut self.ebpf, "senders", remote.octets(), None::<u32>)?;
        put(&mut self.ebpf, "peers", number, None::<RawPeer>)?;
        put(&mut self.ebpf, "idents", number, None::<u32>)?;
        let mut counts = self.counts()?;
        missing_is_well(counts.remove(&number)).map_err(map_error("counts"))
    }

    /// What was counted for a peer since it was set, or `None` where it is not.
    ///
    /// # Errors
    /// [`IpipError::Map`] when the kernel refuses.
    pub fn counters(&mut self, number: u32) -> Result<Option<IpipCounters>, IpipError> {
        match self.counts()?.get(&number, 0) {
            Ok(values) => Ok(Some(values.iter().fold(IpipCounters::default(), |a, b| a.plus(b)))),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(map_error("counts")(error)),
        }
    }

    fn reset_counters(&mut self, number: u32) -> Result<(), IpipError> {
        let processors = aya::util::nr_cpus()
            .map_err(|(_, source)| IpipError::Map { name: "counts", source: io_error(source) })?;
        let zero = PerCpuValues::try_from(vec![IpipCounters::default(); processors])
            .map_err(|source| IpipError::Map { name: "counts", source: io_error(source) })?;
        self.counts()?.insert(number, zero, 0).map_err(map_error("counts"))
    }

    fn counts(&mut self) -> Result<PerCpuHashMap<&mut MapData, u32, IpipCounters>, IpipError> {
        let map = self.ebpf.map_mut("counts").ok_or(IpipError::Absent("counts"))?;
        map.try_into().map_err(map_error("counts"))
    }
}

/// Names in the object.
const OUT: &str = "conet_out";
const IN: &str = "conet_in";

fn program<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, IpipError> {
    let program = ebpf.program_mut(name).ok_or(IpipError::Absent(name))?;
    program.try_into().map_err(|source| IpipError::Program { name, source: Box::new(source) })
}

fn attach(
    ebpf: &mut Ebpf,
    name: &'static str,
    link: IfName,
    at: TcAttachType,
) -> Result<SchedClassifierLink, IpipError> {
    let failed = |source| IpipError::Attach { link, source: Box::new(source) };
    let program = program(ebpf, name)?;
    // Behind whatever hangs there already: that sees the packets as they are on the link.
    let order = TcAttachOptions::TcxOrder(LinkOrder::default());
    let id = program.attach_with_options(link.as_str(), at, order).map_err(failed)?;
    program.take_link(id).map_err(failed)
}

fn change_route<A: aya::Pod>(
    ebpf: &mut Ebpf,
    name: &'static str,
    key: &Key<A>,
    peer: Option<u32>,
) -> Result<(), IpipError> {
    let map = ebpf.map_mut(name).ok_or(IpipError::Absent(name))?;
    let mut map: LpmTrie<_, A, u32> = map.try_into().map_err(map_error(name))?;
    match peer {
        Some(peer) => map.insert(key, peer, 0),
        None => missing_is_well(map.remove(key)),
    }
    .map_err(map_error(name))
}

fn put<K: aya::Pod, V: aya::Pod>(
    ebpf: &mut Ebpf,
    name: &'static str,
    key: K,
    value: Option<V>,
) -> Result<(), IpipError> {
    let map = ebpf.map_mut(name).ok_or(IpipError::Absent(name))?;
    let mut map: HashMap<_, K, V> = map.try_into().map_err(map_error(name))?;
    match value {
        Some(value) => map.insert(key, value, 0),
        None => missing_is_well(map.remove(&key)),
    }
    .map_err(map_error(name))
}

fn map_error(name: &'static str) -> impl Fn(MapError) -> IpipError {
    move |source| IpipError::Map { name, source }
}

fn io_error(source: io::Error) -> MapError {
    MapError::IoError(source)
}

fn missing_is_well(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(e)) if e.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
