//! What goes through a lane, and what of it arrives.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use blake2::digest::{KeyInit, Mac, consts::U16};
use blake2::{Blake2s256, Blake2sMac, Digest};
use conet_benches::process;
use conet_tunnel::DEFAULT_PORT;
use socket2::{Domain, Protocol, Socket, Type};

use crate::scene::{Lane, key, outer};

/// What arrived, in how long, and what the tunnels spent on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flow {
    pub(crate) bytes: f64,
    pub(crate) packets: f64,
    pub(crate) sent: f64,
    pub(crate) elapsed: f64,
    /// Processor time of the tunnels, and of this process.
    pub(crate) cpu: f64,
    pub(crate) ends: f64,
}

impl Flow {
    /// Seconds a gigabyte.
    pub(crate) fn per_gb(&self, seconds: f64) -> f64 {
        seconds / (self.bytes / 1e9)
    }
}

/// Bytes of a read and a write.
const CHUNK: usize = 128 << 10;
/// How long a receiver waits for the last datagrams.
const PATIENCE: Duration = Duration::from_millis(100);

fn joined<T>(result: thread::Result<Result<T>>) -> Result<T> {
    result.map_err(|_| anyhow!("a thread of the benchmark has panicked"))?
}

/// TCP streams for `duration`.
pub(crate) fn tcp(lane: &Lane, flows: usize, duration: Duration) -> Result<Flow> {
    let listener = lane.run(2, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
    let to = SocketAddr::from((lane.far(), listener.local_addr()?.port()));
    let mut pairs = Vec::new();
    for _ in 0..flows {
        let sender = lane.run(1, || TcpStream::connect_timeout(&to, Duration::from_secs(5)))??;
        pairs.push((sender, listener.accept()?.0));
    }
    let (began, before, own) = (Instant::now(), lane.cpu()?, process::own_cpu());
    let bytes = thread::scope(|scope| {
        let mut receivers = Vec::new();
        for (mut sender, mut receiver) in pairs {
            scope.spawn(move || {
                let chunk = vec![0x5a; CHUNK];
                // Until the time is over or the lane breaks, which the receiver tells.
                while began.elapsed() < duration && sender.write_all(&chunk).is_ok() {}
            });
            receivers.push(scope.spawn(move || -> Result<usize> {
                receiver.set_read_timeout(Some(Duration::from_secs(10)))?;
                let (mut chunk, mut total) = (vec![0; CHUNK], 0);
                loop {
                    match receiver.read(&mut chunk)? {
                        0 => return Ok(total),
                        len => total += len,
                    }
                }
            }));
        }
        receivers.into_iter().map(|receiver| joined(receiver.join())).sum::<Result<usize>>()
    })?;
    let elapsed = began.elapsed().as_secs_f64();
    let cpu = (lane.cpu()? - before).as_secs_f64();
    let ends = (process::own_cpu() - own).as_secs_f64();
    Ok(Flow { bytes: bytes as f64, packets: 0.0, sent: bytes as f64, elapsed, cpu, ends })
}

/// Does `work` while somebody sends the far end `rate` initiations a second that know
/// its key and nobody's secret.
pub(crate) fn flooded<T: Send>(lane: &Lane, rate: u32, work: impl FnOnce() -> T) -> Result<T> {
    let sender = lane.run(1, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
    sender.connect((outer(2), DEFAULT_PORT))?;
    let mac1_key = Blake2s256::new().chain_update(b"mac1----").chain_update(key(2).public().0);
    let mac1_key = mac1_key.finalize();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let flooding = scope.spawn(|| -> Result<()> {
            let (began, mut sent) = (Instant::now(), 0u32);
            while !done.load(Ordering::Relaxed) {
                if f64::from(sent) >= began.elapsed().as_secs_f64() * f64::from(rate) {
                    thread::sleep(Duration::from_micros(500));
                    continue;
                }
                sent += 1;
                let mut message = [0x5a; 148];
                message[..4].copy_from_slice(&[1, 0, 0, 0]);
                message[8..12].copy_from_slice(&sent.to_le_bytes());
                let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(&mac1_key)
                    .map_err(|error| anyhow::anyhow!("a key of 32 bytes: {error}"))?;
                let mac1 = Mac::chain_update(mac, &message[..116]).finalize().into_bytes();
                message[116..132].copy_from_slice(&mac1);
                // Refused by a full queue: the next one.
                drop(sender.send(&message));
            }
            Ok(())
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        joined(flooding.join())?;
        Ok(result)
    })
}

/// Datagrams of `payload` bytes for `duration`, `rate` bits a second or as many as go.
pub(crate) fn udp(
    lane: &Lane,
    payload: usize,
    rate: Option<f64>,
    duration: Duration,
) -> Result<Flow> {
    let receiver = lane.run(2, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
    socket2::SockRef::from(&receiver).set_recv_buffer_size(4 << 20)?;
    let to = SocketAddr::from((lane.far(), receiver.local_addr()?.port()));
    let sender = lane.run(1, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
    sender.connect(to)?;
    receiver.set_read_timeout(Some(PATIENCE))?;
    let (began, before, own) = (Instant::now(), lane.cpu()?, process::own_cpu());
    let (sent, received) = thread::scope(|scope| {
        let sending = scope.spawn(move || send(&sender, payload, rate, began, duration));
        let receiving = scope.spawn(move || {
            let (mut buffer, mut count) = ([0; 2048], 0u64);
            while receiver.recv(&mut buffer).is_ok() {
                count += 1;
            }
            Ok(count)
        });
        Ok::<_, anyhow::Error>((joined(sending.join())?, joined(receiving.join())?))
    })?;
    let cpu = (lane.cpu()? - before).as_secs_f64();
    let ends = (process::own_cpu() - own).as_secs_f64();
    // What is received is what was sent within the time.
    let (packets, elapsed) = (received as f64, duration.as_secs_f64());
    let bytes = packets * payload as f64;
    Ok(Flow { bytes, packets, sent: sent as f64, elapsed, cpu, ends })
}

fn send(
    socket: &UdpSocket,
    payload: usize,
    rate: Option<f64>,
    began: Instant,
    duration: Duration,
) -> Result<u64> {
    let datagram = vec![0x5a; payload];
    let mut sent = 0u64;
    loop {
        let elapsed = began.elapsed();
        if elapsed >= duration {
            return Ok(sent);
        }
        let due = rate.map(|rate| elapsed.as_secs_f64() * rate / 8.0 / payload as f64);
        if due.is_some_and(|due| sent as f64 >= due) {
            thread::sleep(Duration::from_micros(500));
            continue;
        }
        // A full queue refuses: as lost as any other.
        sent += u64::from(socket.send(&datagram).is_ok());
    }
}

/// Round trips of `count` echo requests, one after the other, in microseconds; those
/// without an answer within `patience` are left out.
pub(crate) fn ping(lane: &Lane, count: u16, patience: Duration) -> Result<Vec<f64>> {
    let open = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4));
    let socket = lane.run(1, open)??;
    socket.connect(&SocketAddr::from((lane.far(), 0)).into())?;
    Ok(conet_benches::ping::ping(&socket, count, patience)?)
}
