//! seccomp user notification: a supervisor on the same machine makes the program's
//! calls. No network is between them, so it does less than forwarding must.

use super::bound::make;
use super::conn::{Call, is_read, is_write};
use crate::sys::calls::{read_process, write_process};
use crate::sys::filter::{answer_notified, next_notified, wake_synchronously};
use crate::work::MAX_SIZE;
use anyhow::{Context as _, Result};
use rustix::fd::AsFd as _;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// Makes the calls of the program `pid`, whose listener is its descriptor `fd`.
pub(crate) fn supervise(pid: i32, fd: i32) -> Result<()> {
    let process = pidfd_open(Pid::from_raw(pid).context("no pid")?, PidfdFlags::empty())?;
    let listener = pidfd_getfd(&process, fd, PidfdGetfdFlags::empty())?;
    let listener = listener.as_fd();
    wake_synchronously(listener);
    rustix::io::write(rustix::stdio::stdout(), &[0; 8])?;
    let (mut input, mut output) = (vec![0; MAX_SIZE], vec![0; MAX_SIZE]);
    loop {
        let notified = match next_notified(listener) {
            // It ended while it was told of.
            Err(Errno::NOENT) => return Ok(()),
            other => other?,
        };
        let (number, args) = (notified.number, notified.args);
        let len = usize::try_from(args[2]).unwrap_or(0).min(MAX_SIZE);
        let input = &mut input[..if is_write(number) { len } else { 0 }];
        let output = &mut output[..if is_read(number) { len } else { 0 }];
        if !input.is_empty() {
            read_process(notified.pid, args[1], input)?;
        }
        let result = make(Call { number, args, input, output: &mut *output })?;
        if !output.is_empty() {
            write_process(notified.pid, args[1], output)?;
        }
        answer_notified(listener, notified.id, result)?;
    }
}
