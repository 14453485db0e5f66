//! The deputy: this code in the original process at home, serving the remote half.
//!
//! ```text
//! SERVING ─ CALL ─► run it here, REPLY ─► SERVING
//!    │  interrupted, or the image comes by itself
//!    ▼
//! COMING ─ END ─► (FINISHING: a pending call ends) ─► HOME: the program goes on
//!    │                                             └─► HELD: its mover takes it on
//!    └ link ends or lies ─► LOST: the process ends by SIGKILL
//! ```
//!
//! It is generic: what a call means is known to the remote side. Its dispositions
//! are the program's own; signals that have a handler are blocked while the program
//! is away, so they stay pending in the kernel until it is back, and all others act
//! on this process as on any.

use crate::clock::SECOND;
use crate::link::{self, Broken, Frame, Keys};
use crate::restore::{self, Incoming, Side};
use crate::sys;
use conet_deputy_core::boot::{
    ABORTED, BOOT, BROKEN_OFF, Boot, COUNTS, COUNTS_LEN, Count, HOLD_MS, PARKED, PENDING, Pending,
    STATE, STATUS, Status, fault, phase,
};
use conet_wire::image::{Commit, Head, MemoryMap, REGION, REGION_LEN, reason};
use conet_wire::link::{
    ComeHome, Exit, MAX_DESCS, PLACE_BUFFER, ParsedRequest, ReplyHead, direction, kind, output_len,
    padded, parse_request,
};
use linux_raw_sys::general as nr;
use zerocopy::{FromBytes, IntoBytes};

pub(crate) fn status() -> &'static mut Status {
    let bytes = sys::slice_mut(STATUS, size_of::<Status>());
    match Status::mut_from_bytes(bytes) {
        Ok(status) => status,
        Err(_) => lost(fault::PROTOCOL, 0),
    }
}

/// What is counted of call `number`.
fn count_of(number: u32) -> Option<&'static mut Count> {
    let at = usize::try_from(number).ok().filter(|at| *at < COUNTS_LEN)?;
    let bytes = sys::slice_mut(COUNTS, COUNTS_LEN * size_of::<Count>());
    <[Count]>::mut_from_bytes(bytes).ok()?.get_mut(at)
}

/// What a deputy needs to know between two calls.
pub(crate) struct Deputy {
    /// `clock_gettime` of this process's vDSO, or 0.
    clock: u64,
    /// Number of the last call.
    last: u32,
    /// Sequence of the last call that ran.
    pub(crate) done: u32,
    /// Descriptor of the socket to the daemon.
    pub(crate) daemon: i32,
    pub(crate) rseq: (u64, u32, u32),
    pub(crate) pending: Pending,
    /// The kernel's mark (−512 to −514) of the call that was broken off to fetch the
    /// program, 0 if none had begun.
    broken_off: i64,
}

/// Runs until the program is home, or is no more.
pub(crate) fn run() -> ! {
    let bytes = sys::slice_mut(BOOT, size_of::<Boot>());
    let Ok(boot) = Boot::read_from_bytes(bytes) else { lost(fault::PROTOCOL, 0) };
    bytes.fill(0);
    let set = if boot.pending.present == 1 { 1 - boot.pending.set } else { 0 };
    let link = &mut sys::state().link;
    let fd = i32::try_from(boot.link).unwrap_or(-1);
    link.start(
        fd,
        set,
        &Keys {
            cipher: boot.cipher,
            seal: boot.seal_key,
            open: boot.open_key,
            seal_next: boot.seal_next,
            open_next: boot.open_next,
        },
    );
    sys::lists().maps = i32::try_from(boot.maps).unwrap_or(-1);
    let status = status();
    status.blocked = boot.blocked;
    status.link = boot.link;
    status.phase = phase::SERVING;
    let rseq = (boot.rseq_addr, boot.rseq_len, boot.rseq_signature);
    if rseq.0 != 0 {
        // The area lies in memory that is the remote half's now.
        sys::plain(nr::__NR_rseq, [rseq.0, u64::from(rseq.1), 1, u64::from(rseq.2), 0, 0]);
    }
    // From here on the process lives at the remote node.
    let commit = Commit { offsets: boot.offsets };
    if sys::state().link.send_value(kind::COMMIT, 0, &commit).is_err() {
        lost(fault::END, 0);
    }
    let mut deputy = Deputy {
        clock: boot.clock,
        last: u32::MAX,
        done: 0,
        daemon: i32::try_from(boot.daemon).unwrap_or(-1),
        rseq,
        pending: boot.pending,
        broken_off: 0,
    };
    // Another stay's, where the program was held here and has gone on.
    deputy.forget_counts();
    if deputy.pending.present == 1 {
        deputy.finish_for_remote();
    }
    loop {
        deputy.serve();
    }
}

/// Ends the process, whose other half is lost. The pause lets the daemon read why.
pub(crate) fn lost(why: u32, detail: u64) -> ! {
    let status = sys::slice_mut(STATUS, size_of::<Status>());
    if let Ok(status) = Status::mut_from_bytes(status) {
        status.fault = why;
        status.detail = detail;
        status.phase = phase::LOST;
    }
    sys::poll(&mut [], 200);
    sys::die(9)
}

pub(crate) fn gated_receive(fd: i32, into: &mut [u8], flags: u32) -> i64 {
    let (fd, at) = (u64::from(fd.cast_unsigned()), into.as_mut_ptr() as u64);
    let args = [fd, at, into.len() as u64, u64::from(flags), 0, 0];
    sys::gate(nr::__NR_recvfrom, &args)
}

impl Deputy {
    /// Takes one frame and does what it says.
    fn serve(&mut self) {
        let frame = match sys::state().link.expect(gated_receive) {
            Ok(frame) => frame,
            Err(Broken::Interrupted) => self.come_home(false),
            Err(Broken::End) => lost(fault::END, 0),
            Err(Broken::Forged) => lost(fault::FORGED, 0),
        };
        let link = &mut sys::state().link;
        match frame.header.kind {
            kind::CALL => self.call(&frame),
            kind::EXEC => self.exec(&frame),
            kind::FORK => self.fork(&frame),
            kind::EXIT => {
                status().phase = phase::EXITING;
                let exit = Exit::read_from_prefix(link.received(&frame));
                sys::exit(exit.map_or(255, |(exit, _)| exit.status));
            }
            kind::SLICE => take_slice(&frame),
            kind::HEAD => self.take_home(Some(&frame)),
            _ => lost(fault::PROTOCOL, u64::from(frame.header.kind)),
        }
    }

    fn call(&mut self, frame: &Frame) {
        let link = &mut sys::state().link;
        if frame.header.seq != self.done.wrapping_add(1) {
            lost(fault::PROTOCOL, u64::from(frame.header.seq));
        }
        let input = link.received(frame);
        let Ok(mut parsed) = parse_request(input) else { lost(fault::PROTOCOL, 0) };
        let at = place(&mut parsed, input, link.body());
        let status = status();
        let number = parsed.request.nr;
        status.last_call = u64::from(number);
        self.account(number, parsed.request.took);
        let begin = self.now();
        let result = sys::gate(number, &parsed.request.args);
        match result {
            result if link::is_aborted(result) => {
                self.broken_off = if result == ABORTED { 0 } else { result - BROKEN_OFF };
                self.come_home(false)
            }
            PARKED => {
                self.pending = Pending {
                    present: 1,
                    count: parsed.request.descs,
                    set: link.set,
                    reserved: 0,
                    descs: parsed.descs,
                    at,
                };
                self.come_home(true);
            }
            _ => {}
        }
        if number == nr::__NR_rt_sigprocmask {
            status.blocked = parsed.request.args[4];
        }
        status.calls += 1;
        let kind = if status.is_timed == 0 { kind::REPLY } else { kind::REPLY_TIMED };
        if let (Some(begin), Some(end), Some(count)) = (begin, self.now(), count_of(number)) {
            count.timed += 1;
            count.ran += end.saturating_sub(begin);
        }
        self.done = frame.header.seq;
        let len = reply(&parsed, &at, result, link.body());
        if link.send(kind, frame.header.seq, len).is_err() {
            lost(fault::END, 0);
        }
    }

    /// Begins to count, as a process that has just been made.
    pub(crate) fn forget_counts(&mut self) {
        (self.done, self.last) = (0, u32::MAX);
        sys::slice_mut(COUNTS, COUNTS_LEN * size_of::<Count>()).fill(0);
    }

    /// The time, where somebody wants to know how long calls take.
    fn now(&self) -> Option<u64> {
        (status().is_timed != 0 && self.clock != 0).then(|| sys::monotonic(self.clock))
    }

    /// Counts a call, and how long the program `took` over the one before.
    fn account(&mut self, number: u32, took: u64) {
        if took != 0
            && let Some(count) = count_of(self.last)
        {
            count.waited_for += 1;
            count.waited += took;
        }
        self.last = number;
        if let Some(count) = count_of(number) {
            count.calls += 1;
        }
    }

    /// The process moved in the midst of a call that the kernel can restart; this
    /// task owns the restart block, so it is finished here.
    fn finish_for_remote(&mut self) {
        let result = sys::gate(nr::__NR_restart_syscall, &[0; 6]);
        match result {
            PARKED => self.come_home(true),
            // Not even begun again: still pending.
            result if link::is_aborted(result) => self.come_home(true),
            _ => {}
        }
        let link = &mut sys::state().link;
        let body = link.body();
        let mut end = 0;
        let mut put = |bytes: &[u8]| {
            if let Some(room) = body.get_mut(end..end + bytes.len()) {
                room.copy_from_slice(bytes);
            }
            end = padded(end + bytes.len());
        };
        put(ReplyHead { result }.as_bytes());
        put(&u64::from(self.pending.count).to_le_bytes());
        let count = (self.pending.count as usize).min(MAX_DESCS);
        for (desc, at) in self.pending.descs.iter().zip(self.pending.at).take(count) {
            put(desc.as_bytes());
            put(sys::slice(at, output_len(desc, result)));
        }
        self.pending.present = 0;
        if link.send(kind::REPLY, 0, end).is_err() {
            lost(fault::END, 0);
        }
    }

    /// Asks the remote half for the program.
    pub(crate) fn come_home(&mut self, pending: bool) -> ! {
        let link = &mut sys::state().link;
        if pending || self.pending.present == 1 {
            if self.pending.set == link.set {
                link.switch_buffers();
            }
        } else {
            self.pending.present = 0;
        }
        let come = ComeHome { done: self.done, pending: u32::from(pending) };
        if link.send_value(kind::COME_HOME, 0, &come).is_err() {
            lost(fault::END, 0);
        }
        self.take_home(None)
    }

    /// Receives the image and becomes the program again.
    pub(crate) fn take_home(&mut self, first: Option<&Frame>) -> ! {
        let mut incoming = Incoming::new(Side::Home);
        let status = status();
        if let Some(frame) = first {
            handle(&mut incoming, frame);
            status.phase = phase::COMING;
        }
        loop {
            let frame = match sys::state().link.receive(link::wait) {
                Ok(frame) => frame,
                Err(Broken::Forged) => lost(fault::FORGED, 0),
                Err(_) => lost(fault::END, 0),
            };
            match frame.header.kind {
                // It was sent before COME_HOME was seen; it is issued again.
                kind::CALL | kind::EXEC | kind::EXEC_DATA | kind::FORK => {}
                kind::SLICE => take_slice(&frame),
                kind::EXIT => {
                    status.phase = phase::EXITING;
                    let exit = Exit::read_from_prefix(sys::state().link.received(&frame));
                    sys::exit(exit.map_or(255, |(exit, _)| exit.status));
                }
                _ if handle(&mut incoming, &frame) => break,
                // Until the image begins to come, the bell must go on ringing.
                _ => status.phase = phase::COMING,
            }
        }
        (status.pages, status.changed) = incoming.pages();
        status.is_delta = u32::from(incoming.is_delta());
        self.go_on()
    }

    /// The memory is the program's again; so becomes everything else.
    fn go_on(&mut self) -> ! {
        let head = restore::head();
        let status = status();
        sys::close(sys::state().link.fd);
        sys::close(sys::lists().maps);
        sys::close(self.daemon);
        status.reason = head.reason;
        status.detail = head.detail;
        status.blocked = head.blocked;
        let mut registers = head.registers;
        sys::set_base(0x1002, registers.fs_base);
        sys::set_base(0x1001, registers.gs_base);
        if self.rseq.0 != 0 {
            let (addr, len, signature) = self.rseq;
            sys::plain(nr::__NR_rseq, [addr, u64::from(len), 0, u64::from(signature), 0, 0]);
        }
        // A child that was made away has none here; every other has this one.
        if head.robust_addr != 0 {
            sys::plain(nr::__NR_set_robust_list, [head.robust_addr, head.robust_len, 0, 0, 0, 0]);
        }
        wait_for_clocks(&head.clocks);
        // Before anybody may read it: FINISHING, too, is home.
        status.frozen = sys::clock(nr::CLOCK_MONOTONIC)
            .saturating_sub(head.clocks.monotonic)
            .max(0)
            .cast_unsigned();
        let stack = sys::alt_stack(None);
        if head.pending == 1 {
            // Should the process move on before the call ends, its mover reads these.
            let bytes = self.pending.as_bytes();
            sys::slice_mut(PENDING, bytes.len()).copy_from_slice(bytes);
            status.phase = phase::FINISHING;
            sys::set_mask(head.blocked);
            let result = sys::finish_pending();
            // A handler that ran now could not tell where it came from.
            sys::set_mask(u64::MAX);
            store_outputs(&self.pending, result);
            registers.rax = result.cast_unsigned();
        } else if self.is_interrupted(&head) {
            registers.rip = registers.rip.wrapping_add(2);
            registers.rax = (-4i64).cast_unsigned(); // EINTR
        }
        if status.hold == 1 {
            hold(&Head { registers, pending: 0, ..head });
        }
        // A child that the program makes before the daemon has tidied up must not
        // inherit the region (MADV_DONTFORK).
        sys::plain(nr::__NR_madvise, [REGION, REGION_LEN, 10, 0, 0, 0]);
        status.phase = phase::HOME;
        sys::resume(&registers, restore::xsave(), head.blocked, &stack)
    }
}

impl Deputy {
    /// Whether the call that was broken off ends with EINTR instead of being issued
    /// again: a handler is about to run, and the call or the handler's flags say so
    /// (man 7 signal, "Interruption of system calls").
    fn is_interrupted(&self, head: &Head) -> bool {
        const ERESTARTNOINTR: i64 = -513;
        const ERESTARTNOHAND: i64 = -514;
        const SA_RESTART: u64 = 0x1000_0000;
        let waiting = sys::pending_signals() & head.handled & !head.blocked;
        if self.broken_off == 0 || self.broken_off == ERESTARTNOINTR || waiting == 0 {
            return false;
        }
        let flags = sys::action_flags(waiting.trailing_zeros() + 1);
        self.broken_off == ERESTARTNOHAND || flags & SA_RESTART == 0
    }
}

/// Takes a slice of what the program has changed; it runs on.
fn take_slice(frame: &Frame) {
    status().receiving = 1;
    let body = sys::state().link.received(frame);
    let Ok((brk, _)) = u64::read_from_prefix(body) else { lost(fault::PROTOCOL, 0) };
    let head = Head { memory_map: MemoryMap { brk, ..MemoryMap::default() }, ..Head::default() };
    let bytes = head.as_bytes();
    sys::slice_mut(STATE, bytes.len()).copy_from_slice(bytes);
    let mut incoming = Incoming::slice();
    let is_last = loop {
        match sys::state().link.receive(link::wait) {
            Ok(frame) if handle(&mut incoming, &frame) => break frame.header.seq == 1,
            Ok(_) => {}
            Err(Broken::Forged) => lost(fault::FORGED, 0),
            Err(_) => lost(fault::END, 0),
        }
    };
    let status = status();
    status.slices = status.slices.wrapping_add(1);
    status.sliced = status.sliced.wrapping_add(incoming.pages().0);
    status.rounds = status.rounds.wrapping_add(u64::from(is_last));
    status.receiving = 0;
}

/// Waits for the mover that takes the program on to another node: with new registers it
/// is a deputy again. Comes back where nobody does, and the program runs here.
///
/// Not where a handler is due: it runs at home.
fn hold(head: &Head) {
    const STEP_MS: u32 = 5;
    if sys::pending_signals() & head.handled & !head.blocked != 0 {
        return;
    }
    let bytes = head.as_bytes();
    sys::slice_mut(STATE, bytes.len()).copy_from_slice(bytes);
    sys::slice_mut(PENDING, size_of::<Pending>()).fill(0);
    sys::set_mask(head.blocked | head.handled);
    status().phase = phase::HELD;
    for _ in 0..HOLD_MS / STEP_MS {
        sys::poll(&mut [], STEP_MS.cast_signed());
        if status().hold == 0 {
            break;
        }
    }
    // From here on nobody takes it: what follows is done for a program that runs here.
    status().phase = phase::HOME;
    sys::set_mask(u64::MAX);
}

fn handle(incoming: &mut Incoming, frame: &Frame) -> bool {
    match incoming.handle(frame) {
        Ok(complete) => complete,
        Err(refusal) => {
            lost(fault::RESTORE, u64::from(refusal.step) << 32 | u64::from(refusal.errno))
        }
    }
}

/// Gives every buffer of a call its place: inputs where they came in, outputs where
/// the reply will leave from. Pointers follow.
fn place(parsed: &mut ParsedRequest, input: &mut [u8], output: &mut [u8]) -> [u64; MAX_DESCS] {
    let mut at = [0u64; MAX_DESCS];
    let mut end = size_of::<ReplyHead>();
    let count = parsed.descs().len();
    for i in 0..count {
        let desc = parsed.descs[i];
        let len = desc.len as usize;
        let from = parsed.inputs[i];
        at[i] = if desc.direction & direction::IN_PLACE != 0 {
            desc.addr
        } else if desc.direction & direction::OUT != 0 {
            let room = &mut output[end..end + len];
            if desc.direction & direction::IN == 0 {
                room.fill(0);
            } else {
                room.copy_from_slice(&input[from..from + len]);
            }
            end += padded(len);
            room.as_ptr() as u64
        } else {
            input[from..from + len].as_ptr() as u64
        };
        match desc.place {
            argument @ 0..=5 => parsed.request.args[usize::from(argument)] = at[i],
            // Checked by `parse_request`: an earlier buffer, with room at the offset.
            buffer if buffer >= PLACE_BUFFER && buffer != conet_wire::link::PLACE_NONE => {
                let holder = at[usize::from(buffer - PLACE_BUFFER)] + u64::from(desc.offset);
                sys::slice_mut(holder, 8).copy_from_slice(&at[i].to_le_bytes());
            }
            _ => {}
        }
    }
    at
}

/// Packs a reply into `body`, where the outputs already lie; its length.
fn reply(parsed: &ParsedRequest, at: &[u64; MAX_DESCS], result: i64, body: &mut [u8]) -> usize {
    let base = body.as_ptr() as u64;
    let mut end = size_of::<ReplyHead>();
    body[..end].copy_from_slice(ReplyHead { result }.as_bytes());
    for (desc, at) in parsed.descs().iter().zip(at) {
        let len = output_len(desc, result);
        if len == 0 {
            continue;
        }
        if desc.direction & direction::IN_PLACE != 0 {
            body[end..end + len].copy_from_slice(sys::slice(*at, len));
        } else {
            let from = usize::try_from(*at - base).unwrap_or(0);
            if from != end {
                body.copy_within(from..from + len, end);
            }
        }
        end += padded(len);
    }
    end
}

/// The outputs of a call that ended at home go to the program's own buffers.
fn store_outputs(pending: &Pending, result: i64) {
    let count = (pending.count as usize).min(MAX_DESCS);
    for (desc, at) in pending.descs.iter().zip(pending.at).take(count) {
        let len = output_len(desc, result);
        if len > 0 && desc.direction & direction::IN_PLACE == 0 && desc.addr != 0 {
            sys::copy_to_program(desc.addr, sys::slice(at, len));
        }
    }
}

/// Waits until home's clocks have reached what the program may have read; the two
/// nodes' clocks are compared to within a round trip's half.
fn wait_for_clocks(read: &conet_wire::image::Clocks) {
    for (id, value) in [
        (nr::CLOCK_REALTIME, read.realtime),
        (nr::CLOCK_MONOTONIC, read.monotonic),
        (nr::CLOCK_BOOTTIME, read.boottime),
    ] {
        let behind = value - sys::clock(id);
        // More than a second is no error of measurement: somebody set the clock.
        if (1..SECOND).contains(&behind) {
            while sys::clock(id) < value {}
        }
    }
}

const _: () = assert!(reason::ASKED == 0, "a fresh status says so");
