//! Programs that go from one node straight to another.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use common::*;
use conet_deputy_link::mover::{How, MoveError};
use conet_testkit::random::Random;
use conet_testkit::random::seed;
use std::io::Write;
use std::process::Output;
use std::thread;
use std::time::Duration;

/// How a program travelled.
#[derive(Debug, Default)]
struct Journey {
    out: u64,
    on: u64,
    direct: u64,
    home: u64,
    sliced: u64,
}

/// Moves a program between home and two nodes as chance has it, until it ends or has
/// moved so often; its output must be that of an unmoved run.
fn travel(program: &str, args: &[&str], seed: u64, moves: u64, hows: [How; 2]) -> Journey {
    let expected = unmoved(program, args);
    let child = start(program, args);
    let journey = wander(child.id(), seed, moves, hows);
    check_same(&child.finish(), &expected, &journey);
    journey
}

fn check_same(got: &Output, expected: &Output, journey: &Journey) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, want) = (text(&got.stdout), text(&expected.stdout));
    let first = out.lines().zip(want.lines()).find(|(out, want)| out != want);
    assert_eq!(first, None, "{journey:?}");
    assert_eq!((out.len(), got.status), (want.len(), expected.status), "{journey:?}");
    println!("{journey:?}");
}

fn wander(pid: u32, seed: u64, moves: u64, hows: [How; 2]) -> Journey {
    let mut nodes = [Node::new(), Node::new()];
    for (node, how) in nodes.iter_mut().zip(hows) {
        node.how = how;
    }
    let mut random = Random::new(seed);
    let mut journey = Journey::default();
    let mut at: Option<(usize, Away)> = None;
    thread::sleep(Duration::from_millis(20));
    for _ in 0..moves {
        let result = match at.take() {
            None => {
                let to = usize::from(random.chance(500));
                nodes[to].take(pid).map(|away| {
                    journey.out += 1;
                    Some((to, away))
                })
            }
            Some((from, away)) if random.chance(750) => {
                let moved = nodes[1 - from].take_on(&away, pid);
                journey.direct += u64::from(moved.is_direct);
                journey.on += u64::from(moved.away.is_ok());
                assert!(moved.away.is_err() || moved.returned.is_some());
                moved.away.map(|away| Some((1 - from, away?)))
            }
            Some((_, away)) => {
                // Half of them without.
                let sliced = if random.chance(500) { away.slices(pid) } else { Ok(0) };
                journey.sliced += sliced.unwrap_or(0);
                away.bring_home(pid).map(|_| {
                    journey.home += 1;
                    None
                })
            }
        };
        match result {
            Ok(there) => at = there,
            Err(MoveError::Gone | MoveError::Locked(_)) => break,
            Err(error) => panic!("{error} after {journey:?}"),
        }
        thread::sleep(Duration::from_millis(random.below(40)));
    }
    journey
}

/// A file of 64 pages, each filled with its number + 1.
fn pages_file() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for page in 1u64..=64 {
        file.write_all(&page.to_le_bytes().repeat(512)).unwrap();
    }
    file.flush().unwrap();
    file
}

#[test]
fn memory_is_the_same_after_direct_moves() {
    conet_testkit::privileged!();
    let seed = seed();
    let (_directory, program) = compiled("memory", &[]);
    let file = pages_file();
    for (i, hows) in [[How::Precopy; 2], [How::Precopy, How::Stop]].into_iter().enumerate() {
        let seed = seed + i as u64;
        let text = seed.to_string();
        let args = [text.as_str(), "60000", file.path().to_str().unwrap(), "48"];
        let journey = travel(&program, &args, seed, 100, hows);
        // It makes calls that bring it home by itself, also while it is moved on.
        assert!(journey.on >= 3, "{journey:?}");
    }
}

/// Writes, checks, takes and gives back memory at random; what it prints depends on the
/// seed and on the number of steps alone, which it prints at last.
const PAGES: &str = "import os, random, sys
draw = random.Random(int(sys.argv[1]))
page, count = 4096, int(sys.argv[2])
memory, marks = bytearray(page * count), [0] * count
extra = []
step = 0
while step < int(sys.argv[3]):
    step += 1
    for _ in range(20):
        i = draw.randrange(count)
        at = i * page
        if memory[at] != marks[i] or memory[at + page - 1] != marks[i]:
            print('step', step, 'page', i, memory[at], marks[i])
            sys.exit(1)
        marks[i] = draw.randrange(256)
        memory[at:at + page] = bytes([marks[i]]) * page
    if draw.random() < 0.3:
        extra.append(bytearray(bytes([step % 251]) * draw.randrange(1, 4_000_000)))
    if len(extra) > 5:
        old = extra.pop(draw.randrange(len(extra)))
        if old.count(old[0]) != len(old):
            print('step', step, 'extra')
            sys.exit(1)
    if step % 100 == 0:
        print(step, sum(marks), flush=True)
        if os.path.exists(sys.argv[4]): break
if any(memory[i * page:(i + 1) * page] != bytes([marks[i]]) * page for i in range(count)):
    print('the end differs')
print(sum(marks), [len(one) for one in extra])
print(step)";

#[test]
fn a_program_is_the_same_after_many_direct_moves() {
    conet_testkit::privileged!();
    let seed = seed();
    let text = seed.to_string();
    let directory = tempfile::tempdir().unwrap();
    let stop = directory.path().join("stop");
    let run = |steps| ["-c", PAGES, &text, "8192", steps, stop.to_str().unwrap()];
    let child = start(&python(), &run("1000000"));
    let journey = wander(child.id(), seed, 80, [How::Precopy; 2]);
    std::fs::write(&stop, b"").unwrap();
    let output = child.finish();
    let told = String::from_utf8_lossy(&output.stdout);
    let steps = told.lines().last().unwrap();
    std::fs::remove_file(&stop).unwrap();
    check_same(&output, &unmoved(&python(), &run(steps)), &journey);
    assert!(journey.direct >= 30, "{journey:?}");
}

/// What a program waits for it goes on waiting for, and the same time.
#[test]
fn a_program_that_waits_goes_on_waiting_elsewhere() {
    conet_testkit::privileged!();
    let seed = seed();
    let script = "import time, select
for i in range(40):
    begin = time.monotonic()
    time.sleep(0.05)
    select.select([], [], [], 0.05)
    took = time.monotonic() - begin
    print(i, 0.1 <= took < 5)";
    let journey = travel(&python(), &["-c", script], seed, 200, [How::Precopy; 2]);
    assert!(journey.direct >= 3, "{journey:?}");
}

/// Programs that compute do not run at home on the way: the time that they use is none
/// of the home process's.
#[test]
fn a_program_that_computes_uses_no_time_at_home() {
    conet_testkit::privileged!();
    let script = "import time
end = time.monotonic() + 120
while time.monotonic() < end: pass";
    let child = start(&python(), &["-c", script]);
    let pid = child.id();
    thread::sleep(Duration::from_millis(300));
    let mut nodes = [Node::new(), Node::new()];
    let mut away = nodes[0].take(pid).unwrap();
    let before = used(pid);
    for i in 1..=20 {
        let moved = nodes[i % 2].take_on(&away, pid);
        assert!(moved.is_direct, "move {i}");
        away = moved.away.unwrap().unwrap();
        thread::sleep(Duration::from_millis(50));
    }
    // Of a second and more that it ran, some ms of the deputy's merging.
    let used = used(pid) - before;
    assert!(used < Duration::from_millis(500), "{used:?} at home");
    away.bring_home(pid).unwrap();
}

/// Processor time of a process.
fn used(pid: u32) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
    Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
}

/// The second node refuses, or its link ends, before the program has left the first.
#[test]
fn a_node_that_cannot_take_it_leaves_the_program_where_it_is() {
    conet_testkit::privileged!();
    let script = "import time
for i in range(150):
    print(i, flush=True)
    time.sleep(0.01)";
    let expected = unmoved(&python(), &["-c", script]);
    let child = start(&python(), &["-c", script]);
    let pid = child.id();
    thread::sleep(Duration::from_millis(300));
    let mut node = Node::new();
    let away = node.take(pid).unwrap();
    let mut other = Node::new();
    let (secret, _) = other.secrets();
    // Nobody who has the keys.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    drop(listener.accept().unwrap());
    let ask = |wish| drop(away.ask(wish));
    let (_line, line) = conet_deputy_link::family::Line::new().unwrap();
    let relayed = conet_deputy_link::mover::move_on(
        as_pid(pid),
        stream,
        secret,
        POLICY,
        How::Precopy,
        &line,
        ask,
    );
    assert!(matches!(relayed.moved, Err(MoveError::Channel(_))), "{relayed:?}");
    assert!(relayed.returned.is_none());
    wait_until("serving", || {
        status_of(pid).is_some_and(|status| status.phase == conet_deputy_link::phase::SERVING)
    });
    // It can still go elsewhere.
    let moved = other.take_on(&away, pid);
    assert!(moved.is_direct);
    moved.away.unwrap().unwrap().bring_home(pid).unwrap();
    assert_eq!(child.finish().stdout, expected.stdout);
}

/// Changes 15,000 pages, 5,000 of them in memory that it has mapped meanwhile, then few.
const LONG_AGO: &str = "import os, sys, time
page = 4096
memory = bytearray(page * 10000)
def fill(memory):
    for at in range(0, len(memory), page): memory[at] = at // page % 251 + 1
print('ready', flush=True)
sys.stdin.readline()
fill(memory)
more = bytearray(page * 5000)
fill(more)
open(sys.argv[1], 'w').close()
while not os.path.exists(sys.argv[1] + '.stop'):
    for n in range(100): memory[n * page] = 7
    time.sleep(0.01)
for n in range(100): memory[n * page] = n % 251 + 1
for it in memory, more:
    for at in range(0, len(it), page):
        if it[at] != at // page % 251 + 1 or it[at + 1]: print('differs', at)
print('end')";

/// Whatever a program has changed since it left, little of it is left for the moment when
/// it comes home, once slices have come.
#[test]
fn what_was_changed_long_ago_is_home_before_the_program() {
    conet_testkit::privileged!();
    let directory = tempfile::tempdir().unwrap();
    let (mark, stop) = (directory.path().join("mark"), directory.path().join("mark.stop"));
    // Where the machine has no time for slices, they end: the second time, or the tenth.
    let mut is_little = false;
    for slices in std::iter::once(false).chain([true; 10]) {
        if is_little {
            break;
        }
        let mut command = std::process::Command::new(python());
        command.args(["-c", LONG_AGO]).arg(&mark).stdin(std::process::Stdio::piped());
        let mut child = Program::start(&mut command);
        let pid = child.id();
        thread::sleep(Duration::from_millis(300));
        let mut node = Node::new();
        let away = node.take(pid).unwrap();
        child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
        wait_until("its changes", || mark.exists());
        let sliced = if slices { away.slices(pid).unwrap() } else { 0 };
        let returned = away.bring_home(pid).unwrap();
        println!("{sliced} pages in slices, then {returned:?}");
        assert!(returned.is_delta);
        if slices {
            is_little = sliced >= 15_000 && returned.pages < 3_000;
        } else {
            assert!(returned.pages >= 15_000, "{returned:?}");
        }
        std::fs::write(&stop, b"").unwrap();
        let output = child.finish();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "ready\nend\n");
        std::fs::remove_file(&stop).unwrap();
        std::fs::remove_file(&mark).unwrap();
    }
    assert!(is_little);
}
