//! `conet guest …`.

mod capture;
mod hold;
mod machine;

use std::ffi::OsString;
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::Result;
use conet_hostinject::Rate;
use conet_node::client::{Client, ClientError};
use conet_node::enter;
use conet_wire::control::{Guest, GuestRates, Request, Response};
use serde_json::json;

use super::process::ExecError;
use crate::cli::{GuestCommand, Output, RateOptions};
use crate::table;

pub(super) fn run(client: &mut Client, command: GuestCommand) -> Result<()> {
    match command {
        GuestCommand::Add { name, address, kind, queues, rates, output } => {
            add(client, name, address, (kind.as_str(), &rates, queues), output)
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
        GuestCommand::Args { name, machine, output } => {
            machine::args(client, &name, machine, output)
        }
        GuestCommand::Hold { name, output } => hold::hold(client, &name, output),
        GuestCommand::Drain { name, to, output } => hold::drain(client, &name, &to, output),
        GuestCommand::Release { name, from, output } => {
            hold::release(client, &name, from.as_deref(), output)
        }
        GuestCommand::Start { name, machine, program, arguments } => {
            let Err(error) = machine::start(client, &name, machine, program, &arguments);
            Err(error)
        }
        GuestCommand::Remove { name } => remove(client, name),
        GuestCommand::Exec { name, program } => exec(client, &name, &program.command),
    }
}

fn add(
    client: &mut Client,
    name: String,
    addresses: Vec<IpAddr>,
    (kind, rates, queues): (&str, &RateOptions, Option<u16>),
    output: Output,
) -> Result<()> {
    let rates = rate_texts(rates);
    let request = Request::GuestAdd { name, kind: kind.to_owned(), addresses, rates, queues };
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
            match guest.held {
                Some(held) => format!("{}, held: {}", guest.state, held.packets),
                None => guest.state.clone(),
            },
            guest.origin.clone(),
            guest.drops.to_string(),
            table::or_dash(guest.problem.as_ref()),
        ]);
    }
    Ok(table::print(&rows)?)
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
