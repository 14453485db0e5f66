//! Memory stays what it is, whatever the program does to it while it moves.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod common;

use common::*;
use conet_deputy_link::mover::{Method, MoveError};
use std::io::Write;
use std::thread;
use std::time::Duration;

/// What the tests draw from; printed, and settable by `CONET_SEED`.
fn seed() -> u64 {
    let given = std::env::var("CONET_SEED").ok().and_then(|text| text.parse().ok());
    let drawn = || std::time::UNIX_EPOCH.elapsed().unwrap().subsec_micros().into();
    let seed = given.unwrap_or_else(drawn);
    println!("CONET_SEED={seed}");
    seed
}

/// A file of 64 pages, each filled with its number + 1.
fn pages_file() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for page in 1u64..=64 {
        file.write_all(&page.to_le_bytes().repeat(512)).unwrap();
    }
    file.flush().unwrap();
    file
}

#[test]
fn memory_is_the_same_however_it_changes_meanwhile() {
    conet_testkit::privileged!();
    let seed = seed();
    let file = pages_file();
    let (_directory, program) = compiled("memory", &[]);
    for (seed, steps, megabytes) in [(seed, "60000", "48"), (seed + 1, "30000", "160")] {
        let seed = seed.to_string();
        let args = [seed.as_str(), steps, file.path().to_str().unwrap(), megabytes];
        let expected = unmoved(&program, &args);
        let child = start(&program, &args);
        let pid = child.id();
        let mut node = Node::new();
        let (mut stays, mut rounds) = (0, 0);
        thread::sleep(Duration::from_millis(20));
        for i in 0..60u64 {
            let away = match node.take(pid) {
                Ok(away) => away,
                Err(MoveError::Gone | MoveError::Locked(_)) => break,
                Err(error) => panic!("{error}"),
            };
            assert_eq!(away.moved.method, Method::Precopy);
            rounds += away.moved.rounds.len();
            println!("{:?}", away.moved);
            thread::sleep(Duration::from_millis(i % 5 * 11));
            match away.bring_home(pid) {
                Ok(returned) => {
                    stays += 1;
                    println!("{returned:?}");
                }
                Err(MoveError::Gone) => break,
                Err(error) => panic!("{error}"),
            }
            thread::sleep(Duration::from_millis(i % 3 * 7));
        }
        let last = status_of(pid);
        let output = child.finish();
        println!("{} {last:?}", output.status);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (got, want) = (text(&output.stdout), text(&expected.stdout));
        let first = got.lines().zip(want.lines()).find(|(got, want)| got != want);
        assert_eq!(first, None, "after {stays} stays");
        assert_eq!(got.len(), want.len());
        assert_eq!(output.status, expected.status);
        assert!(stays >= 3 && rounds > 2 * stays, "{stays} stays, {rounds} rounds");
        println!("{stays} stays, {rounds} rounds");
    }
}
