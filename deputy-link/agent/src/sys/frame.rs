//! Signal frames: the program's state as the kernel saves and restores it.
//!
//! Layout: arch/x86/include/uapi/asm/sigcontext.h and ucontext.h. The vector state
//! lies apart, with `struct _fpx_sw_bytes` at byte 464 and a magic number behind;
//! without these the kernel restores only the legacy part.

use super::call::{Action, AltStack, alt_stack, set_action};
use super::memory::{fault_exit, slice, slice_mut};
use super::statics::{FRAME, alt_stack as stack_of};
use conet_wire::image::{MAX_XSAVE, Registers};
use core::arch::{asm, naked_asm};

const SIGILL: u32 = 4;
const SIGTRAP: u32 = 5;
const SIGBUS: u32 = 7;
const SIGFPE: u32 = 8;
const SIGSEGV: u32 = 11;
const SIGURG: u32 = 23;
const SIGWINCH: u32 = 28;
const SIGSYS: u32 = 31;

const SA_SIGINFO: u64 = 4;
const SA_RESTORER: u64 = 0x0400_0000;
const SA_ONSTACK: u64 = 0x0800_0000;
const SA_RESTART: u64 = 0x1000_0000;

const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
const SW_BYTES: usize = 464;

/// `struct ucontext` with `struct sigcontext` (x86-64).
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Context {
    flags: u64,
    link: u64,
    stack: AltStack,
    r8: u64,
    r9: u64,
    r10: u64,
    r11: u64,
    r12: u64,
    r13: u64,
    r14: u64,
    r15: u64,
    rdi: u64,
    rsi: u64,
    rbp: u64,
    rbx: u64,
    rdx: u64,
    pub(crate) rax: u64,
    rcx: u64,
    pub(crate) rsp: u64,
    pub(crate) rip: u64,
    eflags: u64,
    segments: [u16; 4],
    err: u64,
    trap_number: u64,
    old_mask: u64,
    cr2: u64,
    fp_state: u64,
    reserved: [u64; 8],
    mask: u64,
}

impl Context {
    /// Where this frame lies.
    pub(crate) fn addr(&self) -> u64 {
        core::ptr::from_ref(self) as u64
    }

    /// The frame at `addr`: the parent's, who waits in the kernel.
    pub(crate) fn at<'a>(addr: u64) -> &'a Self {
        // SAFETY: callers name a frame that its owner has given out and does not
        // leave meanwhile.
        unsafe { &*(addr as *const Self) }
    }

    /// Arguments of the system call that trapped.
    pub(crate) const fn args(&self) -> [u64; 6] {
        [self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9]
    }

    /// Sets the first three arguments of a function or system call.
    pub(crate) const fn set_arguments(&mut self, [rdi, rsi, rdx]: [u64; 3]) {
        (self.rdi, self.rsi, self.rdx) = (rdi, rsi, rdx);
    }

    /// General registers; the bases are not part of a frame.
    pub(crate) fn registers(&self) -> Registers {
        Registers {
            r15: self.r15,
            r14: self.r14,
            r13: self.r13,
            r12: self.r12,
            rbp: self.rbp,
            rbx: self.rbx,
            r11: self.r11,
            r10: self.r10,
            r9: self.r9,
            r8: self.r8,
            rax: self.rax,
            rcx: self.rcx,
            rdx: self.rdx,
            rsi: self.rsi,
            rdi: self.rdi,
            rip: self.rip,
            eflags: self.eflags,
            rsp: self.rsp,
            fs_base: get_base(0x1003),
            gs_base: get_base(0x1004),
        }
    }

    /// Has every signal blocked when the handler returns.
    pub(super) const fn block_all(&mut self) {
        self.mask = u64::MAX;
    }

    fn set_registers(&mut self, r: &Registers) {
        self.r15 = r.r15;
        self.r14 = r.r14;
        self.r13 = r.r13;
        self.r12 = r.r12;
        self.rbp = r.rbp;
        self.rbx = r.rbx;
        self.r11 = r.r11;
        self.r10 = r.r10;
        self.r9 = r.r9;
        self.r8 = r.r8;
        self.rax = r.rax;
        self.rcx = r.rcx;
        self.rdx = r.rdx;
        self.rsi = r.rsi;
        self.rdi = r.rdi;
        self.rip = r.rip;
        self.eflags = r.eflags;
        self.rsp = r.rsp;
    }

    /// Copies the vector state as `PTRACE_GETREGSET` would give it; its length.
    pub(crate) fn copy_xsave(&self, into: &mut [u8; MAX_XSAVE]) -> usize {
        let legacy = slice(self.fp_state, 512);
        let word = |at: usize| {
            u32::from_le_bytes([legacy[at], legacy[at + 1], legacy[at + 2], legacy[at + 3]])
        };
        let len = if word(SW_BYTES) == FP_XSTATE_MAGIC1 {
            (word(SW_BYTES + 16) as usize).clamp(512, MAX_XSAVE)
        } else {
            512
        };
        into[..len].copy_from_slice(slice(self.fp_state, len));
        let mut features = [0u8; 8];
        features.copy_from_slice(&legacy[SW_BYTES + 8..SW_BYTES + 16]);
        into[SW_BYTES..SW_BYTES + 48].fill(0);
        into[SW_BYTES..SW_BYTES + 8].copy_from_slice(&features);
        len
    }
}

fn get_base(code: u64) -> u64 {
    let mut base = 0u64;
    // SAFETY: ARCH_GET_FS and ARCH_GET_GS write one word.
    unsafe { super::call::raw(158, [code, core::ptr::from_mut(&mut base) as u64, 0, 0, 0, 0]) };
    base
}

/// Enters the program with this state; `mask` and `stack` are what the kernel then
/// holds for it. The bases are set by the caller.
pub(crate) fn resume(registers: &Registers, xsave: &[u8], mask: u64, stack: &AltStack) -> ! {
    let frame = FRAME.addr();
    let fp = frame + 1024;
    let area = slice_mut(fp, 7168);
    let len = xsave.len().min(MAX_XSAVE);
    area[..len].copy_from_slice(&xsave[..len]);
    let mut features = [0u8; 8];
    features.copy_from_slice(&xsave[SW_BYTES..SW_BYTES + 8]);
    let size = u32::try_from(len).unwrap_or(0);
    let sw = &mut area[SW_BYTES..SW_BYTES + 48];
    sw.fill(0);
    sw[0..4].copy_from_slice(&FP_XSTATE_MAGIC1.to_le_bytes());
    sw[4..8].copy_from_slice(&(size + 4).to_le_bytes());
    sw[8..16].copy_from_slice(&features);
    sw[16..20].copy_from_slice(&size.to_le_bytes());
    area[len..len + 4].copy_from_slice(&FP_XSTATE_MAGIC2.to_le_bytes());
    // SAFETY: the frame is a static of 8 KiB that nothing else uses now.
    let context = unsafe { &mut *(frame as *mut Context) };
    context.set_registers(registers);
    // UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
    context.flags = 7;
    context.stack = *stack;
    context.segments = [0x33, 0, 0, 0x2b];
    context.fp_state = fp;
    context.mask = mask;
    // SAFETY: rt_sigreturn takes the frame at the stack pointer and does not come back.
    unsafe {
        asm!("mov rsp, {frame}", "mov eax, 15", "syscall", "ud2",
            frame = in(reg) frame, options(noreturn));
    }
}

#[unsafe(naked)]
pub(super) extern "C" fn restorer() {
    naked_asm!("mov eax, 15", "syscall")
}

/// Makes the agent the handler of its signals on the remote side.
pub(crate) fn take_signals() {
    alt_stack(Some(&stack_of(0)));
    let faults = 1 << (SIGSEGV - 1) | 1 << (SIGBUS - 1);
    let install = |signal: u32, handler: u64, mask: u64| {
        // The one after which the program goes on where it was.
        let restart = if signal == SIGWINCH { SA_RESTART } else { 0 };
        let action = Action {
            handler,
            flags: SA_SIGINFO | SA_RESTORER | SA_ONSTACK | restart,
            restorer: restorer as *const () as u64,
            mask,
        };
        set_action(signal, &action);
    };
    install(SIGSYS, on_trap as *const () as u64, !faults);
    install(SIGURG, on_bell as *const () as u64, !faults);
    install(SIGWINCH, on_slice as *const () as u64, !faults);
    for signal in [SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP] {
        install(signal, on_fault as *const () as u64, u64::MAX);
    }
}

/// `siginfo` of SIGSYS: si_code at 8, si_call_addr at 16, si_syscall at 24, si_arch at 28.
fn info_word(info: *const u8, at: usize) -> u32 {
    // SAFETY: the kernel gives 128 bytes.
    unsafe { core::ptr::read_unaligned(info.add(at).cast()) }
}

extern "C" fn on_trap(_signal: i32, info: *const u8, context: *mut Context) {
    // SAFETY: the kernel's frame, ours until the handler returns.
    let context = unsafe { &mut *context };
    crate::trap::on_call(context, info_word(info, 24), info_word(info, 28));
}

extern "C" fn on_bell(_signal: i32, _info: *const u8, context: *mut Context) {
    // SAFETY: as above.
    crate::trap::on_bell(unsafe { &mut *context });
}

extern "C" fn on_slice(_signal: i32, _info: *const u8, _context: *mut Context) {
    crate::trap::on_slice();
}

extern "C" fn on_fault(signal: i32, info: *const u8, context: *mut Context) {
    // SAFETY: as above.
    let context = unsafe { &mut *context };
    if let Some(exit) = fault_exit(context.rip) {
        context.rip = exit;
        return;
    }
    // A breakpoint is reported behind its instruction, a single byte; at home it is
    // to be met again.
    const SI_KERNEL: u32 = 0x80;
    if signal.unsigned_abs() == SIGTRAP && info_word(info, 8) == SI_KERNEL {
        context.rip = context.rip.wrapping_sub(1);
    }
    crate::trap::on_fault(context, signal.unsigned_abs());
}
