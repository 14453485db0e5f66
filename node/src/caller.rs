//! Who asks at the control socket, as the kernel says, and what it may do.
//!
//! Any user may ask what the node is and act on its own processes. Root and the
//! members of group `conet` act on the node and on all its processes.

use std::io;
use std::os::fd::AsFd;

use rustix::net::sockopt::socket_peercred;

use crate::sys;

/// The group whose members administer the node.
pub const GROUP: &str = "conet";

/// The process at the other end of a control connection, when it connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// Its pid in the daemon's pid namespace.
    pub pid: u32,
    /// Its effective uid.
    pub uid: u32,
    /// Whether it is root or in the group `conet`.
    pub administers: bool,
}

impl Caller {
    /// Asks the kernel (SO_PEERCRED and SO_PEERGROUPS, `man 7 unix`).
    ///
    /// # Errors
    ///
    /// Those of `getsockopt(2)`.
    pub(crate) fn of(socket: impl AsFd, group: Option<u32>) -> io::Result<Self> {
        let credentials = socket_peercred(&socket)?;
        let pid =
            u32::try_from(credentials.pid.as_raw_nonzero().get()).map_err(io::Error::other)?;
        let uid = credentials.uid.as_raw();
        let member = match group {
            Some(group) => {
                credentials.gid.as_raw() == group
                    || sys::peer_groups(socket.as_fd())?.contains(&group)
            }
            None => false,
        };
        Ok(Self { pid, uid, administers: uid == 0 || member })
    }

    /// Whether it may see and move processes of this uid.
    #[must_use]
    pub fn may_act_for(self, uid: u32) -> bool {
        self.uid == uid || self.administers
    }
}

/// The gid of the group `conet` in the text of `/etc/group` (`man 5 group`).
pub(crate) fn group_id(text: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(GROUP)).then(|| fields.nth(1)?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_kernel_says_who_asks() {
        let (one, _other) = UnixStream::pair().unwrap();
        let caller = Caller::of(&one, None).unwrap();
        assert_eq!(caller.pid, std::process::id());
        assert_eq!(caller.uid, rustix::process::geteuid().as_raw());
    }

    #[test]
    fn membership_makes_an_administrator() {
        let (one, _other) = UnixStream::pair().unwrap();
        let own = rustix::process::getegid().as_raw();
        assert!(Caller::of(&one, Some(own)).unwrap().administers);
    }

    #[test]
    fn a_user_acts_for_itself_alone() {
        let user = Caller { pid: 7, uid: 1000, administers: false };
        assert!(user.may_act_for(1000) && !user.may_act_for(1001) && !user.may_act_for(0));
        let admin = Caller { administers: true, ..user };
        assert!(admin.may_act_for(0));
    }

    #[test]
    fn the_group_is_found_by_its_whole_name() {
        let text = "root:x:0:\nconetx:x:7:\nconet:x:991:a,b\n";
        assert_eq!(group_id(text), Some(991));
        assert_eq!(group_id("root:x:0:\n"), None);
        assert_eq!(group_id("conet:x\n"), None);
    }
}
