//! The remote side's beginning: a child of the warden turns into the program.
//!
//! ```text
//! open own maps ─► drop everything of the host ─► unmap everything but the region ─►
//! READY ─► image in ([`crate::restore`]), CLOCKS between its rounds ─► vDSO,
//! capabilities, filter ─► PREPARED ─► COMMIT ─► enter the program
//! ```
//!
//! Until COMMIT the process lives at home, and anything that fails here is only
//! told: REFUSED, with the step and the error.

use crate::capture::{self, Leave, for_each_line};
use crate::link::{self, Frame, Keys};
use crate::restore::{self, Incoming, Side};
use crate::trap::{give_up, wait_for};
use crate::{clock, sys, tracking};
use conet_deputy_core::areas::Backing;
use conet_deputy_core::boot::family::MAX_REMOTES;
use conet_deputy_core::boot::family::remote_fd::{self, LINK, MAPS, PAGEMAP, PROC, UFFD, WARDEN};
use conet_deputy_core::boot::{BOOT, Launch, VDSO, host_fd};
use conet_deputy_core::filter::{AgentDescriptors, Program};
use conet_deputy_core::marshal::Signals;
use conet_wire::image::{Clocks, Commit, Head, REGION, REGION_LEN, TASK_SIZE, reason, step};
use conet_wire::link::{Refusal, kind};
use linux_raw_sys::general as nr;
use zerocopy::FromBytes;

const RLIMIT_DATA: u32 = 2;
const RLIMIT_STACK: u32 = 3;
const RLIMIT_CORE: u32 = 4;
const RLIMIT_NPROC: u32 = 6;
const RLIMIT_NOFILE: u32 = 7;
const RLIMIT_MEMLOCK: u32 = 8;
const RLIMIT_AS: u32 = 9;

/// SIGBUS and SIGSEGV, which checked copies survive.
const FAULTS: u64 = 1 << 6 | 1 << 10;

/// Becomes the process whose image comes over the link.
pub(crate) fn run(launch: &Launch, proc_fd: i32, warden_fd: i32) -> ! {
    take_descriptors(proc_fd, warden_fd);
    let state = sys::state();
    state.remote.pid = u64::from(launch.pid.cast_unsigned());
    state.remote.maps = MAPS;
    state.remote.pagemap = PAGEMAP;
    state.link.start(
        LINK,
        0,
        &Keys {
            cipher: launch.cipher,
            seal: launch.seal_key,
            open: launch.open_key,
            seal_next: launch.seal_next,
            open_next: launch.open_next,
        },
    );
    if let Err(refusal) = prepare(launch) {
        if state.link.send_value(kind::REFUSED, 0, &refusal).is_ok() {
            let mut byte = [0];
            while sys::receive(LINK, &mut byte, 0) > 0 {}
        }
        give_up();
    }
    let head = restore::head();
    start(&head, wait_for_commit(launch.clock_skew))
}

/// Opens what the agent needs of `/proc`, tells the daemon who this is on the host,
/// and closes the rest.
fn take_descriptors(proc_fd: i32, warden_fd: i32) {
    let mut who = [0u8; 16];
    let n = sys::read_link(proc_fd, c"self", &mut who[1..14]);
    let digits = usize::try_from(n).unwrap_or(0);
    who[0] = b'R';
    who[1 + digits] = b'\n';
    let len = digits + 2;
    let [maps, pagemap] = sys::open_own(proc_fd);
    sys::send(host_fd::CONTROL, &who[..len]);
    // Out of the way first, as old and new numbers may overlap.
    const F_DUPFD: u64 = 0;
    const HIGH: u64 = 32;
    let high = |fd: i64| {
        let copy = sys::plain(nr::__NR_fcntl, [fd.cast_unsigned(), F_DUPFD, HIGH, 0, 0, 0]);
        i32::try_from(copy).unwrap_or(-1)
    };
    let own = [maps, pagemap, warden_fd.into(), proc_fd.into()].map(high);
    for (from, to) in own.into_iter().zip([MAPS, PAGEMAP, WARDEN, PROC]) {
        if from < 0 || !sys::put_in_place(from, to) {
            give_up();
        }
    }
    let free = u64::from(remote_fd::FREE.unsigned_abs());
    sys::plain(nr::__NR_close_range, [free, u64::from(u32::MAX), 0, 0, 0, 0]);
}

fn refused(step: u32, result: i64) -> Result<(), Refusal> {
    if result < 0 {
        Err(Refusal { step, errno: u32::try_from(-result).unwrap_or(0), addr: 0 })
    } else {
        Ok(())
    }
}

fn prepare(launch: &Launch) -> Result<(), Refusal> {
    clear_address_space()?;
    if sys::state().link.send(kind::READY, 0, 0).is_err() {
        give_up();
    }
    sys::state().remote.tracks = launch.follows == 1 && tracking::begin();
    let mut incoming = Incoming::new(Side::Remote);
    loop {
        let Ok(frame) = sys::state().link.receive(link::wait) else { give_up() };
        match frame.header.kind {
            kind::CLOCKS => tell_clocks(&frame, launch.clock_skew),
            kind::ROUND => {
                incoming.end_round()?;
                if sys::state().link.send(kind::ROUND, frame.header.seq, 0).is_err() {
                    give_up();
                }
            }
            _ if incoming.handle(&frame)? => break,
            _ => {}
        }
    }
    let head = restore::head();
    become_the_program(&head)?;
    confine(&head)?;
    if sys::state().link.send(kind::PREPARED, 0, 0).is_err() {
        give_up();
    }
    Ok(())
}

/// Leaves nothing but the region, with the local vDSO in it.
fn clear_address_space() -> Result<(), Refusal> {
    refused(step::MAP, sys::unmap(0x1000, REGION - 0x1000))?;
    let above = REGION + REGION_LEN;
    refused(step::MAP, sys::unmap(above, TASK_SIZE - above))?;
    refused(step::MAP, sys::map(BOOT, REGION + REGION_LEN - BOOT, 3, nr::MAP_FIXED_NOREPLACE))?;
    const ARCH_MAP_VDSO_64: u32 = 0x2003;
    refused(step::VDSO, sys::set_base(ARCH_MAP_VDSO_64, VDSO))?;
    let mut found = None;
    for_each_line(MAPS, |line| {
        if line.backing == Backing::Vdso {
            found = Some((line.start, line.end));
        }
        Some(())
    });
    let (start, end) = found.ok_or(Refusal { step: step::VDSO, errno: 0, addr: 0 })?;
    sys::use_local_vdso(start, end - start);
    Ok(())
}

/// What the kernel knows of a process besides its memory.
fn become_the_program(head: &Head) -> Result<(), Refusal> {
    refused(step::MM_MAP, sys::set_memory_map(&head.memory_map))?;
    sys::set_name(&head.name);
    let state = sys::state();
    state.remote.signals = Signals { blocked: head.blocked, handled: head.handled };
    state.remote.cpu_time = head.cpu_time;
    state.remote.hidden_fds = head.hidden_fds;
    state.remote.hidden_fds.sort_unstable();
    if head.robust_addr != 0 {
        sys::plain(nr::__NR_set_robust_list, [head.robust_addr, head.robust_len, 0, 0, 0, 0]);
    }
    if head.rseq_addr != 0 {
        let (len, signature) = (u64::from(head.rseq_len), u64::from(head.rseq_signature));
        let result = sys::plain(nr::__NR_rseq, [head.rseq_addr, len, 0, signature, 0, 0]);
        refused(step::SANDBOX, result)?;
    }
    Ok(())
}

/// From here on this process can compute, and talk over its link.
fn confine(head: &Head) -> Result<(), Refusal> {
    for (resource, limit) in [
        (RLIMIT_STACK, head.limits[0]),
        (RLIMIT_DATA, head.limits[1]),
        (RLIMIT_AS, head.limits[2].saturating_add(REGION_LEN)),
        (RLIMIT_CORE, 0),
        // The warden is one more.
        (RLIMIT_NPROC, MAX_REMOTES as u64 + 1),
        (RLIMIT_NOFILE, remote_fd::LIMIT),
        (RLIMIT_MEMLOCK, 0),
    ] {
        sys::set_limit(resource, limit, limit);
    }
    refused(step::SANDBOX, sys::drop_capabilities())?;
    sys::take_signals();
    // Until the program runs, the bell must wait: its frame says who runs.
    sys::set_mask(!FAULTS);
    let number = |fd: i32| fd.cast_unsigned();
    let fds = AgentDescriptors {
        link: number(LINK),
        maps: number(MAPS),
        pagemap: number(PAGEMAP),
        userfault: number(UFFD),
        warden: number(WARDEN),
        proc: number(PROC),
        names: sys::own_names(),
    };
    refused(step::SANDBOX, sys::install_filter(Program::remote(fds).instructions()))
}

/// Answers a question for the clocks.
fn tell_clocks(frame: &Frame, skew: i64) {
    let mut clocks = clock::local_clocks();
    clocks.realtime = clocks.realtime.wrapping_add(skew);
    let link = &mut sys::state().link;
    if link.send_value(kind::CLOCKS_ARE, frame.header.seq, &clocks).is_err() {
        give_up();
    }
}

/// Answers questions for the clocks until the process is to live here.
fn wait_for_commit(skew: i64) -> Commit {
    let state = sys::state();
    loop {
        let Ok(frame) = state.link.receive(link::wait) else { give_up() };
        match frame.header.kind {
            kind::CLOCKS => tell_clocks(&frame, skew),
            kind::COMMIT => return with_skew(&frame, skew),
            _ => give_up(),
        }
    }
}

fn with_skew(frame: &Frame, skew: i64) -> Commit {
    let body = sys::state().link.received(frame);
    let Ok((commit, _)) = Commit::read_from_prefix(body) else { give_up() };
    let realtime = commit.offsets.realtime.wrapping_add(skew);
    Commit { offsets: Clocks { realtime, ..commit.offsets } }
}

fn start(head: &Head, commit: Commit) -> ! {
    sys::state().remote.offsets = commit.offsets;
    sys::use_offsets();
    let mut registers = head.registers;
    sys::set_base(0x1002, registers.fs_base);
    sys::set_base(0x1001, registers.gs_base);
    if head.pending == 1 {
        match wait_for(0, None) {
            Ok(result) => registers.rax = result.cast_unsigned(),
            Err(_) => {
                let leave =
                    Leave { rewind: false, pending: true, reason: reason::ASKED, detail: 0 };
                capture::send_home(&registers, restore::xsave(), leave)
            }
        }
    }
    sys::resume(&registers, restore::xsave(), 0, &sys::handler_stack(0))
}
