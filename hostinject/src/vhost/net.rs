//! A virtio network card's two queues, and the host's TUN device behind them.
//!
//! ```text
//! guest ─ transmit queue ─► frame (copied) ─ judged ─► TUN write ─► host's kernel
//! guest ◄─ receive queue ── frame ◄────────────────── TUN read ◄── host's kernel
//!                          └ ARP, NDP answered here
//! ```
//!
//! A TUN device with a virtio header speaks of checksums and segments as the card does,
//! so up to 64 KiB of one flow go through in one piece, each way, unparsed but for their
//! addresses. What the guest cannot take, the host's kernel splits and completes before.
//!
//! Guest memory is the guest's: a frame is copied, then judged, so that nothing changes in
//! between. Every length is checked before it is believed; chains are virtio-queue's,
//! which bounds them.
//!
//! Sources: virtio 1.3 §5.1.6; Linux `Documentation/networking/tuntap.rst`.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use conet_dataplane::DropReason;
use rustix::io::Errno;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryLoadGuard, GuestMemoryMmap};

use super::Counted;
use super::ring::{Returns, call_for_more};
use super::tap::Taps;
use crate::gate::{Limit, Rates};
use crate::segment::{ANSWER_MAX, ETHERNET, Segment, Verdict};

type Memory = GuestMemoryLoadGuard<GuestMemoryMmap>;
type Chain = DescriptorChain<Memory>;

/// The card's header, with `num_buffers` (virtio 1.3 §5.1.6).
pub(super) const HEADER: usize = 12;
/// The device's, without.
const DEVICE_HEADER: usize = 10;
/// Where the packet lies in a frame's buffer.
const PACKET: usize = HEADER + ETHERNET;
/// Where the device's header lies, right before the packet.
const DEVICE: usize = PACKET - DEVICE_HEADER;
/// Longest packet.
const LONGEST: usize = 65_535;
/// Longest frame.
pub(super) const LONGEST_FRAME: usize = ETHERNET + LONGEST;
/// Frames of one direction before the other has its turn.
const BUDGET: usize = 256;
/// Frames for the guest before it is called: it takes them while the next are copied.
const GIVEN: usize = 16;

/// [`ETHERNET`], as headers count.
const ETH: u16 = 14;
const _: () = assert!(ETH as usize == ETHERNET);
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_…`.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

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
    /// The device failed.
    #[error("the host's device: {0}")]
    Device(#[source] io::Error),
}

/// One card.
pub(super) struct Card {
    device: Arc<File>,
    segment: Segment,
    /// Most bytes of a packet that is not split.
    mtu: usize,
    /// A frame from the guest.
    from_guest: Box<[u8]>,
    /// A frame to the guest, and its length where one waits for buffers.
    to_guest: Box<[u8]>,
    waiting: Option<usize>,
    /// Answers that wait for buffers; the latest only, as a guest asks again.
    answer: Option<([u8; HEADER + ANSWER_MAX], usize)>,
    /// How fast the guest may be, and what keeps it to that.
    rates: Rates,
    from_limit: Limit,
    to_limit: Limit,
    /// Who watches it.
    taps: Taps,
    /// What its host does with it now.
    is_held: bool,
    has_kept: bool,
    /// Whether a frame may lie in several chains.
    pub(super) merges: bool,
    counted: Arc<Mutex<Counted>>,
    /// Chains of one frame to the guest: where each begins, and its end among the parts.
    chains: Vec<(u16, usize)>,
    /// Buffers of the guest's for that frame; as many bytes as it has, none empty.
    parts: Vec<(GuestAddress, usize)>,
}

impl Card {
    pub(super) fn new(
        device: Arc<File>,
        segment: Segment,
        mtu: usize,
        counted: Arc<Mutex<Counted>>,
    ) -> Self {
        let frame = || vec![0; PACKET + LONGEST].into_boxed_slice();
        Self {
            device,
            segment,
            mtu,
            from_guest: frame(),
            to_guest: frame(),
            waiting: None,
            answer: None,
            rates: Rates::default(),
            from_limit: Limit::default(),
            to_limit: Limit::default(),
            taps: Taps::default(),
            is_held: false,
            has_kept: false,
            merges: false,
            counted,
            chains: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// Forgets what was under way with a guest that has gone.
    pub(super) fn reset(&mut self) {
        self.waiting = None;
        self.answer = None;
        self.chains.clear();
        self.merges = false;
    }

    fn count(&self, reason: DropReason) {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).drops.count(reason);
    }

    /// Sees what the port has been told meanwhile.
    pub(super) fn attend(&mut self) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        if counted.rates != self.rates {
            self.rates = counted.rates;
            self.from_limit = Limit::new(self.rates.from_guest);
            self.to_limit = Limit::new(self.rates.to_guest);
        }
        if !Arc::ptr_eq(&counted.taps, &self.taps) {
            self.taps = Arc::clone(&counted.taps);
        }
        self.is_held = counted.hold.is_held();
        if self.is_held
            && let Some(len) = self.waiting.take()
        {
            let mut frame = self.to_guest.get_mut(DEVICE..len).unwrap_or_default().to_vec();
            // As the device gave it; the card's header goes as far as that.
            if let Some(header) = header_of(&self.to_guest) {
                header.card_to_device().write(&mut frame);
            }
            let lost = counted.hold.accept(vec![frame]);
            (0..lost).for_each(|_| counted.drops.count(DropReason::HoldFull));
        }
        counted.is_settled = self.is_held;
        self.has_kept = counted.hold.kept().0 > 0;
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
            match self.copy(chain, memory) {
                Ok(len) => self.frame(len)?,
                Err(reason) => self.count(reason),
            }
            returns.put(queue, memory, head, 0)?;
        }
        let call = returns.publish(queue, memory)?;
        Ok(Turn { call, more: taken == BUDGET })
    }

    /// Copies a frame out of the guest's memory.
    fn copy(&mut self, chain: Chain, memory: &Memory) -> Result<usize, DropReason> {
        let malformed = |_| DropReason::Malformed;
        let mut reader = chain.reader(&**memory).map_err(malformed)?;
        let len = reader.available_bytes();
        if len < PACKET {
            return Err(DropReason::Malformed);
        }
        let frame = self.from_guest.get_mut(..len).ok_or(DropReason::TooBig)?;
        reader.read_exact(frame).map_err(|_| DropReason::Malformed)?;
        Ok(len)
    }

    /// Does with a frame of the guest's what is to be done.
    fn frame(&mut self, len: usize) -> Result<(), NetError> {
        for tap in self.taps.iter() {
            tap.offer(self.from_guest.get(HEADER..len).unwrap_or_default());
        }
        if self.from_limit.is_set() {
            let (bytes, parts) = (len.saturating_sub(PACKET), parts(&self.from_guest, len));
            if !self.from_limit.admits(Instant::now(), bytes, parts) {
                self.count(DropReason::GuestRate);
                return Ok(());
            }
        }
        let frame = self.from_guest.get_mut(HEADER..len).unwrap_or_default();
        let mut answer = [0; ANSWER_MAX];
        let reason = match self.segment.handle_frame(frame, &mut answer) {
            Verdict::Packet(len) => match self.pass_on(len) {
                Ok(()) => return Ok(()),
                Err(Ok(reason)) => reason,
                Err(Err(error)) => return Err(error),
            },
            Verdict::Answer(len) => {
                self.set_answer(&answer, len);
                return Ok(());
            }
            Verdict::Drop(reason) => reason,
        };
        self.count(reason);
        Ok(())
    }

    /// Writes the packet of `len` bytes to the host.
    fn pass_on(&mut self, len: usize) -> Result<(), Result<DropReason, NetError>> {
        let header = header_of(&self.from_guest).ok_or(Ok(DropReason::Malformed))?;
        let header = header.to_device().ok_or(Ok(DropReason::Malformed))?;
        if header.gso_type == GSO_NONE && len > self.mtu {
            return Err(Ok(DropReason::TooBig));
        }
        header.write(&mut self.from_guest[DEVICE..]);
        let packet = self.from_guest.get(DEVICE..PACKET + len).unwrap_or_default();
        match rustix::io::write(self.device.as_fd(), packet) {
            Ok(_) => Ok(()),
            Err(Errno::BADFD) => Err(Err(NetError::Device(Errno::BADFD.into()))),
            // The header and the packet contradict each other.
            Err(Errno::INVAL) => Err(Ok(DropReason::Malformed)),
            // The link is down, or memory is short.
            Err(_) => Err(Ok(DropReason::Device)),
        }
    }

    /// Gives the guest what is for it, as far as it has buffers.
    pub(super) fn receive(&mut self, queue: &mut Queue, memory: &Memory) -> Result<Turn, NetError> {
        self.attend();
        let mut returns = Returns::begin(queue);
        let mut call = false;
        let mut turn = Turn { call: false, more: true };
        for _ in 0..GIVEN {
            if let Some((mut frame, len)) = self.answer.take() {
                if !self.give(&mut frame[..len], queue, memory, &mut returns)? {
                    self.answer = Some((frame, len));
                    turn.more = call_for_more(queue, memory)?;
                    break;
                }
            } else {
                let Some(len) = self.next()? else {
                    turn.more = false;
                    break;
                };
                let mut frame = std::mem::take(&mut self.to_guest);
                let given = self.give(&mut frame[..len], queue, memory, &mut returns);
                self.to_guest = frame;
                if !given? {
                    self.waiting = Some(len);
                    turn.more = call_for_more(queue, memory)?;
                    break;
                }
            }
            call |= returns.publish(queue, memory)?;
        }
        turn.call = call;
        Ok(turn)
    }

    /// The frame that is to be given next, in `to_guest`.
    fn next(&mut self) -> Result<Option<usize>, NetError> {
        if let Some(len) = self.waiting.take() {
            return Ok(Some(len));
        }
        loop {
            if self.is_held {
                return Ok(None);
            }
            let kept = self.kept();
            let is_kept = kept.is_some();
            let room = self.to_guest.get_mut(DEVICE..).unwrap_or_default();
            let read = match kept {
                Some(packet) => copy_into(room, &packet),
                None => rustix::io::read(self.device.as_fd(), room),
            };
            let len = match read {
                Ok(len) => len,
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => continue,
                // The kernel could not describe one packet by a header; that one is gone.
                Err(Errno::INVAL) => {
                    self.count(DropReason::Device);
                    continue;
                }
                Err(error) => return Err(NetError::Device(error.into())),
            };
            let header = self.to_guest.get(DEVICE..).and_then(header_of);
            let (Some(header), true) = (header, len > DEVICE_HEADER) else { continue };
            if !is_kept && self.to_limit.is_set() {
                let len = PACKET + len - DEVICE_HEADER;
                let parts = parts_of(header, len);
                if !self.to_limit.admits(Instant::now(), len - PACKET, parts) {
                    self.count(DropReason::GuestRate);
                    continue;
                }
            }
            let is_v6 = self.to_guest[PACKET] >> 4 == 6;
            header.to_card().write(&mut self.to_guest);
            self.segment.address(&mut self.to_guest[HEADER..PACKET], is_v6);
            return Ok(Some(PACKET + len - DEVICE_HEADER));
        }
    }

    /// What was kept for the guest while it was held.
    fn kept(&mut self) -> Option<Vec<u8>> {
        if !self.has_kept {
            return None;
        }
        let packet = self.counted.lock().unwrap_or_else(PoisonError::into_inner).hold.next();
        self.has_kept = packet.is_some();
        packet
    }

    /// Copies a frame into the guest's buffers; false where it has too few just now.
    fn give(
        &mut self,
        frame: &mut [u8],
        queue: &mut Queue,
        memory: &Memory,
        returns: &mut Returns,
    ) -> Result<bool, NetError> {
        let before = queue.next_avail();
        let most = if self.merges { usize::from(queue.size()) } else { 1 };
        let mut room = 0;
        self.chains.clear();
        self.parts.clear();
        while room < frame.len() && self.chains.len() < most {
            let Some(chain) = queue.iter(&**memory)?.next() else {
                // Later, with those that were taken.
                queue.set_next_avail(before);
                return Ok(false);
            };
            let head = chain.head_index();
            // Each descriptor is read once: what the guest changes after is not believed.
            for descriptor in chain.writable() {
                let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
                let len = len.min(frame.len() - room);
                if len > 0 {
                    self.parts.push((descriptor.addr(), len));
                    room += len;
                }
                if room == frame.len() {
                    break;
                }
            }
            self.chains.push((head, self.parts.len()));
        }
        if room < frame.len() {
            // Whatever it waits for: buffers of a guest that cannot hold the frame.
            self.count(DropReason::TooBig);
            for (head, _) in self.chains.drain(..) {
                returns.put(queue, memory, head, 0)?;
            }
            return Ok(true);
        }
        let count = u16::try_from(self.chains.len()).unwrap_or(u16::MAX);
        frame[DEVICE_HEADER..HEADER].copy_from_slice(&count.to_le_bytes());
        let (mut rest, mut parts) = (&*frame, self.parts.as_slice());
        let mut at = 0;
        for (head, end) in self.chains.drain(..) {
            let (of_chain, after) = parts.split_at(end - at);
            (parts, at) = (after, end);
            let mut written = Some(0);
            for &(address, len) in of_chain {
                let (part, after) = rest.split_at(len);
                rest = after;
                // A buffer that is not in its memory: it has what it offered.
                let is_written = memory.write_slice(part, address).is_ok();
                written = written.filter(|_| is_written).map(|sum| sum + len);
            }
            let written = written.and_then(|sum| u32::try_from(sum).ok()).unwrap_or(0);
            returns.put(queue, memory, head, written)?;
        }
        for tap in self.taps.iter() {
            tap.offer(frame.get(HEADER..).unwrap_or_default());
        }
        Ok(true)
    }
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
        self.frame(HEADER + frame.len())
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

/// A header as virtio and TUN share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

/// How many packets a frame of the guest's becomes.
fn parts(frame: &[u8], len: usize) -> usize {
    header_of(frame).map_or(1, |header| parts_of(header, len))
}

fn parts_of(header: Header, len: usize) -> usize {
    match (header.gso_type, header.gso_size) {
        (GSO_NONE, _) | (_, 0) => 1,
        (_, size) => len.saturating_sub(PACKET).div_ceil(usize::from(size)),
    }
}

fn copy_into(room: &mut [u8], packet: &[u8]) -> rustix::io::Result<usize> {
    room.get_mut(..packet.len()).ok_or(Errno::INVAL)?.copy_from_slice(packet);
    Ok(packet.len())
}

fn header_of(bytes: &[u8]) -> Option<Header> {
    let &[flags, gso_type, a, b, c, d, e, f, g, h] = bytes.first_chunk()?;
    Some(Header {
        flags,
        gso_type,
        hdr_len: u16::from_le_bytes([a, b]),
        gso_size: u16::from_le_bytes([c, d]),
        csum_start: u16::from_le_bytes([e, f]),
        csum_offset: u16::from_le_bytes([g, h]),
    })
}

impl Header {
    /// As the device has it: places count from the packet. None where they are before it,
    /// or the guest asks for what it was not offered.
    fn to_device(self) -> Option<Self> {
        let is_known = matches!(self.gso_type & !GSO_ECN, GSO_NONE | GSO_TCPV4 | GSO_TCPV6);
        // A checksum that the guest says is good is for the host to believe or not.
        let flags = self.flags & NEEDS_CSUM;
        let (csum_start, csum_offset) =
            if flags == 0 { (0, 0) } else { (self.csum_start.checked_sub(ETH)?, self.csum_offset) };
        let is_gso = self.gso_type != GSO_NONE;
        is_known.then_some(Self {
            flags,
            gso_type: self.gso_type,
            // A hint, which some guests leave out.
            hdr_len: if is_gso { self.hdr_len.saturating_sub(ETH) } else { 0 },
            gso_size: if is_gso { self.gso_size } else { 0 },
            csum_start,
            csum_offset,
        })
    }

    /// As the card has it: places count from the Ethernet header.
    fn to_card(self) -> Self {
        let csum_start =
            if self.flags & NEEDS_CSUM == 0 { 0 } else { self.csum_start.saturating_add(ETH) };
        let hdr_len = if self.gso_type == GSO_NONE { 0 } else { self.hdr_len.saturating_add(ETH) };
        Self { hdr_len, csum_start, ..self }
    }

    /// The opposite of [`Header::to_card`].
    fn card_to_device(self) -> Self {
        let back = |place: u16| place.saturating_sub(ETH);
        Self { hdr_len: back(self.hdr_len), csum_start: back(self.csum_start), ..self }
    }

    fn write(self, into: &mut [u8]) {
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset];
        let bytes = [self.flags, self.gso_type].into_iter();
        let bytes = bytes.chain(words.into_iter().flat_map(u16::to_le_bytes));
        into.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp_segments() -> Header {
        let [flags, gso_type] = [NEEDS_CSUM, GSO_TCPV4];
        Header { flags, gso_type, hdr_len: 54, gso_size: 1380, csum_start: 34, csum_offset: 16 }
    }

    #[test]
    fn places_count_from_the_packet_and_back() {
        let device = tcp_segments().to_device().unwrap();
        assert_eq!((device.hdr_len, device.csum_start, device.csum_offset), (40, 20, 16));
        assert_eq!(device.to_card(), tcp_segments());
        let mut bytes = [0; HEADER];
        device.write(&mut bytes);
        assert_eq!(header_of(&bytes), Some(device));
        assert_eq!(header_of(&bytes[..9]), None);
    }

    #[test]
    fn what_was_not_offered_is_refused() {
        assert_eq!(Header { csum_start: 13, ..tcp_segments() }.to_device(), None);
        // UDP fragments, UDP segments, and what does not exist.
        for gso_type in [3, 5, 2, 0x7f] {
            assert_eq!(Header { gso_type, ..tcp_segments() }.to_device(), None);
        }
        // A plain packet asks for nothing, whatever else its header says.
        let plain = Header { flags: 2, gso_type: GSO_NONE, ..tcp_segments() };
        let none =
            Header { flags: 0, hdr_len: 0, gso_size: 0, csum_start: 0, csum_offset: 0, ..plain };
        assert_eq!(plain.to_device(), Some(none));
    }
}
