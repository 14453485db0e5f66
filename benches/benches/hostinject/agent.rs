//! The guest's side of every lane: one program, whatever the guest is.
//!
//! ```text
//! TCP 7001   'S' data…        ─► how many bytes came (8)      a sink
//!            'R'              ─► bytes until the peer is gone  a source
//!            'L' ms (4)       ─► bytes (8) to itself in nanoseconds (8)
//!            'C'              ─► datagrams counted so far (8)
//! UDP 7001   'E' …            ─► the same again                an echo
//!            'F' …               counted, no answer
//!            'G' ms (4) len (4) ─► datagrams of len bytes, for so long
//! ```
//!
//! Numbers are big-endian. Everything begins at the host: what has no address that the
//! host can reach (passt, slirp4netns) gets its port forwarded.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// Of both protocols, in every guest.
pub(crate) const PORT: u16 = 7001;
/// Bytes of a read and a write.
pub(crate) const CHUNK: usize = 128 << 10;
/// A machine's console says so when it can be asked.
pub(crate) const READY: &str = "agent is ready";

/// Serves until it is killed.
pub(crate) fn run() -> Result<()> {
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
    let listener = TcpListener::bind(any).context("the guest's TCP port")?;
    let datagrams = UdpSocket::bind(any).context("the guest's UDP port")?;
    socket2::SockRef::from(&datagrams).set_recv_buffer_size(4 << 20)?;
    let counted = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&counted);
    thread::spawn(move || answer(&datagrams, &counter));
    println!("{READY}");
    for stream in listener.incoming().flatten() {
        let counted = Arc::clone(&counted);
        // A connection that breaks is the other side's to notice.
        thread::spawn(move || serve(stream, &counted).ok());
    }
    Ok(())
}

fn serve(mut stream: TcpStream, counted: &AtomicU64) -> Result<()> {
    let mut what = [0];
    stream.read_exact(&mut what)?;
    let mut chunk = vec![0x5a; CHUNK];
    match what[0] {
        b'S' => {
            let mut total = 0u64;
            loop {
                match stream.read(&mut chunk)? {
                    0 => break,
                    len => total += len as u64,
                }
            }
            stream.write_all(&total.to_be_bytes())?;
        }
        b'R' => while stream.write_all(&chunk).is_ok() {},
        b'L' => {
            let mut milliseconds = [0; 4];
            stream.read_exact(&mut milliseconds)?;
            let duration = Duration::from_millis(u32::from_be_bytes(milliseconds).into());
            let mut own = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))?;
            own.write_all(b"S")?;
            let began = Instant::now();
            while began.elapsed() < duration {
                own.write_all(&chunk)?;
            }
            own.shutdown(Shutdown::Write)?;
            let mut bytes = [0; 8];
            own.read_exact(&mut bytes)?;
            let elapsed = u64::try_from(began.elapsed().as_nanos())?;
            stream.write_all(&bytes)?;
            stream.write_all(&elapsed.to_be_bytes())?;
        }
        b'C' => stream.write_all(&counted.load(Ordering::Relaxed).to_be_bytes())?,
        _ => {}
    }
    Ok(())
}

fn answer(socket: &UdpSocket, counted: &AtomicU64) {
    let mut buffer = [0; 2048];
    loop {
        // An ICMP error of an earlier answer: the next datagram.
        let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
        match buffer[0] {
            b'E' => {
                socket.send_to(&buffer[..len], from).ok();
            }
            b'F' => {
                counted.fetch_add(1, Ordering::Relaxed);
            }
            b'G' if len >= 9 => flood(socket, from, &buffer),
            _ => {}
        }
    }
}

fn flood(socket: &UdpSocket, to: SocketAddr, request: &[u8]) {
    let number = |at: usize| {
        request[at..].first_chunk().map_or(0, |bytes: &[u8; 4]| u32::from_be_bytes(*bytes))
    };
    let duration = Duration::from_millis(number(1).into());
    let datagram = vec![b'D'; usize::try_from(number(5)).unwrap_or(0).clamp(1, 1400)];
    let began = Instant::now();
    while began.elapsed() < duration {
        for _ in 0..16 {
            // A full queue refuses: as lost as any other.
            socket.send_to(&datagram, to).ok();
        }
    }
}
