//! `conet forward …`.

use anyhow::Result;
use conet_node::client::{Client, ClientError};
use conet_wire::control::{Request, Response};
use serde_json::json;

use crate::cli::{ForwardCommand, Output};
use crate::table;

pub(super) fn run(client: &mut Client, command: ForwardCommand) -> Result<()> {
    match command {
        ForwardCommand::Add { forward, output } => add(client, forward, output),
        ForwardCommand::List { output } => list(client, output),
        ForwardCommand::Remove { forward } => remove(client, forward),
    }
}

fn add(client: &mut Client, forward: String, output: Output) -> Result<()> {
    let Response::Forward(forward) = client.ask(&Request::ForwardAdd { forward })? else {
        return Err(ClientError::Unexpected.into());
    };
    if output.json {
        return Ok(table::json(&serde_json::to_value(&forward)?)?);
    }
    Ok(table::line(&format!("{} ({})", forward.forward, forward.state))?)
}

fn list(client: &mut Client, output: Output) -> Result<()> {
    let Response::Forwards { forwards } = client.ask(&Request::Forwards {})? else {
        return Err(ClientError::Unexpected.into());
    };
    if output.json {
        return Ok(table::json(&json!({ "forwards": forwards }))?);
    }
    if forwards.is_empty() {
        return Ok(table::line("no forwards; add one with: conet forward add tcp:2222:GUEST:22")?);
    }
    let mut rows = table::table(&["FORWARD", "GUEST", "STATE", "ORIGIN", "PORTS", "PROBLEM"]);
    for forward in &forwards {
        rows.add_row([
            forward.forward.clone(),
            forward.guest.clone(),
            forward.state.clone(),
            forward.origin.clone(),
            forward.ports.join(", "),
            table::or_dash(forward.problem.as_ref()),
        ]);
    }
    Ok(table::print(&rows)?)
}

fn remove(client: &mut Client, forward: String) -> Result<()> {
    match client.ask(&Request::ForwardRemove { forward })? {
        Response::Done {} => Ok(()),
        _ => Err(ClientError::Unexpected.into()),
    }
}
