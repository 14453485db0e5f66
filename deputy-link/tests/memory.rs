//! Memory stays what it is, whatever the program does to it while it moves.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use common::*;
use conet_deputy_link::mover::{self, How, Method, MoveError, StopReason};
use conet_testkit::random::seed;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// A file of 64 pages, each filled with its number + 1.
fn pages_file() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for page in 1u64..=64 {
        file.write_all(&page.to_le_bytes().repeat(512)).unwrap();
    }
    file.flush().unwrap();
    file
}

/// The output of a program that moved is that of one that did not.
fn assert_same(output: &Output, expected: &Output, when: &str) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (got, want) = (text(&output.stdout), text(&expected.stdout));
    let first = got.lines().zip(want.lines()).find(|(got, want)| got != want);
    assert_eq!(first, None, "{when}");
    assert_eq!((got.len(), output.status), (want.len(), expected.status), "{when}");
}

/// Moves the program of `tests/programs/memory.c` as often as it lives; gives stays and
/// rounds.
fn torture(seed: u64, steps: &str, megabytes: &str, how: How, follows: bool) -> (u64, u64) {
    let file = pages_file();
    let (_directory, program) = compiled("memory", &[]);
    let seed = seed.to_string();
    let args = [seed.as_str(), steps, file.path().to_str().unwrap(), megabytes];
    travel(&program, &args, how, follows)
}

/// Moves a program as often as it lives, whose output must be that of an unmoved run.
fn travel(program: &str, args: &[&str], how: How, follows: bool) -> (u64, u64) {
    let expected = unmoved(program, args);
    let child = start(program, args);
    let pid = child.id();
    let mut node = Node::new();
    (node.how, node.follows) = (how, follows);
    let (mut stays, mut rounds) = (0, 0);
    thread::sleep(Duration::from_millis(20));
    for i in 0..60u64 {
        let away = match node.take(pid) {
            Ok(away) => away,
            Err(MoveError::Gone) => break,
            // It ends, or a call that was pending is being finished in its deputy.
            Err(MoveError::Locked(locks)) => {
                println!("stay {i}: {locks:?}");
                thread::sleep(Duration::from_millis(5));
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        assert_eq!(away.moved.method == Method::Precopy, how == How::Precopy);
        rounds += away.moved.rounds.len() as u64;
        thread::sleep(Duration::from_millis(i % 5 * 11));
        if i % 2 == 1 {
            // It may end meanwhile.
            let sliced = away.slices(pid).unwrap_or(0);
            assert!(follows || sliced == 0);
        }
        match away.bring_home(pid) {
            Ok(returned) => {
                assert_eq!(returned.is_delta, follows);
                stays += 1;
            }
            Err(MoveError::Gone) => break,
            Err(error) => panic!("{error}"),
        }
        thread::sleep(Duration::from_millis(i % 3 * 7));
    }
    let output = child.finish();
    assert_same(&output, &expected, &format!("after {stays} stays"));
    println!("{stays} stays, {rounds} rounds");
    (stays, rounds)
}

#[test]
fn memory_is_the_same_however_it_changes_meanwhile() {
    conet_testkit::privileged!();
    let seed = seed();
    for (seed, steps, megabytes) in [(seed, "60000", "48"), (seed + 1, "30000", "160")] {
        let (stays, rounds) = torture(seed, steps, megabytes, How::Precopy, true);
        assert!(stays >= 3 && rounds > 2 * stays, "{stays} stays, {rounds} rounds");
    }
}

/// The kernel drops the registration of what is joined, and leaves old marks.
#[test]
fn what_mremap_has_joined_is_the_same() {
    conet_testkit::privileged!();
    let (_directory, program) = compiled("joined", &[]);
    let (stays, _) = travel(&program, &["200"], How::Precopy, true);
    assert!(stays >= 10, "{stays} stays");
}

/// As on kernels before 6.7, on either node.
#[test]
fn memory_is_the_same_where_nothing_is_followed() {
    conet_testkit::privileged!();
    let seed = seed();
    for (i, follows) in [(0, false), (1, true)] {
        let (stays, rounds) = torture(seed + i, "30000", "24", How::Stop, follows);
        assert!(stays >= 3 && rounds == 0, "{stays} stays, {rounds} rounds");
    }
}

/// A swap file, as long as it lives.
struct Swap(tempfile::NamedTempFile);

impl Swap {
    fn start() -> Option<Self> {
        let mut file = tempfile::NamedTempFile::new_in("/var/tmp").ok()?;
        file.write_all(&vec![0; 48 << 20]).ok()?;
        let run = |program| {
            let status = Command::new(program).arg(file.path()).output();
            status.is_ok_and(|output| output.status.success())
        };
        (run("mkswap") && run("swapon")).then_some(Self(file))
    }

    fn used_kib(&self) -> u64 {
        let text = std::fs::read_to_string("/proc/swaps").unwrap();
        let line = text.lines().find(|line| line.starts_with(self.0.path().to_str().unwrap()));
        line.and_then(|line| line.split_whitespace().nth(3)?.parse().ok()).unwrap_or(0)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        Command::new("swapoff").arg(self.0.path()).status().ok();
    }
}

#[test]
fn swapped_pages_move_like_others() {
    conet_testkit::privileged!();
    let seed = seed();
    let Some(swap) = Swap::start() else {
        eprintln!("SKIPPED: this machine takes no swap file in /var/tmp");
        return;
    };
    let used = Arc::new(AtomicU64::new(0));
    let (seen, swap) = (Arc::clone(&used), Arc::new(swap));
    let watched = Arc::downgrade(&swap);
    thread::spawn(move || {
        while let Some(swap) = watched.upgrade() {
            seen.fetch_max(swap.used_kib(), Ordering::SeqCst);
            drop(swap);
            thread::sleep(Duration::from_millis(5));
        }
    });
    let (stays, _) = torture(seed, "30000", "24", How::Precopy, true);
    assert!(stays >= 3 && used.load(Ordering::SeqCst) > 0, "{stays} stays, {used:?} KiB");
}

/// A path to the other node on which something happens after so many bytes from home.
struct Mishap {
    address: SocketAddr,
    passed: Arc<AtomicU64>,
    limit: Arc<AtomicU64>,
}

impl Mishap {
    fn start(
        target: SocketAddr,
        limit: u64,
        happen: impl FnOnce(&TcpStream, &TcpStream) + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (passed, limit) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(limit)));
        let mishap = Self { address, passed: Arc::clone(&passed), limit: Arc::clone(&limit) };
        thread::spawn(move || {
            let (home, _) = listener.accept().unwrap();
            let remote = TcpStream::connect(target).unwrap();
            for link in [&home, &remote] {
                link.set_nodelay(true).unwrap();
            }
            let (mut back, mut to_home) = (remote.try_clone().unwrap(), home.try_clone().unwrap());
            thread::spawn(move || {
                std::io::copy(&mut back, &mut to_home).ok();
                to_home.shutdown(Shutdown::Both).ok();
            });
            let mut happen = Some(happen);
            let mut buffer = vec![0; 65536];
            while let Ok(n @ 1..) = (&home).read(&mut buffer) {
                let before = passed.fetch_add(n as u64, Ordering::SeqCst);
                let left = limit.load(Ordering::SeqCst).saturating_sub(before);
                let part = usize::try_from(left).unwrap().min(n);
                if (&remote).write_all(&buffer[..part]).is_err() {
                    break;
                }
                if part < n {
                    limit.store(u64::MAX, Ordering::SeqCst);
                    if let Some(happen) = happen.take() {
                        happen(&home, &remote);
                    }
                    (&remote).write_all(&buffer[part..n]).ok();
                }
            }
            remote.shutdown(Shutdown::Both).ok();
        });
        mishap
    }
}

/// Whether memory of the process is write-protected by a userfaultfd, or holds conet's
/// region.
fn is_as_it_was(pid: u32) -> bool {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let flags = || smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    !smaps.contains("200000000000-") && !flags().any(|flags| flags.contains(" uw"))
}

/// The link is cut, or the remote half killed, in each round and in the freeze: the
/// program is at home and goes on as if nothing had been.
#[test]
fn a_mishap_in_any_round_leaves_the_program_at_home() {
    conet_testkit::privileged!();
    let seed = seed();
    let file = pages_file();
    let (_directory, program) = compiled("memory", &[]);
    let seed = seed.to_string();
    let args = [seed.as_str(), "150000", file.path().to_str().unwrap(), "24"];
    let expected = unmoved(&program, &args);
    let child = start(&program, &args);
    let pid = child.id();
    thread::sleep(Duration::from_millis(30));
    let mut node = Node::new();
    let path = Mishap::start(node.address(), u64::MAX, |_, _| {});
    let away = node.take_through(pid, path.address).unwrap();
    let mut total = path.passed.load(Ordering::SeqCst);
    away.bring_home(pid).unwrap();
    let (mut failed, mut is_through) = (0, false);
    let places = [2, 300, 700, 900, 960, 985, 993, 997, 998, 999, 1000];
    // A place that was not reached, since less was sent than the time before, is tried anew.
    let places = places.into_iter().flat_map(|place| [place; 3]);
    let mut reached = 0;
    for (i, per_mille) in places.enumerate() {
        if per_mille == reached {
            continue;
        }
        let (home, remote) = node.secrets();
        let host = node.host(pid, remote);
        let cuts = i % 2 == 0;
        let path = Mishap::start(node.address(), total * per_mille / 1000, move |home, remote| {
            if cuts {
                home.shutdown(Shutdown::Both).ok();
                remote.shutdown(Shutdown::Both).ok();
            } else {
                let hosted = host.join().unwrap().unwrap();
                kill("-KILL", hosted.remote_pid);
            }
        });
        let link = TcpStream::connect(path.address).unwrap();
        let (_line, end) = conet_deputy_link::family::Line::new().unwrap();
        let moved = mover::move_out(as_pid(pid), link, home, POLICY, How::Precopy, &end);
        let happened = path.limit.swap(u64::MAX, Ordering::SeqCst) == u64::MAX;
        if happened {
            reached = per_mille;
        } else {
            total = path.passed.load(Ordering::SeqCst);
        }
        println!("at {per_mille} of a thousand: {moved:?}");
        // On a slow machine the program is through before the test is.
        if let Err(MoveError::Gone | MoveError::Locked(_)) = moved {
            assert!(!exists(pid), "{moved:?}");
            is_through = true;
            break;
        }
        if moved.is_err() {
            failed += 1;
            assert!(happened, "at {per_mille} of a thousand");
            // The region of the stay before is taken out when the program has left it.
            wait_until("all to be as it was", || {
                mover::take_out(as_pid(pid));
                is_as_it_was(pid)
            });
            continue;
        }
        // The program sent less this time: it is away, and comes home.
        let returned = mover::bring_home(as_pid(pid), || {});
        if happened {
            // It came upon COMMIT itself, or what followed: the program lived there.
            let signal = child.finish().status.signal();
            assert!(returned.is_err() && signal == Some(9), "{returned:?}, {signal:?}");
            return;
        }
        assert!(returned.is_ok(), "{returned:?}");
    }
    assert_same(&child.finish(), &expected, "after mishaps");
    assert!(is_through || failed >= 4, "{failed} moves failed");
}

fn kill(signal: &str, pid: u32) {
    Command::new("kill").args([signal, &pid.to_string()]).status().unwrap();
}

/// The userfaultfd is of the old program's memory; the mover notices, and moves the new
/// one.
#[test]
fn a_program_that_becomes_another_while_it_is_copied_moves_as_that() {
    conet_testkit::privileged!();
    let script = "
import os, sys, time
data = os.urandom(1 << 20) * 150
print('ready', flush=True); time.sleep(float(sys.argv[1]))
os.execv(sys.executable, [sys.executable, '-c', '''
import hashlib, time
data = bytes(range(256)) * 4096 * 40
for i in range(25): time.sleep(0.02); print(i, hashlib.md5(data).hexdigest(), flush=True)
'''])";
    for wait in ["0.02", "0.08", "0.15", "0.25", "0.35"] {
        let args = ["-c", script, wait];
        let expected = unmoved(&python(), &args);
        let mut child = start(&python(), &args);
        let mut ready = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        let mut node = Node::new();
        let away = node.take(child.id()).unwrap();
        println!("{wait}: {:?}", away.moved);
        match away.bring_home(child.id()) {
            Ok(_) | Err(MoveError::Gone | MoveError::Process(_)) => {}
            Err(error) => panic!("{error}"),
        }
        let mut output = child.finish();
        output.stdout.splice(0..0, ready);
        assert_same(&output, &expected, wait);
    }
}

/// In `execve`, memory that is new has no stack for a moment.
#[test]
fn a_program_in_the_midst_of_execve_has_not_ended() {
    let script = "[ $0 = 0 ] || exec sh -c \"$1\" $(($0 - 1)) \"$1\"";
    let mut child = start("sh", &["-c", script, "1500", script]);
    let mut looks = 0;
    while child.try_wait().unwrap().is_none() {
        if let Ok(found) = conet_deputy_link::locks::locks(as_pid(child.id()), POLICY)
            && child.try_wait().unwrap().is_none()
        {
            assert!(!found.contains(&conet_deputy_link::locks::Lock::NotRunning), "look {looks}");
        }
        looks += 1;
    }
    println!("{looks} looks");
}

#[test]
fn a_program_that_ends_while_it_is_copied_has_ended() {
    conet_testkit::privileged!();
    let script = "
import os, time
data = os.urandom(1 << 20) * 200
print('ready', flush=True); time.sleep(0.1)
os._exit(7)";
    let mut child = start(&python(), &["-c", script]);
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    let mut node = Node::new();
    // Reaped at once, as a shell would.
    let pid = child.id();
    let waiting = thread::spawn(move || child.finish().status.code());
    let error = node.take(pid).err().unwrap();
    assert!(matches!(error, MoveError::Gone | MoveError::Locked(_)), "{error}");
    assert_eq!(waiting.join().unwrap(), Some(7));
}

/// What a disk writes to memory by itself is not seen.
#[test]
fn a_program_that_reads_past_the_page_cache_is_stopped_and_copied() {
    conet_testkit::privileged!();
    let script = "
import mmap, os, sys, time
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE)
open(sys.argv[1], 'wb').write(b'x' * 8192)
try: fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
except OSError: print('none', flush=True); sys.exit()
print('open', flush=True)
while not os.path.getsize(sys.argv[2]): time.sleep(0.01)
for i in range(20): os.lseek(fd, 0, 0); print(i, os.readv(fd, [page]))
";
    let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    let flag = tempfile::NamedTempFile::new().unwrap();
    let args = [file.path().to_str().unwrap(), flag.path().to_str().unwrap()];
    let mut child = start(&python(), &["-c", script, args[0], args[1]]);
    let mut said = [0; 5];
    child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    if &said == b"none\n" {
        eprintln!("SKIPPED: the file system of /var/tmp has no O_DIRECT");
        return;
    }
    let mut node = Node::new();
    let away = node.take(child.id()).unwrap();
    assert_eq!(away.moved.method, Method::Stop(StopReason::DirectIo));
    away.bring_home(child.id()).unwrap();
    std::fs::write(flag.path(), "go on").unwrap();
    let output = child.finish();
    assert!(output.status.success() && output.stdout.ends_with(b"19 4096\n"));
}
