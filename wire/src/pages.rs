//! Pages on the wire: several runs in one frame, and runs that read as zero.
//!
//! ```text
//! PAGES := PagesHead PageRun{runs} bytes{pages × 4096}     the bytes in the runs' order
//! GONE  := PageRun*                                        no bytes: they read as zero
//! ```
//!
//! A record costs its seal and a system call on each side, so pages that lie apart
//! share one. What comes is checked once, by [`parse_pages`] and [`parse_gone`];
//! whether a run lies within an area is the receiver's to know.

use crate::image::{PAGE, PAGES_PER_FRAME, PageRun, TASK_SIZE, overlaps_region};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Most runs in one [`crate::link::kind::GONE`] frame.
pub const GONE_PER_FRAME: usize = 4096;
/// [`PAGES_PER_FRAME`], as an index.
const MAX_RUNS: usize = 64;
const _: () = assert!(MAX_RUNS as u64 == PAGES_PER_FRAME);

/// Head of [`crate::link::kind::PAGES`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PagesHead {
    /// Runs that follow, 1 to [`PAGES_PER_FRAME`].
    pub runs: u32,
    /// Pages of them together, at most [`PAGES_PER_FRAME`].
    pub pages: u32,
}

/// Why pages are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadPages {
    /// Of the first bad run, 0 where the frame is malformed.
    pub addr: u64,
}

impl core::fmt::Display for BadPages {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "malformed pages at {:#x}", self.addr)
    }
}

impl core::error::Error for BadPages {}

/// Whether a run is one that a program may have, `limit` pages at most.
fn check(run: &PageRun, limit: u64) -> Result<(), BadPages> {
    let bad = BadPages { addr: run.addr };
    let end = run.end().ok_or(bad)?;
    let is_good = run.count > 0
        && run.count <= limit
        && run.addr.is_multiple_of(PAGE)
        && end <= TASK_SIZE
        && !overlaps_region(run.addr, end);
    if is_good { Ok(()) } else { Err(bad) }
}

/// Checks a [`crate::link::kind::PAGES`] body and gives its runs with their bytes.
///
/// Runs are aligned, ascending, apart, clear of conet's region, and have all their
/// bytes.
///
/// # Errors
/// [`BadPages`].
pub fn parse_pages(body: &[u8]) -> Result<impl Iterator<Item = (PageRun, &[u8])>, BadPages> {
    const FRAME: BadPages = BadPages { addr: 0 };
    let (head, rest) = PagesHead::read_from_prefix(body).map_err(|_| FRAME)?;
    let count = head.runs as usize;
    if count == 0 || count > MAX_RUNS {
        return Err(FRAME);
    }
    let mut runs = [PageRun::default(); MAX_RUNS];
    let mut data = rest;
    let (mut pages, mut at) = (0, 0);
    for slot in &mut runs[..count] {
        let (run, tail) = PageRun::read_from_prefix(data).map_err(|_| FRAME)?;
        check(&run, PAGES_PER_FRAME)?;
        if run.addr < at {
            return Err(BadPages { addr: run.addr });
        }
        at = run.addr + run.count * PAGE;
        pages += run.count;
        (*slot, data) = (run, tail);
    }
    if pages != u64::from(head.pages) || pages > PAGES_PER_FRAME {
        return Err(FRAME);
    }
    if data.len() as u64 != pages * PAGE {
        return Err(FRAME);
    }
    Ok(runs.into_iter().take(count).map(move |run| {
        let len = usize::try_from(run.count * PAGE).unwrap_or(0).min(data.len());
        let (own, tail) = data.split_at(len);
        data = tail;
        (run, own)
    }))
}

/// Checks a [`crate::link::kind::GONE`] body and gives its runs.
///
/// # Errors
/// [`BadPages`].
pub fn parse_gone(body: &[u8]) -> Result<impl Iterator<Item = PageRun>, BadPages> {
    let count = body.len() / size_of::<PageRun>();
    if !body.len().is_multiple_of(size_of::<PageRun>()) || count > GONE_PER_FRAME {
        return Err(BadPages { addr: 0 });
    }
    // Copies: a frame may lie at an odd address.
    let all = || {
        body.chunks_exact(size_of::<PageRun>())
            .filter_map(|bytes| PageRun::read_from_bytes(bytes).ok())
    };
    let mut at = 0;
    for run in all() {
        check(&run, TASK_SIZE / PAGE)?;
        if run.addr < at {
            return Err(BadPages { addr: run.addr });
        }
        at = run.addr + run.count * PAGE;
    }
    Ok(all())
}

/// Runs gathered for one frame, in ascending order.
#[derive(Clone, Copy, Debug)]
pub struct PageBatch {
    runs: [PageRun; MAX_RUNS],
    count: usize,
    pages: u64,
    /// The last run may grow.
    is_open: bool,
}

impl Default for PageBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl PageBatch {
    /// An empty batch.
    #[must_use]
    pub const fn new() -> Self {
        Self { runs: [PageRun { addr: 0, count: 0 }; MAX_RUNS], count: 0, pages: 0, is_open: false }
    }

    /// Pages in it.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages that still have room. As long as it is not 0, there is room for a run.
    #[must_use]
    pub const fn room(&self) -> u64 {
        // Each run has a page at least, so runs do not end before pages do.
        PAGES_PER_FRAME - self.pages
    }

    /// The runs.
    #[must_use]
    pub fn runs(&self) -> &[PageRun] {
        &self.runs[..self.count]
    }

    /// Adds as much of a run as has room, behind what is there; how many pages.
    pub fn push(&mut self, run: PageRun) -> u64 {
        let count = run.count.min(self.room());
        if count == 0 {
            return 0;
        }
        self.pages += count;
        if self.is_open
            && let Some(last) = self.count.checked_sub(1).and_then(|i| self.runs.get_mut(i))
            && last.end() == Some(run.addr)
        {
            last.count += count;
            return count;
        }
        self.runs[self.count] = PageRun { addr: run.addr, count };
        self.count += 1;
        self.is_open = true;
        count
    }

    /// What comes next begins a run of its own: a run lies in one area.
    pub fn cut(&mut self) {
        self.is_open = false;
    }

    /// Head of the frame; runs and bytes follow.
    #[must_use]
    pub fn head(&self) -> PagesHead {
        let number = |n: u64| u32::try_from(n).unwrap_or(0);
        PagesHead { runs: number(self.count as u64), pages: number(self.pages) }
    }

    /// Empties it.
    pub fn clear(&mut self) {
        (self.count, self.pages) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::image::REGION;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn frame(batch: &PageBatch) -> Vec<u8> {
        let mut body = batch.head().as_bytes().to_vec();
        body.extend_from_slice(batch.runs().as_bytes());
        for run in batch.runs() {
            for i in 0..run.count {
                let page = (run.addr / PAGE + i).to_le_bytes()[0];
                body.extend(core::iter::repeat_n(page, 4096));
            }
        }
        body
    }

    proptest! {
        #[test]
        fn batches_come_back_as_they_were(pages in proptest::collection::btree_set(1u64..500, 1..200)) {
            let mut batch = PageBatch::new();
            let mut seen = Vec::new();
            let mut flush = |batch: &mut PageBatch| {
                let body = frame(batch);
                for (run, bytes) in parse_pages(&body).unwrap() {
                    for i in 0..run.count {
                        let at = usize::try_from(i * PAGE).unwrap();
                        let number = run.addr / PAGE + i;
                        prop_assert_eq!(bytes[at], number.to_le_bytes()[0]);
                        seen.push(number);
                    }
                }
                batch.clear();
                Ok(())
            };
            for &page in &pages {
                let run = PageRun { addr: page * PAGE, count: 1 };
                if batch.push(run) == 0 {
                    flush(&mut batch)?;
                    prop_assert_eq!(batch.push(run), 1);
                }
            }
            flush(&mut batch)?;
            prop_assert_eq!(seen, pages.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn any_bytes_are_refused_or_whole(mut body in proptest::collection::vec(any::<u8>(), 0..64), runs in 0u32..70) {
            if let Some(first) = body.first_chunk_mut::<4>() { *first = runs.to_le_bytes(); }
            if let Ok(all) = parse_pages(&body) {
                for (run, bytes) in all { prop_assert_eq!(bytes.len() as u64, run.count * PAGE); }
            }
            if let Ok(all) = parse_gone(&body) {
                for run in all { prop_assert!(run.end().is_some()); }
            }
        }
    }

    #[test]
    fn runs_that_no_program_has_are_refused() {
        let gone = |runs: &[PageRun]| parse_gone(runs.as_bytes()).map(|_| ());
        let run = |addr, count| PageRun { addr, count };
        assert_eq!(gone(&[run(0x1000, 1 << 20), run(0x1_0000_1000, 1)]), Ok(()));
        for (bad, addr) in [
            (run(0x1001, 1), 0x1001),
            (run(0x1000, 0), 0x1000),
            (run(0x1000, u64::MAX), 0x1000),
            (run(TASK_SIZE, 1), TASK_SIZE),
            (run(REGION - PAGE, 2), REGION - PAGE),
        ] {
            assert_eq!(gone(&[bad]), Err(BadPages { addr }));
        }
        assert_eq!(gone(&[run(0x2000, 1), run(0x1000, 1)]), Err(BadPages { addr: 0x1000 }));
    }
}
