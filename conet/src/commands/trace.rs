//! `conet trace`: what is forwarded for a program that is away.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use conet_node::client::{Client, ClientError};
use conet_wire::control::{Request, Response, Trace, TracedCall};
use serde_json::json;

use crate::cli::Output;
use crate::table;

/// Between two questions: the daemon takes times for 5 s after each.
const PERIOD: Duration = Duration::from_secs(2);

fn ask(client: &mut Client, pid: u32) -> Result<Trace> {
    match client.ask(&Request::Trace { pid, timed: true })? {
        Response::Trace(trace) => Ok(trace),
        _ => Err(ClientError::Unexpected.into()),
    }
}

/// A call's share of the time that was watched.
struct Watched {
    name: String,
    /// Since the program went out.
    calls: u64,
    /// In this time.
    count: u64,
    /// Means, in microseconds.
    ran_us: Option<f64>,
    waited_us: Option<f64>,
    /// Of the time, in which the program waited for it.
    share: f64,
}

/// Watches for some seconds, and tells what was forwarded meanwhile.
pub(super) fn trace(client: &mut Client, pid: u32, seconds: u64, output: Output) -> Result<()> {
    let before = ask(client, pid)?;
    let begin = Instant::now();
    let mut left = Duration::from_secs(seconds);
    let mut after = None;
    while !left.is_zero() {
        let step = left.min(PERIOD);
        thread::sleep(step);
        left -= step;
        after = Some(ask(client, pid)?);
    }
    let after = after.unwrap_or_else(|| before.clone());
    let took = begin.elapsed();
    let mut rows: Vec<Watched> =
        after.calls.iter().map(|now| watched(&before, now, took)).collect();
    rows.sort_by_key(|row| std::cmp::Reverse((row.count, row.calls)));
    if output.json {
        let calls: Vec<_> = rows
            .iter()
            .map(|row| {
                json!({
                    "name": row.name,
                    "calls": row.calls,
                    "calls_watched": row.count,
                    "home_mean_us": row.ran_us,
                    "round_trip_mean_us": row.waited_us,
                    "share": row.share,
                })
            })
            .collect();
        let (command, node, seconds) = (&after.command, &after.node, took.as_secs_f64());
        let value = json!({
            "pid": pid, "command": command, "node": node, "seconds": seconds, "calls": calls,
        });
        return Ok(table::json(&value)?);
    }
    let headings = ["CALL", "SINCE IT WENT", "A SECOND", "AT HOME", "ROUND TRIP", "OF THE TIME"];
    let mut list = table::table(&headings);
    let mean = |us: Option<f64>| us.map_or_else(|| "-".to_owned(), |us| format!("{us:.1} us"));
    for row in &rows {
        list.add_row([
            row.name.clone(),
            row.calls.to_string(),
            format!("{:.1}", per(row.count, took.as_secs_f64()).unwrap_or(0.0)),
            mean(row.ran_us),
            mean(row.waited_us),
            format!("{:.1} %", row.share * 100.0),
        ]);
    }
    table::print(&list)?;
    table::line(&format!("{pid} ({}) runs on {}", after.command, after.node))?;
    Ok(())
}

/// A mean; none of nothing. Counts here are far below 2^52.
#[allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn per(sum: u64, count: f64) -> Option<f64> {
    (count > 0.0).then(|| sum as f64 / count)
}

#[allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn watched(before: &Trace, now: &TracedCall, took: Duration) -> Watched {
    let old = before.calls.iter().find(|old| old.number == now.number);
    // A program that went out anew meanwhile is counted anew.
    let since = |now: u64, old: Option<u64>| now.checked_sub(old.unwrap_or(0)).unwrap_or(now);
    let waited = since(now.waited_ns, old.map(|old| old.waited_ns));
    let mean = |sum: u64, count: u64| per(sum, count as f64).map(|nanos| nanos / 1000.0);
    Watched {
        name: now.name.clone(),
        calls: now.calls,
        count: since(now.calls, old.map(|old| old.calls)),
        ran_us: mean(
            since(now.ran_ns, old.map(|old| old.ran_ns)),
            since(now.timed, old.map(|old| old.timed)),
        ),
        waited_us: mean(waited, since(now.waited_for, old.map(|old| old.waited_for))),
        share: per(waited, took.as_nanos() as f64).unwrap_or(0.0),
    }
}
