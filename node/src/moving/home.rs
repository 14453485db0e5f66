//! Programs whose home is this node.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use conet_deputy_link::locks::describe_return;
use conet_deputy_link::{Status, life, mover, phase, trace, view};
use conet_wire::control::{Failure, MemoryMoved, Moved, Place, Reason};
use conet_wire::image::reason;
use conet_wire::moving::{Answer, Ask, Ticket};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::work::{self, Outcome};
use crate::procfs::{ProcessRef, Stat};

/// Between two questions to the node where a program is whether it is still there:
/// its word that the program has ended may have been lost with one of the daemons.
const CHECK_PERIOD: Duration = Duration::from_millis(1500);
/// Between two questions to the kernel whether the other half answers.
const LISTEN_PERIOD: Duration = Duration::from_millis(500);
/// Silence from which a program counts as out of reach: three unanswered questions of
/// the kernel's.
const UNREACHABLE: Duration = Duration::from_secs(3);
/// How soon after a move that failed an end counts as the move's.
const JUST_NOW: Duration = Duration::from_secs(2);
/// How often in a row a node must not know of a program until it is lost.
const MAX_UNKNOWN: u32 = 2;

/// What is kept of a program across restarts of the daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) process: ProcessRef,
    pub(super) uid: u32,
    pub(super) place: Place,
    /// The node it is at, and the name of its stay there.
    pub(super) stay: Option<(String, Ticket)>,
    /// The same of where it is to go. From one node to another it is held at home for a
    /// moment: a daemon that ends meanwhile leaves a program that is at either, or home.
    #[serde(default)]
    pub(super) next: Option<(String, Ticket)>,
    pub(super) remote_pid: Option<u32>,
    pub(super) hops: u64,
    pub(super) sent_home: u64,
    /// Calls forwarded in stays that are over.
    pub(super) calls: u64,
    pub(super) freeze_us: Option<u64>,
    /// How its memory moved last.
    #[serde(default)]
    pub(super) memory: Option<MemoryMoved>,
    /// For how long its other half could not be reached, in absences that are over.
    #[serde(default)]
    pub(super) waited: Duration,
    pub(super) reason: Option<Reason>,
    /// It was made away, and nobody has asked for it since: one of many.
    #[serde(default)]
    is_born_away: bool,
    /// Its name, as last seen.
    #[serde(default)]
    command: String,
}

/// A program, as the table keeps it.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) record: Record,
    /// Held by the thread that traces it: a process has one tracer at a time.
    pub(super) turn: Arc<Mutex<()>>,
    /// A thread is moving it.
    pub(super) is_busy: bool,
    /// The agent's region is in it, or may be.
    pub(super) has_region: bool,
    /// Calls forwarded in this stay.
    pub(super) calls_now: u64,
    /// Where `conet run` wants it, once it has become its program.
    pub(super) wanted: Option<String>,
    pub(super) ended_at: Option<Instant>,
    /// What its node was last told of its being stopped; nothing yet after a restart.
    told_stopped: Option<bool>,
    /// A thread tells its node something: the next may not overtake it.
    is_telling: bool,
    next_tell: Instant,
    next_check: Instant,
    is_checking: bool,
    /// How often in a row its node did not know of it.
    unknown: u32,
    /// For how long its other half has not been heard of, where that is worth telling.
    pub(super) silence: Option<Duration>,
    next_listen: Instant,
    /// When a move of it failed.
    failed_at: Option<Instant>,
    /// Its calls are timed until then.
    pub(super) timed_until: Option<Instant>,
}

/// Something to be done for a program, found by looking at it.
#[derive(Debug)]
pub(super) enum Errand {
    /// Move it there.
    Out(u32, String),
    /// Bring it home, because of this.
    Home(u32, Reason),
    /// Take the agent's region out of it.
    TakeOut(u32, Arc<Mutex<()>>),
    /// Tell its node that it was stopped, or continues.
    Tell(u32, String, Ask),
    /// Ask the node whether this stay goes on.
    Check(u32, String, Ticket),
}

impl Program {
    pub(super) fn new(process: ProcessRef, uid: u32) -> Self {
        Self::from_record(Record {
            process,
            uid,
            place: Place::Home,
            stay: None,
            next: None,
            remote_pid: None,
            hops: 0,
            sent_home: 0,
            calls: 0,
            freeze_us: None,
            memory: None,
            waited: Duration::ZERO,
            reason: None,
            is_born_away: false,
            command: String::new(),
        })
    }

    /// One that was not known, and may have been away without this daemon: made there
    /// when an earlier one had just ended.
    pub(super) fn found(process: ProcessRef, uid: u32) -> Self {
        let deputy = work::as_pid(process.pid).and_then(|pid| mover::status(pid).ok());
        Self { has_region: deputy.is_some(), ..Self::new(process, uid) }
    }

    /// A child that was made away.
    pub(super) fn born(process: ProcessRef, uid: u32, stay: (String, Ticket)) -> Self {
        let mut program = Self::new(process, uid);
        program.record.place = Place::Away;
        program.record.stay = Some(stay);
        program.record.is_born_away = true;
        program.has_region = true;
        program.told_stopped = Some(false);
        // Its remote's pid is asked for soon; most children have ended by then.
        program
    }

    /// Whether it is listed once it has ended.
    pub(super) const fn is_worth_telling(&self) -> bool {
        self.record.hops > 0 || self.record.reason.is_some()
    }

    fn from_record(record: Record) -> Self {
        Self {
            record,
            turn: Arc::default(),
            is_busy: false,
            has_region: false,
            calls_now: 0,
            wanted: None,
            ended_at: None,
            told_stopped: None,
            is_telling: false,
            next_tell: Instant::now(),
            next_check: Instant::now() + CHECK_PERIOD,
            is_checking: false,
            unknown: 0,
            silence: None,
            next_listen: Instant::now(),
            failed_at: None,
            timed_until: None,
        }
    }

    /// A program that an earlier daemon knew. Where a move was under way, the process
    /// itself says on which side it is.
    pub(super) fn found_again(record: Record) -> Self {
        let mut program = Self::from_record(record);
        let raw = program.record.process.pid;
        if program.record.place == Place::Ended || !program.record.process.is_alive() {
            program.end(None);
            return program;
        }
        let deputy = work::as_pid(raw).and_then(|pid| mover::status(pid).ok());
        program.has_region = deputy.is_some();
        let record = &mut program.record;
        record.stay = record.stay.take().or_else(|| record.next.take());
        if work::is_away(raw) && record.stay.is_some() {
            record.place = Place::Away;
            program.next_check = Instant::now();
        } else {
            program.is_home();
        }
        program
    }

    fn is_home(&mut self) {
        self.record.waited += self.silence.take().unwrap_or_default();
        self.record.place = Place::Home;
        self.record.remote_pid = None;
        self.record.stay = None;
        self.record.next = None;
    }

    pub(super) fn command(&self) -> String {
        Stat::of(self.record.process.pid)
            .filter(|stat| stat.started == self.record.process.started)
            .map_or_else(|| self.record.command.clone(), |stat| stat.command)
    }

    /// Looks at the process; whether something worth keeping has changed.
    pub(super) fn look(&mut self, link_timeout: Duration, errands: &mut Vec<Errand>) -> bool {
        if self.record.place == Place::Ended {
            return false;
        }
        if !self.record.process.is_alive() {
            if self.is_busy {
                return false; // its thread will tell how it ended
            }
            self.end(None);
            return true;
        }
        if self.is_busy {
            return false;
        }
        self.record.command = self.command();
        let Some(pid) = work::as_pid(self.record.process.pid) else { return false };
        match self.record.place {
            Place::Away => self.look_away(pid, link_timeout, errands),
            _ => {
                self.look_home(pid, errands);
                false
            }
        }
    }

    fn look_home(&mut self, pid: rustix::process::Pid, errands: &mut Vec<Errand>) {
        let raw = self.record.process.pid;
        if self.has_region {
            match mover::status(pid) {
                Ok(status) if status.phase == phase::HOME => {
                    errands.push(Errand::TakeOut(raw, Arc::clone(&self.turn)));
                }
                Ok(_) => {}
                Err(_) => self.has_region = false,
            }
        }
        // `conet run` has registered itself; the program is there after its execve.
        if self.wanted.is_some()
            && work::is_another_program(raw)
            && let Some(node) = self.wanted.take()
        {
            errands.push(Errand::Out(raw, node));
        }
    }

    fn look_away(
        &mut self,
        pid: rustix::process::Pid,
        link_timeout: Duration,
        errands: &mut Vec<Errand>,
    ) -> bool {
        let Ok(status) = mover::status(pid) else {
            if work::is_ending(self.record.process.pid) {
                return false; // the next look finds that it has ended, away
            }
            // It became another program: away, or before anybody saw it at home.
            return self.came_home(None);
        };
        match status.phase {
            phase::HOME | phase::FINISHING => return self.came_home(Some(&status)),
            phase::LOST => {
                let why = mover::fault_name(status.fault);
                self.note("lost", format!("its other half was lost: {why}"));
                return true;
            }
            _ => self.calls_now = status.calls,
        }
        if self.listen(pid, link_timeout) {
            return true;
        }
        let Ok(seen) = view(pid) else { return false };
        self.look_at_stay(seen.is_stopped, errands);
        let waiting = seen.handled_pending & !status.blocked;
        if status.phase == phase::SERVING && status.shares == 0 && waiting != 0 && !seen.is_stopped
        {
            let signal = waiting.trailing_zeros() + 1;
            let sentence = describe_return(reason::SIGNAL, u64::from(signal));
            let why = Reason { code: "signal".to_owned(), sentence, passing: true };
            errands.push(Errand::Home(self.record.process.pid, why));
        }
        false
    }

    /// Finds out whether its other half can be reached; true when the wait is over.
    fn listen(&mut self, pid: rustix::process::Pid, link_timeout: Duration) -> bool {
        let now = Instant::now();
        if now < self.next_listen {
            return false;
        }
        self.next_listen = now + LISTEN_PERIOD;
        if self.timed_until.take_if(|until| *until <= now).is_some() {
            // Where this fails, the deputy is no more.
            trace::take_times(pid, false).ok();
        }
        let Ok(silence) = life::silence(pid) else { return false };
        let before = self.silence.take();
        if silence < UNREACHABLE {
            self.record.waited += before.unwrap_or_default();
            return false;
        }
        self.silence = Some(silence);
        if silence < link_timeout {
            return false;
        }
        let node = self.record.stay.as_ref().map_or("its node", |(node, _)| node);
        let (waited, seconds) = (silence.as_secs(), link_timeout.as_secs());
        let sentence = format!(
            "{node} was not heard of for {waited} s (link_timeout is {seconds} s); \
             the program there ends too"
        );
        self.note("unreachable", sentence);
        self.record.process.signal(Signal::KILL);
        true
    }

    /// Keeps its node informed, and itself of whether it is still there.
    fn look_at_stay(&mut self, is_stopped: bool, errands: &mut Vec<Errand>) {
        let pid = self.record.process.pid;
        let Some((node, ticket)) = &self.record.stay else { return };
        let now = Instant::now();
        let is_news = self.told_stopped != Some(is_stopped);
        if is_news && !self.is_telling && now >= self.next_tell {
            (self.told_stopped, self.is_telling) = (Some(is_stopped), true);
            let ask = if is_stopped { Ask::Stop(*ticket) } else { Ask::Continue(*ticket) };
            errands.push(Errand::Tell(pid, node.clone(), ask));
        }
        if now >= self.next_check && !self.is_checking {
            (self.next_check, self.is_checking) = (now + CHECK_PERIOD, true);
            errands.push(Errand::Check(pid, node.clone(), *ticket));
        }
    }

    /// Its node has been told what [`Errand::Tell`] said, or could not be.
    pub(super) fn told(&mut self, was_told: bool) {
        self.is_telling = false;
        if !was_told {
            self.told_stopped = None;
            self.next_tell = Instant::now() + CHECK_PERIOD;
        }
    }

    /// What its node answered to [`Errand::Check`], if anything.
    pub(super) fn checked(&mut self, ticket: Ticket, answer: Option<Answer>) {
        self.is_checking = false;
        let node = match &self.record.stay {
            Some((node, current)) if *current == ticket => node.clone(),
            _ => return,
        };
        if self.record.place != Place::Away || self.is_busy {
            return;
        }
        match answer {
            Some(Answer::Running { remote_pid }) => {
                self.record.remote_pid = Some(remote_pid);
                self.unknown = 0;
            }
            Some(Answer::Unknown) if self.is_at_next() => {}
            Some(Answer::Unknown) => {
                self.unknown += 1;
                if self.unknown >= MAX_UNKNOWN {
                    self.lose(&node, None);
                }
            }
            _ => self.unknown = 0,
        }
    }

    /// Where a move was under way when an earlier daemon ended, and its old node has it no
    /// more, it has gone on: true, and that node is asked from now on.
    pub(super) fn is_at_next(&mut self) -> bool {
        let Some(next) = self.record.next.take() else { return false };
        self.record.stay = Some(next);
        (self.unknown, self.next_check) = (0, Instant::now());
        true
    }

    /// It is home without having been asked; without a status, as another program.
    fn came_home(&mut self, status: Option<&Status>) -> bool {
        if status.is_none() && self.record.is_born_away {
            // As most children do.
            self.add_calls();
            self.record.is_born_away = false;
            self.is_home();
            self.has_region = true;
            return true;
        }
        let record = &mut self.record;
        record.hops += 1;
        // What becomes another program has not been sent home for want of anything.
        record.sent_home += u64::from(status.is_some());
        record.calls =
            record.calls.saturating_add(status.map_or(self.calls_now, |status| status.calls));
        record.memory = status.map(|s| work::memory_home(s.pages, s.sliced, s.is_delta == 1));
        self.is_home();
        self.calls_now = 0;
        self.has_region = true;
        self.record.reason = Some(match status {
            Some(status) => Reason {
                code: return_code(status.reason).to_owned(),
                sentence: format!(
                    "it came home: {}",
                    describe_return(status.reason, status.detail)
                ),
                passing: true,
            },
            None => Reason {
                code: "execve".to_owned(),
                sentence: "it became another program, which is at home".to_owned(),
                passing: true,
            },
        });
        true
    }

    /// Enters the calls of this stay; they are what the deputy's memory says.
    fn add_calls(&mut self) {
        let now = std::mem::take(&mut self.calls_now);
        self.record.calls = self.record.calls.saturating_add(now);
    }

    fn note(&mut self, code: &str, sentence: String) {
        self.record.reason = Some(Reason { code: code.to_owned(), sentence, passing: false });
    }

    /// It has ended.
    pub(super) fn end(&mut self, reason: Option<Reason>) {
        if reason.is_some() {
            self.record.reason = reason;
        } else if self.record.reason.is_none() && self.record.place != Place::Home {
            let there = self.record.stay.as_ref().or(self.record.next.as_ref());
            let there = there.map_or("another node", |(node, _)| node);
            let verb = if self.record.place == Place::Away { "was on" } else { "moved to" };
            self.note("ended", format!("it ended while it {verb} {there}"));
        } else if self.record.reason.is_none()
            && self.failed_at.is_some_and(|at| at.elapsed() < JUST_NOW)
        {
            self.note("ended", "it ended while it was moved".to_owned());
        }
        self.record.place = Place::Ended;
        self.add_calls();
        self.record.waited += self.silence.take().unwrap_or_default();
        self.record.remote_pid = None;
        self.ended_at = Some(Instant::now());
    }

    /// Its other half has ended at `node`. What is left here must not stay behind,
    /// also where it waits in a call and does not notice.
    pub(super) fn lose(&mut self, node: &str, status: Option<u32>) {
        let Some(pid) = work::as_pid(self.record.process.pid) else { return };
        let serving =
            mover::status(pid).is_ok_and(|s| matches!(s.phase, phase::SERVING | phase::LOST));
        if !serving {
            return;
        }
        let how = status.map_or_else(|| "ended unseen".to_owned(), describe_status);
        self.note("remote-ended", format!("its other half on {node} {how}"));
        self.record.process.signal(Signal::KILL);
    }

    /// Enters how a move went, and gives the answer to who asked for it.
    pub(super) fn settle(&mut self, outcome: Outcome, home: &str) -> Result<Moved, Failure> {
        let has_left = outcome.returned.is_some() || self.record.stay.is_none();
        if let Some(returned) = outcome.returned {
            let record = &mut self.record;
            // A move from one node straight to another is one.
            record.hops += u64::from(!outcome.is_direct);
            record.calls = record.calls.saturating_add(returned.calls);
            record.freeze_us = Some(work::micros(returned.freeze));
            record.memory =
                Some(work::memory_home(returned.pages, returned.sliced, returned.is_delta));
            self.calls_now = 0;
            self.has_region = true;
            if let Some(why) = outcome.why {
                record.sent_home += 1;
                let sentence = format!("it came home: {}", why.sentence);
                record.reason = Some(Reason { sentence, ..why });
            }
        }
        if let Some(out) = &outcome.out {
            self.record.hops += 1;
            self.record.freeze_us = Some(work::micros(out.moved.freeze));
            self.record.memory = Some(work::memory_out(&out.moved));
            self.record.remote_pid = out.remote_pid;
            self.record.stay = Some((out.node.clone(), out.ticket));
            self.record.next = None;
            self.record.place = Place::Away;
            self.record.reason = None;
            self.has_region = true;
            // Its node takes it for running, as it was when it left.
            (self.told_stopped, self.unknown) = (Some(false), 0);
            self.next_check = Instant::now() + CHECK_PERIOD;
        } else if outcome.is_still_away {
            let record = &mut self.record;
            record.place = Place::Away;
            let next = record.next.take();
            if has_left {
                record.stay = next;
            }
        } else {
            self.is_home();
        }
        match outcome.failure {
            Some(failure) => {
                // Where it is lost, or nobody waits for the answer, `conet ps` tells.
                self.failed_at = Some(Instant::now());
                if failure.code == "lost" || (outcome.is_unasked && self.record.reason.is_none()) {
                    let passing = failure.code != "lost";
                    let (code, sentence) = (failure.code.clone(), failure.message.clone());
                    self.record.reason = Some(Reason { code, sentence, passing });
                }
                Err(failure)
            }
            None => Ok(Moved {
                pid: self.record.process.pid,
                node: outcome.out.map_or_else(|| home.to_owned(), |out| out.node),
                remote_pid: self.record.remote_pid,
                freeze_us: self.record.freeze_us.unwrap_or(0),
                total_us: work::micros(outcome.total),
                memory: self.record.memory.clone(),
            }),
        }
    }
}

const fn return_code(why: u32) -> &'static str {
    match why {
        reason::CALL => "call",
        reason::CALL_32 => "call-32",
        reason::FAULT => "fault",
        reason::SIGNAL => "signal",
        _ => "asked",
    }
}

/// A wait status in words (man 2 wait).
fn describe_status(status: u32) -> String {
    match status & 0x7f {
        0 => format!("ended with status {}", status >> 8 & 0xff),
        signal => format!("was killed by signal {signal}"),
    }
}
