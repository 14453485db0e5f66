//! `conet doctor`: what this machine can and cannot do for conet, and the remedy.
//!
//! ```text
//! examine ─ for each [`Trial`]: this program again, `doctor --trial NAME` ─► try it, say one line
//!         ─ and what needs no trial: the capabilities, the daemon
//! ```
//!
//! The kernel is asked by doing what conet does, not by its version: distributions
//! switch things off and carry others back. A trial may change the process that
//! makes it (namespaces, filters), or crash it where a kernel is odd, so each has
//! one of its own, for at most [`TRIAL_LIMIT`].
//!
//! An ordinary user's trials are made in a user namespace of its own: what they find
//! is what `conet demo` and `conet lab` have there.
//!
//! What it is not: a benchmark; a machine that is `ok` may be slow.

mod trial;

use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use conet_wire::control::{Request, Response};
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

pub use trial::{Need, TRIALS, Trial};

use crate::client::Client;

/// How long one trial may take. Most take milliseconds; a network namespace may wait
/// for the kernel to clean others up.
pub const TRIAL_LIMIT: Duration = Duration::from_secs(20);

/// What was found about one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// All of it is there.
    Ok,
    /// Some of it is there.
    Limited,
    /// It is not there.
    Missing,
}

impl State {
    /// As tables and JSON have it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Limited => "limited",
            Self::Missing => "missing",
        }
    }
}

/// What a trial says on its one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Whether it is there.
    pub state: State,
    /// What was found: a figure, a version, or what the kernel said.
    pub found: String,
}

impl Finding {
    fn new(state: State, found: impl Into<String>) -> Self {
        Self { state, found: found.into() }
    }

    /// `found` where it worked, else what the kernel said.
    fn of<E: std::fmt::Display>(result: Result<String, E>) -> Self {
        match result {
            Ok(found) => Self::new(State::Ok, found),
            Err(error) => Self::new(State::Missing, error.to_string()),
        }
    }
}

/// One line of the examination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Short and stable, as in `user-namespaces`.
    pub name: &'static str,
    /// Whether it is there.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What of conet needs it.
    pub feature: &'static str,
    /// What to do; none where it is there.
    pub remedy: Option<&'static str>,
    /// What cannot work at all without it.
    #[serde(skip)]
    pub need: Need,
}

/// What this machine can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Examination {
    /// By importance.
    pub checks: Vec<Check>,
}

impl Examination {
    /// Whether programs can move between this machine and others.
    #[must_use]
    pub fn moves_programs(&self) -> bool {
        !self.lacks(&[Need::Moving, Need::Both])
    }

    /// Whether packets can travel between guests.
    #[must_use]
    pub fn tunnels(&self) -> bool {
        !self.lacks(&[Need::Tunnelling, Need::Both])
    }

    /// What is missing that something cannot work without, by name.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        let needed = self.checks.iter().filter(|check| check.need != Need::Nothing);
        needed.filter(|check| check.state == State::Missing).map(|check| check.name).collect()
    }

    fn lacks(&self, needs: &[Need]) -> bool {
        self.checks.iter().any(|check| check.state == State::Missing && needs.contains(&check.need))
    }
}

/// Examines this machine. `program` is one that answers `doctor --trial NAME` with
/// [`Trial::run`]; `socket` is where a daemon would listen.
#[must_use]
pub fn examine(program: &Path, socket: &Path) -> Examination {
    let findings: Vec<_> =
        TRIALS.iter().map(|trial| (trial, try_apart(program, trial.name))).collect();
    let namespaces = findings
        .iter()
        .any(|(trial, finding)| trial.name == "user-namespaces" && finding.state != State::Missing);
    let mut checks = vec![privileges(namespaces)];
    checks.extend(findings.into_iter().map(|(trial, finding)| Check {
        name: trial.name,
        remedy: (finding.state != State::Ok).then_some(trial.remedy),
        state: finding.state,
        found: finding.found,
        feature: trial.feature,
        need: trial.need,
    }));
    checks.push(daemon(socket));
    Examination { checks }
}

/// The first of these trials whose facility this machine lacks, as a sentence with the
/// remedy; none where all is there. `program` as for [`examine`].
#[must_use]
pub fn lacks(program: &Path, trials: &[&Trial]) -> Option<String> {
    trials.iter().find_map(|trial| {
        let finding = try_apart(program, trial.name);
        (finding.state == State::Missing)
            .then(|| format!("{}: {}; {}", trial.name, finding.found, trial.remedy))
    })
}

/// What the daemon cannot do without, of the calling thread's capabilities.
const CAPABILITIES: [(CapabilitySet, &str); 8] = [
    (CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN"),
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
    (CapabilitySet::NET_RAW, "CAP_NET_RAW"),
    (CapabilitySet::SYS_PTRACE, "CAP_SYS_PTRACE"),
    (CapabilitySet::SETUID, "CAP_SETUID"),
    (CapabilitySet::SETGID, "CAP_SETGID"),
    (CapabilitySet::KILL, "CAP_KILL"),
    (CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
];

/// Without them there are namespaces of one's own, if the kernel gives these.
fn privileges(namespaces: bool) -> Check {
    let lacking: Vec<_> = match rustix::thread::capabilities(None) {
        Ok(sets) => CAPABILITIES
            .iter()
            .filter(|(capability, _)| !sets.effective.contains(*capability))
            .map(|(_, name)| *name)
            .collect(),
        Err(_) => vec!["all"],
    };
    let uid = rustix::process::geteuid().as_raw();
    let alone = conet_netsys::userns::has_one_id().unwrap_or(false);
    let (state, found) = match (lacking.is_empty(), alone, namespaces) {
        (true, false, _) => (State::Ok, format!("uid {uid}, all that the daemon needs")),
        (true, true, _) => (State::Limited, "root of a user namespace of one id".to_owned()),
        (false, _, true) => (State::Limited, format!("uid {uid}, without {}", lacking.join(", "))),
        (false, _, false) => (State::Missing, format!("uid {uid}, without {}", lacking.join(", "))),
    };
    Check {
        name: "privileges",
        remedy: (state != State::Ok).then_some(
            "run as root; without, conet demo and conet lab work in a user namespace of their own, \
             with no way to the LAN",
        ),
        state,
        found,
        feature: "the daemon, other hosts on the LAN, programs of several users",
        need: Need::Both,
    }
}

/// A daemon is no part of the machine: nothing fails for want of one.
fn daemon(socket: &Path) -> Check {
    let answer = Client::connect(socket).and_then(|mut client| {
        client.set_timeout(Some(Duration::from_secs(5)))?;
        client.ask(&Request::Status {})
    });
    let (state, found) = match answer {
        Ok(Response::Status(status)) => {
            let daemon = format!("{} {}, pid {}", status.name, status.version, status.pid);
            (State::Ok, format!("{daemon}, {} of {} peers up", status.peers_up, status.peers))
        }
        Ok(_) => (State::Limited, format!("{} answers something else", socket.display())),
        Err(_) => (State::Limited, format!("none answers at {}", socket.display())),
    };
    Check {
        name: "daemon",
        remedy: (state != State::Ok).then_some("start it: conet up"),
        state,
        found,
        feature: "conet run, migrate, ps, guest; not conet demo and conet lab",
        need: Need::Nothing,
    }
}

/// Makes a trial in a process of its own.
fn try_apart(program: &Path, name: &str) -> Finding {
    let child = Command::new(program)
        .args(["doctor", "--trial", name])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let result = child.and_then(|mut child| finish(&mut child));
    match result {
        Ok(Some(line)) => serde_json::from_str(&line).unwrap_or_else(|_| {
            Finding::new(State::Missing, "the trial ended without an answer; it may have crashed")
        }),
        Ok(None) => Finding::new(
            State::Missing,
            format!("the trial did not end within {} s", TRIAL_LIMIT.as_secs()),
        ),
        Err(error) => Finding::new(State::Missing, format!("cannot be tried: {error}")),
    }
}

/// What the child said when it has ended; none where it had to be killed.
fn finish(child: &mut Child) -> io::Result<Option<String>> {
    let started = Instant::now();
    // Short waits at first: most trials take a few milliseconds.
    let mut pause = Duration::from_millis(1);
    while child.try_wait()?.is_none() {
        if started.elapsed() > TRIAL_LIMIT {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    let mut said = String::new();
    if let Some(out) = child.stdout.as_mut() {
        // A line is short, and its writer has ended: what is there is all there is.
        out.take(4096).read_to_string(&mut said)?;
    }
    Ok(Some(said))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(state: State, need: Need) -> Check {
        let (name, found, feature) = ("x", String::new(), "");
        Check { name, state, found, feature, remedy: None, need }
    }

    #[test]
    fn only_what_is_needed_decides() {
        let of = |checks: Vec<Check>| Examination { checks };
        let fine = of(vec![
            check(State::Limited, Need::Both),
            check(State::Missing, Need::Nothing),
            check(State::Ok, Need::Moving),
        ]);
        assert!(fine.moves_programs() && fine.tunnels() && fine.missing().is_empty());
        let moves = of(vec![check(State::Missing, Need::Tunnelling)]);
        assert!(moves.moves_programs() && !moves.tunnels());
        let neither = of(vec![check(State::Missing, Need::Both)]);
        assert!(!neither.moves_programs() && !neither.tunnels());
        assert_eq!(neither.missing(), ["x"]);
    }

    #[test]
    fn a_trial_that_crashes_hangs_or_is_not_there_is_missing() {
        for (program, said) in [("/bin/false", "crashed"), ("/no/such/program", "cannot be tried")]
        {
            let finding = try_apart(Path::new(program), "kernel");
            assert_eq!(finding.state, State::Missing);
            assert!(finding.found.contains(said), "{}", finding.found);
        }
    }

    #[test]
    fn without_a_daemon_the_remedy_is_told() {
        let check = daemon(Path::new("/no/such/socket"));
        assert_eq!(check.state, State::Limited);
        assert!(check.remedy.is_some_and(|remedy| remedy.contains("conet up")));
    }
}
