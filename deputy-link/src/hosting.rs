//! The node that hosts: making a sandbox, and talking to its warden.
//!
//! ```text
//! daemon ─ exec ─► host role ─ namespaces ─► warden ─ fork ─► remote
//!    └──── unix socket in the node's state directory ──┘ └─ clone ─► its children
//! ```
//!
//! What a remote's descendants are, they are in the same sandbox, with links and stays of
//! their own ([`Warden::branch`]).
//!
//! The sandbox: new user, pid, mount, network, ipc and uts namespaces, an empty
//! read-only root, one unprivileged user of the host per owner, no capability, small
//! limits and the filter. The warden is process 1 in it, is nobody's child and so
//! outlives the daemon; whoever connects to its socket next is its daemon.

mod warden;

pub use conet_deputy_core::boot::family::MAX_REMOTES;
pub use warden::{Warden, WardenEvent};

use crate::agent;
use crate::channel::{ChannelError, LinkSecret};
use crate::sys::{packet, spawn};
use conet_deputy_core::boot::Launch;
use conet_deputy_core::boot::family::Ticket;
use conet_transport::session::protect::{OpenError, Opener, Replay};
use conet_wire::link::{kind, split_frame};
use conet_wire::session::{RECORD_PREFIX, parse_record_prefix};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::fcntl_dupfd_cloexec;
use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use zerocopy::IntoBytes;

/// How long the sandbox may take to stand.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a process is not hosted.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A call of the daemon failed.
    #[error("{call}: {source}")]
    Kernel {
        /// What was tried.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host role failed at a step.
    #[error("{}: {source}", .step.text())]
    Step {
        /// The step.
        step: Step,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host role ended without a word.
    #[error("the sandbox ended while it was made")]
    Ended,
    /// The peer's first record is not sealed with the link's keys.
    #[error(transparent)]
    Hello(#[from] ChannelError),
}

/// A step of the host role (agent/src/launch.rs).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step(u8);

impl Step {
    const fn text(self) -> &'static str {
        match self.0 {
            1 => "unshare (are user namespaces allowed? user.max_user_namespaces)",
            2..=4 => "becoming root of the new user namespace",
            5 => "opening /proc",
            6..=10 => "making an empty root file system",
            11 => "starting the warden",
            12 => "starting the remote under its home pid (set_tid)",
            _ => "an unknown step",
        }
    }
}

fn failed(call: &'static str) -> impl Fn(io::Error) -> HostError {
    move |source| HostError::Kernel { call, source }
}

/// What to host, and how.
#[derive(Debug)]
pub struct Hosting<'a> {
    /// Id of the process at home.
    pub pid: i32,
    /// Names its stay.
    pub ticket: Ticket,
    /// Keys of the link; `seal` is what this side seals.
    pub secret: &'a LinkSecret,
    /// User of this host as whom it runs; nobody else's, and unprivileged.
    pub uid: u32,
    /// Lab only: what to add to this node's real-time clock, in nanoseconds.
    pub clock_skew: i64,
    /// Whether what it changes is followed, where the kernel can tell, so that only
    /// that goes home. Without, all of its memory does, as it must before Linux 6.7.
    pub follows: bool,
    /// Where the warden listens.
    pub socket: &'a Path,
    /// How long its home may be silent until the process lives here; then there is
    /// none. A mover that died may leave an open link behind.
    pub patience: Duration,
}

/// A process that is hosted here.
#[derive(Clone, Copy, Debug)]
pub struct Hosted {
    /// The warden, as this host sees it.
    pub warden_pid: u32,
    /// The remote, as this host sees it.
    pub remote_pid: u32,
}

/// Reads the first record of a link, which must be HELLO sealed with its keys.
fn check_hello(link: &mut TcpStream, secret: &LinkSecret) -> Result<(), ChannelError> {
    let mut prefix = [0; RECORD_PREFIX];
    link.read_exact(&mut prefix)?;
    let len = parse_record_prefix(prefix).map_err(|_| OpenError::Truncated)?;
    let mut packet = [0u8; 256];
    let packet = packet.get_mut(..len).ok_or(OpenError::Forged)?;
    link.read_exact(packet)?;
    let mut opener = Opener::new(secret.cipher, &secret.open, Replay::in_order(0));
    let (_, payload) = opener.open_in_place(packet)?;
    let (header, _) = split_frame(&packet[payload]).map_err(|_| ChannelError::Unexpected(0))?;
    if header.kind == kind::HELLO { Ok(()) } else { Err(ChannelError::Unexpected(header.kind)) }
}

/// Makes the sandbox for the process whose home node is at the other end of `link`,
/// and starts its remote half, which takes the image from there.
///
/// # Errors
/// [`HostError`]; nothing is left behind.
pub fn start(mut link: TcpStream, hosting: &Hosting<'_>) -> Result<Hosted, HostError> {
    link.set_nodelay(true).map_err(failed("TCP_NODELAY"))?;
    link.set_read_timeout(Some(START_TIMEOUT)).map_err(failed("SO_RCVTIMEO"))?;
    check_hello(&mut link, hosting.secret)?;
    link.set_read_timeout(Some(hosting.patience)).map_err(failed("SO_RCVTIMEO"))?;
    // A socket of an earlier process with this name is stale.
    match fs::remove_file(hosting.socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("removing the warden's old socket")(error));
        }
        _ => {}
    }
    let listener =
        packet::listen_at(hosting.socket).map_err(failed("binding the warden's socket"))?;
    let result = launch(&link, &listener, hosting);
    if result.is_err() {
        fs::remove_file(hosting.socket).map_err(failed("removing the warden's socket"))?;
    }
    result
}

/// The agent as a program file in memory, with a number above those that the host
/// role expects.
fn program() -> Result<OwnedFd, HostError> {
    let file = memfd_create("conet-agent", MemfdFlags::CLOEXEC)
        .map_err(|error| failed("memfd_create")(error.into()))?;
    let high = fcntl_dupfd_cloexec(&file, 100).map_err(|error| failed("fcntl")(error.into()))?;
    let mut writer = fs::File::from(file);
    writer.write_all(agent::ELF).map_err(failed("writing the agent"))?;
    drop(writer);
    // A file that is open for writing cannot be executed; this copy reads only.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&high));
    let read_only = fs::File::open(path).map_err(failed("opening the agent"))?;
    fcntl_dupfd_cloexec(read_only.as_fd(), 100).map_err(|error| failed("fcntl")(error.into()))
}

fn launch(
    link: &TcpStream,
    listener: &OwnedFd,
    hosting: &Hosting<'_>,
) -> Result<Hosted, HostError> {
    let (mut control, theirs) = UnixStream::pair().map_err(failed("socketpair"))?;
    control.set_read_timeout(Some(START_TIMEOUT)).map_err(failed("SO_RCVTIMEO"))?;
    let program = program()?;
    let fds = [theirs.as_fd(), link.as_fd(), listener.as_fd()];
    let mut child = spawn::host_role(program.as_fd(), fds).map_err(failed("starting the agent"))?;
    drop(theirs);
    let result = converse(&mut control, child.id(), hosting);
    if result.is_err() {
        // Ends what has begun; both fail only where it has ended already.
        child.kill().ok();
    }
    child.wait().map_err(failed("waiting for the host role"))?;
    result
}

fn converse(
    control: &mut UnixStream,
    child: u32,
    hosting: &Hosting<'_>,
) -> Result<Hosted, HostError> {
    let secret = hosting.secret;
    let launch = Launch {
        pid: hosting.pid,
        cipher: secret.cipher_number(),
        seal_key: *secret.seal.expose(),
        open_key: *secret.open.expose(),
        seal_next: 0,
        // HELLO has been opened here.
        open_next: 1,
        clock_skew: hosting.clock_skew,
        ticket: hosting.ticket,
        follows: u64::from(hosting.follows),
    };
    control.write_all(launch.as_bytes()).map_err(failed("talking to the host role"))?;
    say(control, b'U', 0)?;
    let map = format!("0 {} 1\n", hosting.uid);
    for file in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{child}/{file}"), &map).map_err(failed("writing the id maps"))?;
    }
    control.write_all(b"M").map_err(failed("talking to the host role"))?;
    // The warden's id and the remote's come in either order.
    let (mut warden, mut remote) = (None, None);
    while warden.is_none() || remote.is_none() {
        match word(control)? {
            b'W' => warden = Some(number(control)?),
            b'R' => remote = Some(digits(control)?),
            _ => return Err(HostError::Ended),
        }
    }
    let (Some(warden_pid), Some(remote_pid)) = (warden, remote) else {
        return Err(HostError::Ended);
    };
    Ok(Hosted { warden_pid, remote_pid })
}

/// Expects one word of the host role, which `skip` bytes follow.
fn say(control: &mut UnixStream, expected: u8, skip: usize) -> Result<(), HostError> {
    let got = word(control)?;
    let mut rest = vec![0; skip];
    control.read_exact(&mut rest).map_err(|_| HostError::Ended)?;
    if got == expected { Ok(()) } else { Err(HostError::Ended) }
}

fn word(control: &mut UnixStream) -> Result<u8, HostError> {
    let mut byte = [0];
    control.read_exact(&mut byte).map_err(|_| HostError::Ended)?;
    if byte[0] != b'E' {
        return Ok(byte[0]);
    }
    let mut error = [0; 2];
    control.read_exact(&mut error).map_err(|_| HostError::Ended)?;
    let source = io::Error::from_raw_os_error(i32::from(error[1]));
    Err(HostError::Step { step: Step(error[0]), source })
}

fn number(control: &mut UnixStream) -> Result<u32, HostError> {
    let mut bytes = [0; 4];
    control.read_exact(&mut bytes).map_err(|_| HostError::Ended)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Decimal digits, ended by a newline.
fn digits(control: &mut UnixStream) -> Result<u32, HostError> {
    let mut value = 0u32;
    loop {
        let mut byte = [0];
        control.read_exact(&mut byte).map_err(|_| HostError::Ended)?;
        match byte[0] {
            b'\n' => return Ok(value),
            digit @ b'0'..=b'9' => {
                value = value.checked_mul(10).ok_or(HostError::Ended)? + u32::from(digit - b'0');
            }
            _ => return Err(HostError::Ended),
        }
    }
}
