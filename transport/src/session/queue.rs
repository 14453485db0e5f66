//! What waits to be polled: a ring of places that are filled and emptied where they are.
//!
//! *Why no `VecDeque`.* What it takes in is put together first and copied then, in pieces other
//! than those it was put together by: the processor waits for each until it has left the store
//! buffer. With events of a hundred bytes that was a quarter of a row's time.
//!
//! Invariant: places that nobody waits in own no memory but what [`Default`] gives them.

use alloc::vec::Vec;

/// The places.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    places: Vec<T>,
    head: usize,
    length: usize,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { places: Vec::new(), head: 0, length: 0 }
    }
}

impl<T: Default> Queue<T> {
    #[inline]
    pub(crate) const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Another one behind the others, for the caller to fill in; `None` only where there is no
    /// memory for a place, which ends the process.
    #[inline(always)]
    pub(crate) fn add(&mut self) -> Option<&mut T> {
        if self.length == self.places.len() {
            self.grow();
        }
        let at = self.head + self.length;
        self.length += 1;
        let size = self.places.len();
        self.places.get_mut(if at < size { at } else { at - size })
    }

    #[cold]
    #[inline(never)]
    fn grow(&mut self) {
        self.places.rotate_left(self.head);
        self.head = 0;
        self.places.resize_with((2 * self.length).max(8), T::default);
    }

    /// The first one, which waits no more; its caller empties it.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Option<&mut T> {
        if self.length == 0 {
            return None;
        }
        let at = self.head;
        self.length -= 1;
        // From the beginning again: those places are in the processor's cache.
        let is_last = self.length == 0 || at + 1 == self.places.len();
        self.head = if is_last { 0 } else { at + 1 };
        self.places.get_mut(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::VecDeque;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn first_in_is_first_out(steps in prop::collection::vec(0u8..5, 0..2000)) {
            let (mut queue, mut model) = (Queue::default(), VecDeque::new());
            for (n, step) in steps.into_iter().enumerate() {
                if step < 3 {
                    *queue.add().expect("a place") = n;
                    model.push_back(n);
                } else {
                    prop_assert_eq!(queue.next().map(core::mem::take), model.pop_front());
                }
                prop_assert_eq!(queue.is_empty(), model.is_empty());
            }
        }
    }
}
