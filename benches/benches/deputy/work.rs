//! The measured program: an ordinary single-threaded process that is told over its
//! standard input what to do, and says on its standard output how long it took.
//!
//! ```text
//! standard input:  │ operation 4 │ size 4 │ count 8 │   standard output: │ ns 8 │
//! ```
//!
//! It knows nothing of moving: native, moved, notified and traced runs are the same
//! code. Where a peer is no process whose calls are caught (a TCP round trip, a call
//! injected into another process), another [`Caller`] stands in the same loop.
//!
//! Times are taken by the program itself, from the clock of the vDSO, around a
//! whole batch; an eighth of the batch goes before it, unmeasured.

use crate::sys::calls;
use anyhow::{Context as _, Result, bail};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// The largest buffer that is read or written.
pub(crate) const MAX_SIZE: usize = 64 * 1024;
/// The descriptor that is read and written: `/dev/zero`, which takes everything that
/// is written and costs least of all files. Filters know it by this number.
pub(crate) const TARGET_FD: i32 = 50;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Getppid,
    Write(u32),
    Read(u32),
    MmapAnonymous,
    Munmap,
    Mprotect,
    Madvise,
    Brk,
    FutexWake,
    SchedYield,
    Sigprocmask,
    ClockGettime,
    Gettimeofday,
    Time,
    Getcpu,
    ClockGetres,
    /// Changes that many pages of a program that only has memory.
    Dirty(u32),
    /// Changes a page every 10 ms, until the next batch is there.
    KeepChanging,
}

impl Op {
    /// As it is printed.
    pub(crate) fn name(self) -> String {
        let size = |bytes: u32| match bytes {
            0..1024 => format!("{bytes} B"),
            _ => format!("{} KiB", bytes / 1024),
        };
        match self {
            Self::Getppid => "getppid".to_owned(),
            Self::Write(bytes) => format!("write {}", size(bytes)),
            Self::Read(bytes) => format!("read {}", size(bytes)),
            Self::MmapAnonymous => "mmap anonymous".to_owned(),
            Self::Munmap => "munmap".to_owned(),
            Self::Mprotect => "mprotect".to_owned(),
            Self::Madvise => "madvise DONTNEED".to_owned(),
            Self::Brk => "brk".to_owned(),
            Self::FutexWake => "futex wake".to_owned(),
            Self::SchedYield => "sched_yield".to_owned(),
            Self::Sigprocmask => "sigprocmask".to_owned(),
            Self::ClockGettime => "clock_gettime".to_owned(),
            Self::Gettimeofday => "gettimeofday".to_owned(),
            Self::Time => "time".to_owned(),
            Self::Getcpu => "getcpu".to_owned(),
            Self::ClockGetres => "clock_getres".to_owned(),
            Self::Dirty(pages) => format!("{pages} pages changed"),
            Self::KeepChanging => "100 pages changed a second".to_owned(),
        }
    }

    /// Its number and size on the pipe.
    const fn emit(self) -> (u32, u32) {
        match self {
            Self::Getppid => (0, 0),
            Self::Write(bytes) => (1, bytes),
            Self::Read(bytes) => (2, bytes),
            Self::MmapAnonymous => (3, 0),
            Self::Munmap => (4, 0),
            Self::Mprotect => (5, 0),
            Self::Madvise => (6, 0),
            Self::Brk => (7, 0),
            Self::FutexWake => (8, 0),
            Self::SchedYield => (9, 0),
            Self::Sigprocmask => (10, 0),
            Self::ClockGettime => (11, 0),
            Self::Gettimeofday => (12, 0),
            Self::Time => (13, 0),
            Self::Getcpu => (14, 0),
            Self::ClockGetres => (15, 0),
            Self::Dirty(pages) => (16, pages),
            Self::KeepChanging => (17, 0),
        }
    }

    const fn parse(number: u32, size: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Getppid,
            1 => Self::Write(size),
            2 => Self::Read(size),
            3 => Self::MmapAnonymous,
            4 => Self::Munmap,
            5 => Self::Mprotect,
            6 => Self::Madvise,
            7 => Self::Brk,
            8 => Self::FutexWake,
            9 => Self::SchedYield,
            10 => Self::Sigprocmask,
            11 => Self::ClockGettime,
            12 => Self::Gettimeofday,
            13 => Self::Time,
            14 => Self::Getcpu,
            15 => Self::ClockGetres,
            16 => Self::Dirty(size),
            17 => Self::KeepChanging,
            _ => return None,
        })
    }
}

/// A batch of one operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch {
    pub(crate) op: Op,
    pub(crate) count: u64,
}

impl Batch {
    pub(crate) fn emit(self) -> [u8; 16] {
        let (number, size) = self.op.emit();
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&number.to_le_bytes());
        bytes[4..8].copy_from_slice(&size.to_le_bytes());
        bytes[8..].copy_from_slice(&self.count.to_le_bytes());
        bytes
    }

    fn parse(bytes: [u8; 16]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h, rest @ ..] = bytes;
        let op = Op::parse(u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))?;
        Some(Self { op, count: u64::from_le_bytes(rest) })
    }
}

/// Somebody who does an operation many times.
pub(crate) trait Caller {
    /// Does it `count` times; how long that took.
    fn repeat(&mut self, op: Op, count: u64) -> Result<Duration>;
}

/// Says hello with a number, then serves batches until the input ends.
pub(crate) fn serve(caller: &mut dyn Caller, hello: u64) -> Result<()> {
    let (input, output) = (rustix::stdio::stdin(), rustix::stdio::stdout());
    rustix::io::write(output, &hello.to_le_bytes()).context("saying hello")?;
    let mut bytes = [0; 16];
    while rustix::io::read(input, &mut bytes).context("reading a batch")? == bytes.len() {
        let Batch { op, count } = Batch::parse(bytes).context("an unknown operation")?;
        caller.repeat(op, count / 8 + 1).with_context(|| format!("{op:?}"))?;
        let took = caller.repeat(op, count).context("the batch")?;
        rustix::io::write(output, &u64::try_from(took.as_nanos())?.to_le_bytes())?;
    }
    Ok(())
}

/// Times `count` runs of `call`.
pub(crate) fn timed<E>(count: u64, mut call: impl FnMut() -> Result<(), E>) -> Result<Duration, E> {
    let begin = Instant::now();
    for _ in 0..count {
        call()?;
    }
    Ok(begin.elapsed())
}

/// Opens what is read and written, at its number.
pub(crate) fn open_target() -> Result<OwnedFd> {
    let file = std::fs::File::options().read(true).write(true).open("/dev/zero")?;
    Ok(calls::duplicate_at(file.as_fd(), TARGET_FD)?)
}

/// The program itself: it makes the calls.
pub(crate) struct Program {
    target: OwnedFd,
    buffer: Vec<u8>,
    word: std::sync::atomic::AtomicU32,
    scratch: calls::Scratch,
}

impl Program {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            target: open_target()?,
            buffer: vec![7; MAX_SIZE],
            word: std::sync::atomic::AtomicU32::new(0),
            scratch: calls::Scratch::new()?,
        })
    }
}

impl Caller for Program {
    fn repeat(&mut self, op: Op, count: u64) -> Result<Duration> {
        let target: BorrowedFd<'_> = self.target.as_fd();
        let ok = |done: bool| if done { Ok(()) } else { Err(rustix::io::Errno::IO) };
        let took = match op {
            Op::Getppid => timed(count, || ok(rustix::process::getppid().is_some())),
            Op::Write(size) => {
                let bytes = &self.buffer[..size as usize];
                timed(count, || ok(rustix::io::write(target, bytes)? == bytes.len()))
            }
            Op::Read(size) => {
                let bytes = &mut self.buffer[..size as usize];
                timed(count, || ok(rustix::io::read(target, &mut *bytes)? == bytes.len()))
            }
            Op::MmapAnonymous => {
                // One mapping that grows; what is made is taken away unmeasured.
                let begin = self.scratch.map_many(count)?;
                self.scratch.unmap_many(count)?;
                return Ok(begin);
            }
            Op::Munmap => {
                self.scratch.map_many(count)?;
                return Ok(self.scratch.unmap_many(count)?);
            }
            Op::Mprotect => {
                let mut writable = true;
                timed(count, || {
                    writable = !writable;
                    self.scratch.protect(writable)
                })
            }
            Op::Madvise => timed(count, || self.scratch.discard()),
            Op::Brk => {
                let mut grown = false;
                timed(count.next_multiple_of(2), || {
                    grown = !grown;
                    self.scratch.brk(grown)
                })
            }
            Op::FutexWake => timed(count, || calls::futex_wake(&self.word)),
            Op::SchedYield => timed(count, || {
                rustix::thread::sched_yield();
                Ok(())
            }),
            Op::Sigprocmask => timed(count, calls::block_nothing),
            Op::ClockGettime => timed(count, calls::clock_gettime),
            Op::Gettimeofday => timed(count, calls::gettimeofday),
            Op::Time => timed(count, calls::time),
            Op::Getcpu => timed(count, calls::get_cpu),
            Op::ClockGetres => timed(count, calls::clock_getres),
            Op::Dirty(_) | Op::KeepChanging => bail!("this program has no memory to change"),
        };
        Ok(took?)
    }
}
