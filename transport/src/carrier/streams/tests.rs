use super::*;
use crate::carrier::Carrier;
use crate::direct::{Direct, Wait};
use crate::session::handshake::PrivateKey;
use crate::session::{Event, HubConfig};
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

const LONG: Duration = Duration::from_secs(30);

fn key(n: u8) -> PrivateKey {
    PrivateKey::new([n; 32])
}

fn direct(n: u8, streams: Streams) -> Direct<Streams> {
    Direct::over(streams, HubConfig::new(key(n)), Wait::Adaptive).expect("entropy")
}

/// A server over `streams` that answers with the payload, after `pause` if it is short.
struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<u64>>,
}

impl Server {
    fn start(streams: Streams, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let mut server = direct(2, streams);
        let now = server.now();
        server.hub.add_peer(now, key(1).public(), None);
        let thread = thread::spawn(move || {
            let mut ran = 0;
            while !seen.load(Ordering::Relaxed) {
                server.turn(Duration::from_millis(20)).expect("turns");
                while let Some(event) = server.hub.poll_event() {
                    if let Event::Call { peer, id, payload, .. } = event {
                        ran += 1;
                        if payload.len() < 100 {
                            thread::sleep(pause);
                        }
                        server.hub.reply(&peer, id, payload).expect("asked");
                    }
                }
            }
            ran
        });
        Self { stop, thread: Some(thread) }
    }

    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("once").join().expect("no panic")
    }
}

fn call(client: &mut Direct<Streams>, payload: &[u8]) -> Vec<u8> {
    let (now, server) = (client.now(), key(2).public());
    client.hub.call(now, &server, payload.to_vec(), Some(now + LONG)).expect("taken");
    loop {
        client.turn(Duration::from_millis(20)).expect("turns");
        while let Some(event) = client.hub.poll_event() {
            if let Event::Ended { result, .. } = event {
                return result.expect("a reply");
            }
        }
    }
}

fn calls_of_every_size(mut streams: Streams, at: SocketAddr, server: Server) {
    streams.now = Instant::START;
    let mut client = direct(1, streams);
    let now = client.now();
    client.hub.add_peer(now, key(2).public(), Some(at));
    let sizes = [0, 64, 1400, 5000, 100_000, 3 * 1024 * 1024];
    for size in sizes {
        let payload: Vec<u8> = (0..size).map(|n| (n % 249) as u8).collect();
        assert!(call(&mut client, &payload) == payload, "{size} bytes");
    }
    for _ in 0..20 {
        call(&mut client, &[7; 64]);
    }
    let now = client.now();
    let counters = client.hub.status(now).next().expect("one").counters;
    // The server takes 10 ms for a small one, fifty times what UDP would wait.
    assert_eq!((counters.repeats, counters.stale_replies, counters.moves), (0, 0, 0));
    assert_eq!(server.end(), 20 + sizes.len() as u64);
}

#[test]
fn a_session_over_a_unix_pair_repeats_nothing() {
    let (one, two) = UnixStream::pair().expect("socketpair");
    let mut streams = Streams::new().expect("epoll");
    streams.attach_unix(two).expect("attached");
    let server = Server::start(streams, Duration::from_millis(10));
    let mut streams = Streams::new().expect("epoll");
    let at = streams.attach_unix(one).expect("attached");
    calls_of_every_size(streams, at, server);
}

#[test]
fn a_session_over_tcp_repeats_nothing() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let target = StreamTarget::Tcp(listener.local_addr().expect("bound"));
    let mut streams = Streams::new().expect("epoll");
    streams.listen_tcp(listener).expect("listens");
    let server = Server::start(streams, Duration::from_millis(10));
    let mut streams = Streams::new().expect("epoll");
    let at = streams.dial(&target).expect("dials");
    calls_of_every_size(streams, at, server);
}

#[test]
fn a_refused_connection_is_an_event() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let target = StreamTarget::Tcp(listener.local_addr().expect("bound"));
    drop(listener);
    let mut streams = Streams::new().expect("epoll");
    // Loopback may refuse at once.
    if let Ok(stream) = streams.dial(&target) {
        while streams.happened.is_empty() {
            streams.wait(LONG).expect("waits");
            streams.receive(|_| true).expect("receives");
        }
        assert_eq!(streams.poll_event(), Some(StreamEvent::Refused(stream)));
    }
    assert!(streams.is_empty());
}

fn until(streams: &mut Streams, done: impl Fn(&Streams) -> bool) {
    let begun = std::time::Instant::now();
    while !done(streams) {
        assert!(begun.elapsed() < LONG, "{streams:?}");
        streams.wait(Duration::from_millis(10)).expect("waits");
        streams.receive(|_| true).expect("receives");
    }
}

#[test]
fn a_hostile_length_ends_that_connection_alone() {
    let mut streams = Streams::new().expect("epoll");
    let (mut bad, one) = UnixStream::pair().expect("socketpair");
    let (mut good, two) = UnixStream::pair().expect("socketpair");
    let bad_at = streams.attach_unix(one).expect("attached");
    let good_at = streams.attach_unix(two).expect("attached");
    bad.write_all(&u32::MAX.to_le_bytes()).expect("writes");
    until(&mut streams, |streams| streams.len() == 1);
    assert_eq!(streams.poll_event(), Some(StreamEvent::Closed(bad_at)));
    assert_eq!(bad.read(&mut [0]).expect("closed"), 0);
    good.write_all(&[&40u32.to_le_bytes()[..], &[9; 40]].concat()).expect("writes");
    let mut got = Vec::new();
    while got.is_empty() {
        streams.wait(LONG).expect("waits");
        let take = |incoming: Incoming<'_>| {
            assert_eq!(incoming.from, good_at);
            got.extend_from_slice(incoming.bytes);
            true
        };
        streams.receive(take).expect("receives");
    }
    assert_eq!(got, [9; 40]);
}

#[test]
fn strangers_are_few_and_do_not_stay() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    let address = listener.local_addr().expect("bound");
    let mut streams = Streams::new().expect("epoll");
    streams.listen_tcp(listener).expect("listens");
    let mut hub = Hub::new(HubConfig::new(key(1))).expect("entropy");
    let mut strangers = Vec::new();
    for n in 0..MOST_STRANGERS + 20 {
        strangers.push(TcpStream::connect(address).expect("connects"));
        until(&mut streams, |streams| streams.newest == n as u64 + 1);
        assert!(streams.len() <= MOST_STRANGERS);
    }
    let early = Instant::START + UNUSED / 2;
    assert_eq!(streams.tidy(early, &hub), Some(Instant::START + UNUSED));
    assert_eq!(streams.len(), MOST_STRANGERS);
    // A peer has come by the last one.
    let last = stream_address(streams.newest);
    hub.add_peer(early, key(2).public(), Some(last));
    streams.tidy(early, &hub);
    streams.tidy(Instant::START + UNUSED, &hub);
    assert_eq!(streams.len(), 1);
    hub.remove_peer(&key(2).public()).expect("there");
    streams.tidy(early + UNUSED * 2, &hub);
    assert!(streams.is_empty());
}

/// Many connections that all have something to say are all heard.
#[test]
fn a_busy_connection_does_not_keep_others_from_being_read() {
    let mut streams = Streams::new().expect("epoll");
    let record = [&40u32.to_le_bytes()[..], &[9; 40]].concat();
    let mut others = Vec::new();
    for _ in 0..FEW + 3 {
        let (mut other, one) = UnixStream::pair().expect("socketpair");
        streams.attach_unix(one).expect("attached");
        other.write_all(&record.repeat(1000)).expect("fits");
        others.push(other);
    }
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..others.len() {
        streams.wait(LONG).expect("waits");
        // One datagram a turn, and each time of another.
        streams
            .receive(|incoming| {
                seen.insert(incoming.from);
                false
            })
            .expect("receives");
    }
    assert_eq!(seen.len(), others.len());
}

#[test]
fn whoever_does_not_read_costs_a_bounded_queue() {
    let mut streams = Streams::new().expect("epoll");
    let (_other, one) = UnixStream::pair().expect("socketpair");
    let at = streams.attach_unix(one).expect("attached");
    for _ in 0..2 * framing::MOST_OUT / 1400 {
        streams.send(at, &[7; 1400], 1400).expect("lost, that is all");
    }
    streams.flush().expect("flushes");
    let waiting = streams.connections.values().map(|one| one.outbox.waiting().len()).sum::<usize>();
    assert!(waiting <= framing::MOST_OUT);
    assert!(!streams.wait(Duration::from_millis(5)).expect("waits"), "nothing to do");
}

/// A unix connection that somebody made to us; gives his end of it.
fn accepted(streams: &mut Streams) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    streams.take_stranger(Socket::from(ours)).expect("room");
    theirs
}

/// Once a connection had been a peer's it was no stranger any more, and a peer that went from one
/// to the next could use up all file descriptors in the time that unused ones are kept.
#[test]
fn a_peer_that_goes_from_stream_to_stream_keeps_few() {
    let (mut streams, mut hub) =
        (Streams::new().expect("epoll"), Hub::new(HubConfig::new(key(1))).expect("entropy"));
    let (now, mut theirs) = (Instant::START, Vec::new());
    for n in 1..=200 {
        theirs.push(accepted(&mut streams));
        hub.add_peer(now, key(2).public(), Some(stream_address(n)));
        streams.tidy(now, &hub);
    }
    assert!(streams.len() <= MOST_STRANGERS + 1, "{}", streams.len());
    // That one stays, however long.
    streams.tidy(now + UNUSED * 2, &hub);
    assert_eq!((streams.len(), streams.connections.contains_key(&200)), (1, true));
}

/// Each look went through all peers for each connection.
#[test]
fn looking_after_connections_costs_as_much_as_there_are() {
    let time = |count: u64| {
        let (mut streams, mut hub) =
            (Streams::new().expect("epoll"), Hub::new(HubConfig::new(key(1))).expect("entropy"));
        let (now, mut theirs) = (Instant::START, Vec::new());
        for n in 1..=count {
            theirs.push(accepted(&mut streams));
            let mut key = [3; 32];
            key[8..16].copy_from_slice(&n.to_le_bytes());
            hub.add_peer(now, PrivateKey::new(key).public(), Some(stream_address(n)));
            streams.tidy(now, &hub);
        }
        assert_eq!(streams.len() as u64, count);
        let look = |_| {
            let begun = std::time::Instant::now();
            for _ in 0..10 {
                streams.tidy(now, &hub);
            }
            begun.elapsed()
        };
        (0..7).map(look).min().expect("seven")
    };
    let (few, many) = (time(40), time(400));
    assert!(many < few * 40, "{few:?} for 40, {many:?} for 400");
}
