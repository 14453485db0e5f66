//! The process manager: programs of this node that move, and those of others here.
//!
//! ```text
//!            register           migrate NODE            migrate home, a lock, a signal
//!  (conet run) ──► Home ──► Moving ──────► Away ──► Moving ──────► Home
//!                   └──────── ends ────────┴─ ends, other half lost ──► Ended (kept a while)
//! ```
//!
//! The control thread owns the table; it never waits. A move runs on a thread of its
//! own (`work`), which answers by an [`Event`]. What can be seen from outside is
//! looked at 20 times a second while a program is away ([`Movers::handle_timeout`]):
//! whether it came home by itself, is stopped, has a handled signal waiting, or has
//! ended. That costs some 100 µs per program and look; in return nothing of a
//! program's life depends on this daemon, which may die and come back at any time.
//!
//! What is known is written to the state directory before each move (`store`), so
//! a later daemon finds every deputy again; which side of a half-done move it is on
//! says the process itself.
//!
//! - `arrivals`: the port to which their links come.
//! - `family`: children that programs make while they are away.
//! - `direct`: from one node to another.
//! - `home`: records of this node's programs.
//! - `guests`: programs of others, in sandboxes here.

mod arrivals;
mod direct;
mod family;
mod guests;
mod home;
mod work;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use conet_deputy_link::hosting::WardenEvent;
use conet_deputy_link::locks::{self, Policy};
use conet_deputy_link::trace;
use conet_wire::control::{
    Failure, How, Moved, Place, Process, Reason, Response, Trace, TracedCall, Why,
};
use conet_wire::moving::{Answer, Ask, Ticket};
use conet_wire::peer;

use crate::caller::Caller;
use crate::config::PeerConfig;
use crate::control::Responder;
use crate::daemon::NodeHandle;
use crate::peers::PeerResponder;
use crate::processes::{Processes, no_such_process};
use crate::procfs::{ProcessRef, Stat, owner};
use crate::store;
use family::Birth;
use guests::Guests;
use home::{Program, Record};
use work::Outcome;

/// Between two looks while a program is away or about to go.
const WATCH: Duration = Duration::from_millis(50);
/// Between two looks while all are at home.
const IDLE_WATCH: Duration = Duration::from_millis(500);
/// How long an ended program is listed.
const KEEP_ENDED: Duration = Duration::from_secs(600);
/// How long calls are timed after the last that asked for it.
const TIMED: Duration = Duration::from_secs(5);
/// Most ended programs that are listed.
const MAX_ENDED: usize = 500;
/// How far above a process its registered ancestor may be.
const MAX_DEPTH: u32 = 64;

/// What threads tell the table.
#[derive(Debug)]
pub enum Event {
    /// A move is over.
    Worked {
        /// The program.
        pid: u32,
        /// How it went.
        outcome: Box<Outcome>,
        /// Who asked, unless nobody did.
        answer: Option<Responder>,
    },
    /// Its node has heard that a program is stopped or continues, or could not be told.
    Told {
        /// The program.
        pid: u32,
        /// Whether it has heard.
        was_told: bool,
    },
    /// Its node was asked whether a program is still there.
    Checked {
        /// The program.
        pid: u32,
        /// Its stay.
        ticket: Ticket,
        /// The answer, if one came.
        answer: Option<Answer>,
    },
    /// A child has been made away.
    Born(Birth),
    /// A warden says something.
    Warden {
        /// Its sandbox: the stay of the process that it was made for.
        sandbox: Ticket,
        /// What; none when it is gone.
        said: Option<WardenEvent>,
    },
    /// A link has come, and its sandbox stands.
    GuestRuns {
        /// Which stay.
        ticket: Ticket,
        /// The remote, as this host counts.
        remote_pid: u32,
    },
    /// A hosted program has never begun.
    GuestFailed {
        /// Which stay.
        ticket: Ticket,
    },
}

/// The table of programs.
#[derive(Debug)]
pub struct Movers {
    node: NodeHandle<Event>,
    programs: BTreeMap<u32, Program>,
    guests: Guests,
    file: PathBuf,
    next_look: Instant,
}

impl Movers {
    /// Finds what an earlier daemon left and goes on with it.
    #[must_use]
    pub fn new(node: NodeHandle<Event>) -> Self {
        let state = node.config().node.state_dir.clone();
        let file = state.join("processes.json");
        let mut programs = BTreeMap::new();
        for record in store::load::<Vec<Record>>(&file).unwrap_or_default() {
            let program = Program::found_again(record);
            let pid = program.record.process.pid;
            tracing::info!(pid, place = ?program.record.place, "found a program again");
            programs.insert(pid, program);
        }
        let guests = Guests::new(node.clone(), state.join("hosted"));
        Self { node, programs, guests, file, next_look: Instant::now() }
    }

    fn save(&self) {
        let records: Vec<&Record> = self.programs.values().map(|p| &p.record).collect();
        if let Err(error) = store::save(&self.file, &records) {
            tracing::error!(%error, file = %self.file.display(), "cannot keep the table");
        }
    }

    fn policy(&self, is_deputy: bool) -> Policy {
        Policy { allow_root: self.node.config().node.allow_root, is_deputy, started: None }
    }

    /// The program of a pid: one that was registered, or that one has started.
    fn find(&mut self, caller: Caller, pid: u32) -> Result<&mut Program, Failure> {
        let current = ProcessRef::of(pid);
        let is_known = self
            .programs
            .get(&pid)
            .is_some_and(|program| current.is_none_or(|current| program.record.process == current));
        if let (Some(process), Some(uid)) = (current, owner(pid)) {
            // Its owner now: a program may have become another user's by execve.
            if !caller.may_act_for(uid) || !is_known && !self.descends(pid) {
                return Err(no_such_process(pid));
            }
            if !is_known {
                self.programs.insert(pid, Program::found(process, uid));
            }
        }
        self.programs
            .get_mut(&pid)
            .filter(|program| caller.may_act_for(program.record.uid))
            .ok_or_else(|| no_such_process(pid))
    }

    /// Whether a registered program is among the ancestors of `pid`.
    fn descends(&self, pid: u32) -> bool {
        let mut at = pid;
        for _ in 0..MAX_DEPTH {
            let Some(stat) = Stat::of(at) else { return false };
            at = stat.parent;
            let here = self.programs.get(&at).map(|program| program.record.process);
            if here.is_some_and(ProcessRef::is_alive) {
                return true;
            }
            if at <= 1 {
                return false;
            }
        }
        false
    }

    /// Starts a move; its thread answers.
    fn begin(
        &mut self,
        pid: u32,
        to: Option<String>,
        how: How,
        answer: Option<Responder>,
        why: Option<Reason>,
    ) {
        let allow_root = self.node.config().node.allow_root;
        let Some(program) = self.programs.get_mut(&pid) else { return };
        let job = work::Job {
            pid,
            turn: Arc::clone(&program.turn),
            record: program.record.clone(),
            to,
            how,
            policy: Policy {
                allow_root,
                is_deputy: program.has_region,
                started: Some(program.record.process.started),
            },
            name: Stat::of(pid).map(|stat| stat.command).unwrap_or_default(),
            ticket: work::new_ticket(),
            why,
        };
        if let Some(node) = &job.to {
            program.record.next = Some((node.clone(), job.ticket));
        }
        program.is_busy = true;
        program.record.place = Place::Moving;
        self.save();
        work::start(self.node.clone(), job, answer);
    }

    fn finish(&mut self, pid: u32, outcome: Outcome, answer: Option<Responder>) {
        let home = self.node.config().node.name.clone();
        let Some(program) = self.programs.get_mut(&pid) else { return };
        program.is_busy = false;
        let reply = program.settle(outcome, &home);
        if reply.is_err() && !program.record.process.is_alive() {
            program.end(None);
        }
        self.save();
        if let Some(answer) = answer {
            answer.answer(reply.map(Response::Moved));
        } else if let Err(failure) = reply {
            tracing::warn!(pid, %failure, "a move failed");
        }
    }

    /// Looks at every program.
    fn look(&mut self) {
        let link_timeout = self.node.config().node.link_timeout;
        let pids: Vec<u32> = self.programs.keys().copied().collect();
        let mut changed = false;
        let mut errands = Vec::new();
        for pid in pids {
            let Some(program) = self.programs.get_mut(&pid) else { continue };
            changed |= program.look(link_timeout, &mut errands);
        }
        for errand in errands {
            match errand {
                home::Errand::Out(pid, node) => {
                    self.begin(pid, Some(node), How::default(), None, None)
                }
                home::Errand::Home(pid, why) => {
                    self.begin(pid, None, How::default(), None, Some(why))
                }
                home::Errand::TakeOut(pid, turn) => work::take_out(pid, turn),
                home::Errand::Tell(pid, node, ask) => {
                    work::ask(self.node.clone(), node, ask, move |answer| {
                        let was_told = answer == Some(Answer::Done);
                        Some(Event::Told { pid, was_told })
                    });
                }
                home::Errand::Check(pid, node, ticket) => {
                    work::ask(self.node.clone(), node, Ask::Where(ticket), move |answer| {
                        Some(Event::Checked { pid, ticket, answer })
                    });
                }
            }
        }
        let now = Instant::now();
        let before = self.programs.len();
        self.programs.retain(|_, program| {
            let is_worth_telling = program.is_worth_telling();
            program.ended_at.is_none_or(|at| is_worth_telling && now - at < KEEP_ENDED)
        });
        let ended = self.programs.values().filter(|p| p.ended_at.is_some()).count();
        if ended > MAX_ENDED {
            let oldest =
                self.programs.iter().filter_map(|(pid, p)| Some((p.ended_at?, *pid))).min();
            if let Some((_, pid)) = oldest {
                self.programs.remove(&pid);
            }
        }
        if changed || before != self.programs.len() {
            self.save();
        }
    }

    /// A child of a program of ours has been made away; it runs when it is noted.
    fn on_born(&mut self, birth: &Birth) {
        let (pid, line) = (birth.pid, &birth.line);
        // It waits for us, so this is still its pid; where not, it has ended.
        let (Some(process), Some(uid)) = (ProcessRef::of(pid), owner(pid)) else { return };
        self.programs.insert(pid, Program::born(process, uid, birth.stay.clone()));
        self.save();
        self.next_look = Instant::now() + WATCH;
        if let Err(error) = line.noted() {
            tracing::debug!(%error, pid, "a child has ended before it began");
        }
    }

    /// The other half of a program of ours has ended at the peer.
    fn on_ended(&mut self, peer: &PeerConfig, ticket: Ticket, status: Option<u32>) {
        let program = self
            .programs
            .values_mut()
            .find(|program| program.record.stay.as_ref() == Some(&(peer.name.clone(), ticket)));
        let Some(program) = program else { return };
        if program.record.place == Place::Away && !program.is_at_next() {
            program.lose(&peer.name, status);
        }
    }
}

/// A row of `conet ps`.
fn row(program: &Program, home: &str) -> Process {
    let record = &program.record;
    // Until a move has been made it is where it was.
    let is_there = matches!(record.place, Place::Away | Place::Moving);
    let away = record.stay.as_ref().filter(|_| is_there);
    Process {
        pid: record.process.pid,
        uid: record.uid,
        command: program.command(),
        place: match (record.place, program.silence) {
            (Place::Away, Some(_)) => Place::Unreachable,
            (place, _) => place,
        },
        node: away.map_or_else(|| home.to_owned(), |(node, _)| node.clone()),
        remote_pid: record.remote_pid.filter(|_| away.is_some()),
        hops_done: record.hops,
        sent_home: record.sent_home,
        calls_forwarded: record.calls.saturating_add(program.calls_now),
        freeze_us: record.freeze_us,
        memory: record.memory.clone(),
        waited_us: work::micros(record.waited + program.silence.unwrap_or_default()),
        reason: record.reason.clone(),
    }
}

impl Processes for Movers {
    type Event = Event;

    fn hosts(&self) -> bool {
        conet_deputy_link::processor().is_some()
    }

    fn register(&mut self, caller: Caller, pid: u32, node: Option<&str>) -> Result<(), Failure> {
        let (Some(process), Some(uid)) = (ProcessRef::of(pid), owner(pid)) else {
            return Err(no_such_process(pid));
        };
        if !caller.may_act_for(uid) {
            return Err(no_such_process(pid));
        }
        if let Some(node) = node {
            work::peer_that_hosts(self.node.config(), node)?;
        }
        let mut program = Program::new(process, uid);
        program.wanted = node.map(str::to_owned);
        self.programs.insert(pid, program);
        self.next_look = Instant::now() + WATCH;
        self.save();
        Ok(())
    }

    fn list(&mut self, caller: Caller) -> Vec<Process> {
        self.look();
        let home = &self.node.config().node.name;
        self.programs
            .values()
            .filter(|program| caller.may_act_for(program.record.uid))
            .map(|program| row(program, home))
            .collect()
    }

    fn migrate(&mut self, caller: Caller, pid: u32, to: &str, how: How, answer: Responder) {
        let config = self.node.config();
        let home = config.node.name.clone();
        let to = (to != "home" && to != home).then(|| to.to_owned());
        if let Some(node) = &to
            && let Err(failure) = work::peer_that_hosts(config, node)
        {
            return answer.answer(Err(failure));
        }
        self.look();
        let program = match self.find(caller, pid) {
            Ok(program) => program,
            Err(failure) => return answer.answer(Err(failure)),
        };
        if program.is_busy {
            return answer.answer(Err(Failure::new(
                "busy",
                format!("process {pid} is on its way already"),
                "wait until it has arrived: conet ps",
            )));
        }
        if program.record.stay.is_none() && work::is_away(pid) {
            return answer.answer(Err(Failure::new(
                "busy",
                format!("process {pid} is just being made, away"),
                "try again",
            )));
        }
        let record = &program.record;
        if let (Place::Away, Some(silence), Some((node, _))) =
            (record.place, program.silence, &record.stay)
        {
            return answer.answer(Err(Failure::new(
                "unreachable",
                format!("{node} has not been heard of for {} s", silence.as_secs()),
                format!("process {pid} waits for it; see conet peers"),
            )));
        }
        match (record.place, &to) {
            (Place::Ended, _) => answer.answer(Err(no_such_process(pid))),
            (Place::Home, None) => answer.answer(Ok(stays(pid, &home, None))),
            (Place::Away, Some(node))
                if record.stay.as_ref().is_some_and(|(there, _)| there == node) =>
            {
                answer.answer(Ok(stays(pid, node, record.remote_pid)));
            }
            _ => self.begin(pid, to, how, Some(answer), None),
        }
    }

    fn why(&mut self, caller: Caller, pid: u32, answer: Responder) {
        let program = match self.find(caller, pid) {
            Ok(program) => program,
            Err(failure) => return answer.answer(Err(failure)),
        };
        let (ended, reason) = (program.record.place == Place::Ended, program.record.reason.clone());
        let (command, has_region) = (program.command(), program.has_region);
        let policy = self.policy(has_region);
        if ended {
            let why = Why { pid, command, movable: false, reasons: reason.into_iter().collect() };
            return answer.answer(Ok(Response::Why(why)));
        }
        work::thread("conet-why", move || {
            let Some(process) = work::as_pid(pid) else { return };
            answer.answer(match locks::locks(process, policy) {
                Ok(locks) => {
                    let reasons: Vec<Reason> = locks.iter().map(work::reason_of).collect();
                    Ok(Response::Why(Why { pid, command, movable: reasons.is_empty(), reasons }))
                }
                Err(_) => Err(no_such_process(pid)),
            });
        });
    }

    fn trace(&mut self, caller: Caller, pid: u32, timed: bool) -> Result<Trace, Failure> {
        let program = self.find(caller, pid)?;
        let away = (program.record.place == Place::Away).then_some(&program.record.stay);
        let (Some(Some((node, _))), Some(process)) = (away, work::as_pid(pid)) else {
            return Err(Failure::new(
                "not-away",
                format!("process {pid} is not away: its calls are its kernel's own"),
                "move it with conet migrate",
            ));
        };
        let node = node.clone();
        if timed {
            program.timed_until = Some(Instant::now() + TIMED);
        }
        let read = trace::take_times(process, program.timed_until.is_some());
        let calls = read.and_then(|()| trace::read(process)).map_err(|_| no_such_process(pid))?;
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let calls = calls.into_iter().map(|call| TracedCall {
            number: call.number,
            name: call.name.to_owned(),
            calls: call.calls,
            timed: call.timed,
            ran_ns: nanos(call.ran),
            waited_for: call.waited_for,
            waited_ns: nanos(call.waited),
        });
        Ok(Trace { pid, command: program.command(), node, calls: calls.collect() })
    }

    fn handle_peer_ask(&mut self, peer: &PeerConfig, message: Vec<u8>, answer: PeerResponder) {
        let reply = |answer: PeerResponder, with: &Answer| {
            answer.answer(&peer::Answer::Process(with.to_bytes()));
        };
        let Ok(ask) = Ask::parse(&message) else {
            return answer.answer(&peer::Answer::Refused(peer::Refusal::Malformed));
        };
        match ask {
            Ask::Ended { ticket, status } => {
                self.on_ended(peer, ticket, status);
                reply(answer, &Answer::Done);
            }
            _ if !peer.grants.guests_from => {
                tracing::warn!(peer = peer.name, "refused: not in guests_from");
                answer.answer(&peer::Answer::Refused(peer::Refusal::NotGranted));
            }
            ask => {
                let with = self.guests.handle_ask(peer, ask);
                reply(answer, &with);
            }
        }
    }

    fn handle_event(&mut self, event: Event) {
        match event {
            Event::Worked { pid, outcome, answer } => self.finish(pid, *outcome, answer),
            Event::Told { pid, was_told } => {
                if let Some(program) = self.programs.get_mut(&pid) {
                    program.told(was_told);
                }
            }
            Event::Checked { pid, ticket, answer } => {
                if let Some(program) = self.programs.get_mut(&pid) {
                    program.checked(ticket, answer);
                }
            }
            Event::GuestRuns { ticket, remote_pid } => self.guests.on_runs(ticket, remote_pid),
            Event::GuestFailed { ticket } => self.guests.on_ended(ticket, None),
            Event::Warden { sandbox, said } => self.guests.on_warden(sandbox, said),
            Event::Born(birth) => self.on_born(&birth),
        }
    }

    fn handle_timeout(&mut self, now: Instant) {
        self.look();
        self.guests.handle_timeout(now);
        let is_lively = self
            .programs
            .values()
            .any(|p| p.has_region || p.wanted.is_some() || p.record.place == Place::Away);
        self.next_look = now + if is_lively { WATCH } else { IDLE_WATCH };
    }

    fn poll_timeout(&self) -> Option<Instant> {
        Some(self.next_look)
    }
}

/// The answer where a program is asked to go where it is.
fn stays(pid: u32, node: &str, remote_pid: Option<u32>) -> Response {
    let node = node.to_owned();
    Response::Moved(Moved { pid, node, remote_pid, freeze_us: 0, total_us: 0, memory: None })
}
