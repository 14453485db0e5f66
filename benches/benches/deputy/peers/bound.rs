//! The least that a forwarded call can cost: SIGSYS, one message each way, the call
//! in another process. And TCP alone.
//!
//! No table, no checks of pointers, no arrangement for going home; nothing of conet's
//! code. What a real one takes above it is what its generality costs.

use super::conn::{Call, Conn, Wait, is_read, is_write};
use crate::sys::calls::own_bytes;
use crate::sys::filter;
use crate::work::{Caller, MAX_SIZE, Op, TARGET_FD, open_target, timed};
use anyhow::{Result, bail};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The connection of this process, which its SIGSYS handler uses. The process has
/// one thread and makes no caught call inside of the handler.
static CONN: Mutex<Option<Conn>> = Mutex::new(None);

/// Makes this process's calls be made by the server at `port`.
pub(crate) fn trap_to(port: u16, sealed: bool, wait: Wait) -> Result<()> {
    *CONN.lock().unwrap_or_else(PoisonError::into_inner) = Some(Conn::connect(port, sealed, wait)?);
    filter::answer_traps(|number, args| {
        let mut conn = CONN.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(conn) = conn.as_mut() else { return -i64::from(libc::ENOTCONN) };
        let len = usize::try_from(args[2]).unwrap_or(0);
        let buffer = |wanted: bool| own_bytes(args[1], if wanted { len } else { 0 });
        let (input, output) = (buffer(is_write(number)), buffer(is_read(number)));
        conn.call(number, args, input, output).unwrap_or(-i64::from(libc::EIO))
    })?;
    filter::install(filter::Which::Forwarded, filter::Catch::Trap)?;
    Ok(())
}

/// Makes this process answer its own trapped calls of the local kind: what a call
/// costs that is not forwarded but must be looked at.
pub(crate) fn trap_here() -> Result<()> {
    filter::answer_traps(filter::pass)?;
    filter::install(filter::Which::Local, filter::Catch::Trap)?;
    Ok(())
}

/// Makes a call for somebody else, in this process.
pub(crate) fn make(call: Call<'_>) -> Result<i64> {
    let target = open_target_once();
    let Call { number, input, output, .. } = call;
    Ok(if is_write(number) {
        i64::try_from(rustix::io::write(target, input)?)?
    } else if is_read(number) {
        i64::try_from(rustix::io::read(target, output)?)?
    } else {
        rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get().into())
    })
}

fn open_target_once() -> rustix::fd::BorrowedFd<'static> {
    static TARGET: std::sync::OnceLock<rustix::fd::OwnedFd> = std::sync::OnceLock::new();
    rustix::fd::AsFd::as_fd(TARGET.get_or_init(|| {
        open_target().unwrap_or_else(|error| {
            eprintln!("/dev/zero: {error}");
            std::process::exit(1)
        })
    }))
}

/// The server of the bound.
pub(crate) fn serve(sealed: bool) -> Result<()> {
    open_target_once();
    Conn::accept(sealed)?.serve(make)
}

/// The server of TCP alone: nothing is called.
pub(crate) fn bounce() -> Result<()> {
    Conn::accept(false)?.serve(|call| {
        let len = if is_read(call.number) || is_write(call.number) { call.args[2] } else { 1 };
        Ok(i64::try_from(len)?)
    })
}

/// The other end of [`bounce`], or of any server of calls.
pub(crate) struct RoundTrip {
    conn: Conn,
    input: Vec<u8>,
    output: Vec<u8>,
}

impl RoundTrip {
    pub(crate) fn new(port: u16, wait: Wait) -> Result<Self> {
        let conn = Conn::connect(port, false, wait)?;
        Ok(Self { conn, input: vec![7; MAX_SIZE], output: vec![0; MAX_SIZE] })
    }
}

/// An operation as a call: number, arguments, bytes in and out.
pub(crate) fn as_call(op: Op) -> Result<(u32, [u64; 6], usize, usize)> {
    let (number, input, output) = match op {
        Op::Getppid => (libc::SYS_getppid, 0, 0),
        Op::Write(size) => (libc::SYS_write, size, 0),
        Op::Read(size) => (libc::SYS_read, 0, size),
        other => bail!("{} is not forwarded", other.name()),
    };
    let args = [u64::from(TARGET_FD.unsigned_abs()), 0, u64::from(input.max(output)), 0, 0, 0];
    Ok((u32::try_from(number)?, args, input as usize, output as usize))
}

impl Caller for RoundTrip {
    fn repeat(&mut self, op: Op, count: u64) -> Result<Duration> {
        let (number, args, input, output) = as_call(op)?;
        let (input, output) = (&self.input[..input], &mut self.output[..output]);
        timed(count, || self.conn.call(number, &args, input, output).map(drop))
    }
}
