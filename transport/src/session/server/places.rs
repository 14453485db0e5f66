//! Where pieces of calls belong, for who receives them there.

use super::{Server, SlotHead, State};

impl Server {
    /// Where bytes of a large call belong; see [`Assembly::room`].
    pub(crate) fn place_of(
        &mut self,
        head: SlotHead,
        offset: usize,
        most: usize,
    ) -> Option<&mut [u8]> {
        let slot = self.slots.get_mut(usize::from(head.slot))?;
        match &mut slot.state {
            State::Assembling { sequence, assembly, .. }
                if *sequence == head.sequence && assembly.total() == head.total as usize =>
            {
                assembly.room(offset, most)
            }
            _ => None,
        }
    }
}
