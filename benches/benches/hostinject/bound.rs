//! The least that stands between a host and User-Mode Linux by vhost-user: what its kernel
//! and its driver cost, whoever serves them.
//!
//! ```text
//! host's kernel ─ TAP, with the guest's own header ─ readv, writev ─► buffers of the guest's
//! ```
//!
//! A TAP device takes and gives frames as the guest's card has them, so nothing is looked at,
//! copied, answered or refused here: one call a frame, and the used ring. No source check, no
//! rates, no hold, no second guest. A guest is believed what it says: one that lies is a
//! panic at most, since what is touched is checked to be in its memory (`sys`).
//!
//! Independent of ours and of its libraries on purpose: the standard library, `poll` and
//! `mmap`. It speaks as much of the protocol as virtio_uml of Linux 6.1 asks for.
//!
//! Sources: QEMU `docs/interop/vhost-user.rst`; virtio 1.3 §2.7, §5.1.

use std::fs::File;
use std::io::{IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{Ordering, fence};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::sys::{Part, Shared, tap};

/// virtio 1.3 §5.1.3, §6: checksums and TCP segments both ways, MAC, MRG_RXBUF, indirect
/// descriptors, event indices, the protocol's features, version 1.
const FEATURES: u64 = 1
    | 1 << 1
    | 1 << 5
    | 1 << 7
    | 1 << 8
    | 1 << 9
    | 1 << 11
    | 1 << 12
    | 1 << 13
    | 1 << 15
    | 1 << 28
    | 1 << 29
    | 1 << 30
    | 1 << 32;
/// REPLY_ACK, BACKEND_REQ, CONFIG.
const PROTOCOL: u64 = 1 << 3 | 1 << 5 | 1 << 9;
/// Longest frame with its header.
const WHOLE: usize = 12 + 14 + 65_535;
/// Frames of one direction before the other has its turn.
const TURN: usize = 64;

#[derive(Default)]
struct Ring {
    size: u16,
    /// Descriptors, used, available: as the guest's process has them.
    places: [u64; 3],
    next: u16,
    used: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
}

struct Region {
    guest: u64,
    user: u64,
    memory: Shared,
}

#[derive(Default)]
struct Guest {
    regions: Vec<Region>,
    rings: [Ring; 2],
    /// Nothing is read before the guest has more buffers.
    is_dry: bool,
    /// Kept open: its end is the end of the card.
    requests: Option<OwnedFd>,
}

/// Where an address lies: of the guest's, or of its process.
fn place(regions: &[Region], address: u64, of: fn(&Region) -> u64) -> Result<(&Shared, usize)> {
    let found = regions.iter().find_map(|region| {
        let at = usize::try_from(address.checked_sub(of(region))?).ok()?;
        (at < region.memory.len()).then_some((&region.memory, at))
    });
    found.context("an address that is in no region")
}

/// Serves one User-Mode Linux: socket, name of the device.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let [socket, device] = arguments else { bail!("bound SOCKET DEVICE") };
    let device = tap(device).context("no device")?;
    let (mut vmm, _) = UnixListener::bind(socket)?.accept()?;
    let mut guest = Guest::default();
    loop {
        let is_asked = {
            let mut fds = vec![PollFd::new(&vmm, PollFlags::IN)];
            if guest.rings.iter().all(|ring| ring.kick.is_some()) {
                let wanted = if guest.is_dry { PollFlags::empty() } else { PollFlags::IN };
                fds.push(PollFd::new(&device, wanted));
                let kicks = guest.rings.iter().filter_map(|ring| ring.kick.as_ref());
                fds.extend(kicks.map(|kick| PollFd::new(kick, PollFlags::IN)));
            }
            poll(&mut fds, None)?;
            for (fd, kick) in fds.iter().skip(2).zip(&guest.rings) {
                if let (false, Some(kick)) = (fd.revents().is_empty(), &kick.kick) {
                    rustix::io::read(kick, &mut [0; 8])?;
                }
            }
            !fds[0].revents().is_empty()
        };
        if is_asked && !guest.message(&mut vmm)? {
            return Ok(());
        }
        if guest.rings.iter().all(|ring| ring.kick.is_some()) {
            while guest.turn(&device)? {}
        }
    }
}

impl Guest {
    /// Takes a message; false at the end.
    fn message(&mut self, vmm: &mut UnixStream) -> Result<bool> {
        let mut head = [0; 12];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut head)];
        let got = recvmsg(&*vmm, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        if got.bytes == 0 {
            return Ok(false);
        }
        ensure!(got.bytes == 12, "half a message");
        let mut fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        });
        let fds: Vec<OwnedFd> = fds.next().into_iter().flatten().collect();
        let word = |bytes: &[u8], at: usize| {
            bytes[at..].first_chunk().map_or(0, |word| u32::from_ne_bytes(*word))
        };
        let (request, flags, size) = (word(&head, 0), word(&head, 4), word(&head, 8));
        let mut body = vec![0; usize::try_from(size)?];
        vmm.read_exact(&mut body)?;
        let long = |at: usize| body[at..].first_chunk().map_or(0, |it| u64::from_ne_bytes(*it));
        let ring = || usize::try_from(word(&body, 0) & 0xff);
        let answer = match request {
            1 => FEATURES.to_ne_bytes().to_vec(),
            15 => PROTOCOL.to_ne_bytes().to_vec(),
            11 => {
                let mut answer = body[..4].to_vec();
                answer.extend(u32::from(self.rings[ring()?].next).to_ne_bytes());
                answer
            }
            24 => {
                let (mut answer, mac) = (body.clone(), [2, 0, 10, 77, 9, 2]);
                let at = usize::try_from(word(&body, 0))?;
                answer[12..].iter_mut().zip(mac.iter().skip(at)).for_each(|(to, it)| *to = *it);
                answer
            }
            _ => {
                self.set(request, &body, fds, (ring, word, long))?;
                if flags & 8 == 0 {
                    return Ok(true);
                }
                vec![0; 8]
            }
        };
        let mut message = request.to_ne_bytes().to_vec();
        message.extend(5u32.to_ne_bytes());
        message.extend(u32::try_from(answer.len())?.to_ne_bytes());
        message.extend(answer);
        vmm.write_all(&message)?;
        Ok(true)
    }

    fn set(
        &mut self,
        request: u32,
        body: &[u8],
        fds: Vec<OwnedFd>,
        (ring, word, long): (
            impl Fn() -> Result<usize, std::num::TryFromIntError>,
            impl Fn(&[u8], usize) -> u32,
            impl Fn(usize) -> u64,
        ),
    ) -> Result<()> {
        let file = |fds: Vec<OwnedFd>| fds.into_iter().next();
        match request {
            5 => {
                self.regions.clear();
                for (number, fd) in (0..word(body, 0)).zip(fds) {
                    let at = 8 + 32 * usize::try_from(number)?;
                    let (len, offset) = (usize::try_from(long(at + 8))?, long(at + 24));
                    let memory = Shared::map(&File::from(fd), offset, len)?;
                    let (guest, user) = (long(at), long(at + 16));
                    self.regions.push(Region { guest, user, memory });
                }
            }
            8 => self.rings[ring()?].size = u16::try_from(word(body, 4))?,
            9 => self.rings[ring()?].places = [long(8), long(16), long(24)],
            10 => {
                let ring = &mut self.rings[ring()?];
                (ring.next, ring.used) = (u16::try_from(word(body, 4))?, 0);
            }
            12 => self.rings[ring()?].kick = file(fds),
            13 => self.rings[ring()?].call = file(fds),
            21 => self.requests = file(fds),
            _ => {}
        }
        Ok(())
    }

    /// Carries what there is, both ways; whether there may be more.
    fn turn(&mut self, device: &OwnedFd) -> Result<bool> {
        let Self { regions, rings: [receive, transmit], is_dry, .. } = self;
        let (mut parts, mut more) = (Vec::with_capacity(64), false);
        *is_dry = false;
        let (before, mut given) = (receive.used, 0);
        while given < TURN {
            let room = receive.take(regions, &mut parts, WHOLE)?;
            if room.1 < WHOLE {
                // Asked to kick when it has put in anything more.
                *is_dry = !receive.wants_kick(regions, receive.available(regions)?)?;
                more |= !*is_dry;
                break;
            }
            let len = match Part::read(device, &parts) {
                Ok(len) => len,
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            };
            let mut rest = len;
            let (mut count, first) = (0u16, parts[0].clone());
            while rest > 0 {
                let (head, room) = receive.chain(regions, &mut parts)?;
                let written = room.min(rest);
                rest -= written;
                count += 1;
                receive.put(regions, head, u32::try_from(written)?)?;
            }
            first.write(10, &count.to_le_bytes());
            receive.publish(regions)?;
            given += 1;
        }
        more |= given == TURN;
        receive.signal(regions, before)?;
        let (before, mut taken) = (transmit.used, 0);
        while taken < TURN && transmit.next != transmit.available(regions)? {
            let (head, _) = transmit.chain(regions, &mut parts)?;
            // A packet that the host refuses is lost.
            Part::write_all(device, &parts).ok();
            transmit.put(regions, head, 0)?;
            taken += 1;
        }
        transmit.publish(regions)?;
        transmit.signal(regions, before)?;
        more |= taken == TURN || transmit.wants_kick(regions, transmit.next)?;
        Ok(more)
    }
}

impl Ring {
    fn word<'a>(&self, regions: &'a [Region], ring: usize, at: u64) -> Result<Part<'a>> {
        let (memory, at) = place(regions, self.places[ring] + at, |region| region.user)?;
        Ok(memory.part(at, 2))
    }

    fn available(&self, regions: &[Region]) -> Result<u16> {
        Ok(self.word(regions, 2, 2)?.load())
    }

    /// The next chain's head, and the room in it; its parts are put into `parts`.
    fn chain<'a>(
        &mut self,
        regions: &'a [Region],
        parts: &mut Vec<Part<'a>>,
    ) -> Result<(u16, usize)> {
        parts.clear();
        let slot = u64::from(self.next % self.size);
        let head = self.word(regions, 2, 4 + 2 * slot)?.load();
        self.next = self.next.wrapping_add(1);
        Ok((head, self.parts_of(regions, head, parts)?))
    }

    fn parts_of<'a>(
        &self,
        regions: &'a [Region],
        head: u16,
        parts: &mut Vec<Part<'a>>,
    ) -> Result<usize> {
        let (mut table, mut at) = (place(regions, self.places[0], |region| region.user)?, head);
        let mut room = 0;
        loop {
            let mut descriptor = [0; 16];
            table.0.part(table.1 + 16 * usize::from(at), 16).read_into(&mut descriptor);
            let [a, b, c, d, e, f, g, h, len @ .., i, j, k, l] = descriptor;
            let address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            let len = usize::try_from(u32::from_le_bytes(len))?;
            let [flags, next] = [[i, j], [k, l]].map(u16::from_le_bytes);
            let found = place(regions, address, |region| region.guest)?;
            if flags & 4 != 0 {
                // An indirect table.
                (table, at) = (found, 0);
                continue;
            }
            parts.push(found.0.part(found.1, len));
            room += len;
            if flags & 1 == 0 {
                return Ok(room);
            }
            at = next;
        }
    }

    /// Parts of the next chains, which stay where they are, until there is so much room.
    fn take<'a>(
        &self,
        regions: &'a [Region],
        parts: &mut Vec<Part<'a>>,
        wanted: usize,
    ) -> Result<(u16, usize)> {
        parts.clear();
        let (mut room, mut next, available) = (0, self.next, self.available(regions)?);
        while room < wanted && next != available {
            let slot = u64::from(next % self.size);
            let head = self.word(regions, 2, 4 + 2 * slot)?.load();
            room += self.parts_of(regions, head, parts)?;
            next = next.wrapping_add(1);
        }
        Ok((next, room))
    }

    fn put(&mut self, regions: &[Region], head: u16, len: u32) -> Result<()> {
        let slot = u64::from(self.used % self.size);
        let (memory, at) = place(regions, self.places[1] + 4 + 8 * slot, |region| region.user)?;
        let element = u64::from(len) << 32 | u64::from(head);
        memory.part(at, 8).write(0, &element.to_le_bytes());
        self.used = self.used.wrapping_add(1);
        Ok(())
    }

    fn publish(&self, regions: &[Region]) -> Result<()> {
        self.word(regions, 1, 2)?.store(self.used);
        Ok(())
    }

    /// Calls the guest where it wants to be called for what is used since.
    fn signal(&self, regions: &[Region], before: u16) -> Result<()> {
        fence(Ordering::SeqCst);
        let event = self.word(regions, 2, 4 + 2 * u64::from(self.size))?.load();
        let passed = self.used.wrapping_sub(event).wrapping_sub(1) < self.used.wrapping_sub(before);
        if let (true, Some(call)) = (passed, &self.call) {
            rustix::io::write(call, &1u64.to_ne_bytes())?;
        }
        Ok(())
    }

    /// Has the guest kick when it makes more available than so much; whether it has already.
    fn wants_kick(&self, regions: &[Region], after: u16) -> Result<bool> {
        self.word(regions, 1, 4 + 8 * u64::from(self.size))?.store(after);
        fence(Ordering::SeqCst);
        Ok(self.available(regions)? != after)
    }
}
