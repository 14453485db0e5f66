//! Between a VMM and the library that serves it: messages as the protocol has them.
//!
//! Two say something else than the protocol has it, and the library refuses that:
//!
//! - User-Mode Linux (virtio_uml, as of Linux 6.1) makes `SET_MEM_TABLE` as long as two
//!   regions are, however many there are. Here it gets its length.
//! - QEMU (as of 7.2) enables rings before it has set features, and does not repeat it. They
//!   are answered here, and passed on when it has.
//!
//! Which rings are switched on is told to who wants to know as well: the library tells nobody.
//!
//! Everything else passes unread. Only messages go here, some twenty when a guest boots;
//! packets do not.
//!
//! Invariants: what a VMM says costs bounded memory; a descriptor that is not passed on is
//! closed.
//!
//! Sources: QEMU `docs/interop/vhost-user.rst`; Linux `arch/um/drivers/virtio_uml.c`.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Request, flags, size of the body, each four bytes in the host's order.
const HEADER: usize = 12;
/// Longest body that the library takes (`MAX_MSG_SIZE`).
const LONGEST: usize = 0x1000;
/// Most descriptors of a message (`MAX_ATTACHED_FD_ENTRIES`).
const DESCRIPTORS: usize = 32;

const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_ENABLE: u32 = 18;
/// In the flags: the version, this is an answer, an answer is wanted.
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// Most rings that are remembered; more than a card has.
const MOST_RINGS: usize = 64;
/// A table's head, and each region in it.
const TABLE: usize = 8;
const REGION: usize = 32;

/// Passes messages on, both ways, until one side ends; `switched` is told of each ring that
/// the VMM switches off, and then the library; and of each that it switches on, after.
pub(super) fn relay(
    vmm: UnixStream,
    library: UnixStream,
    switched: impl FnMut(usize, bool),
) -> io::Result<()> {
    let (mut from_library, mut to_vmm) = (library.try_clone()?, vmm.try_clone()?);
    let back = thread::Builder::new().name("conet-vhost-back".to_owned()).spawn(move || {
        let mut bytes = [0; HEADER + LONGEST];
        while let Ok(len @ 1..) = from_library.read(&mut bytes) {
            if to_vmm.write_all(&bytes[..len]).is_err() {
                break;
            }
        }
        to_vmm.shutdown(Shutdown::Both).ok();
    })?;
    let passed = pass(&vmm, &library, switched);
    library.shutdown(Shutdown::Both).ok();
    vmm.shutdown(Shutdown::Both).ok();
    back.join().ok();
    passed
}

pub(super) fn pass(
    mut vmm: &UnixStream,
    library: &UnixStream,
    mut switched: impl FnMut(usize, bool),
) -> io::Result<()> {
    let mut has_features = false;
    // The last word on each ring, from before that.
    let mut early = BTreeMap::new();
    let mut bytes = vec![0; HEADER + LONGEST];
    loop {
        let (header, body) = bytes.split_at_mut(HEADER);
        let Some(fds) = receive(vmm, header)? else { return Ok(()) };
        let word = |at: usize| header.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes);
        let (Some(request), Some(flags), Some(size)) = (word(0), word(4), word(8)) else {
            continue;
        };
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let body = body.get_mut(..size).ok_or_else(too_long)?;
        vmm.read_exact(body)?;
        if request == SET_VRING_ENABLE && !has_features {
            if flags & NEED_REPLY != 0 {
                vmm.write_all(&message(request, VERSION | REPLY, &[0; 8]))?;
            }
            let ring = body.first_chunk::<4>().copied();
            if early.len() < MOST_RINGS || ring.is_some_and(|ring| early.contains_key(&ring)) {
                ring.map(|ring| early.insert(ring, message(request, VERSION, body)));
            }
            continue;
        }
        let len = if request == SET_MEM_TABLE { table_len(body) } else { size };
        header[8..].copy_from_slice(&u32::try_from(len).unwrap_or(0).to_ne_bytes());
        let passed = bytes.get(..HEADER + len).unwrap_or_default();
        // What is off is so before the library knows, what is on is so after.
        if request == SET_VRING_ENABLE {
            tell(passed, false, &mut switched);
        }
        send(library, passed, &fds.iter().map(AsFd::as_fd).collect::<Vec<_>>())?;
        if request == SET_VRING_ENABLE {
            tell(passed, true, &mut switched);
        }
        if request == SET_FEATURES {
            has_features = true;
            for (_, message) in std::mem::take(&mut early) {
                tell(&message, false, &mut switched);
                send(library, &message, &[])?;
                tell(&message, true, &mut switched);
            }
        }
    }
}

/// Tells of a ring that is switched so: its number, and whether it is on, each four bytes.
fn tell(message: &[u8], on: bool, switched: &mut impl FnMut(usize, bool)) {
    let word = |at: usize| message.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes);
    if let (Some(ring), Some(state)) = (word(HEADER), word(HEADER + 4))
        && on == (state == 1)
    {
        switched(usize::try_from(ring).unwrap_or(usize::MAX), on);
    }
}

fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap_or(0);
    let words = [request, flags, size].into_iter().flat_map(u32::to_ne_bytes);
    words.chain(body.iter().copied()).collect()
}

/// The length of a table with as many regions as it says.
fn table_len(body: &[u8]) -> usize {
    let count = body.first_chunk().copied().map_or(0, u32::from_ne_bytes);
    let len = usize::try_from(count).ok().and_then(|count| count.checked_mul(REGION));
    len.and_then(|len| len.checked_add(TABLE)).filter(|len| *len < body.len()).unwrap_or(body.len())
}

fn too_long() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

/// Reads a header and the descriptors that come with it; none at the end.
pub(super) fn receive(vmm: impl AsFd, header: &mut [u8]) -> io::Result<Option<Vec<OwnedFd>>> {
    let mut fds = Vec::new();
    let mut at = 0;
    while at < header.len() {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut header[at..])];
        let got = match recvmsg(&vmm, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || fds.len() > DESCRIPTORS {
            return Err(too_long());
        }
        if got.bytes == 0 {
            return if at == 0 { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        at += got.bytes;
    }
    Ok(Some(fds))
}

/// Sends a message, its descriptors with its first byte.
pub(super) fn send(
    mut library: &UnixStream,
    message: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(too_long());
    }
    let sent = sendmsg(library, &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL)?;
    library.write_all(message.get(sent..).unwrap_or_default())
}
