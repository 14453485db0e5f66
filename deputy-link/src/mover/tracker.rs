//! Which of a process's pages to send: round by round while it runs, the rest when it
//! is stopped.
//!
//! ```text
//! begin: stopped for a moment ─ userfaultfd made in its name, taken, closed there ─ runs on
//! round: areas ─ stopped, where something is new, to register it ─ runs on ─ protect what
//!        was written, and send it
//! rest:  stopped ─ areas ─ send what was written since, tell what is gone
//! ```
//!
//! Nothing depends on a registration: what is not registered when it is looked at is
//! sent whole, in the rest as well. So areas may come, go, grow and move, the program
//! may become another one, and a move without rounds is the rest alone.
//!
//! Anonymous memory is as [`conet_deputy_core::scan`] says. Where a private mapping of
//! a file is thrown away (`MADV_DONTNEED`), the file shows again, and the kernel keeps
//! the page's protection as a mark; so it is noted which pages were the program's own
//! copies when they were protected, and one of these that is a file's page or a mark
//! now is sent again. Pages of a mapping that other processes may write are sent
//! again unless the file's times say that nobody has.
//!
//! A mapping can lose its registration and keep its marks ([`conet_deputy_core::scan`]).
//! It is new then: all of it is sent and old marks are taken. So that none is registered
//! again unnoticed, the process stands still from when it is looked for what is new until
//! that is registered.
//!
//! Direct input and output (`O_DIRECT`) writes to memory behind the kernel's page
//! tables: a process that has such a descriptor is moved without rounds.

use super::mirror::Mirror;
use super::out::StopReason;
use super::{MoveError, gone};
use crate::channel::Channel;
use crate::image::area;
use crate::procfs::{self, Mapping};
use crate::ranges::Ranges;
use crate::sys::ptrace::Stopped;
use crate::sys::userfault::{Userfault, has_registered, scan};
use conet_deputy_core::areas::{Backing, gaps};
use conet_deputy_core::scan::{Purpose, Region, Verdict, is, verdict};
use conet_wire::image::{Area, PAGE, REGION, REGION_LEN, TASK_SIZE, area_flags};
use rustix::fs::OFlags;
use rustix::process::Pid;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant, SystemTime};

/// A file that changed so shortly before it was looked at may change again without
/// its time telling (times have the kernel's tick, 10 ms at most).
const FRESH: Duration = Duration::from_millis(100);

/// What of a process's memory is read, of one address space: these files stay with it
/// when the process ends or becomes another program.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) memory: File,
    pagemap: File,
}

impl Files {
    /// Opens them; the process is stopped, or what is found is checked later.
    pub(super) fn open(pid: Pid) -> Result<Self, MoveError> {
        let open = |name| File::open(procfs::path(pid, name)).map_err(gone);
        Ok(Self { memory: open("mem")?, pagemap: open("pagemap")? })
    }

    /// Whether any memory of this address space is registered.
    pub(super) fn is_registered(&self) -> bool {
        has_registered(&self.pagemap, (PAGE, TASK_SIZE))
    }

    /// Regions of a range that serve the purpose, from either of the kernel's ways to
    /// tell.
    fn regions(&self, purpose: Purpose, range: (u64, u64)) -> io::Result<Vec<Region>> {
        let mut regions = Vec::new();
        match scan(&self.pagemap, purpose, range, |region| regions.push(*region)) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => self.present(range),
            other => other.map(|()| regions),
        }
    }

    /// Before Linux 6.7: what is there, from the page map itself.
    fn present(&self, (start, end): (u64, u64)) -> io::Result<Vec<Region>> {
        const PRESENT_OR_SWAPPED: u64 = 3 << 62;
        const BATCH: u64 = 4096;
        let mut regions: Vec<Region> = Vec::new();
        let mut entries = Vec::new();
        let mut at = start;
        while at < end {
            let want = ((end - at) / PAGE).min(BATCH);
            entries.resize(usize::try_from(want * 8).unwrap_or(0), 0);
            self.pagemap.read_exact_at(&mut entries, at / PAGE * 8)?;
            for entry in entries.as_chunks::<8>().0 {
                let there = u64::from_le_bytes(*entry) & PRESENT_OR_SWAPPED != 0;
                let categories = if there { is::PRESENT | is::WRITTEN } else { 0 };
                match regions.last_mut() {
                    Some(last) if last.categories == categories => last.end += PAGE,
                    _ => regions.push(Region { start: at, end: at + PAGE, categories }),
                }
                at += PAGE;
            }
        }
        Ok(regions)
    }
}

/// What tells whether a file that others may write has changed.
type Stamp = (u64, u64, u64, (i64, i64), (i64, i64));

/// A process whose memory is followed.
#[derive(Debug)]
pub(super) struct Tracker {
    pid: Pid,
    userfault: Option<Userfault>,
    /// It has registered what there was.
    has_begun: bool,
    /// How long the process was stopped for that.
    pub(super) pause: Duration,
    /// Pages of file mappings that were the program's own when they were protected.
    own: Ranges,
    /// Shared mappings that were sent, by their start, as they were then.
    stamps: BTreeMap<u64, Stamp>,
}

/// Where pages go.
pub(super) struct Target<'a> {
    pub(super) mirror: &'a mut Mirror,
    pub(super) channel: &'a mut Channel,
}

impl Tracker {
    /// Without rounds.
    pub(super) const fn none(pid: Pid) -> Self {
        Self {
            pid,
            userfault: None,
            has_begun: false,
            pause: Duration::ZERO,
            own: Ranges::new(),
            stamps: BTreeMap::new(),
        }
    }

    /// With rounds, by a userfaultfd of the process.
    pub(super) fn new(pid: Pid, userfault: Userfault) -> Self {
        Self { userfault: Some(userfault), ..Self::none(pid) }
    }

    /// Why its memory cannot be followed, though the kernel could.
    pub(super) fn obstacle(&self) -> Option<StopReason> {
        let direct = || has_direct_descriptor(self.pid).then_some(StopReason::DirectIo);
        self.userfault.as_ref().and_then(|_| direct())
    }

    /// One round, while the process runs. Gives the pages sent.
    pub(super) fn round(&mut self, files: &Files, to: &mut Target<'_>) -> Result<u64, MoveError> {
        let before = to.mirror.pages();
        let (mappings, mut new) = self.follow(files)?;
        let areas = areas(&mappings, &new);
        if areas.is_empty() {
            return Err(MoveError::Replaced);
        }
        add_unknown(&mut new, &areas, to.mirror);
        to.mirror.shape(areas, to.channel)?;
        for mapping in &mappings {
            let range = (mapping.start, mapping.end);
            let pages = match kind_of(mapping) {
                Kind::Skip | Kind::Vdso => continue,
                Kind::Shared => self.round_shared(mapping, to.mirror),
                Kind::File => self.round_of_file(files, range, &new)?,
                Kind::Anonymous => round_anonymous(files, range, &new, to.mirror)?,
            };
            for part in pages.iter() {
                to.mirror.send(part, &files.memory, to.channel)?;
            }
        }
        to.mirror.flush(&files.memory, to.channel)?;
        Ok(to.mirror.pages() - before)
    }

    /// Registers what is not, and gives it with all that is mapped.
    fn follow(&mut self, files: &Files) -> Result<(Vec<Mapping>, Ranges), MoveError> {
        if self.has_begun {
            let mappings = procfs::maps(self.pid).map_err(gone)?;
            let new = self.not_followed(files, &mappings)?;
            if new.len() == 0 {
                return Ok((mappings, new));
            }
        }
        let begin = Instant::now();
        let stopped = Stopped::new(self.pid)?;
        let mappings = procfs::maps(self.pid).map_err(gone)?;
        let new = self.not_followed(files, &mappings)?;
        self.register(&new, &mappings)?;
        stopped.release()?;
        self.pause += begin.elapsed();
        self.has_begun = true;
        self.take_old_marks(files, &new)?;
        Ok((mappings, new))
    }

    /// What should be registered and is not.
    fn not_followed(&self, files: &Files, mappings: &[Mapping]) -> Result<Ranges, MoveError> {
        let mut new = Ranges::new();
        // A scan of all of it would take long, and the process may stand still.
        let strange = if self.has_begun { Some(strange(files)?) } else { None };
        for mapping in mappings.iter().filter(|mapping| is_followed(mapping)) {
            let range = (mapping.start, mapping.end);
            match &strange {
                Some(strange) => strange.within(range).for_each(|part| new.insert(part)),
                None => new.insert(range),
            }
        }
        Ok(new)
    }

    fn register(&self, new: &Ranges, mappings: &[Mapping]) -> Result<(), MoveError> {
        let Some(userfault) = &self.userfault else { return Ok(()) };
        for (range, group) in groups(mappings) {
            let is_new =
                |mapping: &Mapping| new.within((mapping.start, mapping.end)).next().is_some();
            if !group.iter().any(is_new) {
                continue;
            }
            match userfault.register(range) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                    return Err(MoveError::Replaced);
                }
                // It is sent whole in the end.
                Err(error) => tracing::debug!(%error, ?range, "areas are not followed"),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Takes marks of protection from what has just been registered.
    fn take_old_marks(&self, files: &Files, new: &Ranges) -> Result<(), MoveError> {
        /// What has lost its registration again shows none.
        const TRIES: u32 = 5;
        let Some(userfault) = &self.userfault else { return Ok(()) };
        for part in new.iter() {
            let mut tries = 0;
            loop {
                let marked = regions(files, Purpose::Protected, part)?;
                if marked.is_empty() {
                    break;
                }
                if tries == TRIES {
                    return Err(MoveError::Replaced);
                }
                tries += 1;
                for region in marked {
                    // Fails where the program has unmapped some of it: seen next time.
                    userfault.release((region.start, region.end)).ok();
                }
            }
        }
        Ok(())
    }

    /// Protects what was written of a private mapping, and all of what is new of it;
    /// gives the pages to send.
    fn round_of_file(
        &mut self,
        files: &Files,
        range: (u64, u64),
        new: &Ranges,
    ) -> Result<Ranges, MoveError> {
        let mut pages = Ranges::new();
        for region in regions(files, Purpose::Arm, range)? {
            let part = (region.start, region.end);
            pages.insert(part);
            if region.categories & is::FILE == 0 {
                self.own.insert(part);
            } else {
                self.own.remove(part);
            }
        }
        for part in new.within(range) {
            pages.insert(part);
            // Marks where nothing is yet: it is the file's until it is written. What is
            // written before that, and so is not seen by the scan above:
            self.userfault.as_ref().map(|userfault| userfault.protect(part).ok());
            for region in regions(files, Purpose::Everything, part)? {
                if region.categories & (is::PRESENT | is::FILE) == is::PRESENT {
                    self.own.insert((region.start, region.end));
                }
            }
        }
        Ok(pages)
    }

    /// Pages of a shared mapping that was not sent before.
    fn round_shared(&mut self, mapping: &Mapping, mirror: &Mirror) -> Ranges {
        let mut pages = Ranges::new();
        let range = (mapping.start, mapping.end);
        if self.stamps.contains_key(&mapping.start) && mirror.has(range) {
            return pages;
        }
        if let Some(stamp) = stamp(self.pid, mapping) {
            self.stamps.insert(mapping.start, stamp);
            pages.insert(range);
        }
        pages
    }

    /// The rest, of a stopped process whose areas are `mappings`.
    pub(super) fn rest(
        &self,
        files: &Files,
        mappings: &[Mapping],
        to: &mut Target<'_>,
    ) -> Result<(), MoveError> {
        let (mut strange, mut unknown) = (Ranges::new(), Ranges::new());
        if self.userfault.is_some() {
            strange = self::strange(files)?;
            add_unknown(&mut unknown, &areas(mappings, &strange), to.mirror);
        }
        to.mirror.shape(areas(mappings, &strange), to.channel)?;
        for mapping in mappings {
            let range = (mapping.start, mapping.end);
            match kind_of(mapping) {
                Kind::Skip => {}
                Kind::Vdso => to.mirror.send(range, &files.memory, to.channel)?,
                Kind::Shared => {
                    let sent = self.stamps.get(&mapping.start);
                    let is_same = sent.is_some() && sent == stamp(self.pid, mapping).as_ref();
                    if !is_same || !to.mirror.has(range) {
                        to.mirror.send(range, &files.memory, to.channel)?;
                    }
                }
                Kind::File => self.rest_of_file(files, range, &unknown, to)?,
                Kind::Anonymous => self.rest_of_anonymous(files, range, &unknown, to)?,
            }
        }
        to.mirror.flush(&files.memory, to.channel)
    }

    fn rest_of_anonymous(
        &self,
        files: &Files,
        range: (u64, u64),
        unknown: &Ranges,
        to: &mut Target<'_>,
    ) -> Result<(), MoveError> {
        let trusted = if self.userfault.is_some() { u64::MAX } else { !is::REGISTERED };
        let mut take = |region: Region, trusted| {
            let part = (region.start, region.end);
            match verdict(region.categories & trusted) {
                Verdict::Keep => Ok(()),
                Verdict::Send => to.mirror.send(part, &files.memory, to.channel),
                Verdict::Zero => {
                    to.mirror.forget(part);
                    Ok(())
                }
            }
        };
        for region in regions(files, Purpose::Changes, range)? {
            take(region, trusted)?;
        }
        for part in unknown.within(range) {
            for region in regions(files, Purpose::Everything, part)? {
                take(region, !is::REGISTERED)?;
            }
        }
        Ok(())
    }

    fn rest_of_file(
        &self,
        files: &Files,
        range: (u64, u64),
        unknown: &Ranges,
        to: &mut Target<'_>,
    ) -> Result<(), MoveError> {
        if self.userfault.is_none() {
            return to.mirror.send(range, &files.memory, to.channel);
        }
        let mut pages = Ranges::new();
        for region in regions(files, Purpose::Everything, range)? {
            let part = (region.start, region.end);
            let is_protected = region.categories & (is::REGISTERED | is::WRITTEN) == is::REGISTERED;
            let is_there = region.categories & (is::PRESENT | is::SWAPPED) != 0;
            let is_own = region.categories & (is::PRESENT | is::FILE) == is::PRESENT;
            if !is_protected || !is_there {
                pages.insert(part);
            } else if !is_own {
                // It was the program's own when it was protected, and is so no more.
                self.own.within(part).for_each(|lost| pages.insert(lost));
            }
        }
        unknown.within(range).for_each(|part| pages.insert(part));
        for part in pages.iter() {
            to.mirror.send(part, &files.memory, to.channel)?;
        }
        Ok(())
    }
}

/// Adds what was in no list that was sent before: whatever marks it has, the other half
/// does not know it. Mostly it has grown.
fn add_unknown(unknown: &mut Ranges, areas: &[Area], mirror: &Mirror) {
    for area in areas {
        gaps((area.start, area.end), mirror.areas()).for_each(|part| unknown.insert(part));
    }
}

/// How the pages of a mapping are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nothing of it travels.
    Skip,
    /// The vDSO's code, which is sent with the rest.
    Vdso,
    /// Others may write it.
    Shared,
    /// A private mapping of a file.
    File,
    Anonymous,
}

fn kind_of(mapping: &Mapping) -> Kind {
    let is_ours = mapping.start < REGION + REGION_LEN && mapping.end > REGION;
    match mapping.backing {
        _ if is_ours => Kind::Skip,
        Backing::Vvar | Backing::Vsyscall => Kind::Skip,
        Backing::Vdso => Kind::Vdso,
        _ if mapping.is_shared => Kind::Shared,
        Backing::File => Kind::File,
        Backing::Anonymous | Backing::Stack => Kind::Anonymous,
    }
}

fn is_followed(mapping: &Mapping) -> bool {
    matches!(kind_of(mapping), Kind::File | Kind::Anonymous)
}

/// The mappings as areas; those of which nothing is followed are new.
fn areas(mappings: &[Mapping], strange: &Ranges) -> Vec<Area> {
    let with_flags = |mapping: &Mapping| {
        let area = area(mapping)?;
        let is_new = is_followed(mapping)
            && area.flags & area_flags::GROWS_DOWN == 0
            && strange.covers((area.start, area.end));
        let new = if is_new { area_flags::NEW } else { 0 };
        Some(Area { flags: area.flags | new, ..area })
    };
    mappings.iter().filter_map(with_flags).collect()
}

/// Runs of mappings that can be registered together, each with the free space around
/// it: a mapping that grows meanwhile would otherwise be cut in two, and the program's
/// `mremap` of it fail.
fn groups(mappings: &[Mapping]) -> impl Iterator<Item = ((u64, u64), &[Mapping])> {
    let (mut rest, mut start) = (mappings, PAGE);
    std::iter::from_fn(move || {
        let skipped = rest.iter().take_while(|mapping| !is_followed(mapping)).count();
        let (before, from) = rest.split_at(skipped);
        start = before.last().map_or(start, |mapping| mapping.end);
        let count = from.iter().take_while(|mapping| is_followed(mapping)).count();
        let (group, after) = from.split_at(count);
        rest = after;
        let end = after.first().map_or(TASK_SIZE, |mapping| mapping.start.min(TASK_SIZE));
        (!group.is_empty()).then_some(((start, end), group))
    })
}

fn regions(files: &Files, purpose: Purpose, range: (u64, u64)) -> Result<Vec<Region>, MoveError> {
    files.regions(purpose, range).map_err(|error| match error.raw_os_error() {
        // Nothing is left of this address space; whether of the process, others tell.
        Some(libc::ESRCH) => MoveError::Replaced,
        _ if error.kind() == io::ErrorKind::UnexpectedEof => MoveError::Replaced,
        _ => MoveError::Process(error),
    })
}

/// What is not registered.
fn strange(files: &Files) -> Result<Ranges, MoveError> {
    let mut strange = Ranges::new();
    for region in regions(files, Purpose::Strange, (PAGE, TASK_SIZE))? {
        strange.insert((region.start, region.end));
    }
    Ok(strange)
}

/// Protects what was written of anonymous memory; gives the pages to send, of what is
/// new all.
fn round_anonymous(
    files: &Files,
    range: (u64, u64),
    new: &Ranges,
    mirror: &mut Mirror,
) -> Result<Ranges, MoveError> {
    let mut pages = Ranges::new();
    let mut take = |region: &Region, categories| {
        let part = (region.start, region.end);
        match verdict(categories) {
            Verdict::Send => pages.insert(part),
            // It is protected as the zero that it is now.
            Verdict::Zero => mirror.forget(part),
            Verdict::Keep => {}
        }
    };
    for region in regions(files, Purpose::Arm, range)? {
        take(&region, region.categories);
    }
    for part in new.within(range) {
        for region in regions(files, Purpose::Everything, part)? {
            take(&region, region.categories & !is::REGISTERED);
        }
    }
    Ok(pages)
}

/// The times of the file behind a mapping; none where they cannot be told, or may not
/// tell the next change.
fn stamp(pid: Pid, mapping: &Mapping) -> Option<Stamp> {
    let name = format!("map_files/{:x}-{:x}", mapping.start, mapping.end);
    let seen = fs::metadata(procfs::path(pid, &name)).ok()?;
    let age = SystemTime::now().duration_since(seen.modified().ok()?).ok()?;
    let modified = (seen.st_mtime(), seen.st_mtime_nsec());
    let changed = (seen.st_ctime(), seen.st_ctime_nsec());
    (age > FRESH).then(|| (seen.st_dev(), seen.st_ino(), seen.st_size(), modified, changed))
}

/// Whether the process has a descriptor with `O_DIRECT`.
fn has_direct_descriptor(pid: Pid) -> bool {
    let Ok(entries) = fs::read_dir(procfs::path(pid, "fdinfo")) else { return true };
    entries.flatten().any(|entry| {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
        flags.is_some_and(|flags| flags & OFlags::DIRECT.bits() != 0)
    })
}
