//! What the node's guests share with their host: the table of forwards, and the rules
//! that the kernel has of them.
//!
//! ```text
//! conet.toml, forwards.json ─► rows ─┐
//! guests: links, addresses ──────────┼─► HostRules ─► RuleTable, when they differ
//! guests' and the host's sockets ────┘
//! ```
//!
//! The rules are worked out anew whenever something that they come from may have changed:
//! at the start, when a guest comes or goes, by a request, and once a second as long as
//! a guest is followed or a forward is not usable.
//!
//! What is added is in the state directory before it is in force, and is there for the
//! next daemon. A forward whose guest is not up waits; one whose port is taken by a
//! socket of the host's own is *unusable* until that is gone: whoever was there first
//! has it. So no user of the host takes a port away from a guest by listening on it.
//! Fixed forwards go before what is followed, earlier rows before later ones.
//!
//! TCP under way keeps its way whatever changes; UDP to ports that change is asked for
//! anew, since it has neither beginning nor end.
//!
//! The table of rules is removed at the daemon's end unless a guest stays: it belongs to
//! the guests. A killed daemon's table stays with the guests too, and the next daemon
//! replaces it.

mod follow;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use conet_hostinject::{HostRules, PortForward, Ports, RuleTable};
use conet_netsys::{Conntrack, IfName, Listener, NetError, Netlink, SocketDiag, Transport};
use conet_wire::control::{self, Failure, Response};

use super::guests::Guests;
use crate::caller::Caller;
use crate::config::Config;
use crate::control::Responder;
use crate::forward::{A_FORWARD, Forward, Which, check};
use crate::store;
use follow::{Followed, Follower, taken_by_host};

/// Added forwards in the state directory: their texts.
const FILE: &str = "forwards.json";
/// How often sockets are looked at: passt's period (`FWD_PORT_SCAN_INTERVAL`, 1 s).
const PERIOD: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Config,
    Added,
}

#[derive(Debug)]
struct Row {
    forward: Forward,
    origin: Origin,
    state: State,
    problem: Option<String>,
    /// What leads to the guest now.
    ports: Vec<Ports>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Up,
    Waiting,
    Unusable,
}

/// The forwards of the node, and its rules.
#[derive(Debug)]
pub(super) struct Forwards {
    config: Arc<Config>,
    tunnel: IfName,
    file: PathBuf,
    rows: Vec<Row>,
    rules: Option<RuleTable>,
    sockets: Option<SocketDiag>,
    follower: Follower,
    next: Option<Instant>,
}

impl Forwards {
    /// Puts the rules of the calling thread's namespace in force.
    ///
    /// # Errors
    /// As the kernel refuses, where the configuration needs rules.
    pub(super) fn start(
        config: Arc<Config>,
        tunnel: IfName,
        guests: &Guests,
    ) -> Result<Self, NetError> {
        let file = config.node.state_dir.join(FILE);
        let mut all = Self {
            tunnel,
            rows: Vec::new(),
            rules: None,
            sockets: None,
            follower: Follower::default(),
            next: None,
            file,
            config,
        };
        for forward in all.config.forwards.clone() {
            all.rows.push(Row::new(forward, Origin::Config));
        }
        let added: Vec<String> = store::load(&all.file).unwrap_or_default();
        for text in added {
            let forward = match text.parse::<Forward>() {
                Ok(forward) => forward,
                Err(error) => {
                    tracing::error!(forward = text, %error, "an added forward is forgotten");
                    continue;
                }
            };
            let others = all.rows.iter().map(|row| &row.forward);
            match check(&forward, &all.config.node, others) {
                Ok(()) => all.rows.push(Row::new(forward, Origin::Added)),
                // The configuration goes first.
                Err(problem) => tracing::error!(%problem, "an added forward is forgotten"),
            }
        }
        all.update(guests)?;
        Ok(all)
    }

    /// When to call [`Forwards::handle_timeout`].
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.next
    }

    /// Looks at the sockets again.
    pub(super) fn handle_timeout(&mut self, now: Instant, guests: &Guests) {
        if self.next.is_some_and(|at| at <= now) {
            self.on_change(guests);
        }
    }

    /// Guests have come or gone.
    pub(super) fn on_change(&mut self, guests: &Guests) {
        if let Err(error) = self.update(guests) {
            tracing::error!(error = super::start::chain(&error), "the rules are as they were");
        }
    }

    /// What the command line is told.
    pub(super) fn list(&self) -> Vec<control::Forward> {
        self.rows.iter().map(Row::shown).collect()
    }

    /// Adds a forward.
    pub(super) fn add(&mut self, caller: Caller, text: &str, guests: &Guests, answer: Responder) {
        let added = may_change(caller).and_then(|()| self.plan(text, guests)).and_then(|forward| {
            self.rows.push(Row::new(forward, Origin::Added));
            self.store().inspect_err(|_| drop(self.rows.pop()))?;
            self.update(guests).map_err(|error| {
                self.rows.pop();
                self.store_or_warn();
                Failure::new("rules", super::start::chain(&error), "see conet doctor")
            })
        });
        let row = self.rows.last().map(Row::shown);
        answer.answer(added.and_then(|()| {
            row.map(Response::Forward).ok_or_else(|| Failure::new("bug", "no row", "report it"))
        }));
    }

    /// The forward that somebody wants, if it can be had now.
    fn plan(&mut self, text: &str, guests: &Guests) -> Result<Forward, Failure> {
        let forward: Forward = text.parse().map_err(|error| {
            Failure::new("bad-forward", format!("{text:?} is {error}"), {
                format!("give {A_FORWARD}")
            })
        })?;
        match guests.addresses(&forward.guest) {
            None => {
                let message = format!("no guest is named {}", forward.guest);
                return Err(Failure::new("no-such-guest", message, "see conet guest list"));
            }
            Some(addresses) if !addresses.iter().any(IpAddr::is_ipv4) => {
                let message =
                    format!("{} has no IPv4 address, and forwards need one", forward.guest);
                return Err(Failure::new("no-address", message, "add the guest with one"));
            }
            Some(_) => {}
        }
        if let Some(row) = self.rows.iter().find(|row| row.forward == forward) {
            let remedy = "see conet forward list";
            return Err(Failure::new("exists", format!("{} is there", row.forward), remedy));
        }
        check(&forward, &self.config.node, self.rows.iter().map(|row| &row.forward))
            .map_err(|problem| Failure::new("conflict", problem.to_string(), problem.remedy()))?;
        let broken = |error: NetError| {
            Failure::new("broken", super::start::chain(&error), "see conet doctor")
        };
        if let Some(bind) = forward.bind {
            let own = Netlink::open().and_then(|mut host| host.addresses(None)).map_err(broken)?;
            if !own.iter().any(|entry| entry.net.addr() == bind) {
                let message = format!("{bind} is no address of this host's");
                return Err(Failure::new("bad-address", message, "give one, or none for all"));
            }
        }
        let listeners = listeners(&mut self.sockets).map_err(broken)?;
        if let Some(taken) = taken_by_host(&forward, &listeners) {
            let message = taken_text(&taken);
            return Err(Failure::new("in-use", message, "end what listens there, or take another"));
        }
        Ok(forward)
    }

    /// Takes a forward back that was added.
    pub(super) fn remove(
        &mut self,
        caller: Caller,
        text: &str,
        guests: &Guests,
        answer: Responder,
    ) {
        let removed = may_change(caller).and_then(|()| self.removable(text)).and_then(|index| {
            let row = self.rows.remove(index);
            if let Err(failure) = self.store() {
                self.rows.insert(index, row);
                return Err(failure);
            }
            self.update(guests).map_err(|error| {
                Failure::new("rules", super::start::chain(&error), "restart the daemon")
            })
        });
        answer.answer(removed.map(|()| Response::Done {}));
    }

    fn removable(&self, text: &str) -> Result<usize, Failure> {
        // However it is written: `tcp:22:web:22` is `tcp:22:web`.
        let wanted = text.parse::<Forward>().ok();
        let found = self.rows.iter().position(|row| Some(&row.forward) == wanted.as_ref());
        match found.map(|index| (index, &self.rows[index])) {
            Some((index, row)) if row.origin == Origin::Added => Ok(index),
            Some((_, row)) => Err(Failure::new(
                "configured",
                format!("{} is a forward of conet.toml", row.forward),
                "take it out there and start the daemon anew",
            )),
            None => Err(Failure::new(
                "no-such-forward",
                format!("there is no forward {text}"),
                "see conet forward list",
            )),
        }
    }

    /// Removes the rules, unless guests stay that need them.
    pub(super) fn release(mut self, guests_stay: bool) {
        if guests_stay {
            return tracing::info!("the rules stay for the guests that stay");
        }
        if let Some(mut rules) = self.rules.take()
            && let Err(error) = rules.remove()
        {
            tracing::warn!(error = super::start::chain(&error), "rules not removed");
        }
    }

    /// The rules without forwards and guests.
    fn base(&self) -> HostRules {
        let node = &self.config.node;
        HostRules {
            guests: Vec::new(),
            tunnel: self.tunnel,
            overlays: node.overlay.prefixes().collect(),
            shared_address: node.shared_address,
            host_ports: node.host_ports.clone(),
            forwards: Vec::new(),
        }
    }

    /// Works the rules out, and has the kernel take them.
    fn update(&mut self, guests: &Guests) -> Result<(), NetError> {
        let listeners = match self.rows.is_empty() {
            true => Vec::new(),
            false => listeners(&mut self.sockets)?,
        };
        let mut rules = self.base();
        rules.guests = guests.links();
        let mut taken = Vec::new();
        // Fixed ones first.
        for automatic in [false, true] {
            for row in &mut self.rows {
                if (row.forward.ports == Which::Auto) != automatic {
                    continue;
                }
                // What is in force stays so, whatever listens on the host since.
                let before = std::mem::take(&mut row.ports);
                (row.state, row.problem) = (State::Waiting, None);
                let Some((port, to)) = guests.up(&row.forward.guest) else { continue };
                let followed = match row.forward.ports {
                    Which::Fixed { .. } => fixed(&row.forward, &before, &listeners),
                    Which::Auto => {
                        let free = |ports: Ports| {
                            let is_old = before.iter().any(|old| old.meets(ports));
                            is_free(&row.forward, ports, &taken)
                                && (is_old || !is_hosts(&row.forward, ports, &listeners))
                        };
                        self.follower.follow(&row.forward, port, to, &self.config.node, free)
                    }
                };
                row.state = if followed.unusable { State::Unusable } else { State::Up };
                row.problem = followed.problem;
                taken.extend(followed.ports.iter().map(|ports| (row.forward.bind, *ports)));
                rules.forwards.extend(followed.ports.iter().map(|ports| row.forwarded(*ports, to)));
                row.ports = followed.ports;
            }
        }
        self.follower.forget_unused();
        let looks_again =
            |row: &Row| row.forward.ports == Which::Auto || row.state == State::Unusable;
        self.next = self.rows.iter().any(looks_again).then(|| Instant::now() + PERIOD);
        let before = self.rules.as_ref().map_or(&[][..], RuleTable::forwards).to_vec();
        if let Err(error) = self.apply(&rules) {
            if rules.is_needed() {
                return Err(error);
            }
            // A kernel without nftables has no rules of an earlier daemon's either.
            tracing::warn!(
                error = super::start::chain(&error),
                "sources of guests by veth are checked by their way back alone, IPv6 not at all"
            );
            return Ok(());
        }
        if before != rules.forwards
            && let Err(error) = renew_flows(&before, &rules.forwards)
        {
            let error = super::start::chain(&error);
            tracing::warn!(error, "UDP under way goes where it went before");
        }
        Ok(())
    }

    fn apply(&mut self, rules: &HostRules) -> Result<(), NetError> {
        let table = match self.rules.take() {
            Some(table) => table,
            None => RuleTable::open()?,
        };
        self.rules.insert(table).apply(rules)
    }

    /// What guests have sent from addresses that are not theirs, by link.
    pub(super) fn spoofed(&mut self) -> BTreeMap<String, u64> {
        let counted = self.rules.as_mut().map(RuleTable::spoofed);
        counted.and_then(Result::ok).unwrap_or_default()
    }

    fn store(&self) -> Result<(), Failure> {
        let added = self.rows.iter().filter(|row| row.origin == Origin::Added);
        let texts: Vec<_> = added.map(|row| row.forward.to_string()).collect();
        store::save(&self.file, &texts).map_err(|error| {
            let message = format!("cannot write {} ({error})", self.file.display());
            Failure::new("state", message, "make room for it, or set state_dir in conet.toml")
        })
    }

    fn store_or_warn(&self) {
        if let Err(error) = self.store() {
            tracing::error!(%error, "the next daemon will not know what changed");
        }
    }
}

impl Row {
    fn new(forward: Forward, origin: Origin) -> Self {
        Self { forward, origin, state: State::Waiting, problem: None, ports: Vec::new() }
    }

    /// The rule for some of its ports.
    fn forwarded(&self, ports: Ports, to: IpAddr) -> PortForward {
        let to_first = match self.forward.ports {
            Which::Fixed { to_first, .. } => to_first,
            Which::Auto => ports.first,
        };
        PortForward { bind: self.forward.bind, ports, to, to_first }
    }

    fn shown(&self) -> control::Forward {
        let range = |ports: &Ports| match ports.count() {
            1 => format!("{} {}", ports.transport, ports.first),
            _ => format!("{} {}-{}", ports.transport, ports.first, ports.last),
        };
        control::Forward {
            forward: self.forward.to_string(),
            guest: self.forward.guest.clone(),
            origin: if self.origin == Origin::Config { "config" } else { "added" }.to_owned(),
            state: match self.state {
                State::Up => "up",
                State::Waiting => "waiting",
                State::Unusable => "unusable",
            }
            .to_owned(),
            problem: self.problem.clone(),
            ports: self.ports.iter().map(range).collect(),
        }
    }
}

/// The host's sockets, by a socket that is opened when it is first needed.
fn listeners(sockets: &mut Option<SocketDiag>) -> Result<Vec<Listener>, NetError> {
    let open = match sockets.take() {
        Some(open) => open,
        None => SocketDiag::open()?,
    };
    sockets.insert(open).listeners()
}

/// A forward with ports of its own: usable unless the host uses one of them, and has
/// since before it was in force.
fn fixed(forward: &Forward, before: &[Ports], listeners: &[Listener]) -> Followed {
    let taken = taken_by_host(forward, listeners);
    match taken.filter(|_| before.is_empty()) {
        Some(taken) => {
            Followed { unusable: true, problem: Some(taken_text(&taken)), ports: Vec::new() }
        }
        None => Followed {
            unusable: false,
            problem: taken.map(|taken| format!("{}, which gets nothing", taken_text(&taken))),
            ports: forward.fixed().into_iter().collect(),
        },
    }
}

fn taken_text(taken: &Listener) -> String {
    format!("{} port {} is in use by a program of this host's", taken.transport, taken.port)
}

/// Whether a port of the host's that `forward` could take is one of its own.
fn is_hosts(forward: &Forward, ports: Ports, listeners: &[Listener]) -> bool {
    let as_fixed = Forward {
        transport: Some(ports.transport),
        ports: Which::Fixed { first: ports.first, last: ports.last, to_first: ports.first },
        ..forward.clone()
    };
    taken_by_host(&as_fixed, listeners).is_some()
}

/// Whether one port could lead to a guest by `forward`, beside what is `taken`.
fn is_free(forward: &Forward, ports: Ports, taken: &[(Option<IpAddr>, Ports)]) -> bool {
    let meets = |(bind, other): &(Option<IpAddr>, Ports)| {
        let same_address = forward.bind.is_none() || bind.is_none() || forward.bind == *bind;
        same_address && ports.meets(*other)
    };
    !taken.iter().any(meets)
}

/// Has the kernel ask the new rules about UDP to this host's ports that one of the two
/// lists has and the other has not.
fn renew_flows(before: &[PortForward], now: &[PortForward]) -> Result<(), NetError> {
    let only_in = |some: &[PortForward], others: &[PortForward]| {
        let gone = some.iter().filter(|forward| !others.contains(forward));
        gone.map(|forward| forward.ports).collect::<Vec<_>>()
    };
    let mut changed = only_in(before, now);
    changed.extend(only_in(now, before));
    changed.retain(|ports| ports.transport == Transport::Udp);
    if changed.is_empty() {
        return Ok(());
    }
    let own = Netlink::open()?.addresses(None)?;
    let forgotten = Conntrack::open()?.forget(Transport::Udp, |connection| {
        changed.iter().any(|ports| (ports.first..=ports.last).contains(&connection.port))
            && own.iter().any(|entry| entry.net.addr() == IpAddr::V4(connection.destination))
    })?;
    tracing::debug!(forgotten, "UDP under way is asked for anew");
    Ok(())
}

fn may_change(caller: Caller) -> Result<(), Failure> {
    if caller.administers {
        return Ok(());
    }
    Err(Failure::new(
        "denied",
        "only root and members of group conet add and remove forwards",
        "ask one of them",
    ))
}
