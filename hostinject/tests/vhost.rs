//! Virtual machines by vhost-user on a host, in the running kernel. Needs root.

#![cfg(feature = "peers")]
#![allow(clippy::unwrap_used, reason = "the lint's exception for tests leaves out their helpers")]
#![allow(dead_code, reason = "the scene is that of two_hosts")]

mod scene;

use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use conet_hostinject::Lease;
use conet_hostinject::vhost::{self, VhostSpec};
use conet_netsys::{IpNet, MacAddr, Netlink, Route, RouteScope, Sysctl};
use conet_testkit::machine::Machine;
use conet_testkit::{Need, privileged};
use conet_tunnel::{DEFAULT_MTU, Mode};
use scene::{Host, Scene, guest_address, ifname, ping};

const GATEWAY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 1, 1));

/// What a machine of host 1's is told.
fn lease(address: IpAddr, mtu: u16) -> Lease {
    let gateways = vec![IpAddr::from([10, 77, 1, 1])];
    Lease { addresses: vec![address], gateways, prefix: 24, dns: Vec::new(), mtu }
}

/// A port on a host, served by a thread.
fn port(host: &Host, directory: &Path) -> PathBuf {
    let socket = directory.join("vhost");
    let listener = UnixListener::bind(&socket).unwrap();
    let link = ifname("vm");
    let address = guest_address(1, 9);
    let device = host.scratch.netns.run(|| {
        let device = vhost::open_device(link).unwrap();
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
    let device = device.unwrap();
    let spec =
        VhostSpec { mac: MacAddr([2, 0, 10, 77, 1, 10]), lease: lease(address, DEFAULT_MTU) };
    thread::spawn(move || vhost::serve(listener, device, &spec));
    socket
}

/// Setting up the card as a guest by hand does.
fn script(rest: &str) -> String {
    let mtu = DEFAULT_MTU;
    format!(
        "ip link set lo up; ip link set eth0 mtu {mtu} up; ip addr add 10.77.1.10/32 dev eth0\n\
         ip route add 10.77.1.1 dev eth0; ip route add default via 10.77.1.1\n{rest}"
    )
}

/// So many bytes that do not repeat soon.
fn bytes(count: usize) -> Vec<u8> {
    let mut state = 7u64;
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()
    });
    words.flatten().take(count).collect()
}

fn md5(bytes: &[u8]) -> String {
    let mut child = Command::new("md5sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()[..32].to_owned()
}

fn streams_pass(megabytes: usize, boot: fn(&Path, &str) -> Machine) {
    let scene = Scene::new(Mode::WireGuard);
    let directory = tempfile::tempdir().unwrap();
    let socket = port(&scene.hosts[0], directory.path());
    let other = scene.guest(2, 1);
    let listeners = other
        .netns()
        .unwrap()
        .run(|| [5001, 5002].map(|port| TcpListener::bind(("0.0.0.0", port)).unwrap()));
    let [down, up] = listeners.unwrap();
    let to = guest_address(2, 1);
    let mut machine = boot(
        &socket,
        &script(&format!(
            "ping -c 3 10.77.1.1; ping -c 3 {to} && echo other host reached\n\
             nc {to} 5001 > /tmp/data; echo sum $(md5sum < /tmp/data)\n\
             nc {to} 5002 < /tmp/data; echo sent"
        )),
    );
    machine.wait_for("other host reached");
    ping(other.netns().unwrap(), guest_address(1, 9))
        .expect("the machine from the other host's guest");
    let data = bytes(megabytes << 20);
    let begin = std::time::Instant::now();
    let (mut stream, _) = down.accept().unwrap();
    stream.write_all(&data).unwrap();
    drop(stream);
    let line = machine.wait_for("sum ");
    let sum = line.split("sum ").nth(1).unwrap();
    assert_eq!(&sum[..32], md5(&data));
    println!("{megabytes} MiB to the guest in {:?}", begin.elapsed());
    let begin = std::time::Instant::now();
    let (mut stream, _) = up.accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    println!("{megabytes} MiB from the guest in {:?}", begin.elapsed());
    let hash = |bytes: &[u8]| {
        let mut hasher = DefaultHasher::new();
        hasher.write(bytes);
        hasher.finish()
    };
    assert_eq!((got.len(), hash(&got)), (data.len(), hash(&data)));
}

fn uml(socket: &Path, script: &str) -> Machine {
    let mut command = Command::new("linux.uml");
    command.arg(format!("virtio_uml.device={}:1", socket.display()));
    let load = "M=/usr/lib/uml/modules/$(busybox uname -r)/kernel\n\
        for m in net/core/failover drivers/net/net_failover drivers/net/virtio_net; do\n\
            busybox insmod $M/$m.ko\ndone\n\
        ip() { busybox ip \"$@\"; }; ping() { busybox ping \"$@\"; }; nc() { busybox nc \"$@\"; }\n";
    Machine::uml(command, &format!("{load}{script}"))
}

fn qemu(socket: &Path, script: &str) -> Machine {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-object", "memory-backend-memfd,id=m,size=768M,share=on"]);
    command.args(["-machine", "q35,memory-backend=m"]);
    command.arg("-chardev").arg(format!("socket,id=c,path={},reconnect=1", socket.display()));
    command.args(["-netdev", "vhost-user,id=n,chardev=c"]);
    command.args(["-device", "virtio-net-pci,netdev=n,vectors=0,romfile=,mac=02:00:0a:4d:01:0a"]);
    Machine::qemu(command, &[], &[], script)
}

#[test]
fn a_user_mode_linux_exchanges_streams_with_the_other_host() {
    privileged!(Need::Tun, Need::Program("linux.uml"), Need::Program("busybox"));
    streams_pass(100, uml);
}

#[test]
fn a_qemu_machine_exchanges_streams_with_the_other_host() {
    privileged!(Need::Tun, Need::Program("qemu-system-x86_64"), Need::Program("busybox"));
    streams_pass(100, qemu);
}
