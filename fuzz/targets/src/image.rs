//! The link of a moved process: images, calls and replies, from either end.
//!
//! The input is a row of frames as [`conet_wire::link`] describes them, each behind
//! its length (u32 LE); what is behind the last whole one is a frame as well. Frames
//! of an image go through the rules by which a restorer takes one. Two more kinds
//! stand for the remote program and its kernel, which a link does not carry:
//!
//! ```text
//! kind 256   a call: args [u64; 6], then the program's memory, from PROGRAM on
//!            (its number is the frame's `seq`)
//! kind 257   text of /proc/PID/maps
//! ```

use conet_deputy_core::areas::{gaps, parse_line, well_formed};
use conet_deputy_core::marshal::{self, Fault, Memory, Plan, Signals};
use conet_deputy_core::table;
use conet_wire::image::{
    Area, Clocks, Commit, End, Head, MAX_AREAS, MAX_XSAVE, PAGE, PAGES_PER_FRAME, PageRun, REGION,
    REGION_LEN, TASK_SIZE, VERSION, overlaps_region,
};
use conet_wire::link::{
    ComeHome, Exit, FrameHeader, MAX_FRAME, Refusal, ReplyHead, Request, direction, kind,
    output_len, padded, parse_request, split_frame,
};
use conet_wire::pages::{PagesHead, parse_gone, parse_pages};
use std::ops::Range;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A call of the remote program, as input of [`process_image`].
pub const PROGRAM_CALL: u32 = 256;
/// A process's memory map, as input of [`process_image`].
pub const MAPS: u32 = 257;
/// Where the memory of a [`PROGRAM_CALL`] begins.
pub const PROGRAM: u64 = 0x10_0000;

/// Takes the frames as home and as the remote side.
///
/// # Panics
///
/// If a checked request or image is not what its check promises, if a request that
/// was written for a program is refused by the parser, or if a layout is not read
/// back as it was written: findings.
pub fn process_image(data: &[u8]) {
    let mut image = Image::default();
    let mut call = Call::default();
    let mut rest = data;
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let Some((frame, after)) = after.split_at_checked(length) else { break };
        rest = after;
        take(frame, &mut image, &mut call);
    }
    take(rest, &mut image, &mut call);
}

fn take(frame: &[u8], image: &mut Image, call: &mut Call) {
    let Ok((header, body)) = split_frame(frame) else {
        assert!(frame.len() < size_of::<FrameHeader>());
        return;
    };
    if frame.len() > MAX_FRAME {
        return;
    }
    match header.kind {
        kind::CALL => request(body),
        kind::REPLY => call.answer(body),
        PROGRAM_CALL => call.issue(header.seq, body),
        MAPS => body.split(|&byte| byte == b'\n').for_each(line),
        kind::HEAD | kind::AREAS | kind::PAGES | kind::GONE | kind::ROUND | kind::END => {
            image.take(header, body);
        }
        kind::REFUSED => same::<Refusal>(body),
        kind::CLOCKS_ARE => same::<Clocks>(body),
        kind::COMMIT => same::<Commit>(body),
        kind::COME_HOME => same::<ComeHome>(body),
        kind::EXIT => same::<Exit>(body),
        _ => {}
    }
}

/// What is read is written as it was.
fn same<T: FromBytes + IntoBytes + Immutable>(body: &[u8]) {
    if let Ok((value, rest)) = T::read_from_prefix(body) {
        assert_eq!(value.as_bytes().len() + rest.len(), body.len());
        assert!(body.starts_with(value.as_bytes()));
    }
}

/// A call request as the deputy takes it.
fn request(body: &[u8]) {
    let Ok(parsed) = parse_request(body) else { return };
    for (desc, &input) in parsed.descs().iter().zip(&parsed.inputs) {
        if desc.direction & (direction::IN | direction::IN_PLACE) == direction::IN {
            assert!(input + desc.len as usize <= body.len(), "an input outside of its request");
        }
    }
    for result in [0, 1, i64::MAX, -1, -4095, -4096, i64::MIN] {
        let lengths = parsed.descs().iter().map(|desc| {
            assert!(output_len(desc, result) <= desc.len as usize);
            padded(output_len(desc, result))
        });
        let reply = size_of::<FrameHeader>() + size_of::<ReplyHead>() + lengths.sum::<usize>();
        assert!(reply <= MAX_FRAME, "a reply of {reply} bytes");
    }
}

/// A line of a memory map.
fn line(text: &[u8]) {
    let Some(line) = parse_line(text) else { return };
    assert!(text.ends_with(line.name));
    let area = line.area();
    if area.is_valid() {
        assert!(!area.is_empty() && area.len().is_multiple_of(PAGE));
        assert!(area.end <= REGION || area.start >= REGION + REGION_LEN);
    }
}

/// The remote side's call that waits for its reply.
#[derive(Default)]
struct Call {
    memory: Program,
    plan: Option<Plan>,
}

impl Call {
    /// What is written for a program's call is what the deputy's parser takes.
    fn issue(&mut self, number: u32, body: &[u8]) {
        let Ok((args, memory)) = <[u64; 6]>::read_from_prefix(body) else { return };
        let Some(class) = table::lookup(u64::from(number)) else { return };
        self.memory = Program(memory.to_vec());
        let signals = Signals { blocked: 0b0110, handled: 0b0011 };
        let mut out = vec![0xaa; MAX_FRAME - size_of::<FrameHeader>()];
        self.plan = marshal::request(class, number, &args, signals, &self.memory, &mut out).ok();
        if let Some(plan) = &self.plan {
            let written = out.get(..plan.len).unwrap_or_default();
            let parsed = parse_request(written);
            assert_eq!(parsed.map(|parsed| parsed.request), Ok(plan.request));
            assert!(written.len() >= size_of::<Request>());
            request(written);
        }
    }

    /// Any reply either is refused or ends the call.
    fn answer(&mut self, body: &[u8]) {
        if let Some(plan) = self.plan.take() {
            let before = self.memory.0.len();
            plan.store(body, &mut self.memory).ok();
            assert_eq!(self.memory.0.len(), before);
        }
    }
}

/// A program's memory, from [`PROGRAM`] on.
#[derive(Default)]
struct Program(Vec<u8>);

impl Program {
    fn range(addr: u64, length: usize) -> Option<Range<usize>> {
        let start = usize::try_from(addr.checked_sub(PROGRAM)?).ok()?;
        Some(start..start.checked_add(length)?)
    }
}

impl Memory for Program {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        let range = Self::range(addr, into.len()).ok_or(Fault)?;
        into.copy_from_slice(self.0.get(range).ok_or(Fault)?);
        Ok(())
    }

    fn write(&mut self, addr: u64, from: &[u8]) -> Result<(), Fault> {
        let range = Self::range(addr, from.len()).ok_or(Fault)?;
        self.0.get_mut(range).ok_or(Fault)?.copy_from_slice(from);
        Ok(())
    }
}

/// An image on its way out to a remote half: the restorer's rules, without an address
/// space.
#[derive(Default)]
struct Image {
    has_head: bool,
    areas: Vec<Area>,
    /// The list that is coming in.
    list: Option<u32>,
    is_shaped: bool,
    is_over: bool,
    pages: u64,
}

impl Image {
    fn take(&mut self, header: FrameHeader, body: &[u8]) {
        let taken = !self.is_over
            && match header.kind {
                kind::HEAD if !self.has_head => self.head(body).is_some(),
                kind::AREAS => self.list(header.seq, body).is_some(),
                kind::PAGES => self.runs(body).is_some(),
                kind::GONE => self.gone(body).is_some(),
                kind::ROUND if !self.has_head => self.shape().is_some(),
                kind::END if self.has_head => {
                    self.end(body);
                    false
                }
                _ => false,
            };
        // A refused frame ends the image, as does its end.
        self.is_over = !taken;
    }

    fn head(&mut self, body: &[u8]) -> Option<()> {
        same::<Head>(body);
        let (head, xsave) = Head::read_from_prefix(body).ok()?;
        let length = usize::try_from(head.xsave_len).ok()?;
        self.has_head =
            head.version == VERSION && length == xsave.len() && (512..=MAX_XSAVE).contains(&length);
        self.has_head.then_some(())
    }

    fn list(&mut self, seq: u32, body: &[u8]) -> Option<()> {
        if self.list.is_some_and(|list| list != seq) {
            self.shape()?;
        }
        if self.list.is_none() {
            self.areas.clear();
            self.list = Some(seq);
        }
        let mut rest = body;
        while !rest.is_empty() {
            let (area, tail) = Area::read_from_prefix(rest).ok()?;
            self.areas.push(area);
            rest = tail;
        }
        (self.areas.len() <= MAX_AREAS).then_some(())
    }

    /// Checks the list once it is complete.
    fn shape(&mut self) -> Option<()> {
        if self.list.take().is_none() {
            return self.is_shaped.then_some(());
        }
        self.is_shaped = true;
        if self.areas.is_empty() || !well_formed(&self.areas) {
            return None;
        }
        for area in &self.areas {
            assert!(area.start < area.end && area.end <= TASK_SIZE);
            assert!(!overlaps_region(area.start, area.end), "an area in the region");
        }
        self.partition((0, TASK_SIZE));
        self.partition((REGION, REGION + REGION_LEN));
        if let [first, .., last] = self.areas.as_slice() {
            self.partition((first.start + PAGE, last.end - PAGE));
        }
        Some(())
    }

    /// Areas and gaps are together exactly the range, and nothing twice.
    fn partition(&self, range: (u64, u64)) {
        let (from, to) = range;
        let mut parts: Vec<(u64, u64)> = gaps(range, &self.areas).collect();
        let clipped = self.areas.iter().map(|a| (a.start.max(from), a.end.min(to)));
        parts.extend(clipped.filter(|(start, end)| start < end));
        parts.sort_unstable();
        let end = parts.iter().fold(from, |at, &(start, end)| {
            assert!(start == at && start < end, "{start:#x} after {at:#x}");
            end
        });
        assert!(end == to || from >= to, "the parts end at {end:#x}, not at {to:#x}");
    }

    /// Pages of a frame that is taken lie in areas, with all their bytes, and apart.
    fn runs(&mut self, body: &[u8]) -> Option<()> {
        self.shape()?;
        same::<PagesHead>(body);
        let (mut count, mut bytes, mut at) = (0, 0, 0);
        for (run, data) in parse_pages(body).ok()? {
            assert_eq!(u64::try_from(data.len()), Ok(run.count * PAGE));
            assert!(run.addr >= at, "runs of a frame overlap");
            at = run.end()?;
            count += run.count;
            bytes += data.len();
            self.has(run)?;
        }
        assert!(bytes < body.len() && count <= PAGES_PER_FRAME);
        self.pages += count;
        Some(())
    }

    fn gone(&mut self, body: &[u8]) -> Option<()> {
        self.shape()?;
        let mut at = 0;
        for run in parse_gone(body).ok()? {
            assert!(run.addr >= at, "runs of a frame overlap");
            at = run.end()?;
            self.has(run)?;
        }
        Some(())
    }

    fn has(&self, run: PageRun) -> Option<()> {
        let end = run.end()?;
        assert!(!overlaps_region(run.addr, end) && end <= TASK_SIZE, "a run in the region");
        self.areas.iter().any(|area| area.start <= run.addr && end <= area.end).then_some(())
    }

    fn end(&mut self, body: &[u8]) {
        same::<End>(body);
        if self.shape().is_some()
            && let Ok((end, _)) = End::read_from_prefix(body)
            && end == (End { areas: self.areas.len() as u64, pages: self.pages })
        {
            assert!(self.has_head && !self.areas.is_empty());
        }
    }
}
