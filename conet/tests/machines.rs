//! Guests that are machines: their ports, and with `--features peers` QEMU and User-Mode
//! Linux themselves, in a lab.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io::Write;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

#[cfg(feature = "peers")]
use conet_testkit::machine::Machine;

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

/// Of a machine by either port; whoever is none is refused.
fn flags_are_told(host: &str, socket: &str, stream: &str) {
    let args = ok(&guest(host, &["args", "conet-vm", "--memory", "64"]));
    assert!(args.contains(&format!("path={socket},")) && args.contains("size=64M"), "{args}");
    let shown = json(&ok(&guest(host, &["args", "conet-vm", "--json"])));
    assert_eq!(shown["program"], "qemu-system-x86_64");
    // By frames: another socket of the same port, and other flags.
    let args = ok(&guest(host, &["args", "conet-vm", "--port", "stream"]));
    assert!(args.contains(&format!("addr.path={stream}")) && args.contains("mac=02:00"), "{args}");
    assert!(
        failed(&guest(host, &["args", "conet-vm", "--port", "bess"])).contains("--port stream")
    );
    // A namespace has no flags, a machine no namespace.
    assert!(failed(&guest(host, &["args", "conet-h1-g1"])).contains("conet guest exec"));
    assert!(failed(&guest(host, &["args", "nobody"])).contains("no guest"));
    failed(&guest(host, &["exec", "conet-vm", "--", "true"]));
}

/// And mended by removing its guest.
fn a_killed_server_is_told(host: &str) {
    ok(&guest(host, &["add", "conet-vm", "--kind", "uml"]));
    let args = ok(&guest(host, &["args", "conet-vm", "--port", "bess"]));
    assert!(args.contains("vec0:transport=bess,dst=") && args.contains("mtu=1420"), "{args}");
    assert!(
        failed(&guest(host, &["args", "conet-vm", "--port", "stream"])).contains("--port bess")
    );
    ok(&Command::new("pkill").args(["-KILL", "-f", "guest-server --mac"]).output().unwrap());
    wait_until("the server's end", SOON, || row(host, "conet-vm").unwrap()["state"] == "down");
    ok(&guest(host, &["remove", "conet-vm"]));
    ok(&guest(host, &["add", "conet-vm", "--kind", "uml"]));
    assert_eq!(row(host, "conet-vm").unwrap()["state"], "up");
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
    let stream = socket.replace(".vhost", ".stream");
    flags_are_told(host, socket, &stream);

    // How fast it may be is told and changed, and refused where nobody sees to it.
    let rates = || row(host, "conet-vm").unwrap()["rates"].to_string();
    ok(&guest(host, &["rate", "conet-vm", "--rate", "100mbit", "--rate-to", "10kpps"]));
    assert_eq!(rates(), r#"{"from":"100mbit","to":"10kpps"}"#);
    let refusal = failed(&guest(host, &["rate", "conet-h1-g1", "--rate", "1mbit"]));
    assert!(refusal.contains("kind tap"), "{refusal}");
    failed(&guest(host, &["rate", "conet-vm", "--rate", "fast"]));
    failed(&guest(host, &["rate", "nobody", "--rate", "1mbit"]));

    // Its user is told, also by the daemon after, and keeps it from being removed.
    let vmm = Vmm::connect(host, socket);
    let is_there = || row(host, "conet-vm").unwrap()["machine"]["vmm"].is_u64();
    wait_until("the VMM", SOON, is_there);
    Lab::kill_daemon(host);
    assert!(links(host).contains(" conet-vm:"), "the device is the server's");
    Lab::restart(host);
    wait_until("the VMM by the next daemon", SOON, is_there);
    assert_eq!((row(host, "conet-vm").unwrap()["state"].clone(), servers()), ("up".into(), 1));
    assert_eq!(rates(), r#"{"from":"100mbit","to":"10kpps"}"#);
    let refusal = failed(&guest(host, &["remove", "conet-vm"]));
    assert!(refusal.contains(&format!("{}", vmm.0.id())), "{refusal}");
    drop(vmm);
    wait_until("the VMM's end", SOON, || !is_there());
    ok(&guest(host, &["remove", "conet-vm"]));
    assert_eq!((row(host, "conet-vm"), servers()), (None, 0));
    assert_eq!(links(host).lines().count(), before);

    // Who comes by frames is its machine as well.
    ok(&guest(host, &["add", "conet-vm", "--kind", "qemu"]));
    let vmm = Vmm::connect(host, &stream);
    wait_until("the VMM by frames", SOON, is_there);
    failed(&guest(host, &["remove", "conet-vm"]));
    drop(vmm);
    wait_until("its end", SOON, || !is_there());
    ok(&guest(host, &["remove", "conet-vm"]));
    let left = ok(&Lab::exec(host, &["sh", "-c", "ls $(dirname $0)", socket]));
    assert!(!left.contains("conet-vm"), "{left}");

    a_killed_server_is_told(host);
    ok(&conet(&["lab", "down"]));
    nothing_remains();
    assert_eq!(servers(), 0);
    drop(lab);
}

/// Told when it is added or by the configuration, printed for QEMU, and in the device.
#[test]
fn a_machine_has_the_queues_that_it_is_given() {
    conet_testkit::privileged!(Need::Tun, Need::Program("pgrep"));
    let host = "conet-h1";
    let lab = Lab::up("wireguard");
    ok(&guest(host, &["add", "conet-vm", "--kind", "qemu", "--queues", "3"]));
    let queues = |name| row(host, name).unwrap()["machine"]["queues"].clone();
    let args = || ok(&guest(host, &["args", "conet-vm"]));
    assert_eq!(queues("conet-vm"), 3);
    assert!(args().contains(",queues=3") && args().contains(",mq=on"), "{}", args());
    // The next daemon knows, and finds the server that it wants.
    let served = || ok(&Command::new("pgrep").args(["-f", "queues 3"]).output().unwrap());
    let before = served();
    Lab::kill_daemon(host);
    Lab::restart(host);
    wait_until("the machine", SOON, || row(host, "conet-vm").unwrap()["state"] == "up");
    assert_eq!((queues("conet-vm"), served()), (3.into(), before));
    for (kind, queues) in [("uml", "2"), ("tap", "2"), ("netns", "3")] {
        let refusal = failed(&guest(host, &["add", "x", "--kind", kind, "--queues", queues]));
        assert!(refusal.contains("of kind qemu"), "{refusal}");
    }
    for queues in ["0", "17"] {
        failed(&guest(host, &["add", "x", "--kind", "qemu", "--queues", queues]));
    }
    ok(&guest(host, &["remove", "conet-vm"]));
    let table = "\\n[[guest]]\\nname = \"conet-vm\"\\nkind = \"qemu\"\\naddress = \"10.77.1.20\"";
    common::reconfigure(host, &format!("$s/$/{table}\\nqueues = 2/"));
    assert_eq!((queues("conet-vm"), servers()), (2.into(), 1));
    assert!(args().contains(",queues=2"), "{}", args());
    ok(&conet(&["lab", "down"]));
    nothing_remains();
    drop(lab);
}

/// A machine whose memory file shrinks under its port brings down that port alone; one that
/// has another address in the next configuration has a port for that.
#[test]
fn a_port_is_its_machines_alone() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"), Need::Program("pgrep"));
    // As a VMM does to the point of giving its memory and one queue, which is then gone.
    const SHRINKS: &str = "
import array, os, socket, struct, sys, time
vmm = socket.socket(socket.AF_UNIX); vmm.connect(sys.argv[1])
def say(request, body=b'', fds=[]):
    head = struct.pack('III', request, 1, len(body))
    vmm.sendmsg([head + body], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', fds))] if fds else [])
memory = os.memfd_create('guest'); os.ftruncate(memory, 1 << 20)
kick = os.eventfd(0)
say(3)
say(2, struct.pack('Q', 1 << 32 | 1 << 30))
say(5, struct.pack('IIQQQQ', 1, 0, 0, 1 << 20, 0, 0), [memory])
say(8, struct.pack('II', 1, 64))
say(9, struct.pack('IIQQQQ', 1, 0, 0x1000, 0x3000, 0x2000, 0))
say(12, struct.pack('Q', 1), [kick])
say(18, struct.pack('II', 1, 1))
time.sleep(0.5)
os.ftruncate(memory, 0)
os.eventfd_write(kick, 1)
time.sleep(1000)";
    let host = "conet-h1";
    let lab = Lab::up("wireguard");
    for name in ["conet-bad", "conet-good"] {
        ok(&guest(host, &["add", name, "--kind", "qemu"]));
    }
    let socket = |name| row(host, name).unwrap()["machine"]["socket"].as_str().unwrap().to_owned();
    let mut command = Command::new(CONET);
    command.args(["lab", "exec", host, "--", "python3", "-c", SHRINKS, &socket("conet-bad")]);
    let vmm = Vmm(command.stdin(Stdio::null()).spawn().unwrap());
    wait_until("its port's end", SOON, || row(host, "conet-bad").unwrap()["state"] == "down");
    assert_eq!((row(host, "conet-good").unwrap()["state"].clone(), servers()), ("up".into(), 1));
    drop(vmm);
    for name in ["conet-bad", "conet-good"] {
        ok(&guest(host, &["remove", name]));
    }

    let table = "\\n[[guest]]\\nname = \"conet-vm\"\\nkind = \"uml\"\\naddress = \"10.77.1.20\"";
    common::reconfigure(host, &format!("$s/$/{table}/"));
    let mac = || row(host, "conet-vm").unwrap()["machine"]["mac"].clone();
    assert_eq!((mac(), servers()), ("02:00:0a:4d:01:14".into(), 1));
    common::reconfigure(host, "s/10.77.1.20/10.77.1.21/");
    assert_eq!((mac(), servers()), ("02:00:0a:4d:01:15".into(), 1));
    let serving = Command::new("pgrep").args(["-fc", "address 10.77.1.21$"]).output().unwrap();
    assert_eq!(String::from_utf8(serving.stdout).unwrap().trim(), "1");
    ok(&conet(&["lab", "down"]));
    nothing_remains();
    drop(lab);
}

/// A capture of a guest's card into a file, running.
struct Capture(Child, String);

impl Capture {
    fn start(host: &str, name: &str, more: &[&str]) -> Self {
        let file = format!("/var/tmp/conet-t{}-{name}.pcapng", std::process::id());
        let mut command = Command::new(CONET);
        command.args(["lab", "exec", host, "--", CONET, "guest", "capture", name, "-w", &file]);
        let child = command.args(more).stderr(Stdio::piped()).spawn().unwrap();
        let begun = || std::fs::metadata(&file).is_ok_and(|file| file.len() > 0);
        wait_until("the capture", SOON, begun);
        Self(child, file)
    }

    /// What it says at its end, and what tcpdump reads.
    fn read(self) -> (String, String) {
        let output = self.0.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        // By a pipe: a profile of AppArmor's may keep tcpdump from the file.
        let mut tcpdump = Command::new("tcpdump");
        tcpdump.args(["-nn", "-r", "-"]).stdin(Stdio::piped());
        let mut child = tcpdump.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(&std::fs::read(&self.1).unwrap()).unwrap();
        std::fs::remove_file(&self.1).unwrap();
        let read = child.wait_with_output().unwrap();
        (String::from_utf8(output.stderr).unwrap(), ok(&read))
    }
}

#[test]
fn a_guests_frames_are_captured() {
    conet_testkit::privileged!(Need::Tun, Need::Program("tcpdump"), Need::Program("ping"));
    let host = "conet-h1";
    let lab = Lab::up("wireguard");
    ok(&guest(host, &["add", "conet-tap", "--kind", "tap"]));
    for name in ["conet-h1-g1", "conet-tap"] {
        let capture = Capture::start(host, name, &[]);
        let ping = ["exec", name, "--", "ping", "-c", "3", "-i", "0.2", "-W", "20", "10.77.1.1"];
        ok(&guest(host, &ping));
        let pid = capture.0.id().to_string();
        // As Ctrl-C does.
        ok(&Command::new("kill").args(["-INT", &pid]).output().unwrap());
        let (said, shown) = capture.read();
        assert!(said.contains(" 0 missed"), "{said}");
        assert_eq!(shown.matches("ICMP echo request").count(), 3, "{shown}");
        assert_eq!(shown.matches("ICMP echo reply").count(), 3, "{shown}");
    }
    // It ends by itself, also where there is nothing to see.
    ok(&guest(host, &["add", "conet-vm", "--kind", "qemu"]));
    let (said, shown) = Capture::start(host, "conet-vm", &["--seconds", "1"]).read();
    assert_eq!((said.contains("0 packets of conet-vm"), shown.as_str()), (true, ""), "{said}");
    failed(&guest(host, &["capture", "nobody", "-w", "/dev/null"]));
    failed(&guest(host, &["capture", "conet-tap", "-w", "/nowhere/x"]));
    ok(&conet(&["lab", "down"]));
    nothing_remains();
    drop(lab);
}

/// Starts a machine with the flags that are printed for it, on the lab host.
#[cfg(feature = "peers")]
fn started(host: &str, name: &str, memory: &str, port: &str) -> Command {
    let flags = ["args", name, "--memory", memory, "--port", port, "--json"];
    let shown = json(&ok(&guest(host, &flags)));
    let mut command = Command::new(CONET);
    command.args(["lab", "exec", host, "--", shown["program"].as_str().unwrap()]);
    let flags = shown["arguments"].as_array().unwrap().iter();
    command.args(flags.map(|flag| flag.as_str().unwrap()));
    command
}

/// Sets up the card as it is told by DHCP, and then pings the other host's guest for as long
/// as it lives.
#[cfg(feature = "peers")]
fn pinging(card: &str) -> String {
    format!(
        "busybox cat > /tmp/dhcp <<'END'
#!/bin/sh
[ $1 = bound ] || exit 0
busybox ip link set $interface mtu $mtu
busybox ip addr add $ip/$mask dev $interface
busybox ip route add default via $router
echo by DHCP $ip/$mask mtu $mtu
END
busybox chmod 755 /tmp/dhcp; busybox ip link set {card} up
busybox udhcpc -i {card} -f -q -n -t 20 -s /tmp/dhcp
busybox ping 10.77.2.2
"
    )
}

/// Each machine, started as it is told, reaches the other host's guest in each mode, and
/// again after its daemon was killed and is back.
#[cfg(feature = "peers")]
#[test]
fn machines_reach_the_other_host_in_every_mode() {
    conet_testkit::privileged!(
        Need::Tun,
        Need::Program("linux.uml"),
        Need::Program("qemu-system-x86_64"),
        Need::Program("busybox")
    );
    for mode in ["wireguard", "ip-udp", "ipip"] {
        let lab = Lab::up(mode);
        let host = "conet-h1";
        for (name, kind) in
            [("conet-u", "uml"), ("conet-q", "qemu"), ("conet-b", "uml"), ("conet-s", "qemu")]
        {
            ok(&guest(host, &["add", name, "--kind", kind]));
        }
        let load = "M=/usr/lib/uml/modules/$(busybox uname -r)/kernel\n\
            for m in net/core/failover drivers/net/net_failover drivers/net/virtio_net; do\n\
                busybox insmod $M/$m.ko\ndone\n";
        let script = format!("{load}{}", pinging("eth0"));
        let uml = |name, port, script: &str| Machine::uml(started(host, name, "512", port), script);
        let qemu = |name, port| {
            Machine::qemu(started(host, name, "768", port), &[], &[], &pinging("eth0"))
        };
        let names = ["conet-u", "conet-q", "conet-b", "conet-s"];
        let captures = names.map(|name| Capture::start(host, name, &["--packets", "30"]));
        let mut machines = [
            ("uml", uml("conet-u", "vhost", &script)),
            ("qemu", qemu("conet-q", "vhost")),
            ("uml by bess", uml("conet-b", "bess", &pinging("vec0"))),
            ("qemu by stream", qemu("conet-s", "stream")),
        ];
        let addresses = ["10.77.1.3", "10.77.1.4", "10.77.1.5", "10.77.1.6"];
        for ((what, machine), address) in machines.iter_mut().zip(addresses) {
            machine.wait_for(&format!("by DHCP {address}/24 mtu 1420"));
            machine.wait_for("bytes from 10.77.2.2");
            println!("{mode}: {what} reaches the other host");
        }
        for capture in captures {
            let (said, shown) = capture.read();
            assert!(said.contains("30 packets") && said.contains(" 0 missed"), "{said}");
            for what in ["BOOTP/DHCP, Request", "BOOTP/DHCP, Reply", "ARP, Reply", "ICMP echo"] {
                assert!(shown.contains(what), "{what}: {shown}");
            }
        }
        for address in addresses {
            let ping = ["exec", "conet-h2-g1", "--", "ping", "-c", "3", "-W", "5", address];
            ok(&guest("conet-h2", &ping));
        }
        Lab::kill_daemon(host);
        Lab::restart(host);
        let begin = std::time::Instant::now();
        for (what, machine) in &mut machines {
            while machine.has_said() {}
            machine.wait_for("bytes from 10.77.2.2");
            println!("{mode}: {what} again {:?} after the start", begin.elapsed());
        }
        drop(machines);
        ok(&conet(&["lab", "down"]));
        nothing_remains();
        drop(lab);
    }
}
