//! Connections that move between namespaces of the running kernel.

mod scene;

use conet_migsock::{Address, Host};
use conet_testkit::privileged;
use conet_testkit::random::Random;
use scene::{MOVING_4, MOVING_6, Scene, Space, move_over, talks};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

fn hosts(scene: &Scene) -> [Host; 2] {
    [&scene.old, &scene.new].map(|space: &Space| space.run(Host::open).expect("nftables"))
}

/// The bytes of a stream, anywhere in it.
struct Stream(Random);

impl Stream {
    fn new(seed: u64) -> Self {
        Self(Random::new(seed))
    }

    fn next(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.0.number().to_le_bytes()[3]).collect()
    }
}

/// Sends and receives both streams through a non-blocking socket, until `total` went
/// each way or `stop` says so.
struct Pump {
    out: Stream,
    expected: Stream,
    pending: Vec<u8>,
    written: usize,
    read: usize,
    total: usize,
}

impl Pump {
    fn new(out: u64, expected: u64, total: usize) -> Self {
        Self {
            out: Stream::new(out),
            expected: Stream::new(expected),
            pending: Vec::new(),
            written: 0,
            read: 0,
            total,
        }
    }

    fn done(&self) -> bool {
        self.written == self.total && self.read == self.total
    }

    /// One round; says whether anything moved.
    fn turn(&mut self, stream: &mut TcpStream, most: usize) -> io::Result<bool> {
        let mut moved = false;
        if self.pending.is_empty() {
            self.pending = self.out.next(most.min(self.total - self.written));
        }
        if !self.pending.is_empty() {
            match stream.write(&self.pending) {
                Ok(n) => {
                    self.pending.drain(..n);
                    self.written += n;
                    moved = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        let mut bytes = vec![0; most];
        match stream.read(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                assert!(bytes[..n] == self.expected.next(n), "stream differs at {}", self.read);
                self.read += n;
                moved = true;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        Ok(moved)
    }
}

fn streams_through_moves(local: &str, server: &str, address: Address, moves: usize) {
    let mut scene = Scene::new();
    let hosts = hosts(&scene);
    let (mut client, mut server) = scene.connect(local, server);
    const TOTAL: usize = 6_000_000;
    let peer = thread::spawn(move || {
        server.set_nonblocking(true).expect("option");
        let mut pump = Pump::new(2, 1, TOTAL);
        let limit = Instant::now() + Duration::from_secs(60);
        while !pump.done() {
            if !pump.turn(&mut server, 40_000).expect("no reset") {
                assert!(Instant::now() < limit, "{} of {TOTAL} read", pump.read);
                thread::sleep(Duration::from_micros(200));
            }
        }
        server
    });
    let mut pump = Pump::new(1, 2, TOTAL);
    let mut carried = (0, 0, 0);
    for n in 1..=moves {
        client.set_nonblocking(true).expect("option");
        // Write on without reading for a while, so that both queues hold something.
        while pump.written.min(pump.read) < TOTAL * n / (moves + 1) {
            if !pump.turn(&mut client, 30_000).expect("no reset") {
                thread::sleep(Duration::from_micros(200));
            }
        }
        for _ in 0..8 {
            let more = pump.out.next(0);
            assert!(more.is_empty());
            if pump.pending.is_empty() {
                pump.pending = pump.out.next(30_000.min(TOTAL - pump.written));
            }
            if let Ok(n) = client.write(&pump.pending) {
                pump.pending.drain(..n);
                pump.written += n;
            }
        }
        let (from, to) = if scene.at_new { (&hosts[1], &hosts[0]) } else { (&hosts[0], &hosts[1]) };
        let state;
        (client, state) = move_over(&mut scene, from, to, client, address);
        carried.0 += state.recv.len();
        carried.1 += state.send.len() - state.unsent;
        carried.2 += state.unsent;
    }
    client.set_nonblocking(true).expect("option");
    let limit = Instant::now() + Duration::from_secs(60);
    while !pump.done() {
        if !pump.turn(&mut client, 30_000).expect("no reset") {
            assert!(Instant::now() < limit, "{} of {TOTAL} read", pump.read);
            thread::sleep(Duration::from_micros(200));
        }
    }
    let mut server = peer.join().expect("the peer's stream is intact");
    eprintln!("carried: {} unread, {} unacknowledged, {} unsent", carried.0, carried.1, carried.2);
    assert!(carried.0 > 0 && carried.1 + carried.2 > 0, "{carried:?}");
    for stream in [&client, &server] {
        stream.set_nonblocking(false).expect("option");
    }
    talks(&mut client, &mut server).expect("alive");
    // An ordinary end.
    drop(client);
    assert_eq!(server.read(&mut [0; 8]).expect("no reset"), 0);
}

#[test]
fn both_streams_survive_six_moves() {
    privileged!();
    streams_through_moves(MOVING_4, "10.200.1.1", Address::Coming, 6);
}

#[test]
fn an_ipv6_connection_moves() {
    privileged!();
    streams_through_moves(MOVING_6, "fd01::1", Address::Coming, 3);
}

#[test]
fn an_ipv4_connection_of_an_ipv6_socket_moves() {
    privileged!();
    streams_through_moves("::ffff:10.200.9.9", "10.200.1.1", Address::Coming, 2);
}

#[test]
fn the_address_may_be_there_before() {
    privileged!();
    streams_through_moves(MOVING_4, "10.200.1.1", Address::Here, 2);
}

#[test]
fn every_queue_arrives_to_the_byte() {
    privileged!();
    let mut scene = Scene::new();
    let hosts = hosts(&scene);
    let (mut client, mut server) = scene.connect(MOVING_4, "10.200.1.1");
    // Unread at the client.
    server.write_all(b"unread bytes").expect("sent");
    // The server reads nothing, so its window closes: then bytes stay unsent.
    client.set_nonblocking(true).expect("option");
    let mut out = Stream::new(1);
    let mut written = 0;
    let mut still = 0;
    while still < 20 {
        match client.write(&out.0.number().to_le_bytes().repeat(1000)) {
            Ok(n) => {
                written += n;
                still = 0;
                if n < 8000 {
                    break;
                }
            }
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                still += 1;
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
    let frozen = hosts[0].freeze(client.as_fd()).expect("freezes");
    let state = frozen.state().clone();
    assert_eq!(state.recv, b"unread bytes");
    assert!(state.unsent > 0 && state.send.len() >= state.unsent, "{state:?}");
    assert!(state.scales.is_some() && state.sack && state.timestamp.is_some());
    frozen.rollback().expect("thaws");
    (client, _) = move_over(&mut scene, &hosts[0], &hosts[1], client, Address::Coming);
    let mut bytes = [0; 12];
    client.read_exact(&mut bytes).expect("unread bytes");
    assert_eq!(&bytes, b"unread bytes");
    let (mut out, mut read) = (Stream::new(1), 0);
    let mut expected = Vec::new();
    while expected.len() < written {
        expected.extend(out.0.number().to_le_bytes().repeat(1000));
    }
    let mut received = vec![0; written];
    while read < written {
        match server.read(&mut received[read..]).expect("alive") {
            0 => panic!("ended after {read}"),
            n => read += n,
        }
    }
    assert!(received == expected[..written]);
}

#[test]
fn options_go_along() {
    privileged!();
    let mut scene = Scene::new();
    let hosts = hosts(&scene);
    let (client, mut server) = scene.connect(MOVING_4, "10.200.1.1");
    let socket = socket2::SockRef::from(&client);
    socket.set_tcp_nodelay(true).expect("option");
    socket.set_keepalive(true).expect("option");
    socket
        .set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(Duration::from_secs(77)))
        .expect("option");
    socket.set_tcp_user_timeout(Some(Duration::from_secs(33))).expect("option");
    socket.set_ttl_v4(44).expect("option");
    socket.set_tos_v4(0x10).expect("option");
    socket.set_linger(Some(Duration::from_secs(5))).expect("option");
    socket.set_reuse_address(true).expect("option");
    socket.set_recv_buffer_size(90_000).expect("option");
    socket.set_tcp_congestion(b"cubic").expect("option");
    client.set_write_timeout(Some(Duration::from_millis(2500))).expect("option");
    let before =
        (socket.recv_buffer_size().expect("option"), socket.send_buffer_size().expect("option"));
    let (mut client, _) = move_over(&mut scene, &hosts[0], &hosts[1], client, Address::Coming);
    let socket = socket2::SockRef::from(&client);
    assert!(socket.tcp_nodelay().expect("option"));
    assert!(socket.keepalive().expect("option"));
    assert_eq!(socket.tcp_keepalive_time().expect("option"), Duration::from_secs(77));
    assert_eq!(socket.tcp_user_timeout().expect("option"), Some(Duration::from_secs(33)));
    assert_eq!(socket.ttl_v4().expect("option"), 44);
    assert_eq!(socket.tos_v4().expect("option"), 0x10);
    assert_eq!(socket.linger().expect("option"), Some(Duration::from_secs(5)));
    assert!(socket.reuse_address().expect("option"));
    let congestion = socket.tcp_congestion().expect("option");
    assert!(congestion.starts_with(b"cubic"));
    assert_eq!(client.write_timeout().expect("option"), Some(Duration::from_millis(2500)));
    let after =
        (socket.recv_buffer_size().expect("option"), socket.send_buffer_size().expect("option"));
    assert_eq!(before, after);
    talks(&mut client, &mut server).expect("alive");
}

#[test]
fn a_frozen_connection_can_thaw_and_a_prepared_one_vanish() {
    privileged!();
    let scene = Scene::new();
    let hosts = hosts(&scene);
    let (mut client, mut server) = scene.connect(MOVING_4, "10.200.1.1");
    for _ in 0..3 {
        let frozen = hosts[0].freeze(client.as_fd()).expect("freezes");
        let state = frozen.state().clone();
        // Sent into the lock: lost on the way, and sent again afterwards.
        server.write_all(b"into the lock").expect("queued");
        let prepared = scene.new.run(|| hosts[1].prepare(&state, Address::Coming));
        let prepared = prepared.expect("prepares");
        assert_eq!((scene.old.established(), scene.new.established()), (1, 1));
        scene.new.run(move || drop(prepared));
        assert_eq!(scene.new.established(), 0);
        frozen.rollback().expect("thaws");
        let mut bytes = [0; 13];
        client.read_exact(&mut bytes).expect("alive");
        assert_eq!(&bytes, b"into the lock");
        talks(&mut client, &mut server).expect("alive");
    }
}

#[test]
fn freezing_and_preparing_are_quick() {
    privileged!();
    let scene = Scene::new();
    let hosts = hosts(&scene);
    let (mut client, mut server) = scene.connect(MOVING_4, "10.200.1.1");
    server.write_all(&[7; 1000]).expect("sent");
    let (mut freezes, mut prepares) = (Vec::new(), Vec::new());
    for _ in 0..200 {
        let start = Instant::now();
        let frozen = hosts[0].freeze(client.as_fd()).expect("freezes");
        freezes.push(start.elapsed());
        let state = frozen.state().clone();
        scene.new.run(|| {
            let start = Instant::now();
            let prepared = hosts[1].prepare(&state, Address::Coming).expect("prepares");
            prepares.push(start.elapsed());
            drop(prepared);
        });
        frozen.rollback().expect("thaws");
    }
    freezes.sort_unstable();
    prepares.sort_unstable();
    eprintln!("freeze: median {:?}, prepare: median {:?}", freezes[100], prepares[100]);
    assert!(freezes[100] < Duration::from_millis(5) && prepares[100] < Duration::from_millis(5));
    client.read_exact(&mut [0; 1000]).expect("alive");
    talks(&mut client, &mut server).expect("alive");
}
