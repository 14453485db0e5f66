//! A node whose processes stay at home: it keeps account of them, and says so.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Instant;

use conet_wire::control::{Failure, Place, Process, Reason, Response, Why};
use conet_wire::peer::{Answer, Refusal};

use super::{Processes, no_such_process};
use crate::caller::Caller;
use crate::config::PeerConfig;
use crate::control::Responder;
use crate::peers::PeerResponder;
use crate::procfs::{ProcessRef, Stat, owner};

/// The programs that `conet run` started on this node.
#[derive(Debug)]
pub struct AtHome {
    node: String,
    known: BTreeMap<u32, Known>,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    process: ProcessRef,
    uid: u32,
}

impl AtHome {
    /// No programs yet, on the node of this name.
    #[must_use]
    pub fn new(node: &str) -> Self {
        Self { node: node.to_owned(), known: BTreeMap::new() }
    }

    /// A program that runs and that the caller may act on.
    fn find(&mut self, caller: Caller, pid: u32) -> Result<Known, Failure> {
        self.known.retain(|_, known| known.process.is_alive());
        let known = self.known.get(&pid).filter(|known| caller.may_act_for(known.uid));
        known.copied().ok_or_else(|| no_such_process(pid))
    }
}

fn stays() -> Reason {
    Reason {
        code: "no-movement".to_owned(),
        sentence: "this daemon moves no processes".to_owned(),
        passing: false,
    }
}

fn command(pid: u32) -> String {
    Stat::of(pid).map(|stat| stat.command).unwrap_or_default()
}

impl Processes for AtHome {
    type Event = Infallible;

    fn hosts(&self) -> bool {
        false
    }

    fn register(&mut self, caller: Caller, pid: u32, node: Option<&str>) -> Result<(), Failure> {
        let (Some(process), Some(uid)) = (ProcessRef::of(pid), owner(pid)) else {
            return Err(no_such_process(pid));
        };
        if !caller.may_act_for(uid) {
            return Err(no_such_process(pid));
        }
        if node.is_some() {
            let Reason { code, sentence, .. } = stays();
            return Err(Failure::new(code, sentence, "run it without --node"));
        }
        self.known.insert(pid, Known { process, uid });
        Ok(())
    }

    fn list(&mut self, caller: Caller) -> Vec<Process> {
        self.known.retain(|_, known| known.process.is_alive());
        let seen = self.known.iter().filter(|(_, known)| caller.may_act_for(known.uid));
        let row = |(pid, known): (&u32, &Known)| Process {
            pid: *pid,
            uid: known.uid,
            command: command(*pid),
            place: Place::Home,
            node: self.node.clone(),
            remote_pid: None,
            hops_done: 0,
            sent_home: 0,
            calls_forwarded: 0,
            freeze_us: None,
            reason: None,
        };
        seen.map(row).collect()
    }

    fn migrate(&mut self, caller: Caller, pid: u32, _to: &str, answer: Responder) {
        let Reason { code, sentence, .. } = stays();
        answer.answer(match self.find(caller, pid) {
            Ok(_) => Err(Failure::new(code, sentence, "see conet why")),
            Err(failure) => Err(failure),
        });
    }

    fn why(&mut self, caller: Caller, pid: u32, answer: Responder) {
        let why = self.find(caller, pid).map(|_| {
            let reasons = vec![stays()];
            Response::Why(Why { pid, command: command(pid), movable: false, reasons })
        });
        answer.answer(why);
    }

    fn handle_peer_ask(&mut self, _peer: &PeerConfig, _message: Vec<u8>, answer: PeerResponder) {
        answer.answer(&Answer::Refused(Refusal::NoProcesses));
    }

    fn handle_event(&mut self, event: Infallible) {
        match event {}
    }

    fn handle_timeout(&mut self, _now: Instant) {}

    fn poll_timeout(&self) -> Option<Instant> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Caller = Caller { pid: 1, uid: 0, administers: true };

    fn user(uid: u32) -> Caller {
        Caller { pid: 1, uid, administers: false }
    }

    #[test]
    fn a_program_is_listed_while_it_runs() {
        let mut table = AtHome::new("a");
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        table.register(ROOT, child.id(), None).unwrap();
        let rows = table.list(ROOT);
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].pid, rows[0].place), (child.id(), Place::Home));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(table.list(ROOT).is_empty());
    }

    #[test]
    fn another_users_program_is_not_there() {
        let mut table = AtHome::new("a");
        let pid = std::process::id();
        let uid = owner(pid).unwrap();
        let other = user(uid + 1);
        assert_eq!(table.register(other, pid, None), Err(no_such_process(pid)));
        table.register(user(uid), pid, None).unwrap();
        assert!(table.list(other).is_empty());
        assert_eq!(table.list(user(uid)).len(), 1);
        assert_eq!(table.find(other, pid).unwrap_err(), no_such_process(pid));
    }
}
