//! The fake memory is one array at address [`BASE`]; what lies outside faults.

extern crate std;
use super::*;
use conet_wire::link::parse_request;
use linux_raw_sys::general as nr;
use std::vec;
use std::vec::Vec;

const BASE: u64 = 0x10_0000;

struct Fake(Vec<u8>);

impl Fake {
    fn range(&self, addr: u64, len: usize) -> Result<core::ops::Range<usize>, Fault> {
        let at = usize::try_from(addr.checked_sub(BASE).ok_or(Fault)?).map_err(|_| Fault)?;
        if at + len <= self.0.len() { Ok(at..at + len) } else { Err(Fault) }
    }

    fn word(&mut self, at: u64, value: u64) {
        self.write(BASE + at, &value.to_le_bytes()).unwrap();
    }
}

impl Memory for Fake {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        into.copy_from_slice(&self.0[self.range(addr, into.len())?]);
        Ok(())
    }
    fn write(&mut self, addr: u64, from: &[u8]) -> Result<(), Fault> {
        let range = self.range(addr, from.len())?;
        self.0[range].copy_from_slice(from);
        Ok(())
    }
}

fn plan(memory: &Fake, number: u32, args: [u64; 6]) -> (Result<Plan, NotForwarded>, Vec<u8>) {
    plan_with(memory, number, args, Signals::default())
}

fn plan_with(
    memory: &Fake,
    number: u32,
    args: [u64; 6],
    signals: Signals,
) -> (Result<Plan, NotForwarded>, Vec<u8>) {
    let mut body = vec![0xaa; MAX_FRAME];
    let class = table::lookup(u64::from(number)).unwrap();
    let plan = request(class, number, &args, signals, memory, &mut body);
    if let Ok(plan) = &plan {
        body.truncate(plan.len);
    }
    (plan, body)
}

fn reply(result: i64, parts: &[&[u8]]) -> Vec<u8> {
    let mut out = ReplyHead { result }.as_bytes().to_vec();
    for part in parts {
        out.extend_from_slice(part);
        out.resize(8 + padded(out.len() - 8), 0);
    }
    out
}

#[test]
fn a_write_carries_its_bytes_and_a_bad_pointer_is_efault() {
    let mut memory = Fake(vec![0; 4096]);
    memory.write(BASE + 100, b"some bytes").unwrap();
    let (plan_, body) = plan(&memory, nr::__NR_write, [3, BASE + 100, 10, 0, 0, 0]);
    let parsed = parse_request(&body).unwrap();
    assert_eq!(&body[parsed.inputs[0]..][..10], b"some bytes");
    assert_eq!(plan_.unwrap().store(&reply(10, &[]), &mut memory), Ok(10));

    let (bad, _) = plan(&memory, nr::__NR_write, [3, BASE + 4090, 10, 0, 0, 0]);
    assert_eq!(bad.map(|_| ()), Err(NotForwarded::Errno(errno::EFAULT)));
}

#[test]
fn a_read_stores_only_what_was_read() {
    let mut memory = Fake(vec![b'.'; 64]);
    let (plan, body) = plan(&memory, nr::__NR_read, [0, BASE, 32, 0, 0, 0]);
    assert!(parse_request(&body).is_ok());
    let plan = plan.unwrap();
    assert_eq!(plan.store(&reply(3, &[b"abc"]), &mut memory), Ok(3));
    assert_eq!(&memory.0[..5], b"abc..");
    assert_eq!(plan.store(&reply(-11, &[]), &mut memory), Ok(-11));
    assert_eq!(plan.store(&reply(9, &[b"abc"]), &mut memory), Err(Fault), "short reply");
}

#[test]
fn a_text_ends_at_its_nul_and_is_bounded() {
    let mut memory = Fake(vec![b'x'; 8192]);
    memory.write(BASE + 4090, b"/a/b\0").unwrap();
    let (_, body) = plan(&memory, nr::__NR_open, [BASE + 4090, 0, 0, 0, 0, 0]);
    let parsed = parse_request(&body).unwrap();
    assert_eq!(parsed.descs()[0].len, 5);
    let (long, _) = plan(&memory, nr::__NR_open, [BASE + 4095, 0, 0, 0, 0, 0]);
    assert_eq!(long.map(|_| ()), Err(NotForwarded::Errno(errno::ENAMETOOLONG)));
    let (edge, _) = plan(&memory, nr::__NR_open, [BASE + 8190, 0, 0, 0, 0, 0]);
    assert_eq!(edge.map(|_| ()), Err(NotForwarded::Errno(errno::EFAULT)));
}

#[test]
fn long_transfers_are_cut_to_a_chunk() {
    let memory = Fake(vec![1; 2 * CHUNK]);
    let (plan, body) = plan(&memory, nr::__NR_write, [1, BASE, 2 * CHUNK as u64, 0, 0, 0]);
    assert_eq!(plan.unwrap().request.args[2], CHUNK as u64);
    assert!(parse_request(&body).is_ok());
}

#[test]
fn vectors_are_gathered_and_scattered() {
    let mut memory = Fake(vec![0; 4096]);
    memory.write(BASE + 1000, b"abcdef").unwrap();
    for (i, (at, len)) in [(1000, 2), (2000, 0), (1002, 4)].into_iter().enumerate() {
        memory.word(16 * i as u64, BASE + at);
        memory.word(16 * i as u64 + 8, len);
    }
    let (plan_, body) = plan(&memory, nr::__NR_writev, [1, BASE, 3, 0, 0, 0]);
    let parsed = parse_request(&body).unwrap();
    assert_eq!(plan_.unwrap().request.nr, nr::__NR_write);
    assert_eq!(&body[parsed.inputs[0]..][..6], b"abcdef");

    let (plan_, _) = plan(&memory, nr::__NR_readv, [1, BASE, 3, 0, 0, 0]);
    assert_eq!(plan_.unwrap().store(&reply(5, &[b"12345"]), &mut memory), Ok(5));
    assert_eq!(&memory.0[1000..1006], b"12345f");
}

#[test]
fn a_received_message_lands_in_its_header() {
    let mut memory = Fake(vec![0; 4096]);
    // msghdr at 0: name 500/16, iov 100/1 → 600/8, control 700/24.
    for (at, value) in [
        (0, BASE + 500),
        (8, 16),
        (16, BASE + 100),
        (24, 1),
        (32, BASE + 700),
        (40, 24),
        (100, BASE + 600),
        (108, 8),
    ] {
        memory.word(at, value);
    }
    let (plan, body) = plan(&memory, nr::__NR_recvmsg, [4, BASE, 0, 0, 0, 0]);
    let parsed = parse_request(&body).unwrap();
    assert_eq!(parsed.descs().len(), 5);
    let mut header = [0u8; 56];
    header[0..8].fill(0xdd); // the deputy's pointer must not reach the program
    header[8] = 7;
    header[40] = 20;
    header[48] = 1;
    let body = reply(3, &[&header, b"0123456789abcdef", b"xyz", b"control-control-control-"]);
    assert_eq!(plan.unwrap().store(&body, &mut memory), Ok(3));
    assert_eq!(&memory.0[0..8], &(BASE + 500).to_le_bytes());
    assert_eq!((memory.0[8], memory.0[40], memory.0[48]), (7, 20, 1));
    assert_eq!(&memory.0[500..503], b"012");
    assert_eq!(&memory.0[600..604], b"xyz\0");
    assert_eq!(&memory.0[700..707], b"control");
}

#[test]
fn a_mask_that_lets_a_handled_signal_in_goes_home() {
    let mut memory = Fake(vec![0; 256]);
    memory.word(0, 0b100);
    let args = [0, 0, 0, BASE, 8, 0];
    let blocked = Signals { blocked: 0b10, handled: 0b10 };
    let (plan_, _) = plan_with(&memory, nr::__NR_ppoll, args, blocked);
    assert_eq!(plan_.map(|_| ()), Err(NotForwarded::GoHome));
    let open = Signals { blocked: 0, handled: 0b10 };
    let (_, body) = plan_with(&memory, nr::__NR_ppoll, args, open);
    let parsed = parse_request(&body).unwrap();
    assert_eq!(body[parsed.inputs[0]], 0b110);
    // pselect6 carries the mask one pointer further away.
    memory.word(64, BASE);
    memory.word(72, 8);
    let (_, body) = plan_with(&memory, nr::__NR_pselect6, [0, 0, 0, 0, 0, BASE + 64], open);
    let parsed = parse_request(&body).unwrap();
    assert_eq!(parsed.descs().len(), 2);
    assert_eq!(body[parsed.inputs[1]], 0b110);
}

#[test]
fn unknown_ioctls_go_home() {
    let memory = Fake(vec![0; 64]);
    let (plan_, _) = plan(&memory, nr::__NR_ioctl, [0, 0xc018_aa3f, BASE, 0, 0, 0]);
    assert_eq!(plan_.map(|_| ()), Err(NotForwarded::GoHome));
}

#[test]
fn the_whole_table_survives_hostile_arguments() {
    // Any number, any arguments: a request that parses, or a refusal.
    let memory = Fake((0..4096u32).map(|i| (i % 251) as u8).collect());
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..20_000 {
        let line = &table::TABLE[usize::try_from(random()).unwrap() % table::TABLE.len()];
        let mut args = [0u64; 6];
        for arg in &mut args {
            *arg = match random() % 5 {
                0 => 0,
                1 => random(),
                2 => random() % 5000,
                _ => BASE + random() % 4096,
            };
        }
        let (plan, body) = plan(&memory, line.0, args);
        if plan.is_ok() {
            assert!(parse_request(&body).is_ok(), "round {round}: {} {args:x?}", line.1);
        }
    }
}
