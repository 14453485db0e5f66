//! The conet command line.

fn main() {}
