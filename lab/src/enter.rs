//! Entering a lab host: the calling process joins its namespaces and becomes a
//! program there, with the pid it had.
//!
//! Only a process with one thread may do so: a thread of its own would stay
//! outside (`setns(2)`).

use std::convert::Infallible;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use conet_node::client::SOCKET_VARIABLE;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use crate::LabError;
use crate::plan;
use crate::state::{HostState, LabState};

/// Environment variable that names a host's configuration.
pub const CONFIG_VARIABLE: &str = "CONET_CONFIG";

/// Becomes a program inside a host: same pid, same parent, same terminal.
///
/// Its environment gains `CONET_SOCKET` and `CONET_CONFIG`, by which commands
/// find the host's daemon. Its working directory is the same path, or `/` where
/// the host has none such.
///
/// # Errors
///
/// [`LabError`]; it returns only then.
pub fn exec(
    host: &str,
    program: &OsString,
    arguments: &[OsString],
) -> Result<Infallible, LabError> {
    enter(LabState::load()?.host(host)?)?;
    let source = Command::new(program)
        .args(arguments)
        .env(SOCKET_VARIABLE, plan::socket())
        .env(CONFIG_VARIABLE, plan::CONFIG)
        .exec();
    Err(LabError::Program { program: program.into(), source })
}

/// Becomes the daemon of a host, in a session of its own.
///
/// # Errors
///
/// [`LabError`]; it returns only then.
pub fn exec_daemon(host: &str) -> Result<Infallible, LabError> {
    // Before the mounts change: what runs now is what the daemon is to be.
    let program = Path::new("/proc/self/exe");
    enter(LabState::load()?.host(host)?)?;
    rustix::process::setsid().map_err(LabError::step("leave the terminal"))?;
    let error = Command::new(program)
        .arg0("conet")
        .args(["up", "-c", plan::CONFIG])
        .env(SOCKET_VARIABLE, plan::socket())
        .env(CONFIG_VARIABLE, plan::CONFIG)
        .exec();
    Err(LabError::step("start the daemon")(error))
}

fn enter(host: &HostState) -> Result<(), LabError> {
    let gone = || LabError::HostGone { name: host.name.clone() };
    let pid = i32::try_from(host.holder.pid).ok().and_then(Pid::from_raw).ok_or_else(gone)?;
    let holder = pidfd_open(pid, PidfdFlags::empty()).map_err(|_| gone())?;
    // With the descriptor open the pid cannot pass to another process.
    if !host.holder.is_alive() {
        return Err(gone());
    }
    let directory = std::env::current_dir().ok();
    let shared = ThreadNameSpaceType::NETWORK
        | ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION;
    let all = shared | ThreadNameSpaceType::TIME;
    let joined = match move_into_thread_name_spaces(holder.as_fd(), all) {
        // A kernel without time namespaces.
        Err(Errno::INVAL) => move_into_thread_name_spaces(holder.as_fd(), shared),
        other => other,
    };
    joined.map_err(|error| match error {
        Errno::PERM => LabError::NotRoot,
        error => LabError::step("enter the lab host")(error),
    })?;
    let back = directory.is_some_and(|directory| std::env::set_current_dir(directory).is_ok());
    if !back {
        std::env::set_current_dir("/").map_err(LabError::step("go to /"))?;
    }
    Ok(())
}
