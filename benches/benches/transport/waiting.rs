//! What waiting costs others, and what others cost who waits: ours adaptive beside ours
//! blocking while other programs want every processor twice, calls beside ten thousand parked
//! ones, and processor time while nothing happens.
//!
//! A turn is as long as many time slices of a loop: who has slept gets the processor at once
//! for a while. Beside the loops each turn has a new pair, since where the kernel puts two
//! threads counts for more than how they wait, and so each adaptive one begins by spinning and
//! must find out. A call of a hundred is late by what others do, which differs between turns:
//! a row has the median of the turns' p99, and their spread.

use anyhow::{Result, bail, ensure};
use conet_benches::report::{Report, Row, Rule};
use conet_benches::stats::{median, spread};
use conet_transport::direct::{Direct, Wait};
use conet_transport::session::handshake::{PrivateKey, PublicKey};
use conet_transport::session::{Event, HubConfig, Limits};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

use crate::Options;
use crate::measure::{Place, Times, Turn, pin};

const LOOK: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(20);
/// Busy loops on each processor.
const LOOPS: usize = 2;
/// What cannot be told from 1 here: three runs gave 0.92 to 1.11 for the same two, 0.99 on
/// average, where spinning on beside loops gives 1.3 to 14.
const NO_WORSE: f64 = 1.1;
/// Turns of each in a round: many short ones, since what is late differs between turns.
const TURNS: usize = 10;
/// How long parked calls are left alone before what they cost is measured: they are asked for
/// after a second, and then more and more rarely.
const SETTLE: Duration = Duration::from_secs(3);

/// Where the ends of a pair run.
#[derive(Clone, Debug)]
pub(crate) struct Processors {
    pub(crate) all: Vec<usize>,
    /// Both ends, or wherever the kernel puts them.
    pub(crate) place: Option<Place>,
}

impl Processors {
    fn pin_to(&self, end: fn(Place) -> usize) -> Result<()> {
        match self.place {
            Some(place) => pin(end(place)),
            None => {
                let mut set = CpuSet::new();
                self.all.iter().for_each(|processor| set.set(*processor));
                sched_setaffinity(None, &set)?;
            }
        }
        Ok(())
    }

    fn pin(&self) -> String {
        self.place.map_or_else(|| "anywhere".to_owned(), Place::pin)
    }
}

/// A thread that ends with who has started it.
struct Worker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Worker {
    fn start(work: impl FnOnce(&AtomicBool) -> Result<()> + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        Self { stop, thread: Some(spawn(move || work(&seen))) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // What has failed there has failed here: the calls brought nothing.
        self.thread.take().map(JoinHandle::join).map(drop).unwrap_or_default();
    }
}

/// A client whose server answers in a thread of its own.
struct Pair {
    client: Direct,
    server: PublicKey,
    _thread: Worker,
}

fn node(key: u8, wait: Wait, parked: usize) -> Result<Direct> {
    let socket = UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    let limits = Limits { queued: 2 * parked + 1, ..Limits::default() };
    let config = HubConfig { limits, ..HubConfig::new(PrivateKey::new([key; 32])) };
    Ok(Direct::new(socket, config, wait)?)
}

/// Answers all calls but those that want to be parked.
fn serve(mut server: Direct, stop: &AtomicBool) -> Result<()> {
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
    /// With so many parked calls.
    fn start(processors: &Processors, wait: Wait, parked: usize) -> Result<Self> {
        let (mut client, mut server) = (node(1, wait, parked)?, node(2, wait, parked)?);
        let (name, address, now) = (server.hub.public_key(), server.local_addr()?, client.now());
        server.hub.add_peer(now, client.hub.public_key(), None);
        client.hub.add_peer(now, name, Some(address));
        let there = processors.clone();
        let thread = Worker::start(move |stop| {
            there.pin_to(|place| place.server)?;
            serve(server, stop)
        });
        processors.pin_to(|place| place.client)?;
        let mut pair = Self { client, server: name, _thread: thread };
        for _ in 0..100 {
            pair.call()?;
        }
        for _ in 0..parked {
            let now = pair.client.now();
            pair.client.hub.call(now, &pair.server, b"park".to_vec(), None)?;
        }
        if parked > 0 {
            pair.idle(SETTLE)?;
            let status = pair.client.hub.status(pair.client.now()).next();
            let waiting = status.map_or(0, |status| status.calls_in_flight);
            ensure!(waiting == parked, "{waiting} calls of {parked} wait");
        }
        Ok(pair)
    }

    fn call(&mut self) -> Result<()> {
        let mut payload = self.client.hub.buffer(&self.server, 64);
        payload.resize(64, 7);
        let (now, start) = (self.client.now(), Instant::now());
        let ours = self.client.hub.call(now, &self.server, payload, None)?;
        loop {
            self.client.turn(LOOK)?;
            while let Some(event) = self.client.hub.poll_event() {
                match event {
                    Event::Ended { peer, call, result } if call == ours => {
                        self.client.hub.recycle(&peer, result?);
                        return Ok(());
                    }
                    Event::Ended { result, .. } => bail!("a parked call ended: {result:?}"),
                    _ => {}
                }
            }
            ensure!(start.elapsed() < PATIENCE, "a call has not ended");
        }
    }

    /// One call after the other for so long.
    fn calls(&mut self, time: Duration) -> Result<Turn> {
        let (mut times, begun) = (Vec::new(), Instant::now());
        while begun.elapsed() < time {
            let start = Instant::now();
            self.call()?;
            times.push(start.elapsed().as_secs_f64() * 1e9);
        }
        Ok(Turn(times))
    }

    fn idle(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            self.client.turn(left.max(Duration::from_millis(1)))?;
            while self.client.hub.poll_event().is_some() {}
        }
        Ok(())
    }
}

/// Gives the pair whose turn it is, ours first: one that stays, or a new one.
type Give<'p> = &'p mut dyn FnMut(usize, &mut dyn FnMut(&mut Pair) -> Result<()>) -> Result<()>;

/// One figure of two pairs in turn, the first of which is ours.
struct Beside<'a> {
    case: &'a str,
    how: &'a str,
    names: [&'a str; 2],
    /// Of a turn's times, and by which rule.
    shares: &'a [(&'a str, f64, Option<f64>)],
}

impl Beside<'_> {
    fn measure(&self, options: &Options, give: Give<'_>) -> Result<[Vec<Times>; 2]> {
        let time = Duration::from_millis(if options.is_test { 5 } else { 60 });
        let mut turns = [Vec::new(), Vec::new()];
        for round in 0..TURNS * options.rounds {
            // Who was first in the last round is second.
            for n in [round % 2, (round + 1) % 2] {
                give(n, &mut |pair| {
                    let mut times = Times::default();
                    times.add(pair.calls(time)?);
                    turns[n].push(times);
                    Ok(())
                })?;
            }
        }
        Ok(turns)
    }

    fn report(&self, report: &mut Report, pin: &str, turns: &[Vec<Times>; 2]) -> Result<()> {
        let [ours, other] = self.names;
        for (name, share, factor) in self.shares {
            let [mine, others] =
                [0, 1].map(|n| turns[n].iter().map(|turn| turn.at(*share)).collect::<Vec<_>>());
            report.add(Row {
                case: self.case.to_owned(),
                metric: format!("{name}, {}, {ours}", self.how),
                unit: "ns",
                ours: median(&mine),
                peers: vec![(other.to_owned(), median(&others))],
                rule: factor.map(|factor| Rule::times(factor, other)),
                bound: None,
                pin: pin.to_owned(),
                runs: mine.len(),
                spread: spread(&mine),
            })?;
        }
        Ok(())
    }
}

/// Two busy loops on each processor, as other programs may be.
pub(crate) fn beside_loops(
    options: &Options,
    report: &mut Report,
    case: &str,
    how: &str,
    processors: &Processors,
) -> Result<()> {
    let loops = processors.all.iter().flat_map(|processor| [*processor; LOOPS]);
    let loops: Vec<_> = loops
        .map(|processor| {
            Worker::start(move |stop| {
                pin(processor);
                while !stop.load(Ordering::Relaxed) {}
                Ok(())
            })
        })
        .collect();
    let shares = &[("p50", 0.5, None), ("p99", 0.99, Some(NO_WORSE))];
    let beside = Beside { case, how, names: ["adaptive", "blocking"], shares };
    // Where the kernel puts two threads counts for more than how they wait.
    let turns = beside.measure(options, &mut |n, turn| {
        turn(&mut Pair::start(processors, [Wait::Adaptive, Wait::Block][n], 0)?)
    })?;
    drop(loops);
    beside.report(report, &processors.pin(), &turns)
}

/// So many calls wait at the server, and others are made.
pub(crate) fn beside_parked(
    options: &Options,
    report: &mut Report,
    case: &str,
    processors: &Processors,
    parked: usize,
) -> Result<()> {
    let mut pairs =
        [Pair::start(processors, Wait::Block, parked)?, Pair::start(processors, Wait::Block, 0)?];
    let shares = &[("p50", 0.5, Some(1.1)), ("p99", 0.99, Some(1.25))];
    let beside = Beside { case, how: "blocking", names: ["plain", "none_parked"], shares };
    let turns = beside.measure(options, &mut |n, turn| turn(&mut pairs[n]))?;
    beside.report(report, &processors.pin(), &turns)
}

/// Time that this process's threads have had a processor (`proc_pid_schedstat`, first field).
fn on_processor() -> Result<Duration> {
    let mut sum = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        // One that has just ended is not there.
        let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) else { continue };
        sum += text.split(' ').next().unwrap_or_default().parse::<u64>()?;
    }
    Ok(Duration::from_nanos(sum))
}

/// What both ends take of a processor while nothing happens.
pub(crate) fn idle(
    options: &Options,
    report: &mut Report,
    case: &str,
    processors: &Processors,
    parked: usize,
) -> Result<()> {
    let span = Duration::from_millis(if options.is_test { 20 } else { 1000 });
    let how = if parked == 0 { "alone".to_owned() } else { format!("{parked} parked calls") };
    for (name, wait) in [("adaptive", Wait::Adaptive), ("blocking", Wait::Block)] {
        let mut pair = Pair::start(processors, wait, parked)?;
        let mut shares = Vec::new();
        for _ in 0..options.rounds.div_ceil(2) {
            let (before, begun) = (on_processor()?, Instant::now());
            pair.idle(span)?;
            let used = on_processor()?.saturating_sub(before);
            shares.push(100.0 * used.as_secs_f64() / begun.elapsed().as_secs_f64());
        }
        report.add(Row {
            case: case.to_owned(),
            metric: format!("of a processor for both ends, {how}, {name}"),
            unit: "%",
            ours: median(&shares),
            peers: Vec::new(),
            // A turn of a test is too short to be idle in.
            rule: (!options.is_test).then(|| Rule::constant(1.0)),
            bound: None,
            pin: processors.pin(),
            runs: shares.len(),
            spread: spread(&shares),
        })?;
    }
    Ok(())
}
