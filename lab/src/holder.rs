//! The process that keeps a lab host's namespaces: `conet lab hold`, which
//! nobody needs to type.
//!
//! ```text
//! lab up ──spawn, plan on stdin──► hold: enter net (by name)
//!                                        unshare mnt, uts, ipc, time
//!                                        private /tmp and /run, /run/netns shared with the machine
//!                                        host name, /tmp/marker, the daemon's files
//!        ◄──────"ready" on stdout─────── sleep until killed
//! ```
//!
//! The namespaces live as long as this process (the network namespace also by
//! its name). It holds nothing else: no descriptor of the caller's, no terminal.
//!
//! `/run/netns` inside is the same mount as outside and propagates both ways, so
//! that the guests which a host's daemon makes are seen by the machine's
//! `ip netns`; everything else that is mounted inside stays inside.
//!
//! Sources: `mount_namespaces(7)`, `time_namespaces(7)`, `open_tree(2)`.

use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use conet_netsys::{NETNS_DIR, Netns, NetnsName};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_change,
    move_mount, open_tree,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use crate::{LabError, sys};

/// What the holder says when all is there.
pub(crate) const READY: &str = "ready";

/// What a holder is to make.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Host name, and name of its network namespace.
    pub name: String,
    /// Added to the monotonic and boot-time clocks, in seconds, where the kernel
    /// has time namespaces.
    pub clock_s: u32,
    /// Files to write in the host's private directories.
    pub files: Vec<PlannedFile>,
}

/// A file in a host's private directories.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PlannedFile {
    /// Where; its directory is made.
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
    /// What is in it.
    pub text: String,
}

/// Reads the plan from standard input, carries it out, says `ready` on
/// standard output, and keeps the namespaces until it is killed.
///
/// # Errors
///
/// [`LabError`] for the first step that fails; then nothing is kept.
pub fn hold() -> Result<std::convert::Infallible, LabError> {
    let mut text = String::new();
    io::stdin().lock().read_to_string(&mut text).map_err(LabError::step("read the host's plan"))?;
    let plan: Plan = serde_json::from_str(&text)
        .map_err(io::Error::from)
        .map_err(LabError::step("read the host's plan"))?;
    // A session of its own: a Ctrl-C on the terminal is not for it.
    rustix::process::setsid().map_err(LabError::step("leave the terminal"))?;
    name_process(&plan.name)?;
    Netns::open(&NetnsName::new(&plan.name)?)?.enter_for_good()?;
    enter_host(&plan)?;
    for file in &plan.files {
        write_file(file)?;
    }
    std::env::set_current_dir("/").map_err(LabError::step("go to /"))?;
    let said = writeln!(io::stdout(), "{READY}").and_then(|()| io::stdout().flush());
    said.map_err(LabError::step("answer"))?;
    close_standard_streams()?;
    loop {
        std::thread::park();
    }
}

/// Gives the process the host's name, as `ps` shows it.
fn name_process(name: &str) -> Result<(), LabError> {
    let name = CString::new(name).map_err(io::Error::from);
    let named = name.and_then(|name| Ok(rustix::thread::set_name(&name)?));
    named.map_err(LabError::step("name the process"))
}

fn enter_host(plan: &Plan) -> Result<(), LabError> {
    // A copy of the mount in the same peer group, taken before the rest is cut
    // off: what is mounted below it appears on both sides.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let flags = flags | OpenTreeFlags::AT_RECURSIVE;
    let netns_tree =
        open_tree(CWD, NETNS_DIR, flags).map_err(LabError::step_on("copy the mount", NETNS_DIR))?;
    sys::unshare_host().map_err(LabError::step("make a host's namespaces"))?;
    // Downstream: the machine's later mounts and unmounts arrive, ours stay here.
    let cut = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", cut).map_err(LabError::step("cut the mounts off"))?;
    let program = own_program(&["/tmp", "/run"]);
    private_directory("/tmp", "mode=1777")?;
    private_directory("/run", "mode=0755")?;
    if let Some((path, tree)) = program {
        put_back(&path, tree).map_err(LabError::step("bring conet along"))?;
    }
    fs::create_dir(NETNS_DIR).map_err(LabError::step_on("make", NETNS_DIR))?;
    move_mount(netns_tree, "", CWD, NETNS_DIR, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(LabError::step_on("mount", NETNS_DIR))?;
    rustix::system::sethostname(plan.name.as_bytes())
        .map_err(LabError::step("set the host's name"))?;
    shift_clocks(plan.clock_s)
}

/// This program, where it was started from one of the directories that are going to be
/// `hidden`: without it no `conet` could be run there.
pub(crate) fn own_program(hidden: &[&str]) -> Option<(PathBuf, OwnedFd)> {
    let path = std::env::current_exe().ok()?;
    let is_hidden = hidden.iter().any(|directory| path.starts_with(directory));
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    // Fails where the file is gone since: then there is nothing to bring.
    let tree = is_hidden.then(|| open_tree(CWD, &path, flags).ok())??;
    Some((path, tree))
}

pub(crate) fn put_back(path: &Path, tree: OwnedFd) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::File::create(path)?;
    Ok(move_mount(tree, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

pub(crate) fn private_directory(path: &str, options: &str) -> Result<(), LabError> {
    let options = CString::new(options).map_err(io::Error::from);
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    let mounted =
        options.and_then(|options| Ok(mount("tmpfs", path, "tmpfs", flags, options.as_c_str())?));
    mounted.map_err(LabError::step_on("mount a private directory on", path))
}

/// Moves this process into a time namespace whose clocks are ahead.
fn shift_clocks(seconds: u32) -> Result<(), LabError> {
    match sys::unshare_time() {
        Ok(()) => {}
        // A kernel without CONFIG_TIME_NS: the clocks stay the machine's.
        Err(Errno::INVAL) => return Ok(()),
        Err(error) => return Err(LabError::step("make a time namespace")(error)),
    }
    let offsets = format!("monotonic {seconds} 0\nboottime {seconds} 0\n");
    fs::write("/proc/self/timens_offsets", offsets)
        .map_err(LabError::step("set the host's clocks"))?;
    // The offsets hold once a process has entered: enter.
    let path = "/proc/self/ns/time_for_children";
    let namespace = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(LabError::step_on("open", path))?;
    use std::os::fd::AsFd;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Time))
        .map_err(LabError::step("enter the time namespace"))
}

fn write_file(file: &PlannedFile) -> Result<(), LabError> {
    let write = || -> io::Result<()> {
        if let Some(directory) = file.path.parent() {
            fs::create_dir_all(directory)?;
        }
        // Closed to others before there is something to read.
        fs::write(&file.path, "")?;
        fs::set_permissions(&file.path, fs::Permissions::from_mode(file.mode))?;
        fs::write(&file.path, &file.text)
    };
    write().map_err(LabError::step_on("write", &file.path))
}

pub(crate) fn close_standard_streams() -> Result<(), LabError> {
    let null = || -> rustix::io::Result<()> {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty())?;
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)
    };
    null().map_err(LabError::step("let go of the terminal"))
}
