//! Turns, rounds and rows: how each case is measured.

use anyhow::{Context as _, Result};
use conet_benches::report::{Report, Row, Rule};
use conet_benches::stats::{median, spread};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::time::Instant;

use crate::Options;

/// Which processor calls and which answers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) client: usize,
    pub(crate) server: usize,
}

impl Place {
    pub(crate) fn pin(self) -> String {
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
pub(crate) struct Turn(pub(crate) Vec<f64>);

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
pub(crate) struct Times {
    pub(crate) name: String,
    pub(crate) all: Vec<f64>,
    pub(crate) medians: Vec<f64>,
}

impl Times {
    pub(crate) fn add(&mut self, turn: Turn) {
        self.medians.push(median(&turn.0));
        self.all.extend(turn.0);
    }

    pub(crate) fn at(&self, share: f64) -> f64 {
        let mut sorted = self.all.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1);
        // As a share of a count: exact enough for an index.
        #[expect(clippy::cast_possible_truncation, reason = "a share of the length")]
        let at = (last as f64 * share) as usize;
        sorted.get(at).copied().unwrap_or(0.0)
    }
}

pub(crate) type Contender<'a> = (String, Box<dyn FnMut() -> Result<Turn> + 'a>);

/// Gives every contender a turn in every round, each round beginning with another.
pub(crate) fn interleave(
    options: &Options,
    contenders: &mut Vec<Contender<'_>>,
) -> Result<Vec<Times>> {
    if let Some(only) = &options.only {
        contenders.retain(|(name, _)| only.split(',').any(|only| only == name));
    }
    let rounds = options.rounds;
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

/// A rule for one of ours: its name, the share that it is about, and the rule.
pub(crate) type Ruled = (&'static str, &'static str, Rule);

/// What the rows of one case have in common.
#[derive(Debug)]
pub(crate) struct Case<'a> {
    pub(crate) name: &'a str,
    pub(crate) how: &'a str,
    pub(crate) place: Place,
    /// Who of the contenders are ours.
    pub(crate) ours: &'a [&'a str],
    /// Of each of ours, the peer that is the least possible.
    pub(crate) bounds: &'a [(&'a str, &'a str)],
}

impl Case<'_> {
    /// The rows: each of ours, at each share, beside the others; a row more for each
    /// further rule.
    pub(crate) fn report(
        &self,
        report: &mut Report,
        times: &[Times],
        rules: &[Ruled],
    ) -> Result<()> {
        for ours in times.iter().filter(|times| self.ours.contains(&&*times.name)) {
            for (share_name, share) in SHARES {
                let is_about = |rule: &&Ruled| rule.0 == ours.name && rule.1 == share_name;
                let mut rules: Vec<_> =
                    rules.iter().filter(is_about).map(|rule| Some(rule.2.clone())).collect();
                if rules.is_empty() {
                    rules.push(None);
                }
                for rule in rules {
                    let others = times.iter().filter(|other| other.name != ours.name);
                    let bound = self.bounds.iter().find(|(name, _)| *name == ours.name);
                    let bound = bound.filter(|_| share_name == "p50");
                    report.add(Row {
                        case: self.name.to_owned(),
                        metric: format!("{share_name}, {}, {}", self.how, ours.name),
                        unit: "ns",
                        ours: ours.at(share),
                        peers: others.map(|other| (other.name.clone(), other.at(share))).collect(),
                        rule,
                        bound: bound.map(|(_, bound)| (*bound).to_owned()),
                        pin: self.place.pin(),
                        runs: ours.medians.len(),
                        spread: spread(&ours.medians),
                    })?;
                }
            }
        }
        Ok(())
    }
}

/// A contender that gives turns.
pub(crate) fn named<'a>(name: &str, run: impl FnMut() -> Result<Turn> + 'a) -> Contender<'a> {
    (name.to_owned(), Box::new(run))
}
