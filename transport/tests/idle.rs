//! What waiting costs the processor, on real sockets: a test binary of its own, because it
//! counts what the whole process has used.

use conet_transport::endpoint::{Endpoint, EndpointConfig, EndpointEvent, TcpFallback};
use conet_transport::session::Limits;
use conet_transport::session::handshake::PrivateKey;
use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);
const PARKED: usize = 10_000;
const IDLE: Duration = Duration::from_secs(5);

/// Time that this process's threads have had a processor (`proc_pid_schedstat`, first field).
fn on_processor() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").expect("proc");
    let times = tasks.filter_map(|task| {
        // One that has just ended is not there.
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(times.sum())
}

/// Ten thousand calls that wait, a session that could go over to TCP, and a peer that is
/// nowhere: others are answered meanwhile, and all of it takes less than a hundredth of a
/// processor.
#[test]
fn ten_thousand_parked_calls_cost_little() {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let key = |n| PrivateKey::new([n; 32]);
    let start = |n, peers| {
        let limits = Limits { queued: 2 * PARKED, ..Limits::default() };
        let config = EndpointConfig {
            peers,
            limits,
            tcp_fallback: TcpFallback::Listen,
            ..EndpointConfig::new(key(n))
        };
        Endpoint::start(any, config).expect("starts")
    };
    let server = start(2, vec![(key(1).public(), None)]);
    let to = key(2).public();
    // Nobody listens at the discard port.
    let nowhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
    let peers = vec![(to, Some(server.endpoint.local_addr())), (key(3).public(), Some(nowhere))];
    let client = start(1, peers);
    let endpoint = server.endpoint.clone();
    thread::spawn(move || {
        for event in server.events {
            if let EndpointEvent::Call { ticket, payload, .. } = event
                && payload != b"park"
            {
                endpoint.reply(ticket, payload).expect("somebody waits");
            }
        }
    });
    let hour = Duration::from_secs(3600);
    let parked: Vec<_> =
        (0..PARKED).map(|_| client.endpoint.begin(to, b"park".to_vec(), hour)).collect();
    let begun = Instant::now();
    let count = || server.endpoint.status().expect("runs").peers[0].parked;
    while count() < PARKED {
        assert!(begun.elapsed() < LONG, "{} are parked", count());
        thread::sleep(Duration::from_millis(100));
    }
    for n in 0..100 {
        assert_eq!(client.endpoint.call(to, vec![n; 64], LONG), Ok(vec![n; 64]));
    }
    // Of several spans one must be quiet: what has just been asked for may be asked for again.
    let mut spans = Vec::new();
    let is_quiet = |&(used, passed): &(Duration, Duration)| used * 100 < passed;
    while !spans.last().is_some_and(is_quiet) {
        assert!(spans.len() < 8, "used and passed: {spans:?}");
        let (before, begun) = (on_processor(), Instant::now());
        thread::sleep(IDLE);
        spans.push((on_processor().saturating_sub(before), begun.elapsed()));
    }
    assert!(parked.iter().all(|call| call.wait_timeout(Duration::ZERO).is_none()));
}
