//! The socket for bulk: many datagrams in a system call, Don't Fragment, congestion marks.
//!
//! By quinn-udp: GSO where the kernel and the device have it (Linux 4.18, `man 7 udp`:
//! `UDP_SEGMENT`), GRO where the kernel has it (5.0), else one datagram in a system call.
//! Where a device says only when it is used that it has no GSO, what was on its way is sent
//! once more one by one, and so is everything after that.
//!
//! Datagrams leave as ECN-capable (ECT(0), RFC 3168 §5) and are never cut in pieces
//! (`IP_PMTUDISC_PROBE`): what is too long for the device is told, what is too long for
//! the path is lost, and the session's search for the path MTU needs both.

use super::control::Control;
use super::{DATAGRAM, Incoming, SOCKET_BUFFER, sys, wait_for};
use crate::session::ways::stream_number;
use crate::session::{BulkPort, Scattered};
use quinn_udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState, is_msg_size_err};
use rustix::event::{PollFd, PollFlags};
use rustix::net::SendFlags;
use socket2::{MsgHdr, SockAddr, SockRef};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

/// Most datagrams in one system call (`UDP_MAX_SEGMENTS` of Linux 4.18; 128 since 6.10).
const SEGMENTS: usize = 64;

/// A bound socket and what it can do.
#[derive(Debug)]
pub struct BulkSocket {
    socket: UdpSocket,
    state: UdpSocketState,
    port: BulkPort,
    incoming: Vec<u8>,
    /// What was to be gathered by the kernel, where it did not.
    gathered: Vec<u8>,
    /// Most datagrams in one system call; tests want other ones.
    segments: usize,
}

impl BulkSocket {
    /// Binds a socket to any port of `address`.
    ///
    /// # Errors
    ///
    /// Those of `socket(2)`, `bind(2)` and `setsockopt(2)`.
    pub fn bind(address: IpAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(SocketAddr::new(address, 0))?;
        let state = UdpSocketState::new((&socket).into())?;
        let buffers = socket2::SockRef::from(&socket);
        // Smaller buffers only cost speed.
        buffers.set_recv_buffer_size(SOCKET_BUFFER).ok();
        buffers.set_send_buffer_size(SOCKET_BUFFER).ok();
        // What the kernel says counts its own memory as well, about half of it.
        let buffer = u32::try_from(buffers.recv_buffer_size()? / 2).unwrap_or(u32::MAX);
        let port = BulkPort { port: socket.local_addr()?.port(), buffer };
        let incoming = vec![0; DATAGRAM];
        let gathered = Vec::new();
        Ok(Self { socket, state, port, incoming, gathered, segments: SEGMENTS })
    }

    /// The socket, for its options.
    #[must_use]
    pub const fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    pub(crate) const fn port(&self) -> BulkPort {
        self.port
    }

    pub(crate) const fn batch(&self) -> usize {
        // Without GSO a batch is several system calls, which is no reason to make none.
        self.segments
    }

    pub(super) fn poll_fd(&self) -> PollFd<'_> {
        PollFd::new(&self.socket, PollFlags::IN)
    }

    pub(crate) fn send(
        &mut self,
        to: SocketAddr,
        datagrams: &[u8],
        segment: usize,
    ) -> io::Result<bool> {
        let most = match self.state.max_gso_segments() {
            1 => 1,
            _ => self.segments,
        };
        let mut rest = datagrams;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(segment.max(1) * most.max(1)));
            let transmit = Transmit {
                destination: to,
                ecn: Some(EcnCodepoint::Ect0),
                contents: now,
                segment_size: (now.len() > segment).then_some(segment),
                src_ip: None,
            };
            match self.state.try_send((&self.socket).into(), &transmit) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    // The socket's buffer is full: until there is room, or it is lost.
                    wait_for(&mut [PollFd::new(&self.socket, PollFlags::OUT)], ROOM)?;
                    self.state.try_send((&self.socket).into(), &transmit).ok();
                }
                Err(error) if is_msg_size_err(&error) => return Ok(false),
                // No GSO after all, as quinn-udp has noticed.
                Err(_) if now.len() > segment && self.state.max_gso_segments() == 1 => {
                    return self.send(to, rest, segment);
                }
                Err(error) if is_fatal(&error) => return Err(error),
                // Refused, unreachable: to the session it is lost.
                Err(_) => {}
            }
            rest = later;
        }
        Ok(true)
    }

    /// As [`send`](Self::send), of what lies in several places: the kernel gathers it.
    pub(crate) fn send_parts(
        &mut self,
        to: SocketAddr,
        parts: &[IoSlice<'_>],
        segment: usize,
    ) -> io::Result<bool> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        if length <= segment || self.state.max_gso_segments() > 1 {
            let segment = u16::try_from(segment).ok().filter(|_| length > segment);
            let (address, control) = (SockAddr::from(to), Control::new(to.ip(), segment));
            let message = MsgHdr::new().with_addr(&address).with_buffers(parts);
            let message = message.with_control(control.bytes());
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let flags = flags.bits().cast_signed();
            match SockRef::from(&self.socket).sendmsg(&message, flags) {
                Ok(_) => return Ok(true),
                Err(error) if is_msg_size_err(&error) => return Ok(false),
                // What is to be done about it, the other way knows.
                Err(_) => {}
            }
        }
        let mut gathered = core::mem::take(&mut self.gathered);
        gathered.clear();
        gathered.extend(parts.iter().flat_map(|part| part.iter()));
        let sent = self.send(to, &gathered, segment);
        self.gathered = gathered;
        sent
    }

    /// As [`receive`](Self::receive), into several places.
    pub(crate) fn receive_parts(
        &mut self,
        parts: &mut [IoSliceMut<'_>],
    ) -> io::Result<Option<Scattered>> {
        match sys::receive(&self.socket, parts) {
            // Nobody is there; to the session it would be a stream of ours.
            Ok(scattered) => Ok(Some(scattered).filter(|one| stream_number(one.from).is_none())),
            Err(error) if is_fatal(&error) => Err(error),
            // Nothing there, or an error of an earlier datagram.
            Err(_) => Ok(None),
        }
    }

    pub(crate) fn receive(&mut self, mut take: impl FnMut(Incoming<'_>)) -> io::Result<usize> {
        let mut meta = [RecvMeta::default()];
        let mut into = [IoSliceMut::new(&mut self.incoming)];
        match self.state.recv((&self.socket).into(), &mut into, &mut meta) {
            Ok(_) => {}
            Err(error) if is_fatal(&error) => return Err(error),
            // Nothing there, or an error of an earlier datagram.
            Err(_) => return Ok(0),
        }
        let [RecvMeta { len, stride, addr, ecn, .. }] = meta;
        let Some(bytes) = self.incoming.get_mut(..len) else { return Ok(0) };
        if stream_number(addr).is_some() {
            // Nobody is there; to the session it would be a stream of ours.
            return Ok(0);
        }
        let marked = ecn == Some(EcnCodepoint::Ce);
        let mut taken = 0;
        for datagram in bytes.chunks_mut(stride.max(1)) {
            take(Incoming { from: addr, bytes: datagram, marked });
            taken += 1;
        }
        Ok(taken)
    }
}

/// How long a batch waits for room in the socket's buffer.
const ROOM: Duration = Duration::from_millis(1);

fn is_fatal(error: &io::Error) -> bool {
    error
        .raw_os_error()
        .is_some_and(|code| super::is_fatal(rustix::io::Errno::from_raw_os_error(code)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn pair() -> (BulkSocket, BulkSocket, SocketAddr) {
        let (one, two) =
            (BulkSocket::bind(HERE).expect("one"), BulkSocket::bind(HERE).expect("two"));
        let to = two.socket().local_addr().expect("bound");
        (one, two, to)
    }

    /// Datagrams and their marks, as many as there are to come.
    fn received(socket: &mut BulkSocket, count: usize) -> Vec<(Vec<u8>, bool)> {
        let mut got = Vec::new();
        while got.len() < count {
            let mut fds = [socket.poll_fd()];
            assert!(wait_for(&mut fds, Duration::from_secs(10)).expect("polls"), "{}", got.len());
            socket
                .receive(|incoming| got.push((incoming.bytes.to_vec(), incoming.marked)))
                .expect("receives");
        }
        got
    }

    fn batch(segments: usize, segment: usize) -> Vec<u8> {
        (0..=250).cycle().take(segments * segment - segment / 2).collect()
    }

    #[test]
    fn a_batch_arrives_as_the_same_datagrams_with_and_without_gso() {
        for (without_gso, count) in [(false, 64), (true, 64), (false, 1), (false, 100), (true, 3)] {
            let (mut one, mut two, to) = pair();
            if without_gso {
                one.segments = 1;
            }
            let bytes = batch(count, 500);
            assert!(one.send(to, &bytes, 500).expect("sends"));
            let got = received(&mut two, count);
            let expected: Vec<_> = bytes.chunks(500).map(|chunk| (chunk.to_vec(), false)).collect();
            assert!(got == expected, "{without_gso} {count}");
        }
    }

    /// A kernel or device that refuses GSO only when it is used: what was on its way goes
    /// one by one, and so does everything after it.
    #[test]
    fn where_gso_is_refused_nothing_is_lost() {
        let (mut one, mut two, to) = pair();
        // More than the kernel makes segments of: EINVAL, as from a kernel without GSO.
        let bytes = batch(200, 100);
        one.segments = 200;
        assert!(one.send(to, &bytes, 100).expect("sends"));
        let got = received(&mut two, 200);
        assert!(got.iter().map(|(bytes, _)| &bytes[..]).eq(bytes.chunks(100)));
        assert_eq!(one.state.max_gso_segments(), 1);
        assert!(one.batch() > 1, "batches are still worth it");
        assert!(one.send(to, &bytes, 100).expect("sends"));
        assert_eq!(received(&mut two, 200).len(), 200);
    }

    #[test]
    fn congestion_marks_are_read_and_packets_can_be_marked() {
        let (one, mut two, to) = pair();
        let mut ecn = EcnCodepoint::Ce;
        for marked in [true, false] {
            let transmit = Transmit {
                destination: to,
                ecn: Some(ecn),
                contents: &[7; 100],
                segment_size: None,
                src_ip: None,
            };
            one.state.try_send((&one.socket).into(), &transmit).expect("sends");
            assert_eq!(received(&mut two, 1), [(vec![7; 100], marked)]);
            ecn = EcnCodepoint::Ect0;
        }
        // What it sends itself may be marked on its way.
        let (mut one, two, to) = pair();
        one.send(to, &[7; 100], 100).expect("sends");
        assert!(wait_for(&mut [two.poll_fd()], Duration::from_secs(10)).expect("polls"));
        let (mut bytes, mut meta) = ([0; 200], [RecvMeta::default()]);
        two.state
            .recv((&two.socket).into(), &mut [IoSliceMut::new(&mut bytes)], &mut meta)
            .expect("receives");
        assert_eq!(meta[0].ecn, Some(EcnCodepoint::Ect0));
    }

    #[test]
    fn what_is_too_long_for_the_device_is_told() {
        let (mut one, _two, to) = pair();
        assert!(!one.send(to, &[0; 65_535], 65_535).expect("sends"));
        assert!(one.send(to, &[0; 60_000], 60_000).expect("sends"));
    }

    #[test]
    fn a_port_where_nobody_listens_is_loss_and_no_error() {
        let (mut one, two, to) = pair();
        drop(two);
        for _ in 0..3 {
            assert!(one.send(to, &batch(4, 500), 500).expect("lost, that is all"));
            assert_eq!(one.receive(|_| ()).expect("nothing"), 0);
        }
    }

    /// Everything that comes, in parts of `part` bytes and a long one; and the lengths of
    /// datagrams.
    fn received_in_parts(socket: &mut BulkSocket, part: usize, most: usize) -> (Vec<u8>, usize) {
        let (mut got, mut segment) = (Vec::new(), 0);
        while got.len() < most {
            let mut fds = [socket.poll_fd()];
            assert!(wait_for(&mut fds, Duration::from_secs(10)).expect("polls"), "{}", got.len());
            let mut bytes = vec![0; DATAGRAM];
            let (first, last) = bytes.split_at_mut(7 * part);
            let mut parts: Vec<_> = first.chunks_mut(part).map(IoSliceMut::new).collect();
            parts.push(IoSliceMut::new(last));
            let Some(scattered) = socket.receive_parts(&mut parts).expect("receives") else {
                continue;
            };
            assert!(!scattered.marked);
            segment = segment.max(scattered.segment);
            got.extend_from_slice(&bytes[..scattered.length]);
        }
        (got, segment)
    }

    #[test]
    fn what_lies_in_parts_goes_and_comes_in_parts() {
        for (without_gso, length, segment) in
            [(false, 9000, 500), (true, 9000, 500), (false, 60_000, 60_000), (false, 777, 1472)]
        {
            let (mut one, mut two, to) = pair();
            if without_gso {
                // More than the kernel makes segments of: as from one without GSO.
                one.segments = 200;
                assert!(one.send(to, &batch(200, 100), 100).expect("sends"));
                received(&mut two, 200);
                assert_eq!(one.state.max_gso_segments(), 1);
            }
            let bytes: Vec<u8> = (0..=250).cycle().take(length).collect();
            let parts: Vec<_> = bytes.chunks(113).map(IoSlice::new).collect();
            assert!(one.send_parts(to, &parts, segment).expect("sends"));
            let (got, longest) = received_in_parts(&mut two, 97, length);
            assert!(got == bytes && longest == segment.min(length), "{length} {segment} {longest}");
        }
        let (mut one, two, to) = pair();
        assert!(!one.send_parts(to, &[IoSlice::new(&[0; 65_535])], 65_535).expect("is told"));
        drop(two);
        for _ in 0..3 {
            assert!(one.send_parts(to, &[IoSlice::new(&[0; 100])], 100).expect("lost"));
        }
    }

    #[test]
    fn marks_go_and_come_with_parts() {
        let (mut one, mut two, to) = pair();
        let transmit = Transmit {
            destination: to,
            ecn: Some(EcnCodepoint::Ce),
            contents: &[7; 100],
            segment_size: None,
            src_ip: None,
        };
        one.state.try_send((&one.socket).into(), &transmit).expect("sends");
        assert!(wait_for(&mut [two.poll_fd()], Duration::from_secs(10)).expect("polls"));
        let from = one.socket().local_addr().expect("bound");
        let mut bytes = [0; 200];
        let got = two.receive_parts(&mut [IoSliceMut::new(&mut bytes)]).expect("receives");
        assert_eq!(got, Some(Scattered { from, length: 100, segment: 100, marked: true }));
        // What it sends itself may be marked on its way.
        assert!(one.send_parts(to, &[IoSlice::new(&[7; 100])], 100).expect("sends"));
        assert!(wait_for(&mut [two.poll_fd()], Duration::from_secs(10)).expect("polls"));
        let mut meta = [RecvMeta::default()];
        two.state
            .recv((&two.socket).into(), &mut [IoSliceMut::new(&mut bytes)], &mut meta)
            .expect("receives");
        assert_eq!(meta[0].ecn, Some(EcnCodepoint::Ect0));
    }
}
