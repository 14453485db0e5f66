//! What waiting costs: calls beside ten thousand parked ones, processor time when nothing
//! happens, and calls while other programs want every processor twice.
//!
//! `cargo run --release -p conet-transport --example waiting --features std`
//!
//! Each figure stands beside its peer of the same run, in turns. Two nodes in one process,
//! a thread each, over loopback.

use conet_transport::direct::{Direct, Wait};
use conet_transport::session::handshake::{PrivateKey, PublicKey};
use conet_transport::session::{Event, HubConfig, Limits};
use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const LOOK: Duration = Duration::from_secs(1);
const PARKED: usize = 10_000;
const ROUNDS: usize = 20;
const CALLS: usize = 1000;
const IDLE: Duration = Duration::from_secs(5);

type Failed = Box<dyn Error + Send + Sync>;

/// Two nodes; the client is the caller's.
struct Pair {
    client: Direct,
    server: PublicKey,
    stop: Arc<AtomicBool>,
}

/// Keys here are examples; see `direct.rs` for good ones.
fn node(key: u8, wait: Wait) -> Result<Direct, Failed> {
    let socket = UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    let limits = Limits { queued: 2 * PARKED, ..Limits::default() };
    let config = HubConfig { limits, ..HubConfig::new(PrivateKey::new([key; 32])) };
    Ok(Direct::new(socket, config, wait)?)
}

/// Answers all calls but those that want to be parked.
fn serve(mut server: Direct, stop: &AtomicBool) -> Result<(), Failed> {
    while !stop.load(Ordering::Relaxed) {
        server.turn(LOOK)?;
        while let Some(event) = server.hub.poll_event() {
            if let Event::Call { peer, id, payload, .. } = event
                && payload != b"park"
            {
                server.hub.reply(&peer, id, payload)?;
            }
        }
    }
    Ok(())
}

impl Pair {
    fn start(wait: Wait) -> Result<Self, Failed> {
        let (mut client, mut server) = (node(1, wait)?, node(2, wait)?);
        let (name, address, now) = (server.hub.public_key(), server.local_addr()?, client.now());
        server.hub.add_peer(now, client.hub.public_key(), None);
        client.hub.add_peer(now, name, Some(address));
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        thread::spawn(move || serve(server, &seen).map_err(|error| eprintln!("server: {error}")));
        let mut pair = Self { client, server: name, stop };
        pair.calls(CALLS)?;
        Ok(pair)
    }

    /// So many calls of 64 B, one after the other.
    fn calls(&mut self, count: usize) -> Result<Vec<Duration>, Failed> {
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let begun = Instant::now();
            let mut payload = self.client.hub.buffer(&self.server, 64);
            payload.resize(64, 7);
            let now = self.client.now();
            self.client.hub.call(now, &self.server, payload, None)?;
            let mut waits = true;
            while waits {
                self.client.turn(LOOK)?;
                while let Some(event) = self.client.hub.poll_event() {
                    if let Event::Ended { result, .. } = event {
                        self.client.hub.recycle(&self.server, result?);
                        waits = false;
                    }
                }
            }
            times.push(begun.elapsed());
        }
        Ok(times)
    }

    /// Begins calls that nobody answers, until all of them wait at the server.
    fn park(&mut self) -> Result<(), Failed> {
        for _ in 0..PARKED {
            let now = self.client.now();
            self.client.hub.call(now, &self.server, b"park".to_vec(), None)?;
        }
        self.idle(Duration::from_secs(3))
    }

    fn idle(&mut self, time: Duration) -> Result<(), Failed> {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            self.client.turn(left.max(Duration::from_millis(1)))?;
            while self.client.hub.poll_event().is_some() {}
        }
        Ok(())
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn show(what: &str, mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort_unstable();
    let at =
        |permille: usize| times.get(times.len() * permille / 1000).copied().unwrap_or_default();
    let (p50, p99) = (at(500), at(990));
    println!("{what:<44} p50 {p50:>10.1?}  p99 {p99:>10.1?}  p99.9 {:>10.1?}", at(999));
    (p50, p99)
}

/// Processor time of this process (`man 5 proc_pid_stat`: ticks of 10 ms).
fn processor_time() -> Result<Duration, Failed> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(Duration::from_millis(ticks * 10))
}

fn parked() -> Result<(), Failed> {
    let (mut alone, mut beside) = (Pair::start(Wait::Block)?, Pair::start(Wait::Block)?);
    beside.park()?;
    let (mut one, mut two) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        one.extend(alone.calls(CALLS)?);
        two.extend(beside.calls(CALLS)?);
    }
    let status = beside.client.hub.status(beside.client.now()).next().ok_or("no peer")?;
    println!("{} calls wait at the server", status.calls_in_flight);
    let (first, _) = show("calls alone", one);
    let (second, _) = show("calls beside 10,000 parked ones", two);
    println!("ratio of the medians: {:.2}", second.as_secs_f64() / first.as_secs_f64());
    for wait in [Wait::Adaptive, Wait::Block] {
        let mut pair = Pair::start(wait)?;
        pair.park()?;
        let before = processor_time()?;
        pair.idle(IDLE)?;
        let used = processor_time()?.saturating_sub(before).as_secs_f64() / IDLE.as_secs_f64();
        println!("{wait:?}, idle beside 10,000 parked calls: {:.2} % of a processor", used * 100.0);
    }
    Ok(())
}

fn crowded() -> Result<(), Failed> {
    let loops = 2 * thread::available_parallelism()?.get();
    let stop = Arc::new(AtomicBool::new(false));
    let mut pairs = [Pair::start(Wait::Adaptive)?, Pair::start(Wait::Block)?];
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..loops {
        let stop = stop.clone();
        thread::spawn(move || while !stop.load(Ordering::Relaxed) {});
    }
    for _ in 0..ROUNDS {
        for (pair, times) in pairs.iter_mut().zip(&mut times) {
            times.extend(pair.calls(CALLS / 4)?);
        }
    }
    stop.store(true, Ordering::Relaxed);
    println!("beside {loops} busy loops:");
    let [adaptive, block] = times;
    let (_, adaptive) = show("  adaptive", adaptive);
    let (_, block) = show("  blocking", block);
    println!("ratio of p99: {:.2}", adaptive.as_secs_f64() / block.as_secs_f64());
    Ok(())
}

fn free() -> Result<(), Failed> {
    let mut pairs = [Pair::start(Wait::Adaptive)?, Pair::start(Wait::Block)?];
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (pair, times) in pairs.iter_mut().zip(&mut times) {
            times.extend(pair.calls(CALLS)?);
        }
    }
    let [adaptive, block] = times;
    show("nothing else runs, adaptive", adaptive);
    show("nothing else runs, blocking", block);
    Ok(())
}

fn main() -> Result<(), Failed> {
    free()?;
    parked()?;
    crowded()
}
