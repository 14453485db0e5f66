//! What somebody on the lab's LAN sees of a program that moves: nothing of it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Lab, Said, Shared, migrate, python, row, take_out};
use conet_testkit::Need;

/// Everything that crosses the lab's LAN.
struct Capture {
    dump: Child,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Capture {
    fn begin() -> Self {
        let mut dump = Command::new("tcpdump");
        dump.args(["-n", "-i", "conet-lan", "-s", "0", "-B", "32768", "-U", "-w", "-"]);
        let mut dump = dump.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut out, into) = (dump.stdout.take().unwrap(), Arc::clone(&seen));
        // Read all the while, since a full pipe would lose packets.
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(n @ 1..) = out.read(&mut buffer) {
                into.lock().unwrap().extend_from_slice(&buffer[..n]);
            }
        });
        let capture = Self { dump, seen };
        capture.wait_for(b"conet begins");
        capture
    }

    /// Sends `mark` in clear between the hosts until it is seen: so it is known that
    /// looking finds, and that all before it has been seen too.
    fn wait_for(&self, mark: &[u8]) {
        let script = "
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.sendto(sys.argv[1].encode(), ('192.0.2.2', 9))
";
        let mark = str::from_utf8(mark).unwrap();
        common::wait_until(mark, Duration::from_secs(20), || {
            common::ok(&Lab::exec("conet-h1", &[&python(), "-c", script, mark]));
            std::thread::sleep(Duration::from_millis(100));
            let seen = self.seen.lock().unwrap();
            count(&seen[seen.len().saturating_sub(1 << 14)..], mark.as_bytes()) > 0
        });
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.dump.kill().ok();
        self.dump.wait().ok();
    }
}

fn count(bytes: &[u8], pattern: &[u8]) -> usize {
    bytes.windows(pattern.len()).filter(|window| *window == pattern).count()
}

/// A program with a pattern in its memory reads a file with another while away.
fn shows_nothing(mode: &str) {
    let lab = Lab::up(mode);
    let (held, read) = (b"conet-held-in-memory", b"conet-read-from-file");
    let file = Shared::with("secret", &read.repeat(20_000));
    let (go, end) = (Shared::new("go"), Shared::new("end"));
    let script = "
import os, sys, time
def wait(name):
    while not os.path.exists(name): time.sleep(0.01)
# In memory only: it is put together here.
held = bytearray(('conet-' + 'held-' + 'in-' + 'memory').encode() * 50000)
print('begin', flush=True)
wait(sys.argv[2])
with open(sys.argv[1], 'rb') as f: text = f.read()
print(len(text), text[:20].decode(), flush=True)
wait(sys.argv[3])
print(held[-20:].decode(), flush=True)
";
    let capture = Capture::begin();
    let python = python();
    let mut program = lab.run(&[&python, "-c", script, file.path(), go.path(), end.path()]);
    let (moved, said) = (program.pid(), Said::by(&mut program));
    said.wait_for("begin");
    take_out(moved);
    go.create();
    said.wait_for("400000 conet-read-from-file");
    migrate(moved, "home");
    take_out(moved);
    migrate(moved, "home");
    assert_eq!(row(moved)["hops_done"], 4);
    end.create();
    said.wait_for("conet-held-in-memory");
    capture.wait_for(b"conet is not hidden");
    let seen = capture.seen.lock().unwrap().clone();
    // The memory crossed three times, the file once.
    assert!(seen.len() > 3 << 20, "{} bytes", seen.len());
    assert_eq!(count(&seen, held), 0, "memory in clear");
    assert_eq!(count(&seen, read), 0, "a file in clear");
    assert_eq!(count(&seen, b"import os, sys"), 0, "the program in clear");
}

#[test]
fn a_moving_program_is_not_seen_on_the_lan() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"), Need::Program("tcpdump"));
    shows_nothing("wireguard");
    // A link is sealed whatever the tunnel is.
    shows_nothing("ipip");
}

#[test]
fn a_link_that_brings_no_ticket_of_ours_is_closed() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    // From the other host: sixteen bytes that name no stay, then anything.
    let script = "
import socket, sys
s = socket.create_connection(('192.0.2.2', 47700), 5)
s.sendall(bytes(16) + b'x' * 100)
s.settimeout(10)
try: print(s.recv(1))
except ConnectionResetError: print(b'')
";
    let said = common::ok(&Lab::exec("conet-h1", &[&python(), "-c", script]));
    assert_eq!(said, "b''\n");
    let program = lab.run(&["sleep", "60"]);
    take_out(program.pid());
}
