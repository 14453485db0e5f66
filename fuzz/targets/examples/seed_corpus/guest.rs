//! Seeds for the targets of guests' ports: questions of DHCP's by another implementation,
//! conversations of VMMs, rings of drivers.

use std::net::{Ipv4Addr, Ipv6Addr};

use conet_wire::held;
use dhcproto::{Encodable, v4, v6};

const CARD: [u8; 6] = [2, 0, 10, 77, 1, 2];
/// The card's address on its link.
const LINK: [u16; 8] = [0xfe80, 0, 0, 0, 0xa, 0x4dff, 0xfe01, 0x102];
type Seeds = Vec<(&'static str, Vec<u8>)>;

fn ethernet(kind: u16, payload: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &CARD, &kind.to_be_bytes(), payload].concat()
}

fn udp(ports: [u16; 2], payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(8 + payload.len()).unwrap_or(u16::MAX);
    let [from, to] = ports.map(u16::to_be_bytes);
    [&from[..], &to, &len.to_be_bytes(), &[0, 0], payload].concat()
}

fn ipv6(next: u8, hops: u8, to: [u16; 8], payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(payload.len()).unwrap_or(u16::MAX).to_be_bytes();
    let from = Ipv6Addr::from(LINK).octets();
    let to = Ipv6Addr::from(to).octets();
    ethernet(0x86dd, &[&[0x60, 0, 0, 0][..], &len, &[next, hops], &from, &to, payload].concat())
}

fn dhcp(kind: u8, options: &[v4::DhcpOption]) -> Vec<u8> {
    let none = Ipv4Addr::UNSPECIFIED;
    let mut message = v4::Message::new_with_id(7, none, none, none, none, &CARD);
    message.opts_mut().insert(v4::DhcpOption::MessageType(kind.into()));
    for option in options {
        message.opts_mut().insert(option.clone());
    }
    let datagram = udp([68, 67], &message.to_vec().unwrap_or_default());
    let len = u16::try_from(20 + datagram.len()).unwrap_or(u16::MAX);
    let mut header = [0; 20];
    let outer = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17];
    header[..10].copy_from_slice(&outer);
    header[2..4].copy_from_slice(&len.to_be_bytes());
    header[16..].fill(0xff);
    let sum = conet_wire::ip::checksum(&header, 0);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    ethernet(0x0800, &[&header[..], &datagram].concat())
}

fn dhcp6(kind: u8, is_named: bool) -> Vec<u8> {
    let mut message = v6::Message::new_with_id(kind.into(), [1, 2, 3]);
    let mut opts = v6::DhcpOptions::new();
    opts.insert(v6::DhcpOption::IAAddr(v6::IAAddr {
        addr: [0xfd77, 1, 0, 0, 0, 0, 0, 2].into(),
        preferred_life: 1,
        valid_life: 2,
        opts: v6::DhcpOptions::new(),
    }));
    let all = message.opts_mut();
    all.insert(v6::DhcpOption::ClientId(vec![0, 3, 0, 1, 9, 9, 9, 9, 9, 9]));
    all.insert(v6::DhcpOption::IANA(v6::IANA { id: 1, t1: 0, t2: 0, opts }));
    if is_named {
        let ours = [&[0, 3, 0, 1, 2][..], b"conet"].concat();
        all.insert(v6::DhcpOption::ServerId(ours));
    }
    let datagram = udp([546, 547], &message.to_vec().unwrap_or_default());
    ipv6(17, 1, [0xff02, 0, 0, 0, 0, 0, 1, 2], &datagram)
}

/// What a guest sends; how its port is, before it.
pub(crate) fn frames() -> Seeds {
    let arp = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &CARD, &[10, 77, 1, 2], &[0; 6], &[10, 77, 1, 1]];
    let own = v4::DhcpOption::RequestedIpAddress([10, 77, 1, 2].into());
    let other = v4::DhcpOption::RequestedIpAddress([10, 77, 1, 9].into());
    let mut solicitation = [133, 0, 0, 0, 0, 0, 0, 0];
    let routers = [0xff02, 0, 0, 0, 0, 0, 0, 2];
    let to = Ipv6Addr::from(routers).octets();
    let summed = [&Ipv6Addr::from(LINK).octets()[..], &to, &[0, 0, 0, 8, 0, 0, 0, 58]];
    let summed = [&summed.concat()[..], &solicitation].concat();
    solicitation[2..4].copy_from_slice(&conet_wire::ip::checksum(&summed, 0).to_be_bytes());
    let seeds: [(&str, u8, Vec<u8>); 13] = [
        ("arp", 0, ethernet(0x0806, &arp.concat())),
        ("discover", 0, dhcp(1, &[])),
        ("discover-rapid", 2, dhcp(1, &[v4::DhcpOption::RapidCommit])),
        ("request", 4, dhcp(3, &[own])),
        ("request-other", 0, dhcp(3, &[other])),
        ("release", 0, dhcp(7, &[])),
        ("inform", 0, dhcp(8, &[])),
        ("solicit", 0, dhcp6(1, false)),
        ("request6", 0, dhcp6(3, true)),
        ("confirm6", 0, dhcp6(4, false)),
        ("rebind6", 4, dhcp6(6, false)),
        ("release6", 0, dhcp6(8, true)),
        ("router-solicitation", 8, ipv6(58, 255, routers, &solicitation)),
    ];
    seeds.into_iter().map(|(name, how, frame)| (name, [&[how][..], &frame].concat())).collect()
}

fn message(request: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let head = [request, 1, size].into_iter().flat_map(u32::to_ne_bytes);
    head.chain(body.iter().copied()).collect()
}

/// What VMMs say to their backend.
pub(crate) fn messages() -> Seeds {
    let region = [0u8; 32];
    let table = |count: u32, regions: usize| {
        let head = [count.to_ne_bytes(), [0; 4]].concat();
        message(5, &[&head[..], &region.repeat(regions)].concat())
    };
    let features = message(2, &(1u64 << 32 | 1 << 30).to_ne_bytes());
    let enable = |ring: u32| message(18, &[ring.to_ne_bytes(), 1u32.to_ne_bytes()].concat());
    let asks = [18u32, 9, 8].into_iter().flat_map(u32::to_ne_bytes).chain([0; 8]).collect();
    vec![
        ("owner", message(3, &[])),
        ("features", features.clone()),
        ("table", table(1, 1)),
        ("table-of-user-mode-linux", table(1, 2)),
        ("early-enable", [enable(0), enable(1), enable(0), features].concat()),
        ("enable-that-asks", asks),
    ]
}

/// A queue as a driver sets it up, and one whose chain is a loop.
pub(crate) fn rings() -> Seeds {
    let ring = |how: u8, flags: u16, next: u16, len: u32| {
        let mut memory = vec![0; 0x900];
        // Descriptors at 0x100: one, and another at which it may go on.
        for at in [0x100, 0x110] {
            memory[at..at + 8].copy_from_slice(&0x400u64.to_le_bytes());
            memory[at + 8..at + 12].copy_from_slice(&len.to_le_bytes());
            memory[at + 12..at + 14].copy_from_slice(&flags.to_le_bytes());
            memory[at + 14..at + 16].copy_from_slice(&next.to_le_bytes());
        }
        // Available at 0x200: two chains, the first descriptor and the second.
        memory[0x202] = 2;
        memory[0x206] = 1;
        // A frame of the guest's behind the card's header.
        let frame = dhcp(1, &[]);
        memory[0x40c..0x40c + frame.len()].copy_from_slice(&frame);
        let head = [how, 3, 0x10, 0, 0x20, 0, 0x30, 0];
        [&head[..], &memory].concat()
    };
    vec![
        ("transmit", ring(0, 0, 0, 500)),
        ("transmit-loop", ring(0, 1, 0, 500)),
        ("transmit-beyond", ring(4, 0, 0, u32::MAX)),
        ("receive", ring(1, 2, 0, 1500)),
        ("receive-merged", ring(7, 2, 0, 600)),
        ("receive-short", ring(1, 2, 0, 20)),
    ]
}

/// What a host has kept for a guest: nothing, and a packet of each family.
pub(crate) fn held() -> Seeds {
    let mut four = vec![0; held::HEADER + 28];
    four[held::HEADER] = 0x45;
    four[held::HEADER + 16..held::HEADER + 20].copy_from_slice(&[10, 77, 1, 2]);
    let mut six = vec![0; held::HEADER + 48];
    six[held::HEADER] = 0x60;
    let both = held::emit(&[four.clone(), six]);
    let mut long = both.clone();
    let lengths = long.len() - 4..;
    long.splice(lengths, [0xff; 4]);
    let mut cut = both.clone();
    cut.truncate(both.len() - 5);
    vec![
        ("none", held::emit(&[])),
        ("cut", cut),
        ("something-behind", [&both[..], &[0]].concat()),
        ("long", long),
        ("many", held::emit(&vec![four; 9])),
        ("both-families", both),
    ]
}
