use super::*;
use conet_testkit::random::Random;
use loom::sync::Arc;
use std::sync::atomic::{AtomicU64, fence};

struct Plain(Vec<AtomicU64>);

impl Plain {
    fn new(words: u64) -> Self {
        Self((0..Layout::total(words)).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Memory for Plain {
    fn load(&self, at: usize, ordering: Ordering) -> u64 {
        self.0[at].load(ordering)
    }

    fn store(&self, at: usize, value: u64, ordering: Ordering) {
        self.0[at].store(value, ordering);
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

/// Only the words that the test touches: each costs loom time.
struct Modelled {
    tail: loom::sync::atomic::AtomicU64,
    sleeping: loom::sync::atomic::AtomicU64,
    data: Vec<loom::sync::atomic::AtomicU64>,
}

impl Modelled {
    fn new(words: usize) -> Self {
        let word = || loom::sync::atomic::AtomicU64::new(0);
        let data = (0..words).map(|_| word()).collect();
        Self { tail: word(), sleeping: word(), data }
    }

    fn word(&self, at: usize) -> &loom::sync::atomic::AtomicU64 {
        match at {
            0 => &self.tail,
            APART => &self.sleeping,
            at => &self.data[at - 2 * APART],
        }
    }
}

impl Memory for Modelled {
    fn load(&self, at: usize, ordering: Ordering) -> u64 {
        self.word(at).load(ordering)
    }

    fn store(&self, at: usize, value: u64, ordering: Ordering) {
        self.word(at).store(value, ordering);
    }

    fn fence(&self) {
        loom::sync::atomic::fence(Ordering::SeqCst);
    }
}

/// All orders of two threads: what is read is what was written, in a ring so small that
/// each record takes the place of the one before.
#[test]
fn loom_every_record_arrives_once_and_whole() {
    loom::model(|| {
        let (layout, memory) = (Layout::new(0, 16), Arc::new(Modelled::new(16)));
        let theirs = memory.clone();
        let thread = loom::thread::spawn(move || {
            let mut writer = Writer::new(layout);
            for n in 1..=3u8 {
                // Records of one word and of two: they wrap.
                let bytes = vec![n; 4 + 5 * usize::from(n % 2)];
                while !writer.push(&*theirs, &bytes).expect("an honest reader") {
                    loom::thread::yield_now();
                }
                writer.publish(&*theirs);
            }
        });
        let (mut reader, mut room, mut next) = (Reader::new(layout), [0; 64], 1u8);
        while next <= 3 {
            match reader.pop(&*memory, &mut room).expect("an honest writer") {
                Some(length) => {
                    assert_eq!(length, 4 + 5 * usize::from(next % 2));
                    assert!(room[..length].iter().all(|byte| *byte == next));
                    reader.release(&*memory);
                    next += 1;
                }
                None => loom::thread::yield_now(),
            }
        }
        thread.join().expect("ends");
        assert_eq!(reader.pop(&*memory, &mut room), Ok(None));
    });
}

/// All orders: either the reader sees the record before it sleeps, or the writer wakes it.
#[test]
fn loom_nobody_sleeps_over_a_record() {
    loom::model(|| {
        let (layout, memory) = (Layout::new(0, 16), Arc::new(Modelled::new(16)));
        let theirs = memory.clone();
        let thread = loom::thread::spawn(move || {
            let mut writer = Writer::new(layout);
            assert_eq!(writer.push(&*theirs, &[1]), Ok(true));
            writer.publish(&*theirs)
        });
        let mut reader = Reader::new(layout);
        let sleeps = reader.may_sleep(&*memory);
        let woken = thread.join().expect("ends");
        assert!(!sleeps || woken, "asleep, and nobody wakes it");
        if !sleeps {
            reader.is_awake(&*memory);
        }
        assert_eq!(reader.pop(&*memory, &mut [0; 8]), Ok(Some(1)));
    });
}

#[test]
fn records_of_every_length_come_out_in_order() {
    for seed in 0..20 {
        let mut random = Random::new(seed);
        let words = 1 << (4 + random.below(6));
        let (memory, layout) = (Plain::new(words), Layout::new(0, words));
        let (mut writer, mut reader) = (Writer::new(layout), Reader::new(layout));
        let (mut sent, mut got, mut room) = (Vec::new(), Vec::new(), vec![0; 5000]);
        while got.len() < 500 {
            while sent.len() < 500 && random.chance(700) {
                let most = (words - LINE - 1) * 8;
                let length = usize::try_from(1 + random.below(most)).expect("small");
                let mut bytes = vec![0; length];
                random.fill(&mut bytes);
                if writer.push(&memory, &bytes).expect("honest") {
                    sent.push(bytes);
                }
            }
            writer.publish(&memory);
            while random.chance(700) {
                let Some(length) = reader.pop(&memory, &mut room).expect("honest") else { break };
                got.push(room[..length].to_vec());
                reader.release(&memory);
            }
        }
        assert!(got == sent, "seed {seed}");
        assert!(
            !writer
                .push(&memory, &vec![0; usize::try_from(words * 8).expect("small")])
                .expect("no error")
        );
        assert!(!writer.push(&memory, &[]).expect("no error"));
    }
}

/// What was payload a round ago lies where the next length will be.
#[test]
fn payload_of_a_round_ago_is_no_record() {
    let (memory, layout) = (Plain::new(32), Layout::new(0, 32));
    let (mut writer, mut reader, mut room) = (Writer::new(layout), Reader::new(layout), [0; 256]);
    for round in 0..20 {
        // Words that would be good lengths, in every word of every line.
        let bytes = [8u64.to_le_bytes(); 15].concat();
        let bytes = &bytes[..if round % 3 == 0 { 40 } else { 120 }];
        assert_eq!(writer.push(&memory, bytes), Ok(true), "{round}");
        assert_eq!(reader.pop(&memory, &mut room), Ok(None), "{round}: not shown yet");
        writer.publish(&memory);
        assert_eq!(reader.pop(&memory, &mut room), Ok(Some(bytes.len())), "{round}");
        assert_eq!(reader.pop(&memory, &mut room), Ok(None), "{round}");
        assert!(reader.may_sleep(&memory));
        reader.release(&memory);
    }
}

#[test]
fn what_no_honest_side_writes_is_refused() {
    let (memory, layout) = (Plain::new(16), Layout::new(0, 16));
    let set = |at: usize, value: u64| memory.store(at, value, Relaxed);
    let (mut reader, mut room) = (Reader::new(layout), [0; 256]);
    for length in [120, 257, u64::MAX] {
        set(layout.place(0), length);
        assert_eq!(reader.pop(&memory, &mut room), Err(Hostile::Length), "{length}");
        assert!(!reader.may_sleep(&memory));
    }
    set(layout.place(0), 16);
    assert_eq!(reader.pop(&memory, &mut room), Ok(Some(16)));
    let mut writer = Writer::new(layout);
    assert_eq!(writer.push(&memory, &[1; 40]), Ok(true));
    for tail in [u64::MAX, 9, 1000] {
        set(layout.tail(), tail);
        assert_eq!(writer.push(&memory, &[1; 40]), Err(Hostile::Position), "{tail}");
    }
}
