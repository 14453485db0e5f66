//! Calls that make programs, away from home: `execve`, `fork` and their kin.
//!
//! ```text
//! execve:  EXEC ─ EXEC_DATA* ─► the deputy calls it ─► REPLY (it failed) | the link ends (it succeeded)
//! ```
//!
//! Frames of [`crate::link`]; their numbers are in [`crate::link::kind`]. What comes
//! from the remote side is checked here before the deputy relies on it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Most bytes of path, arguments and environment together. The kernel takes 6 MiB
/// (three quarters of `_STK_LIM`, fs/exec.c, Linux 4.13) whatever the limits; more
/// than that is refused at home, by the kernel itself.
pub const MAX_EXEC: u64 = 6 * 1024 * 1024 + 8192;

/// Body of [`crate::link::kind::EXEC`]; `bytes` bytes follow in as many
/// [`crate::link::kind::EXEC_DATA`] frames as they need: the path, then the arguments,
/// then the environment, each ended by a NUL.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Exec {
    /// Number of the call: `execve` or `execveat`.
    pub nr: u32,
    /// Number of arguments.
    pub argc: u32,
    /// Number of environment strings.
    pub envc: u32,
    /// Flags of `execveat`.
    pub flags: u32,
    /// Directory of `execveat`.
    pub directory: u64,
    /// Length of the strings, at most [`MAX_EXEC`].
    pub bytes: u64,
}

impl Exec {
    /// Whether as many strings can lie in as many bytes as it says.
    #[must_use]
    pub const fn is_possible(&self) -> bool {
        self.bytes <= MAX_EXEC && 1 + self.argc as u64 + self.envc as u64 <= self.bytes
    }

    /// Bytes of the two arrays of pointers, each with its NULL.
    #[must_use]
    pub const fn pointer_bytes(&self) -> u64 {
        8 * (self.argc as u64 + self.envc as u64 + 2)
    }

    /// Whether `strings` are what it announces: so many bytes, so many strings.
    #[must_use]
    pub fn describes(&self, strings: &[u8]) -> bool {
        let ends = strings.iter().filter(|&&byte| byte == 0).count() as u64;
        strings.len() as u64 == self.bytes
            && strings.last() == Some(&0)
            && ends == 1 + u64::from(self.argc) + u64::from(self.envc)
    }
}

/// Where each NUL-terminated string begins in `strings`.
pub fn string_offsets(strings: &[u8]) -> impl Iterator<Item = usize> + '_ {
    let mut next = 0;
    core::iter::from_fn(move || {
        let at = next;
        let len = strings.get(at..)?.iter().position(|&byte| byte == 0)?;
        next = at + len + 1;
        Some(at)
    })
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    #[test]
    fn strings_are_counted_before_they_are_believed() {
        let exec = Exec { argc: 2, envc: 1, bytes: 13, ..Exec::default() };
        let good = b"/bin\0a\0\0X=1\0\0";
        let strings = &good[..13 - 1];
        let exec = Exec { bytes: 12, ..exec };
        assert!(exec.is_possible() && exec.describes(strings));
        assert_eq!(string_offsets(strings).collect::<Vec<_>>(), [0, 5, 7, 8]);
        assert!(!exec.describes(&strings[..11]));
        assert!(!exec.describes(b"/bin\0a\0b\0X=1"));
        assert!(!Exec { argc: 3, ..exec }.describes(strings));
        assert_eq!(exec.pointer_bytes(), 40);
    }

    #[test]
    fn more_than_the_kernel_takes_is_not_possible() {
        for (argc, envc, bytes) in
            [(0, 0, 0), (1, 0, 1), (u32::MAX, u32::MAX, 64), (0, 0, MAX_EXEC + 1)]
        {
            assert!(!Exec { argc, envc, bytes, ..Exec::default() }.is_possible());
        }
        assert!(Exec { bytes: 1, ..Exec::default() }.is_possible());
    }

    #[test]
    fn any_bytes_have_their_offsets() {
        assert_eq!(string_offsets(b"").count(), 0);
        assert_eq!(string_offsets(b"no end").count(), 0);
        assert_eq!(string_offsets(b"\0\0\0").collect::<Vec<_>>(), [0, 1, 2]);
    }
}
