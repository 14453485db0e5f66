//! Streams between a guest of each kind and a guest of the other host, in every mode of the
//! tunnel, checked by hash each way. Needs root.
//!
//! Namespaces run with every test, by 16 MiB. Machines want `--features peers`, and
//! run by `cargo xtask peers`, by 100 MiB;
//! `CONET_GUEST_MIB=1024` makes it a gigabyte of either.

#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]
#![allow(dead_code, reason = "the scene is that of two_hosts")]

mod scene;

use std::hash::{DefaultHasher, Hasher};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use conet_hostinject::PortKind;
use conet_netsys::Netns;
use conet_testkit::{Need, privileged};
use conet_tunnel::Mode;
use scene::{Scene, guest_address, guest_spec, ping};

const MODES: [Mode; 3] = [Mode::WireGuard, Mode::IpUdp, Mode::IpIp];
const MIB: usize = 1 << 20;
/// No stream says nothing for so long.
const SILENCE: Duration = Duration::from_secs(60);

/// MiB each way.
fn amount(usual: usize) -> usize {
    let given = std::env::var("CONET_GUEST_MIB").ok().map(|text| text.parse().unwrap());
    given.unwrap_or(usual)
}

/// A MiB that has nothing in common with its neighbours.
fn block(number: usize) -> Vec<u8> {
    let mut state = u64::try_from(number).unwrap().wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()
    });
    words.take(MIB / 8).flatten().collect()
}

/// Sends blocks, and gives the hash of what it sent.
fn send(mut stream: &TcpStream, blocks: usize) -> u64 {
    stream.set_write_timeout(Some(SILENCE)).unwrap();
    let mut hasher = DefaultHasher::new();
    for number in 0..blocks {
        let block = block(number);
        hasher.write(&block);
        stream.write_all(&block).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    hasher.finish()
}

/// The hash of all that comes, by MiB, and how much it is.
fn receive(mut stream: &TcpStream) -> (u64, usize) {
    stream.set_read_timeout(Some(SILENCE)).unwrap();
    let (mut hasher, mut total) = (DefaultHasher::new(), 0);
    let mut block = vec![0; MIB];
    loop {
        let mut filled = 0;
        while filled < MIB {
            match stream.read(&mut block[filled..]) {
                Ok(0) => break,
                Ok(got) => filled += got,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("after {total} bytes: {error}"),
            }
        }
        if filled == 0 {
            return (hasher.finish(), total);
        }
        hasher.write(&block[..filled]);
        total += filled;
    }
}

fn both_ways(from: &Netns, to: &Netns, address: IpAddr, blocks: usize) {
    let listener = to.run(|| TcpListener::bind("0.0.0.0:5001").unwrap()).unwrap();
    let to = SocketAddr::from((address, 5001));
    let there = from.run(|| TcpStream::connect_timeout(&to, SILENCE).unwrap()).unwrap();
    let (here, _) = listener.accept().unwrap();
    for (sender, receiver) in [(&there, &here), (&here, &there)] {
        let (sent, got) = thread::scope(|scope| {
            let got = scope.spawn(|| receive(receiver));
            (send(sender, blocks), got.join().unwrap())
        });
        assert_eq!(got, (sent, blocks * MIB));
    }
}

#[test]
fn namespaces_exchange_streams_in_every_mode() {
    privileged!(Need::Tun);
    let blocks = amount(16);
    for mode in MODES {
        let scene = Scene::new(mode);
        let other = scene.guest(2, 1);
        for (guest, kind) in [(1, PortKind::Veth), (2, PortKind::Tap)] {
            let mut spec = guest_spec(1, guest);
            spec.kind = kind;
            let port = scene.hosts[0].attach(spec);
            let begin = Instant::now();
            let (from, to) = (port.netns().unwrap(), other.netns().unwrap());
            ping(from, guest_address(2, 1)).unwrap();
            both_ways(from, to, guest_address(2, 1), blocks);
            println!("{mode}, {kind:?}: {blocks} MiB each way in {:?}", begin.elapsed());
        }
    }
}

#[cfg(feature = "peers")]
mod machines {
    use std::os::unix::net::UnixListener;
    use std::path::{Path, PathBuf};
    use std::process::{Child, Command, Stdio};

    use conet_hostinject::Lease;
    use conet_hostinject::vhost::{self, Transport, VhostSpec};
    use conet_netsys::{IpNet, MacAddr, Netlink, Route, RouteScope, Sysctl};
    use conet_testkit::machine::Machine;
    use conet_tunnel::DEFAULT_MTU;

    use super::*;
    use scene::{Host, ifname};

    const GATEWAY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 1, 1));
    /// What the guest sends again and again, in MiB.
    const REPEATED: usize = 16;

    /// A machine's port on a host, served by a thread, by every transport.
    fn port(host: &Host, directory: &Path, queues: u16) -> PathBuf {
        let socket = directory.join("port.vhost");
        let listeners: [(Transport, UnixListener); 3] = Transport::ALL
            .map(|transport| (transport, transport.bind(&transport.socket(&socket)).unwrap()));
        let (link, address) = (ifname("vm"), guest_address(1, 9));
        let device = host.scratch.netns.run(|| {
            let device = vhost::open_device(link, queues).unwrap();
            let mut netlink = Netlink::open().unwrap();
            netlink.set_mtu(link, u32::from(DEFAULT_MTU)).unwrap();
            netlink.add_address(link, IpNet::from(GATEWAY)).unwrap();
            netlink.set_up(link).unwrap();
            let route = Route::on_link(IpNet::from(address), link);
            let route = Route { source: Some(GATEWAY), scope: RouteScope::Link, ..route };
            netlink.replace_route(&route).unwrap();
            Sysctl::Ipv4Forward.write("1").unwrap();
            device
        });
        let spec = VhostSpec {
            mac: MacAddr([2, 0, 10, 77, 1, 10]),
            queues,
            lease: Lease {
                addresses: vec![address],
                gateways: vec![],
                prefix: 24,
                dns: vec![],
                mtu: DEFAULT_MTU,
            },
        };
        let device = device.unwrap();
        thread::spawn(move || vhost::serve_transports(&listeners, device, &spec));
        socket
    }

    /// Takes a stream and says its hash, then sends what it was given again and again. By
    /// socat: the nc of busybox moves a KiB at a time, ten times slower than the port. The
    /// last one waits for the other side's end, or the machine would go with what it has not
    /// sent yet.
    fn script(card: &str, blocks: usize) -> String {
        let (mtu, to, times) = (DEFAULT_MTU, guest_address(2, 1), blocks.div_ceil(REPEATED));
        format!(
            "b=busybox\n\
             $b ip link set lo up; $b ip link set {card} mtu {mtu}; $b ip link set {card} up\n\
             $b ip addr add 10.77.1.10/32 dev {card}; $b ip route add 10.77.1.1 dev {card}\n\
             $b ip route add default via 10.77.1.1\n\
             until $b ping -c 1 -W 5 {to}; do :; done\n\
             s=\"socat -t 60 -b 262144\"\n\
             $s -u TCP:{to}:5001 CREATE:/tmp/data; echo first: $($b md5sum < /tmp/data)\n\
             echo down: $($s -u TCP:{to}:5002 STDOUT | $b md5sum)\n\
             for i in $($b seq {times}); do $b cat /tmp/data; done | $s - TCP:{to}:5003\n\
             echo done\n"
        )
    }

    fn uml(card: String, script: &str) -> Machine {
        let mut command = Command::new("linux.uml");
        command.arg(card);
        let load = "M=/usr/lib/uml/modules/$(busybox uname -r)/kernel\n\
            for m in net/core/failover drivers/net/net_failover drivers/net/virtio_net; do\n\
                busybox insmod $M/$m.ko\ndone\n";
        Machine::uml(command, &format!("{load}{script}"))
    }

    fn qemu(flags: &[&str], script: &str) -> Machine {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(flags);
        Machine::qemu(command, &[], &["socat"], script)
    }

    fn boot(
        program: &str,
        transport: Transport,
        socket: &Path,
        (queues, script): (u16, &str),
    ) -> Machine {
        let path = transport.socket(socket).display().to_string();
        let mac = "02:00:0a:4d:01:0a";
        let mq = if queues > 1 { "on" } else { "off" };
        match (program, transport) {
            ("uml", Transport::Vhost) => uml(format!("virtio_uml.device={path}:1"), script),
            ("uml", _) => uml(
                format!("vec0:transport=bess,dst={path},src={path}.uml,depth=128,mac={mac}"),
                script,
            ),
            (_, Transport::Vhost) => qemu(
                &[
                    "-object",
                    "memory-backend-memfd,id=m,size=768M,share=on",
                    "-machine",
                    "q35,memory-backend=m",
                    "-chardev",
                    &format!("socket,id=c,path={path},reconnect=1"),
                    "-smp",
                    &queues.to_string(),
                    "-netdev",
                    &format!("vhost-user,id=n,chardev=c,queues={queues}"),
                    "-device",
                    &format!("virtio-net-pci,netdev=n,mq={mq},vectors=0,romfile=,mac={mac}"),
                ],
                script,
            ),
            _ => qemu(
                &[
                    "-netdev",
                    &format!("stream,id=n,server=off,addr.type=unix,addr.path={path}"),
                    "-device",
                    &format!("virtio-net-pci,netdev=n,romfile=,mac={mac}"),
                ],
                script,
            ),
        }
    }

    fn md5sum() -> Child {
        Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    }

    /// Sends blocks; gives their MD5.
    fn give(listener: &TcpListener, blocks: usize) -> String {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_write_timeout(Some(SILENCE)).unwrap();
        let mut sum = md5sum();
        let mut into = sum.stdin.take().unwrap();
        for number in 0..blocks {
            let block = block(number);
            into.write_all(&block).unwrap();
            stream.write_all(&block).unwrap();
        }
        drop(into);
        String::from_utf8(sum.wait_with_output().unwrap().stdout).unwrap()[..32].to_owned()
    }

    fn exchange(program: &str, transport: Transport, mode: Mode, blocks: usize) {
        let scene = Scene::new(mode);
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let socket = port(&scene.hosts[0], directory.path(), 1);
        let other = scene.guest(2, 1);
        let listen =
            || [5001, 5002, 5003].map(|port| TcpListener::bind(("0.0.0.0", port)).unwrap());
        let listeners = other.netns().unwrap().run(listen).unwrap();
        let card = if (program, transport) == ("uml", Transport::Bess) { "vec0" } else { "eth0" };
        let mut machine = boot(program, transport, &socket, (1, &script(card, blocks)));
        let line = machine.wait_for("bytes from");
        println!("{mode}, {program} by {transport:?}: {line}");
        let (to_guest, from_guest) = streams_pass(&mut machine, listeners, blocks);
        println!(
            "{mode}, {program} by {transport:?}: {blocks} MiB to it {to_guest:?}, from it \
             {from_guest:?}"
        );
    }

    /// As the script has it: how long each way took.
    fn streams_pass(
        machine: &mut Machine,
        [first, down, up]: [TcpListener; 3],
        blocks: usize,
    ) -> (Duration, Duration) {
        let sum = give(&first, REPEATED);
        assert!(machine.wait_for("first: ").contains(&sum));
        let begin = Instant::now();
        let sum = give(&down, blocks);
        assert!(machine.wait_for("down: ").contains(&sum));
        let to_guest = begin.elapsed();
        let begin = Instant::now();
        let (stream, _) = up.accept().unwrap();
        let got = receive(&stream);
        let mut hasher = DefaultHasher::new();
        let times = blocks.div_ceil(REPEATED);
        for _ in 0..times {
            (0..REPEATED).for_each(|number| hasher.write(&block(number)));
        }
        assert_eq!(got, (hasher.finish(), times * REPEATED * MIB));
        // It ends when both sides have.
        drop(stream);
        machine.wait_for("done");
        (to_guest, begin.elapsed())
    }

    #[test]
    fn user_mode_linux_exchanges_streams_in_every_mode() {
        privileged!(Need::Tun, Need::Program("linux.uml"), Need::Program("socat"));
        for mode in MODES {
            for transport in [Transport::Vhost, Transport::Bess] {
                exchange("uml", transport, mode, amount(100));
            }
        }
    }

    #[test]
    fn qemu_machines_exchange_streams_in_every_mode() {
        privileged!(Need::Tun, Need::Program("qemu-system-x86_64"), Need::Program("busybox"));
        for mode in MODES {
            for transport in [Transport::Vhost, Transport::Stream] {
                exchange("qemu", transport, mode, amount(100));
            }
        }
    }

    /// How often each thread of a pair of queues has slept.
    fn slept() -> Vec<u64> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        let read =
            |path: PathBuf, file| std::fs::read_to_string(path.join(file)).unwrap_or_default();
        let of_pairs = tasks.filter(|task| read(task.clone(), "comm").trim() == "vring_worker");
        let count = |task: PathBuf| {
            let status = read(task, "status");
            let line =
                status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            line.map_or(0, |count| count.trim().parse().unwrap())
        };
        of_pairs.map(count).collect()
    }

    /// A machine of two processors has a pair of queues for each, and both carry.
    #[test]
    fn a_qemu_machine_of_two_processors_uses_both_pairs() {
        privileged!(Need::Tun, Need::Program("qemu-system-x86_64"), Need::Program("busybox"));
        let scene = Scene::new(Mode::WireGuard);
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let socket = port(&scene.hosts[0], directory.path(), 2);
        let other = scene.guest(2, 1);
        let listen =
            || [5001, 5002, 5003].map(|port| TcpListener::bind(("0.0.0.0", port)).unwrap());
        let listeners = other.netns().unwrap().run(listen).unwrap();
        // Each processor sends by its own pair, and is answered by that.
        let both = "echo queues $($b ls /sys/class/net/eth0/queues | $b tr '\\n' ' ')\n\
            for cpu in 0 1; do $b sleep 1\n\
            $b taskset -c $cpu $b ping -c 60 -i 0.05 10.77.1.1 > /dev/null; echo pair $cpu; done\n";
        let script = script("eth0", REPEATED);
        let (setup, streams) = script.split_at(script.find("$b nc").unwrap());
        let mut machine =
            boot("qemu", Transport::Vhost, &socket, (2, &format!("{setup}{both}{streams}")));
        let queues = machine.wait_for("queues ");
        assert!(
            ["rx-0", "rx-1", "tx-0", "tx-1"].iter().all(|name| queues.contains(name)),
            "{queues}"
        );
        let before = slept();
        machine.wait_for("pair 0");
        let between = slept();
        machine.wait_for("pair 1");
        let after = slept();
        let rises = |from: &[u64], to: &[u64]| -> Vec<u64> {
            from.iter().zip(to).map(|(from, to)| to - from).collect()
        };
        let (first, second) = (rises(&before, &between), rises(&between, &after));
        println!("slept by turns: {first:?}, {second:?}");
        assert_eq!((first.len(), second.len()), (2, 2), "a thread a pair");
        // The busier thread of the one is not that of the other.
        let busier = |rises: &[u64]| usize::from(rises[1] > rises[0]);
        assert!(first.iter().max() >= Some(&30) && second.iter().max() >= Some(&30));
        assert_ne!(busier(&first), busier(&second), "{first:?} {second:?}");
        streams_pass(&mut machine, listeners, REPEATED);
    }
}
