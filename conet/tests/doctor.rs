//! `conet doctor`, as root, as an ordinary user, and where something is missing.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A user that owns nothing, as on most systems.
const NOBODY: u32 = 65_534;

fn run(command: &mut Command) -> (Output, Value) {
    let output = command.env_remove("CONET_SOCKET").stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let report = serde_json::from_str(&text)
        .unwrap_or_else(|_| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)));
    (output, report)
}

/// A copy that every user may execute.
fn copy(directory: &Path) -> std::path::PathBuf {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    let program = directory.join("conet");
    fs::copy(env!("CARGO_BIN_EXE_conet"), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{name}: {report}"))
}

/// Every line is whole, and the status is what the lines say.
fn is_sound(output: &Output, report: &Value) {
    for check in report["checks"].as_array().unwrap() {
        let state = check["state"].as_str().unwrap();
        assert!(["ok", "limited", "missing"].contains(&state), "{check}");
        assert!(!check["found"].as_str().unwrap().is_empty(), "{check}");
        assert!(!check["feature"].as_str().unwrap().is_empty(), "{check}");
        assert_eq!(check["remedy"].is_null(), state == "ok", "{check}");
    }
    let both = report["moving"] == true && report["tunnelling"] == true;
    assert_eq!(report["ok"], both);
    assert_eq!(output.status.success(), both);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(said.lines().count(), usize::from(!both), "{said}");
}

#[test]
fn whoever_asks_is_told_what_the_machine_can_do() {
    let program = env!("CARGO_BIN_EXE_conet");
    let (output, report) = run(Command::new(program).args(["doctor", "--json"]));
    is_sound(&output, &report);
    let table = Command::new(program).arg("doctor").stdin(Stdio::null()).output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    for check in report["checks"].as_array().unwrap() {
        let name = check["name"].as_str().unwrap();
        assert!(table.lines().any(|line| line.starts_with(name)), "{name} is not in {table}");
    }
}

#[test]
fn an_ordinary_user_is_told_of_its_own_namespaces() {
    conet_testkit::privileged!();
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let program = copy(directory.path());
    let mut command = Command::new(program);
    let (output, report) = run(command.args(["doctor", "--json"]).uid(NOBODY).gid(NOBODY));
    is_sound(&output, &report);
    assert_eq!(check(&report, "privileges")["state"], "limited");
    assert_eq!(check(&report, "ebpf")["state"], "missing");
    if check(&report, "user-namespaces")["state"] == "ok" {
        let found = check(&report, "network-namespaces")["found"].as_str().unwrap();
        assert!(found.contains("in a user namespace"), "{found}");
    }
}

#[test]
fn a_machine_without_user_namespaces_moves_no_programs() {
    conet_testkit::privileged!(conet_testkit::Need::Program("unshare"));
    let script = format!(
        "echo 0 > /proc/sys/user/max_user_namespaces; exec {} doctor --json",
        env!("CARGO_BIN_EXE_conet")
    );
    // The limit is that of the new user namespace, not of the machine.
    let (output, report) = run(Command::new("unshare").args(["-U", "-r", "sh", "-c", &script]));
    is_sound(&output, &report);
    assert_eq!(report["moving"], false);
    assert_eq!(check(&report, "user-namespaces")["state"], "missing");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("user-namespaces") && said.contains("do not move"), "{said}");
}
