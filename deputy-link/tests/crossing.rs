//! Real programs cross to a sandbox on this machine and come home.

use conet_deputy_link::hosting::{self, Hosting, Warden};
use conet_deputy_link::locks::Policy;
use conet_deputy_link::{LinkSecret, mover};
use conet_transport::session::protect::{Cipher, Key, link_keys};
use rustix::process::Pid;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Duration;

const POLICY: Policy = Policy { allow_root: true, is_deputy: true };
const GUEST_UID: u32 = 0x7000_0001;

/// The other node: it hosts one process at a time.
struct Node {
    directory: tempfile::TempDir,
    listener: TcpListener,
    generation: u8,
}

struct Away {
    warden: Warden,
    remote_pid: u32,
}

impl Node {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        Self { directory, listener, generation: 0 }
    }

    fn secrets(&mut self) -> (LinkSecret, LinkSecret) {
        self.generation += 1;
        let cipher = Cipher::preferred();
        let keys = || link_keys(&Key::new([self.generation; 32]), b"test");
        let (home, remote) = (keys(), keys());
        (
            LinkSecret { cipher, seal: home.home_to_remote, open: home.remote_to_home },
            LinkSecret { cipher, seal: remote.remote_to_home, open: remote.home_to_remote },
        )
    }

    fn take(&mut self, pid: u32) -> Result<(Away, mover::Moved), mover::MoveError> {
        let (home, remote) = self.secrets();
        let socket: PathBuf = self.directory.path().join("warden");
        let address = self.listener.local_addr().unwrap();
        let listener = self.listener.try_clone().unwrap();
        let path = socket.clone();
        let host = thread::spawn(move || {
            let (link, _) = listener.accept().unwrap();
            let pid = i32::try_from(pid).unwrap();
            hosting::start(
                link,
                &Hosting { pid, secret: &remote, uid: GUEST_UID, clock_skew: 0, socket: &path },
            )
        });
        let stream = TcpStream::connect(address).unwrap();
        let moved = mover::move_out(as_pid(pid), stream, home, POLICY);
        let hosted = host.join().unwrap();
        let moved = moved?;
        let remote_pid = hosted.unwrap().remote_pid;
        Ok((Away { warden: Warden::connect(&socket).unwrap(), remote_pid }, moved))
    }
}

fn as_pid(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

fn start(program: &str, args: &[&str]) -> Child {
    Command::new(program).args(args).stdout(Stdio::piped()).spawn().unwrap()
}

fn unmoved(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap()
}

fn hops(program: &str, args: &[&str], count: u32, pause: Duration) {
    let expected = unmoved(program, args);
    let child = start(program, args);
    let pid = child.id();
    let mut node = Node::new();
    thread::sleep(pause);
    let mut done = 0;
    for _ in 0..count {
        let (away, moved) = match node.take(pid) {
            Ok(taken) => taken,
            Err(mover::MoveError::Gone) => break,
            Err(error) if error.to_string().contains("ending") => break,
            Err(error) => panic!("{error}"),
        };
        thread::sleep(pause);
        let Ok(status) = mover::status(as_pid(pid)) else { continue };
        let returned = mover::bring_home(as_pid(pid), || away.warden.ring().unwrap());
        let returned = match returned {
            Ok(returned) => returned,
            Err(mover::MoveError::Gone) => break,
            Err(error) => panic!("{error}"),
        };
        println!(
            "freeze {:?}, {} pages; {} calls; home in {:?}, {} of {} pages changed (remote {})",
            moved.freeze,
            moved.pages,
            status.calls,
            returned.total,
            returned.changed,
            returned.pages,
            away.remote_pid
        );
        done += 1;
        thread::sleep(pause);
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status, expected.status);
    if output.stdout != expected.stdout {
        panic!(
            "the output differs:\n{}\n{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&expected.stdout)
        );
    }
    assert!(done > 0);
}

/// The interpreter itself, where `python3` is a script that starts it.
fn python() -> String {
    let output = unmoved("python3", &["-c", "import sys; print(sys.executable)"]);
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

const PYTHON: &str = "
import hashlib, os, sys, time
h = b'x'; rows = []
for i in range(120):
    for k in range(20000): h = hashlib.sha256(h).digest()
    rows.append([h] * 500)
    with open('/etc/hostname', 'rb') as f: f.read()
    print(i, h.hex(), sum(x[0][0] for x in rows), os.getpid() == PID if (PID := os.getpid()) else 0, flush=True)
sys.exit(5)
";

#[test]
fn awk_crosses_and_comes_home() {
    let script =
        "BEGIN { for (i = 0; i < 30000000; i++) { s += i % 7; if (i % 100000 == 0) print i, s } }";
    hops("awk", &[script], 5, Duration::from_millis(100));
}

#[test]
fn python_crosses_and_comes_home() {
    hops(&python(), &["-c", PYTHON], 20, Duration::from_millis(30));
}

#[test]
fn a_sleeping_python_sleeps_as_long_as_it_should() {
    let script = "
import time, sys
for i in range(12):
    t = time.monotonic(); w = time.time(); time.sleep(0.25); d = time.monotonic() - t; e = time.time() - w
    print(i, 0.249 < d < 0.34, 0.249 < e < 0.34, flush=True)
";
    hops(&python(), &["-c", script], 20, Duration::from_millis(60));
}

#[test]
fn a_polling_python_is_not_disturbed() {
    let script = "
import select, os, time
r, w = os.pipe(); p = select.poll(); p.register(r, select.POLLIN)
for i in range(12):
    t = time.monotonic(); got = p.poll(200); d = time.monotonic() - t
    t = time.monotonic(); got2 = select.select([r], [], [], 0.05); d2 = time.monotonic() - t
    print(i, got, got2, 0.199 < d < 0.3, 0.049 < d2 < 0.15, flush=True)
";
    hops(&python(), &["-c", script], 20, Duration::from_millis(60));
}

#[test]
fn compressors_cross_and_come_home() {
    let data = tempfile::NamedTempFile::new().unwrap();
    let script = format!("seq 1 3000000 > {}", data.path().display());
    assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
    let path = data.path().to_str().unwrap();
    hops("gzip", &["-9", "-c", path], 20, Duration::from_millis(20));
    hops("xz", &["-T1", "-2", "-c", path], 20, Duration::from_millis(50));
}
