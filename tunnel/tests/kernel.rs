//! The tunnel as a whole in the running kernel: two namespaces joined by a veth
//! pair. Needs root and `/dev/net/tun`.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

mod common;

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use common::{MODES, config, ifname, inner, key, net, peer, transfer, wire};
use conet_netsys::{IpNet, Route, RouteKind};
use conet_testkit::{Need, privileged};
use conet_tunnel::{
    Config, DEFAULT_MTU, DEFAULT_PORT, Mode, Offloads, PeerConfig, StartError, TunnelError,
};

#[test]
fn a_tunnel_brings_its_device_and_routes_and_takes_them_away() {
    privileged!(Need::Tun);
    let [one, _two] = wire();
    let mut netlink = one.netlink();
    // IPv6 link-local routes come when the kernel is ready.
    let mut state = || {
        let links: Vec<_> = netlink.links().unwrap().iter().map(|l| l.name).collect();
        let mut routes = netlink.routes().unwrap();
        routes.retain(|r| matches!(r.destination, IpNet::V4(_)));
        (links, routes)
    };
    let before = state();
    let tunnel = one.start(config(1, Mode::WireGuard)).unwrap();
    let mut netlink = one.netlink();
    let device = netlink.link(ifname("conet0")).unwrap().unwrap();
    assert!(device.up);
    assert_eq!(device.mtu, u32::from(DEFAULT_MTU));
    assert_eq!(device.kind.as_deref(), Some("tun"));
    let routes = netlink.routes().unwrap();
    let route =
        routes.iter().find(|r| r.destination == net("10.77.2.0/24") && r.metric.is_none()).unwrap();
    assert_eq!((route.link, route.source), (Some(ifname("conet0")), Some(inner(1))));
    let snapshot = tunnel.snapshot().unwrap();
    assert_eq!(snapshot.listen.port(), DEFAULT_PORT);
    assert_eq!(snapshot.public_key, key(1).public());
    assert_eq!(snapshot.peers.len(), 1);
    assert!(tunnel.is_running());
    tunnel.stop();
    assert_eq!(state(), before);
}

#[test]
fn what_cannot_start_says_why_and_leaves_nothing() {
    privileged!(Need::Tun);
    let [one, _two] = wire();
    let mut netlink = one.netlink();
    let running = one.start(config(1, Mode::WireGuard)).unwrap();
    let elsewhere = SocketAddr::from(([0, 0, 0, 0], 4444));
    let busy = Config { listen: elsewhere, ..config(1, Mode::WireGuard) };
    let error = one.start(busy).unwrap_err();
    assert!(matches!(error, StartError::Device { .. }), "{error:?}");
    let taken = Config { device: ifname("conet1"), ..config(1, Mode::WireGuard) };
    let error = one.start(taken).unwrap_err();
    assert!(matches!(error, StartError::Listen { .. }), "{error:?}");
    let looping = {
        let mut config = config(1, Mode::WireGuard);
        config.peers[0].allowed.push(net("192.0.0.0/8"));
        config
    };
    let error = one.start(looping).unwrap_err();
    assert!(matches!(error, StartError::Peer(_)), "{error:?}");
    assert!(error.to_string().contains("192.0.0.0/8"), "{error}");
    assert_eq!(netlink.link(ifname("conet1")).unwrap(), None);
    // The first one is not concerned.
    running.snapshot().unwrap();
}

#[test]
fn peers_change_while_it_runs() {
    privileged!(Need::Tun);
    let ends = wire();
    let [one, two] = &ends;
    let tunnels = [
        one.start(config(1, Mode::WireGuard)).unwrap(),
        two.start(config(2, Mode::WireGuard)).unwrap(),
    ];
    transfer(one, two, inner(2), 1);
    for mode in [Mode::IpIp, Mode::IpUdp, Mode::WireGuard] {
        tunnels[0].set_mode(key(2).public(), mode).unwrap();
        tunnels[1].set_mode(key(1).public(), mode).unwrap();
        transfer(one, two, inner(2), 1);
        assert_eq!(tunnels[0].snapshot().unwrap().peers[0].mode, mode);
    }
    let mut netlink = one.netlink();
    let mut routed = |prefix: &str| {
        netlink.routes().unwrap().iter().any(|route| route.destination == net(prefix))
    };
    tunnels[0]
        .set_allowed(key(2).public(), vec![net("10.77.2.0/25"), net("10.99.0.0/16")])
        .unwrap();
    assert!(routed("10.77.2.0/25") && routed("10.99.0.0/16") && !routed("10.77.2.0/24"));
    tunnels[0].add_peer(peer(3, Mode::IpIp)).unwrap();
    assert!(routed("10.77.3.0/24"));
    let error = tunnels[0].add_peer(peer(3, Mode::IpIp)).unwrap_err();
    assert!(matches!(error, TunnelError::Peer(_)), "{error}");
    tunnels[0].remove_peer(key(3).public()).unwrap();
    assert!(!routed("10.77.3.0/24"));
    transfer(one, two, inner(2), 1);
}

/// Each switch by itself, against an end that has the others.
#[test]
fn without_offloads_it_works_too() {
    privileged!(Need::Tun);
    let none = Offloads::NONE;
    let ends = [
        [none, none],
        [Offloads { device: true, ..none }, Offloads { send: true, receive: true, ..none }],
        [Offloads { send: true, ..none }, Offloads { device: true, receive: true, ..none }],
        [Offloads { receive: true, ..none }, Offloads { device: true, send: true, ..none }],
        [none, Offloads::ALL],
    ];
    for mode in MODES {
        for offloads in ends {
            let [one, two] = wire();
            let with = |n, offloads| Config { offloads, ..config(n, mode) };
            let tunnels = [
                one.start(with(1, offloads[0])).unwrap(),
                two.start(with(2, offloads[1])).unwrap(),
            ];
            let there = transfer(&one, &two, inner(2), 4);
            let back = transfer(&two, &one, inner(1), 4);
            println!("{mode}, {offloads:?}: {there:.0} and {back:.0} Mb/s");
            for tunnel in tunnels {
                let snapshot = tunnel.snapshot().unwrap();
                assert_eq!(snapshot.peers[0].drops.total() + snapshot.drops.total(), 0);
            }
        }
    }
}

#[test]
fn a_deleted_device_ends_the_tunnel() {
    privileged!(Need::Tun);
    let [one, _two] = wire();
    let tunnel = one.start(config(1, Mode::WireGuard)).unwrap();
    assert!(one.netlink().delete_link(ifname("conet0")).unwrap());
    let began = Instant::now();
    while tunnel.is_running() {
        assert!(began.elapsed() < Duration::from_secs(5));
        thread::sleep(Duration::from_millis(10));
    }
    assert!(matches!(tunnel.snapshot().unwrap_err(), TunnelError::Stopped));
}

/// As when the process is killed: the device and its routes are gone, and the
/// host has a default route that would take the packets in clear.
#[test]
fn without_its_device_no_packet_takes_another_way() {
    privileged!(Need::Tun);
    let [one, two] = wire();
    let mut netlink = one.netlink();
    netlink.add_route(&Route::default_via(IpAddr::from([192, 0, 2, 2]))).unwrap();
    let tunnel = one.start(config(1, Mode::WireGuard)).unwrap();
    let connect = |to: IpAddr| {
        let patience = Duration::from_millis(200);
        one.run(|| TcpStream::connect_timeout(&(to, 9).into(), patience).unwrap_err().kind())
    };
    netlink.set_down(ifname("conet0")).unwrap();
    assert_eq!(connect(inner(2)), ErrorKind::HostUnreachable);
    // What is no peer's goes its way as before: the neighbour says that it has
    // no such route.
    assert_ne!(connect(IpAddr::from([10, 78, 0, 1])), ErrorKind::HostUnreachable);
    tunnel.stop();
    assert!(!netlink.routes().unwrap().iter().any(|r| r.kind == RouteKind::Unreachable));
    drop(two);
}

/// Datagrams to the open port and packets to the raw sockets, of every length
/// that a LAN carries, while a session is up.
#[test]
fn garbage_from_the_lan_does_not_disturb() {
    privileged!(Need::Tun);
    for mode in MODES {
        let [one, two] = wire();
        let tunnels = [one.start(config(1, mode)).unwrap(), two.start(config(2, mode)).unwrap()];
        transfer(&one, &two, inner(2), 1);
        let socket = one.run(|| UdpSocket::bind("192.0.2.1:0").unwrap());
        let to = SocketAddr::from(([192, 0, 2, 2], DEFAULT_PORT));
        for len in 0..1473 {
            let mut bytes = vec![0xa5; len];
            if let Some(start) = bytes.first_chunk_mut() {
                // Data for session number 0 of peer 0, which may exist.
                *start = [4, 0, 0, 0, 1, 0, 0, 0];
            }
            socket.send_to(&bytes, to).unwrap();
        }
        transfer(&one, &two, inner(2), 1);
        let snapshot = tunnels[1].snapshot().unwrap();
        let counted = snapshot.drops.total() + snapshot.peers[0].drops.total();
        assert!(counted > 1000, "{mode} {snapshot:?}");
    }
}

/// A router between the two whose far link takes 1280 bytes, and which says so.
#[test]
fn a_hop_of_1280_bytes_is_found_and_told() {
    privileged!(Need::Tun);
    let no_kernel = Offloads { kernel: false, ..Offloads::ALL };
    let ways = MODES.map(|mode| (mode, Offloads::ALL)).into_iter();
    for (mode, offloads) in ways.chain([(Mode::IpIp, no_kernel)]) {
        let [one, two, _router] = common::routed(1280);
        let far = |n| {
            let endpoint = Some(SocketAddr::from(([198, 51, 100, 2], DEFAULT_PORT)));
            PeerConfig { endpoint, ..peer(n, mode) }
        };
        let near = Config { peers: vec![far(2)], offloads, ..config(1, mode) };
        let tunnels =
            [one.start(near).unwrap(), two.start(Config { offloads, ..config(2, mode) }).unwrap()];
        if mode == Mode::IpIp && offloads.kernel && common::kernel_carries() {
            common::carried(&[&one, &two], &tunnels);
        }
        // Large segments are lost until the router has spoken.
        let rate = transfer(&one, &two, inner(2), 4);
        let back = transfer(&two, &one, inner(1), 4);
        println!("{mode} over 1280 bytes: {rate:.0} and {back:.0} Mb/s");
        // What may not be dropped comes through in fragments.
        let receiver = two.run(|| UdpSocket::bind((inner(2), 0)).unwrap());
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let sender = one.run(|| UdpSocket::bind((inner(1), 0)).unwrap());
        rustix::net::sockopt::set_ip_mtu_discover(
            &sender,
            rustix::net::sockopt::Ipv4PathMtuDiscovery::DONT,
        )
        .unwrap();
        let sent: Vec<u8> = (0..1380u16).map(|byte| byte.to_le_bytes()[0]).collect();
        let to = receiver.local_addr().unwrap();
        // The way is asked about while it is used.
        let began = Instant::now();
        while tunnels[0].snapshot().unwrap().peers[0].path_mtu != 1280 {
            assert!(began.elapsed() < Duration::from_secs(10), "{mode}: not known");
            sender.send_to(b"small", to).unwrap();
            receiver.recv(&mut [0; 9]).unwrap();
            thread::sleep(Duration::from_millis(100));
        }
        sender.send_to(&sent, to).unwrap();
        let mut got = [0; 2000];
        let (len, _) = receiver.recv_from(&mut got).unwrap();
        assert_eq!(got[..len], sent, "{mode}");
    }
}

#[test]
fn the_outer_network_may_be_ipv6_and_the_inner_one_too() {
    privileged!(Need::Tun);
    for mode in [Mode::WireGuard, Mode::IpUdp] {
        let ends = wire();
        for (n, end) in (1..).zip(&ends) {
            let mut netlink = end.netlink();
            netlink.add_address(ifname("eth0"), net(&format!("2001:db8::{n}/64"))).unwrap();
        }
        let over_v6 = |n: u16| {
            let small = u8::try_from(n).unwrap();
            let other = 3 - n;
            let at = format!("[2001:db8::{other}]:{DEFAULT_PORT}").parse().unwrap();
            let mut peer = PeerConfig { endpoint: Some(at), ..peer(3 - small, mode) };
            peer.allowed.push(net(&format!("fd77:{other}::/32")));
            let mut addresses = config(small, mode).addresses;
            addresses.push(net(&format!("fd77:{n}::1/128")));
            let listen = SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, DEFAULT_PORT));
            Config { addresses, listen, peers: vec![peer], ..config(small, mode) }
        };
        let [one, two] = &ends;
        // Addresses are tentative for a moment (RFC 4862 §5.4).
        let patience = Instant::now();
        let mut tunnels = Vec::new();
        for (n, end) in [(1, one), (2, two)] {
            loop {
                match end.start(over_v6(n)) {
                    Ok(tunnel) => break tunnels.push(tunnel),
                    Err(error) => assert!(patience.elapsed() < Duration::from_secs(5), "{error}"),
                }
                thread::sleep(Duration::from_millis(100));
            }
        }
        transfer(one, two, inner(2), 4);
        transfer(two, one, "fd77:1::1".parse().unwrap(), 4);
        let snapshot = tunnels[0].snapshot().unwrap();
        assert!(snapshot.peers[0].endpoint.unwrap().is_ipv6());
        assert!(snapshot.peers[0].rx_bytes > 4 << 20, "{snapshot:?}");
    }
}
