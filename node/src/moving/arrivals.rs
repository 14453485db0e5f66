//! The node's TCP port, until it is known whose a connection is.
//!
//! ```text
//! accepted ──► waiting ── 16 bytes are there, and stay ──► handed over
//!                 └── the end, 5 s, or too many: the oldest ──► closed
//! ```
//!
//! Anybody may connect. One thread waits for all of them, so that whoever connects and says
//! nothing costs a descriptor for a while, and keeps nobody else out.
//!
//! Not here: what the first bytes mean.

use std::collections::BTreeMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use mio::{Events, Interest, Poll, Token};

/// First bytes that are wanted.
pub(super) const FIRST: usize = 16;
/// How long they may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections that are waited for at a time.
const MOST_WAITING: usize = 256;
/// Pause after the machine is out of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);
const LISTENER: Token = Token(0);

/// Connections that have not said enough yet, by token; the lowest is the oldest.
struct Arrivals {
    poll: Poll,
    listener: mio::net::TcpListener,
    waiting: BTreeMap<Token, (mio::net::TcpStream, Instant)>,
    newest: usize,
    /// When to try to accept once more.
    again: Option<Instant>,
}

/// Hands over every connection whose first bytes have come, with these bytes, which can
/// still be read from it; until polling fails.
///
/// # Errors
/// As of epoll_create1(2), epoll_ctl(2), epoll_wait(2).
pub(super) fn serve(
    listener: TcpListener,
    mut hand_over: impl FnMut([u8; FIRST], TcpStream),
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let mut listener = mio::net::TcpListener::from_std(listener);
    let poll = Poll::new()?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    let (waiting, again) = (BTreeMap::new(), None);
    let mut arrivals = Arrivals { poll, listener, waiting, newest: 0, again };
    let mut events = Events::with_capacity(64);
    loop {
        let next = arrivals.waiting.values().map(|(_, until)| *until).chain(arrivals.again).min();
        let timeout = next.map(|at| at.saturating_duration_since(Instant::now()));
        match arrivals.poll.poll(&mut events, timeout) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        let now = Instant::now();
        for event in &events {
            match event.token() {
                LISTENER => arrivals.again = Some(now),
                token => arrivals.look(token, &mut hand_over),
            }
        }
        if arrivals.again.is_some_and(|again| again <= now) {
            arrivals.accept(now, &mut hand_over);
        }
        arrivals.waiting.retain(|_, (_, until)| *until > now);
    }
}

impl Arrivals {
    fn accept(&mut self, now: Instant, hand_over: &mut impl FnMut([u8; FIRST], TcpStream)) {
        self.again = None;
        loop {
            let (mut stream, _) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    self.again = Some(now + PAUSE);
                    return;
                }
            };
            self.newest += 1;
            let token = Token(self.newest);
            let watched = self.poll.registry().register(&mut stream, token, Interest::READABLE);
            if let Err(error) = watched {
                tracing::warn!(%error, "a connection is dropped");
                continue;
            }
            while self.waiting.len() >= MOST_WAITING {
                self.waiting.pop_first();
            }
            self.waiting.insert(token, (stream, now + PATIENCE));
            // Most have said it by now.
            self.look(token, hand_over);
        }
    }

    /// Whether enough has come on this one.
    fn look(&mut self, token: Token, hand_over: &mut impl FnMut([u8; FIRST], TcpStream)) {
        let Some((stream, _)) = self.waiting.get(&token) else { return };
        let mut first = [0; FIRST];
        match stream.peek(&mut first) {
            Ok(FIRST) => {}
            Ok(1..) => return,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            // It has ended.
            Ok(0) | Err(_) => return drop(self.waiting.remove(&token)),
        }
        let Some((mut stream, _)) = self.waiting.remove(&token) else { return };
        let stream = self.poll.registry().deregister(&mut stream).and_then(|()| {
            let stream = TcpStream::from(OwnedFd::from(stream));
            stream.set_nonblocking(false)?;
            Ok(stream)
        });
        match stream {
            Ok(stream) => hand_over(first, stream),
            Err(error) => tracing::warn!(%error, "a connection is dropped"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::sync::mpsc::{Receiver, channel};
    use std::thread;

    const LONG: Duration = Duration::from_secs(60);

    fn served() -> (std::net::SocketAddr, Receiver<([u8; FIRST], TcpStream)>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, receiver) = channel();
        thread::spawn(move || {
            serve(listener, |first, stream| drop(sender.send((first, stream)))).unwrap();
        });
        (address, receiver)
    }

    fn is_closed(mut stream: TcpStream) -> bool {
        stream.set_read_timeout(Some(LONG)).unwrap();
        match stream.read(&mut [0]) {
            Ok(read) => read == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    #[test]
    fn the_first_bytes_are_told_and_stay() {
        let (address, arrived) = served();
        let mut near = TcpStream::connect(address).unwrap();
        // One by one, with pauses, so that they come apart.
        for byte in 0..20 {
            near.write_all(&[byte]).unwrap();
            thread::sleep(Duration::from_millis(5));
        }
        let (first, mut far) = arrived.recv_timeout(LONG).unwrap();
        assert_eq!(first, std::array::from_fn(|n| u8::try_from(n).unwrap()));
        let mut all = [0; 20];
        far.read_exact(&mut all).unwrap();
        assert_eq!(all, std::array::from_fn(|n| u8::try_from(n).unwrap()));
    }

    #[test]
    fn who_says_nothing_keeps_nobody_out() {
        let (address, arrived) = served();
        let mut silent: Vec<_> =
            (0..MOST_WAITING + 50).map(|_| TcpStream::connect(address).unwrap()).collect();
        let mut near = TcpStream::connect(address).unwrap();
        near.write_all(&[7; FIRST]).unwrap();
        assert_eq!(arrived.recv_timeout(LONG).unwrap().0, [7; FIRST]);
        // The oldest made room, the others had their time.
        for stream in [silent.remove(0), silent.pop().unwrap()] {
            assert!(is_closed(stream));
        }
    }

    #[test]
    fn who_ends_early_is_forgotten() {
        let (address, arrived) = served();
        let mut near = TcpStream::connect(address).unwrap();
        near.write_all(&[7; FIRST - 1]).unwrap();
        near.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(is_closed(near));
        assert!(arrived.try_recv().is_err());
    }
}
