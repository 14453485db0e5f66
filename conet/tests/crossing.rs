//! Ordinary programs go to another host and come home, many times, and neither they
//! nor whoever started them notices.
//!
//! Short by default. `cargo xtask crossing` sets the variables by which it runs in
//! full: `CONET_CROSSING_SEED`, `CONET_CROSSING_HOPS` and `CONET_CROSSING_SECONDS`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::{Lab, Shared, Times, compiled, migrate, python, row, take_out};
use conet_testkit::Need;
use conet_testkit::random::Random;

/// A number that `cargo xtask crossing` may set.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// A program of a length that can be chosen.
struct Case {
    name: &'static str,
    /// Command line for so many units of work, and the files that it needs.
    make: fn(u64) -> (Vec<String>, Vec<Shared>),
}

const CASES: &[Case] = &[
    Case { name: "python", make: python_case },
    Case { name: "awk", make: awk_case },
    Case { name: "gzip", make: |units| compressor("gzip", &["-9", "-c"], units) },
    Case { name: "xz", make: |units| compressor("xz", &["-T1", "-6", "-c"], units) },
    Case { name: "static", make: static_case },
];

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn python_case(units: u64) -> (Vec<String>, Vec<Shared>) {
    let file = Shared::with("read", &text(1));
    let script = "
import hashlib, os, sys
h = b'x'; rows = []
for i in range(int(sys.argv[1])):
    for k in range(100000): h = hashlib.sha256(h).digest()
    rows.append([h] * 100)
    with open(sys.argv[2], 'rb') as f: n = len(f.readline())
    print(i, os.getpid() > 1, n, h.hex(), sum(x[0][0] for x in rows), flush=True)
sys.exit(5)
";
    let arguments = owned(&[&python(), "-c", script, &units.to_string(), file.path()]);
    (arguments, vec![file])
}

fn awk_case(units: u64) -> (Vec<String>, Vec<Shared>) {
    let script = "BEGIN { for (i = 0; i < n; i++) { for (k = 0; k < 1000000; k++) s = (s * 3 + k) % 1000003; print i, s; fflush() } exit 3 }";
    (owned(&["awk", "-v", &format!("n={units}"), script]), Vec::new())
}

/// About a megabyte for each unit, neither random nor very repetitive.
fn text(units: u64) -> Vec<u8> {
    let mut random = Random::new(7);
    let mut text = String::new();
    while text.len() < usize::try_from(units << 20).unwrap() {
        let word = random.below(5000).pow(2);
        writeln!(text, "{} {word} lorem {}", text.len(), word % 97).unwrap();
    }
    text.into_bytes()
}

fn compressor(program: &str, options: &[&str], units: u64) -> (Vec<String>, Vec<Shared>) {
    let file = Shared::with("data", &text(units * 2));
    (owned(&[&[program], options, &[file.path()]].concat()), vec![file])
}

fn static_case(units: u64) -> (Vec<String>, Vec<Shared>) {
    let (program, file) = (compiled("counter", &["-static"]), Shared::with("read", &text(1)));
    (owned(&[program.path(), &units.to_string(), file.path()]), vec![program, file])
}

/// Runs it at home; its output, and the processor time that it took. Real time would
/// depend on what else the machine does.
fn unmoved(arguments: &[String]) -> (Output, Duration) {
    let before = common::children_ran();
    let output = Command::new(&arguments[0]).args(&arguments[1..]).output().unwrap();
    (output, common::children_ran() - before)
}

/// What was measured of a program that crossed.
#[derive(Default)]
struct Measured {
    /// Longest time that it did not run, in µs, out and home.
    freeze_out_us: u64,
    home_us: u64,
    /// Its remote half, its home half, and real time, while away.
    remote: Times,
    home: Times,
    away: Duration,
}

fn hop(random: &mut Random, pause: Duration) {
    let mean = u64::try_from(pause.as_micros()).unwrap();
    std::thread::sleep(Duration::from_micros(mean / 3 + random.below(mean * 4 / 3)));
}

/// Makes a program of about `seconds`, and takes it through `hops`.
fn crosses(lab: &Lab, case: &Case, random: &mut Random, hops: u64, seconds: u64) {
    let (arguments, files) = (case.make)(3);
    let (_, took) = unmoved(&arguments);
    drop((arguments, files));
    let units = (Duration::from_secs(seconds).as_secs_f64() / took.as_secs_f64() * 3.0).ceil();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small, positive")]
    let (arguments, _files) = (case.make)((units as u64).max(2));
    let (expected, took) = unmoved(&arguments);
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let program = lab.run(&words);
    let pid = program.pid();
    // Its output is read all the while, else it would wait for a reader.
    let output = std::thread::spawn(move || program.finish());
    let pause = took.mul_f64(0.65) / u32::try_from(hops).unwrap();
    let mut seen = Measured::default();
    for _ in 0..hops / 2 {
        hop(random, pause);
        let moved = migrate(pid, "conet-h2");
        seen.freeze_out_us = seen.freeze_out_us.max(moved["freeze_us"].as_u64().unwrap());
        let remote = u32::try_from(moved["remote_pid"].as_u64().unwrap()).unwrap();
        let look = || (Instant::now(), Times::of(pid).unwrap(), Times::of(remote).unwrap());
        let before = look();
        hop(random, pause);
        let after = look();
        seen.away += after.0 - before.0;
        seen.home.add(before.1, after.1);
        seen.remote.add(before.2, after.2);
        let moved = migrate(pid, "home");
        seen.home_us = seen.home_us.max(moved["total_us"].as_u64().unwrap());
    }
    let still_ran = common::exists(pid);
    let output = output.join().unwrap();
    assert!(still_ran, "it ended before its hops did");
    assert_eq!(output.status, expected.status, "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == expected.stdout, "{}: the output differs", case.name);
    assert!(output.stderr == expected.stderr);
    let row = row(pid);
    assert_eq!(row["place"], "ended", "{row}");
    assert!(row["hops_done"].as_u64().unwrap() >= hops / 2 * 2, "{row}");
    assert_eq!(row["sent_home"], 0, "{row}");
    assert!(row["calls_forwarded"].as_u64().unwrap() > 0, "{row}");
    report(case, &seen, &row, took);
    // It ran there, or waited for others on this machine, half of the time at least.
    assert!((seen.remote.run + seen.remote.waited) * 2 >= seen.away, "it did not run");
    assert!(seen.remote.run >= seen.home.run, "the work is done at home");
    assert!(seen.home.user <= seen.away / 20 + Duration::from_millis(20), "it ran at home");
}

/// Past libtest's capture: these figures are what the run is for.
fn report(case: &Case, seen: &Measured, row: &serde_json::Value, unmoved: Duration) {
    let share = |part: Duration| 100.0 * part.as_secs_f64() / seen.away.as_secs_f64();
    let line = format!(
        "{:7} {:5.1} s unmoved, {} hops, {} calls forwarded, sent home {}; away {:.1} s: remote ran {:.0} % and waited {:.0} %, home ran {:.1} % (user {:.1} %); longest freeze out {:.1} ms, home {:.1} ms\n",
        case.name,
        unmoved.as_secs_f64(),
        row["hops_done"],
        row["calls_forwarded"],
        row["sent_home"],
        seen.away.as_secs_f64(),
        share(seen.remote.run),
        share(seen.remote.waited),
        share(seen.home.run),
        share(seen.home.user),
        ms(seen.freeze_out_us),
        ms(seen.home_us),
    );
    std::io::stderr().write_all(line.as_bytes()).ok();
}

#[allow(clippy::cast_precision_loss, reason = "for people to read")]
fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

#[test]
fn ordinary_programs_cross_many_times() {
    conet_testkit::privileged!(
        Need::Tun,
        Need::Program("python3"),
        Need::Program("awk"),
        Need::Program("gzip"),
        Need::Program("xz"),
        Need::Program("cc")
    );
    let seed = setting("CONET_CROSSING_SEED", 1);
    let hops = setting("CONET_CROSSING_HOPS", 8);
    let seconds = setting("CONET_CROSSING_SECONDS", 3);
    std::io::stderr().write_all(format!("seed {seed}\n").as_bytes()).ok();
    let lab = Lab::up("wireguard");
    let mut random = Random::new(seed);
    for case in CASES {
        crosses(&lab, case, &mut random, hops, seconds);
    }
}

#[test]
fn a_host_reads_the_same_wherever_the_program_runs() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    let script = "
import os, sys, time
last = time.monotonic()
while not os.path.exists(sys.argv[1]):
    with open('/tmp/marker') as f: marker = f.read().strip()
    now = time.monotonic()
    print(os.uname().nodename, marker, os.getpid(), time.time(), now, now >= last, flush=True)
    last = now
    time.sleep(0.02)
print('end')
";
    let (end, python) = (Shared::new("end"), python());
    let program = lab.run(&[&python, "-c", script, end.path()]);
    let pid = program.pid();
    let mut random = Random::new(2);
    let watched = std::thread::spawn(move || watch(program));
    for _ in 0..6 {
        hop(&mut random, Duration::from_millis(150));
        let remote = take_out(pid);
        let names = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/uts")).unwrap();
        assert_ne!(names(remote), names(pid), "the other host's name is another");
        hop(&mut random, Duration::from_millis(150));
        migrate(pid, "home");
    }
    end.create();
    let lines = watched.join().unwrap();
    assert!(lines.len() > 50, "{}", lines.len());
    let mut worst = 0.0f64;
    let mut last = 0.0;
    for (line, read_at) in &lines {
        let words: Vec<&str> = line.split(' ').collect();
        assert_eq!(words[..3], ["conet-h1", "conet-h1", &pid.to_string()], "{line}");
        assert_eq!(words[5], "True", "{line}");
        let monotonic: f64 = words[4].parse().unwrap();
        assert!(monotonic >= last, "{line}");
        last = monotonic;
        worst = worst.max((read_at - words[3].parse::<f64>().unwrap()).abs());
    }
    let report =
        format!("clock: off by {:.1} ms at most, over {} lines\n", worst * 1e3, lines.len());
    std::io::stderr().write_all(report.as_bytes()).ok();
    assert!(worst < 0.25, "{worst}");
    assert_eq!(row(pid)["hops_done"], 12);
}

/// Every line that a program prints, with the machine's time when it came.
fn watch(mut program: common::Program) -> Vec<(String, f64)> {
    use std::io::BufRead;
    let out = program.0.as_mut().unwrap().stdout.take().unwrap();
    let mut lines = Vec::new();
    for line in std::io::BufReader::new(out).lines() {
        let line = line.unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        if line == "end" {
            break;
        }
        lines.push((line, now.as_secs_f64()));
    }
    assert!(program.finish().status.success());
    lines
}

/// Computes, sleeps, reads, and every now and then starts a child or a thread, for
/// which it comes home by itself.
const MIXED: &str = "
import hashlib, os, subprocess, sys, threading, time
h = sys.argv[1].encode()
for i in range(120):
    for k in range(20000): h = hashlib.sha256(h).digest()
    what = h[0] % 40
    if what == 0: print(subprocess.run(['echo', 'child'], capture_output=True).stdout)
    elif what == 1:
        t = threading.Thread(target=lambda: time.sleep(0.01)); t.start(); t.join()
        print('thread')
    elif what < 6: time.sleep(0.02)
    elif what < 12: print(len(os.listdir('/usr/bin')) > 0)
    print(i, h.hex()[:16], flush=True)
sys.exit(int(sys.argv[1]))
";

#[test]
fn several_programs_hop_at_once_and_for_reasons_of_their_own() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let seed = setting("CONET_CROSSING_SEED", 1);
    let lab = Lab::up("wireguard");
    let (lab, python) = (&lab, &python());
    std::thread::scope(|scope| {
        for number in 1..=3u64 {
            scope.spawn(move || {
                let mut random = Random::new(seed + number);
                let number = number.to_string();
                let command = [python.as_str(), "-c", MIXED, &number];
                let expected = Command::new(command[0]).args(&command[1..]).output().unwrap();
                let program = lab.run(&command);
                let pid = program.pid();
                let output = std::thread::spawn(move || program.finish());
                let mut moved = 0;
                while !output.is_finished() {
                    hop(&mut random, Duration::from_millis(120));
                    let to = if random.chance(500) { "conet-h2" } else { "home" };
                    let answer = common::try_migrate(pid, to);
                    moved += u32::from(answer.status.success());
                    let said = String::from_utf8_lossy(&answer.stderr);
                    // It has a child or a thread just now, or has ended.
                    let reasons = ["threads", "shares its memory", "has ended", "not one of yours"];
                    let is_told = reasons.iter().any(|reason| said.contains(reason));
                    assert!(answer.status.success() || is_told, "seed {seed}: {said}");
                }
                let output = output.join().unwrap();
                assert_eq!(output.status, expected.status, "seed {seed}: {}", row(pid));
                assert!(output.stdout == expected.stdout, "seed {seed}: the output differs");
                assert!(moved > 0, "seed {seed}: it did not move");
            });
        }
    });
}
