//! `conet guest args` and `conet guest start`: what runs a guest that is a machine.
//!
//! A card by `fd` or `dgram` is a descriptor that the VMM inherits: the port's socket for
//! frames as messages, connected before the VMM begins. So both ends hear of each other's
//! end, as they do not by datagrams between two names; and nobody but who may start the
//! machine needs to reach the socket.

use std::convert::Infallible;
use std::ffi::OsString;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use conet_hostinject::vhost::Transport;
use conet_node::client::{Client, ClientError};
use conet_wire::control::{Guest, Machine, Request, Response};
use rustix::io::FdFlags;
use serde_json::json;

use crate::cli::{MachineOptions, Output, PortName};
use crate::commands::process::ExecError;
use crate::table;

const UML: &str = "linux.uml";
const QEMU: &str = "qemu-system-x86_64";

/// Prints what a machine is to be started with.
pub(super) fn args(
    client: &mut Client,
    name: &str,
    MachineOptions { memory, port }: MachineOptions,
    output: Output,
) -> Result<()> {
    let guest = guest(client, name)?;
    if let Some(line) = &guest.line {
        if output.json {
            return Ok(table::json(&json!({ "line": line }))?);
        }
        return Ok(table::line(line)?);
    }
    let machine = machine(&guest)?;
    if port.is_inherited() {
        let port = port.as_str();
        anyhow::bail!(
            "a card by {port} is a descriptor that the machine inherits; start it with: conet \
             guest start {name} --port {port}"
        );
    }
    let (program, arguments) = flags(&guest.kind, machine, memory, port, None)?;
    if output.json {
        return Ok(table::json(&json!({ "program": program, "arguments": arguments }))?);
    }
    Ok(table::line(&arguments.join(" "))?)
}

/// Becomes the machine: same pid, same parent, same terminal. It returns only in failure.
pub(super) fn start(
    client: &mut Client,
    name: &str,
    MachineOptions { memory, port }: MachineOptions,
    program: Option<OsString>,
    arguments: &[OsString],
) -> Result<Infallible> {
    let guest = guest(client, name)?;
    let machine = machine(&guest)?;
    let card = if port.is_inherited() { Some(connected(machine)?) } else { None };
    let number = card.as_ref().map(AsRawFd::as_raw_fd);
    let (usual, flags) = flags(&guest.kind, machine, memory, port, number)?;
    if let Some(card) = card {
        rustix::io::fcntl_setfd(&card, FdFlags::empty()).context("cannot pass the card on")?;
        // From here on it is the machine's.
        let _number = card.into_raw_fd();
    }
    let program = program.unwrap_or_else(|| usual.into());
    let source = Command::new(&program).args(flags).args(arguments).exec();
    Err(ExecError { program, source }.into())
}

/// The port's socket for frames as messages.
fn connected(machine: &Machine) -> Result<OwnedFd> {
    let path = Transport::Bess.socket(Path::new(&machine.socket));
    let socket = Transport::Bess.connect(&path);
    socket.with_context(|| format!("cannot reach the port at {}; root can", path.display()))
}

fn guest(client: &mut Client, name: &str) -> Result<Guest> {
    let Response::Guests { guests } = client.ask(&Request::Guests {})? else {
        return Err(ClientError::Unexpected.into());
    };
    let guest = guests.into_iter().find(|guest| guest.name == name);
    guest.with_context(|| format!("no guest is named {name}; list them with: conet guest list"))
}

fn machine(guest: &Guest) -> Result<&Machine> {
    let name = &guest.name;
    guest.machine.as_ref().with_context(|| {
        format!(
            "{name} is a namespace, and runs already; run programs in it with: conet guest exec \
             {name}"
        )
    })
}

/// The program that runs such a guest, and the flags for its card; `number` is that of the
/// descriptor that it inherits. Neither has blanks but in the socket's directory, which is
/// the node's own.
fn flags(
    kind: &str,
    machine: &Machine,
    memory: u32,
    port: PortName,
    number: Option<i32>,
) -> Result<(&'static str, Vec<String>)> {
    let Machine { socket, mac, mtu, .. } = machine;
    let at = |transport: Transport| transport.socket(Path::new(socket)).display().to_string();
    let number = number.unwrap_or(-1);
    let (program, card) = match (kind, port) {
        ("uml", PortName::Vhost) => (UML, vec![format!("virtio_uml.device={socket}:1")]),
        ("uml", PortName::Bess) => {
            // Its own end is a name too; it makes it anew each time.
            let (dst, src) = (at(Transport::Bess), format!("{}.uml", at(Transport::Bess)));
            (UML, vec![vector_of_uml(&format!("bess,dst={dst},src={src}"), mac, *mtu)])
        }
        ("uml", PortName::Fd) => (UML, vec![vector_of_uml(&format!("fd,fd={number}"), mac, *mtu)]),
        ("uml", PortName::Stream | PortName::Dgram) => {
            let port = port.as_str();
            anyhow::bail!("User-Mode Linux knows no port {port}; give it --port bess, fd or vhost")
        }
        (_, PortName::Bess | PortName::Fd) => {
            let port = port.as_str();
            anyhow::bail!("QEMU knows no port {port}; give it --port stream, dgram or vhost")
        }
        (_, PortName::Stream) => {
            let path = at(Transport::Stream);
            let netdev = format!("stream,id=conet,server=off,addr.type=unix,addr.path={path}");
            (QEMU, frames_of_qemu(netdev, mac))
        }
        (_, PortName::Dgram) => {
            let netdev = format!("dgram,id=conet,local.type=fd,local.str={number}");
            (QEMU, frames_of_qemu(netdev, mac))
        }
        (_, PortName::Vhost) => (QEMU, vhost_of_qemu(socket, mac, (memory, machine.queues))),
    };
    let mut arguments = match program {
        UML => vec![format!("mem={memory}M")],
        _ => vec!["-m".to_owned(), memory.to_string()],
    };
    arguments.extend(card);
    Ok((program, arguments))
}

fn vector_of_uml(transport: &str, mac: &str, mtu: u16) -> String {
    format!("vec0:transport={transport},depth=128,mac={mac},mtu={mtu}")
}

fn frames_of_qemu(netdev: String, mac: &str) -> Vec<String> {
    let device = format!("virtio-net-pci,netdev=conet,mac={mac}");
    vec!["-netdev".to_owned(), netdev, "-device".to_owned(), device]
}

fn vhost_of_qemu(socket: &str, mac: &str, (memory, queues): (u32, u16)) -> Vec<String> {
    // The guest uses as many pairs as it has processors.
    let [several, mq] = match queues {
        1 => [String::new(), String::new()],
        _ => [format!(",queues={queues}"), ",mq=on".to_owned()],
    };
    let pairs = [
        // The port sees the guest's memory.
        ("-object", format!("memory-backend-memfd,id=conet,size={memory}M,share=on")),
        ("-machine", "memory-backend=conet".to_owned()),
        // Once a second, until the port is there again.
        ("-chardev", format!("socket,id=conet,path={socket},reconnect=1")),
        ("-netdev", format!("vhost-user,id=conet,chardev=conet{several}")),
        // Without MSI-X, whose calls QEMU 7.2 loses with vhost-user where it emulates.
        ("-device", format!("virtio-net-pci,netdev=conet,mac={mac}{mq},vectors=0")),
    ];
    pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
}
