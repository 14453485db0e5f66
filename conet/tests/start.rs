//! `conet guest start` in a lab: machines with their cards, by descriptors too; and with
//! `--features peers` QEMU and User-Mode Linux themselves, with IPv6 addresses.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

#[cfg(feature = "peers")]
use conet_testkit::machine::Machine;

use common::{CONET, Lab, conet, failed, guest, guest_row as row, nothing_remains, ok, wait_until};
use conet_testkit::Need;

const SOON: Duration = Duration::from_secs(30);
const HOST: &str = "conet-h1";

/// As a VMM that inherits its card: asks by ARP who the gateway is, tells the answer and its
/// last argument, and waits for the port's end.
const VMM: &str = r#"#!/usr/bin/env python3
import re, socket, sys
told = ' '.join(sys.argv[1:])
card = socket.socket(fileno=int(re.search(r'(?:fd=|local\.str=)(\d+)', told).group(1)))
mac = bytes.fromhex(re.search(r'mac=([0-9a-f:]+)', told).group(1).replace(':', ''))
own, gateway = socket.inet_aton(sys.argv[-1]), socket.inet_aton('10.77.1.1')
asks = bytes.fromhex('0001080006040001')
card.send(b'\xff' * 6 + mac + b'\x08\x06' + asks + mac + own + bytes(6) + gateway)
frame = b''
while frame[12:14] != b'\x08\x06':
    frame = card.recv(2000)
print(socket.inet_ntoa(frame[28:32]), sys.argv[-1], flush=True)
while card.recv(2000):
    pass
print('gone', flush=True)
"#;

/// A card by a descriptor is the machine's: its port knows who has it, either end hears of
/// the other's, and who comes next is served.
#[test]
fn a_machine_inherits_its_card() {
    conet_testkit::privileged!(Need::Tun, Need::Program("python3"), Need::Program("pgrep"));
    let lab = Lab::up("wireguard");
    let program = format!("/var/tmp/conet-t{}-vmm", std::process::id());
    fs::write(&program, VMM).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    for (name, kind, port) in [("conet-u", "uml", "fd"), ("conet-q", "qemu", "dgram")] {
        ok(&guest(HOST, &["add", name, "--kind", kind, "--address", "10.77.1.9"]));
        for round in 0..2 {
            let mut command = Command::new(CONET);
            command.args(["lab", "exec", HOST, "--", CONET, "guest", "start", name, "--port"]);
            command.args([port, "--program", &program, "--memory", "64", "--", "10.77.1.9"]);
            let mut vmm = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
            let mut said = BufReader::new(vmm.stdout.take().unwrap()).lines().map(Result::unwrap);
            assert_eq!(said.next().unwrap(), "10.77.1.1 10.77.1.9", "{name}");
            assert_eq!(row(HOST, name)["machine"]["vmm"], vmm.id());
            let busy = failed(&guest(HOST, &["remove", name]));
            assert!(busy.contains(&vmm.id().to_string()), "{busy}");
            if round == 0 {
                vmm.kill().unwrap();
                vmm.wait().unwrap();
                let is_gone = || row(HOST, name)["machine"]["vmm"].is_null();
                wait_until("the port to hear of its end", SOON, is_gone);
            } else {
                let server = ["pgrep", "-f", "guest-server --mac"];
                let pid = ok(&Lab::exec(HOST, &server));
                ok(&Lab::exec(HOST, &["kill", "-KILL", pid.trim()]));
                assert_eq!(said.next().unwrap(), "gone");
                vmm.wait().unwrap();
            }
        }
        ok(&guest(HOST, &["remove", name]));
    }
    fs::remove_file(&program).unwrap();
    ok(&guest(HOST, &["add", "conet-u", "--kind", "uml"]));
    for (arguments, said) in [
        (&["args", "conet-u", "--port", "fd"][..], "conet guest start conet-u --port fd"),
        (&["start", "conet-u", "--port", "dgram"], "User-Mode Linux knows no port dgram"),
        (&["start", "conet-h1-g1"], "runs already"),
        (&["start", "nobody"], "no guest is named nobody"),
        (&["start", "conet-u", "--program", "/no/such"], "cannot run /no/such"),
    ] {
        let text = failed(&guest(HOST, arguments));
        assert!(text.contains(said), "{arguments:?}: {text}");
    }
    ok(&conet(&["lab", "down"]));
    nothing_remains();
    drop(lab);
}

/// A line of coLinux's in `conet.toml` makes a guest whose card is as it says, and is told.
#[test]
fn a_guest_in_place_of_colinux_has_the_card_of_its_line() {
    conet_testkit::privileged!(Need::Tun, Need::Program("ping"));
    let lab = Lab::up("wireguard");
    let line = "eth1=slirp,00:ff:12:34:56:78,tcp:2222:22";
    let table = format!(
        "\\n[[guest]]\\nname = \"conet-co\"\\nkind = \"colinux\"\\naddress = \"10.77.1.20\"\\nline \
         = \"{line}\""
    );
    common::reconfigure(HOST, &format!("$s/$/{table}/"));
    assert_eq!(ok(&guest(HOST, &["args", "conet-co"])), format!("{line}\n"));
    let shown = row(HOST, "conet-co");
    assert_eq!((&shown["kind"], &shown["line"]), (&"colinux".into(), &line.into()));
    let card = ok(&guest(HOST, &["exec", "conet-co", "--", "ip", "link", "show", "eth1"]));
    assert!(card.contains("00:ff:12:34:56:78"), "{card}");
    let ping = ["exec", "conet-co", "--", "ping", "-c", "1", "-W", "20", "10.77.2.2"];
    ok(&guest(HOST, &ping));
    let forwards = ok(&Lab::exec(HOST, &[CONET, "forward", "list"]));
    assert!(forwards.contains("tcp:2222:conet-co:22"), "{forwards}");
    let refusal = failed(&guest(HOST, &["start", "conet-co"]));
    assert!(refusal.contains("runs already"), "{refusal}");
    ok(&conet(&["lab", "down"]));
    nothing_remains();
    drop(lab);
}

/// `conet guest start` of a machine, to whose arguments more may be added.
#[cfg(feature = "peers")]
fn started(name: &str, port: &str, memory: &str) -> Command {
    let mut command = Command::new(CONET);
    command.args(["lab", "exec", HOST, "--", CONET, "guest", "start", name]);
    command.args(["--port", port, "--memory", memory, "--"]);
    command
}

/// Says when it has an address that begins so, and then asks the other host's guest for as
/// long as it lives.
#[cfg(feature = "peers")]
fn pinging(card: &str, address: &str) -> String {
    format!(
        "until busybox ip -6 addr show dev {card} | busybox grep '{address}' | busybox grep -v \
         tentative; do busybox sleep 1; done\necho has {address}\n\
         busybox ping -6 fd77:0:0:2::2\n"
    )
}

/// Machines with IPv6 addresses reach the other host's guest in each mode and are reached:
/// by what their kernels make of the advertised prefix, and by DHCPv6.
#[cfg(feature = "peers")]
#[test]
fn machines_with_ipv6_reach_the_other_host_in_every_mode() {
    conet_testkit::privileged!(
        Need::Tun,
        Need::Program("linux.uml"),
        Need::Program("qemu-system-x86_64"),
        Need::Program("busybox"),
        Need::Program("dhclient")
    );
    let module = "M=/usr/lib/uml/modules/$(busybox uname -r)/kernel\n\
        for m in lib/crc-ccitt net/ipv6/ipv6; do busybox insmod $M/$m.ko; done\n";
    let up = |card: &str| format!("busybox ip link set {card} up\n");
    // The client as its distribution has it; what it is told is set by two lines.
    let client = "cat > /tmp/told <<'END'\n#!/bin/sh\n[ $reason = BOUND6 ] || exit 0\n\
        ip -6 addr add $new_ip6_address/128 dev $interface nodad\nEND\nchmod 755 /tmp/told\n\
        until ip -6 addr show dev vec0 | grep fe80:: | grep -v tentative; do sleep 1; done\n\
        dhclient -6 -1 -cf /dev/null -lf /tmp/leases -pf /tmp/pid -sf /tmp/told vec0\n";
    for mode in ["wireguard", "ip-udp", "ipip"] {
        let lab = Lab::with(2, mode, &["--ipv6"]);
        ok(&guest(HOST, &["add", "conet-q", "--kind", "qemu"]));
        ok(&guest(HOST, &["add", "conet-d", "--kind", "qemu"]));
        ok(&guest(HOST, &["add", "conet-f", "--kind", "uml"]));
        ok(&guest(HOST, &["add", "conet-b", "--kind", "uml", "--address", "fd77:0:0:1::99"]));
        let own = ["fd77::1:0:aff:fe4d:103", "fd77::1:0:aff:fe4d:104", "fd77::1:0:aff:fe4d:105"];
        let qemu = |name, port, own| {
            let script = format!("{}{}", up("eth0"), pinging("eth0", own));
            Machine::qemu(started(name, port, "768"), &[], &[], &script)
        };
        let by_fd = format!("{module}{}{}", up("vec0"), pinging("vec0", own[2]));
        let by_dhcp =
            format!("{module}{}{client}{}", up("vec0"), pinging("vec0", "fd77:0:0:1::99"));
        let mut machines = [
            ("qemu", own[0], qemu("conet-q", "vhost", own[0])),
            ("qemu by dgram", own[1], qemu("conet-d", "dgram", own[1])),
            ("uml by fd", own[2], Machine::uml(started("conet-f", "fd", "512"), &by_fd)),
            (
                "uml by bess",
                "fd77:0:0:1::99",
                Machine::uml(started("conet-b", "bess", "512"), &by_dhcp),
            ),
        ];
        for (what, own, machine) in &mut machines {
            machine.wait_for(&format!("has {own}"));
            machine.wait_for("bytes from fd77:0:0:2::2");
            println!("{mode}: {what} reaches the other host");
            let ping = ["exec", "conet-h2-g1", "--", "ping", "-c", "3", "-W", "20", own];
            ok(&guest("conet-h2", &ping));
        }
        drop(machines);
        ok(&conet(&["lab", "down"]));
        nothing_remains();
        drop(lab);
    }
}
