//! What a right file means, and what a wrong one is told.

mod guests;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;

use super::*;

/// RFC 8032 §7.1, test 1 and test 2.
const SEED: &str = "nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A=";
const OWN_PUBLIC: &str = "11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";
const OTHER_PUBLIC: &str = "PUAXw+hDiVqStwqnTRt+vJyYLM8uxJaMwM1V8Sr0Zgw=";

const NODE: &str = r#"[node]
name = "one"
private_key_file = "node.key"
address = "192.0.2.1"
overlay = "10.77.1.0/24"
"#;

const PEER: &str = r#"
[[peer]]
name = "two"
public_key = "PUAXw+hDiVqStwqnTRt+vJyYLM8uxJaMwM1V8Sr0Zgw="
endpoint = "192.0.2.2:47700"
allowed_ips = ["10.77.2.0/24"]
"#;

struct Files(TempDir);

impl Files {
    fn new(text: &str) -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        fs::write(files.path("conet.toml"), text).unwrap();
        fs::write(files.path("node.key"), format!("{SEED}\n")).unwrap();
        files.mode("node.key", 0o600);
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    fn load(&self) -> Result<Config, String> {
        let dir = format!("{}/", self.0.path().display());
        Config::load(&self.path("conet.toml")).map_err(|error| error.to_string().replace(&dir, ""))
    }
}

fn guest(name: &str, address: &str) -> String {
    format!("[[guest]]\nname = \"{name}\"\nkind = \"netns\"\naddress = \"{address}\"\n")
}

#[test]
fn what_guests_share_with_their_host_is_off_until_named() {
    let config = Files::new(NODE).load().unwrap();
    assert!(!config.node.shared_address && config.forwards.is_empty());
    assert_eq!(config.node.host_ports, HostPorts::Only(Vec::new()));
    let text = format!(
        "{NODE}shared_address = true\nhost_ports = [\"tcp:53\", \"udp:5000-5010\"]\n\
         forwards = [\"tcp:2222:web:22\", \"auto:web\"]\n{}",
        guest("web", "10.77.1.2")
    );
    let config = Files::new(&text).load().unwrap();
    assert!(config.node.shared_address);
    assert_eq!(config.forwards[1].to_string(), "auto:web");
    let HostPorts::Only(ports) = config.node.host_ports else { panic!() };
    assert_eq!((ports[0].first, ports[1].last), (53, 5010));
    let all = Files::new(&format!("{NODE}host_ports = [\"all\"]\n")).load().unwrap();
    assert_eq!(all.node.host_ports, HostPorts::All);
}

#[test]
fn a_wrong_forward_is_told() {
    let with = |forwards: &str| format!("{NODE}{forwards}\n{}", guest("web", "10.77.1.2"));
    for (forwards, said) in [
        ("forwards = [\"tcp:80:wep\"]", "no [[guest]] is named `wep`; did you mean `web`?"),
        (
            "forwards = [\"tcp:80-90:web\", \"tcp:90:web:91\"]",
            "tcp:90:web:91 takes ports that tcp:80-90:web takes; take other ports of the host",
        ),
        (
            "forwards = [\"udp:51820:web\"]",
            "udp:51820:web takes udp port 51820, which is this node's own for the tunnel; take \
             other ports of the host",
        ),
        (
            "forwards = [\"tcp:127.0.0.1:80:web\"]",
            "tcp:127.0.0.1:80:web is bound to 127.0.0.1, from where nothing goes to a guest; give \
             an IPv4 address of this host's, or none for all",
        ),
        (
            "forwards = [\"tcp:[::]:80:web\"]",
            "tcp:[::]:80:web is bound to ::, and forwards are IPv4's; give an IPv4 address \
             of this host's, or none for all",
        ),
        (
            "forwards = [\"tcp:1-5000:web:2-5001\"]",
            "tcp:1-5000:web:2-5001 changes ports, of which forwards may change 4096 in all; use \
             the same ports inside, or fewer",
        ),
    ] {
        refused(&with(forwards), &format!("conet.toml:6: node.forwards: {said}"));
    }
    refused(
        &with("forwards = [\"80:web\"]"),
        "conet.toml:6: node.forwards: `80:web` is not valid; write a forward, as in \
         tcp:2222:web:22, udp:5000-5010:web, tcp:192.0.2.1:80:web or auto:web",
    );
    refused(
        &with("host_ports = [\"tcp:1\", \"all\"]"),
        "conet.toml:6: node.host_ports: `all` is not valid; write [\"all\"] alone, or ports",
    );
}

/// Asserts that the file is refused with exactly this line.
#[track_caller]
fn refused(text: &str, expected: &str) {
    let error = Files::new(text).load().unwrap_err();
    assert_eq!(error, expected);
    assert!(!error.contains('\n'), "one line: {error}");
}

/// [`NODE`] with a line added to it (line 6), then [`PEER`] (lines 7 to 11).
fn with(line: &str) -> String {
    format!("{NODE}{line}\n{}", PEER.trim_start())
}

#[test]
fn the_least_file_takes_its_defaults() {
    let config = Files::new(NODE).load().unwrap();
    assert_eq!(config.node.identity.public().to_string(), OWN_PUBLIC);
    assert_eq!(config.node.port, 47_700);
    assert_eq!(config.node.wireguard_port, 51_820);
    assert_eq!(config.node.socket, Path::new("/run/conet/control.sock"));
    let gateways: Vec<_> = config.node.overlay.gateways().collect();
    assert_eq!(gateways, [IpAddr::from([10, 77, 1, 1])]);
    assert_eq!(config.node.guest_uid_base, 0x7000_0000);
    assert_eq!(config.node.clock_offset, ClockOffset::default());
    assert!(!config.node.allow_root);
    assert!(config.peers.is_empty() && config.guests.is_empty());
}

#[test]
fn every_key_is_read() {
    let text = format!(
        r#"[node]
name = "one"
private_key_file = "node.key"
address = "192.0.2.1"
port = 1000
wireguard_port = 1001
overlay = "10.77.1.0/24"
mode = "ipip"
state_dir = "/run/elsewhere"
socket = "/run/s"
guests_from = ["two"]
host_for_us = ["three"]
plain_links = ["three"]
allow_root = true
guest_uid_base = 0x10_0000
link_timeout = 7
tcp_fallback = false
clock_offset = "-90s"
tun_offload = false
udp_gso = false
ipip_kernel = false
{PEER}persistent_keepalive = 25
wireguard_endpoint = "192.0.2.9:9"

[[peer]]
name = "three"
mode = "wireguard"
public_key = "/FHNjmIYoaONpH7QAjDwWAgW7RO6MwOsXeuRFUiQgCU="

[[peer]]
name = "four"
mode = "ip-udp"
wireguard_key = "{OWN_PUBLIC}"

[[guest]]
name = "web"
kind = "netns"
address = "10.77.1.2"
"#
    );
    let config = Files::new(&text).load().unwrap();
    let node = &config.node;
    assert_eq!((node.port, node.wireguard_port), (1000, 1001));
    assert_eq!(node.socket, Path::new("/run/s"));
    assert_eq!(node.state_dir, Path::new("/run/elsewhere"));
    assert_eq!(node.guest_uid_base, 0x10_0000);
    assert_eq!(node.link_timeout, Duration::from_secs(7));
    assert!(!node.tcp_fallback);
    assert_eq!(node.clock_offset.nanoseconds, -90_000_000_000);
    assert!(node.allow_root);
    let offloads = conet_tunnel::Offloads { receive: true, ..conet_tunnel::Offloads::NONE };
    assert_eq!(node.offloads, offloads);
    let two = config.peer("two").unwrap();
    assert_eq!(two.mode, Mode::IpIp);
    assert_eq!(two.grants, Grants { guests_from: true, ..Grants::default() });
    assert_eq!(two.persistent_keepalive, Some(Duration::from_secs(25)));
    assert_eq!(two.wireguard_endpoint, "192.0.2.9:9".parse().ok());
    assert_eq!(two.allowed_ips, ["10.77.2.0/24".parse().unwrap()]);
    let three = config.peer("three").unwrap();
    assert_eq!(three.mode, Mode::WireGuard);
    assert_eq!(three.grants, Grants { host_for_us: true, plain_links: true, ..Grants::default() });
    assert_eq!(three.endpoint, None);
    assert_eq!(config.peer("four").unwrap().key.identity(), None);
    assert_eq!(config.peer("four").unwrap().mode, Mode::IpUdp);
    assert_eq!(config.guests[0].addresses, [IpAddr::from([10, 77, 1, 2])]);
}

#[test]
fn grants_are_off_until_named() {
    let config = Files::new(&with("")).load().unwrap();
    assert_eq!(config.peer("two").unwrap().grants, Grants::default());
    assert_eq!(config.peer("two").unwrap().wireguard_endpoint, "192.0.2.2:51820".parse().ok());
}

#[test]
fn unknown_keys_and_sections_are_refused() {
    refused(&with("prot = 1"), "conet.toml:6: node.prot: unknown key; did you mean `port`?");
    refused(
        &format!("{NODE}{PEER}endpiont = \"x\""),
        "conet.toml:12: peer.endpiont: unknown key; did you mean `endpoint`?",
    );
    refused(
        &format!("{NODE}[[guest]]\ncolour = 1"),
        "conet.toml:7: guest.colour: unknown key; known are: name, kind, address, addresses, rate, rate_from, rate_to, line, queues",
    );
    refused(
        &format!("{NODE}[[peers]]\nname = \"a\""),
        "conet.toml:6: peers: unknown section; did you mean `peer`?",
    );
}

#[test]
fn what_must_be_there_is_asked_for() {
    refused(
        "",
        "conet.toml:1: node: missing; add a [node] section with private_key_file, address and overlay",
    );
    let without = |key: &str| -> String {
        NODE.lines().filter(|line| !line.starts_with(key)).map(|line| format!("{line}\n")).collect()
    };
    refused(
        &without("address"),
        "conet.toml:1: node.address: missing; add this host's own address, as in address = \"192.0.2.1\"",
    );
    refused(
        &without("overlay"),
        "conet.toml:1: node.overlay: missing; add the guests' prefix, as in overlay = \"10.77.1.0/24\"",
    );
    refused(
        &without("private_key_file"),
        "conet.toml:1: node.private_key_file: missing; make a key with (umask 077; conet keygen > \
         node.key), and add private_key_file = \"node.key\"",
    );
    refused(
        &format!("{NODE}[[peer]]\nname = \"two\"\n"),
        "conet.toml:6: peer.public_key: missing; add the key that `conet pubkey` prints there (or \
         wireguard_key, for a peer that only tunnels)",
    );
    refused(
        &format!("{NODE}[[guest]]\nname = \"web\"\nkind = \"netns\"\n"),
        "conet.toml:6: guest.address: missing; add an address of the overlay, as in address = \
         \"10.77.1.2\"",
    );
}

#[test]
fn wrong_types_and_values_are_refused_with_what_to_write() {
    for (line, expected) in [
        ("port = \"x\"", "port: is a string; write a port from 1 to 65535"),
        ("port = 0", "port: `0` is not valid; write a port from 1 to 65535"),
        ("port = 70000", "port: `70000` is not valid; write a port from 1 to 65535"),
        (
            "port = 51820",
            "wireguard_port: 51820 is already the port for sessions; give WireGuard another",
        ),
        ("mode = \"fou\"", "mode: `fou` is not valid; write \"wireguard\", \"ip-udp\" or \"ipip\""),
        ("allow_root = 1", "allow_root: is an integer; write true or false"),
        (
            "guest_uid_base = 1000",
            "guest_uid_base: `1000` is not valid; write a uid from 65536 to 4294901759",
        ),
        ("link_timeout = 4", "link_timeout: `4` is not valid; write seconds from 5 to 86400"),
        (
            "clock_offset = \"fast\"",
            "clock_offset: `fast` is not valid; write a signed number with ns, us, ms, s, m, h or \
             d, as in \"-90s\"",
        ),
        (
            "host_for_us = \"two\"",
            "host_for_us: is a string; write a list of names of peers, as in [\"a\", \"b\"]",
        ),
        (
            "private_key = \"x\"",
            "private_key_file: given together with private_key; keep one of the two",
        ),
    ] {
        // The two that stand elsewhere name their own line.
        let at = match expected {
            text if text.starts_with("wireguard_port") => 1,
            text if text.starts_with("private_key_file") => 3,
            _ => 6,
        };
        refused(&with(line), &format!("conet.toml:{at}: node.{expected}"));
    }
    refused(
        &NODE.replace("10.77.1.0/24", "10.77.1.7/24"),
        "conet.toml:5: node.overlay: `10.77.1.7/24` is not valid; write a network of /8 to /30 \
         without host bits, as in \"10.77.1.0/24\"",
    );
    refused(
        &NODE.replace("\"one\"", "\"a/b\""),
        "conet.toml:2: node.name: `a/b` is not valid; write 1 to 63 letters, digits, `.`, `_` or \
         `-`, the first a letter or digit",
    );
    refused(
        &with("").replace("\"two\"", "\"home\""),
        "conet.toml:8: peer.name: `home` is not valid; write another name: `home` is where a \
         process comes from",
    );
    refused(
        &format!("{NODE}[peer]\nname = \"two\"\n"),
        "conet.toml:6: peer: is not a list of sections; write each one as a section of its own, \
         with two brackets: [[peer]], [[guest]]",
    );
    let syntax = Files::new(&with("port = = 1")).load().unwrap_err();
    assert!(syntax.starts_with("conet.toml:6: file: not valid TOML: "), "{syntax}");
}

#[test]
fn keys_are_checked() {
    refused(
        &with("").replace(OTHER_PUBLIC, "AAAA"),
        "conet.toml:9: peer.public_key: 3 bytes long where a key has 32; give the 44 characters \
         that `conet keygen` or `conet pubkey` prints",
    );
    refused(
        &with("").replace(OTHER_PUBLIC, "no key"),
        "conet.toml:9: peer.public_key: not base64; give the 44 characters that `conet keygen` or \
         `conet pubkey` prints",
    );
    refused(
        &with("").replace(OTHER_PUBLIC, OWN_PUBLIC),
        "conet.toml:9: peer.public_key: the key is this node's own; give the peer's",
    );
    refused(
        &format!("{}{}", with(""), PEER.replace("\"two\"", "\"three\"")),
        "conet.toml:15: peer.public_key: the key is already that of peer `two`; each peer has its own",
    );
}

#[test]
fn a_private_key_that_others_can_read_is_refused() {
    let files = Files::new(NODE);
    files.mode("node.key", 0o640);
    assert_eq!(
        files.load().unwrap_err(),
        "conet.toml:3: node.private_key_file: node.key has mode 0640, so others can read the \
         secret in it; run: chmod 600 node.key"
    );
    let files = Files::new(
        &NODE.replace("private_key_file = \"node.key\"", &format!("private_key = \"{SEED}\"")),
    );
    files.mode("conet.toml", 0o644);
    assert_eq!(
        files.load().unwrap_err(),
        "conet.toml:3: node.private_key: conet.toml has mode 0644, so others can read the secret \
         in it; run: chmod 600 conet.toml"
    );
    files.mode("conet.toml", 0o600);
    assert_eq!(files.load().unwrap().node.identity.public().to_string(), OWN_PUBLIC);
}

#[test]
fn a_preshared_key_is_read_where_others_cannot_and_not_shown() {
    let key = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";
    let files = Files::new(&format!("{NODE}{PEER}preshared_key = \"{key}\"\n"));
    files.mode("conet.toml", 0o600);
    let config = files.load().unwrap();
    assert_eq!(config.peer("two").unwrap().preshared_key, key.parse().ok());
    assert!(!format!("{config:?}").contains(key));
    files.mode("conet.toml", 0o644);
    let error = files.load().unwrap_err();
    assert!(error.contains("peer.preshared_key: conet.toml has mode 0644"), "{error}");
    let files = Files::new(&format!("{NODE}{PEER}preshared_key = \"secret but wrong\"\n"));
    files.mode("conet.toml", 0o600);
    let error = files.load().unwrap_err();
    assert!(error.contains("`wg genpsk`") && !error.contains("secret"), "{error}");
}

#[test]
fn files_that_are_not_there_are_named() {
    let files = Files::new(NODE);
    fs::remove_file(files.path("node.key")).unwrap();
    assert_eq!(
        files.load().unwrap_err(),
        "conet.toml:3: node.private_key_file: node.key cannot be read (No such file or directory \
         (os error 2)); make one: (umask 077; conet keygen > node.key)"
    );
    fs::remove_file(files.path("conet.toml")).unwrap();
    assert_eq!(
        files.load().unwrap_err(),
        "conet.toml: cannot be read (No such file or directory (os error 2)): write one, or name \
         it with -c"
    );
}

#[test]
fn grants_name_peers_that_have_an_identity() {
    refused(
        &with("host_for_us = [\"tow\"]"),
        "conet.toml:6: node.host_for_us: no [[peer]] is named `tow`; did you mean `two`?",
    );
    refused(
        &format!("{NODE}guests_from = [\"two\"]\n"),
        "conet.toml:6: node.guests_from: no [[peer]] is named `two`; there is none",
    );
    refused(
        &with("guests_from = [\"two\"]").replace("public_key", "wireguard_key"),
        "conet.toml:6: node.guests_from: peer `two` has only a wireguard_key, which grants \
         tunnelling alone; give its public_key",
    );
}

#[test]
fn names_prefixes_and_addresses_belong_to_one() {
    refused(
        &with("").replace("\"two\"", "\"one\""),
        "conet.toml:8: peer.name: `one` is already the name of this node; give each its own",
    );
    let three = "[[peer]]\nname = \"three\"\nwireguard_key = \"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"\n";
    refused(
        &format!("{}{three}allowed_ips = [\"10.77.2.9/24\"]\n", with("")),
        "conet.toml:15: peer.allowed_ips: 10.77.2.0/24 is already routed to peer `two`; a prefix \
         belongs to one peer",
    );
    refused(
        &with("").replace("10.77.2.0/24", "10.77.1.128/25"),
        "conet.toml:11: peer.allowed_ips: 10.77.1.128/25 lies in this node's own overlay \
         10.77.1.0/24; name the peer's own prefix",
    );
    // A wider one beside them is a route of last resort, not an overlap.
    let wide = format!("{}{three}allowed_ips = [\"10.77.0.0/16\"]\n", with(""));
    assert_eq!(Files::new(&wide).load().unwrap().peers.len(), 2);

    refused(
        &format!("{NODE}{}", guest("web", "10.77.2.2")),
        "conet.toml:9: guest.address: 10.77.2.2 is not a guest's address in overlay 10.77.1.0/24; \
         take one of the overlay's",
    );
    refused(
        &format!("{NODE}{}", guest("web", "10.77.1.1")),
        "conet.toml:9: guest.address: 10.77.1.1 is not a guest's address in overlay 10.77.1.0/24; \
         the first and the last are the network's, the second is the gateway's",
    );
    refused(
        &format!("{NODE}{}{}", guest("web", "10.77.1.2"), guest("db", "10.77.1.2")),
        "conet.toml:13: guest.address: 10.77.1.2 is already the address of guest `web`; give each \
         its own",
    );
    refused(
        &format!("{NODE}{}{}", guest("web", "10.77.1.2"), guest("web", "10.77.1.3")),
        "conet.toml:11: guest.name: `web` is already the name of a guest; give each its own",
    );
}

#[test]
fn packets_to_peers_do_not_loop_and_ipip_peers_are_told_apart() {
    refused(
        &with("").replace("10.77.2.0/24", "192.0.2.0/24"),
        "conet.toml:7: peer.allowed_ips: 192.0.2.0/24 contains the endpoint 192.0.2.2 of peer \
         `two`, whose packets would loop; leave it out",
    );
    let ipip = with("mode = \"ipip\"");
    refused(
        &ipip.replace("endpoint = \"192.0.2.2:47700\"\n", ""),
        "conet.toml:7: peer.endpoint: missing or not IPv4; mode ipip needs the peer's address, as \
         in endpoint = \"192.0.2.2:47700\"",
    );
    let three = "[[peer]]\nname = \"three\"\nendpoint = \"192.0.2.2:1\"\n\
                 wireguard_key = \"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"\n";
    refused(
        &format!("{ipip}{three}"),
        "conet.toml:12: peer.endpoint: 192.0.2.2 is already the address of peer `two`; in mode \
         ipip each needs its own",
    );
    assert!(Files::new(&format!("{}{three}", with(""))).load().is_ok());
}

#[test]
fn a_guests_name_fits_its_link() {
    refused(
        &format!(
            "{NODE}[[guest]]\nname = \"a-name-of-16-byte\"\nkind = \"netns\"\naddress = \"10.77.1.2\"\n"
        ),
        "conet.toml:7: guest.name: `a-name-of-16-byte` is longer than 15 bytes, the most for a \
         link; give a shorter name",
    );
}

#[test]
fn offsets_of_clocks() {
    let parse = |text: &str| text.parse::<ClockOffset>().map(|offset| offset.nanoseconds);
    assert_eq!(parse("+1500ms"), Ok(1_500_000_000));
    assert_eq!(parse("-2h"), Ok(-7_200_000_000_000));
    assert_eq!(parse("3d"), Ok(259_200_000_000_000));
    for wrong in ["", "5", "s", "1.5s", "9999999999d", "1 s", "1w"] {
        assert_eq!(parse(wrong), Err(InvalidOffset), "{wrong}");
    }
}

proptest::proptest! {
    /// Any text is a configuration or an error, never a panic.
    #[test]
    fn any_text_is_answered(text in "\\PC{0,200}") {
        let files = Files::new(&text);
        proptest::prop_assert!(files.load().is_err());
    }
}

#[test]
fn a_guests_rate_is_for_both_ways_or_for_each() {
    let with = |kind: &str, keys: &str| {
        let text = guest("web", "10.77.1.2").replace("netns", kind);
        Files::new(&format!("{NODE}{text}{keys}\n")).load()
    };
    let config = with("tap", "rate = \"100mbit\"\nrate_to = \"1gbit,50kpps\"").unwrap();
    let rates = config.guests[0].rates;
    let shown = [rates.from_guest, rates.to_guest].map(|rate| rate.to_string());
    assert_eq!(shown, ["100mbit", "1gbit,50kpps"]);
    let said = with("tap", "rate = \"fast\"").unwrap_err();
    assert!(said.contains("guest.rate") && said.contains("\"100mbit\""), "{said}");
    let said = with("netns", "rate_from = \"1mbit\"").unwrap_err();
    assert!(said.contains("guest.rate_from") && said.contains("kind = \"tap\""), "{said}");
}

#[test]
fn a_machine_of_qemus_may_have_several_pairs_of_queues() {
    let with = |kind: &str, keys: &str| {
        let text = guest("web", "10.77.1.2").replace("netns", kind);
        Files::new(&format!("{NODE}{text}{keys}\n")).load().map(|one| one.guests[0].queues)
    };
    assert_eq!((with("qemu", ""), with("qemu", "queues = 16")), (Ok(1), Ok(16)));
    assert_eq!(with("uml", "queues = 1"), Ok(1));
    for (kind, queues) in [("qemu", "0"), ("qemu", "17"), ("uml", "2"), ("netns", "4")] {
        let said = with(kind, &format!("queues = {queues}")).unwrap_err();
        assert!(said.contains("guest.queues") && said.contains("up to 16"), "{said}");
    }
    assert!(with("qemu", "queues = \"2\"").is_err());
}

#[test]
fn guests_are_told_of_named_resolvers_or_of_the_hosts() {
    let dns = |keys: &str| Files::new(&format!("{NODE}{keys}\n")).load().map(|one| one.node.dns);
    assert_eq!(dns(""), Ok(None));
    assert_eq!(dns("dns = []"), Ok(Some(Vec::new())));
    assert_eq!(dns("dns = [\"9.9.9.9\"]"), Ok(Some(vec![IpAddr::from([9, 9, 9, 9])])));
    let said = dns("dns = [\"127.0.0.1\"]").unwrap_err();
    assert!(said.contains("node.dns") && said.contains("127.0.0.1"), "{said}");
}
