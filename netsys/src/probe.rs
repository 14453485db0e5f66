//! Whether this machine's kernel has what the network side of conet needs, found
//! out by trying.
//!
//! What it is not: a judgement; whoever asks knows what for. Each function leaves
//! the calling thread, or process, changed as it says: ask in a process of its own.

use std::io;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use rustix::mount::{MountFlags, mount};

use crate::netlink::Netlink;
use crate::{IfName, NetError, Object, Op, sys};

/// Moves the calling thread into a new network namespace, for good.
///
/// # Errors
///
/// EPERM without CAP_SYS_ADMIN, ENOSPC beyond `user.max_net_namespaces`, EINVAL
/// without network namespaces in the kernel.
pub fn network_namespace() -> io::Result<()> {
    Ok(sys::unshare_net()?)
}

/// Makes a time namespace, which the calling process's next children are born in
/// (kernel 5.6).
///
/// # Errors
///
/// EPERM without CAP_SYS_ADMIN, EINVAL without time namespaces in the kernel.
pub fn time_namespace() -> io::Result<()> {
    Ok(sys::unshare_time()?)
}

/// Moves the calling process into a new mount namespace; its next children are born in
/// a new process namespace, the first of them as its process 1.
///
/// # Errors
///
/// EPERM without CAP_SYS_ADMIN, ENOSPC beyond `user.max_pid_namespaces`.
pub fn process_namespace() -> io::Result<()> {
    Ok(sys::unshare_processes()?)
}

/// Mounts the processes of the calling process's namespace on `/proc`, which must be
/// that of a mount namespace of its own.
///
/// # Errors
///
/// EPERM where parts of the former `/proc` are hidden, as in many containers
/// (`mount_too_revealing` in the kernel's `fs/namespace.c`).
pub fn own_proc() -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(mount("proc", "/proc", "proc", flags, None)?)
}

/// Loads an eBPF program for traffic control, and lets go of it.
///
/// # Errors
///
/// EPERM without CAP_BPF and CAP_NET_ADMIN in the initial user namespace, ENOSYS
/// without eBPF in the kernel.
pub fn ebpf() -> io::Result<()> {
    sys::load_bpf_program().map(drop)
}

/// Adds the queueing discipline that eBPF programs hang from, `clsact` (kernel
/// 4.5), to the loopback link of the calling thread's network namespace, for good.
///
/// # Errors
///
/// ENOENT without the discipline in the kernel, EPERM without CAP_NET_ADMIN.
pub fn traffic_control() -> Result<(), NetError> {
    let mut netlink = Netlink::open()?;
    let index = netlink.link(IfName::LOOPBACK)?.map_or(0, |link| link.index);
    let mut message = TcMessage::with_index(i32::try_from(index).unwrap_or(0));
    // TC_H_CLSACT, and its own handle (linux/pkt_sched.h).
    message.header.parent = TcHandle { major: 0xffff, minor: 0xfff1 };
    message.header.handle = TcHandle { major: 0xffff, minor: 0 };
    message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    let flags = netlink_packet_core::NLM_F_CREATE | netlink_packet_core::NLM_F_EXCL;
    let message = RouteNetlinkMessage::NewQueueDiscipline(message);
    netlink.change(Op::AddQdisc, &Object::Link(IfName::LOOPBACK), message, flags)
}
