use super::*;
use crate::session::protect::link_keys;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::os::unix::net::UnixStream;

/// A stream that reads what is scripted and keeps what is written.
#[derive(Debug, Default)]
struct Script {
    reads: VecDeque<Result<Vec<u8>, io::ErrorKind>>,
    written: Vec<u8>,
}

impl Read for Script {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.reads.pop_front() {
            None => Ok(0),
            Some(Err(kind)) => Err(kind.into()),
            Some(Ok(mut bytes)) => {
                let n = bytes.len().min(buf.len());
                buf[..n].copy_from_slice(&bytes[..n]);
                if n < bytes.len() {
                    self.reads.push_front(Ok(bytes.split_off(n)));
                }
                Ok(n)
            }
        }
    }
}

impl Write for Script {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.written.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn carrier<S: Read + Write>(stream: S, home: bool) -> StreamCarrier<S> {
    let keys = link_keys(&Key::new([1; 32]), b"test");
    let (sealing, opening) = if home {
        (keys.home_to_remote, keys.remote_to_home)
    } else {
        (keys.remote_to_home, keys.home_to_remote)
    };
    StreamCarrier::new(stream, Cipher::Aes128Gcm, &sealing, &opening, Position::default())
}

/// What home writes for these payloads.
fn records(payloads: &[&[u8]]) -> Vec<u8> {
    let mut home = carrier(Script::default(), true);
    for payload in payloads {
        home.send(payload).expect("fits");
    }
    home.into_stream().written
}

fn remote(
    reads: impl IntoIterator<Item = Result<Vec<u8>, io::ErrorKind>>,
) -> StreamCarrier<Script> {
    carrier(Script { reads: reads.into_iter().collect(), written: Vec::new() }, false)
}

#[test]
fn records_cross_a_unix_stream_both_ways() {
    let (a, b) = UnixStream::pair().expect("pair");
    let big = vec![7u8; MAX_PAYLOAD];
    let sent = big.clone();
    let other = std::thread::spawn(move || {
        let mut remote = carrier(b, false);
        assert_eq!(remote.recv().expect("intact"), Some(&b"hello"[..]));
        assert_eq!(remote.recv().expect("intact"), Some(&sent[..]));
        remote.send(b"").expect("sent");
        assert_eq!(remote.position(), Position { send: 1, receive: 2 });
    });
    let mut home = carrier(a, true);
    home.send(b"hello").expect("sent");
    home.send_with(big.len(), |room| room.fill(7)).expect("sent");
    assert_eq!(home.recv().expect("intact"), Some(&b""[..]));
    other.join().expect("other end");
    assert_eq!(home.recv().expect("closed between records"), None);
    assert!(matches!(home.send(&vec![0; MAX_PAYLOAD + 1]), Err(SendError::TooLong(_))));
}

#[test]
fn a_timeout_in_the_middle_loses_nothing() {
    let bytes = records(&[b"payload", b"next"]);
    for cut in 1..bytes.len() {
        let (front, back) = bytes.split_at(cut);
        let mut remote =
            remote([Ok(front.to_vec()), Err(io::ErrorKind::WouldBlock), Ok(back.to_vec())]);
        let mut got = Vec::new();
        for _ in 0..3 {
            match remote.recv() {
                Ok(payload) => got.push(payload.expect("not closed").to_vec()),
                Err(RecvError::Io(error)) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                Err(error) => panic!("cut at {cut}: {error}"),
            }
        }
        assert_eq!(got, [&b"payload"[..], b"next"], "cut at {cut}");
    }
}

#[test]
fn hostile_lengths_take_no_memory() {
    for length in [0u32, 31, 256 * 1024 + 4096 + 33, u32::MAX] {
        let mut remote = remote([Ok(length.to_le_bytes().to_vec())]);
        assert!(matches!(remote.recv(), Err(RecvError::Length(_))));
        assert!(remote.incoming.capacity() < 100);
        assert!(matches!(remote.recv(), Err(RecvError::Broken)));
        assert!(matches!(remote.send(b"x"), Err(SendError::Broken)));
    }
}

#[test]
fn repeated_missing_and_reordered_records_end_the_carrier() {
    let one = records(&[b"one"]);
    let two = records(&[b"one", b"two"])[one.len()..].to_vec();
    let twice = [one.clone(), one.clone()].concat();
    let mut replayed = remote([Ok(twice)]);
    assert!(replayed.recv().is_ok());
    assert!(matches!(replayed.recv(), Err(RecvError::Open(OpenError::Replayed))));
    let mut gap = remote([Ok(two)]);
    assert!(matches!(gap.recv(), Err(RecvError::Open(OpenError::Gap))));
    let mut reflected = carrier(Script { reads: [Ok(one)].into(), written: Vec::new() }, true);
    assert!(matches!(reflected.recv(), Err(RecvError::Open(OpenError::Forged))));
}

#[test]
fn every_cut_is_seen() {
    let bytes = records(&[b"payload"]);
    for cut in 1..bytes.len() {
        let mut remote = remote([Ok(bytes[..cut].to_vec())]);
        assert!(matches!(remote.recv(), Err(RecvError::Truncated)), "cut at {cut}");
    }
}

proptest! {
    #[test]
    fn any_way_to_cut_reads_gives_the_same_records(
        payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..500), 0..8),
        steps in prop::collection::vec(1usize..90, 1..50),
    ) {
        let payloads: Vec<&[u8]> = payloads.iter().map(Vec::as_slice).collect();
        let mut rest = records(&payloads);
        let mut reads = Vec::new();
        for step in steps.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let tail = rest.split_off((*step).min(rest.len()));
            reads.push(Ok(core::mem::replace(&mut rest, tail)));
        }
        let mut remote = remote(reads);
        for payload in payloads {
            prop_assert_eq!(remote.recv().expect("intact"), Some(payload));
        }
        prop_assert_eq!(remote.recv().expect("closed"), None);
    }

    #[test]
    fn any_changed_byte_is_refused(at: prop::sample::Index, change in 1u8..) {
        let mut bytes = records(&[b"some payload"]);
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        let mut remote = remote([Ok(bytes)]);
        prop_assert!(remote.recv().is_err());
    }
}
