//! The run: which cases, in which lanes, against which rules.

use crate::Options;
use crate::lanes::{Kind, Lane, Placement};
use crate::moves;
use crate::peers::conn::Wait;
use crate::work::Op;
use anyhow::{Context as _, Result};
use conet_benches::report::{Report, Row, Rule};
use conet_benches::stats::{median, spread};
use conet_transport::session::protect::Cipher;
use rustix::thread::{CpuSet, sched_getaffinity};

/// What a batch should take, in nanoseconds.
const BATCH_NS: u128 = 1_500_000;

const FORWARDED: [Op; 7] = [
    Op::Getppid,
    Op::Write(16),
    Op::Write(4096),
    Op::Write(65536),
    Op::Read(16),
    Op::Read(4096),
    Op::Read(65536),
];
const LOCAL: [Op; 13] = [
    Op::Munmap,
    Op::Mprotect,
    Op::Madvise,
    Op::Brk,
    Op::MmapAnonymous,
    Op::FutexWake,
    Op::SchedYield,
    Op::Sigprocmask,
    Op::ClockGettime,
    Op::Gettimeofday,
    Op::Time,
    Op::Getcpu,
    Op::ClockGetres,
];

/// The first two processors that this process may use; one twice where there is one.
fn processors() -> Result<[usize; 2]> {
    let set = sched_getaffinity(None)?;
    let mut all = (0..CpuSet::MAX_CPU).filter(|processor| set.is_set(*processor));
    let first = all.next().context("no processor")?;
    Ok([first, all.next().unwrap_or(first)])
}

/// Times of one operation at one place, in nanoseconds, by lane.
struct Times {
    lanes: Vec<(Kind, Vec<f64>)>,
}

impl Times {
    fn peers(&self) -> Vec<(String, f64)> {
        let others = self.lanes.iter().filter(|(kind, _)| !matches!(kind, Kind::Moved(_)));
        others.map(|(kind, times)| (kind.name().to_owned(), median(times))).collect()
    }
}

/// Goes round the lanes.
fn interleaved(lanes: &mut [Lane], op: Op, at: Placement, rounds: u32) -> Result<Times> {
    const TRIAL: u64 = 8;
    let mut counts = Vec::new();
    let mut times = Vec::new();
    for lane in &mut *lanes {
        times.push((lane.kind, Vec::new()));
        let mut count = 0;
        if lane.kind.is_for(at) {
            let took = lane.run(op, TRIAL, at)?.as_nanos().max(1);
            count = u64::try_from(BATCH_NS * u128::from(TRIAL) / took)?.clamp(TRIAL, 20_000);
        }
        counts.push(count);
    }
    for round in 0..rounds {
        for i in 0..lanes.len() {
            // Each round begins with another one.
            let i = (i + round as usize) % lanes.len();
            if counts[i] > 0 {
                let took = lanes[i].run(op, counts[i], at)?;
                times[i].1.push(took.as_secs_f64() * 1e9 / counts[i] as f64);
            }
        }
    }
    times.retain(|(_, times)| !times.is_empty());
    Ok(Times { lanes: times })
}

/// One row for each way of ours.
fn rows(
    report: &mut Report,
    op: Op,
    at: Placement,
    times: &Times,
    rule: impl Fn(Op, Placement) -> Option<Rule>,
) -> Result<()> {
    for (kind, own) in times.lanes.iter().filter(|(kind, _)| matches!(kind, Kind::Moved(_))) {
        report.add(Row {
            case: op.name(),
            metric: format!("{}, {}", at.name(), kind.name()),
            unit: "ns",
            ours: median(own),
            peers: times.peers(),
            rule: rule(op, at),
            pin: at.pin(),
            runs: own.len(),
            spread: spread(own),
        })?;
    }
    Ok(())
}

/// Does the cases that are wanted, in the lanes that are wanted, which are started only
/// if there is a case.
fn cases(
    report: &mut Report,
    options: &Options,
    kinds: &[Kind],
    cases: impl Iterator<Item = (Op, Placement, String)>,
    rule: impl Fn(Op, Placement) -> Option<Rule>,
) -> Result<()> {
    let mut lanes = Vec::new();
    for (op, at, what) in cases.filter(|(_, _, what)| options.wants(what)) {
        report.progress(&what);
        if lanes.is_empty() {
            for kind in kinds.iter().filter(|kind| options.has(kind.name())) {
                lanes.push(Lane::start(*kind)?);
            }
        }
        let times = interleaved(&mut lanes, op, at, options.rounds)?;
        rows(report, op, at, &times, &rule)?;
    }
    Ok(())
}

/// Forwarded calls: the time, and what bounds it. The processes are new for each place:
/// how to wait is learnt, and what one place has taught is wrong at the other.
fn forwarded(report: &mut Report, options: &Options, ops: &[Op], at: Placement) -> Result<()> {
    let kinds = [
        Kind::Moved(Cipher::Aes128Gcm),
        Kind::Native,
        Kind::Tcp(Wait::Block),
        Kind::Tcp(Wait::Spin),
        Kind::Bound { sealed: false, wait: Wait::Block },
        Kind::Bound { sealed: true, wait: Wait::Block },
        Kind::Bound { sealed: true, wait: Wait::Spin },
        Kind::PtraceInject,
        Kind::PtraceForward,
        Kind::SeccompNotify,
    ];
    let named = ops.iter().map(|op| (*op, at, format!("{}, {}", op.name(), at.name())));
    cases(report, options, &kinds, named, |op, at| {
        if at.caller != at.server {
            return Some(Rule::times(1.25, "tcp"));
        }
        // The figure, 8 µs in plain and 1 µs for the cipher, is for calls without bulk.
        matches!(op, Op::Getppid | Op::Write(16) | Op::Read(16)).then(|| Rule::constant(9000.0))
    })
}

/// Calls that a process makes where it is.
fn local(report: &mut Report, options: &Options, ops: &[Op], at: Placement) -> Result<()> {
    let kinds = [Kind::Moved(Cipher::preferred()), Kind::Native, Kind::Filtered, Kind::Trapped];
    let named = ops.iter().map(|op| (*op, at, format!("{}, away", op.name())));
    cases(report, options, &kinds, named, |op, _| {
        let factor = if matches!(op, Op::ClockGettime) { 1.0 } else { 1.1 };
        Some(Rule::times(factor, "native"))
    })
}

/// Everything, or, as a test, a little of each.
pub(crate) fn run(options: &Options) -> Result<()> {
    let [one, two] = processors()?;
    let mut places = vec![Placement { caller: one, server: one }];
    let mut report = Report::new("deputy", options.format);
    if one == two {
        report.note("one processor only: nothing is measured across processors");
    } else {
        places.push(Placement { caller: one, server: two });
    }
    let (ops, locals) = if options.is_test {
        (&[Op::Getppid, Op::Read(4096)][..], &[Op::Munmap, Op::ClockGettime][..])
    } else {
        (&FORWARDED[..], &LOCAL[..])
    };
    for at in &places {
        forwarded(&mut report, options, ops, *at)?;
    }
    local(&mut report, options, locals, places[0])?;
    moves::run(&mut report, options)?;
    report.finish()?;
    Ok(())
}
