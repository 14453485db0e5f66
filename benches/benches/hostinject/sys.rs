//! What no library has safe. All unsafe code of the benchmark is here.
#![allow(unsafe_code, reason = "taking over a raw descriptor")]

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};

/// A device as a file: to be read, written and waited for as one.
pub(crate) fn into_file(device: impl IntoRawFd) -> File {
    // SAFETY: the device gives up its descriptor, which is open and nobody else's.
    unsafe { File::from_raw_fd(device.into_raw_fd()) }
}
