use super::*;
use crate::options::CARRIED;
use proptest::prelude::*;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

fn example() -> SavedSocket {
    SavedSocket {
        flow: Flow {
            local: SocketAddr::from(([10, 77, 1, 2], 8080)),
            peer: SocketAddr::from(([192, 0, 2, 9], 40000)),
        },
        ipv6: false,
        v6only: false,
        mss: 1460,
        sack: true,
        scales: Some(WindowScales { send: 7, receive: 9 }),
        timestamp: Some(123_456),
        window: RepairWindow { snd_wl1: 1, snd_wnd: 2, max_window: 3, rcv_wnd: 4, rcv_wup: 5 },
        recv_end: 1000,
        send_end: 2000,
        recv: b"unread".to_vec(),
        send: b"sent and unsent".to_vec(),
        unsent: 6,
        reuse_address: true,
        buffers: Buffers { send: 87_040, receive: 131_072, lock: 3 },
        congestion: "cubic".to_owned(),
        options: vec![SavedOption { id: 7, value: -1 }, SavedOption { id: 10, value: 1 }],
    }
}

#[test]
fn what_is_written_is_read_back() {
    let state = example();
    let bytes = state.encode();
    assert_eq!(bytes[..8], *b"cnsk\x01\0\x1c\0");
    assert_eq!(SavedSocket::decode(&bytes), Ok(state));
    let mut more = bytes.clone();
    more.push(0);
    assert_eq!(SavedSocket::decode(&more), Err(StateError::Trailing));
    for cut in 0..bytes.len() {
        assert_eq!(SavedSocket::decode(&bytes[..cut]), Err(StateError::Truncated), "{cut}");
    }
}

/// The layout is read by hosts of other versions: it may not change unnoticed.
#[test]
fn layout_golden_vector() {
    let bytes = example().encode();
    assert_eq!(bytes.len(), 158);
    assert_eq!(
        bytes[8..30],
        [4, 0, 0x90, 0x1f, 10, 77, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    let checksum = bytes.iter().fold(0u32, |sum, byte| sum.rotate_left(5) ^ u32::from(*byte));
    assert_eq!(checksum, GOLDEN, "{bytes:?}");
}

const GOLDEN: u32 = 1_030_449_262;

#[test]
fn impossible_fields_are_refused_by_name() {
    let wrong = |change: fn(&mut SavedSocket)| {
        let mut state = example();
        change(&mut state);
        SavedSocket::decode(&state.encode())
    };
    let field = |name| Err(StateError::Field(name));
    assert_eq!(wrong(|s| s.flow.local.set_port(0)), field("port"));
    assert_eq!(wrong(|s| s.flow.peer.set_ip(Ipv4Addr::UNSPECIFIED.into())), field("address"));
    assert_eq!(wrong(|s| s.flow.peer.set_ip(Ipv6Addr::LOCALHOST.into())), field("address family"));
    assert_eq!(wrong(|s| s.ipv6 = true), field("address family"));
    assert_eq!(wrong(|s| s.v6only = true), field("IPV6_V6ONLY"));
    assert_eq!(wrong(|s| s.mss = 0), field("MSS"));
    assert_eq!(wrong(|s| s.mss = 70_000), field("MSS"));
    assert_eq!(
        wrong(|s| s.scales = Some(WindowScales { send: 15, receive: 0 })),
        field("window scale")
    );
    assert_eq!(wrong(|s| s.window.max_window = 0), field("window"));
    assert_eq!(wrong(|s| s.unsent = 16), field("count of unsent bytes"));
    assert_eq!(wrong(|s| s.buffers.lock = 4), field("SO_BUF_LOCK"));
    assert_eq!(wrong(|s| s.buffers.send = u32::MAX), field("buffer size"));
    assert_eq!(wrong(|s| s.congestion.clear()), field("congestion control"));
    assert_eq!(wrong(|s| s.congestion = "cu/bic".to_owned()), field("congestion control"));
    assert_eq!(wrong(|s| s.options[0].id = 200), field("option"));
    assert_eq!(wrong(|s| s.options[1].id = 7), field("option"));
    assert_eq!(wrong(|s| s.options[1].value = i64::MAX), field("option"));
    let mut bytes = example().encode();
    bytes[4] = 2;
    assert_eq!(SavedSocket::decode(&bytes), Err(StateError::Version(2)));
    bytes[0] = 0;
    assert_eq!(SavedSocket::decode(&bytes), Err(StateError::Magic));
}

#[test]
fn a_claimed_length_takes_no_memory() {
    let mut bytes = example().encode();
    let at = bytes.len() - 4 - 15 - 6 - 4;
    bytes[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(SavedSocket::decode(&bytes), Err(StateError::Field("queue length")));
    bytes[at..at + 4].copy_from_slice(&60_000_000u32.to_le_bytes());
    assert_eq!(SavedSocket::decode(&bytes), Err(StateError::Truncated));
}

#[test]
fn debug_shows_no_data() {
    let text = format!("{:?}", example());
    assert!(!text.contains("sent and") && text.contains("unread: 6"), "{text}");
}

prop_compose! {
    fn states()(
        ipv6: bool, mapped: bool, octets: [u8; 16], ports in (1u16.., 1u16..), mss in 1u32..=65535,
        scales in prop::option::of((0u8..=14, 0u8..=14)), timestamp: Option<u32>,
        words: [u32; 4], recv in prop::collection::vec(any::<u8>(), 0..200),
        send in prop::collection::vec(any::<u8>(), 0..200), unsent: prop::sample::Index,
        flags: [bool; 3], lock in 0u8..=3, buffers: [u16; 2], mask: u32, value in 0i64..=1000,
    ) -> SavedSocket {
        let four = Ipv4Addr::new(octets[0] | 1, octets[1], octets[2], octets[3]);
        let ip: std::net::IpAddr = match (ipv6, mapped) {
            (false, _) => four.into(),
            (true, true) => four.to_ipv6_mapped().into(),
            (true, false) => {
                let [_, rest @ ..] = octets;
                let mut octets = [0x20; 16];
                octets[1..].copy_from_slice(&rest);
                Ipv6Addr::from(octets).into()
            }
        };
        let chosen = CARRIED.iter().enumerate().filter(|(at, _)| mask >> at & 1 == 1);
        SavedSocket {
            flow: Flow { local: SocketAddr::new(ip, ports.0), peer: SocketAddr::new(ip, ports.1) },
            ipv6,
            v6only: ipv6 && flags[0],
            mss,
            sack: flags[1],
            scales: scales.map(|(send, receive)| WindowScales { send, receive }),
            timestamp,
            window: RepairWindow {
                snd_wl1: words[0], snd_wnd: words[1], max_window: u32::MAX, rcv_wnd: words[2], rcv_wup: words[3],
            },
            recv_end: words[0],
            send_end: words[1],
            unsent: if send.is_empty() { 0 } else { unsent.index(send.len()) },
            recv,
            send,
            reuse_address: flags[2],
            buffers: Buffers { send: buffers[0].into(), receive: buffers[1].into(), lock },
            congestion: "bbr".to_owned(),
            options: chosen.map(|(_, carried)| SavedOption { id: carried.id, value }).collect(),
        }
    }
}

proptest! {
    #[test]
    fn every_state_round_trips(state in states()) {
        prop_assert_eq!(SavedSocket::decode(&state.encode()), Ok(state));
    }

    #[test]
    fn one_state_has_one_form(state in states(), at: prop::sample::Index, change in 1u8..) {
        let mut bytes = state.encode();
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        if let Ok(other) = SavedSocket::decode(&bytes) {
            prop_assert_eq!(other.encode(), bytes);
        }
    }

    #[test]
    fn any_bytes_end_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(SavedSocket::decode(&bytes).is_err());
    }
}
