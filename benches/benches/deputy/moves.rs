//! Moves of programs of several sizes: how long they stand still, how long it takes,
//! and what comes home.
//!
//! The program has so much memory, every page of it written with bytes that do not
//! repeat, and waits. It moves out, changes a few pages, comes home. The freeze is the
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
use anyhow::{Result, bail};
use conet_benches::report::{Report, Row, Rule};
use conet_benches::stats::{median, spread};
use conet_transport::session::protect::Cipher;
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
    pub(crate) fn area(&self) -> Area {
        let at = (self.bytes.as_ptr() as u64).next_multiple_of(PAGE as u64);
        Area { at, pages: (self.bytes.len() / PAGE - 1) as u64 }
    }
}

impl Caller for Memory {
    fn repeat(&mut self, op: Op, count: u64) -> Result<Duration> {
        let Op::Dirty(pages) = op else { bail!("this program only has memory") };
        let begin = Instant::now();
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

    fn hop(&mut self, seen: &mut Seen) -> Result<()> {
        let pid = self.program.pid()?;
        let away = self.node.take(pid, Cipher::preferred())?;
        self.program.run(Batch { op: Op::Dirty(DIRTY), count: 1 })?;
        let home = away.bring_home(pid)?;
        let moved = &away.moved;
        let copy = |pages| self.copier.copy(pid, self.area, pages).map(ms);
        for (times, ours, bound) in [
            (&mut seen.freeze, moved.freeze, copy(moved.pages)?),
            (&mut seen.total, moved.total, copy(moved.pages)?),
            (&mut seen.home, home.total, copy(home.pages)?),
        ] {
            times[0].push(ms(ours));
            times[1].push(bound);
        }
        seen.came.push(home.pages as f64);
        seen.changed.push(home.changed as f64);
        Ok(())
    }
}

/// The sizes in MiB, and how often each is moved.
const SIZES: [(usize, u32); 3] = [(8, 21), (256, 9), (2048, 3)];

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
        let mut seen = Seen::default();
        for _ in 0..rounds {
            moving.hop(&mut seen)?;
        }
        add(report, &case, "stop-and-copy", &seen)?;
    }
    Ok(())
}

fn add(report: &mut Report, case: &str, way: &str, seen: &Seen) -> Result<()> {
    let row = |metric: &str, unit, values: &[f64], peer: (&str, f64)| Row {
        case: case.to_owned(),
        metric: format!("{way}, {metric}"),
        unit,
        ours: median(values),
        peers: vec![(peer.0.to_owned(), peer.1)],
        rule: None,
        bound: None,
        pin: "moves: unpinned".to_owned(),
        runs: values.len(),
        spread: spread(values),
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
