//! The run: which cases, in which lanes, against which rules.

use crate::Options;
use crate::lanes::{Kind, Lane, Placement};
use crate::peers::conn::Wait;
use crate::work::Op;
use anyhow::{Context as _, Result};
use conet_benches::report::{Report, Row, Rule};
use conet_benches::stats::{median, spread};
use conet_transport::session::protect::Cipher;
use rustix::thread::{CpuSet, sched_getaffinity};

/// What a batch should take.
const BATCH_NS: f64 = 1.5e6;

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
    let mut counts = Vec::new();
    let mut times = Vec::new();
    for lane in &mut *lanes {
        times.push((lane.kind, Vec::new()));
        let ns = if lane.kind.is_for(at) { lane.run(op, 8, at)? } else { 1.0 };
        counts.push((BATCH_NS / ns).clamp(8.0, 20_000.0) as u64);
    }
    for round in 0..rounds {
        for i in 0..lanes.len() {
            // Each round begins with another one.
            let i = (i + round as usize) % lanes.len();
            if lanes[i].kind.is_for(at) {
                times[i].1.push(lanes[i].run(op, counts[i], at)?);
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
    rule: impl Fn(Kind) -> Option<Rule>,
) -> Result<()> {
    for (kind, own) in times.lanes.iter().filter(|(kind, _)| matches!(kind, Kind::Moved(_))) {
        report.add(Row {
            case: op.name(),
            metric: format!("{}, {}", at.name(), kind.name()),
            unit: "ns",
            ours: median(own),
            peers: times.peers(),
            rule: rule(*kind),
            pin: at.pin(),
            runs: own.len(),
            spread: spread(own),
        })?;
    }
    Ok(())
}

/// Starts those lanes that are wanted.
fn start(options: &Options, kinds: impl IntoIterator<Item = Kind>) -> Result<Vec<Lane>> {
    kinds.into_iter().filter(|kind| options.has(kind.name())).map(Lane::start).collect()
}

/// Forwarded calls: the time, and what bounds it.
fn forwarded(
    report: &mut Report,
    options: &Options,
    ops: &[Op],
    places: &[Placement],
) -> Result<()> {
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
    let mut lanes = start(options, kinds)?;
    for at in places {
        for op in ops {
            let what = format!("{}, {}", op.name(), at.name());
            if !options.wants(&what) {
                continue;
            }
            report.progress(&what);
            let times = interleaved(&mut lanes, *op, *at, options.rounds)?;
            rows(report, *op, *at, &times, |_| {
                if at.caller != at.server {
                    return Some(Rule::times(1.25, "tcp"));
                }
                // The figure is for calls without bulk.
                matches!(op, Op::Getppid | Op::Write(16) | Op::Read(16))
                    .then(|| Rule::constant(9000.0))
            })?;
        }
    }
    Ok(())
}

/// Calls that a process makes where it is.
fn local(report: &mut Report, options: &Options, ops: &[Op], at: Placement) -> Result<()> {
    let kinds = [Kind::Moved(Cipher::preferred()), Kind::Native, Kind::Filtered, Kind::Trapped];
    let mut lanes = start(options, kinds)?;
    for op in ops {
        let what = format!("{}, away", op.name());
        if !options.wants(&what) {
            continue;
        }
        report.progress(&what);
        let times = interleaved(&mut lanes, *op, at, options.rounds)?;
        rows(report, *op, at, &times, |_| Some(Rule::times(1.1, "native")))?;
    }
    Ok(())
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
    forwarded(&mut report, options, ops, &places)?;
    local(&mut report, options, locals, places[0])?;
    report.finish()?;
    Ok(())
}
