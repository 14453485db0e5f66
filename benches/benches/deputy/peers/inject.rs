//! Calls made in a stopped process by its tracer, as designs without code of their
//! own in the process make them.
//!
//! The stopped process stands at a system call instruction of its own. Registers are
//! set once per call, one instruction is stepped, the result is read: one stop, where
//! PTRACE_SYSCALL would take two. Buffers are copied by `process_vm_*v`.

use super::bound::as_call;
use super::conn::{Call, Conn, Wait, is_read, is_write};
use crate::sys::calls::{read_process, write_process};
use crate::sys::trace::{Regs, Stop, Traced};
use crate::work::{Caller, MAX_SIZE, Op, open_target, timed};
use anyhow::{Result, ensure};
use rustix::io::Errno;
use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::Duration;

/// A process that waits to be used; ends with its input.
pub(crate) fn wait_to_be_used() -> Result<()> {
    let _target = open_target()?;
    let buffer = vec![7u8; MAX_SIZE];
    let at = buffer.as_ptr() as u64;
    rustix::io::write(rustix::stdio::stdout(), &at.to_le_bytes())?;
    rustix::io::read(rustix::stdio::stdin(), &mut [0u8; 1])?;
    Ok(())
}

/// A stopped process in which calls can be made.
pub(crate) struct Borrowed {
    traced: Traced,
    child: std::process::Child,
    at: Regs,
    buffer: u64,
    bytes: Vec<u8>,
}

impl Borrowed {
    pub(crate) fn start() -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--role", "used"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut word = [0; 8];
        if let Some(output) = child.stdout.as_mut() {
            output.read_exact(&mut word)?;
        }
        let traced = Traced::seize(i32::try_from(child.id())?)?;
        ensure!(traced.interrupt()? != Stop::Gone, "the process to be used ended");
        // It was within read(2): behind its instruction, or about to restart it.
        let mut at = traced.regs()?;
        at.rip -= 2;
        at.orig_rax = u64::MAX;
        let buffer = u64::from_le_bytes(word);
        Ok(Self { traced, child, at, buffer, bytes: vec![7; MAX_SIZE] })
    }

    pub(crate) fn id(&self) -> u64 {
        self.child.id().into()
    }

    /// Makes a call in it.
    fn call(&self, number: u32, args: &[u64; 6]) -> Result<i64, Errno> {
        let second = if is_read(number) || is_write(number) { self.buffer } else { args[1] };
        let [rdi, _, rdx, r10, r8, r9] = *args;
        let rax = u64::from(number);
        self.traced.set_regs(&Regs { rax, rdi, rsi: second, rdx, r10, r8, r9, ..self.at })?;
        while self.traced.step()? != Stop::Step {}
        Ok(self.traced.regs()?.rax.cast_signed())
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(-1)
    }

    fn make(&self, call: Call<'_>) -> Result<i64> {
        if is_write(call.number) {
            write_process(self.pid(), self.buffer, call.input)?;
        }
        let result = self.call(call.number, &call.args)?;
        if is_read(call.number) {
            read_process(self.pid(), self.buffer, call.output)?;
        }
        Ok(result)
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Caller for Borrowed {
    fn repeat(&mut self, op: Op, count: u64) -> Result<Duration> {
        let (number, args, input, output) = as_call(op)?;
        let mut bytes = std::mem::take(&mut self.bytes);
        let took = timed(count, || {
            if is_write(number) {
                write_process(self.pid(), self.buffer, &bytes[..input])?;
            }
            let result = self.call(number, &args)?;
            if is_read(number) {
                read_process(self.pid(), self.buffer, &mut bytes[..output])?;
            }
            if result < 0 { Err(Errno::IO) } else { Ok(()) }
        });
        self.bytes = bytes;
        Ok(took?)
    }
}

/// The home half of a design with tracers: makes what comes over TCP in a stopped
/// process, whose id it says first.
pub(crate) fn serve() -> Result<()> {
    let borrowed = Borrowed::start()?;
    rustix::io::write(rustix::stdio::stdout(), &borrowed.id().to_le_bytes())?;
    Conn::accept(false)?.serve(|call| borrowed.make(call))
}

/// The other half: traces a program whose filter says SECCOMP_RET_TRACE, and sends
/// its calls to `port`.
pub(crate) fn trace(pid: i32, port: u16) -> Result<()> {
    let traced = Traced::seize(pid)?;
    let mut conn = Conn::connect(port, false, Wait::Block)?;
    rustix::io::write(rustix::stdio::stdout(), &[0; 8])?;
    let (mut input, mut output) = (vec![0; MAX_SIZE], vec![0; MAX_SIZE]);
    loop {
        match traced.wait()? {
            Stop::Gone => return Ok(()),
            Stop::Step => traced.go_on(libc::SIGTRAP)?,
            Stop::Other(signal) => traced.go_on(signal)?,
            Stop::Call => {
                let mut regs = traced.regs()?;
                let number = u32::try_from(regs.orig_rax)?;
                let args = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
                let len = usize::try_from(args[2]).unwrap_or(0).min(MAX_SIZE);
                let input = &mut input[..if is_write(number) { len } else { 0 }];
                let output = &mut output[..if is_read(number) { len } else { 0 }];
                if !input.is_empty() {
                    read_process(pid, args[1], input)?;
                }
                let result = conn.call(number, &args, input, output)?;
                if !output.is_empty() {
                    write_process(pid, args[1], output)?;
                }
                regs.orig_rax = u64::MAX;
                regs.rax = result.cast_unsigned();
                traced.set_regs(&regs)?;
                traced.go_on(0)?;
            }
        }
    }
}
