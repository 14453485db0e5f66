//! The way that coLinux's packets took, as two processes of its kind: what ours is
//! compared with.
//!
//! ```text
//! host's kernel ─ TAP ─► `net`  ─ unix socket, a head and a frame ─► `monitor` ─► guest
//!                      (network daemon)                          (coLinux daemon)
//! ```
//!
//! `net` is what `colinux-net-daemon` and `conet-tap-daemon` were: a select loop around
//! a TAP device and a stream socket, one frame a message. `monitor` is the daemon that
//! gave each message to the driver, and so to the guest: here by the guest's own TAP
//! device in its namespace, one write a frame, as one `ioctl` a frame was there.
//!
//! Independent of ours on purpose: the standard library, `poll` and two device nodes. No
//! offloads and no batches, as there were none.
//!
//! Source: coLinux 0.7, `src/colinux/os/linux/user/conet-tap-daemon`,
//! `src/colinux/user/daemon.c`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use tun_tap::{Iface, Mode};

/// Longest frame: an Ethernet header and an MTU of 1,500, with room.
const FRAME: usize = 2048;
/// `co_message_t`: from, to, priority, type, and the length of what follows.
const HEAD: usize = 20;

/// Is one of the two, in the namespace of the caller, until the other is gone.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let [part, device, socket] = arguments else { bail!("net|monitor DEVICE SOCKET") };
    let tap = Iface::without_packet_info(device, Mode::Tap)
        .with_context(|| format!("no device {device}"))?;
    let stream = match part.as_str() {
        // It was the daemon that the network daemons connected to.
        "monitor" => UnixListener::bind(socket)?.accept()?.0,
        _ => connect(socket)?,
    };
    pump(&crate::sys::into_file(tap), stream)
}

fn connect(socket: &str) -> Result<UnixStream> {
    let began = std::time::Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                ensure!(began.elapsed().as_secs() < 10, "no other daemon at {socket}: {error}");
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

fn pump(mut device: &File, stream: UnixStream) -> Result<()> {
    // `read` and `write`, as they did, where the library would `recv` and `send`.
    let mut stream = File::from(OwnedFd::from(stream));
    let mut message = [0; HEAD + FRAME];
    loop {
        let [from_device, from_stream] = wait(device.as_fd(), stream.as_fd())?;
        if from_device {
            let len = device.read(&mut message[HEAD..])?;
            message[16..HEAD].copy_from_slice(&u32::try_from(len)?.to_be_bytes());
            stream.write_all(&message[..HEAD + len])?;
        }
        if from_stream {
            if stream.read_exact(&mut message[..HEAD]).is_err() {
                return Ok(());
            }
            let len = message[16..HEAD].first_chunk().map_or(0, |len| u32::from_be_bytes(*len));
            let len = usize::try_from(len)?;
            ensure!(len <= FRAME, "a message of {len} bytes");
            stream.read_exact(&mut message[HEAD..HEAD + len])?;
            // Refused while the link is down: lost, as a frame may be.
            device.write_all(&message[HEAD..HEAD + len]).ok();
        }
    }
}

fn wait(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> Result<[bool; 2]> {
    let mut both = [one, other].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    while let Err(error) = poll(&mut both, None) {
        ensure!(error == rustix::io::Errno::INTR, "poll: {error}");
    }
    Ok([!both[0].revents().is_empty(), !both[1].revents().is_empty()])
}
