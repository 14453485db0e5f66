//! DHCP for a guest whose address is known: question in, answer out.
//!
//! A guest is offered one of its own addresses, the one that it asks for if that is its
//! own. Where it means to have another it hears NAK, and begins anew.
//!
//! Sources: RFC 2131 §4.3, RFC 2132, RFC 3442, RFC 4039, RFC 6842; the layout is smoltcp's
//! (`wire::dhcpv4`).

use std::net::Ipv4Addr;

use conet_dataplane::DropReason;
use conet_wire::ip::is_unicast;
use smoltcp::wire::{DhcpOption, DhcpOptionWriter, DhcpPacket};

use super::{LEASE, Lease};

/// `op` (RFC 2131 §2).
const REQUEST: u8 = 1;
const REPLY: u8 = 2;
const COOKIE: u32 = 0x6382_5363;
/// Bytes before the options, the cookie included.
const HEADER: usize = 240;
/// No answer is shorter: clients of BOOTP have a buffer of that size (RFC 1542 §2.1).
const SHORTEST: usize = 300;
/// None is longer: what every client takes, 576 bytes less headers (RFC 2131 §2).
const LONGEST: usize = 548;

/// Codes of RFC 2132, RFC 4039 and RFC 3442.
mod code {
    pub(super) const NETMASK: u8 = 1;
    pub(super) const ROUTER: u8 = 3;
    pub(super) const DNS: u8 = 6;
    pub(super) const MTU: u8 = 26;
    pub(super) const REQUESTED: u8 = 50;
    pub(super) const LEASE_TIME: u8 = 51;
    pub(super) const KIND: u8 = 53;
    pub(super) const SERVER: u8 = 54;
    pub(super) const RENEWAL: u8 = 58;
    pub(super) const REBINDING: u8 = 59;
    pub(super) const CLIENT: u8 = 61;
    pub(super) const RAPID: u8 = 80;
    pub(super) const ROUTES: u8 = 121;
}

/// What a message is (RFC 2132 §9.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Discover = 1,
    Offer = 2,
    Request = 3,
    Decline = 4,
    Ack = 5,
    Nak = 6,
    Release = 7,
    Inform = 8,
}

/// An answer, written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) len: usize,
    /// The guest's address, or everybody's.
    pub(super) to: Ipv4Addr,
}

/// What is looked at of a question's options; the first of each counts.
#[derive(Debug, Default)]
struct Options<'a> {
    kind: Option<Kind>,
    server: Option<Ipv4Addr>,
    requested: Option<Ipv4Addr>,
    client: Option<&'a [u8]>,
    is_rapid: bool,
}

impl<'a> Options<'a> {
    fn read(options: impl Iterator<Item = DhcpOption<'a>>) -> Self {
        let mut read = Self::default();
        for DhcpOption { kind: code, data } in options {
            let address = || data.try_into().ok().map(|octets: [u8; 4]| Ipv4Addr::from(octets));
            match code {
                code::KIND => read.kind = read.kind.or_else(|| kind_of(data)),
                code::SERVER => read.server = read.server.or_else(address),
                code::REQUESTED => read.requested = read.requested.or_else(address),
                code::CLIENT => read.client = read.client.or(Some(data)),
                code::RAPID => read.is_rapid = true,
                _ => {}
            }
        }
        read
    }
}

fn kind_of(data: &[u8]) -> Option<Kind> {
    match data {
        [1] => Some(Kind::Discover),
        [3] => Some(Kind::Request),
        [4] => Some(Kind::Decline),
        [7] => Some(Kind::Release),
        [8] => Some(Kind::Inform),
        _ => None,
    }
}

/// Answers a question by `server`, into `room`.
///
/// # Errors
/// [`DropReason::Malformed`] for what is no question of a client's,
/// [`DropReason::NotUnicast`] for what wants no answer of ours.
pub(super) fn answer(
    lease: &Lease,
    server: Ipv4Addr,
    question: &[u8],
    room: &mut [u8],
) -> Result<Reply, DropReason> {
    let asked = DhcpPacket::new_checked(question).map_err(|_| DropReason::Malformed)?;
    let options = Options::read(asked.options());
    let is_clients = u8::from(asked.opcode()) == REQUEST
        && asked.magic_number() == COOKIE
        && asked.relay_agent_ip().is_unspecified();
    let kind = options.kind.filter(|_| is_clients).ok_or(DropReason::Malformed)?;
    let first = lease.v4().next().ok_or(DropReason::NotUnicast)?;
    let own = |address: &Ipv4Addr| lease.v4().any(|own| own == *address);
    let has = Some(asked.client_ip()).filter(|address| !address.is_unspecified());
    // RFC 2131 §4.3.2: asked for when it chooses or boots again, had when it renews.
    let wants = options.requested.or(has);
    let rapid = kind == Kind::Discover && options.is_rapid;
    let (kind, given) = match kind {
        Kind::Discover => {
            let kind = if rapid { Kind::Ack } else { Kind::Offer };
            (kind, options.requested.filter(own).unwrap_or(first))
        }
        // It has chosen another server, of which it cannot have heard by us.
        Kind::Request if options.server.is_some_and(|chosen| chosen != server) => {
            return Err(DropReason::NotUnicast);
        }
        Kind::Request => match wants.filter(own) {
            Some(address) => (Kind::Ack, address),
            None => (Kind::Nak, Ipv4Addr::UNSPECIFIED),
        },
        // It has an address and asks for the rest; which, is its affair.
        Kind::Inform if has.is_some_and(|address| is_unicast(address.into())) => {
            (Kind::Ack, Ipv4Addr::UNSPECIFIED)
        }
        Kind::Inform => return Err(DropReason::Malformed),
        // Its addresses stay its own.
        Kind::Decline | Kind::Release => return Err(DropReason::NotUnicast),
        Kind::Offer | Kind::Ack | Kind::Nak => return Err(DropReason::Malformed),
    };
    let room = room.get_mut(..LONGEST).ok_or(DropReason::TooBig)?;
    let len = write(lease, server, question, (kind, given), (options.client, rapid), room)
        .ok_or(DropReason::TooBig)?;
    let to = match has {
        // RFC 2131 §4.1; a NAK is for whoever hears it, since the address is not good.
        _ if kind == Kind::Nak => Ipv4Addr::BROADCAST,
        Some(address) => address,
        None if asked.flags().bits() & 0x8000 != 0 => Ipv4Addr::BROADCAST,
        None => given,
    };
    Ok(Reply { len, to })
}

/// Writes the answer; its length.
fn write(
    lease: &Lease,
    server: Ipv4Addr,
    question: &[u8],
    (kind, given): (Kind, Ipv4Addr),
    (client, rapid): (Option<&[u8]>, bool),
    room: &mut [u8],
) -> Option<usize> {
    room.fill(0);
    // Transaction, flags, and the client's address and card are repeated.
    room.get_mut(..HEADER)?.copy_from_slice(question.get(..HEADER)?);
    let mut packet = DhcpPacket::new_unchecked(&mut *room);
    packet.set_opcode(REPLY.into());
    packet.set_hops(0);
    packet.set_secs(0);
    packet.set_your_ip(given);
    packet.set_server_ip(Ipv4Addr::UNSPECIFIED);
    if kind == Kind::Nak {
        packet.set_client_ip(Ipv4Addr::UNSPECIFIED);
    }
    packet.set_sname_and_boot_file_to_zero();
    let mut out = Writer { writer: packet.options_mut(), len: HEADER };
    out.put(code::KIND, &[kind as u8])?;
    out.put(code::SERVER, &server.octets())?;
    if let Some(client) = client {
        out.put(code::CLIENT, client)?;
    }
    if kind != Kind::Nak {
        if rapid {
            out.put(code::RAPID, &[])?;
        }
        if !given.is_unspecified() {
            let seconds = u32::try_from(LEASE.as_secs()).ok()?;
            out.put(code::LEASE_TIME, &seconds.to_be_bytes())?;
            out.put(code::RENEWAL, &(seconds / 2).to_be_bytes())?;
            out.put(code::REBINDING, &(seconds / 8 * 7).to_be_bytes())?;
        }
        network(lease, server, given, &mut out)?;
    }
    out.writer.end().ok()?;
    Some((out.len + 1).max(SHORTEST))
}

/// Netmask, routes, MTU and resolvers.
fn network(lease: &Lease, router: Ipv4Addr, given: Ipv4Addr, out: &mut Writer<'_>) -> Option<()> {
    let mask = u32::MAX.checked_shl(32 - u32::from(lease.prefix.min(32))).unwrap_or(0);
    out.put(code::NETMASK, &mask.to_be_bytes())?;
    out.put(code::ROUTER, &router.octets())?;
    let of = if given.is_unspecified() { lease.v4().next()? } else { given };
    if u32::from(of) & mask != u32::from(router) & mask {
        // Beyond the netmask, so on the link by a route of its own; who knows this
        // option disregards the router's (RFC 3442).
        let mut routes = vec![32];
        routes.extend(router.octets());
        routes.extend([0; 4]);
        routes.push(0);
        routes.extend(router.octets());
        out.put(code::ROUTES, &routes)?;
    }
    out.put(code::MTU, &lease.mtu.to_be_bytes())?;
    let resolvers: Vec<u8> = lease.dns_v4().flat_map(|address| address.octets()).collect();
    if !resolvers.is_empty() {
        out.put(code::DNS, &resolvers)?;
    }
    Some(())
}

/// Options, one behind the other, and where they end.
struct Writer<'a> {
    writer: DhcpOptionWriter<'a>,
    len: usize,
}

impl Writer<'_> {
    fn put(&mut self, kind: u8, data: &[u8]) -> Option<()> {
        self.writer.emit(DhcpOption { kind, data }).ok()?;
        self.len += 2 + data.len();
        Some(())
    }
}
