//! What the remote half has of a process's memory, and sending it more.
//!
//! The mirror knows the list of areas that was sent last, and in which pages the
//! remote half may have bytes; all others read as zero there. What is gone at home is
//! told only where that makes a difference.

use super::MoveError;
use crate::channel::{Channel, ChannelError};
use crate::ranges::Ranges;
use conet_wire::image::{AREAS_PER_FRAME, Area, PAGE, PageRun, area_flags};
use conet_wire::link::kind;
use conet_wire::pages::{GONE_PER_FRAME, PageBatch};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use zerocopy::IntoBytes;

/// Bits by which two areas at one address are different ones.
const KIND: u32 = area_flags::GROWS_DOWN | area_flags::HOLD | area_flags::VDSO;
const PAGE_LEN: usize = 4096;

/// The remote half's memory, as far as home has to know.
#[derive(Debug)]
pub(super) struct Mirror {
    areas: Vec<Area>,
    /// Of the list sent last.
    seq: u32,
    filled: Ranges,
    batch: PageBatch,
    /// What the other half is to be told to be zero, after what it is sent.
    gone: Ranges,
    /// Pages sent.
    pages: u64,
}

impl Mirror {
    pub(super) const fn new() -> Self {
        Self {
            areas: Vec::new(),
            seq: 0,
            filled: Ranges::new(),
            batch: PageBatch::new(),
            gone: Ranges::new(),
            pages: 0,
        }
    }

    /// Areas of the last list.
    pub(super) const fn areas(&self) -> &[Area] {
        self.areas.as_slice()
    }

    /// Pages sent so far.
    pub(super) const fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether the remote half may have bytes in all of `start..end`.
    pub(super) fn has(&self, range: (u64, u64)) -> bool {
        self.filled.covers(range)
    }

    /// Gives the remote half's memory the shape of these areas; what it has in new ones is
    /// no more.
    pub(super) fn shape(
        &mut self,
        areas: Vec<Area>,
        channel: &mut Channel,
    ) -> Result<(), ChannelError> {
        let is_new = |area: &Area| area.flags & area_flags::NEW != 0;
        let plain = |area: &Area| Area { flags: area.flags & !area_flags::NEW, ..*area };
        let lasting: Vec<Area> = areas.iter().map(plain).collect();
        let replaces = |area: &Area| {
            let first = self.areas.partition_point(|old| old.end <= area.start);
            is_new(area) && self.areas.get(first).is_some_and(|old| old.start < area.end)
        };
        if lasting == self.areas && !areas.iter().any(replaces) {
            return Ok(());
        }
        let changed = |area: &Area| {
            let first = self.areas.partition_point(|old| old.end <= area.start);
            let mut here = self.areas[first..].iter().take_while(|old| old.start < area.end);
            !is_new(area) && here.any(|old| (old.flags ^ area.flags) & KIND != 0)
        };
        if areas.iter().any(changed) {
            // What has become of another kind goes first.
            let rest: Vec<Area> = areas.iter().filter(|area| !changed(area)).copied().collect();
            if !rest.is_empty() {
                self.send_list(&rest, channel)?;
            }
        }
        self.send_list(&areas, channel)?;
        self.areas = lasting;
        Ok(())
    }

    fn send_list(&mut self, areas: &[Area], channel: &mut Channel) -> Result<(), ChannelError> {
        self.seq = self.seq.wrapping_add(1);
        for chunk in areas.chunks(AREAS_PER_FRAME) {
            channel.send(kind::AREAS, self.seq, &[chunk.as_bytes()])?;
        }
        let mut at = 0;
        for area in areas {
            let from = if area.flags & area_flags::NEW != 0 { area.end } else { area.start };
            self.filled.remove((at, from));
            at = area.end;
        }
        self.filled.remove((at, u64::MAX));
        Ok(())
    }

    /// Sends the pages of `start..end`, which lies in one area.
    pub(super) fn send(
        &mut self,
        (start, end): (u64, u64),
        memory: &File,
        channel: &mut Channel,
    ) -> Result<(), MoveError> {
        self.filled.insert((start, end));
        // While the program runs, what was zero may have been written since.
        self.gone.remove((start, end));
        self.batch.cut();
        let mut run = PageRun { addr: start, count: (end - start) / PAGE };
        while run.count > 0 {
            let last = self.batch.runs().last().and_then(PageRun::end).unwrap_or(0);
            // A frame's runs ascend.
            let taken = if run.addr < last { 0 } else { self.batch.push(run) };
            run = PageRun { addr: run.addr + taken * PAGE, count: run.count - taken };
            if taken == 0 || self.batch.room() == 0 {
                self.flush_pages(memory, channel)?;
            }
        }
        Ok(())
    }

    /// Tells that `start..end` reads as zero, where the remote half may not know.
    pub(super) fn forget(&mut self, range: (u64, u64)) {
        for part in self.filled.within(range) {
            self.gone.insert(part);
        }
        self.filled.remove(range);
    }

    /// Sends what is gathered.
    pub(super) fn flush(&mut self, memory: &File, channel: &mut Channel) -> Result<(), MoveError> {
        self.flush_pages(memory, channel)?;
        let mut runs = Vec::new();
        for area in &self.areas {
            let parts = self.gone.within((area.start, area.end));
            runs.extend(parts.map(|(addr, end)| PageRun { addr, count: (end - addr) / PAGE }));
        }
        self.gone = Ranges::new();
        for chunk in runs.chunks(GONE_PER_FRAME) {
            channel.send(kind::GONE, 0, &[chunk.as_bytes()])?;
        }
        Ok(())
    }

    fn flush_pages(&mut self, memory: &File, channel: &mut Channel) -> Result<(), MoveError> {
        let batch = std::mem::take(&mut self.batch);
        if batch.pages() == 0 {
            return Ok(());
        }
        if send_batch(&batch, memory, channel)? {
            self.pages += batch.pages();
            return Ok(());
        }
        // Part of it cannot be read (behind the end of a file): page by page.
        let mut one = [0; PAGE_LEN];
        for run in batch.runs() {
            for i in 0..run.count {
                let addr = run.addr + i * PAGE;
                let mut page = PageBatch::new();
                page.push(PageRun { addr, count: 1 });
                if memory.read_exact_at(&mut one, addr).is_ok() {
                    if send_batch(&page, memory, channel)? {
                        self.pages += 1;
                    }
                } else {
                    self.forget((addr, addr + PAGE));
                }
            }
        }
        Ok(())
    }
}

/// Reads a batch straight into a record and sends it; false where not all can be read.
fn send_batch(batch: &PageBatch, memory: &File, channel: &mut Channel) -> Result<bool, MoveError> {
    let (head, runs) = (batch.head(), batch.runs());
    let mut unread = None;
    channel.send_with(kind::PAGES, 0, |mut body| {
        let len = head.as_bytes().len() + runs.as_bytes().len();
        let (front, rest) = body.split_at_mut_checked(len)?;
        front[..head.as_bytes().len()].copy_from_slice(head.as_bytes());
        front[head.as_bytes().len()..].copy_from_slice(runs.as_bytes());
        body = rest;
        let mut total = len;
        for run in runs {
            let bytes = usize::try_from(run.count * PAGE).ok()?;
            let (page, rest) = body.split_at_mut_checked(bytes)?;
            if let Err(error) = memory.read_exact_at(page, run.addr) {
                unread = Some(error);
                return None;
            }
            body = rest;
            total += bytes;
        }
        Some(total)
    })?;
    match unread {
        None => Ok(true),
        // Nothing is left of this address space: the program ended, or became another.
        Some(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(MoveError::Replaced),
        Some(_) => Ok(false),
    }
}
