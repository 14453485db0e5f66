//! Machines of the lanes: User-Mode Linux with the host's files, QEMU with a few of them.

use std::net::IpAddr;
use std::process::Command;

use anyhow::Result;
use conet_hostinject::machine_mac;
use conet_hostinject::vhost::Transport;
use conet_netsys::{MacAddr, Veth};
use conet_testkit::machine::Machine;

use crate::kind::Kind;
use crate::lane::{GUEST, HOST, Lane, MTU, appears, ifname};
use crate::peers::exists;

/// Starts the lane's machine, and makes the host's end where that is the machine's own.
pub(crate) fn start(lane: &mut Lane) -> Result<()> {
    match lane.kind {
        Kind::UmlVhost => {
            let card = format!("virtio_uml.device={}:1", lane.vhost_socket()?.display());
            uml(lane, card, "eth0", MTU)
        }
        Kind::UmlBess => {
            let socket = Transport::Bess.socket(&lane.vhost_socket()?);
            let own = lane.socket("own");
            let (socket, own, mac) = (socket.display(), own.display(), mac());
            uml(
                lane,
                format!("vec0:transport=bess,dst={socket},src={own},depth=128,mac={mac}"),
                "vec0",
                MTU,
            )
        }
        Kind::QemuStream => {
            let socket = Transport::Stream.socket(&lane.vhost_socket()?);
            let card =
                format!("stream,id=n,server=off,addr.type=unix,addr.path={}", socket.display());
            let device = format!("virtio-net-pci,netdev=n,romfile=,mac={}", mac());
            qemu(lane, &["-netdev", &card, "-device", &device], MTU)
        }
        Kind::UmlTap => {
            uml(lane, "vec0:transport=tap,ifname=guest,depth=128,gro=1".to_owned(), "vec0", MTU)?;
            appears(&lane.host, "guest")?;
            lane.host.address("guest", HOST)
        }
        Kind::UmlRaw => {
            let mut netlink = lane.host.netlink()?;
            netlink.add_veth(&Veth {
                name: ifname("guest")?,
                peer: ifname("raw")?,
                peer_netns: None,
                mtu: None,
                mac: None,
                peer_mac: None,
            })?;
            netlink.set_up(ifname("raw")?)?;
            lane.host.address("guest", HOST)?;
            uml(lane, "vec0:transport=raw,ifname=raw,depth=128,gro=1".to_owned(), "vec0", MTU)
        }
        Kind::UmlBound => bound(lane),
        Kind::QemuVhost => {
            let socket = lane.vhost_socket()?;
            let path = socket.display();
            qemu(
                lane,
                &[
                    "-object",
                    "memory-backend-memfd,id=m,size=768M,share=on",
                    "-machine",
                    "q35,memory-backend=m",
                    "-chardev",
                    &format!("socket,id=c,path={path}"),
                    "-netdev",
                    "vhost-user,id=n,chardev=c",
                    "-device",
                    "virtio-net-pci,netdev=n,vectors=0,romfile=",
                ],
                MTU,
            )
        }
        _ => Ok(()),
    }
}

/// User-Mode Linux, and the least that can serve it.
fn bound(lane: &mut Lane) -> Result<()> {
    let socket = lane.socket("bound");
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--role", "bound"]).arg(&socket).arg("guest");
    lane.spawn(command, false)?;
    exists(&socket)?;
    lane.host.address("guest", HOST)?;
    uml(lane, format!("virtio_uml.device={}:1", socket.display()), "eth0", MTU)
}

/// The card's address as its port expects it, where the transport does not tell.
fn mac() -> MacAddr {
    machine_mac(&[IpAddr::V4(GUEST)])
}

/// Sets up the guest's card and starts its agent.
fn script(card: &str, mtu: u16) -> Result<String> {
    let agent = std::env::current_exe()?;
    Ok(format!(
        "busybox ip link set lo up; busybox ip link set {card} mtu {mtu}\n\
         busybox ip link set {card} up\n\
         busybox ip addr add {GUEST}/24 dev {card}; busybox ip route add default via {HOST}\n\
         {} --role agent\n",
        agent.display()
    ))
}

pub(crate) fn uml(lane: &mut Lane, flag: String, card: &str, mtu: u16) -> Result<()> {
    let mut command = Command::new("linux.uml");
    command.arg(flag);
    let load = "M=/usr/lib/uml/modules/$(busybox uname -r)/kernel\n\
        for m in net/core/failover drivers/net/net_failover drivers/net/virtio_net; do\n\
            busybox insmod $M/$m.ko\ndone\n";
    let script = format!("{load}{}", script(card, mtu)?);
    lane.boot(move || Machine::uml(command, &script))
}

pub(crate) fn qemu(lane: &mut Lane, flags: &[&str], mtu: u16) -> Result<()> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(flags);
    let agent = std::env::current_exe()?;
    let name = agent.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let packed = agent.to_string_lossy().into_owned();
    let script = script("eth0", mtu)?.replace(&packed, &format!("/bin/{name}"));
    lane.boot(move || Machine::qemu(command, &[], &[&packed], &script))
}
