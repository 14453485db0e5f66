//! Guests that are machines: their ports, and with `--features peers` QEMU and User-Mode
//! Linux themselves, in a lab.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::{CONET, Lab, conet, failed, json, nothing_remains, ok, wait_until};
use conet_testkit::Need;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);

fn guest(host: &str, arguments: &[&str]) -> Output {
    Lab::exec(host, &[&[CONET, "guest"], arguments].concat())
}

fn row(host: &str, name: &str) -> Option<Value> {
    let list = json(&ok(&guest(host, &["list", "--json"])));
    list["guests"].as_array().unwrap().iter().find(|guest| guest["name"] == name).cloned()
}

fn links(host: &str) -> String {
    ok(&Lab::exec(host, &["ip", "-o", "link"]))
}

/// The processes that serve ports.
fn servers() -> usize {
    let found = Command::new("pgrep").args(["-fc", "guest-server --mac"]).output().unwrap();
    String::from_utf8(found.stdout).unwrap().trim().parse().unwrap()
}

/// Somebody who connects to a machine's socket and says nothing, until killed.
struct Vmm(Child);

impl Vmm {
    fn connect(host: &str, socket: &str) -> Self {
        const TEXT: &str = "
import socket, sys, time
vmm = socket.socket(socket.AF_UNIX)
vmm.connect(sys.argv[1])
time.sleep(1000)";
        let mut command = Command::new(CONET);
        command.args(["lab", "exec", host, "--", "python3", "-c", TEXT, socket]);
        Self(command.stdin(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn a_machines_port_outlives_the_daemon_and_leaves_nothing() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"), Need::Program("pgrep"));
    let host = "conet-h1";
    let lab = Lab::up("wireguard");
    let before = links(host).lines().count();
    assert_eq!(
        ok(&guest(host, &["add", "conet-vm", "--kind", "qemu"])),
        "conet-vm 10.77.1.3 (qemu)\n"
    );
    let up = row(host, "conet-vm").unwrap();
    assert_eq!((&up["state"], &up["kind"]), (&"up".into(), &"qemu".into()));
    let machine = &up["machine"];
    assert_eq!((&machine["mac"], &machine["vmm"]), (&"02:00:0a:4d:01:03".into(), &Value::Null));
    let socket = machine["socket"].as_str().unwrap();
    let args = ok(&guest(host, &["args", "conet-vm", "--memory", "64"]));
    assert!(args.contains(&format!("path={socket},")) && args.contains("size=64M"), "{args}");
    let shown = json(&ok(&guest(host, &["args", "conet-vm", "--json"])));
    assert_eq!(shown["program"], "qemu-system-x86_64");
    // A namespace has no flags, a machine no namespace.
    assert!(failed(&guest(host, &["args", "conet-h1-g1"])).contains("conet guest exec"));
    assert!(failed(&guest(host, &["args", "nobody"])).contains("no guest"));
    failed(&guest(host, &["exec", "conet-vm", "--", "true"]));

    // Its user is told, also by the daemon after, and keeps it from being removed.
    let vmm = Vmm::connect(host, socket);
    let is_there = || row(host, "conet-vm").unwrap()["machine"]["vmm"].is_u64();
    wait_until("the VMM", SOON, is_there);
    Lab::kill_daemon(host);
    assert!(links(host).contains(" conet-vm:"), "the device is the server's");
    Lab::restart(host);
    wait_until("the VMM by the next daemon", SOON, is_there);
    assert_eq!((row(host, "conet-vm").unwrap()["state"].clone(), servers()), ("up".into(), 1));
    let refusal = failed(&guest(host, &["remove", "conet-vm"]));
    assert!(refusal.contains(&format!("{}", vmm.0.id())), "{refusal}");
    drop(vmm);
    wait_until("the VMM's end", SOON, || !is_there());
    ok(&guest(host, &["remove", "conet-vm"]));
    assert_eq!((row(host, "conet-vm"), servers()), (None, 0));
    assert_eq!(links(host).lines().count(), before);

    // A server that is killed is told, and mended by removing its guest.
    ok(&guest(host, &["add", "conet-vm", "--kind", "uml"]));
    ok(&Command::new("pkill").args(["-KILL", "-f", "guest-server --mac"]).output().unwrap());
    wait_until("the server's end", SOON, || row(host, "conet-vm").unwrap()["state"] == "down");
    ok(&guest(host, &["remove", "conet-vm"]));
    ok(&guest(host, &["add", "conet-vm", "--kind", "uml"]));
    assert_eq!(row(host, "conet-vm").unwrap()["state"], "up");
    ok(&conet(&["lab", "down"]));
    nothing_remains();
    assert_eq!(servers(), 0);
    drop(lab);
}
