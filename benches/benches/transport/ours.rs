//! Ours: a `Direct` in each of two threads, over any carrier.

use anyhow::{Result, bail, ensure};
use conet_transport::carrier::shared::peer_address;
use conet_transport::carrier::{Carrier, Shared, Streams, Udp};
use conet_transport::direct::{Direct, Wait};
use conet_transport::session::handshake::{FEATURES, PrivateKey, PublicKey, local_features};
use conet_transport::session::{CallId, Event, HubConfig, Lane, Limits};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::measure::{Place, Turn, answer_length, pin};
use crate::stream::Carried;
use conet_wire::session::handshake::{FEATURE_AES, FEATURE_PLAIN};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const PATIENCE: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(20);

/// How packets are protected.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Sealed {
    Plain,
    Aes,
    ChaCha,
}

impl Sealed {
    pub(crate) const ALL: [Self; 3] = [Self::Plain, Self::Aes, Self::ChaCha];

    /// Whether this processor does it well.
    pub(crate) fn is_there(self) -> bool {
        self != Self::Aes || local_features() & FEATURE_AES != 0
    }

    pub(crate) const fn features(self) -> u32 {
        FEATURES
            | match self {
                Self::Plain => FEATURE_PLAIN,
                Self::Aes => FEATURE_AES,
                Self::ChaCha => 0,
            }
    }
}

/// What carries them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Over {
    Udp,
    Tcp,
    Shared,
}

/// Longest datagram over the carriers on which length costs nothing.
const LONG: usize = 16 * 1024;

fn direct<C: Carrier>(
    carrier: C,
    key: u8,
    sealed: Sealed,
    wait: Wait,
    datagram: usize,
) -> Result<Direct<C>> {
    let config = HubConfig {
        features: sealed.features(),
        limits: Limits { datagram, ..Limits::default() },
        ..HubConfig::new(PrivateKey::new([key; 32]))
    };
    Ok(Direct::over(carrier, config, wait)?)
}

/// What a pair of ours is measured by.
pub(crate) trait Ours {
    /// One call after the other.
    fn calls(&mut self, size: usize, calls: usize) -> Result<Turn>;
    /// Eight calls in a row, each with the result of the one before.
    fn row(&mut self, size: usize) -> Result<()>;
    /// Calls while large ones are always under way.
    fn calls_beside_bulk(&mut self, calls: usize) -> Result<Turn>;
    /// What large calls carry in `time`, two of them always under way.
    fn bulk(&mut self, time: Duration) -> Result<Carried>;
    fn end(self: Box<Self>) -> Result<()>;
}

/// Starts a client and its server.
pub(crate) fn start(over: Over, place: Place, sealed: Sealed, wait: Wait) -> Result<Box<dyn Ours>> {
    Ok(match over {
        Over::Udp => {
            let (mut client, mut server) =
                (Udp::new(UdpSocket::bind(ANY)?), Udp::new(UdpSocket::bind(ANY)?));
            let at = server.local_addr()?;
            server.connect(client.local_addr()?)?;
            client.connect(at)?;
            let datagram = Limits::default().datagram;
            Box::new(Pair::start((client, server, at), place, sealed, wait, datagram)?)
        }
        Over::Tcp => {
            let listener = TcpListener::bind(ANY)?;
            let stream = TcpStream::connect(listener.local_addr()?)?;
            let (mut client, mut server) = (Streams::new()?, Streams::new()?);
            let at = client.attach_tcp(stream)?;
            server.attach_tcp(listener.accept()?.0)?;
            Box::new(Pair::start((client, server, at), place, sealed, wait, LONG)?)
        }
        Over::Shared => {
            let (one, two) = UnixStream::pair()?;
            let accepting = std::thread::spawn(move || Shared::accept(two));
            let client = Shared::offer(one)?;
            let Ok(server) = accepting.join() else { bail!("nobody accepts") };
            Box::new(Pair::start((client, server?, peer_address()), place, sealed, wait, LONG)?)
        }
    })
}

/// A client whose server answers in a thread of its own.
struct Pair<C> {
    client: Direct<C>,
    server: PublicKey,
    ids: Vec<CallId>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

/// Answers until it is told to stop.
fn serve<C: Carrier>(mut server: Direct<C>, stop: &AtomicBool) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        server.turn(LOOK)?;
        while let Some(event) = server.hub.poll_event() {
            if let Event::Call { peer, id, payload, argument, .. } = event {
                let length = answer_length(payload.len());
                if length == payload.len() {
                    server.hub.reply(&peer, id, payload)?;
                } else {
                    // What comes next goes where this one was.
                    let mut answer = server.hub.buffer(&peer, length);
                    answer.extend_from_slice(&payload[..length]);
                    server.hub.reply(&peer, id, answer)?;
                    server.hub.recycle(&peer, payload);
                }
                if let Some(argument) = argument {
                    server.hub.recycle(&peer, argument);
                }
            }
        }
    }
    Ok(())
}

impl<C: Carrier + Send + 'static> Pair<C> {
    /// `carriers`: the client's, the server's, and where the client sees the server.
    fn start(
        carriers: (C, C, SocketAddr),
        place: Place,
        sealed: Sealed,
        wait: Wait,
        datagram: usize,
    ) -> Result<Self> {
        let (client, server, address) = carriers;
        let [own, name] = [1, 2].map(|key| PrivateKey::new([key; 32]).public());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        // Made in its own thread: from one thread's allocator both would have memory in
        // common cache lines, which two programs never have.
        let thread = std::thread::spawn(move || {
            pin(place.server);
            let mut server = direct(server, 2, sealed, wait, datagram)?;
            let now = server.now();
            server.hub.add_peer(now, own, None);
            serve(server, &stopped)
        });
        pin(place.client);
        let mut client = direct(client, 1, sealed, wait, datagram)?;
        let now = client.now();
        client.hub.add_peer(now, name, Some(address));
        client.hub.handle_timeout(now);
        let mut pair = Self { client, server: name, ids: Vec::new(), stop, thread };
        // The first one pays for the handshake, and a few more for the estimate of time.
        for _ in 0..32 {
            pair.call(Lane::Calls, 64)?;
        }
        Ok(pair)
    }

    /// Begins a call; its end is waited for by [`finish`](Self::finish).
    fn begin(&mut self, lane: Lane, size: usize) -> Result<CallId> {
        // As the streams, which are given the same bytes again and again.
        let payload = self.client.hub.used_buffer(&self.server, size);
        let now = self.client.now();
        Ok(self.client.hub.call_on(now, &self.server, lane, payload, None)?)
    }

    /// Waits until so many calls have ended.
    fn finish(&mut self, mut calls: usize) -> Result<()> {
        // A look at the clock is a tenth of what is measured here.
        let mut start = None;
        while calls > 0 {
            self.client.turn(LOOK)?;
            while let Some(event) = self.client.hub.poll_event() {
                if let Event::Ended { peer, result, .. } = event {
                    self.client.hub.recycle(&peer, result?);
                    calls -= 1;
                }
            }
            ensure!(
                calls == 0 || start.get_or_insert_with(Instant::now).elapsed() < PATIENCE,
                "a call has not ended: {:?}",
                self.client.hub.status(self.client.now()).next()
            );
        }
        Ok(())
    }

    fn call(&mut self, lane: Lane, size: usize) -> Result<()> {
        self.begin(lane, size)?;
        self.finish(1)
    }

    /// Waits for one call; gives how many others ended meanwhile.
    fn finish_one(&mut self, wanted: CallId) -> Result<usize> {
        let mut start = None;
        let (mut others, mut is_over) = (0, false);
        while !is_over {
            self.client.turn(LOOK)?;
            while let Some(event) = self.client.hub.poll_event() {
                if let Event::Ended { peer, call, result } = event {
                    self.client.hub.recycle(&peer, result?);
                    is_over |= call == wanted;
                    others += usize::from(call != wanted);
                }
            }
            ensure!(
                is_over || start.get_or_insert_with(Instant::now).elapsed() < PATIENCE,
                "a call beside bulk has not ended"
            );
        }
        Ok(others)
    }
}

impl<C: Carrier + Send + 'static> Ours for Pair<C> {
    fn row(&mut self, size: usize) -> Result<()> {
        let now = self.client.now();
        let mut row: [(Vec<u8>, bool); 8] = Default::default();
        for (payload, _) in &mut row {
            *payload = self.client.hub.buffer(&self.server, size);
            payload.resize(size, 7);
        }
        let (row, mut ids) = (row.into_iter(), std::mem::take(&mut self.ids));
        ids.clear();
        self.client.hub.call_row(now, &self.server, Lane::Calls, row, None, &mut ids)?;
        self.ids = ids;
        self.finish(8)
    }

    fn calls(&mut self, size: usize, calls: usize) -> Result<Turn> {
        Turn::of(calls, || self.call(Lane::Calls, size))
    }

    fn calls_beside_bulk(&mut self, calls: usize) -> Result<Turn> {
        const BULK: usize = 4 << 20;
        let mut under_way = 0;
        Turn::of(calls, || {
            while under_way < 2 {
                self.begin(Lane::Bulk, BULK)?;
                under_way += 1;
            }
            let call = self.begin(Lane::Calls, 64)?;
            under_way -= self.finish_one(call)?;
            Ok(())
        })
    }

    fn bulk(&mut self, time: Duration) -> Result<Carried> {
        const SIZE: usize = 8 << 20;
        Carried::by(|| {
            let (mut bytes, start) = (0, Instant::now());
            self.begin(Lane::Bulk, SIZE)?;
            while start.elapsed() < time {
                self.begin(Lane::Bulk, SIZE)?;
                self.finish(1)?;
                bytes += SIZE as u64;
            }
            self.finish(1)?;
            Ok(bytes + SIZE as u64)
        })
    }

    fn end(self: Box<Self>) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(result) => result,
            Err(_) => bail!("the server's thread has failed"),
        }
    }
}
