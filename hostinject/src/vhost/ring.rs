//! What a virtqueue's user needs beside taking chains out: giving several back at once.
//!
//! A frame that lies in several buffers must come back in one step of the used index, or
//! the guest sees a part of it (virtio 1.3 §5.1.6.4.1, `num_buffers`). virtio-queue
//! returns one chain a step; everything else of it is used.
//!
//! Invariant: [`Returns`] is written behind the index that the guest reads, and becomes
//! visible by one store with release ordering.
//!
//! Sources: virtio 1.3 §2.7.7.2, §2.7.8, §2.7.10.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// The guest wants no call for used buffers (virtio 1.3 §2.7.7).
const NO_INTERRUPT: u16 = 1;

/// Chains on their way back to the guest.
#[derive(Debug)]
pub(super) struct Returns {
    /// The index that the guest sees.
    seen: Wrapping<u16>,
    /// Behind it lie those that it does not see yet.
    next: Wrapping<u16>,
}

impl Returns {
    pub(super) fn begin(queue: &Queue) -> Self {
        let seen = Wrapping(queue.next_used());
        Self { seen, next: seen }
    }

    /// Gives back the chain that began at `head`, with so many bytes written into it.
    pub(super) fn put(
        &mut self,
        queue: &Queue,
        memory: &GuestMemoryMmap,
        head: u16,
        written: u32,
    ) -> Result<(), GuestMemoryError> {
        let slot = u64::from(self.next.0 % queue.size());
        let element = (u64::from(written.to_le()) << 32) | u64::from(u32::from(head).to_le());
        memory.write_obj(element.to_le(), at(queue.used_ring(), 4 + 8 * slot)?)?;
        self.next += 1;
        Ok(())
    }

    /// Lets the guest see them; whether it wants to be called for that.
    pub(super) fn publish(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, GuestMemoryError> {
        if self.next == self.seen {
            return Ok(false);
        }
        let (old, new) = (self.seen, self.next);
        memory.store(new.0.to_le(), at(queue.used_ring(), 2)?, Ordering::Release)?;
        queue.set_next_used(new.0);
        self.seen = new;
        // The guest writes what it wants and then reads the index.
        fence(Ordering::SeqCst);
        if queue.event_idx_enabled() {
            let place = at(queue.avail_ring(), 4 + 2 * u64::from(queue.size()))?;
            let event = Wrapping(u16::from_le(memory.load(place, Ordering::Relaxed)?));
            return Ok(passes(event, old, new));
        }
        let flags = u16::from_le(memory.load(at(queue.avail_ring(), 0)?, Ordering::Relaxed)?);
        Ok(flags & NO_INTERRUPT == 0)
    }
}

/// Asks the guest for a call when it has put anything more into the queue than is there
/// now, which is too little; whether it has meanwhile.
///
/// With event indices a guest says nothing on its own, and where its queue ran dry, so
/// would the device once it is full: nobody would come here again.
pub(super) fn call_for_more(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
) -> Result<bool, virtio_queue::Error> {
    let next = queue.next_avail();
    let seen = queue.avail_idx(memory, Ordering::Acquire)?;
    queue.set_next_avail(seen.0);
    let more = queue.enable_notification(memory);
    queue.set_next_avail(next);
    more
}

/// Whether an index that went from `old` to `new` has gone beyond `event`.
fn passes(event: Wrapping<u16>, old: Wrapping<u16>, new: Wrapping<u16>) -> bool {
    new - event - Wrapping(1) < new - old
}

/// The rings are where the guest says: their ends may lie beyond the last address.
fn at(base: u64, offset: u64) -> Result<GuestAddress, GuestMemoryError> {
    base.checked_add(offset)
        .map(GuestAddress)
        .ok_or(GuestMemoryError::InvalidGuestAddress(GuestAddress(base)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `vring_need_event` of virtio 1.3 §2.7.10.1 has it, over every wrap.
    #[test]
    fn a_call_is_due_when_the_index_passes_the_event() {
        for old in [0u16, 5, u16::MAX - 2, u16::MAX] {
            for step in [1u16, 2, 7, 300] {
                for event in
                    [old.wrapping_sub(3), old, old.wrapping_add(step - 1), old.wrapping_add(step)]
                {
                    let distance = event.wrapping_sub(old);
                    let due = distance < step;
                    let (event, old) = (Wrapping(event), Wrapping(old));
                    assert_eq!(
                        passes(event, old, old + Wrapping(step)),
                        due,
                        "{event} {old} {step}"
                    );
                }
            }
        }
    }
}
