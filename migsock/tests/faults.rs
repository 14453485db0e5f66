//! Every call of a move fails once: the connection lives on one side, never on both
//! and never on neither.

mod scene;

use conet_migsock::{Activated, Address, Host, NftLock, Prepared};
use conet_testkit::privileged;
use scene::{FailingKernel, FailingLock, Fault, MOVING_4, Scene, talks};
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

type Failing = Host<FailingKernel, FailingLock>;

fn failing(real: NftLock, fault: &Arc<Fault>) -> Failing {
    let lock = FailingLock { real, fault: fault.clone() };
    Host::with_ports(FailingKernel(fault.clone()), lock)
}

/// Tries one whole move with the fault in it; gives the connection if it ended up on
/// the new side.
fn try_move(
    scene: &mut Scene,
    old: &Failing,
    new: &Failing,
    client: &TcpStream,
) -> Option<TcpStream> {
    let frozen = match old.freeze(client.as_fd()) {
        Ok(frozen) => frozen,
        Err(_) => return None,
    };
    let state = frozen.state().clone();
    let prepared = match scene.new.run(|| new.prepare(&state, Address::Coming)) {
        Ok(prepared) => prepared,
        Err(_) => {
            // A failure to thaw is told, and repaired by the drop.
            frozen.rollback().ok();
            return None;
        }
    };
    let mut gone = match frozen.commit() {
        Ok(gone) => gone,
        Err((frozen, _)) => {
            // Both sides exist, both are locked: the new one goes first.
            scene.new.run(move || drop(prepared));
            frozen.rollback().ok();
            return None;
        }
    };
    scene.move_address();
    let Activated { fd, unsent, trouble: _ } = activate(prepared);
    gone.release().or_else(|_| gone.release()).expect("the second time");
    let mut stream = TcpStream::from(fd);
    // What the kernel did not take at once is the caller's to write.
    stream.write_all(&unsent).expect("alive");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("option");
    Some(stream)
}

fn activate(prepared: Prepared<'_, FailingKernel>) -> Activated {
    match prepared.activate() {
        Ok(activated) => activated,
        Err((again, _)) => match again.activate() {
            Ok(activated) => activated,
            Err((_, error)) => panic!("the second time: {error}"),
        },
    }
}

#[test]
fn every_call_fails_once() {
    privileged!();
    let mut scene = Scene::new();
    let locks =
        |scene: &Scene| [&scene.old, &scene.new].map(|s| s.run(NftLock::open).expect("nftables"));
    let (mut stayed, mut moved) = (0, 0);
    for n in 1.. {
        let (mut client, mut server) = scene.connect(MOVING_4, "10.200.1.1");
        // Something unread on the way.
        server.write_all(b"from the peer").expect("sent");
        client.write_all(b"to the peer").expect("sent");
        std::thread::sleep(Duration::from_millis(2));
        let fault = Fault::at(n);
        let [old, new] = locks(&scene).map(|lock| failing(lock, &fault));
        let new_stream = try_move(&mut scene, &old, &new, &client);
        let hit = fault.hit.lock().expect("alive").clone();
        let context = format!("call {n}: {hit:?}");
        let here = (scene.old.established(), scene.new.established());
        match new_stream {
            Some(stream) => {
                moved += 1;
                assert_eq!(here, (0, 1), "{context}");
                client = stream;
            }
            None => {
                stayed += 1;
                assert_eq!(here, (1, 0), "{context}");
            }
        }
        let read = |stream: &mut TcpStream, expected: &[u8]| {
            let mut bytes = vec![0; expected.len()];
            std::io::Read::read_exact(stream, &mut bytes).expect(&context);
            assert_eq!(bytes, expected, "{context}");
        };
        read(&mut client, b"from the peer");
        read(&mut server, b"to the peer");
        talks(&mut client, &mut server).expect(&context);
        drop((client, server));
        if scene.at_new {
            scene.move_address();
        }
        if hit.is_none() {
            break;
        }
    }
    eprintln!("{stayed} faults left the connection where it was, {moved} moves went through");
    assert!(stayed > 90 && moved >= 5, "{stayed}, {moved}");
}

/// Between a packet's passing the lock's hook and its being counted as sent, only the
/// socket's own lock is held: `SIOCOUTQNSD`, which does not take it, may be asked in
/// repair mode alone. A connection that was restored by its answer hung: the peer
/// acknowledged what this side believed unsent.
#[test]
fn a_packet_past_the_hook_counts_as_sent() {
    privileged!();
    let scene = Scene::new();
    let (client, _server) = scene.connect(MOVING_4, "10.200.1.1");
    let calls = Fault::at(usize::MAX);
    let old = failing(scene.old.run(NftLock::open).expect("nftables"), &calls);
    drop(old.freeze(client.as_fd()).expect("established"));
    let calls = calls.calls.lock().expect("alive").clone();
    let first = |what: &str| {
        let found = calls.iter().position(|call| call.starts_with(what));
        found.unwrap_or_else(|| panic!("no {what} in {calls:?}"))
    };
    let repair = first("setsockopt Opt { level: 6, name: 19 }");
    assert!(first("lock") < repair && repair < first("queued OutNotSent"), "{calls:?}");
    let asks = calls[first("lock")..repair].iter();
    assert!(asks.into_iter().any(|call| call == "getsockopt Opt { level: 6, name: 11 }"));
}
