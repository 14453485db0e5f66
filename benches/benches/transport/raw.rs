//! What the kernel alone takes: sockets that are bounced, without a protocol.

use anyhow::Result;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::thread::JoinHandle;

use crate::measure::{Place, Turn, answer_length, pin};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// Bytes of the longest UDP datagram over IPv4.
pub(crate) const LONGEST: usize = 65_507;
/// A datagram that ends a server.
const END: usize = 1;

/// Receives, asking again and again or sleeping.
pub(crate) fn receive(socket: &UdpSocket, bytes: &mut [u8], spins: bool) -> std::io::Result<usize> {
    loop {
        match socket.recv(bytes) {
            Err(error) if spins && error.kind() == ErrorKind::WouldBlock => {
                core::hint::spin_loop();
            }
            other => return other,
        }
    }
}

/// Datagrams of `size` bytes, at most what one holds.
pub(crate) fn udp(place: Place, size: usize, calls: usize, spins: bool) -> Result<Turn> {
    let (client, server) = (UdpSocket::bind(ANY)?, UdpSocket::bind(ANY)?);
    client.connect(server.local_addr()?)?;
    server.connect(client.local_addr()?)?;
    client.set_nonblocking(spins)?;
    server.set_nonblocking(spins)?;
    let thread = std::thread::spawn(move || -> std::io::Result<()> {
        pin(place.server);
        let mut bytes = vec![0; 65_536];
        loop {
            let length = receive(&server, &mut bytes, spins)?;
            if length == END {
                return Ok(());
            }
            server.send(&bytes[..answer_length(length)])?;
        }
    });
    pin(place.client);
    let (mut bytes, payload) = (vec![0; 65_536], vec![7; size]);
    let turn = Turn::of(calls, || {
        client.send(&payload)?;
        receive(&client, &mut bytes, spins)?;
        Ok(())
    });
    client.send(&[0; END])?;
    join(thread)?;
    turn
}

pub(crate) fn join(thread: JoinHandle<std::io::Result<()>>) -> Result<()> {
    match thread.join() {
        Ok(result) => Ok(result?),
        Err(_) => anyhow::bail!("the server's thread has failed"),
    }
}

/// Answers requests of `size` bytes until the stream ends.
fn bounce(mut stream: impl Read + Write, size: usize) -> std::io::Result<()> {
    let mut bytes = vec![0; size];
    while stream.read_exact(&mut bytes).is_ok() {
        stream.write_all(&bytes[..answer_length(size)])?;
    }
    Ok(())
}

fn call(mut stream: impl Read + Write, size: usize, calls: usize) -> Result<Turn> {
    let (payload, mut answer) = (vec![7; size], vec![0; answer_length(size)]);
    Turn::of(calls, || {
        stream.write_all(&payload)?;
        stream.read_exact(&mut answer)?;
        Ok(())
    })
}

/// One TCP connection without Nagle's delay, blocking.
pub(crate) fn tcp(place: Place, size: usize, calls: usize) -> Result<Turn> {
    let listener = TcpListener::bind(ANY)?;
    let at = listener.local_addr()?;
    let thread = std::thread::spawn(move || {
        pin(place.server);
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        bounce(stream, size)
    });
    pin(place.client);
    let stream = TcpStream::connect(at)?;
    stream.set_nodelay(true)?;
    let turn = call(stream, size, calls);
    join(thread)?;
    turn
}

/// A pair of unix datagram sockets, blocking.
pub(crate) fn unix_datagram(place: Place, size: usize, calls: usize) -> Result<Turn> {
    let (client, server) = UnixDatagram::pair()?;
    let thread = std::thread::spawn(move || {
        pin(place.server);
        let mut bytes = vec![0; size];
        while server.recv(&mut bytes)? != END {
            server.send(&bytes[..answer_length(size)])?;
        }
        Ok(())
    });
    pin(place.client);
    let (mut bytes, payload) = (vec![0; 64], vec![7; size]);
    let turn = Turn::of(calls, || {
        client.send(&payload)?;
        client.recv(&mut bytes)?;
        Ok(())
    });
    client.send(&[0; END])?;
    join(thread)?;
    turn
}

/// A pair of unix stream sockets, blocking.
pub(crate) fn unix(place: Place, size: usize, calls: usize) -> Result<Turn> {
    let (client, server) = UnixStream::pair()?;
    let thread = std::thread::spawn(move || {
        pin(place.server);
        bounce(server, size)
    });
    pin(place.client);
    let turn = call(client, size, calls);
    join(thread)?;
    turn
}
