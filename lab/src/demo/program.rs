//! The programs that the demonstration moves: they run as `conet demo-program`,
//! which nobody needs to type, so that a demonstration needs nothing but conet.
//!
//! Both have one thread. What [`work`] writes depends neither on where nor on when
//! it runs; what [`calls`] writes is times.

use std::fs::File;
use std::io::{self, BufRead, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::random::Random;
use crate::MARKER;

/// What [`work`] ends with, and the Python program too: no status that something
/// else would end with.
pub const STATUS: u8 = 37;
/// Rounds of computing per line, some 10 ms.
const ROUNDS: u32 = 1_500_000;
/// Bytes read per line.
const READ: usize = 1024;
/// Between two lines.
const PAUSE: Duration = Duration::from_millis(20);

/// Computes, reads `file` over and over, and writes `lines` lines; then the
/// process should end with [`STATUS`].
///
/// # Errors
///
/// What reading or writing says.
pub fn work(file: &Path, lines: u32) -> io::Result<()> {
    name("conet-work")?;
    let mut digest = 0_u64;
    let mut bytes = [0; READ];
    for line in 0..lines {
        for _ in 0..ROUNDS {
            digest = Random::new(digest).number();
        }
        let mut file = File::open(file)?;
        file.seek(SeekFrom::Start(u64::from(line) * 37 % 4096))?;
        file.read_exact(&mut bytes)?;
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            digest = Random::new(digest ^ u64::from_le_bytes(word)).number();
        }
        let marker = std::fs::read_to_string(MARKER)?;
        let system = rustix::system::uname();
        let node = system.nodename().to_string_lossy();
        let mut out = io::stdout().lock();
        writeln!(out, "{line} {digest:016x} {node} {}", marker.trim())?;
        out.flush()?;
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// For each number on standard input makes so many calls, of which each must run
/// at home, and writes how many nanoseconds all took; ends with its input.
///
/// The call is `getppid(2)`: the kernel does nothing for it, so what is timed is
/// the way there and back.
///
/// # Errors
///
/// What reading or writing says; a line that is no number.
pub fn calls() -> io::Result<()> {
    name("conet-calls")?;
    for line in io::stdin().lock().lines() {
        let count: u32 =
            line?.trim().parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let begin = Instant::now();
        for _ in 0..count {
            std::hint::black_box(rustix::process::getppid());
        }
        let nanoseconds = begin.elapsed().as_nanos();
        let mut out = io::stdout().lock();
        writeln!(out, "{nanoseconds}")?;
        out.flush()?;
    }
    Ok(())
}

/// Names the process, as `ps` shows it.
fn name(name: &str) -> io::Result<()> {
    let name = std::ffi::CString::new(name)?;
    Ok(rustix::thread::set_name(&name)?)
}
