//! Real programs cross to a sandbox on this machine and come home.

mod common;

use common::{compiled, hops, python};
use std::process::Command;
use std::time::Duration;

#[test]
fn awk_crosses_and_comes_home() {
    conet_testkit::privileged!();
    let script =
        "BEGIN { for (i = 0; i < 60000000; i++) { s += i % 7; if (i % 100000 == 0) print i, s } }";
    hops("awk", &[script], 10, Duration::from_millis(60), 5);
}

#[test]
fn python_crosses_and_comes_home() {
    conet_testkit::privileged!();
    let script = "
import hashlib, os, sys, time
h = b'x'; rows = []
for i in range(120):
    for k in range(20000): h = hashlib.sha256(h).digest()
    rows.append([h] * 500)
    with open('/etc/hostname', 'rb') as f: f.read()
    print(i, h.hex(), sum(x[0][0] for x in rows), flush=True)
sys.exit(5)
";
    hops(&python(), &["-c", script], 20, Duration::from_millis(30), 10);
}

#[test]
fn a_sleeping_python_sleeps_as_long_as_it_should() {
    conet_testkit::privileged!();
    let script = "
import time, sys
for i in range(12):
    t = time.monotonic(); w = time.time(); time.sleep(0.25); d = time.monotonic() - t; e = time.time() - w
    print(i, 0.249 < d < 2, 0.249 < e < 2, flush=True)
";
    hops(&python(), &["-c", script], 20, Duration::from_millis(50), 10);
}

#[test]
fn a_polling_python_is_not_disturbed() {
    conet_testkit::privileged!();
    let script = "
import select, os, time
r, w = os.pipe(); p = select.poll(); p.register(r, select.POLLIN)
for i in range(12):
    t = time.monotonic(); got = p.poll(200); d = time.monotonic() - t
    t = time.monotonic(); got2 = select.select([r], [], [], 0.05); d2 = time.monotonic() - t
    print(i, got, got2, 0.199 < d < 2, 0.049 < d2 < 2, flush=True)
";
    hops(&python(), &["-c", script], 20, Duration::from_millis(50), 10);
}

#[test]
fn compressors_cross_and_come_home() {
    conet_testkit::privileged!();
    let data = tempfile::NamedTempFile::new().unwrap();
    let script = format!("seq 1 3000000 > {}", data.path().display());
    assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
    let path = data.path().to_str().unwrap();
    hops("gzip", &["-9", "-c", path], 20, Duration::from_millis(20), 5);
    hops("xz", &["-T1", "-2", "-c", path], 20, Duration::from_millis(40), 5);
}

#[test]
fn a_static_program_keeps_its_registers_and_memory() {
    conet_testkit::privileged!();
    let (_directory, program) = compiled("state", &["-static"]);
    hops(&program, &["60"], 20, Duration::from_millis(30), 8);
    let (_directory, program) = compiled("state", &[]);
    hops(&program, &["60"], 20, Duration::from_millis(30), 8);
}

#[test]
fn a_module_that_is_imported_away_is_there_at_home() {
    conet_testkit::privileged!();
    // Shared objects are mapped while away, used here and at home.
    let script = "
import time
time.sleep(0.15)
for i, name in enumerate(['json', 'decimal', 'sqlite3', 'ctypes', 'lzma', 'ssl', 'bz2', 'csv']):
    module = __import__(name)
    time.sleep(0.1)
    print(name, len(dir(module)) > 3, flush=True)
import decimal, json, zlib
print(decimal.Decimal(2).sqrt(), json.dumps([1, 2]), zlib.crc32(b'x'))
";
    hops(&python(), &["-c", script], 15, Duration::from_millis(45), 4);
}

/// A bell within the vDSO, or a trap from its stub, once sent the program home with an
/// instruction pointer that is not there.
#[test]
fn a_program_that_only_reads_clocks_is_not_harmed() {
    conet_testkit::privileged!();
    let (_directory, program) = compiled("clocks", &["-O2"]);
    hops(&program, &[], 25, Duration::from_millis(25), 10);
}

/// It is fetched from any place in such a function, and a pointer that faults there
/// is its own fault, with its handler.
#[test]
fn a_program_in_a_function_of_the_vdso_comes_home() {
    conet_testkit::privileged!();
    let (_directory, program) = compiled("vdso", &["-O2"]);
    hops(&program, &[], 40, Duration::from_millis(10), 10);
}

/// What is unmapped away and used again must not show the file that home has there.
#[test]
fn memory_where_a_file_was_is_the_programs_own() {
    conet_testkit::privileged!();
    let script = "
import mmap, time, sys
f = open('/etc/services', 'rb'); size = 12288
for i in range(40):
    m = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_READ); a = m[:16]
    time.sleep(0.02); m.close()
    own = [bytearray([i & 255]) * 140000 for _ in range(3)]
    time.sleep(0.02)
    print(i, a, all(set(b) == {i & 255} for b in own), flush=True)
    for b in own: b[70000] = 7
";
    hops(&python(), &["-c", script], 25, Duration::from_millis(17), 10);
}

/// Absolute timeouts of futexes are home's time.
#[test]
fn a_wait_for_an_event_takes_its_time() {
    conet_testkit::privileged!();
    let script = "
import threading, time
e = threading.Event()
for i in range(10):
    t = time.monotonic(); got = e.wait(0.2); d = time.monotonic() - t
    print(i, got, 0.199 < d < 2, flush=True)
";
    hops(&python(), &["-c", script], 15, Duration::from_millis(45), 5);
}
