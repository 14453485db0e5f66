//! Everything that `netsys` asks, asked of the running kernel. Needs root.
//!
//! Each test works in namespaces of its own, named `conet-t<pid>-<n>`, which are
//! removed when the test ends, also by a panic.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

use std::io::ErrorKind;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, panic, process};

use conet_netsys::{
    Fault, IfName, IpNet, Link, MacAddr, NetError, Netlink, Netns, NetnsName, Route, RouteKind,
    RouteScope, Sysctl, Veth,
};
use conet_testkit::privileged;

/// A named namespace that is deleted on drop.
struct Scratch {
    name: NetnsName,
    netns: Netns,
}

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = NetnsName::new(&format!("conet-t{}-{n}", process::id())).unwrap();
        let netns = Netns::create(&name).unwrap();
        Self { name, netns }
    }

    fn netlink(&self) -> Netlink {
        Netlink::open_in(&self.netns).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        assert!(Netns::delete(&self.name).unwrap());
        assert!(!Netns::delete(&self.name).unwrap(), "the second time there is nothing");
    }
}

fn ifname(s: &str) -> IfName {
    IfName::new(s).unwrap()
}

fn net(s: &str) -> IpNet {
    s.parse().unwrap()
}

fn addr(s: &str) -> IpAddr {
    s.parse().unwrap()
}

fn veth(name: &str, peer: &str) -> Veth<'static> {
    Veth {
        name: ifname(name),
        peer: ifname(peer),
        peer_netns: None,
        mtu: None,
        mac: None,
        peer_mac: None,
    }
}

fn names(netlink: &mut Netlink) -> Vec<String> {
    netlink.links().unwrap().iter().map(|l| l.name.to_string()).collect()
}

#[test]
fn a_named_namespace_is_what_ip_netns_makes() {
    privileged!();
    let scratch = Scratch::new();
    assert!(Netns::list().unwrap().contains(&scratch.name));
    assert!(Netns::exists(&scratch.name));
    let reopened = Netns::open(&scratch.name).unwrap();
    assert_eq!(reopened.id().unwrap(), scratch.netns.id().unwrap());
    assert_ne!(reopened.id().unwrap(), Netns::current().unwrap().id().unwrap());
    assert_eq!(
        Netns::of_process(process::id()).unwrap().id().unwrap(),
        Netns::current().unwrap().id().unwrap()
    );
    let error = Netns::create(&scratch.name).unwrap_err();
    assert!(error.is_exists(), "{error}");
    assert!(error.to_string().contains(scratch.name.as_str()), "{error}");
    assert!(error.remedy().is_some());

    let path = scratch.name.clone();
    let named = path.as_str().to_owned();
    drop(scratch);
    assert!(!Netns::list().unwrap().iter().any(|n| n.as_str() == named));
    let error = Netns::open(&path).unwrap_err();
    assert!(error.is_missing() && error.fault() == Fault::Caller, "{error}");
}

#[test]
fn a_rest_without_a_namespace_is_told_from_one_and_deleted() {
    privileged!();
    // What a crash between creating the file and mounting leaves behind.
    drop(Scratch::new());
    let name = NetnsName::new(&format!("conet-t{}-rest", process::id())).unwrap();
    fs::write(format!("{}/{name}", conet_netsys::NETNS_DIR), "").unwrap();
    assert!(!Netns::exists(&name));
    let error = Netns::open(&name).unwrap_err();
    assert!(Netns::delete(&name).unwrap());
    assert!(matches!(error, NetError::NotANamespace { .. }), "{error}");
}

#[test]
fn entering_lasts_until_the_guard_drops() {
    privileged!();
    let scratch = Scratch::new();
    let here = Netns::current().unwrap().id().unwrap();
    let inside = scratch.netns.id().unwrap();
    {
        let _guard = scratch.netns.enter().unwrap();
        assert_eq!(Netns::current().unwrap().id().unwrap(), inside);
    }
    assert_eq!(Netns::current().unwrap().id().unwrap(), here);
    let seen = scratch.netns.run(|| Netns::current().unwrap().id().unwrap()).unwrap();
    assert_eq!(seen, inside);
    assert_eq!(Netns::current().unwrap().id().unwrap(), here);

    // A panic inside reaches the caller, and the namespace is left.
    let caught = panic::catch_unwind(|| {
        let _guard = scratch.netns.enter().unwrap();
        panic::resume_unwind(Box::new("expected"));
    });
    assert!(caught.is_err());
    assert_eq!(Netns::current().unwrap().id().unwrap(), here);
    let caught = panic::catch_unwind(panic::AssertUnwindSafe(|| {
        scratch.netns.run(|| panic::resume_unwind(Box::new("expected")))
    }));
    assert!(caught.is_err());
}

#[test]
fn links_are_made_changed_and_deleted() {
    privileged!();
    let scratch = Scratch::new();
    let mut netlink = scratch.netlink();
    let mac: MacAddr = "02:00:0a:4d:01:02".parse().unwrap();
    let spec = Veth { mtu: Some(1400), mac: Some(mac), ..veth("conet-a", "conet-b") };
    netlink.add_veth(&spec).unwrap();
    let error = netlink.add_veth(&spec).unwrap_err();
    assert!(error.is_exists(), "{error}");
    assert!(error.to_string().starts_with("add veth conet-a: "), "{error}");
    assert!(error.to_string().contains("choose another name"), "{error}");

    let link: Link = netlink.link(ifname("conet-a")).unwrap().unwrap();
    assert_eq!((link.mtu, link.mac, link.up), (1400, Some(mac), false));
    assert_eq!(link.kind.as_deref(), Some("veth"));
    assert_eq!(netlink.index(ifname("conet-a")).unwrap(), link.index);
    let peer = netlink.link(ifname("conet-b")).unwrap().unwrap();
    assert_eq!((link.other_end, peer.other_end), (Some(peer.index), Some(link.index)));

    netlink.add_bridge(ifname("conet-br")).unwrap();
    netlink.set_master(ifname("conet-a"), Some(ifname("conet-br"))).unwrap();
    netlink.set_up(ifname("conet-a")).unwrap();
    netlink.set_up(ifname("conet-b")).unwrap();
    netlink.set_mtu(ifname("conet-b"), 1300).unwrap();
    let other: MacAddr = "02:00:0a:4d:01:03".parse().unwrap();
    netlink.set_mac(ifname("conet-b"), other).unwrap();
    let bridge = netlink.link(ifname("conet-br")).unwrap().unwrap();
    let a = netlink.link(ifname("conet-a")).unwrap().unwrap();
    let b = netlink.link(ifname("conet-b")).unwrap().unwrap();
    assert_eq!(a.master, Some(bridge.index));
    assert!(a.up && a.running);
    assert_eq!((b.mtu, b.mac), (1300, Some(other)));
    netlink.set_master(ifname("conet-a"), None).unwrap();
    assert_eq!(netlink.link(ifname("conet-a")).unwrap().unwrap().master, None);
    netlink.set_down(ifname("conet-b")).unwrap();
    netlink.rename(ifname("conet-b"), ifname("conet-c")).unwrap();
    assert_eq!(netlink.link(ifname("conet-b")).unwrap(), None);

    let all = names(&mut netlink);
    for name in ["lo", "conet-a", "conet-c", "conet-br"] {
        assert!(all.iter().any(|n| n == name), "{name} in {all:?}");
    }
    assert!(netlink.delete_link(ifname("conet-a")).unwrap());
    assert!(!netlink.delete_link(ifname("conet-a")).unwrap());
    assert_eq!(netlink.link(ifname("conet-c")).unwrap(), None, "its peer went with it");
    let error = netlink.set_up(ifname("conet-a")).unwrap_err();
    assert!(error.is_missing() && error.fault() == Fault::Caller, "{error}");
    let error = netlink.index(ifname("conet-a")).unwrap_err();
    assert_eq!(error.to_string(), "look up link: no link conet-a in this namespace");
}

/// What has no better route is refused.
fn routes_refuse(l: &mut Netlink, netns: &Netns) {
    let refused = Route::unreachable(net("10.9.11.0/24"), 4000);
    l.add_route(&refused).unwrap();
    l.replace_route(&refused).unwrap();
    assert!(l.routes().unwrap().iter().any(|r| r.destination == refused.destination
        && r.kind == RouteKind::Unreachable
        && r.metric == Some(4000)));
    let connect = || TcpStream::connect((addr("10.9.11.1"), 9)).unwrap_err();
    assert_eq!(netns.run(connect).unwrap().kind(), ErrorKind::HostUnreachable);
    let six = Route::unreachable(net("fd0b::/64"), 4000);
    l.replace_route(&six).unwrap();
    assert!(l.delete_route(&six).unwrap() && l.delete_route(&refused).unwrap());
    assert!(!l.delete_route(&refused).unwrap());
}

#[test]
fn addresses_and_routes_carry_a_connection_between_two_namespaces() {
    privileged!();
    let (left, right) = (Scratch::new(), Scratch::new());
    let (mut l, mut r) = (left.netlink(), right.netlink());
    l.add_veth(&Veth { peer_netns: Some(&right.netns), ..veth("conet-a", "conet-b") }).unwrap();
    for (netlink, link, v4, v6) in [
        (&mut l, "conet-a", "10.9.8.1/24", "fd09::1/64"),
        (&mut r, "conet-b", "10.9.8.2/24", "fd09::2/64"),
    ] {
        netlink.add_address(ifname(link), net(v4)).unwrap();
        netlink.add_address(ifname(link), net(v6)).unwrap();
        netlink.set_up(ifname(link)).unwrap();
        netlink.set_up(IfName::LOOPBACK).unwrap();
        assert!(netlink.add_address(ifname(link), net(v4)).unwrap_err().is_exists());
    }
    let found: Vec<IpNet> =
        l.addresses(Some(ifname("conet-a"))).unwrap().iter().map(|a| a.net).collect();
    assert!(found.contains(&net("10.9.8.1/24")) && found.contains(&net("fd09::1/64")), "{found:?}");
    assert!(l.addresses(None).unwrap().len() > found.len(), "loopback has addresses too");

    // An address behind the other namespace, reached by a route each way.
    r.add_address(IfName::LOOPBACK, net("10.9.9.9/32")).unwrap();
    let route = Route::via(net("10.9.9.0/24"), addr("10.9.8.2"));
    l.add_route(&route).unwrap();
    assert!(l.add_route(&route).unwrap_err().is_exists());
    l.replace_route(&Route { source: Some(addr("10.9.8.1")), ..route }).unwrap();
    let listed = l.routes().unwrap();
    let mine = listed.iter().find(|r| r.destination == net("10.9.9.0/24")).unwrap();
    assert_eq!(mine.gateway, Some(addr("10.9.8.2")));
    assert_eq!(mine.source, Some(addr("10.9.8.1")));
    assert_eq!(mine.link, Some(ifname("conet-a")));

    for (ip, port) in [("10.9.9.9", 0), ("fd09::2", 0)] {
        let listener = right.netns.run(|| TcpListener::bind((addr(ip), port)).unwrap()).unwrap();
        let at = listener.local_addr().unwrap();
        let client = left.netns.run(|| TcpStream::connect(at).unwrap()).unwrap();
        assert_eq!(listener.accept().unwrap().1, client.local_addr().unwrap());
    }

    assert!(l.delete_route(&route).unwrap());
    assert!(!l.delete_route(&route).unwrap());
    l.add_route(&Route::on_link(net("10.9.10.1/32"), ifname("conet-a"))).unwrap();
    let listed = l.routes().unwrap();
    let mine = listed.iter().find(|r| r.destination == net("10.9.10.1/32")).unwrap();
    assert_eq!((mine.scope, mine.gateway), (RouteScope::Link, None));
    let default = Route {
        link: Some(ifname("conet-a")),
        onlink: true,
        ..Route::default_via(addr("169.254.1.1"))
    };
    l.add_route(&default).unwrap();
    assert!(l.routes().unwrap().iter().any(|r| r.destination == net("0.0.0.0/0") && r.onlink));
    l.add_route(&Route::via(net("fd0a::/64"), addr("fd09::2"))).unwrap();
    assert!(l.routes().unwrap().iter().any(|r| r.destination == net("fd0a::/64")));
    let error = l.add_route(&Route::via(net("10.1.0.0/16"), addr("10.200.0.1"))).unwrap_err();
    // The default route makes every address reachable by some gateway, but no
    // gateway may lie behind another.
    assert_eq!(error.fault(), Fault::Caller, "{error}");

    routes_refuse(&mut l, &left.netns);
    assert!(l.delete_address(ifname("conet-a"), net("10.9.8.1/24")).unwrap());
    assert!(!l.delete_address(ifname("conet-a"), net("10.9.8.1/24")).unwrap());
}

#[test]
fn a_link_moves_and_a_permanent_neighbour_needs_no_arp() {
    privileged!();
    let (left, right) = (Scratch::new(), Scratch::new());
    let (mut l, mut r) = (left.netlink(), right.netlink());
    l.add_veth(&veth("conet-a", "conet-b")).unwrap();
    l.move_link(ifname("conet-b"), &right.netns).unwrap();
    assert_eq!(l.link(ifname("conet-b")).unwrap(), None);
    let mac = r.link(ifname("conet-b")).unwrap().unwrap().mac.unwrap();
    l.add_address(ifname("conet-a"), net("10.9.8.1/24")).unwrap();
    l.set_up(ifname("conet-a")).unwrap();
    l.set_neighbour(ifname("conet-a"), addr("10.9.8.2"), mac).unwrap();
    l.set_neighbour(ifname("conet-a"), addr("fd09::2"), mac).unwrap();
    let arp = left.netns.run(|| fs::read_to_string("/proc/thread-self/net/arp").unwrap()).unwrap();
    assert!(arp.contains("10.9.8.2") && arp.contains(&mac.to_string()), "{arp}");
}

#[test]
fn switches_belong_to_their_namespace() {
    privileged!();
    let scratch = Scratch::new();
    let before = Sysctl::Ipv4Forward.read().unwrap();
    scratch
        .netns
        .run(|| {
            assert_eq!(Sysctl::Ipv4Forward.read().unwrap(), "0");
            Sysctl::Ipv4Forward.write("1").unwrap();
            assert_eq!(Sysctl::Ipv4Forward.read().unwrap(), "1");
            for switch in [
                Sysctl::RpFilter(None),
                Sysctl::ProxyArp(Some(IfName::LOOPBACK)),
                Sysctl::SendRedirects(None),
                Sysctl::AcceptDad(None),
                Sysctl::DisableIpv6(Some(IfName::LOOPBACK)),
                Sysctl::Ipv6Forward,
            ] {
                switch.write("1").unwrap();
                assert_eq!(switch.read().unwrap(), "1", "{switch:?}");
            }
            Sysctl::PingGroupRange.write("0 100").unwrap();
            let error = Sysctl::RpFilter(Some(IfName::new("conet-x").unwrap())).write("1");
            let error = error.unwrap_err();
            assert!(error.is_missing(), "{error}");
            assert!(error.to_string().contains("conf/conet-x/rp_filter"), "{error}");
        })
        .unwrap();
    assert_eq!(Sysctl::Ipv4Forward.read().unwrap(), before);
}

#[test]
fn what_a_panicking_test_made_is_gone() {
    privileged!();
    let mut name = None;
    let caught = panic::catch_unwind(panic::AssertUnwindSafe(|| {
        let scratch = Scratch::new();
        name = Some(scratch.name.clone());
        scratch.netlink().add_veth(&veth("conet-a", "conet-b")).unwrap();
        panic::resume_unwind(Box::new("expected"));
    }));
    assert!(caught.is_err());
    assert!(!Netns::exists(&name.unwrap()));
}
