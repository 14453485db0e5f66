//! A lab, and programs in it, for tests that move them.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

pub(crate) mod scene;

use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use conet_netsys::{Netlink, Netns};
use conet_testkit::privileged::{Exclusive, exclusive};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

pub(crate) const CONET: &str = env!("CARGO_BIN_EXE_conet");
/// A directory that all lab hosts share: `/tmp` and `/run` are each host's own.
pub(crate) const SHARED: &str = "/var/tmp";

pub(crate) fn conet(arguments: &[&str]) -> Output {
    Command::new(CONET).args(arguments).stdin(Stdio::null()).output().unwrap()
}

#[track_caller]
pub(crate) fn ok(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Asserts a failure that is told in one line, and gives the line.
#[track_caller]
pub(crate) fn failed(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "it succeeded");
    assert_eq!(said.lines().filter(|line| line.starts_with("conet:")).count(), 1, "{said}");
    said
}

#[track_caller]
pub(crate) fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// Waits until `what` holds, for `limit` at most; how long it took.
#[track_caller]
pub(crate) fn wait_until(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) -> Duration {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
    begin.elapsed()
}

/// A lab that this test made; removed when dropped.
pub(crate) struct Lab {
    hosts: u32,
    _alone: Exclusive,
}

impl Lab {
    /// Of two hosts.
    pub(crate) fn up(mode: &str) -> Self {
        Self::of(2, mode)
    }

    pub(crate) fn of(hosts: u32, mode: &str) -> Self {
        Self::with(hosts, mode, &[])
    }

    pub(crate) fn with(hosts: u32, mode: &str, more: &[&str]) -> Self {
        let alone = exclusive();
        // Only a lab that came up is ours to remove.
        let count = hosts.to_string();
        let up = ["lab", "up", "--hosts", &count, "--guests", "1", "--mode", mode];
        ok(&conet(&[&up[..], more].concat()));
        Self { hosts, _alone: alone }
    }

    /// Names of its hosts.
    pub(crate) fn hosts(&self) -> Vec<String> {
        (1..=self.hosts).map(|number| format!("conet-h{number}")).collect()
    }

    pub(crate) fn exec(host: &str, command: &[&str]) -> Output {
        conet(&[&["lab", "exec", host, "--"], command].concat())
    }

    pub(crate) fn daemon(host: &str) -> u32 {
        let status = json(&ok(&Self::exec(host, &[CONET, "status", "--json"])));
        u32::try_from(status["pid"].as_u64().unwrap()).unwrap()
    }

    /// Kills a host's daemon and starts another.
    pub(crate) fn kill_daemon(host: &str) {
        let before = Self::daemon(host);
        signal(before, Signal::KILL);
        wait_until("the daemon's end", Duration::from_secs(5), || !exists(before));
    }

    pub(crate) fn restart(host: &str) {
        ok(&conet(&["lab", "restart", host]));
    }

    /// Starts a program on conet-h1 by `conet run`.
    pub(crate) fn run(&self, command: &[&str]) -> Program {
        self.run_with(&[], command)
    }

    /// Starts a program on conet-h1 by `conet run` with `options`.
    pub(crate) fn run_with(&self, options: &[&str], command: &[&str]) -> Program {
        let child = self.command(options, command).spawn().unwrap();
        let program = Program(Some(child));
        // Until its execve it is conet, and moving it would have it come home.
        let pid = program.pid();
        let own = fs::metadata(CONET).unwrap();
        wait_until("becoming its program", Duration::from_secs(10), || {
            use std::os::unix::fs::MetadataExt;
            let file = fs::metadata(format!("/proc/{pid}/exe"));
            !exists(pid) || file.is_ok_and(|file| file.ino() != own.ino())
        });
        program
    }

    /// `conet lab exec conet-h1 -- conet run … -- …`, its output caught.
    pub(crate) fn command(&self, options: &[&str], command: &[&str]) -> Command {
        let mut run = Command::new(CONET);
        run.args(["lab", "exec", "conet-h1", "--", CONET, "run"]).args(options);
        run.arg("--").args(command);
        run.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        run
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for host in self.hosts() {
                let log = fs::read_to_string(format!("/run/conet-lab/{host}.log"));
                eprintln!("--- {host}\n{}", log.unwrap_or_default());
            }
        }
        let removed = conet(&["lab", "down"]);
        if !std::thread::panicking() {
            ok(&removed);
            nothing_remains();
        }
    }
}

/// `conet guest …` on a lab host.
pub(crate) fn guest(host: &str, arguments: &[&str]) -> Output {
    Lab::exec(host, &[&[CONET, "guest"], arguments].concat())
}

/// What a lab host lists of a guest.
pub(crate) fn guest_row(host: &str, name: &str) -> Value {
    let list = json(&ok(&guest(host, &["list", "--json"])));
    let mut guests = list["guests"].as_array().unwrap().iter();
    guests.find(|guest| guest["name"] == name).unwrap().clone()
}

#[track_caller]
pub(crate) fn nothing_remains() {
    let links = Netlink::open().unwrap().links().unwrap();
    let links: Vec<_> = links.iter().map(|link| link.name.as_str()).collect();
    assert!(!links.iter().any(|name| conet_lab::is_lab_name(name)), "{links:?}");
    let namespaces = Netns::list().unwrap();
    let left = namespaces.iter().find(|name| conet_lab::is_lab_name(name.as_str()));
    assert!(left.is_none(), "{left:?}");
    assert!(!std::path::Path::new(conet_lab::STATE_DIR).exists());
    let error = failed(&conet(&["lab", "status"]));
    assert_eq!(error.trim_end(), "conet: no lab is up; make one with: conet lab up");
}

/// A program that does not outlive its test.
pub(crate) struct Program(pub(crate) Option<Child>);

impl Program {
    pub(crate) fn pid(&self) -> u32 {
        self.0.as_ref().unwrap().id()
    }

    /// Waits for its end.
    pub(crate) fn finish(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }

    /// Waits for its end, for `limit` at most.
    #[track_caller]
    pub(crate) fn status_within(&mut self, limit: Duration) -> ExitStatus {
        let child = self.0.as_mut().unwrap();
        let mut status = None;
        wait_until("its end", limit, || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.0.as_mut().unwrap().try_wait().unwrap().is_some()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// Every row of `conet ps` on conet-h1.
pub(crate) fn rows() -> Vec<Value> {
    let listed = json(&ok(&Lab::exec("conet-h1", &[CONET, "ps", "--json"])));
    listed["processes"].as_array().unwrap().clone()
}

/// A program's row; null where it is not listed.
pub(crate) fn row(pid: u32) -> Value {
    rows().into_iter().find(|row| row["pid"] == pid).unwrap_or_default()
}

pub(crate) fn try_migrate(pid: u32, to: &str) -> Output {
    Lab::exec("conet-h1", &[CONET, "migrate", "--json", &pid.to_string(), to])
}

/// Moves a program, and asserts that it runs there.
#[track_caller]
pub(crate) fn migrate(pid: u32, to: &str) -> Value {
    let moved = json(&ok(&try_migrate(pid, to)));
    if to == "home" {
        assert_eq!(moved["node"], "conet-h1", "{moved}");
    } else {
        assert_eq!(moved["node"], to, "{moved}");
        let remote = u32::try_from(moved["remote_pid"].as_u64().unwrap()).unwrap();
        assert!(exists(remote) && remote != pid, "{moved}");
    }
    moved
}

/// Moves a program out, and gives its remote pid.
#[track_caller]
pub(crate) fn take_out(pid: u32) -> u32 {
    u32::try_from(migrate(pid, "conet-h2")["remote_pid"].as_u64().unwrap()).unwrap()
}

/// What `conet why` says, as `code: sentence` each.
#[track_caller]
pub(crate) fn why(pid: u32) -> Vec<String> {
    let why = json(&ok(&Lab::exec("conet-h1", &[CONET, "why", "--json", &pid.to_string()])));
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let reasons = why["reasons"].as_array().unwrap().iter();
    let reasons: Vec<_> =
        reasons.map(|r| format!("{}: {}", text(&r["code"]), text(&r["sentence"]))).collect();
    assert_eq!(why["movable"], reasons.is_empty());
    reasons
}

pub(crate) fn as_pid(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

#[track_caller]
pub(crate) fn signal(pid: u32, signal: Signal) {
    kill_process(as_pid(pid), signal).unwrap();
}

/// Fields of `/proc/PID/stat` from the third (man 5 proc).
fn stat(pid: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}

/// State of a process, as `/proc` names it.
pub(crate) fn state(pid: u32) -> Option<char> {
    stat(pid)?.first()?.chars().next()
}

/// Parent of a process.
pub(crate) fn parent_of(pid: u32) -> Option<u32> {
    stat(pid)?.get(1)?.parse().ok()
}

/// Whether the machine has such a process, and it is no zombie.
pub(crate) fn exists(pid: u32) -> bool {
    state(pid).is_some_and(|state| state != 'Z' && state != 'X')
}

/// What a process has had of the processors so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    /// In user mode, to 10 ms.
    pub(crate) user: Duration,
    /// In all.
    pub(crate) run: Duration,
    /// How long it was ready to run and others ran.
    pub(crate) waited: Duration,
}

impl Times {
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let ticks: u64 = stat(pid)?.get(11)?.parse().ok()?;
        let all = fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
        let mut all = all.split_whitespace().map(|ns| ns.parse().map(Duration::from_nanos));
        let (run, waited) = (all.next()?.ok()?, all.next()?.ok()?);
        Some(Self { user: Duration::from_millis(ticks * 10), run, waited })
    }

    /// Adds what passed between two looks.
    pub(crate) fn add(&mut self, before: Self, after: Self) {
        self.user += after.user.saturating_sub(before.user);
        self.run += after.run.saturating_sub(before.run);
        self.waited += after.waited.saturating_sub(before.waited);
    }
}

/// Processor time of the children of this process that were waited for, to 10 ms.
pub(crate) fn children_ran() -> Duration {
    let stat = stat(std::process::id()).unwrap();
    let ticks = |field: usize| stat[field - 3].parse::<u64>().unwrap();
    Duration::from_millis((ticks(16) + ticks(17)) * 10)
}

/// The interpreter itself, where `python3` is a script that starts it.
pub(crate) fn python() -> String {
    static FOUND: OnceLock<String> = OnceLock::new();
    let look = || {
        let arguments = ["-c", "import sys; print(sys.executable)"];
        ok(&Command::new("python3").args(arguments).output().unwrap()).trim().to_owned()
    };
    FOUND.get_or_init(look).clone()
}

/// A file that all hosts see, removed when dropped.
pub(crate) struct Shared(pub(crate) PathBuf);

impl Shared {
    pub(crate) fn new(name: &str) -> Self {
        Self(PathBuf::from(SHARED).join(format!("conet-t{}-{name}", std::process::id())))
    }

    pub(crate) fn with(name: &str, bytes: &[u8]) -> Self {
        let file = Self::new(name);
        fs::write(&file.0, bytes).unwrap();
        file
    }

    pub(crate) fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }

    pub(crate) fn create(&self) -> File {
        File::create(&self.0).unwrap()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
    }
}

/// Compiles a program of `tests/programs`.
pub(crate) fn compiled(name: &str, flags: &[&str]) -> Shared {
    let program = Shared::new(name);
    let source = format!("{}/tests/programs/{name}.c", env!("CARGO_MANIFEST_DIR"));
    let mut cc = Command::new("cc");
    cc.args(["-O1", "-o"]).arg(&program.0).arg(source).args(flags);
    assert!(cc.status().unwrap().success(), "cc {name}");
    program
}

/// What a program has printed so far.
#[derive(Clone, Default)]
pub(crate) struct Said(Arc<Mutex<String>>);

impl Said {
    /// Reads what `program` prints from now on.
    pub(crate) fn by(program: &mut Program) -> Self {
        let said = Self::default();
        let (ours, mut out) = (said.clone(), program.0.as_mut().unwrap().stdout.take().unwrap());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = out.read(&mut buffer) {
                ours.0.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
        });
        said
    }

    pub(crate) fn text(&self) -> String {
        self.0.lock().unwrap().clone()
    }

    #[track_caller]
    pub(crate) fn wait_for(&self, what: &str) {
        wait_until(what, Duration::from_secs(10), || self.text().contains(what));
    }

    /// Waits until it has printed something more.
    #[track_caller]
    pub(crate) fn wait_for_more(&self) {
        let now = self.text().len();
        wait_until("more output", Duration::from_secs(5), || self.text().len() > now);
    }
}

/// Changes a host's `conet.toml` by sed(1), and restarts its daemon.
pub(crate) fn reconfigure(host: &str, change: &str) {
    let config = ok(&Lab::exec(host, &["sh", "-c", "echo $CONET_CONFIG"]));
    ok(&Lab::exec(host, &["sed", "-i", change, config.trim()]));
    // Where the change keeps the peers apart, the restart says so; the test sees to it.
    conet(&["lab", "restart", host]);
    Lab::daemon(host);
}
