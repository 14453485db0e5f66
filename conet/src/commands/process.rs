//! `conet run`, `ps`, `migrate` and `why`.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::Result;
use conet_node::client::{Client, ClientError};
use conet_wire::control::{
    How, MemoryMoved, MoveMethod, Moved, Place, Process, Request, Response, Why,
};
use serde_json::json;

use crate::cli::Output;
use crate::table;

/// A program that could not become this process.
#[derive(Debug)]
pub(super) struct ExecError {
    pub(super) program: OsString,
    pub(super) source: io::Error,
}

impl std::fmt::Display for ExecError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { program, source } = self;
        write!(f, "cannot run {} ({source}); give a program on PATH", program.display())
    }
}

impl std::error::Error for ExecError {}

/// Registers this process, and becomes the program: the pid that the shell knows
/// is the program's, and its parent is the shell.
pub(super) fn run(client: &mut Client, node: Option<String>, command: &[OsString]) -> Result<()> {
    let pid = std::process::id();
    match client.ask(&Request::Register { pid, node })? {
        Response::Registered { .. } => {}
        _ => return Err(ClientError::Unexpected.into()),
    }
    let Some((program, arguments)) = command.split_first() else {
        anyhow::bail!("no program; see: conet run --help");
    };
    let source = Command::new(program).args(arguments).exec();
    Err(ExecError { program: program.clone(), source }.into())
}

pub(super) fn ps(client: &mut Client, output: Output) -> Result<()> {
    let Response::Processes { processes } = client.ask(&Request::Ps {})? else {
        return Err(ClientError::Unexpected.into());
    };
    if output.json {
        return Ok(table::json(&json!({ "processes": processes }))?);
    }
    let headings = [
        "PID",
        "UID",
        "PLACE",
        "NODE",
        "REMOTE",
        "HOPS",
        "SENT HOME",
        "CALLS",
        "FREEZE",
        "WAITED",
        "COMMAND",
    ];
    let mut rows = table::table(&headings);
    for process in &processes {
        rows.add_row(row(process));
    }
    table::print(&rows)?;
    for process in &processes {
        if let Some(reason) = &process.reason {
            table::line(&format!("{}: {}", process.pid, reason.sentence))?;
        }
    }
    Ok(())
}

fn row(process: &Process) -> [String; 11] {
    [
        process.pid.to_string(),
        process.uid.to_string(),
        place(process.place).to_owned(),
        process.node.clone(),
        table::or_dash(process.remote_pid),
        process.hops_done.to_string(),
        process.sent_home.to_string(),
        process.calls_forwarded.to_string(),
        process.freeze_us.map_or_else(|| "-".to_owned(), milliseconds),
        milliseconds(process.waited_us),
        process.command.clone(),
    ]
}

fn place(place: Place) -> &'static str {
    match place {
        Place::Home => "home",
        Place::Moving => "moving",
        Place::Away => "away",
        Place::Unreachable => "unreachable",
        Place::Ended => "ended",
    }
}

fn milliseconds(us: u64) -> String {
    format!("{}.{:01} ms", us / 1000, us % 1000 / 100)
}

pub(super) fn migrate(
    client: &mut Client,
    pid: u32,
    to: String,
    how: How,
    output: Output,
) -> Result<()> {
    let mut tell = |progress: &conet_wire::control::Progress| {
        // Progress that nobody reads is no reason to stop.
        writeln!(io::stderr(), "{}: {}", progress.phase, progress.detail).ok();
    };
    let request = Request::Migrate { pid, to, how };
    let Response::Moved(moved) = client.ask_telling(&request, &mut tell)? else {
        return Err(ClientError::Unexpected.into());
    };
    if output.json {
        return Ok(table::json(&serde_json::to_value(&moved)?)?);
    }
    let Moved { pid, node, freeze_us, total_us, memory, .. } = moved;
    let (freeze, total) = (milliseconds(freeze_us), milliseconds(total_us));
    table::line(&format!("{pid} runs on {node} (held for {freeze} of {total})"))?;
    if let Some(memory) = memory {
        table::line(&format!("  {}", sentence(&memory)))?;
    }
    Ok(())
}

/// How memory moved, for people.
fn sentence(memory: &MemoryMoved) -> String {
    let MemoryMoved { pages, held_pages, rounds, why, .. } = memory;
    let why = why.as_ref().map_or_else(String::new, |why| format!(": {why}"));
    match memory.method {
        MoveMethod::Precopy => format!(
            "{pages} pages sent, {held_pages} of them while it was held, after {} rounds",
            rounds.len()
        ),
        MoveMethod::Stop => format!("{pages} pages sent, all while it was held{why}"),
        MoveMethod::Changes => format!("{pages} pages came home, those changed away"),
        MoveMethod::All => format!("{pages} pages came home, all that it had{why}"),
    }
}

pub(super) fn why(client: &mut Client, pid: u32, output: Output) -> Result<()> {
    let Response::Why(why) = client.ask(&Request::Why { pid })? else {
        return Err(ClientError::Unexpected.into());
    };
    if output.json {
        return Ok(table::json(&serde_json::to_value(&why)?)?);
    }
    let Why { pid, command, movable, reasons } = why;
    let verdict = if movable { "may move" } else { "may not move" };
    table::line(&format!("{pid} ({command}) {verdict}"))?;
    for reason in reasons {
        let passing = if reason.passing { " (may pass)" } else { "" };
        table::line(&format!("  {}: {}{passing}", reason.code, reason.sentence))?;
    }
    Ok(())
}
