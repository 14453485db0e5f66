//! Bulk and calls over real sockets in network namespaces: a device of 1280 bytes, and a path
//! that swallows what is longer without a word.

use conet_netsys::{IfName, Netlink, Netns, NetnsName, Veth};
use conet_testkit::privileged;
use conet_transport::direct::{Direct, Wait};
use conet_transport::session::handshake::PrivateKey;
use conet_transport::session::{Event, HubConfig, Lane};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
const THERE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));
const PATIENCE: Duration = Duration::from_secs(60);
const PAYLOAD: usize = 2 << 20;

/// A namespace that goes with the test.
struct Named(NetnsName, Netns);

impl Named {
    fn new(what: &str) -> Self {
        let name = NetnsName::new(&format!("conet-{what}-{}", std::process::id())).expect("name");
        let netns = Netns::create(&name).expect("a namespace");
        Self(name, netns)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        Netns::delete(&self.0).ok();
    }
}

/// Two namespaces, joined by a veth pair whose ends have these MTUs. An end drops, without
/// a word to anybody, what is longer than its own.
fn joined(what: &str, near: u32, far: u32) -> (Named, Named) {
    let (here, there) = (Named::new(&format!("{what}1")), Named::new(&format!("{what}2")));
    let end = |name: &str| IfName::new(name).expect("a name");
    let (near_end, far_end) = (end("near"), end("far"));
    let veth = Veth {
        name: near_end,
        peer: far_end,
        peer_netns: Some(&there.1),
        mtu: Some(9000),
        mac: None,
        peer_mac: None,
    };
    Netlink::open_in(&here.1).expect("netlink").add_veth(&veth).expect("veth");
    for (netns, end, address, mtu) in
        [(&here.1, near_end, "10.77.0.1/24", near), (&there.1, far_end, "10.77.0.2/24", far)]
    {
        let mut netlink = Netlink::open_in(netns).expect("netlink");
        netlink.add_address(end, address.parse().expect("a network")).expect("address");
        netlink.set_mtu(end, mtu).expect("mtu");
        netlink.set_up(end).expect("up");
    }
    (here, there)
}

fn direct(netns: &Named, at: IpAddr, key: u8) -> Direct {
    let start = || {
        let socket = UdpSocket::bind(SocketAddr::new(at, 0)).expect("binds");
        Direct::new(socket, HubConfig::new(PrivateKey::new([key; 32])), Wait::Spin)
    };
    netns.1.run(start).expect("enters").expect("starts")
}

/// One call, answered with itself turned around.
fn call(nodes: &mut [Direct; 2], lane: Lane, size: usize) {
    let payload: Vec<u8> = (0..=250).cycle().take(size).collect();
    let to = nodes[1].hub.public_key();
    let now = nodes[0].now();
    nodes[0].hub.call_on(now, &to, lane, payload.clone(), None).expect("taken");
    let begun = Instant::now();
    loop {
        for node in nodes.iter_mut() {
            node.turn(Duration::ZERO).expect("sockets");
            while let Some(event) = node.hub.poll_event() {
                match event {
                    Event::Call { peer, id, mut payload, .. } => {
                        payload.reverse();
                        node.hub.reply(&peer, id, payload).expect("waits");
                    }
                    Event::Ended { result, .. } => {
                        let mut reply = result.expect("a reply");
                        reply.reverse();
                        assert!(reply == payload, "{size} bytes came back changed");
                        return;
                    }
                    _ => {}
                }
            }
        }
        let status = || nodes[0].hub.status(nodes[0].now()).next();
        assert!(begun.elapsed() < PATIENCE, "{size} bytes do not arrive: {:?}", status());
    }
}

/// Carries bulk and calls; gives how long datagrams with pieces are on average.
fn carries(what: &str, near: u32, far: u32) -> u64 {
    let (here, there) = joined(what, near, far);
    let mut nodes = [direct(&here, HERE, 1), direct(&there, THERE, 2)];
    let (keys, at) = (
        [nodes[0].hub.public_key(), nodes[1].hub.public_key()],
        nodes[1].local_addr().expect("bound"),
    );
    let now = nodes[1].now();
    nodes[1].hub.add_peer(now, keys[0], None);
    let now = nodes[0].now();
    nodes[0].hub.add_peer(now, keys[1], Some(at));
    for size in [64, 1300, PAYLOAD, PAYLOAD, 1300, PAYLOAD, 64] {
        call(&mut nodes, if size == PAYLOAD { Lane::Bulk } else { Lane::Calls }, size);
    }
    let before = nodes[0].hub.status(nodes[0].now()).next().expect("one").counters;
    call(&mut nodes, Lane::Bulk, PAYLOAD);
    let after = nodes[0].hub.status(nodes[0].now()).next().expect("one").counters;
    let sent = after.sent_bytes - before.sent_bytes;
    assert!(sent < 2 * PAYLOAD as u64, "{sent} bytes for {PAYLOAD}");
    sent / (after.sent_packets - before.sent_packets)
}

#[test]
fn a_device_of_1280_bytes_carries_bulk_and_calls() {
    privileged!();
    carries("narrow", 1280, 1280);
}

#[test]
fn a_hop_that_swallows_long_datagrams_carries_bulk_and_calls() {
    privileged!();
    carries("hole", 9000, 1280);
}

#[test]
fn a_path_of_jumbo_frames_is_found() {
    privileged!();
    // Acknowledgements count as well, and the least is what all paths carry.
    assert!(carries("jumbo", 9000, 9000) > 1300);
}
