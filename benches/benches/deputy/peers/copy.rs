//! The least that a move can cost while the program stands still: it is stopped, the
//! kernel is asked which pages matter, these are read, sealed, sent over TCP, opened
//! into new memory, and the other side says that it has them.
//!
//! ```text
//! │ bytes to come 8 │ then records: │ ≤ 64 KiB │ tag 16 │ …     reply: │ 1 │
//! ```
//!
//! No areas are described, no registers, no descriptors; nothing is prepared for a way
//! back; nothing of conet's code.

use crate::lanes::Role;
use crate::sys::calls::{read_process, scan_pages};
use crate::sys::trace::{Stop, Traced};
use anyhow::{Result, bail, ensure};
use ring::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use rustix::process::Pid;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const RECORD: usize = 16 * PAGE;
const TAG: usize = 16;

fn key() -> Result<LessSafeKey> {
    match UnboundKey::new(&AES_128_GCM, &[5; 16]) {
        Ok(key) => Ok(LessSafeKey::new(key)),
        Err(_) => bail!("no key"),
    }
}

fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// The other node: takes one copy for each connection, until its parent ends.
pub(crate) fn take() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = u64::from(listener.local_addr()?.port());
    rustix::io::write(rustix::stdio::stdout(), &port.to_le_bytes())?;
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let key = key()?;
        let mut len = [0; 8];
        stream.read_exact(&mut len)?;
        let len = usize::try_from(u64::from_le_bytes(len))?;
        // The program's new memory, whose pages appear as they are written; gone before
        // the stream is closed.
        let mut memory = vec![0u8; len + TAG];
        let mut filled = 0;
        for number in 0.. {
            if filled == len {
                break;
            }
            let record = &mut memory[filled..(filled + RECORD).min(len) + TAG];
            stream.read_exact(record)?;
            filled += record.len() - TAG;
            ensure!(key.open_in_place(nonce(number), Aad::empty(), record).is_ok(), "forged");
        }
        stream.write_all(&[1])?;
    }
}

/// Where a program's memory is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Area {
    pub(crate) at: u64,
    pub(crate) pages: u64,
}

/// Copies of a program's memory to a process of their own.
pub(crate) struct Copier {
    other: Role,
}

impl Copier {
    pub(crate) fn start() -> Result<Self> {
        Ok(Self { other: Role::start(&["take-copies"])? })
    }

    /// Stops `pid`, looks for `pages` pages of `area`, spread over it, and copies them;
    /// how long the program stood still.
    pub(crate) fn copy(&self, pid: Pid, area: Area, pages: u64) -> Result<Duration> {
        let pid = pid.as_raw_nonzero().get();
        let mut stream =
            TcpStream::connect((Ipv4Addr::LOCALHOST, u16::try_from(self.other.hello)?))?;
        stream.set_nodelay(true)?;
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        let key = key()?;
        let mut buffer = vec![0; RECORD + TAG];
        let pages = pages.min(area.pages);
        let apart = area.pages / pages.max(1) * PAGE as u64;

        let begin = Instant::now();
        let traced = Traced::seize(pid)?;
        ensure!(traced.interrupt()? != Stop::Gone, "the program ended");
        if pages < area.pages {
            scan_pages(&pagemap, area.at, area.at + area.pages * PAGE as u64)?;
        }
        stream.write_all(&(pages * PAGE as u64).to_le_bytes())?;
        let mut done = 0;
        for number in 0.. {
            if done == pages {
                break;
            }
            let some = (pages - done).min((RECORD / PAGE) as u64);
            let len = usize::try_from(some)? * PAGE;
            if apart == PAGE as u64 {
                read_process(pid, area.at + done * apart, &mut buffer[..len])?;
            } else {
                for (page, i) in buffer[..len].chunks_mut(PAGE).zip(done..) {
                    read_process(pid, area.at + i * apart, page)?;
                }
            }
            done += some;
            let (body, tag) = buffer[..len + TAG].split_at_mut(len);
            let Ok(sealed) = key.seal_in_place_separate_tag(nonce(number), Aad::empty(), body)
            else {
                bail!("not sealed")
            };
            tag.copy_from_slice(sealed.as_ref());
            stream.write_all(&buffer[..len + TAG])?;
        }
        stream.read_exact(&mut [0])?;
        traced.detach()?;
        let took = begin.elapsed();
        // It closes when it has given its memory back, which is no part of a move.
        stream.read_to_end(&mut Vec::new())?;
        Ok(took)
    }
}
