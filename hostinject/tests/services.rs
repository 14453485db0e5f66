//! Guests that know nothing of their network, with the clients that images have: busybox's
//! udhcpc, ISC's dhclient, and the kernel's own handling of router advertisements. Needs
//! root.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]
#![allow(dead_code, reason = "the scene is that of two_hosts")]

mod scene;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use conet_hostinject::{GuestPort, GuestSpec, PortKind};
use conet_testkit::{Need, privileged};
use conet_tunnel::{DEFAULT_MTU, Mode};
use scene::{Scene, guest_address, guest_spec, ping};

/// Emulated machines and busy ones take their time.
const PATIENCE: Duration = Duration::from_secs(60);

fn attach(scene: &Scene, v6: Option<&str>) -> GuestPort {
    let mut spec = GuestSpec { kind: PortKind::Tap, ..guest_spec(1, 1) };
    if let Some(address) = v6 {
        spec.addresses.push(address.parse().unwrap());
        spec.gateways.push("fd00:1::1".parse().unwrap());
        spec.dns.push("2001:db8::53".parse().unwrap());
    }
    let port = scene.hosts[0].attach(spec);
    // As an image finds its card.
    run(&port, "ip", &["addr", "flush", "dev", "eth0"]);
    run(&port, "ip", &["link", "set", "eth0", "down", "mtu", "1500"]);
    run(&port, "ip", &["link", "set", "eth0", "up"]);
    assert_eq!(shown(&port, &["route"]), "", "it knows no way");
    port
}

/// Runs a program in the guest; what it prints.
fn run(port: &GuestPort, program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    let output = port.netns().unwrap().run(|| command.output().unwrap()).unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(output.status.success(), "{program} {arguments:?}: {out}{err}");
    out
}

fn shown(port: &GuestPort, arguments: &[&str]) -> String {
    run(port, "ip", arguments)
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// ISC's client where no profile of AppArmor's, which goes by the path, keeps it from the
/// files of a test.
fn dhclient_in(directory: &Path) -> String {
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path).map(|at| at.join("dhclient")).find(|at| at.exists());
    let copy = directory.join("client");
    fs::copy(found.unwrap(), &copy).unwrap();
    copy.to_str().unwrap().to_owned()
}

/// What a client calls when it has heard something.
fn script(directory: &Path, text: &str) -> PathBuf {
    let path = directory.join("script");
    fs::write(&path, format!("#!/bin/sh\n{text}")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn is_set_up(port: &GuestPort) {
    let address = shown(port, &["-4", "addr", "show", "dev", "eth0"]);
    assert!(address.contains("inet 10.77.1.2/24"), "{address}");
    assert!(address.contains(&format!("mtu {DEFAULT_MTU}")), "{address}");
    ping(port.netns().unwrap(), guest_address(2, 1)).expect("the other host's guest");
    // By ARP for itself, which is answered for it.
    ping(port.netns().unwrap(), guest_address(1, 2)).expect("the guest beside it");
}

#[test]
fn udhcpc_sets_a_guest_up() {
    privileged!(Need::Tun, Need::Program("udhcpc"));
    let scene = Scene::new(Mode::WireGuard);
    let (other, beside) = (scene.guest(2, 1), scene.guest(1, 2));
    let port = attach(&scene, None);
    let directory = tempfile::tempdir().unwrap();
    let told = directory.path().join("told");
    let script = script(
        directory.path(),
        &format!(
            "[ $1 = bound ] || exit 0\n\
             ip link set $interface mtu $mtu; ip addr add $ip/$mask dev $interface\n\
             ip route add default via $router; echo $dns $lease > {}\n",
            told.display()
        ),
    );
    let script = script.to_str().unwrap();
    run(&port, "udhcpc", &["-i", "eth0", "-n", "-q", "-f", "-t", "20", "-s", script]);
    is_set_up(&port);
    assert_eq!(fs::read_to_string(told).unwrap(), "192.0.2.53 3600\n");
    drop((other, beside));
}

#[test]
fn dhclient_sets_a_guest_up_and_renews() {
    privileged!(Need::Tun, Need::Program("dhclient"));
    let scene = Scene::new(Mode::WireGuard);
    let (other, beside) = (scene.guest(2, 1), scene.guest(1, 2));
    let port = attach(&scene, None);
    let directory = tempfile::tempdir().unwrap();
    let script = script(
        directory.path(),
        "case $reason in BOUND|REBOOT) ;; *) exit 0;; esac\n\
         ip link set $interface mtu $new_interface_mtu\n\
         ip addr replace $new_ip_address/$new_subnet_mask dev $interface\n\
         ip route replace default via $new_routers\n",
    );
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (leases, pid, script) = (at("leases"), at("pid"), script.to_str().unwrap());
    let files = ["-cf", "/dev/null", "-lf", &leases, "-pf", &pid, "-sf", script];
    let client = dhclient_in(directory.path());
    let dhclient = |how: &[&str]| run(&port, &client, &[how, &files, &["eth0"]].concat());
    dhclient(&["-1"]);
    is_set_up(&port);
    run(&port, &client, &[&["-x"][..], &files].concat());
    // It boots again with the lease that it has, and keeps it.
    dhclient(&["-1"]);
    let kept = fs::read_to_string(&leases).unwrap();
    assert!(kept.matches("fixed-address 10.77.1.2;").count() >= 2, "{kept}");
    // And says goodbye.
    run(&port, &client, &[&["-r"][..], &files].concat());
    drop((other, beside));
}

#[test]
fn a_kernel_alone_has_its_ipv6_address_and_router() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    // What the card 02:00:0a:4d:01:02 makes of fd00:1::/64.
    let port = attach(&scene, Some("fd00:1::aff:fe4d:102"));
    wait_until("an address from the advertised prefix", || {
        let addresses = shown(&port, &["-6", "addr", "show", "dev", "eth0"]);
        addresses.contains("inet6 fd00:1::aff:fe4d:102/64") && !addresses.contains("tentative")
    });
    let routes = shown(&port, &["-6", "route"]);
    assert!(routes.contains("default via fe80::63:6fff:fe6e:6574 dev eth0"), "{routes}");
    assert!(routes.contains(&format!("mtu {DEFAULT_MTU}")), "{routes}");
    assert!(!routes.contains("fd00:1::/64"), "nobody but the router is on the link: {routes}");
    // Its host is behind the router.
    run(&port, "ping", &["-c", "1", "-W", "30", "fd00:1::1"]);
}

#[test]
fn dhclient_gets_an_ipv6_address() {
    privileged!(Need::Tun, Need::Program("dhclient"));
    let scene = Scene::new(Mode::WireGuard);
    let port = attach(&scene, Some("fd00:1::2"));
    // DHCPv6 asks from the card's own address, and the route is the kernel's.
    wait_until("a router and an address of the link's", || {
        let addresses = shown(&port, &["-6", "addr", "show", "dev", "eth0"]);
        addresses.contains("inet6 fe80::")
            && !addresses.contains("tentative")
            && shown(&port, &["-6", "route"]).contains("default via fe80::")
    });
    let directory = tempfile::tempdir().unwrap();
    let told = directory.path().join("told");
    let script = script(
        directory.path(),
        &format!(
            "[ $reason = BOUND6 ] || exit 0\n\
             ip -6 addr add $new_ip6_address/128 dev $interface nodad\n\
             echo $new_dhcp6_name_servers > {}\n",
            told.display()
        ),
    );
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (leases, pid, script) = (at("leases"), at("pid"), script.to_str().unwrap());
    let files = ["-cf", "/dev/null", "-lf", &leases, "-pf", &pid, "-sf", script];
    let client = dhclient_in(directory.path());
    run(&port, &client, &[&["-6", "-1"][..], &files, &["eth0"]].concat());
    let addresses = shown(&port, &["-6", "addr", "show", "dev", "eth0"]);
    assert!(addresses.contains("inet6 fd00:1::2/128"), "{addresses}");
    assert_eq!(fs::read_to_string(told).unwrap(), "2001:db8::53\n");
    run(&port, "ping", &["-c", "1", "-W", "30", "fd00:1::1"]);
    run(&port, &client, &[&["-6", "-r"][..], &files, &["eth0"]].concat());
}
