//! Measurements between the namespaces of a lab, without a program of the
//! machine's: echo round trips, TCP throughput, and what a link carries.
//!
//! A socket belongs to the network namespace it was made in, whichever thread
//! uses it later (`man 7 network_namespaces`); so each socket is made inside, and
//! used outside.

pub mod capture;
pub mod ping;
pub mod tcp;

use std::io;
use std::net::Ipv4Addr;

use conet_netsys::NetError;
use thiserror::Error;

/// A measurement that could not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MeasureError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A socket refused.
    #[error("cannot {step}: {source}; see whether the lab is up: conet lab status")]
    Socket {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Nothing came back.
    #[error("no answer from {target} to {sent} packets; see conet peers on both hosts")]
    Silent {
        /// Whom was asked.
        target: Ipv4Addr,
        /// How often.
        sent: u32,
    },
    /// The link to be watched is not there.
    #[error("there is no link {link} to watch; make the lab first: conet lab up")]
    NoLink {
        /// Its name.
        link: String,
    },
    /// The receiver did not get what was sent.
    #[error("{received} of {sent} bytes arrived; see conet peers on both hosts")]
    Short {
        /// Bytes sent.
        sent: u64,
        /// Bytes received.
        received: u64,
    },
    /// A measuring thread died.
    #[error("a measuring thread died; this is a bug, report it")]
    Thread,
}

impl MeasureError {
    pub(crate) fn socket(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Socket { step, source }
    }
}

/// The value below which `percent` of the sorted samples lie, by nearest rank.
fn percentile<T: Copy>(sorted: &[T], percent: usize) -> Option<T> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_by_nearest_rank() {
        let samples: Vec<u32> = (1..=200).collect();
        assert_eq!(percentile(&samples, 50), Some(100));
        assert_eq!(percentile(&samples, 99), Some(198));
        assert_eq!(percentile(&samples, 100), Some(200));
        assert_eq!(percentile(&[7], 50), Some(7));
        assert_eq!(percentile::<u32>(&[], 50), None);
    }
}
