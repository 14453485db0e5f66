//! Moves of programs of several sizes: how long they stand still, how long it takes,
//! and what comes home.
//!
//! The program has so much memory, every page of it written with bytes that do not
//! repeat, and waits. It moves out, changes a few pages, comes home. The freeze is the
//! mover's: from before the program is stopped until its other half may run.

use crate::Options;
use crate::lanes::Role;
use crate::moved::Node;
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

/// What was seen of one size.
#[derive(Default)]
struct Seen {
    freeze: Vec<f64>,
    total: Vec<f64>,
    home: Vec<f64>,
    came: Vec<f64>,
    changed: Vec<f64>,
}

fn hop(program: &mut Role, node: &mut Node, seen: &mut Seen) -> Result<()> {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let away = node.take(program.pid()?, Cipher::preferred())?;
    seen.freeze.push(ms(away.moved.freeze));
    seen.total.push(ms(away.moved.total));
    program.run(Batch { op: Op::Dirty(DIRTY), count: 1 })?;
    let home = away.bring_home(program.pid()?)?;
    seen.home.push(ms(home.total));
    seen.came.push(home.pages as f64);
    seen.changed.push(home.changed as f64);
    Ok(())
}

/// The sizes in MiB, and how often each is moved.
const SIZES: [(usize, u32); 3] = [(8, 21), (256, 9), (2048, 3)];

pub(crate) fn run(report: &mut Report, options: &Options) -> Result<()> {
    for (mib, rounds) in SIZES {
        let case = if mib < 1024 { format!("{mib} MB") } else { format!("{} GB", mib / 1024) };
        if !options.wants(&format!("move {case}")) || options.is_test && mib > 8 {
            continue;
        }
        let rounds = if options.is_test { 2 } else { rounds };
        report.progress(&format!("move {case}, stop-and-copy"));
        let mut program = Role::start(&["memory", &mib.to_string()])?;
        let mut node = Node::new()?;
        let mut seen = Seen::default();
        for _ in 0..rounds {
            hop(&mut program, &mut node, &mut seen)?;
        }
        add(report, &case, &seen)?;
    }
    Ok(())
}

fn add(report: &mut Report, case: &str, seen: &Seen) -> Result<()> {
    let dirtied = vec![("dirtied".to_owned(), f64::from(DIRTY))];
    let few = || Rule::above("dirtied", OTHERS);
    let freeze = (case == "256 MB").then(|| Rule::constant(5.0));
    for (metric, unit, values, peers, rule) in [
        ("freeze, stop-and-copy", "ms", &seen.freeze, vec![], freeze),
        ("total, stop-and-copy", "ms", &seen.total, vec![], None),
        ("home again, total", "ms", &seen.home, vec![], None),
        ("home again, came", "pages", &seen.came, dirtied.clone(), Some(few())),
        ("home again, changed", "pages", &seen.changed, dirtied, Some(few())),
    ] {
        report.add(Row {
            case: format!("move {case}"),
            metric: metric.to_owned(),
            unit,
            ours: median(values),
            peers,
            rule,
            bound: None,
            pin: "unpinned".to_owned(),
            runs: values.len(),
            spread: spread(values),
        })?;
    }
    Ok(())
}
