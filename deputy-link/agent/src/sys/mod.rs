//! What touches the kernel, the processor or foreign memory: all `unsafe` of the
//! agent, behind functions that are safe for this single-threaded program.

#![allow(unsafe_code, reason = "the kernel and foreign memory are reached from here only")]

mod call;
mod divert;
mod entry;
mod frame;
mod memory;
mod statics;
mod vdso;

pub(crate) use call::*;
pub(crate) use divert::divert;
pub(crate) use entry::{finish_pending, gate};
pub(crate) use frame::{Context, handler_stack, resume, take_signals};
pub(crate) use memory::{Program, slice, slice_mut};
pub(crate) use statics::{buffers, lists, state};
pub(crate) use vdso::{
    Inside, finish_return, has_returned, inside, local_clock, monotonic, offset, patch,
    restore_return, stop_at_return, undo, use_local_vdso, use_offsets,
};
