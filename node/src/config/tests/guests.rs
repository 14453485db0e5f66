//! Guests of both families, and what is told of one that cannot be.

use super::*;

/// A node whose guests have IPv6 addresses, and IPv4 ones with `v4`.
fn six(v4: &str, rest: &str) -> String {
    let overlay = format!("overlay = [{v4}\"fd77:1::/64\"]");
    format!("{}{rest}", NODE.replace("overlay = \"10.77.1.0/24\"", &overlay))
}

const BOTH: &str = "\"10.77.1.0/24\", ";

#[test]
fn guests_have_addresses_of_either_family_or_both() {
    let guests = "[[guest]]\nname = \"a\"\nkind = \"tap\"\naddresses = [\"10.77.1.2\", \"fd77:1::2\"]\n\
        [[guest]]\nname = \"b\"\nkind = \"netns\"\naddress = \"fd77:1::3\"\n\
        [[guest]]\nname = \"c\"\nkind = \"qemu\"\naddress = \"10.77.1.3\"\n";
    let config = Files::new(&six(BOTH, guests)).load().unwrap();
    assert_eq!(config.node.overlay.to_string(), "10.77.1.0/24, fd77:1::/64");
    let addresses: Vec<_> = config.guests.iter().map(|guest| guest.addresses.clone()).collect();
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    assert_eq!(
        addresses,
        [vec![ip("10.77.1.2"), ip("fd77:1::2")], vec![ip("fd77:1::3")], vec![ip("10.77.1.3")]]
    );
    let alone = guest("b", "fd77:1::3");
    let config = Files::new(&six("", &alone)).load().unwrap();
    assert_eq!(config.node.overlay.v4(), None);
    // As one prefix, without brackets.
    let bare = six("", &alone).replace("[\"fd77:1::/64\"]", "\"fd77:1::/64\"");
    assert_eq!(Files::new(&bare).load().unwrap().node.overlay, config.node.overlay);
}

#[test]
fn an_ipv6_address_that_no_guest_can_have_is_told() {
    refused(
        &six("", &guest("web", "10.77.1.2")),
        "conet.toml:9: guest.address: 10.77.1.2 is not a guest's address in overlay fd77:1::/64; \
         take one of the overlay's, or give that a prefix of this family as well, as in overlay = \
         [\"10.77.1.0/24\", \"fd77:1::/64\"]",
    );
    for (address, remedy) in [
        ("fd77:1::1", "the first is the network's, the second is the gateway's"),
        ("fd77:2::2", "take one of the overlay's"),
    ] {
        refused(
            &six(BOTH, &guest("web", address)),
            &format!(
                "conet.toml:9: guest.address: {address} is not a guest's address in overlay \
                 10.77.1.0/24, fd77:1::/64; {remedy}"
            ),
        );
    }
    refused(
        &six(BOTH, &format!("{}{}", guest("web", "fd77:1::2"), guest("db", "fd77:1:0::2"))),
        "conet.toml:13: guest.address: fd77:1::2 is already the address of guest `web`; give each \
         its own",
    );
    refused(
        &six("", "").replace("fd77:1::/64", "fd77:1::7/64"),
        "conet.toml:5: node.overlay: `fd77:1::7/64` is not valid; write a network of /16 to /126 \
         that guests can have, without host bits, as in \"fd77:1::/64\"",
    );
    refused(
        &six("\"fd77:2::/64\", ", ""),
        "conet.toml:5: node.overlay: `fd77:1::/64` is not valid; write one prefix of IPv4 and one \
         of IPv6 at most",
    );
    refused(
        &NODE.replace("overlay = \"10.77.1.0/24\"", "overlay = []"),
        "conet.toml:1: node.overlay: missing; add the guests' prefix, as in overlay = \
         \"10.77.1.0/24\"",
    );
    let peer = with("").replace("\"10.77.1.0/24\"", "[\"10.77.1.0/24\", \"fd77:1::/64\"]");
    refused(
        &peer.replace("10.77.2.0/24", "fd77:1::80/121"),
        "conet.toml:11: peer.allowed_ips: fd77:1::80/121 lies in this node's own overlay \
         fd77:1::/64; name the peer's own prefix",
    );
    let forwards = six("", &guest("web", "fd77:1::2"))
        .replace("[[guest]]", "forwards = [\"tcp:80:web\"]\n[[guest]]");
    refused(
        &forwards,
        "conet.toml:6: node.forwards: guest `web` has no IPv4 address, and forwards need one; give \
         it one of the overlay's",
    );
}

fn colinux(line: &str) -> String {
    format!("{NODE}{}line = '{line}'\n", guest("co", "10.77.1.2").replace("netns", "colinux"))
}

#[test]
fn a_line_of_colinux_makes_a_guest_with_its_card() {
    let config = Files::new(&colinux("eth1=tuntap,\"TAP 2\",00:ff:12:34:56:78")).load().unwrap();
    let line = config.guests[0].line.as_ref().unwrap();
    assert_eq!((config.guests[0].kind, line.card), (GuestKind::Colinux, 1));
    assert_eq!(line.to_string(), "eth1=tuntap,\"TAP 2\",00:ff:12:34:56:78");
    // Ports that slirp led to it are forwards like others.
    let slirp = colinux("eth0=slirp,,tcp:2222:22/udp:5000:6000:10");
    let forwards: Vec<_> = Files::new(&slirp).load().unwrap().forwards;
    let shown: Vec<_> = forwards.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["tcp:2222:co:22", "udp:5000-5009:co:6000-6009"]);
    refused(
        &slirp.replace("[[guest]]", "forwards = [\"tcp:2222:co\"]\n[[guest]]"),
        "conet.toml:6: node.forwards: tcp:2222:co takes ports that tcp:2222:co:22 takes; take other \
         ports of the host",
    );
}

#[test]
fn a_line_that_is_none_of_colinuxs_is_told() {
    refused(
        &colinux("eth0=vde,x"),
        "conet.toml:10: guest.line: `eth0=vde,x`: names no way of coLinux's; write tuntap, slirp, \
         pcap-bridge or ndis-bridge",
    );
    refused(
        &colinux("").replace("line = ''\n", ""),
        "conet.toml:6: guest.line: missing; add the card's line of its configuration, as in line = \
         'eth0=tuntap,\"TAP\"'",
    );
    refused(
        &colinux("eth0=tuntap").replace("colinux", "tap"),
        "conet.toml:10: guest.line: is for a guest in place of coLinux; give it kind = \"colinux\", \
         or leave this out",
    );
    refused(
        &colinux("eth0=slirp,,tcp:47700:22"),
        "conet.toml:6: guest.line: tcp:47700:co:22 takes tcp port 47700, which is this node's own for \
         links of processes; take other ports of the host",
    );
}
