//! `conet lab …` and `conet demo`.

use std::convert::Infallible;
use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use conet_lab::demo::{self, Figure, Report, Step};
use conet_lab::{LabError, LabReport, Options, Removed, Watch, rootless};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::cli::{LabCommand, Output};
use crate::table;

pub(super) fn run(command: LabCommand) -> Result<ExitCode> {
    if rootless::is_needed()
        && let Some(status) = run_as_user(&command)?
    {
        return Ok(status);
    }
    if let LabCommand::Init { parent, command } = command {
        return Ok(rootless::init(parent, &command)?.into());
    }
    run_as_root(command).map(|()| ExitCode::SUCCESS)
}

/// Runs the same command in the user's machine; none for those that make that.
fn run_as_user(command: &LabCommand) -> Result<Option<ExitCode>> {
    let status = match command {
        LabCommand::Up { .. } => rootless::run_lab_up(&arguments()),
        LabCommand::Down { output } => match rootless::run_lab_down(&arguments()) {
            Err(LabError::NotUp) => {
                print_removed(&Removed::default(), *output)?;
                Ok(0)
            }
            other => other,
        },
        LabCommand::Status { .. } | LabCommand::Exec { .. } | LabCommand::Restart { .. } => {
            rootless::run_in_lab(&arguments())
        }
        LabCommand::Hold
        | LabCommand::Daemon { .. }
        | LabCommand::Init { .. }
        | LabCommand::Machine => return Ok(None),
    };
    Ok(Some(status?.into()))
}

/// What this command was started with.
fn arguments() -> Vec<OsString> {
    std::env::args_os().skip(1).collect()
}

fn run_as_root(command: LabCommand) -> Result<()> {
    match command {
        LabCommand::Up { hosts, guests, ipv6, mode, output } => {
            up(&Options { hosts, guests, ipv6, mode: mode.into() }, output)
        }
        LabCommand::Down { output } => down(output),
        LabCommand::Status { output } => show(&conet_lab::status()?, output),
        LabCommand::Exec { host, program } => {
            let Some((program, arguments)) = program.command.split_first() else {
                anyhow::bail!("no program; see: conet lab exec --help");
            };
            become_other(conet_lab::exec(&host, program, arguments))
        }
        LabCommand::Restart { host } => {
            let interrupted = on_signals()?;
            Ok(conet_lab::restart(&host, Watch { progress: &tell, interrupted: &interrupted })?)
        }
        LabCommand::Hold => become_other(conet_lab::hold()),
        LabCommand::Init { .. } => anyhow::bail!("process 1 is not run twice"),
        LabCommand::Machine => Ok(rootless::start_machine()?),
        LabCommand::Daemon { host } => become_other(conet_lab::exec_daemon(&host)),
    }
}

/// The result of something that returns only in failure.
fn become_other(result: Result<Infallible, conet_lab::LabError>) -> Result<()> {
    match result {
        Ok(never) => match never {},
        Err(error) => Err(error.into()),
    }
}

/// A flag that the signals set which ask a program to end.
fn on_signals() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&flag))
            .context("cannot watch for signals")?;
    }
    Ok(flag)
}

fn tell(step: &str) {
    // Progress that nobody reads is no reason to stop.
    writeln!(io::stderr(), "{step} …").ok();
}

fn up(options: &Options, output: Output) -> Result<()> {
    let interrupted = on_signals()?;
    conet_lab::up(options, Watch { progress: &tell, interrupted: &interrupted })?;
    show(&conet_lab::status()?, output)
}

fn down(output: Output) -> Result<()> {
    print_removed(&conet_lab::down()?, output)
}

fn print_removed(removed: &Removed, output: Output) -> Result<()> {
    if output.json {
        let removed = json!({
            "processes": removed.processes,
            "namespaces": removed.namespaces,
            "links": removed.links,
        });
        return Ok(table::json(&removed)?);
    }
    table::line(&format!(
        "removed {} processes, {} namespaces, {} links",
        removed.processes,
        removed.namespaces.len(),
        removed.links.len()
    ))?;
    Ok(())
}

fn show(lab: &LabReport, output: Output) -> Result<()> {
    if output.json {
        return Ok(table::json(&serde_json::to_value(lab)?)?);
    }
    let mut rows =
        table::table(&["HOST", "ADDRESS", "OVERLAY", "MODE", "DAEMON", "PEERS UP", "GUESTS"]);
    for host in &lab.hosts {
        let guests: Vec<_> =
            host.guests.iter().map(|guest| format!("{} {}", guest.name, guest.address)).collect();
        rows.add_row([
            host.name.clone(),
            host.address.to_string(),
            host.overlay.clone(),
            lab.mode.clone(),
            table::or_dash(host.daemon_pid),
            host.peers_up.to_string(),
            if guests.is_empty() { "-".to_owned() } else { guests.join(", ") },
        ]);
    }
    table::print(&rows)?;
    Ok(())
}

pub(super) fn demo(output: Output) -> Result<ExitCode> {
    if rootless::is_needed() {
        return Ok(rootless::run(&arguments())?.into());
    }
    show_demo(output).map(|()| ExitCode::SUCCESS)
}

fn show_demo(output: Output) -> Result<()> {
    let interrupted = on_signals()?;
    let mut told = |step: &Step| {
        // Progress that nobody reads is no reason to stop.
        writeln!(io::stderr(), "  {}", summary(step)).ok();
    };
    let report = demo::demo(Watch { progress: &tell, interrupted: &interrupted }, &mut told);
    if output.json {
        table::json(&report.to_json()?)?;
    } else {
        print_report(&report)?;
    }
    if report.interrupted {
        anyhow::bail!("interrupted; nothing of the lab is left, run conet demo again");
    }
    match report.steps.iter().find_map(|step| Some((step, step.error.as_ref()?))) {
        Some((step, error)) => Err(anyhow::anyhow!("{}: {error}", step.name)),
        None if !report.ok() => {
            Err(anyhow::anyhow!("this machine can show none of the steps; see: conet doctor"))
        }
        None => Ok(()),
    }
}

/// A step in one line.
fn summary(step: &Step) -> String {
    match (&step.error, &step.unavailable) {
        (Some(error), _) => format!("FAILED: {error}"),
        (None, Some(reason)) => format!("{} unavailable: {reason}", step.name),
        (None, None) => format!("ok in {:.1} s: {}", step.seconds, figures(step)),
    }
}

fn figures(step: &Step) -> String {
    let shown: Vec<_> = step.figures.iter().map(figure).collect();
    shown.join(", ")
}

fn figure(figure: &Figure) -> String {
    let value = match &figure.value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let unit = match figure.unit {
        "us" => "µs",
        "mbit_s" => "Mbit/s",
        other => other,
    };
    format!("{} {value} {unit}", figure.name.replace('_', " ")).trim_end().to_owned()
}

fn print_report(report: &Report) -> Result<()> {
    let mut rows = table::table(&["STEP", "RESULT", "SECONDS", "FIGURES"]);
    for step in &report.steps {
        rows.add_row([
            step.name.clone(),
            match (&step.error, &step.unavailable) {
                (Some(_), _) => "FAILED",
                (None, Some(_)) => "unavailable",
                (None, None) => "ok",
            }
            .to_owned(),
            format!("{:.1}", step.seconds),
            step.error.clone().or(step.unavailable.clone()).unwrap_or_else(|| figures(step)),
        ]);
    }
    table::print(&rows)?;
    let note = match report.rootless {
        true => "; without root: guests by TAP, and no way to this machine's LAN",
        false => "",
    };
    table::line(&format!("{} steps in {:.1} s{note}", report.steps.len(), report.seconds))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_as_people_write_them() {
        let shown = |name, value: Value, unit| figure(&Figure { name, value, unit });
        assert_eq!(shown("rtt_p50", json!(12.5), "us"), "rtt p50 12.5 µs");
        assert_eq!(shown("protocols", json!("udp"), ""), "protocols udp");
        assert_eq!(shown("throughput", json!(900.1), "mbit_s"), "throughput 900.1 Mbit/s");
    }
}
