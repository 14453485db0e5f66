//! `conet demo`: the main job, end to end, on one machine, with figures.
//!
//! ```text
//! for each mode:  lab up ─► steps, each with figures ─► lab down
//! ```
//!
//! A step that fails does not end the demonstration: the others still say what
//! works. A Ctrl-C does, and so does a lab that does not come up. Whatever
//! happens, the lab is removed ([`Raised`] does so when dropped). A step that this
//! machine cannot show, as its doctor finds, is *unavailable* and not tried.
//!
//! What a step does is in the modules below, by subject; each step is a function
//! from the raised lab to its figures.

mod needs;
mod network;
mod process;
pub mod program;
mod random;
mod socket;

use std::sync::atomic::Ordering;
use std::time::Instant;

use conet_node::client::ClientError;
use conet_node::config::Mode;
use serde::Serialize;
use serde_json::{Map, Value, json};
use thiserror::Error;

use self::needs::Need;
use crate::measure::MeasureError;
use crate::{LabError, LabState, Options, Watch, down, up};

/// One figure that a step found.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// What it is, as in `rtt_p50`.
    pub name: &'static str,
    /// The number, or what was seen.
    pub value: Value,
    /// Its unit, or empty where it has none.
    pub unit: &'static str,
}

impl Figure {
    fn new(name: &'static str, value: impl Into<Value>, unit: &'static str) -> Self {
        Self { name, value: value.into(), unit }
    }
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Its name, with the mode where it has one.
    pub name: String,
    /// Why it failed, and what to do; none where it succeeded.
    pub error: Option<String>,
    /// Why this machine cannot show it, and what to do; then it was not tried.
    pub unavailable: Option<String>,
    /// What it found.
    pub figures: Vec<Figure>,
    /// How long it took.
    pub seconds: f64,
}

impl Step {
    fn unavailable(name: String, reason: String) -> Self {
        let unavailable = Some(reason);
        Self { name, error: None, unavailable, figures: Vec::new(), seconds: 0.0 }
    }

    /// Whether it succeeded.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.error.is_none() && self.unavailable.is_none()
    }

    /// As the report has it: `name`, `ok`, `seconds`, `figures` by name and unit,
    /// and `error` where there was one. `ok` is null where there is `unavailable`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut figures = Map::new();
        for figure in &self.figures {
            let unit =
                if figure.unit.is_empty() { String::new() } else { format!("_{}", figure.unit) };
            figures.insert(format!("{}{unit}", figure.name), figure.value.clone());
        }
        let mut step = json!({
            "name": self.name,
            "ok": self.ok(),
            "seconds": self.seconds,
            "figures": figures,
        });
        if let Some(error) = &self.error {
            step["error"] = Value::from(error.as_str());
        }
        if let Some(reason) = &self.unavailable {
            step["ok"] = Value::Null;
            step["unavailable"] = Value::from(reason.as_str());
        }
        step
    }
}

/// Why a step failed; each text ends with what to do.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StepError {
    /// The lab.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A measurement.
    #[error(transparent)]
    Measure(#[from] MeasureError),
    /// Something is on the LAN that must not be.
    #[error("the LAN carried {what} ({count} frames); this is a bug, report it")]
    OnTheLan {
        /// What it is.
        what: String,
        /// In how many frames.
        count: u64,
    },
    /// The capture does not show what it must, so it proves nothing.
    #[error("the capture shows no {what}, so it proves nothing; try again on an idle machine")]
    NothingSeen {
        /// What was to be seen.
        what: &'static str,
    },
    /// The daemon did not do what it was asked.
    #[error(transparent)]
    Daemon(#[from] ClientError),
    /// A program does not go on.
    #[error("{what} does not come; see ps, and the daemons' logs in {}", crate::STATE_DIR)]
    Slow {
        /// What was waited for.
        what: &'static str,
    },
    /// A program ended before it had shown anything.
    #[error("the program ended after {hops} of {wanted} moves (seed {seed}); try an idle machine")]
    FewHops {
        /// Moves until then.
        hops: usize,
        /// Least moves.
        wanted: usize,
        /// What the times of the moves follow from.
        seed: u64,
    },
    /// A program that moved is not as one that did not.
    #[error("{what} is {moved:?} moved and {unmoved:?} unmoved; this is a bug, report it")]
    Differs {
        /// What differs.
        what: String,
        /// In the program that moved.
        moved: String,
        /// In the one that did not.
        unmoved: String,
    },
    /// A program did not do its work, wherever it ran.
    #[error("the program ended with {status} and said {said:?} last; this is a bug, report it")]
    Broken {
        /// How it ended.
        status: String,
        /// The last line that it wrote.
        said: String,
    },
    /// A program did not stay away.
    #[error("the program did not work away: {reason}; this is a bug, report it")]
    Stayed {
        /// Why, as the daemon says.
        reason: String,
    },
    /// A connection.
    #[error(transparent)]
    Socket(#[from] socket::SocketError),
}

/// What a step gives.
pub type Figures = Result<Vec<Figure>, StepError>;

/// A lab that is up, until this is dropped.
#[derive(Debug)]
pub struct Raised {
    /// The lab.
    pub state: LabState,
    /// How its packets travel.
    pub mode: Mode,
    lowered: bool,
}

impl Raised {
    fn lower(&mut self) -> Figures {
        self.lowered = true;
        let removed = down()?;
        Ok(vec![Figure::new("processes", removed.processes, "")])
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        if !self.lowered {
            // On the way out because of another failure: that one is told.
            drop(self.lower());
        }
    }
}

/// All steps.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// In the order in which they ran.
    pub steps: Vec<Step>,
    /// How long all took.
    pub seconds: f64,
    /// Whether somebody asked to stop.
    pub interrupted: bool,
    /// Whether it ran in a user namespace of one id, as an ordinary user's does.
    pub rootless: bool,
}

#[derive(Serialize)]
struct ReportJson {
    ok: bool,
    interrupted: bool,
    rootless: bool,
    seconds: f64,
    steps: Vec<Value>,
}

impl Report {
    /// Whether every step that this machine can show ran and succeeded, and there was
    /// one.
    #[must_use]
    pub fn ok(&self) -> bool {
        !self.interrupted
            && self.steps.iter().any(Step::ok)
            && self.steps.iter().all(|step| step.error.is_none())
    }

    /// The report as one JSON object, with `steps` in it.
    ///
    /// # Errors
    ///
    /// None in practice: all keys are strings.
    pub fn to_json(&self) -> serde_json::Result<Value> {
        serde_json::to_value(ReportJson {
            ok: self.ok(),
            interrupted: self.interrupted,
            rootless: self.rootless,
            seconds: self.seconds,
            steps: self.steps.iter().map(Step::to_json).collect(),
        })
    }
}

/// Runs the demonstration. `told` hears of each step as it ends.
#[must_use]
pub fn demo(watch: Watch<'_>, told: &mut dyn FnMut(&Step)) -> Report {
    let started = Instant::now();
    let mut run = Run { watch, told, report: Report::default() };
    for mode in [Mode::WireGuard, Mode::IpIp] {
        run.mode(mode);
    }
    let mut report = run.report;
    report.interrupted = watch.interrupted.load(Ordering::Relaxed);
    report.rootless = crate::rootless::is_inside();
    report.seconds = started.elapsed().as_secs_f64();
    report
}

/// The demonstration under way.
struct Run<'a> {
    watch: Watch<'a>,
    told: &'a mut dyn FnMut(&Step),
    report: Report,
}

impl Run<'_> {
    /// All that is shown in one mode.
    fn mode(&mut self, mode: Mode) {
        let mut raised = None;
        let watch = self.watch;
        let name = |what: &str| format!("{what} ({mode})");
        self.step(Need::Lab(mode), &name("lab up"), || {
            let state = up(&Options { hosts: 2, guests: 1, ipv6: false, mode }, watch)?;
            let hosts = state.hosts.len();
            raised = Some(Raised { state, mode, lowered: false });
            Ok(vec![Figure::new("hosts", hosts, "")])
        });
        let Some(mut raised) = raised else { return self.without_lab(mode) };
        self.step(Need::Nothing, &name("ping"), || network::ping(&raised));
        self.step(Need::Nothing, &name("tcp there"), || network::tcp(&raised, 1, 2));
        self.step(Need::Nothing, &name("tcp back"), || network::tcp(&raised, 2, 1));
        self.step(Need::Nothing, &name("lan capture"), || network::capture(&raised));
        if mode == Mode::WireGuard {
            self.step(Need::Moving, &name("process moves"), || process::moves(&raised, watch));
            self.step(Need::Moving, &name("forwarded call"), || process::calls(&raised, watch));
            self.step(Need::Sockets, &name("socket moves"), || socket::moves(&raised, watch));
        }
        // Also after a Ctrl-C, when the steps before were left out.
        self.always(&name("lab down"), || raised.lower());
    }

    /// Where this machine cannot have the lab, it cannot have what is shown in it.
    fn without_lab(&mut self, mode: Mode) {
        let reason = self.report.steps.last().and_then(|step| step.unavailable.clone());
        let Some(reason) = reason else { return };
        let only = ["process moves", "forwarded call", "socket moves"];
        let more = if mode == Mode::WireGuard { &only[..] } else { &[] };
        for what in ["ping", "tcp there", "tcp back", "lan capture"].iter().chain(more) {
            self.tell(Step::unavailable(format!("{what} ({mode})"), reason.clone()));
        }
    }

    /// Runs a step, unless somebody asked to stop, or this machine lacks what it needs.
    fn step(&mut self, need: Need, name: &str, work: impl FnOnce() -> Figures) {
        if self.watch.interrupted.load(Ordering::Relaxed) {
            return;
        }
        match need.lacking() {
            Some(reason) => self.tell(Step::unavailable(name.to_owned(), reason)),
            None => self.always(name, work),
        }
    }

    fn always(&mut self, name: &str, work: impl FnOnce() -> Figures) {
        (self.watch.progress)(name);
        let started = Instant::now();
        let outcome = work();
        let seconds = started.elapsed().as_secs_f64();
        let (figures, error) = match outcome {
            Ok(figures) => (figures, None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        self.tell(Step { name: name.to_owned(), error, unavailable: None, figures, seconds });
    }

    fn tell(&mut self, step: Step) {
        (self.told)(&step);
        self.report.steps.push(step);
    }
}

/// With one digit after the point.
fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    fn step(error: Option<&str>) -> Step {
        Step {
            name: "ping (ipip)".to_owned(),
            error: error.map(str::to_owned),
            unavailable: None,
            figures: vec![Figure::new("rtt_p50", 12.5, "us"), Figure::new("frames", 3, "")],
            seconds: 0.5,
        }
    }

    #[test]
    fn a_step_names_its_figures_with_their_units() {
        assert_eq!(
            step(None).to_json(),
            json!({
                "name": "ping (ipip)",
                "ok": true,
                "seconds": 0.5,
                "figures": { "rtt_p50_us": 12.5, "frames": 3 },
            })
        );
        assert_eq!(step(Some("x; y")).to_json()["error"], "x; y");
    }

    #[test]
    fn a_report_is_good_only_whole() {
        let good = Report { steps: vec![step(None)], ..Report::default() };
        assert!(good.ok());
        assert!(!Report::default().ok());
        assert!(!Report { interrupted: true, ..good.clone() }.ok());
        assert!(!Report { steps: vec![step(None), step(Some("x"))], ..good.clone() }.ok());
        // What cannot be shown is no failure, and shows nothing.
        let left_out = || Step::unavailable("x".to_owned(), "no y; get y".to_owned());
        assert!(Report { steps: vec![step(None), left_out()], ..good.clone() }.ok());
        assert!(!Report { steps: vec![left_out()], ..good.clone() }.ok());
        let shown = left_out().to_json();
        assert_eq!((&shown["ok"], &shown["unavailable"]), (&Value::Null, &json!("no y; get y")));
        assert_eq!(good.to_json().unwrap()["steps"][0]["name"], "ping (ipip)");
    }

    #[test]
    fn an_interrupted_run_makes_nothing() {
        let interrupted = AtomicBool::new(true);
        let watch = Watch { progress: &|_| {}, interrupted: &interrupted };
        let report = demo(watch, &mut |_| {});
        assert!(report.steps.is_empty() && report.interrupted && !report.ok());
    }
}
