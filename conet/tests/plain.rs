//! What needs neither root nor a daemon.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};

fn conet(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_conet"))
        .args(arguments)
        .env_remove("CONET_SOCKET")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn said(output: &Output) -> (i32, String) {
    let text = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    assert!(!text.contains('\n'), "one line: {text}");
    (output.status.code().unwrap(), text)
}

#[test]
fn keys_are_made_and_derived() {
    let key = String::from_utf8(conet(&["keygen"], "").stdout).unwrap();
    assert_eq!(key.trim_end().len(), 44);
    let public = conet(&["pubkey"], &key);
    let wireguard = conet(&["pubkey", "--wireguard"], &key);
    assert!(public.status.success() && wireguard.status.success());
    assert_eq!((public.stdout.len(), wireguard.stdout.len()), (45, 45));
    assert_ne!(public.stdout, wireguard.stdout);
    let (status, text) = said(&conet(&["pubkey"], "no key"));
    assert_eq!(status, 1);
    assert!(text.starts_with("conet: standard input is not a private key: not base64"), "{text}");
}

#[test]
fn without_a_daemon_the_remedy_is_told() {
    for command in [&["status"][..], &["peers"], &["ps"], &["run", "--", "true"]] {
        let (status, text) = said(&conet(&[&["--socket", "/nonexistent"], command].concat(), ""));
        assert_eq!(status, 1);
        assert!(text.ends_with("start it with: conet up"), "{text}");
    }
}

#[test]
fn a_wrong_configuration_is_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("conet.toml");
    std::fs::write(&path, "[node]\nprot = 1\n").unwrap();
    let shown = path.display().to_string();
    let (status, text) = said(&conet(&["up", "-c", &shown], ""));
    assert_eq!(status, 1);
    assert_eq!(text, format!("conet: {shown}:2: node.prot: unknown key; did you mean `port`?"));

    let key = dir.path().join("node.key");
    std::fs::write(&key, conet(&["keygen"], "").stdout).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::write(&path, "[node]\nname = \"a\"\nprivate_key_file = \"node.key\"\n").unwrap();
    let (_, text) = said(&conet(&["up", "-c", &shown], ""));
    assert!(text.contains(":3: node.private_key_file: ") && text.contains("chmod 600"), "{text}");
}

#[test]
fn a_command_that_is_none_takes_one_line() {
    let (status, text) = said(&conet(&["stauts"], ""));
    assert_eq!(status, 2);
    assert!(text.contains("conet --help"), "{text}");
}
