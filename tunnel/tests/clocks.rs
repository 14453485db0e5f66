//! Clocks that step: the tunnel's own time, which never goes back, and the time of day,
//! which it is told once, when it starts.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

mod memory;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use conet_tunnel::{Core, Engine, MemoryNetwork, Mode, OwnAddresses};
use memory::*;

const HOUR: Duration = Duration::from_secs(3600);
const DAY_ONE: Duration = Duration::from_secs(1 << 30);

/// A node that starts at a time of day of its own.
fn started(n: u8, now: Instant, unix: Duration) -> Node {
    let own =
        OwnAddresses { inner: vec![IpAddr::from([10, 77, n, 1])], outer: vec![address(n).ip()] };
    let core = Core::new(key(n), own, now, unix);
    let mut node = Engine::new(core, Default::default(), MemoryNetwork::default());
    node.core.add_peer(&peer(3 - n, Mode::WireGuard)).unwrap();
    node
}

/// Steps both to `now` and carries what that brings.
fn at(nodes: &mut [Node], now: Instant) {
    for node in &mut *nodes {
        node.step_time(now).unwrap();
    }
    settle(nodes);
}

/// Sends a packet from node `from`, and whether it came out of the other.
fn crosses(nodes: &mut [Node], from: usize, text: &[u8]) -> bool {
    let (n, other) = (u8::try_from(from + 1).unwrap(), u8::try_from(2 - from).unwrap());
    give(&mut nodes[from], packet(n, other, text));
    settle(nodes);
    taken(&mut nodes[1 - from]).contains(&packet(n, other, text))
}

#[test]
fn steps_of_the_own_time_break_no_session() {
    let start = Instant::now() + 24 * HOUR;
    let mut nodes = [started(1, start, DAY_ONE), started(2, start, DAY_ONE)];
    assert!(crosses(&mut nodes, 0, b"first"));
    // Back, by as much as you like: time stands still till it is caught up.
    for back in [Duration::from_nanos(1), Duration::from_secs(1), 23 * HOUR] {
        at(&mut nodes, start - back);
        assert!(crosses(&mut nodes, 0, b"there") && crosses(&mut nodes, 1, b"back"), "{back:?}");
    }
    // Forward, past every limit of a session: as after a sleep. The one that has slept
    // meets one that has not, and the other way round.
    let mut now = start;
    for (step, sleeper) in [(10, 0), (125, 1), (181, 0), (600, 1), (36_000, 0)] {
        now += Duration::from_secs(step);
        nodes[sleeper].step_time(now).unwrap();
        settle(&mut nodes);
        let mut came = false;
        for _ in 0..60 {
            came = crosses(&mut nodes, 0, b"there") && crosses(&mut nodes, 1, b"back");
            if came {
                break;
            }
            // Its retries take their time.
            now += Duration::from_secs(1);
            at(&mut nodes, now);
        }
        assert!(came, "{step} s forward of node {}", sleeper + 1);
        at(&mut nodes, now);
    }
}

#[test]
fn a_host_that_restarts_with_another_time_of_day_is_reached_and_reaches_in_time() {
    for (before, after) in [(DAY_ONE, DAY_ONE - HOUR), (DAY_ONE + 10_000 * HOUR, DAY_ONE)] {
        let start = Instant::now();
        let mut nodes = [started(1, start, before), started(2, start, DAY_ONE)];
        assert!(crosses(&mut nodes, 0, b"first"));
        let mut now = start + Duration::from_secs(10);
        at(&mut nodes, now);
        // Started anew with a clock that goes behind: its own handshakes are as old as a
        // replay's, and must be refused (whitepaper, section 5.1).
        nodes[0] = started(1, now, after);
        assert!(!crosses(&mut nodes, 0, b"too early"));
        assert!(nodes[1].core.peers()[0].drops.total() > 0);
        // The other's are not, and open the way for both; what had to wait comes too.
        // It begins one as soon as packets of its own are not answered.
        let mut came = false;
        for _ in 0..40 {
            came |= crosses(&mut nodes, 1, b"hello");
            if came {
                break;
            }
            now += Duration::from_secs(1);
            at(&mut nodes, now);
        }
        assert!(came && crosses(&mut nodes, 0, b"at last"));
        // A clock that is ahead is none the worse.
        nodes[0] = started(1, now, before + 20_000 * HOUR);
        at(&mut nodes, now + Duration::from_secs(1));
        assert!(crosses(&mut nodes, 0, b"from the future"));
    }
}
