//! `conet trace`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::time::Duration;

use common::{CONET, Lab, Said, Shared, failed, json, migrate, ok, python, take_out, wait_until};
use conet_testkit::Need;

const CALLS: &str = "
import os, sys
print('begin', flush=True)
f = os.open('/dev/null', os.O_WRONLY)
while not os.path.exists(sys.argv[1]):
    for k in range(50):
        os.getppid()
        os.write(f, b'x' * 16)
";

#[test]
fn trace_tells_what_is_forwarded() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    let stop = Shared::with("stop", b"");
    fs::remove_file(stop.path()).unwrap();
    let mut program = lab.run(&[&python(), "-c", CALLS, stop.path()]);
    let (pid, said) = (program.pid().to_string(), Said::by(&mut program));
    wait_until("its first line", Duration::from_secs(5), || said.text().contains("begin"));
    let trace = |more: &[&str]| {
        Lab::exec("conet-h1", &[&[CONET, "trace", &pid, "--seconds", "1"], more].concat())
    };
    assert!(failed(&trace(&[])).contains("is not away"));
    take_out(program.pid());
    let told = json(&ok(&trace(&["--json"])));
    let calls = told["calls"].as_array().unwrap();
    for (name, least) in [("getppid", 50), ("write", 50), ("stat", 1)] {
        let call = calls.iter().find(|call| call["name"].as_str().unwrap().contains(name));
        let call = call.unwrap_or_else(|| panic!("no {name} in {told:#}"));
        let number = |key: &str| call[key].as_f64().unwrap_or_else(|| panic!("no {key}: {call}"));
        assert!(number("calls") >= number("calls_watched"), "{call}");
        assert!(number("calls_watched") >= f64::from(least), "{call}");
        assert!(number("round_trip_mean_us") > number("home_mean_us"), "{call}");
        assert!(number("home_mean_us") > 0.0 && number("share") < 1.0, "{call}");
    }
    let text = ok(&trace(&[]));
    assert!(text.contains("getppid") && text.contains("runs on conet-h2"), "{text}");
    migrate(program.pid(), "home");
    fs::write(stop.path(), b"").unwrap();
    assert!(program.status_within(Duration::from_secs(10)).success());
}
