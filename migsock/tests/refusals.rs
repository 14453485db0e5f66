//! What does not move is refused by its name, and stays as it was.

mod scene;

use conet_migsock::{Host, Kernel, Linux, NftLock, Opt, Queued, SaveError, TcpState};
use conet_testkit::privileged;
use scene::{MOVING_4, Scene, talks};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

fn refusal(host: &Host, fd: BorrowedFd<'_>) -> SaveError {
    match host.freeze(fd) {
        Ok(_) => panic!("frozen"),
        Err(error) => error,
    }
}

fn state(host: &Host, fd: BorrowedFd<'_>) -> String {
    match refusal(host, fd) {
        SaveError::State(state) => state.to_string(),
        other => panic!("{other}"),
    }
}

#[test]
fn other_states_are_refused_by_name() {
    privileged!();
    let scene = Scene::new();
    let host = scene.old.run(Host::open).expect("nftables");
    let listener = scene.old.run(|| TcpListener::bind("127.0.0.1:0")).expect("binds");
    assert_eq!(state(&host, listener.as_fd()), "LISTEN");
    let fresh = scene.old.run(|| Socket::new(Domain::IPV4, Type::STREAM, None)).expect("socket");
    assert_eq!(state(&host, fresh.as_fd()), "CLOSE");
    let silent = scene.old.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
        socket.set_nonblocking(true).expect("option");
        let nobody: SocketAddr = "10.200.1.99:9".parse().expect("address");
        socket.connect(&nobody.into()).expect_err("in progress");
        socket
    });
    assert_eq!(state(&host, silent.as_fd()), "SYN_SENT");
    let (client, server) = scene.connect(MOVING_4, "10.200.1.1");
    client.shutdown(Shutdown::Write).expect("FIN");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(state(&host, client.as_fd()), "FIN_WAIT2");
    let peer = scene.peer.run(Host::open).expect("nftables");
    assert_eq!(state(&peer, server.as_fd()), "CLOSE_WAIT");
    assert_eq!(TcpState(99).to_string(), "unknown");
}

#[test]
fn other_protocols_are_refused_by_name() {
    privileged!();
    let scene = Scene::new();
    let host = scene.old.run(Host::open).expect("nftables");
    let udp = scene.old.run(|| Socket::new(Domain::IPV4, Type::DGRAM, None)).expect("socket");
    assert!(matches!(refusal(&host, udp.as_fd()), SaveError::NotTcp));
    let (unix, _other) = std::os::unix::net::UnixStream::pair().expect("pair");
    assert!(matches!(refusal(&host, unix.as_fd()), SaveError::NotTcp));
    let mptcp = scene
        .old
        .run(|| Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::from(262))).expect("MPTCP"));
    assert!(matches!(refusal(&host, mptcp.as_fd()), SaveError::Mptcp));
}

#[test]
fn urgent_data_is_refused_and_the_connection_lives() {
    privileged!();
    let scene = Scene::new();
    let host = scene.old.run(Host::open).expect("nftables");
    let (mut client, mut server) = scene.connect(MOVING_4, "10.200.1.1");
    SockRef::from(&server).send_out_of_band(b"!").expect("sent");
    std::thread::sleep(Duration::from_millis(50));
    assert!(matches!(refusal(&host, client.as_fd()), SaveError::Urgent));
    talks(&mut client, &mut server).expect("alive");
}

#[test]
fn link_local_addresses_are_refused() {
    privileged!();
    let scene = Scene::new();
    let host = scene.old.run(Host::open).expect("nftables");
    let index = scene.old.netlink().index("lo".parse().expect("name")).expect("loopback");
    let net = "fe80::1/64".parse().expect("prefix");
    scene.old.netlink().add_address("lo".parse().expect("name"), net).expect("added");
    let (client, _server) = scene.old.run(|| {
        let local = std::net::SocketAddrV6::new("fe80::1".parse().expect("address"), 0, 0, index);
        let listener = TcpListener::bind(local).expect("binds");
        let client = std::net::TcpStream::connect(listener.local_addr().expect("bound"));
        (client.expect("connects"), listener.accept().expect("accepts"))
    });
    assert!(matches!(refusal(&host, client.as_fd()), SaveError::LinkLocal(_)));
}

/// A kernel with an option that this one was built without.
struct Pretending {
    option: i32,
    answer: &'static [u8],
}

impl Kernel for Pretending {
    fn getsockopt(&self, fd: BorrowedFd<'_>, option: Opt, value: &mut [u8]) -> io::Result<usize> {
        if option.level == 6 && option.name == self.option {
            value[..self.answer.len()].copy_from_slice(self.answer);
            return Ok(self.answer.len());
        }
        Linux.getsockopt(fd, option, value)
    }
    fn socket(&self, ipv6: bool) -> io::Result<OwnedFd> {
        Linux.socket(ipv6)
    }
    fn getsockname(&self, fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
        Linux.getsockname(fd)
    }
    fn getpeername(&self, fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
        Linux.getpeername(fd)
    }
    fn setsockopt(&self, fd: BorrowedFd<'_>, option: Opt, value: &[u8]) -> io::Result<()> {
        Linux.setsockopt(fd, option, value)
    }
    fn queued(&self, fd: BorrowedFd<'_>, queue: Queued) -> io::Result<usize> {
        Linux.queued(fd, queue)
    }
    fn has_urgent(&self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        Linux.has_urgent(fd)
    }
    fn peek(&self, fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<usize> {
        Linux.peek(fd, bytes)
    }
    fn send(&self, fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
        Linux.send(fd, bytes)
    }
    fn bind(&self, fd: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()> {
        Linux.bind(fd, address)
    }
    fn connect(&self, fd: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()> {
        Linux.connect(fd, address)
    }
    fn disconnect(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Linux.disconnect(fd)
    }
}

#[test]
fn tls_in_the_kernel_and_ao_are_refused() {
    privileged!();
    let scene = Scene::new();
    let (mut client, mut server) = scene.connect(MOVING_4, "10.200.1.1");
    let refused = |option, answer| {
        let lock = scene.old.run(NftLock::open).expect("nftables");
        let host = Host::with_ports(Pretending { option, answer }, lock);
        host.freeze(client.as_fd()).expect_err("refused")
    };
    assert!(matches!(refused(31, b"tls\0"), SaveError::UpperLayer));
    assert!(matches!(refused(40, &[0; 48]), SaveError::Ao));
    talks(&mut client, &mut server).expect("alive");
}
