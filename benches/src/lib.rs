//! Benchmarks beside named peers: `cargo bench -p conet-benches`, `conet bench`.
//!
//! They are in `benches/`, by subject; each says at its top what it is compared
//! with and what is not comparable. CI runs each once, which measures nothing.
//! Here is what they share: [`report`] and [`stats`], [`ping`] and [`process`].

pub mod ping;
pub mod process;
pub mod report;
pub mod stats;
