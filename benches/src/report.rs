//! What a benchmark says: a table for people, or one JSON object a line.
//!
//! A row compares ours with its peers of the same run, and may have a rule over it.
//! A rule whose peer was not measured is not met and not missed: `met` is `null`.

use std::io::{self, Write};
use std::process::Command;

use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use serde_json::{Map, Value, json};

/// How the result is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A table, at the end.
    Table,
    /// One object a line, as soon as it is known.
    Json,
}

/// An upper limit for ours.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    factor: f64,
    peer: Option<String>,
    plus: f64,
}

impl Rule {
    /// At most `factor` times a peer.
    #[must_use]
    pub fn times(factor: f64, peer: &str) -> Self {
        Self { factor, peer: Some(peer.to_owned()), plus: 0.0 }
    }

    /// At most a peer and `plus`, in the row's unit.
    #[must_use]
    pub fn above(peer: &str, plus: f64) -> Self {
        Self { factor: 1.0, peer: Some(peer.to_owned()), plus }
    }

    /// At most `limit`, in the row's unit.
    #[must_use]
    pub const fn constant(limit: f64) -> Self {
        Self { factor: 0.0, peer: None, plus: limit }
    }

    fn text(&self, unit: &str) -> String {
        match (&self.peer, self.plus) {
            (None, limit) => format!("<= {}", quantity(limit, unit)),
            (Some(peer), 0.0) => format!("<= {} * {peer}", self.factor),
            (Some(peer), plus) => format!("<= {peer} + {}", quantity(plus, unit)),
        }
    }

    /// The limit, where its peer was measured.
    fn limit(&self, row: &Row) -> Option<f64> {
        let of_peer = match &self.peer {
            None => 0.0,
            Some(name) => self.factor * row.peer(name)?,
        };
        Some(of_peer + self.plus)
    }
}

/// One comparison.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was done.
    pub case: String,
    /// What of it was measured, and how.
    pub metric: String,
    /// Of `ours`, the peers and the spread's base: `ns`, `ms`, `pages`.
    pub unit: &'static str,
    /// Ours: the median.
    pub ours: f64,
    /// The others of the same run, by name.
    pub peers: Vec<(String, f64)>,
    /// What ours should be.
    pub rule: Option<Rule>,
    /// Which processors whom.
    pub pin: String,
    /// How many measurements the medians are of.
    pub runs: usize,
    /// Of ours: see [`crate::stats::spread`].
    pub spread: f64,
}

impl Row {
    fn peer(&self, name: &str) -> Option<f64> {
        self.peers.iter().find(|(peer, _)| peer == name).map(|(_, value)| *value)
    }

    /// Ours in terms of what the rule names.
    fn ratio(&self) -> Option<f64> {
        let rule = self.rule.as_ref()?;
        let base = match &rule.peer {
            Some(name) => self.peer(name)?,
            None => rule.plus,
        };
        Some(self.ours / base)
    }

    fn met(&self) -> Option<bool> {
        let limit = self.rule.as_ref()?.limit(self)?;
        Some(self.ours <= limit)
    }
}

/// A quantity with its unit, in as many digits as are worth reading.
fn quantity(value: f64, unit: &str) -> String {
    let (value, unit) =
        if unit == "ns" && value >= 1000.0 { (value / 1e3, "µs") } else { (value, unit) };
    if value >= 100.0 || value == value.trunc() {
        format!("{value:.0} {unit}")
    } else if value >= 10.0 {
        format!("{value:.1} {unit}")
    } else {
        format!("{value:.2} {unit}")
    }
}

/// The report of one benchmark.
#[derive(Debug)]
pub struct Report {
    bench: &'static str,
    format: Format,
    kernel: String,
    commit: String,
    rows: Vec<Row>,
}

/// What the sources are, for the record; `unknown` outside a checkout.
fn commit() -> String {
    let git = |args: &[&str]| {
        let output =
            Command::new("git").arg("-C").arg(env!("CARGO_MANIFEST_DIR")).args(args).output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".to_owned();
    };
    let is_changed = git(&["status", "--porcelain"]).is_none_or(|changes| !changes.is_empty());
    if is_changed { format!("{commit}+changes") } else { commit }
}

impl Report {
    /// A report without rows.
    #[must_use]
    pub fn new(bench: &'static str, format: Format) -> Self {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        Self { bench, format, kernel, commit: commit(), rows: Vec::new() }
    }

    /// Says what is being measured now.
    pub fn progress(&self, what: &str) {
        // Progress that nobody reads is no reason to stop.
        writeln!(io::stderr(), "{}: {what} …", self.bench).ok();
    }

    /// Says something that the reader must know.
    pub fn note(&self, what: &str) {
        writeln!(io::stderr(), "{}: {what}", self.bench).ok();
    }

    /// Takes a row; as JSON it is printed at once.
    ///
    /// # Errors
    /// When standard output does not take it.
    pub fn add(&mut self, row: Row) -> io::Result<()> {
        if self.format == Format::Json {
            let mut out = io::stdout().lock();
            writeln!(out, "{}", self.json(&row))?;
            out.flush()?;
        }
        self.rows.push(row);
        Ok(())
    }

    fn json(&self, row: &Row) -> Value {
        let rounded = |value: f64| (value * 1000.0).round() / 1000.0;
        let peers: Map<_, _> =
            row.peers.iter().map(|(name, value)| (name.clone(), json!(rounded(*value)))).collect();
        json!({
            "bench": self.bench,
            "case": row.case,
            "metric": row.metric,
            "unit": row.unit,
            "ours": rounded(row.ours),
            "peers": peers,
            "ratio": row.ratio().map(rounded),
            "target": row.rule.as_ref().map(|rule| rule.text(row.unit)),
            "met": row.met(),
            "pin": row.pin,
            "runs": row.runs,
            "spread": rounded(row.spread),
            "kernel": self.kernel,
            "commit": self.commit,
        })
    }

    /// Prints the table, where it was asked for.
    ///
    /// # Errors
    /// When standard output does not take it.
    pub fn finish(&self) -> io::Result<()> {
        if self.format == Format::Json {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        let mut table = Table::new();
        table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(["CASE", "HOW", "OURS", "SPREAD", "TARGET", "MET", "RATIO", "BESIDE"]);
        for row in &self.rows {
            let dash = || "-".to_owned();
            let peers: Vec<_> = row
                .peers
                .iter()
                .map(|(name, value)| format!("{name} {}", quantity(*value, row.unit)))
                .collect();
            table.add_row([
                row.case.clone(),
                row.metric.clone(),
                quantity(row.ours, row.unit),
                format!("{:.0} %", row.spread * 100.0),
                row.rule.as_ref().map_or_else(dash, |rule| rule.text(row.unit)),
                match row.met() {
                    Some(true) => "yes".to_owned(),
                    Some(false) => "NO".to_owned(),
                    None => dash(),
                },
                row.ratio().map_or_else(dash, |ratio| format!("{ratio:.2}")),
                peers.join(", "),
            ]);
        }
        for line in table.lines() {
            writeln!(out, "{}", line.trim_end())?;
        }
        let runs = self.rows.iter().map(|row| row.runs).max().unwrap_or(0);
        writeln!(
            out,
            "{}: medians of up to {runs} interleaved rounds; kernel {}, commit {}",
            self.bench, self.kernel, self.commit
        )?;
        for pin in self.rows.iter().map(|row| &row.pin).collect::<std::collections::BTreeSet<_>>() {
            writeln!(out, "pinned: {pin}")?;
        }
        out.flush()
    }
}
