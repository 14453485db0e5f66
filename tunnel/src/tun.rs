//! The TUN device as a [`Port`].
//!
//! With offloads on, one read brings up to 64 KiB of one TCP or UDP flow, which
//! is cut into packets of the device's MTU here; one write may take several
//! packets of a flow joined. Should the kernel refuse joined packets (EINVAL:
//! a kernel or a path that cannot take them), joining is switched off for good.
//!
//! Sources: Linux `Documentation/networking/tuntap.rst`, virtio 1.3 §5.1.6.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};

use conet_dataplane::{HEAD_ROOM, Packet, Pool, Port, PortError, Progress};
use conet_netsys::IfName;
use rustix::io::Errno;
use tun_rs::{DeviceBuilder, GROTable, IDEAL_BATCH_SIZE, SyncDevice, VIRTIO_NET_HDR_LEN};

/// Longest joined packet, and what the device library demands around it (its
/// offset twice).
pub(crate) const CAPACITY: usize = 65_535 + 2 * HEAD_ROOM;

// The virtio header is written into the head room of a packet.
const _: () = assert!(VIRTIO_NET_HDR_LEN <= HEAD_ROOM);

/// A TUN device, deleted by the kernel when this is dropped.
pub(crate) struct TunPort {
    device: SyncDevice,
    /// One raw read: virtio header and up to 64 KiB.
    raw: Vec<u8>,
    /// Buffers for the pieces of the next read.
    pieces: Vec<Piece>,
    sizes: Vec<usize>,
    /// Buffers of the packets being written.
    writing: Vec<Vec<u8>>,
    table: GROTable,
    joining: bool,
    mtu: usize,
}

/// A packet as the device library wants to see it while reading.
struct Piece(Packet);

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        self.0.data()
    }
}

impl AsMut<[u8]> for Piece {
    fn as_mut(&mut self) -> &mut [u8] {
        self.0.data_mut()
    }
}

impl std::fmt::Debug for TunPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TunPort").field("joining", &self.joining).finish_non_exhaustive()
    }
}

impl TunPort {
    /// Makes the device, down, in the namespace of the calling thread.
    pub(crate) fn create(name: IfName, mtu: u16, offload: bool) -> io::Result<Self> {
        let device = DeviceBuilder::new()
            .name(name.as_str())
            .enable(false)
            .with(|options| {
                options.offload(offload);
            })
            .build_sync()?;
        device.set_nonblocking(true)?;
        Ok(Self {
            device,
            raw: vec![0; VIRTIO_NET_HDR_LEN + 65_535],
            pieces: Vec::with_capacity(IDEAL_BATCH_SIZE),
            sizes: vec![0; IDEAL_BATCH_SIZE],
            writing: Vec::with_capacity(IDEAL_BATCH_SIZE),
            table: GROTable::default(),
            joining: offload,
            mtu: usize::from(mtu),
        })
    }

    /// Whether the device takes TCP, and UDP, in large pieces.
    pub(crate) fn offloads(&self) -> (bool, bool) {
        (self.device.tcp_gso(), self.device.udp_gso())
    }

    fn write(&mut self, from: usize, to: usize) -> io::Result<usize> {
        let packets = &mut self.writing[from..to];
        self.device.send_multiple(&mut self.table, packets, HEAD_ROOM)
    }

    /// Writes each packet on its own.
    fn write_singly(&mut self) -> Result<usize, PortError> {
        let mut refused = 0;
        for i in 0..self.writing.len() {
            match self.write(i, i + 1) {
                Ok(_) => {}
                Err(e) if is_gone(&e) => return Err(PortError::Gone),
                Err(_) => refused += 1,
            }
        }
        Ok(refused)
    }
}

impl AsRawFd for TunPort {
    fn as_raw_fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }
}

impl Port for TunPort {
    fn receive(&mut self, pool: &mut Pool, into: &mut Vec<Packet>) -> Result<Progress, PortError> {
        while self.pieces.len() < IDEAL_BATCH_SIZE {
            let mut packet = pool.take();
            packet.set_len(self.mtu);
            self.pieces.push(Piece(packet));
        }
        let read = self.device.recv_multiple(&mut self.raw, &mut self.pieces, &mut self.sizes, 0);
        match read {
            Ok(count) => {
                for (piece, &size) in self.pieces.drain(..count).zip(&self.sizes) {
                    let Piece(mut packet) = piece;
                    packet.set_len(size);
                    into.push(packet);
                }
                Ok(Progress { packets: count, refused: 0, more: true })
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Progress::default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                Ok(Progress { more: true, ..Progress::default() })
            }
            Err(e) if is_gone(&e) => Err(PortError::Gone),
            // An errno is the device's own; anything else is about one packet
            // that the library could not cut.
            Err(e) if e.raw_os_error().is_some() => Err(PortError::Kernel(e)),
            Err(_) => Ok(Progress { refused: 1, more: true, packets: 0 }),
        }
    }

    fn send(&mut self, packets: &mut Vec<Packet>, pool: &mut Pool) -> Result<Progress, PortError> {
        let count = packets.len();
        self.writing.extend(packets.iter_mut().map(|p| mem::take(p.backing_mut())));
        let result = if self.joining {
            match self.write(0, count) {
                Ok(_) => Ok(0),
                Err(e) if is_gone(&e) => Err(PortError::Gone),
                Err(e) if Errno::from_io_error(&e) == Some(Errno::INVAL) => {
                    tracing::warn!("the device takes no joined packets; sending them singly");
                    self.joining = false;
                    // Which of them were written is unknown: these are lost, as
                    // on any wire, and counted.
                    Ok(count)
                }
                // A device that is down refuses them all (EIO).
                Err(_) => Ok(count),
            }
        } else {
            self.write_singly()
        };
        for (packet, backing) in packets.iter_mut().zip(self.writing.drain(..)) {
            *packet.backing_mut() = backing;
        }
        packets.drain(..).for_each(|packet| pool.give(packet));
        result.map(|refused| Progress { packets: count - refused, refused, more: false })
    }
}

/// The device was deleted (EBADFD, from `tun_chr_read_iter` and its kin).
fn is_gone(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::BADFD)
}
