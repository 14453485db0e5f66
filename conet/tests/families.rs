//! Guests with IPv6 addresses in a lab: given by `conet.toml` and at run time, in every
//! mode of the tunnel; and none that can pose as another.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::time::Duration;

use common::{
    CONET, Lab, conet, failed, guest, guest_row as row, json, nothing_remains, ok, wait_until,
};
use conet_testkit::Need;

const SOON: Duration = Duration::from_secs(30);

fn add(host: &str, arguments: &[&str]) -> Vec<String> {
    let added = json(&ok(&guest(host, &[&["add", "--json"], arguments].concat())));
    let addresses = added["addresses"].as_array().unwrap().iter();
    addresses.map(|address| address.as_str().unwrap().to_owned()).collect()
}

/// The guest may still be looking whether its address is free.
fn pings(host: &str, guest: &str, to: &str) {
    let ping = ["exec", guest, "--", "ping", "-c", "3", "-i", "0.1", "-W", "5", to];
    wait_until(&format!("{guest} reaches {to}"), SOON, || {
        common::guest(host, &ping).status.success()
    });
}

#[test]
fn guests_with_ipv6_reach_the_other_host_in_every_mode() {
    conet_testkit::privileged!(Need::Tun, Need::Program("ping"));
    for mode in ["wireguard", "ip-udp", "ipip"] {
        let lab = Lab::with(2, mode, &["--ipv6"]);
        let (near, far) = ("conet-h1", "conet-h2");
        let first = row(near, "conet-h1-g1")["addresses"].to_string();
        assert_eq!(first, r#"["10.77.1.2","fd77:0:0:1::2"]"#);
        // Of each family one that is free, or those that are asked for.
        assert_eq!(add(near, &["conet-t", "--kind", "tap"]), ["10.77.1.3", "fd77:0:0:1::3"]);
        let asked = ["conet-s", "--address", "fd77:0:0:1::66,fd77:0:0:1::67", "--address"];
        let got = add(near, &[&asked[..], &["fd77:0:0:1::68"]].concat());
        assert_eq!(got, ["fd77:0:0:1::66", "fd77:0:0:1::67", "fd77:0:0:1::68"]);
        // What the card of a machine makes of the prefix.
        let of_machine = add(near, &["conet-vm", "--kind", "qemu"]);
        assert_eq!(of_machine, ["10.77.1.4", "fd77::1:0:aff:fe4d:104"]);
        for name in ["conet-h1-g1", "conet-t", "conet-s"] {
            pings(near, name, "fd77:0:0:2::2");
            pings(near, name, "fd77:0:0:1::2");
            pings(near, name, "fd77:0:0:1::1");
        }
        for address in ["fd77:0:0:1::2", "fd77:0:0:1::3", "fd77:0:0:1::67", "10.77.1.3"] {
            pings(far, "conet-h2-g1", address);
        }
        let status = json(&ok(&conet(&["lab", "status", "--json"])));
        assert_eq!(status["hosts"][0]["overlay"], "10.77.1.0/24, fd77:0:0:1::/64");
        // All of them are there for the next daemon.
        Lab::kill_daemon(near);
        Lab::restart(near);
        for name in ["conet-t", "conet-s"] {
            pings(near, name, "fd77:0:0:2::2");
        }
        for (arguments, said) in [
            (&["add", "x", "--address", "fd77:0:0:2::9"][..], "not a guest's address in overlay"),
            (&["add", "x", "--address", "fd77:0:0:1::1"], "the second is the gateway's"),
            (&["add", "x", "--address", "fd77:0:0:1::67"], "is the address of guest conet-s"),
        ] {
            let text = failed(&guest(near, arguments));
            assert!(text.contains(said), "{text}");
        }
        let forward = ["forward", "add", "tcp:2222:conet-s:22"];
        let text = failed(&Lab::exec(near, &[&[CONET][..], &forward].concat()));
        assert!(text.contains("has no IPv4 address"), "{text}");
        ok(&conet(&["lab", "down"]));
        nothing_remains();
        drop(lab);
    }
}

/// Three datagrams, from an address that the guest gives itself, to the other host's guest.
const LIES: &str = "
import socket, subprocess, sys, time
lie, to = sys.argv[1:]
def ip(*words): subprocess.run(['ip', 'address', *words, 'dev', 'eth0'], check=True)
ip('add', lie, *(['nodad'] if ':' in lie else []))
s = socket.socket(socket.AF_INET6 if ':' in lie else socket.AF_INET, socket.SOCK_DGRAM)
s.bind((lie, 0))
for _ in range(3):
    s.sendto(b'lie', (to, 9))
    time.sleep(0.05)
ip('del', lie)";

#[test]
fn a_guest_that_poses_as_another_is_counted_and_not_heard() {
    conet_testkit::privileged!(Need::Tun, Need::Program("ping"), Need::Program("python3"));
    let lab = Lab::with(2, "wireguard", &["--ipv6"]);
    let host = "conet-h1";
    // Sources are looked at loosely, and those of IPv6 not at all.
    ok(&Lab::exec(host, &["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=2"]));
    add(host, &["conet-b"]);
    let name = "conet-h1-g1";
    pings(host, name, "fd77:0:0:2::2");
    let refused = || row(host, name)["drop_reasons"]["source_not_allowed"].as_u64().unwrap_or(0);
    assert_eq!(refused(), 0);
    let sent = || {
        let peers = json(&ok(&Lab::exec(host, &[CONET, "peers", "--json"])));
        peers["peers"][0]["tx_bytes"].as_u64().unwrap()
    };
    let mut least = 0;
    for (lie, to) in [("10.77.1.3/32", "10.77.2.2"), ("fd77:0:0:1::3/128", "fd77:0:0:2::2")] {
        pings(host, name, to);
        let before = sent();
        let lies = ["exec", name, "--", "python3", "-c", LIES];
        let lie_address = lie.split('/').next().unwrap();
        ok(&guest(host, &[&lies[..], &[lie_address, to]].concat()));
        least += 3;
        wait_until("the count", SOON, || refused() >= least);
        // A keepalive may go, three datagrams would be more.
        assert!(sent() - before < 3 * 32, "{} bytes", sent() - before);
        least = refused();
    }
    // The count is the guest's, and stays with it.
    assert_eq!(row(host, "conet-b")["drops"], 0);
    Lab::kill_daemon(host);
    Lab::restart(host);
    assert!(refused() >= least);
    pings(host, name, "fd77:0:0:2::2");
    ok(&conet(&["lab", "down"]));
    nothing_remains();
    drop(lab);
}
