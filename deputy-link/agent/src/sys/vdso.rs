//! The local vDSO, and the program's copy of home's with its entry points patched.
//!
//! A vDSO is a small ELF image (vdso(7)); its symbols are found through the dynamic
//! section. Copies cannot read their data pages, so every entry point that would is
//! replaced by a jump into the agent.
//!
//! ```text
//! program ─ call ─► copy of home's vDSO ─ jmp ─► entry ─► answered here ── ret ─► program
//!                   (patched)                      └────► stub: syscall; ret (traps)
//! ```
//!
//! A program may have to go home in the midst of this, though nothing of it exists
//! there. At its first instruction, and at the stub, the call has not begun: it goes
//! home to begin at the vDSO of home ([`Inside`]). Between, its return address is
//! replaced, and it goes home as it returns.

use super::frame::Context;
use super::memory::{Program, slice, slice_mut};
use crate::clock;
use conet_deputy_core::marshal::Memory;
use conet_wire::image::VdsoEntries;
use core::arch::naked_asm;
use core::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use linux_raw_sys::{errno, general as nr};

/// Clocks that have an entry in [`OFFSETS`]: 0 to `CLOCK_TAI`.
const CLOCKS: usize = 12;

/// `clock_gettime` of the local vDSO, or the system call.
static LOCAL_CLOCK: AtomicU64 = AtomicU64::new(0);
/// `getcpu` of the local vDSO, or 0.
static LOCAL_CPU: AtomicU64 = AtomicU64::new(0);
/// A `syscall` instruction outside of the region, which traps into the agent.
static TRAP_STUB: AtomicU64 = AtomicU64::new(0);
/// Stack pointer with which the last vDSO function was entered: there lies its return
/// address, and below it are its arguments.
static ENTERED_AT: AtomicU64 = AtomicU64::new(0);
/// Which function that was, by its place in [`ENTRIES`].
static ENTERED: AtomicU64 = AtomicU64::new(0);
/// The return address that was replaced by [`returned`], or 0.
static RETURN_TO: AtomicU64 = AtomicU64::new(0);
/// Where the functions are in home's vDSO, in the order of [`ENTRIES`].
static HOME: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];

/// What a function gives when only a system call can answer.
const TRAP: i64 = -4096;
/// Where the jump is in a patched entry point, `mov r11, target; jmp r11`.
const PATCH_JUMP: u64 = 10;

/// Nanoseconds of `CLOCK_MONOTONIC` by the `clock_gettime` of a vDSO.
pub(crate) fn monotonic(clock: u64) -> u64 {
    let mut time = [0u64; 2];
    // SAFETY: the daemon found the symbol in this process's own vDSO, which nobody
    // can unmap while the deputy runs; it has this signature (vdso(7)).
    let function: extern "C" fn(u32, *mut [u64; 2]) -> i32 = unsafe { core::mem::transmute(clock) };
    function(nr::CLOCK_MONOTONIC, &raw mut time);
    time[0].wrapping_mul(1_000_000_000).wrapping_add(time[1])
}

/// What to add to each local clock, as seconds and nanoseconds; `i64::MIN` seconds
/// where the clock is not time of the day.
static OFFSETS: [[AtomicI64; 2]; CLOCKS] =
    [const { [AtomicI64::new(i64::MIN), AtomicI64::new(0)] }; CLOCKS];
/// One bit for each clock in [`OFFSETS`] that is time of the day.
static HAS_OFFSET: AtomicU64 = AtomicU64::new(0);

/// Remembers what the clocks of the two nodes differ by.
pub(crate) fn use_offsets() {
    let mut known = 0;
    for (id, slot) in (0u32..).zip(&OFFSETS) {
        if let Some([seconds, nanos]) = clock::split_offset(id) {
            slot[0].store(seconds, Ordering::Relaxed);
            slot[1].store(nanos, Ordering::Relaxed);
            known |= 1 << id;
        }
    }
    HAS_OFFSET.store(known, Ordering::Relaxed);
}

/// What to add to local clock `id`, as seconds and nanoseconds.
pub(crate) fn offset(id: u32) -> Option<[i64; 2]> {
    let slot = OFFSETS.get(usize::try_from(id).ok()?)?;
    let seconds = slot[0].load(Ordering::Relaxed);
    (seconds != i64::MIN).then(|| [seconds, slot[1].load(Ordering::Relaxed)])
}

/// Remembers where the local vDSO's functions are.
pub(crate) fn use_local_vdso(base: u64, len: u64) {
    let len = usize::try_from(len).unwrap_or(0);
    let call = clock_gettime_call as *const () as u64;
    let entry = symbol(slice(base, len), b"__vdso_clock_gettime").map_or(call, |at| base + at);
    LOCAL_CLOCK.store(entry, Ordering::Relaxed);
    let entry = symbol(slice(base, len), b"__vdso_getcpu").map_or(0, |at| base + at);
    LOCAL_CPU.store(entry, Ordering::Relaxed);
}

fn word(image: &[u8], at: u64, len: usize) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let mut bytes = [0; 8];
    bytes[..len].copy_from_slice(image.get(at..at.checked_add(len)?)?);
    Some(u64::from_le_bytes(bytes))
}

/// Offset of dynamic symbol `name` in an ELF image whose addresses begin at 0.
fn symbol(image: &[u8], name: &[u8]) -> Option<u64> {
    const PT_DYNAMIC: u64 = 2;
    let (headers, count) = (word(image, 32, 8)?, word(image, 56, 2)?);
    let dynamic = (0..count).find_map(|i| {
        let at = headers + 56 * i;
        (word(image, at, 4)? == PT_DYNAMIC).then(|| word(image, at + 8, 8))?
    })?;
    let entry = |tag: u64| {
        (0..64).find_map(|i| {
            let at = dynamic + 16 * i;
            (word(image, at, 8)? == tag).then(|| word(image, at + 8, 8))?
        })
    };
    let (strings, symbols) = (entry(5)?, entry(6)?);
    // Symbols end where the strings begin or the image does; a vDSO has a dozen.
    (1..64).find_map(|i| {
        let at = symbols + 24 * i;
        let text = strings + word(image, at, 4)?;
        let value = word(image, at + 8, 8)?;
        let text = image.get(usize::try_from(text).ok()?..)?;
        (text.get(..name.len())? == name && text.get(name.len()) == Some(&0)).then_some(value)
    })
}

/// The local clock `id` as seconds and nanoseconds.
pub(crate) fn local_clock(id: u32) -> Option<[i64; 2]> {
    let mut time = [0i64; 2];
    // SAFETY: the symbol has this signature (vdso(7)) and lies in mapped code.
    let function: extern "C" fn(u32, *mut [i64; 2]) -> i32 =
        unsafe { core::mem::transmute(LOCAL_CLOCK.load(Ordering::Relaxed)) };
    let result = function(id, &raw mut time);
    (result == 0).then_some(time)
}

/// Patches the program's copy of home's vDSO, which is mapped writable at `base`.
pub(crate) fn patch(base: u64, entries: &VdsoEntries) {
    // Bytes 9 to 15 of an ELF image are padding: `syscall; ret` fits.
    slice_mut(base + 9, 3).copy_from_slice(&[0x0f, 0x05, 0xc3]);
    TRAP_STUB.store(base + 9, Ordering::Relaxed);
    let home = [
        entries.clock_gettime,
        entries.gettimeofday,
        entries.time,
        entries.clock_getres,
        entries.getcpu,
        entries.getrandom,
    ];
    for ((at, entry), known) in home.into_iter().zip(ENTRIES).zip(&HOME) {
        known.store(at, Ordering::Relaxed);
        if at != 0 {
            let code = slice_mut(at, 13);
            code[..2].copy_from_slice(&[0x49, 0xbb]);
            code[2..10].copy_from_slice(&(entry as *const () as u64).to_le_bytes());
            code[10..].copy_from_slice(&[0x41, 0xff, 0xe3]);
        }
    }
}

/// Whether `rip` is in conet's own region.
pub(crate) const fn is_in_region(rip: u64) -> bool {
    conet_wire::image::overlaps_region(rip, rip.wrapping_add(1))
}

/// Where in a vDSO function a handler has interrupted the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inside {
    /// The call has not begun: it can begin at this address of home's vDSO, with the
    /// registers as they are.
    Begin(u64),
    /// The call is done; it only returns.
    Return,
    /// In the midst of it.
    Midst,
}

/// Where the program is, if in a vDSO function; `is_trapped` behind a system call
/// that trapped.
pub(crate) fn inside(rip: u64, is_trapped: bool) -> Option<Inside> {
    let home = |which: usize| HOME.get(which).map_or(0, |at| at.load(Ordering::Relaxed));
    for (which, entry) in ENTRIES.into_iter().enumerate() {
        let at = home(which);
        let is_patch = at != 0 && (rip == at || rip == at + PATCH_JUMP);
        if is_patch || rip == entry as *const () as u64 {
            return Some(Inside::Begin(at));
        }
    }
    let stub = TRAP_STUB.load(Ordering::Relaxed);
    let entered = usize::try_from(ENTERED.load(Ordering::Relaxed)).unwrap_or(0);
    match rip.wrapping_sub(stub) {
        _ if stub == 0 => None,
        0 => Some(Inside::Begin(home(entered))),
        2 if is_trapped => Some(Inside::Begin(home(entered))),
        2 => Some(Inside::Return),
        _ => is_in_region(rip).then_some(Inside::Midst),
    }
}

/// Where the function was entered, if what is known of it can be true of `context`.
fn entered_at(context: &Context) -> Option<u64> {
    const DEEPEST: u64 = 64 * 1024;
    let at = ENTERED_AT.load(Ordering::Relaxed);
    (at.wrapping_sub(context.rsp) < DEEPEST && at != 0).then_some(at)
}

/// Has the function that is being left return into a trap.
pub(crate) fn stop_at_return(context: &Context) {
    if RETURN_TO.load(Ordering::Relaxed) != 0 {
        return;
    }
    let Some(at) = entered_at(context) else { return };
    let mut word = [0; 8];
    if Program.read(at, &mut word).is_ok() {
        let trap = (returned as *const () as u64).to_le_bytes();
        if Program.write(at, &trap).is_ok() {
            RETURN_TO.store(u64::from_le_bytes(word), Ordering::Relaxed);
        }
    }
}

/// Puts the return address back, where it was replaced.
pub(crate) fn restore_return() {
    let back = RETURN_TO.swap(0, Ordering::Relaxed);
    if back != 0 {
        // Where this cannot be written, the function could not return anyway.
        Program.write(ENTERED_AT.load(Ordering::Relaxed), &back.to_le_bytes()).ok();
    }
}

/// Forgets a replaced return address: it was another's, who has ended since.
pub(crate) fn forget_return() {
    RETURN_TO.store(0, Ordering::Relaxed);
}

/// Lets a function whose work is done return; false if there is no such stack.
pub(crate) fn finish_return(context: &mut Context) -> bool {
    let mut word = [0; 8];
    let read = Program.read(context.rsp, &mut word).is_ok();
    if read {
        context.rip = u64::from_le_bytes(word);
        context.rsp = context.rsp.wrapping_add(8);
    }
    read
}

/// Whether the program has just returned into the trap; then it is where it would
/// have returned to.
pub(crate) fn has_returned(context: &mut Context) -> bool {
    if context.rip != returned as *const () as u64 {
        return false;
    }
    match RETURN_TO.swap(0, Ordering::Relaxed) {
        0 => false,
        back => {
            context.rip = back;
            true
        }
    }
}

/// A function faulted at a pointer of the program's: back to its beginning, at home's
/// vDSO, where it will fault as it would have.
pub(crate) fn undo(context: &mut Context) -> bool {
    if inside(context.rip, false) != Some(Inside::Midst) {
        return false;
    }
    restore_return();
    let Some(at) = entered_at(context) else { return false };
    let mut saved = [0; 24];
    // Where there is no stack to save them on, they are in the registers still.
    if Program.read(at.wrapping_sub(24), &mut saved).is_ok()
        && let [rdx, rsi, rdi] = *saved.as_chunks::<8>().0
    {
        context.set_arguments([rdi, rsi, rdx].map(u64::from_le_bytes));
    }
    let entered = usize::try_from(ENTERED.load(Ordering::Relaxed)).unwrap_or(0);
    let home = HOME.get(entered).map_or(0, |at| at.load(Ordering::Relaxed));
    (context.rip, context.rsp) = (home, at);
    true
}

/// Where a function returns to when the program is wanted home.
#[unsafe(naked)]
extern "C" fn returned() {
    naked_asm!("ud2")
}

/// An entry point: notes where it was entered, has `$fast` answer, or traps with the
/// stack and the arguments as they were.
macro_rules! entry {
    ($name:ident, $which:literal, $number:expr, $fast:ident) => {
        #[unsafe(naked)]
        extern "C" fn $name() {
            naked_asm!(
                "mov [rip + {at}], rsp",
                "mov qword ptr [rip + {entered}], {which}",
                "push rdi",
                "push rsi",
                "push rdx",
                "call {fast}",
                "pop rdx",
                "pop rsi",
                "pop rdi",
                "cmp rax, {trap}",
                "je 2f",
                "ret",
                "2:",
                "mov eax, {number}",
                "jmp [rip + {stub}]",
                at = sym ENTERED_AT,
                entered = sym ENTERED,
                which = const $which,
                fast = sym $fast,
                trap = const TRAP,
                number = const $number,
                stub = sym TRAP_STUB,
            )
        }
    };
}

/// `clock_gettime`, called so often that nanoseconds count: the local vDSO writes to
/// the program's buffer, and what the clocks differ by is added there.
#[unsafe(naked)]
extern "C" fn entry_clock_gettime() {
    naked_asm!(
        "mov [rip + {at}], rsp",
        "mov qword ptr [rip + {entered}], 0",
        "push rdi",
        "push rsi",
        "push rdx",
        "cmp edi, {clocks}",
        "jae 3f",
        "mov rax, [rip + {known}]",
        "bt rax, rdi",
        "jnc 3f",
        "call [rip + {clock}]",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "test eax, eax",
        "jne 4f",
        "mov ecx, edi",
        "shl ecx, 4",
        "lea rdx, [rip + {offsets}]",
        "add rcx, rdx",
        "mov rax, [rsi + 8]",
        "mov rdx, [rsi]",
        "add rax, [rcx + 8]",
        "add rdx, [rcx]",
        "cmp rax, {second}",
        "jb 2f",
        "sub rax, {second}",
        "inc rdx",
        "2:",
        "mov [rsi + 8], rax",
        "mov [rsi], rdx",
        "xor eax, eax",
        "ret",
        "3:",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "4:",
        "mov eax, {number}",
        "jmp [rip + {stub}]",
        at = sym ENTERED_AT,
        entered = sym ENTERED,
        clocks = const CLOCKS,
        known = sym HAS_OFFSET,
        clock = sym LOCAL_CLOCK,
        offsets = sym OFFSETS,
        second = const clock::SECOND,
        number = const nr::__NR_clock_gettime,
        stub = sym TRAP_STUB,
    )
}

/// Where the local vDSO has no clock.
#[unsafe(naked)]
extern "C" fn clock_gettime_call() {
    naked_asm!("mov eax, {number}", "syscall", "ret", number = const nr::__NR_clock_gettime)
}

entry!(entry_gettimeofday, 1, nr::__NR_gettimeofday, gettimeofday);
entry!(entry_time, 2, nr::__NR_time, time);
entry!(entry_clock_getres, 3, nr::__NR_clock_getres, clock_getres);
entry!(entry_getcpu, 4, nr::__NR_getcpu, getcpu);
entry!(entry_getrandom, 5, nr::__NR_getrandom, getrandom);

/// The entry points, in the order of [`HOME`].
const ENTRIES: [extern "C" fn(); 6] = [
    entry_clock_gettime,
    entry_gettimeofday,
    entry_time,
    entry_clock_getres,
    entry_getcpu,
    entry_getrandom,
];

/// Stores through a pointer of the program's; a wrong one faults, as it does in the
/// real vDSO.
fn store<T>(pointer: *mut T, value: T) {
    if !pointer.is_null() {
        // SAFETY: the caller of a vDSO function vouches for its pointers; a wrong one
        // faults, which `undo` makes the program's own fault.
        unsafe { pointer.write_unaligned(value) };
    }
}

extern "C" fn gettimeofday(time: *mut [i64; 2], zone: *mut [i32; 2]) -> i64 {
    match clock::read(nr::CLOCK_REALTIME) {
        Some([seconds, nanos]) if zone.is_null() => {
            store(time, [seconds, nanos / 1000]);
            0
        }
        _ => TRAP,
    }
}

extern "C" fn time(time: *mut i64) -> i64 {
    // As the kernel's: it never looks at the processor's counter.
    let Some([seconds, _]) = clock::read(nr::CLOCK_REALTIME_COARSE) else { return TRAP };
    store(time, seconds);
    seconds
}

extern "C" fn clock_getres(id: u32, time: *mut [i64; 2]) -> i64 {
    match clock::resolution(id) {
        Some(nanos) => {
            store(time, [0, nanos]);
            0
        }
        None => TRAP,
    }
}

extern "C" fn getcpu(cpu: *mut u32, node: *mut u32, _unused: u64) -> i64 {
    let entry = LOCAL_CPU.load(Ordering::Relaxed);
    if entry == 0 {
        return TRAP;
    }
    // SAFETY: the symbol has this signature (vdso(7)) and lies in mapped code.
    let function: extern "C" fn(*mut u32, *mut u32, u64) -> i32 =
        unsafe { core::mem::transmute(entry) };
    i64::from(function(cpu, node, 0))
}

extern "C" fn getrandom(
    _buffer: u64,
    _len: u64,
    _flags: u64,
    _opaque: u64,
    opaque_len: u64,
) -> i64 {
    // A question for the size of the opaque state: there is none.
    if opaque_len == u64::MAX { -i64::from(errno::ENOSYS) } else { TRAP }
}
