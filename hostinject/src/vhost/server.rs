//! A machine's port as a process of its own: started, found again, asked, ended.
//!
//! ```text
//! daemon                                   server (this very program, told to be one)
//!   makes the device, binds the socket ──► standard input: a socket by which both come,
//!                                          a descriptor for each queue of the device
//!                                          binds NAME.stream, NAME.bess by itself
//!   connects to NAME.control ────────────► "status" → lines; "end" → it ends
//! ```
//!
//! The server outlives the daemon: a machine's network goes on while the daemon is
//! restarted, and a hostile machine that brings its port down (memory that shrinks under
//! it is SIGBUS) has brought down no other. Whether a server runs is told by its control
//! socket alone, which ends with it: no file has its number. What else it is asked is in
//! [`gate`].
//!
//! It holds no capability, is nobody and gains nothing by execve; beside its
//! descriptors there is what anybody may do.
//!
//! Sources: `unix(7)` (`SO_PEERCRED`), `capabilities(7)`.

use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use conet_dataplane::{DropCounts, DropReason};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Gid, Pid, Signal, Uid, kill_process};
use rustix::thread::{
    CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use super::device::MAX_QUEUES;
use super::{Counted, Device, ServeError, Transport, VhostSpec, front, gate, serve_counted, tap};
use crate::{Lease, Rates};

/// How long a server may take to start, and to end.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long it may take to answer.
const ANSWER: Duration = Duration::from_secs(1);
/// Longest line of a question.
const LINE: u64 = 128;
/// `nobody` and `nogroup`, as everywhere.
const NOBODY: u32 = 65_534;

/// Where a server is, and what starts one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerSpec {
    /// Where its sockets are, named after the guest. Whoever may enter it may be the
    /// guest.
    pub directory: PathBuf,
    /// What starts a server: a program and its first arguments; those of
    /// [`ServerArguments`] follow.
    pub command: Vec<OsString>,
}

impl ServerSpec {
    /// The socket for the VMM.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.vhost"))
    }

    fn control(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.control"))
    }
}

/// What a server says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerStatus {
    /// The VMM that is connected.
    pub vmm: Option<u32>,
    /// What is kept, where the guest is held: packets, bytes.
    pub held: Option<(u64, u64)>,
    /// What was dropped, by reason.
    pub drops: DropCounts,
    /// For whom it runs, as [`VhostSpec`]'s `Display` has it.
    pub serves: String,
}

/// A server that runs.
#[derive(Debug)]
pub(crate) struct Server {
    pub(super) control: PathBuf,
    pub(super) socket: PathBuf,
}

impl Server {
    /// The one that runs for a guest, and whether it serves what is wanted now.
    pub(crate) fn find(at: &ServerSpec, name: &str, spec: &VhostSpec) -> Option<(Self, bool)> {
        let server = Self { control: at.control(name), socket: at.socket(name) };
        let status = server.status().ok()?;
        Some((server, status.serves == spec.to_string()))
    }

    /// Starts one with the device; it is there when this returns.
    pub(crate) fn start(
        at: &ServerSpec,
        name: &str,
        device: &Device,
        spec: &VhostSpec,
    ) -> io::Result<Self> {
        let server = Self { control: at.control(name), socket: at.socket(name) };
        // Whoever may enter may be the guest, whatever the sockets' own modes.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&at.directory)?;
        server.unlink();
        let listener = UnixListener::bind(&server.socket)?;
        let none = || io::Error::from(io::ErrorKind::InvalidInput);
        let (program, first) = at.command.split_first().ok_or_else(none)?;
        let mut command = Command::new(program);
        command.args(first).arg("--mac").arg(spec.mac.to_string());
        let Lease { addresses, gateways, prefix, dns, mtu } = &spec.lease;
        command.arg("--mtu").arg(mtu.to_string()).arg("--prefix").arg(prefix.to_string());
        command.arg("--control").arg(&server.control);
        command.arg("--queues").arg(spec.queues.to_string());
        for (flag, list) in [("--gateway", gateways), ("--dns", dns), ("--address", addresses)] {
            for address in list {
                command.arg(flag).arg(address.to_string());
            }
        }
        // A signal for the daemon's group is not for it.
        command.process_group(0).current_dir("/");
        let (ours, its) = UnixStream::pair()?;
        hand_over(&ours, &listener, device)?;
        command.stdin(OwnedFd::from(its)).stdout(Stdio::null()).stderr(Stdio::inherit());
        let mut child = command.spawn()?;
        let begin = Instant::now();
        while server.status().is_err() {
            if let Some(status) = child.try_wait()? {
                server.unlink();
                return Err(io::Error::other(format!("the guest's server ended: {status}")));
            }
            if begin.elapsed() > PATIENCE {
                child.kill().ok();
                child.wait().ok();
                server.unlink();
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::sleep(Duration::from_millis(2));
        }
        // It is waited for by whoever is its parent when it ends.
        thread::Builder::new().name("conet-vhost-wait".to_owned()).spawn(move || child.wait())?;
        Ok(server)
    }

    /// What it says of itself.
    pub(crate) fn status(&self) -> io::Result<ServerStatus> {
        let mut stream = self.connect()?;
        stream.write_all(b"status\n")?;
        parse(BufReader::new(stream))
    }

    /// Has it keep the guest's packets.
    pub(crate) fn hold(&self) -> io::Result<()> {
        self.tell("hold\n")
    }

    /// Has it let them pass again, what is kept first.
    pub(crate) fn release(&self) -> io::Result<()> {
        self.tell("release\n")
    }

    /// How fast the guest may be from now on.
    pub(crate) fn set_rates(&self, rates: Rates) -> io::Result<()> {
        self.tell(&gate::rates_line(rates))
    }

    fn tell(&self, what: &str) -> io::Result<()> {
        match self.ask(what.as_bytes())?.1.as_str() {
            "ok" => Ok(()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// What it has kept, which it has no more.
    pub(crate) fn drain(&self) -> io::Result<Vec<Vec<u8>>> {
        let (mut reader, line) = self.ask(b"drain\n")?;
        match line.starts_with("held ") {
            true => gate::read_packets(&mut reader),
            false => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Gives it what another host has kept; how many did not fit.
    pub(crate) fn accept(&self, packets: &[Vec<u8>]) -> io::Result<usize> {
        let mut question = b"accept\n".to_vec();
        gate::write_packets(&mut question, packets)?;
        let (_, line) = self.ask(&question)?;
        let lost = line.strip_prefix("lost ").and_then(|count| count.parse().ok());
        lost.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Asks, and reads a line.
    fn ask(&self, question: &[u8]) -> io::Result<(BufReader<UnixStream>, String)> {
        let mut stream = self.connect()?;
        stream.write_all(question)?;
        let (mut reader, mut line) = (BufReader::new(stream), String::new());
        io::Read::take(&mut reader, LINE).read_line(&mut line)?;
        Ok((reader, line.trim_end().to_owned()))
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let stream = UnixStream::connect(&self.control)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        Ok(stream)
    }

    /// Ends it, and with it the device; the sockets go too.
    pub(crate) fn end(&self) -> io::Result<()> {
        if let Ok(mut stream) = self.connect() {
            let pid = socket_peercred(&stream)?.pid;
            stream.write_all(b"end\n").ok();
            // It closes this when it ends.
            stream.set_read_timeout(Some(PATIENCE))?;
            if !matches!(io::Read::read(&mut stream, &mut [0]), Ok(0)) {
                kill_process(pid, Signal::KILL).ok();
            }
        }
        self.unlink();
        Ok(())
    }

    fn unlink(&self) {
        fs::remove_file(&self.control).ok();
        for transport in Transport::ALL {
            fs::remove_file(transport.socket(&self.socket)).ok();
        }
    }
}

/// Watches the card of the machine whose VMM has this socket; see [`tap`].
pub(crate) fn watch(socket: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket.with_extension("control"))?;
    // A row says that it is alive more often than that.
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"capture\n")?;
    Ok(stream)
}

/// Reads a status.
fn parse(reader: impl BufRead) -> io::Result<ServerStatus> {
    let bad = || io::Error::from(io::ErrorKind::InvalidData);
    let mut status = ServerStatus::default();
    for line in reader.lines() {
        let line = line?;
        let mut words = line.split(' ');
        match (words.next(), words.next(), words.next()) {
            (Some("vmm"), Some(pid), None) => status.vmm = Some(pid.parse().map_err(|_| bad())?),
            (Some("held"), Some(packets), Some(bytes)) => {
                let number = |word: &str| word.parse().map_err(|_| bad());
                status.held = Some((number(packets)?, number(bytes)?));
            }
            (Some("drop"), Some(reason), Some(count)) => {
                let reason = DropReason::ALL.iter().find(|known| known.as_str() == reason);
                // Of a later version: counted as nothing here.
                let Some(reason) = reason else { continue };
                status.drops[*reason] = count.parse().map_err(|_| bad())?;
            }
            (Some("serves"), Some(_), _) => {
                status.serves = line.trim_start_matches("serves ").to_owned();
            }
            (Some("end"), None, None) => return Ok(status),
            _ => {}
        }
    }
    Err(bad())
}

/// What a server is told.
#[derive(Debug, Clone)]
pub struct ServerArguments {
    /// What is served.
    pub spec: VhostSpec,
    /// Where to be asked.
    pub control: PathBuf,
}

/// Gives a server that is to start what it serves.
fn hand_over(to: &UnixStream, listener: &UnixListener, device: &Device) -> io::Result<()> {
    let queues = device.queues().iter().map(|queue| queue.as_fd());
    let fds: Vec<_> = std::iter::once(listener.as_fd()).chain(queues).collect();
    front::send(to, &[0], &fds)
}

/// Takes what the daemon gives.
fn take_over(from: &impl AsFd) -> io::Result<(UnixListener, Device)> {
    let none = || io::Error::from(io::ErrorKind::InvalidInput);
    let fds = front::receive(from, &mut [0])?.ok_or_else(none)?;
    let mut fds = fds.into_iter();
    let listener = fds.next().ok_or_else(none)?;
    if !(1..=usize::from(MAX_QUEUES)).contains(&fds.len()) {
        return Err(none());
    }
    Ok((UnixListener::from(listener), Device::of(fds)))
}

/// Is a guest's server, with a socket as standard input by which the VMM's socket and the
/// device come; ends when it is told to.
///
/// # Errors
/// [`ServeError`].
pub fn run_server(arguments: ServerArguments) -> Result<std::convert::Infallible, ServeError> {
    let ServerArguments { spec, control } = arguments;
    let (listener, device) = take_over(&io::stdin())?;
    let mut listeners = vec![(Transport::Vhost, listener)];
    for transport in [Transport::Stream, Transport::Bess] {
        listeners.push((transport, transport.bind(&transport.socket(&control))?));
    }
    // Last: who can ask finds all of it there.
    let control = bind(&control)?;
    let held = device.clone();
    confine()?;
    let counted = Arc::new(Mutex::new(Counted::default()));
    let (told, serves) = (Arc::clone(&counted), spec.to_string());
    thread::Builder::new().name("conet-vhost-ask".to_owned()).spawn(move || {
        while gate::wait(&control, &held, &told).is_ok() {
            let Ok((stream, _)) = control.accept() else { continue };
            // Whoever asks is the daemon; one that says nothing keeps nobody waiting.
            stream.set_read_timeout(Some(ANSWER)).ok();
            stream.set_write_timeout(Some(ANSWER)).ok();
            answer(stream, &held, &told, &serves).ok();
        }
    })?;
    serve_counted(&listeners, &device, &spec, &counted)
}

/// For the owner alone, from the beginning.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    bound
}

pub(super) fn answer(
    whole: UnixStream,
    device: &Device,
    counted: &Arc<Mutex<Counted>>,
    serves: &str,
) -> io::Result<()> {
    let mut line = String::new();
    let mut stream = &whole;
    let mut reader = BufReader::new(stream);
    io::Read::take(&mut reader, LINE).read_line(&mut line)?;
    match line.trim_end() {
        "status" => {
            let (vmm, held, drops) = {
                let counted = gate::lock(counted);
                (counted.vmm, counted.hold.held(), counted.drops)
            };
            let mut text = format!("serves {serves}\n");
            text += &vmm.map_or_else(String::new, |pid| format!("vmm {pid}\n"));
            if let Some((packets, bytes)) = held {
                text += &format!("held {packets} {bytes}\n");
            }
            for (reason, count) in drops.nonzero() {
                text += &format!("drop {} {count}\n", reason.as_str());
            }
            stream.write_all((text + "end\n").as_bytes())
        }
        "end" => std::process::exit(0),
        "capture" => tap::begin(whole, counted),
        line => gate::answer(line, &mut reader, stream, device, counted).map(drop),
    }
}

/// Gives up whatever this process may do beyond its descriptors, before it has threads.
fn confine() -> io::Result<()> {
    set_no_new_privs(true)?;
    match be_nobody() {
        // A user namespace that has no such users: all that is here is one user's own.
        Err(Errno::PERM | Errno::INVAL) => {}
        other => other?,
    }
    let none = CapabilitySet::empty();
    set_capabilities(
        None::<Pid>,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )?;
    Ok(())
}

fn be_nobody() -> rustix::io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    set_thread_groups(&[])?;
    let gid = Gid::from_raw(NOBODY);
    set_thread_res_gid(gid, gid, gid)?;
    let uid = Uid::from_raw(NOBODY);
    set_thread_res_uid(uid, uid, uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_back_and_half_of_one_is_none() {
        let whole = "serves a b c,d\nvmm 77\nheld 5 600\ndrop malformed 3\ndrop of_a_later_version 9\nend\n";
        let status = parse(whole.as_bytes()).unwrap();
        assert_eq!((status.vmm, status.drops[DropReason::Malformed]), (Some(77), 3));
        assert_eq!(status.held, Some((5, 600)));
        assert_eq!((status.drops.total(), status.serves.as_str()), (3, "a b c,d"));
        for cut in 0..whole.len() - 1 {
            assert!(parse(&whole.as_bytes()[..cut]).is_err(), "{cut}");
        }
        assert!(parse("vmm x\nend\n".as_bytes()).is_err());
        assert_eq!(parse("end\n".as_bytes()).unwrap(), ServerStatus::default());
    }
}
