//! Questions written by another implementation (dhcproto), answers read by it.

use dhcproto::{Decodable, Decoder, Encodable, v4, v6};
use pnet_packet::Packet as _;
use pnet_packet::icmpv6::{Icmpv6Packet, checksum};
use pnet_packet::ipv4::Ipv4Packet;
use pnet_packet::udp::{UdpPacket, ipv4_checksum, ipv6_checksum};
use proptest::prelude::*;

use super::*;
use crate::segment::{OURS, Segment, Verdict};

const GUEST: MacAddr = MacAddr([2, 0, 10, 77, 1, 2]);
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 1);
const CLIENT: &str = "fe80::a:4dff:fe01:102";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn ip6(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

fn lease() -> Lease {
    Lease {
        addresses: vec![ADDRESS.into(), ip("10.77.1.3"), ip("fd77:1::2")],
        gateways: vec![GATEWAY.into(), ip("fd77:1::1")],
        prefix: 24,
        dns: ["9.9.9.9", "2620:fe::fe", "149.112.112.112"].map(ip).to_vec(),
        mtu: 1420,
    }
}

fn segment(lease: &Lease) -> Segment {
    Segment::new(OURS, GUEST, lease.addresses.clone()).with_services(lease.clone())
}

fn ask(lease: &Lease, frame: &[u8]) -> Result<Vec<u8>, DropReason> {
    let mut answer = [0xa5; ANSWER_MAX];
    match segment(lease).handle_frame(frame, &mut answer) {
        Verdict::Answer(len) => Ok(answer[..len].to_vec()),
        Verdict::Drop(reason) => Err(reason),
        Verdict::Packet(_) => panic!("it was passed on"),
    }
}

/// A frame of the guest's with a datagram, its checksum unfinished.
fn frame_v4([from, to]: [Ipv4Addr; 2], port: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(GUEST.0);
    frame.extend([8, 0]);
    let len = u16::try_from(28 + payload.len()).unwrap();
    let mut header = vec![0x45, 0];
    header.extend(len.to_be_bytes());
    header.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = conet_wire::ip::checksum(&header, 0);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(header);
    frame.extend(68u16.to_be_bytes());
    frame.extend(port.to_be_bytes());
    frame.extend((len - 20).to_be_bytes());
    frame.extend([0xab, 0xcd]);
    frame.extend(payload);
    frame
}

fn frame_v6(from: &str, next: u8, hops: u8, to: &str, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x33, 0x33, 0, 0, 0, 1];
    frame.extend(GUEST.0);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    frame.extend([next, hops]);
    frame.extend(ip6(from).octets());
    frame.extend(ip6(to).octets());
    frame.extend(payload);
    frame
}

fn question(kind: v4::MessageType, options: &[v4::DhcpOption]) -> v4::Message {
    let none = Ipv4Addr::UNSPECIFIED;
    let mut message = v4::Message::new_with_id(0x1234_5678, none, none, none, none, &GUEST.0);
    message.opts_mut().insert(v4::DhcpOption::MessageType(kind));
    for option in options {
        message.opts_mut().insert(option.clone());
    }
    message
}

fn dhcp_to(lease: &Lease, way: [Ipv4Addr; 2], message: &v4::Message) -> Option<v4::Message> {
    let frame = frame_v4(way, 67, &message.to_vec().unwrap());
    let answer = ask(lease, &frame).ok()?;
    // Whole and right, from its server.
    let packet = Ipv4Packet::new(&answer[14..]).unwrap();
    assert_eq!(pnet_packet::ipv4::checksum(&packet), packet.get_checksum());
    assert_eq!(packet.get_source(), GATEWAY);
    let udp = UdpPacket::new(packet.payload()).unwrap();
    let sum = ipv4_checksum(&udp, &packet.get_source(), &packet.get_destination());
    assert_eq!((udp.get_checksum(), udp.get_source(), udp.get_destination()), (sum, 67, 68));
    assert!(udp.payload().len() >= 300 && answer.len() <= 14 + 576);
    let reply = v4::Message::decode(&mut Decoder::new(udp.payload())).unwrap();
    assert_eq!((reply.opcode(), reply.xid()), (v4::Opcode::BootReply, message.xid()));
    assert_eq!(reply.chaddr(), GUEST.0);
    let is_broadcast = packet.get_destination().is_broadcast();
    assert_eq!(answer[..6] == [0xff; 6], is_broadcast);
    assert!(is_broadcast || answer[..6] == GUEST.0);
    Some(reply)
}

fn dhcp(lease: &Lease, message: &v4::Message) -> Option<v4::Message> {
    dhcp_to(lease, [Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST], message)
}

fn kind_of(message: &v4::Message) -> v4::MessageType {
    message.opts().msg_type().unwrap()
}

#[test]
fn a_guest_gets_its_address_and_all_that_belongs_to_it() {
    use v4::{DhcpOption as O, MessageType as M, OptionCode as C};
    let lease = lease();
    let client = O::ClientIdentifier(vec![1, 2, 3, 4, 5, 6, 7]);
    let offer = dhcp(&lease, &question(M::Discover, std::slice::from_ref(&client))).unwrap();
    assert_eq!((kind_of(&offer), offer.yiaddr()), (M::Offer, ADDRESS));
    assert_eq!(offer.opts().get(C::ClientIdentifier), Some(&client));
    let chosen = [O::ServerIdentifier(GATEWAY), O::RequestedIpAddress(ADDRESS)];
    let ack = dhcp(&lease, &question(M::Request, &chosen)).unwrap();
    assert_eq!((kind_of(&ack), ack.yiaddr()), (M::Ack, ADDRESS));
    for option in [
        O::ServerIdentifier(GATEWAY),
        O::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)),
        O::Router(vec![GATEWAY]),
        O::DomainNameServer(vec![[9, 9, 9, 9].into(), [149, 112, 112, 112].into()]),
        O::InterfaceMtu(1420),
        O::AddressLeaseTime(3600),
        O::Renewal(1800),
        O::Rebinding(3150),
    ] {
        let code = C::from(&option);
        assert_eq!(ack.opts().get(code), Some(&option));
    }
    assert!(ack.opts().get(C::ClasslessStaticRoute).is_none());
    // Its other address is its own too; nobody else's is.
    for (wanted, kind, given) in [
        ([10, 77, 1, 3], M::Ack, [10, 77, 1, 3]),
        ([10, 77, 1, 4], M::Nak, [0; 4]),
        ([0; 4], M::Nak, [0; 4]),
    ] {
        // It boots again, and knows no server.
        let wanted = O::RequestedIpAddress(wanted.into());
        let reply = dhcp(&lease, &question(M::Request, &[wanted])).unwrap();
        assert_eq!((kind_of(&reply), reply.yiaddr()), (kind, given.into()));
    }
    // It wants it at once (RFC 4039).
    let rapid = dhcp(&lease, &question(M::Discover, &[O::RapidCommit])).unwrap();
    assert_eq!((kind_of(&rapid), rapid.yiaddr()), (M::Ack, ADDRESS));
    assert!(rapid.opts().get(C::RapidCommit).is_some());
}

#[test]
fn a_gateway_beyond_the_netmask_has_a_route() {
    use v4::{DhcpOption as O, MessageType as M, OptionCode as C};
    let lease = Lease { prefix: 32, ..lease() };
    let ack = dhcp(&lease, &question(M::Discover, &[])).unwrap();
    assert_eq!(ack.opts().get(C::SubnetMask), Some(&O::SubnetMask(Ipv4Addr::BROADCAST)));
    let Some(O::ClasslessStaticRoute(routes)) = ack.opts().get(C::ClasslessStaticRoute) else {
        panic!("no routes: {ack}");
    };
    let shown: Vec<_> = routes.iter().map(|(to, by)| format!("{to} {by}")).collect();
    assert_eq!(shown, ["10.77.1.1/32 0.0.0.0", "0.0.0.0/0 10.77.1.1"]);
}

#[test]
fn a_lease_is_renewed_from_where_it_is_used() {
    use v4::{DhcpOption as O, MessageType as M, OptionCode as C};
    let lease = lease();
    let mut renewal = question(M::Request, &[]);
    renewal.set_ciaddr(ADDRESS);
    for way in [[ADDRESS, GATEWAY], [ADDRESS, Ipv4Addr::BROADCAST]] {
        let ack = dhcp_to(&lease, way, &renewal).unwrap();
        assert_eq!((kind_of(&ack), ack.yiaddr(), ack.ciaddr()), (M::Ack, ADDRESS, ADDRESS));
    }
    // Its address is another now.
    let moved = Lease { addresses: vec![ip("10.77.1.9")], ..lease.clone() };
    let nak = dhcp_to(&moved, [ADDRESS, GATEWAY], &renewal).unwrap();
    assert_eq!((kind_of(&nak), nak.ciaddr()), (M::Nak, Ipv4Addr::UNSPECIFIED));
    assert!(nak.opts().get(C::AddressLeaseTime).is_none());
    // It has an address, and wants the rest; an address is not lent.
    let mut inform = question(M::Inform, &[]);
    inform.set_ciaddr(ADDRESS);
    let ack = dhcp_to(&lease, [ADDRESS, GATEWAY], &inform).unwrap();
    assert_eq!((kind_of(&ack), ack.yiaddr()), (M::Ack, Ipv4Addr::UNSPECIFIED));
    assert!(ack.opts().get(C::AddressLeaseTime).is_none());
    assert_eq!(ack.opts().get(C::InterfaceMtu), Some(&O::InterfaceMtu(1420)));
    for silent in [M::Release, M::Decline, M::Offer, M::Ack, M::Nak, M::Inform] {
        assert!(dhcp(&lease, &question(silent, &[])).is_none(), "{silent:?}");
    }
    let other = O::ServerIdentifier([10, 77, 1, 7].into());
    assert!(dhcp(&lease, &question(M::Request, &[other])).is_none(), "it chose another");
}

/// To a server elsewhere: no affair of ours, but a packet as any other.
#[test]
fn what_is_for_another_server_passes() {
    let message = question(v4::MessageType::Request, &[]).to_vec().unwrap();
    let mut frame = frame_v4([ADDRESS, [10, 77, 2, 9].into()], 67, &message);
    frame[..6].copy_from_slice(&OURS.0);
    let mut answer = [0; ANSWER_MAX];
    let verdict = segment(&lease()).handle_frame(&frame, &mut answer);
    assert_eq!(verdict, Verdict::Packet(frame.len() - 14));
}

fn ask6(lease: &Lease, message: &v6::Message) -> Option<v6::Message> {
    let payload = message.to_vec().unwrap();
    let mut udp = [546u16.to_be_bytes(), 547u16.to_be_bytes()].concat();
    udp.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
    udp.extend([1, 2]);
    udp.extend(payload);
    let answer = ask(lease, &frame_v6(CLIENT, 17, 1, "ff02::1:2", &udp)).ok()?;
    assert_eq!(answer[..6], GUEST.0);
    let (from, to) = (packet::link_local(OURS), ip6(CLIENT));
    assert_eq!((&answer[22..38], &answer[38..54]), (&from.octets()[..], &to.octets()[..]));
    let udp = UdpPacket::new(&answer[54..]).unwrap();
    assert_eq!(udp.get_checksum(), ipv6_checksum(&udp, &from, &to));
    assert_eq!((udp.get_source(), udp.get_destination()), (547, 546));
    let reply = v6::Message::decode(&mut Decoder::new(udp.payload())).unwrap();
    assert_eq!(reply.xid(), message.xid());
    let id = v6::DhcpOption::ServerId(vec![0, 3, 0, 1, 2, b'c', b'o', b'n', b'e', b't']);
    assert_eq!(reply.opts().get(v6::OptionCode::ServerId), Some(&id));
    Some(reply)
}

fn question6(kind: v6::MessageType, options: Vec<v6::DhcpOption>) -> v6::Message {
    let mut message = v6::Message::new_with_id(kind, [1, 2, 3]);
    message.opts_mut().insert(v6::DhcpOption::ClientId(vec![0, 3, 0, 1, 9, 9, 9, 9, 9, 9]));
    options.into_iter().for_each(|option| message.opts_mut().insert(option));
    message
}

fn association(addresses: &[&str]) -> v6::DhcpOption {
    let mut opts = v6::DhcpOptions::new();
    for address in addresses {
        opts.insert(v6::DhcpOption::IAAddr(v6::IAAddr {
            addr: ip6(address),
            preferred_life: 0,
            valid_life: 0,
            opts: v6::DhcpOptions::new(),
        }));
    }
    v6::DhcpOption::IANA(v6::IANA { id: 77, t1: 0, t2: 0, opts })
}

/// The addresses of the association, with how long each is good.
fn given(message: &v6::Message) -> Vec<(Ipv6Addr, u32)> {
    let Some(v6::DhcpOption::IANA(association)) = message.opts().get(v6::OptionCode::IANA) else {
        return Vec::new();
    };
    assert_eq!(association.id, 77);
    let addresses = association.opts.get_all(v6::OptionCode::IAAddr).unwrap_or_default();
    let address = |option: &v6::DhcpOption| match option {
        v6::DhcpOption::IAAddr(address) => (address.addr, address.valid_life),
        other => panic!("{other:?}"),
    };
    addresses.iter().map(address).collect()
}

fn status(message: &v6::Message) -> Option<v6::Status> {
    match message.opts().get(v6::OptionCode::StatusCode)? {
        v6::DhcpOption::StatusCode(code) => Some(code.status),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_guest_gets_its_ipv6_address() {
    use v6::{DhcpOption as O, MessageType as M, OptionCode as C};
    let lease = lease();
    let own = (ip6("fd77:1::2"), 7200);
    let ours = O::ServerId(vec![0, 3, 0, 1, 2, b'c', b'o', b'n', b'e', b't']);
    let advert = ask6(&lease, &question6(M::Solicit, vec![association(&[])])).unwrap();
    assert_eq!((advert.msg_type(), given(&advert)), (M::Advertise, vec![own]));
    assert_eq!(advert.opts().get(C::Preference), Some(&O::Preference(255)));
    let dns = O::DomainNameServers(vec![ip6("2620:fe::fe")]);
    assert_eq!(advert.opts().get(C::DomainNameServers), Some(&dns));
    let rapid = question6(M::Solicit, vec![association(&[]), O::RapidCommit]);
    let reply = ask6(&lease, &rapid).unwrap();
    assert_eq!((reply.msg_type(), given(&reply)), (M::Reply, vec![own]));
    assert!(reply.opts().get(C::RapidCommit).is_some());
    // What it had and may not have any more is taken back.
    for (kind, is_named) in [(M::Request, true), (M::Renew, true), (M::Rebind, false)] {
        let had = association(&["fd77:1::2", "fd77:9::9"]);
        let mut options = vec![had];
        options.extend(is_named.then(|| ours.clone()));
        let reply = ask6(&lease, &question6(kind, options)).unwrap();
        assert_eq!(given(&reply), [own, (ip6("fd77:9::9"), 0)], "{kind:?}");
        // To whom it is, is said where it has to be, and nowhere else.
        let mut options = vec![association(&[])];
        options.extend((!is_named).then(|| ours.clone()));
        assert!(ask6(&lease, &question6(kind, options)).is_none(), "{kind:?}");
    }
    for (had, expected) in [
        (&["fd77:1::2"][..], Some(v6::Status::Success)),
        (&["fd77:1::2", "fd77:9::9"], Some(v6::Status::NotOnLink)),
        (&[], None),
    ] {
        let reply = ask6(&lease, &question6(M::Confirm, vec![association(had)]));
        assert_eq!(reply.as_ref().and_then(status), expected);
    }
    for kind in [M::Release, M::Decline] {
        let options = vec![association(&["fd77:1::2"]), ours.clone()];
        let reply = ask6(&lease, &question6(kind, options)).unwrap();
        assert_eq!((reply.msg_type(), status(&reply)), (M::Reply, Some(v6::Status::Success)));
    }
    let mut information = v6::Message::new(M::InformationRequest);
    let reply = ask6(&lease, &information).unwrap();
    assert_eq!(reply.opts().get(C::DomainNameServers), Some(&dns));
    information.opts_mut().insert(association(&[]));
    assert!(ask6(&lease, &information).is_none());
    for kind in [M::Advertise, M::Reply, M::Reconfigure, M::Unknown(99)] {
        assert!(ask6(&lease, &question6(kind, vec![ours.clone()])).is_none(), "{kind:?}");
    }
    // One association has the addresses; the guest has no other, and no prefix.
    let prefixes = O::IAPD(v6::IAPD { id: 5, t1: 0, t2: 0, opts: v6::DhcpOptions::new() });
    let reply = ask6(&lease, &question6(M::Solicit, vec![association(&[]), prefixes])).unwrap();
    let Some(O::IAPD(refused)) = reply.opts().get(C::IAPD) else { panic!("{reply:?}") };
    let Some(O::StatusCode(code)) = refused.opts.get(C::StatusCode) else { panic!("{refused:?}") };
    assert_eq!((refused.id, code.status), (5, v6::Status::NoPrefixAvail));
    // A guest without an address has no such service.
    let only_v4 = Lease { addresses: vec![ADDRESS.into()], ..lease };
    assert!(ask6(&only_v4, &question6(M::Solicit, vec![association(&[])])).is_none());
}

fn solicitation(from: &str, hops: u8) -> Vec<u8> {
    let mut icmp = vec![133, 0, 0, 0, 0, 0, 0, 0];
    let sum = checksum(&Icmpv6Packet::new(&icmp).unwrap(), &ip6(from), &ip6("ff02::2"));
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    frame_v6(from, 58, hops, "ff02::2", &icmp)
}

/// The options of an advertisement that is right, by code.
fn options_of(advert: &[u8], to: &str) -> Vec<(u8, Vec<u8>)> {
    let (from, to) = (packet::link_local(OURS), ip6(to));
    assert_eq!((&advert[22..38], &advert[38..54]), (&from.octets()[..], &to.octets()[..]));
    assert_eq!((advert[20], advert[21]), (58, 255));
    let icmp = &advert[54..];
    let packet = Icmpv6Packet::new(icmp).unwrap();
    assert_eq!(packet.get_checksum(), checksum(&packet, &from, &to));
    // Type, code; hops, managed and other, lifetime.
    assert_eq!((&icmp[..2], &icmp[4..8]), (&[134, 0][..], &[64, 0xc0, 0x23, 0x28][..]));
    let (mut rest, mut options) = (&icmp[16..], Vec::new());
    while let [code, len, ..] = rest {
        let (option, after) = rest.split_at(8 * usize::from(*len));
        options.push((*code, option[2..].to_vec()));
        rest = after;
    }
    options
}

#[test]
fn a_guest_hears_of_its_router() {
    let lease = lease();
    let advert = ask(&lease, &solicitation(CLIENT, 255)).unwrap();
    assert_eq!(advert[..6], GUEST.0);
    let options = options_of(&advert, CLIENT);
    let [(1, card), (5, mtu), (25, resolvers)] = &options[..] else { panic!("{options:?}") };
    assert_eq!((&card[..], &mtu[..]), (&OURS.0[..], &[0, 0, 0, 0, 5, 0x8c][..]));
    assert_eq!(resolvers[2..6], 9000u32.to_be_bytes());
    assert_eq!(resolvers[6..], ip6("2620:fe::fe").octets());
    // To all, where it has no address of its link's yet, and unasked.
    let unnamed = ask(&lease, &solicitation("::", 255)).unwrap();
    assert_eq!(options_of(&unnamed, "ff02::1"), options);
    let mut unasked = [0; ANSWER_MAX];
    let len = segment(&lease).advert(&mut unasked).unwrap();
    assert_eq!((&unasked[..len], &unasked[..6]), (&unnamed[..], &[0x33, 0x33, 0, 0, 0, 1][..]));
    // From beyond the link, or without IPv6: nothing.
    assert!(ask(&lease, &solicitation(CLIENT, 64)).is_err());
    let only_v4 = Lease { addresses: vec![ADDRESS.into()], ..lease };
    assert!(ask(&only_v4, &solicitation(CLIENT, 255)).is_err());
    assert_eq!(segment(&only_v4).advert(&mut unasked), None);
}

#[test]
fn a_prefix_is_there_for_the_address_that_the_card_makes_of_it() {
    let made = packet::with_interface(ip6("fd77:1::"), GUEST);
    let lease = Lease { addresses: vec![made.into()], ..lease() };
    let options = options_of(&ask(&lease, &solicitation(CLIENT, 255)).unwrap(), CLIENT);
    let prefix = options.iter().find(|(code, _)| *code == 3).map(|(_, data)| &data[..]);
    let mut expected = vec![64, 0x40, 0, 0, 0x1c, 0x20, 0, 0, 0x0e, 0x10, 0, 0, 0, 0];
    expected.extend(ip6("fd77:1::").octets());
    assert_eq!(prefix, Some(&expected[..]));
}

/// Frames to begin with: each kind of question.
fn questions() -> Vec<Vec<u8>> {
    let mut frames = vec![solicitation(CLIENT, 255)];
    for kind in [1, 3, 4, 7, 8] {
        let options = [v4::DhcpOption::RequestedIpAddress(ADDRESS), v4::DhcpOption::RapidCommit];
        let message = question(v4::MessageType::from(kind), &options);
        let way = [Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST];
        frames.push(frame_v4(way, 67, &message.to_vec().unwrap()));
    }
    for kind in [1, 3, 4, 5, 6, 8, 9, 11] {
        let options = vec![association(&["fd77:1::2", "fd77:9::9"])];
        let payload = question6(v6::MessageType::from(kind), options).to_vec().unwrap();
        let mut udp = vec![2, 0x22, 2, 0x23];
        udp.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
        udp.extend([0, 0]);
        udp.extend(payload);
        frames.push(frame_v6(CLIENT, 17, 1, "ff02::1:2", &udp));
    }
    frames
}

proptest! {
    /// Whatever a guest makes of a question, an answer is a frame to it or to all.
    #[test]
    fn spoilt_questions_do_no_harm(
        which in 0usize..14,
        spoils in prop::collection::vec((14usize..400, any::<u8>()), 0..8),
        cut in 0usize..700,
        more in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut frame = questions()[which].clone();
        for (at, byte) in spoils {
            if let Some(place) = frame.get_mut(at) {
                *place = byte;
            }
        }
        frame.extend(more);
        frame.truncate(cut.max(14));
        let mut answer = [0; ANSWER_MAX];
        if let Verdict::Answer(len) = segment(&lease()).handle_frame(&frame, &mut answer) {
            prop_assert!((42..=ANSWER_MAX).contains(&len));
            prop_assert_eq!(&answer[6..12], &OURS.0[..]);
        }
    }

    #[test]
    fn any_bytes_are_answered_or_not(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let mut room = [0; 548];
        dhcp::answer(&lease(), GATEWAY, &bytes, &mut room).ok();
        dhcp6::answer(&lease(), OURS, &bytes, &mut room).ok();
    }
}
