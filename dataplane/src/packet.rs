//! A packet buffer with room before its data, and the pool it returns to.
//!
//! ```text
//! backing  | head room (16) | data (len) | spare, initialised on demand |
//! ```
//!
//! The backing is one `Vec<u8>` whose capacity never changes, so a recycled
//! packet costs no allocation. Dropping a packet instead of giving it back is
//! no fault, only an allocation later.

/// Bytes before the data: room for a virtio-net header (12 bytes with
/// `num_buffers`, virtio 1.3 §5.1.6), rounded up for alignment.
pub const HEAD_ROOM: usize = 16;

/// One packet in its buffer.
#[derive(Debug, Default)]
pub struct Packet {
    // Invariant: at least HEAD_ROOM bytes long, except in a defaulted packet.
    backing: Vec<u8>,
}

impl Packet {
    fn with_capacity(capacity: usize) -> Self {
        let mut backing = Vec::with_capacity(HEAD_ROOM + capacity);
        backing.resize(HEAD_ROOM, 0);
        Self { backing }
    }

    /// The data.
    pub fn data(&self) -> &[u8] {
        self.backing.get(HEAD_ROOM..).unwrap_or_default()
    }

    /// The data, to be changed in place.
    pub fn data_mut(&mut self) -> &mut [u8] {
        self.backing.get_mut(HEAD_ROOM..).unwrap_or_default()
    }

    /// Most bytes of data that fit without a new allocation.
    pub fn capacity(&self) -> usize {
        self.backing.capacity().saturating_sub(HEAD_ROOM)
    }

    /// Makes the data `len` bytes long; what is new is zero.
    pub fn set_len(&mut self, len: usize) {
        self.backing.resize(HEAD_ROOM + len, 0);
    }

    /// Head room and data as one vector, for device libraries that write a
    /// header before the data. It must stay at least [`HEAD_ROOM`] bytes long.
    pub fn backing_mut(&mut self) -> &mut Vec<u8> {
        &mut self.backing
    }
}

/// Buffers of one capacity, waiting to be used again.
#[derive(Debug)]
pub struct Pool {
    free: Vec<Packet>,
    capacity: usize,
    keep: usize,
    allocated: u64,
}

impl Pool {
    /// A pool of packets that hold up to `capacity` bytes of data each. It keeps
    /// at most `keep` of them when idle.
    pub fn new(capacity: usize, keep: usize) -> Self {
        Self { free: Vec::with_capacity(keep), capacity, keep, allocated: 0 }
    }

    /// An empty packet.
    pub fn take(&mut self) -> Packet {
        self.free.pop().unwrap_or_else(|| {
            self.allocated += 1;
            Packet::with_capacity(self.capacity)
        })
    }

    /// Takes a packet back.
    pub fn give(&mut self, mut packet: Packet) {
        // A buffer that a library grew or shrank would break the promise of one
        // capacity.
        if self.free.len() < self.keep && packet.capacity() == self.capacity {
            packet.set_len(0);
            self.free.push(packet);
        }
    }

    /// Bytes of data that each packet holds.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Packets allocated so far; it stands still on a warm path.
    pub fn allocated(&self) -> u64 {
        self.allocated
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warm_pool_allocates_nothing() {
        let mut pool = Pool::new(1500, 4);
        for _ in 0..100 {
            let mut packets: Vec<_> = (0..4).map(|_| pool.take()).collect();
            for packet in &mut packets {
                assert!(packet.data().is_empty());
                assert_eq!(packet.capacity(), 1500);
                packet.set_len(1500);
                packet.data_mut()[1499] = 7;
            }
            packets.into_iter().for_each(|p| pool.give(p));
        }
        assert_eq!(pool.allocated(), 4);
    }

    #[test]
    fn head_room_precedes_the_data() {
        let mut pool = Pool::new(64, 1);
        let mut packet = pool.take();
        packet.set_len(3);
        packet.data_mut().copy_from_slice(b"abc");
        assert_eq!(packet.backing_mut().len(), HEAD_ROOM + 3);
        assert_eq!(&packet.backing_mut()[HEAD_ROOM..], b"abc");
        assert!(Packet::default().data().is_empty());
    }

    #[test]
    fn a_buffer_of_another_size_does_not_come_back() {
        let mut pool = Pool::new(64, 4);
        let mut packet = pool.take();
        packet.set_len(1000);
        pool.give(packet);
        assert_eq!(pool.take().capacity(), 64);
        assert_eq!(pool.allocated(), 2);
    }
}
