//! Handlers of the program, diverted for as long as the deputy must let signals in.
//!
//! A diverted signal is queued again, unchanged, and stays blocked; the deputy's gate
//! is closed, so that the program comes home, where its own handler runs. Should the
//! signal come between the gate's check and its system call, the call is given up.
//! With an `execve` that succeeds the kernel puts every handler back to the default,
//! and signals that come from then on act on the new program, as on any.

use super::call::{Action, action_of, plain, set_action};
use super::frame::{Context, restorer};
use conet_deputy_core::boot::{STATUS, Status, entry};
use core::mem::offset_of;
use linux_raw_sys::general as nr;

const SIGNALS: usize = 64;
const SA_NOCLDSTOP: u64 = 1;
const SA_NOCLDWAIT: u64 = 2;
const SA_SIGINFO: u64 = 4;
const SA_RESTORER: u64 = 0x0400_0000;

/// What the program had, to be put back.
pub(crate) struct Diverted {
    actions: [Action; SIGNALS],
    signals: u64,
}

/// Puts a handler of ours in the place of each of the program's.
pub(crate) fn divert() -> Diverted {
    let none = Action { handler: 0, flags: 0, restorer: 0, mask: 0 };
    let mut diverted = Diverted { actions: [none; SIGNALS], signals: 0 };
    for (signal, old) in (1u32..).zip(&mut diverted.actions) {
        *old = action_of(signal);
        if old.handler <= 1 {
            continue; // the default, or ignored: as it should be
        }
        diverted.signals |= 1 << (signal - 1);
        let kept = old.flags & (SA_NOCLDSTOP | SA_NOCLDWAIT);
        let ours = Action {
            handler: on_diverted as *const () as u64,
            flags: kept | SA_SIGINFO | SA_RESTORER,
            restorer: restorer as *const () as u64,
            mask: u64::MAX,
        };
        set_action(signal, &ours);
    }
    diverted
}

impl Diverted {
    /// Signals that the program handles.
    pub(crate) const fn signals(&self) -> u64 {
        self.signals
    }

    /// Puts the program's handlers back; everything must be blocked that they handle.
    pub(crate) fn restore(&self) {
        for (signal, old) in (1u32..).zip(&self.actions) {
            if self.signals & 1 << (signal - 1) != 0 {
                set_action(signal, old);
            }
        }
    }
}

extern "C" fn on_diverted(signal: i32, info: *const u8, context: *mut Context) {
    let pid = plain(nr::__NR_getpid, [0; 6]).cast_unsigned();
    let tid = plain(nr::__NR_gettid, [0; 6]).cast_unsigned();
    // A process may send itself what it likes (man 2 rt_tgsigqueueinfo).
    let signal = u64::from(signal.unsigned_abs());
    plain(nr::__NR_rt_tgsigqueueinfo, [pid, tid, signal, info as u64, 0, 0]);
    let interrupt = STATUS + offset_of!(Status, interrupt) as u64;
    super::slice_mut(interrupt, 4).copy_from_slice(&1u32.to_le_bytes());
    // SAFETY: the kernel's frame, ours until the handler returns.
    let context = unsafe { &mut *context };
    context.block_all();
    let entry = super::entry::start();
    let at = context.rip.wrapping_sub(entry);
    if (entry::CHECK..=entry::SYSCALL).contains(&at) {
        context.rip = entry + entry::ABORT;
    }
}
