//! What a benchmark says: a table for people, or one JSON object a line.
//!
//! A row compares ours with its peers of the same run, and may have a rule over it.
//! A rule whose peer was not measured is not met and not missed: `met` is `null`.
//! A row may name the peer that is its bound: what a minimal independent program takes
//! for the same, so that a rule that is missed shows how much of it could be won.
//!
//! ```text
//! {bench, case, metric, unit, ours, peers {name: value}, ratio, target, met,
//!  bound {name, value, ratio} or null, pin, runs, spread, kernel, commit, versions {name: text}}
//! ```

use std::collections::BTreeSet;
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

/// A limit for ours: an upper one, or by [`Rule::at_least`] a lower one.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    factor: f64,
    peer: Option<String>,
    plus: f64,
    is_lower: bool,
}

impl Rule {
    /// At most `factor` times a peer.
    #[must_use]
    pub fn times(factor: f64, peer: &str) -> Self {
        Self { factor, peer: Some(peer.to_owned()), plus: 0.0, is_lower: false }
    }

    /// At least `factor` times a peer: for what is better the more it is.
    #[must_use]
    pub fn at_least(factor: f64, peer: &str) -> Self {
        Self { is_lower: true, ..Self::times(factor, peer) }
    }

    /// At most a peer and `plus`, in the row's unit.
    #[must_use]
    pub fn above(peer: &str, plus: f64) -> Self {
        Self { factor: 1.0, peer: Some(peer.to_owned()), plus, is_lower: false }
    }

    /// At most `limit`, in the row's unit.
    #[must_use]
    pub const fn constant(limit: f64) -> Self {
        Self { factor: 0.0, peer: None, plus: limit, is_lower: false }
    }

    fn text(&self, unit: &str) -> String {
        let sign = if self.is_lower { ">=" } else { "<=" };
        match (&self.peer, self.plus) {
            (None, limit) => format!("{sign} {}", quantity(limit, unit)),
            (Some(peer), 0.0) => format!("{sign} {} * {peer}", self.factor),
            (Some(peer), plus) => format!("{sign} {peer} + {}", quantity(plus, unit)),
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
    /// The peer that shows the least that is possible.
    pub bound: Option<String>,
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
        (base != 0.0).then(|| self.ours / base)
    }

    /// The bound's name and time, and ours in terms of it; none where it was not
    /// measured.
    fn bound(&self) -> Option<(&str, f64, f64)> {
        let name = self.bound.as_deref()?;
        let value = self.peer(name)?;
        Some((name, value, self.ours / value))
    }

    fn met(&self) -> Option<bool> {
        let rule = self.rule.as_ref()?;
        let limit = rule.limit(self)?;
        Some(if rule.is_lower { self.ours >= limit } else { self.ours <= limit })
    }

    /// As the table shows it.
    fn cells(&self) -> [String; 9] {
        let dash = || "-".to_owned();
        let peers: Vec<_> = self
            .peers
            .iter()
            .map(|(name, value)| format!("{name} {}", quantity(*value, self.unit)))
            .collect();
        [
            self.case.clone(),
            self.metric.clone(),
            quantity(self.ours, self.unit),
            format!("{:.0} %", self.spread * 100.0),
            self.rule.as_ref().map_or_else(dash, |rule| rule.text(self.unit)),
            match self.met() {
                Some(true) => "yes".to_owned(),
                Some(false) => "NO".to_owned(),
                None => dash(),
            },
            self.ratio().map_or_else(dash, |ratio| format!("{ratio:.2}")),
            self.bound().map_or_else(dash, |(name, _, ratio)| format!("{ratio:.2} * {name}")),
            peers.join(", "),
        ]
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
    versions: Vec<(String, String)>,
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
        Self { bench, format, kernel, commit: commit(), versions: Vec::new(), rows: Vec::new() }
    }

    /// Says what a peer is, and of which version: in each row that it is in.
    pub fn version(&mut self, peer: &str, version: &str) {
        self.versions.push((peer.to_owned(), version.to_owned()));
    }

    /// The kernel's release.
    #[must_use]
    pub fn kernel(&self) -> &str {
        &self.kernel
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
        let bound = row.bound().map(|(name, value, ratio)| {
            json!({"name": name, "value": rounded(value), "ratio": rounded(ratio)})
        });
        let of_row = self.versions.iter().filter(|(name, _)| row.peer(name).is_some());
        let versions: Map<_, _> =
            of_row.map(|(name, version)| (name.clone(), json!(version))).collect();
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
            "bound": bound,
            "pin": row.pin,
            "runs": row.runs,
            "spread": rounded(row.spread),
            "kernel": self.kernel,
            "commit": self.commit,
            "versions": versions,
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
        self.print(&mut out)?;
        out.flush()
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let mut table = Table::new();
        table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header([
            "CASE", "HOW", "OURS", "SPREAD", "TARGET", "MET", "RATIO", "LEAST", "BESIDE",
        ]);
        for row in &self.rows {
            table.add_row(row.cells());
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
        let least = "ours in terms of what a minimal independent program takes";
        writeln!(out, "RATIO: ours in terms of the target's peer; LEAST: {least}")?;
        for pin in self.rows.iter().map(|row| &row.pin).collect::<BTreeSet<_>>() {
            writeln!(out, "pinned: {pin}")?;
        }
        for (peer, version) in &self.versions {
            if self.rows.iter().any(|row| row.peer(peer).is_some()) {
                writeln!(out, "{peer}: {version}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
