//! The cases: who is measured beside whom, where, and by which rule.

use anyhow::{Context as _, Result};
use conet_benches::report::{Report, Row, Rule};
use conet_benches::stats::{median, spread};
use conet_transport::direct::Wait;
use rustix::thread::{CpuSet, sched_getaffinity};
use std::time::Duration;

use crate::Options;
use crate::measure::{Case, Contender, Place, Ruled, Turn, interleave, named};
use crate::ours::{Ours, Over, Sealed, start};
use crate::quic::Configs;
use crate::stream::{Carried, Work};
use crate::waiting::{self, Processors};
use crate::{alone, bound, loss, quic, raw, rpc, stream};

/// Ours over UDP, over TCP and in shared memory.
const OURS: [&str; 9] = [
    "plain",
    "aes",
    "chacha",
    "tcp_plain",
    "tcp_aes",
    "tcp_chacha",
    "shared_plain",
    "shared_aes",
    "shared_chacha",
];
const OVER: [Over; 3] = [Over::Udp, Over::Tcp, Over::Shared];
/// The least that each of ours over UDP and in shared memory could take.
const BOUNDS: [(&str, &str); 6] = [
    ("plain", "least_plain"),
    ("aes", "least_aes"),
    ("chacha", "least_chacha"),
    ("shared_plain", "least_shared_plain"),
    ("shared_aes", "least_shared_aes"),
    ("shared_chacha", "least_shared_chacha"),
];

/// What all cases need.
struct Bench<'o> {
    options: &'o Options,
    report: Report,
    quic: Configs,
    apart: Place,
    together: Place,
    /// All processors that may be used.
    all: Vec<usize>,
}

fn ours<'a>(place: Place, size: usize, calls: usize, wait: Wait) -> Vec<Contender<'a>> {
    let mut all = Vec::new();
    for (over, names) in OVER.into_iter().zip(OURS.chunks(3)) {
        for (sealed, name) in Sealed::ALL.into_iter().zip(names) {
            if !sealed.is_there() {
                continue;
            }
            all.push(named(name, move || {
                let mut pair = start(over, place, sealed, wait)?;
                let turn = pair.calls(size, calls);
                pair.end()?;
                turn
            }));
        }
    }
    all
}

/// The bounds of calls of 64 bytes; in shared memory only where both ends spin.
fn bounds<'a>(place: Place, calls: usize, spins: bool) -> Vec<Contender<'a>> {
    let there = || Sealed::ALL.into_iter().filter(|sealed| sealed.is_there());
    let name = |sealed: Sealed, from: usize| BOUNDS[from + sealed as usize].1;
    let over_udp = there()
        .map(|sealed| named(name(sealed, 0), move || bound::udp(place, sealed, 1, calls, spins)));
    let shared = there()
        .filter(|_| spins)
        .map(|sealed| named(name(sealed, 3), move || bound::shared(place, sealed, calls)));
    over_udp.chain(shared).collect()
}

impl Bench<'_> {
    fn begins(&self, case: &str) -> bool {
        let wanted = self.options.case.as_ref().is_none_or(|wanted| case.contains(wanted));
        if wanted {
            self.report.progress(case);
        }
        wanted
    }

    const fn calls(&self, measured: usize, test: usize) -> usize {
        if self.options.is_test { test } else { measured }
    }

    fn is_one(&self) -> bool {
        self.apart.client == self.apart.server
    }

    /// Both ends' work for a call, without what carries it.
    fn alone(&mut self) -> Result<()> {
        if !self.begins("call 64 B, session alone") {
            return Ok(());
        }
        let (at, calls) = (self.apart.client, self.calls(20_000, 160));
        let each = Sealed::ALL.into_iter().zip(OURS).filter(|(sealed, _)| sealed.is_there());
        let mut all: Vec<_> = each
            .map(|(sealed, name)| named(name, move || alone::calls(at, sealed, 64, false, calls)))
            .collect();
        all.push(named("row_of_8", || alone::calls(at, Sealed::Plain, 64, true, calls / 4)));
        let times = interleave(self.options, &mut all)?;
        drop(all);
        let place = Place { client: at, server: at };
        let (name, how, ours) = ("call 64 B", "session alone", &OURS[..3]);
        let case = Case { name, how, place, ours, bounds: &[] };
        case.report(&mut self.report, &times, &[])
    }

    /// Both sides ask again and again, over two processors.
    fn spinning(&mut self) -> Result<()> {
        if self.is_one() || !self.begins("call 64 B, spinning") {
            return Ok(());
        }
        let (place, calls) = (self.apart, self.calls(2000, 20));
        let mut all = ours(place, 64, calls, Wait::Spin);
        all.push(named("udp_spin", || raw::udp(place, 64, calls, true)));
        all.push(named("quinn_proto", || quic::proto(&self.quic, place, 64, calls)));
        all.push(named("tcp_nodelay", || raw::tcp(place, 64, calls)));
        all.extend(bounds(place, calls, true));
        let times = interleave(self.options, &mut all)?;
        drop(all);
        let rules = [
            ("plain", "p50", Rule::above("udp_spin", 500.0)),
            ("plain", "p50", Rule::times(0.65, "quinn_proto")),
            ("aes", "p50", Rule::above("udp_spin", 800.0)),
            ("aes", "p50", Rule::times(0.65, "quinn_proto")),
            ("chacha", "p50", Rule::times(0.65, "quinn_proto")),
            ("shared_plain", "p50", Rule::constant(600.0)),
        ];
        let (name, how) = ("call 64 B", "spinning");
        let case = Case { name, how, place, ours: &OURS, bounds: &BOUNDS };
        case.report(&mut self.report, &times, &rules)
    }

    /// Both sides sleep until something comes, or try for a while first.
    fn waiting(&mut self, how: &str, wait: Wait, place: Place, calls: usize) -> Result<()> {
        if !self.begins(&format!("call 64 B, {how}")) {
            return Ok(());
        }
        let mut all = ours(place, 64, calls, wait);
        all.push(named("udp_block", || raw::udp(place, 64, calls, false)));
        all.push(named("tcp_nodelay", || raw::tcp(place, 64, calls)));
        all.push(named("unix", || raw::unix(place, 64, calls)));
        all.push(named("unix_datagram", || raw::unix_datagram(place, 64, calls)));
        all.push(named("quinn_tokio", || quic::tokio(&self.quic, place, 64, calls)));
        all.push(named("tarpc", || rpc::tarpc(place, 64, calls)));
        all.extend(bounds(place, calls, false));
        let times = interleave(self.options, &mut all)?;
        drop(all);
        let mut rules: Vec<Ruled> = Vec::new();
        for ours in &OURS[..3] {
            if wait == Wait::Block && place.client == place.server {
                rules.push((ours, "p50", Rule::times(1.25, "udp_block")));
            }
            rules.push((ours, "p50", Rule::times(1.0, "tcp_nodelay")));
            rules.push((ours, "p50", Rule::times(1.0, "tarpc")));
        }
        let case = Case { name: "call 64 B", how, place, ours: &OURS, bounds: &BOUNDS };
        case.report(&mut self.report, &times, &rules)
    }

    /// Larger payloads, answered by 64 bytes.
    fn large(&mut self) -> Result<()> {
        for (name, size, calls) in
            [("call 4 KiB", 4096, 500), ("call 64 KiB", 65_536, 100), ("call 1 MiB", 1 << 20, 20)]
        {
            if !self.begins(name) {
                continue;
            }
            let (place, calls) = (self.apart, self.calls(calls, 3));
            let mut all = ours(place, size, calls, Wait::Adaptive);
            let (spin, block) = if size > raw::LONGEST {
                ("udp_65507_spin", "udp_65507_block")
            } else {
                ("udp_spin", "udp_block")
            };
            // Two of the longest are no measure for a mebibyte.
            if size < 2 * raw::LONGEST {
                let size = size.min(raw::LONGEST);
                if place.client != place.server {
                    all.push(named(spin, move || raw::udp(place, size, calls, true)));
                }
                all.push(named(block, move || raw::udp(place, size, calls, false)));
            }
            all.push(named("tcp_nodelay", || raw::tcp(place, size, calls)));
            all.push(named("unix", || raw::unix(place, size, calls)));
            all.push(named("quinn_proto", || quic::proto(&self.quic, place, size, calls)));
            all.push(named("quinn_tokio", || quic::tokio(&self.quic, place, size, calls)));
            all.push(named("tarpc", || rpc::tarpc(place, size, calls)));
            let times = interleave(self.options, &mut all)?;
            drop(all);
            let case = Case { name, how: "adaptive", place, ours: &OURS, bounds: &[] };
            case.report(&mut self.report, &times, &[])?;
        }
        Ok(())
    }

    /// Ours in two ways, one after the other.
    fn beside(
        &mut self,
        name: &str,
        wait: Wait,
        (other, factor): (&'static str, f64),
        least: Option<Contender<'static>>,
        mut run: impl FnMut(&mut dyn Ours) -> Result<Turn>,
    ) -> Result<()> {
        if self.is_one() || !self.begins(name) {
            return Ok(());
        }
        let (place, calls) = (self.apart, self.calls(1000, 10));
        let mut all = vec![
            named("plain", || {
                let mut pair = start(Over::Udp, place, Sealed::Plain, wait)?;
                let turn = run(&mut *pair);
                pair.end()?;
                turn
            }),
            named(other, || {
                let mut pair = start(Over::Udp, place, Sealed::Plain, wait)?;
                let turn = pair.calls(64, calls);
                pair.end()?;
                turn
            }),
        ];
        let bounds: Vec<_> = least.iter().map(|(name, _)| ("plain", name.clone())).collect();
        all.extend(least);
        let times = interleave(self.options, &mut all)?;
        drop(all);
        let how = if wait == Wait::Spin { "spinning" } else { "adaptive" };
        let bounds: Vec<_> = bounds.iter().map(|(ours, bound)| (*ours, &**bound)).collect();
        let case = Case { name, how, place, ours: &["plain"], bounds: &bounds };
        case.report(&mut self.report, &times, &[("plain", "p50", Rule::times(factor, other))])
    }

    /// One datagram in a hundred is lost, each way.
    fn loss(&mut self) -> Result<()> {
        if self.is_one() || !self.begins("call 64 B, 1 % loss") {
            return Ok(());
        }
        let (place, calls) = (self.apart, self.calls(2000, 20));
        let mut all = vec![
            named("plain", || loss::calls(place, calls, 100)),
            named("without_loss", || loss::calls(place, calls, 0)),
            named("udp_spin", || raw::udp(place, 64, calls, true)),
        ];
        let mut times = interleave(self.options, &mut all)?;
        drop(all);
        let round_trip = times.iter().find(|times| times.name == "without_loss");
        let round_trip = round_trip.map_or(0.0, |times| times.at(0.5));
        // The retransmission timeout of a path as short as this one is its least.
        let mut limit =
            crate::measure::Times { name: "rto_and_rtt".to_owned(), ..Default::default() };
        limit.add(Turn(vec![loss::LEAST_TIMEOUT_NS + round_trip]));
        times.push(limit);
        let (name, how) = ("call 64 B", "1 % loss, spinning");
        let case = Case { name, how, place, ours: &["plain"], bounds: &[] };
        case.report(&mut self.report, &times, &[("plain", "p99", Rule::times(1.5, "rto_and_rtt"))])
    }

    /// Others that want the processors, calls that wait, and nothing to do.
    fn others(&mut self) -> Result<()> {
        let options = self.options;
        let at = |place| Processors { all: self.all.clone(), place };
        let (anywhere, one, two) = (at(None), at(Some(self.together)), at(Some(self.apart)));
        let case = "call beside two busy loops a processor";
        let mut places = vec![("anywhere", &anywhere), ("on one processor", &one)];
        if !self.is_one() {
            places.push(("on two processors", &two));
        }
        if self.begins(case) {
            for (how, processors) in places {
                waiting::beside_loops(options, &mut self.report, case, how, processors)?;
            }
        }
        let parked = self.calls(10_000, 200);
        let case = "call beside 10,000 parked ones";
        if self.begins(case) {
            waiting::beside_parked(options, &mut self.report, case, &two, parked)?;
        }
        if self.begins("idle") {
            for parked in [0, parked] {
                waiting::idle(options, &mut self.report, "idle", &two, parked)?;
            }
        }
        Ok(())
    }

    /// Much in one direction.
    fn bulk(&mut self) -> Result<()> {
        if !self.begins("bulk") {
            return Ok(());
        }
        let place = self.apart;
        let time = Duration::from_millis(if self.options.is_test { 50 } else { 400 });
        type Run = Box<dyn FnMut() -> Result<Carried>>;
        let mut all: Vec<(&str, Run)> = vec![
            ("tcp", Box::new(move || stream::tcp(place, time))),
            ("udp_1400", Box::new(move || stream::udp(place, 1400, Work::Nothing, time))),
            ("udp_65000", Box::new(move || stream::udp(place, 65_000, Work::Nothing, time))),
            ("udp_1400_copy", Box::new(move || stream::udp(place, 1400, Work::Copy, time))),
            ("udp_65000_copy", Box::new(move || stream::udp(place, 65_000, Work::Copy, time))),
            ("udp_1400_aes", Box::new(move || stream::udp(place, 1400, Work::Seal, time))),
            ("udp_65000_aes", Box::new(move || stream::udp(place, 65_000, Work::Seal, time))),
        ];
        let first = all.len();
        let each = OVER.into_iter().flat_map(|over| Sealed::ALL.map(|sealed| (over, sealed)));
        for ((over, sealed), name) in each.zip(OURS).filter(|((_, sealed), _)| sealed.is_there()) {
            let run = move || {
                let mut pair = start(over, place, sealed, Wait::Adaptive)?;
                let carried = pair.bulk(time)?;
                pair.end()?;
                Ok(carried)
            };
            all.push((name, Box::new(run)));
        }
        let is_wanted = |name: &str| {
            let only = self.options.only.as_ref();
            only.is_none_or(|only| only.split(',').any(|only| only == name))
        };
        let first = all[..first].iter().filter(|(name, _)| is_wanted(name)).count();
        all.retain(|(name, _)| is_wanted(name));
        let mut carried: Vec<Vec<Carried>> = vec![Vec::new(); all.len()];
        let rounds = self.options.rounds.div_ceil(2);
        for round in 0..rounds {
            for n in 0..all.len() {
                let n = (n + round) % all.len();
                let (name, run) = &mut all[n];
                carried[n].push(run().with_context(|| (*name).to_owned())?);
            }
        }
        let names: Vec<_> = all.iter().map(|(name, _)| *name).collect();
        self.bulk_rows(place, &names, first, &carried)
    }

    /// `first` and all behind it are ours.
    fn bulk_rows(
        &mut self,
        place: Place,
        names: &[&str],
        first: usize,
        carried: &[Vec<Carried>],
    ) -> Result<()> {
        let figures = |n: usize, figure: fn(Carried) -> f64| {
            carried[n].iter().map(|carried| figure(*carried)).collect::<Vec<_>>()
        };
        for ours in first..names.len() {
            let name = names[ours];
            let bound = if name.ends_with("plain") { "udp_65000_copy" } else { "udp_65000_aes" };
            let mut rules = vec![("ms", None)];
            if OURS[..3].contains(&name) {
                rules.push(("Gb/s", Some(Rule::at_least(0.8, "udp_1400"))));
                rules.push(("Gb/s", Some(Rule::at_least(1.0, "tcp"))));
            } else {
                rules.push(("Gb/s", None));
            }
            if name == "aes" {
                rules.push(("Gb/s", Some(Rule::at_least(0.8, bound))));
            }
            for (unit, rule) in rules {
                let (what, figure): (_, fn(Carried) -> f64) = match unit {
                    "ms" => ("processor for a GB", Carried::cost),
                    _ => ("arrived", Carried::gigabits),
                };
                let peers = (0..names.len()).filter(|n| *n != ours);
                self.report.add(Row {
                    case: "bulk".to_owned(),
                    metric: format!("{what}, {name}"),
                    unit,
                    ours: median(&figures(ours, figure)),
                    peers: peers
                        .map(|n| (names[n].to_owned(), median(&figures(n, figure))))
                        .collect(),
                    rule,
                    bound: Some(bound.to_owned()),
                    pin: place.pin(),
                    runs: carried[ours].len(),
                    spread: spread(&figures(ours, figure)),
                })?;
            }
        }
        Ok(())
    }
}

/// Everything.
pub(crate) fn run(options: &Options) -> Result<()> {
    let set = sched_getaffinity(None)?;
    let all: Vec<_> = (0..CpuSet::MAX_CPU).filter(|processor| set.is_set(*processor)).collect();
    let one = *all.first().context("no processor")?;
    let two = *all.get(1).unwrap_or(&one);
    let mut report = Report::new("transport", options.format);
    if one == two {
        report.note("one processor only: nothing is measured across processors");
    }
    for (peer, version) in [
        ("quinn_proto", "quinn-proto 0.11, rustls with ring, AES-128-GCM"),
        ("quinn_tokio", "quinn 0.11 on tokio 1 of one thread a side, AES-128-GCM"),
        ("tarpc", "tarpc 0.38 over TCP_NODELAY with bincode, tokio 1 of one thread a side"),
        ("udp_1400", "quinn-udp 0.6, GSO and GRO, datagrams of 1400 bytes, no protocol"),
        ("udp_65000", "the same with datagrams of 65,000 bytes"),
        ("least_plain", "no code of ours: the same sockets, bytes and copies, no protocol"),
        ("least_aes", "least_plain, sealed by ring's AES-128-GCM; least_chacha likewise"),
        ("least_shared_plain", "a ring of records of two cache lines, no protocol"),
        ("least_row", "least_plain with eight calls in a datagram, as long as ours"),
        (
            "least_beside_bulk",
            "least_plain beside bulk in datagrams of 6000 bytes, copied in and out",
        ),
        ("udp_1400_copy", "udp_1400, each datagram copied in and out"),
        ("udp_65000_copy", "udp_65000, each datagram copied in and out"),
        ("udp_1400_aes", "udp_1400, each datagram copied, sealed, opened and copied"),
        ("udp_65000_aes", "udp_65000, each datagram copied, sealed, opened and copied"),
        ("without_loss", "ours in the same loop, nothing lost"),
    ] {
        report.version(peer, version);
    }
    let quic = Configs::new()?;
    let (apart, together) =
        (Place { client: one, server: two }, Place { client: one, server: one });
    let mut bench = Bench { options, report, quic, apart, together, all };
    bench.alone()?;
    bench.spinning()?;
    let (two, one) = (bench.apart, bench.together);
    let (few, many) = (bench.calls(500, 20), bench.calls(1500, 20));
    bench.waiting("blocking on one processor", Wait::Block, one, many)?;
    bench.waiting("adaptive on one processor", Wait::Adaptive, one, many)?;
    if !bench.is_one() {
        bench.waiting("blocking on two processors", Wait::Block, two, few)?;
        bench.waiting("adaptive on two processors", Wait::Adaptive, two, few)?;
    }
    bench.large()?;
    let calls = bench.calls(1000, 10);
    let least = named("least_row", move || bound::udp(two, Sealed::Plain, 8, calls, true));
    bench.beside("chain of 8", Wait::Spin, ("one_call", 1.3), Some(least), |pair| {
        Turn::of(calls, || pair.row(64))
    })?;
    for wait in [Wait::Spin, Wait::Adaptive] {
        let least = || named("least_beside_bulk", move || bound::beside_bulk(two, calls));
        let least = (wait == Wait::Spin).then(least);
        bench.beside("call beside bulk", wait, ("idle", 2.0), least, |pair| {
            pair.calls_beside_bulk(calls)
        })?;
    }
    bench.loss()?;
    bench.others()?;
    bench.bulk()?;
    bench.report.finish()?;
    Ok(())
}
