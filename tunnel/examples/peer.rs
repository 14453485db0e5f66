//! One end of a tunnel, on Linux (as root) or Windows (as administrator, with wintun.dll
//! beside the program):
//!
//! ```text
//! peer KEY-FILE ADDRESS PEER-KEY ENDPOINT PREFIX[,PREFIX…]
//! peer my.key 10.77.1.1/24 SkK3…= 192.0.2.2:51820 10.77.2.0/24
//! ```
//!
//! `KEY-FILE` holds a private key as `wg genkey` prints it. It runs until standard input
//! ends, and then says what came and went.

use std::fs;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::process::ExitCode;

use conet_tunnel::{
    Config, DEFAULT_MTU, DEFAULT_PORT, DeviceName, Offloads, PeerConfig, PrivateKey, Tunnel,
};

type Failure = Box<dyn std::error::Error>;

fn run(args: &[String]) -> Result<(), Failure> {
    let [key, address, peer, endpoint, prefixes] = args else {
        return Err("peer KEY-FILE ADDRESS PEER-KEY ENDPOINT PREFIX[,PREFIX…]".into());
    };
    let private_key: PrivateKey = fs::read_to_string(key)
        .map_err(|error| format!("{key}: {error}"))?
        .trim()
        .parse()
        .map_err(|error| format!("{key}: {error}"))?;
    let allowed = prefixes.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let tunnel = Tunnel::start(Config {
        device: DeviceName::new("conet0")?,
        private_key,
        listen: SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)),
        addresses: vec![address.parse()?],
        mtu: DEFAULT_MTU,
        offloads: Offloads::ALL,
        peers: vec![PeerConfig::new(peer.parse()?, Some(endpoint.parse()?), allowed)],
    })?;
    println!("we are {}; end standard input to stop", tunnel.snapshot()?.public_key);
    io::stdin().read_to_end(&mut Vec::new())?;
    for peer in tunnel.snapshot()?.peers {
        println!("{}: {} bytes came, {} went", peer.public_key, peer.rx_bytes, peer.tx_bytes);
    }
    Ok(())
}

fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peer: {error}");
            ExitCode::FAILURE
        }
    }
}
