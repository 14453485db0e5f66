//! Several conet hosts on one machine: namespaces, measurements and the demonstration.
//!
//! A lab host is a network namespace with a link to the LAN bridge `conet-lan`,
//! together with mount, UTS, IPC and time namespaces of its own, so that a
//! program can tell hosts apart by everything that differs between machines:
//! addresses, host name, `/tmp`, `/run`, clocks. Each runs its own daemon.
//! Process ids are the machine's: a lab shows what moves where, and hiding pids
//! would hide just that.
//!
//! What it is not: a test fixture only. `conet lab` and `conet demo` are shipped.
//!
//! Everything here needs root, of the machine or of a user namespace: an ordinary user
//! has the whole lab inside namespaces of its own ([`rootless`]).

pub mod demo;
mod down;
mod enter;
mod error;
mod holder;
mod lan;
pub mod measure;
mod names;
mod plan;
mod process;
pub mod rootless;
mod state;
mod status;
mod sys;
mod up;

pub use down::{Removed, down};
pub use enter::{CONFIG_VARIABLE, exec, exec_daemon};
pub use error::LabError;
pub use holder::hold;
pub use names::{HostId, LAN, LAN_PREFIX, MAX_GUESTS, MAX_HOSTS, UPLINK, is_lab_name};
pub use plan::MARKER;
pub use state::{HostState, LabState, STATE_DIR};
pub use status::{HostReport, LabReport, status};
pub use up::{Options, Watch, ask_status, restart, up};
