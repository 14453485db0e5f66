//! Calls that the agent answers itself, wholly or in part.

use crate::sys::{self, Program};
use crate::trap::{self, Away, call, give_up, plain};
use crate::{clock, exec, tracking};
use conet_deputy_core::marshal::{Fault, Memory};
use conet_deputy_core::table::{Class, Local, lookup};
use conet_wire::image::{PAGE, REGION, area_flags, overlaps_region};
use conet_wire::link::{CHUNK, Desc, Exit, ReplyHead, Request, direction, kind};
use linux_raw_sys::{errno, general as nr};
use zerocopy::FromBytes;

const fn error(number: u32) -> i64 {
    -(number as i64)
}

/// Answers call `number`.
pub(crate) fn run(which: Local, number: u32, args: &[u64; 6]) -> Result<i64, Away> {
    match which {
        Local::RtSigprocmask => change_mask(args),
        Local::RtSigaction => change_action(args),
        Local::ArchPrctl => arch_prctl(args),
        Local::ClockGettime => clock_gettime(args),
        Local::Gettimeofday => gettimeofday(args),
        Local::Time => time(args),
        Local::Getrandom | Local::Getcpu => Ok(sys::plain(number, *args)),
        Local::Getrusage => rusage(args),
        Local::Times => times(args),
        Local::Mmap => map(args),
        Local::Memory => memory(number, args),
        Local::Close if is_hidden(args[0]) => Ok(error(errno::EBADF)),
        Local::Close => plain(number, *args),
        Local::CloseRange => close_range(args),
        Local::Dup2 => duplicate(number, args),
        Local::Kill => send_signal(number, args),
        Local::Futex => futex(args),
        Local::ClockGetres => clock_getres(args),
        Local::Exec => exec::run(number, args),
        // Needs the program's state, and is done where that is.
        Local::Fork => Err(Away::GoHome),
        Local::Exit => exit(args[0]),
    }
}

fn is_hidden(fd: u64) -> bool {
    sys::state().remote.hidden_fds.contains(&(fd & 0xffff_ffff))
}

fn read_word(addr: u64) -> Result<u64, Fault> {
    let mut bytes = [0; 8];
    Program.read(addr, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Runs `fill`, which gives −errno for a bad pointer by [`Fault`].
fn or_fault(result: Result<i64, Fault>) -> i64 {
    result.unwrap_or(error(errno::EFAULT))
}

/// `rt_sigprocmask(how, set, old, 8)`: the real mask here never changes; at home it
/// is the program's plus all handled signals. The true one travels beside it.
fn change_mask(args: &[u64; 6]) -> Result<i64, Away> {
    let [how, set, old, size, ..] = *args;
    if size != 8 {
        return Ok(error(errno::EINVAL));
    }
    let before = sys::state().remote.signals.blocked;
    if set != 0 {
        let Ok(mask) = read_word(set) else { return Ok(error(errno::EFAULT)) };
        let after = match how {
            0 => before | mask,
            1 => before & !mask,
            2 => mask,
            _ => return Ok(error(errno::EINVAL)),
        } & !(1 << 8 | 1 << 18); // SIGKILL and SIGSTOP cannot be blocked
        if after != before {
            sys::state().remote.signals.blocked = after;
            if let Err(away) = tell_mask() {
                // The call runs again at home, from the start.
                sys::state().remote.signals.blocked = before;
                return Err(away);
            }
        }
    }
    if old == 0 {
        return Ok(0);
    }
    Ok(or_fault(Program.write(old, &before.to_le_bytes()).map(|()| 0)))
}

/// Sets the deputy's mask from what is known here.
fn tell_mask() -> Result<i64, Away> {
    let signals = sys::state().remote.signals;
    let mask = (signals.blocked | signals.handled).to_le_bytes();
    let request = Request {
        nr: nr::__NR_rt_sigprocmask,
        descs: 1,
        args: [2, 0, 0, 8, signals.blocked, 0],
        took: 0,
    };
    let desc = Desc { len: 8, place: 1, direction: direction::IN, ..Desc::default() };
    trap::with_inputs(request, &[desc], &[&mask])
}

/// `rt_sigaction(signal, new, old, 8)`: the action is home's; a signal with a
/// handler is kept blocked there, and brings the program home when it comes.
fn change_action(args: &[u64; 6]) -> Result<i64, Away> {
    use conet_deputy_core::table::{Buffer, Len};
    const ACTION: Len = Len::Fixed(32);
    const BUFFERS: &[Buffer] = &[
        Buffer { arg: 1, input: true, output: false, len: ACTION, mode: 0, unit: 1 },
        Buffer { arg: 2, input: false, output: true, len: ACTION, mode: 0, unit: 1 },
    ];
    let [signal, new, ..] = *args;
    let before = sys::state().remote.signals;
    let mut after = before;
    if new != 0 && (1..=64).contains(&signal) {
        let Ok(handler) = read_word(new) else { return Ok(error(errno::EFAULT)) };
        if handler > 1 {
            after.handled |= 1 << (signal - 1);
        } else {
            after.handled &= !(1 << (signal - 1));
        }
    }
    let grown = after.handled & !before.handled != 0;
    if grown {
        sys::state().remote.signals = after;
        tell_mask().inspect_err(|_| sys::state().remote.signals = before)?;
    }
    let result = call(Class::Forward(BUFFERS), nr::__NR_rt_sigaction, args);
    let keep = matches!(result, Ok(value) if value >= 0);
    if keep && !grown && after.handled != before.handled {
        sys::state().remote.signals = after;
        // Done is done: where home asks meanwhile, the image's head tells the mask.
        tell_mask().ok();
    } else if !keep && grown {
        sys::state().remote.signals = before;
        if result.is_ok() {
            tell_mask().ok();
        }
    }
    result
}

fn arch_prctl(args: &[u64; 6]) -> Result<i64, Away> {
    // ARCH_SET_GS, ARCH_SET_FS, ARCH_GET_FS, ARCH_GET_GS
    if (0x1001..=0x1004).contains(&args[0]) {
        Ok(sys::plain(nr::__NR_arch_prctl, *args))
    } else {
        Err(Away::GoHome)
    }
}

fn write_pair(addr: u64, pair: [i64; 2]) -> i64 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&pair[0].to_le_bytes());
    bytes[8..].copy_from_slice(&pair[1].to_le_bytes());
    or_fault(Program.write(addr, &bytes).map(|()| 0))
}

fn clock_gettime(args: &[u64; 6]) -> Result<i64, Away> {
    use conet_deputy_core::table::{Buffer, Len};
    const BUFFERS: &[Buffer] =
        &[Buffer { arg: 1, input: false, output: true, len: Len::Fixed(16), mode: 0, unit: 1 }];
    let id = u32::try_from(args[0] & 0xffff_ffff).unwrap_or(u32::MAX);
    if let Some(pair) = clock::read(id) {
        return Ok(write_pair(args[1], pair));
    }
    // Processor time is what was used at home and what is used here.
    if matches!(id, nr::CLOCK_PROCESS_CPUTIME_ID | nr::CLOCK_THREAD_CPUTIME_ID) {
        let used = sys::state().remote.cpu_time + sys::clock(id);
        return Ok(write_pair(args[1], [used / clock::SECOND, used % clock::SECOND]));
    }
    call(Class::Forward(BUFFERS), nr::__NR_clock_gettime, args)
}

fn clock_getres(args: &[u64; 6]) -> Result<i64, Away> {
    let id = u32::try_from(args[0] & 0xffff_ffff).unwrap_or(u32::MAX);
    let Some(nanos) = clock::resolution(id) else { return Ok(error(errno::EINVAL)) };
    Ok(if args[1] == 0 { 0 } else { write_pair(args[1], [0, nanos]) })
}

fn gettimeofday(args: &[u64; 6]) -> Result<i64, Away> {
    let Some([seconds, nanos]) = clock::read(nr::CLOCK_REALTIME) else { return Err(Away::GoHome) };
    // The time zone is zero unless somebody has set it by settimeofday(2).
    if args[1] != 0 && Program.write(args[1], &[0; 8]).is_err() {
        return Ok(error(errno::EFAULT));
    }
    Ok(if args[0] == 0 { 0 } else { write_pair(args[0], [seconds, nanos / 1000]) })
}

fn time(args: &[u64; 6]) -> Result<i64, Away> {
    let Some([seconds, _]) = clock::read(nr::CLOCK_REALTIME) else { return Err(Away::GoHome) };
    if args[0] != 0 && Program.write(args[0], &seconds.to_le_bytes()).is_err() {
        return Ok(error(errno::EFAULT));
    }
    Ok(seconds)
}

/// `getrusage`: what was used at home and what is used here.
fn rusage(args: &[u64; 6]) -> Result<i64, Away> {
    use conet_deputy_core::table::{Buffer, Len};
    const BUFFERS: &[Buffer] =
        &[Buffer { arg: 1, input: false, output: true, len: Len::Fixed(144), mode: 0, unit: 1 }];
    let result = call(Class::Forward(BUFFERS), nr::__NR_getrusage, args)?;
    let is_self = matches!(args[0] & 0xffff_ffff, 0 | 1);
    if result != 0 || !is_self {
        return Ok(result);
    }
    let here = sys::own_rusage();
    let add = || -> Result<i64, Fault> {
        for at in [0u64, 16] {
            let index = usize::try_from(at / 8).map_err(|_| Fault)?;
            let micros = read_word(args[1] + at + 8)? + here[index + 1];
            let seconds = read_word(args[1] + at)? + here[index] + micros / 1_000_000;
            Program.write(args[1] + at, &seconds.to_le_bytes())?;
            Program.write(args[1] + at + 8, &(micros % 1_000_000).to_le_bytes())?;
        }
        Ok(0)
    };
    Ok(or_fault(add()))
}

/// `times`, in ticks of 10 ms (`sysconf(_SC_CLK_TCK)` is 100 on x86-64).
fn times(args: &[u64; 6]) -> Result<i64, Away> {
    use conet_deputy_core::table::{Buffer, Len};
    const BUFFERS: &[Buffer] =
        &[Buffer { arg: 0, input: false, output: true, len: Len::Fixed(32), mode: 0, unit: 1 }];
    let result = call(Class::Forward(BUFFERS), nr::__NR_times, args)?;
    if args[0] == 0 {
        return Ok(result);
    }
    let here = sys::own_rusage();
    let ticks = |at: usize| here[at] * 100 + here[at + 1] / 10_000;
    let add = || -> Result<i64, Fault> {
        for (at, more) in [(0, ticks(0)), (8, ticks(2))] {
            let total = read_word(args[0] + at)? + more;
            Program.write(args[0] + at, &total.to_le_bytes())?;
        }
        Ok(result)
    };
    Ok(or_fault(add()))
}

/// What the filter lets the agent do near the region, and no more.
fn is_clear(addr: u64, len: u64) -> Result<(), Result<i64, Away>> {
    let far_below = addr >> 32 < (REGION >> 32) - 1 && len >> 32 == 0;
    if addr >> 32 > REGION >> 32 || far_below {
        Ok(())
    } else if overlaps_region(addr, addr.saturating_add(len.max(1))) {
        Err(Ok(error(errno::EINVAL)))
    } else {
        Err(Err(Away::GoHome))
    }
}

/// Memory calls that the filter did not let through by itself.
fn memory(number: u32, args: &[u64; 6]) -> Result<i64, Away> {
    const MADV_DONTNEED: u64 = 4;
    const MADV_FREE: u64 = 8;
    const MADV_REMOVE: u64 = 9;
    if number != nr::__NR_brk
        && let Err(refused) = is_clear(args[0], args[1])
    {
        return refused;
    }
    match number {
        nr::__NR_munmap if has_file(args[0], args[0].saturating_add(args[1])) => {
            let result = plain(number, *args)?;
            if result < 0 {
                return Ok(result);
            }
        }
        nr::__NR_mremap if has_file(args[0], args[0].saturating_add(args[1])) => {
            return Err(Away::GoHome);
        }
        nr::__NR_mremap if args[3] > 1 || args[0] >> 32 <= REGION >> 32 => {
            return Err(Away::GoHome);
        }
        nr::__NR_madvise if args[2] == MADV_REMOVE => return Err(Away::GoHome),
        // Here all memory is anonymous; at home a file would fill it again.
        nr::__NR_madvise
            if matches!(args[2], MADV_DONTNEED | MADV_FREE)
                && has_file(args[0], args[0].saturating_add(args[1])) =>
        {
            return Err(Away::GoHome);
        }
        _ => {}
    }
    let result = sys::plain(number, *args);
    note_removed(number, args, result);
    // Areas that home would have as one may be several here, as only some are tracked.
    if number == nr::__NR_mremap && result == error(errno::EFAULT) {
        return Err(Away::GoHome);
    }
    Ok(result)
}

/// Notes what of the memory that came here is no more.
fn note_removed(number: u32, args: &[u64; 6], result: i64) {
    let [addr, len, new_len, ..] = *args;
    let end = |len: u64| addr.saturating_add(len.div_ceil(PAGE).saturating_mul(PAGE));
    match (number, result) {
        (nr::__NR_munmap, 0) => tracking::forget(addr, end(len)),
        (nr::__NR_mremap, place) if place == addr.cast_signed() => {
            tracking::forget(end(new_len), end(len));
        }
        (nr::__NR_mremap, place) if !(-4095..0).contains(&place) => {
            tracking::forget(addr, end(len));
        }
        _ => {}
    }
}

fn has_file(start: u64, end: u64) -> bool {
    let lists = sys::lists();
    lists.areas[..lists.area_count]
        .iter()
        .any(|a| a.flags & area_flags::FILE != 0 && a.start < end && a.end > start)
}

/// `mmap` of a file, or at a fixed address.
///
/// A private or read-only file mapping is made at home, at the same address, so
/// that it is there when the program returns; here its content is copied.
fn map(args: &[u64; 6]) -> Result<i64, Away> {
    let [addr, len, prot, flags, fd, offset] = *args;
    let flags32 = u32::try_from(flags).map_err(|_| Away::GoHome)?;
    let fixed = flags32 & (nr::MAP_FIXED | nr::MAP_FIXED_NOREPLACE) != 0;
    let anonymous = flags32 & nr::MAP_ANONYMOUS != 0;
    let shared = flags32 & nr::MAP_SHARED != 0;
    let plain_file = flags32
        & !(nr::MAP_FIXED
            | nr::MAP_PRIVATE
            | nr::MAP_SHARED
            | nr::MAP_DENYWRITE
            | nr::MAP_EXECUTABLE
            | nr::MAP_NORESERVE
            | nr::MAP_POPULATE)
        == 0;
    let (writable, page_len) = (prot & 2 != 0, len.div_ceil(PAGE) * PAGE);
    if fixed && let Err(refused) = is_clear(addr, page_len) {
        return refused;
    }
    if anonymous && !shared {
        // Where home has a file it must have this memory too.
        if fixed && has_file(addr, addr.saturating_add(page_len)) {
            let made = plain(nr::__NR_mmap, *args)?;
            if made < 0 {
                return Ok(made);
            }
        }
        let made = sys::plain(nr::__NR_mmap, *args);
        if fixed && made == addr.cast_signed() {
            tracking::forget(addr, addr + page_len);
        }
        return Ok(made);
    }
    if anonymous || !plain_file || (shared && writable) || len == 0 || len > 1 << 30 {
        return Err(Away::GoHome);
    }
    let here = flags & u64::from(nr::MAP_FIXED) | u64::from(nr::MAP_PRIVATE | nr::MAP_ANONYMOUS);
    let place = sys::plain(nr::__NR_mmap, [addr, page_len, 3, here, u64::MAX, 0]);
    if place < 0 {
        return Ok(place);
    }
    let place = place.cast_unsigned();
    tracking::forget(place, place + page_len);
    let at_home = flags | u64::from(nr::MAP_FIXED);
    let made = plain(nr::__NR_mmap, [place, len, prot, at_home, fd, offset]);
    match made {
        Ok(at) if at.cast_unsigned() == place => {}
        Ok(failed) => {
            sys::unmap(place, page_len);
            return Ok(failed);
        }
        Err(away) => {
            sys::unmap(place, page_len);
            return Err(away);
        }
    }
    fill(place, len, fd, offset)?;
    sys::protect(place, page_len, u32::try_from(prot & 7).unwrap_or(0));
    note_file(place, place + page_len);
    Ok(place.cast_signed())
}

/// Copies `len` bytes of file `fd` to `place`; what lies behind its end stays zero.
fn fill(place: u64, len: u64, fd: u64, offset: u64) -> Result<(), Away> {
    let class = lookup(u64::from(nr::__NR_pread64)).ok_or(Away::GoHome)?;
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(CHUNK as u64);
        let args = [fd, place + done, piece, offset + done, 0, 0];
        match call(class, nr::__NR_pread64, &args) {
            Ok(0) => break,
            Ok(n) if n > 0 => done += n.cast_unsigned(),
            // The call is issued again at home, where mapping once more does no harm.
            failed => {
                sys::unmap(place, len.div_ceil(PAGE) * PAGE);
                return Err(failed.err().unwrap_or(Away::GoHome));
            }
        }
    }
    Ok(())
}

/// Remembers a file mapping, for [`has_file`]. The list is not sorted any more,
/// and need not be: the image's areas have been mapped.
fn note_file(start: u64, end: u64) {
    let lists = sys::lists();
    if let Some(slot) = lists.areas.get_mut(lists.area_count) {
        *slot = conet_wire::image::Area { start, end, prot: 0, flags: area_flags::FILE };
        lists.area_count += 1;
    }
}

/// `close_range(first, last, flags)` around what is hidden.
fn close_range(args: &[u64; 6]) -> Result<i64, Away> {
    let [first, last, flags, ..] = *args;
    let (first, last) = (first & 0xffff_ffff, last & 0xffff_ffff);
    let hidden = sys::state().remote.hidden_fds;
    if !hidden.iter().any(|fd| (first..=last).contains(fd)) {
        return plain(nr::__NR_close_range, *args);
    }
    // CLOSE_RANGE_UNSHARE is for those who share their table.
    if flags & 2 != 0 {
        return Err(Away::GoHome);
    }
    let mut from = first;
    for fd in hidden.into_iter().filter(|fd| (first..=last).contains(fd)) {
        if from < fd {
            let result = plain(nr::__NR_close_range, [from, fd - 1, flags, 0, 0, 0])?;
            if result < 0 {
                return Ok(result);
            }
        }
        from = fd + 1;
    }
    if from > last {
        return Ok(0);
    }
    plain(nr::__NR_close_range, [from, last, flags, 0, 0, 0])
}

/// `kill` and its kin: what a program sends itself and handles is delivered before the
/// call returns, so the call belongs where handlers run.
fn send_signal(number: u32, args: &[u64; 6]) -> Result<i64, Away> {
    let remote = &sys::state().remote;
    let signal = if number == nr::__NR_tgkill { args[2] } else { args[1] };
    let deliverable = remote.signals.handled & !remote.signals.blocked;
    let is_ours = args[0] & 0xffff_ffff == remote.pid;
    if is_ours && (1..=64).contains(&signal) && deliverable & 1 << (signal - 1) != 0 {
        return Err(Away::GoHome);
    }
    plain(number, *args)
}

/// Futexes with an absolute timeout, which is home's time. With one thread and private
/// memory nobody can wake the program, so it sleeps, at home.
fn futex(args: &[u64; 6]) -> Result<i64, Away> {
    use conet_deputy_core::table::{Buffer, Len};
    const BUFFERS: &[Buffer] =
        &[Buffer { arg: 2, input: true, output: false, len: Len::Fixed(16), mode: 0, unit: 1 }];
    const WAIT_BITSET: u64 = 9;
    const CLOCK_REALTIME_FLAG: u64 = 256;
    const TIMER_ABSTIME: u64 = 1;
    let [word, operation, value, timeout, ..] = *args;
    if operation & 0x7f != WAIT_BITSET || timeout == 0 {
        return Err(Away::GoHome);
    }
    let mut now = [0; 4];
    if Program.read(word, &mut now).is_err() {
        return Ok(error(errno::EFAULT));
    }
    if u64::from(u32::from_le_bytes(now)) != value & 0xffff_ffff {
        return Ok(error(errno::EAGAIN));
    }
    let id = if operation & CLOCK_REALTIME_FLAG != 0 { 0 } else { 1 };
    let sleep = [id, TIMER_ABSTIME, timeout, 0, 0, 0];
    Ok(match call(Class::Forward(BUFFERS), nr::__NR_clock_nanosleep, &sleep)? {
        0 => error(errno::ETIMEDOUT),
        other => other,
    })
}

fn duplicate(number: u32, args: &[u64; 6]) -> Result<i64, Away> {
    if is_hidden(args[0]) {
        return Ok(error(errno::EBADF));
    }
    if is_hidden(args[1]) {
        return Err(Away::GoHome);
    }
    plain(number, *args)
}

fn exit(status: u64) -> ! {
    let state = sys::state();
    if state.link.send_value(kind::EXIT, 0, &Exit { status }).is_ok() {
        let mut byte = [0];
        while sys::receive(state.link.fd, &mut byte, 0) > 0 {}
    }
    give_up()
}

/// Stores the outputs of a call that was pending when the program came here; its
/// buffers stand in the reply.
pub(crate) fn store_pending(body: &[u8]) -> Result<i64, Fault> {
    let (head, rest) = ReplyHead::read_from_prefix(body).map_err(|_| Fault)?;
    let (count, mut rest) = u64::read_from_prefix(rest).map_err(|_| Fault)?;
    for _ in 0..count.min(conet_wire::link::MAX_DESCS as u64) {
        let (desc, tail) = Desc::read_from_prefix(rest).map_err(|_| Fault)?;
        let len = conet_wire::link::output_len(&desc, head.result);
        let data = tail.get(..len).ok_or(Fault)?;
        if len > 0 && Program.write(desc.addr, data).is_err() {
            return Ok(error(errno::EFAULT));
        }
        rest = tail.get(conet_wire::link::padded(len)..).ok_or(Fault)?;
    }
    Ok(head.result)
}
