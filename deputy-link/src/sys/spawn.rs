//! Starting the host role with exactly the descriptors that it expects.

use conet_deputy_core::boot::host_fd;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// Starts `program` as the host role; `fds` become [`host_fd`]'s numbers in order.
pub(crate) fn host_role(program: BorrowedFd<'_>, fds: [BorrowedFd<'_>; 3]) -> io::Result<Child> {
    let path = format!("/proc/self/fd/{}", program.as_raw_fd());
    let raw = fds.map(|fd| fd.as_raw_fd());
    let targets = [host_fd::CONTROL, host_fd::LINK, host_fd::LISTEN];
    let mut command = Command::new(path);
    command
        .arg("host")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: only async-signal-safe calls on plain integers between fork and exec.
    unsafe {
        command.pre_exec(move || {
            // Out of the way first, as sources and targets may overlap.
            let mut high = [0; 3];
            for (copy, fd) in high.iter_mut().zip(raw) {
                *copy = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100);
                if *copy < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            for (copy, target) in high.into_iter().zip(targets) {
                if libc::dup2(copy, target) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    command.spawn()
}
