//! TCP throughput from one namespace to another, counted where it arrives.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use conet_netsys::Netns;
use socket2::{Domain, Socket, Type};

use super::MeasureError;

/// Bytes of one write; what iperf3 takes.
const CHUNK: usize = 128 * 1024;
/// How long a connection, or a stalled read, may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// One end of a measurement.
#[derive(Debug, Clone, Copy)]
pub struct End<'a> {
    /// Its namespace.
    pub netns: &'a Netns,
    /// Its address there.
    pub address: Ipv4Addr,
}

/// How much to send.
#[derive(Debug, Clone, Copy)]
pub enum Amount {
    /// As much as can be in this time.
    For(Duration),
    /// So many bytes.
    Bytes(u64),
}

/// What arrived.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Throughput {
    /// Bytes that the receiver read.
    pub bytes: u64,
    /// From the sender's first write to the receiver's end of stream.
    pub seconds: f64,
}

impl Throughput {
    /// In megabits a second.
    #[must_use]
    pub fn megabits(self) -> f64 {
        // Exact up to 2^53 bytes.
        #[allow(clippy::cast_precision_loss, reason = "a figure for people")]
        let bits = self.bytes as f64 * 8.0;
        bits / self.seconds / 1e6
    }
}

/// Sends `pattern` over and over from one end to the other.
///
/// # Errors
///
/// [`MeasureError`]; [`MeasureError::Short`] where bytes were lost.
pub fn throughput(
    from: End<'_>,
    to: End<'_>,
    amount: Amount,
    pattern: &[u8],
) -> Result<Throughput, MeasureError> {
    let at = SocketAddrV4::new(to.address, 0);
    let listener = to
        .netns
        .run(|| TcpListener::bind(at))?
        .map_err(MeasureError::socket("listen in the receiving guest"))?;
    let target =
        listener.local_addr().map_err(MeasureError::socket("listen in the receiving guest"))?;
    let socket = from
        .netns
        .run(|| Socket::new(Domain::IPV4, Type::STREAM, None))?
        .map_err(MeasureError::socket("open a socket in the sending guest"))?;
    thread::scope(|scope| {
        let receiver = scope.spawn(move || receive(&listener));
        let sent = connect(socket, target).and_then(|stream| send(stream, amount, pattern));
        let received = receiver.join().map_err(|_| MeasureError::Thread)?;
        let (started, sent) = sent.map_err(MeasureError::socket("send to the other guest"))?;
        let (ended, received) =
            received.map_err(MeasureError::socket("receive from the other guest"))?;
        if received != sent {
            return Err(MeasureError::Short { sent, received });
        }
        let seconds = ended.duration_since(started).as_secs_f64();
        Ok(Throughput { bytes: received, seconds })
    })
}

fn connect(socket: Socket, target: SocketAddr) -> io::Result<TcpStream> {
    socket.connect_timeout(&target.into(), PATIENCE)?;
    let stream = TcpStream::from(socket);
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn send(mut stream: TcpStream, amount: Amount, pattern: &[u8]) -> io::Result<(Instant, u64)> {
    let chunk: Vec<u8> = pattern.iter().copied().cycle().take(CHUNK).collect();
    let started = Instant::now();
    let mut sent = 0_u64;
    loop {
        let left = match amount {
            Amount::For(time) if started.elapsed() >= time => 0,
            Amount::For(_) => chunk.len(),
            Amount::Bytes(bytes) => {
                usize::try_from(bytes.saturating_sub(sent)).unwrap_or(CHUNK).min(chunk.len())
            }
        };
        if left == 0 {
            return Ok((started, sent));
        }
        stream.write_all(&chunk[..left])?;
        sent += left as u64;
    }
}

fn receive(listener: &TcpListener) -> io::Result<(Instant, u64)> {
    let mut stream = accept(listener)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut buffer = vec![0; CHUNK];
    let mut received = 0_u64;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok((Instant::now(), received)),
            Ok(length) => received += length as u64,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Takes one connection, in bounded time: the sender may fail to reach us.
fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    // On Linux a receive timeout limits accept(2) too (`man 7 socket`).
    socket2::SockRef::from(listener).set_read_timeout(Some(PATIENCE))?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => return Ok(stream),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_arrives() {
        conet_testkit::privileged!();
        let netns = Netns::current().unwrap();
        let end = End { netns: &netns, address: Ipv4Addr::LOCALHOST };
        let exact = throughput(end, end, Amount::Bytes(1_000_001), b"conet").unwrap();
        assert_eq!(exact.bytes, 1_000_001);
        let timed = throughput(end, end, Amount::For(Duration::from_millis(50)), b"conet").unwrap();
        assert!(timed.bytes > 0 && timed.seconds >= 0.05 && timed.megabits() > 0.0);
    }
}
