//! `conet doctor`.

use std::path::Path;

use anyhow::{Context, Result};
use conet_node::doctor::{Check, Trial, examine};
use serde_json::json;

use crate::cli::Output;
use crate::table;

/// The program to make trials with: this one, also if its file has been replaced.
const OWN_PROGRAM: &str = "/proc/self/exe";

pub(super) fn doctor(socket: &Path, output: Output) -> Result<()> {
    let found = examine(Path::new(OWN_PROGRAM), socket);
    let (moving, tunnelling) = (found.moves_programs(), found.tunnels());
    if output.json {
        table::json(&json!({
            "ok": moving && tunnelling,
            "moving": moving,
            "tunnelling": tunnelling,
            "checks": found.checks,
        }))?;
    } else {
        print(&found.checks)?;
    }
    if moving && tunnelling {
        return Ok(());
    }
    let what = match (moving, tunnelling) {
        (false, false) => "programs do not move and packets do not travel",
        (false, true) => "programs do not move",
        _ => "packets do not travel",
    };
    anyhow::bail!("on this machine {what}, for want of: {}", found.missing().join(", "));
}

fn print(checks: &[Check]) -> Result<()> {
    let mut rows = table::table(&["CHECK", "STATE", "FOUND"]);
    for check in checks {
        rows.add_row([check.name, check.state.as_str(), check.found.as_str()]);
    }
    table::print(&rows)?;
    for check in checks {
        if let Some(remedy) = check.remedy {
            table::line(&format!("{} touches {}: {remedy}", check.name, check.feature))?;
        }
    }
    Ok(())
}

/// Makes one trial in this process and says what it found in one line.
pub(super) fn trial(name: &str) -> Result<()> {
    let trial = Trial::named(name).context("no such trial; run: conet doctor")?;
    let finding = trial.run();
    Ok(table::line(&serde_json::to_string(&finding)?)?)
}
