//! The demonstration, by the built program: its report, and what is left of it
//! when somebody stops it.
//!
//! One at a time, and not beside a lab: a machine has one.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use conet_netsys::{Netlink, Netns};
use conet_testkit::privileged::exclusive;
use conet_testkit::random::Random;
use conet_testkit::{Need, privileged};
use serde_json::Value;

const CONET: &str = env!("CARGO_BIN_EXE_conet");
/// A promise: `conet demo` takes no longer.
const LIMIT: Duration = Duration::from_secs(60);
/// From a Ctrl-C to the end: the longest step that does not look is 2 s.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Namespaces, links and processes that a demonstration makes.
fn remains() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for link in Netlink::open().unwrap().links().unwrap() {
        if conet_lab::is_lab_name(link.name.as_str()) {
            found.insert(format!("link {}", link.name));
        }
    }
    for name in Netns::list().unwrap() {
        if conet_lab::is_lab_name(name.as_str()) {
            found.insert(format!("namespace {name}"));
        }
    }
    if std::path::Path::new(conet_lab::STATE_DIR).exists() {
        found.insert(conet_lab::STATE_DIR.to_owned());
    }
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let read = |file| fs::read(entry.path().join(file)).unwrap_or_default();
        let (name, arguments) = (read("comm"), read("cmdline"));
        let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
        let ours = name.starts_with(b"conet-h") || name.starts_with(b"conet\n");
        if ours || arguments.contains("conet-work") || arguments.contains("demo-program") {
            found.insert(format!("process {} {arguments}", entry.file_name().display()));
        }
    }
    found
}

/// What was there `before` may go meanwhile: processes of an earlier test that the
/// system reaps when it likes.
fn assert_left_nothing(before: &BTreeSet<String>, after: &str) {
    let left: Vec<String> = remains().difference(before).cloned().collect();
    assert!(left.is_empty(), "after {after} remain {left:?}");
}

fn report(output: &[u8]) -> Value {
    serde_json::from_slice(output).unwrap()
}

#[test]
fn a_demonstration_shows_everything_and_leaves_nothing() {
    privileged!(Need::Tun);
    let _alone = exclusive();
    let before = remains();
    let begin = Instant::now();
    let output = Command::new(CONET).args(["demo", "--json"]).stdin(Stdio::null()).output();
    let output = output.unwrap();
    assert!(begin.elapsed() < LIMIT, "{:?}", begin.elapsed());
    let report = report(&output.stdout);
    assert!(output.status.success() && report["ok"] == true, "{report:#}");
    assert_eq!(report["rootless"], false);
    let steps = report["steps"].as_array().unwrap();
    let step = |name: &str| {
        let step = steps.iter().find(|step| step["name"] == name).unwrap();
        assert_eq!(step["ok"], true);
        &step["figures"]
    };
    for mode in ["wireguard", "ipip"] {
        assert_eq!(step(&format!("ping ({mode})"))["received"], 500);
        assert!(step(&format!("tcp back ({mode})"))["throughput_mbit_s"].as_f64().unwrap() > 1.0);
    }
    let moved = step("process moves (wireguard)");
    assert!(moved["hops"].as_u64().unwrap() >= 10, "{moved}");
    assert!(moved["freeze_p50_ms"].as_f64().unwrap() > 0.0, "{moved}");
    assert!(moved["calls_forwarded"].as_u64().unwrap() > 0, "{moved}");
    let call = step("forwarded call (wireguard)");
    assert!(call["native_ns"].as_f64().unwrap() > 0.0, "{call}");
    assert!(call["ratio"].as_f64().unwrap() > 1.0, "{call}");
    let socket = step("socket moves (wireguard)");
    assert!(socket["in_flight_per_move_bytes"].as_u64().unwrap() > 0, "{socket}");
    assert_eq!(socket["lost_bytes"], 0);
    assert_left_nothing(&before, "demo");
}

/// Stops a demonstration `after` a step of this name has begun.
fn stopped_at(step: &str, after: Duration) {
    let before = remains();
    let mut demo = Command::new(CONET)
        .args(["demo", "--json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut progress = BufReader::new(demo.stderr.take().unwrap()).lines();
    let begun = format!("{step} …");
    assert!(progress.by_ref().any(|line| line.unwrap() == begun), "no step {step}");
    // What it says from now on has to go somewhere.
    let rest = thread::spawn(move || progress.for_each(drop));
    thread::sleep(after);
    let pid = rustix::process::Pid::from_child(&demo);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let begin = Instant::now();
    let mut said = Vec::new();
    demo.stdout.take().unwrap().read_to_end(&mut said).unwrap();
    let status = demo.wait().unwrap();
    assert!(begin.elapsed() < STOP_LIMIT, "{step}: {:?}", begin.elapsed());
    rest.join().unwrap();
    let report = report(&said);
    assert!(status.code() == Some(1) && report["interrupted"] == true, "{step}: {report:#}");
    assert_left_nothing(&before, &format!("{step}, {after:?} later"));
}

#[test]
fn a_stopped_demonstration_leaves_nothing() {
    privileged!(Need::Tun);
    let _alone = exclusive();
    let seed = u64::from(std::process::id());
    eprintln!("seed {seed}");
    let mut random = Random::new(seed);
    for (step, most_ms) in [
        ("making conet-h2", 100),
        ("process moves (wireguard)", 5000),
        ("forwarded call (wireguard)", 500),
        ("socket moves (wireguard)", 500),
    ] {
        stopped_at(step, Duration::from_millis(random.below(most_ms)));
    }
}
