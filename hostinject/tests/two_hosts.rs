//! Two hosts on a LAN, each with guests, joined by tunnels, in the running
//! kernel. Needs root.
//!
//! ```text
//!   guest 10.77.1.2 ─ host 192.0.2.1 ─ bridge ─ host 192.0.2.2 ─ guest 10.77.2.2
//!                                        │
//!                                     capture
//! ```
//!
//! Everything lives in namespaces named `conet-t<pid>-…`, which are removed when
//! the scene drops, also by a panic.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

mod scene;

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use conet_dataplane::DropReason;
use conet_hostinject::{AttachError, GuestPort};
use conet_netsys::{IfName, NETNS_DIR, Netlink, Netns, Sysctl, Veth};
use conet_testkit::{Need, privileged};
use conet_tunnel::Mode;
use scene::{Capture, Scene, guest_address, guest_name, guest_spec, ifname, key, ping};

const PATTERN: &[u8] = b"<<a pattern that nobody on the LAN may read>>";

/// Sends `bytes` from one guest to a listener in the other and compares.
fn transfer(from: &GuestPort, to: &GuestPort, bytes: &[u8]) -> Duration {
    let address = to.spec().addresses[0];
    let listener = to.netns().unwrap().run(|| TcpListener::bind((address, 0)).unwrap()).unwrap();
    let at = listener.local_addr().unwrap();
    let began = Instant::now();
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut got = Vec::with_capacity(bytes.len());
            let (mut stream, peer) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            stream.read_to_end(&mut got).unwrap();
            assert_eq!(peer.ip(), from.spec().addresses[0], "the guest's own address is seen");
            got
        });
        let mut stream = from.netns().unwrap().run(|| TcpStream::connect(at).unwrap()).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(bytes).unwrap();
        drop(stream);
        assert!(receiver.join().unwrap() == bytes, "the stream arrives as it was sent");
    });
    began.elapsed()
}

fn patterned(len: usize) -> Vec<u8> {
    PATTERN.iter().copied().cycle().take(len).collect()
}

fn crossing(mode: Mode) {
    let scene = Scene::new(mode);
    let capture = Capture::start(&scene.lan);
    let (one, two) = (scene.guest(1, 1), scene.guest(2, 1));
    let rtt = ping(one.netns().unwrap(), guest_address(2, 1)).expect("ping there");
    ping(two.netns().unwrap(), guest_address(1, 1)).expect("ping back");
    let bytes = patterned(8 << 20);
    let there = transfer(&one, &two, &bytes);
    let back = transfer(&two, &one, &bytes);
    let rate = |took: Duration| bytes.len() as f64 * 8e-6 / took.as_secs_f64();
    println!("{mode}: ping {rtt:?}, TCP {:.0} and {:.0} Mb/s", rate(there), rate(back));

    let seen = capture.stop();
    // Segments of 64 KiB, and what a busy machine's capture misses.
    assert!(seen.packets > 100, "{} packets", seen.packets);
    assert_eq!(seen.foreign, Vec::<String>::new(), "{mode}: host addresses only on the LAN");
    assert_eq!(seen.contains(PATTERN), mode == Mode::IpIp, "{mode}");
    let tunnel = scene.hosts[0].tunnel.snapshot().unwrap();
    let peer = tunnel.peer(key(2).public()).unwrap();
    assert!(peer.rx_bytes > 8 << 20 && peer.tx_bytes > 8 << 20, "{peer:?}");
    assert_eq!(peer.last_handshake.is_some(), mode == Mode::WireGuard);
    assert_eq!(peer.dropped(DropReason::SourceNotAllowed), 0);
    one.detach().unwrap();
    two.detach().unwrap();
}

#[test]
fn guests_reach_each_other_by_wireguard_and_the_lan_sees_nothing_of_it() {
    privileged!(Need::Tun);
    crossing(Mode::WireGuard);
}

#[test]
fn guests_reach_each_other_by_ipip_and_the_lan_sees_hosts_only() {
    privileged!(Need::Tun);
    crossing(Mode::IpIp);
}

#[test]
fn guests_of_one_host_reach_each_other_and_their_host() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let (one, two) = (scene.guest(1, 1), scene.guest(1, 2));
    ping(one.netns().unwrap(), guest_address(1, 2)).expect("neighbour");
    ping(one.netns().unwrap(), IpAddr::from([10, 77, 1, 1])).expect("gateway");
    ping(scene.hosts[0].netns(), guest_address(1, 2)).expect("from the host");
    let far = scene.guest(2, 1);
    ping(scene.hosts[0].netns(), guest_address(2, 1)).expect("from the host to a far guest");
    ping(one.netns().unwrap(), IpAddr::from([10, 77, 2, 1])).expect("the far host");
    for port in [one, two, far] {
        port.detach().unwrap();
    }
}

#[test]
fn a_forbidden_source_is_refused_by_the_far_host_and_a_forged_one_by_its_own() {
    privileged!(Need::Tun);
    for mode in [Mode::WireGuard, Mode::IpIp] {
        let scene = Scene::new(mode);
        let near = scene.guest(1, 1);
        let far = scene.guest(2, 1);
        ping(near.netns().unwrap(), guest_address(2, 1)).expect("an honest packet first");
        let refused = || {
            let snapshot = scene.hosts[1].tunnel.snapshot().unwrap();
            snapshot.peer(key(1).public()).unwrap().dropped(DropReason::SourceNotAllowed)
        };
        let sent = || {
            let snapshot = scene.hosts[0].tunnel.snapshot().unwrap();
            snapshot.peer(key(2).public()).unwrap().tx_packets
        };

        // Host one lets a guest use an address that is not host one's to give.
        let liar = scene.guest_with(1, 3, IpAddr::from([10, 77, 9, 9]));
        assert_eq!(ping(liar.netns().unwrap(), guest_address(2, 1)), None);
        assert_eq!(refused(), 1, "{mode}");

        // A guest that forges a source does not get past its own host.
        let before = sent();
        scene::send_forged(near.netns().unwrap(), [10, 77, 1, 99], [10, 77, 2, 2]);
        scene::send_forged(near.netns().unwrap(), [10, 77, 2, 7], [10, 77, 2, 2]);
        thread::sleep(Duration::from_millis(100));
        assert_eq!(sent(), before, "{mode}: nothing forged enters the tunnel");
        scene::send_forged(near.netns().unwrap(), [10, 77, 1, 2], [10, 77, 2, 2]);
        thread::sleep(Duration::from_millis(100));
        assert_eq!(sent(), before + 1, "{mode}: the same packet with its own source does");
        for port in [near, far, liar] {
            port.detach().unwrap();
        }
    }
}

#[test]
fn a_guest_is_taken_over_without_a_packet_lost() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let one = scene.guest(1, 1);
    let two = scene.guest(2, 1);
    assert!(!one.is_adopted());
    ping(one.netns().unwrap(), guest_address(2, 1)).expect("warm up");
    let listener =
        two.netns().unwrap().run(|| TcpListener::bind((guest_address(2, 1), 0)).unwrap());
    let listener = listener.unwrap();
    let at = listener.local_addr().unwrap();
    let mut client = one.netns().unwrap().run(|| TcpStream::connect(at).unwrap()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let retransmitted = || {
        one.netns()
            .unwrap()
            .run(|| std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap())
            .unwrap()
    };
    let retransmissions = |snmp: String| -> u64 {
        let mut rows = snmp.lines().filter(|l| l.starts_with("Tcp:")).map(str::to_owned);
        let (names, values) = (rows.next().unwrap(), rows.next().unwrap());
        let at = names.split(' ').position(|n| n == "RetransSegs").unwrap();
        values.split(' ').nth(at).unwrap().parse().unwrap()
    };
    let before = retransmissions(retransmitted());
    for round in 0..20u8 {
        let again = scene.hosts[0].attach(guest_spec(1, 1));
        assert!(again.is_adopted());
        client.write_all(&[round; 1000]).unwrap();
        let mut got = [0; 1000];
        server.read_exact(&mut got).unwrap();
        assert_eq!(got, [round; 1000]);
        drop(again);
    }
    assert_eq!(retransmissions(retransmitted()), before);
    one.detach().unwrap();
    two.detach().unwrap();
}

#[test]
fn whatever_a_crash_left_is_mended_or_removed() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let host = &scene.hosts[0];
    let spec = guest_spec(1, 1);
    let works = |what: &str| {
        let mut port = host.attach(spec.clone());
        assert!(!port.is_adopted(), "{what}");
        assert!(port.is_up().unwrap(), "{what}");
        ping(port.netns().unwrap(), IpAddr::from([10, 77, 1, 1])).expect(what);
        port.detach().unwrap();
        assert!(!Netns::exists(&spec.name), "{what}");
    };
    works("nothing there");
    drop(Netns::create(&spec.name).unwrap());
    works("a namespace without a link");
    std::fs::write(format!("{NETNS_DIR}/{}", spec.name), "").unwrap();
    works("a name without a namespace");
    let stray = Veth {
        name: spec.host_link,
        peer: ifname("stray"),
        peer_netns: None,
        mtu: None,
        mac: None,
        peer_mac: None,
    };
    host.netlink().add_veth(&stray).unwrap();
    works("a link without a guest");
    assert_eq!(host.netlink().link(ifname("stray")).unwrap(), None);

    let remove = || host.run(|| GuestPort::remove(&spec.name, spec.host_link).unwrap());
    drop(host.attach(spec.clone()));
    assert!(remove());
    assert!(!remove(), "the second time there is nothing");
    assert_eq!(host.netlink().link(spec.host_link).unwrap(), None);
}

#[test]
fn a_guest_that_cannot_be_made_leaves_nothing() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let host = &scene.hosts[0];
    host.netlink().add_bridge(guest_spec(1, 1).host_link).unwrap();
    let error = host.run(|| GuestPort::attach(guest_spec(1, 1)).map(drop).unwrap_err());
    assert!(matches!(error, AttachError::LinkTaken { .. }), "{error}");
    assert!(!Netns::exists(&guest_name(1, 1)));
    // It is somebody else's: an attempt must not cost them their link.
    assert!(host.netlink().link(guest_spec(1, 1).host_link).unwrap().is_some());

    let mut spec = guest_spec(1, 2);
    spec.addresses.clear();
    let error = host.run(|| GuestPort::attach(spec.clone()).map(drop).unwrap_err());
    assert!(matches!(error, AttachError::NoAddress { .. }), "{error}");
    let mut spec = guest_spec(1, 2);
    spec.addresses.push("fd00:1::2".parse().unwrap());
    let error = host.run(|| GuestPort::attach(spec.clone()).map(drop).unwrap_err());
    assert!(matches!(error, AttachError::NoGateway { .. }), "{error}");
    assert!(!Netns::exists(&guest_name(1, 2)));
}

#[test]
fn guests_with_ipv6_reach_each_other_by_both_families() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let attach = |h: u8| {
        let mut spec = guest_spec(h, 1);
        spec.addresses.push(format!("fd00:{h}::2").parse().unwrap());
        spec.gateways.push(format!("fd00:{h}::1").parse().unwrap());
        scene.hosts[usize::from(h) - 1].attach(spec)
    };
    let (one, two) = (attach(1), attach(2));
    // There at once: nobody has to be asked whether they are.
    for (netns, address) in
        [(one.netns().unwrap(), "fd00:1::2"), (scene.hosts[0].netns(), "fd00:1::1")]
    {
        let address: IpAddr = address.parse().unwrap();
        drop(netns.run(|| TcpListener::bind((address, 0))).unwrap().unwrap());
    }
    ping(one.netns().unwrap(), guest_address(2, 1)).expect("IPv4");
    let six: IpAddr = "fd00:2::2".parse().unwrap();
    let listener = two.netns().unwrap().run(|| TcpListener::bind((six, 0)).unwrap()).unwrap();
    let at = listener.local_addr().unwrap();
    let connect = || TcpStream::connect_timeout(&at, Duration::from_secs(3));
    let client = one.netns().unwrap().run(connect).unwrap().expect("IPv6");
    assert_eq!(listener.accept().unwrap().1, client.local_addr().unwrap());
    assert_eq!(client.local_addr().unwrap().ip(), "fd00:1::2".parse::<IpAddr>().unwrap());
    one.detach().unwrap();
    two.detach().unwrap();
}

/// Where it did not forward before, the first guest with IPv6 has it do so; what it has heard
/// of its own routers stays true.
#[test]
fn a_host_that_begins_to_forward_listens_to_its_routers() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let host = &scene.hosts[0];
    let names = ["listens", "deaf"].map(ifname);
    for (name, value) in names.into_iter().zip(["1", "0"]) {
        host.netlink().add_bridge(name).unwrap();
        host.run(|| Sysctl::AcceptRa(Some(name)).write(value).unwrap());
    }
    host.run(|| Sysctl::Ipv6Forward.write("0").unwrap());
    let values = || host.run(|| names.map(|name| Sysctl::AcceptRa(Some(name)).read().unwrap()));
    host.attach(guest_spec(1, 1)).detach().unwrap();
    assert_eq!(values(), ["1", "0"], "IPv4 has nothing to do with it");
    let mut spec = guest_spec(1, 1);
    spec.addresses.push("fd00:1::2".parse().unwrap());
    spec.gateways.push("fd00:1::1".parse().unwrap());
    let port = host.attach(spec);
    assert_eq!(host.run(|| Sysctl::Ipv6Forward.read().unwrap()), "1");
    assert_eq!(values(), ["2", "0"]);
    port.detach().unwrap();
}

#[test]
fn nothing_remains_of_a_scene() {
    privileged!(Need::Tun);
    let names = {
        let scene = Scene::new(Mode::IpIp);
        let guest = scene.guest(1, 1);
        assert!(Netns::exists(&guest.spec().name));
        let mut names = vec![guest.spec().name.clone(), scene.lan.name.clone()];
        names.extend(scene.hosts.iter().map(|h| h.scratch.name.clone()));
        drop(guest);
        names
    };
    for name in names {
        assert!(!Netns::exists(&name), "{name}");
    }
    let here = Netlink::open().unwrap().links().unwrap();
    let ours = |name: &IfName| name.as_str().starts_with("conet-t");
    assert!(!here.iter().any(|link| ours(&link.name)), "{here:?}");
}
