//! User namespaces of one id: how an ordinary user is root in namespaces of its own.
//!
//! ```text
//! outside            inside
//! uid 1000  ◄──────  uid 0     the only id; all others show as 65534
//! gid 1000  ◄──────  gid 0     setgroups(2) is denied
//! ```
//!
//! The kernel lets a process map its own id and no other without a privileged
//! helper (`newuidmap(1)`), and a group only once it has given up `setgroups(2)`.
//!
//! Sources: `user_namespaces(7)`. Least kernel: 3.19 (`/proc/PID/setgroups`).

use std::fs;
use std::io;

use crate::sys;

/// Why there is no user namespace.
#[derive(Debug, thiserror::Error)]
pub enum UserNamespaceError {
    /// The kernel makes none for this user.
    #[error("cannot make a user namespace: {0}")]
    Refused(#[source] io::Error),
    /// It made one, and does not let its maker be root in it: what AppArmor and
    /// other security modules do to ordinary programs.
    #[error("cannot become root of a user namespace ({file}): {source}")]
    Map {
        /// Which file was refused.
        file: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Moves the calling process, which must have one thread, into a new user
/// namespace in which its user and group are root and there are no others.
///
/// # Errors
///
/// [`UserNamespaceError`]: EPERM where an ordinary user may not, ENOSPC beyond
/// `user.max_user_namespaces`, EINVAL with several threads. After a failure of the
/// maps the process is in the namespace as nobody: let it end.
pub fn become_root() -> Result<(), UserNamespaceError> {
    let uid = rustix::process::geteuid().as_raw();
    let gid = rustix::process::getegid().as_raw();
    sys::unshare_user().map_err(|error| UserNamespaceError::Refused(error.into()))?;
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", &format!("0 {gid} 1"))
}

fn write(file: &'static str, text: &str) -> Result<(), UserNamespaceError> {
    fs::write(file, text).map_err(|source| UserNamespaceError::Map { file, source })
}

/// Whether the calling process's user namespace holds a single id: then there is
/// no second one to run somebody else's programs under.
///
/// # Errors
///
/// Where `/proc` cannot be read.
pub fn has_one_id() -> io::Result<bool> {
    fs::read_to_string("/proc/self/uid_map").map(|map| ids(&map) == 1)
}

/// How many ids a map holds (`user_namespaces(7)`: first inside, first outside, count).
fn ids(map: &str) -> u64 {
    map.lines()
        .filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok())
        .fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_a_map_are_counted() {
        assert_eq!(ids("         0       1000          1\n"), 1);
        assert_eq!(ids("         0          0 4294967295\n"), 4_294_967_295);
        assert_eq!(ids("0 1000 1\n1 100000 65536\n"), 65_537);
        assert_eq!(ids(""), 0);
    }
}
