//! Calls that make programs, away from home: `execve`, `fork` and their kin.
//!
//! ```text
//! execve:  EXEC ─ EXEC_DATA* ─► the deputy calls it ─► REPLY (it failed) | the link ends (it succeeded)
//! fork:    FORK ─► the deputy has a link made ─► BRANCH ─► the remote half divides ─► READY (child's
//!          link) ─► the deputy forks ─► REPLY (the parent's link), BORN (the child's)
//! ```
//!
//! Frames of [`crate::link`]; their numbers are in [`crate::link::kind`]. What comes
//! from the remote side is checked here before the deputy relies on it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Most bytes of path, arguments and environment together. The kernel takes 6 MiB
/// (three quarters of `_STK_LIM`, fs/exec.c, Linux 4.13) whatever the limits; more
/// than that is refused at home, by the kernel itself.
pub const MAX_EXEC: u64 = 6 * 1024 * 1024 + 8192;

/// `clone` flags (linux/sched.h) that a [`Fork`] may have.
pub mod clone {
    /// The child shares its parent's memory; with [`VFORK`] only.
    pub const VM: u64 = 0x100;
    /// The parent waits until the child has become another program or ended.
    pub const VFORK: u64 = 0x4000;
    /// The child has its parent's parent.
    pub const PARENT: u64 = 0x8000;
    /// The child's id is stored for the parent.
    pub const PARENT_SETTID: u64 = 0x0010_0000;
    /// A word of the child's is cleared at its end.
    pub const CHILD_CLEARTID: u64 = 0x0020_0000;
    /// The child's id is stored for the child.
    pub const CHILD_SETTID: u64 = 0x0100_0000;
    /// Handled signals get their default action in the child (Linux 5.5).
    pub const CLEAR_SIGHAND: u64 = 1 << 32;
    /// What the deputy does with a child of its own.
    pub const AT_HOME: u64 = CHILD_CLEARTID | CLEAR_SIGHAND;
}

/// Body of [`crate::link::kind::FORK`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Fork {
    /// Bits of [`clone::AT_HOME`]; the rest is the remote side's own.
    pub flags: u64,
    /// For [`clone::CHILD_CLEARTID`].
    pub child_tid: u64,
    /// 1 if the child shares its parent's memory away, 0 if it has a copy.
    pub shares: u32,
    /// Zero.
    pub reserved: u32,
}

impl Fork {
    /// Whether it asks for nothing else than it may.
    #[must_use]
    pub const fn is_possible(&self) -> bool {
        self.flags & !clone::AT_HOME == 0 && self.shares <= 1
    }
}

/// Body of [`crate::link::kind::BRANCH`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Branch {
    /// Names the child's stay.
    pub ticket: [u8; 16],
}

/// Body of [`crate::link::kind::BORN`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Born {
    /// The child's process id, as it sees it.
    pub pid: u32,
    /// 1 if it is to come home at once, because nobody there would look after it.
    pub come_home: u32,
}

/// Added to one of [`why`] this is a [`crate::link::kind::REPLY`]'s result to
/// [`crate::link::kind::FORK`]: nothing has happened, and the call is to be made at
/// home. No error number of the kernel is near (include/linux/errno.h: below 531).
pub const NOT_FORKED: i64 = -4050;

/// Why a child is not made away; details of [`crate::image::reason::FORK`].
pub mod why {
    /// No daemon answers at home.
    pub const NO_DAEMON: u64 = 1;
    /// The other node takes no further process, or is not reached.
    pub const REFUSED: u64 = 2;
    /// The process may not open so many files, or sees no `/proc`.
    pub const NO_FILES: u64 = 3;
    /// The child's link ended.
    pub const LINK: u64 = 4;
    /// The sandbox holds no further process.
    pub const LIMIT: u64 = 5;
    /// The warden has not handed out the child's link.
    pub const NO_LINK: u64 = 6;
    /// Too many `vfork`s within each other.
    pub const DEPTH: u64 = 7;
    /// The greatest of these.
    pub const LAST: u64 = DEPTH;
}

/// One of [`why`], if `result` says that nothing has been forked.
#[must_use]
pub fn not_forked(result: i64) -> Option<u64> {
    let cause = u64::try_from(result.checked_sub(NOT_FORKED)?).ok()?;
    (1..=why::LAST).contains(&cause).then_some(cause)
}

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
    fn what_was_not_forked_is_no_process_and_no_error() {
        assert_eq!(not_forked(NOT_FORKED + 2), Some(why::REFUSED));
        for result in [i64::MIN, -4096, NOT_FORKED, NOT_FORKED + 8, -531, -11, 0, 1, i64::MAX] {
            assert_eq!(not_forked(result), None, "{result}");
        }
        assert!(Fork { flags: clone::AT_HOME, ..Fork::default() }.is_possible());
        for flags in [clone::VM, clone::PARENT, 1 << 16, 17] {
            assert!(!Fork { flags, ..Fork::default() }.is_possible(), "{flags:#x}");
        }
    }

    #[test]
    fn any_bytes_have_their_offsets() {
        assert_eq!(string_offsets(b"").count(), 0);
        assert_eq!(string_offsets(b"no end").count(), 0);
        assert_eq!(string_offsets(b"\0\0\0").collect::<Vec<_>>(), [0, 1, 2]);
    }
}
