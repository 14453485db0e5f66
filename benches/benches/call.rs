//! A call of 64 bytes that is answered with 64 bytes, over loopback: conet's
//! endpoint beside a datagram and a TCP connection that are bounced by a thread.
//!
//! The references are what the kernel alone costs: one blocking socket on each
//! side, no encryption, nothing sent again. A call of conet's crosses four threads
//! (caller, its endpoint, the other endpoint, who answers).
//!
//! Threads are pinned, and in two ways. With all on one processor the code is what
//! takes the time. With callers and answers on two, waking a sleeping processor
//! takes most of it: in a virtual machine that can be ten times a whole bounce, and
//! less for whoever keeps its processor awake, so the order may turn around.
//!
//! The three are measured in turn, and that twice, in groups of their own: where
//! the two groups differ, the machine was not quiet.
#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]
#![allow(missing_docs, reason = "criterion's macros make undocumented items")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use conet_transport::endpoint::{Endpoint, EndpointConfig, EndpointEvent, Started};
use conet_transport::session::handshake::{Entropy, PrivateKey, PublicKey, SystemEntropy};
use criterion::{Criterion, criterion_group, criterion_main};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const PATIENCE: Duration = Duration::from_secs(5);
const SIZE: usize = 64;

/// The processor for calling and the one for answering, where there are two.
fn processors() -> Option<[usize; 2]> {
    let set = sched_getaffinity(None).ok()?;
    let mut all = (0..CpuSet::MAX_CPU).filter(|processor| set.is_set(*processor));
    Some([all.next()?, all.next()?])
}

/// Keeps the calling thread, and those it starts, on a processor.
fn pin(processor: Option<usize>) {
    if let Some(processor) = processor {
        let mut set = CpuSet::new();
        set.set(processor);
        sched_setaffinity(None, &set).unwrap();
    }
}

fn private_key() -> PrivateKey {
    let mut bytes = [0; 32];
    SystemEntropy::default().fill(&mut bytes).unwrap();
    PrivateKey::new(bytes)
}

/// Answers calls until the process ends; gives where.
fn answer_calls(key: PrivateKey, caller: PublicKey, on: Option<usize>) -> SocketAddr {
    let (told, heard) = std::sync::mpsc::channel();
    thread::spawn(move || {
        pin(on);
        let peers = vec![(caller, None)];
        let config = EndpointConfig { peers, ..EndpointConfig::new(key) };
        let Started { endpoint, events, .. } = Endpoint::start(ANY, config).unwrap();
        told.send(endpoint.local_addr()).unwrap();
        for event in events {
            if let EndpointEvent::Call { ticket, payload, .. } = event {
                endpoint.reply(ticket, payload).unwrap();
            }
        }
    });
    heard.recv().unwrap()
}

/// Bounces datagrams until the process ends; gives where.
fn bounce_datagrams(on: Option<usize>) -> SocketAddr {
    let socket = UdpSocket::bind(ANY).unwrap();
    let at = socket.local_addr().unwrap();
    thread::spawn(move || {
        pin(on);
        let mut bytes = [0; SIZE];
        while let Ok((length, from)) = socket.recv_from(&mut bytes) {
            socket.send_to(&bytes[..length], from).unwrap();
        }
    });
    at
}

/// Bounces the bytes of one connection until it ends; gives where.
fn bounce_stream(on: Option<usize>) -> SocketAddr {
    let listener = TcpListener::bind(ANY).unwrap();
    let at = listener.local_addr().unwrap();
    thread::spawn(move || {
        pin(on);
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        let mut bytes = [0; SIZE];
        while stream.read_exact(&mut bytes).is_ok() && stream.write_all(&bytes).is_ok() {}
    });
    at
}

/// Measures with the calling and the answering threads on these processors.
fn measure(criterion: &mut Criterion, placed: &str, on: [Option<usize>; 2]) {
    let [calling, answering] = on;
    let (ours, theirs) = (private_key(), private_key());
    let (our_name, name) = (ours.public(), theirs.public());
    let address = answer_calls(theirs, our_name, answering);
    let datagrams = UdpSocket::bind(ANY).unwrap();
    datagrams.connect(bounce_datagrams(answering)).unwrap();
    datagrams.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = TcpStream::connect(bounce_stream(answering)).unwrap();
    stream.set_nodelay(true).unwrap();
    pin(calling);
    let peers = vec![(name, Some(address))];
    let config = EndpointConfig { peers, ..EndpointConfig::new(ours) };
    let Started { endpoint, thread, events: _events } = Endpoint::start(ANY, config).unwrap();
    // The first one pays for the handshake.
    endpoint.call(name, vec![0; SIZE], PATIENCE).unwrap();
    let mut bytes = [7; SIZE];
    for turn in ["first", "second"] {
        let mut group = criterion.benchmark_group(format!("call 64 B, {placed}, {turn}"));
        group.bench_function("udp", |bencher| {
            bencher.iter(|| {
                datagrams.send(&bytes).unwrap();
                assert_eq!(datagrams.recv(&mut bytes).unwrap(), SIZE);
            });
        });
        group.bench_function("tcp_nodelay", |bencher| {
            bencher.iter(|| {
                stream.write_all(&bytes).unwrap();
                stream.read_exact(&mut bytes).unwrap();
            });
        });
        group.bench_function("conet", |bencher| {
            bencher.iter(|| endpoint.call(name, vec![7; SIZE], PATIENCE).unwrap());
        });
        group.finish();
    }
    endpoint.close();
    assert!(thread.join());
}

fn call(criterion: &mut Criterion) {
    match processors() {
        Some([one, two]) => {
            eprintln!("callers on processor {one}, answers there or on {two}");
            measure(criterion, "one processor", [Some(one); 2]);
            measure(criterion, "two processors", [Some(one), Some(two)]);
        }
        None => {
            eprintln!("one processor, unpinned");
            measure(criterion, "unpinned", [None; 2]);
        }
    }
}

criterion_group!(benches, call);
criterion_main!(benches);
