//! What each command does.

mod bench;
mod doctor;
mod forward;
mod guest;
mod import;
mod keys;
mod lab;
mod node;
mod process;
mod trace;

use conet_wire::control::How;
use std::io;
use std::process::ExitCode;

use anyhow::Result;
use conet_hostinject::Lease;
use conet_hostinject::vhost::{ServerArguments, VhostSpec};
use conet_lab::demo::program;
use conet_node::client::{Client, socket_path};

use crate::cli::{Cli, Command, DemoProgram};

/// Carries out a command.
pub(crate) fn run(cli: Cli) -> Result<ExitCode> {
    let socket = cli.socket.unwrap_or_else(socket_path);
    let connect = || Client::connect(&socket);
    match cli.command {
        Command::Demo { output } => return lab::demo(output),
        Command::Lab { command } => return lab::run(command),
        Command::Keygen => keys::keygen(),
        Command::Pubkey { wireguard } => keys::pubkey(wireguard),
        Command::Import { from, options } => import::import(&from, options),
        Command::Up { config } => node::up(&config),
        Command::Status { output } => node::status(&mut connect()?, output),
        Command::Peers { output } => node::peers(&mut connect()?, output),
        Command::Forward { command } => forward::run(&mut connect()?, command),
        Command::Guest { command } => guest::run(&mut connect()?, command),
        Command::GuestServer { mac, mtu, control, prefix, gateway, dns, address, queues } => {
            let lease = Lease { addresses: address, gateways: gateway, prefix, dns, mtu };
            let spec = VhostSpec { mac, lease, queues };
            let arguments = ServerArguments { spec, control };
            let never = conet_hostinject::vhost::run_server(arguments)?;
            match never {}
        }
        Command::Run { node, program } => process::run(&mut connect()?, node, &program.command),
        Command::Ps { output } => process::ps(&mut connect()?, output),
        Command::Migrate { pid, to, precopy: _, stop, output } => {
            let how = if stop { How::Stop } else { How::Precopy };
            process::migrate(&mut connect()?, pid, to, how, output)
        }
        Command::Trace { pid, seconds, output } => {
            trace::trace(&mut connect()?, pid, seconds, output)
        }
        Command::Why { pid, output } => process::why(&mut connect()?, pid, output),
        Command::Bench { name: None, json, .. } => bench::list(json),
        Command::Bench { name: Some(name), json, options } => bench::run(&name, json, options),
        Command::Down => node::down(&mut connect()?),
        Command::Doctor { trial: Some(name), .. } => doctor::trial(&name),
        Command::Doctor { output, trial: None } => doctor::doctor(&socket, output),
        Command::DemoProgram { program: DemoProgram::Calls } => Ok(program::calls()?),
        Command::DemoProgram { program: DemoProgram::Work { file, lines } } => {
            program::work(&file, lines)?;
            return Ok(ExitCode::from(program::STATUS));
        }
    }?;
    Ok(ExitCode::SUCCESS)
}

/// The status that a failed command ends with: that of a shell where a program
/// could not be started, else 1.
pub(crate) fn exit_status(error: &anyhow::Error) -> u8 {
    let source = match error.downcast_ref::<conet_lab::LabError>() {
        Some(conet_lab::LabError::Program { source, .. }) => source,
        _ => match error.downcast_ref::<process::ExecError>() {
            Some(error) => &error.source,
            None => return 1,
        },
    };
    if source.kind() == io::ErrorKind::NotFound { 127 } else { 126 }
}
