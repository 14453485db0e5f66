//! A machine of one's own, for users who are not root.
//!
//! ```text
//! user's shell ─► conet demo ── user, net, mount, pid, uts, ipc namespaces
//!                    │ waits      └─► init: process 1, /proc, /run ─► conet demo, as root in there
//!                    └ dies ► init is killed ► the kernel ends all that is inside
//!
//! user's shell ─► conet lab up ── as above, but init stays (`lab init`)
//!                 conet lab …  ── joins init's namespaces ─► conet lab …, as root in there
//! ```
//!
//! The user namespace maps one id, the user's own, to root. Inside, everything is as
//! for root but for what follows from that: there is no second id to run a hosted
//! program under, so the sandbox runs under the user's; guests are plugged by TAP;
//! and the LAN is the lab's own, with no way to the machine's.
//!
//! A process of the outside cannot become one of the inside (`setns(2)`: a process
//! namespace is for children), so here `conet lab exec` waits for the program rather
//! than being it, and gives its exit status.
//!
//! Nothing remains: process 1 takes all with it when it ends, and the kernel removes
//! namespaces, links and mounts with the last process.
//!
//! Sources: `user_namespaces(7)`, `pid_namespaces(7)`.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use conet_netsys::{IfName, Netlink, userns};
use conet_node::procfs::{ProcessRef, Stat};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, FlockOperation, flock, unlinkat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, wait};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use crate::holder::{close_standard_streams, own_program, private_directory, put_back};
use crate::{LabError, sys};

mod signals;

use signals::Signals;

/// The running program.
const SELF: &str = "/proc/self/exe";
/// What a keeping init says when all is there.
const READY: &str = "ready";
/// The file that names the user's lab machine, and what it is before it is whole.
const FILE: &str = "machine.json";
const NEXT: &str = "machine.next";
/// How long a killed machine may take to be gone.
const KILL_LIMIT: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// Whether this process is in such a machine, or in any user namespace that has but
/// one id.
#[must_use]
pub fn is_inside() -> bool {
    rustix::process::geteuid().is_root() && userns::has_one_id().unwrap_or(false)
}

/// Whether this process needs such a machine.
#[must_use]
pub fn is_needed() -> bool {
    !rustix::process::geteuid().is_root()
}

/// Runs this program with `arguments` in a machine of its own, which ends with it and
/// with the caller. Gives its exit status.
///
/// # Errors
///
/// [`LabError::NoNamespace`] and others, where the machine cannot be made.
pub fn run(arguments: &[OsString]) -> Result<u8, LabError> {
    let signals = Signals::watch()?;
    make_namespaces()?;
    let parent = std::process::id().to_string();
    let init = Command::new(SELF)
        .args(["lab", "init", "--parent", &parent, "--"])
        .args(arguments)
        .spawn()
        .map_err(LabError::step("start process 1"))?;
    supervise(init, false, &signals)
}

/// Runs this program with `arguments` in the user's lab machine.
///
/// # Errors
///
/// [`LabError::NotUp`] where there is none, others where it cannot be entered.
pub fn run_in_lab(arguments: &[OsString]) -> Result<u8, LabError> {
    let machine = Machine::open()?;
    machine.run(arguments)
}

/// Makes the user's lab machine and runs this program with `arguments` in it; where
/// that fails, the machine is removed, unless it was there before.
///
/// # Errors
///
/// As [`run`].
pub fn run_lab_up(arguments: &[OsString]) -> Result<u8, LabError> {
    let lock = Lock::take()?;
    let (machine, is_new) = match Machine::open() {
        Ok(machine) => (machine, false),
        Err(LabError::NotUp) => match Machine::start(&lock) {
            Ok(machine) => (machine, true),
            Err(error) => {
                lock.remove_state()?;
                return Err(error);
            }
        },
        Err(error) => return Err(error),
    };
    let result = machine.run(arguments);
    if is_new && !matches!(result, Ok(0)) {
        machine.end()?;
        lock.remove_state()?;
    }
    result
}

/// Runs this program with `arguments`, `lab down`, in the user's lab machine, and
/// removes that; without a machine there is nothing to run it in.
///
/// # Errors
///
/// [`LabError::NotUp`] where there is no machine, and then nothing is left of one.
pub fn run_lab_down(arguments: &[OsString]) -> Result<u8, LabError> {
    let lock = Lock::take()?;
    let machine = match Machine::open() {
        Err(LabError::NotUp) => {
            lock.remove_state()?;
            return Err(LabError::NotUp);
        }
        other => other?,
    };
    let status = machine.run(arguments)?;
    machine.end()?;
    lock.remove_state()?;
    Ok(status)
}

/// Moves this process into new namespaces, the children's process namespace included.
fn make_namespaces() -> Result<(), LabError> {
    userns::become_root().map_err(LabError::NoNamespace)?;
    // What security modules refuse to an ordinary user's namespace, they refuse here.
    sys::unshare_machine()
        .map_err(|error| LabError::NoNamespace(userns::UserNamespaceError::Refused(error.into())))
}

/// Is process 1 of a machine: `conet lab init`, which nobody needs to type. With a
/// command it runs this program with those arguments and ends with it; without, it
/// says `ready` and stays.
///
/// # Errors
///
/// [`LabError`] for the first step that fails; then nothing is left.
pub fn init(parent: Option<u32>, arguments: &[OsString]) -> Result<u8, LabError> {
    if let Some(parent) = parent {
        follow(parent)?;
    }
    furnish()?;
    rustix::thread::set_name(c"conet-machine").map_err(LabError::step("name the process"))?;
    let signals = Signals::watch_as_init()?;
    if arguments.is_empty() {
        match keep(&signals)? {}
    }
    let child = Command::new(SELF).args(arguments).spawn();
    supervise(child.map_err(LabError::step("start conet in its machine"))?, true, &signals)
}

/// Has the kernel kill this process when its parent, outside, ends.
fn follow(parent: u32) -> Result<(), LabError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(LabError::step("follow the caller"))?;
    // It may have ended before. /proc is still that of outside, and so are its ids.
    let own = fs::read_link("/proc/self").ok();
    let own = own.and_then(|own| own.to_str()?.parse().ok());
    let has_it = own.and_then(Stat::of).is_some_and(|stat| stat.parent == parent);
    if has_it { Ok(()) } else { Err(LabError::Interrupted) }
}

/// Gives the machine a /proc and a /run of its own, and a loopback that is up.
fn furnish() -> Result<(), LabError> {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    let program = own_program(&["/run"]);
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(LabError::step("cut the mounts off"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "/proc", "proc", flags, None).map_err(|error| LabError::NoProc(error.into()))?;
    // For programs that look there; ours ask the kernel.
    mount("sysfs", "/sys", "sysfs", flags, None).ok();
    private_directory("/run", "mode=0755")?;
    if let Some((path, tree)) = program {
        put_back(&path, tree).map_err(LabError::step("bring conet along"))?;
    }
    Ok(Netlink::open()?.set_up(IfName::LOOPBACK)?)
}

/// Stays until killed, and reaps what is left to process 1.
fn keep(signals: &Signals) -> Result<Infallible, LabError> {
    rustix::process::setsid().map_err(LabError::step("leave the terminal"))?;
    std::env::set_current_dir("/").map_err(LabError::step("go to /"))?;
    let said = writeln!(io::stdout(), "{READY}").and_then(|()| io::stdout().flush());
    said.map_err(LabError::step("answer"))?;
    close_standard_streams()?;
    loop {
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        signals.sleep()?;
    }
}

/// Waits for a child, passes on what asks to end (as it came, or as SIGTERM), and gives
/// its exit status as shells do. Reaps others meanwhile: process 1 has everybody's.
fn supervise(child: Child, passes_on: bool, signals: &Signals) -> Result<u8, LabError> {
    let pid = Pid::from_child(&child);
    loop {
        while let Ok(Some((ended, status))) = wait(WaitOptions::NOHANG) {
            if ended == pid {
                let status = ExitStatus::from_raw(status.as_raw());
                let code = status.code().or_else(|| Some(128 + status.signal()?));
                return Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1));
            }
        }
        if let Some(signal) = signals.take_request() {
            // Process 1 heeds one only.
            let signal = if passes_on { signal } else { Signal::TERM };
            // Fails where it has just ended, which the next round sees.
            rustix::process::kill_process(pid, signal).ok();
        }
        signals.sleep()?;
    }
}

/// The user's lab machine. Its process 1 is held by a descriptor: ids and `/proc` mean
/// something else once this process has entered.
struct Machine {
    init: OwnedFd,
}

impl Machine {
    /// The machine that runs.
    fn open() -> Result<Self, LabError> {
        let path = directory()?.join(FILE);
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(LabError::NotUp),
            other => other.map_err(LabError::step_on("read the lab's state", &path))?,
        };
        let init: ProcessRef = serde_json::from_slice(&bytes)
            .map_err(io::Error::from)
            .map_err(LabError::step_on("read the lab's state", &path))?;
        Self::of(init).ok_or(LabError::NotUp)
    }

    /// The machine of this process 1; none where it has ended.
    fn of(init: ProcessRef) -> Option<Self> {
        let pid = i32::try_from(init.pid).ok().and_then(Pid::from_raw)?;
        let descriptor = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // With the descriptor open the pid cannot pass to another process.
        init.is_alive().then_some(Self { init: descriptor })
    }

    /// Makes one, which stays. The namespaces are made by a child: this process is to
    /// enter them as any later one does.
    fn start(lock: &Lock) -> Result<Self, LabError> {
        let mut maker = Command::new(SELF)
            .args(["lab", "machine"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(LabError::step("make a machine"))?;
        let line = first_line(&mut maker)?;
        maker.wait().map_err(LabError::step("wait for the machine"))?;
        let failed = || LabError::Machine { said: "the machine has ended; try again".to_owned() };
        let init = line.parse().ok().and_then(ProcessRef::of).ok_or_else(failed)?;
        let machine = Self::of(init).ok_or_else(failed)?;
        let written =
            serde_json::to_vec(&init).map_err(io::Error::from).and_then(|bytes| lock.write(&bytes));
        if let Err(error) = written {
            machine.end()?;
            return Err(LabError::step_on("write the lab's state", &lock.path)(error));
        }
        Ok(machine)
    }

    /// Joins its namespaces and runs this program with `arguments` there.
    fn run(&self, arguments: &[OsString]) -> Result<u8, LabError> {
        let signals = Signals::watch()?;
        let directory = std::env::current_dir().ok();
        let all = ThreadNameSpaceType::USER
            | ThreadNameSpaceType::PROCESS_ID
            | ThreadNameSpaceType::NETWORK
            | ThreadNameSpaceType::MOUNT
            | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
            | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION;
        move_into_thread_name_spaces(self.init.as_fd(), all)
            .map_err(LabError::step("enter the user's machine"))?;
        let mut command = Command::new(SELF);
        // What the user sees inside is what is there: a lab host does the same.
        let known = directory.filter(|directory| directory.is_dir());
        command.args(arguments).current_dir(known.unwrap_or_else(|| "/".into()));
        let child = command.spawn().map_err(LabError::step("start conet in its machine"))?;
        supervise(child, true, &signals)
    }

    /// Kills process 1, and with it all that is inside; returns when it has ended.
    fn end(&self) -> Result<(), LabError> {
        let ended = || -> rustix::io::Result<bool> {
            match pidfd_send_signal(&self.init, Signal::KILL) {
                // It has been reaped.
                Err(Errno::SRCH) => return Ok(true),
                other => other?,
            }
            // Readable when the process has ended (`man 2 pidfd_open`).
            let mut ready = [PollFd::new(&self.init, PollFlags::IN)];
            Ok(poll(&mut ready, Some(&KILL_LIMIT))? > 0)
        };
        match ended() {
            Ok(true) => Ok(()),
            Ok(false) => Err(LabError::step("end the user's machine")(Errno::TIMEDOUT)),
            Err(error) => Err(LabError::step("end the user's machine")(error)),
        }
    }
}

/// Makes the namespaces of a machine that stays, starts its process 1 and prints that
/// one's id; what `lab up` runs.
///
/// # Errors
///
/// [`LabError`]; then there is no machine.
pub fn start_machine() -> Result<(), LabError> {
    make_namespaces()?;
    let mut init = Command::new(SELF)
        .args(["lab", "init"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(LabError::step("start process 1"))?;
    first_line(&mut init)?;
    writeln!(io::stdout(), "{}", init.id()).map_err(LabError::step("answer"))
}

/// What a child says when it is ready; where it ends before, its one line of failure is
/// the error.
fn first_line(child: &mut Child) -> Result<String, LabError> {
    let wait = || LabError::step("wait for the machine");
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line).map_err(wait())?;
    }
    if !line.is_empty() {
        return Ok(line.trim_end().to_owned());
    }
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut said).map_err(wait())?;
    }
    let status = child.wait().map_err(wait())?;
    let said = said.trim().lines().last().map(|line| line.trim_start_matches("conet: "));
    let said = said.map_or_else(|| format!("the machine ended with {status}"), str::to_owned);
    Err(LabError::Machine { said })
}

/// Where the user's lab keeps its one file: the runtime directory, or one of the
/// user's own in /tmp.
fn directory() -> Result<PathBuf, LabError> {
    let uid = rustix::process::geteuid().as_raw();
    let is_own = |path: &Path| {
        fs::symlink_metadata(path)
            .is_ok_and(|data| data.is_dir() && data.uid() == uid && data.mode() & 0o022 == 0)
    };
    if let Some(runtime) = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from)
        && is_own(&runtime)
    {
        return Ok(runtime.join("conet-lab"));
    }
    let path = PathBuf::from(format!("/tmp/conet-lab-{uid}"));
    if fs::symlink_metadata(&path).is_ok() && !is_own(&path) {
        let error = io::Error::new(io::ErrorKind::PermissionDenied, "it is somebody else's");
        return Err(LabError::step_on("use the lab's directory", path)(error));
    }
    Ok(path)
}

/// The right to change the user's lab machine; given up when dropped. Its directory is
/// held open: inside the machine a path in /run leads elsewhere.
struct Lock {
    path: PathBuf,
    parent: File,
    directory: File,
}

impl Lock {
    fn take() -> Result<Self, LabError> {
        let path = directory()?;
        let parent = path.parent().unwrap_or(Path::new("/"));
        let parent =
            File::open(parent).map_err(LabError::step_on("open the lab's directory", parent))?;
        loop {
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(LabError::step_on("make the lab's directory", &path)(error));
                }
                _ => {}
            }
            let directory = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(LabError::step_on("open the lab's directory", &path))?,
            };
            // In /tmp somebody may have been quicker than the look at it.
            let owner = directory.metadata().map(|data| data.uid());
            if owner.ok() != Some(rustix::process::geteuid().as_raw()) {
                let error = io::Error::from(io::ErrorKind::PermissionDenied);
                return Err(LabError::step_on("use the lab's directory", &path)(error));
            }
            flock(&directory, FlockOperation::LockExclusive)
                .map_err(LabError::step_on("lock the lab", &path))?;
            // Whoever held it may have removed the directory.
            let inode = |data: fs::Metadata| (data.dev(), data.ino());
            if fs::metadata(&path).map(inode).ok() == directory.metadata().map(inode).ok() {
                return Ok(Self { path, parent, directory });
            }
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let next = self.path.join(NEXT);
        fs::write(&next, bytes)?;
        fs::rename(&next, self.path.join(FILE))
    }

    fn remove_state(self) -> Result<(), LabError> {
        let remove = |directory: &File, name: &OsStr, flags| match unlinkat(directory, name, flags)
        {
            Err(error) if error != Errno::NOENT => Err(error),
            _ => Ok(()),
        };
        let removed = [NEXT, FILE]
            .iter()
            .try_for_each(|name| remove(&self.directory, name.as_ref(), AtFlags::empty()))
            .and_then(|()| {
                let name = self.path.file_name().unwrap_or_default();
                remove(&self.parent, name, AtFlags::REMOVEDIR)
            });
        removed.map_err(LabError::step_on("remove", &self.path))
    }
}
