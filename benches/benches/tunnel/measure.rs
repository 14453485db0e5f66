//! The run: which cases, in which lanes, against which rules.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use conet_benches::report::{Report, Row, Rule};
use conet_benches::stats::{median, spread};
use conet_tunnel::{Mode, Offloads};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustix::time::{ClockId, clock_gettime};

use crate::Options;
use crate::scale;
use crate::scene::{Kind, Lane};
use crate::traffic::{Flow, flooded, ping, tcp, udp};

/// Bytes of a datagram that fill a packet of 1,420.
const FULL: usize = 1392;
/// Bytes of a datagram whose packet has 64.
const SMALL: usize = 36;
/// Bits a second of the paced case.
const PACE: f64 = 200e6;
/// Echo requests a round.
const PINGS: u16 = 200;

/// Bogus handshakes a second of the flood.
const FLOOD: u32 = 1000;

const FLOODED: &str = "tcp, 1 flow, 1,000 bogus handshakes a second";
/// The same lane without the flood.
const QUIET: &str = "CPU quiet";

const CASES: [&str; 7] = [
    "tcp, 1 flow",
    "tcp, 8 flows",
    "udp, 200 Mb/s",
    "udp, at the limit",
    "udp, 64 B packets",
    "ping",
    FLOODED,
];

/// Measurements of one lane in one case, by metric.
type Values = Vec<(&'static str, Vec<f64>)>;

fn flow(case: &str, flow: &Flow) -> Vec<(&'static str, f64)> {
    let lost = 100.0 * (1.0 - flow.packets / flow.sent.max(1.0)).max(0.0);
    let mut values = vec![
        ("CPU", flow.per_gb(flow.cpu)),
        ("CPU with the ends'", flow.per_gb(flow.cpu + flow.ends)),
        ("time", flow.per_gb(flow.elapsed)),
    ];
    if case.contains("64 B") {
        let per_packet = |seconds: f64| seconds * 1e9 / flow.packets.max(1.0);
        values = vec![
            ("CPU a packet", per_packet(flow.cpu)),
            ("time a packet", per_packet(flow.elapsed)),
        ];
    }
    if case.starts_with("udp") {
        values.push(("lost", lost));
    }
    values
}

fn once(case: &str, lane: &Lane, duration: Duration) -> Result<Vec<(&'static str, f64)>> {
    if lane.kind == Kind::Ours(Mode::IpIp, Offloads::ALL) {
        // A peer is in the kernel from half a second after its first packets on.
        drop(ping(lane, 5, Duration::from_secs(1))?);
        std::thread::sleep(Duration::from_millis(700));
        drop(ping(lane, 5, Duration::from_secs(1))?);
    }
    let one = match case {
        "tcp, 1 flow" => tcp(lane, 1, duration)?,
        "tcp, 8 flows" => tcp(lane, 8, duration)?,
        "udp, 200 Mb/s" => udp(lane, FULL, Some(PACE), duration)?,
        "udp, at the limit" => udp(lane, FULL, None, duration)?,
        "udp, 64 B packets" => udp(lane, SMALL, None, duration)?,
        FLOODED => {
            let quiet = tcp(lane, 1, duration)?;
            let flooded = flooded(lane, FLOOD, || tcp(lane, 1, duration))??;
            let cpu = |flow: &Flow| flow.per_gb(flow.cpu);
            return Ok(vec![("CPU", cpu(&flooded)), (QUIET, cpu(&quiet))]);
        }
        _ => {
            let count = if duration < Duration::from_millis(500) { 5 } else { PINGS };
            let mut times = ping(lane, count, Duration::from_secs(1))?;
            times.sort_by(f64::total_cmp);
            let at =
                |share: usize| times.get(times.len() * share / 100).copied().unwrap_or(f64::NAN);
            return Ok(vec![("p50", at(50)), ("p99", at(99))]);
        }
    };
    Ok(flow(case, &one))
}

fn unit(metric: &str) -> &'static str {
    match metric {
        "CPU" | QUIET | "CPU with the ends'" | "time" => "s/GB",
        "CPU a packet" | "time a packet" => "ns",
        "lost" => "%",
        _ => "us",
    }
}

/// Processor time of this thread or process, in seconds.
pub(crate) fn own_time(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Seals and opens a gigabyte in packets of 1,420 bytes; seconds.
fn aead(duration: Duration) -> Result<f64> {
    let key = UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).map_err(|_| anyhow!("no cipher"))?;
    let key = LessSafeKey::new(key);
    let mut space = vec![0; 1420];
    let (began, mut bytes) = (Instant::now(), 0);
    let spent = own_time(ClockId::ThreadCPUTime);
    let nonce = || Nonce::assume_unique_for_key([0; 12]);
    while began.elapsed() < duration {
        for _ in 0..100 {
            key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut space)
                .and_then(|()| key.open_in_place(nonce(), Aad::empty(), &mut space).map(drop))
                .map_err(|_| anyhow!("the cipher has failed"))?;
            space.truncate(1420);
            bytes += 1420;
        }
    }
    Ok((own_time(ClockId::ThreadCPUTime) - spent) * 1e9 / f64::from(bytes))
}

/// What a lane of ours should be, by the figures that the project is built to.
fn rules(case: &str, metric: &str, kind: Kind) -> Vec<Rule> {
    let Kind::Ours(mode, Offloads::ALL) = kind else { return vec![] };
    if case == FLOODED {
        return if metric == "CPU" { vec![Rule::times(1.1, "quiet")] } else { vec![] };
    }
    match (mode, case.starts_with("tcp"), metric) {
        (Mode::WireGuard, true, "CPU") => vec![
            Rule::times(0.4, "boringtun-cli"),
            Rule::times(0.4, "gotatun"),
            Rule::times(0.2, "wireguard-go"),
            Rule::times(1.4, "aead"),
        ],
        (Mode::WireGuard, true, "time") => {
            vec![Rule::times(0.4, "boringtun-cli"), Rule::times(0.4, "gotatun")]
        }
        (Mode::IpUdp, true, "CPU") => vec![Rule::constant(1.3)],
        // In the kernel: the tunnels' processes only count.
        (Mode::IpIp, true, "CPU") => vec![Rule::constant(0.05)],
        (Mode::IpIp, true, "time") => vec![Rule::times(1.11, "bare")],
        _ => vec![],
    }
}

/// The peer that shows the least that is possible.
fn bound_of(case: &str, metric: &str, kind: Kind) -> Option<String> {
    let Kind::Ours(mode, Offloads::ALL) = kind else { return None };
    let bound = match (mode, case.starts_with("tcp"), metric) {
        (Mode::WireGuard, true, "CPU" | "time") => Kind::Bound { in_kernel: false },
        (Mode::IpIp, true, "time") => Kind::Bound { in_kernel: true },
        _ => return None,
    };
    Some(bound.name())
}

/// One case: rounds over all lanes, each beginning with another.
fn case(report: &mut Report, options: &Options, case: &str, lanes: &[Lane]) -> Result<()> {
    report.progress(case);
    let mut values: Vec<Values> = lanes.iter().map(|_| Vec::new()).collect();
    let mut bound = Vec::new();
    for round in 0..options.rounds {
        if case.starts_with("tcp") {
            bound.push(aead(options.duration / 4)?);
        }
        for i in 0..lanes.len() {
            let i = (i + round) % lanes.len();
            if case == FLOODED && !lanes[i].kind.has_handshakes() {
                continue;
            }
            let measured = match once(case, &lanes[i], options.duration) {
                Ok(measured) => measured,
                Err(error) if !lanes[i].kind.is_foreign() => return Err(error),
                Err(error) => {
                    report
                        .note(&format!("{} has failed in {case}: {error:#}", lanes[i].kind.name()));
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
        if seen.contains(&metric) {
            continue;
        }
        seen.push(metric);
        rows(report, case, metric, lanes, &values, &bound)?;
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
        let (Kind::Ours(..), Some(own)) = (lane.kind, of(i)) else { continue };
        let others = (0..lanes.len()).filter(|other| *other != i);
        let mut peers: Vec<_> =
            others.filter_map(|o| Some((lanes[o].kind.name(), median(of(o)?)))).collect();
        let quiet = values[i].iter().find(|(known, _)| *known == QUIET);
        if let Some((_, quiet)) = quiet.filter(|_| metric == "CPU") {
            peers.push(("quiet".to_owned(), median(quiet)));
        }
        let has_bound = metric == "CPU" && !bound.is_empty();
        if has_bound {
            peers.push(("aead".to_owned(), median(bound)));
        }
        // The wire spends no tunnel's time.
        peers.retain(|(name, _)| name != "bare" || metric != "CPU" && metric != "CPU a packet");
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
                bound: bound_of(case, metric, lane.kind),
                pin: "not pinned".to_owned(),
                runs: own.len(),
                spread: spread(own),
            })?;
        }
    }
    Ok(())
}

/// Everything that is wanted.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut report = Report::new("tunnel", options.format);
    report.version("bound-sealed", "TUN and UDP offloads, ring's ChaCha20-Poly1305, nothing else");
    report.version("bound-kernel", "benches/bpf/minimal.bpf.c");
    report.version("aead", "ring's ChaCha20-Poly1305, sealed and opened, 1,420 bytes");
    let mut lanes = Vec::new();
    for (index, kind) in Kind::ALL.into_iter().enumerate() {
        let name = kind.name();
        if !options.has(&name) {
            continue;
        }
        if kind.is_foreign() && kind.program().is_none() {
            report.note(&format!("not measured: {name} is not installed"));
            continue;
        }
        match Lane::start(kind, index) {
            Ok(lane) => lanes.push(lane),
            Err(error) if kind.is_foreign() || kind == (Kind::Bound { in_kernel: true }) => {
                report.note(&format!("not measured: {error:#}"))
            }
            Err(error) => return Err(error),
        }
        if let Some(version) = kind.version() {
            report.version(&name, &version);
        }
    }
    for name in CASES {
        if options.case.as_ref().is_none_or(|wanted| name.contains(wanted.as_str())) {
            case(&mut report, options, name, &lanes)?;
        }
    }
    if options.case.as_ref().is_none_or(|wanted| scale::CASE.contains(wanted.as_str())) {
        scale::run(&mut report, options)?;
    }
    report.finish()?;
    Ok(())
}
