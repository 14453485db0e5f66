//! The UDP driver on real sockets of the loopback interface.

use conet_transport::endpoint::{
    self, CallFailed, Endpoint, EndpointConfig, EndpointEvent, Started,
};
use conet_transport::session::handshake::{PrivateKey, PublicKey};
use conet_transport::session::{CallError, CallRefused, DownReason, Lane, Limits};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const LONG: Duration = Duration::from_secs(20);

fn key(n: u8) -> PrivateKey {
    PrivateKey::new([n; 32])
}

fn start(n: u8, peers: Vec<(PublicKey, Option<SocketAddr>)>) -> Started {
    let config = EndpointConfig { peers, ..EndpointConfig::new(key(n)) };
    Endpoint::start(LOCAL, config).expect("starts")
}

/// Answers every call with its payload reversed.
fn echo(endpoint: Endpoint, events: mpsc::Receiver<EndpointEvent>) -> Arc<AtomicU32> {
    let executed = Arc::new(AtomicU32::new(0));
    let count = executed.clone();
    thread::spawn(move || {
        for event in events {
            if let EndpointEvent::Call { ticket, mut payload, .. } = event {
                count.fetch_add(1, Ordering::SeqCst);
                payload.reverse();
                endpoint.reply(ticket, payload).expect("somebody waits");
            }
        }
    });
    executed
}

fn pair() -> (Started, Started) {
    let server = start(2, vec![(key(1).public(), None)]);
    let address = server.endpoint.local_addr();
    let client = start(1, vec![(key(2).public(), Some(address))]);
    (client, server)
}

#[test]
fn calls_of_every_size_and_many_callers() {
    let (client, server) = pair();
    let executed = echo(server.endpoint.clone(), server.events);
    let sizes = [0, 1, 1175, 1176, 1177, 5000, 100_000, 1024 * 1024];
    for size in sizes {
        let payload: Vec<u8> = (0..size).map(|n| (n % 249) as u8).collect();
        let expected: Vec<u8> = payload.iter().rev().copied().collect();
        let reply = client.endpoint.call(key(2).public(), payload, LONG).expect("reply");
        assert!(reply == expected, "{size} bytes");
    }
    let callers: Vec<_> = (0..4u8)
        .map(|n| {
            let endpoint = client.endpoint.clone();
            thread::spawn(move || {
                for call in 0..100u8 {
                    let reply = endpoint.call(key(2).public(), vec![n, call], LONG);
                    assert_eq!(reply, Ok(vec![call, n]));
                }
            })
        })
        .collect();
    for caller in callers {
        caller.join().expect("caller");
    }
    assert_eq!(executed.load(Ordering::SeqCst), 400 + 8);
    let status = client.endpoint.status().expect("runs");
    assert!(status.peers[0].up && status.peers[0].rtt.is_some());
    assert_eq!(status.peers[0].counters.forged, 0);
}

/// Loopback carries datagrams of 64 KiB, and large payloads find out.
#[test]
fn large_payloads_go_in_large_datagrams_beside_small_calls() {
    const SIZE: usize = 16 << 20;
    let (client, server) = pair();
    let executed = echo(server.endpoint.clone(), server.events);
    let endpoint = client.endpoint.clone();
    let small = thread::spawn(move || {
        for call in 0..200u8 {
            assert_eq!(endpoint.call(key(2).public(), vec![call], LONG), Ok(vec![call]));
        }
    });
    for round in 0..3u8 {
        let mut payload = vec![round; SIZE];
        payload[0] = !round;
        let reply = client.endpoint.call(key(2).public(), payload.clone(), LONG).expect("reply");
        payload.reverse();
        assert!(reply == payload, "{round}");
    }
    small.join().expect("caller");
    assert_eq!(executed.load(Ordering::SeqCst), 203);
    let counters = client.endpoint.status().expect("runs").peers[0].counters;
    let length = counters.sent_bytes / counters.sent_packets;
    assert!(length > 1232, "datagrams of {length} bytes on average");
}

#[test]
fn errors_say_whether_a_call_may_have_run() {
    let (client, server) = pair();
    let nobody = client.endpoint.call(key(9).public(), vec![], LONG);
    assert!(matches!(nobody, Err(CallFailed::Refused(CallRefused::Peer(_)))));
    let long = client.endpoint.call(key(2).public(), vec![0; 16 * 1024 * 1024 + 1], LONG);
    assert!(matches!(long, Err(CallFailed::Refused(CallRefused::NotTaken(_)))));
    let slow = client.endpoint.begin(key(2).public(), vec![1], Duration::from_millis(300));
    let ticket = loop {
        match server.events.recv_timeout(LONG).expect("event") {
            EndpointEvent::Call { ticket, .. } => break ticket,
            EndpointEvent::PeerUp(_) => {}
            other => panic!("{other:?}"),
        }
    };
    let failed = slow.wait().expect_err("nobody answered");
    assert_eq!(failed, CallFailed::Ended(CallError::TimedOut));
    assert!(failed.may_have_run());
    assert_eq!(server.events.recv_timeout(LONG), Ok(EndpointEvent::Cancelled(ticket)));
    server.endpoint.refuse(ticket).expect("still known");
    let refused = client.endpoint.begin(key(2).public(), vec![2], LONG);
    match server.events.recv_timeout(LONG).expect("event") {
        EndpointEvent::Call { ticket, .. } => server.endpoint.refuse(ticket).expect("waits"),
        other => panic!("{other:?}"),
    }
    let failed = refused.wait().expect_err("refused");
    assert_eq!(failed, CallFailed::Ended(CallError::Refused));
    assert!(!failed.may_have_run());
}

#[test]
fn closing_tells_the_peer_and_ends_the_thread() {
    let (client, server) = pair();
    let endpoint = client.endpoint.clone();
    let waiting = thread::spawn(move || endpoint.call(key(2).public(), vec![1], LONG));
    loop {
        if let EndpointEvent::Call { .. } = server.events.recv_timeout(LONG).expect("event") {
            break;
        }
    }
    client.endpoint.close();
    assert!(client.thread.join());
    assert_eq!(waiting.join().expect("caller"), Err(CallFailed::Closed));
    let down = EndpointEvent::PeerDown(key(1).public(), DownReason::Closed);
    assert_eq!(server.events.recv_timeout(LONG), Ok(down));
    assert!(client.endpoint.status().is_err());
    drop(server.endpoint);
    assert!(server.thread.join(), "the last handle ends the thread");
}

#[test]
fn peers_come_and_go_while_it_runs() {
    let (client, server) = pair();
    let executed = echo(server.endpoint.clone(), server.events);
    let third = start(3, vec![]);
    let call = || third.endpoint.call(key(2).public(), vec![7], Duration::from_secs(1));
    assert!(matches!(call(), Err(CallFailed::Refused(CallRefused::Peer(_)))));
    third.endpoint.add_peer(key(2).public(), Some(server.endpoint.local_addr())).expect("runs");
    assert_eq!(call(), Err(CallFailed::Ended(CallError::Unreachable)), "server knows no third");
    server.endpoint.add_peer(key(3).public(), None).expect("runs");
    let reply = third.endpoint.call(key(2).public(), vec![7], LONG);
    assert_eq!(reply, Ok(vec![7]));
    server.endpoint.remove_peer(key(3).public()).expect("there");
    assert!(server.endpoint.remove_peer(key(3).public()).is_err());
    assert_eq!(client.endpoint.call(key(2).public(), vec![8], LONG), Ok(vec![8]));
    assert_eq!(executed.load(Ordering::SeqCst), 2);
}

#[test]
fn an_idle_endpoint_sleeps() {
    let (client, server) = pair();
    let executed = echo(server.endpoint.clone(), server.events);
    client.endpoint.call(key(2).public(), vec![1], LONG).expect("reply");
    let before = client.endpoint.status().expect("runs").peers[0].counters.sent_packets;
    let start = Instant::now();
    thread::sleep(Duration::from_secs(3));
    let after = client.endpoint.status().expect("runs").peers[0].counters.sent_packets;
    assert!(after - before <= 8, "{} packets in {:?}", after - before, start.elapsed());
    assert_eq!(executed.load(Ordering::SeqCst), 1);
}

/// An endpoint once gave a call of a row to its owner without the argument, as if it had none.
#[test]
fn calls_of_a_row_have_their_arguments_at_an_endpoint() {
    let (client, server) = pair();
    let endpoint = server.endpoint.clone();
    thread::spawn(move || {
        for event in server.events {
            if let EndpointEvent::Call { ticket, lane, payload, argument } = event {
                assert_eq!(lane, Lane::Control);
                let stops = payload == b"stop";
                let answer = [argument.unwrap_or_default(), payload].concat();
                if stops {
                    endpoint.reply_and_stop(ticket, answer).expect("somebody waits");
                } else {
                    endpoint.reply(ticket, answer).expect("somebody waits");
                }
            }
        }
    });
    let row = |calls: &[(&str, bool)]| {
        let row = calls.iter().map(|(say, anyhow)| (say.as_bytes().to_vec(), *anyhow)).collect();
        let pending = client.endpoint.begin_row(Lane::Control, key(2).public(), row, LONG);
        pending.into_iter().map(endpoint::PendingCall::wait).collect::<Vec<_>>()
    };
    let good = row(&[("a", false), ("b", false), ("c", false)]);
    assert_eq!(good, [Ok(b"a".to_vec()), Ok(b"ab".to_vec()), Ok(b"abc".to_vec())]);
    let stopped = row(&[("stop", false), ("b", true), ("stop", false), ("c", false)]);
    assert_eq!(stopped[1], Ok(b"stopb".to_vec()));
    assert_eq!(stopped[3], Err(CallFailed::Ended(CallError::Aborted)));
    assert!(row(&[]).is_empty());
    let nine = row(&[("a", false); 9]);
    assert!(nine.iter().all(|one| matches!(one, Err(CallFailed::Refused(_)))), "{nine:?}");
}

#[test]
fn a_pending_call_can_be_cancelled() {
    let (client, server) = pair();
    let to = key(2).public();
    let pending = client.endpoint.begin(to, vec![1], LONG);
    let ticket = loop {
        if let EndpointEvent::Call { ticket, .. } = server.events.recv_timeout(LONG).expect("event")
        {
            break ticket;
        }
    };
    pending.cancel();
    pending.cancel();
    assert_eq!(pending.wait(), Err(CallFailed::Ended(CallError::Unknown)));
    assert_eq!(server.events.recv_timeout(LONG), Ok(EndpointEvent::Cancelled(ticket)));
    server.endpoint.reply(ticket, vec![]).expect("still to be answered");
    // One that was never sent, and one that has ended.
    let nowhere = start(3, vec![(to, None)]);
    let pending = nowhere.endpoint.begin(to, vec![1], LONG);
    pending.cancel();
    assert_eq!(pending.wait(), Err(CallFailed::Ended(CallError::Cancelled)));
    echo(server.endpoint.clone(), server.events);
    let pending = client.endpoint.begin(to, vec![1], LONG);
    let reply = pending.wait_timeout(LONG);
    pending.cancel();
    assert_eq!(reply, Some(Ok(vec![1])));
    // It keeps no endpoint alive.
    let pending = nowhere.endpoint.begin(to, vec![1], LONG);
    drop(nowhere.endpoint);
    assert!(nowhere.thread.join());
    pending.cancel();
    assert_eq!(pending.wait(), Err(CallFailed::Closed));
}

/// The bell that the last handle rings must be heard though the handle goes.
#[test]
fn an_endpoint_whose_last_handle_goes_ends_at_once() {
    for _ in 0..50 {
        let nowhere = start(3, vec![(key(2).public(), None)]);
        let pending = nowhere.endpoint.begin(key(2).public(), vec![1], LONG);
        drop(nowhere.endpoint);
        assert!(nowhere.thread.join());
        assert_eq!(pending.wait(), Err(CallFailed::Closed));
    }
}

/// An application that reads no events once made the endpoint keep without end what a peer
/// calls that starts again and again.
#[test]
fn who_does_not_read_events_has_a_bounded_number_of_them() {
    const SLOTS: usize = 64;
    // Behind the channel's thousand.
    const MOST: usize = 1024 + SLOTS;
    let to = key(2).public();
    let limits = Limits { slots: SLOTS, ..Limits::default() };
    let peers = vec![(key(1).public(), None), (key(3).public(), None)];
    let config = EndpointConfig { peers, limits, ..EndpointConfig::new(key(2)) };
    let server = Endpoint::start(LOCAL, config).expect("starts");
    let address = server.endpoint.local_addr();
    let other = start(3, vec![(to, Some(address))]);
    echo(other.endpoint.clone(), other.events);
    assert_eq!(server.endpoint.call(key(3).public(), vec![7], LONG), Ok(vec![7]));
    let mut refused = 0;
    let mut made = 0;
    while refused == 0 {
        assert!(made < 2 * MOST, "{made} calls were taken");
        let client = start(1, vec![(to, Some(address))]);
        let calls: Vec<_> = (0..SLOTS).map(|_| client.endpoint.begin(to, vec![1], LONG)).collect();
        made += SLOTS;
        let begun = Instant::now();
        let executions = |status: &endpoint::EndpointStatus| {
            let peer = status.peers.iter().find(|peer| peer.key == key(1).public());
            peer.map_or(0, |peer| peer.counters.executions)
        };
        // All have arrived, and are where they stay.
        while executions(&server.endpoint.status().expect("runs")) < made as u64 {
            assert!(begun.elapsed() < LONG, "{made} calls");
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(50));
        let ended = |call: &endpoint::PendingCall| call.wait_timeout(Duration::ZERO);
        refused += calls.iter().filter_map(ended).filter(Result::is_err).count();
        // Whoever reads events may wait for calls of its own, and answer.
        assert_eq!(server.endpoint.call(key(3).public(), vec![8], LONG), Ok(vec![8]));
        client.endpoint.close();
        assert!(client.thread.join());
    }
    let (mut calls, mut is_up) = (0, None);
    while let Ok(event) = server.events.recv_timeout(Duration::from_millis(500)) {
        match event {
            EndpointEvent::Call { .. } => calls += 1,
            EndpointEvent::PeerUp(peer) if peer == key(1).public() => is_up = Some(true),
            EndpointEvent::PeerDown(peer, _) if peer == key(1).public() => is_up = Some(false),
            _ => {}
        }
    }
    assert!(calls <= MOST && calls + refused >= made, "{calls} of {made}, {refused} refused");
    assert_eq!(is_up, Some(false), "it has closed");
    // And who reads again gets calls again.
    let client = start(1, vec![(to, Some(address))]);
    echo(server.endpoint.clone(), server.events);
    assert_eq!(client.endpoint.call(to, vec![1, 2], LONG), Ok(vec![2, 1]));
}

/// Callers may go without waiting, with the thread that has called, and so may the endpoint's
/// last handle while calls wait.
#[test]
fn callers_that_go_leave_nothing_behind() {
    let (client, server) = pair();
    let to = key(2).public();
    let endpoint = client.endpoint.clone();
    let brief = Duration::from_millis(200);
    let begins = move || (0..200).for_each(|_| drop(endpoint.begin(to, vec![1], brief)));
    thread::spawn(begins).join().expect("begins");
    let begun = Instant::now();
    let in_flight = |one: &Endpoint| one.status().expect("runs").peers[0].calls_in_flight;
    thread::sleep(brief);
    while in_flight(&client.endpoint) > 0 {
        assert!(begun.elapsed() < LONG, "{} calls", in_flight(&client.endpoint));
        thread::sleep(Duration::from_millis(10));
    }
    let waiting: Vec<_> = (0..200).map(|_| client.endpoint.begin(to, vec![2], LONG)).collect();
    drop(client.endpoint);
    assert!(client.thread.join());
    for call in waiting {
        assert_eq!(call.wait(), Err(CallFailed::Closed));
    }
    drop((server.endpoint, server.events));
    assert!(server.thread.join());
}
