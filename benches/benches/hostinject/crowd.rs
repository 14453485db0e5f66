//! Many guests on one host: what it costs to attach one more and to remove one, and
//! whether the others notice.
//!
//! While 64 guests come and go, one that was there before is asked for an echo every
//! millisecond; an answer that does not come within a second is lost.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use conet_benches::report::{Report, Row, Rule};
use conet_benches::stats::{median, spread};
use conet_hostinject::{GuestPort, GuestSpec, PortKind, Rates};
use conet_netsys::NetnsName;
use socket2::{Domain, Protocol, Socket, Type};

use crate::Options;
use crate::kind::Kind;
use crate::lane::{GUEST, HOST, Lane, MTU, ifname};

pub(crate) const CASE: &str = "64 guests on one host";
const GUESTS: u8 = 64;
/// Most milliseconds that one may take.
const LIMIT: f64 = 50.0;

#[derive(Default)]
struct Round {
    attach: Vec<f64>,
    detach: Vec<f64>,
    lost: f64,
}

fn spec(lane: &Lane, kind: PortKind, number: u8) -> Result<GuestSpec> {
    let name = format!("{}c{number}", lane.prefix());
    Ok(GuestSpec {
        name: NetnsName::new(&name).context("no name for a guest")?,
        host_link: ifname(&format!("crowd{number}"))?,
        guest_link: ifname("eth0")?,
        addresses: vec![IpAddr::V4(Ipv4Addr::new(10, 77, 10, number))],
        gateways: vec![IpAddr::V4(HOST)],
        prefix: 24,
        dns: vec![],
        rates: Rates::default(),
        mtu: MTU,
        mac: None,
        kind,
        server: Some(lane.server()?),
        queues: 1,
    })
}

/// Guests come and go; gives milliseconds of each, in the order of the guests.
fn come_and_go(specs: Vec<GuestSpec>) -> Result<[Vec<f64>; 2]> {
    let milliseconds = |began: Instant| began.elapsed().as_secs_f64() * 1e3;
    let mut ports = Vec::new();
    let attach: Result<Vec<f64>> = specs
        .into_iter()
        .map(|spec| {
            let began = Instant::now();
            ports.push(GuestPort::attach(spec)?);
            Ok(milliseconds(began))
        })
        .collect();
    // Those that were attached, also where one was not.
    let detach: Result<Vec<f64>> = ports
        .into_iter()
        .map(|port| {
            let began = Instant::now();
            port.detach()?;
            Ok(milliseconds(began))
        })
        .collect();
    Ok([attach?, detach?])
}

fn once(lane: &Lane, kind: PortKind, count: u8) -> Result<Round> {
    let open = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4));
    let socket = lane.run(open)??;
    socket.connect(&SocketAddr::from((GUEST, 0)).into())?;
    let specs: Vec<_> = (1..=count).map(|n| spec(lane, kind, n)).collect::<Result<_>>()?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut lost = 0;
            while !done.load(Ordering::Relaxed) {
                let times = conet_benches::ping::ping(&socket, 1, Duration::from_secs(1));
                lost += u32::from(times.is_ok_and(|times| times.is_empty()));
                thread::sleep(Duration::from_millis(1));
            }
            lost
        });
        let found = lane.host.netns.run(|| come_and_go(specs));
        done.store(true, Ordering::Relaxed);
        let lost = asking.join().map_err(|_| anyhow!("who asks has panicked"))?;
        let [attach, detach] = found??;
        Ok(Round { attach, detach, lost: f64::from(lost) })
    })
}

/// By veth, and by vhost-user without machines.
pub(crate) fn run(report: &mut Report, options: &Options, lanes: &[Lane]) -> Result<()> {
    let Some(lane) = lanes.iter().find(|lane| lane.kind == Kind::Netns) else { return Ok(()) };
    report.progress(CASE);
    let count = if options.is_smoke { 4 } else { GUESTS };
    for (kind, what) in
        [(PortKind::Veth, "netns"), (PortKind::Tap, "tap"), (PortKind::Vhost, "vhost")]
    {
        let rounds: Vec<_> =
            (0..options.rounds.min(3)).map(|_| once(lane, kind, count)).collect::<Result<_>>()?;
        let all = |of: fn(&Round) -> f64| rounds.iter().map(of).collect::<Vec<_>>();
        let values: [(&str, &'static str, f64, Vec<f64>); 5] = [
            ("attach, p50", "ms", LIMIT, all(|round| median(&round.attach))),
            ("attach, slowest", "ms", LIMIT, all(|round| slowest(&round.attach))),
            ("remove, p50", "ms", LIMIT, all(|round| median(&round.detach))),
            ("remove, slowest", "ms", LIMIT, all(|round| slowest(&round.detach))),
            ("echoes of another lost", "", 0.0, all(|round| round.lost)),
        ];
        for (metric, unit, limit, own) in values {
            report.add(Row {
                case: CASE.to_owned(),
                metric: format!("{metric}, {what}"),
                unit,
                ours: median(&own),
                peers: vec![],
                rule: Some(Rule::constant(limit)),
                bound: None,
                pin: "not pinned".to_owned(),
                runs: own.len(),
                spread: spread(&own),
            })?;
        }
    }
    Ok(())
}

fn slowest(times: &[f64]) -> f64 {
    times.iter().copied().fold(0.0, f64::max)
}
