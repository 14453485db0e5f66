//! `conet guest hold`, `drain` and `release`: a guest's packets while it moves.
//!
//! ```text
//! here                                 there, where a guest of its address is made
//!   hold web
//!   drain web --to FILE ── FILE ──►      release web --from FILE
//! ```
//!
//! What was drained is in the file before it is gone from the port for good: where the file
//! cannot be written, or this is killed, the port has it again.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use conet_node::client::{Client, ClientError};
use conet_wire::control::{Held, Request, Response};
use conet_wire::held;
use serde_json::json;

use crate::cli::Output;
use crate::table;

/// Bytes of a piece: with what is around it, and half as much again as it is written, well
/// below the longest request.
const PIECE: usize = 2700;
/// The name of standard input and output.
const STANDARD_STREAM: &str = "-";

pub(super) fn hold(client: &mut Client, name: &str, output: Output) -> Result<()> {
    let held = ask(client, Request::GuestHold { name: name.to_owned() })?;
    if output.json {
        return Ok(table::json(&json!({ "guest": name, "held": held }))?);
    }
    Ok(table::line(&format!("{name} is held, with {}", shown(held)))?)
}

pub(super) fn drain(client: &mut Client, name: &str, to: &Path, output: Output) -> Result<()> {
    let by_stdout = to == Path::new(STANDARD_STREAM);
    anyhow::ensure!(!(by_stdout && output.json), "give --json with a file, as in --to web.held");
    // Whatever can fail does so before anything is taken out.
    let mut file = match by_stdout {
        true => None,
        false => Some(create(to)?),
    };
    let asked = client.ask(&Request::GuestDrain { name: name.to_owned() });
    let written = asked.map_err(anyhow::Error::from).and_then(|response| {
        let Response::Drained { held, packets } = response else {
            return Err(ClientError::Unexpected.into());
        };
        let bytes = STANDARD.decode(packets).map_err(|_| ClientError::Unexpected)?;
        let written = match &mut file {
            Some(file) => file.write_all(&bytes).and_then(|()| file.sync_all()),
            None => io::stdout().write_all(&bytes).and_then(|()| io::stdout().flush()),
        };
        if let Err(error) = written {
            // Not confirmed, so this has them kept again.
            let back = ask(client, Request::GuestHold { name: name.to_owned() });
            let kept = if back.is_ok() { "kept for it still" } else { "perhaps lost" };
            let said = format!("cannot write {}; {} are {kept}", to.display(), shown(held));
            return Err(anyhow::Error::new(error).context(said));
        }
        Ok(held)
    });
    let held = written.inspect_err(|_| {
        if !by_stdout {
            std::fs::remove_file(to).ok();
        }
    })?;
    // Where this fails they may be in both places, which is better than in none.
    let confirmed = client.ask(&Request::GuestDrained { name: name.to_owned() });
    confirmed.with_context(|| {
        format!("{} are in {}, and perhaps kept here again", shown(held), to.display())
    })?;
    if output.json {
        return Ok(table::json(&json!({ "guest": name, "drained": held }))?);
    }
    match by_stdout {
        true => Ok(()),
        false => Ok(table::line(&format!("{} of {name} are in {}", shown(held), to.display()))?),
    }
}

pub(super) fn release(
    client: &mut Client,
    name: &str,
    from: Option<&Path>,
    output: Output,
) -> Result<()> {
    let given = match from {
        Some(from) => give_before(client, name, &read(from)?)?,
        None => (Held::default(), 0),
    };
    let released = ask(client, Request::GuestRelease { name: name.to_owned() })?;
    let (given, lost) = given;
    if output.json {
        let object = json!({ "guest": name, "given": given, "lost": lost, "released": released });
        return Ok(table::json(&object)?);
    }
    let lost = if lost > 0 { format!("; {lost} did not fit") } else { String::new() };
    Ok(table::line(&format!("{name} is released, with {}{lost}", shown(released)))?)
}

/// Gives packets to a guest that is held from now on; one that was not before is let go
/// again where that fails.
fn give_before(client: &mut Client, name: &str, bytes: &[u8]) -> Result<(Held, u64)> {
    held::parse(bytes)?;
    let Response::Guests { guests } = client.ask(&Request::Guests {})? else {
        return Err(ClientError::Unexpected.into());
    };
    let was_held = guests.iter().any(|guest| guest.name == name && guest.held.is_some());
    ask(client, Request::GuestHold { name: name.to_owned() })?;
    give(client, name, bytes).inspect_err(|_| {
        if !was_held {
            ask(client, Request::GuestRelease { name: name.to_owned() }).ok();
        }
    })
}

fn give(client: &mut Client, name: &str, bytes: &[u8]) -> Result<(Held, u64)> {
    let mut at = 0;
    let mut pieces = bytes.chunks(PIECE).peekable();
    while let Some(bytes) = pieces.next() {
        let last = pieces.peek().is_none();
        let piece = STANDARD.encode(bytes);
        let request = Request::GuestAccept { name: name.to_owned(), at, piece, last };
        at += bytes.len() as u64;
        match client.ask(&request)? {
            Response::Accepted { held, lost } if last => return Ok((held, lost)),
            Response::Done {} if !last => {}
            _ => break,
        }
    }
    Err(ClientError::Unexpected.into())
}

/// A new file for its owner alone, since what people say is in it.
fn create(to: &Path) -> Result<File> {
    let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to);
    created.with_context(|| format!("cannot make {}; name a file that is not there", to.display()))
}

fn read(from: &Path) -> Result<Vec<u8>> {
    let limit = held::MAX_LENGTH as u64 + 1;
    let mut bytes = Vec::new();
    let read = match from == Path::new(STANDARD_STREAM) {
        true => io::stdin().lock().take(limit).read_to_end(&mut bytes),
        false => File::open(from).and_then(|file| file.take(limit).read_to_end(&mut bytes)),
    };
    read.with_context(|| format!("cannot read {}", from.display()))?;
    Ok(bytes)
}

fn ask(client: &mut Client, request: Request) -> Result<Held> {
    match client.ask(&request)? {
        Response::Held(held) => Ok(held),
        _ => Err(ClientError::Unexpected.into()),
    }
}

fn shown(held: Held) -> String {
    let Held { packets, bytes } = held;
    format!("{packets} packets ({bytes} bytes)")
}
