//! Guests by TAP on two hosts, in the running kernel. Needs root.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]
#![allow(dead_code, reason = "the scene is that of two_hosts")]

mod scene;

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use conet_dataplane::DropReason;
use conet_hostinject::{AttachError, GateError, GuestPort, GuestSpec, PortKind, Rates};
use conet_netsys::{IpNet, Netlink, Netns};
use conet_testkit::{Need, privileged};
use conet_tunnel::Mode;
use scene::{Scene, guest_address, guest_name, guest_spec, ping};

/// A guest by TAP, with an IPv6 address too.
fn spec(host: u8, guest: u8) -> GuestSpec {
    let mut spec = GuestSpec { kind: PortKind::Tap, ..guest_spec(host, guest) };
    spec.addresses.push(format!("fd00:{host}::{}", guest + 1).parse().unwrap());
    spec.gateways.push(format!("fd00:{host}::1").parse().unwrap());
    spec
}

fn attach(scene: &Scene, host: u8, guest: u8) -> GuestPort {
    scene.hosts[usize::from(host) - 1].attach(spec(host, guest))
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(10), "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a stream from one to the other, at this address of its.
fn transfer(from: &GuestPort, to: &GuestPort, address: IpAddr, bytes: &[u8]) {
    let listener = to.netns().unwrap().run(|| TcpListener::bind((address, 0)).unwrap()).unwrap();
    let at = listener.local_addr().unwrap();
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let (mut stream, peer) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            assert!(from.spec().addresses.contains(&peer.ip()), "{peer}");
            got
        });
        let mut stream = from.netns().unwrap().run(|| TcpStream::connect(at).unwrap()).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(bytes).unwrap();
        drop(stream);
        assert!(receiver.join().unwrap() == bytes, "the stream arrives as it was sent");
    });
}

#[test]
fn guests_by_tap_reach_all_that_guests_by_veth_do() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let (one, two) = (attach(&scene, 1, 1), attach(&scene, 2, 1));
    let (beside, by_veth) = (attach(&scene, 1, 2), scene.guest(2, 2));
    assert!(!one.is_adopted() && one.spec().kind == PortKind::Tap);
    for (what, to) in [
        ("the other host's guest", guest_address(2, 1)),
        ("the other host's guest by veth", guest_address(2, 2)),
        ("the guest beside it", guest_address(1, 2)),
        ("its gateway", IpAddr::from([10, 77, 1, 1])),
        ("its host", IpAddr::from([192, 0, 2, 1])),
    ] {
        ping(one.netns().unwrap(), to).expect(what);
    }
    ping(by_veth.netns().unwrap(), guest_address(1, 1)).expect("from a guest by veth");
    let bytes: Vec<u8> = (0..4_u32 << 20).map(|byte| byte.to_le_bytes()[1]).collect();
    for address in &two.spec().addresses {
        transfer(&one, &two, *address, &bytes);
    }
    transfer(&two, &one, guest_address(1, 1), &bytes);
    drop(beside);
}

#[test]
fn a_guest_with_a_wide_netmask_finds_its_neighbours_too() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let (one, two) = (attach(&scene, 1, 1), attach(&scene, 1, 2));
    let mut netlink = Netlink::open_in(one.netns().unwrap()).unwrap();
    let wide: IpNet = "10.77.1.2/16".parse().unwrap();
    netlink.add_address(one.spec().guest_link, wide).unwrap();
    // By ARP for the neighbour itself, not for the gateway.
    ping(one.netns().unwrap(), guest_address(1, 2)).expect("the guest beside it");
    drop(two);
}

#[test]
fn a_guest_by_tap_cannot_be_another() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let (one, two) = (attach(&scene, 1, 1), attach(&scene, 2, 1));
    ping(one.netns().unwrap(), guest_address(2, 1)).expect("as itself");
    let before = one.drops()[DropReason::SourceNotAllowed];
    for forged in [[10, 77, 1, 3], [192, 0, 2, 1], [10, 77, 2, 2]] {
        scene::send_forged(one.netns().unwrap(), forged, [10, 77, 2, 2]);
    }
    wait_until("three forged packets are counted", || {
        one.drops()[DropReason::SourceNotAllowed] == before + 3
    });
    drop(two);
}

#[test]
fn a_guest_by_tap_is_found_again_and_leaves_nothing() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let host = &scene.hosts[0];
    let two = attach(&scene, 2, 1);
    let link = spec(1, 1).host_link;
    for round in 0..5 {
        let mut port = attach(&scene, 1, 1);
        assert!(port.is_up().unwrap());
        ping(port.netns().unwrap(), guest_address(2, 1)).unwrap_or_else(|| panic!("round {round}"));
        drop(port);
        assert!(Netns::exists(&guest_name(1, 1)), "the namespace stays");
        assert_eq!(host.netlink().link(link).unwrap(), None, "its devices do not");
    }
    // As a veth and as a TAP again: the namespace is the same.
    let port = scene.guest(1, 1);
    ping(port.netns().unwrap(), guest_address(2, 1)).expect("by veth");
    drop(port);
    let port = attach(&scene, 1, 1);
    ping(port.netns().unwrap(), guest_address(2, 1)).expect("by TAP after a veth");
    port.detach().unwrap();
    assert!(!Netns::exists(&guest_name(1, 1)));
    assert_eq!(host.netlink().link(link).unwrap(), None);
    drop(two);
}

/// Its link is freed later, which is in nobody's way.
#[test]
fn a_removed_guest_leaves_its_names_to_the_next() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let host = &scene.hosts[0];
    let link = spec(1, 1).host_link;
    for kind in [PortKind::Veth, PortKind::Tap, PortKind::Veth, PortKind::Tap, PortKind::Tap] {
        let port = host.attach(GuestSpec { kind, ..spec(1, 1) });
        assert!(!port.is_adopted(), "{kind:?}");
        ping(port.netns().unwrap(), IpAddr::from([10, 77, 1, 1])).expect("the guest's gateway");
        host.run(|| port.detach().unwrap());
        assert_eq!(host.netlink().link(link).unwrap(), None, "{kind:?}");
        assert!(!Netns::exists(&guest_name(1, 1)), "{kind:?}");
    }
}

#[test]
fn what_is_there_is_not_made_anew() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let host = &scene.hosts[0];
    let create = |spec: GuestSpec| host.run(|| GuestPort::create(spec));
    // A link that somebody needs: the host's own.
    let mut taken = spec(1, 1);
    taken.host_link = scene::ifname("eth0");
    for kind in [PortKind::Veth, PortKind::Tap] {
        let error = create(GuestSpec { kind, ..taken.clone() }).map(drop).unwrap_err();
        assert!(matches!(error, AttachError::Exists { .. }), "{error}");
        assert!(host.netlink().link(taken.host_link).unwrap().is_some());
        assert!(!Netns::exists(&guest_name(1, 1)));
    }
    drop(Netns::create(&guest_name(1, 1)).unwrap());
    let error = create(spec(1, 1)).map(drop).unwrap_err();
    assert!(matches!(error, AttachError::Exists { .. }), "{error}");
    assert!(Netns::exists(&guest_name(1, 1)), "it is somebody else's");
    create(spec(1, 2)).unwrap().detach().unwrap();
}

#[test]
fn a_device_that_is_deleted_ends_the_port_and_no_more() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let mut port = attach(&scene, 1, 1);
    assert!(port.is_up().unwrap());
    Netlink::open_in(port.netns().unwrap()).unwrap().delete_link(port.spec().guest_link).unwrap();
    wait_until("the port is down", || !port.is_up().unwrap());
    port.detach().unwrap();
    let port = attach(&scene, 1, 1);
    ping(port.netns().unwrap(), IpAddr::from([10, 77, 1, 1])).expect("a new one");
}

/// The host's datagrams for a guest, and how many of them it has got so far, in order.
struct Datagrams(UdpSocket, UdpSocket);

impl Datagrams {
    fn new(scene: &Scene, port: &GuestPort) -> Self {
        let bind = |address: IpAddr| UdpSocket::bind((address, 7001)).unwrap();
        let guest = port.netns().unwrap().run(|| bind(guest_address(1, 1))).unwrap();
        guest.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let host = scene.hosts[0].run(|| bind(IpAddr::from([10, 77, 1, 1])));
        Self(host, guest)
    }

    fn send(&self, numbers: std::ops::Range<u32>) {
        for number in numbers {
            self.0.send_to(&number.to_be_bytes(), (guest_address(1, 1), 7001)).unwrap();
        }
    }

    /// What has come, until nothing more does.
    fn got(&self) -> Vec<u32> {
        let mut bytes = [0; 4];
        let next = || self.1.recv(&mut bytes).ok().map(|_| u32::from_be_bytes(bytes));
        std::iter::from_fn(next).collect()
    }
}

#[test]
fn a_held_guest_gets_its_packets_in_order_when_it_is_released() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let port = attach(&scene, 1, 1);
    let datagrams = Datagrams::new(&scene, &port);
    datagrams.send(0..10);
    assert_eq!(datagrams.got(), (0..10).collect::<Vec<_>>());
    port.hold().unwrap();
    // The thread has heard of it when one more has not come.
    datagrams.send(10..60);
    let early = datagrams.got();
    assert!(early.len() < 50, "it is held");
    // All are kept, or came before it was.
    let mut kept = Vec::new();
    // Among others, which the host's kernel sends by itself.
    let is_ours = |packet: &Vec<u8>| packet.len() == 10 + 28 + 4 && packet[10] == 0x45;
    wait_until("what has not come is kept", || {
        kept.extend(port.drain().unwrap().into_iter().filter(is_ours));
        early.len() + kept.len() == 50
    });
    let last = |packet: &Vec<u8>| u32::from_be_bytes(*packet.last_chunk().unwrap());
    let numbers: Vec<u32> = early.iter().copied().chain(kept.iter().map(last)).collect();
    assert_eq!(numbers, (10..60).collect::<Vec<_>>());
    datagrams.send(60..70);
    assert_eq!(port.accept(kept).unwrap(), 0);
    port.release().unwrap();
    datagrams.send(70..80);
    let mut got = early;
    wait_until("all of them, in order", || {
        got.extend(datagrams.got());
        got == (10..80).collect::<Vec<_>>()
    });
    assert_eq!(port.drops()[DropReason::HoldFull], 0);
    let veth = scene.guest(2, 1);
    assert!(matches!(veth.hold(), Err(GateError::Veth)));
}

#[test]
fn a_guests_rate_changes_while_it_runs() {
    privileged!(Need::Tun);
    let scene = Scene::new(Mode::WireGuard);
    let mut port = attach(&scene, 1, 1);
    let datagrams = Datagrams::new(&scene, &port);
    let rates = Rates { to_guest: "1pps".parse().unwrap(), ..Rates::default() };
    port.set_rates(rates).unwrap();
    let begin = Instant::now();
    // A burst of 64 passes, and one a second.
    let mut sent = 0;
    while port.drops()[DropReason::GuestRate] < 100 {
        datagrams.send(0..200);
        sent += 200;
        thread::sleep(Duration::from_millis(5));
        assert!(sent < 100_000, "nothing is limited");
    }
    let got = datagrams.got().len();
    let most = 200 + 64 + usize::try_from(begin.elapsed().as_secs()).unwrap() + 1;
    assert!(got <= most, "{got} of {sent} in {:?}", begin.elapsed());
    port.set_rates(Rates::default()).unwrap();
    datagrams.send(0..10);
    wait_until("ten that are not limited", || {
        datagrams.send(500..501);
        datagrams.got().contains(&500)
    });
}
