//! DHCPv6 for a guest whose addresses are known: question in, answer out.
//!
//! All of a guest's IPv6 addresses are in its first association for addresses; others,
//! temporary addresses and prefixes it has none.
//!
//! The layout is read and written here: of the crates that have it, dhcproto (0.15) panics
//! at a status of one byte where arithmetic is checked, and recurses as deeply as options
//! are nested. Here nothing is nested deeper than an address in its association.
//!
//! Invariants: an association's parts are read to its end and not beyond; an answer has at
//! most [`MOST`] associations and as many addresses in each.
//!
//! Sources: RFC 8415 §16, §18.3, §21; RFC 3646.

use std::net::Ipv6Addr;

use conet_dataplane::DropReason;
use conet_netsys::MacAddr;

use super::{LEASE, Lease};

/// All DHCP relays and servers (RFC 8415 §7.1).
pub(super) const SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
/// Associations of a question that are answered, and addresses of each.
const MOST: usize = 4;
/// Longest identifier of a client, its type included (RFC 8415 §11.1).
const LONGEST_ID: usize = 130;
/// Type and transaction.
const HEADER: usize = 4;
/// Identifier and two times; an address and two times.
const ASSOCIATION: usize = 12;
const ADDRESS: usize = 24;

/// Kinds of messages (RFC 8415 §7.3).
mod kind {
    pub(super) const SOLICIT: u8 = 1;
    pub(super) const ADVERTISE: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const CONFIRM: u8 = 4;
    pub(super) const RENEW: u8 = 5;
    pub(super) const REBIND: u8 = 6;
    pub(super) const REPLY: u8 = 7;
    pub(super) const RELEASE: u8 = 8;
    pub(super) const DECLINE: u8 = 9;
    pub(super) const INFORMATION: u8 = 11;
}

/// Codes of options (RFC 8415 §24, RFC 3646).
mod code {
    pub(super) const CLIENT: u16 = 1;
    pub(super) const SERVER: u16 = 2;
    pub(super) const ADDRESSES: u16 = 3;
    pub(super) const TEMPORARY: u16 = 4;
    pub(super) const ADDRESS: u16 = 5;
    pub(super) const PREFERENCE: u16 = 7;
    pub(super) const STATUS: u16 = 13;
    pub(super) const RAPID: u16 = 14;
    pub(super) const DNS: u16 = 23;
    pub(super) const PREFIXES: u16 = 25;
}

/// Status codes (RFC 8415 §21.13).
mod status {
    pub(super) const SUCCESS: u16 = 0;
    pub(super) const NO_ADDRESSES: u16 = 2;
    pub(super) const NOT_ON_LINK: u16 = 4;
    pub(super) const NO_PREFIXES: u16 = 6;
}

/// Options, one behind the other, as far as they are whole.
fn options(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (&[a, b, c, d], rest) = bytes.split_first_chunk()?;
        let len = usize::from(u16::from_be_bytes([c, d]));
        let data = rest.get(..len)?;
        bytes = rest.get(len..)?;
        Some((u16::from_be_bytes([a, b]), data))
    })
}

/// An association of a question's.
#[derive(Debug, Clone, Copy)]
struct Association<'a> {
    code: u16,
    id: [u8; 4],
    parts: &'a [u8],
}

impl<'a> Association<'a> {
    fn read(code: u16, data: &'a [u8]) -> Option<Self> {
        let head = if code == code::TEMPORARY { 4 } else { ASSOCIATION };
        Some(Self { code, id: *data.first_chunk()?, parts: data.get(head..)? })
    }

    /// The addresses that the client says are in it.
    fn addresses(&self) -> impl Iterator<Item = Ipv6Addr> {
        options(self.parts).filter(|(code, _)| *code == code::ADDRESS).filter_map(|(_, data)| {
            data.get(..ADDRESS)?.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets))
        })
    }
}

/// What is looked at of a question; of single options the first counts.
#[derive(Debug)]
struct Question<'a> {
    kind: u8,
    transaction: [u8; 3],
    client: Option<&'a [u8]>,
    server: Option<&'a [u8]>,
    is_rapid: bool,
    associations: Vec<Association<'a>>,
}

impl<'a> Question<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let (&[kind, a, b, c], rest) = bytes.split_first_chunk::<HEADER>()?;
        let mut read = Self {
            kind,
            transaction: [a, b, c],
            client: None,
            server: None,
            is_rapid: false,
            associations: Vec::new(),
        };
        for (code, data) in options(rest) {
            match code {
                code::CLIENT => read.client = read.client.or(Some(data)),
                code::SERVER => read.server = read.server.or(Some(data)),
                code::RAPID => read.is_rapid = true,
                code::ADDRESSES | code::TEMPORARY | code::PREFIXES
                    if read.associations.len() < MOST =>
                {
                    read.associations.push(Association::read(code, data)?);
                }
                _ => {}
            }
        }
        Some(read)
    }

    /// Whether it has what its kind is to have (RFC 8415 §16), for `server`.
    fn is_for(&self, server: &[u8]) -> bool {
        let is_client = self.client.is_some_and(|id| (3..=LONGEST_ID).contains(&id.len()));
        let is_ours = self.server == Some(server);
        match self.kind {
            kind::SOLICIT | kind::CONFIRM | kind::REBIND => is_client && self.server.is_none(),
            kind::REQUEST | kind::RENEW | kind::RELEASE | kind::DECLINE => is_client && is_ours,
            kind::INFORMATION => {
                (is_client || self.client.is_none())
                    && (is_ours || self.server.is_none())
                    && self.associations.is_empty()
            }
            _ => false,
        }
    }
}

/// Our identifier: that of an Ethernet address (RFC 8415 §11.4), the same on every host, so
/// that a guest that has moved finds its server again.
fn identifier(ours: MacAddr) -> [u8; 10] {
    let [a, b, c, d, e, f] = ours.0;
    [0, 3, 0, 1, a, b, c, d, e, f]
}

/// Answers a question, into `room`; the answer's length.
///
/// # Errors
/// [`DropReason::Malformed`] for what is no question of a client's to us,
/// [`DropReason::NotUnicast`] for what is to have no answer.
pub(super) fn answer(
    lease: &Lease,
    ours: MacAddr,
    question: &[u8],
    room: &mut [u8],
) -> Result<usize, DropReason> {
    let server = identifier(ours);
    let asked = Question::read(question).filter(|asked| asked.is_for(&server));
    let asked = asked.ok_or(DropReason::Malformed)?;
    let is_own = |address| lease.v6().any(|own| own == address);
    let mut of_client = asked.associations.iter().flat_map(Association::addresses).peekable();
    // RFC 8415 §18.3.3.
    if asked.kind == kind::CONFIRM && of_client.peek().is_none() {
        return Err(DropReason::NotUnicast);
    }
    let is_on_link = of_client.all(is_own);
    let commits = asked.kind == kind::SOLICIT && asked.is_rapid;
    let advertises = asked.kind == kind::SOLICIT && !commits;
    let mut out = Writer { room, at: 0 };
    let mut write = || {
        out.bytes(&[if advertises { kind::ADVERTISE } else { kind::REPLY }])?;
        out.bytes(&asked.transaction)?;
        out.option(code::SERVER, &[&server])?;
        if let Some(client) = asked.client {
            out.option(code::CLIENT, &[client])?;
        }
        if advertises {
            // There is no other server to wait for.
            out.option(code::PREFERENCE, &[&[255]])?;
        }
        if commits {
            out.option(code::RAPID, &[])?;
        }
        match asked.kind {
            kind::CONFIRM if !is_on_link => out.status(status::NOT_ON_LINK)?,
            kind::CONFIRM | kind::RELEASE | kind::DECLINE => out.status(status::SUCCESS)?,
            kind::INFORMATION => {}
            _ => associations(lease, &asked, &mut out)?,
        }
        let resolvers: Vec<u8> = lease.dns_v6().flat_map(|address| address.octets()).collect();
        if !resolvers.is_empty() {
            out.option(code::DNS, &[&resolvers])?;
        }
        Some(())
    };
    write().ok_or(DropReason::TooBig)?;
    Ok(out.at)
}

/// Fills the associations that were asked for.
fn associations(lease: &Lease, asked: &Question<'_>, out: &mut Writer<'_>) -> Option<()> {
    let seconds = u32::try_from(LEASE.as_secs()).ok()?;
    let times = |a: u32, b: u32| [a.to_be_bytes(), b.to_be_bytes()].concat();
    let mut is_first = true;
    for association in &asked.associations {
        let mut parts = Writer { room: &mut [0; 256], at: 0 };
        let has_addresses = association.code == code::ADDRESSES;
        if has_addresses && is_first {
            is_first = false;
            for own in lease.v6().take(MOST) {
                let life = times(seconds, 2 * seconds);
                parts.option(code::ADDRESS, &[&own.octets(), &life])?;
            }
            // What it may not have any more (RFC 8415 §18.3.4).
            let others = association.addresses().filter(|one| lease.v6().all(|own| own != *one));
            for other in others.take(MOST) {
                parts.option(code::ADDRESS, &[&other.octets(), &[0; 8]])?;
            }
        } else {
            let is_prefix = association.code == code::PREFIXES;
            parts.status(if is_prefix { status::NO_PREFIXES } else { status::NO_ADDRESSES })?;
        }
        let filled = parts.room.get(..parts.at)?;
        // When to renew here, when with anybody; temporary ones have no such times.
        let head = match association.code {
            code::TEMPORARY => Vec::new(),
            code::ADDRESSES => times(seconds / 2, seconds / 5 * 4),
            _ => vec![0; 8],
        };
        out.option(association.code, &[&association.id, &head, filled])?;
    }
    Some(())
}

/// Writes into a room that may end.
struct Writer<'a> {
    room: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> Option<()> {
        self.room.get_mut(self.at..self.at + bytes.len())?.copy_from_slice(bytes);
        self.at += bytes.len();
        Some(())
    }

    fn option(&mut self, code: u16, parts: &[&[u8]]) -> Option<()> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        self.bytes(&code.to_be_bytes())?;
        self.bytes(&u16::try_from(len).ok()?.to_be_bytes())?;
        parts.iter().try_for_each(|part| self.bytes(part))
    }

    /// A status without a text.
    fn status(&mut self, status: u16) -> Option<()> {
        self.option(code::STATUS, &[&status.to_be_bytes()])
    }
}
