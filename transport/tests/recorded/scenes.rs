//! What is said in each recording: by the build under test, at host 2 or where it has moved
//! to, and by the recorded build.

use crate::node::{Datagram, Side, address, key};
use conet_transport::session::handshake::FEATURES;
use conet_transport::session::{Lane, Limits};
use conet_transport::time::Instant;
use conet_wire::session::handshake::{INITIATION, Initiation};
use std::time::Duration;

/// What the recorded build offers: AES, LANES, MOVE, BULK, FIND.
const RECORDED: u32 = 1 | 4 | 8 | 64 | 128;
/// What this build offers to who begins. Where it begins itself it offers what is recorded:
/// answers are bound to that.
const OURS: u32 = 1 | FEATURES;

pub(crate) struct Scene {
    pub(crate) name: &'static str,
    pub(crate) ms: u64,
    /// Hosts of the recorded build.
    pub(crate) recorded: &'static [u8],
    pub(crate) ours: fn(&mut Side, Instant, u64),
    pub(crate) theirs: fn(&mut Side, Instant, u64),
    /// Bytes that our side sends, at least.
    pub(crate) sends: usize,
    /// What happens at our side, and how often.
    pub(crate) expected: &'static [(usize, &'static str)],
}

/// Calls of each kind from `host` to the node of key `to`, over two and a half seconds from
/// `from` on.
fn calls(side: &mut Side, now: Instant, ms: u64, host: u8, to: u8, large: u8) {
    match ms {
        10 => {
            for lane in Lane::ALL {
                side.call(now, host, to, lane, b'e', 10);
            }
            side.call(now, host, to, Lane::Control, b'e', 3000);
            side.call(now, host, to, Lane::Calls, b'r', 20);
            side.call(now, host, to, Lane::Calls, b'n', 20);
        }
        20 => {
            side.row(now, host, to, &[(b'e', false), (b'e', false), (b's', false), (b'e', true)]);
            side.row(now, host, to, &[(b's', false), (b'e', false), (b'e', false)]);
        }
        30 => side.cancel(now, host, to),
        // More than there are slots at first.
        40 => (0..70).for_each(|_| side.call(now, host, to, Lane::Pages, b'w', 9)),
        50 => {
            let length = if large == b'e' { 70_000 } else { 8 };
            side.call(now, host, to, Lane::Bulk, large, length);
        }
        _ => {}
    }
}

/// A few calls, to see that a session stands.
fn some(side: &mut Side, now: Instant, host: u8, to: u8) {
    side.call(now, host, to, Lane::Calls, b'e', 30);
    side.row(now, host, to, &[(b'e', false), (b'e', false)]);
    side.call(now, host, to, Lane::Bulk, b'e', 3000);
}

/// Node `number` at `host`, which knows the node of key `peer`, and its host if it is to begin.
fn start(
    side: &mut Side,
    now: Instant,
    host: u8,
    number: u8,
    features: u32,
    peer: (u8, Option<u8>),
) {
    // New keys come soon, so that a recording has them.
    let limits = Limits { rekey_after: Duration::from_millis(2000), ..Limits::default() };
    side.start(host, number, features, limits);
    side.hub(host).add_peer(now, key(peer.0), peer.1.map(address));
}

fn ours_answers(side: &mut Side, now: Instant, ms: u64) {
    match ms {
        0 => start(side, now, 2, 2, OURS, (1, None)),
        2200 => some(side, now, 2, 1),
        _ => {}
    }
}

fn theirs_begins(side: &mut Side, now: Instant, ms: u64) {
    match ms {
        0 => start(side, now, 1, 1, RECORDED, (2, Some(2))),
        2300 => side.leave(now, 1),
        _ => calls(side, now, ms, 1, 2, b'e'),
    }
}

fn ours_begins(side: &mut Side, now: Instant, ms: u64) {
    match ms {
        0 => start(side, now, 2, 2, RECORDED, (1, Some(1))),
        _ => calls(side, now, ms, 2, 1, b'l'),
    }
}

fn theirs_answers(side: &mut Side, now: Instant, ms: u64) {
    match ms {
        0 => start(side, now, 1, 1, RECORDED, (2, None)),
        2200 => some(side, now, 1, 2),
        2300 => side.leave(now, 1),
        _ => {}
    }
}

/// Calls under way both ways when somebody moves.
fn under_way(side: &mut Side, now: Instant, host: u8, to: u8) {
    side.call(now, host, to, Lane::Calls, b'w', 50);
    side.call(now, host, to, Lane::Bulk, b'e', 20_000);
}

/// The session of the node at `from` goes on at `to`.
fn moves(side: &mut Side, now: Instant, from: u8, to: u8, number: u8, peer: u8) -> Vec<u8> {
    let frozen = side.hub(from).freeze(now, &key(peer)).expect("stands");
    side.start(to, number, RECORDED, Limits::default());
    side.thaw(now, &frozen.image, Some(from), to);
    side.hub(from).set_moved(now, &key(peer), address(to)).expect("was here");
    frozen.image
}

fn ours_stays(side: &mut Side, now: Instant, ms: u64) {
    match ms {
        0 => start(side, now, 2, 2, OURS, (1, None)),
        98 => under_way(side, now, 2, 1),
        400 => some(side, now, 2, 1),
        _ => {}
    }
}

fn theirs_moves(side: &mut Side, now: Instant, ms: u64) {
    match ms {
        0 => start(side, now, 1, 1, RECORDED, (2, Some(2))),
        98 => under_way(side, now, 1, 2),
        100 => drop(moves(side, now, 1, 4, 1, 2)),
        400 => some(side, now, 4, 2),
        _ => {}
    }
}

fn ours_moves(side: &mut Side, now: Instant, ms: u64) {
    match ms {
        0 => start(side, now, 2, 2, RECORDED, (1, Some(1))),
        98 => under_way(side, now, 2, 1),
        100 => {
            let image = moves(side, now, 2, 5, 2, 1);
            // A second life of it comes too late.
            side.start(6, 2, RECORDED, Limits::default());
            side.keep(image);
        }
        400 => some(side, now, 5, 1),
        500 => {
            let image = side.kept();
            side.thaw(now, &image, None, 6);
        }
        _ => {}
    }
}

fn theirs_stays(side: &mut Side, now: Instant, ms: u64) {
    match ms {
        0 => start(side, now, 1, 1, RECORDED, (2, None)),
        98 => under_way(side, now, 1, 2),
        400 => some(side, now, 1, 2),
        _ => {}
    }
}

fn ours_moves_as_well(side: &mut Side, now: Instant, ms: u64) {
    match ms {
        0 => start(side, now, 2, 2, OURS, (1, None)),
        98 => under_way(side, now, 2, 1),
        100 => drop(moves(side, now, 2, 5, 2, 1)),
        400 => some(side, now, 5, 1),
        _ => {}
    }
}

/// Node 1 is gone from host 1 and begins anew at host 4; node 3, which both know, hears of it.
fn theirs_is_found(side: &mut Side, now: Instant, ms: u64) {
    match ms {
        0 => {
            start(side, now, 1, 1, RECORDED, (2, Some(2)));
            start(side, now, 3, 3, RECORDED, (2, Some(2)));
            side.hub(3).add_peer(now, key(1), Some(address(1)));
            side.hub(1).add_peer(now, key(3), None);
        }
        200 => {
            side.crash(1);
            start(side, now, 4, 1, RECORDED, (3, Some(3)));
            side.hub(4).add_peer(now, key(2), None);
        }
        _ => {}
    }
}

fn ours_finds(side: &mut Side, now: Instant, ms: u64) {
    match ms {
        0 => {
            start(side, now, 2, 2, RECORDED, (1, None));
            side.hub(2).add_peer(now, key(3), None);
        }
        8900 => some(side, now, 2, 1),
        _ => {}
    }
}

/// So many have begun already that who begins now must show where it is.
fn theirs_is_flooded(side: &mut Side, now: Instant, ms: u64) {
    if ms == 0 {
        start(side, now, 1, 1, RECORDED, (2, None));
        for n in 0..100 {
            let mut bytes = Initiation::emit_clear(RECORDED).to_vec();
            bytes.resize(INITIATION, n);
            side.take(now, Datagram { from: address(9), to: address(1), bytes });
        }
    }
}

fn ours_shows_itself(side: &mut Side, now: Instant, ms: u64) {
    match ms {
        0 => start(side, now, 2, 2, RECORDED, (1, Some(1))),
        10 => some(side, now, 2, 1),
        _ => {}
    }
}

pub(crate) const SCENES: &[Scene] = &[
    Scene {
        name: "v1-find-begins",
        ms: 2400,
        recorded: &[1],
        ours: ours_answers,
        theirs: theirs_begins,
        sends: 90_000,
        expected: &[
            (1, "2 called Bulk e10"),
            (1, "2 called Bulk e70000"),
            (1, "2 called Calls e10"),
            (1, "2 called Calls e40"),
            (2, "2 called Calls e40 in a row"),
            (1, "2 called Calls n20"),
            (1, "2 called Calls r20"),
            (1, "2 called Calls s40"),
            (1, "2 called Calls s40 in a row"),
            (1, "2 called Control e10"),
            (1, "2 called Control e3000"),
            (1, "2 called Pages e10"),
            (70, "2 called Pages w9"),
            (1, "2 cancelled"),
            (1, "2 down 1 Closed"),
            (2, "2 reply to e of a row"),
            (1, "2 reply to e30"),
            (1, "2 reply to e3000"),
            (1, "2 up 1"),
            (1, "2:7 sends to 1:7"),
            (1, "2:8 sends to 1:8"),
        ],
    },
    Scene {
        name: "v1-find-answers",
        ms: 2400,
        recorded: &[1],
        ours: ours_begins,
        theirs: theirs_answers,
        sends: 0,
        expected: &[
            (2, "2 Aborted e of a row"),
            (1, "2 Refused r20"),
            (1, "2 Unknown n20"),
            (1, "2 called Bulk e3000"),
            (1, "2 called Calls e30"),
            (1, "2 called Calls e40"),
            (1, "2 called Calls e40 in a row"),
            (1, "2 down 1 Closed"),
            (3, "2 reply to e of a row"),
            (4, "2 reply to e10"),
            (1, "2 reply to e3000"),
            (1, "2 reply to l8"),
            (2, "2 reply to s of a row"),
            (70, "2 reply to w9"),
            (1, "2 up 1"),
            (1, "2:7 sends to 1:7"),
            (1, "2:8 sends to 1:8"),
        ],
    },
    Scene {
        name: "v1-find-moves",
        ms: 2000,
        recorded: &[1, 4],
        ours: ours_stays,
        theirs: theirs_moves,
        sends: 0,
        expected: &[
            (1, "2 called Bulk e3000"),
            (1, "2 called Bulk e20000"),
            (1, "2 called Calls e30"),
            (1, "2 called Calls e40"),
            (1, "2 called Calls e40 in a row"),
            (1, "2 called Calls w50"),
            (2, "2 reply to e of a row"),
            (1, "2 reply to e30"),
            (1, "2 reply to e3000"),
            (1, "2 reply to e20000"),
            (1, "2 reply to w50"),
            (1, "2 up 1"),
            (1, "2:7 sends to 1:7"),
            (1, "2:7 sends to 4:7"),
            (1, "2:8 sends to 1:8"),
            (1, "2:8 sends to 4:8"),
        ],
    },
    Scene {
        name: "v1-find-is-moved",
        ms: 2000,
        recorded: &[1],
        ours: ours_moves,
        theirs: theirs_stays,
        sends: 0,
        expected: &[
            (1, "2 called Bulk e20000"),
            (1, "2 called Calls w50"),
            (1, "2 up 1"),
            (1, "2:7 sends to 1:7"),
            (1, "5 called Bulk e3000"),
            (1, "5 called Calls e30"),
            (1, "5 called Calls e40"),
            (1, "5 called Calls e40 in a row"),
            (2, "5 reply to e of a row"),
            (1, "5 reply to e30"),
            (1, "5 reply to e3000"),
            (1, "5 reply to e20000"),
            (1, "5 reply to w50"),
            (1, "5 up 1"),
            (1, "5:7 sends to 1:7"),
            (1, "5:8 sends to 1:8"),
            (2, "6 Err(Unknown) for a second life"),
            (1, "6 down 1 Superseded"),
            (1, "6:7 sends to 1:7"),
        ],
    },
    Scene {
        name: "v1-find-both-move",
        ms: 2000,
        recorded: &[1, 4],
        ours: ours_moves_as_well,
        theirs: theirs_moves,
        sends: 0,
        expected: &[
            (1, "2 called Bulk e20000"),
            (1, "2 called Calls w50"),
            (1, "2 up 1"),
            (1, "2:7 sends to 1:7"),
            (1, "2:7 sends to 4:7"),
            (1, "5 called Bulk e3000"),
            (1, "5 called Calls e30"),
            (1, "5 called Calls e40"),
            (1, "5 called Calls e40 in a row"),
            (2, "5 reply to e of a row"),
            (1, "5 reply to e30"),
            (1, "5 reply to e3000"),
            (1, "5 reply to e20000"),
            (1, "5 reply to w50"),
            (1, "5 up 1"),
            (1, "5:7 sends to 1:7"),
            (1, "5:7 sends to 4:7"),
            (1, "5:8 sends to 4:8"),
        ],
    },
    Scene {
        name: "v1-find-finds",
        ms: 9000,
        recorded: &[1, 3, 4],
        ours: ours_finds,
        theirs: theirs_is_found,
        sends: 0,
        expected: &[
            (1, "2 down 1 Silent"),
            (2, "2 reply to e of a row"),
            (1, "2 reply to e30"),
            (1, "2 reply to e3000"),
            (2, "2 up 1"),
            (1, "2 up 3"),
            (1, "2:7 sends to 1:7"),
            (1, "2:7 sends to 3:7"),
            (1, "2:7 sends to 4:7"),
            (1, "2:8 sends to 4:8"),
        ],
    },
    Scene {
        name: "v1-find-cookie",
        ms: 100,
        recorded: &[1],
        ours: ours_shows_itself,
        theirs: theirs_is_flooded,
        sends: 0,
        expected: &[
            (2, "2 reply to e of a row"),
            (1, "2 reply to e30"),
            (1, "2 reply to e3000"),
            (1, "2 up 1"),
            (1, "2:7 sends to 1:7"),
            (1, "2:8 sends to 1:8"),
        ],
    },
];
