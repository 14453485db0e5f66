//! Three namespaces: the old host, the new host, and the peer between them.
//!
//! ```text
//! old 10.200.1.2 ──veth── 10.200.1.1 peer 10.200.2.1 ──veth── 10.200.2.2 new
//!         the moving address 10.200.9.9 and fd09::9 is on one of them
//! ```
#![allow(dead_code, reason = "each test binary uses a part of it")]

use conet_migsock::{
    Activated, Address, CallFailed, Flow, Frozen, Host, Kernel, Linux, Lock, LockError, NftLock,
    Opt, Queued, SavedSocket,
};
use conet_netsys::{IfName, IpNet, Netlink, Netns, NetnsName, Route, Veth};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub(crate) const MOVING_4: &str = "10.200.9.9";
pub(crate) const MOVING_6: &str = "fd09::9";

pub(crate) struct Space {
    pub(crate) name: NetnsName,
    pub(crate) netns: Netns,
}

impl Space {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("conet-t{}-s{n}", std::process::id());
        let name = NetnsName::new(&name).expect("short");
        let netns = Netns::create(&name).expect("root");
        let space = Self { name, netns };
        space.netlink().set_up(ifname("lo")).expect("loopback");
        // Addresses are usable at once, instead of after duplicate detection.
        for links in ["all", "default"] {
            let path = format!("/proc/sys/net/ipv6/conf/{links}/accept_dad");
            space.run(|| std::fs::write(path, "0")).expect("sysctl");
        }
        space
    }

    pub(crate) fn netlink(&self) -> Netlink {
        Netlink::open_in(&self.netns).expect("netlink")
    }

    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.netns.run(work).expect("a thread in the namespace")
    }

    /// Established connections of this namespace, by its own tables.
    pub(crate) fn established(&self) -> usize {
        self.run(|| {
            ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"]
                .iter()
                .flat_map(|path| {
                    let table = std::fs::read_to_string(path).expect("procfs");
                    table.lines().skip(1).map(str::to_owned).collect::<Vec<_>>()
                })
                .filter(|line| line.split_whitespace().nth(3) == Some("01"))
                .count()
        })
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        Netns::delete(&self.name).ok();
    }
}

fn ifname(name: &str) -> IfName {
    IfName::new(name).expect("short")
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub(crate) struct Scene {
    pub(crate) old: Space,
    pub(crate) new: Space,
    pub(crate) peer: Space,
    /// Which host has the moving address.
    pub(crate) at_new: bool,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let (old, new, peer) = (Space::new(), Space::new(), Space::new());
        for (host, n) in [(&old, 1), (&new, 2)] {
            let end = format!("to{n}");
            let veth = Veth {
                name: ifname(&end),
                peer: ifname("eth0"),
                peer_netns: Some(&host.netns),
                mtu: None,
                mac: None,
                peer_mac: None,
            };
            let mut there = peer.netlink();
            there.add_veth(&veth).expect("veth");
            let mut here = host.netlink();
            for (netlink, link, last) in [(&mut there, end.as_str(), 1), (&mut here, "eth0", 2)] {
                let link = ifname(link);
                netlink.add_address(link, net(&format!("10.200.{n}.{last}/24"))).expect("IPv4");
                netlink.add_address(link, net(&format!("fd0{n}::{last}/64"))).expect("IPv6");
                netlink.set_up(link).expect("up");
            }
            here.add_route(&Route::default_via(ip(&format!("10.200.{n}.1")))).expect("route");
            here.add_route(&Route::default_via(ip(&format!("fd0{n}::1")))).expect("route");
        }
        let scene = Self { old, new, peer, at_new: false };
        scene.place();
        scene
    }

    /// Puts the moving address where it belongs now, and the peer's route to it.
    fn place(&self) {
        let (here, there, n) =
            if self.at_new { (&self.new, &self.old, 2) } else { (&self.old, &self.new, 1) };
        for (address, bits, gateway) in
            [(MOVING_4, 32, format!("10.200.{n}.2")), (MOVING_6, 128, format!("fd0{n}::2"))]
        {
            let net = net(&format!("{address}/{bits}"));
            there.netlink().delete_address(ifname("lo"), net).expect("gone");
            here.netlink().add_address(ifname("lo"), net).expect("there");
            let route = Route::via(net, ip(&gateway));
            self.peer.netlink().replace_route(&route).expect("route");
        }
    }

    /// Moves the address to the other host.
    pub(crate) fn move_address(&mut self) {
        self.at_new = !self.at_new;
        self.place();
    }

    pub(crate) fn here(&self) -> &Space {
        if self.at_new { &self.new } else { &self.old }
    }

    pub(crate) fn there(&self) -> &Space {
        if self.at_new { &self.old } else { &self.new }
    }

    /// A connection from the moving address to a listener of the peer's.
    pub(crate) fn connect(&self, local: &str, server: &str) -> (TcpStream, TcpStream) {
        let server = SocketAddr::new(ip(server), 0);
        let listener = self.peer.run(|| TcpListener::bind(server)).expect("listener");
        let to = listener.local_addr().expect("bound");
        let local = SocketAddr::new(ip(local), 0);
        let client = self.here().run(|| {
            let socket = socket2::Socket::new(
                socket2::Domain::for_address(local),
                socket2::Type::STREAM,
                None,
            );
            let socket = socket.expect("socket");
            socket.bind(&local.into()).expect("the address is here");
            let to = match (local.is_ipv6(), to.ip()) {
                (true, IpAddr::V4(v4)) => SocketAddr::new(v4.to_ipv6_mapped().into(), to.port()),
                _ => to,
            };
            socket.connect(&to.into()).expect("connects");
            TcpStream::from(socket)
        });
        let (server, _) = listener.accept().expect("accepts");
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(Duration::from_secs(20))).expect("option");
            stream.set_write_timeout(Some(Duration::from_secs(20))).expect("option");
        }
        (client, server)
    }
}

/// One whole move; the connection ends up on the other host.
pub(crate) fn move_over(
    scene: &mut Scene,
    from: &Host,
    to: &Host,
    stream: TcpStream,
    address: Address,
) -> (TcpStream, SavedSocket) {
    let frozen = from.freeze(stream.as_fd()).expect("freezes");
    let bytes = frozen.state().encode();
    let state = SavedSocket::decode(&bytes).expect("reads back");
    assert_eq!(state, *frozen.state());
    if address == Address::Here {
        // The address is on both hosts for a moment; the route still points here.
        let net = net(&format!(
            "{}/{}",
            state.flow.local.ip().to_canonical(),
            if state.flow.on_the_wire().local.is_ipv4() { 32 } else { 128 }
        ));
        scene.there().netlink().add_address(ifname("lo"), net).expect("added");
        let prepared = scene.there().run(|| to.prepare(&state, address)).expect("prepares");
        scene.there().netlink().delete_address(ifname("lo"), net).expect("removed");
        return (finish(scene, frozen, prepared), state);
    }
    let prepared = scene.there().run(|| to.prepare(&state, address)).expect("prepares");
    (finish(scene, frozen, prepared), state)
}

fn finish(
    scene: &mut Scene,
    frozen: Frozen<'_, '_, Linux>,
    prepared: conet_migsock::Prepared<'_, Linux>,
) -> TcpStream {
    let mut gone = match frozen.commit() {
        Ok(gone) => gone,
        Err((_, error)) => panic!("{error}"),
    };
    scene.move_address();
    let activated = match prepared.activate() {
        Ok(activated) => activated,
        Err((_, error)) => panic!("{error}"),
    };
    gone.release().expect("released");
    drop(gone);
    let Activated { fd, unsent, trouble } = activated;
    assert!(unsent.is_empty() && trouble.is_none(), "{} left, {trouble:?}", unsent.len());
    let stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("option");
    stream
}

/// Whether bytes still cross both ways.
pub(crate) fn talks(here: &mut TcpStream, there: &mut TcpStream) -> io::Result<()> {
    for turn in 0..2 {
        let (from, to) =
            if turn == 0 { (&mut *here, &mut *there) } else { (&mut *there, &mut *here) };
        from.write_all(b"still there?")?;
        let mut bytes = [0; 12];
        to.read_exact(&mut bytes)?;
        assert_eq!(&bytes, b"still there?");
    }
    Ok(())
}

/// Lets the n-th call of kernel and lock together fail, once.
#[derive(Debug)]
pub(crate) struct Fault {
    countdown: AtomicUsize,
    pub(crate) hit: Mutex<Option<String>>,
    /// All calls, in their order.
    pub(crate) calls: Mutex<Vec<String>>,
}

impl Fault {
    pub(crate) fn at(n: usize) -> Arc<Self> {
        let countdown = AtomicUsize::new(n);
        Arc::new(Self { countdown, hit: Mutex::new(None), calls: Mutex::default() })
    }

    fn fails(&self, what: String) -> bool {
        self.calls.lock().expect("alive").push(what.clone());
        let fails = self.countdown.fetch_sub(1, Ordering::SeqCst) == 1;
        if fails {
            *self.hit.lock().expect("alive") = Some(what);
        }
        fails
    }
}

pub(crate) struct FailingKernel(pub(crate) Arc<Fault>);

impl FailingKernel {
    fn gate<T>(&self, what: String, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.0.fails(what) { Err(io::Error::from_raw_os_error(libc_eio())) } else { call() }
    }
}

const fn libc_eio() -> i32 {
    5
}

impl Kernel for FailingKernel {
    fn socket(&self, ipv6: bool) -> io::Result<OwnedFd> {
        self.gate("socket".into(), || Linux.socket(ipv6))
    }
    fn getsockname(&self, fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
        self.gate("getsockname".into(), || Linux.getsockname(fd))
    }
    fn getpeername(&self, fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
        self.gate("getpeername".into(), || Linux.getpeername(fd))
    }
    fn getsockopt(&self, fd: BorrowedFd<'_>, option: Opt, value: &mut [u8]) -> io::Result<usize> {
        self.gate(format!("getsockopt {option:?}"), || Linux.getsockopt(fd, option, value))
    }
    fn setsockopt(&self, fd: BorrowedFd<'_>, option: Opt, value: &[u8]) -> io::Result<()> {
        self.gate(format!("setsockopt {option:?}"), || Linux.setsockopt(fd, option, value))
    }
    fn queued(&self, fd: BorrowedFd<'_>, queue: Queued) -> io::Result<usize> {
        self.gate(format!("queued {queue:?}"), || Linux.queued(fd, queue))
    }
    fn has_urgent(&self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        self.gate("poll".into(), || Linux.has_urgent(fd))
    }
    fn peek(&self, fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<usize> {
        self.gate("peek".into(), || Linux.peek(fd, bytes))
    }
    fn send(&self, fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
        self.gate("send".into(), || Linux.send(fd, bytes))
    }
    fn bind(&self, fd: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()> {
        self.gate("bind".into(), || Linux.bind(fd, address))
    }
    fn connect(&self, fd: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()> {
        self.gate("connect".into(), || Linux.connect(fd, address))
    }
    fn disconnect(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.gate("disconnect".into(), || Linux.disconnect(fd))
    }
}

pub(crate) struct FailingLock {
    pub(crate) real: NftLock,
    pub(crate) fault: Arc<Fault>,
}

impl FailingLock {
    fn gate(
        &self,
        what: &'static str,
        call: impl FnOnce() -> Result<(), LockError>,
    ) -> Result<(), LockError> {
        if self.fault.fails(what.to_owned()) {
            return Err(LockError::Refused { what, source: io::Error::from_raw_os_error(12) });
        }
        call()
    }
}

impl Lock for FailingLock {
    fn lock(&self, flow: Flow) -> Result<(), LockError> {
        self.gate("lock", || self.real.lock(flow))
    }
    fn release(&self, flow: Flow) -> Result<(), LockError> {
        self.gate("release", || self.real.release(flow))
    }
}

/// Names the error type for tests that match on it.
pub(crate) type Failed = CallFailed;
