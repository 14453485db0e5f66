//! Entry for the fuzz target `tunnel_errors`: what does not fit the way to a peer, and
//! what ICMP says of it.
//!
//! ```text
//! input    how 1 │ MTU of the ways 2, big-endian │ rest
//! ```
//!
//! | how mod 8 | the rest is |
//! |---|---|
//! | 0, 1, 2 | a packet from the device, made one to the peer in mode `wireguard`, `ipip`, `ip-udp` |
//! | 3 | a packet from the device, as is |
//! | 4 | an ICMP packet from the raw socket, as is |
//! | 5, 6, 7 | type, code, and a packet: an error that quotes our packet to the `ipip` peer with this one inside, of protocol 4, 41, and whole |
//!
//! What must hold, by rules written down here a second time: a packet goes, or is
//! counted as dropped; one that goes fits the way or may be fragmented; whoever is told
//! that a packet does not fit is its sender, is told the way's MTU less the tunnel's
//! headers (1280 at least in IPv6), and could not know it: the packet is longer than
//! that, and must not be fragmented. Errors are whole packets with right checksums, at
//! most 576 bytes long in IPv4 and 1280 in IPv6, and never about errors.

use conet_wire::ip::{PROTO_ICMP, PROTO_ICMPV6, checksum};

use super::{
    Destination, INPUT_MAX, IPIP_ADDRESS, IPV4_HEADER, IpAddr, IpView, Ipv4Addr, Outgoing, TARGET,
    Target,
};

/// Third octets of the peers' prefixes, and the bytes of outer headers in their modes.
const PEERS: [(u8, u16); 3] = [(2, 60), (3, 20), (4, 28)];
/// Ways of less than this are not believed (Linux's `route/min_pmtu`), and the
/// configuration's is Ethernet's.
const LEAST: u16 = 552;
const CONFIGURED: u16 = 1500;

/// Type and code of an error with the MTU in it, and whom it is for.
type Told = (((u8, u8), u32), IpAddr);

/// Gives one input to a tunnel; see the module. Says how many senders were told
/// something.
///
/// # Panics
/// When the tunnel does something that it must not: that is the finding.
pub fn tunnel_errors(input: &[u8]) -> usize {
    let Some((&[how, high, low], rest)) = input.split_first_chunk() else { return 0 };
    let rest = &rest[..rest.len().min(INPUT_MAX)];
    TARGET.with_borrow_mut(|slot| {
        let target = slot.get_or_insert_with(Target::new);
        target.set_ways(u16::from_be_bytes([high, low]));
        let told = target.run_errors(how, u16::from_be_bytes([high, low]), rest);
        target.out.clear();
        target.replies.clear();
        told
    })
}

impl Target {
    /// The ways to all peers have this MTU from now on.
    fn set_ways(&mut self, mtu: u16) {
        for (site, _) in PEERS {
            let packet = to_site(&[0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0], site);
            if let Ok(outgoing) = Outgoing::whole(&packet) {
                self.core.handle_device(&outgoing, &mut self.out, &mut self.replies);
            }
        }
        self.out.clear();
        self.core.ask_ways(|way| {
            let (Destination::Ip(_) | Destination::Udp(_)) = way;
            Some(mtu)
        });
        let wanted = mtu.clamp(LEAST, CONFIGURED);
        assert!(self.core.peers().iter().all(|peer| peer.path_mtu == wanted));
    }

    fn run_errors(&mut self, how: u8, mtu: u16, rest: &[u8]) -> usize {
        let way = mtu.clamp(LEAST, CONFIGURED);
        match how % 8 {
            how @ 0..=2 => {
                let (site, overhead) = PEERS[usize::from(how)];
                let packet = to_site(rest, site);
                self.sent(&packet, way, way - overhead)
            }
            3 => self.sent_anywhere(rest),
            4 => {
                let told = self.ip(rest);
                assert_eq!(told, Vec::<Vec<u8>>::new(), "ICMP itself comes out of no tunnel");
                self.relayed(None, mtu)
            }
            how => {
                let Some((&[kind, code], inner)) = rest.split_first_chunk() else { return 0 };
                let inner = if how == 7 { to_site(inner, 3) } else { inner.to_vec() };
                let protocol = if how == 6 { 41 } else { 4 };
                let error = quoting(kind, code, mtu, protocol, &inner);
                self.ip(&error);
                self.relayed(Some((kind, code, &inner)), mtu)
            }
        }
    }

    /// A packet to a peer whose way has `way` bytes, `fits` of them for us.
    fn sent(&mut self, packet: &[u8], way: u16, fits: u16) -> usize {
        let Ok(outgoing) = Outgoing::whole(packet) else { return 0 };
        let view = *outgoing.view();
        let before = self.dropped();
        self.core.handle_device(&outgoing, &mut self.out, &mut self.replies);
        let went = self.out.transmits().map(|t| t.datagrams().len()).sum::<usize>();
        let dropped = self.dropped() - before;
        assert!(
            went > 0 || dropped == 1,
            "a packet neither goes nor is counted: {went} {dropped} {packet:?} {way}"
        );
        let length = view.bytes().len();
        for transmit in self.out.transmits() {
            // Raw sockets get the outer IP header with them, UDP its own from the kernel.
            let headers = if matches!(transmit.to(), Destination::Ip(_)) { 0 } else { 28 };
            let longest = transmit.datagrams().map(<[u8]>::len).max().unwrap_or(0) + headers;
            assert!(longest <= usize::from(way) || transmit.may_fragment(), "{longest} > {way}");
            assert!(
                length <= usize::from(fits) || !view.dont_fragment() || length <= 1280,
                "{length} bytes go where {fits} fit, and must not be fragmented"
            );
        }
        let told = self.told();
        if let Some((view_of_error, to)) = told.first() {
            let least = if view.is_v6() { 1280 } else { 0 };
            let say = fits.max(least);
            assert_eq!(*view_of_error, (too_big(view.is_v6()), u32::from(say)));
            assert_eq!(*to, view.source());
            assert!(length > usize::from(say) && view.dont_fragment() && went == 0);
            assert!(view.may_cause_error());
        }
        told.len()
    }

    fn sent_anywhere(&mut self, packet: &[u8]) -> usize {
        let Ok(outgoing) = Outgoing::whole(packet) else { return 0 };
        self.core.handle_device(&outgoing, &mut self.out, &mut self.replies);
        self.told().len()
    }

    /// What is told of an error from outside about `quoted`.
    fn relayed(&mut self, about: Option<(u8, u8, &[u8])>, mtu: u16) -> usize {
        let told = self.told();
        assert!(told.len() <= 1);
        let (Some(((kind, said), to)), Some((outer_kind, code, inner))) = (told.first(), about)
        else {
            return told.len();
        };
        let Ok(view) = IpView::quoted(inner) else { panic!("told about no packet") };
        assert_eq!(*to, view.source());
        let is_ours = match view.destination() {
            IpAddr::V4(to) => to.octets()[..3] == [10, 77, 3],
            IpAddr::V6(to) => to.segments()[..2] == [0xfd00, 3],
        };
        assert!(is_ours, "told about a packet that goes elsewhere");
        match (outer_kind, code) {
            (3, 4) => {
                let fits = mtu.max(LEAST) - 20;
                let say = if view.is_v6() { fits.max(1280) } else { fits };
                assert_eq!((*kind, *said), (too_big(view.is_v6()), u32::from(say)));
            }
            (3 | 11, _) => assert_eq!(*kind, if view.is_v6() { (1, 3) } else { (3, 1) }),
            _ => panic!("ICMP of type {outer_kind} is relayed"),
        }
        told.len()
    }

    /// Type and code of each error made, the MTU in it, and to whom.
    fn told(&self) -> Vec<Told> {
        let buffer = self.replies.buffer();
        let packets = self.replies.packets().iter().map(|packet| &buffer[packet.at.clone()]);
        packets.map(read_error).collect()
    }

    fn dropped(&self) -> u64 {
        let of_peers = self.core.peers().iter().map(|peer| peer.drops.total()).sum::<u64>();
        of_peers + self.core.drops().total()
    }
}

fn too_big(v6: bool) -> (u8, u8) {
    if v6 { (2, 0) } else { (3, 4) }
}

/// Checks an error of ours whole.
fn read_error(packet: &[u8]) -> Told {
    let Ok(view) = IpView::new(packet) else { panic!("an error that is no packet") };
    assert_eq!(view.bytes().len(), packet.len());
    let icmp = view.payload();
    let (longest, protocol, pseudo) = match view.is_v6() {
        false => {
            assert_eq!(checksum(&packet[..IPV4_HEADER], 0), 0);
            (576, PROTO_ICMP, 0)
        }
        true => {
            let mut pseudo = packet[8..40].to_vec();
            pseudo.extend(u32::try_from(icmp.len()).unwrap_or(u32::MAX).to_be_bytes());
            pseudo.extend([0, 0, 0, PROTO_ICMPV6]);
            (1280, PROTO_ICMPV6, u32::from(!checksum(&pseudo, 0)))
        }
    };
    assert!(packet.len() <= longest && view.protocol() == protocol && icmp.len() > 8 + 19);
    assert_eq!(checksum(icmp, pseudo), 0, "a wrong checksum");
    assert_eq!(IpView::quoted(&icmp[8..]).map(|quoted| quoted.source()), Ok(view.destination()));
    let mtu = match view.is_v6() {
        true => u32::from_be_bytes([icmp[4], icmp[5], icmp[6], icmp[7]]),
        false => u32::from(u16::from_be_bytes([icmp[6], icmp[7]])),
    };
    (((icmp[0], icmp[1]), mtu), view.destination())
}

/// `bytes` as a packet of ours to a peer, as far as they are long enough: its length,
/// hops and addresses made right, the rest as it is.
fn to_site(bytes: &[u8], site: u8) -> Vec<u8> {
    let mut packet = bytes.to_vec();
    let v6 = packet.first().is_some_and(|first| first >> 4 == 6);
    if v6 {
        packet.resize(packet.len().max(40), 0);
        let length = u16::try_from(packet.len() - 40).unwrap_or(u16::MAX);
        packet[4..6].copy_from_slice(&length.to_be_bytes());
        packet[7] = 64;
        packet[8..24].copy_from_slice(&[0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        packet[24..40].copy_from_slice(&[0xfd, 0, 0, site, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    } else {
        packet.resize(packet.len().max(20), 0);
        packet[0] = 0x45;
        let length = u16::try_from(packet.len()).unwrap_or(u16::MAX);
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        packet[8] = 64;
        packet[12..16].copy_from_slice(&[10, 77, 1, 2]);
        packet[16..20].copy_from_slice(&[10, 77, site, 2]);
    }
    packet
}

/// An error of a router's about our packet to the `ipip` peer.
fn quoting(kind: u8, code: u8, mtu: u16, protocol: u8, inner: &[u8]) -> Vec<u8> {
    let ours = Ipv4Addr::new(192, 0, 2, 1);
    let outer = header(ours, IPIP_ADDRESS.into(), protocol, inner.len());
    let [high, low] = mtu.to_be_bytes();
    let mut packet = header(Ipv4Addr::new(192, 0, 2, 254), ours, PROTO_ICMP, 28 + inner.len());
    packet.extend([kind, code, 0, 0, 0, 0, high, low]);
    packet.extend(outer);
    packet.extend_from_slice(inner);
    packet
}

fn header(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, payload: usize) -> Vec<u8> {
    let header = super::OuterV4 {
        source,
        destination,
        protocol,
        ttl: 64,
        ecn: super::Ecn::NotEct,
        dont_fragment: true,
        total_len: u16::try_from(IPV4_HEADER + payload).unwrap_or(u16::MAX),
    };
    let mut bytes = [0; IPV4_HEADER];
    header.emit(&mut bytes);
    bytes.to_vec()
}
