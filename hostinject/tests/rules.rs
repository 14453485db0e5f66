//! One host with guests and a LAN, in the running kernel: what its packet filter does
//! for guests. Needs root.
//!
//! ```text
//!   guest a 10.77.1.2, fd00:1::2 ┐
//!   guest b 10.77.1.3, fd00:1::3 ┴ host 192.0.2.1, 2001:db8::1 ─ lan 192.0.2.9, 2001:db8::9
//! ```
//!
//! The LAN knows no way to the guests' addresses.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use conet_dataplane::DropReason;
use conet_hostinject::{
    GuestLink, GuestPort, GuestSpec, HostPorts, HostRules, PortForward, PortKind, Ports, Rates,
    RuleTable,
};
use conet_netsys::{IfName, IpNet, Netlink, Netns, NetnsName, Sysctl, Transport, Veth};
use conet_testkit::{Need, privileged};

static SCENE: AtomicU32 = AtomicU32::new(0);
static TURN: Mutex<()> = Mutex::new(());
/// Long enough for a busy machine.
const LIMIT: Duration = Duration::from_secs(20);
/// IPv4 and IPv6.
const FAMILIES: [bool; 2] = [true, false];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn ifname(name: &str) -> IfName {
    IfName::new(name).unwrap()
}

fn host(ipv4: bool) -> IpAddr {
    ip(if ipv4 { "192.0.2.1" } else { "2001:db8::1" })
}

fn server(ipv4: bool) -> IpAddr {
    ip(if ipv4 { "192.0.2.9" } else { "2001:db8::9" })
}

fn guest(number: u8, ipv4: bool) -> IpAddr {
    match ipv4 {
        true => IpAddr::from([10, 77, 1, number + 1]),
        false => ip(&format!("fd00:1::{}", number + 1)),
    }
}

struct Scene {
    host: Netns,
    lan: Netns,
    guests: Vec<GuestPort>,
    names: Vec<NetnsName>,
    _turn: MutexGuard<'static, ()>,
}

impl Scene {
    fn new(kind: PortKind) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let number = SCENE.fetch_add(1, Ordering::Relaxed);
        let name = |what| {
            NetnsName::new(&format!("conet-t{}-r{number}{what}", std::process::id())).unwrap()
        };
        let names: Vec<_> = ["host", "lan", "a", "b"].map(name).to_vec();
        let host = Netns::create(&names[0]).unwrap();
        let lan = Netns::create(&names[1]).unwrap();
        let mut at_host = Netlink::open_in(&host).unwrap();
        let (mac, peer_mac, mtu) = (None, None, None);
        let (eth0, peer_netns) = (ifname("eth0"), Some(&lan));
        let pair = Veth { name: eth0, peer: eth0, peer_netns, mtu, mac, peer_mac };
        at_host.add_veth(&pair).unwrap();
        for (netns, last) in [(&host, 1), (&lan, 9)] {
            netns.run(|| Sysctl::AcceptDad(Some(eth0)).write("0").unwrap()).unwrap();
            let mut netlink = Netlink::open_in(netns).unwrap();
            netlink.set_up(IfName::LOOPBACK).unwrap();
            netlink.add_address(eth0, format!("192.0.2.{last}/24").parse().unwrap()).unwrap();
            netlink.add_address(eth0, format!("2001:db8::{last}/64").parse().unwrap()).unwrap();
            netlink.set_up(eth0).unwrap();
        }
        let mut scene = Self { host, lan, guests: Vec::new(), names, _turn: turn };
        for (number, link) in [(1, "a"), (2, "b")] {
            let spec = GuestSpec {
                name: scene.names[1 + usize::from(number)].clone(),
                host_link: ifname(link),
                guest_link: eth0,
                addresses: FAMILIES.map(|ipv4| guest(number, ipv4)).to_vec(),
                gateways: vec![ip("10.77.1.1"), ip("fd00:1::1")],
                rates: Rates::default(),
                prefix: 24,
                dns: Vec::new(),
                mtu: 1420,
                mac: None,
                kind,
                server: None,
                queues: 1,
            };
            let port = scene.host.run(|| GuestPort::attach(spec).unwrap()).unwrap();
            // An address of a guest's that is still being probed cannot be used.
            port.netns().unwrap().run(|| await_ipv6(guest(number, false))).unwrap();
            scene.host.run(|| await_ipv6(ip("fd00:1::1"))).unwrap();
            scene.guests.push(port);
        }
        scene
    }

    fn rules(&self) -> RuleTable {
        RuleTable::open_in(&self.host).unwrap()
    }

    fn nft(&self, arguments: &[&str]) -> String {
        let run = || Command::new("nft").args(arguments).output().unwrap();
        let output = self.host.run(run).unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Links, addresses and routes of the host.
    fn interfaces(&self) -> String {
        let mut netlink = Netlink::open_in(&self.host).unwrap();
        let links: Vec<_> = netlink.links().unwrap();
        let addresses = netlink.addresses(None).unwrap();
        let routes = netlink.routes().unwrap();
        format!("{links:?} {addresses:?} {routes:?}")
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        for name in &self.names {
            Netns::delete(name).unwrap();
        }
    }
}

/// Waits until an address of the calling thread's namespace can be used.
fn await_ipv6(address: IpAddr) {
    let began = std::time::Instant::now();
    while UdpSocket::bind((address, 0)).is_err() {
        assert!(began.elapsed() < LIMIT, "{address} cannot be used");
        thread::sleep(Duration::from_millis(20));
    }
}

fn behind((link, number): (&str, u8)) -> GuestLink {
    GuestLink { link: ifname(link), addresses: FAMILIES.map(|ipv4| guest(number, ipv4)).to_vec() }
}

fn shared() -> HostRules {
    HostRules {
        guests: [("a", 1), ("b", 2)].map(behind).to_vec(),
        tunnel: ifname("conet0"),
        overlays: vec!["10.77.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
        shared_address: true,
        host_ports: HostPorts::Only(Vec::new()),
        forwards: Vec::new(),
    }
}

fn forward(transport: Transport, ports: (u16, u16), to: IpAddr, to_first: u16) -> PortForward {
    let ports = Ports { transport, first: ports.0, last: ports.1 };
    PortForward { bind: None, ports, to, to_first }
}

/// Answers each connection with the address that it came from.
fn mirror(listener: &TcpListener, times: usize) {
    for _ in 0..times {
        let (mut stream, peer) = listener.accept().unwrap();
        // Whom a client gave up on is no failure of the mirror.
        stream.write_all(peer.ip().to_canonical().to_string().as_bytes()).ok();
    }
}

fn listen(netns: &Netns, port: u16) -> TcpListener {
    netns.run(|| TcpListener::bind(("::", port)).unwrap()).unwrap()
}

/// Whom a mirror at `to` takes `from` for.
#[track_caller]
fn seen_as(from: &Netns, to: (IpAddr, u16)) -> IpAddr {
    let ask = || {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from(to), LIMIT).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        ip(&text)
    };
    from.run(ask).unwrap()
}

/// Asks a mirror in `at` that listens on `port`, from `from`, by `to`.
#[track_caller]
fn mirrored(at: &Netns, port: u16, from: &Netns, to: (IpAddr, u16)) -> IpAddr {
    let listener = listen(at, port);
    thread::scope(|scope| {
        let mirror = scope.spawn(|| mirror(&listener, 1));
        let seen = seen_as(from, to);
        mirror.join().unwrap();
        seen
    })
}

/// The same by UDP, the answer from where the question went.
#[track_caller]
fn udp_mirrored(at: &Netns, port: u16, from: &Netns, to: (IpAddr, u16)) -> IpAddr {
    let socket = at.run(|| UdpSocket::bind(("::", port)).unwrap()).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let unspecified = if to.0.is_ipv4() { "0.0.0.0" } else { "::" };
    let client = from.run(|| UdpSocket::bind((unspecified, 0)).unwrap()).unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    client.connect(to).unwrap();
    client.send(b"who am I?").unwrap();
    let mut buffer = [0; 64];
    let (_, peer) = socket.recv_from(&mut buffer).unwrap();
    socket.send_to(peer.ip().to_canonical().to_string().as_bytes(), peer).unwrap();
    let length = client.recv(&mut buffer).unwrap();
    ip(std::str::from_utf8(&buffer[..length]).unwrap())
}

fn pings(from: &Netns, to: IpAddr) -> bool {
    let to = to.to_string();
    let run = || Command::new("ping").args(["-c", "2", "-i", "0.1", "-W", "5", &to]).output();
    from.run(run).unwrap().unwrap().status.success()
}

#[test]
fn guests_have_their_hosts_address_on_the_lan() {
    privileged!(Need::Tun, Need::Program("ping"));
    for kind in [PortKind::Veth, PortKind::Tap] {
        let scene = Scene::new(kind);
        let (a, b) = (scene.guests[0].netns().unwrap(), scene.guests[1].netns().unwrap());
        assert!(!pings(a, server(true)), "the LAN knows no way back without it");
        let mut rules = scene.rules();
        rules.apply(&shared()).unwrap();
        for ipv4 in FAMILIES {
            assert!(pings(a, server(ipv4)));
            assert_eq!(mirrored(&scene.lan, 8000, a, (server(ipv4), 8000)), host(ipv4));
            assert_eq!(udp_mirrored(&scene.lan, 8001, b, (server(ipv4), 8001)), host(ipv4));
            // Among each other they have their own.
            assert_eq!(mirrored(a, 8002, b, (guest(1, ipv4), 8002)), guest(2, ipv4));
            assert_eq!(mirrored(a, 8003, &scene.host, (guest(1, ipv4), 8003)), {
                ip(if ipv4 { "10.77.1.1" } else { "fd00:1::1" })
            });
        }
    }
}

#[test]
fn ports_of_the_host_lead_to_guests() {
    privileged!(Need::Tun);
    for kind in [PortKind::Veth, PortKind::Tap] {
        let scene = Scene::new(kind);
        let (a, b) = (scene.guests[0].netns().unwrap(), scene.guests[1].netns().unwrap());
        let mut rules = scene.rules();
        let mut wanted = shared();
        for ipv4 in FAMILIES {
            let to = guest(1, ipv4);
            wanted.forwards.extend([
                forward(Transport::Tcp, (2222, 2222), to, 22),
                forward(Transport::Tcp, (8000, 8010), to, 8000),
                forward(Transport::Tcp, (9000, 9999), to, 19_000),
                forward(Transport::Udp, (5353, 5354), to, 53),
                PortForward {
                    bind: Some(host(ipv4)),
                    ..forward(Transport::Tcp, (7000, 7000), to, 7000)
                },
            ]);
        }
        rules.apply(&wanted).unwrap();
        for ipv4 in FAMILIES {
            let at = host(ipv4);
            for (port, inside) in [(2222, 22), (8000, 8000), (8010, 8010), (9876, 19_876)] {
                assert_eq!(mirrored(a, inside, &scene.lan, (at, port)), server(ipv4), "{port}");
            }
            assert_eq!(mirrored(a, 7000, &scene.lan, (at, 7000)), server(ipv4));
            assert_eq!(udp_mirrored(a, 54, &scene.lan, (at, 5354)), server(ipv4));
            // The host itself, another guest, and the guest itself, by the same address.
            assert_eq!(mirrored(a, 22, &scene.host, (at, 2222)), at);
            assert_eq!(udp_mirrored(a, 53, &scene.host, (at, 5353)), at);
            assert_eq!(mirrored(a, 22, b, (at, 2222)), guest(2, ipv4));
            let gateway = ip(if ipv4 { "10.77.1.1" } else { "fd00:1::1" });
            assert_eq!(mirrored(a, 22, a, (at, 2222)), gateway);
            assert_eq!(mirrored(a, 22, b, (gateway, 2222)), guest(2, ipv4));
            // The bound one leads nowhere from another of the host's addresses, nor
            // does a port beside the range.
            for (to, port) in [(gateway, 7000), (at, 8011), (at, 7999)] {
                let refused = || TcpStream::connect_timeout(&(to, port).into(), LIMIT);
                scene.host.run(refused).unwrap().unwrap_err();
            }
        }
        // A connection outlives the change of rules, and the removal.
        let listener = listen(a, 22);
        let connect = || TcpStream::connect((host(true), 2222)).unwrap();
        let mut far = scene.lan.run(connect).unwrap();
        let (mut near, _) = listener.accept().unwrap();
        rules.apply(&shared()).unwrap();
        assert!(rules.remove().unwrap() && !rules.remove().unwrap());
        near.set_read_timeout(Some(LIMIT)).unwrap();
        let mut byte = [0];
        rules.apply(&wanted).unwrap();
        far.write_all(&[7]).unwrap();
        near.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [7]);
    }
}

#[test]
fn ten_thousand_short_connections_lose_none() {
    privileged!(Need::Tun);
    let scene = Scene::new(PortKind::Veth);
    let a = scene.guests[0].netns().unwrap();
    let mut rules = scene.rules();
    let to_guest = forward(Transport::Tcp, (2222, 2222), guest(1, true), 22);
    rules.apply(&HostRules { forwards: vec![to_guest], ..shared() }).unwrap();
    let out = (&scene.lan, 8000, a, server(true), 8000, host(true));
    let inwards = (a, 22, &scene.lan, host(true), 2222, server(true));
    for (at, port, from, to, by, seen) in [out, inwards] {
        let listener = listen(at, port);
        thread::scope(|scope| {
            // Four askers, who wait for each answer; every port is asked for once.
            let mirror = scope.spawn(|| mirror(&listener, 10_000));
            let askers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| (0..2500).filter(|_| seen_as(from, (to, by)) == seen).count())
                })
                .collect();
            let answered: usize = askers.into_iter().map(|asker| asker.join().unwrap()).sum();
            assert_eq!(answered, 10_000);
            mirror.join().unwrap();
        });
    }
}

#[test]
fn a_guest_reaches_of_its_host_what_it_is_told() {
    privileged!(Need::Tun, Need::Program("ping"));
    for kind in [PortKind::Veth, PortKind::Tap] {
        let scene = Scene::new(kind);
        let a = scene.guests[0].netns().unwrap();
        let mut rules = scene.rules();
        let open = Ports { transport: Transport::Tcp, first: 8000, last: 8001 };
        let only = HostRules { host_ports: HostPorts::Only(vec![open]), ..shared() };
        let gateway = |ipv4| ip(if ipv4 { "10.77.1.1" } else { "fd00:1::1" });
        rules.apply(&only).unwrap();
        let closed = [8002, 7999].map(|port| listen(&scene.host, port));
        for ipv4 in FAMILIES {
            for address in [host(ipv4), gateway(ipv4)] {
                assert!(pings(a, address));
                assert_eq!(mirrored(&scene.host, 8001, a, (address, 8001)), guest(1, ipv4));
                for closed in &closed {
                    let to = SocketAddr::new(address, closed.local_addr().unwrap().port());
                    let refused = a.run(|| TcpStream::connect_timeout(&to, LIMIT)).unwrap();
                    let kind = refused.unwrap_err().kind();
                    assert_ne!(kind, ErrorKind::TimedOut, "it is told");
                    // Others reach it, and so does the host what is in the guest.
                    scene.lan.run(|| drop(TcpStream::connect((host(ipv4), to.port())))).unwrap();
                }
            }
            assert_eq!(mirrored(a, 9000, &scene.host, (guest(1, ipv4), 9000)), gateway(ipv4));
        }
        // Also where the guest lies about its source, and the host does not look.
        scene.host.run(|| Sysctl::RpFilter(None).write("2").unwrap()).unwrap();
        let spoofed = "192.0.2.77/32".parse().unwrap();
        let mut netlink = Netlink::open_in(a).unwrap();
        netlink.add_address(ifname("eth0"), spoofed).unwrap();
        let udp = scene.host.run(|| UdpSocket::bind((host(true), 8002)).unwrap()).unwrap();
        let liar = a.run(|| UdpSocket::bind(("192.0.2.77", 0)).unwrap()).unwrap();
        for _ in 0..3 {
            liar.send_to(b"x", (host(true), 8002)).unwrap();
        }
        udp.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        assert!(udp.recv_from(&mut [0; 8]).is_err());

        rules.apply(&HostRules { host_ports: HostPorts::All, ..shared() }).unwrap();
        drop(closed);
        assert_eq!(mirrored(&scene.host, 8002, a, (host(true), 8002)), guest(1, true));
    }
}

/// Sends three datagrams from `source`, which the guest takes for one of its own.
fn lie(guest: &Netns, source: IpAddr, to: (IpAddr, u16)) {
    let mut netlink = Netlink::open_in(guest).unwrap();
    let lied = IpNet::from(source);
    netlink.add_address(ifname("eth0"), lied).unwrap();
    let liar = guest.run(|| {
        await_ipv6(source);
        UdpSocket::bind((source, 0)).unwrap()
    });
    let liar = liar.unwrap();
    for _ in 0..3 {
        liar.send_to(b"lie", to).unwrap();
    }
    netlink.delete_address(ifname("eth0"), lied).unwrap();
}

/// What was sent to a socket until something honest came from `honest`.
fn heard(socket: &UdpSocket, honest: IpAddr) -> Vec<IpAddr> {
    let mut liars = Vec::new();
    loop {
        let mut text = [0; 8];
        let (length, from) = socket.recv_from(&mut text).unwrap();
        match &text[..length] {
            b"honest" => {
                assert_eq!(from.ip().to_canonical(), honest);
                return liars;
            }
            _ => liars.push(from.ip().to_canonical()),
        }
    }
}

#[test]
fn no_guest_is_another_whatever_its_host_is_set_to() {
    privileged!(Need::Tun);
    for kind in [PortKind::Veth, PortKind::Tap] {
        let scene = Scene::new(kind);
        // Sources are looked at loosely, and those of IPv6 not at all.
        scene.host.run(|| Sysctl::RpFilter(None).write("2").unwrap()).unwrap();
        let a = scene.guests[0].netns().unwrap();
        let mut rules = scene.rules();
        let mut open = HostRules { host_ports: HostPorts::All, ..shared() };
        let places = |ipv4| {
            [(&scene.lan, server(ipv4)), (&scene.host, host(ipv4))].map(|(netns, address)| {
                let socket = netns.run(|| UdpSocket::bind((address, 9)).unwrap()).unwrap();
                socket.set_read_timeout(Some(LIMIT)).unwrap();
                (socket, address)
            })
        };
        let tell = |ipv4, with_rules: bool| -> usize {
            let lies = [guest(2, ipv4), ip(if ipv4 { "192.0.2.77" } else { "2001:db8::77" })];
            let own = a.run(|| UdpSocket::bind((guest(1, ipv4), 0)).unwrap()).unwrap();
            let heard = places(ipv4).map(|(socket, to)| {
                // Nothing waits for a neighbour to be found then.
                own.send_to(b"honest", (to, 9)).unwrap();
                let seen = |socket: &UdpSocket| match with_rules && to == server(ipv4) {
                    true => heard(socket, host(ipv4)),
                    false => heard(socket, guest(1, ipv4)),
                };
                seen(&socket);
                for source in lies {
                    lie(a, source, (to, 9));
                }
                own.send_to(b"honest", (to, 9)).unwrap();
                seen(&socket).len()
            });
            heard.iter().sum()
        };
        let by_veth = kind == PortKind::Veth;
        // A kernel's own checks are what there was before: they let some of it pass.
        assert_eq!(tell(false, false), if by_veth { 12 } else { 0 });
        for ipv4 in FAMILIES {
            rules.apply(&open).unwrap();
            assert_eq!(tell(ipv4, true), 0, "{kind:?}");
        }
        let spoofed = rules.spoofed().unwrap();
        assert_eq!(spoofed["b"], 0);
        if !by_veth {
            // Its port refused it before.
            assert_eq!(spoofed["a"], 0);
            assert!(scene.guests[0].drops()[DropReason::SourceNotAllowed] >= 24);
            continue;
        }
        assert!(spoofed["a"] >= 24, "{spoofed:?}");
        // Counts go over to other rules, and to who comes next.
        open.shared_address = false;
        rules.apply(&open).unwrap();
        drop(rules);
        let mut rules = scene.rules();
        assert_eq!(rules.spoofed().unwrap(), spoofed);
        open.guests.remove(0);
        rules.apply(&open).unwrap();
        assert_eq!(rules.spoofed().unwrap().into_keys().collect::<Vec<_>>(), ["b"]);
    }
}

/// More counters than one answer of the kernel's holds, and sets than one message.
#[test]
fn a_thousand_guests_are_checked_and_counted_each() {
    privileged!();
    let scene = Scene::new(PortKind::Veth);
    let many = (0..1500u16).map(|number| {
        let [high, low] = number.to_be_bytes();
        let addresses =
            vec![IpAddr::from([10, 78, high, low]), ip(&format!("fd78::{:x}", number + 2))];
        GuestLink { link: ifname(&format!("guest-{number}")), addresses }
    });
    let mut all = shared();
    all.guests.extend(many);
    let mut rules = scene.rules();
    rules.apply(&all).unwrap();
    let spoofed = rules.spoofed().unwrap();
    assert_eq!(spoofed.len(), 1502);
    assert_eq!(spoofed["guest-1499"], 0);
    let a = scene.guests[0].netns().unwrap();
    assert!(pings(a, server(true)) && pings(a, server(false)));
    assert_eq!(rules.spoofed().unwrap()["a"], 0);
    rules.apply(&shared()).unwrap();
    assert_eq!(rules.spoofed().unwrap().len(), 2);
}

#[test]
fn rules_go_without_a_trace_and_outlive_who_made_them() {
    privileged!(Need::Program("nft"));
    let scene = Scene::new(PortKind::Veth);
    scene.nft(&["add", "table", "inet", "somebodys"]);
    let before = (scene.nft(&["list", "ruleset"]), scene.interfaces());
    let mut rules = scene.rules();
    let mut wanted = shared();
    wanted.forwards.push(forward(Transport::Udp, (1, 4096), guest(1, true), 2));
    rules.apply(&wanted).unwrap();
    let listed = scene.nft(&["list", "ruleset"]);
    for said in [
        "table inet conet {",
        "hook postrouting priority srcnat",
        "masquerade",
        "iifname @guests",
        "iifname . ip6 saddr @sources6 accept",
        "hook prerouting priority raw",
    ] {
        assert!(listed.contains(said), "{said}: {listed}");
    }
    rules.apply(&shared()).unwrap();
    assert!(!scene.nft(&["list", "ruleset"]).contains("dnat"));
    // Its maker dies, and another finds it and makes it its own.
    drop(rules);
    assert!(scene.nft(&["list", "ruleset"]).contains("masquerade"));
    let mut rules = scene.rules();
    rules.apply(&wanted).unwrap();
    rules.apply(&wanted).unwrap();
    assert!(rules.remove().unwrap());
    assert_eq!((scene.nft(&["list", "ruleset"]), scene.interfaces()), before);
    // What needs no table makes none, and removes one.
    rules.apply(&shared()).unwrap();
    drop(rules);
    let none = HostRules {
        guests: Vec::new(),
        shared_address: false,
        host_ports: HostPorts::All,
        ..shared()
    };
    scene.rules().apply(&none).unwrap();
    assert_eq!((scene.nft(&["list", "ruleset"]), scene.interfaces()), before);
}
