//! The TUN device as a [`Device`].
//!
//! With offloads on, one read brings up to 64 KiB of one TCP or UDP flow; one write
//! takes a run of packets of a flow, gathered from where they lie. Should the kernel
//! refuse joined packets (EINVAL: a kernel or a path that cannot take them), they are
//! written singly, and joining of that protocol is switched off for good.
//!
//! Sources: Linux `Documentation/networking/tuntap.rst`, virtio 1.3 §5.1.6.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};

use conet_dataplane::{DropReason, PortError, Progress};
use conet_netsys::IfName;
use rustix::io::{Errno, writev};
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::offload::{self, Joined, Joiner, Unfinished, unfinished};
use crate::{Device, Inner, Outgoing};

/// A virtio header and the longest packet.
const FRAME: usize = offload::HEADER + 65_535;
/// Reads before other work has its turn.
const READS: usize = 64;
/// Header and pieces of one write, with one to spare.
const VECTORS: usize = 66;

/// A TUN device, deleted by the kernel when this is dropped.
pub(crate) struct TunDevice {
    device: SyncDevice,
    frame: Box<[u8]>,
    joiner: Joiner,
    /// Where unfinished packets are finished, for a device that takes none.
    scratch: Scratch,
    mtu: u16,
    /// Whether packets bear a virtio header.
    headers: bool,
    /// Whether TCP and UDP are joined.
    joins: (bool, bool),
}

impl std::fmt::Debug for TunDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TunDevice").field("joins", &self.joins).finish_non_exhaustive()
    }
}

impl TunDevice {
    /// Makes the device, down, in the namespace of the calling thread.
    pub(crate) fn create(name: IfName, offload: bool, mtu: u16) -> io::Result<Self> {
        let device = DeviceBuilder::new()
            .name(name.as_str())
            .enable(false)
            .with(|options| {
                options.offload(offload);
            })
            .build_sync()?;
        device.set_nonblocking(true)?;
        let joins = (device.tcp_gso(), device.udp_gso());
        let headers = offload && joins.0;
        let frame = vec![0; FRAME].into_boxed_slice();
        let (joiner, scratch) = (Joiner::default(), Scratch::default());
        Ok(Self { device, frame, joiner, scratch, mtu, headers, joins })
    }

    /// Whether the device takes TCP, and UDP, in large pieces.
    pub(crate) fn offloads(&self) -> (bool, bool) {
        self.joins
    }

    fn read(&mut self) -> Read {
        match self.device.recv(&mut self.frame) {
            Ok(len) => Read::Frame(len),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Read::Empty,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Read::Again,
            Err(e) if is_gone(&e) => Read::Failed(PortError::Gone),
            // The kernel could not describe one packet by a header; that one is gone.
            Err(e) if Errno::from_io_error(&e) == Some(Errno::INVAL) => Read::Refused,
            Err(e) => Read::Failed(PortError::Kernel(e)),
        }
    }
}

enum Read {
    Frame(usize),
    Empty,
    Again,
    Refused,
    Failed(PortError),
}

impl AsRawFd for TunDevice {
    fn as_raw_fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }
}

impl Device for TunDevice {
    fn receive(
        &mut self,
        each: &mut dyn FnMut(Result<Outgoing<'_>, DropReason>),
    ) -> Result<Progress, PortError> {
        let mut progress = Progress { more: true, ..Progress::default() };
        for _ in 0..READS {
            match self.read() {
                Read::Frame(len) => {
                    let frame = self.frame.get(..len).unwrap_or_default();
                    let outgoing =
                        if self.headers { Outgoing::gso(frame) } else { Outgoing::whole(frame) };
                    each(outgoing);
                    progress.packets += 1;
                }
                Read::Empty => {
                    progress.more = false;
                    break;
                }
                Read::Again => {}
                Read::Refused => progress.refused += 1,
                Read::Failed(error) => return Err(error),
            }
        }
        Ok(progress)
    }

    fn send(&mut self, buffer: &[u8], packets: &[Inner]) -> Result<Progress, PortError> {
        let Self { device, joiner, scratch, mtu, headers, joins, .. } = self;
        let mut writer =
            Writer { device, buffer, scratch, headers: *headers, joins: *joins, refused: 0 };
        for Inner { at, trusted, segment } in packets {
            let may = writer.joins;
            if !trusted {
                match unfinished(&buffer[at.clone()], *segment, *mtu) {
                    Unfinished::No => {}
                    Unfinished::Behind(header) => {
                        // What came before it goes before it.
                        joiner.finish(&mut |joined| writer.write(&joined))?;
                        writer.write_unfinished(&header, at.clone())?;
                        continue;
                    }
                    Unfinished::Lost => {
                        writer.refused += 1;
                        continue;
                    }
                }
            }
            joiner.push(buffer, at.clone(), *trusted, may, &mut |joined| writer.write(&joined))?;
        }
        joiner.finish(&mut |joined| writer.write(&joined))?;
        let Writer { joins, refused, .. } = writer;
        self.joins = joins;
        Ok(Progress { packets: packets.len() - refused.min(packets.len()), refused, more: false })
    }
}

/// Buffers of the longest packet, made when they are first needed.
#[derive(Debug, Default)]
struct Scratch {
    frame: Vec<u8>,
    packet: Vec<u8>,
}

struct Writer<'a> {
    device: &'a SyncDevice,
    buffer: &'a [u8],
    scratch: &'a mut Scratch,
    headers: bool,
    joins: (bool, bool),
    refused: usize,
}

impl Writer<'_> {
    fn write(&mut self, joined: &Joined<'_>) -> Result<(), PortError> {
        if joined.head.is_empty() {
            return joined.pieces.iter().try_for_each(|at| self.write_single(at.clone()));
        }
        let mut vectors = [IoSlice::new(&[]); VECTORS];
        let parts = joined.pieces.iter().map(|at| &self.buffer[at.clone()]);
        let filled = vectors.iter_mut().zip(std::iter::once(joined.head).chain(parts));
        let count = filled.map(|(vector, part)| *vector = IoSlice::new(part)).count();
        match writev(self.device, &vectors[..count]) {
            Ok(_) => Ok(()),
            Err(Errno::BADFD) => Err(PortError::Gone),
            Err(Errno::INVAL) => {
                tracing::warn!(udp = joined.is_udp, "the device takes no joined packets");
                let joins = if joined.is_udp { &mut self.joins.1 } else { &mut self.joins.0 };
                *joins = false;
                // The packets are whole where they lie.
                let headers = joined.headers;
                joined
                    .pieces
                    .iter()
                    .try_for_each(|at| self.write_single(at.start - headers..at.end))
            }
            // A device that is down refuses them (EIO).
            Err(_) => {
                self.refused += joined.pieces.len();
                Ok(())
            }
        }
    }

    /// Leaves the rest to the kernel where the device takes such packets, and finishes
    /// them here where not.
    fn write_unfinished(
        &mut self,
        header: &[u8; offload::HEADER],
        at: Range<usize>,
    ) -> Result<(), PortError> {
        let packet = &self.buffer[at];
        if self.headers {
            match writev(self.device, &[IoSlice::new(header), IoSlice::new(packet)]) {
                Ok(_) => return Ok(()),
                Err(Errno::BADFD) => return Err(PortError::Gone),
                Err(Errno::INVAL) => {}
                Err(_) => {
                    self.refused += 1;
                    return Ok(());
                }
            }
        }
        let Scratch { frame, packet: piece } = &mut *self.scratch;
        frame.clear();
        frame.extend_from_slice(header);
        frame.extend_from_slice(packet);
        let Ok(outgoing) = Outgoing::gso(frame) else {
            self.refused += 1;
            return Ok(());
        };
        for index in 0..outgoing.count() {
            piece.resize(outgoing.len_of(index), 0);
            outgoing.write(index, piece);
            let written = write_whole(self.device, self.headers, piece)?;
            self.refused += usize::from(!written);
        }
        Ok(())
    }

    fn write_single(&mut self, at: Range<usize>) -> Result<(), PortError> {
        let written = write_whole(self.device, self.headers, &self.buffer[at])?;
        self.refused += usize::from(!written);
        Ok(())
    }
}

/// Writes a packet as it is; says whether the device has taken it.
fn write_whole(device: &SyncDevice, headers: bool, packet: &[u8]) -> Result<bool, PortError> {
    let header = [0; offload::HEADER];
    let header = if headers { &header[..] } else { &[] };
    match writev(device, &[IoSlice::new(header), IoSlice::new(packet)]) {
        Ok(_) => Ok(true),
        Err(Errno::BADFD) => Err(PortError::Gone),
        Err(_) => Ok(false),
    }
}

/// The device was deleted (EBADFD, from `tun_chr_read_iter` and its kin).
fn is_gone(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::BADFD)
}
