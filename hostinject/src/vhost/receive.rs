//! The receiving half of a [`Card`]: what the host has for the guest, into its buffers.
//!
//! A packet is read where it belongs as long as they are long: those of a stream. Else it is
//! read into a buffer of ours and copied, which a packet pays for that has to wait for
//! buffers as well.
//!
//! Sources: virtio 1.3 §5.1.6.4.

use std::os::fd::AsFd;

use conet_dataplane::DropReason;
use rustix::io::Errno;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::buffers::WHOLE;
use super::gate::lock;
use super::header::{DEVICE, DEVICE_HEADER, HEADER, Header, PACKET, header_of, parts_of};
use super::net::{BULK, Card, GIVEN, NetError, Turn};
use super::ring::{Returns, call_for_more};
use super::sys;

/// What became of the next frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Given {
    Frame,
    /// There is none.
    Nothing,
    /// The guest has too few buffers.
    Waits,
}

impl Card {
    /// Gives the guest what is for it, as far as it has buffers.
    pub(super) fn receive(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<Turn, NetError> {
        self.attend();
        let given = self.fill(queue, memory);
        // Nobody but us knows of those that were taken and not used.
        self.buffers.put_back(queue);
        let (mut turn, last) = given?;
        turn.more = match last {
            Given::Frame => true,
            Given::Nothing => false,
            Given::Waits => call_for_more(queue, memory)?,
        };
        Ok(turn)
    }

    fn fill(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<(Turn, Given), NetError> {
        let mut returns = Returns::begin(queue);
        let mut turn = Turn::default();
        let mut given = Given::Frame;
        for _ in 0..GIVEN {
            given = self.give_next(queue, memory, &mut returns)?;
            if given != Given::Frame {
                break;
            }
            turn.call |= returns.publish(queue, memory)?;
        }
        Ok((turn, given))
    }

    fn give_next(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        returns: &mut Returns,
    ) -> Result<Given, NetError> {
        if let Some((mut frame, len)) = self.answer.take() {
            if self.give(&mut frame[..len], queue, memory, returns)? {
                return Ok(Given::Frame);
            }
            self.answer = Some((frame, len));
            return Ok(Given::Waits);
        }
        if let Some(given) = self.give_direct(queue, memory, returns)? {
            return Ok(given);
        }
        let Some(len) = self.next()? else { return Ok(Given::Nothing) };
        let mut frame = std::mem::take(&mut self.to_guest);
        let given = self.give(&mut frame[..len], queue, memory, returns);
        self.to_guest = frame;
        if given? {
            return Ok(Given::Frame);
        }
        self.waiting = Some(len);
        Ok(Given::Waits)
    }

    /// Has the kernel write the next packet where the guest is to find it; nothing is said
    /// where that does not fit now.
    fn give_direct(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        returns: &mut Returns,
    ) -> Result<Option<Given>, NetError> {
        let is_plain = self.waiting.is_none() && self.taps.is_empty();
        if !(self.is_bulk && self.merges && is_plain) || self.is_held || self.has_kept {
            return Ok(None);
        }
        if !self.buffers.take(queue, memory, WHOLE)? {
            return Ok(None);
        }
        let Some(slices) = self.buffers.slices(memory, PACKET) else { return Ok(None) };
        loop {
            let mut head = [0; DEVICE_HEADER];
            let len = match sys::read_into(&*self.device, &mut head, &slices) {
                Ok(len) => len,
                // Its memory is shorter than it says.
                Err(Errno::FAULT) => return Err(NetError::Gone),
                Err(error) => match self.no_packet(error)? {
                    true => continue,
                    false => return Ok(Some(Given::Nothing)),
                },
            };
            let Some(len) = len.checked_sub(DEVICE_HEADER).filter(|len| *len > 0) else { continue };
            let (len, header) = (PACKET + len, header_of(&head));
            self.is_bulk = len >= BULK;
            if !self.admits(1, len, header.map_or(1, |header| parts_of(header, len))) {
                continue;
            }
            let chains = self.buffers.chains_for(len);
            let mut frame = [0; PACKET];
            if let Some(header) = header {
                header.to_card().write(&mut frame);
            }
            frame[DEVICE_HEADER..HEADER].copy_from_slice(&count(chains));
            // What the guest may have changed by now is its own to read.
            let is_v6 = self.buffers.byte(memory, PACKET).is_some_and(|byte| byte >> 4 == 6);
            self.segment.address(&mut frame[HEADER..], is_v6);
            let is_written = self.buffers.write(memory, &frame);
            let len = if is_written { len } else { 0 };
            self.buffers.spend(chains, len, queue, memory, returns)?;
            return Ok(Some(Given::Frame));
        }
    }

    /// What a read that brought nothing means: whether to read again.
    fn no_packet(&self, error: Errno) -> Result<bool, NetError> {
        match error {
            Errno::AGAIN => Ok(false),
            Errno::INTR => Ok(true),
            // The kernel could not describe one packet by a header; that one is gone.
            Errno::INVAL => {
                self.count(DropReason::Device);
                Ok(true)
            }
            error => Err(NetError::Device(error.into())),
        }
    }

    /// The frame that is to be given next, in `to_guest`.
    pub(super) fn next(&mut self) -> Result<Option<usize>, NetError> {
        if let Some(len) = self.waiting.take() {
            return Ok(Some(len));
        }
        loop {
            if self.is_held {
                return Ok(None);
            }
            let kept = self.kept();
            if kept.is_none() && self.has_kept {
                // What came before is another card's to give; that one wakes this one.
                return Ok(None);
            }
            let is_kept = kept.is_some();
            let room = self.to_guest.get_mut(DEVICE..).unwrap_or_default();
            let read = match kept {
                Some(packet) => copy_into(room, &packet),
                None => rustix::io::read(self.device.as_fd(), room),
            };
            let len = match read {
                Ok(len) => len,
                Err(error) => match self.no_packet(error)? {
                    true => continue,
                    false => return Ok(None),
                },
            };
            let header = self.to_guest.get(DEVICE..).and_then(header_of);
            let (Some(header), true) = (header, len > DEVICE_HEADER) else { continue };
            let len = PACKET + len - DEVICE_HEADER;
            self.is_bulk = len >= BULK;
            if !is_kept && !self.admits(1, len, parts_of(header, len)) {
                continue;
            }
            let is_v6 = self.to_guest[PACKET] >> 4 == 6;
            Header::to_card(header).write(&mut self.to_guest);
            self.segment.address(&mut self.to_guest[HEADER..PACKET], is_v6);
            return Ok(Some(len));
        }
    }

    /// What was kept for the guest while it was held; the first card's to give, so that
    /// it is given in order.
    fn kept(&mut self) -> Option<Vec<u8>> {
        if !self.has_kept || self.index > 0 {
            return None;
        }
        let mut counted = lock(&self.counted);
        let packet = counted.hold.next();
        self.has_kept = counted.hold.kept().0 > 0;
        if !self.has_kept {
            // The others have waited for this.
            counted.wake();
        }
        packet
    }

    /// Copies a frame into the guest's buffers; false where it has too few just now.
    fn give(
        &mut self,
        frame: &mut [u8],
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        returns: &mut Returns,
    ) -> Result<bool, NetError> {
        let wanted = if self.merges { frame.len() } else { 1 };
        let has_room = self.buffers.take(queue, memory, wanted)?;
        let chains = match (self.merges, self.buffers.first()) {
            (_, None) => return Ok(false),
            (true, _) if !has_room && self.buffers.len() < usize::from(queue.size()) => {
                return Ok(false);
            }
            (true, _) => self.buffers.chains_for(frame.len()),
            (false, _) => 1,
        };
        let fits = match self.merges {
            true => has_room,
            false => self.buffers.first().is_some_and(|room| room >= frame.len()),
        };
        if !fits {
            // Whatever it waits for: buffers of a guest that cannot hold the frame.
            self.count(DropReason::TooBig);
            self.buffers.spend(chains, 0, queue, memory, returns)?;
            return Ok(true);
        }
        frame[DEVICE_HEADER..HEADER].copy_from_slice(&count(chains));
        // Buffers that are not in its memory: it has what it offered.
        let is_written = self.buffers.write(memory, frame);
        let len = if is_written { frame.len() } else { 0 };
        self.buffers.spend(chains, len, queue, memory, returns)?;
        for tap in self.taps.iter() {
            tap.offer(frame.get(HEADER..).unwrap_or_default());
        }
        Ok(true)
    }
}

/// `num_buffers`.
fn count(chains: usize) -> [u8; 2] {
    u16::try_from(chains).unwrap_or(u16::MAX).to_le_bytes()
}

fn copy_into(room: &mut [u8], packet: &[u8]) -> rustix::io::Result<usize> {
    room.get_mut(..packet.len()).ok_or(Errno::INVAL)?.copy_from_slice(packet);
    Ok(packet.len())
}
