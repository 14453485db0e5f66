//! A program that proves that it runs in one place, and what may befall its moves.
//!
//! It writes a numbered line and reads it back, over and over. If it ever ran in two
//! places, or a call ran twice or not at all, its file would show it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{
    CONET, Lab, Program, Said, Shared, as_pid, conet, exists, python, row, signal, state,
    try_migrate, wait_until,
};
use conet_netsys::{IfName, Netlink};
use rustix::process::Signal;

pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// Has some memory to move, and proves that each call runs once.
const LINES: &str = "
import os, sys
memory = bytearray(os.urandom(1 << 20) * 24)
f = os.open(sys.argv[1], os.O_RDWR | os.O_APPEND)
n = 0
print('begin', flush=True)
while not os.path.exists(sys.argv[1] + '.stop'):
    line = b'%06d\\n' % n
    assert os.write(f, line) == 7
    assert os.pread(f, 7, 7 * n) == line, n
    for k in range(3000): pass
    memory[(n * 4096 * 7) % len(memory)] = n & 255
    n += 1
print('wrote', n, flush=True)
sys.exit(9)
";

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Blow {
    /// The daemon of this host.
    Daemon(&'static str),
    Program,
    /// Its newest half in a sandbox.
    Remote,
    /// Its oldest, where a second is being made.
    OldRemote,
    /// The newest half's warden.
    Warden,
    /// This host's cable, for so long.
    Lan(&'static str, Duration),
}

/// Halves of `pid` in sandboxes, and the wardens of those.
fn remotes(pid: u32) -> (Vec<u32>, Vec<u32>) {
    let (mut halves, mut wardens) = (Vec::new(), Vec::new());
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(other) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Ok(status) = fs::read_to_string(entry.path().join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let ids: Vec<&str> = field("NSpid:").unwrap_or_default().split_whitespace().collect();
        if other != pid && ids.len() > 1 && ids.last() == Some(&pid.to_string().as_str()) {
            halves.push(other);
            let parent = field("PPid:").and_then(|parent| parent.trim().parse().ok());
            wardens.extend(parent.filter(|parent: &u32| *parent > 1));
        }
    }
    (halves, wardens)
}

/// A stopped process, which goes on when this is dropped.
struct Held(u32);

impl Held {
    fn new(pid: u32) -> Self {
        rustix::process::kill_process(as_pid(pid), Signal::STOP).unwrap();
        Self(pid)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // It may have been struck.
        rustix::process::kill_process(as_pid(self.0), Signal::CONT).ok();
    }
}

pub(crate) struct Scene {
    lab: Lab,
    program: Program,
    said: Said,
    file: Shared,
    pub(crate) pid: u32,
}

impl Scene {
    pub(crate) fn start(lab: Lab) -> Self {
        let file = Shared::with("matrix", b"");
        let mut program = lab.run(&[&python(), "-c", LINES, file.path()]);
        let (pid, said) = (program.pid(), Said::by(&mut program));
        said.wait_for("begin");
        Self { lab, program, said, file, pid }
    }

    fn lines(&self) -> usize {
        fs::read(self.file.path()).unwrap().len() / 7
    }

    /// What has been written so far is whole and in order. A line that is just being
    /// written may be seen in part, where it goes beyond a page.
    fn check(&self, context: &str) {
        let text = fs::read_to_string(self.file.path()).unwrap();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for (n, line) in whole.lines().enumerate() {
            assert_eq!(line, format!("{n:06}"), "{context}");
        }
    }

    pub(crate) fn place(&self) -> String {
        row(self.pid)["place"].as_str().unwrap_or("none").to_owned()
    }

    fn strike(&self, blow: Blow, daemons: &[(String, u32)]) {
        let kill = |pid: Option<&u32>| {
            // It may have gone by itself.
            if let Some(pid) = pid.filter(|pid| exists(**pid)) {
                rustix::process::kill_process(as_pid(*pid), Signal::KILL).ok();
            }
        };
        match blow {
            Blow::Daemon(host) => {
                kill(daemons.iter().find(|(name, _)| name == host).map(|(_, pid)| pid))
            }
            Blow::Program => signal(self.pid, Signal::KILL),
            Blow::Remote => kill(remotes(self.pid).0.last()),
            Blow::OldRemote => kill(remotes(self.pid).0.first()),
            Blow::Warden => kill(remotes(self.pid).1.last()),
            Blow::Lan(host, time) => {
                cut(host, true);
                thread::sleep(time);
                cut(host, false);
            }
        }
    }

    fn is_frozen(&self) -> bool {
        state(self.pid) == Some('t')
    }

    /// Waits until the program is frozen, and holds it there: its daemon is stopped.
    fn hold_freeze(&self, daemon: u32, before: &[u32]) -> Option<Held> {
        let limit = Instant::now() + 5 * SECOND;
        while Instant::now() < limit {
            // The calls made before the freeze stop it too, for less.
            if self.is_frozen() && self.new_half(before).is_some() && self.is_frozen() {
                return Some(Held::new(daemon));
            }
        }
        None
    }

    /// Its half at the node where it goes, once it has none where it was.
    fn new_half(&self, before: &[u32]) -> Option<u32> {
        let halves = remotes(self.pid).0;
        halves.first().copied().filter(|half| halves.len() == 1 && !before.contains(half))
    }

    /// Waits until the program has become its deputy, and keeps its other half from
    /// hearing so.
    fn hold_commit(&self, before: &[u32]) -> Option<Held> {
        let limit = Instant::now() + 10 * SECOND;
        let mut half = None;
        while Instant::now() < limit {
            // One that is there already may not be looked for: a moment later it has heard.
            half = half.filter(|half| exists(*half)).or_else(|| self.new_half(before));
            if let Some(half) = half
                && self.has_deputy()
            {
                return Some(Held::new(half));
            }
        }
        None
    }

    /// Whether it has become its deputy: the agent is in it, and nobody traces it.
    fn has_deputy(&self) -> bool {
        let read = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", self.pid));
        let is_agent = |line: &str| line.starts_with("200000000000-");
        read("maps").is_ok_and(|maps| maps.lines().any(is_agent))
            && read("status").is_ok_and(|status| status.contains("TracerPid:\t0\n"))
    }

    /// Begins a move, strikes in `phase`, and sees to it that all goes on; gives where
    /// the program is then.
    pub(crate) fn case(&mut self, to: &str, phase: &str, blow: Blow, after: Duration) -> String {
        const TRIES: u32 = 10;
        let from = match row(self.pid)["node"].as_str() {
            Some(node) if self.place() == "away" => node.to_owned(),
            _ => "home".to_owned(),
        };
        for _ in 0..TRIES {
            if let Some(place) = self.try_case(to, phase, blow, after) {
                return place;
            }
            self.get_to(&from);
        }
        panic!("to {to}, {after:?} after {phase}: the phase was not seen in {TRIES} moves");
    }

    /// As [`Self::case`]; none where the phase was over before it was seen, as happens on
    /// a busy machine, and nothing was struck.
    fn try_case(&mut self, to: &str, phase: &str, blow: Blow, after: Duration) -> Option<String> {
        let context = format!("to {to}, {after:?} after {phase}: {blow:?}");
        // Asked before: one that is held does not answer.
        let daemons: Vec<(String, u32)> =
            self.lab.hosts().into_iter().map(|host| (host.clone(), Lab::daemon(&host))).collect();
        let before = remotes(self.pid).0;
        let mut migrate = Command::new(CONET)
            .args(["lab", "exec", "conet-h1", "--", CONET, "migrate"])
            .args([&self.pid.to_string(), to])
            // All in one freeze, which then is long enough to be found.
            .args((phase == "freeze").then_some("--stop"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(migrate.stderr.take().unwrap()).lines();
        let told = if ["freeze", "commit"].contains(&phase) { "prepare" } else { phase };
        let begun = said.by_ref().any(|line| line.is_ok_and(|line| line.starts_with(told)));
        let rest = thread::spawn(move || said.map_while(Result::ok).collect::<Vec<_>>());
        if begun {
            let held = match phase {
                "freeze" => self.hold_freeze(daemons[0].1, &before),
                "commit" => self.hold_commit(&before),
                _ => None,
            };
            if held.is_none() && phase != told {
                wait_until(&context, 90 * SECOND, || migrate.try_wait().unwrap().is_some());
                drop(rest.join());
                return None;
            }
            thread::sleep(after);
            self.strike(blow, &daemons);
            drop(held);
        }
        wait_until(&context, 90 * SECOND, || migrate.try_wait().unwrap().is_some());
        let told = rest.join().unwrap();
        for host in self.lab.hosts() {
            if !conet(&["lab", "exec", &host, "--", CONET, "status"]).status.success() {
                wait_until(&context, 30 * SECOND, || {
                    conet(&["lab", "restart", &host]).status.success()
                });
            }
        }
        wait_until(&format!("{context}: the nodes meet ({told:?})"), 30 * SECOND, || {
            let peers = conet(&["lab", "exec", "conet-h1", "--", CONET, "peers", "--json"]);
            let up = String::from_utf8_lossy(&peers.stdout).matches("\"up\": true").count();
            up + 1 == self.lab.hosts().len()
        });
        let mut place = String::new();
        wait_until(&format!("{context}: it settles ({told:?})"), 40 * SECOND, || {
            place = self.place();
            ["home", "away", "ended"].contains(&place.as_str())
        });
        if place != "ended" {
            let before = self.lines();
            wait_until(&format!("{context}: it goes on, {place} ({told:?})"), 40 * SECOND, || {
                self.lines() > before || self.place() == "ended"
            });
            place = self.place();
        }
        if place == "ended" {
            let row = row(self.pid);
            // Killed at home, once the move was over, it is a program like any other.
            let was_over = to == "home" && migrate.wait().unwrap().success();
            assert!(
                was_over || row["reason"]["sentence"].is_string(),
                "{context}: no reason ({told:?}) {row}"
            );
        }
        self.check(&context);
        eprintln!("{context}: {place}");
        Some(place)
    }

    /// Moves it, however often that takes.
    pub(crate) fn get_to(&self, node: &str) {
        let begin = Instant::now();
        loop {
            let moved = try_migrate(self.pid, node);
            if moved.status.success() {
                return;
            }
            let said = String::from_utf8_lossy(&moved.stderr);
            assert!(begin.elapsed() < 60 * SECOND, "it does not get to {node}: {said}");
            thread::sleep(SECOND / 10);
        }
    }

    /// Brings the program to an end, or has found it ended, and gives the lab back.
    pub(crate) fn finish(mut self) -> Lab {
        if self.place() != "ended" {
            wait_until("it comes home", 60 * SECOND, || {
                self.place() == "home" || try_migrate(self.pid, "home").status.success()
            });
            let stop = format!("{}.stop", self.file.path());
            fs::write(&stop, b"").unwrap();
            let status = self.program.status_within(30 * SECOND);
            fs::remove_file(&stop).unwrap();
            assert_eq!(status.code(), Some(9), "{}", self.said.text());
            assert!(self.said.text().contains(&format!("wrote {}", self.lines())));
        }
        self.check("the end");
        // A half that was never told to live waits for 30 s.
        wait_until("no half remains", 45 * SECOND, || remotes(self.pid).0.is_empty());
        for host in &self.lab.hosts()[1..] {
            let list = ["sh", "-c", "ls $(dirname $CONET_SOCKET)/hosted"];
            let files = String::from_utf8_lossy(&Lab::exec(host, &list).stdout).into_owned();
            assert!(!files.contains("json") && !files.contains("sock"), "{host} has {files}");
        }
        self.lab
    }
}

/// A host's cable.
fn cut(host: &str, is_cut: bool) {
    let bridge = (!is_cut).then(|| IfName::new("conet-lan").unwrap());
    Netlink::open().unwrap().set_master(IfName::new(host).unwrap(), bridge).unwrap();
}
