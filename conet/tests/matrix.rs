//! Whoever dies, or whatever is cut, at whichever phase of a move: the program lives
//! in one place and goes on, or has ended with a stored reason; nothing remains.
//!
//! The program writes a numbered line and reads it back, over and over. If it ever ran
//! in two places, or a call ran twice or not at all, its file would show it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{
    CONET, Lab, Program, Said, Shared, exists, python, row, signal, try_migrate, wait_until,
};
use conet_netsys::{IfName, Netlink};
use conet_testkit::Need;
use conet_testkit::random::Random;
use rustix::process::Signal;

const SECOND: Duration = Duration::from_secs(1);

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
enum Blow {
    HomeDaemon,
    OtherDaemon,
    Program,
    Remote,
    Warden,
    Lan(Duration),
}

const BLOWS: [Blow; 7] = [
    Blow::HomeDaemon,
    Blow::OtherDaemon,
    Blow::Remote,
    Blow::Warden,
    Blow::Program,
    Blow::Lan(Duration::from_millis(300)),
    Blow::Lan(Duration::from_secs(12)),
];

/// Of moves there and back; in the freeze and before the commit is heard they are held.
const PHASES: [(&str, &str); 5] = [
    ("conet-h2", "prepare"),
    ("conet-h2", "copy"),
    ("conet-h2", "freeze"),
    ("conet-h2", "commit"),
    ("home", "home"),
];

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
        rustix::process::kill_process(common::as_pid(pid), Signal::STOP).unwrap();
        Self(pid)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // It may have been struck.
        rustix::process::kill_process(common::as_pid(self.0), Signal::CONT).ok();
    }
}

struct Scene {
    lab: Lab,
    program: Program,
    said: Said,
    file: Shared,
    pid: u32,
}

impl Scene {
    fn start(lab: Lab) -> Self {
        let file = Shared::with("matrix", b"");
        let mut program = lab.run(&[&python(), "-c", LINES, file.path()]);
        let (pid, said) = (program.pid(), Said::by(&mut program));
        said.wait_for("begin");
        Self { lab, program, said, file, pid }
    }

    fn lines(&self) -> usize {
        fs::read(self.file.path()).unwrap().len() / 7
    }

    /// What has been written so far is whole and in order.
    fn check(&self, context: &str) {
        let text = fs::read_to_string(self.file.path()).unwrap();
        for (n, line) in text.lines().enumerate() {
            assert_eq!(line, format!("{n:06}"), "{context}");
        }
    }

    fn place(&self) -> String {
        row(self.pid)["place"].as_str().unwrap_or("none").to_owned()
    }

    fn strike(&self, blow: Blow, [home_daemon, other_daemon]: [u32; 2]) {
        let kill = |pid: Option<&u32>| {
            // It may have gone by itself.
            if let Some(pid) = pid.filter(|pid| exists(**pid)) {
                rustix::process::kill_process(common::as_pid(*pid), Signal::KILL).ok();
            }
        };
        match blow {
            Blow::HomeDaemon => kill(Some(&home_daemon)),
            Blow::OtherDaemon => kill(Some(&other_daemon)),
            Blow::Program => signal(self.pid, Signal::KILL),
            Blow::Remote => kill(remotes(self.pid).0.last()),
            Blow::Warden => kill(remotes(self.pid).1.last()),
            Blow::Lan(time) => {
                cut(true);
                thread::sleep(time);
                cut(false);
            }
        }
    }

    fn is_frozen(&self) -> bool {
        common::state(self.pid) == Some('t')
    }

    /// Waits until the program is frozen, and holds it there: its daemon is stopped.
    fn hold_freeze(&self, daemon: u32) -> Option<Held> {
        let limit = Instant::now() + 10 * SECOND;
        while Instant::now() < limit {
            // The calls made before the freeze stop it too, for less.
            if self.is_frozen() && remotes(self.pid).0.len() == 1 && self.is_frozen() {
                return Some(Held::new(daemon));
            }
        }
        None
    }

    /// Waits until the program has become its deputy, and keeps its other half from
    /// hearing so.
    fn hold_commit(&self) -> Option<Held> {
        let limit = Instant::now() + 10 * SECOND;
        let mut half = None;
        while Instant::now() < limit {
            half = half.or_else(|| remotes(self.pid).0.last().copied());
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
    fn case(&mut self, to: &str, phase: &str, blow: Blow, after: Duration) -> String {
        let context = format!("to {to}, {after:?} after {phase}: {blow:?}");
        // Asked before: one that is held does not answer.
        let daemons = ["conet-h1", "conet-h2"].map(Lab::daemon);
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
                "freeze" => self.hold_freeze(daemons[0]),
                "commit" => self.hold_commit(),
                _ => None,
            };
            assert!(held.is_some() || phase == told, "{context}: the phase was not seen");
            thread::sleep(after);
            self.strike(blow, daemons);
            drop(held);
        }
        wait_until(&context, 90 * SECOND, || migrate.try_wait().unwrap().is_some());
        let told = rest.join().unwrap();
        for host in ["conet-h1", "conet-h2"] {
            if !common::conet(&["lab", "exec", host, "--", CONET, "status"]).status.success() {
                wait_until(&context, 30 * SECOND, || {
                    common::conet(&["lab", "restart", host]).status.success()
                });
            }
        }
        wait_until(&format!("{context}: the nodes meet ({told:?})"), 30 * SECOND, || {
            let peers = common::conet(&["lab", "exec", "conet-h1", "--", CONET, "peers", "--json"]);
            String::from_utf8_lossy(&peers.stdout).contains("\"up\": true")
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
        place
    }

    /// Moves it, however often that takes.
    fn get_to(&self, node: &str) {
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
    fn finish(mut self) -> Lab {
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
        let hosted = Lab::exec("conet-h2", &["sh", "-c", "ls $(dirname $CONET_SOCKET)/hosted"]);
        let files = String::from_utf8_lossy(&hosted.stdout).into_owned();
        assert!(!files.contains("json") && !files.contains("sock"), "remains: {files}");
        self.lab
    }
}

/// The second host's cable.
fn cut(is_cut: bool) {
    let bridge = (!is_cut).then(|| IfName::new("conet-lan").unwrap());
    Netlink::open().unwrap().set_master(IfName::new("conet-h2").unwrap(), bridge).unwrap();
}

#[test]
fn a_program_lives_in_one_place_whatever_dies_in_a_move() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let seed = std::env::var("CONET_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("seed {seed}");
    let mut random = Random::new(seed);
    let mut scene = Scene::start(Lab::up("wireguard"));
    let (mut ended, mut moved, mut stayed) = (0, 0, 0);
    for blow in BLOWS {
        for (to, phase) in PHASES {
            let from = if to == "home" { "away" } else { "home" };
            if scene.place() == "ended" {
                scene = Scene::start(scene.finish());
            }
            if scene.place() != from {
                let start = if to == "home" { "conet-h2" } else { "home" };
                scene.get_to(start);
            }
            let after = Duration::from_micros(random.below(20_000));
            match scene.case(to, phase, blow, after).as_str() {
                "ended" => ended += 1,
                place if place == from => stayed += 1,
                _ => moved += 1,
            }
        }
    }
    drop(scene.finish());
    eprintln!("{moved} moved, {stayed} stayed, {ended} ended");
    assert!(moved > 0 && ended >= 3, "{moved} {ended}");
}
