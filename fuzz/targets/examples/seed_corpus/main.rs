//! Writes the first corpus of each target with the real encoders, and mutations of
//! it: `cargo run -p conet-fuzz-targets --example seed_corpus`.
//!
//! The same run gives the same files. What a fuzzing run finds is added by hand,
//! minimised.

mod guest;
mod image;

use conet_migsock::options::{CARRIED, SavedOption};
use conet_migsock::state::{Buffers, RepairWindow, WindowScales};
use conet_migsock::{Flow, SavedSocket};
use conet_testkit::random::Random;
use conet_wire::session::frame::{
    Ack, After, Direction, Frame, Lane, Marks, Seen, SlotHead, Status,
};
use conet_wire::session::handshake::{INITIATION, Initiation, RESPONSE, Response};
use conet_wire::session::{Header, PacketKind};
use std::io;
use std::path::Path;

fn main() -> io::Result<()> {
    write("guest_frame", &guest::frames())?;
    write("held_packets", &guest::held())?;
    write("vhost_messages", &guest::messages())?;
    write("vhost_rings", &guest::rings())?;
    write("hostile_ring", &rings())?;
    write("session_image", &conet_fuzz_targets::session_images())?;
    write("process_image", &image::process_images())?;
    write("saved_socket", &saved_sockets())?;
    write("session_packet", &session_packets())
}

/// Each seed, and two mutations of each.
fn write(target: &str, seeds: &[(&str, Vec<u8>)]) -> io::Result<()> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus").join(target);
    std::fs::create_dir_all(&dir)?;
    let mut random = Random::new(1);
    for (name, bytes) in seeds {
        std::fs::write(dir.join(name), bytes)?;
        for mutation in 0..2 {
            let mut bytes = bytes.clone();
            for _ in 0..=random.below(4) {
                let at = usize::try_from(random.below(bytes.len() as u64)).unwrap_or(0);
                let [byte, ..] = random.number().to_le_bytes();
                if let Some(to) = bytes.get_mut(at) {
                    *to = byte;
                }
            }
            std::fs::write(dir.join(format!("{name}-mutated-{mutation}")), bytes)?;
        }
    }
    Ok(())
}

fn step(kind: u8, bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_le_bytes();
    [&[kind], &length[..], bytes].concat()
}

fn pass(millis: u16) -> Vec<u8> {
    [&[4], &millis.to_le_bytes()[..]].concat()
}

fn frames(frames: &[Frame<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for frame in frames {
        let at = bytes.len();
        bytes.resize(at + frame.wire_len(), 0);
        if let Some(room) = bytes.get_mut(at..) {
            frame.emit(room).ok();
        }
    }
    bytes
}

fn head(slot: u16, sequence: u64, total: u32) -> SlotHead {
    SlotHead { slot, sequence, total }
}

/// What somebody sends who has no keys.
fn stranger() -> Vec<u8> {
    let data = Header { kind: PacketKind::Data, flags: 0, session: 0, number: 9 }.emit();
    let mut initiation = Initiation::emit_clear(1).to_vec();
    initiation.resize(INITIATION, 0x55);
    let mut response = Response::emit_clear(3).to_vec();
    response.resize(RESPONSE, 0x55);
    let data = [&data[..], &[0; 40]].concat();
    [step(0, &initiation), step(1, &response), step(1, &data)].concat()
}

/// A piece of a call of 200 bytes in slot 1.
fn chunk(sequence: u64, offset: u32, data: &[u8]) -> Frame<'_> {
    let (head, direction) = (head(1, sequence, 200), Direction::Call);
    Frame::Chunk { head, direction, lane: Lane::Calls, offset, data }
}

/// A piece of the reply to the first call of ours.
fn back(offset: u32, data: &[u8]) -> Frame<'_> {
    let (head, direction) = (head(0, 1, 200), Direction::Reply);
    Frame::Chunk { head, direction, lane: Lane::Calls, offset, data }
}

/// Rows of calls, grants, slots given and taken, proofs of addresses.
fn lanes() -> Vec<u8> {
    let after = |slot, sequence| Some(After { slot, sequence, anyhow: true });
    let marked = |slot, sequence, after, data| {
        let marks = Marks { lane: Lane::Bulk, after };
        Frame::Marked { head: head(slot, sequence, 1), marks, data }
    };
    let (first, second) = (marked(2, 3, None, b"a"), marked(3, 4, after(2, 3), b"b"));
    let grant = |direction| Frame::Grant { slot: 0, sequence: 1, direction, upto: 5000 };
    let grants = [grant(Direction::Call), grant(Direction::Reply)];
    let slots = Frame::Slots { version: 1, count: 8 };
    let release = Frame::Release { version: 0, count: 1, floor: 9 };
    let seen = Seen { largest: 4, marked: 1, ..Seen::default() };
    let bitmap = seen.bitmap_bytes();
    let seen = seen.frame(&bitmap);
    let proofs = [Frame::Challenge { token: 1 }, Frame::Proof { token: 2 }];
    [
        step(2, &frames(&[second, first])),
        step(9, b"argument"),
        step(2, &frames(&grants)),
        step(2, &frames(&[slots, release, seen])),
        step(2, &frames(&proofs)),
        pass(100),
        step(9, b"result"),
    ]
    .concat()
}

fn session_packets() -> Vec<(&'static str, Vec<u8>)> {
    let call = Frame::Call { head: head(0, 1, 5), data: b"hello" };
    let reply = Frame::Reply { head: head(0, 1, 3), status: Status::Done, data: b"yes" };
    let ack = Frame::Ack(Ack { largest: 6, delay_us: 10, bitmap: [0b111, 0, 0, 0] });
    let (ping, pong) = (Frame::Ping { token: 1 }, Frame::Pong { token: 0 });
    let working = Frame::Working { slot: 0, sequence: 1 };
    let cancel = |sequence| Frame::Cancel { slot: 0, sequence };
    let close = Frame::Close { reason: 0 };
    let sealed = |row: &[Frame<'_>]| step(2, &frames(row));
    let tracked = |row: &[Frame<'_>]| step(3, &frames(row));
    vec![
        ("stranger", stranger()),
        (
            "call-answered",
            [sealed(&[call]), step(9, b"answer"), sealed(&[call]), pass(50)].concat(),
        ),
        (
            "call-waits",
            [sealed(&[call]), sealed(&[call]), pass(3000), step(9, b"late"), sealed(&[ack])]
                .concat(),
        ),
        (
            "call-cancelled",
            [sealed(&[cancel(1), call]), sealed(&[cancel(2)]), step(9, b"")].concat(),
        ),
        (
            "call-in-pieces",
            [
                tracked(&[chunk(1, 128, &[3; 72])]),
                tracked(&[chunk(1, 0, &[1; 128])]),
                step(9, &[8; 6000]),
                pass(100),
                sealed(&[ack]),
            ]
            .concat(),
        ),
        (
            "piece-replaced",
            [
                tracked(&[chunk(1, 0, &[1; 64])]),
                tracked(&[chunk(2, 0, &[1; 64])]),
                tracked(&[chunk(1, 64, &[1; 64])]),
            ]
            .concat(),
        ),
        ("reply-to-ours", [sealed(&[reply]), sealed(&[reply]), sealed(&[working])].concat()),
        (
            "reply-in-pieces",
            [tracked(&[back(128, &[3; 72])]), pass(10), tracked(&[back(0, &[1; 128])])].concat(),
        ),
        (
            "acknowledgements",
            [sealed(&[ack, ping, pong]), pass(20), sealed(&[ack]), pass(2000)].concat(),
        ),
        ("silence", [sealed(&[ping]), pass(6000), sealed(&[call])].concat()),
        ("farewell", [sealed(&[call, close, call]), sealed(&[ping])].concat()),
        ("frames-alone", frames(&[call, reply, ack, ping, working, cancel(7), close])),
        ("lanes", lanes()),
    ]
}

fn saved_sockets() -> Vec<(&'static str, Vec<u8>)> {
    let plain = SavedSocket {
        flow: Flow { local: ([10, 77, 1, 2], 8080).into(), peer: ([192, 0, 2, 9], 40_000).into() },
        ipv6: false,
        v6only: false,
        mss: 1460,
        sack: true,
        scales: Some(WindowScales { send: 7, receive: 9 }),
        timestamp: Some(123_456),
        window: RepairWindow { snd_wl1: 1, snd_wnd: 2, max_window: 3, rcv_wnd: 4, rcv_wup: 5 },
        recv_end: 1000,
        send_end: 2000,
        recv: b"unread".to_vec(),
        send: b"sent and unsent".to_vec(),
        unsent: 6,
        reuse_address: true,
        buffers: Buffers { send: 87_040, receive: 131_072, lock: 3 },
        congestion: "cubic".to_owned(),
        options: CARRIED.iter().map(|carried| SavedOption { id: carried.id, value: 1 }).collect(),
    };
    let bare = SavedSocket {
        sack: false,
        scales: None,
        timestamp: None,
        recv: Vec::new(),
        send: Vec::new(),
        unsent: 0,
        options: Vec::new(),
        ..plain.clone()
    };
    let six = SavedSocket {
        flow: Flow {
            local: (std::net::Ipv6Addr::LOCALHOST, 8080).into(),
            peer: (std::net::Ipv6Addr::LOCALHOST, 40_000).into(),
        },
        ipv6: true,
        v6only: true,
        ..plain.clone()
    };
    let full = SavedSocket { recv: vec![1; 3000], send: vec![2; 2000], ..plain.clone() };
    [("plain", plain), ("bare", bare), ("six", six), ("full-queues", full)]
        .map(|(name, state)| (name, state.encode()))
        .into()
}

/// Scripts of steps and of what the peer writes meanwhile; see `hostile_ring`.
fn rings() -> Vec<(&'static str, Vec<u8>)> {
    let quiet = 255;
    // Write, publish; the peer says so much is there, and how long the record is.
    let honest = [[0, 40], [1, 0], [0, 200], [1, 0], [5, 80], [1, 9], [2, 0], [3, 0]];
    let honest: Vec<u8> = honest.iter().flat_map(|step| [&step[..], &[quiet]].concat()).collect();
    let mut seeds = vec![("honest", honest.clone()), ("repeated", honest.repeat(20))];
    let mut random = Random::new(7);
    for (name, length) in [("short", 60), ("middle", 600), ("long", 4000)] {
        let mut bytes = vec![0; length];
        random.fill(&mut bytes);
        seeds.push((name, bytes));
    }
    seeds
}
