//! `execve` away from home: the remote side sends the strings, the deputy calls it.
//!
//! ```text
//! remote                          deputy
//! EXEC, EXEC_DATA… ────────────►  collects them in memory of its own
//!                                 handlers ─► diverted; mask ─► the program's; execve
//! gives −errno  ◄──── REPLY ────  failed: all as it was
//! ends          ◄──── (end) ────  succeeded: the link was closed on exec
//! ```
//!
//! The new program must begin with the old one's mask, and the deputy keeps handled
//! signals blocked. So for the time of the call their handlers are replaced by
//! [`sys::divert`]: a signal that comes before the kernel has let go of the old program
//! is queued again, and the program goes home to handle it.

use crate::deputy::{Deputy, gated_receive, lost, status};
use crate::link::{self, Broken, Frame};
use crate::sys::{self, Program};
use crate::trap::{Away, give_up, wait_for};
use conet_deputy_core::boot::fault;
use conet_deputy_core::marshal::{Fault, Memory, Plan};
use conet_wire::family::{Exec, MAX_EXEC, string_offsets};
use conet_wire::image::PAGE;
use conet_wire::link::{CHUNK, ReplyHead, Request, kind};
use linux_raw_sys::general as nr;
use zerocopy::FromBytes;

/// Where a string ends, NUL included, and at most `limit` bytes are looked at.
fn string_len(addr: u64, limit: u64) -> Result<u64, Fault> {
    let mut piece = [0u8; 256];
    let mut done = 0;
    while done < limit {
        let from = addr.wrapping_add(done);
        // Never across a page: what follows the NUL may not be readable.
        let room = usize::try_from(PAGE - from % PAGE).unwrap_or(1).min(piece.len());
        Program.read(from, &mut piece[..room])?;
        if let Some(end) = piece[..room].iter().position(|&byte| byte == 0) {
            return Ok(done + end as u64 + 1);
        }
        done += room as u64;
    }
    Err(Fault)
}

/// The pointers of an array that ends with NULL; one that cannot be read is an error.
fn pointers(array: u64) -> impl Iterator<Item = Result<u64, Fault>> {
    let mut index = 0;
    core::iter::from_fn(move || {
        // Linux takes a NULL array for an empty one.
        if array == 0 {
            return None;
        }
        let mut bytes = [0; 8];
        let read = Program.read(array.wrapping_add(8 * index), &mut bytes);
        index += 1;
        match (read, u64::from_le_bytes(bytes)) {
            (Err(fault), _) => Some(Err(fault)),
            (Ok(()), 0) => None,
            (Ok(()), pointer) => Some(Ok(pointer)),
        }
    })
}

/// Calls `each` with address and length of every string, in order; the numbers of
/// arguments and of environment strings.
fn for_each_string(
    [path, argv, envp]: [u64; 3],
    mut each: impl FnMut(u64, u64) -> Result<(), Fault>,
) -> Result<[u32; 2], Fault> {
    let mut left = MAX_EXEC;
    let mut one = |addr| {
        let len = string_len(addr, left)?;
        left -= len;
        each(addr, len)
    };
    one(path)?;
    let mut counts = [0; 2];
    for (count, array) in counts.iter_mut().zip([argv, envp]) {
        for pointer in pointers(array) {
            one(pointer?)?;
            *count += 1;
        }
    }
    Ok(counts)
}

/// Bytes on their way to the deputy.
struct Sending {
    filled: usize,
}

impl Sending {
    fn flush(&mut self) {
        let link = &mut sys::state().link;
        if self.filled > 0 && link.send(kind::EXEC_DATA, 0, self.filled).is_err() {
            give_up();
        }
        self.filled = 0;
    }

    fn add(&mut self, addr: u64, len: u64) -> Result<(), Fault> {
        let mut done = 0;
        while done < len {
            if self.filled == CHUNK {
                self.flush();
            }
            let room = &mut sys::state().link.body()[self.filled..CHUNK];
            let part = usize::try_from(len - done).unwrap_or(CHUNK).min(room.len());
            Program.read(addr.wrapping_add(done), &mut room[..part])?;
            self.filled += part;
            done += part as u64;
        }
        Ok(())
    }
}

/// `execve` or `execveat`: comes back when it failed.
///
/// What cannot be read, and what is too long, goes home: the kernel there tells the
/// error in its own order.
pub(crate) fn run(number: u32, args: &[u64; 6]) -> Result<i64, Away> {
    let at = number == nr::__NR_execveat;
    let (directory, strings, flags) = if at {
        (args[0], [args[1], args[2], args[3]], args[4])
    } else {
        (0, [args[0], args[1], args[2]], 0)
    };
    let state = sys::state();
    if at && state.remote.hidden_fds.contains(&(directory & 0xffff_ffff)) {
        return Err(Away::GoHome);
    }
    let mut bytes = 0;
    let counted = for_each_string(strings, |_, len| {
        bytes += len;
        Ok(())
    });
    let [argc, envc] = counted.map_err(|_| Away::GoHome)?;
    let flags = u32::try_from(flags & 0xffff_ffff).unwrap_or(0);
    let exec = Exec { nr: number, argc, envc, flags, directory, bytes };
    if !exec.is_possible() {
        return Err(Away::GoHome);
    }
    // A reply without outputs.
    let plan = Plan::with(Request::default(), &[], &[], state.link.body());
    let plan = plan.map_err(|_| Away::GoHome)?;
    state.remote.seq = state.remote.seq.wrapping_add(1);
    let seq = state.remote.seq;
    if state.link.send_value(kind::EXEC, seq, &exec).is_err() {
        give_up();
    }
    let mut sending = Sending { filled: 0 };
    // Nobody changes these strings meanwhile: there is one thread.
    if for_each_string(strings, |addr, len| sending.add(addr, len)).is_err() {
        give_up();
    }
    sending.flush();
    wait_for(seq, Some(&plan))
}

/// The strings of an `execve`, in memory of the deputy's own.
struct Staging {
    addr: u64,
    len: u64,
    exec: Exec,
}

impl Staging {
    fn new(exec: Exec) -> Result<Self, i64> {
        let len = (exec.bytes.next_multiple_of(8) + exec.pointer_bytes()).next_multiple_of(PAGE);
        let addr = sys::map(0, len, 3, 0);
        if addr < 0 { Err(addr) } else { Ok(Self { addr: addr.cast_unsigned(), len, exec }) }
    }

    fn strings(&self) -> &'static mut [u8] {
        sys::slice_mut(self.addr, usize::try_from(self.exec.bytes).unwrap_or(0))
    }

    /// Builds the arrays of pointers behind the strings: number and arguments of the
    /// call.
    fn call(&self) -> [u64; 6] {
        let exec = &self.exec;
        let argv = self.addr + exec.bytes.next_multiple_of(8);
        let envp = argv + 8 * (u64::from(exec.argc) + 1);
        let mut at = argv;
        for offset in string_offsets(self.strings()).skip(1) {
            if at == envp - 8 {
                at = envp; // the memory is new, so that the NULL between is there
            }
            sys::slice_mut(at, 8).copy_from_slice(&(self.addr + offset as u64).to_le_bytes());
            at += 8;
        }
        if exec.nr == nr::__NR_execveat {
            [exec.directory, self.addr, argv, envp, u64::from(exec.flags), 0]
        } else {
            [self.addr, argv, envp, 0, 0, 0]
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        sys::unmap(self.addr, self.len);
    }
}

impl Deputy {
    /// Becomes another program, or tells why not.
    pub(crate) fn exec(&mut self, frame: &Frame) {
        if frame.header.seq != self.done.wrapping_add(1) {
            lost(fault::PROTOCOL, u64::from(frame.header.seq));
        }
        let body = sys::state().link.received(frame);
        let exec = match Exec::read_from_prefix(body) {
            Ok((exec, _)) if exec.is_possible() && is_exec(exec.nr) => exec,
            _ => lost(fault::PROTOCOL, 0),
        };
        status().last_call = u64::from(exec.nr);
        let staging = Staging::new(exec);
        if !collect(&exec, staging.as_ref().ok()) {
            drop(staging);
            self.come_home(false);
        }
        let result = match &staging {
            Ok(staging) => self.call_exec(staging),
            Err(error) => *error,
        };
        drop(staging);
        // Nothing of it remains in the kernel, so it is issued again at home.
        if link::is_aborted(result) || result == conet_deputy_core::boot::PARKED {
            self.come_home(false);
        }
        status().calls += 1;
        self.done = frame.header.seq;
        let link = &mut sys::state().link;
        if link.send_value(kind::REPLY, frame.header.seq, &ReplyHead { result }).is_err() {
            lost(fault::END, 0);
        }
    }

    fn call_exec(&self, staging: &Staging) -> i64 {
        if !staging.exec.describes(staging.strings()) {
            lost(fault::PROTOCOL, 0);
        }
        let args = staging.call();
        let blocked = status().blocked;
        let before = sys::signal_mask();
        let diverted = sys::divert();
        // A handled signal waits that the program does not block: first it is handled.
        let result = if sys::pending_signals() & diverted.signals() & !blocked == 0 {
            sys::set_mask(blocked);
            let result = sys::gate(staging.exec.nr, &args);
            sys::set_mask(before);
            result
        } else {
            conet_deputy_core::boot::ABORTED
        };
        diverted.restore();
        result
    }
}

fn is_exec(number: u32) -> bool {
    matches!(number, nr::__NR_execve | nr::__NR_execveat)
}

/// Takes the strings off the link, into `staging` where there is one; false when the
/// program is wanted home before all are there.
fn collect(exec: &Exec, staging: Option<&Staging>) -> bool {
    let mut left = exec.bytes;
    while left > 0 {
        let frame = match sys::state().link.receive(|fd, into| gated_receive(fd, into, 0)) {
            Ok(frame) => frame,
            Err(Broken::Interrupted) => return false,
            Err(Broken::End) => lost(fault::END, 0),
            Err(Broken::Forged) => lost(fault::FORGED, 0),
        };
        let bytes = sys::state().link.received(&frame);
        let len = bytes.len() as u64;
        if frame.header.kind != kind::EXEC_DATA || len == 0 || len > left {
            lost(fault::PROTOCOL, u64::from(frame.header.kind));
        }
        if let Some(staging) = staging {
            let at = usize::try_from(exec.bytes - left).unwrap_or(0);
            staging.strings()[at..at + bytes.len()].copy_from_slice(bytes);
        }
        left -= len;
    }
    true
}
