//! The role's one state and its buffers, as plain statics: there is no heap here.

use super::call::AltStack;
use crate::branch::Child;
use crate::link::Link;
use crate::trap::Remote;
use conet_wire::image::{Area, MAX_AREAS};
use conet_wire::session::{MAX_PACKET, RECORD_PREFIX};
use core::cell::UnsafeCell;

/// Bytes of each stack.
pub(super) const STACK_LEN: usize = 64 * 1024;

/// Bytes of a record buffer.
pub(crate) const RECORD: usize = RECORD_PREFIX + MAX_PACKET;

/// A static that one thread of one process uses.
#[repr(C, align(4096))]
pub(super) struct Static<T>(UnsafeCell<T>);

// SAFETY: every role is single-threaded; handlers that use a static are masked
// against each other.
unsafe impl<T> Sync for Static<T> {}

impl<T> Static<T> {
    const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    pub(super) fn addr(&self) -> u64 {
        self.0.get() as u64
    }
}

pub(super) static HOST_STACK: Static<[u8; STACK_LEN]> = Static::new([0; STACK_LEN]);
/// Most `vfork`s within each other; a remote's depth counts from 0.
pub(crate) const MAX_DEPTH: usize = 3;

/// Where handlers run, by the remote's depth: those that share memory must not share
/// a stack.
static ALT_STACKS: [Static<[u8; STACK_LEN]>; MAX_DEPTH + 1] =
    [const { Static::new([0; STACK_LEN]) }; MAX_DEPTH + 1];
/// The frame with which the program is entered.
pub(super) static FRAME: Static<[u8; 8192]> = Static::new([0; 8192]);

/// Pairs of buffers: two for a deputy, one for each depth of a remote.
static RECORDS: [Static<[u8; RECORD]>; 2 * (MAX_DEPTH + 1)] =
    [const { Static::new([0; RECORD]) }; 2 * (MAX_DEPTH + 1)];

/// What a role keeps.
pub(crate) struct State {
    /// The link to the other half.
    pub(crate) link: Link,
    /// The remote side's own.
    pub(crate) remote: Remote,
    /// A child that shares this memory, until it has begun.
    pub(crate) child: Option<Child>,
}

/// Lists of areas; apart from [`State`], because they begin as zeros, which take no
/// room in the program's file.
pub(crate) struct Lists {
    /// Areas of the image that is coming in.
    pub(crate) areas: [Area; MAX_AREAS],
    /// How many of them are valid.
    pub(crate) area_count: usize,
    /// What is leaving: apart from `areas`, which tell where home has files, also to
    /// a parent whose memory the leaving child has shared.
    pub(crate) leaving: [Area; MAX_AREAS],
    /// What is mapped already (deputy), or must not travel (remote).
    pub(crate) present: [Area; MAX_AREAS],
    /// How many of them are valid.
    pub(crate) present_count: usize,
    /// Areas as they came (remote).
    pub(crate) base: [Area; MAX_AREAS],
    /// How many of them are valid.
    pub(crate) base_count: usize,
    /// The deputy's `/proc/self/maps`, opened before the process moved: when it comes
    /// home it may have no descriptor left to open one.
    pub(crate) maps: i32,
}

const NONE: Area = Area { start: 0, end: 0, prot: 0, flags: 0 };

static STATE: Static<State> =
    Static::new(State { link: Link::none(), remote: Remote::new(), child: None });
static LISTS: Static<Lists> = Static::new(Lists {
    areas: [NONE; MAX_AREAS],
    area_count: 0,
    leaving: [NONE; MAX_AREAS],
    present: [NONE; MAX_AREAS],
    present_count: 0,
    base: [NONE; MAX_AREAS],
    base_count: 0,
    maps: 0,
});

/// The role's lists, as [`state`].
pub(crate) fn lists() -> &'static mut Lists {
    // SAFETY: as for `state`.
    unsafe { &mut *LISTS.0.get() }
}

/// The role's state. Callers hold it for one operation and never across a point
/// where a handler that uses it can run.
pub(crate) fn state() -> &'static mut State {
    // SAFETY: single-threaded; see above for handlers.
    unsafe { &mut *STATE.0.get() }
}

/// Where handlers of a remote of this depth run.
pub(crate) fn alt_stack(depth: usize) -> AltStack {
    let addr = ALT_STACKS[depth.min(MAX_DEPTH)].addr();
    AltStack { addr, flags: 0, padding: 0, len: STACK_LEN as u64 }
}

/// The receive and send buffers of `set`, 0 to [`MAX_DEPTH`].
pub(crate) fn buffers(set: u32) -> (&'static mut [u8; RECORD], &'static mut [u8; RECORD]) {
    let first = 2 * (set as usize).min(MAX_DEPTH);
    // SAFETY: a link takes one set at a time and lets go of it when it takes the other.
    unsafe { (&mut *RECORDS[first].0.get(), &mut *RECORDS[first + 1].0.get()) }
}

/// A dependency names an allocator without using it on any path taken here.
struct NoHeap;

// SAFETY: it never gives memory out.
unsafe impl core::alloc::GlobalAlloc for NoHeap {
    unsafe fn alloc(&self, _: core::alloc::Layout) -> *mut u8 {
        core::ptr::null_mut()
    }

    unsafe fn dealloc(&self, _: *mut u8, _: core::alloc::Layout) {}
}

#[global_allocator]
static NO_HEAP: NoHeap = NoHeap;
