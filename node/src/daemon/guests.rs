//! The node's guests: those of the configuration, and those added at run time.
//!
//! ```text
//!            add                        remove
//! (nothing) ────► Adding ────► Up ────► Removing ────► (nothing)
//!                   │ failed             │ failed, or programs run in it
//!                   ▼                    ▼
//!                (nothing)           Unusable | Up
//! ```
//!
//! The kernel makes and removes guests on a thread of their own, which posts a
//! [`GuestEvent`]; the table belongs to the control thread. What was added is in the
//! state directory before it is made and until it is gone, so that whichever step a
//! crash hits, the next daemon finds the guest, or finishes its removal.
//!
//! The configuration goes first: an added guest that has come to contradict it is
//! kept as *unusable*, with the reason, until it is removed or fits again. One of
//! the configuration's that cannot be attached ends the daemon's start; one that was
//! added does not.
//!
//! At the daemon's end guests in which nothing runs are removed, and made again by
//! the next one.

mod attach;
mod gate;
mod record;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use conet_dataplane::{DropCounts, DropReason};
use conet_hostinject::{GuestLink, GuestPort, Rates, machine_mac};
use conet_netsys::{IfName, Netlink, Netns, NetnsName};
use conet_tunnel::DEFAULT_MTU;
use conet_wire::control::{self, Failure, Response};

pub(super) use attach::GuestError;
pub use attach::SERVER_COMMAND;
use attach::{Removal, attach, create, remove, remove_rest};
pub(super) use gate::Piece;
use record::{Record, load, rate_texts, rates_of, save};

use crate::caller::Caller;
use crate::config::{Config, GuestConfig, GuestKind, is_name};
use crate::control::Responder;

/// What a thread that worked on a guest has to say.
#[derive(Debug)]
pub(super) enum GuestEvent {
    /// A guest was made, or not.
    Made { name: String, made: Result<GuestPort, GuestError>, answer: Responder },
    /// A guest was removed, or not.
    Removed { name: String, removal: Removal, answer: Responder },
}

/// Tells the control thread.
pub(super) type Post = Arc<dyn Fn(GuestEvent) + Send + Sync>;

/// Who asked for a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Config,
    Added,
}

enum State {
    /// A thread makes it.
    Adding,
    Up(GuestPort),
    /// A thread removes it.
    Removing,
    /// It is in the state directory only, for this reason.
    Unusable(String),
}

struct Guest {
    config: GuestConfig,
    origin: Origin,
    state: State,
}

/// All guests of the node.
pub(super) struct Guests {
    config: Arc<Config>,
    file: PathBuf,
    guests: Vec<Guest>,
    /// Packets that somebody is about to give to one of them.
    pieces: Option<gate::Pieces>,
    /// Packets that were taken out of one, and may not have arrived anywhere.
    drained: Option<gate::Drained>,
    post: Post,
}

impl fmt::Debug for Guests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guests").field("file", &self.file).finish_non_exhaustive()
    }
}

impl Guests {
    /// Attaches the configuration's guests, and those that were added to an earlier
    /// daemon, in the calling thread's network namespace as their host.
    pub(super) fn start(config: Arc<Config>, post: Post) -> Result<Self, GuestError> {
        let file = config.node.state_dir.join(record::FILE);
        let mut all = Self { config, file, guests: Vec::new(), pieces: None, drained: None, post };
        for guest in all.config.guests.clone() {
            match attach(&all.config, &guest) {
                Ok(port) => all.push(guest, Origin::Config, State::Up(port)),
                Err(error) => {
                    all.release();
                    return Err(error);
                }
            }
        }
        for record in load(&all.file) {
            all.restore(record);
        }
        all.store_or_warn();
        Ok(all)
    }

    fn push(&mut self, config: GuestConfig, origin: Origin, state: State) {
        self.guests.push(Guest { config, origin, state });
    }

    /// Takes over a guest that was added earlier, or finishes its removal.
    fn restore(&mut self, record: Record) {
        let is_going = record.is_going;
        let guest = match record.guest() {
            Ok(guest) => guest,
            Err(error) => {
                return tracing::error!(%error, "a guest of the state directory is forgotten");
            }
        };
        let twin = self.guests.iter().any(|other| other.config.name == guest.name);
        if twin {
            return tracing::warn!(guest = guest.name, "added, and now of conet.toml: that counts");
        }
        let problem = match self.check(&guest) {
            Err(failure) => failure.to_string(),
            Ok(()) if is_going => match remove_rest(&self.config, &guest) {
                // Programs came to run in it meanwhile: it stays.
                Removal::Busy(..) => return self.restore(Record::of(&guest, false)),
                Removal::Gone => return,
                Removal::Failed(error) => error.to_string(),
            },
            Ok(()) => match attach(&self.config, &guest) {
                Ok(port) => return self.push(guest, Origin::Added, State::Up(port)),
                Err(error) => super::start::chain(&error),
            },
        };
        tracing::error!(guest = guest.name, problem, "an added guest cannot be used");
        self.push(guest, Origin::Added, State::Unusable(problem));
    }

    /// What the command line is told; `spoofed` is what rules have dropped, by link.
    pub(super) fn list(&mut self, spoofed: &BTreeMap<String, u64>) -> Vec<control::Guest> {
        let config = Arc::clone(&self.config);
        let of = |guest: &Guest| spoofed.get(&guest.config.name).copied().unwrap_or(0);
        self.guests.iter_mut().map(|guest| guest.row(&config, of(guest))).collect()
    }

    /// Makes a guest.
    pub(super) fn add(
        &mut self,
        caller: Caller,
        name: String,
        kind: &str,
        (addresses, rates, queues): (Vec<IpAddr>, &control::GuestRates, Option<u16>),
        answer: Responder,
    ) {
        let begun = may_change(caller).and_then(|()| self.plan(name, kind, addresses, rates));
        let begun = begun.and_then(|guest| with_queues(guest, queues));
        // Before the rules take a link of that name for a guest's.
        let begun = begun.and_then(|guest| is_nobodys(&guest.name).map(|()| guest));
        let begun = begun.and_then(|guest| {
            self.push(guest.clone(), Origin::Added, State::Adding);
            self.store().inspect_err(|_| drop(self.guests.pop())).map(|()| guest)
        });
        let guest = match begun {
            Ok(guest) => guest,
            Err(failure) => return answer.answer(Err(failure)),
        };
        let (config, post) = (Arc::clone(&self.config), Arc::clone(&self.post));
        let name = guest.name.clone();
        // Where the thread does not start, its closure drops the answer, which tells
        // the client; the guest is taken back here.
        let started = spawn(move || {
            let made = create(&config, &guest);
            post(GuestEvent::Made { name: guest.name, made, answer });
        });
        if !started {
            self.forget(&name);
        }
    }

    /// The guest that somebody wants, with an address.
    fn plan(
        &self,
        name: String,
        kind: &str,
        mut addresses: Vec<IpAddr>,
        rates: &control::GuestRates,
    ) -> Result<GuestConfig, Failure> {
        let kind = kind.parse::<GuestKind>().map_err(|error| {
            Failure::new("bad-kind", format!("{kind:?} is {error}"), "see conet guest add --help")
        })?;
        if kind == GuestKind::Colinux {
            let message = "a guest in place of coLinux needs the line of its card";
            return Err(Failure::new("bad-kind", message, "write it into conet.toml, with line ="));
        }
        if addresses.is_empty() {
            addresses = self.free_addresses(kind);
        }
        let rates = read_rates(kind, rates)?;
        let guest = GuestConfig { name, kind, addresses, rates, line: None, queues: 1 };
        self.check(&guest)?;
        Ok(guest)
    }

    /// Addresses that no guest has, one of each of the overlay's families.
    fn free_addresses(&self, kind: GuestKind) -> Vec<IpAddr> {
        let taken: BTreeSet<_> =
            self.guests.iter().flat_map(|guest| guest.config.addresses.iter().copied()).collect();
        self.config.node.overlay.free(kind.is_machine(), |address| taken.contains(&address))
    }

    /// Whether a guest may be added beside those that there are.
    fn check(&self, guest: &GuestConfig) -> Result<(), Failure> {
        let (name, node) = (guest.name.as_str(), &self.config.node);
        if !is_name(name) || name.len() > 15 || name == "home" {
            return Err(Failure::new(
                "bad-name",
                format!("{name:?} is no name for a guest"),
                "give 1 to 15 letters, digits, `.`, `_` or `-`, the first a letter or digit, \
                 and not `home`",
            ));
        }
        let bearer = if node.name == name {
            Some("this node")
        } else if self.config.peer(name).is_some() {
            Some("a peer")
        } else if self.guests.iter().any(|other| other.config.name == name) {
            Some("a guest")
        } else {
            None
        };
        if let Some(bearer) = bearer {
            let message = format!("{name} is already the name of {bearer}");
            return Err(Failure::new("exists", message, "give another name"));
        }
        if guest.addresses.is_empty() {
            let message = format!("no address of {} is free", node.overlay);
            return Err(Failure::new("full", message, "remove a guest: conet guest remove NAME"));
        }
        for (index, address) in guest.addresses.iter().enumerate() {
            self.check_address(*address)?;
            if guest.addresses[..index].contains(address) {
                let message = format!("{address} is given twice");
                return Err(Failure::new("bad-address", message, "give each address once"));
            }
        }
        Ok(())
    }

    fn check_address(&self, address: IpAddr) -> Result<(), Failure> {
        let node = &self.config.node;
        if let Some(remedy) = node.overlay.refuses_guest_at(address) {
            let message = format!("{address} is not a guest's address in overlay {}", node.overlay);
            return Err(Failure::new("bad-address", message, remedy));
        }
        match self.guests.iter().find(|other| other.config.addresses.contains(&address)) {
            Some(other) => {
                let message = format!("{address} is the address of guest {}", other.config.name);
                Err(Failure::new("exists", message, "give another, or none to be given one"))
            }
            None => Ok(()),
        }
    }

    fn no_such(&self, name: &str) -> Failure {
        let known: Vec<_> = self.guests.iter().map(|guest| guest.config.name.as_str()).collect();
        let known = if known.is_empty() { "there is none".into() } else { known.join(", ") };
        Failure::new(
            "no-such-guest",
            format!("no guest is named {name}"),
            format!("see conet guest list ({known})"),
        )
    }

    /// Removes a guest that was added.
    pub(super) fn remove(&mut self, caller: Caller, name: &str, answer: Responder) {
        if let Err(failure) = may_change(caller).and_then(|()| self.removable(name)) {
            return answer.answer(Err(failure));
        }
        let Some(guest) = self.guests.iter_mut().find(|guest| guest.config.name == name) else {
            return;
        };
        let before = std::mem::replace(&mut guest.state, State::Removing);
        let guest = guest.config.clone();
        if let Err(failure) = self.store() {
            self.set(name, before);
            return answer.answer(Err(failure));
        }
        let (config, post) = (Arc::clone(&self.config), Arc::clone(&self.post));
        let (name, asked) = (name.to_owned(), name.to_owned());
        let started = spawn(move || {
            let removal = match before {
                State::Up(port) => remove(port),
                _ => remove_rest(&config, &guest),
            };
            post(GuestEvent::Removed { name, removal, answer });
        });
        if !started {
            // Its port was dropped with the closure: it is found again by name.
            self.set(&asked, State::Unusable("no thread could be started".to_owned()));
        }
    }

    /// Whether a guest may be removed now.
    fn removable(&self, name: &str) -> Result<(), Failure> {
        let Some(guest) = self.guests.iter().find(|guest| guest.config.name == name) else {
            return Err(self.no_such(name));
        };
        match (guest.origin, &guest.state) {
            (Origin::Config, _) => Err(Failure::new(
                "configured",
                format!("{name} is a guest of conet.toml"),
                "take it out there and start the daemon anew",
            )),
            (_, State::Adding | State::Removing) => Err(Failure::new(
                "busy",
                format!("{name} is being made or removed"),
                "try again when that is done",
            )),
            _ => Ok(()),
        }
    }

    /// A thread has done what it could.
    pub(super) fn handle_event(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::Made { name, made: Ok(port), answer } => {
                tracing::info!(guest = name, "guest added");
                self.set(&name, State::Up(port));
                let config = Arc::clone(&self.config);
                let row = self.guests.iter_mut().find(|guest| guest.config.name == name);
                if let Some(guest) = row {
                    answer.answer(Ok(Response::Guest(guest.row(&config, 0))));
                }
            }
            GuestEvent::Made { name, made: Err(error), answer } => {
                self.forget(&name);
                let message = super::start::chain(&error);
                let remedy = "see conet doctor, and the daemon's log";
                answer.answer(Err(Failure::new("attach", message, remedy)));
            }
            GuestEvent::Removed { name, removal: Removal::Gone, answer } => {
                tracing::info!(guest = name, "guest removed");
                self.forget(&name);
                answer.answer(Ok(Response::Done {}));
            }
            GuestEvent::Removed { name, removal: Removal::Busy(port, pids), answer } => {
                let state = match port {
                    Some(port) => State::Up(port),
                    None => State::Unusable("programs run in it".to_owned()),
                };
                self.set(&name, state);
                self.store_or_warn();
                let pids: Vec<_> = pids.iter().take(10).map(u32::to_string).collect();
                let message = format!("programs run in {name}: {}", pids.join(", "));
                answer.answer(Err(Failure::new("busy", message, "end them, then try again")));
            }
            GuestEvent::Removed { name, removal: Removal::Failed(error), answer } => {
                let message = super::start::chain(&error);
                self.set(&name, State::Unusable(message.clone()));
                answer.answer(Err(Failure::new("remove", message, "try again")));
            }
        }
    }

    /// Links at the host's end of all guests, also of those that are being made or
    /// removed. One that cannot be used may be alive still, from an earlier daemon: then
    /// its namespace is there. A link of such a name alone is somebody else's.
    pub(super) fn links(&self) -> Vec<GuestLink> {
        let guests = self.guests.iter().filter(|guest| {
            let namespace = NetnsName::new(&guest.config.name);
            !matches!(guest.state, State::Unusable(_))
                || namespace.is_ok_and(|name| Netns::exists(&name))
        });
        let link = |guest: &Guest| {
            let addresses = guest.config.addresses.clone();
            Some(GuestLink { link: IfName::new(&guest.config.name).ok()?, addresses })
        };
        guests.filter_map(link).collect()
    }

    /// A guest's addresses, in whatever state it is.
    pub(super) fn addresses(&self, name: &str) -> Option<&[IpAddr]> {
        let guest = self.guests.iter().find(|guest| guest.config.name == name)?;
        Some(&guest.config.addresses)
    }

    /// A guest that is there, and its first IPv4 address.
    pub(super) fn up(&self, name: &str) -> Option<(&GuestPort, IpAddr)> {
        let guest = self.guests.iter().find(|guest| guest.config.name == name)?;
        match &guest.state {
            State::Up(port) => {
                let mut addresses = guest.config.addresses.iter();
                Some((port, *addresses.find(|address| address.is_ipv4())?))
            }
            _ => None,
        }
    }

    /// Removes the guests in which nothing runs; the others stay for the next daemon.
    /// Says whether there are such.
    pub(super) fn release(&mut self) -> bool {
        let mut stays = false;
        for guest in self.guests.drain(..) {
            if let State::Up(port) = guest.state {
                match remove(port) {
                    Removal::Gone => tracing::info!(guest = guest.config.name, "guest removed"),
                    Removal::Busy(..) => {
                        stays = true;
                        tracing::info!(guest = guest.config.name, "it stays: programs run in it");
                    }
                    Removal::Failed(error) => {
                        tracing::warn!(guest = guest.config.name, %error, "guest not removed");
                    }
                }
            }
        }
        stays
    }

    fn set(&mut self, name: &str, state: State) {
        if let Some(guest) = self.guests.iter_mut().find(|guest| guest.config.name == name) {
            guest.state = state;
        }
    }

    fn forget(&mut self, name: &str) {
        self.guests.retain(|guest| guest.config.name != name);
        self.store_or_warn();
    }

    /// Writes what was added.
    fn store(&self) -> Result<(), Failure> {
        let added = self.guests.iter().filter(|guest| guest.origin == Origin::Added);
        let records: Vec<_> = added
            .map(|guest| Record::of(&guest.config, matches!(guest.state, State::Removing)))
            .collect();
        save(&self.file, &records).map_err(|error| {
            let message = format!("cannot write {} ({error})", self.file.display());
            Failure::new("state", message, "make room for it, or set state_dir in conet.toml")
        })
    }

    /// For changes that have happened and cannot be taken back.
    fn store_or_warn(&self) {
        if let Err(error) = self.store() {
            tracing::error!(%error, "the next daemon will not know what changed");
        }
    }
}

impl Guest {
    /// What a machine is to be started with.
    fn machine(&self, config: &Config) -> Option<control::Machine> {
        let is_machine = self.config.kind.is_machine();
        let status = match &self.state {
            State::Up(port) => port.server(),
            _ => None,
        };
        is_machine.then(|| control::Machine {
            socket: attach::server(config).socket(&self.config.name).display().to_string(),
            mac: machine_mac(&self.config.addresses).to_string(),
            mtu: DEFAULT_MTU,
            queues: self.config.queues,
            gateways: config.node.overlay.gateways().collect(),
            vmm: status.and_then(|status| status.vmm),
        })
    }

    fn row(&mut self, config: &Config, spoofed: u64) -> control::Guest {
        let mut drops = match &self.state {
            State::Up(port) => port.drops(),
            _ => DropCounts::default(),
        };
        drops[DropReason::SourceNotAllowed] += spoofed;
        let (state, problem) = match &mut self.state {
            State::Adding => ("adding", None),
            State::Removing => ("removing", None),
            State::Unusable(problem) => ("unusable", Some(problem.clone())),
            State::Up(port) => match port.is_up() {
                Ok(true) => ("up", None),
                Ok(false) => ("down", Some("its link is down or gone".to_owned())),
                Err(error) => ("down", Some(error.to_string())),
            },
        };
        control::Guest {
            name: self.config.name.clone(),
            kind: self.config.kind.as_str().to_owned(),
            address: self.config.addresses.first().map(ToString::to_string).unwrap_or_default(),
            addresses: self.config.addresses.clone(),
            origin: if self.origin == Origin::Config { "config" } else { "added" }.to_owned(),
            state: state.to_owned(),
            problem,
            drops: drops.total(),
            drop_reasons: super::by_reason([drops]),
            rates: rate_texts(self.config.rates),
            held: match &self.state {
                State::Up(port) => port.held(),
                _ => None,
            }
            .map(|(packets, bytes)| control::Held { packets, bytes }),
            line: self.config.line.as_ref().map(ToString::to_string),
            machine: self.machine(config),
        }
    }
}

/// How fast somebody wants a guest of this kind to be.
fn read_rates(kind: GuestKind, rates: &control::GuestRates) -> Result<Rates, Failure> {
    let rates = rates_of(rates).map_err(|error| {
        Failure::new("bad-rate", error.to_string(), "see conet guest add --help")
    })?;
    if kind == GuestKind::Netns && rates != Rates::default() {
        let message = "a guest by veth has nobody to limit its packets";
        return Err(Failure::new("bad-rate", message, "make it of kind tap"));
    }
    Ok(rates)
}

/// A guest with so many pairs of queues, where it can have them.
fn with_queues(mut guest: GuestConfig, queues: Option<u16>) -> Result<GuestConfig, Failure> {
    guest.queues = queues.unwrap_or(1);
    if guest.kind.may_have_queues(guest.queues) {
        return Ok(guest);
    }
    let message = format!(
        "a guest of kind {} cannot have {} pairs of queues",
        guest.kind.as_str(),
        guest.queues
    );
    Err(Failure::new("bad-queues", message, "give it 1, or up to 16 to one of kind qemu"))
}

/// Refuses the name of a link that is there.
fn is_nobodys(name: &str) -> Result<(), Failure> {
    let failed = |text: String| Failure::new("attach", text, "see conet doctor");
    let link = IfName::new(name).map_err(|error| failed(error.to_string()))?;
    let found = Netlink::open().and_then(|mut host| host.link(link));
    match found.map_err(|error| failed(super::start::chain(&error)))? {
        Some(_) => Err(Failure::new(
            "attach",
            format!("there is already a link named {name}"),
            "choose another name, or remove that first",
        )),
        None => Ok(()),
    }
}

fn may_change(caller: Caller) -> Result<(), Failure> {
    if caller.administers {
        return Ok(());
    }
    Err(Failure::new(
        "denied",
        "only root and members of group conet add and remove guests",
        "ask one of them",
    ))
}

/// Whether the thread was started.
fn spawn(work: impl FnOnce() + Send + 'static) -> bool {
    let started = thread::Builder::new().name("conet-guest".to_owned()).spawn(work);
    started.inspect_err(|error| tracing::error!(%error, "no thread for a guest")).is_ok()
}
