//! The roles that this executable plays as a process of its own.

use crate::peers::conn::Wait;
use crate::peers::{bound, copy, inject, notify};
use crate::sys::filter::{self, Catch, Which};
use crate::sys::vdso;
use crate::work::{Program, serve};
use anyhow::{Context as _, Result, bail};
use rustix::fd::AsRawFd as _;
use rustix::process::{Signal, set_parent_process_death_signal};

fn port(text: &str) -> Result<u16> {
    text.parse().context("a port")
}

fn waiting(how: &str) -> Wait {
    if how == "spin" { Wait::Spin } else { Wait::Block }
}

/// Plays a role until its input, its connection or its parent ends.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    // The programs that move are not touched: they end with their input.
    if !matches!(args.as_slice(), ["program"] | ["memory", _]) {
        set_parent_process_death_signal(Some(Signal::KILL))?;
    }
    match args.as_slice() {
        ["program"] => serve(&mut Program::new()?, 0),
        ["program-filtered"] => {
            let mut program = Program::new()?;
            filter::install(Which::Local, Catch::Allow)?;
            serve(&mut program, 0)
        }
        ["program-trapped"] => {
            let mut program = Program::new()?;
            bound::trap_here()?;
            serve(&mut program, 0)
        }
        ["program-clocks"] => {
            let mut program = Program::new()?;
            vdso::install().context("replacing the vDSO")?;
            serve(&mut program, 0)
        }
        ["program-traced"] => {
            let mut program = Program::new()?;
            filter::install(Which::Forwarded, Catch::Trace)?;
            serve(&mut program, 0)
        }
        ["program-notified"] => {
            let mut program = Program::new()?;
            let listener = filter::install(Which::Forwarded, Catch::Notify)?;
            let listener = listener.context("no listener")?;
            let number = u64::from(listener.as_raw_fd().unsigned_abs());
            // Stays open as long as this process, for its supervisor to take.
            std::mem::forget(listener);
            serve(&mut program, number)
        }
        ["program-bound", at, how, wait] => {
            let mut program = Program::new()?;
            bound::trap_to(port(at)?, *how == "sealed", waiting(wait))?;
            serve(&mut program, 0)
        }
        ["memory", mib] => {
            let mut memory = crate::moves::Memory::new(mib.parse()?);
            let at = memory.area().at;
            serve(&mut memory, at)
        }
        ["tcp", at, how] => serve(&mut bound::RoundTrip::new(port(at)?, waiting(how))?, 0),
        ["inject"] => {
            let mut borrowed = inject::Borrowed::start()?;
            let id = borrowed.id();
            serve(&mut borrowed, id)
        }
        ["used"] => inject::wait_to_be_used(),
        ["serve-tcp"] => bound::bounce(),
        ["serve-bound", how] => bound::serve(*how == "sealed"),
        ["take-copies"] => copy::take(),
        ["serve-inject"] => inject::serve(),
        ["trace", pid, at] => inject::trace(pid.parse()?, port(at)?),
        ["supervise", pid, fd] => notify::supervise(pid.parse()?, fd.parse()?),
        other => bail!("no such role: {}", other.join(" ")),
    }
}
