use proptest::prelude::*;

use super::*;
use crate::config::Config;

/// Base64 of 32 bytes of 2, 7, 3 and 4.
const PRIVATE: &str = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=";
const SHARED: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";
const ONE: &str = "AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=";
const TWO: &str = "BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ=";

fn whole() -> String {
    format!(
        "# a comment\n[Interface]\nPrivateKey = {PRIVATE} # ours\nlistenport=51821\n\
         Address = 10.8.0.5/24, fd00::5/64\nAddress = 10.9.0.1/32\nMTU = 1420\nTable = auto\n\
         FwMark = off\nSaveConfig = false\n\n[PEER]\nPublicKey = {ONE}\n\
         PresharedKey = {SHARED}\nEndpoint = 192.0.2.2:51820\nAllowedIPs = 10.8.0.0/25, fd01::/64\n\
         AllowedIPs = 10.8.0.200\nPersistentKeepalive = 25\n[Peer]\nPublicKey = {TWO}\n\
         AllowedIPs =\nPersistentKeepalive = off\nEndpoint = [2001:db8::1]:7\n"
    )
}

fn choice() -> NodeChoice {
    NodeChoice {
        address: "0.0.0.0".parse().unwrap(),
        overlay: "10.77.1.0/24".parse().unwrap(),
        name: Some("one".to_owned()),
    }
}

fn load(text: &str) -> Result<Config, String> {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("conet.toml");
    std::fs::write(&file, text).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    Config::load(&file).map_err(|error| error.to_string())
}

#[test]
fn every_key_is_carried_over() {
    let parsed = parse(&whole()).unwrap();
    let text = parsed.to_toml(&Identity::generate().unwrap(), &choice());
    let config = load(&text).unwrap();
    let node = &config.node;
    assert_eq!(**node.wireguard_private_key.as_ref().unwrap(), [2; 32]);
    assert_eq!((node.wireguard_port, node.name.as_str()), (51821, "one"));
    let own: Vec<_> = node.tunnel_addresses.iter().map(ToString::to_string).collect();
    assert_eq!(own, ["10.8.0.5", "fd00::5", "10.9.0.1"]);
    let [one, two] = &config.peers[..] else { panic!() };
    assert_eq!(one.tunnel_key().0, [3; 32]);
    assert_eq!(one.preshared_key.unwrap().0, [7; 32]);
    assert_eq!(one.wireguard_endpoint, Some("192.0.2.2:51820".parse().unwrap()));
    assert_eq!(one.persistent_keepalive.unwrap().as_secs(), 25);
    let prefixes: Vec<_> = one.allowed_ips.iter().map(ToString::to_string).collect();
    assert_eq!(prefixes, ["10.8.0.0/25", "fd01::/64", "10.8.0.200/32"]);
    assert_eq!((two.tunnel_key().0, two.persistent_keepalive), ([4; 32], None));
    assert!(two.allowed_ips.is_empty() && two.preshared_key.is_none());
}

#[test]
fn the_overlay_follows_from_an_address_that_can_be_a_gateway() {
    let overlay = |address: &str| {
        let text = format!("[Interface]\nPrivateKey={PRIVATE}\nAddress={address}");
        parse(&text).unwrap().overlay().map(|net| net.to_string())
    };
    assert_eq!(overlay("10.8.0.1/24").as_deref(), Some("10.8.0.0/24"));
    assert_eq!(overlay("fd00::1/64, 10.8.0.5/30").as_deref(), Some("10.8.0.4/30"));
    for none in ["10.8.0.5/24", "10.8.0.1/32", "fd00::1/64", ""] {
        assert_eq!(overlay(none), None, "{none}");
    }
}

#[test]
fn what_conet_has_not_is_refused_by_name_and_line() {
    for (from, to, said) in [
        ("MTU = 1420", "MTU = 1380", "line 7: MTU: conet has no such thing; its device has 1420"),
        ("Table = auto", "Table = off", "line 8: Table: conet has no such thing; routes are"),
        ("FwMark = off", "FwMark = 0x7", "line 9: FwMark: conet has no such thing; route by"),
        ("SaveConfig = false", "saveconfig = true", "line 10: saveconfig: conet has no such"),
        ("MTU = 1420", "DNS = 1.1.1.1", "line 7: DNS: conet has no such thing; set it for the"),
        ("MTU = 1420", "PostUp = x", "line 7: PostUp: conet has no such thing; run it where"),
        ("MTU = 1420", "PreUp = x", "line 7: PreUp: "),
        ("MTU = 1420", "PreDown = x", "line 7: PreDown: "),
        ("MTU = 1420", "PostDown = x", "line 7: PostDown: "),
        ("MTU = 1420", "Mtu = 1420\nmtu = 1420", "line 8: mtu: given twice; keep one"),
        ("MTU = 1420", "Jc = 4", "line 7: Jc: no key of wg-quick's; take it out"),
        ("[PEER]", "[Interface]", "line 12: [Interface]: given twice; keep one"),
        ("# a comment", "a = b", "line 1: a: neither [Interface], [Peer] nor KEY = VALUE"),
        ("# a comment", "[Peers]", "line 1: (a line): neither [Interface], [Peer]"),
        ("listenport=51821", "listenport=0", "line 4: listenport: not a port from 1 to 65535"),
        ("192.0.2.2:51820", "a.example:51820", "line 15: Endpoint: conet has no such thing; names"),
        ("192.0.2.2:51820", "192.0.2.2", "line 15: Endpoint: not an address and a port"),
        ("10.8.0.0/25,", "10.8.0.0/33,", "line 16: AllowedIPs: not addresses with prefix lengths"),
        ("10.8.0.0/25,", "0.0.0.0/0,", "line 17: AllowedIPs: 0.0.0.0/0 contains the endpoint 192"),
        ("AllowedIPs =\n", "AllowedIPs = fd01::/64\n", "line 21: AllowedIPs: fd01::/64 is the"),
        ("Keepalive = 25", "Keepalive = 65536", "line 18: PersistentKeepalive: not off or"),
        (TWO, ONE, "line 20: PublicKey: two peers have this key; keep one"),
    ] {
        let text = whole().replacen(from, to, 1);
        assert_ne!(text, whole(), "{from}");
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.starts_with(said), "{to}: {error}");
    }
    for (without, said) in [
        ("PrivateKey", "line 2: PrivateKey: missing; add it"),
        ("[Interface]", "line 2: PrivateKey: neither [Interface]"),
        ("PublicKey", "line 12: PublicKey: missing; add it"),
    ] {
        let text = whole();
        let lines: Vec<_> = text.lines().collect();
        let at = lines.iter().position(|line| line.starts_with(without)).unwrap();
        let text = [&lines[..at], &lines[at + 1..]].concat().join("\n");
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.starts_with(said), "{without}: {error}");
    }
    assert_eq!(parse("").unwrap_err().to_string(), "line 1: [Interface]: missing; add it");
}

#[test]
fn no_secret_is_shown() {
    let half = &PRIVATE[..20];
    for broken in [
        whole().replace("PrivateKey = ", "PrivateKey "),
        whole().replace("PrivateKey = ", ""),
        whole().replace(PRIVATE, half),
        whole().replace(SHARED, &SHARED[..20]),
        whole().replace("[Interface]", PRIVATE),
        whole().replace(&format!("PublicKey = {ONE}"), &format!("PublicKey = {half}")),
    ] {
        let error = parse(&broken).unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains(half) && !shown.contains(&SHARED[..20]), "{shown}");
    }
    let shown = format!("{:?}", parse(&whole()).unwrap());
    assert!(!shown.contains(half) && !shown.contains("2, 2"), "{shown}");
}

proptest! {
    #[test]
    fn any_text_is_refused_or_carried_over(lines in prop::collection::vec(
        prop_oneof![
            Just("[Interface]".to_owned()),
            Just("[Peer]".to_owned()),
            Just(format!("PrivateKey={PRIVATE}")),
            Just(format!("PublicKey={ONE}")),
            Just(format!("PublicKey={TWO}")),
            "(Address|AllowedIPs) = 1?[0-9]\\.[0-9]\\.0\\.0/[12][0-9]",
            "Endpoint = 192\\.0\\.2\\.[0-9]:[0-9]{1,5}",
            "[ -~]{0,30}",
        ], 0..12)) {
        if let Ok(parsed) = parse(&lines.join("\n")) {
            let text = parsed.to_toml(&Identity::from_seed(&[9; 32]), &choice());
            // Whatever conet.toml refuses, it is not the text.
            if let Err(error) = load(&text) {
                prop_assert!(!error.contains("TOML") && !error.contains("unknown"), "{}", error);
            }
        }
    }
}
