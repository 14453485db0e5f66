//! A second node on this machine, and programs to move to it.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod family;

#[allow(unused_imports, reason = "each test binary uses a part")]
pub(crate) use family::{Blow, Fail, Family, Phase};

use conet_deputy_link::hosting::{self, HostError, Hosted, Hosting, Warden};
use conet_deputy_link::locks::Policy;
use conet_deputy_link::mover::{How, Wish};
use conet_deputy_link::{LinkSecret, Status, Ticket, life, mover, phase};
use conet_transport::session::protect::{Cipher, Key, link_keys};
use rustix::process::Pid;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) const POLICY: Policy = Policy { allow_root: true, is_deputy: true, started: None };
/// The stay of the process that a sandbox was made for.
pub(crate) const FIRST: Ticket = [1; 16];
pub(crate) const GUEST_UID: u32 = 0x7000_0001;

/// The other node.
pub(crate) struct Node {
    directory: tempfile::TempDir,
    listener: TcpListener,
    generation: u32,
    /// How processes move here.
    pub(crate) how: How,
    /// Whether what they change here is followed.
    pub(crate) follows: bool,
}

/// A process that is away.
pub(crate) struct Away {
    pub(crate) warden: Warden,
    pub(crate) hosted: Hosted,
    pub(crate) moved: mover::Moved,
    pub(crate) family: Family,
    ticket: Ticket,
}

impl Node {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = life::listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        Self { directory, listener, generation: 0, how: How::default(), follows: true }
    }

    pub(crate) fn secrets(&mut self) -> (LinkSecret, LinkSecret) {
        self.generation += 1;
        let cipher = Cipher::preferred();
        let mut key = [0; 32];
        key[..4].copy_from_slice(&self.generation.to_le_bytes());
        let keys = || link_keys(&Key::new(key), b"test");
        let (home, remote) = (keys(), keys());
        (
            LinkSecret { cipher, seal: home.home_to_remote, open: home.remote_to_home },
            LinkSecret { cipher, seal: remote.remote_to_home, open: remote.home_to_remote },
        )
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    /// Hosts the next link that comes.
    pub(crate) fn host(
        &self,
        pid: u32,
        secret: LinkSecret,
    ) -> thread::JoinHandle<Result<Hosted, HostError>> {
        let socket = self.socket();
        let listener = self.listener.try_clone().unwrap();
        let follows = self.follows;
        thread::spawn(move || {
            let (link, _) = listener.accept().unwrap();
            let pid = i32::try_from(pid).unwrap();
            let hosting = Hosting {
                pid,
                ticket: FIRST,
                secret: &secret,
                uid: GUEST_UID,
                clock_skew: 0,
                follows,
                socket: &socket,
                patience: Duration::from_secs(2),
            };
            hosting::start(link, &hosting)
        })
    }

    /// Connects to the warden of the last sandbox.
    pub(crate) fn warden(&self) -> std::io::Result<Warden> {
        Warden::connect(&self.socket())
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join(format!("warden-{}", self.generation))
    }

    /// Moves a process here.
    pub(crate) fn take(&mut self, pid: u32) -> Result<Away, mover::MoveError> {
        self.take_through(pid, self.address())
    }

    /// Moves a process here over a link that begins at `address`.
    pub(crate) fn take_through(
        &mut self,
        pid: u32,
        address: SocketAddr,
    ) -> Result<Away, mover::MoveError> {
        for _ in 0..100 {
            let (home, remote) = self.secrets();
            let host = self.host(pid, remote);
            let stream = life::connect(address, Duration::from_secs(10)).unwrap();
            let family = Family::of(pid);
            let shared = Arc::default();
            // Held until the warden is known: the process may divide at once.
            let mut knows = std::sync::Mutex::lock(&shared).unwrap();
            let line = family.line(FIRST, Arc::clone(&shared));
            let moved = mover::move_out(as_pid(pid), stream, home, POLICY, self.how, &line);
            let hosted = host.join().unwrap();
            let (moved, hosted) = (moved?, hosted.unwrap());
            if let Ok(warden) = self.warden() {
                family.follow(warden.try_clone().unwrap());
                *knows = Some((warden.try_clone().unwrap(), hosted));
                drop(knows);
                return Ok(Away { warden, hosted, moved, family, ticket: FIRST });
            }
            drop(knows);
            // It has gone home again by itself, or ended.
            wait_home(pid);
        }
        panic!("it never stays")
    }
}

/// How a move from one of these nodes to another went.
pub(crate) struct MovedOn {
    /// It is here now; none where it has gone home again by itself.
    pub(crate) away: Result<Option<Away>, mover::MoveError>,
    /// It has left the first node.
    pub(crate) returned: Option<mover::Returned>,
    /// It has not run at home.
    pub(crate) is_direct: bool,
}

impl Node {
    /// Moves a process here that is at another node.
    pub(crate) fn take_on(&mut self, from: &Away, pid: u32) -> MovedOn {
        if self.how == How::Precopy {
            // Where it has ended, the move says so.
            from.slices(pid).ok();
        }
        let (home, remote) = self.secrets();
        let host = self.host(pid, remote);
        let stream = life::connect(self.address(), Duration::from_secs(10)).unwrap();
        let family = from.family.clone();
        let shared = Arc::default();
        let mut knows = std::sync::Mutex::lock(&shared).unwrap();
        let line = family.line(FIRST, Arc::clone(&shared));
        // A program that has ended by itself has no warden any more.
        let ask = |wish| drop(from.ask(wish));
        let relayed = mover::move_on(as_pid(pid), stream, home, POLICY, self.how, &line, ask);
        let hosted = host.join().unwrap();
        let away = relayed.moved.map(|moved| {
            let (warden, hosted) = (self.warden().ok()?, hosted.unwrap());
            family.follow(warden.try_clone().ok()?);
            *knows = Some((warden.try_clone().ok()?, hosted));
            Some(Away { warden, hosted, moved, family: family.clone(), ticket: FIRST })
        });
        drop(knows);
        MovedOn { away, returned: relayed.returned, is_direct: relayed.is_direct }
    }
}

impl Away {
    pub(crate) fn ask(&self, wish: Wish) -> std::io::Result<()> {
        match wish {
            Wish::Bell => self.warden.ring(self.ticket),
            Wish::Slice => self.warden.slice(self.ticket),
        }
    }

    /// Has what was changed here go home while the program runs; the pages.
    pub(crate) fn slices(&self, pid: u32) -> Result<u64, mover::MoveError> {
        mover::slices(as_pid(pid), || drop(self.ask(Wish::Slice)))
    }

    pub(crate) fn bring_home(&self, pid: u32) -> Result<mover::Returned, mover::MoveError> {
        mover::bring_home(as_pid(pid), || {
            // A program that has ended by itself has no warden any more.
            self.warden.ring(self.ticket).ok();
        })
    }

    /// Brings a descendant home.
    pub(crate) fn bring_child_home(
        &self,
        (pid, ticket): (u32, Ticket),
    ) -> Result<mover::Returned, mover::MoveError> {
        mover::bring_home(as_pid(pid), || {
            self.warden.ring(ticket).ok();
        })
    }
}

pub(crate) fn as_pid(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

/// A program that does not outlive its test.
pub(crate) struct Program(Option<Child>);

impl std::ops::Deref for Program {
    type Target = Child;
    fn deref(&self) -> &Child {
        self.0.as_ref().unwrap()
    }
}

impl std::ops::DerefMut for Program {
    fn deref_mut(&mut self) -> &mut Child {
        self.0.as_mut().unwrap()
    }
}

impl Program {
    /// Starts a command, its output caught.
    pub(crate) fn start(command: &mut Command) -> Self {
        Self(Some(command.stdout(Stdio::piped()).spawn().unwrap()))
    }

    /// Waits for its end.
    pub(crate) fn finish(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

pub(crate) fn start(program: &str, args: &[&str]) -> Program {
    Program(Some(Command::new(program).args(args).stdout(Stdio::piped()).spawn().unwrap()))
}

pub(crate) fn unmoved(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap()
}

/// The interpreter itself, where `python3` is a script that starts it.
pub(crate) fn python() -> String {
    let output = unmoved("python3", &["-c", "import sys; print(sys.executable)"]);
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Compiles a program of `tests/programs`.
pub(crate) fn compiled(name: &str, flags: &[&str]) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let source = format!("{}/tests/programs/{name}.c", env!("CARGO_MANIFEST_DIR"));
    let program = directory.path().join(name);
    let status = Command::new("cc")
        .args(["-O1", "-w", "-o"])
        .arg(&program)
        .arg(source)
        .args(flags)
        .status()
        .unwrap();
    assert!(status.success(), "cc {name}");
    let path = program.to_str().unwrap().to_owned();
    (directory, path)
}

/// Waits until `what` holds, for ten seconds at most.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(10), "{what}: not within 10 s");
        thread::sleep(Duration::from_millis(1));
    }
    begin.elapsed()
}

pub(crate) fn status_of(pid: u32) -> Option<Status> {
    mover::status(as_pid(pid)).ok()
}

/// Waits until a program has come home by itself; its last status.
pub(crate) fn wait_home(pid: u32) -> Status {
    let mut last = None;
    wait_until("coming home", || {
        last = status_of(pid);
        last.is_none_or(|s| matches!(s.phase, phase::HOME | phase::FINISHING))
    });
    last.unwrap_or_default()
}

/// Whether the machine has such a process, and it is no zombie.
pub(crate) fn exists(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")))
}

/// Moves a program to and fro, at most `count` times in a run, until it has completed
/// `least` stays; the output and status of each run must be those of an unmoved one. How
/// many stays fit in a run is for the machine to say, so there may be several.
pub(crate) fn hops(program: &str, args: &[&str], count: u32, pause: Duration, least: u32) {
    let expected = unmoved(program, args);
    let mut runs = Vec::new();
    while runs.iter().sum::<u32>() < least {
        assert!(runs.len() < 10, "{program}: stays per run {runs:?}, to be {least}");
        runs.push(hops_once(program, args, count, pause, &expected));
    }
}

fn hops_once(program: &str, args: &[&str], count: u32, pause: Duration, expected: &Output) -> u32 {
    let child = start(program, args);
    let pid = child.id();
    let mut node = Node::new();
    thread::sleep(pause);
    let mut done = 0;
    for _ in 0..count {
        let away = match node.take(pid) {
            Ok(away) => away,
            Err(mover::MoveError::Gone) => break,
            // It became another program, or ends, or is at home with threads.
            Err(mover::MoveError::Locked(_)) => {
                thread::sleep(pause);
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        thread::sleep(pause);
        match away.bring_home(pid) {
            Ok(_) => done += 1,
            Err(mover::MoveError::Gone) => break,
            // By itself, for a reason, and became another program.
            Err(mover::MoveError::Process(_)) => {}
            Err(error) => panic!("{error}"),
        }
        thread::sleep(pause);
    }
    let output = child.finish();
    assert_eq!(output.status, expected.status);
    assert!(
        output.stdout == expected.stdout,
        "the output differs:\n{}\nunmoved:\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&expected.stdout)
    );
    done
}

/// Somebody on the path between the two halves.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    /// Bytes that passed from the remote half to home.
    pub(crate) passed: Arc<AtomicUsize>,
    forge: Arc<AtomicBool>,
    seen: Arc<std::sync::Mutex<Vec<u8>>>,
}

/// What the relay does when told to interfere, towards home.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Forgery {
    /// Sends the last record once more.
    Replay,
    /// Changes one bit of the next record.
    Alter,
    /// Sends a record of its own.
    Insert,
}

impl Relay {
    /// Relays one connection to `target`.
    pub(crate) fn start(target: SocketAddr, forgery: Forgery) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (passed, forge) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
        let relay = Self {
            address,
            passed: Arc::clone(&passed),
            forge: Arc::clone(&forge),
            seen: Arc::clone(&seen),
        };
        thread::spawn(move || {
            let (mut home, _) = listener.accept().unwrap();
            let mut remote = TcpStream::connect(target).unwrap();
            let (mut from_home, mut to_remote) =
                (home.try_clone().unwrap(), remote.try_clone().unwrap());
            let outward = Arc::clone(&seen);
            thread::spawn(move || {
                let mut buffer = vec![0; 65536];
                while let Ok(n @ 1..) = from_home.read(&mut buffer) {
                    outward.lock().unwrap().extend_from_slice(&buffer[..n]);
                    if to_remote.write_all(&buffer[..n]).is_err() {
                        return;
                    }
                }
                to_remote.shutdown(std::net::Shutdown::Write).ok();
            });
            let mut last = Vec::new();
            let mut buffer = vec![0; 65536];
            while let Ok(n @ 1..) = remote.read(&mut buffer) {
                seen.lock().unwrap().extend_from_slice(&buffer[..n]);
                let mut out = buffer[..n].to_vec();
                if forge.swap(false, Ordering::SeqCst) {
                    match forgery {
                        Forgery::Replay => out.splice(0..0, last.clone()).for_each(drop),
                        Forgery::Alter => out[n - 1] ^= 1,
                        Forgery::Insert => {
                            let mut forged = vec![60u8, 0, 0, 0];
                            forged.extend_from_slice(&[3; 60]);
                            out.splice(0..0, forged).for_each(drop);
                        }
                    }
                }
                if home.write_all(&out).is_err() {
                    return;
                }
                last = buffer[..n].to_vec();
                passed.fetch_add(n, Ordering::SeqCst);
            }
            home.shutdown(std::net::Shutdown::Write).ok();
        });
        relay
    }

    pub(crate) fn interfere(&self) {
        self.forge.store(true, Ordering::SeqCst);
    }

    /// Everything that passed, in either direction.
    pub(crate) fn capture(&self) -> Vec<u8> {
        self.seen.lock().unwrap().clone()
    }
}
