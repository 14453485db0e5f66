//! Memory: the four functions that compilers call, and copies that survive faults.
//!
//! The program's pointers may be wrong. `copy_checked` is the one place where they
//! are followed; the fault handler of the remote side ([`super::frame`]) sees an
//! instruction pointer between its labels and continues at its failure exit.

use conet_deputy_core::marshal::{Fault, Memory};
use core::arch::{global_asm, naked_asm};

#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    naked_asm!("mov rax, rdi", "mov rcx, rdx", "rep movsb", "ret")
}

#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "mov rcx, rdx",
        "mov r8, rdi",
        "sub r8, rsi",
        "cmp r8, rdx",
        "jb 2f", // the start of `to` lies within `from`: copy backwards
        "rep movsb",
        "ret",
        "2:",
        "lea rdi, [rdi + rdx - 1]",
        "lea rsi, [rsi + rdx - 1]",
        "std",
        "rep movsb",
        "cld",
        "ret",
    )
}

#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    naked_asm!("mov r8, rdi", "mov eax, esi", "mov rcx, rdx", "rep stosb", "mov rax, r8", "ret")
}

#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    naked_asm!(
        "2:",
        "cmp rdx, 8",
        "jb 3f",
        "mov rax, [rdi]",
        "cmp rax, [rsi]",
        "jne 3f",
        "add rdi, 8",
        "add rsi, 8",
        "sub rdx, 8",
        "jmp 2b",
        "3:",
        "test rdx, rdx",
        "jz 4f",
        "movzx eax, byte ptr [rdi]",
        "movzx ecx, byte ptr [rsi]",
        "sub eax, ecx",
        "jne 5f",
        "inc rdi",
        "inc rsi",
        "dec rdx",
        "jmp 3b",
        "4:",
        "xor eax, eax",
        "5:",
        "ret",
    )
}

#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    naked_asm!("jmp {}", sym memcmp)
}

#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    naked_asm!(
        "xor eax, eax",
        "2:",
        "cmp byte ptr [rdi + rax], 0",
        "je 3f",
        "inc rax",
        "jmp 2b",
        "3:",
        "ret"
    )
}

// copy_checked(to, from, len) → 0, or 1 after a fault.
global_asm!(
    ".global copy_checked",
    ".global copy_checked_end",
    ".global copy_checked_failed",
    "copy_checked:",
    "mov rcx, rdx",
    "rep movsb",
    "copy_checked_end:",
    "xor eax, eax",
    "ret",
    "copy_checked_failed:",
    "mov eax, 1",
    "ret",
);

unsafe extern "C" {
    fn copy_checked(to: *mut u8, from: *const u8, len: usize) -> u32;
    fn copy_checked_end();
    fn copy_checked_failed();
}

/// Where to continue after a fault at `rip`, if it was in a checked copy.
pub(super) fn fault_exit(rip: u64) -> Option<u64> {
    let begin = copy_checked as *const () as u64;
    let end = copy_checked_end as *const () as u64;
    (begin..end).contains(&rip).then_some(copy_checked_failed as *const () as u64)
}

/// The memory of the program that this agent lives in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Program;

/// Whether a program may own this range at all: the region is never its own.
fn owns(addr: u64, len: usize) -> bool {
    addr.checked_add(len as u64).is_some_and(|end| {
        end <= conet_wire::image::TASK_SIZE + 4096 && !conet_wire::image::overlaps_region(addr, end)
    })
}

impl Memory for Program {
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault> {
        if !owns(addr, into.len()) {
            return Err(Fault);
        }
        // SAFETY: `into` is writable for its length; a fault on `addr` is survived
        // by the fault handler, and the range is not our own.
        let failed = unsafe { copy_checked(into.as_mut_ptr(), addr as *const u8, into.len()) };
        if failed == 0 { Ok(()) } else { Err(Fault) }
    }

    fn write(&mut self, addr: u64, from: &[u8]) -> Result<(), Fault> {
        if !owns(addr, from.len()) {
            return Err(Fault);
        }
        // SAFETY: `from` is readable for its length; a fault on `addr` is survived by
        // the fault handler. What is written belongs to the program, never to us.
        let failed = unsafe { copy_checked(addr as *mut u8, from.as_ptr(), from.len()) };
        if failed == 0 { Ok(()) } else { Err(Fault) }
    }
}

/// Memory at a fixed address that the role has mapped and that no reference to
/// anything else covers.
pub(crate) fn slice<'a>(addr: u64, len: usize) -> &'a [u8] {
    // SAFETY: callers name ranges that this role has just mapped readable (areas of
    // the image, the region's own pages); nothing else holds a mutable reference.
    unsafe { core::slice::from_raw_parts(addr as *const u8, len) }
}

/// As [`slice()`], to write.
pub(crate) fn slice_mut<'a>(addr: u64, len: usize) -> &'a mut [u8] {
    // SAFETY: as for `slice`; the ranges are mapped writable and used by one caller
    // at a time.
    unsafe { core::slice::from_raw_parts_mut(addr as *mut u8, len) }
}
