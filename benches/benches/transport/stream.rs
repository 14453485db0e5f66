//! Much in one direction: what TCP and bare UDP carry, and what sealing adds to it.
//!
//! The bare ones have no protocol: the sender sends as fast as its system call lets it,
//! what arrives counts, and what the receiver's buffer had no room for is lost. With
//! `Work::Copy` they copy the payload into packets and out of them, and with
//! `Work::Seal` they also do what no transport can leave out that seals: copy the payload
//! into packets, seal each with AES-128-GCM, open each and copy it out. That is the least
//! an encrypted transport takes over this path.

use anyhow::Result;
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use ring::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use std::io::{ErrorKind, IoSliceMut, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::measure::{Place, pin};
use crate::raw::join;

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// Bytes of a payload, which is sent again and again.
const PAYLOAD: usize = 8 << 20;
/// What one system call takes at most.
const CALL: usize = 65_000;

/// What arrived, in what time, and what both ends' processors spent on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Carried {
    bytes: f64,
    time: Duration,
    processor: Duration,
}

impl Carried {
    /// Does `work`, which says how many bytes it carried.
    pub(crate) fn by(work: impl FnOnce() -> Result<u64>) -> Result<Self> {
        let (start, before) = (Instant::now(), processor());
        let bytes = work()? as f64;
        Ok(Self { bytes, time: start.elapsed(), processor: processor().saturating_sub(before) })
    }

    pub(crate) fn gigabits(self) -> f64 {
        self.bytes * 8e-9 / self.time.as_secs_f64()
    }

    /// Milliseconds of processor for a gigabyte.
    pub(crate) fn cost(self) -> f64 {
        self.processor.as_secs_f64() * 1e12 / self.bytes
    }
}

/// What all threads of this process have spent.
fn processor() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), nanoseconds)
}

/// One TCP connection, both ends blocking.
pub(crate) fn tcp(place: Place, time: Duration) -> Result<Carried> {
    let listener = TcpListener::bind(ANY)?;
    let at = listener.local_addr()?;
    let (told, heard) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        pin(place.server);
        let (mut stream, _) = listener.accept()?;
        let (mut bytes, mut total) = (vec![0; 1 << 20], 0);
        loop {
            match stream.read(&mut bytes)? {
                0 => break,
                length => total += length as u64,
            }
        }
        told.send(total).ok();
        Ok(())
    });
    pin(place.client);
    let mut stream = TcpStream::connect(at)?;
    Carried::by(|| {
        let (bytes, start) = (vec![7; PAYLOAD], Instant::now());
        while start.elapsed() < time {
            for part in bytes.chunks(1 << 20) {
                stream.write_all(part)?;
            }
        }
        drop(stream);
        join(thread)?;
        Ok(heard.recv()?)
    })
}

/// What is done beside sending and receiving.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Work {
    Nothing,
    Copy,
    Seal,
}

fn key() -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &[7; 16]).unwrap())
}

fn nonce() -> Nonce {
    // Nobody reads these: only the time counts.
    Nonce::assume_unique_for_key([0; 12])
}

/// Datagrams of `segment` bytes, as many in a system call as it takes (GSO, GRO).
pub(crate) fn udp(place: Place, segment: usize, work: Work, time: Duration) -> Result<Carried> {
    let (client, server) = (UdpSocket::bind(ANY)?, UdpSocket::bind(ANY)?);
    for socket in [&client, &server] {
        socket2::SockRef::from(socket).set_recv_buffer_size(4 << 20).ok();
        socket2::SockRef::from(socket).set_send_buffer_size(4 << 20).ok();
    }
    let to = server.local_addr()?;
    let (told, heard) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || -> std::io::Result<()> {
        pin(place.server);
        told.send(count(&server, work)?).ok();
        Ok(())
    });
    pin(place.client);
    Carried::by(|| {
        let state = UdpSocketState::new((&client).into())?;
        let segments = state.max_gso_segments().min(CALL / segment);
        let (payload, mut batch) = (vec![7; PAYLOAD], Vec::with_capacity(CALL));
        let (key, start) = (key(), Instant::now());
        while start.elapsed() < time {
            for part in payload.chunks(segments * (segment - 16)) {
                let contents = match work {
                    Work::Nothing => part,
                    Work::Copy | Work::Seal => {
                        fill(&mut batch, part, segment, (work == Work::Seal).then_some(&key));
                        &batch[..]
                    }
                };
                let segment_size = (contents.len() > segment).then_some(segment);
                let transmit =
                    Transmit { destination: to, ecn: None, contents, segment_size, src_ip: None };
                match state.try_send((&client).into(), &transmit) {
                    Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error.into()),
                    _ => {}
                }
            }
        }
        // A few, lest the one that ends it be lost.
        for _ in 0..20 {
            client.send_to(&[0], to)?;
            std::thread::sleep(Duration::from_millis(1));
        }
        join(thread)?;
        Ok(heard.recv()?)
    })
}

/// Copies `part` into datagrams of `segment` bytes, and seals each.
fn fill(batch: &mut Vec<u8>, part: &[u8], segment: usize, key: Option<&LessSafeKey>) {
    batch.clear();
    for piece in part.chunks(segment - 16) {
        let at = batch.len();
        batch.extend_from_slice(piece);
        let tag = key.map(|key| {
            key.seal_in_place_separate_tag(nonce(), Aad::empty(), &mut batch[at..]).unwrap()
        });
        batch.extend_from_slice(tag.as_ref().map_or(&[0; 16], AsRef::as_ref));
    }
}

/// Counts what comes, until a datagram of one byte does.
fn count(socket: &UdpSocket, work: Work) -> std::io::Result<u64> {
    let state = UdpSocketState::new(socket.into())?;
    let (mut bytes, mut total) = (vec![0; 1 << 16], 0);
    let (mut payload, mut at, key) = (vec![0; PAYLOAD + CALL], 0, key());
    loop {
        let mut meta = [RecvMeta::default()];
        match state.recv(socket.into(), &mut [IoSliceMut::new(&mut bytes)], &mut meta) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(socket, PollFlags::IN)];
                poll(&mut fds, Timespec::try_from(Duration::from_secs(5)).ok().as_ref())?;
                continue;
            }
            other => drop(other?),
        }
        let RecvMeta { len, stride, .. } = meta[0];
        if len == 1 {
            return Ok(total);
        }
        total += len as u64;
        if work != Work::Nothing {
            for piece in bytes[..len].chunks_mut(stride.max(1)) {
                let opened = match work {
                    Work::Seal => key.open_in_place(nonce(), Aad::empty(), piece),
                    _ => Ok(piece),
                };
                let Ok(opened) = opened else { continue };
                payload[at..at + opened.len()].copy_from_slice(opened);
                at += opened.len();
            }
            at %= PAYLOAD;
        }
    }
}
