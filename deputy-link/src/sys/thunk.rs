//! Code that a process runs for a borrowed call, and that restores the process by
//! itself where its tracer has died meanwhile.
//!
//! ```text
//! syscall                          the borrowed call; its tracer stops it here
//! close                            what it made, where a slot says so
//! flags, stack pointer             from the slots below
//! rt_sigprocmask(SIG_SETMASK)      the process's own mask
//! general registers, jmp           where it was
//! ```
//!
//! It lies in the zeros behind the vDSO's image, which no code or data uses; the
//! kernel gives the process a page of its own when they are written (ptrace(2),
//! `/proc/PID/mem`). Nothing of the process's stack is used.

use super::ptrace::Regs;

/// Bytes of code and slots.
pub(super) const LEN: usize = SLOTS + 8 * COUNT;
/// Where the slots begin.
const SLOTS: usize = 192;

// Slots, in words.
const RFLAGS: usize = 0;
const RSP: usize = 1;
const MASK: usize = 2;
const RIP: usize = 3;
/// Not 0: the call's result is a descriptor to close.
const CLOSE: usize = 4;
const GENERAL: usize = 5;
const COUNT: usize = GENERAL + 15;

/// `mov register, [rip + …]` without the displacement, in the order of [`general`].
const LOADS: [[u8; 3]; 15] = [
    [0x48, 0x8b, 0x05], // rax
    [0x48, 0x8b, 0x1d], // rbx
    [0x48, 0x8b, 0x0d], // rcx
    [0x48, 0x8b, 0x15], // rdx
    [0x48, 0x8b, 0x35], // rsi
    [0x48, 0x8b, 0x3d], // rdi
    [0x48, 0x8b, 0x2d], // rbp
    [0x4c, 0x8b, 0x05], // r8
    [0x4c, 0x8b, 0x0d], // r9
    [0x4c, 0x8b, 0x15], // r10
    [0x4c, 0x8b, 0x1d], // r11
    [0x4c, 0x8b, 0x25], // r12
    [0x4c, 0x8b, 0x2d], // r13
    [0x4c, 0x8b, 0x35], // r14
    [0x4c, 0x8b, 0x3d], // r15
];

const fn general(regs: &Regs) -> [u64; 15] {
    [
        regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ]
}

/// Where a thunk is in an image, or fits: behind its last byte that is not zero.
pub(super) fn place(image: &[u8]) -> Option<usize> {
    const ALIGN: usize = 64;
    let code = code();
    let mut places = (0..image.len()).step_by(ALIGN);
    let earlier = places.find(|at| image[*at..].starts_with(&code.bytes[..code.at]));
    if earlier.is_some() {
        return earlier;
    }
    let end = image.iter().rposition(|byte| *byte != 0)? + 1;
    // Some room for what may end in zeros.
    let at = (end + ALIGN).next_multiple_of(ALIGN);
    (at + LEN <= image.len()).then_some(at)
}

/// The code, whose slots are empty.
fn code() -> Code {
    let mut code = Code { bytes: [0; LEN], at: 0 };
    code.put(&[0x0f, 0x05]); // syscall
    code.put(&[0x89, 0xc7]); // mov edi, eax
    code.put_with_slot(&[0x8b, 0x0d], CLOSE); // mov ecx, [rip + …]
    code.put(&[0xe3, 7]); // jrcxz behind the next two
    code.put(&[0xb8, 3, 0, 0, 0]); // mov eax, close
    code.put(&[0x0f, 0x05]); // syscall
    code.put_with_slot(&[0x48, 0x8d, 0x25], RFLAGS); // lea rsp, [rip + …]
    code.put(&[0x9d]); // popfq; nothing below changes the flags
    code.put_with_slot(&[0x48, 0x8b, 0x25], RSP); // mov rsp, [rip + …]
    code.put(&[0xb8, 14, 0, 0, 0]); // mov eax, rt_sigprocmask
    code.put(&[0xbf, 2, 0, 0, 0]); // mov edi, SIG_SETMASK
    code.put_with_slot(&[0x48, 0x8d, 0x35], MASK); // lea rsi, [rip + …]
    code.put(&[0xba, 0, 0, 0, 0]); // mov edx, 0
    code.put(&[0x41, 0xba, 8, 0, 0, 0]); // mov r10d, 8
    code.put(&[0x0f, 0x05]); // syscall
    for (number, load) in LOADS.iter().enumerate() {
        code.put_with_slot(load, GENERAL + number);
    }
    code.put_with_slot(&[0xff, 0x25], RIP); // jmp [rip + …]
    code
}

/// Code and slots for a process that is to go on with `regs` and `mask`.
pub(super) fn bytes(regs: &Regs, mask: u64) -> [u8; LEN] {
    let mut code = code();
    let regs = on_its_own(regs);
    code.set(RFLAGS, regs.eflags);
    code.set(RSP, regs.rsp);
    code.set(MASK, mask);
    code.set(RIP, regs.rip);
    for (number, value) in general(&regs).into_iter().enumerate() {
        code.set(GENERAL + number, value);
    }
    code.bytes
}

/// Where the slot is that says whether the call's result is to be closed, a 64-bit
/// word.
pub(super) const CLOSE_AT: u64 = (SLOTS + 8 * CLOSE) as u64;

/// Whether the kernel is about to restart a call of the process.
pub(super) const fn is_restarting(regs: &Regs) -> bool {
    regs.orig_rax.cast_signed() >= 0 && matches!(regs.rax.cast_signed(), -514..=-512 | -516)
}

/// The registers that say what the kernel would do on the way back to the process:
/// a call that was interrupted is issued again (arch/x86/kernel/signal.c).
const fn on_its_own(regs: &Regs) -> Regs {
    const RESTART_SYSCALL: u64 = 219;
    let mut own = *regs;
    if is_restarting(regs) {
        own.rip = regs.rip.wrapping_sub(2);
        own.rax = if regs.rax.cast_signed() == -516 { RESTART_SYSCALL } else { regs.orig_rax };
    }
    own
}

struct Code {
    bytes: [u8; LEN],
    at: usize,
}

impl Code {
    fn put(&mut self, code: &[u8]) {
        self.bytes[self.at..self.at + code.len()].copy_from_slice(code);
        self.at += code.len();
    }

    /// An instruction whose last four bytes say how far behind it its slot lies.
    fn put_with_slot(&mut self, code: &[u8], slot: usize) {
        self.put(code);
        let distance = SLOTS + 8 * slot - (self.at + 4);
        self.put(&u32::try_from(distance).unwrap_or(0).to_le_bytes());
    }

    fn set(&mut self, slot: usize, value: u64) {
        let at = SLOTS + 8 * slot;
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thunk_lies_behind_the_image() {
        let mut image = vec![1; 1000];
        image.resize(4096, 0);
        assert_eq!(place(&image), Some(1088));
        assert_eq!(place(&image[..1088 + LEN]), Some(1088));
        assert_eq!(place(&image[..1088 + LEN - 1]), None);
        assert_eq!(place(&[0; 4096]), None);
        // The second time it is found again.
        let code = code();
        assert!(code.at <= SLOTS, "{}", code.at);
        image[1088..1088 + LEN].copy_from_slice(&code.bytes);
        image[1088 + LEN - 1] = 7;
        assert_eq!(place(&image), Some(1088));
    }
}
