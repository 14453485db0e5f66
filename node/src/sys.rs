//! The one socket option that no safe interface offers: the groups of a unix
//! socket's other end.

#![allow(unsafe_code, reason = "getsockopt(2) writes through a raw pointer; see SAFETY")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Most groups asked for: Linux gives a process at most NGROUPS_MAX, 65536
/// (`man 2 getgroups`).
const MAX_GROUPS: usize = 65_536;

/// The supplementary groups of the process at the other end of a unix stream
/// socket, as they were when it connected (SO_PEERGROUPS, kernel 4.13).
///
/// # Errors
///
/// That of `getsockopt(2)`.
pub(crate) fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups: Vec<u32> = vec![0; 64];
    loop {
        let mut length =
            libc::socklen_t::try_from(size_of_val(&groups[..])).map_err(io::Error::other)?;
        // SAFETY: the pointer and the length describe the vector's own memory,
        // which any bytes may fill; the descriptor is open as long as it is
        // borrowed; `length` is valid for the kernel to read and write.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let count = usize::try_from(length).unwrap_or(0) / size_of::<u32>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // Too small: the kernel has written the size that is needed.
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count.min(MAX_GROUPS), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_groups_of_the_other_end_are_ours() {
        let (one, _other) = UnixStream::pair().unwrap();
        let groups = peer_groups(one.as_fd()).unwrap();
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap();
        let own: Vec<u32> = line.split_whitespace().map(|group| group.parse().unwrap()).collect();
        assert_eq!(groups, own);
    }
}
