//! Linux's own tunnels as the peer: WireGuard in a QEMU machine (Debian's kernel and
//! module, by emulation), `ipip` and `sit` in User-Mode Linux. Needs root and
//! `/dev/net/tun`; run by `cargo xtask peers`, which gets the kernels.
//!
//! ```text
//! namespace: Tunnel ─ conet0          guest kernel: wg0, or tun4 and tun6
//!                └─ tap0 192.0.2.1 ════ 192.0.2.2 ─┘
//! ```
//!
//! The guest takes 100 MB, says their SHA-256, and sends them back. A guest that says
//! nothing for a minute has failed.

#![cfg(feature = "peers")]
#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use common::{Scratch, config, ifname, inner, key, net};
use conet_netsys::{IfName, Sysctl};
use conet_testkit::machine::Machine;
use conet_testkit::{Need, privileged};
use conet_tunnel::{Config, Mode, PeerConfig, PresharedKey, Tunnel};

const MEGABYTES: usize = 100;
const PRIVATE: &str = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=";
const PRESHARED: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";
/// `REKEY_AFTER_TIME` of the whitepaper, §6.1.
const REKEY: Duration = Duration::from_secs(120);

/// In the guest, for each transfer: takes what comes to port 7000, says its hash, and
/// sends it to whoever asks at port 7001.
const ECHO: &str = "\
    busybox nc -l -p 7000 < /dev/null > /tmp/data\n\
    busybox sha256sum /tmp/data\n\
    busybox nc -l -p 7001 < /tmp/data\n";

/// The near end of the wire, once the machine has made it.
fn join(host: &Scratch) {
    let mut netlink = host.netlink();
    let tap = ifname("tap0");
    let began = Instant::now();
    while netlink.link(tap).unwrap().is_none() {
        assert!(began.elapsed() < Duration::from_secs(60), "the machine makes no tap0");
        thread::sleep(Duration::from_millis(20));
    }
    host.run(|| drop(Sysctl::DisableIpv6(Some(tap)).write("1")));
    netlink.add_address(tap, net("192.0.2.1/24")).unwrap();
    netlink.set_up(tap).unwrap();
    netlink.set_up(IfName::LOOPBACK).unwrap();
}

/// Connects as soon as somebody listens there. A machine beside an emulated one may be
/// so slow to answer ARP that it counts as not there at first.
fn connect(host: &Scratch, to: SocketAddr) -> TcpStream {
    let began = Instant::now();
    loop {
        match host.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(20))) {
            Ok(stream) => {
                stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
                return stream;
            }
            Err(error)
                if [ErrorKind::ConnectionRefused, ErrorKind::HostUnreachable]
                    .contains(&error.kind()) =>
            {
                let waited = began.elapsed();
                assert!(waited < Duration::from_secs(60), "nobody listens at {to}: {error}");
                thread::sleep(Duration::from_millis(100));
            }
            Err(error) => panic!("{to}: {error}"),
        }
    }
}

/// `MEGABYTES` there and back.
fn echo(host: &Scratch, machine: &mut Machine, address: IpAddr) {
    let bytes: Vec<u8> = (0..=250).cycle().take(MEGABYTES << 20).collect();
    let hash = ring::digest::digest(&ring::digest::SHA256, &bytes);
    let hash: String = hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let began = Instant::now();
    let mut stream = connect(host, (address, 7000).into());
    stream.write_all(&bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 0);
    let there = began.elapsed();
    assert_eq!(machine.wait_for("  /tmp/data").split_whitespace().next(), Some(hash.as_str()));
    let began = Instant::now();
    let mut got = Vec::with_capacity(bytes.len());
    connect(host, (address, 7001).into()).read_to_end(&mut got).unwrap();
    assert!(got == bytes, "what came back differs");
    println!("{address}: {MEGABYTES} MB there in {there:.1?}, back in {:.1?}", began.elapsed());
}

/// All that the peer sent was taken, both ways.
fn assert_whole(tunnel: &Tunnel, megabytes: u64) {
    let snapshot = tunnel.snapshot().unwrap();
    let peer = &snapshot.peers[0];
    assert!(peer.rx_bytes.min(peer.tx_bytes) > megabytes << 20, "{peer:?}");
    assert_eq!(peer.drops.total() + snapshot.drops.total(), 0, "{snapshot:?}");
}

#[test]
fn linuxs_ipip_and_sit_are_peers_like_any_other() {
    privileged!(
        Need::Tun,
        Need::Program("linux.uml"),
        Need::Program("busybox"),
        Need::Program("ip")
    );
    let host = Scratch::new();
    let script = format!(
        "M=/usr/lib/uml/modules/$(busybox uname -r)/kernel\n\
         for m in net/ipv4/tunnel4 net/ipv4/ip_tunnel net/ipv4/ipip lib/crc-ccitt \
             net/ipv6/ipv6 net/ipv6/sit; do busybox insmod $M/$m.ko; done\n\
         ip link set lo up; ip addr add 192.0.2.2/24 dev vec0; ip link set vec0 up\n\
         ip link add tun4 type ipip local 192.0.2.2 remote 192.0.2.1\n\
         ip link add tun6 type sit local 192.0.2.2 remote 192.0.2.1\n\
         ip addr add 10.77.2.1/32 dev tun4; ip link set tun4 mtu 1420 up\n\
         ip link set tun6 mtu 1420 up; ip addr add fd00:2::1/128 dev tun6\n\
         ip route add 10.77.1.0/24 dev tun4; ip route add fd00:1::/64 dev tun6\n\
         echo IS READY\n{ECHO}{ECHO}"
    );
    let command = host.command("linux.uml", &["vec0:transport=tap,ifname=tap0"]);
    let mut machine = Machine::uml(command, &script);
    join(&host);
    let mut ours = config(1, Mode::IpIp);
    ours.addresses.push(net("fd00:1::1/128"));
    ours.peers[0].allowed.push(net("fd00:2::/64"));
    let tunnel = host.start(ours).unwrap();
    machine.wait_for("IS READY");
    for address in [inner(2), "fd00:2::1".parse().unwrap()] {
        echo(&host, &mut machine, address);
    }
    // Its router solicitations are multicast, which must not come out of a tunnel.
    let snapshot = tunnel.snapshot().unwrap();
    let peer = &snapshot.peers[0];
    assert!(peer.rx_bytes.min(peer.tx_bytes) > (2 * MEGABYTES as u64) << 20, "{peer:?}");
    println!("dropped: {:?}", peer.drops.nonzero().collect::<Vec<_>>());
    machine.wait_for_end();
}

#[test]
fn linuxs_wireguard_is_a_peer_like_any_other() {
    privileged!(
        Need::Tun,
        Need::Program("qemu-system-x86_64"),
        Need::Program("busybox"),
        Need::Program("wg")
    );
    let host = Scratch::new();
    let script = format!(
        "ip link set lo up; ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up\n\
         echo {PRIVATE} > /private; echo {PRESHARED} > /preshared\n\
         ip link add wg0 type wireguard\n\
         wg set wg0 listen-port 51820 private-key /private peer {} preshared-key /preshared \
             endpoint 192.0.2.1:51820 allowed-ips 10.77.1.0/24\n\
         ip addr add 10.77.2.1/32 dev wg0; ip link set wg0 mtu 1420; ip link set wg0 up\n\
         ip route add 10.77.1.0/24 dev wg0\n\
         echo IS READY\n{ECHO}\
         echo HANDSHAKE $(wg show wg0 latest-handshakes)\n\
         busybox nc -l -p 7002 < /dev/null > /dev/null\n\
         echo HANDSHAKE $(wg show wg0 latest-handshakes)\n{ECHO}",
        key(1).public(),
    );
    let card = ["tap,id=n,ifname=tap0,script=no,downscript=no", "virtio-net-pci,netdev=n,romfile="];
    let card = ["-netdev", card[0], "-device", card[1]];
    let command = host.command("qemu-system-x86_64", &card);
    let mut machine = Machine::qemu(command, &["wireguard"], &["wg"], &script);
    join(&host);
    let mut ours = config(1, Mode::WireGuard);
    let preshared_key = Some(PresharedKey([7; 32]));
    ours.peers[0] = PeerConfig { preshared_key, ..ours.peers[0].clone() };
    let tunnel = host.start(Config { ..ours }).unwrap();
    machine.wait_for("IS READY");
    echo(&host, &mut machine, inner(2));
    assert_whole(&tunnel, MEGABYTES as u64);
    let first = machine.wait_for("HANDSHAKE ");

    // Traffic beyond the life of the first keys.
    let mut trickle = connect(&host, (inner(2), 7002).into());
    let age = || tunnel.snapshot().unwrap().peers[0].last_handshake.unwrap();
    let began = Instant::now();
    let before = age();
    while began.elapsed() + before < REKEY + Duration::from_secs(20) {
        trickle.write_all(b"still here").unwrap();
        thread::sleep(Duration::from_millis(500));
    }
    assert!(age() < Duration::from_secs(30), "no new keys: {:?}", age());
    drop(trickle);
    let second = machine.wait_for("HANDSHAKE ");
    assert_ne!(first, second, "the kernel has new keys as well");
    echo(&host, &mut machine, inner(2));
    assert_whole(&tunnel, 2 * MEGABYTES as u64);
    machine.wait_for_end();
}
