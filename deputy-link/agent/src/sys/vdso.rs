//! The local vDSO, and the program's copy of home's with its entry points patched.
//!
//! A vDSO is a small ELF image (vdso(7)); its symbols are found through the dynamic
//! section. Copies cannot read their data pages, so every entry point that would is
//! replaced by a jump into the agent.

use super::memory::{slice, slice_mut};
use crate::clock;
use conet_wire::image::VdsoEntries;
use core::arch::naked_asm;
use core::sync::atomic::{AtomicU64, Ordering};
use linux_raw_sys::{errno, general as nr};

/// `clock_gettime` of the local vDSO, or 0.
static LOCAL_CLOCK: AtomicU64 = AtomicU64::new(0);
/// A `syscall` instruction outside of the region, which traps into the agent.
static TRAP_STUB: AtomicU64 = AtomicU64::new(0);

/// Remembers where the local vDSO's clock is.
pub(crate) fn use_local_vdso(base: u64, len: u64) {
    let len = usize::try_from(len).unwrap_or(0);
    let entry = symbol(slice(base, len), b"__vdso_clock_gettime").map_or(0, |at| base + at);
    LOCAL_CLOCK.store(entry, Ordering::Relaxed);
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
    let entry = LOCAL_CLOCK.load(Ordering::Relaxed);
    let result = if entry == 0 {
        let args = [u64::from(id), core::ptr::from_mut(&mut time) as u64, 0, 0, 0, 0];
        // SAFETY: `time` has the size of a timespec.
        unsafe { super::call::raw(nr::__NR_clock_gettime, args) }
    } else {
        // SAFETY: the symbol has this signature (vdso(7)) and lies in mapped code.
        let function: extern "C" fn(u32, *mut [i64; 2]) -> i32 =
            unsafe { core::mem::transmute(entry) };
        i64::from(function(id, &raw mut time))
    };
    (result == 0).then_some(time)
}

/// Patches the program's copy of home's vDSO, which is mapped writable at `base`.
pub(crate) fn patch(base: u64, entries: &VdsoEntries) {
    // Bytes 9 to 15 of an ELF image are padding: `syscall; ret` fits.
    slice_mut(base + 9, 3).copy_from_slice(&[0x0f, 0x05, 0xc3]);
    TRAP_STUB.store(base + 9, Ordering::Relaxed);
    for (at, target) in [
        (entries.clock_gettime, entry_clock_gettime as *const () as u64),
        (entries.gettimeofday, entry_gettimeofday as *const () as u64),
        (entries.time, entry_time as *const () as u64),
        (entries.clock_getres, entry_clock_getres as *const () as u64),
        (entries.getcpu, entry_getcpu as *const () as u64),
        (entries.getrandom, entry_getrandom as *const () as u64),
    ] {
        if at != 0 {
            // mov r11, target; jmp r11
            let code = slice_mut(at, 13);
            code[..2].copy_from_slice(&[0x49, 0xbb]);
            code[2..10].copy_from_slice(&target.to_le_bytes());
            code[10..].copy_from_slice(&[0x41, 0xff, 0xe3]);
        }
    }
}

/// Whether `rip` is just behind the stub's system call instruction, or on it.
pub(crate) fn is_stub(rip: u64) -> bool {
    let stub = TRAP_STUB.load(Ordering::Relaxed);
    stub != 0 && (stub..stub + 3).contains(&rip)
}

/// Whether `rip` is in conet's own region.
pub(crate) const fn is_in_region(rip: u64) -> bool {
    conet_wire::image::overlaps_region(rip, rip.wrapping_add(1))
}

/// A system call that traps, for what only the handler can answer.
fn trapping(number: u32, a: u64, b: u64, c: u64) -> i64 {
    #[unsafe(naked)]
    extern "C" fn through(stub: u64, number: u64, a: u64, b: u64, c: u64) -> i64 {
        naked_asm!(
            "mov r11, rdi",
            "mov rax, rsi",
            "mov rdi, rdx",
            "mov rsi, rcx",
            "mov rdx, r8",
            "jmp r11"
        )
    }
    through(TRAP_STUB.load(Ordering::Relaxed), u64::from(number), a, b, c)
}

/// Stores through a pointer of the program's; a wrong one faults, as it does in the
/// real vDSO.
fn store<T>(pointer: *mut T, value: T) {
    if !pointer.is_null() {
        // SAFETY: the caller of a vDSO function vouches for its pointers.
        unsafe { pointer.write_unaligned(value) };
    }
}

extern "C" fn entry_clock_gettime(id: u32, time: *mut [i64; 2]) -> i64 {
    match clock::read(id) {
        Some(value) if !time.is_null() => {
            store(time, value);
            0
        }
        _ => trapping(nr::__NR_clock_gettime, u64::from(id), time as u64, 0),
    }
}

extern "C" fn entry_gettimeofday(time: *mut [i64; 2], zone: *mut [i32; 2]) -> i64 {
    match clock::read(nr::CLOCK_REALTIME) {
        Some([seconds, nanos]) if zone.is_null() => {
            store(time, [seconds, nanos / 1000]);
            0
        }
        _ => trapping(nr::__NR_gettimeofday, time as u64, zone as u64, 0),
    }
}

extern "C" fn entry_time(time: *mut i64) -> i64 {
    let Some([seconds, _]) = clock::read(nr::CLOCK_REALTIME) else {
        return trapping(nr::__NR_time, time as u64, 0, 0);
    };
    store(time, seconds);
    seconds
}

extern "C" fn entry_clock_getres(id: u32, time: *mut [i64; 2]) -> i64 {
    trapping(nr::__NR_clock_getres, u64::from(id), time as u64, 0)
}

extern "C" fn entry_getcpu(cpu: *mut u32, node: *mut u32, unused: u64) -> i64 {
    trapping(nr::__NR_getcpu, cpu as u64, node as u64, unused)
}

extern "C" fn entry_getrandom(
    buffer: u64,
    len: u64,
    flags: u64,
    _opaque: u64,
    opaque_len: u64,
) -> i64 {
    // A question for the size of the opaque state: there is none.
    if opaque_len == u64::MAX {
        return -i64::from(errno::ENOSYS);
    }
    trapping(nr::__NR_getrandom, buffer, len, flags)
}
