//! The steps about packets: guest to guest, and what the LAN sees of it.

use std::net::Ipv4Addr;
use std::time::Duration;

use conet_netsys::{Netns, NetnsName};
use conet_node::config::Mode;

use super::{Figure, Figures, Raised, StepError, rounded};
use crate::LabError;
use crate::measure::capture::{Capture, Captured};
use crate::measure::ping::{Echo, ping as echo};
use crate::measure::tcp::{Amount, End, throughput};
use crate::names::{HostId, LAN};
use crate::up::host_ids;

/// Echoes per measurement: enough for a 99th percentile of several samples.
const ECHOES: u32 = 500;
/// How long TCP is measured, each way.
const TCP_TIME: Duration = Duration::from_secs(2);
/// Bytes sent while the LAN is watched.
const WATCHED_BYTES: u64 = 2 << 20;
/// Bytes sent before the watcher has to have them: they fit its socket's buffer at
/// Linux's default limit (`net.core.rmem_max`, 212,992).
const WATCHED_PIECE: u64 = 64 << 10;
/// What the watched packets carry; nothing else on the LAN says so.
const PATTERN: &[u8] = b"conet demo: these bytes are in the clear. ";

/// A guest of the lab, and where it is.
struct Guest {
    netns: Netns,
    address: Ipv4Addr,
}

impl Guest {
    /// The first guest of the host of this number.
    fn first_of(lab: &Raised, number: usize) -> Result<Self, StepError> {
        let host: HostId = *host_ids(&lab.state).get(number - 1).ok_or(LabError::NotUp)?;
        let name = NetnsName::new(&host.guest_name(1)).map_err(LabError::from)?;
        let netns = Netns::open(&name).map_err(LabError::from)?;
        Ok(Self { netns, address: host.guest_address(1) })
    }

    fn end(&self) -> End<'_> {
        End { netns: &self.netns, address: self.address }
    }
}

/// Round trips from the first host's guest to the second's.
pub(super) fn ping(lab: &Raised) -> Figures {
    let (one, two) = (Guest::first_of(lab, 1)?, Guest::first_of(lab, 2)?);
    let request = Echo {
        target: two.address,
        count: ECHOES,
        payload: &[0x63; 56],
        limit: Duration::from_millis(500),
    };
    // The first one pays for the handshake and the neighbours' addresses.
    echo(&one.netns, &Echo { count: 3, limit: Duration::from_secs(2), ..request })?;
    let trips = echo(&one.netns, &request)?;
    Ok(vec![
        Figure::new("rtt_min", rounded(trips.min_us), "us"),
        Figure::new("rtt_p50", rounded(trips.p50_us), "us"),
        Figure::new("rtt_p99", rounded(trips.p99_us), "us"),
        Figure::new("sent", trips.sent, ""),
        Figure::new("received", trips.received, ""),
    ])
}

/// TCP throughput from one host's guest to another's.
pub(super) fn tcp(lab: &Raised, from: usize, to: usize) -> Figures {
    let (from, to) = (Guest::first_of(lab, from)?, Guest::first_of(lab, to)?);
    let sent = throughput(from.end(), to.end(), Amount::For(TCP_TIME), &[0x63; 4096])?;
    Ok(vec![
        Figure::new("throughput", rounded(sent.megabits()), "mbit_s"),
        Figure::new("bytes", sent.bytes, ""),
    ])
}

/// What the LAN carries while guests talk: only the hosts' addresses, and in
/// `wireguard` mode nothing that the guests said. In `ipip` mode what they said is
/// looked for too, and found: that is how it is known that looking finds it.
pub(super) fn capture(lab: &Raised) -> Figures {
    let (one, two) = (Guest::first_of(lab, 1)?, Guest::first_of(lab, 2)?);
    let watching = Capture::start(LAN)?;
    let request =
        Echo { target: two.address, count: 5, payload: PATTERN, limit: Duration::from_secs(1) };
    echo(&one.netns, &request)?;
    let mut sent = 0;
    while sent < WATCHED_BYTES {
        let amount = Amount::Bytes(WATCHED_PIECE.min(WATCHED_BYTES - sent));
        sent += throughput(one.end(), two.end(), amount, PATTERN)?.bytes;
        watching.wait_for(sent);
    }
    let captured = watching.stop()?;
    check(lab, &captured, &one, &two)?;
    let protocols: Vec<_> = captured.protocols().into_keys().collect();
    let in_clear = captured.holding(PATTERN);
    Ok(vec![
        Figure::new("inner_bytes_sent", sent, ""),
        Figure::new("frames", captured.frames(), ""),
        Figure::new("frames_in_clear", in_clear, ""),
        Figure::new("protocols", protocols.join(" "), ""),
    ])
}

fn check(lab: &Raised, captured: &Captured, one: &Guest, two: &Guest) -> Result<(), StepError> {
    let hosts: Vec<_> = host_ids(&lab.state).into_iter().map(HostId::lan_address).collect();
    for (address, count) in captured.addresses() {
        if !hosts.contains(&address) {
            return Err(StepError::OnTheLan { what: format!("the address {address}"), count });
        }
    }
    let strangers = u64::try_from(captured.strangers()).unwrap_or(u64::MAX);
    if strangers > 0 {
        let what = "frames that are neither IPv4 nor ARP".to_owned();
        return Err(StepError::OnTheLan { what, count: strangers });
    }
    if captured.missed > 0 || (captured.bytes() as u64) < WATCHED_BYTES {
        return Err(StepError::NothingSeen { what: "transfer as a whole" });
    }
    let seen = |needle: &[u8]| u64::try_from(captured.holding(needle)).unwrap_or(u64::MAX);
    // Source and destination, as they stand side by side in an inner header.
    let header = [one.address.octets(), two.address.octets()].concat();
    match lab.mode {
        Mode::WireGuard => {
            for (what, needle) in [("a guest's bytes", PATTERN), ("a guest's header", &header)] {
                let count = seen(needle);
                if count > 0 {
                    return Err(StepError::OnTheLan { what: what.to_owned(), count });
                }
            }
            Ok(())
        }
        Mode::IpUdp | Mode::IpIp if seen(PATTERN) == 0 || seen(&header) == 0 => {
            Err(StepError::NothingSeen { what: "inner packets in the clear" })
        }
        Mode::IpUdp | Mode::IpIp => Ok(()),
    }
}
