//! What a packet costs in system calls, wake-ups and copies, counted and not reckoned.
//!
//! | count | is, of every thread of it |
//! |---|---|
//! | calls | `raw_syscalls:sys_enter`, by perf events |
//! | wake-ups | voluntary context switches: each was slept out, and ended by a wake-up |
//! | copies | bytes that `read` and `write` moved between kernel and process, for each byte of payload (`/proc/PID/io`); sockets' own calls are not in it |
//!
//! `between` is whoever stands between host and guest: our thread or server, the replica's
//! two daemons, passt. `machine` is the virtual machine's own process. Client and agent are
//! in neither: they are the same for all.
//!
//! Two kinds of traffic: an echo, a packet at a time, where every packet pays for itself;
//! and a stream to the guest, counted by packets of 1,448 bytes however they were joined.
//!
//! Sources: `perf_event_open(2)`, `proc_pid_status(5)`, `proc_pid_io(5)`.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use conet_benches::report::{Report, Row};
use conet_benches::stats::{median, spread};

use crate::Options;
use crate::lane::Lane;
use crate::measure::{APART, ONE};
use crate::sys::Counter;
use crate::traffic::{SMALL, echo, tcp};

pub(crate) const CASE: &str = "counted";
/// Payload of a packet with timestamps, at an MTU of 1,500.
const SEGMENT: f64 = 1448.0;
const EVENT: &str = "/sys/kernel/tracing/events/raw_syscalls/sys_enter/id";

/// Counts of one group of threads so far.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    wakes: u64,
    moved: u64,
}

fn line_of(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// What threads have counted; one that has ended counts as nothing.
fn counts(threads: &[u32]) -> Counts {
    let read = |tid: &u32, what| {
        fs::read_to_string(format!("/proc/{tid}/task/{tid}/{what}")).unwrap_or_default()
    };
    threads.iter().fold(Counts::default(), |sum, tid| {
        let (status, io) = (read(tid, "status"), read(tid, "io"));
        Counts {
            wakes: sum.wakes + line_of(&status, "voluntary_ctxt_switches"),
            moved: sum.moved + line_of(&io, "rchar") + line_of(&io, "wchar"),
        }
    })
}

/// The number of the tracepoint; none where the kernel shows it nowhere.
fn event() -> Option<u64> {
    fs::read_to_string(EVENT).ok()?.trim().parse().ok()
}

/// Of one group in one lane: metric and value.
fn group(
    name: &str,
    threads: &[u32],
    event: Option<u64>,
    traffic: impl FnOnce() -> Result<(f64, f64)>,
) -> Result<Vec<(String, f64)>> {
    // A thread that ends meanwhile cannot be counted, nor any where perf is forbidden.
    let counters: Option<Vec<Counter>> =
        event.and_then(|event| threads.iter().map(|tid| Counter::of(*tid, event).ok()).collect());
    let before = counts(threads);
    let (packets, bytes) = traffic()?;
    let after = counts(threads);
    let mut values = Vec::new();
    if let Some(counters) = counters {
        let calls: u64 = counters.iter().map(Counter::read).sum();
        values.push((format!("calls a packet, {name}"), calls as f64 / packets));
    }
    let wakes = after.wakes.saturating_sub(before.wakes) as f64;
    values.push((format!("wake-ups a packet, {name}"), wakes / packets));
    if name == "between" {
        let moved = after.moved.saturating_sub(before.moved) as f64;
        values.push(("copies a byte, between".to_owned(), moved / bytes));
    }
    Ok(values)
}

fn once(lane: &Lane, options: &Options, is_echo: bool, event: Option<u64>) -> Result<Found> {
    let traffic = || {
        if is_echo {
            let _pinned = lane.on_one_processor();
            let count = if options.is_smoke { 20 } else { 300 };
            let packets = 2.0 * echo(lane, count, Duration::from_millis(200))?.len() as f64;
            return Ok((packets.max(1.0), packets.max(1.0) * (SMALL + 28) as f64));
        }
        let _pinned = lane.with_guest_apart();
        let bytes = tcp(lane, true, options.duration)?.bytes;
        Ok((bytes / SEGMENT, bytes))
    };
    let mut found = Vec::new();
    for (name, threads) in [("between", lane.between()), ("machine", lane.machine_threads())] {
        if !threads.is_empty() {
            found.extend(group(name, &threads, event, traffic)?);
        }
    }
    Ok(found)
}

type Found = Vec<(String, f64)>;

/// Every lane, with both kinds of traffic.
pub(crate) fn run(report: &mut Report, options: &Options, lanes: &[Lane]) -> Result<()> {
    let event = event();
    if event.is_none() {
        report.note("calls are not counted: mount -t tracefs tracefs /sys/kernel/tracing");
    }
    for (what, is_echo) in [("counted, echo", true), ("counted, tcp to the guest", false)] {
        report.progress(what);
        let mut values: Vec<Vec<(String, Vec<f64>)>> = lanes.iter().map(|_| vec![]).collect();
        for _ in 0..options.rounds.min(3) {
            for (lane, values) in lanes.iter().zip(&mut values) {
                let found = match once(lane, options, is_echo, event) {
                    Ok(found) => found,
                    Err(error) if lane.kind.is_ours() => return Err(error),
                    Err(error) => {
                        report.note(&format!("{}, {what}: {error:#}", lane.kind.name()));
                        continue;
                    }
                };
                for (metric, value) in found {
                    // Peers move bytes by calls that are not in this count.
                    let counts_all = lane.kind.is_ours() || lane.kind == crate::kind::Kind::Replica;
                    if metric.starts_with("copies") && !counts_all {
                        continue;
                    }
                    match values.iter_mut().find(|(known, _)| *known == metric) {
                        Some((_, all)) => all.push(value),
                        None => values.push((metric, vec![value])),
                    }
                }
            }
        }
        let pin = if is_echo { ONE } else { APART };
        rows(report, what, pin, lanes, &values)?;
    }
    Ok(())
}

fn rows(
    report: &mut Report,
    case: &str,
    pin: &str,
    lanes: &[Lane],
    values: &[Vec<(String, Vec<f64>)>],
) -> Result<()> {
    for (i, lane) in lanes.iter().enumerate().filter(|(_, lane)| lane.kind.is_ours()) {
        for (metric, own) in &values[i] {
            let others = (0..lanes.len()).filter(|other| *other != i).filter_map(|other| {
                let (_, all) = values[other].iter().find(|(known, _)| known == metric)?;
                Some((lanes[other].kind.name().to_owned(), median(all)))
            });
            report.add(Row {
                case: case.to_owned(),
                metric: format!("{metric}, {}", lane.kind.name()),
                unit: "",
                ours: median(own),
                peers: others.collect(),
                rule: None,
                bound: None,
                pin: pin.to_owned(),
                runs: own.len(),
                spread: spread(own),
            })?;
        }
    }
    Ok(())
}
