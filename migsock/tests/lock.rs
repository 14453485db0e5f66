//! The packet lock in the running kernel.

mod scene;

use conet_migsock::{Flow, Lock, LockError, NftLock};
use conet_testkit::privileged;
use scene::{MOVING_4, MOVING_6, Scene, talks};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

const SHORT: Duration = Duration::from_millis(60);

fn flow(stream: &TcpStream) -> Flow {
    Flow {
        local: stream.local_addr().expect("connected"),
        peer: stream.peer_addr().expect("connected"),
    }
}

/// Whether bytes from one end reach the other within a short time.
fn reaches(from: &mut TcpStream, to: &mut TcpStream) -> bool {
    from.write_all(b"x").expect("queued");
    to.set_read_timeout(Some(SHORT)).expect("option");
    match to.read(&mut [0]) {
        Ok(1) => true,
        Err(error) if error.kind() == ErrorKind::WouldBlock => false,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_locked_flow_is_cut_both_ways_and_no_other() {
    privileged!();
    let scene = Scene::new();
    let lock = scene.old.run(NftLock::open).expect("nftables");
    for (local, server) in
        [(MOVING_4, "10.200.1.1"), (MOVING_6, "fd01::1"), ("::ffff:10.200.9.9", "10.200.1.1")]
    {
        let (mut client, mut server_end) = scene.connect(local, server);
        let (mut other, mut other_end) = scene.connect(local, server);
        lock.lock(flow(&client)).expect("locked");
        assert!(matches!(lock.lock(flow(&client)), Err(LockError::Held(_))));
        assert!(!reaches(&mut client, &mut server_end), "{local}: outgoing");
        assert!(!reaches(&mut server_end, &mut client), "{local}: incoming");
        assert!(reaches(&mut other, &mut other_end), "{local}: another flow");
        assert!(reaches(&mut other_end, &mut other), "{local}: another flow");
        lock.release(flow(&client)).expect("released");
        assert!(lock.release(flow(&client)).is_err(), "{local}: not locked");
        // What was lost is sent again: the connection is whole.
        for stream in [&client, &server_end] {
            stream.set_read_timeout(Some(Duration::from_secs(20))).expect("option");
        }
        for stream in [&mut client, &mut server_end] {
            stream.read_exact(&mut [0]).expect("sent again");
        }
        talks(&mut client, &mut server_end).expect("alive");
    }
}

/// Without a socket the kernel would answer with a reset; under the lock it is mute.
#[test]
fn the_lock_outlives_the_socket() {
    privileged!();
    let scene = Scene::new();
    let lock = scene.old.run(NftLock::open).expect("nftables");
    let (client, mut server) = scene.connect(MOVING_4, "10.200.1.1");
    let flow = flow(&client);
    lock.lock(flow).expect("locked");
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("option");
    drop(client);
    server.write_all(b"anybody?").expect("queued");
    server.set_read_timeout(Some(SHORT)).expect("option");
    let silent = server.read(&mut [0]).expect_err("nothing comes");
    assert_eq!(silent.kind(), ErrorKind::WouldBlock);
    lock.release(flow).expect("released");
    server.set_read_timeout(Some(Duration::from_secs(20))).expect("option");
    let reset = server.read(&mut [0]).expect_err("the retransmission is answered");
    assert_eq!(reset.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_lock_that_is_dropped_leaves_nothing() {
    privileged!();
    let scene = Scene::new();
    let (mut client, mut server) = scene.connect(MOVING_4, "10.200.1.1");
    let lock = scene.old.run(NftLock::open).expect("nftables");
    lock.lock(flow(&client)).expect("locked");
    assert!(!reaches(&mut client, &mut server));
    drop(lock);
    server.set_read_timeout(Some(Duration::from_secs(20))).expect("option");
    server.read_exact(&mut [0]).expect("sent again");
    client.set_read_timeout(Some(Duration::from_secs(20))).expect("option");
    talks(&mut client, &mut server).expect("alive");
}

#[test]
fn locking_is_quick() {
    privileged!();
    let scene = Scene::new();
    let lock = scene.old.run(NftLock::open).expect("nftables");
    let flow = Flow {
        local: "10.200.9.9:1000".parse().expect("address"),
        peer: "10.200.1.1:2000".parse().expect("address"),
    };
    let (mut locks, mut releases) = (Vec::new(), Vec::new());
    for _ in 0..300 {
        let start = Instant::now();
        lock.lock(flow).expect("locked");
        locks.push(start.elapsed());
        let start = Instant::now();
        lock.release(flow).expect("released");
        releases.push(start.elapsed());
    }
    locks.sort_unstable();
    releases.sort_unstable();
    eprintln!("lock: median {:?}, release: median {:?}", locks[150], releases[150]);
    // A program that is run for it needs 30 ms and more.
    assert!(locks[150] < Duration::from_millis(5) && releases[150] < Duration::from_millis(5));
}

#[test]
fn mixed_flows_are_refused() {
    privileged!();
    let scene = Scene::new();
    let lock = scene.old.run(NftLock::open).expect("nftables");
    let flow = Flow {
        local: "10.200.9.9:1000".parse().expect("address"),
        peer: "[fd01::1]:2000".parse().expect("address"),
    };
    assert!(matches!(lock.lock(flow), Err(LockError::Mixed(_))));
}
