//! Twenty programs, seven of them with children, each moved again and again at random
//! times, itself or one of its descendants: output and status are those of an unmoved
//! run.
//!
//! Short by default. `cargo xtask programs` sets the variables by which it runs in
//! full: `CONET_PROGRAMS_SEED`, `CONET_PROGRAMS_HOPS` and `CONET_PROGRAMS_SECONDS`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{CONET, Lab, Shared, compiled, python, row, try_migrate};
use conet_testkit::Need;
use conet_testkit::random::Random;

/// Programs that run at once: as many as there are hosts.
const AT_ONCE: usize = 2;

/// A number that `cargo xtask programs` may set.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// A command line for so many units of work.
type Make = fn(&Files, u64) -> Vec<String>;

/// What the programs read and run.
struct Files {
    text: Shared,
    counter: Shared,
    python: String,
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// A program that reads the same file `units` times.
fn reads(command: &[&str], files: &Files, units: u64) -> Vec<String> {
    let again = usize::try_from(units).unwrap();
    let paths = vec![files.text.path(); again];
    words(&[command, &paths].concat())
}

/// A script that is told how many rounds to run, and where the file is.
fn script(interpreter: &[&str], text: &str, files: &Files, units: u64) -> Vec<String> {
    words(&[interpreter, &[text, "script", &units.to_string(), files.text.path()]].concat())
}

const PROGRAMS: [(&str, Make); 20] = [
    ("python hashes", |files, units| {
        let text = "
import hashlib, sys
h = b'x'
for i in range(int(sys.argv[2])):
    for k in range(30000): h = hashlib.sha256(h).digest()
    print(i, len(open(sys.argv[3]).readline()), h.hex(), flush=True)
sys.exit(5)";
        script(&[&files.python, "-c"], text, files, units)
    }),
    ("python objects", |files, units| {
        let text = "
import json, sys
seen = {}
for i in range(int(sys.argv[2])):
    for k in range(3000): seen[k * i % 9973] = {'k': [k, str(i)] * 3}
    again = json.loads(json.dumps(seen))
    print(i, len(again), sum(len(v['k']) for v in again.values()))";
        script(&[&files.python, "-c"], text, files, units)
    }),
    ("awk", |_, units| {
        let text = "BEGIN { for (i = 0; i < n; i++) { for (k = 0; k < 300000; k++) s = (s * 3 + k) % 1000003; print i, s; fflush() } exit 3 }";
        words(&["awk", "-v", &format!("n={units}"), text])
    }),
    ("gzip", |files, units| reads(&["gzip", "-9", "-c"], files, units)),
    ("xz", |files, units| reads(&["xz", "-T1", "-3", "-c"], files, units)),
    ("static", |files, units| {
        words(&[files.counter.path(), &units.to_string(), files.text.path()])
    }),
    ("perl", |files, units| {
        let text = "my ($n) = $ARGV[1]; my %h; for my $i (1..$n) { for my $k (1..60000) { $h{$k % 7919} .= chr(65 + $k % 26) if $k % 3; $h{$k % 7919} = '' if length($h{$k % 7919} // '') > 20 } print \"$i \", scalar(keys %h), \"\\n\" } exit 4";
        script(&["perl", "-e"], text, files, units)
    }),
    ("sha256sum", |files, units| reads(&["sha256sum"], files, units)),
    ("md5sum", |files, units| reads(&["md5sum"], files, units)),
    ("sort", |files, units| {
        reads(&["sort", "--parallel=1", "-S", "16M", "-k2", "-u"], files, units)
    }),
    ("factor", |_, units| {
        // Some milliseconds each: with smaller ones the command line grows too long.
        let first = 900_000_000_000_000_000_000_000_001;
        let numbers = (0..units * 4).map(|n| (first + u128::from(n) * 7919).to_string());
        [words(&["factor"]), numbers.collect()].concat()
    }),
    ("grep", |files, units| {
        reads(&["grep", "-c", "-E", "(1.*7|9.*3).*lorem.*(4|6)$"], files, units)
    }),
    ("sed", |files, units| {
        reads(&["sed", "-n", "s/lorem \\([0-9]*\\)/\\1 dolor/;s/9/nine/g;$p"], files, units)
    }),
    ("sh, a hundred commands", |files, units| {
        let text = "n=0; while [ $n -lt $((25 * $1)) ]; do expr $n + 1 >/dev/null; echo $(basename /a/b$n) $(wc -c < \"$2\"); n=$((n + 1)); done; exit 7";
        script(&["sh", "-c"], text, files, units)
    }),
    ("sh, pipelines of five", |files, units| {
        let text = "for n in $(seq $(($1 / 4 + 1))); do cat \"$2\" | tr 0-4 5-9 | grep -v 77 | sort | sha256sum; done";
        script(&["sh", "-c"], text, files, units)
    }),
    ("bash", |files, units| {
        let text = "f() { local x=$(( $1 * 7 % 1013 )); ( echo \"sub $x\" | tr a-z A-Z ); }; for ((n = 0; n < 20 * $1; n++)); do v=$(f $n); for ((k = 0; k < 300; k++)); do : $((k * n)); done; echo \"$n $v\"; done; wait; exit 9";
        script(&["bash", "-c"], text, files, units)
    }),
    ("python with children", |files, units| {
        let text = "
import hashlib, subprocess, sys
h = b'x'
for i in range(int(sys.argv[2]) * 2):
    for k in range(8000): h = hashlib.sha256(h).digest()
    out = subprocess.run(['sha256sum', sys.argv[3]], capture_output=True).stdout
    print(i, out[:16], h.hex()[:8], subprocess.call(['sh', '-c', 'exit 3']), flush=True)";
        script(&[&files.python, "-c"], text, files, units)
    }),
    ("perl with children", |files, units| {
        let text = "$| = 1; for my $i (1..$ARGV[1] * 4) { pipe(my $r, my $w); my $p = fork; if (!$p) { close $r; my $s = 0; $s = ($s * 31 + $_) % 65521 for 1..40000; print $w \"$s\\n\"; exit($i % 50) } close $w; my $l = <$r>; waitpid($p, 0); print \"$i $l\", $? >> 8, \"\\n\" } exit 6";
        script(&["perl", "-e"], text, files, units)
    }),
    ("xargs", |files, units| {
        let text = "seq $((40 * $1)) | xargs -n 2 expr 3 +  2>&1 | cksum; yes \"$2\" | head -n $1 | xargs -n 1 sha256sum";
        script(&["sh", "-c"], text, files, units)
    }),
    ("find", |files, units| {
        let text = "for n in $(seq $1); do find \"$2\" -exec cksum {} \\; -exec sh -c 'exit 0' \\; -print; done";
        script(&["sh", "-c"], text, files, units)
    }),
];

/// A megabyte, neither random nor very repetitive.
fn text() -> Vec<u8> {
    let mut random = Random::new(7);
    let mut text = String::new();
    while text.len() < 1 << 20 {
        let word = random.below(5000).pow(2);
        writeln!(text, "{} {word} lorem {}", text.len(), word % 97).unwrap();
    }
    text.into_bytes()
}

/// Runs it at home, where `conet run` would, and unmoved.
fn unmoved(arguments: &[String]) -> (Output, Duration) {
    let begin = Instant::now();
    let mut command = Command::new(CONET);
    command.args(["lab", "exec", "conet-h1", "--"]).args(arguments);
    let output = command.stdin(Stdio::null()).output().unwrap();
    (output, begin.elapsed())
}

/// A process and all that descend from it.
fn family(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(parent) = all.get(next) {
        let path = format!("/proc/{parent}/task/{parent}/children");
        let children = fs::read_to_string(path).unwrap_or_default();
        all.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        next += 1;
    }
    all
}

/// What a move may be refused for: the process has ended, was replaced, has a thread or
/// shares its memory for a moment, or moves already.
const PASSING: [&str; 8] = [
    "has ended",
    "not one of yours",
    "shares its memory",
    "threads",
    "on its way",
    "is ending",
    "did not come home",
    "traced",
];

/// Moves a program and its descendants until it ends; how many moves went well.
fn moves(random: &mut Random, pid: u32, pause: Duration, ended: impl Fn() -> bool) -> u64 {
    let mut done = 0;
    let mut was_refused = false;
    while !ended() {
        let mean = u64::try_from(pause.as_micros()).unwrap();
        // What it was refused for has passed in a moment.
        let mean = if was_refused { mean.min(15_000) } else { mean };
        thread::sleep(Duration::from_micros(mean / 3 + random.below(mean * 4 / 3)));
        let all = family(pid);
        // Itself as often as all others together.
        let at = if random.chance(500) { 0 } else { random.below(all.len() as u64) };
        let target = all[usize::try_from(at).unwrap()];
        let to = if row(target)["place"] == "away" { "home" } else { "conet-h2" };
        let answer = try_migrate(target, to);
        let said = String::from_utf8_lossy(&answer.stderr).into_owned();
        let is_told = PASSING.iter().any(|reason| said.contains(reason));
        assert!(answer.status.success() || is_told, "{target} to {to}: {said}");
        was_refused = !answer.status.success();
        done += u64::from(!was_refused);
    }
    done
}

fn crosses(lab: &Lab, name: &str, make: Make, files: &Files, random: &mut Random, hops: u64) {
    let seconds = setting("CONET_PROGRAMS_SECONDS", 2);
    // What a unit takes, without what starting takes.
    let [few, more] = [2, 34].map(|units| unmoved(&make(files, units)).1.as_secs_f64());
    let units = (seconds as f64 / ((more - few) / 32.0).max(1e-5)).ceil();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small, positive")]
    let mut units = (units as u64).clamp(2, 3000);
    for _ in 0..4 {
        let arguments = make(files, units);
        let (expected, took) = unmoved(&arguments);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let program = lab.run(&arguments);
        let pid = program.pid();
        let output = thread::spawn(move || program.finish());
        let pause = took.mul_f64(0.7) / u32::try_from(hops).unwrap();
        let done = moves(random, pid, pause, || output.is_finished());
        let output = output.join().unwrap();
        let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status, expected.status, "{name}: {} {}", said(&output), row(pid));
        assert!(output.stdout == expected.stdout, "{name}: the output differs");
        assert_eq!(said(&output), said(&expected), "{name}");
        let (row, took) = (row(pid), took.as_secs_f64());
        let line = format!(
            "{name:23} {took:4.1} s unmoved, {done} moves; itself {} hops, {} calls forwarded, sent home {}\n",
            row["hops_done"], row["calls_forwarded"], row["sent_home"],
        );
        std::io::stderr().write_all(line.as_bytes()).ok();
        if done >= hops {
            return;
        }
        // It was over too soon, or was refused too often.
        units *= 2;
    }
    panic!("{name} was not moved {hops} times");
}

#[test]
fn twenty_programs_cross_with_their_children() {
    conet_testkit::privileged!(
        Need::Tun,
        Need::Program("python3"),
        Need::Program("awk"),
        Need::Program("gzip"),
        Need::Program("xz"),
        Need::Program("perl"),
        Need::Program("bash"),
        Need::Program("cc")
    );
    let seed = setting("CONET_PROGRAMS_SEED", 1);
    let hops = setting("CONET_PROGRAMS_HOPS", 4);
    std::io::stderr().write_all(format!("seed {seed}, {hops} hops each\n").as_bytes()).ok();
    let begin = Instant::now();
    let lab = Lab::up("wireguard");
    let counter = compiled("counter", &["-static"]);
    let files = Files { text: Shared::with("text", &text()), counter, python: python() };
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((name, make)) = PROGRAMS.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut random = Random::new(seed ^ name.len() as u64);
                    crosses(&lab, name, *make, &files, &mut random, hops);
                }
            });
        }
    });
    let line = format!("twenty programs in {:.0} s\n", begin.elapsed().as_secs_f64());
    std::io::stderr().write_all(line.as_bytes()).ok();
}
