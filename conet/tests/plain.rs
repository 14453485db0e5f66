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

/// A file of wg-quick's, with keys of 32 bytes of 2 and 3.
const WG_QUICK: &str = "[Interface]\nPrivateKey = AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\n\
    Address = 10.8.0.1/24\n[Peer]\nPublicKey = AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=\n\
    Endpoint = 192.0.2.2:51820\nAllowedIPs = 10.9.0.0/24\n";

#[test]
fn a_file_of_wg_quick_is_imported_once_and_no_secret_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (from, to) = (path("wg0.conf"), path("conet.toml"));
    let import = |text: &str, more: &[&str]| {
        std::fs::write(&from, text).unwrap();
        let all = [&["import", &from, "--to", &to, "--name", "one"], more].concat();
        Command::new(env!("CARGO_BIN_EXE_conet")).args(all).output().unwrap()
    };
    let refusals = [
        (
            WG_QUICK.replace("[Peer]", "DNS = 1.1.1.1\n[Peer]"),
            "wg0.conf: line 4: DNS: conet has no",
        ),
        (WG_QUICK.replace(".0.1/24", ".0.1/32"), "--overlay 10.77.1.0/24"),
        (WG_QUICK.replace("10.9.0.0/24", "10.8.0.0/25"), "lies in this node's own overlay"),
        (WG_QUICK.replace("PrivateKey = ", "PrivateKey "), "line 2: (a line): neither"),
    ];
    for (text, said) in refusals {
        let output = import(&text, &[]);
        let shown = String::from_utf8(output.stderr).unwrap();
        let line = shown.lines().last().unwrap();
        assert!(!output.status.success() && line.contains(said), "{shown}");
        assert!(!shown.contains("AgICAg") && std::fs::read_dir(dir.path()).unwrap().count() == 1);
    }
    let output = import(WG_QUICK, &["--json"]);
    assert!(output.status.success(), "{output:?}");
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["peers"], 1);
    let mode = std::fs::metadata(&to).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let text = std::fs::read_to_string(&to).unwrap();
    assert!(text.contains("overlay = \"10.8.0.0/24\"") && text.contains("peer1"), "{text}");
    // What is there stays.
    let again = import(WG_QUICK, &[]);
    assert!(!again.status.success());
    assert!(String::from_utf8(again.stderr).unwrap().contains("it is there already"));
    assert_eq!(std::fs::read_to_string(&to).unwrap(), text);
    let chosen = import(WG_QUICK, &["--overlay", "10.77.1.0/24", "--to", &path("other.toml")]);
    assert!(!chosen.status.success(), "--to twice is no command");
}
