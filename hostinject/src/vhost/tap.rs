//! Frames of a card as somebody watches them: "capture" to the port's process, and then a
//! row of frames on the same connection until it is closed.
//!
//! ```text
//! time 8, missed so far 8, length 4, frame      integers little-endian; time in nanoseconds
//!                                               since 1970; a length of 0 only says "alive"
//! ```
//!
//! A card waits for nobody: what does not fit into the row is counted as missed.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime};

use super::Counted;
use super::gate::lock;

/// Bytes before a frame.
pub(crate) const HEAD: usize = 20;
/// Longest frame, with room to spare.
pub(crate) const LONGEST: usize = 1 << 17;
/// Frames that wait for one who watches: 16 MiB at most.
const ROW: usize = 256;
/// Most who watch one guest.
const MOST: usize = 4;
/// How often a silent row says that it is alive.
const ALIVE: Duration = Duration::from_millis(500);

/// Where frames go.
#[derive(Debug, Clone)]
pub(super) struct Tap {
    row: SyncSender<(SystemTime, Vec<u8>)>,
    missed: Arc<AtomicU64>,
}

impl Tap {
    pub(super) fn offer(&self, frame: &[u8]) {
        if self.row.try_send((SystemTime::now(), frame.to_vec())).is_err() {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// All who watch.
pub(super) type Taps = Arc<Vec<Tap>>;

/// Lets whoever is at the other end of `stream` watch, on a thread of its own.
pub(super) fn begin(stream: UnixStream, counted: &Arc<Mutex<Counted>>) -> io::Result<()> {
    // Who reads slowly misses frames, and is waited for by its own thread alone.
    stream.set_write_timeout(None)?;
    let (row, frames) = sync_channel(ROW);
    let missed = Arc::new(AtomicU64::new(0));
    {
        let mut counted = lock(counted);
        if counted.taps.len() >= MOST {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let tap = Tap { row, missed: Arc::clone(&missed) };
        counted.taps = counted.taps.iter().cloned().chain([tap]).collect::<Vec<_>>().into();
        counted.wake();
    }
    let all = Arc::clone(counted);
    let mine = Arc::clone(&missed);
    let end = move || {
        let mut counted = lock(&all);
        let others = counted.taps.iter().filter(|tap| !Arc::ptr_eq(&tap.missed, &mine));
        counted.taps = others.cloned().collect::<Vec<_>>().into();
        counted.wake();
    };
    let started = thread::Builder::new().name("conet-capture".to_owned()).spawn({
        let end = end.clone();
        move || {
            pass(stream, &frames, &missed).ok();
            end();
        }
    });
    started.map(drop).inspect_err(|_| end())
}

/// Passes frames on until nobody is there any more.
fn pass(
    mut stream: UnixStream,
    frames: &Receiver<(SystemTime, Vec<u8>)>,
    missed: &AtomicU64,
) -> io::Result<()> {
    let mut record = Vec::new();
    loop {
        let (time, frame) = match frames.recv_timeout(ALIVE) {
            Ok(frame) => frame,
            Err(RecvTimeoutError::Timeout) => (SystemTime::now(), Vec::new()),
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        record.clear();
        record.extend(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX).to_le_bytes());
        record.extend(missed.load(Ordering::Relaxed).to_le_bytes());
        record.extend(u32::try_from(frame.len()).unwrap_or(0).to_le_bytes());
        record.extend(&frame);
        stream.write_all(&record)?;
    }
}

/// What one who watches has read: time, missed so far, frame.
pub(crate) fn read(stream: &mut impl Read) -> io::Result<(Duration, u64, Vec<u8>)> {
    let mut head = [0; HEAD];
    stream.read_exact(&mut head)?;
    let number = |at: usize| head.get(at..)?.first_chunk().copied().map(u64::from_le_bytes);
    let len = head.last_chunk().copied().map_or(0, u32::from_le_bytes);
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > LONGEST {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut frame = vec![0; len];
    stream.read_exact(&mut frame)?;
    Ok((Duration::from_nanos(number(0).unwrap_or(0)), number(8).unwrap_or(0), frame))
}
