//! The network between two nodes goes away: programs wait, and go on when it is back,
//! or end on both sides with a stored reason.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::net::UdpSocket;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use common::{
    Lab, Said, Shared, conet, exists, failed, migrate, ok, python, reconfigure, row, take_out,
    try_migrate, wait_until,
};
use conet_netsys::{IfName, IpNet, Netlink, Netns, NetnsName};
use conet_testkit::Need;

const SECOND: Duration = Duration::from_secs(1);
/// The port of the second host on the LAN's bridge, and the bridge.
const PORT: &str = "conet-h2";
const BRIDGE: &str = "conet-lan";

/// Writes a numbered line at its file's end, again and again, and reads it back.
const LINES: &str = "
import os, sys
f = os.open(sys.argv[1], os.O_RDWR | os.O_APPEND)
n = 0
print('begin', flush=True)
while not os.path.exists(sys.argv[1] + '.stop'):
    line = b'%06d\\n' % n
    assert os.write(f, line) == 7
    assert os.pread(f, 7, 7 * n) == line, n
    for k in range(20000): pass
    n += 1
print('wrote', n, flush=True)
sys.exit(9)
";

/// The cable of the second host, whose carrier stays when it is cut.
fn cut(is_cut: bool) {
    let bridge = (!is_cut).then(|| IfName::new(BRIDGE).unwrap());
    Netlink::open().unwrap().set_master(IfName::new(PORT).unwrap(), bridge).unwrap();
}

fn lines(file: &Shared) -> usize {
    fs::read(file.path()).unwrap().len() / 7
}

/// An address of the machine's own network namespace, taken away when dropped.
struct MachineHas(IpNet);

impl MachineHas {
    fn new(address: &str) -> Self {
        let net = format!("{address}/32").parse().unwrap();
        Netlink::open().unwrap().add_address(IfName::LOOPBACK, net).unwrap();
        Self(net)
    }
}

impl Drop for MachineHas {
    fn drop(&mut self) {
        Netlink::open().unwrap().delete_address(IfName::LOOPBACK, self.0).ok();
    }
}

/// The machine once answered ARP on the lab's LAN for its own addresses; where hosts had
/// the same, they did not reach each other for seconds, or for good.
#[test]
fn the_machine_does_not_answer_for_its_own_addresses_on_the_lan() {
    conet_testkit::privileged!(Need::Tun);
    let address = "192.0.2.99";
    let _address = MachineHas::new(address);
    let _lab = Lab::up("wireguard");
    let netns = Netns::open(&NetnsName::new("conet-h1").unwrap()).unwrap();
    // The first packet makes the kernel ask who has the address.
    let socket = netns.run(|| UdpSocket::bind("192.0.2.1:0")).unwrap().unwrap();
    socket.send_to(b"?", (address, 9)).unwrap();
    std::thread::sleep(SECOND / 2);
    let table = ok(&Lab::exec("conet-h1", &["cat", "/proc/net/arp"]));
    let entry = table.lines().find(|line| line.starts_with(address)).unwrap();
    assert!(entry.contains("00:00:00:00:00:00"), "{table}");
}

#[test]
fn programs_wait_for_the_network_and_go_on() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    let file = Shared::with("lines", b"");
    let stop = format!("{}.stop", file.path());
    let mut program = lab.run(&[&python(), "-c", LINES, file.path()]);
    let (pid, said) = (program.pid(), Said::by(&mut program));
    wait_until("its first line", 5 * SECOND, || said.text().contains("begin"));
    take_out(pid);
    wait_until("calls away", 5 * SECOND, || lines(&file) > 50);
    for absence in [7, 15] {
        cut(true);
        let begin = Instant::now();
        wait_until("it is out of reach", 5 * SECOND, || row(pid)["place"] == "unreachable");
        let before = lines(&file);
        let refused = failed(&try_migrate(pid, "home"));
        assert!(refused.contains("has not been heard of"), "{refused}");
        std::thread::sleep((absence * SECOND).saturating_sub(begin.elapsed()));
        assert_eq!(lines(&file), before, "it went on by itself");
        cut(false);
        let back = wait_until("it goes on", 10 * SECOND, || lines(&file) > before + 20);
        eprintln!("away for {absence} s; it went on after {} ms", back.as_millis());
        wait_until("it is known to", 5 * SECOND, || row(pid)["place"] == "away");
        let waited = row(pid)["waited_us"].as_u64().unwrap();
        assert!(waited > u64::from(absence - 3) * 1_000_000, "{waited}");
    }
    // The nodes meet again as well.
    wait_until("the nodes have met", 20 * SECOND, || {
        let peers = conet(&["lab", "exec", "conet-h1", "--", common::CONET, "peers", "--json"]);
        ok(&peers).contains("\"up\": true")
    });
    migrate(pid, "home");
    fs::write(&stop, b"").unwrap();
    let status = program.status_within(10 * SECOND);
    fs::remove_file(&stop).unwrap();
    assert_eq!(status.code(), Some(9), "{}", said.text());
    let text = fs::read_to_string(file.path()).unwrap();
    let expected: String = (0..text.len() / 7).map(|n| format!("{n:06}\n")).collect();
    assert_eq!(text, expected, "a call was lost, or ran twice");
    assert!(said.text().contains(&format!("wrote {}", text.len() / 7)), "{}", said.text());
}

#[test]
fn both_halves_end_when_the_network_stays_away() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"));
    let lab = Lab::up("wireguard");
    for host in ["conet-h1", "conet-h2"] {
        reconfigure(host, "s/^mode = .*/&\\nlink_timeout = 6/");
    }
    let file = Shared::with("lines", b"");
    let compute = "print('begin', flush=True)\nwhile True: pass";
    for script in [LINES, compute] {
        let mut program = lab.run(&[&python(), "-c", script, file.path()]);
        let (pid, said) = (program.pid(), Said::by(&mut program));
        wait_until("its first line", 5 * SECOND, || said.text().contains("begin"));
        let remote = take_out(pid);
        cut(true);
        let status = program.status_within(20 * SECOND);
        assert_eq!(status.signal(), Some(9));
        let row = row(pid);
        assert_eq!(row["place"], "ended", "{row}");
        assert_eq!(row["reason"]["code"], "unreachable", "{row}");
        let took = wait_until("the remote half's end", 40 * SECOND, || !exists(remote));
        eprintln!("the remote half ended {} s later", took.as_secs());
        cut(false);
        wait_until("the nodes have met", 20 * SECOND, || {
            let peers = conet(&["lab", "exec", "conet-h1", "--", common::CONET, "peers", "--json"]);
            ok(&peers).contains("\"up\": true")
        });
    }
}
