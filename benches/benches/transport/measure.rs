//! The cases, round after round, and their rows.

use anyhow::{Context as _, Result};
use conet_benches::report::{Report, Row, Rule};
use conet_benches::stats::{median, spread};
use conet_transport::direct::Wait;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::time::{Duration, Instant};

use crate::Options;
use crate::ours::{Pair, Sealed};
use crate::raw;

/// Which processor calls and which answers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) client: usize,
    pub(crate) server: usize,
}

impl Place {
    fn pin(self) -> String {
        format!("client on processor {}, server on {}", self.client, self.server)
    }
}

/// Bytes of an answer.
pub(crate) fn answer_length(size: usize) -> usize {
    size.min(64)
}

/// Keeps the calling thread on a processor.
pub(crate) fn pin(processor: usize) {
    let mut set = CpuSet::new();
    set.set(processor);
    sched_setaffinity(None, &set).unwrap();
}

/// The times of one turn's calls, ns.
#[derive(Debug, Default)]
pub(crate) struct Turn(Vec<f64>);

impl Turn {
    /// Times `calls` calls, after a tenth as many that are not timed.
    pub(crate) fn of(calls: usize, mut call: impl FnMut() -> Result<()>) -> Result<Self> {
        for _ in 0..calls / 10 {
            call()?;
        }
        let mut times = Vec::with_capacity(calls);
        for _ in 0..calls {
            let start = Instant::now();
            call()?;
            times.push(start.elapsed().as_secs_f64() * 1e9);
        }
        Ok(Self(times))
    }
}

/// All times of one contender, and the median of each round.
#[derive(Debug, Default)]
struct Times {
    name: String,
    all: Vec<f64>,
    medians: Vec<f64>,
}

impl Times {
    fn add(&mut self, turn: Turn) {
        self.medians.push(median(&turn.0));
        self.all.extend(turn.0);
    }

    fn at(&self, share: f64) -> f64 {
        let mut sorted = self.all.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1);
        // As a share of a count: exact enough for an index.
        #[expect(clippy::cast_possible_truncation, reason = "a share of the length")]
        let at = (last as f64 * share) as usize;
        sorted.get(at).copied().unwrap_or(0.0)
    }
}

type Contender<'a> = (String, Box<dyn FnMut() -> Result<Turn> + 'a>);

/// Gives every contender a turn in every round, each round beginning with another.
fn interleave(rounds: usize, contenders: &mut [Contender<'_>]) -> Result<Vec<Times>> {
    let name = |(name, _): &Contender<'_>| Times { name: name.clone(), ..Times::default() };
    let mut times: Vec<Times> = contenders.iter().map(name).collect();
    for round in 0..rounds {
        for n in 0..contenders.len() {
            let n = (n + round) % contenders.len();
            let turn = contenders[n].1().with_context(|| contenders[n].0.clone())?;
            times[n].add(turn);
        }
    }
    Ok(times)
}

const SHARES: [(&str, f64); 3] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)];

/// The rows of one case: each of ours, at each share, beside the others.
fn rows(
    report: &mut Report,
    case: &str,
    how: &str,
    place: Place,
    times: &[Times],
    rule: impl Fn(&str) -> (Option<Rule>, Option<&'static str>),
) -> Result<()> {
    let is_ours = |times: &&Times| Sealed::ALL.iter().any(|sealed| sealed.name() == times.name);
    for ours in times.iter().filter(is_ours) {
        for (share_name, share) in SHARES {
            let others = times.iter().filter(|other| other.name != ours.name);
            let (rule, bound) = if share_name == "p50" { rule(&ours.name) } else { (None, None) };
            report.add(Row {
                case: case.to_owned(),
                metric: format!("{share_name}, {how}, {}", ours.name),
                unit: "ns",
                ours: ours.at(share),
                peers: others.map(|other| (other.name.clone(), other.at(share))).collect(),
                rule,
                bound: bound.map(str::to_owned),
                pin: place.pin(),
                runs: ours.medians.len(),
                spread: spread(&ours.medians),
            })?;
        }
    }
    Ok(())
}

fn ours<'a>(place: Place, size: usize, calls: usize, wait: Wait) -> Vec<Contender<'a>> {
    let there = Sealed::ALL.into_iter().filter(|sealed| sealed.is_there());
    there
        .map(|sealed| {
            let run = move || {
                let mut pair = Pair::start(place, sealed, wait)?;
                let turn = pair.calls(size, calls);
                pair.end()?;
                turn
            };
            (sealed.name().to_owned(), Box::new(run) as Box<dyn FnMut() -> Result<Turn>>)
        })
        .collect()
}

fn named<'a>(name: &str, run: impl FnMut() -> Result<Turn> + 'a) -> Contender<'a> {
    (name.to_owned(), Box::new(run))
}

/// Small calls, spinning over two processors and sleeping on one.
fn small(report: &mut Report, options: &Options, places: [Place; 2]) -> Result<()> {
    let calls = if options.is_test { 50 } else { 2000 };
    let [apart, together] = places;
    if options.wants("call 64 B, spinning") && apart.client != apart.server {
        report.progress("call 64 B, spinning");
        let mut all = ours(apart, 64, calls, Wait::Spin);
        all.push(named("udp_spin", || raw::udp(apart, 64, calls, true)));
        all.push(named("tcp_nodelay", || raw::tcp(apart, 64, calls)));
        let times = interleave(options.rounds, &mut all)?;
        rows(report, "call 64 B", "spinning", apart, &times, |name| match name {
            "plain" => (Some(Rule::above("udp_spin", 500.0)), Some("udp_spin")),
            "aes" => (Some(Rule::above("udp_spin", 800.0)), Some("udp_spin")),
            _ => (None, Some("udp_spin")),
        })?;
    }
    for (how, wait) in [("blocking", Wait::Block), ("adaptive", Wait::Adaptive)] {
        let case = format!("call 64 B, {how} on one processor");
        if !options.wants(&case) {
            continue;
        }
        report.progress(&case);
        let mut all = ours(together, 64, calls, wait);
        all.push(named("udp_block", || raw::udp(together, 64, calls, false)));
        all.push(named("tcp_nodelay", || raw::tcp(together, 64, calls)));
        all.push(named("unix", || raw::unix(together, 64, calls)));
        let times = interleave(options.rounds, &mut all)?;
        let how = format!("{how} on one processor");
        rows(report, "call 64 B", &how, together, &times, |_| {
            (Some(Rule::times(1.25, "udp_block")), Some("udp_block"))
        })?;
    }
    Ok(())
}

/// Larger payloads beside streams.
fn large(report: &mut Report, options: &Options, place: Place) -> Result<()> {
    for (name, size, calls) in
        [("call 4 KiB", 4096, 500), ("call 64 KiB", 65_536, 100), ("call 1 MiB", 1 << 20, 20)]
    {
        if !options.wants(name) {
            continue;
        }
        report.progress(name);
        let calls = if options.is_test { 5 } else { calls };
        let mut all = ours(place, size, calls, Wait::Adaptive);
        all.push(named("tcp_nodelay", || raw::tcp(place, size, calls)));
        all.push(named("unix", || raw::unix(place, size, calls)));
        let times = interleave(options.rounds, &mut all)?;
        rows(report, name, "adaptive", place, &times, |_| (None, None))?;
    }
    Ok(())
}

/// Eight dependent calls beside one, and one beside saturating bulk.
fn rows_and_bulk(report: &mut Report, options: &Options, place: Place) -> Result<()> {
    let calls = if options.is_test { 20 } else { 1000 };
    if options.wants("chain of 8") {
        report.progress("chain of 8");
        let run = |row: bool| {
            move || {
                let mut pair = Pair::start(place, Sealed::Plain, Wait::Adaptive)?;
                let turn =
                    if row { Turn::of(calls, || pair.row(64)) } else { pair.calls(64, calls) };
                pair.end()?;
                turn
            }
        };
        let mut all = vec![named("plain", run(true)), named("one_call", run(false))];
        let times = interleave(options.rounds, &mut all)?;
        rows(report, "chain of 8", "adaptive", place, &times, |_| {
            (Some(Rule::times(1.3, "one_call")), None)
        })?;
    }
    if options.wants("call beside bulk") {
        report.progress("call beside bulk");
        let run = |bulk: bool| {
            move || {
                let mut pair = Pair::start(place, Sealed::Plain, Wait::Adaptive)?;
                let turn = if bulk { pair.calls_beside_bulk(calls) } else { pair.calls(64, calls) };
                pair.end()?;
                turn
            }
        };
        let mut all = vec![named("plain", run(true)), named("idle", run(false))];
        let times = interleave(options.rounds, &mut all)?;
        rows(report, "call beside bulk", "adaptive", place, &times, |_| {
            (Some(Rule::times(2.0, "idle")), None)
        })?;
    }
    Ok(())
}

/// Time that 8 Gbit take in large calls, beside TCP: smaller is better, so that the rule
/// is an upper limit like the others.
fn bulk(report: &mut Report, options: &Options, place: Place) -> Result<()> {
    if !options.wants("bulk") {
        return Ok(());
    }
    report.progress("bulk");
    let time = Duration::from_millis(if options.is_test { 50 } else { 400 });
    let per_gigabyte = |(bytes, took): (u64, Duration)| took.as_secs_f64() * 1e12 / bytes as f64;
    let (mut tcp, mut by_seal) = (Vec::new(), vec![Vec::new(); Sealed::ALL.len()]);
    for _ in 0..options.rounds.div_ceil(3) {
        tcp.push(per_gigabyte(raw::tcp_bulk(place, time)?));
        for (sealed, times) in Sealed::ALL.into_iter().zip(&mut by_seal) {
            if sealed.is_there() {
                let mut pair = Pair::start(place, sealed, Wait::Adaptive)?;
                times.push(per_gigabyte(pair.bulk(time)?));
                pair.end()?;
            }
        }
    }
    for (sealed, times) in Sealed::ALL.into_iter().zip(&by_seal).filter(|(_, t)| !t.is_empty()) {
        report.add(Row {
            case: "bulk".to_owned(),
            metric: format!("ms per GB, {}", sealed.name()),
            unit: "ms",
            ours: median(times),
            peers: vec![("tcp".to_owned(), median(&tcp))],
            rule: Some(Rule::times(1.0, "tcp")),
            bound: None,
            pin: place.pin(),
            runs: times.len(),
            spread: spread(times),
        })?;
    }
    Ok(())
}

impl Options {
    fn wants(&self, case: &str) -> bool {
        self.case.as_ref().is_none_or(|wanted| case.contains(wanted))
    }
}

/// Everything.
pub(crate) fn run(options: &Options) -> Result<()> {
    let set = sched_getaffinity(None)?;
    let mut all = (0..CpuSet::MAX_CPU).filter(|processor| set.is_set(*processor));
    let one = all.next().context("no processor")?;
    let two = all.next().unwrap_or(one);
    let mut report = Report::new("transport", options.format);
    if one == two {
        report.note("one processor only: nothing is measured across processors");
    }
    report.note("not measured, and so not beaten: quinn-proto, quinn, tarpc, shared memory");
    let (apart, together) =
        (Place { client: one, server: two }, Place { client: one, server: one });
    small(&mut report, options, [apart, together])?;
    large(&mut report, options, apart)?;
    rows_and_bulk(&mut report, options, apart)?;
    bulk(&mut report, options, apart)?;
    report.finish()?;
    Ok(())
}
