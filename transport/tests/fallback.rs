//! UDP blocked by nftables under a session on real sockets, in a namespace of its own.

use conet_netsys::{IfName, Netlink, Netns, NetnsName};
use conet_testkit::privileged;
use conet_testkit::privileged::Need;
use conet_transport::carrier::{Fallback, StreamTarget, Streams, Udp};
use conet_transport::direct::{Direct, Wait};
use conet_transport::endpoint::{Endpoint, EndpointConfig, EndpointEvent, TcpFallback};
use conet_transport::session::handshake::{PrivateKey, PublicKey};
use conet_transport::session::ways::stream_number;
use conet_transport::session::{Event, HubConfig};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const LONG: Duration = Duration::from_secs(60);
const TURN: Duration = Duration::from_millis(20);

struct Space {
    name: NetnsName,
    netns: Netns,
}

impl Space {
    fn new(n: u32) -> Self {
        let name = format!("conet-t{}-f{n}", std::process::id());
        let name = NetnsName::new(&name).expect("short");
        let netns = Netns::create(&name).expect("root");
        let mut netlink = Netlink::open_in(&netns).expect("netlink");
        netlink.set_up(IfName::new("lo").expect("a name")).expect("loopback");
        Self { name, netns }
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        Netns::delete(&self.name).expect("was made");
    }
}

/// In the calling thread's namespace.
fn nft(rules: &str) {
    let mut nft = Command::new("nft");
    let mut nft = nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("nft");
    nft.stdin.take().expect("piped").write_all(rules.as_bytes()).expect("writes");
    assert!(nft.wait().expect("nft").success(), "{rules}");
}

fn block_udp() {
    let hook = "type filter hook output priority 0;";
    nft(&format!("table inet t {{\nchain c {{\n{hook}\nmeta l4proto udp drop;\n}}\n}}\n"));
}

fn key(n: u8) -> PrivateKey {
    PrivateKey::new([n; 32])
}

fn node(n: u8) -> (Direct<Fallback>, SocketAddr, StreamTarget) {
    let udp = Udp::new(UdpSocket::bind(ANY).expect("bind"));
    let address = udp.local_addr().expect("bound");
    let listener = TcpListener::bind(ANY).expect("bind");
    let target = StreamTarget::Tcp(listener.local_addr().expect("bound"));
    let mut streams = Streams::new().expect("epoll");
    streams.listen_tcp(listener).expect("listens");
    let carrier = Fallback::new(udp, streams);
    let direct = Direct::over(carrier, HubConfig::new(key(n)), Wait::Adaptive).expect("entropy");
    (direct, address, target)
}

/// Echoes until it is told to stop, and counts.
fn serve(mut server: Direct<Fallback>, stop: &AtomicBool, ran: &AtomicU64) {
    while !stop.load(Ordering::Relaxed) {
        server.turn(TURN).expect("turns");
        while let Some(event) = server.hub.poll_event() {
            if let Event::Call { peer, id, payload, .. } = event {
                ran.fetch_add(1, Ordering::Relaxed);
                server.hub.reply(&peer, id, payload).expect("asked");
            }
        }
    }
}

fn call(client: &mut Direct<Fallback>, peer: &PublicKey, payload: &[u8]) -> Duration {
    let (begun, now) = (Instant::now(), client.now());
    client.hub.call(now, peer, payload.to_vec(), Some(now + LONG)).expect("taken");
    loop {
        client.turn(TURN).expect("turns");
        while let Some(event) = client.hub.poll_event() {
            match event {
                Event::Ended { result, .. } => {
                    assert!(result.expect("a reply") == payload);
                    return begun.elapsed();
                }
                Event::Down(_, reason) => panic!("down: {reason:?}"),
                _ => {}
            }
        }
    }
}

fn is_on_stream(client: &Direct<Fallback>, peer: &PublicKey) -> bool {
    client.hub.address_of(peer).is_some_and(|address| stream_number(address).is_some())
}

/// Ends the server, also where the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn scene(story: impl FnOnce(&mut Direct<Fallback>, PublicKey) -> u64 + Send) {
    let (stop, ran) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (mut server, address, target) = node(2);
    let peer = server.hub.public_key();
    let now = server.now();
    server.hub.add_peer(now, key(1).public(), None);
    let (mut client, ..) = node(1);
    let now = client.now();
    client.hub.add_peer(now, peer, Some(address));
    client.carrier.add_peer(now, peer, address, target);
    let calls = thread::scope(|scope| {
        scope.spawn(|| serve(server, &stop, &ran));
        let _stop = Stop(&stop);
        story(&mut client, peer)
    });
    assert_eq!(ran.load(Ordering::Relaxed), calls, "each call runs once");
}

#[test]
fn a_session_begins_over_tcp_where_udp_is_blocked() {
    privileged!(Need::Program("nft"));
    let space = Space::new(0);
    let run = || {
        block_udp();
        scene(|client, peer| {
            let took = call(client, &peer, b"hello");
            println!("first reply after {took:?}");
            assert!(is_on_stream(client, &peer));
            call(client, &peer, &[7; 300_000]);
            2
        });
    };
    space.netns.run(run).expect("a thread in the namespace");
}

#[test]
fn a_session_goes_over_to_tcp_and_back() {
    privileged!(Need::Program("nft"));
    let space = Space::new(1);
    let run = || {
        scene(|client, peer| {
            call(client, &peer, b"hello");
            assert!(!is_on_stream(client, &peer));
            let handshakes = |client: &Direct<Fallback>| {
                client.hub.status(client.now()).next().expect("one").counters.handshakes
            };
            let before = handshakes(client);
            block_udp();
            let took = call(client, &peer, b"still there?");
            println!("gone over after {took:?}");
            assert!(is_on_stream(client, &peer));
            call(client, &peer, &[7; 300_000]);
            nft("delete table inet t\n");
            let (begun, mut calls) = (Instant::now(), 3);
            while is_on_stream(client, &peer) {
                assert!(begun.elapsed() < LONG);
                call(client, &peer, b"back?");
                calls += 1;
            }
            println!("back after {:?}", begun.elapsed());
            assert_eq!(handshakes(client), before, "one session all along");
            calls
        });
    };
    space.netns.run(run).expect("a thread in the namespace");
}

/// The same by the endpoint that daemons use.
#[test]
fn an_endpoint_goes_over_to_tcp() {
    privileged!(Need::Program("nft"));
    let space = Space::new(2);
    let run = || {
        let start = |n: u8, port: u16, peer: (PublicKey, Option<SocketAddr>)| {
            let config = EndpointConfig {
                peers: vec![peer],
                tcp_fallback: TcpFallback::Listen,
                ..EndpointConfig::new(key(n))
            };
            Endpoint::start((Ipv4Addr::LOCALHOST, port).into(), config).expect("starts")
        };
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 7001));
        let server = start(2, 7001, (key(1).public(), None));
        let client = start(1, 7002, (key(2).public(), Some(address)));
        thread::spawn(move || {
            for event in server.events {
                if let EndpointEvent::Call { ticket, payload, .. } = event {
                    server.endpoint.reply(ticket, payload).expect("somebody waits");
                }
            }
        });
        let call = |payload: Vec<u8>| {
            let reply = client.endpoint.call(key(2).public(), payload.clone(), LONG);
            assert!(reply == Ok(payload));
            client.endpoint.status().expect("runs").peers.remove(0)
        };
        let on_stream =
            |address: Option<SocketAddr>| stream_number(address.expect("one")).is_some();
        assert!(!on_stream(call(b"hello".to_vec()).address));
        block_udp();
        let begun = Instant::now();
        assert!(on_stream(call(b"still there?".to_vec()).address));
        println!("gone over after {:?}", begun.elapsed());
        call(vec![7; 2 * 1024 * 1024]);
        nft("delete table inet t\n");
        let begun = Instant::now();
        while on_stream(call(vec![1]).address) {
            assert!(begun.elapsed() < LONG);
        }
        assert_eq!(call(vec![2]).counters.handshakes, 1, "one session all along");
    };
    space.netns.run(run).expect("a thread in the namespace");
}

/// Nobody listens, or UDP works: the stream is not needed, and not missed.
#[test]
fn without_a_block_nothing_is_dialled() {
    let (server, client) = (node(2), node(1));
    let ((mut server, address, target), (mut client, ..)) = (server, client);
    let peer = server.hub.public_key();
    let now = server.now();
    server.hub.add_peer(now, key(1).public(), None);
    let now = client.now();
    client.hub.add_peer(now, peer, Some(address));
    client.carrier.add_peer(now, peer, address, target);
    let (stop, ran) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| serve(server, &stop, &ran));
        let _stop = Stop(&stop);
        for _ in 0..100 {
            call(&mut client, &peer, b"hello");
        }
    });
    assert!(!is_on_stream(&client, &peer));
    assert_eq!(ran.load(Ordering::Relaxed), 100);
}
