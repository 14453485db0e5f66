//! A card whose driver, and whose VMM, are bytes; see [`crate::fuzz_support`].

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex};

use conet_netsys::MacAddr;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::Counted;
use super::net::Card;
use crate::segment::{OURS, Segment};
use crate::services::Lease;

/// The guest's memory.
const MEMORY: usize = 1 << 16;
/// Longest conversation: its messages fit a socket's buffer however short they are.
const CONVERSATION: usize = 2048;
/// Turns of a queue; each ends by itself.
const TURNS: usize = 3;

/// Gives a driver's memory to a card: `[how 1] [size 1] [descriptors, available, used: 2
/// each, in 16s of bytes] memory`, for one queue. Bits of `how`: 1, the guest receives; 2,
/// frames may lie in several chains; 4, event indices.
pub fn vhost_rings(input: &[u8]) {
    let Some((&[how, size, a, b, c, d, e, f], rest)) = input.split_first_chunk() else { return };
    let Ok(memory) = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]) else {
        return;
    };
    let rest = &rest[..rest.len().min(MEMORY)];
    memory.write_slice(rest, GuestAddress(0)).ok();
    let memory = GuestMemoryAtomic::new(memory);
    let Ok(mut queue) = Queue::new(1024) else { return };
    queue.set_size(1 << (size % 11));
    let place = |low, high| u32::from(u16::from_le_bytes([low, high])) << 4;
    queue.set_desc_table_address(Some(place(a, b)), Some(0));
    queue.set_avail_ring_address(Some(place(c, d)), Some(0));
    queue.set_used_ring_address(Some(place(e, f)), Some(0));
    queue.set_event_idx(how & 4 != 0);
    queue.set_ready(true);
    // Each frame is one of these, as it is of a TUN device.
    let Ok((device, host)) = UnixDatagram::pair() else { return };
    if device.set_nonblocking(true).is_err() || host.set_nonblocking(true).is_err() {
        return;
    }
    // One that is large, and what is then read straight into the guest's memory.
    for len in [60, 9000, 1400, 9000, 40_000] {
        let mut packet = vec![0; 10 + len];
        packet[10] = 0x45;
        host.send(&packet).ok();
    }
    let [address, gateway] = [[10, 77, 1, 2], [10, 77, 1, 1]].map(std::net::IpAddr::from);
    let lease = Lease {
        addresses: vec![address],
        gateways: vec![gateway],
        prefix: 24,
        dns: Vec::new(),
        mtu: 1420,
    };
    let guest = MacAddr([2, 0, 10, 77, 1, 2]);
    let segment = Segment::new(OURS, guest, vec![address]).with_services(lease);
    let counted = Arc::new(Mutex::new(Counted::default()));
    let device = Arc::new(File::from(OwnedFd::from(device)));
    let mut card = Card::new(0, device, segment, 1420, counted);
    card.merges = how & 2 != 0;
    for _ in 0..TURNS {
        let guard = memory.memory();
        let turn = match how & 1 {
            0 => card.transmit(&mut queue, &guard),
            _ => card.receive(&mut queue, &guard),
        };
        if turn.is_err() {
            return;
        }
    }
}

/// Gives what a VMM says to the relay before the library; no descriptors. What comes out is
/// whole messages.
///
/// # Panics
/// When what is passed on is no row of messages: that is the finding.
pub fn vhost_messages(input: &[u8]) {
    let input = &input[..input.len().min(CONVERSATION)];
    let (Ok((mut vmm, ours)), Ok((library, mut behind))) = (UnixStream::pair(), UnixStream::pair())
    else {
        return;
    };
    if vmm.write_all(input).is_err() || vmm.shutdown(Shutdown::Write).is_err() {
        return;
    }
    super::front::pass(&ours, &library, |_, _| ()).ok();
    drop((ours, library));
    let mut passed = Vec::new();
    if behind.read_to_end(&mut passed).is_err() {
        return;
    }
    let mut rest = &passed[..];
    while let Some((head, body)) = rest.split_first_chunk::<12>() {
        let size = u32::from_ne_bytes([head[8], head[9], head[10], head[11]]);
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let after = body.get(size..);
        assert!(after.is_some(), "a message that is not whole was passed on");
        rest = after.unwrap_or_default();
    }
    assert!(rest.is_empty(), "half a header was passed on");
}
