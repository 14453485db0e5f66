//! The least that a tunnel can be: bounds for ours, which share no code with it.
//!
//! | bound | is |
//! |---|---|
//! | `bound-sealed` | one thread between a TUN device and a UDP socket, with every offload; what is read is sealed in pieces by ring's ChaCha20-Poly1305 under a fixed key, opened where it lies, and written as it was read |
//! | `bound-kernel` | `bpf/minimal.bpf.c`: an outer header on, an outer header off |
//!
//! Neither is a tunnel. There are no handshakes, no peers, no routes, no checks, no
//! counters; the sealed one carries whole reads of the device, with the header that the
//! kernel gave them, so that it has no segment to cut or to join. Both have the same
//! devices, the same bytes on the wire and the same calls of the kernel as ours, so what
//! ours takes beyond them is what could be won.

use std::io::{self, IoSlice, IoSliceMut, Read as _};
use std::net::{SocketAddr, UdpSocket};
use std::ops::Range;
use std::thread;

use anyhow::{Context as _, Result, anyhow};
use aya::programs::{SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use conet_netsys::{IpNet, Netlink, Route};
use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::writev;
use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::scene::{MTU, PORT, ifname, inner, net, outer};

const DEVICE: &str = "conet0";
const WIRE: &str = "eth0";

/// Of one read: the kernel's header and the longest packet.
const LONGEST: usize = 10 + 65_535;
/// What a datagram carries: as much as WireGuard's, whose packets have 1,420 bytes.
const PIECE: usize = 1420;
/// As long as WireGuard's: a word that says whether more follow, a number.
const HEADER: usize = 16;
const TAG: usize = 16;
const DATAGRAM: usize = HEADER + PIECE + TAG;
/// Datagrams of one call; the kernel takes 65,507 bytes.
const BATCH: usize = 45;
const SOCKET_BUFFER: usize = 4 << 20;
const BUFFERS: usize = 4;
const BUFFER: usize = 65_536;
/// Reads of the device before the socket has its turn.
const READS: usize = 64;

/// A bound, until standard input ends.
pub(crate) fn serve(n: u8, in_kernel: bool) -> Result<()> {
    let device = DeviceBuilder::new()
        .name(DEVICE)
        .enable(false)
        .with(|options| {
            options.offload(true);
        })
        .build_sync()?;
    let mut netlink = Netlink::open()?;
    let (name, other) = (ifname(DEVICE)?, 3 - n);
    netlink.add_address(name, IpNet::from(std::net::IpAddr::V4(inner(n))))?;
    netlink.set_mtu(name, MTU.into())?;
    netlink.set_up(name)?;
    netlink.add_route(&Route::on_link(net(&format!("10.77.{other}.0/24"))?, name))?;
    // Held until the end: the programs hang by them.
    let _programs = if in_kernel {
        Some(hang(&mut netlink, n)?)
    } else {
        let socket = UdpSocket::bind(SocketAddr::from((outer(n), PORT)))?;
        let to = SocketAddr::from((outer(other), PORT));
        thread::Builder::new().spawn(move || {
            if let Err(error) = carry(&device, &socket, to) {
                eprintln!("tunnel: the bound has failed: {error:#}");
            }
        })?;
        None
    };
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn hang(netlink: &mut Netlink, n: u8) -> Result<Ebpf> {
    let object = aya::include_bytes_aligned!("../../bpf/minimal.bpf.o");
    let address = |n| u32::from_ne_bytes(outer(n).octets());
    let values = [
        address(n),
        address(3 - n),
        netlink.index(ifname(WIRE)?)?,
        netlink.index(ifname(DEVICE)?)?,
    ];
    let mut loader = EbpfLoader::new();
    for (name, value) in ["local", "remote", "link", "device"].iter().zip(&values) {
        loader.override_global(name, value, true);
    }
    let mut ebpf = loader.load(object)?;
    let places = [
        ("minimal_out", DEVICE, TcAttachType::Egress),
        ("minimal_in", WIRE, TcAttachType::Ingress),
    ];
    for (name, link, at) in places {
        let program: &mut SchedClassifier =
            ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?;
        program.load()?;
        program.attach(link, at)?;
    }
    Ok(ebpf)
}

/// Carries packets both ways, for ever.
fn carry(device: &SyncDevice, socket: &UdpSocket, to: SocketAddr) -> Result<()> {
    device.set_nonblocking(true)?;
    let state = UdpSocketState::new(UdpSockRef::from(socket))?;
    set_socket_send_buffer_size_force(socket, SOCKET_BUFFER)?;
    set_socket_recv_buffer_size_force(socket, SOCKET_BUFFER)?;
    let key = UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).map_err(|_| anyhow!("no cipher"))?;
    let key = LessSafeKey::new(key);
    let mut sender = Sender { state: &state, key: &key, to, number: 0, batch: Vec::new() };
    let mut receiver = Receiver::new(&key);
    let mut read = vec![0; LONGEST];
    loop {
        let mut ready = [PollFd::new(device, PollFlags::IN), PollFd::new(socket, PollFlags::IN)];
        poll(&mut ready, None)?;
        for _ in 0..READS {
            match device.recv(&mut read) {
                Ok(len) => sender.send(socket, &read[..len])?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        receiver.receive(&state, socket, device)?;
    }
}

/// Seals what the device gave.
struct Sender<'a> {
    state: &'a UdpSocketState,
    key: &'a LessSafeKey,
    to: SocketAddr,
    number: u64,
    batch: Vec<u8>,
}

impl Sender<'_> {
    fn send(&mut self, socket: &UdpSocket, read: &[u8]) -> Result<()> {
        let count = read.len().div_ceil(PIECE);
        for (i, piece) in read.chunks(PIECE).enumerate() {
            let at = self.batch.len();
            self.number += 1;
            let more = u64::from(i + 1 < count);
            self.batch.extend_from_slice(&more.to_le_bytes());
            self.batch.extend_from_slice(&self.number.to_le_bytes());
            self.batch.extend_from_slice(piece);
            let sealed = &mut self.batch[at + HEADER..];
            let tag = self
                .key
                .seal_in_place_separate_tag(nonce(self.number), Aad::empty(), sealed)
                .map_err(|_| anyhow!("the cipher has failed"))?;
            self.batch.extend_from_slice(tag.as_ref());
            if (i + 1) % BATCH == 0 || i + 1 == count {
                let transmit = Transmit {
                    destination: self.to,
                    ecn: None,
                    contents: &self.batch,
                    segment_size: Some(DATAGRAM),
                    src_ip: None,
                };
                // A full queue loses it, as a wire would.
                drop(self.state.try_send(UdpSockRef::from(socket), &transmit));
                self.batch.clear();
            }
        }
        Ok(())
    }
}

fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Opens what the network gave.
struct Receiver<'a> {
    key: &'a LessSafeKey,
    buffer: Vec<u8>,
    /// What has come of a read, of an earlier call and of this one.
    kept: Vec<u8>,
    pieces: Vec<Range<usize>>,
    next: u64,
    /// A piece of the read is lost.
    is_broken: bool,
}

impl<'a> Receiver<'a> {
    fn new(key: &'a LessSafeKey) -> Self {
        let buffer = vec![0; BUFFERS * BUFFER];
        Self { key, buffer, kept: vec![], pieces: vec![], next: 1, is_broken: false }
    }

    /// What one call brings.
    fn receive(
        &mut self,
        state: &UdpSocketState,
        socket: &UdpSocket,
        device: &SyncDevice,
    ) -> Result<()> {
        let mut metas = [RecvMeta::default(); BUFFERS];
        let mut parts = self.buffer.chunks_exact_mut(BUFFER);
        let mut slices: [IoSliceMut<'_>; BUFFERS] =
            std::array::from_fn(|_| IoSliceMut::new(parts.next().unwrap_or_default()));
        let count = match state.recv(UdpSockRef::from(socket), &mut slices, &mut metas) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // Of something that was sent before the far end was there.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for (i, meta) in metas[..count].iter().enumerate() {
            let (start, stride) = (i * BUFFER, meta.stride.max(1));
            for at in (start..start + meta.len).step_by(stride) {
                self.open(at..(at + stride).min(start + meta.len), device);
            }
        }
        for at in self.pieces.drain(..) {
            self.kept.extend_from_slice(&self.buffer[at]);
        }
        Ok(())
    }

    fn open(&mut self, at: Range<usize>, device: &SyncDevice) {
        let Some((head, sealed)) = self.buffer[at.clone()].split_at_mut_checked(HEADER) else {
            return;
        };
        let mut words = head.chunks_exact(8).map(|word| word.try_into().map(u64::from_le_bytes));
        let (Some(Ok(more)), Some(Ok(number))) = (words.next(), words.next()) else { return };
        if self.key.open_in_place(nonce(number), Aad::empty(), sealed).is_err() {
            return;
        }
        self.is_broken |= number != self.next;
        self.next = number + 1;
        self.pieces.push(at.start + HEADER..at.end - TAG);
        if more == 0 {
            if !self.is_broken {
                let rest = self.pieces.iter().map(|at| IoSlice::new(&self.buffer[at.clone()]));
                let parts: Vec<_> = std::iter::once(IoSlice::new(&self.kept)).chain(rest).collect();
                // Refused by a device that is down.
                writev(device, &parts).ok();
            }
            self.is_broken = false;
            self.pieces.clear();
            self.kept.clear();
        }
    }
}
