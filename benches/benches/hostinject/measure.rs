//! The run: which cases, in which lanes, against which rules.

use std::time::Duration;

use anyhow::Result;
use conet_benches::report::{Report, Row, Rule};
use conet_benches::stats::{median, spread};

use crate::Options;
use crate::kind::Kind;
use crate::lane::Lane;
use crate::traffic::{Flow, echo, flood, ping, tcp, within};
use crate::{counts, crowd};

const PING: &str = "ping";
const ECHO: &str = "udp echo";
const TO: &str = "tcp to the guest";
const FROM: &str = "tcp from the guest";
const FLOOD_TO: &str = "udp, 64 B packets, to the guest";
const FLOOD_FROM: &str = "udp, 64 B packets, from the guest";
const CASES: [&str; 6] = [PING, ECHO, TO, FROM, FLOOD_TO, FLOOD_FROM];

/// How round trips are pinned.
pub(crate) const ONE: &str = "all of a lane on processor 0";
/// How all else is.
pub(crate) const APART: &str = "the guest on processor 1, all else on 0";

/// A stream of the guest's to itself: what its kernel does without a card, both ends of it
/// on its one processor.
const LOOP: &str = "uml-loop";

/// Round trips of one round.
const TRIPS: u16 = 500;
/// Those of before, which are not counted: neighbours are asked for, processes wake up.
const WARM: u16 = 20;
const PATIENCE: Duration = Duration::from_secs(1);

/// Measurements of one lane in one case, by metric.
type Values = Vec<(&'static str, Vec<f64>)>;

fn unit(metric: &str) -> &'static str {
    match metric {
        "p50" | "p99" => "us",
        "throughput" => "Mb/s",
        "packets" => "1/s",
        "CPU" => "s/GB",
        _ => "ns",
    }
}

/// Whether it measures round trips, which is done on one processor.
fn is_trips(case: &str) -> bool {
    matches!(case, PING | ECHO)
}

fn trips(mut times: Vec<f64>) -> Vec<(&'static str, f64)> {
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times.get(times.len() * percent / 100).copied();
    [("p50", at(50)), ("p99", at(99))]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
}

fn stream(flow: &Flow) -> Vec<(&'static str, f64)> {
    vec![("throughput", flow.bytes * 8e-6 / flow.elapsed), ("CPU", flow.cpu / (flow.bytes / 1e9))]
}

fn packets(flow: &Flow) -> Vec<(&'static str, f64)> {
    vec![("packets", flow.packets / flow.elapsed), ("CPU a packet", flow.cpu * 1e9 / flow.packets)]
}

fn once(case: &str, lane: &Lane, options: &Options) -> Result<Vec<(&'static str, f64)>> {
    let duration = options.duration;
    let _pinned = if is_trips(case) { lane.on_one_processor() } else { lane.with_guest_apart() };
    let count = if options.is_smoke { 20 } else { TRIPS };
    Ok(match case {
        PING => {
            ping(lane, WARM, PATIENCE)?;
            trips(ping(lane, count, PATIENCE)?)
        }
        ECHO => {
            echo(lane, WARM, PATIENCE)?;
            trips(echo(lane, count, PATIENCE)?)
        }
        TO | FROM => stream(&tcp(lane, case == TO, duration)?),
        _ => packets(&flood(lane, case == FLOOD_TO, duration)?),
    })
}

/// What a lane of ours should be, by the figures that the project is built to.
fn rules(case: &str, metric: &str, kind: Kind) -> Vec<Rule> {
    match (kind, case, metric) {
        (Kind::Netns, PING, "p50") => {
            vec![Rule::times(1.0, "bridge"), Rule::times(0.333, "replica")]
        }
        (Kind::NetnsPair, PING, "p50") => vec![Rule::times(1.0, "bridge-pair")],
        (Kind::Netns, TO | FROM, "throughput") => vec![Rule::at_least(3.0, "replica")],
        (Kind::UmlVhost, TO | FROM, "throughput") => {
            vec![Rule::at_least(10.0, "passt"), Rule::at_least(1.0, "uml-tap")]
        }
        _ => vec![],
    }
}

/// One case: rounds over all lanes, each beginning with another.
fn case(report: &mut Report, options: &Options, case: &str, lanes: &[Lane]) -> Result<()> {
    report.progress(case);
    let mut values: Vec<Values> = lanes.iter().map(|_| Vec::new()).collect();
    let mut bound = Vec::new();
    let looped = lanes.iter().find(|lane| lane.kind == Kind::UmlVhost);
    for round in 0..options.rounds {
        if let (TO | FROM, Some(lane)) = (case, looped) {
            let _pinned = lane.with_guest_apart();
            let flow = within(lane, options.duration)?;
            bound.push(flow.bytes * 8e-6 / flow.elapsed);
        }
        for i in 0..lanes.len() {
            let i = (i + round) % lanes.len();
            let kind = lanes[i].kind;
            if case == PING && !kind.has_address() {
                continue;
            }
            let measured = match once(case, &lanes[i], options) {
                Ok(measured) => measured,
                Err(error) if kind.is_ours() => {
                    return Err(error.context(format!("{} in {case}", kind.name())));
                }
                Err(error) => {
                    report.note(&format!("{} has failed in {case}: {error:#}", kind.name()));
                    continue;
                }
            };
            for (metric, value) in measured {
                match values[i].iter_mut().find(|(known, _)| *known == metric) {
                    Some((_, all)) => all.push(value),
                    None => values[i].push((metric, vec![value])),
                }
            }
        }
    }
    let metrics: Vec<_> = values.iter().flatten().map(|(metric, _)| *metric).collect();
    let mut seen = Vec::new();
    for metric in metrics {
        if !seen.contains(&metric) {
            seen.push(metric);
            rows(report, case, metric, lanes, &values, &bound)?;
        }
    }
    Ok(())
}

fn rows(
    report: &mut Report,
    case: &str,
    metric: &'static str,
    lanes: &[Lane],
    values: &[Values],
    bound: &[f64],
) -> Result<()> {
    let of = |i: usize| values[i].iter().find(|(known, _)| *known == metric).map(|(_, all)| all);
    for (i, lane) in lanes.iter().enumerate() {
        let Some(own) = of(i).filter(|_| lane.kind.is_ours()) else { continue };
        let others = (0..lanes.len()).filter(|other| *other != i);
        let mut peers: Vec<_> = others
            .filter_map(|other| Some((lanes[other].kind.name().to_owned(), median(of(other)?))))
            .collect();
        let is_stream = lane.kind == Kind::UmlVhost && metric == "throughput";
        if is_stream && !bound.is_empty() {
            peers.push((LOOP.to_owned(), median(bound)));
        }
        let least = Kind::UmlBound.name();
        let is_bound = lane.kind == Kind::UmlVhost && peers.iter().any(|(name, _)| name == least);
        let rules = rules(case, metric, lane.kind);
        let rules =
            if rules.is_empty() { vec![None] } else { rules.into_iter().map(Some).collect() };
        for rule in rules {
            report.add(Row {
                case: case.to_owned(),
                metric: format!("{metric}, {}", lane.kind.name()),
                unit: unit(metric),
                ours: median(own),
                peers: peers.clone(),
                rule,
                bound: is_bound.then(|| least.to_owned()),
                pin: if is_trips(case) { ONE } else { APART }.to_owned(),
                runs: own.len(),
                spread: spread(own),
            })?;
        }
    }
    Ok(())
}

/// Everything that is wanted.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut report = Report::new("hostinject", options.format);
    report.version(LOOP, "a stream within the guest of uml-vhost, by its loopback device");
    let mut lanes = Vec::new();
    for (index, kind) in Kind::ALL.into_iter().enumerate() {
        let name = kind.name();
        if !options.has(kind) {
            continue;
        }
        if options.is_smoke && options.lanes.is_empty() && (kind.is_uml() || kind.is_qemu()) {
            report.note(&format!("not tried: {name}: a machine; name it to have it tried"));
            continue;
        }
        if let Some(reason) = kind.missing() {
            report.note(&format!("not measured: {name}: {reason}"));
            continue;
        }
        report.progress(&format!("{name} starts"));
        match Lane::start(kind, index) {
            Ok(lane) => lanes.push(lane),
            Err(error) if kind.is_ours() => return Err(error),
            Err(error) => report.note(&format!("not measured: {name}: {error:#}")),
        }
        if let Some(version) = kind.version() {
            report.version(name, &version);
        }
    }
    let is_wanted =
        |name: &str| options.case.as_ref().is_none_or(|wanted| name.contains(wanted.as_str()));
    for name in CASES {
        if is_wanted(name) {
            case(&mut report, options, name, &lanes)?;
        }
    }
    if is_wanted(counts::CASE) {
        counts::run(&mut report, options, &lanes)?;
    }
    if is_wanted(crowd::CASE) {
        crowd::run(&mut report, options, &lanes)?;
    }
    report.finish()?;
    Ok(())
}
