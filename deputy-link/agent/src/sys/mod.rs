//! What touches the kernel, the processor or foreign memory: all `unsafe` of the
//! agent, behind functions that are safe for this single-threaded program.

#![allow(unsafe_code, reason = "the kernel and foreign memory are reached from here only")]

mod call;
mod divert;
mod divide;
mod entry;
mod frame;
mod memory;
mod message;
mod statics;
mod vdso;

pub(crate) use call::*;
pub(crate) use divert::divert;
pub(crate) use divide::*;
pub(crate) use entry::{finish_pending, gate};
pub(crate) use frame::{Context, resume, take_signals};
pub(crate) use memory::{Program, slice, slice_mut};
pub(crate) use message::*;
pub(crate) use statics::{MAX_DEPTH, State, alt_stack as handler_stack, buffers, lists, state};
pub(crate) use vdso::{
    Inside, finish_return, forget_return, has_returned, inside, local_clock, monotonic, offset,
    patch, restore_return, stop_at_return, undo, use_local_vdso, use_offsets,
};
