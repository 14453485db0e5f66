//! Mode `ipip` in the kernel beside its process: which may be stopped, killed and begun
//! anew, and leaves nothing. Needs root and Linux 6.6.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]

mod common;

use std::env;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, UdpSocket};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use aya::programs::{SchedClassifier, TcAttachType};
use common::{Scratch, config, ifname, inner, key, net, transfer, wire};
use conet_netsys::{Route, Veth};
use conet_testkit::{Need, privileged};
use conet_tunnel::{Config, IpipPath, Mode, Offloads, Tunnel};
use rustix::process::{Pid, Signal, kill_process};

const PATIENCE: Duration = Duration::from_secs(30);
/// Which of the two ends a process is.
const END: &str = "CONET_TEST_END";

fn both_families(n: u8) -> Config {
    let mut config = config(n, Mode::IpIp);
    config.addresses.push(net(&format!("fd00:{n}::1/128")));
    config.peers[0].allowed.push(net(&format!("fd00:{}::/32", 3 - n)));
    config
}

/// A tunnel in a process of its own.
struct Apart(Child, BufReader<ChildStdout>);

impl Apart {
    fn start(end: &Scratch, n: u8) -> Self {
        let this = env::current_exe().unwrap();
        let arguments = ["--exact", "a_process_with_a_tunnel", "--nocapture"];
        let mut command: Command = end.command(this.to_str().unwrap(), &arguments);
        let command = command.env(END, n.to_string()).stdout(Stdio::piped());
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self(child, output)
    }

    fn wait_for(&mut self, word: &str) {
        let mut line = String::new();
        while line.trim() != word {
            line.clear();
            assert_ne!(self.1.read_line(&mut line).unwrap(), 0, "ended before {word}");
        }
    }

    fn stop(&self) {
        kill_process(Pid::from_child(&self.0), Signal::STOP).unwrap();
        let began = Instant::now();
        while self.stat()[0] != "T" {
            assert!(began.elapsed() < PATIENCE);
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ticks of processor time so far (`proc_pid_stat(5)`, fields 14 and 15).
    fn ticks(&self) -> u64 {
        self.stat()[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum()
    }

    /// From its state on, which is field 3.
    fn stat(&self) -> Vec<String> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
        fields.map(ToOwned::to_owned).collect()
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Not a test: what [`Apart`] runs; nothing by itself. It says when the other end is
/// carried in the kernel, and ends with its standard input.
#[test]
fn a_process_with_a_tunnel() {
    let Ok(end) = env::var(END) else { return };
    let n: u8 = end.parse().unwrap();
    let tunnel = Tunnel::start(both_families(n)).unwrap();
    println!("\nup");
    thread::spawn(move || {
        while !tunnel.snapshot().unwrap().peer(key(3 - n).public()).unwrap().in_kernel {
            thread::sleep(Duration::from_millis(20));
        }
        println!("\ncarried");
        thread::park();
    });
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// Keeps both ends in use until `done`.
fn exchange(ends: &[Scratch; 2], done: impl FnOnce() + Send) {
    let sockets = [0, 1].map(|i: usize| {
        let own = inner(u8::try_from(i).unwrap() + 1);
        ends[i].run(|| UdpSocket::bind((own, 0)).unwrap())
    });
    let stop = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for (socket, to) in sockets.iter().zip([inner(2), inner(1)]) {
                    // A tunnel that is not there refuses.
                    drop(socket.send_to(b"in use", (to, 9)));
                }
                thread::sleep(Duration::from_millis(20));
            }
        });
        done();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

fn hooks(end: &Scratch, link: &str, at: TcAttachType) -> usize {
    end.run(|| SchedClassifier::query_tcx(link, at).unwrap().1.len())
}

#[test]
fn packets_pass_while_both_daemons_are_stopped_and_nothing_stays_when_they_are_killed() {
    privileged!(Need::Tun);
    if !common::kernel_carries() {
        return;
    }
    let ends = wire();
    let [one, two] = &ends;
    let mut apart = [Apart::start(one, 1), Apart::start(two, 2)];
    apart.iter_mut().for_each(|end| end.wait_for("up"));
    exchange(&ends, || apart.iter_mut().for_each(|end| end.wait_for("carried")));
    assert_eq!(hooks(one, "eth0", TcAttachType::Ingress), 1);
    assert_eq!(hooks(one, "conet0", TcAttachType::Egress), 1);

    apart.iter().for_each(Apart::stop);
    let ticks = || apart.iter().map(Apart::ticks).sum::<u64>();
    let before = ticks();
    for to in [[inner(2), inner(1)], ["fd00:2::1", "fd00:1::1"].map(|a| a.parse().unwrap())] {
        let there = transfer(one, two, to[0], 64);
        let back = transfer(two, one, to[1], 64);
        println!("{there:.0} and {back:.0} Mb/s");
    }
    assert_eq!(ticks(), before, "no process has run");

    // As a crash: nothing is tidied up by anybody.
    for end in &mut apart {
        end.0.kill().unwrap();
        end.0.wait().unwrap();
    }
    for end in &ends {
        let began = Instant::now();
        while hooks(end, "eth0", TcAttachType::Ingress) != 0 {
            assert!(began.elapsed() < PATIENCE);
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(end.netlink().link(ifname("conet0")).unwrap(), None);
    }
    let mut again = [Apart::start(one, 1), Apart::start(two, 2)];
    again.iter_mut().for_each(|end| end.wait_for("up"));
    exchange(&ends, || again.iter_mut().for_each(|end| end.wait_for("carried")));
    transfer(one, two, inner(2), 8);
}

#[test]
fn an_end_and_a_change_of_mode_leave_nothing_either() {
    privileged!(Need::Tun);
    if !common::kernel_carries() {
        return;
    }
    let ends = wire();
    let tunnels = [1, 2].map(|n| ends[usize::from(n) - 1].start(both_families(n)).unwrap());
    let [one, two] = &ends;
    let (us, other) = (key(1).public(), key(2).public());
    let carried = || {
        let began = Instant::now();
        while !tunnels[0].snapshot().unwrap().peer(other).unwrap().in_kernel {
            assert!(began.elapsed() < PATIENCE);
            thread::sleep(Duration::from_millis(20));
        }
    };
    exchange(&ends, carried);
    assert_eq!(hooks(one, "eth0", TcAttachType::Ingress), 1);
    for mode in [Mode::WireGuard, Mode::IpUdp] {
        tunnels[0].set_mode(other, mode).unwrap();
        tunnels[1].set_mode(us, mode).unwrap();
        let snapshot = tunnels[0].snapshot().unwrap();
        assert!(matches!(snapshot.ipip, IpipPath::Unused));
        assert!(!snapshot.peer(other).unwrap().in_kernel);
        assert_eq!(hooks(one, "eth0", TcAttachType::Ingress), 0);
        assert_eq!(hooks(one, "conet0", TcAttachType::Egress), 0);
        transfer(one, two, inner(2), 1);
    }
    tunnels[0].set_mode(other, Mode::IpIp).unwrap();
    tunnels[1].set_mode(us, Mode::IpIp).unwrap();
    exchange(&ends, carried);
    let before = tunnels[0].snapshot().unwrap().peer(other).unwrap().clone();
    transfer(one, two, inner(2), 16);
    let after = tunnels[0].snapshot().unwrap().peer(other).unwrap().clone();
    // Counters are of inner packets, whatever number of them travels in one piece.
    let (packets, bytes) = (after.tx_packets - before.tx_packets, after.tx_bytes - before.tx_bytes);
    assert!(bytes > 16 << 20 && bytes < 20 << 20, "{bytes}");
    assert!((16 << 20) / packets <= 1420, "{packets} packets");
    // While the modes differed some may have been lost.
    assert_eq!(after.drops, before.drops);
    for tunnel in tunnels {
        tunnel.stop();
    }
    assert_eq!(hooks(one, "eth0", TcAttachType::Ingress), 0);
}

#[test]
fn switched_off_it_is_not_used_and_says_so() {
    privileged!(Need::Tun);
    let [one, _two] = wire();
    let offloads = Offloads { kernel: false, ..Offloads::ALL };
    let tunnel = one.start(Config { offloads, ..both_families(1) }).unwrap();
    assert!(matches!(tunnel.snapshot().unwrap().ipip, IpipPath::SwitchedOff));
    assert_eq!(hooks(&one, "conet0", TcAttachType::Egress), 0);
}

/// Batches that an application makes (UDP_SEGMENT) travel as one, and arrive as what they
/// are, each counted.
/// From and to, in both families.
const BOTH: [(&str, &str); 2] = [("10.77.1.1", "10.77.2.1"), ("fd00:1::1", "fd00:2::1")];

/// An application sends `count` datagrams of `size` bytes by one call, the last 7 bytes
/// shorter.
fn batch_arrives([one, two]: [&Scratch; 2], from: IpAddr, to: IpAddr, count: usize, size: usize) {
    let receiver = two.run(|| UdpSocket::bind((to, 0)).unwrap());
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let sender = one.run(|| UdpSocket::bind((from, 0)).unwrap());
    let state = quinn_udp::UdpSocketState::new((&sender).into()).unwrap();
    let contents: Vec<u8> = (0..count * size - 7).map(|i| i.to_le_bytes()[1]).collect();
    let destination = receiver.local_addr().unwrap();
    let batch = quinn_udp::Transmit {
        destination,
        ecn: None,
        contents: &contents,
        segment_size: Some(size),
        src_ip: None,
    };
    state.try_send((&sender).into(), &batch).unwrap();
    for datagram in contents.chunks(size) {
        let mut buffer = [0; 2000];
        let len = receiver.recv(&mut buffer).unwrap();
        assert!(buffer[..len] == *datagram, "{count} of {size}: {len}");
    }
}

/// A raw socket on the same machine is given what no wire has parted or finished: large
/// pieces without their checksums.
#[test]
fn an_end_in_the_kernel_is_understood_by_one_by_sockets() {
    privileged!(Need::Tun);
    if !common::kernel_carries() {
        return;
    }
    for offloads in [Offloads { kernel: false, ..Offloads::ALL }, Offloads::NONE] {
        let ends = wire();
        let [one, two] = &ends;
        let near = one.start(both_families(1)).unwrap();
        let far = two.start(Config { offloads, ..both_families(2) }).unwrap();
        let began = Instant::now();
        while !near.snapshot().unwrap().peers[0].in_kernel {
            assert!(began.elapsed() < PATIENCE, "not carried in the kernel");
            let socket = one.run(|| UdpSocket::bind((inner(1), 0)).unwrap());
            socket.send_to(b"small", (inner(2), 9)).unwrap();
            thread::sleep(Duration::from_millis(50));
        }
        for (from, to) in BOTH {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            common::transfer(one, two, to, 20);
            common::transfer(two, one, from, 20);
            for (count, size) in [(30, 1300), (3, 200), (2, 800), (40, 1000)] {
                batch_arrives([one, two], from, to, count, size);
            }
        }
        let snapshot = far.snapshot().unwrap();
        assert_eq!(snapshot.peers[0].drops.total(), 0, "{snapshot:?}");
    }
}

#[test]
fn batches_of_udp_arrive_as_datagrams() {
    privileged!(Need::Tun);
    if !common::kernel_carries() {
        return;
    }
    let ends = wire();
    let tunnels = [1, 2].map(|n| ends[usize::from(n) - 1].start(both_families(n)).unwrap());
    let [one, two] = &ends;
    common::carried(&[one, two], &tunnels);
    for (from, to) in BOTH {
        let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
        let before = tunnels[0].snapshot().unwrap().peers[0].clone();
        batch_arrives([one, two], from, to, 30, 1300);
        let after = tunnels[0].snapshot().unwrap().peers[0].clone();
        let header = if from.is_ipv4() { 28 } else { 48 };
        assert_eq!(after.tx_packets - before.tx_packets, 30);
        assert_eq!(after.tx_bytes - before.tx_bytes, 30 * (1300 + header) - 7);
        assert_eq!(after.drops, before.drops);
    }
}

/// The kernel's routes are followed: packets go another way, programs hang elsewhere, and
/// nothing of them stays at the first link.
#[test]
fn a_changed_route_is_followed() {
    privileged!(Need::Tun);
    if !common::kernel_carries() {
        return;
    }
    let ends = wire();
    let tunnels = [1, 2].map(|n| ends[usize::from(n) - 1].start(both_families(n)).unwrap());
    let [one, two] = &ends;
    common::carried(&[one, two], &tunnels);
    let second = Veth {
        name: ifname("eth1"),
        peer: ifname("eth1"),
        peer_netns: Some(two.netns()),
        mtu: None,
        mac: None,
        peer_mac: None,
    };
    one.netlink().add_veth(&second).unwrap();
    for (end, n) in [(one, 1), (two, 2)] {
        let mut netlink = end.netlink();
        netlink.add_address(ifname("eth1"), net(&format!("198.51.100.{n}/24"))).unwrap();
        netlink.set_up(ifname("eth1")).unwrap();
    }
    for (end, n) in [(one, 1), (two, 2)] {
        let other = 3 - n;
        let gateway = format!("198.51.100.{other}").parse().unwrap();
        let way = Route::via(net(&format!("192.0.2.{other}/32")), gateway);
        let source = format!("192.0.2.{n}").parse().ok();
        end.netlink().add_route(&Route { source, ..way }).unwrap();
    }
    let moved = || {
        let began = Instant::now();
        let at = |link| hooks(one, link, TcAttachType::Ingress);
        while (at("eth0"), at("eth1")) != (0, 1) {
            assert!(began.elapsed() < PATIENCE);
            thread::sleep(Duration::from_millis(20));
        }
    };
    exchange(&ends, moved);
    common::carried(&[one, two], &tunnels);
    transfer(one, two, inner(2), 16);
    transfer(two, one, inner(1), 16);
}
