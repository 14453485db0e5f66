//! Moves from one node to another, in which the program does not run at home.
//!
//! This daemon's part is that of every move out: it asks the second node to host, makes
//! the link and lets the mover work, on the thread of a move ([`super::work`]). The first
//! node is only asked for slices and to ring the bell; it hears that its half has ended as
//! it always does. Whatever goes wrong, the process itself says where the program is.

use conet_deputy_link::mover::{self, Wish};
use conet_wire::control::{Failure, How};

use super::Event;
use super::work::{self, Job, Outcome, Passage};
use crate::control::Responder;
use crate::daemon::NodeHandle;

/// Moves a program that is away to the node `to`, and enters in `outcome` how it went.
///
/// # Errors
///
/// What the caller is told. The program is where it was or, where the outcome has its
/// return, at home.
pub(super) fn move_on(
    node: &NodeHandle<Event>,
    job: &Job,
    to: &str,
    answer: Option<&Responder>,
    outcome: &mut Outcome,
) -> Result<(), Failure> {
    if let (How::Precopy, Some(pid)) = (job.how, work::as_pid(job.pid)) {
        // Most of it before the second node waits for anything.
        mover::slices(pid, || work::ask_warden(node, job, Wish::Slice))
            .map_err(|error| work::failure(job.pid, &error))?;
    }
    let Passage { pid, stream, secret, policy, how, line } = work::prepare(node, job, to, answer)?;
    let ask = |wish| work::ask_warden(node, job, wish);
    let relayed = mover::move_on(pid, stream, secret, policy, how, &line, ask);
    outcome.returned = relayed.returned;
    let moved = relayed.moved.map_err(|error| match &outcome.returned {
        Some(_) => work::came_home_instead(job.pid, to, &error),
        None => work::failure(job.pid, &error),
    })?;
    outcome.is_direct = relayed.is_direct;
    outcome.out = Some(work::arrived(node, job, to, moved));
    Ok(())
}
