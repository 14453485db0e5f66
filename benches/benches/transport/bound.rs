//! The least that is possible: what no protocol that does what ours does can leave out.
//!
//! Nothing of ours is in here. The same bytes go over the same kind of socket, between the
//! same processors, in packets with a header, a number and a tag; each payload is copied in
//! and out and, where it is sealed, sealed and opened by the same AEAD of the same crate. There
//! are no clocks, slots, replay windows, queues, timers or repeats, and whatever is lost hangs.
//! In memory it is a ring of records of two cache lines, each shown by its first word, with the
//! orderings that two processes need of which one may sleep.

use anyhow::{Result, ensure};
use ring::aead::{AES_128_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::measure::{Place, Turn, pin};
use crate::ours::Sealed;
use crate::raw::{join, receive};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// Bytes of a payload and of its answer.
const SIZE: usize = 64;
/// Bytes in front of a packet's frames and behind them.
const HEADER: usize = 16;
const TAG: usize = 16;
/// Bytes in front of a payload: of a call or an answer, and of a call that takes another's
/// result.
const HEAD: usize = 24;
const HEAD_IN_ROW: usize = 40;
/// Most calls in one packet.
const ROW: usize = 8;

type Payloads = [[u8; SIZE]; ROW];

/// One direction's key and numbers.
struct Way {
    key: Option<LessSafeKey>,
    number: u64,
}

impl Way {
    fn new(sealed: Sealed) -> Self {
        let algorithm = match sealed {
            Sealed::Plain => None,
            Sealed::Aes => Some(&AES_128_GCM),
            Sealed::ChaCha => Some(&CHACHA20_POLY1305),
        };
        let key = algorithm.map(|algorithm| {
            LessSafeKey::new(UnboundKey::new(algorithm, &[7; 32][..algorithm.key_len()]).unwrap())
        });
        Self { key, number: 0 }
    }

    fn nonce(&self) -> Nonce {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&self.number.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }

    /// The packet's length.
    fn pack(&mut self, out: &mut [u8], count: usize, head: usize, payloads: &Payloads) -> usize {
        self.number += 1;
        out[..8].copy_from_slice(&[3, 0, 0, 0, 1, 0, 0, 0]);
        out[8..HEADER].copy_from_slice(&self.number.to_le_bytes());
        let mut at = HEADER;
        for (n, payload) in payloads[..count].iter().enumerate() {
            let head = if n == 0 { HEAD } else { head };
            out[at..at + 8].copy_from_slice(&(n as u64).to_le_bytes());
            out[at + 8..at + head].fill(0);
            out[at + head..at + head + SIZE].copy_from_slice(payload);
            at += head + SIZE;
        }
        let (header, sealed) = out[..at].split_at_mut(HEADER);
        let tag = match &self.key {
            Some(key) => {
                let tag = key.seal_in_place_separate_tag(self.nonce(), Aad::from(header), sealed);
                tag.unwrap().as_ref().try_into().unwrap()
            }
            None => [0; TAG],
        };
        out[at..at + TAG].copy_from_slice(&tag);
        at + TAG
    }

    fn unpack(&mut self, packet: &mut [u8], count: usize, head: usize, into: &mut Payloads) {
        self.number += 1;
        let (header, sealed) = packet.split_at_mut(HEADER);
        assert!(header[4..8] == [1, 0, 0, 0] && header[8..] == self.number.to_le_bytes());
        match &self.key {
            Some(key) => drop(key.open_in_place(self.nonce(), Aad::from(header), sealed).unwrap()),
            None => assert!(sealed.ends_with(&[0; TAG])),
        }
        let mut at = 0;
        for (n, payload) in into[..count].iter_mut().enumerate() {
            let head = if n == 0 { HEAD } else { head };
            assert!(sealed[at..at + 8] == (n as u64).to_le_bytes());
            payload.copy_from_slice(&sealed[at + head..at + head + SIZE]);
            at += head + SIZE;
        }
    }
}

/// Both directions of one end, and the payloads that it has in hands.
struct End {
    out: Way,
    back: Way,
    packet: Vec<u8>,
    payloads: Payloads,
}

impl End {
    fn new(sealed: Sealed) -> Self {
        let (out, back) = (Way::new(sealed), Way::new(sealed));
        Self { out, back, packet: vec![0; 65_536], payloads: [[7; SIZE]; ROW] }
    }

    fn calls(&mut self, count: usize) -> usize {
        self.out.pack(&mut self.packet, count, HEAD_IN_ROW, &self.payloads)
    }

    fn on_answers(&mut self, length: usize, count: usize) {
        self.back.unpack(&mut self.packet[..length], count, HEAD, &mut self.payloads);
    }

    /// Answers the calls of a packet, each of which is given the answer before.
    fn answer(&mut self, length: usize, count: usize) -> usize {
        self.back.unpack(&mut self.packet[..length], count, HEAD_IN_ROW, &mut self.payloads);
        for n in 1..count {
            std::hint::black_box(self.payloads[n - 1]);
        }
        self.out.pack(&mut self.packet, count, HEAD, &self.payloads)
    }
}

/// `count` calls in a packet over UDP.
pub(crate) fn udp(
    place: Place,
    sealed: Sealed,
    count: usize,
    calls: usize,
    spins: bool,
) -> Result<Turn> {
    let (client, server) = (UdpSocket::bind(ANY)?, UdpSocket::bind(ANY)?);
    client.connect(server.local_addr()?)?;
    server.connect(client.local_addr()?)?;
    client.set_nonblocking(spins)?;
    server.set_nonblocking(spins)?;
    let rounds = calls + calls / 10;
    let thread = std::thread::spawn(move || -> std::io::Result<()> {
        pin(place.server);
        let mut end = End::new(sealed);
        for _ in 0..rounds {
            let length = receive(&server, &mut end.packet, spins)?;
            let length = end.answer(length, count);
            server.send(&end.packet[..length])?;
        }
        Ok(())
    });
    pin(place.client);
    let mut end = End::new(sealed);
    let turn = Turn::of(calls, || {
        let length = end.calls(count);
        client.send(&end.packet[..length])?;
        let length = receive(&client, &mut end.packet, spins)?;
        end.on_answers(length, count);
        Ok(())
    });
    join(thread)?;
    turn
}

/// Bytes of bulk in a system call beside calls.
const BATCH: usize = 6000;
/// Batches that may be on their way: what comes beyond would be lost, and bulk that repeats
/// nothing would seem to be faster.
const BATCHES: u64 = 4;
/// A datagram that ends a server.
const END: usize = 1;

/// Calls while bulk goes the same way by sockets of its own: between any two batches each end
/// looks for calls, and what has come is copied out. Who answers says how many batches have
/// come; nothing is acknowledged otherwise, or repeated.
pub(crate) fn beside_bulk(place: Place, calls: usize) -> Result<Turn> {
    let pair = || -> Result<[UdpSocket; 2]> {
        let (one, two) = (UdpSocket::bind(ANY)?, UdpSocket::bind(ANY)?);
        one.connect(two.local_addr()?)?;
        two.connect(one.local_addr()?)?;
        one.set_nonblocking(true)?;
        two.set_nonblocking(true)?;
        Ok([one, two])
    };
    let ([client, server], [source, sink]) = (pair()?, pair()?);
    let thread = std::thread::spawn(move || -> std::io::Result<()> {
        pin(place.server);
        let (mut end, mut bytes) = (End::new(Sealed::Plain), vec![0; BATCH]);
        let (mut payload, mut at, mut taken) = (vec![0; 8 << 20], 0, 0u64);
        loop {
            match server.recv(&mut end.packet) {
                Ok(END) => return Ok(()),
                Ok(length) => {
                    let length = end.answer(length, 1);
                    end.packet[..8].copy_from_slice(&taken.to_le_bytes());
                    server.send(&end.packet[..length])?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if let Ok(length) = sink.recv(&mut bytes) {
                payload[at..at + length].copy_from_slice(&bytes[..length]);
                at = (at + length) % (payload.len() - BATCH);
                taken += 1;
            }
        }
    });
    pin(place.client);
    let (mut end, mut batch, payload) = (End::new(Sealed::Plain), vec![0; BATCH], vec![7; 8 << 20]);
    let (mut at, mut sent, mut taken) = (0, 0, 0);
    let turn = Turn::of(calls, || {
        let length = end.calls(1);
        client.send(&end.packet[..length])?;
        loop {
            if sent - taken < BATCHES {
                batch.copy_from_slice(&payload[at..at + BATCH]);
                at = (at + BATCH) % (payload.len() - BATCH);
                sent += u64::from(source.send(&batch).is_ok());
            }
            if let Ok(length) = client.recv(&mut end.packet) {
                taken = u64::from_le_bytes(end.packet[..8].try_into()?);
                end.packet[..8].copy_from_slice(&[3, 0, 0, 0, 1, 0, 0, 0]);
                end.on_answers(length, 1);
                return Ok(());
            }
        }
    });
    client.send(&[0; END])?;
    join(thread)?;
    turn
}

/// A cache line.
#[repr(align(64))]
struct Line([AtomicU64; 8]);

/// Lines of a ring: 1 MiB, as ours.
const LINES: usize = 16 * 1024;
/// Of a record: a call of 64 bytes and its header fill them.
const RECORD: usize = 2;

struct Ring {
    lines: Vec<Line>,
    sleeping: Line,
}

impl Ring {
    fn new() -> Arc<Self> {
        let line = || Line([const { AtomicU64::new(0) }; 8]);
        Arc::new(Self { lines: (0..LINES).map(|_| line()).collect(), sleeping: line() })
    }

    /// Record number `n` from 1 on; whether somebody would have to be woken.
    fn write(&self, n: usize, packet: &[u8]) -> bool {
        let at = n * RECORD % LINES;
        let (begin, rest) = packet.as_chunks::<8>().0.split_at(7);
        let lines = [(&self.lines[at + 1].0[..], rest), (&self.lines[at].0[1..], begin)];
        for (line, words) in lines {
            for (word, bytes) in line.iter().zip(words) {
                word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
            }
        }
        self.lines[at].0[0].store(n as u64, Ordering::Release);
        fence(Ordering::SeqCst);
        self.sleeping.0[0].load(Ordering::Relaxed) != 0
    }

    fn read(&self, n: usize, packet: &mut [u8]) {
        let at = n * RECORD % LINES;
        while self.lines[at].0[0].load(Ordering::Acquire) != n as u64 {
            core::hint::spin_loop();
        }
        let (begin, rest) = packet.as_chunks_mut::<8>().0.split_at_mut(7);
        for (line, words) in [(&self.lines[at].0[1..], begin), (&self.lines[at + 1].0[..], rest)] {
            for (word, bytes) in line.iter().zip(words) {
                *bytes = word.load(Ordering::Relaxed).to_le_bytes();
            }
        }
    }
}

/// Calls in shared memory, both ends spinning.
pub(crate) fn shared(place: Place, sealed: Sealed, calls: usize) -> Result<Turn> {
    let (forth, back) = (Ring::new(), Ring::new());
    let (theirs, rounds) = ((forth.clone(), back.clone()), calls + calls / 10);
    let thread = std::thread::spawn(move || -> std::io::Result<()> {
        pin(place.server);
        let (mut end, (forth, back)) = (End::new(sealed), theirs);
        for n in 1..=rounds {
            forth.read(n, &mut end.packet[..LENGTH]);
            let length = end.answer(LENGTH, 1);
            back.write(n, &end.packet[..length]);
        }
        Ok(())
    });
    pin(place.client);
    let (mut end, mut n) = (End::new(sealed), 0);
    let turn = Turn::of(calls, || {
        n += 1;
        let length = end.calls(1);
        ensure!(!forth.write(n, &end.packet[..length]), "nobody sleeps here");
        back.read(n, &mut end.packet[..LENGTH]);
        end.on_answers(LENGTH, 1);
        Ok(())
    });
    join(thread)?;
    turn
}

/// Bytes of a packet with one call.
const LENGTH: usize = HEADER + HEAD + SIZE + TAG;
