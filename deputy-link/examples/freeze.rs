//! Times of moves to a sandbox on this machine and home again.
//!
//! `cargo run --release -p conet-deputy-link --example freeze -- [MEGABYTES [MOVES]]`, as
//! root. The program has that much memory and changes 100 pages a second.

#![allow(clippy::unwrap_used, reason = "an example that cannot set itself up has failed")]

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Node, python, start};
use std::io::Read;
use std::thread;
use std::time::Duration;

const SCRIPT: &str = "
import random, sys, time
size = int(sys.argv[1]) << 20
data = bytearray(random.randbytes(1 << 20) * (size >> 20))
print('ready', flush=True)
while True:
    data[random.randrange(size)] += 0
    time.sleep(0.01)
";

fn main() {
    let number = |i: usize, otherwise: u32| {
        std::env::args().nth(i).map_or(otherwise, |text| text.parse().unwrap())
    };
    let (megabytes, moves) = (number(1, 256), number(2, 20));
    let mut child = start(&python(), &["-c", SCRIPT, &megabytes.to_string()]);
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    let pid = child.id();
    let mut node = Node::new();
    let (mut out, mut home) = (Vec::new(), Vec::new());
    for _ in 0..moves {
        let away = node.take(pid).unwrap();
        println!("{:?}", away.moved);
        out.push(away.moved.freeze);
        thread::sleep(Duration::from_millis(200));
        let returned = away.bring_home(pid).unwrap();
        println!("{returned:?}");
        home.push(returned.total);
        thread::sleep(Duration::from_millis(100));
    }
    for (name, mut times) in [("out: freeze", out), ("home: total", home)] {
        times.sort_unstable();
        let at = |part: usize| times[(times.len() - 1) * part / 100];
        println!("{name}: p50 {:?} p90 {:?} max {:?}", at(50), at(90), at(100));
    }
    child.kill().unwrap();
}
