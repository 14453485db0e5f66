//! The seccomp program of a remote process: what traps, what does not.
//!
//! Dispatch more than boundary: a program owns its agent, and safety rests on
//! namespaces, an unprivileged user and no capability ([`crate`] documentation
//! of deputy-link). Still nothing that the agent does not need gets through.
//!
//! ```text
//! arch ≠ x86-64 ─────────────────────────────► trap (the agent takes the process home)
//! sched_yield, brk, robust list, rseq ───────► allow
//! instruction in conet's region
//!    call on the short list, its arguments as the agent uses them ► allow
//!    else ─────────────────────────────────────────────────────► kill
//! instruction elsewhere
//!    memory call that stays clear of the region ► allow
//!    futex ─────────────────────────────────────► allow
//!    else ──────────────────────────────────────► trap
//! ```
//!
//! Sources: man 2 seccomp, linux/seccomp.h, linux/bpf_common.h.

use crate::boot::family::remote_fd;
use crate::scan::{PAGEMAP_SCAN, UFFDIO_REGISTER, UFFDIO_WRITEPROTECT};
use conet_wire::family::clone;
use conet_wire::image::REGION;
use linux_raw_sys::general as nr;

/// One classic BPF instruction (`struct sock_filter`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip if true.
    pub jump_true: u8,
    /// Instructions to skip if false.
    pub jump_false: u8,
    /// Constant.
    pub k: u32,
}

/// `SECCOMP_RET_ALLOW`.
pub const ALLOW: u32 = 0x7fff_0000;
/// `SECCOMP_RET_TRAP`: the agent's handler decides.
pub const TRAP: u32 = 0x0003_0000;
/// `SECCOMP_RET_KILL_PROCESS` (Linux 4.14).
pub const KILL: u32 = 0x8000_0000;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const X32_BIT: u32 = 0x4000_0000;

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JEQ: u16 = 0x15;
const JGT: u16 = 0x25;
const JGE: u16 = 0x35;
const RETURN: u16 = 0x06;

// Offsets in struct seccomp_data.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const POINTER_HIGH: u32 = 12;
const fn arg_low(i: u32) -> u32 {
    16 + 8 * i
}
const fn arg_high(i: u32) -> u32 {
    20 + 8 * i
}

/// Upper half of every address in conet's region.
const REGION_HIGH: u32 = {
    assert!(REGION & 0xffff_ffff == 0);
    (REGION >> 32) as u32
};

const MAP_PRIVATE_ANONYMOUS: u32 = 0x22;
/// `MAP_SHARED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_FIXED_NOREPLACE`.
const MAP_KIND: u32 = 0x10_0033;

/// Most instructions of a program.
pub const MAX: usize = 256;

/// A program under construction.
#[derive(Debug)]
pub struct Program {
    code: [Instruction; MAX],
    len: usize,
}

/// Descriptors that the agent uses after the filter is in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgentDescriptors {
    /// The link.
    pub link: u32,
    /// `/proc/self/maps`.
    pub maps: u32,
    /// `/proc/self/pagemap`.
    pub pagemap: u32,
    /// The userfaultfd.
    pub userfault: u32,
    /// To the warden.
    pub warden: u32,
    /// The host's `/proc`.
    pub proc: u32,
    /// Where the two names lie that the agent opens below it, in memory that nobody
    /// can change.
    pub names: [u64; 2],
}

/// Flags of the `clone` by which a remote divides: its child's parent is the warden.
pub const DIVIDE: u64 = clone::PARENT | SIGCHLD;
/// The same for a child that shares its memory.
pub const DIVIDE_SHARED: u64 = clone::PARENT | clone::VM | clone::VFORK | SIGCHLD;
const SIGCHLD: u64 = 17;
const PR_SET_DUMPABLE: u32 = 4;
const FREE: u32 = remote_fd::FREE.cast_unsigned();

/// Lower half of a word.
#[allow(clippy::cast_possible_truncation, reason = "the half is meant")]
const fn low(word: u64) -> u32 {
    word as u32
}

impl Program {
    /// The program for a remote process whose agent uses `fds`.
    #[must_use]
    pub fn remote(fds: AgentDescriptors) -> Self {
        let mut p = Self { code: [Instruction::default(); MAX], len: 0 };
        p.load(ARCH);
        p.unless_equal_return(AUDIT_ARCH_X86_64, TRAP);
        p.load(NUMBER);
        p.push(JGE, 0, 1, X32_BIT);
        p.ret(TRAP);
        // By number alone, so that the kernel knows them beforehand and does not run
        // the program at all (seccomp's bitmap of constant actions, Linux 5.11).
        for number in [
            nr::__NR_sched_yield,
            nr::__NR_brk,
            nr::__NR_set_robust_list,
            nr::__NR_get_robust_list,
            nr::__NR_rseq,
        ] {
            p.allow(number);
        }
        p.load(POINTER_HIGH);
        // The jump is patched when the length of the agent's part is known.
        let fork = p.len;
        p.push(JEQ, 0, 0, REGION_HIGH);
        p.agent(fds);
        let distance = p.len - fork - 1;
        #[allow(clippy::cast_possible_truncation, reason = "checked against the width")]
        {
            assert!(distance < 256);
            p.code[fork].jump_false = distance as u8;
        }
        p.program();
        p
    }

    /// The instructions.
    #[must_use]
    pub fn instructions(&self) -> &[Instruction] {
        &self.code[..self.len]
    }

    /// Calls of the agent itself.
    fn agent(&mut self, fds: AgentDescriptors) {
        self.load(NUMBER);
        // What a forwarded call needs comes first.
        self.on_descriptors(nr::__NR_sendto, &[fds.link, fds.warden]);
        self.on_descriptors(nr::__NR_recvfrom, &[fds.link]);
        self.allow(nr::__NR_rt_sigreturn);
        self.allow(nr::__NR_exit_group);
        self.allow(nr::__NR_clock_gettime);
        self.allow(nr::__NR_getrandom);
        self.allow(nr::__NR_getcpu);
        self.allow(nr::__NR_getrusage);
        self.allow(nr::__NR_arch_prctl);
        self.allow(nr::__NR_sigaltstack);
        self.on_descriptors(nr::__NR_lseek, &[fds.maps]);
        self.on_descriptors(nr::__NR_read, &[fds.maps]);
        self.on_descriptors(nr::__NR_pread64, &[fds.pagemap]);
        self.tracking(fds);
        self.dividing(fds);
        for number in [nr::__NR_munmap, nr::__NR_mprotect, nr::__NR_madvise, nr::__NR_mincore] {
            self.away_from_region(number, KILL);
        }
        self.moving_away_from_region(nr::__NR_mremap, KILL);
        self.anonymous_map(KILL, true);
        self.ret(KILL);
    }

    /// Calls by which the agent makes a child, and the child becomes its own.
    fn dividing(&mut self, fds: AgentDescriptors) {
        self.on_descriptors(nr::__NR_recvmsg, &[fds.warden]);
        self.on_descriptors(nr::__NR_prctl, &[PR_SET_DUMPABLE]);
        // New number below the free ones, old number among them.
        self.push(JEQ, 0, 6, nr::__NR_dup2);
        self.load(arg_low(0));
        self.push(JGE, 0, 3, FREE);
        self.load(arg_low(1));
        self.push(JGE, 1, 0, FREE);
        self.ret(ALLOW);
        self.ret(KILL);
        self.push(JEQ, 0, 4, nr::__NR_close);
        self.load(arg_low(0));
        self.push(JGE, 0, 1, FREE);
        self.ret(ALLOW);
        self.ret(KILL);
        self.push(JEQ, 0, 7, nr::__NR_clone);
        self.load(arg_high(0));
        self.push(JEQ, 0, 3, 0);
        self.load(arg_low(0));
        self.push(JEQ, 2, 0, low(DIVIDE));
        self.push(JEQ, 1, 0, low(DIVIDE_SHARED));
        self.ret(KILL);
        self.ret(ALLOW);
        self.open_own(fds);
    }

    /// `openat` of the names given, for reading, below the descriptor given.
    fn open_own(&mut self, fds: AgentDescriptors) {
        self.push(JEQ, 0, 11, nr::__NR_openat);
        self.load(arg_low(0));
        self.push(JEQ, 0, 7, fds.proc);
        self.load(arg_low(2));
        self.push(JEQ, 0, 5, 0);
        self.load(arg_high(1));
        self.push(JEQ, 0, 3, REGION_HIGH);
        self.load(arg_low(1));
        self.push(JEQ, 2, 0, low(fds.names[0]));
        self.push(JEQ, 1, 0, low(fds.names[1]));
        self.ret(KILL);
        self.ret(ALLOW);
    }

    /// Calls of the program.
    fn program(&mut self) {
        self.load(NUMBER);
        self.futex();
        // munmap and mremap trap: where home has a file, home must hear of it.
        self.away_from_region(nr::__NR_mprotect, TRAP);
        self.anonymous_map(TRAP, false);
        self.ret(TRAP);
    }

    /// `call(addr, len, …)`: allowed where the range cannot touch the region.
    ///
    /// Above the region any length will do, as the kernel refuses ranges that
    /// wrap; below it the range must be shorter than 4 GiB and start more than
    /// that away.
    fn away_from_region(&mut self, number: u32, otherwise: u32) {
        self.push(JEQ, 0, 9, number);
        self.load(arg_high(0));
        self.push(JGT, 0, 1, REGION_HIGH);
        self.ret(ALLOW);
        self.push(JGE, 0, 1, REGION_HIGH - 1);
        self.ret(otherwise);
        self.load(arg_high(1));
        self.push(JEQ, 0, 1, 0);
        self.ret(ALLOW);
        self.ret(otherwise);
    }

    /// `mremap` above the region, where the kernel chooses any new place
    /// (`MREMAP_MAYMOVE` at most); what else there is takes the process home.
    fn moving_away_from_region(&mut self, number: u32, otherwise: u32) {
        self.push(JEQ, 0, 7, number);
        self.load(arg_low(3));
        self.push(JGT, 0, 1, 1);
        self.ret(otherwise);
        self.load(arg_high(0));
        self.push(JGT, 0, 1, REGION_HIGH);
        self.ret(ALLOW);
        self.ret(otherwise);
    }

    /// `mmap(addr, len, prot, flags, …)`: private anonymous memory. A fixed
    /// address is the agent's privilege (it has checked it), and never inside
    /// the region.
    fn anonymous_map(&mut self, otherwise: u32, fixed: bool) {
        if fixed {
            self.push(JEQ, 0, 8, nr::__NR_mmap);
            self.load(arg_low(3));
            self.push(AND, 0, 0, MAP_PRIVATE_ANONYMOUS | 1);
            self.push(JEQ, 1, 0, MAP_PRIVATE_ANONYMOUS);
            self.ret(otherwise);
            self.load(arg_high(0));
            self.push(JEQ, 0, 1, REGION_HIGH);
            self.ret(otherwise);
            self.ret(ALLOW);
        } else {
            self.push(JEQ, 0, 5, nr::__NR_mmap);
            self.load(arg_low(3));
            self.push(AND, 0, 0, MAP_KIND);
            self.push(JEQ, 0, 1, MAP_PRIVATE_ANONYMOUS);
            self.ret(ALLOW);
            self.ret(otherwise);
        }
    }

    /// `futex`: waits that end by an absolute time are the agent's, since that time is
    /// home's.
    fn futex(&mut self) {
        const OPERATION: u32 = 0x7f;
        const LOCK_PI: u32 = 6;
        const WAIT_BITSET: u32 = 9;
        const WAIT_REQUEUE_PI: u32 = 11;
        const LOCK_PI2: u32 = 13;
        self.push(JEQ, 0, 12, nr::__NR_futex);
        self.load(arg_low(1));
        self.push(AND, 0, 0, OPERATION);
        self.push(JEQ, 3, 0, WAIT_BITSET);
        self.push(JEQ, 2, 0, LOCK_PI);
        self.push(JEQ, 1, 0, WAIT_REQUEUE_PI);
        self.push(JEQ, 0, 5, LOCK_PI2);
        self.load(arg_low(3));
        self.push(JEQ, 0, 2, 0);
        self.load(arg_high(3));
        self.push(JEQ, 1, 0, 0);
        self.ret(TRAP);
        self.ret(ALLOW);
    }

    /// `call(fd, …)`: allowed on these descriptors.
    fn on_descriptors(&mut self, number: u32, fds: &[u32]) {
        #[allow(clippy::cast_possible_truncation, reason = "a handful of descriptors")]
        let count = fds.len() as u8;
        self.push(JEQ, 0, count + 3, number);
        self.load(arg_low(0));
        for left in (0..count).rev().zip(fds) {
            self.push(JEQ, left.0 + 1, 0, *left.1);
        }
        self.ret(KILL);
        self.ret(ALLOW);
    }

    /// `ioctl(pagemap, PAGEMAP_SCAN, …)`: what has changed of the program's own memory;
    /// `ioctl(userfault, UFFDIO_REGISTER or UFFDIO_WRITEPROTECT, …)`: to learn it of what is
    /// new.
    fn tracking(&mut self, fds: AgentDescriptors) {
        self.push(JEQ, 0, 10, nr::__NR_ioctl);
        self.load(arg_low(0));
        self.push(JEQ, 0, 2, fds.pagemap);
        self.load(arg_low(1));
        self.push(JEQ, 4, 5, PAGEMAP_SCAN);
        self.push(JEQ, 0, 4, fds.userfault);
        self.load(arg_low(1));
        self.push(JEQ, 1, 0, UFFDIO_REGISTER);
        self.push(JEQ, 0, 1, UFFDIO_WRITEPROTECT);
        self.ret(ALLOW);
        self.ret(KILL);
    }

    fn allow(&mut self, number: u32) {
        self.push(JEQ, 0, 1, number);
        self.ret(ALLOW);
    }

    fn unless_equal_return(&mut self, k: u32, value: u32) {
        self.push(JEQ, 1, 0, k);
        self.ret(value);
    }

    fn load(&mut self, offset: u32) {
        self.push(LOAD, 0, 0, offset);
    }

    fn ret(&mut self, value: u32) {
        self.push(RETURN, 0, 0, value);
    }

    fn push(&mut self, code: u16, jump_true: u8, jump_false: u8, k: u32) {
        self.code[self.len] = Instruction { code, jump_true, jump_false, k };
        self.len += 1;
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use conet_wire::image::REGION_LEN;

    const NAMES: [u64; 2] = [REGION + 0x2345, REGION + 0x2350];
    const FDS: AgentDescriptors = AgentDescriptors {
        link: 3,
        maps: 4,
        pagemap: 5,
        userfault: 8,
        warden: 6,
        proc: 7,
        names: NAMES,
    };
    const AGENT: u64 = REGION + 0x1234;
    const PROGRAM: u64 = 0x5555_0000_1000;

    /// Runs the program as the kernel would (Documentation/networking/filter.rst).
    fn run(arch: u32, number: u32, pointer: u64, args: [u64; 6]) -> u32 {
        let program = Program::remote(FDS);
        let mut data = [0u32; 16];
        data[0] = number;
        data[1] = arch;
        let halves = |v: u64| [(v & 0xffff_ffff) as u32, (v >> 32) as u32];
        data[2..4].copy_from_slice(&halves(pointer));
        for (i, arg) in args.into_iter().enumerate() {
            data[4 + 2 * i..6 + 2 * i].copy_from_slice(&halves(arg));
        }
        let (mut at, mut a) = (0usize, 0u32);
        loop {
            let i = program.instructions()[at];
            at += 1;
            let jump = |yes| usize::from(if yes { i.jump_true } else { i.jump_false });
            match i.code {
                LOAD => a = data[i.k as usize / 4],
                AND => a &= i.k,
                JEQ => at += jump(a == i.k),
                JGT => at += jump(a > i.k),
                JGE => at += jump(a >= i.k),
                RETURN => return i.k,
                other => panic!("unknown operation {other:#x}"),
            }
        }
    }

    fn call(number: u32, pointer: u64, args: [u64; 6]) -> u32 {
        run(AUDIT_ARCH_X86_64, number, pointer, args)
    }

    #[test]
    fn the_program_fits_and_is_long_enough_to_mean_something() {
        let len = Program::remote(FDS).instructions().len();
        assert!((80..=MAX).contains(&len), "{len}");
    }

    #[test]
    fn foreign_architectures_trap() {
        const AUDIT_ARCH_I386: u32 = 0x4000_0003;
        // Number 91 is munmap for i386 and fchmod for x86-64.
        assert_eq!(run(AUDIT_ARCH_I386, 91, PROGRAM, [0; 6]), TRAP);
        assert_eq!(run(AUDIT_ARCH_I386, 11, AGENT, [0; 6]), TRAP);
        assert_eq!(call(X32_BIT | 1, PROGRAM, [0; 6]), TRAP);
    }

    #[test]
    fn what_a_program_does_alone_is_allowed_and_the_rest_traps() {
        for number in [nr::__NR_futex, nr::__NR_sched_yield, nr::__NR_brk, nr::__NR_rseq] {
            assert_eq!(call(number, PROGRAM, [0; 6]), ALLOW);
        }
        for number in [
            nr::__NR_read,
            nr::__NR_open,
            nr::__NR_execve,
            nr::__NR_clone,
            nr::__NR_rt_sigreturn,
            nr::__NR_madvise,
            nr::__NR_sendto,
            nr::__NR_io_uring_setup,
        ] {
            assert_eq!(call(number, PROGRAM, [0; 6]), TRAP, "{number}");
        }
        let heap = [0x7f00_0000_0000, 1 << 40, 3, 0x22, u64::MAX, 0];
        assert_eq!(call(nr::__NR_mprotect, PROGRAM, heap), ALLOW);
        assert_eq!(call(nr::__NR_munmap, PROGRAM, heap), TRAP);
        for (operation, timeout, want) in [
            (0, 1, ALLOW),
            (1 | 128, 0, ALLOW),
            (9 | 128, 0, ALLOW),
            (9 | 128, 1, TRAP),
            (9 | 128, 1 << 40, TRAP),
            (9 | 128 | 256, 8, TRAP),
            (6, 8, TRAP),
            (13, 8, TRAP),
            (6, 0, ALLOW),
        ] {
            let args = [0x7f00_0000_0000, operation, 0, timeout, 0, 0];
            assert_eq!(call(nr::__NR_futex, PROGRAM, args), want, "{operation} {timeout}");
        }
        assert_eq!(call(nr::__NR_mmap, PROGRAM, [0, 4096, 3, 0x22, u64::MAX, 0]), ALLOW);
        assert_eq!(call(nr::__NR_mmap, PROGRAM, [0, 4096, 3, 0x20022, u64::MAX, 0]), ALLOW);
        for flags in [0x32, 0x10_0022, 0x21, 0x01, 0x02] {
            let args = [0x7f00_0000_0000, 4096, 3, flags, u64::MAX, 0];
            assert_eq!(call(nr::__NR_mmap, PROGRAM, args), TRAP, "{flags:#x}");
        }
        let remap = |flags| [0x7f00_0000_0000, 4096, 8192, flags, 0, 0];
        assert_eq!(call(nr::__NR_mremap, PROGRAM, remap(1)), TRAP);
        assert_eq!(call(nr::__NR_mremap, AGENT, remap(1)), ALLOW);
        assert_eq!(call(nr::__NR_mremap, AGENT, remap(3)), KILL);
    }

    #[test]
    fn no_memory_call_reaches_the_region() {
        for number in [nr::__NR_munmap, nr::__NR_mprotect, nr::__NR_mremap] {
            for (addr, len) in [
                (REGION, 4096),
                (REGION + REGION_LEN - 4096, 4096),
                (REGION - 4096, 8192),
                (0, u64::MAX),
                (0, 1 << 46),
                (0x1000, REGION),
                (REGION - (1 << 32), (1 << 32) + 4096),
            ] {
                for flags in [0, 1, 3] {
                    let args = [addr, len, len, flags, REGION, 0];
                    assert_ne!(call(number, PROGRAM, args), ALLOW, "{number} {addr:#x} {len:#x}");
                    assert_ne!(call(number, AGENT, args), ALLOW, "{number} {addr:#x} {len:#x}");
                }
            }
        }
        for flags in [0x32, 0x10_0022, 0x22 | 0x10] {
            let args = [REGION, 4096, 7, flags, u64::MAX, 0];
            assert_ne!(call(nr::__NR_mmap, AGENT, args), ALLOW);
            assert_ne!(call(nr::__NR_mmap, PROGRAM, args), ALLOW);
        }
    }

    #[test]
    fn a_remote_divides_in_one_way_only() {
        for (flags, want) in [
            (DIVIDE, ALLOW),
            (DIVIDE_SHARED, ALLOW),
            (17, KILL),
            (DIVIDE | clone::VM, KILL),
            (DIVIDE | 0x1000_0000, KILL),
            (DIVIDE | 1 << 32, KILL),
        ] {
            assert_eq!(call(nr::__NR_clone, AGENT, [flags, 0, 0, 0, 0, 0]), want, "{flags:#x}");
            assert_eq!(call(nr::__NR_clone, PROGRAM, [flags, 0, 0, 0, 0, 0]), TRAP);
        }
        for (proc, name, flags, want) in [
            (7, NAMES[0], 0, ALLOW),
            (7, NAMES[1], 0, ALLOW),
            (6, NAMES[0], 0, KILL),
            (7, NAMES[0] + 1, 0, KILL),
            (7, NAMES[0] + (1 << 32), 0, KILL),
            (7, NAMES[0], 2, KILL),
        ] {
            assert_eq!(call(nr::__NR_openat, AGENT, [proc, name, flags, 0, 0, 0]), want);
        }
        for (from, to, want) in [(8, 4, ALLOW), (9, 7, ALLOW), (4, 6, KILL), (8, 8, KILL)] {
            assert_eq!(call(nr::__NR_dup2, AGENT, [from, to, 0, 0, 0, 0]), want, "{from} {to}");
        }
        assert_eq!(call(nr::__NR_close, AGENT, [8, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(call(nr::__NR_close, AGENT, [7, 0, 0, 0, 0, 0]), KILL);
        assert_eq!(call(nr::__NR_prctl, AGENT, [4, 1, 0, 0, 0, 0]), ALLOW);
        assert_eq!(call(nr::__NR_prctl, AGENT, [15, 0, 0, 0, 0, 0]), KILL);
    }

    #[test]
    fn the_agents_code_is_no_way_out() {
        for number in [
            nr::__NR_open,
            nr::__NR_openat,
            nr::__NR_socket,
            nr::__NR_connect,
            nr::__NR_execve,
            nr::__NR_clone,
            nr::__NR_clone3,
            nr::__NR_fork,
            nr::__NR_kill,
            nr::__NR_ptrace,
            nr::__NR_write,
            nr::__NR_sendmsg,
            nr::__NR_dup2,
            nr::__NR_ioctl,
            nr::__NR_rt_sigaction,
            nr::__NR_rt_sigprocmask,
            nr::__NR_prctl,
        ] {
            assert_eq!(call(number, AGENT, [3, 0, 0, 0, 0, 0]), KILL, "{number}");
        }
        assert_eq!(call(nr::__NR_sendto, AGENT, [3, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(call(nr::__NR_sendto, AGENT, [6, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(call(nr::__NR_sendto, AGENT, [7, 0, 0, 0, 0, 0]), KILL);
        assert_eq!(call(nr::__NR_read, AGENT, [0, 0, 0, 0, 0, 0]), KILL);
        assert_eq!(call(nr::__NR_recvmsg, AGENT, [6, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(call(nr::__NR_recvmsg, AGENT, [3, 0, 0, 0, 0, 0]), KILL);
        let scan = u64::from(PAGEMAP_SCAN);
        assert_eq!(call(nr::__NR_ioctl, AGENT, [5, scan, 0, 0, 0, 0]), ALLOW);
        assert_eq!(call(nr::__NR_ioctl, AGENT, [5, scan + 1, 0, 0, 0, 0]), KILL);
        assert_eq!(call(nr::__NR_ioctl, AGENT, [0, scan, 0, 0, 0, 0]), KILL);
        assert_eq!(call(nr::__NR_ioctl, PROGRAM, [5, scan, 0, 0, 0, 0]), TRAP);
        let register = u64::from(UFFDIO_REGISTER);
        assert_eq!(call(nr::__NR_ioctl, AGENT, [8, register, 0, 0, 0, 0]), ALLOW);
        let protect = u64::from(UFFDIO_WRITEPROTECT);
        assert_eq!(call(nr::__NR_ioctl, AGENT, [8, protect, 0, 0, 0, 0]), ALLOW);
        assert_eq!(call(nr::__NR_ioctl, PROGRAM, [8, protect, 0, 0, 0, 0]), TRAP);
        assert_eq!(call(nr::__NR_ioctl, AGENT, [8, register + 1, 0, 0, 0, 0]), KILL);
        assert_eq!(call(nr::__NR_ioctl, AGENT, [8, scan, 0, 0, 0, 0]), KILL);
        assert_eq!(call(nr::__NR_ioctl, AGENT, [5, register, 0, 0, 0, 0]), KILL);
        assert_eq!(call(nr::__NR_ioctl, PROGRAM, [8, register, 0, 0, 0, 0]), TRAP);
        assert_eq!(call(nr::__NR_mmap, AGENT, [0x1000, 4096, 3, 0x32, u64::MAX, 0]), ALLOW);
        assert_eq!(call(nr::__NR_mmap, AGENT, [0x1000, 4096, 3, 0x02, 3, 0]), KILL);
    }
}
