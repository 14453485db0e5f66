//! The least that home's clock can cost away from home: a patched vDSO.
//!
//! ```text
//! program ─ C library ─ copy of the vDSO ─ jmp ─► here ─ call ─► the vDSO, elsewhere
//!                       (patched)                  └─ adds an offset, returns
//! ```
//!
//! No pointer is kept for a way home, no clock is told from another, nothing is
//! counted; nothing of conet's code. The vDSO moves with its data pages (mremap, as
//! CRIU does it), and a copy with patched entries lies where it was, because that is
//! where the C library's pointers lead.
//!
//! Sources: vdso(7), the kernel's selftests/vDSO; System V ABI, AMD64.

use super::check;
use rustix::io::Errno;
use std::arch::naked_asm;
use std::ffi::CStr;
use std::fs;
use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// What is added: seconds, and nanoseconds and microseconds that make a carry likely
/// every third time.
static SECONDS: AtomicI64 = AtomicI64::new(1000);
static NANOS: AtomicI64 = AtomicI64::new(333_333_333);
static MICROS: AtomicI64 = AtomicI64::new(333_333);

/// The vDSO's functions, where they are now.
static CLOCK_GETTIME: AtomicU64 = AtomicU64::new(0);
static GETTIMEOFDAY: AtomicU64 = AtomicU64::new(0);
static CLOCK_GETRES: AtomicU64 = AtomicU64::new(0);
static GETCPU: AtomicU64 = AtomicU64::new(0);

#[unsafe(naked)]
extern "C" fn clock_gettime() {
    naked_asm!(
        "push rsi",
        "call [rip + {clock}]",
        "pop rsi",
        "mov rdx, [rsi + 8]",
        "mov rcx, [rsi]",
        "add rdx, [rip + {nanos}]",
        "add rcx, [rip + {seconds}]",
        "cmp rdx, 1000000000",
        "jb 2f",
        "sub rdx, 1000000000",
        "inc rcx",
        "2:",
        "mov [rsi + 8], rdx",
        "mov [rsi], rcx",
        "ret",
        clock = sym CLOCK_GETTIME,
        nanos = sym NANOS,
        seconds = sym SECONDS,
    )
}

#[unsafe(naked)]
extern "C" fn gettimeofday() {
    naked_asm!(
        "push rdi",
        "call [rip + {clock}]",
        "pop rdi",
        "mov rdx, [rdi + 8]",
        "mov rcx, [rdi]",
        "add rdx, [rip + {micros}]",
        "add rcx, [rip + {seconds}]",
        "cmp rdx, 1000000",
        "jb 2f",
        "sub rdx, 1000000",
        "inc rcx",
        "2:",
        "mov [rdi + 8], rdx",
        "mov [rdi], rcx",
        "ret",
        clock = sym GETTIMEOFDAY,
        micros = sym MICROS,
        seconds = sym SECONDS,
    )
}

/// A clock that differs by a part of a second changes its second at another time, so
/// `time` must see the parts: of the coarse clock.
#[unsafe(naked)]
extern "C" fn time() {
    naked_asm!(
        "sub rsp, 24",
        "mov edi, {coarse}",
        "mov rsi, rsp",
        "call [rip + {clock}]",
        "mov rax, [rsp]",
        "mov rdx, [rsp + 8]",
        "add rdx, [rip + {nanos}]",
        "add rax, [rip + {seconds}]",
        "add rsp, 24",
        "cmp rdx, 1000000000",
        "jb 2f",
        "inc rax",
        "2:",
        "ret",
        coarse = const libc::CLOCK_REALTIME_COARSE,
        clock = sym CLOCK_GETTIME,
        nanos = sym NANOS,
        seconds = sym SECONDS,
    )
}

#[unsafe(naked)]
extern "C" fn clock_getres() {
    naked_asm!("jmp [rip + {there}]", there = sym CLOCK_GETRES)
}

#[unsafe(naked)]
extern "C" fn getcpu() {
    naked_asm!("jmp [rip + {there}]", there = sym GETCPU)
}

/// One function: its name, what it is replaced by, where the replacement finds it.
struct Function {
    name: &'static CStr,
    entry: extern "C" fn(),
    there: Option<&'static AtomicU64>,
}

const FUNCTIONS: [Function; 5] = [
    Function { name: c"__vdso_clock_gettime", entry: clock_gettime, there: Some(&CLOCK_GETTIME) },
    Function { name: c"__vdso_gettimeofday", entry: gettimeofday, there: Some(&GETTIMEOFDAY) },
    Function { name: c"__vdso_time", entry: time, there: None },
    Function { name: c"__vdso_clock_getres", entry: clock_getres, there: Some(&CLOCK_GETRES) },
    Function { name: c"__vdso_getcpu", entry: getcpu, there: Some(&GETCPU) },
];

/// Addresses of the vDSO's functions.
fn symbols() -> io::Result<[u64; 5]> {
    let missing = || io::Error::other("this process's C library knows no vDSO");
    // SAFETY: a name that ends with 0; nothing is loaded that is not there.
    let vdso =
        unsafe { libc::dlopen(c"linux-vdso.so.1".as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    if vdso.is_null() {
        return Err(missing());
    }
    let mut all = [0; 5];
    for (place, function) in all.iter_mut().zip(&FUNCTIONS) {
        // SAFETY: a handle of dlopen's and a name that ends with 0.
        *place = unsafe { libc::dlsym(vdso, function.name.as_ptr()) } as u64;
        if *place == 0 {
            return Err(missing());
        }
    }
    Ok(all)
}

/// The areas of the vDSO and its data, in order; the vDSO itself is the last.
fn areas() -> io::Result<Vec<Range<u64>>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let area = |line: &str| {
        let (range, _) = line.split_once(' ')?;
        let (from, to) = range.split_once('-')?;
        Some(u64::from_str_radix(from, 16).ok()?..u64::from_str_radix(to, 16).ok()?)
    };
    let of_vdso = |line: &&str| line.contains("[vvar") || line.ends_with("[vdso]");
    let areas: Vec<_> = maps.lines().filter(of_vdso).filter_map(area).collect();
    let is_last = maps.lines().rfind(of_vdso).is_some_and(|line| line.ends_with("[vdso]"));
    if is_last { Ok(areas) } else { Err(io::Error::other("the vDSO lies as none does")) }
}

fn map(at: u64, len: u64, prot: i32, more: i32) -> Result<u64, Errno> {
    let len = usize::try_from(len).map_err(|_| Errno::INVAL)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | more;
    // SAFETY: new memory, where nothing is (MAP_FIXED_NOREPLACE) or anywhere.
    let addr = unsafe { libc::mmap(at as *mut _, len, prot, flags, -1, 0) };
    if addr == libc::MAP_FAILED { Err(Errno::NOMEM) } else { Ok(addr as u64) }
}

/// Moves the vDSO with its data to other addresses that lie to one another as before;
/// by how far.
fn move_away(areas: &[Range<u64>]) -> Result<u64, Errno> {
    let (Some(first), Some(last)) = (areas.first(), areas.last()) else {
        return Err(Errno::NOENT);
    };
    let to = map(0, last.end - first.start, libc::PROT_NONE, 0)?;
    let distance = to.wrapping_sub(first.start);
    for area in areas {
        let len = usize::try_from(area.end - area.start).map_err(|_| Errno::INVAL)?;
        let (from, to) = (area.start as *mut _, area.start.wrapping_add(distance));
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the new place is what this function has reserved. The old one holds
        // code and data of the kernel's that nobody refers to but by the functions'
        // addresses, where `install` puts others before anybody calls them.
        let moved = unsafe { libc::mremap(from, len, len, flags, to as *mut libc::c_void) };
        if moved == libc::MAP_FAILED {
            return Err(Errno::PERM);
        }
    }
    Ok(distance)
}

/// Replaces this process's vDSO. It must have one thread. After an error the process
/// has no vDSO to call, and must end.
pub(crate) fn install() -> io::Result<()> {
    let before = now();
    let (symbols, areas) = (symbols()?, areas()?);
    let distance = move_away(&areas)?;
    for (at, function) in symbols.iter().zip(&FUNCTIONS) {
        if let Some(there) = function.there {
            there.store(at.wrapping_add(distance), Ordering::Relaxed);
        }
    }
    let Some(old) = areas.last() else { return Err(Errno::NOENT.into()) };
    let len = usize::try_from(old.end - old.start).map_err(|_| Errno::INVAL)?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let copy = map(old.start, old.end - old.start, prot, libc::MAP_FIXED_NOREPLACE)?;
    let from = old.start.wrapping_add(distance) as *const u8;
    // SAFETY: the moved vDSO and the new area, both of `len` bytes.
    unsafe { ptr::copy_nonoverlapping(from, copy as *mut u8, len) };
    for (at, function) in symbols.iter().zip(&FUNCTIONS) {
        let mut code = [0x49, 0xbb, 0, 0, 0, 0, 0, 0, 0, 0, 0x41, 0xff, 0xe3]; // mov r11, …; jmp r11
        code[2..10].copy_from_slice(&(function.entry as *const () as u64).to_le_bytes());
        // SAFETY: in the copy, whose functions are longer than this and 16 bytes apart.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), *at as *mut u8, code.len()) };
    }
    let prot = libc::PROT_READ | libc::PROT_EXEC;
    // SAFETY: the copy, which is code from now on.
    check(unsafe { libc::mprotect(copy as *mut _, len, prot) }.into())?;
    // A C library that has other ways would be measured as if it had ours.
    let apart = now() - before;
    if (1000..1060).contains(&apart) {
        Ok(())
    } else {
        Err(io::Error::other(format!("the clock went {apart} s where 1000 were added")))
    }
}

fn now() -> libc::time_t {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is written.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec
}
