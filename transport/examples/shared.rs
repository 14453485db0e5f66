//! Two processes of one host that call each other through shared memory.
//!
//! The program starts itself again with one end of a unix socket as its standard input;
//! the two share rings by it, and neither trusts the other.
//!
//! `cargo run --release -p conet-transport --example shared --features std [-- spin]`
//!
//! With `spin` neither process ever sleeps, which wants two processors; then the rings are
//! measured alone as well, without a session: what is left is what a session costs.

use conet_transport::carrier::shared::peer_address;
use conet_transport::carrier::{Carrier, Incoming, Shared};
use conet_transport::direct::{Direct, Wait};
use conet_transport::session::handshake::{PrivateKey, local_features};
use conet_transport::session::{Event, HubConfig};
use std::error::Error;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const LOOK: Duration = Duration::from_millis(20);
const CALLS: u32 = 100_000;

/// Keys here are examples; see `direct.rs` for good ones.
fn direct(own: u8, shared: Shared, spins: bool) -> Result<Direct<Shared>, Box<dyn Error>> {
    let (key, peer) = (PrivateKey::new([own; 32]), PrivateKey::new([3 - own; 32]).public());
    let config = HubConfig { features: local_features(), ..HubConfig::new(key) };
    let wait = if spins { Wait::Spin } else { Wait::Adaptive };
    let mut direct = Direct::over(shared, config, wait)?;
    let now = direct.now();
    direct.hub.add_peer(now, peer, (own == 1).then(peer_address));
    Ok(direct)
}

/// The next datagram of 64 B, without sleeping.
fn next(rings: &mut Shared) -> io::Result<[u8; 64]> {
    let mut got = [0; 64];
    let mut copy = |incoming: Incoming<'_>| {
        got.copy_from_slice(incoming.bytes);
        false
    };
    while rings.receive(&mut copy)? == 0 {
        std::hint::spin_loop();
    }
    Ok(got)
}

fn say(rings: &mut Shared, bytes: &[u8; 64]) -> io::Result<()> {
    rings.send(peer_address(), bytes, bytes.len())?;
    rings.flush()
}

fn show(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |permille: usize| times[times.len() * permille / 1000];
    println!("{CALLS} {what} of 64 B: p50 {:?}, p99 {:?}, p99.9 {:?}", at(500), at(990), at(999));
}

fn serve(spins: bool) -> Result<(), Box<dyn Error>> {
    let bell = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut rings = Shared::accept(bell)?;
    for _ in 0..if spins { CALLS } else { 0 } {
        let said = next(&mut rings)?;
        say(&mut rings, &said)?;
    }
    let mut server = direct(2, rings, spins)?;
    // Until the other process has gone.
    while server.turn(LOOK).is_ok() {
        while let Some(event) = server.hub.poll_event() {
            if let Event::Call { peer, id, payload, .. } = event {
                server.hub.reply(&peer, id, payload)?;
            }
        }
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let spins = arguments.iter().any(|argument| argument == "spin");
    if arguments.iter().any(|argument| argument == "serve") {
        return serve(spins);
    }
    let (ours, theirs) = UnixStream::pair()?;
    let mut child = Command::new(std::env::current_exe()?);
    child.arg("serve").stdin(Stdio::from(OwnedFd::from(theirs)));
    let mut child = child.args(spins.then_some("spin")).spawn()?;
    let mut rings = Shared::offer(ours)?;
    if spins {
        let mut times = Vec::new();
        for n in 0..CALLS {
            let begun = Instant::now();
            let mut said = [7; 64];
            said[..4].copy_from_slice(&n.to_le_bytes());
            say(&mut rings, &said)?;
            if next(&mut rings)? != said {
                return Err("the other process said something else".into());
            }
            times.push(begun.elapsed());
        }
        show("round trips of the rings alone", times);
    }
    let mut client = direct(1, rings, spins)?;
    let server = PrivateKey::new([2; 32]).public();

    let mut times = Vec::new();
    for _ in 0..CALLS {
        let begun = Instant::now();
        let mut payload = client.hub.buffer(&server, 64);
        payload.resize(64, 7);
        let now = client.now();
        client.hub.call(now, &server, payload, Some(now + Duration::from_secs(10)))?;
        let mut waits = true;
        while waits {
            client.turn(LOOK)?;
            while let Some(event) = client.hub.poll_event() {
                if let Event::Ended { result, .. } = event {
                    client.hub.recycle(&server, result?);
                    waits = false;
                }
            }
        }
        times.push(begun.elapsed());
    }
    show("calls", times);
    drop(client);
    child.wait()?;
    Ok(())
}
