//! Whether this machine's kernel moves processes, found out by trying.
//!
//! What it is not: a judgement; whoever asks knows what for. Some functions leave
//! the calling thread or process changed, as they say: ask in a process of its own,
//! with one thread, that ends afterwards.

use std::io;

use crate::sys::probe;
use crate::sys::ptrace::Stopped;

/// Makes the namespaces that a hosted program runs in, for the calling process.
///
/// # Errors
///
/// EPERM where user namespaces are not allowed, ENOSPC beyond
/// `user.max_user_namespaces`, EINVAL where the kernel lacks one of the kinds.
pub fn sandbox() -> io::Result<()> {
    probe::unshare_sandbox()
}

/// Starts a process under an id of our choice in a new process namespace, as a
/// hosted program needs to have the id that it has at home (`clone3` with `set_tid`,
/// kernel 5.5).
///
/// # Errors
///
/// EPERM without the right to choose ids, ENOSYS on kernels before 5.3.
pub fn chosen_pid() -> io::Result<()> {
    probe::chosen_pid()
}

/// Stops a child with ptrace and lets it go.
///
/// # Errors
///
/// EPERM where Yama or a sandbox forbids it.
pub fn trace() -> io::Result<()> {
    let child = probe::Sleeper::start()?;
    let stopped = Stopped::new(child.pid()).map_err(|error| io::Error::other(error.to_string()))?;
    stopped.release().map_err(|error| io::Error::other(error.to_string()))
}

/// Has the kernel turn a call of this thread into a signal (seccomp filter with
/// RET_TRAP, kernel 3.5). The thread keeps the filter.
///
/// # Errors
///
/// EINVAL without CONFIG_SECCOMP_FILTER; [`io::ErrorKind::Other`] where the filter
/// was taken and the call went through.
pub fn trap() -> io::Result<()> {
    if probe::trap()? {
        Ok(())
    } else {
        Err(io::Error::other("the kernel took the filter and did not trap"))
    }
}

/// Asks for a second vDSO, which the kernel refuses in a way that tells whether it
/// could map one (`arch_prctl(ARCH_MAP_VDSO_64)`, kernel 4.8).
///
/// # Errors
///
/// EINVAL without CONFIG_CHECKPOINT_RESTORE.
pub fn vdso() -> io::Result<()> {
    probe::vdso()
}

/// What userfaultfd of this kernel does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserFaults {
    /// Pages can be protected against writing (kernel 5.7).
    pub write_protect: bool,
    /// The kernel itself lifts the protection and notes it (kernel 6.7).
    pub asynchronous: bool,
    /// Faults within system calls are covered too; else only those of programs.
    pub in_calls: bool,
}

/// Asks userfaultfd what it can.
///
/// # Errors
///
/// ENOSYS without userfaultfd, EPERM where it is kept from this user.
pub fn user_faults() -> io::Result<UserFaults> {
    probe::user_faults()
}

/// Asks the kernel which of our pages are present (`PAGEMAP_SCAN`, kernel 6.7).
///
/// # Errors
///
/// ENOTTY on older kernels.
pub fn pagemap_scan() -> io::Result<()> {
    probe::pagemap_scan()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Those that change the calling process are tried by `conet doctor`'s test.
    #[test]
    fn a_child_can_be_traced_and_pages_be_asked_about() {
        trace().unwrap();
        vdso().unwrap();
        match pagemap_scan() {
            Ok(()) => {}
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOTTY), "{error}"),
        }
    }

    #[test]
    fn a_filter_traps_on_its_thread_alone() {
        std::thread::spawn(trap).join().unwrap().unwrap();
        // Were it here too, this would end the test.
        std::fs::read_to_string("/proc/self/stat").unwrap();
    }
}
