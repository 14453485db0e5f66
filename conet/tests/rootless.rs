//! `conet demo` and `conet lab` by a user who is not root.
//!
//! The user has nothing: no group, no home, no directory but a copy of the program.
//! Its labs are in namespaces of its own, so other labs of the machine are not
//! concerned, and need not be waited for.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use conet_testkit::{Need, privileged};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Users that own nothing on an ordinary system; one for each test, so that what
/// remains of one is not taken for another's.
static NEXT_USER: AtomicU32 = AtomicU32::new(1_234_500_000);
/// One at a time: each has a whole lab, and a small machine is not to carry three.
static TURN: Mutex<()> = Mutex::new(());
/// No step takes nearly as long.
const LIMIT: Duration = Duration::from_secs(60);

/// An ordinary user with a copy of the program, which it may execute.
struct User {
    uid: u32,
    directory: tempfile::TempDir,
    /// Namespaces and links that there were before.
    before: BTreeSet<String>,
    /// Its XDG_RUNTIME_DIR; none for a user without one.
    runtime: Option<tempfile::TempDir>,
    _turn: MutexGuard<'static, ()>,
}

/// As udev's rules have it on every distribution; a machine without udev keeps it for root.
fn give_everybody_tun() {
    const TUN: &str = "/dev/net/tun";
    let mode = fs::metadata(TUN).unwrap().permissions().mode();
    if mode & 0o666 != 0o666 {
        fs::set_permissions(TUN, fs::Permissions::from_mode(mode | 0o666)).unwrap();
    }
}

impl User {
    fn new() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        give_everybody_tun();
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(directory.path(), executable.clone()).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_conet"), directory.path().join("conet")).unwrap();
        fs::set_permissions(directory.path().join("conet"), executable).unwrap();
        let uid = NEXT_USER.fetch_add(1, Ordering::Relaxed);
        Self { uid, directory, before: visible(), runtime: None, _turn: turn }
    }

    /// Gives it a runtime directory where systemd has them: its machine has a /run of
    /// its own, where that is not to be found.
    fn with_runtime_directory(mut self) -> Self {
        let runtime = tempfile::tempdir_in("/run").unwrap();
        std::os::unix::fs::chown(runtime.path(), Some(self.uid), Some(self.uid)).unwrap();
        self.runtime = Some(runtime);
        self
    }

    fn program(&self) -> PathBuf {
        self.directory.path().join("conet")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.program());
        command.args(arguments).uid(self.uid).gid(self.uid).current_dir("/");
        command.env_remove("XDG_RUNTIME_DIR").env_remove("CONET_SOCKET").stdin(Stdio::null());
        if let Some(runtime) = &self.runtime {
            command.env("XDG_RUNTIME_DIR", runtime.path());
        }
        command
    }

    fn conet(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Its processes, by pid and command, but those that only wait to be reaped by
    /// the system.
    fn processes(&self) -> Vec<String> {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let own = entries.filter(|entry| {
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            if status.lines().any(|line| line.starts_with("State:\tZ")) {
                return false;
            }
            let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
            uids.is_some_and(|uids| uids.split_whitespace().any(|uid| uid == self.uid.to_string()))
        });
        own.map(|entry| {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            format!("{} {}", entry.file_name().display(), name.trim_end())
        })
        .collect()
    }

    /// Asserts that nothing of the user's runs, and that nothing is left elsewhere.
    #[track_caller]
    fn left_nothing(&self) {
        // What has been killed takes the kernel a moment to take apart.
        wait_until(&format!("the end of {:?}", self.processes()), || self.processes().is_empty());
        assert!(!PathBuf::from(format!("/tmp/conet-lab-{}", self.uid)).exists());
        if let Some(runtime) = &self.runtime {
            assert_eq!(fs::read_dir(runtime.path()).unwrap().count(), 0);
        }
        let now = visible();
        let new: Vec<_> =
            now.difference(&self.before).filter(|one| one.contains("conet")).collect();
        assert!(new.is_empty(), "{new:?}");
    }
}

impl Drop for User {
    fn drop(&mut self) {
        // Of a test that failed.
        for process in self.processes() {
            let pid = process.split(' ').next().and_then(|pid| pid.parse().ok());
            if let Some(pid) = pid.and_then(Pid::from_raw) {
                kill_process(pid, Signal::KILL).ok();
            }
        }
        fs::remove_dir_all(format!("/tmp/conet-lab-{}", self.uid)).ok();
    }
}

/// Links and named namespaces of where the test runs.
fn visible() -> BTreeSet<String> {
    let links = conet_netsys::Netlink::open().unwrap().links().unwrap();
    let names = conet_netsys::Netns::list().unwrap();
    let links = links.into_iter().map(|link| format!("link {}", link.name));
    links.chain(names.into_iter().map(|name| format!("namespace {name}"))).collect()
}

#[track_caller]
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < LIMIT, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[track_caller]
fn ok(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
fn failed(output: &Output, said: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains(said), "{text}");
}

/// Whether this machine lets the user have what a lab of its own needs.
fn can_be_rootless(user: &User) -> bool {
    let doctor = user.conet(&["doctor", "--json"]);
    let report: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    checks.iter().any(|check| check["name"] == "rootless" && check["state"] == "ok")
}

macro_rules! user_or_skip {
    ($($need:expr),*) => {{
        privileged!(Need::Tun $(, $need)*);
        let user = User::new();
        assert!(can_be_rootless(&user), "this machine gives ordinary users no user namespaces");
        user
    }};
}

#[test]
fn an_ordinary_user_sees_every_step_and_nothing_is_left() {
    let user = user_or_skip!();
    let output = user.conet(&["demo", "--json"]);
    let report: Value = serde_json::from_str(&ok(&output)).unwrap();
    assert!(report["ok"] == true && report["rootless"] == true, "{report:#}");
    let steps = report["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 15, "{report:#}");
    for step in steps {
        // Shown, or left out for a reason.
        let reason = step["unavailable"].as_str();
        assert_eq!(step["ok"] == true, reason.is_none(), "{step:#}");
        assert!(reason.is_none_or(|reason| reason.len() > 10 && step["ok"].is_null()), "{step:#}");
    }
    // What the doctor says is there is shown.
    let doctor = user.conet(&["doctor", "--json"]);
    let doctor: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let step = |name: &str| steps.iter().find(|step| step["name"] == name).unwrap();
    assert_eq!(step("process moves (wireguard)")["ok"] == true, doctor["moving"] == true);
    assert_eq!(step("ping (ipip)")["ok"] == true, doctor["tunnelling"] == true);
    user.left_nothing();
}

#[test]
fn a_demonstration_of_a_users_that_is_stopped_or_killed_leaves_nothing() {
    let user = user_or_skip!();
    for (step, signal) in [
        ("making conet-h2", Signal::INT),
        ("process moves (wireguard)", Signal::TERM),
        ("starting the daemon of conet-h2", Signal::KILL),
        ("process moves (wireguard)", Signal::KILL),
    ] {
        let mut demo = user
            .command(&["demo", "--json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut progress = BufReader::new(demo.stderr.take().unwrap()).lines();
        let begun = format!("{step} …");
        assert!(progress.by_ref().any(|line| line.unwrap() == begun), "no step {step}");
        let rest = thread::spawn(move || progress.for_each(drop));
        kill_process(Pid::from_child(&demo), signal).unwrap();
        let mut said = Vec::new();
        demo.stdout.take().unwrap().read_to_end(&mut said).unwrap();
        let status = demo.wait().unwrap();
        rest.join().unwrap();
        if signal != Signal::KILL {
            let report: Value = serde_json::from_slice(&said).unwrap();
            assert!(status.code() == Some(1) && report["interrupted"] == true, "{report:#}");
        }
        user.left_nothing();
    }
}

#[test]
fn a_users_lab_stays_until_it_is_removed() {
    let user = user_or_skip!(Need::Program("ping")).with_runtime_directory();
    let program = user.program();
    let program = program.to_str().unwrap();
    failed(&user.conet(&["lab", "status"]), "no lab is up");
    ok(&user.conet(&["lab", "up", "--hosts", "2"]));
    failed(&user.conet(&["lab", "up"]), "a lab is up already");
    let exec =
        |command: &[&str]| user.conet(&[&["lab", "exec", "conet-h1", "--"], command].concat());
    assert_eq!(ok(&exec(&["uname", "-n"])), "conet-h1\n");
    assert_eq!(exec(&["sh", "-c", "exit 7"]).status.code(), Some(7));
    assert_eq!(exec(&["sh", "-c", "kill -9 $$"]).status.code(), Some(137));
    assert_eq!(exec(&["/no/such/program"]).status.code(), Some(127));
    // Its guests are plugged by TAP; one of each kind can be added.
    let listed: Value =
        serde_json::from_str(&ok(&exec(&[program, "guest", "list", "--json"]))).unwrap();
    assert_eq!(listed["guests"][0]["kind"], "tap");
    for (name, kind) in [("conet-a", "tap"), ("conet-b", "netns")] {
        ok(&exec(&[program, "guest", "add", name, "--kind", kind]));
        let ping = ["ping", "-c", "3", "-i", "0.2", "-W", "5", "10.77.2.2"];
        ok(&exec(&[&[program, "guest", "exec", name, "--"][..], &ping].concat()));
    }
    let report: Value =
        serde_json::from_str(&ok(&user.conet(&["lab", "status", "--json"]))).unwrap();
    assert_eq!(report["hosts"][0]["peers_up"], 1);
    assert!(!PathBuf::from(format!("/tmp/conet-lab-{}", user.uid)).exists());
    assert_eq!(ok(&user.conet(&["lab", "restart", "conet-h1"])), "");
    ok(&user.conet(&["lab", "down"]));
    user.left_nothing();
    assert_eq!(ok(&user.conet(&["lab", "down"])), "removed 0 processes, 0 namespaces, 0 links\n");
    user.left_nothing();
}

#[test]
fn a_users_lab_ends_with_its_first_process() {
    let user = user_or_skip!();
    ok(&user.conet(&["lab", "up"]));
    let state = fs::read(format!("/tmp/conet-lab-{}/machine.json", user.uid)).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    let init = i32::try_from(state["pid"].as_i64().unwrap()).unwrap();
    assert!(user.processes().len() >= 5, "{:?}", user.processes());
    kill_process(Pid::from_raw(init).unwrap(), Signal::KILL).unwrap();
    wait_until("the end of all", || user.processes().is_empty());
    failed(&user.conet(&["lab", "status"]), "no lab is up");
    // A new one takes its place.
    ok(&user.conet(&["lab", "up"]));
    ok(&user.conet(&["lab", "down"]));
    user.left_nothing();
}

#[test]
fn a_directory_that_is_somebody_elses_is_not_used() {
    let user = user_or_skip!();
    let path = format!("/tmp/conet-lab-{}", user.uid);
    fs::create_dir(&path).unwrap();
    failed(&user.conet(&["lab", "up"]), "it is somebody else's");
    failed(&user.conet(&["lab", "status"]), "it is somebody else's");
    fs::remove_dir(&path).unwrap();
    user.left_nothing();
}

#[test]
fn where_proc_is_hidden_the_reason_is_told_in_one_line() {
    let user = user_or_skip!(Need::Program("unshare"));
    let program = user.program();
    // As containers do; then the kernel lets no ordinary user mount another one.
    let hide = "mount -t tmpfs tmpfs /proc/tty && exec \"$@\"";
    let hidden = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", hide, "sh", "setpriv"]);
        command.args([format!("--reuid={}", user.uid), format!("--regid={}", user.uid)]);
        command.arg("--clear-groups").arg(&program).args(arguments).stdin(Stdio::null());
        command.output().unwrap()
    };
    for arguments in [&["demo"][..], &["lab", "up"]] {
        let output = hidden(arguments);
        failed(&output, "containers that hide parts of theirs forbid it");
        assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
    }
    let doctor: Value = serde_json::from_slice(&hidden(&["doctor", "--json"]).stdout).unwrap();
    let checks = doctor["checks"].as_array().unwrap();
    let rootless = checks.iter().find(|check| check["name"] == "rootless").unwrap();
    assert_eq!(rootless["state"], "missing", "{rootless}");
    user.left_nothing();
}

#[test]
fn steps_that_the_machine_cannot_show_are_unavailable_with_their_reason() {
    privileged!(Need::Tun, Need::Program("unshare"));
    // Root of a user namespace in which no further one can be made.
    let script = format!(
        "mount -t tmpfs tmpfs /run && echo 0 > /proc/sys/user/max_user_namespaces && \
         ip link set lo up && exec {} demo --json",
        env!("CARGO_BIN_EXE_conet")
    );
    let output = Command::new("unshare")
        .args(["-U", "-r", "-n", "-m", "-p", "--fork", "--mount-proc", "sh", "-c", &script])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let report: Value = serde_json::from_str(&ok(&output)).unwrap();
    let steps = report["steps"].as_array().unwrap();
    assert_eq!((steps.len(), &report["ok"]), (15, &Value::Bool(true)));
    let unavailable: Vec<_> =
        steps.iter().filter(|step| step.get("unavailable").is_some()).collect();
    let names: Vec<_> = unavailable.iter().map(|step| step["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["process moves (wireguard)", "forwarded call (wireguard)"]);
    for step in unavailable {
        assert!(step["ok"].is_null());
        let reason = step["unavailable"].as_str().unwrap();
        assert!(reason.starts_with("user-namespaces: ") && reason.contains("sysctl"), "{reason}");
    }
}
