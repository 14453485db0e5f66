//! Other people's ways into a guest: passt, pasta, slirp4netns, with the MTU that each
//! is made for.
//!
//! passt speaks with QEMU, a length of four bytes before each frame. So that there is a
//! figure for User-Mode Linux too, its `bess` transport (a frame a message) is connected
//! to passt by a process between, `shim`, which costs what it costs: the lane's name says
//! so in the report's versions.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType};
use serde_json::json;

use crate::agent::PORT;
use crate::kind::Kind;
use crate::lane::{GUEST, HOST, Lane};
use crate::machines;

/// What passt recommends, and sets by default.
const PASST_MTU: u16 = 65_520;
/// What a guest of slirp4netns has as its address.
const SLIRP_GUEST: &str = "10.0.2.100";

pub(crate) fn start(lane: &mut Lane) -> Result<()> {
    lane.lan()?;
    match lane.kind {
        Kind::Passt => {
            passt(lane)?;
            let path = lane.socket("passt");
            let card =
                format!("stream,id=n,server=off,addr.type=unix,addr.path={}", path.display());
            let flags = ["-netdev", &card, "-device", "virtio-net-pci,netdev=n,romfile="];
            machines::qemu(lane, &flags, PASST_MTU)
        }
        Kind::PasstUml => {
            passt(lane)?;
            let mut command = Command::new(std::env::current_exe()?);
            let [passt, bess] = ["passt", "bess"].map(|name| lane.socket(name));
            command.args(["--role", "shim"]).arg(&passt).arg(&bess);
            lane.spawn(command, false)?;
            exists(&bess)?;
            let own = lane.socket("own");
            let flag = format!(
                "vec0:transport=bess,dst={},src={},depth=128,mtu={PASST_MTU}",
                bess.display(),
                own.display()
            );
            machines::uml(lane, flag, "vec0", PASST_MTU)
        }
        Kind::Pasta => pasta(lane),
        _ => slirp(lane),
    }
}

/// The options that passt and pasta have in common.
fn options(command: &mut Command) {
    let port = PORT.to_string();
    command.args(["-f", "-q", "--runas", "0:0", "-t", &port, "-u", &port]);
    command.args(["-a", &GUEST.to_string(), "-n", "24", "-g", &HOST.to_string()]);
}

fn passt(lane: &mut Lane) -> Result<()> {
    let mut command = Command::new("passt");
    options(&mut command);
    let socket = lane.socket("passt");
    command.arg("-s").arg(&socket);
    lane.spawn(command, false)?;
    exists(&socket)
}

fn pasta(lane: &mut Lane) -> Result<()> {
    let guest = lane.empty_guest()?.name.clone();
    let mut command = Command::new("pasta");
    options(&mut command);
    command.args(["--config-net", "-T", "none", "-U", "none", "--netns-only", "--netns"]);
    command.arg(format!("/run/netns/{}", guest.as_str()));
    lane.spawn(command, false)
}

fn slirp(lane: &mut Lane) -> Result<()> {
    let guest = lane.empty_guest()?.name.clone();
    let socket = lane.socket("slirp");
    let mut command = Command::new("slirp4netns");
    command.args(["--configure", "--mtu=65520", "--netns-type=path", "--api-socket"]);
    command.arg(&socket).arg(format!("/run/netns/{}", guest.as_str())).arg("tap0");
    lane.spawn(command, false)?;
    exists(&socket)?;
    for proto in ["tcp", "udp"] {
        let request = json!({"execute": "add_hostfwd", "arguments": {
            "proto": proto, "host_addr": "0.0.0.0", "host_port": PORT,
            "guest_addr": SLIRP_GUEST, "guest_port": PORT,
        }});
        let mut stream = UnixStream::connect(&socket)?;
        stream.write_all(request.to_string().as_bytes())?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(!answer.contains("error"), "slirp4netns refused to forward: {answer}");
    }
    Ok(())
}

/// Waits for a socket that somebody else makes.
pub(crate) fn exists(path: &Path) -> Result<()> {
    let began = Instant::now();
    while !path.exists() {
        ensure!(began.elapsed() < Duration::from_secs(10), "no socket {}", path.display());
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Between passt's stream and User-Mode Linux's messages, until one of them ends.
pub(crate) fn shim(arguments: &[String]) -> Result<()> {
    let [passt, bess] = arguments else { bail!("shim PASST BESS") };
    let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(bess.as_str())?)?;
    rustix::net::listen(&listener, 1)?;
    let guest = rustix::net::accept(&listener)?;
    let mut stream = UnixStream::connect(passt).context("passt is gone")?;
    let mut frame = vec![0; 4 + 70_000];
    loop {
        let mut both = [PollFd::new(&guest, PollFlags::IN), PollFd::new(&stream, PollFlags::IN)];
        poll(&mut both, None)?;
        let ready = both.map(|fd| !fd.revents().is_empty());
        if ready[0] {
            let (len, _) = rustix::net::recv(guest.as_fd(), &mut frame[4..], RecvFlags::empty())?;
            if len == 0 {
                return Ok(());
            }
            frame[..4].copy_from_slice(&u32::try_from(len)?.to_be_bytes());
            stream.write_all(&frame[..4 + len])?;
        }
        if ready[1] {
            let mut head = [0; 4];
            stream.read_exact(&mut head)?;
            let len = usize::try_from(u32::from_be_bytes(head))?;
            let frame = frame.get_mut(..len).context("passt sent a frame that is too long")?;
            stream.read_exact(frame)?;
            rustix::net::send(guest.as_fd(), frame, SendFlags::empty())?;
        }
    }
}
