//! Programs that make children while they are away: what their deputies ask of home.
//!
//! ```text
//! deputy: FORK ─► Branch to the node ─► link ─► the child's link and line to the deputy
//! child:  BORN ─► a record in the table ─► NOTED
//! ```
//!
//! A thread listens to each deputy of this daemon's. It asks and connects; the record of
//! a child is the control thread's, which also tells the child that it may run: a
//! program runs away only when a later daemon would find it.
//!
//! Deputies of an earlier daemon have nobody to ask, and make their children at home.

use std::time::Duration;

use conet_deputy_link::LinkSecret;
use conet_deputy_link::family::{DeputyEnd, Line, LineEvent, Refused};
use conet_transport::session::protect::{Key, link_keys};
use conet_wire::moving::{Answer, Ask, Root, Ticket};

use super::{Event, work};
use crate::daemon::NodeHandle;

/// How long each step of making a link may take; what takes longer is made at home.
const STEP_LIMIT: Duration = Duration::from_secs(3);

/// A child that has been made away.
#[derive(Debug)]
pub struct Birth {
    pub(super) pid: u32,
    pub(super) stay: (String, Ticket),
    /// To tell it that its record is kept.
    pub(super) line: Line,
}

/// A line for the deputy of a process that is to be at `stay`, and a thread to listen
/// to it until it is closed.
///
/// # Errors
/// When descriptors run out.
pub(super) fn attend(
    node: &NodeHandle<Event>,
    stay: (String, Ticket),
) -> std::io::Result<DeputyEnd> {
    let (line, end) = Line::new()?;
    let node = node.clone();
    work::thread("conet-family", move || listen(&node, &stay, &line));
    Ok(end)
}

fn listen(node: &NodeHandle<Event>, stay: &(String, Ticket), line: &Line) {
    loop {
        let done = match line.event() {
            Ok(Some(LineEvent::Fork)) => match branch(node, stay, line) {
                Ok(()) => Ok(()),
                Err(refused) => line.refuse(refused),
            },
            Ok(Some(LineEvent::Born { pid })) => line.try_clone().map(|line| {
                node.post(Event::Born(Birth { pid, stay: stay.clone(), line }));
            }),
            Ok(None) => return,
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            // Closing the line sends whoever waits for an answer home.
            tracing::debug!(%error, stay = %stay.1, "a deputy is not listened to any more");
            return;
        }
    }
}

/// Has a link made for a child of the process at this stay, and gives it to its deputy.
fn branch(
    node: &NodeHandle<Event>,
    (peer, parent): &(String, Ticket),
    line: &Line,
) -> Result<(), Refused> {
    let refuse = |why: &dyn std::fmt::Display| {
        tracing::info!(peer, stay = %parent, "a child is made at home: {why}");
        Refused::ByNode
    };
    let config = node.config();
    let granted = work::peer_that_hosts(config, peer).map_err(|failure| refuse(&failure))?;
    let address = granted.endpoint.ok_or_else(|| refuse(&"where it is, is not known"))?;
    let (ticket, root) = (work::new_ticket(), work::new_root());
    let cipher = work::cipher_for(granted);
    let keys = link_keys(&Key::new(root), &ticket.0);
    let ask = Ask::Branch {
        parent: *parent,
        ticket,
        root: Root(root),
        cipher: work::cipher_number(cipher),
    };
    let answer = node.ask_peer(peer, ask.to_bytes(), STEP_LIMIT).map_err(|error| refuse(&error))?;
    match Answer::parse(&answer) {
        Ok(Answer::Ready) => {}
        Ok(Answer::Refused { code, .. }) if code == "limit" => return Err(Refused::Limit),
        Ok(Answer::Refused { sentence, .. }) => return Err(refuse(&sentence)),
        _ => return Err(refuse(&"it answered something else")),
    }
    let link = work::connect(address, ticket, config.node.link_timeout, STEP_LIMIT)
        .map_err(|error| refuse(&error))?;
    let secret = LinkSecret { cipher, seal: keys.home_to_remote, open: keys.remote_to_home };
    let end = attend(node, (peer.clone(), ticket)).map_err(|error| refuse(&error))?;
    line.give(ticket.0, link, secret, &end).map_err(|error| refuse(&error))
}
