//! Hosts between which UDP does not pass.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use common::{CONET, Lab, Said, Shared, json, migrate, ok, python, take_out, wait_until};
use conet_netsys::{Netns, NetnsName};
use conet_testkit::Need;

const LONG: Duration = Duration::from_secs(60);

/// Says lines until it is told to end.
const PROGRAM: &str = "
import os, sys, time
print('begin', flush=True)
n = 0
while not os.path.exists(sys.argv[1]):
    n += os.getppid() > 0
    time.sleep(0.01)
print('end', n > 0, flush=True)
";

/// How `host` reaches the other one: `udp`, `tcp`, or nothing while it does not.
fn carrier(host: &str) -> Option<String> {
    let told = json(&ok(&Lab::exec(host, &[CONET, "peers", "--json"])));
    told["peers"][0]["carrier"].as_str().map(str::to_owned)
}

fn both_by(carrier_wanted: &str) {
    wait_until(carrier_wanted, LONG, || {
        ["conet-h1", "conet-h2"].iter().all(|host| carrier(host).as_deref() == Some(carrier_wanted))
    });
}

fn block_udp(host: &str) {
    for step in [
        "add table inet blocked",
        "add chain inet blocked in { type filter hook input priority 0; }",
        "add chain inet blocked out { type filter hook output priority 0; }",
        "add rule inet blocked in meta l4proto udp drop",
        "add rule inet blocked out meta l4proto udp drop",
    ] {
        ok(&Lab::exec(host, &["nft", step]));
    }
}

#[test]
fn where_udp_is_blocked_nodes_talk_and_programs_move_by_tcp() {
    conet_testkit::privileged!(Need::Tun, Need::Program("nft"), Need::Program("python3"));
    let lab = Lab::up("wireguard");
    let stop = Shared::with("stop", b"");
    fs::remove_file(stop.path()).unwrap();
    let mut program = lab.run(&[&python(), "-c", PROGRAM, stop.path()]);
    let said = Said::by(&mut program);
    wait_until("its first line", LONG, || said.text().contains("begin"));
    both_by("udp");
    block_udp("conet-h1");
    // Also where somebody talks to the port who has nothing to say, or nonsense.
    let port = SocketAddr::from(([192, 0, 2, 2], 47700));
    let strangers = Netns::open(&NetnsName::new("conet-h1").unwrap()).unwrap().run(move || {
        let silent = TcpStream::connect(port).unwrap();
        let mut loud = TcpStream::connect(port).unwrap();
        loud.write_all(&[0x5a; 4096]).unwrap();
        (silent, loud)
    });
    both_by("tcp");
    take_out(program.pid());
    migrate(program.pid(), "home");
    take_out(program.pid());
    let text = ok(&Lab::exec("conet-h1", &[CONET, "peers"]));
    assert!(text.contains("192.0.2.2:47700, by TCP"), "{text}");
    // A daemon that starts where UDP is blocked finds its peers all the same.
    Lab::kill_daemon("conet-h2");
    Lab::restart("conet-h2");
    both_by("tcp");
    ok(&Lab::exec("conet-h1", &["nft", "delete", "table", "inet", "blocked"]));
    both_by("udp");
    drop(strangers);
    migrate(program.pid(), "home");
    fs::write(stop.path(), b"").unwrap();
    assert!(program.status_within(LONG).success());
    assert!(said.text().contains("end True"), "{}", said.text());
}
