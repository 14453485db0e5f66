//! `conet guest hold`, `drain` and `release` in a lab: a guest's packets wait while it goes
//! to another host, and come there in order.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use common::{
    CONET, Lab, conet, failed, guest, guest_row as row, json, nothing_remains, ok, reconfigure,
    wait_until,
};
use conet_testkit::Need;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);
/// Most that a host keeps.
const MOST: u64 = 4096;

fn held(host: &str, name: &str) -> Option<u64> {
    row(host, name)["held"]["packets"].as_u64()
}

/// Datagrams with the numbers from one to another, to an address.
const SENDS: &str = "
import socket, sys, time
to, begin, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(begin, end):
    s.sendto(b'%d' % number, (to, 9))
    time.sleep(0.0005)";

/// Sends numbers to a guest that is held, as many at once as no queue on the way minds.
fn send(to: (&str, &str, &str), numbers: std::ops::Range<u64>) {
    let (host, name, address) = to;
    let mut sent = numbers.start;
    while sent < numbers.end {
        let end = (sent + 100).min(numbers.end);
        let before = held(host, name).unwrap();
        let (first, last) = (sent.to_string(), end.to_string());
        let sends = ["exec", "conet-h3-g1", "--", "python3", "-c", SENDS, address, &first, &last];
        ok(&guest("conet-h3", &sends));
        wait_until("what was sent is kept", SOON, || {
            held(host, name).unwrap() == before + (end - sent)
        });
        sent = end;
    }
}

/// Writes the numbers that it hears, one a line.
const HEARS: &str = "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 33, 1 << 24) # SO_RCVBUFFORCE
s.bind(('0.0.0.0', 9))
print('ready', flush=True)
while True:
    print(s.recv(100).decode(), flush=True)";

/// Takes a guest's packets out, and is killed before they are anywhere.
const DIES: &str = r#"
import socket
s = socket.socket(socket.AF_UNIX)
s.connect('/run/conet/control.sock')
s.sendall(b'{"request":"guest-drain","name":"conet-t"}\n')
assert b'"packets":10' in s.recv(1000)"#;

struct Hears(Child, BufReader<ChildStdout>);

impl Hears {
    fn begin(host: &str, name: &str) -> Self {
        let mut command = Command::new(CONET);
        command.args(["lab", "exec", host, "--", CONET, "guest", "exec", name, "--"]);
        command.args(["python3", "-c", HEARS]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut hears = Self(child, output);
        assert_eq!(hears.line(), "ready");
        hears
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.1.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for Hears {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A file that a test leaves nothing of.
struct Scratch(String);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(format!("/var/tmp/conet-t{}-{name}.held", std::process::id()))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
    }
}

/// From now on conet-h2 has the guests' prefix that conet-h1 had.
fn prefix_moves() {
    for host in ["conet-h1", "conet-h2", "conet-h3"] {
        reconfigure(host, "s/10\\.77\\.1\\./10.77.9./g; s/10\\.77\\.2\\./10.77.1./g");
    }
}

/// One by TAP and one that is a machine go to where a guest by TAP has their address; more
/// than is kept comes for the first.
#[test]
fn what_is_held_on_one_host_is_released_on_another_in_order() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::of(3, "wireguard");
    let (here, there) = ("conet-h1", "conet-h2");
    let guests = [("conet-t", "tap", "10.77.1.50"), ("conet-q", "qemu", "10.77.1.51")];
    let files = guests.map(|(name, ..)| Scratch::new(name));
    let drained = [4000, 300];
    for (((name, kind, address), file), count) in guests.iter().zip(&files).zip(drained) {
        ok(&guest(here, &["add", name, "--kind", kind, "--address", address]));
        assert_eq!(held(here, name), None);
        let said = json(&ok(&guest(here, &["hold", name, "--json"])));
        assert_eq!(said["held"]["packets"], 0);
        send((here, name, address), 0..count);
        let said = json(&ok(&guest(here, &["drain", name, "--to", &file.0, "--json"])));
        assert_eq!(said["drained"]["packets"], count);
        assert_eq!(held(here, name), Some(0), "it stays held");
        ok(&guest(here, &["remove", name]));
    }
    prefix_moves();
    let more = [150, 50];
    for (index, (name, _, address)) in guests.iter().enumerate() {
        let (drained, more, file) = (drained[index], more[index], &files[index].0);
        ok(&guest(there, &["add", name, "--kind", "tap", "--address", address]));
        ok(&guest(there, &["hold", name]));
        send((there, name, address), drained..drained + more);
        let mut hears = Hears::begin(there, name);
        let said = json(&ok(&guest(there, &["release", name, "--from", file, "--json"])));
        let lost = (drained + more).saturating_sub(MOST);
        assert_eq!((&said["given"]["packets"], &said["lost"]), (&drained.into(), &lost.into()));
        assert_eq!(said["released"]["packets"], drained + more - lost);
        for number in 0..drained + more - lost {
            assert_eq!(hears.line(), number.to_string());
        }
        // What comes then comes behind it.
        let next = ["exec", "conet-h3-g1", "--", "python3", "-c", SENDS, address, "9999", "10000"];
        ok(&guest("conet-h3", &next));
        assert_eq!(hears.line(), "9999");
        let row = row(there, name);
        assert_eq!(row["held"], Value::Null);
        assert_eq!(row["drop_reasons"]["hold_full"].as_u64().unwrap_or(0), lost);
    }
    ok(&conet(&["lab", "down"]));
    nothing_remains();
    drop(lab);
}

#[test]
fn what_cannot_be_held_or_released_is_told() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::of(3, "wireguard");
    let host = "conet-h1";
    for (name, address) in [("conet-t", "10.77.1.50"), ("conet-u", "10.77.1.60")] {
        ok(&guest(host, &["add", name, "--kind", "tap", "--address", address]));
    }
    let [kept, cut, none] = ["kept", "cut", "none"].map(Scratch::new);
    let by_veth = "is a guest by veth";
    for (arguments, said) in [
        (&["hold", "conet-h1-g1"][..], by_veth),
        (&["release", "conet-h1-g1"], by_veth),
        (&["hold", "nobody"], "no guest is named nobody"),
        (&["drain", "conet-t", "--to", &none.0], "conet-t is not held"),
        (&["release", "conet-t", "--from", &none.0], "cannot read"),
    ] {
        let text = failed(&guest(host, arguments));
        assert!(text.contains(said), "{arguments:?}: {text}");
    }
    assert!(!fs::exists(&none.0).unwrap(), "nothing is left of a drain that was refused");
    ok(&guest(host, &["hold", "conet-t"]));
    send((host, "conet-t", "10.77.1.50"), 0..10);
    assert!(ok(&guest(host, &["list"])).contains("up, held: 10"));
    // A file that is there is nobody's to replace; the packets stay.
    fs::write(&cut.0, "mine").unwrap();
    assert!(failed(&guest(host, &["drain", "conet-t", "--to", &cut.0])).contains("is not there"));
    assert_eq!((fs::read(&cut.0).unwrap(), held(host, "conet-t")), (b"mine".into(), Some(10)));
    // Where the file is full, they are kept still.
    let full = failed(&guest(host, &["drain", "conet-t", "--to", "/dev/full"]));
    assert!(full.contains("/dev/full"), "{full}");
    let by_stdout = ["sh", "-c", &format!("{CONET} guest drain conet-t --to - > /dev/full")];
    let full = failed(&Lab::exec(host, &by_stdout));
    assert!(full.contains("kept for it still"), "{full}");
    assert_eq!(held(host, "conet-t"), Some(10));

    // Who takes them out and does not say that they are safe has not taken them.
    ok(&Lab::exec(host, &["python3", "-c", DIES]));
    assert_eq!(held(host, "conet-t"), Some(0));

    ok(&guest(host, &["drain", "conet-t", "--to", &kept.0]));
    let bytes = fs::read(&kept.0).unwrap();
    fs::write(&cut.0, &bytes[..bytes.len() - 1]).unwrap();
    for (name, file, said) in [
        ("conet-t", &cut.0, "cut short"),
        ("conet-u", &kept.0, "are for 10.77.1.50, which is no address of conet-u"),
        ("conet-h1-g1", &kept.0, by_veth),
    ] {
        let text = failed(&guest(host, &["release", name, "--from", file]));
        assert!(text.contains(said), "{text}");
    }
    // One that was not held before is not afterwards.
    assert_eq!((held(host, "conet-t"), held(host, "conet-u")), (Some(0), None));
    // By a pipe, as by ssh.
    let mut hears = Hears::begin(host, "conet-t");
    let pipe = format!("{CONET} guest release conet-t --from - < {}", kept.0);
    assert!(ok(&Lab::exec(host, &["sh", "-c", &pipe])).contains("with 10 packets"));
    for number in 0..10 {
        assert_eq!(hears.line(), number.to_string());
    }
    drop(hears);
    ok(&conet(&["lab", "down"]));
    nothing_remains();
    drop(lab);
}
