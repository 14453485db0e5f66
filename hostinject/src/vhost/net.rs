//! A virtio network card's two queues, and the host's TUN device behind them.
//!
//! ```text
//! guest ─ transmit queue ─► head (copied) ─ judged ─► TUN write, the rest from its memory
//! guest ◄─ receive queue ── TUN read, into its memory ◄──────────────── host's kernel
//!                          └ ARP, NDP answered here
//! ```
//!
//! A TUN device with a virtio header speaks of checksums and segments as the card does,
//! so up to 64 KiB of one flow go through in one piece, each way, unparsed but for their
//! addresses. What the guest cannot take, the host's kernel splits and completes before.
//!
//! Large frames are copied once, by the kernel, between the device and the guest's memory.
//! Small ones are copied by us as well, which is cheaper than to say where they lie; so is
//! what somebody watches, or what was kept.
//!
//! Guest memory is the guest's: what is judged is copied first, so that nothing of it
//! changes in between; what is not copied, nobody looks at. Every length is checked before
//! it is believed; chains are virtio-queue's, which bounds them.
//!
//! A guest may have several pairs of queues, each a card with a thread and a queue of the
//! device: what they share is [`Counted`], and their guest's address in the segment.
//!
//! Sources: virtio 1.3 §5.1.6; Linux `Documentation/networking/tuntap.rst`.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use conet_dataplane::DropReason;
use rustix::io::Errno;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT};
use vm_memory::{
    GuestMemoryBackend, GuestMemoryError, GuestMemoryLoadGuard, GuestMemoryMmap, VolatileSlice,
};

use super::Counted;
use super::buffers::{Buffers, WHOLE};
use super::gate::{lock, pull};
use super::header::{
    DEVICE, GSO_NONE, HEADER, Header, LONGEST, NEEDS_CSUM, PACKET, header_of, parts,
};
use super::ring::Returns;
use super::sys::{self, MOST_SLICES};
use super::tap::Taps;
use crate::segment::{ANSWER_MAX, ETHERNET, Segment, Verdict};

type Memory = GuestMemoryLoadGuard<GuestMemoryMmap>;
type Chain = DescriptorChain<Memory>;

/// Longest frame.
pub(super) const LONGEST_FRAME: usize = ETHERNET + LONGEST;
/// Frames of one direction before the other has its turn.
const BUDGET: usize = 256;
/// Frames for the guest before it is called: it takes them while the next are read.
pub(super) const GIVEN: usize = 16;
/// From so many bytes on, a frame is not copied by us. Nothing that we answer is so long.
pub(super) const BULK: usize = 8192;
/// Bytes of such a frame that are copied and judged: all headers of its packet's.
const HEAD: usize = 256;
const _: () = assert!(HEAD >= PACKET + 60 && HEAD < BULK);

/// What a queue wants next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Turn {
    /// The guest is to be called.
    pub(super) call: bool,
    /// There is more to do: come again.
    pub(super) more: bool,
}

/// A queue that contradicts itself, or the device is gone.
#[derive(Debug, thiserror::Error)]
pub(super) enum NetError {
    /// The rings are not in the guest's memory.
    #[error("the guest's queue lies outside of its memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The ring's index jumped by more than it holds.
    #[error("the guest's queue is malformed: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// The memory that the guest shares is shorter than it said.
    #[error("the guest's memory is gone")]
    Gone,
    /// The device failed.
    #[error("the host's device: {0}")]
    Device(#[source] io::Error),
}

/// One card.
pub(super) struct Card {
    /// Which of the guest's pairs of queues it is; the first gives what was kept.
    pub(super) index: usize,
    pub(super) device: Arc<File>,
    pub(super) segment: Segment,
    /// Most bytes of a packet that is not split.
    mtu: usize,
    /// A frame from the guest, or its head.
    from_guest: Box<[u8]>,
    /// A frame to the guest, and its length where one waits for buffers.
    pub(super) to_guest: Box<[u8]>,
    pub(super) waiting: Option<usize>,
    /// What comes now is probably as long as what came last.
    pub(super) is_bulk: bool,
    /// Answers that wait for buffers; the latest only, as a guest asks again.
    pub(super) answer: Option<([u8; HEADER + ANSWER_MAX], usize)>,
    /// Who watches it.
    pub(super) taps: Taps,
    /// What its host does with it now: rates from and to the guest, the hold.
    limits: [bool; 2],
    pub(super) is_held: bool,
    pub(super) has_kept: bool,
    /// Whether a frame may lie in several chains.
    pub(super) merges: bool,
    pub(super) counted: Arc<Mutex<Counted>>,
    pub(super) buffers: Buffers,
}

impl Card {
    pub(super) fn new(
        index: usize,
        device: Arc<File>,
        segment: Segment,
        mtu: usize,
        counted: Arc<Mutex<Counted>>,
    ) -> Self {
        let frame = || vec![0; WHOLE].into_boxed_slice();
        Self {
            index,
            device,
            segment,
            mtu,
            from_guest: frame(),
            to_guest: frame(),
            waiting: None,
            is_bulk: false,
            answer: None,
            taps: Taps::default(),
            limits: [false; 2],
            is_held: false,
            has_kept: false,
            merges: false,
            counted,
            buffers: Buffers::default(),
        }
    }

    /// Forgets what was under way with a guest that has gone.
    pub(super) fn reset(&mut self) {
        self.waiting = None;
        self.answer = None;
        self.merges = false;
    }

    pub(super) fn count(&self, reason: DropReason) {
        lock(&self.counted).drops.count(reason);
    }

    /// Sees what the port has been told meanwhile.
    pub(super) fn attend(&mut self) {
        let mut counted = lock(&self.counted);
        self.limits = counted.limits.map(|limit| limit.is_set());
        if !Arc::ptr_eq(&counted.taps, &self.taps) {
            self.taps = Arc::clone(&counted.taps);
        }
        self.is_held = counted.hold.is_held();
        if self.is_held
            && let Some(len) = self.waiting.take()
        {
            let frame = as_read(&self.to_guest, len);
            let lost = counted.hold.accept(vec![frame]);
            (0..lost).for_each(|_| counted.drops.count(DropReason::HoldFull));
        }
        counted.settle(self.index, self.is_held);
        self.has_kept = counted.hold.kept().0 > 0;
    }

    /// Gives what it has and what its queue of the device holds to the card that is the first.
    pub(super) fn hand_over(&mut self) {
        if let Some(len) = self.waiting.take() {
            let frame = as_read(&self.to_guest, len);
            let mut counted = lock(&self.counted);
            if let Err(reason) = counted.hold.keep(&frame) {
                counted.drops.count(reason);
            }
        }
        // Whatever is wrong with the device, its next reader finds out.
        pull(&self.device, &self.counted).ok();
    }

    /// Whether so much may pass now, of what the guest sends (0) or receives (1).
    pub(super) fn admits(&self, way: usize, len: usize, parts: usize) -> bool {
        if !self.limits[way] {
            return true;
        }
        let mut counted = lock(&self.counted);
        let is_admitted =
            counted.limits[way].admits(Instant::now(), len.saturating_sub(PACKET), parts);
        if !is_admitted {
            counted.drops.count(DropReason::GuestRate);
        }
        is_admitted
    }

    /// Whether the receive queue is to be looked at.
    pub(super) fn has_answer(&self) -> bool {
        self.answer.is_some()
    }

    /// Whether its host keeps the guest's packets.
    pub(super) fn is_held(&self) -> bool {
        self.is_held
    }

    /// Lets the router make itself known, unless the guest waits for an answer.
    pub(super) fn advertise(&mut self) {
        let mut advert = [0; ANSWER_MAX];
        if self.answer.is_none()
            && let Some(len) = self.segment.advert(&mut advert)
        {
            self.set_answer(&advert, len);
        }
    }

    fn set_answer(&mut self, answer: &[u8; ANSWER_MAX], len: usize) {
        let mut waiting = [0; HEADER + ANSWER_MAX];
        waiting[HEADER..].copy_from_slice(answer);
        self.answer = Some((waiting, HEADER + len));
    }

    /// Takes what the guest sends.
    pub(super) fn transmit(
        &mut self,
        queue: &mut Queue,
        memory: &Memory,
    ) -> Result<Turn, NetError> {
        self.attend();
        let mut returns = Returns::begin(queue);
        let mut taken = 0;
        while taken < BUDGET {
            let Some(chain) = queue.iter(memory.clone())?.next() else { break };
            taken += 1;
            let head = chain.head_index();
            match self.send(chain, memory) {
                Ok(()) => {}
                Err(Refusal::Drop(reason)) => self.count(reason),
                Err(Refusal::End(error)) => return Err(error),
            }
            returns.put(queue, memory, head, 0)?;
        }
        let call = returns.publish(queue, memory)?;
        Ok(Turn { call, more: taken == BUDGET })
    }

    /// Does with a chain of the guest's what is to be done.
    fn send(&mut self, chain: Chain, memory: &Memory) -> Result<(), Refusal> {
        let (slices, len) = readable(chain, memory).map_err(Refusal::Drop)?;
        if len < PACKET {
            return Err(Refusal::Drop(DropReason::Malformed));
        }
        let is_direct = len >= BULK && slices.len() <= MOST_SLICES && self.taps.is_empty();
        let copied = if is_direct { HEAD } else { len };
        let behind = split(&slices, self.from_guest.get_mut(..copied).unwrap_or_default());
        self.frame(len, &behind)
    }

    /// Does with a frame of the guest's what is to be done; all of it was copied but for
    /// what is behind, of which there is only of long ones.
    fn frame(&mut self, len: usize, behind: &[VolatileSlice<'_>]) -> Result<(), Refusal> {
        let more: usize = behind.iter().map(VolatileSlice::len).sum();
        let copied = len - more;
        for tap in self.taps.iter() {
            tap.offer(self.from_guest.get(HEADER..copied).unwrap_or_default());
        }
        if !self.admits(0, len, parts(&self.from_guest, len)) {
            return Ok(());
        }
        let frame = self.from_guest.get_mut(HEADER..copied).unwrap_or_default();
        let mut answer = [0; ANSWER_MAX];
        let verdict = match more {
            0 => self.segment.handle_frame(frame, &mut answer),
            _ => self.segment.handle_head(frame, more),
        };
        match verdict {
            Verdict::Packet(len) => self.pass_on(len, copied, behind),
            Verdict::Answer(len) => {
                self.set_answer(&answer, len);
                Ok(())
            }
            Verdict::Drop(reason) => Err(Refusal::Drop(reason)),
        }
    }

    /// Writes the packet of `len` bytes to the host.
    fn pass_on(
        &mut self,
        len: usize,
        copied: usize,
        behind: &[VolatileSlice<'_>],
    ) -> Result<(), Refusal> {
        let header = header_of(&self.from_guest).and_then(Header::to_device);
        let header = header.ok_or(Refusal::Drop(DropReason::Malformed))?;
        if header.gso_type == GSO_NONE && len > self.mtu {
            return Err(Refusal::Drop(DropReason::TooBig));
        }
        header.write(&mut self.from_guest[DEVICE..]);
        // What a link pads a packet with is left out.
        let end = PACKET + len;
        let packet = self.from_guest.get(DEVICE..end.min(copied)).unwrap_or_default();
        let written = match end.saturating_sub(copied) {
            0 => rustix::io::write(self.device.as_fd(), packet),
            more => sys::write_from(&*self.device, packet, &first(behind, more)),
        };
        match written {
            Ok(_) => Ok(()),
            Err(Errno::BADFD) => Err(Refusal::End(NetError::Device(Errno::BADFD.into()))),
            Err(Errno::FAULT) => Err(Refusal::End(NetError::Gone)),
            // The header and the packet contradict each other.
            Err(Errno::INVAL) => Err(Refusal::Drop(DropReason::Malformed)),
            // The link is down, or memory is short.
            Err(_) => Err(Refusal::Drop(DropReason::Device)),
        }
    }
}

/// A frame to the guest as the device gave it; the card's header goes as far as that.
fn as_read(frame: &[u8], len: usize) -> Vec<u8> {
    let header = header_of(frame);
    let mut read = frame.get(DEVICE..len).unwrap_or_default().to_vec();
    if let Some(header) = header {
        header.card_to_device().write(&mut read);
    }
    read
}

/// Why a frame of the guest's went nowhere.
enum Refusal {
    Drop(DropReason),
    /// Nor will another.
    End(NetError),
}

/// What a chain has to read, and how much that is: no more than the longest frame.
fn readable(
    chain: Chain,
    memory: &GuestMemoryMmap,
) -> Result<(Vec<VolatileSlice<'_>>, usize), DropReason> {
    let mut slices = Vec::with_capacity(32);
    let mut whole = 0usize;
    for descriptor in chain.readable() {
        let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        whole = whole.saturating_add(len);
        if whole > WHOLE {
            return Err(DropReason::TooBig);
        }
        for slice in memory.get_slices(descriptor.addr(), len) {
            slices.push(slice.map_err(|_| DropReason::Malformed)?);
        }
    }
    Ok((slices, whole))
}

/// So many bytes of the beginning.
fn first<'a>(slices: &[VolatileSlice<'a>], mut len: usize) -> Vec<VolatileSlice<'a>> {
    let mut all = Vec::with_capacity(slices.len());
    for slice in slices {
        let here = slice.len().min(len);
        all.extend(slice.subslice(0, here).ok().filter(|_| here > 0));
        len -= here;
    }
    all
}

/// Copies the beginning, and says where the rest lies.
fn split<'a>(slices: &[VolatileSlice<'a>], into: &mut [u8]) -> Vec<VolatileSlice<'a>> {
    let mut room = into;
    let mut rest = Vec::new();
    for slice in slices {
        let (here, after) = room.split_at_mut(slice.len().min(room.len()));
        slice.copy_to(here);
        if here.len() < slice.len() {
            rest.extend(slice.offset(here.len()).ok());
        }
        room = after;
    }
    rest
}

/// Frames without a header, as transports have them that know of no offloads.
impl Card {
    /// Does with a frame of the guest's what is to be done.
    pub(super) fn take_frame(&mut self, frame: &[u8]) -> Result<(), NetError> {
        let Some(room) = self.from_guest.get_mut(HEADER..HEADER + frame.len()) else {
            self.count(DropReason::TooBig);
            return Ok(());
        };
        if frame.len() < ETHERNET {
            self.count(DropReason::Malformed);
            return Ok(());
        }
        room.copy_from_slice(frame);
        self.from_guest[..HEADER].fill(0);
        match self.frame(HEADER + frame.len(), &[]) {
            Ok(()) => {}
            Err(Refusal::Drop(reason)) => self.count(reason),
            Err(Refusal::End(error)) => return Err(error),
        }
        Ok(())
    }

    /// The next frame for the guest; none where there is none now.
    pub(super) fn next_frame(&mut self) -> Result<Option<&[u8]>, NetError> {
        if let Some((frame, len)) = self.answer.take() {
            let room = self.to_guest.get_mut(..len).unwrap_or_default();
            room.copy_from_slice(frame.get(..len).unwrap_or_default());
            return Ok(self.tapped(len));
        }
        while let Some(len) = self.next()? {
            let header = header_of(&self.to_guest);
            // Of the time of another guest, which took what this one does not.
            if header.is_none_or(|header| header.flags & NEEDS_CSUM != 0 || header.gso_type != 0) {
                self.count(DropReason::Device);
                continue;
            }
            return Ok(self.tapped(len));
        }
        Ok(None)
    }

    /// A frame that is about to go, shown to whoever watches.
    fn tapped(&self, len: usize) -> Option<&[u8]> {
        let frame = self.to_guest.get(HEADER..len)?;
        self.taps.iter().for_each(|tap| tap.offer(frame));
        Some(frame)
    }
}
