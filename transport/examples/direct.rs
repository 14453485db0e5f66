//! Two nodes, each in one thread with a `Direct`: calls, a row of dependent calls, and a
//! session that moves to another socket in the middle.
//!
//! `cargo run --release -p conet-transport --example direct --features std`

use conet_transport::direct::{Direct, Wait};
use conet_transport::session::handshake::{Entropy, PrivateKey, PublicKey, SystemEntropy};
use conet_transport::session::{Event, HubConfig, Lane};
use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

const LOOK: Duration = Duration::from_millis(20);

fn key() -> Result<[u8; 32], Box<dyn Error>> {
    let mut bytes = [0; 32];
    SystemEntropy::default().fill(&mut bytes)?;
    Ok(bytes)
}

fn direct(key: [u8; 32]) -> Result<Direct, Box<dyn Error>> {
    let socket = UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    Ok(Direct::new(socket, HubConfig::new(PrivateKey::new(key)), Wait::Adaptive)?)
}

/// Answers each call with its argument, if it has one, and what it says.
fn serve(mut server: Direct) -> Result<(), Box<dyn Error + Send + Sync>> {
    loop {
        server.turn(LOOK)?;
        while let Some(event) = server.hub.poll_event() {
            if let Event::Call { peer, id, payload, argument, .. } = event {
                let mut answer = argument.unwrap_or_default();
                answer.extend_from_slice(&payload);
                server.hub.reply(&peer, id, answer)?;
                server.hub.recycle(&peer, payload);
            }
        }
    }
}

/// Waits for so many calls; gives the last reply.
fn finish(client: &mut Direct, mut calls: usize) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut last = Vec::new();
    while calls > 0 {
        client.turn(LOOK)?;
        while let Some(event) = client.hub.poll_event() {
            if let Event::Ended { result, .. } = event {
                last = result?;
                calls -= 1;
            }
        }
    }
    Ok(last)
}

fn call(client: &mut Direct, server: &PublicKey, say: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut payload = client.hub.buffer(server, say.len());
    payload.extend_from_slice(say);
    let now = client.now();
    client.hub.call(now, server, payload, Some(now + Duration::from_secs(5)))?;
    finish(client, 1)
}

fn main() -> Result<(), Box<dyn Error>> {
    let client_key = key()?;
    let (mut client, mut server) = (direct(client_key)?, direct(key()?)?);
    let (name, address) = (server.hub.public_key(), server.local_addr()?);
    let now = server.now();
    server.hub.add_peer(now, client.hub.public_key(), None);
    std::thread::spawn(move || serve(server).map_err(|error| eprintln!("server: {error}")));

    let now = client.now();
    client.hub.add_peer(now, name, Some(address));
    println!("reply: {}", String::from_utf8_lossy(&call(&mut client, &name, b"hello")?));

    let row = ["three ", "calls ", "in one datagram"].map(|say| (say.as_bytes().to_vec(), false));
    let now = client.now();
    client.hub.call_row(now, &name, Lane::Calls, row.into_iter(), None, &mut Vec::new())?;
    println!("row: {}", String::from_utf8_lossy(&finish(&mut client, 3)?));

    let mut times = Vec::new();
    for _ in 0..2000 {
        let start = Instant::now();
        let reply = call(&mut client, &name, &[7; 64])?;
        client.hub.recycle(&name, reply);
        times.push(start.elapsed());
    }
    times.sort_unstable();
    println!("2000 calls of 64 B: median {:?}", times[times.len() / 2]);

    // As if to another process: all that goes there is the image.
    let now = client.now();
    let frozen = client.hub.freeze(now, &name)?;
    let mut elsewhere = direct(client_key)?;
    let now = elsewhere.now();
    elsewhere.hub.thaw(now, &frozen.image, None)?;
    let reply = call(&mut elsewhere, &name, b"from elsewhere")?;
    println!("moved with {} bytes: {}", frozen.image.len(), String::from_utf8_lossy(&reply));
    Ok(())
}
