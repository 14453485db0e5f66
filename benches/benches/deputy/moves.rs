//! Moves of programs of several sizes: how long they stand still, how long it takes,
//! and what comes home.
//!
//! The program has so much memory, every page of it written with bytes that do not
//! repeat, and changes 100 pages a second. It moves out, changes some more at once, and
//! comes home, waiting. The freeze is the
//! mover's: from before the program is stopped until its other half may run. On the way
//! home only the whole is known, in which the freeze is contained.
//!
//! After each hop the same program, at home, is copied by [`crate::peers::copy`]: as many
//! pages as went in the freeze, on the whole, and home.

use crate::Options;
use crate::lanes::Role;
use crate::moved::Node;
use crate::peers::copy::{Area, Copier};
use crate::work::{Batch, Caller, Op};
use anyhow::{Context as _, Result, bail};
use conet_benches::report::{Report, Row, Rule};
use conet_benches::stats::{median, spread};
use conet_deputy_link::mover::{How, Method, StopReason};
use conet_transport::session::protect::Cipher;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
/// Pages that are changed away.
const DIRTY: u32 = 100;
/// Pages that any program changes by going on: its stack, its libraries' data.
const OTHERS: f64 = 16.0;

/// A program that only has memory.
pub(crate) struct Memory {
    bytes: Vec<u8>,
    round: u8,
}

impl Memory {
    pub(crate) fn new(mib: usize) -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut bytes = Vec::with_capacity(mib << 20);
        while bytes.len() < mib << 20 {
            // xorshift64: bytes that no shortcut for zeros or repeats fits.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        Self { bytes, round: 0 }
    }
}

impl Memory {
    /// Changes 100 pages a second, until there is something to read.
    fn keep_changing(&mut self) -> Result<()> {
        let pause = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        let stdin = rustix::stdio::stdin();
        let mut at = 0;
        while poll(&mut [PollFd::new(&stdin, PollFlags::IN)], Some(&pause))? == 0 {
            // Some pages on, so that they are not neighbours.
            at = (at + 17 * PAGE) % self.bytes.len();
            self.bytes[at] = self.bytes[at].wrapping_add(1);
        }
        Ok(())
    }

    pub(crate) fn area(&self) -> Area {
        let at = (self.bytes.as_ptr() as u64).next_multiple_of(PAGE as u64);
        Area { at, pages: (self.bytes.len() / PAGE - 1) as u64 }
    }
}

impl Caller for Memory {
    fn repeat(&mut self, op: Op, count: u64) -> Result<Duration> {
        let begin = Instant::now();
        if op == Op::KeepChanging {
            self.keep_changing()?;
            return Ok(begin.elapsed());
        }
        let Op::Dirty(pages) = op else { bail!("this program only has memory") };
        for _ in 0..count {
            self.round = self.round.wrapping_add(1);
            let apart = (self.bytes.len() / PAGE / pages.max(1) as usize).max(1) * PAGE;
            for page in self.bytes.chunks_mut(apart).take(pages as usize) {
                page[0] = page[0].wrapping_add(self.round | 1);
            }
        }
        Ok(begin.elapsed())
    }
}

/// The figure: how long a program may stand still, in milliseconds.
const FREEZE_MS: f64 = 5.0;

/// What was seen of one size, moved in one way; times in milliseconds, each with what
/// bounds it.
#[derive(Default)]
struct Seen {
    freeze: [Vec<f64>; 2],
    /// Stops before the freeze, to make rounds possible.
    pause: Vec<f64>,
    /// Pages that went in the freeze.
    frozen: Vec<f64>,
    total: [Vec<f64>; 2],
    home: [Vec<f64>; 2],
    came: Vec<f64>,
    changed: Vec<f64>,
}

/// A program that moves to and fro, and who copies it beside.
struct Moving {
    program: Role,
    area: Area,
    node: Node,
    copier: Copier,
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Moving {
    fn start(mib: usize) -> Result<Self> {
        let program = Role::start(&["memory", &mib.to_string()])?;
        // All but what is left of the first and the last page.
        let area = Area { at: program.hello, pages: ((mib << 20) / PAGE - 1) as u64 };
        Ok(Self { program, area, node: Node::new()?, copier: Copier::start()? })
    }

    /// Moves out and home again; why not in that way, where it could not be.
    fn hop(&mut self, seen: &mut Seen, how: How) -> Result<Option<StopReason>> {
        let pid = self.program.pid()?;
        let busy = Batch { op: Op::KeepChanging, count: 1 };
        let some = Batch { op: Op::Dirty(DIRTY), count: 1 };
        self.program.begin(busy)?;
        let away = self.node.take(pid, Cipher::preferred(), how)?;
        self.program.begin(some)?;
        self.program.end(busy)?;
        self.program.end(some)?;
        let home = away.bring_home(pid)?;
        if let (How::Precopy, Method::Stop(reason)) = (how, away.moved.method) {
            return Ok(Some(reason));
        }
        let moved = &away.moved;
        let copy = |pages| self.copier.copy(pid, self.area, pages).map(ms);
        for (times, ours, bound) in [
            (&mut seen.freeze, moved.freeze, copy(moved.frozen_pages)?),
            (&mut seen.total, moved.total, copy(moved.pages)?),
            (&mut seen.home, home.total, copy(home.pages)?),
        ] {
            times[0].push(ms(ours));
            times[1].push(bound);
        }
        seen.pause.push(ms(moved.pause));
        seen.frozen.push(moved.frozen_pages as f64);
        seen.came.push(home.pages as f64);
        seen.changed.push(home.changed as f64);
        Ok(None)
    }
}

/// The sizes in MiB, and how often each is moved.
const SIZES: [(usize, u32); 3] = [(8, 21), (256, 11), (2048, 5)];

pub(crate) fn run(report: &mut Report, options: &Options) -> Result<()> {
    for (mib, rounds) in SIZES {
        let case = if mib < 1024 { format!("{mib} MB") } else { format!("{} GB", mib / 1024) };
        let case = format!("move {case}");
        if !options.wants(&case) || options.is_test && mib > 8 {
            continue;
        }
        let rounds = if options.is_test { 2 } else { rounds };
        report.progress(&case);
        let mut moving = Moving::start(mib)?;
        let ways = [(How::Precopy, "pre-copy"), (How::Stop, "stop-and-copy")];
        let mut seen = [Seen::default(), Seen::default()];
        for _ in 0..rounds {
            for ((how, way), seen) in ways.iter().zip(&mut seen) {
                let hop = moving.hop(seen, *how).with_context(|| case.clone())?;
                if let Some(reason) = hop {
                    report.note(&format!("{case}: no {way} this time: {reason}"));
                }
            }
        }
        let all = ways.iter().zip(&seen);
        for ((how, way), seen) in all.filter(|(_, seen)| !seen.came.is_empty()) {
            add(report, &case, way, seen)?;
            if *how == How::Precopy {
                add_precopy(report, &case, way, seen)?;
            }
        }
    }
    Ok(())
}

fn row(case: &str, metric: String, unit: &'static str, values: &[f64]) -> Row {
    Row {
        case: case.to_owned(),
        metric,
        unit,
        ours: median(values),
        peers: vec![],
        rule: None,
        bound: None,
        pin: "moves: unpinned".to_owned(),
        runs: values.len(),
        spread: spread(values),
    }
}

/// What only pre-copy has: it stops the program twice, and sends little in the freeze.
fn add_precopy(report: &mut Report, case: &str, way: &str, seen: &Seen) -> Result<()> {
    let pause = row(case, format!("{way}, pause before"), "ms", &seen.pause);
    report.add(Row { rule: Some(Rule::constant(FREEZE_MS)), ..pause })?;
    report.add(row(case, format!("{way}, in the freeze"), "pages", &seen.frozen))?;
    Ok(())
}

fn add(report: &mut Report, case: &str, way: &str, seen: &Seen) -> Result<()> {
    let row = |metric: &str, unit, values: &[f64], peer: (&str, f64)| Row {
        peers: vec![(peer.0.to_owned(), peer.1)],
        ..row(case, format!("{way}, {metric}"), unit, values)
    };
    for (metric, rule, [ours, bound]) in [
        ("freeze", Some(Rule::constant(FREEZE_MS)), &seen.freeze),
        ("total", None, &seen.total),
        ("home again", Some(Rule::constant(FREEZE_MS)), &seen.home),
    ] {
        let bound = ("bound_copy", median(bound));
        let row = row(metric, "ms", ours, bound);
        report.add(Row { rule, bound: Some(bound.0.to_owned()), ..row })?;
    }
    for (metric, values) in
        [("home again, came", &seen.came), ("home again, changed", &seen.changed)]
    {
        let row = row(metric, "pages", values, ("dirtied", f64::from(DIRTY)));
        report.add(Row { rule: Some(Rule::above("dirtied", OTHERS)), ..row })?;
    }
    Ok(())
}
