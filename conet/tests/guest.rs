//! `conet guest …` in a lab: guests that come and go while the daemon runs.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::{CONET, Lab, conet, failed, json, nothing_remains, ok, wait_until};
use conet_netsys::{Netns, NetnsName};
use conet_testkit::Need;
use serde_json::Value;

fn guest(host: &str, arguments: &[&str]) -> Output {
    Lab::exec(host, &[&[CONET, "guest"], arguments].concat())
}

fn list(host: &str) -> Vec<Value> {
    let text = ok(&guest(host, &["list", "--json"]));
    json(&text)["guests"].as_array().unwrap().clone()
}

fn row(host: &str, name: &str) -> Option<Value> {
    list(host).into_iter().find(|guest| guest["name"] == name)
}

fn exists(name: &str) -> bool {
    Netns::exists(&NetnsName::new(name).unwrap())
}

/// Links of a lab host, by name.
fn links(host: &str) -> String {
    ok(&Lab::exec(host, &["ip", "-o", "link"]))
}

fn pings(host: &str, guest: &str, to: &str) {
    let ping = ["exec", guest, "--", "ping", "-c", "3", "-i", "0.05", "-W", "5", to];
    ok(&self::guest(host, &ping));
}

/// Removes a lab, and looks while no other test may have one.
fn removed(lab: Lab) {
    ok(&conet(&["lab", "down"]));
    nothing_remains();
    drop(lab);
}

#[test]
fn guests_come_and_go_while_the_daemon_runs() {
    conet_testkit::privileged!(Need::Tun, Need::Program("ping"));
    let lab = Lab::up("wireguard");
    assert_eq!(row("conet-h1", "conet-h1-g1").unwrap()["origin"], "config");
    let by_veth = json(&ok(&guest("conet-h1", &["add", "conet-a", "--json"])));
    assert_eq!(by_veth["addresses"], serde_json::json!(["10.77.1.3"]));
    assert_eq!((&by_veth["kind"], &by_veth["state"]), (&"netns".into(), &"up".into()));
    let add = ["add", "conet-b", "--kind", "tap", "--address", "10.77.1.9", "--address"];
    assert_eq!(
        ok(&guest("conet-h1", &[&add[..], &["10.77.1.8"]].concat())),
        "conet-b 10.77.1.9, 10.77.1.8 (tap)\n"
    );
    // The far guest, the guest beside, and from afar at each address.
    for name in ["conet-a", "conet-b"] {
        pings("conet-h1", name, "10.77.2.2");
        pings("conet-h1", name, "10.77.1.2");
    }
    for address in ["10.77.1.3", "10.77.1.8", "10.77.1.9"] {
        pings("conet-h2", "conet-h2-g1", address);
    }
    // exec becomes the program: its pid is that of the command.
    let shown = guest("conet-h1", &["exec", "conet-b", "--", "sh", "-c", "echo $$ $PPID; exit 7"]);
    assert_eq!(shown.status.code(), Some(7));
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.trim_end().ends_with(&std::process::id().to_string()), "{shown}");
    let status = json(&ok(&Lab::exec("conet-h1", &[CONET, "status", "--json"])));
    assert_eq!(status["guests"].as_array().unwrap().len(), 3);

    for name in ["conet-a", "conet-b"] {
        ok(&guest("conet-h1", &["remove", name]));
        assert!(!exists(name) && row("conet-h1", name).is_none());
        assert!(!links("conet-h1").contains(name), "{}", links("conet-h1"));
    }
    let routes = ok(&Lab::exec("conet-h1", &["ip", "route", "show", "table", "all"]));
    assert!(!routes.contains("10.77.1.3") && !routes.contains("10.77.1.9"), "{routes}");
    assert_eq!(list("conet-h1").len(), 1);
    pings("conet-h1", "conet-h1-g1", "10.77.2.2");
    removed(lab);
}

#[test]
fn what_cannot_be_done_with_guests_is_told_in_one_line() {
    conet_testkit::privileged!(Need::Tun);
    let lab = Lab::up("wireguard");
    ok(&guest("conet-h1", &["add", "conet-a", "--kind", "tap"]));
    for (arguments, said) in [
        (&["add", "conet-a"][..], "already the name of a guest"),
        (&["add", "conet-h2"], "already the name of a peer"),
        (&["add", "conet-h2-g1"], "already a network namespace"),
        // The host's uplink is a veth too: it must not be taken for a rest.
        (&["add", "eth0"], "already a link named eth0"),
        (&["add", "conet0"], "already a link named conet0"),
        (&["add", "conet-x", "--address", "10.77.2.9"], "not a guest's address in overlay 10.77.1"),
        (&["add", "conet-x", "--address", "10.77.1.1"], "not a guest's address"),
        (&["add", "conet-x", "--address", "10.77.1.2"], "is the address of guest conet-h1-g1"),
        (&["add", "../x"], "is no name for a guest"),
        (&["remove", "conet-x"], "no guest is named conet-x"),
        (&["remove", "conet-h1-g1"], "is a guest of conet.toml"),
        (&["exec", "conet-x", "--", "true"], "no guest is named conet-x"),
        (&["exec", "conet-a", "--", "/no/such/program"], "cannot run /no/such/program"),
    ] {
        let text = failed(&guest("conet-h1", arguments));
        assert!(text.contains(said), "{arguments:?}: {text}");
    }
    assert_eq!(list("conet-h1").len(), 2, "nothing of what was refused is there");
    pings("conet-h1", "conet-a", "10.77.2.2");

    // A user lists, and changes nothing. (Its copy of the program: it may not read ours.)
    let program = "/var/tmp/conet-guest-test";
    fs::copy(CONET, program).unwrap();
    let as_user = |arguments: &str| {
        let script = format!("{program} guest {arguments}");
        let mut command = Command::new(CONET);
        command.args(["lab", "exec", "conet-h1", "--", "setpriv", "--reuid=65534"]);
        command.args(["--regid=65534", "--clear-groups", "sh", "-c", &script]);
        command.stdin(Stdio::null()).output().unwrap()
    };
    assert!(ok(&as_user("list")).contains("conet-a"));
    for (arguments, said) in [
        ("add conet-x", "only root and members of group conet"),
        ("remove conet-a", "only root and members of group conet"),
        ("exec conet-a -- true", "only root enters guest conet-a"),
    ] {
        let text = failed(&as_user(arguments));
        assert!(text.contains(said), "{text}");
    }
    fs::remove_file(program).unwrap();

    // A guest with a program in it stays, whatever its kind.
    let mut inside = Command::new(CONET);
    inside.args(["lab", "exec", "conet-h1", "--", CONET, "guest", "exec", "conet-a", "--"]);
    // A process group of its own: it is ended by its id alone.
    let mut inside = inside.args(["sleep", "600"]).process_group(0).spawn().unwrap();
    let pid = inside.id();
    wait_until("the program runs", Duration::from_secs(10), || {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sleep")
    });
    let text = failed(&guest("conet-h1", &["remove", "conet-a"]));
    assert!(text.contains(&format!("programs run in conet-a: {pid}")), "{text}");
    pings("conet-h1", "conet-a", "10.77.2.2");
    inside.kill().unwrap();
    inside.wait().unwrap();
    ok(&guest("conet-h1", &["remove", "conet-a"]));
    removed(lab);
}

#[test]
fn added_guests_survive_daemons_and_removed_ones_do_not_come_back() {
    conet_testkit::privileged!(Need::Tun, Need::Program("ping"));
    let lab = Lab::up("wireguard");
    for (name, kind) in [("conet-a", "netns"), ("conet-b", "tap"), ("conet-c", "tap")] {
        ok(&guest("conet-h1", &["add", name, "--kind", kind]));
    }
    let before: Vec<_> = list("conet-h1").iter().map(|guest| guest["addresses"].clone()).collect();
    ok(&guest("conet-h1", &["remove", "conet-c"]));
    // An orderly end, and a kill.
    for kill in [false, true] {
        if kill {
            Lab::kill_daemon("conet-h1");
        }
        Lab::restart("conet-h1");
        let after: Vec<_> =
            list("conet-h1").iter().map(|guest| guest["addresses"].clone()).collect();
        assert_eq!(after, before[..3]);
        assert!(!exists("conet-c"));
        for name in ["conet-a", "conet-b"] {
            assert_eq!(row("conet-h1", name).unwrap()["state"], "up");
            pings("conet-h1", name, "10.77.2.2");
        }
    }
    // A removal that a crash cut short is finished by the next daemon.
    Lab::kill_daemon("conet-h1");
    let edit = "sed -i 's/\"is_going\":false/\"is_going\":true/g' /run/conet/guests.json";
    ok(&Lab::exec("conet-h1", &["sh", "-c", edit]));
    Lab::restart("conet-h1");
    assert_eq!(list("conet-h1").len(), 1);
    assert!(!exists("conet-a") && !exists("conet-b"));
    assert!(!links("conet-h1").contains("conet-a"));
    removed(lab);
}
