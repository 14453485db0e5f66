//! `conet guest …`.

mod capture;
mod hold;

use std::ffi::OsString;
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use conet_hostinject::Rate;
use conet_hostinject::vhost::Transport;
use conet_node::client::{Client, ClientError};
use conet_node::enter;
use conet_wire::control::{Guest, GuestRates, Machine, Request, Response};
use serde_json::json;

use super::process::ExecError;
use crate::cli::{GuestCommand, Output, PortName, RateOptions};
use crate::table;

const UML: &str = "linux.uml";
const QEMU: &str = "qemu-system-x86_64";

pub(super) fn run(client: &mut Client, command: GuestCommand) -> Result<()> {
    match command {
        GuestCommand::Add { name, address, kind, rates, output } => {
            add(client, name, address, (kind.as_str(), &rates), output)
        }
        GuestCommand::Rate { name, rates } => {
            let rates = rate_texts(&rates);
            match client.ask(&Request::GuestRate { name, rates })? {
                Response::Done {} => Ok(()),
                _ => Err(ClientError::Unexpected.into()),
            }
        }
        GuestCommand::Capture { name, write, seconds, packets } => {
            capture::run(client, &name, write, &capture::Ends { seconds, packets })
        }
        GuestCommand::List { output } => list(client, output),
        GuestCommand::Args { name, memory, port, output } => {
            args(client, &name, memory, port, output)
        }
        GuestCommand::Hold { name, output } => hold::hold(client, &name, output),
        GuestCommand::Drain { name, to, output } => hold::drain(client, &name, &to, output),
        GuestCommand::Release { name, from, output } => {
            hold::release(client, &name, from.as_deref(), output)
        }
        GuestCommand::Remove { name } => remove(client, name),
        GuestCommand::Exec { name, command } => exec(client, &name, &command),
    }
}

fn add(
    client: &mut Client,
    name: String,
    addresses: Vec<IpAddr>,
    (kind, rates): (&str, &RateOptions),
    output: Output,
) -> Result<()> {
    let rates = rate_texts(rates);
    let request = Request::GuestAdd { name, kind: kind.to_owned(), addresses, rates };
    let Response::Guest(guest) = client.ask(&request)? else {
        return Err(ClientError::Unexpected.into());
    };
    if output.json {
        return Ok(table::json(&serde_json::to_value(&guest)?)?);
    }
    Ok(table::line(&format!("{} {} ({})", guest.name, addresses_of(&guest), guest.kind))?)
}

fn rate_texts(options: &RateOptions) -> GuestRates {
    let text = |one: Option<Rate>| one.or(options.rate).map(|rate| rate.to_string());
    GuestRates { from: text(options.rate_from), to: text(options.rate_to) }
}

fn list(client: &mut Client, output: Output) -> Result<()> {
    let Response::Guests { guests } = client.ask(&Request::Guests {})? else {
        return Err(ClientError::Unexpected.into());
    };
    if output.json {
        return Ok(table::json(&json!({ "guests": guests }))?);
    }
    if guests.is_empty() {
        return Ok(table::line("no guests; make one with: conet guest add NAME")?);
    }
    let mut rows =
        table::table(&["NAME", "KIND", "ADDRESSES", "STATE", "ORIGIN", "DROPS", "PROBLEM"]);
    for guest in &guests {
        rows.add_row([
            guest.name.clone(),
            guest.kind.clone(),
            addresses_of(guest),
            guest.state.clone(),
            guest.origin.clone(),
            guest.drops.to_string(),
            table::or_dash(guest.problem.as_ref()),
        ]);
    }
    Ok(table::print(&rows)?)
}

/// Prints what a machine is to be started with.
fn args(
    client: &mut Client,
    name: &str,
    memory: u32,
    port: PortName,
    output: Output,
) -> Result<()> {
    let Response::Guests { guests } = client.ask(&Request::Guests {})? else {
        return Err(ClientError::Unexpected.into());
    };
    let guest = guests.iter().find(|guest| guest.name == name);
    let guest = guest.ok_or_else(|| {
        anyhow::anyhow!("no guest is named {name}; list them with: conet guest list")
    })?;
    let Some(machine) = &guest.machine else {
        anyhow::bail!(
            "{name} is a namespace, and runs already; run programs in it with: conet guest exec {name}"
        );
    };
    let (program, arguments) = flags(&guest.kind, machine, memory, port)?;
    if output.json {
        return Ok(table::json(&json!({ "program": program, "arguments": arguments }))?);
    }
    Ok(table::line(&arguments.join(" "))?)
}

/// The program that runs such a guest, and the flags for its card. Neither has blanks but
/// in the socket's directory, which is the node's own.
fn flags(
    kind: &str,
    machine: &Machine,
    memory: u32,
    port: PortName,
) -> Result<(&'static str, Vec<String>)> {
    let Machine { socket, mac, mtu, .. } = machine;
    let at = |transport: Transport| transport.socket(Path::new(socket)).display().to_string();
    let (program, card) = match (kind, port) {
        ("uml", PortName::Vhost) => (UML, vec![format!("virtio_uml.device={socket}:1")]),
        ("uml", PortName::Bess) => {
            // Its own end is a name too; it makes it anew each time.
            let (dst, src) = (at(Transport::Bess), format!("{}.uml", at(Transport::Bess)));
            let card =
                format!("vec0:transport=bess,dst={dst},src={src},depth=128,mac={mac},mtu={mtu}");
            (UML, vec![card])
        }
        ("uml", PortName::Stream) => {
            anyhow::bail!("User-Mode Linux knows no port stream; give it --port bess, or vhost")
        }
        (_, PortName::Bess) => {
            anyhow::bail!("QEMU knows no port bess; give it --port stream, or vhost")
        }
        (_, PortName::Stream) => {
            let path = at(Transport::Stream);
            let netdev = format!("stream,id=conet,server=off,addr.type=unix,addr.path={path}");
            let device = format!("virtio-net-pci,netdev=conet,mac={mac}");
            (QEMU, vec!["-netdev".to_owned(), netdev, "-device".to_owned(), device])
        }
        (_, PortName::Vhost) => (QEMU, vhost_of_qemu(socket, mac, memory)),
    };
    let mut arguments = match program {
        UML => vec![format!("mem={memory}M")],
        _ => vec!["-m".to_owned(), memory.to_string()],
    };
    arguments.extend(card);
    Ok((program, arguments))
}

fn vhost_of_qemu(socket: &str, mac: &str, memory: u32) -> Vec<String> {
    let pairs = [
        // The port sees the guest's memory.
        ("-object", format!("memory-backend-memfd,id=conet,size={memory}M,share=on")),
        ("-machine", "memory-backend=conet".to_owned()),
        // Once a second, until the port is there again.
        ("-chardev", format!("socket,id=conet,path={socket},reconnect=1")),
        ("-netdev", "vhost-user,id=conet,chardev=conet".to_owned()),
        // Without MSI-X, whose calls QEMU 7.2 loses with vhost-user where it emulates.
        ("-device", format!("virtio-net-pci,netdev=conet,mac={mac},vectors=0")),
    ];
    pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
}

fn remove(client: &mut Client, name: String) -> Result<()> {
    match client.ask(&Request::GuestRemove { name })? {
        Response::Done {} => Ok(()),
        _ => Err(ClientError::Unexpected.into()),
    }
}

/// Becomes a program inside a guest: same pid, same parent, same terminal.
fn exec(client: &mut Client, name: &str, command: &[OsString]) -> Result<()> {
    let Some((program, arguments)) = command.split_first() else {
        anyhow::bail!("no program; see: conet guest exec --help");
    };
    enter::enter(client, name)?;
    let source = Command::new(program).args(arguments).exec();
    Err(ExecError { program: program.into(), source }.into())
}

fn addresses_of(guest: &Guest) -> String {
    let all: Vec<_> = guest.addresses.iter().map(IpAddr::to_string).collect();
    all.join(", ")
}
