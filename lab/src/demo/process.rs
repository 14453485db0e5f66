//! The steps about programs that move: what they write, and what a call costs.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use conet_node::client::{Client, ClientError};
use conet_node::procfs::ProcessRef;
use conet_wire::control::{How, Moved, Process, Request, Response};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::Value;

use super::random::{Random, seed};
use super::{Figure, Figures, Raised, StepError, rounded};
use crate::plan::socket;
use crate::state::HostState;
use crate::{LabError, Watch};

/// The running program, whichever name it has in whichever mount namespace.
const SELF: &str = "/proc/self/exe";
/// The program that is moved, where the machine has Python.
const SCRIPT: &str = include_str!("work.py");
/// Where it lies, and what it reads: in the private directory of one host, so
/// that reading it elsewhere has to ask home.
const SCRIPT_FILE: &str = "/tmp/conet-work.py";
const INPUT_FILE: &str = "/tmp/conet-work.in";
/// Lines that it writes: some 6 s, of which the moves take half.
const LINES: u32 = 200;
/// Moves: there and home six times, and there once more, so that it ends away.
const HOPS: usize = 13;
/// Moves without which nothing is shown.
const LEAST_HOPS: usize = 10;
/// Least and most milliseconds between two moves.
const STAY_MS: (u64, u64) = (50, 300);
/// How often a move is asked for that is refused: what keeps a process is often
/// over at once.
const ATTEMPTS: u32 = 50;
/// How long one move may take.
const MOVE_LIMIT: Duration = Duration::from_secs(10);
/// How long a program may take in all.
const PROGRAM_LIMIT: Duration = Duration::from_secs(40);
/// How often a wait looks again.
const POLL: Duration = Duration::from_millis(10);
/// How long a killed program's other half may take to be gone.
const REMOTE_LIMIT: Duration = Duration::from_secs(3);
/// Calls per measurement: at home, and away.
const CALLS: (u32, u32) = (200_000, 1000);
/// Measurements, of which the median counts.
const BATCHES: usize = 7;

/// The hosts between which programs move, by name.
const HOME: &str = "conet-h1";
const AWAY: &str = "conet-h2";

/// A program on the first host; killed when dropped.
struct Running {
    child: Child,
    /// Its other half, as last seen.
    remote: Option<ProcessRef>,
}

impl Running {
    fn start(program: &[String], may_move: bool, set: impl FnOnce(&mut Command)) -> Started {
        let mut command = Command::new(SELF);
        command.args(["lab", "exec", HOME, "--"]);
        if may_move {
            command.args([SELF, "run", "--"]);
        }
        // A group of its own: a Ctrl-C on the terminal is for the demonstration.
        command.args(program).stdin(Stdio::null()).process_group(0);
        set(&mut command);
        let child = command.spawn().map_err(LabError::step("start a program"))?;
        Ok(Self { child, remote: None })
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, once it has ended.
    fn wait(&mut self, watch: Watch<'_>) -> Result<ExitStatus, StepError> {
        let deadline = Instant::now() + PROGRAM_LIMIT;
        loop {
            watch.check()?;
            let status = self.child.try_wait().map_err(LabError::step("wait for a program"))?;
            if let Some(status) = status {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(StepError::Slow { what: "the end of a program" });
            }
            thread::sleep(POLL);
        }
    }

    /// Moves it; none where it has ended.
    fn migrate(
        &mut self,
        client: &mut Client,
        to: &str,
        refused: &mut u64,
    ) -> Result<Option<Moved>, StepError> {
        let request = Request::Migrate { pid: self.pid(), to: to.to_owned(), how: How::default() };
        for attempt in 1.. {
            match client.ask(&request) {
                Ok(Response::Moved(moved)) => {
                    self.remote = moved.remote_pid.and_then(ProcessRef::of);
                    return Ok(Some(moved));
                }
                Ok(_) => return Err(ClientError::Unexpected.into()),
                Err(ClientError::Failure(_)) if self.has_ended() => return Ok(None),
                Err(ClientError::Failure(_)) if attempt < ATTEMPTS => *refused += 1,
                Err(error) => return Err(error.into()),
            }
            thread::sleep(POLL);
        }
        Ok(None)
    }

    fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }
}

type Started = Result<Running, LabError>;

impl Drop for Running {
    fn drop(&mut self) {
        // Also where it has ended: then neither does anything.
        self.child.kill().ok();
        self.child.wait().ok();
        if let Some(remote) = self.remote
            && !remote.wait_gone(REMOTE_LIMIT)
        {
            remote.signal(rustix::process::Signal::KILL);
        }
    }
}

/// The daemon of the first host.
fn daemon(host: &HostState) -> Result<Client, StepError> {
    let mut client = Client::connect(&host.path(&socket().to_string_lossy()))?;
    client.set_timeout(Some(MOVE_LIMIT))?;
    Ok(client)
}

/// Python as a program that can be moved, if the machine has it: what is on PATH
/// is often a script that chooses one.
fn python(host: &HostState) -> Option<String> {
    let asked = Command::new("python3")
        .args(["-I", "-c", "import sys; print(sys.executable)"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    let path = String::from_utf8(asked.ok()?.stdout).ok()?.trim().to_owned();
    // A host's own /tmp and /run hide what the machine has there.
    (path.starts_with('/') && host.path(&path).exists()).then_some(path)
}

/// The program that is moved, and what it is called.
fn program(host: &HostState) -> Result<(&'static str, Vec<String>), StepError> {
    let put = |path: &str, bytes: &[u8]| {
        let path = host.path(path);
        fs::write(&path, bytes).map_err(LabError::step_on("write", path))
    };
    let mut random = Random::new(0);
    let input: Vec<u8> = (0..1024).flat_map(|_| random.number().to_le_bytes()).collect();
    put(INPUT_FILE, &input)?;
    let lines = LINES.to_string();
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    match python(host) {
        Some(python) => {
            put(SCRIPT_FILE, SCRIPT.as_bytes())?;
            Ok(("python", words(&[&python, "-I", SCRIPT_FILE, INPUT_FILE, &lines])))
        }
        None => Ok(("bundled", words(&[SELF, "demo-program", "work", INPUT_FILE, &lines]))),
    }
}

/// Where a program's output goes.
fn into_file(command: &mut Command, path: &Path) -> Result<(), LabError> {
    let file = File::create(path).map_err(LabError::step_on("make", path))?;
    let copy = file.try_clone().map_err(LabError::step_on("make", path))?;
    command.stdout(file).stderr(copy);
    Ok(())
}

fn start_into(program: &[String], may_move: bool, path: &Path) -> Started {
    let mut made = Ok(());
    let running = Running::start(program, may_move, |command| made = into_file(command, path));
    made.and(running)
}

/// Moves a program there and home again while it computes, reads and writes, and
/// compares with the same program unmoved, which runs at the same time.
pub(super) fn moves(lab: &Raised, watch: Watch<'_>) -> Figures {
    let host = lab.state.host(HOME)?;
    let (name, program) = program(host)?;
    let files = ["moved", "unmoved"].map(|name| host.path(&format!("/tmp/conet-{name}.out")));
    let mut unmoved = start_into(&program, false, &files[1])?;
    let mut moved = start_into(&program, true, &files[0])?;
    let mut client = daemon(host)?;
    first_line(&files[0], &mut moved, watch)?;
    let seed = seed();
    let mut random = Random::new(seed);
    let (mut freezes, mut refused) = (Vec::new(), 0);
    for hop in 0..HOPS {
        let stay = STAY_MS.0 + random.below(STAY_MS.1 - STAY_MS.0);
        thread::sleep(Duration::from_millis(stay));
        watch.check()?;
        let to = if hop % 2 == 0 { AWAY } else { "home" };
        match moved.migrate(&mut client, to, &mut refused)? {
            Some(moved) => freezes.push(moved.freeze_us),
            None => break,
        }
    }
    let status = [moved.wait(watch)?, unmoved.wait(watch)?];
    let row = listed(&mut client, moved.pid())?;
    same(&files, status)?;
    if freezes.len() < LEAST_HOPS {
        return Err(StepError::FewHops { hops: freezes.len(), wanted: LEAST_HOPS, seed });
    }
    if row.sent_home > 0 || row.calls_forwarded == 0 {
        let reason = row.reason.map_or_else(|| "no calls went home".to_owned(), |r| r.sentence);
        return Err(StepError::Stayed { reason });
    }
    freezes.sort_unstable();
    Ok(vec![
        Figure::new("program", name, ""),
        Figure::new("hops", freezes.len(), ""),
        Figure::new("freeze_p50", milliseconds(freezes[freezes.len() / 2]), "ms"),
        Figure::new("freeze_max", milliseconds(freezes[freezes.len() - 1]), "ms"),
        Figure::new("calls_forwarded", row.calls_forwarded, ""),
        Figure::new("lines_alike", LINES, ""),
        Figure::new("exit_status", status[0].code(), ""),
        Figure::new("refused_at_first", refused, ""),
        Figure::new("seed", seed, ""),
    ])
}

/// Waits until a program has begun to write: before, its interpreter starts.
fn first_line(path: &Path, program: &mut Running, watch: Watch<'_>) -> Result<(), StepError> {
    let deadline = Instant::now() + PROGRAM_LIMIT;
    while !fs::read(path).is_ok_and(|bytes| bytes.contains(&b'\n')) {
        watch.check()?;
        if program.has_ended() || Instant::now() >= deadline {
            return Err(StepError::Slow { what: "the first line of a program" });
        }
        thread::sleep(POLL);
    }
    Ok(())
}

/// What the daemon knows of a program.
fn listed(client: &mut Client, pid: u32) -> Result<Process, StepError> {
    let Response::Processes { processes } = client.ask(&Request::Ps {})? else {
        return Err(ClientError::Unexpected.into());
    };
    let row = processes.into_iter().find(|process| process.pid == pid);
    row.ok_or_else(|| ClientError::Unexpected.into())
}

/// Whether moved and unmoved wrote the same lines and ended alike.
fn same(files: &[PathBuf; 2], status: [ExitStatus; 2]) -> Result<(), StepError> {
    let read = |path: &PathBuf| {
        let text = fs::read_to_string(path).map_err(LabError::step_on("read", path))?;
        Ok::<_, LabError>(text.lines().map(str::to_owned).collect::<Vec<_>>())
    };
    let (moved, unmoved) = (read(&files[0])?, read(&files[1])?);
    for line in 0..moved.len().max(unmoved.len()) {
        let at = |lines: &[String]| lines.get(line).map_or("nothing", |line| line).to_owned();
        if moved.get(line) != unmoved.get(line) {
            let what = format!("line {}", line + 1);
            return Err(StepError::Differs { what, moved: at(&moved), unmoved: at(&unmoved) });
        }
    }
    if status[0] != status[1] {
        let [moved, unmoved] = status.map(|status| status.to_string());
        return Err(StepError::Differs { what: "end".to_owned(), moved, unmoved });
    }
    let wanted = Some(i32::from(super::program::STATUS));
    if status[0].code() != wanted || moved.len() != LINES as usize {
        let said = moved.last().cloned().unwrap_or_default();
        return Err(StepError::Broken { status: status[0].to_string(), said });
    }
    Ok(())
}

/// A program that times its own calls.
struct Timer {
    running: Running,
    answers: Receiver<f64>,
}

impl Timer {
    fn start() -> Result<Self, StepError> {
        let program = [SELF, "demo-program", "calls"].map(str::to_owned);
        let mut running = Running::start(&program, true, |command| {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        })?;
        let (said, answers) = channel();
        let out = running.child.stdout.take();
        // It ends with the program's output.
        thread::spawn(move || {
            for line in out.into_iter().flat_map(|out| BufReader::new(out).lines()) {
                let Some(number) = line.ok().and_then(|line| line.parse().ok()) else { break };
                if said.send(number).is_err() {
                    break;
                }
            }
        });
        Ok(Self { running, answers })
    }

    /// Nanoseconds per call: the median of some measurements.
    fn measure(&mut self, calls: u32, watch: Watch<'_>) -> Result<f64, StepError> {
        let mut times = Vec::new();
        for _ in 0..BATCHES {
            watch.check()?;
            let Some(input) = &mut self.running.child.stdin else { break };
            writeln!(input, "{calls}").map_err(LabError::step("ask a program"))?;
            let time = self.answers.recv_timeout(MOVE_LIMIT);
            let time = time.map_err(|_| StepError::Slow { what: "the times of a program" })?;
            times.push(time / f64::from(calls));
        }
        times.sort_unstable_by(f64::total_cmp);
        Ok(times.get(times.len() / 2).copied().unwrap_or_default())
    }
}

/// What a call costs at home and away.
pub(super) fn calls(lab: &Raised, watch: Watch<'_>) -> Figures {
    let mut client = daemon(lab.state.host(HOME)?)?;
    let mut timer = Timer::start()?;
    // Two processors, where there are: else which of them is used decides.
    let processors = processors();
    let pinned = pin(timer.running.pid(), processors.first());
    let native = timer.measure(CALLS.0, watch)?;
    let mut refused = 0;
    let moved = timer.running.migrate(&mut client, AWAY, &mut refused)?;
    let remote = moved.and_then(|moved| moved.remote_pid);
    let pinned = pinned && remote.is_some_and(|remote| pin(remote, processors.get(1)));
    let forwarded = timer.measure(CALLS.1, watch)?;
    drop(timer.running.child.stdin.take());
    let status = timer.running.wait(watch)?;
    if !status.success() {
        return Err(StepError::Broken { status: status.to_string(), said: String::new() });
    }
    let row = listed(&mut client, timer.running.pid())?;
    if row.calls_forwarded < u64::from(CALLS.1) {
        return Err(StepError::Stayed { reason: "no calls went home".to_owned() });
    }
    let processors = match processors[..] {
        [home, away, ..] if pinned => format!("{home} and {away}"),
        _ => "unpinned".to_owned(),
    };
    Ok(vec![
        Figure::new("native", rounded(native), "ns"),
        Figure::new("forwarded", rounded(forwarded / 1000.0), "us"),
        Figure::new("ratio", rounded(forwarded / native), ""),
        Figure::new("cpus", processors, ""),
    ])
}

/// The processors that may be used.
fn processors() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(None) else { return Vec::new() };
    (0..CpuSet::MAX_CPU).filter(|processor| set.is_set(*processor)).collect()
}

/// Keeps a process on one processor; whether it will stay there.
fn pin(pid: u32, processor: Option<&usize>) -> bool {
    let (Some(processor), Some(pid)) = (processor, i32::try_from(pid).ok().and_then(Pid::from_raw))
    else {
        return false;
    };
    let mut set = CpuSet::new();
    set.set(*processor);
    sched_setaffinity(Some(pid), &set).is_ok()
}

/// In milliseconds with two digits after the point.
pub(super) fn milliseconds(us: u64) -> Value {
    Value::from(f64::from(u32::try_from(us / 10).unwrap_or(u32::MAX)) / 100.0)
}
