//! The program that enters processes.
//!
//! One static program, linked at [`conet_wire::image::REGION`], in three roles:
//!
//! - **host**: started by the daemon of a node that hosts a process. It makes the
//!   namespaces ([`launch`]) and leaves the *warden* in them ([`warden`]), whose
//!   child becomes the *remote*: it rebuilds the process around itself
//!   ([`restore`]) and stays in it as the handler of SIGSYS ([`trap`]).
//! - **deputy**: the same bytes, put into the original process at home, where
//!   they run the calls of the remote ([`deputy`]) until the image comes back
//!   ([`capture`] on the remote side, [`restore`] at home).
//!
//! No allocator, no thread-local storage, no libc: it lives among a program's own
//! memory and must leave all of it alone. Each role owns one static state, used by
//! one thread; handlers are masked against each other. What touches the kernel or
//! foreign memory is in [`sys`].

#![no_std]
#![no_main]

mod branch;
mod capture;
mod clock;
mod deputy;
mod exec;
mod fork;
mod launch;
mod link;
mod local;
mod remote;
mod restore;
mod slice;
mod sys;
mod tracking;
mod trap;
mod warden;
