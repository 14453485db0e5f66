//! The system calls that safe wrappers do not offer. All unsafe code of the
//! benchmark is here.
#![allow(unsafe_code, reason = "system calls without a safe wrapper")]

pub(crate) mod calls;
pub(crate) mod filter;
pub(crate) mod trace;
pub(crate) mod vdso;

use rustix::io::Errno;

/// The result of a function of the C library that fails with −1.
fn check(result: libc::c_long) -> Result<u64, Errno> {
    u64::try_from(result).map_err(|_| {
        let code = std::io::Error::last_os_error().raw_os_error();
        Errno::from_raw_os_error(code.unwrap_or(libc::EIO))
    })
}
