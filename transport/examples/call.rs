//! Two endpoints in one process: one answers, one calls.
//!
//! `cargo run -p conet-transport --example call --features std`

use conet_transport::endpoint::{Endpoint, EndpointConfig, EndpointEvent};
use conet_transport::session::handshake::{Entropy, PrivateKey, SystemEntropy};
use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

fn key() -> Result<PrivateKey, Box<dyn Error>> {
    let mut bytes = [0; 32];
    SystemEntropy::default().fill(&mut bytes)?;
    Ok(PrivateKey::new(bytes))
}

fn main() -> Result<(), Box<dyn Error>> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let (server_key, client_key) = (key()?, key()?);
    let server_name = server_key.public();

    let peers = vec![(client_key.public(), None)];
    let server = Endpoint::start(any, EndpointConfig { peers, ..EndpointConfig::new(server_key) })?;
    let address = server.endpoint.local_addr();
    std::thread::spawn(move || {
        for event in server.events {
            match event {
                EndpointEvent::Call { ticket, payload, .. } => {
                    let answer = payload.to_ascii_uppercase();
                    if let Err(error) = server.endpoint.reply(ticket, answer) {
                        eprintln!("server: {error}");
                    }
                }
                other => eprintln!("server: {other:?}"),
            }
        }
    });

    let peers = vec![(server_name, Some(address))];
    let client = Endpoint::start(any, EndpointConfig { peers, ..EndpointConfig::new(client_key) })?;
    let timeout = Duration::from_secs(5);
    let reply = client.endpoint.call(server_name, b"hello".to_vec(), timeout)?;
    println!("reply: {}", String::from_utf8_lossy(&reply));

    let calls = 2000u32;
    let mut times: Vec<Duration> = Vec::new();
    for _ in 0..calls {
        let start = Instant::now();
        client.endpoint.call(server_name, vec![0; 64], timeout)?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    println!("{calls} calls of 64 B: median {:?}", times[times.len() / 2]);
    for peer in client.endpoint.status()?.peers {
        println!("{:?} at {:?}: rtt {:?}, {:?}", peer.key, peer.address, peer.rtt, peer.counters);
    }
    client.endpoint.close();
    client.thread.join();
    Ok(())
}
