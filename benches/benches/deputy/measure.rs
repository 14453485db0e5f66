//! The run: which cases, in which lanes, against which rules.

use crate::Options;
use crate::lanes::{Kind, Lane, Placement};
use crate::peers::conn::Wait;
use crate::work::Op;
use crate::{moves, peers};
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
/// Calls that are made where the program is.
const LOCAL: [Op; 8] = [
    Op::Munmap,
    Op::Mprotect,
    Op::Madvise,
    Op::Brk,
    Op::MmapAnonymous,
    Op::FutexWake,
    Op::SchedYield,
    Op::Sigprocmask,
];
/// What the vDSO answers.
const CLOCKS: [Op; 5] = [Op::ClockGettime, Op::Gettimeofday, Op::Time, Op::Getcpu, Op::ClockGetres];
/// Figure of a forwarded call on one processor, in the clear.
const PLAIN_NS: f64 = 8000.0;
/// What AES-GCM may add to it.
const SEALED_NS: f64 = 1000.0;

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
    /// What `ours` is shown beside: peers, and where it is sealed, the same in the clear.
    fn peers(&self, ours: Kind) -> Vec<(String, f64)> {
        let others = self.lanes.iter().filter(|(kind, _)| match kind {
            Kind::Moved(cipher) => *cipher == Cipher::Plain && ours != *kind,
            _ => true,
        });
        others.map(|(kind, times)| (kind.name().to_owned(), median(times))).collect()
    }
}

/// How many of an operation take about a batch's time. Asked more than once, since the
/// first calls find nothing in caches, and how to wait is learnt.
fn count_of(lane: &mut Lane, op: Op, at: Placement) -> Result<u64> {
    const TRIALS: u32 = 3;
    const LEAST: u64 = 8;
    let mut count = LEAST;
    for _ in 0..TRIALS {
        let took = lane.run(op, count, at)?.as_nanos().max(1);
        count = u64::try_from(BATCH_NS * u128::from(count) / took)?.clamp(LEAST, 20_000);
    }
    Ok(count)
}

/// Goes round the lanes.
fn interleaved(lanes: &mut [Lane], op: Op, at: Placement, rounds: u32) -> Result<Times> {
    let mut counts = Vec::new();
    let mut times = Vec::new();
    for lane in &mut *lanes {
        times.push((lane.kind, Vec::new()));
        counts.push(if lane.kind.is_for(at) { count_of(lane, op, at)? } else { 0 });
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

/// What a row is judged by: its rule, and the peer that is its bound.
type Judged = (Option<Rule>, Option<&'static str>);

/// One row for each way of ours.
fn rows(
    report: &mut Report,
    op: Op,
    at: Placement,
    times: &Times,
    judge: impl Fn(Kind, Op, Placement) -> Judged,
) -> Result<()> {
    for (kind, own) in times.lanes.iter().filter(|(kind, _)| matches!(kind, Kind::Moved(_))) {
        let (rule, bound) = judge(*kind, op, at);
        report.add(Row {
            case: op.name(),
            metric: format!("{}, {}", at.name(), kind.name()),
            unit: "ns",
            ours: median(own),
            peers: times.peers(*kind),
            rule,
            bound: bound.map(str::to_owned),
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
    judge: impl Fn(Kind, Op, Placement) -> Judged,
) -> Result<()> {
    let mut lanes = Vec::new();
    for (op, at, what) in cases.filter(|(_, _, what)| options.wants(what)) {
        report.progress(&what);
        if lanes.is_empty() {
            for kind in kinds.iter().filter(|kind| options.has(kind.name())) {
                match Lane::start(*kind) {
                    Ok(lane) => lanes.push(lane),
                    Err(error) if matches!(kind, Kind::Moved(_) | Kind::Native) => {
                        return Err(error);
                    }
                    // Rules over it are neither met nor missed.
                    Err(error) => report.note(&format!("not measured: {error:#}")),
                }
            }
        }
        let times = interleaved(&mut lanes, op, at, options.rounds)?;
        rows(report, op, at, &times, &judge)?;
    }
    Ok(())
}

/// Forwarded calls: the time, and what bounds it. The processes are new for each place:
/// how to wait is learnt, and what one place has taught is wrong at the other.
fn forwarded(report: &mut Report, options: &Options, ops: &[Op], at: Placement) -> Result<()> {
    let kinds = [
        Kind::Moved(Cipher::Plain),
        Kind::Moved(Cipher::Aes128Gcm),
        Kind::Native,
        Kind::Tcp(Wait::Block),
        Kind::Tcp(Wait::Spin),
        Kind::Bound { sealed: false, wait: Wait::Block },
        Kind::Bound { sealed: true, wait: Wait::Block },
        Kind::Bound { sealed: false, wait: Wait::Spin },
        Kind::Bound { sealed: true, wait: Wait::Spin },
        Kind::PtraceInject,
        Kind::PtraceForward,
        Kind::SeccompNotify,
    ];
    let named = ops.iter().map(|op| (*op, at, format!("{}, {}", op.name(), at.name())));
    cases(report, options, &kinds, named, |kind, _, at| {
        let is_plain = kind == Kind::Moved(Cipher::Plain);
        let rule = if at.caller != at.server {
            Rule::times(1.25, "tcp_nodelay")
        } else if is_plain {
            Rule::constant(PLAIN_NS)
        } else {
            Rule::above("plain", SEALED_NS)
        };
        // Ours asks before it blocks, and so does what bounds it where that helps.
        let bound = match (at.caller == at.server, is_plain) {
            (true, true) => "bound_plain",
            (true, false) => "bound",
            (false, true) => "bound_plain_spin",
            (false, false) => "bound_spin",
        };
        (Some(rule), Some(bound))
    })
}

/// Calls that a process makes where it is.
fn local(report: &mut Report, options: &Options, ops: &[Op], at: Placement) -> Result<()> {
    let kinds = [Kind::Moved(Cipher::preferred()), Kind::Native, Kind::Filtered, Kind::Trapped];
    let named = ops.iter().map(|op| (*op, at, format!("{}, away", op.name())));
    cases(report, options, &kinds, named, |_, op, _| {
        // Where home may have a file, home must hear of it; the mask of signals is home's.
        let is_looked_at = matches!(op, Op::Munmap | Op::Madvise | Op::Sigprocmask);
        let bound = if is_looked_at { "bound_trap" } else { "bound_filter" };
        (Some(Rule::times(1.1, "native")), Some(bound))
    })
}

/// Home's clock, read away.
fn clocks(report: &mut Report, options: &Options, ops: &[Op], at: Placement) -> Result<()> {
    let kinds = [Kind::Moved(Cipher::preferred()), Kind::Native, Kind::Clocks];
    let named = ops.iter().map(|op| (*op, at, format!("{}, away", op.name())));
    cases(report, options, &kinds, named, |_, op, _| {
        let factor = if op == Op::ClockGettime { 1.0 } else { 1.1 };
        (Some(Rule::times(factor, "native")), Some("bound_vdso"))
    })
}

/// Everything, or, as a test, a little of each.
pub(crate) fn run(options: &Options) -> Result<()> {
    let [one, two] = processors()?;
    let mut places = vec![Placement { caller: one, server: one }];
    let mut report = Report::new("deputy", options.format);
    peers::name_versions(&mut report);
    if one == two {
        report.note("one processor only: nothing is measured across processors");
    } else {
        places.push(Placement { caller: one, server: two });
    }
    let (ops, locals, clock) = if options.is_test {
        (&[Op::Getppid, Op::Read(4096)][..], &LOCAL[..1], &CLOCKS[..1])
    } else {
        (&FORWARDED[..], &LOCAL[..], &CLOCKS[..])
    };
    for at in &places {
        forwarded(&mut report, options, ops, *at)?;
    }
    local(&mut report, options, locals, places[0])?;
    clocks(&mut report, options, clock, places[0])?;
    moves::run(&mut report, options)?;
    report.finish()?;
    Ok(())
}
