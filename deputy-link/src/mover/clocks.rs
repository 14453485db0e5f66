//! How far the clocks of two nodes are apart, by questions over the link.
//!
//! The shortest of some round trips counts; the error is at most half of it.

use super::MoveError;
use crate::channel::{Channel, ChannelError};
use conet_wire::image::Clocks;
use conet_wire::link::kind;
use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};
use zerocopy::FromBytes;

/// Round trips by which clocks are compared; the shortest counts.
const CLOCK_ROUNDS: u32 = 5;

/// This node's clocks, in nanoseconds.
fn clocks() -> Clocks {
    let now = |id| {
        let time = clock_gettime(id);
        time.tv_sec.wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec)
    };
    Clocks {
        realtime: now(ClockId::Realtime),
        monotonic: now(ClockId::Monotonic),
        boottime: now(ClockId::Boottime),
        raw: now(ClockId::MonotonicRaw),
    }
}

/// What to add to the other node's clocks to read ours.
pub(super) fn compare_clocks(channel: &mut Channel) -> Result<Clocks, MoveError> {
    let mut best: Option<(Duration, Clocks)> = None;
    for seq in 0..CLOCK_ROUNDS {
        let sent = Instant::now();
        let before = clocks();
        channel.send(kind::CLOCKS, seq, &[])?;
        let (header, body) = channel.receive()?;
        let (there, _) =
            Clocks::read_from_prefix(body).map_err(|_| ChannelError::Unexpected(header.kind))?;
        let after = clocks();
        let round = sent.elapsed();
        let middle = |a: i64, b: i64, there: i64| a + (b - a) / 2 - there;
        let offsets = Clocks {
            realtime: middle(before.realtime, after.realtime, there.realtime),
            monotonic: middle(before.monotonic, after.monotonic, there.monotonic),
            boottime: middle(before.boottime, after.boottime, there.boottime),
            raw: middle(before.raw, after.raw, there.raw),
        };
        if best.is_none_or(|(shortest, _)| round < shortest) {
            best = Some((round, offsets));
        }
    }
    best.map(|(_, offsets)| offsets).ok_or_else(|| ChannelError::Unexpected(0).into())
}
