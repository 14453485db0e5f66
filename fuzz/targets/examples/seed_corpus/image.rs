//! Seeds of `process_image`: what movers, restorers, deputies and remotes send.

use conet_deputy_core::areas::parse_line;
use conet_deputy_core::marshal::{Fault, Memory, Signals, request};
use conet_deputy_core::table;
use conet_fuzz_targets::image::{MAPS, PROGRAM, PROGRAM_CALL};
use conet_wire::image::{
    Area, Clocks, Commit, End, Head, MemoryMap, PAGE, PageRun, REGION, Registers, VERSION,
    VdsoEntries, area_flags, step,
};
use conet_wire::link::{ComeHome, Exit, FrameHeader, MAX_FRAME, Refusal, ReplyHead, kind, padded};
use conet_wire::pages::PageBatch;
use linux_raw_sys::{errno, general as nr};
use zerocopy::IntoBytes;

/// A static program's map, and two lines that are not of the format.
const MAP: &str = "\
00400000-00401000 r--p 00000000 fe:00 1835                               /usr/bin/with space
00401000-00483000 r-xp 00001000 fe:00 1835                               /usr/bin/with space
004ae000-004b0000 rw-p 00000000 00:00 0
55d0c2a00000-55d0c2a21000 rw-p 00000000 00:00 0                          [heap]
7f10c0000000-7f10c0021000 r--s 00001000 fe:00 1835                       /usr/lib/cache
7ffd10000000-7ffd10021000 rw-p 00000000 00:00 0                          [stack]
7ffd10100000-7ffd10104000 r--p 00000000 00:00 0                          [vvar]
7ffd10104000-7ffd10106000 r-xp 00000000 00:00 0                          [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
7ffd10104000 r-xp 00000000
7ffd10104000-x rwx 0 0 0";

fn framed(kind: u32, seq: u32, parts: &[&[u8]]) -> Vec<u8> {
    let header = FrameHeader { kind, seq };
    let frame = [&[header.as_bytes()], parts].concat().concat();
    let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
    [&length.to_le_bytes(), frame.as_slice()].concat()
}

fn head() -> Vec<u8> {
    let head = Head {
        version: VERSION,
        xsave_len: 576,
        registers: Registers { rip: 0x40_1234, rsp: 0x7ffd_1002_0f00, ..Registers::default() },
        handled: 1 << 14,
        memory_map: MemoryMap { start_brk: 0x55d0_c2a0_0000, ..MemoryMap::default() },
        vdso: VdsoEntries { clock_gettime: 0x7ffd_1010_4c00, ..VdsoEntries::default() },
        name: *b"python3\0\0\0\0\0\0\0\0\0",
        limits: [8 << 20, u64::MAX, u64::MAX],
        clocks: Clocks { realtime: 1_700_000_000_000_000_000, ..Clocks::default() },
        ..Head::default()
    };
    framed(kind::HEAD, 0, &[head.as_bytes(), &[0x37; 576]])
}

fn areas(list: &[Area]) -> Vec<u8> {
    framed(kind::AREAS, 0, &[list.as_bytes()])
}

fn pages(addr: u64, count: u64) -> Vec<u8> {
    runs(&[PageRun { addr, count }])
}

fn runs(runs: &[PageRun]) -> Vec<u8> {
    let mut batch = PageBatch::new();
    for run in runs {
        batch.push(*run);
    }
    let bytes = vec![0x5a; usize::try_from(batch.pages() * PAGE).unwrap_or(0)];
    framed(kind::PAGES, 0, &[batch.head().as_bytes(), runs.as_bytes(), &bytes])
}

fn gone(addr: u64, count: u64) -> Vec<u8> {
    framed(kind::GONE, 0, &[PageRun { addr, count }.as_bytes()])
}

fn round() -> Vec<u8> {
    framed(kind::ROUND, 0, &[])
}

fn end(areas: u64, pages: u64) -> Vec<u8> {
    framed(kind::END, 0, &[End { areas, pages }.as_bytes()])
}

/// The areas that a mover makes of [`MAP`].
fn list() -> Vec<Area> {
    let lines = MAP.lines().filter_map(|line| Some(parse_line(line.as_bytes())?.area()));
    lines.filter(Area::is_valid).collect()
}

struct Program(Vec<u8>);

impl Memory for Program {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        let at = addr.checked_sub(PROGRAM).and_then(|at| usize::try_from(at).ok()).ok_or(Fault)?;
        into.copy_from_slice(self.0.get(at..at + into.len()).ok_or(Fault)?);
        Ok(())
    }

    fn write(&mut self, _: u64, _: &[u8]) -> Result<(), Fault> {
        Err(Fault)
    }
}

/// A program's memory: `words` at its begin, then text.
fn memory(words: &[u64]) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.resize(128, 0);
    bytes.extend_from_slice(b"/etc/hostname\0and more\n\0");
    bytes.resize(320, b'.');
    bytes
}

/// The call as the program makes it, as the deputy gets it, and a reply.
fn call(number: u32, args: [u64; 6], memory: Vec<u8>, result: i64, outputs: &[&[u8]]) -> Vec<u8> {
    let issued = framed(PROGRAM_CALL, number, &[args.as_bytes(), &memory]);
    let mut body = vec![0; MAX_FRAME - size_of::<FrameHeader>()];
    let class = table::lookup(u64::from(number));
    let plan = class.and_then(|class| {
        request(class, number, &args, Signals::default(), &Program(memory), &mut body).ok()
    });
    body.truncate(plan.map_or(0, |plan| plan.len));
    let mut reply = Vec::new();
    for output in outputs {
        reply.extend_from_slice(output);
        reply.resize(padded(reply.len()), 0);
    }
    let head = ReplyHead { result };
    let sent = framed(kind::CALL, 1, &[&body]);
    [issued, sent, framed(kind::REPLY, 1, &[head.as_bytes(), &reply])].concat()
}

fn calls() -> Vec<(&'static str, Vec<u8>)> {
    const TEXT: u64 = PROGRAM + 128;
    let refused = -i64::from(errno::ENOENT);
    // A header, its vector of two, and room for a name, data and ancillary data.
    let message = memory(&[
        PROGRAM + 160,
        16,
        PROGRAM + 56,
        2,
        PROGRAM + 96,
        32,
        0,
        PROGRAM + 200,
        5,
        PROGRAM + 220,
        90,
    ]);
    let vector = memory(&[TEXT, 4, TEXT + 8, 12, 1, u64::MAX]);
    let at = |addr| [3, addr, 2, 0, 0, 0];
    vec![
        ("call-write", call(nr::__NR_write, [1, TEXT, 22, 0, 0, 0], memory(&[]), 22, &[])),
        ("call-read", call(nr::__NR_read, [3, TEXT, 64, 0, 0, 0], memory(&[]), 5, &[b"bytes"])),
        (
            "call-openat-refused",
            call(nr::__NR_openat, [u64::MAX, TEXT, 0, 0, 0, 0], memory(&[]), refused, &[]),
        ),
        ("call-writev", call(nr::__NR_writev, at(PROGRAM), vector.clone(), 16, &[])),
        ("call-readv", call(nr::__NR_readv, at(PROGRAM), vector, 7, &[b"7 bytes"])),
        ("call-sendmsg", call(nr::__NR_sendmsg, at(PROGRAM), message.clone(), 95, &[])),
        (
            "call-recvmsg",
            call(nr::__NR_recvmsg, at(PROGRAM), message, 6, &[&[0; 56], &[2; 16], b"answer"]),
        ),
        (
            "call-pselect",
            call(
                nr::__NR_pselect6,
                [70, TEXT, 0, TEXT, 0, PROGRAM],
                memory(&[PROGRAM + 16, 8, 0b100]),
                1,
                &[&[1; 16], &[0; 16]],
            ),
        ),
        (
            "call-poll-bad-pointer",
            call(nr::__NR_poll, [PROGRAM + 316, 9, 0, 0, 0, 0], memory(&[]), 1, &[&[1; 8]]),
        ),
    ]
}

pub(crate) fn process_images() -> Vec<(&'static str, Vec<u8>)> {
    let list = list();
    let count = list.len() as u64;
    let heap = 0x55d0_c2a0_0000;
    let stack = 0x7ffd_1002_0000;
    let text = Area { start: 0x40_0000, end: 0x40_2000, prot: 5, flags: area_flags::FILE };
    let in_region = Area { start: REGION - PAGE, end: REGION + PAGE, ..text };
    let clocks = Clocks { realtime: -5, monotonic: i64::MIN, boottime: i64::MAX, raw: 0 };
    let refusal = Refusal { step: step::MAP, errno: errno::ENOMEM, addr: heap };
    let mut seeds = vec![
        ("maps", framed(MAPS, 0, &[MAP.as_bytes()])),
        ("image", [head(), areas(&list), pages(heap, 1), pages(stack, 1), end(count, 2)].concat()),
        ("image-in-parts", {
            let (low, high) = list.split_at(list.len() / 2);
            [head(), areas(low), areas(high), pages(0x40_0000, 1), end(count, 1)].concat()
        }),
        ("image-without-pages", [head(), areas(&list), end(count, 0)].concat()),
        ("image-unordered", [head(), areas(&[text, text]), end(2, 0)].concat()),
        ("image-in-the-region", [head(), areas(&[in_region]), end(1, 0)].concat()),
        ("image-pages-outside", [head(), areas(&[text]), pages(0x40_1000, 2)].concat()),
        ("image-pages-twice", {
            [head(), areas(&[text]), pages(0x40_1000, 1), pages(0x40_1000, 1), end(1, 2)].concat()
        }),
        ("image-in-rounds", {
            let scattered = [PageRun { addr: heap, count: 2 }, PageRun { addr: stack, count: 1 }];
            let (fewer, later) = (areas(list.get(1..).unwrap_or_default()), areas(&list));
            let mut second = later.clone();
            // Another sequence: another list.
            second.splice(8..12, 1u32.to_le_bytes());
            let first = [later, runs(&scattered), round(), fewer, round()].concat();
            [first, second, gone(heap, 9), pages(heap, 1), head(), end(count, 4)].concat()
        }),
        ("image-gone-outside", [head(), areas(&[text]), gone(0x40_1000, 2)].concat()),
        ("image-headless", [areas(&list), end(count, 0)].concat()),
        (
            "agreement",
            [
                framed(kind::CLOCKS, 0, &[]),
                framed(kind::CLOCKS_ARE, 0, &[clocks.as_bytes()]),
                framed(kind::PREPARED, 0, &[]),
                framed(kind::COMMIT, 0, &[Commit { offsets: clocks }.as_bytes()]),
                framed(kind::COME_HOME, 0, &[ComeHome { done: 9, pending: 1 }.as_bytes()]),
                framed(kind::EXIT, 0, &[Exit { status: 3 }.as_bytes()]),
                framed(kind::REFUSED, 0, &[refusal.as_bytes()]),
            ]
            .concat(),
        ),
    ];
    seeds.extend(calls());
    seeds
}
