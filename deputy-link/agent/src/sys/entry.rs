//! Where control comes in, at the offsets that [`conet_deputy_core::boot::entry`] names.

use super::{call, statics};
use conet_deputy_core::boot::{ABORTED, PARKED, STATUS, entry};
use core::arch::global_asm;
use core::mem::offset_of;

global_asm!(
    ".section .text.entry, \"ax\", @progbits",
    ".balign 4096",
    ".global _start",
    "_start:",
    // The host role, as execve leaves it: argc at the stack pointer.
    "    xor ebp, ebp",
    "    mov rdi, rsp",
    "    lea rsp, [rip + {host_stack} + {stack_len}]",
    "    call {host}",
    "    ud2",
    "    .org _start + {deputy}, 0x90",
    // The stack pointer is the mover's choice.
    "    xor ebp, ebp",
    "    call {deputy_role}",
    "    ud2",
    // rdi: number, rsi: pointer to six arguments.
    "    .org _start + 128, 0x90",
    "conet_gate:",
    "    mov rax, rdi",
    "    mov r11, rsi",
    "    mov rdi, [r11]",
    "    mov rsi, [r11 + 8]",
    "    mov rdx, [r11 + 16]",
    "    mov r10, [r11 + 24]",
    "    mov r8, [r11 + 32]",
    "    mov r9, [r11 + 40]",
    "    jmp 2f",
    "    .org _start + {check}, 0x90",
    "2:",
    "    movabs r11, {interrupt}",
    "    cmp dword ptr [r11], 0",
    "    jne 3f",
    "    .org _start + {syscall}, 0x90",
    "    syscall",
    "    ret",
    "    .org _start + {abort}, 0x90",
    "3:",
    "    mov rax, {aborted}",
    "    ret",
    "    .org _start + {parked}, 0x90",
    "    mov rax, {parked_value}",
    "    ret",
    "    .org _start + {finish}, 0x90",
    "conet_finish:",
    "    mov eax, 219",
    "    syscall",
    "    ret",
    ".text",
    host_stack = sym statics::HOST_STACK,
    stack_len = const statics::STACK_LEN,
    host = sym host_role,
    deputy = const entry::DEPUTY,
    deputy_role = sym deputy_role,
    check = const entry::CHECK,
    syscall = const entry::SYSCALL,
    abort = const entry::ABORT,
    parked = const entry::PARKED,
    finish = const entry::FINISH,
    interrupt = const STATUS + offset_of!(conet_deputy_core::boot::Status, interrupt) as u64,
    aborted = const ABORTED,
    parked_value = const PARKED,
);

unsafe extern "C" {
    fn _start();
    fn conet_gate(number: u64, args: *const u64) -> i64;
    fn conet_finish() -> i64;
}

extern "C" fn host_role(stack: *const u64) -> ! {
    // SAFETY: the kernel leaves argc there, then the pointers of argv (System V
    // ABI, x86-64 supplement §3.4.1).
    let argc = unsafe { *stack };
    let text = if argc > 1 {
        // SAFETY: argv[1] is a NUL-terminated string.
        unsafe { core::ffi::CStr::from_ptr((*stack.add(2)) as *const core::ffi::c_char) }
    } else {
        c""
    };
    crate::launch::run(text)
}

extern "C" fn deputy_role() -> ! {
    crate::deputy::run()
}

/// Runs a call unless the daemon wants the program home: a result, −errno,
/// [`ABORTED`] or [`PARKED`].
pub(crate) fn gate(number: u32, args: &[u64; 6]) -> i64 {
    // SAFETY: the deputy runs what the remote half of the same program asks for;
    // its buffers were rebased to checked ranges of this role's own.
    unsafe { conet_gate(u64::from(number), args.as_ptr()) }
}

/// Where this program begins: [`entry`]'s offsets count from here.
pub(super) fn start() -> u64 {
    _start as *const () as u64
}

/// Finishes the pending call, at home and for good.
pub(crate) fn finish_pending() -> i64 {
    // SAFETY: restart_syscall(2) has no arguments.
    unsafe { conet_finish() }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The program cannot go on without its agent, and must not go on wrongly.
    call::die(9)
}

/// Named by the unwinding tables of `core`; never called, as panics abort.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
