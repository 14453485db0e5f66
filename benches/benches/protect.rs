//! Sealing and opening of records, beside copying as many bytes.
//!
//! In one thread, in place, on memory that is in a cache: what is measured is the
//! processor. The reference, `memcpy`, is what moving the same bytes once more
//! would cost. The cipher is the one that two nodes of this machine would choose.
#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]
#![allow(missing_docs, reason = "criterion's macros make undocumented items")]

use std::hint::black_box;

use conet_testkit::random::Random;
use conet_transport::session::protect::{Cipher, Key, Label, Opener, Replay, Sealer};
use conet_wire::session::{HEADER, TAG};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const SIZES: [usize; 4] = [64, 4 << 10, 64 << 10, 256 << 10];
/// Bytes of records that are sealed before they are opened: they fit a
/// second-level cache.
const BATCH_BYTES: usize = 512 << 10;

fn payload(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; HEADER + size + TAG];
    Random::new(size as u64).fill(&mut bytes);
    bytes
}

fn protect(criterion: &mut Criterion) {
    let cipher = Cipher::preferred();
    eprintln!("cipher {cipher:?}, unpinned");
    let key = || Key::new([7; Key::LEN]);
    let mut group = criterion.benchmark_group("protect");
    for size in SIZES {
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_with_input(BenchmarkId::new("memcpy", size), &size, |bencher, &size| {
            let from = payload(size);
            let mut to = vec![0; from.len()];
            bencher.iter(|| {
                to[HEADER..HEADER + size].copy_from_slice(&black_box(&from)[..size]);
                black_box(&mut to);
            });
        });
        group.bench_with_input(BenchmarkId::new("seal", size), &size, |bencher, &size| {
            let mut sealer = Sealer::new(cipher, &key(), 0);
            let mut record = payload(size);
            bencher.iter(|| {
                let sealed = sealer.seal_in_place(Label::data(1), black_box(&mut record), size);
                sealed.unwrap()
            });
        });
        group.bench_with_input(BenchmarkId::new("open", size), &size, |bencher, &size| {
            let mut sealer = Sealer::new(cipher, &key(), 0);
            let mut opener = Opener::new(cipher, &key(), Replay::in_order(0));
            let sealed = || {
                let mut record = payload(size);
                sealer.seal_in_place(Label::data(1), &mut record, size).unwrap();
                record
            };
            let records = (BATCH_BYTES / size).clamp(1, 256) as u64;
            bencher.iter_batched_ref(
                sealed,
                |record| opener.open_in_place(black_box(record)).unwrap(),
                BatchSize::NumIterations(records),
            );
        });
    }
    group.finish();
}

criterion_group!(benches, protect);
criterion_main!(benches);
