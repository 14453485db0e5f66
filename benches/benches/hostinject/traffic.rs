//! What goes to a guest and comes from it, and what it costs.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use conet_benches::process;
use rustix::net::sockopt::set_tcp_congestion;
use socket2::{Domain, Protocol, Socket, Type};

use crate::agent::CHUNK;
use crate::lane::{GUEST, Lane};

/// Bytes of a datagram whose packet has 64.
pub(crate) const SMALL: usize = 36;
/// How long anything may say nothing.
const SILENCE: Duration = Duration::from_secs(10);
/// How long a receiver waits for the last datagrams.
const LAST: Duration = Duration::from_millis(100);

/// What arrived, in how long, and what everybody together spent on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flow {
    pub(crate) bytes: f64,
    pub(crate) packets: f64,
    pub(crate) elapsed: f64,
    /// Processor time of this process and of every process of the lane.
    pub(crate) cpu: f64,
}

fn metered(lane: &Lane, work: impl FnOnce() -> Result<(u64, f64)>) -> Result<(u64, f64, f64)> {
    let (before, own) = (lane.cpu(), process::own_cpu());
    let (amount, elapsed) = work()?;
    let cpu = lane.cpu().saturating_sub(before) + process::own_cpu().saturating_sub(own);
    Ok((amount, elapsed, cpu.as_secs_f64()))
}

fn connect(lane: &Lane, what: u8) -> Result<TcpStream> {
    let far = lane.far();
    let open = || Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP));
    let socket = lane.run(open)??;
    // Linux's usual one, whatever this host's is; before it connects, or bbr's pacing stays.
    set_tcp_congestion(&socket, "cubic").or_else(|_| set_tcp_congestion(&socket, "reno")).ok();
    socket.connect_timeout(&far.into(), SILENCE)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    stream.write_all(&[what])?;
    Ok(stream)
}

fn number(mut stream: &TcpStream) -> Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

/// A stream to the guest, or from it, for `duration`.
pub(crate) fn tcp(lane: &Lane, to_guest: bool, duration: Duration) -> Result<Flow> {
    let mut stream = connect(lane, if to_guest { b'S' } else { b'R' })?;
    let mut chunk = vec![0x5a; CHUNK];
    let (bytes, elapsed, cpu) = metered(lane, || {
        let (began, mut total) = (Instant::now(), 0);
        while began.elapsed() < duration {
            if to_guest {
                stream.write_all(&chunk)?;
            } else {
                let len = stream.read(&mut chunk)?;
                ensure!(len > 0, "the guest has ended the stream");
                total += len as u64;
            }
        }
        if to_guest {
            // What is still under way counts, and so does its time.
            stream.shutdown(Shutdown::Write)?;
            total = number(&stream)?;
        }
        Ok((total, began.elapsed().as_secs_f64()))
    })?;
    Ok(Flow { bytes: bytes as f64, packets: 0.0, elapsed, cpu })
}

/// A stream of the guest's to itself, for `duration`.
pub(crate) fn within(lane: &Lane, duration: Duration) -> Result<Flow> {
    let mut stream = connect(lane, b'L')?;
    stream.write_all(&u32::try_from(duration.as_millis())?.to_be_bytes())?;
    stream.set_read_timeout(Some(duration + SILENCE))?;
    let (bytes, nanoseconds) = (number(&stream)? as f64, number(&stream)? as f64);
    Ok(Flow { bytes, packets: 0.0, elapsed: nanoseconds / 1e9, cpu: 0.0 })
}

fn datagrams(lane: &Lane) -> Result<UdpSocket> {
    let socket = lane.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
    socket2::SockRef::from(&socket).set_recv_buffer_size(4 << 20)?;
    socket.connect(lane.far())?;
    Ok(socket)
}

/// Small datagrams, as many as go, for `duration`.
pub(crate) fn flood(lane: &Lane, to_guest: bool, duration: Duration) -> Result<Flow> {
    let socket = datagrams(lane)?;
    let (packets, elapsed, cpu) = metered(lane, || {
        if to_guest {
            let count = || number(&connect(lane, b'C')?);
            let (before, began) = (count()?, Instant::now());
            let datagram = [b'F'; SMALL];
            while began.elapsed() < duration {
                for _ in 0..16 {
                    // A full queue refuses: as lost as any other.
                    socket.send(&datagram).ok();
                }
            }
            let elapsed = began.elapsed().as_secs_f64();
            std::thread::sleep(LAST);
            return Ok((count()? - before, elapsed));
        }
        let mut request = [b'G'; 9];
        request[1..5].copy_from_slice(&u32::try_from(duration.as_millis())?.to_be_bytes());
        request[5..].copy_from_slice(&u32::try_from(SMALL)?.to_be_bytes());
        socket.set_read_timeout(Some(duration + SILENCE / 2))?;
        socket.send(&request)?;
        let (mut count, mut buffer) = (0, [0; 2048]);
        while socket.recv(&mut buffer).is_ok() {
            count += 1;
            if count == 1 {
                socket.set_read_timeout(Some(LAST))?;
            }
        }
        Ok((count, duration.as_secs_f64()))
    })?;
    ensure!(packets > 0, "no datagram has arrived");
    let packets = packets as f64;
    Ok(Flow { bytes: packets * SMALL as f64, packets, elapsed, cpu })
}

/// Round trips of `count` datagrams that a process of the guest sends back, in
/// microseconds.
pub(crate) fn echo(lane: &Lane, count: u16, patience: Duration) -> Result<Vec<f64>> {
    let socket = datagrams(lane)?;
    socket.set_read_timeout(Some(patience))?;
    let (mut times, mut buffer) = (Vec::new(), [0; 2048]);
    for number in 0..count {
        let mut datagram = [b'E'; SMALL];
        datagram[1..3].copy_from_slice(&number.to_be_bytes());
        let began = Instant::now();
        socket.send(&datagram)?;
        // An answer that comes late is of an earlier one.
        while let Ok(len) = socket.recv(&mut buffer) {
            if buffer[..len] == datagram {
                times.push(began.elapsed().as_secs_f64() * 1e6);
                break;
            }
        }
    }
    Ok(times)
}

/// Round trips of `count` echo requests that the guest's kernel answers, in microseconds.
pub(crate) fn ping(lane: &Lane, count: u16, patience: Duration) -> Result<Vec<f64>> {
    let open = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4));
    let socket = lane.run(open)??;
    socket.connect(&SocketAddr::from((GUEST, 0)).into())?;
    Ok(conet_benches::ping::ping(&socket, count, patience)?)
}
