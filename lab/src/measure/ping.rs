//! Round trips of ICMP echo (RFC 792), from a namespace.

use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use conet_netsys::Netns;
use pnet_packet::Packet;
use pnet_packet::icmp::echo_reply::EchoReplyPacket;
use pnet_packet::icmp::echo_request::MutableEchoRequestPacket;
use pnet_packet::icmp::{IcmpPacket, IcmpTypes, checksum, echo_request};
use pnet_packet::ipv4::Ipv4Packet;
use socket2::{Domain, Protocol, Socket, Type};

use super::{MeasureError, percentile};

/// Bytes of ICMP header before an echo's payload.
const HEADER: usize = 8;
/// Largest packet that is taken.
const MAX_PACKET: usize = 2048;

/// What to send.
#[derive(Debug, Clone, Copy)]
pub struct Echo<'a> {
    /// Whom to ask.
    pub target: Ipv4Addr,
    /// How often, one after the other.
    pub count: u32,
    /// What each carries, at most 1400 bytes.
    pub payload: &'a [u8],
    /// How long an answer may take.
    pub limit: Duration,
}

/// Round-trip times in microseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoundTrips {
    /// Requests sent.
    pub sent: u32,
    /// Answers that came in time.
    pub received: u32,
    /// The least.
    pub min_us: f64,
    /// The median.
    pub p50_us: f64,
    /// What 99 of 100 keep under.
    pub p99_us: f64,
}

/// Asks, and waits for each answer before it asks again.
///
/// # Errors
///
/// [`MeasureError`]; [`MeasureError::Silent`] where no answer came at all.
pub fn ping(from: &Netns, echo: &Echo<'_>) -> Result<RoundTrips, MeasureError> {
    let socket = from
        .run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)))?
        .map_err(MeasureError::socket("open a raw socket"))?;
    let target = SocketAddrV4::new(echo.target, 0).into();
    socket.connect(&target).map_err(MeasureError::socket("reach the guest"))?;
    // Raw sockets of one namespace all see all replies: tell ours by this.
    let identifier = u16::try_from(std::process::id() & 0xffff).unwrap_or(0);
    let mut times = Vec::new();
    for sequence in 0..echo.count {
        let sequence = u16::try_from(sequence & 0xffff).unwrap_or(0);
        let packet = request(identifier, sequence, echo.payload);
        let sent_at = Instant::now();
        match socket.send(&packet) {
            Ok(_) => {}
            // What a tunnel answers while it has no session yet.
            Err(error) if is_unreachable(&error) => continue,
            Err(error) => return Err(MeasureError::socket("send an echo")(error)),
        }
        if wait(&socket, identifier, sequence, sent_at + echo.limit)? {
            times.push(sent_at.elapsed().as_secs_f64() * 1e6);
        }
    }
    summary(echo, times)
}

fn summary(echo: &Echo<'_>, mut times: Vec<f64>) -> Result<RoundTrips, MeasureError> {
    times.sort_by(f64::total_cmp);
    match (times.first(), percentile(&times, 50), percentile(&times, 99)) {
        (Some(min_us), Some(p50_us), Some(p99_us)) => Ok(RoundTrips {
            sent: echo.count,
            received: u32::try_from(times.len()).unwrap_or(u32::MAX),
            min_us: *min_us,
            p50_us,
            p99_us,
        }),
        _ => Err(MeasureError::Silent { target: echo.target, sent: echo.count }),
    }
}

fn request(identifier: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER + payload.len()];
    if let Some(mut packet) = MutableEchoRequestPacket::new(&mut bytes) {
        packet.set_icmp_type(IcmpTypes::EchoRequest);
        packet.set_icmp_code(echo_request::IcmpCodes::NoCode);
        packet.set_identifier(identifier);
        packet.set_sequence_number(sequence);
        packet.set_payload(payload);
    }
    if let Some(sum) = IcmpPacket::new(&bytes).map(|packet| checksum(&packet))
        && let Some(mut packet) = MutableEchoRequestPacket::new(&mut bytes)
    {
        packet.set_checksum(sum);
    }
    bytes
}

/// Waits for the answer to one request; whether it came before the deadline.
fn wait(
    socket: &Socket,
    identifier: u16,
    sequence: u16,
    deadline: Instant,
) -> Result<bool, MeasureError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        // A zero timeout would mean none at all.
        socket
            .set_read_timeout(Some(left.max(Duration::from_micros(1))))
            .map_err(MeasureError::socket("limit the wait"))?;
        let mut buffer = [0; MAX_PACKET];
        let length = match (&mut &*socket).read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if is_unreachable(&error) => continue,
            Err(error) => return Err(MeasureError::socket("wait for an echo")(error)),
        };
        if is_answer(&buffer[..length], identifier, sequence) {
            return Ok(true);
        }
    }
}

/// Whether a packet, IP header and all, answers the request.
fn is_answer(packet: &[u8], identifier: u16, sequence: u16) -> bool {
    let Some(ip) = Ipv4Packet::new(packet) else { return false };
    EchoReplyPacket::new(ip.payload()).is_some_and(|reply| {
        reply.get_icmp_type() == IcmpTypes::EchoReply
            && reply.get_identifier() == identifier
            && reply.get_sequence_number() == sequence
    })
}

fn is_unreachable(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_answers_its_own_echo() {
        conet_testkit::privileged!();
        let netns = Netns::current().unwrap();
        let echo = Echo {
            target: Ipv4Addr::LOCALHOST,
            count: 20,
            payload: b"conet",
            limit: Duration::from_secs(1),
        };
        let trips = ping(&netns, &echo).unwrap();
        assert_eq!((trips.sent, trips.received), (20, 20));
        assert!(trips.min_us > 0.0 && trips.min_us <= trips.p50_us && trips.p50_us <= trips.p99_us);
    }

    #[test]
    fn a_request_has_a_right_checksum() {
        let bytes = request(0x1234, 7, b"abc");
        assert_eq!(&bytes[4..], [0x12, 0x34, 0, 7, b'a', b'b', b'c']);
        let packet = IcmpPacket::new(&bytes).unwrap();
        assert_eq!(packet.get_checksum(), checksum(&packet));
    }

    #[test]
    fn silence_is_an_error() {
        let echo = Echo {
            target: Ipv4Addr::new(10, 77, 1, 9),
            count: 3,
            payload: b"",
            limit: Duration::from_millis(1),
        };
        let error = summary(&echo, Vec::new()).unwrap_err();
        assert!(error.to_string().starts_with("no answer from 10.77.1.9 to 3 packets"));
    }
}
