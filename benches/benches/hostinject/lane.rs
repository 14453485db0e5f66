//! A lane: a host in a network namespace of its own, a guest, and what is between them.
//!
//! ```text
//! host (namespace)                        guest (namespace, or a machine)
//!   client of this process ── the port ──── agent
//!   10.77.9.1                               10.77.9.2
//!   192.0.2.1 (where a guest has no address for the host: its port is forwarded)
//! ```
//!
//! In lanes of a pair the client is in a second guest, 10.77.9.3, beside the first.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use conet_benches::process;
use conet_hostinject::vhost::ServerSpec;
use conet_hostinject::{GuestPort, GuestSpec, PortKind, Rates};
use conet_netsys::{IfName, Netlink, Netns, NetnsName, Route, Veth};
use conet_testkit::machine::Machine;
use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};

use crate::agent::PORT;
use crate::kind::Kind;
use crate::{machines, peers, traffic};

/// Of every link that does not choose its own.
pub(crate) const MTU: u16 = 1500;
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 9, 1);
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 9, 2);
pub(crate) const BESIDE: Ipv4Addr = Ipv4Addr::new(10, 77, 9, 3);
/// Where forwarded ports are.
pub(crate) const LAN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// How long a lane may take to carry its first datagram.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn ifname(name: &str) -> Result<IfName> {
    IfName::new(name).with_context(|| format!("{name} is no name of a link"))
}

/// A namespace that ends with its lane.
pub(crate) struct Space {
    pub(crate) name: NetnsName,
    pub(crate) netns: Netns,
}

impl Space {
    fn new(name: &str) -> Result<Self> {
        let name = NetnsName::new(name).context("no name for a namespace")?;
        let netns = Netns::create(&name)?;
        let space = Self { name, netns };
        space.netlink()?.set_up(IfName::LOOPBACK)?;
        Ok(space)
    }

    pub(crate) fn netlink(&self) -> Result<Netlink> {
        Ok(Netlink::open_in(&self.netns)?)
    }

    /// Gives a link its address, 24 bits of it shared, and sets it up.
    pub(crate) fn address(&self, link: &str, address: Ipv4Addr) -> Result<()> {
        let mut netlink = self.netlink()?;
        netlink.add_address(ifname(link)?, format!("{address}/24").parse()?)?;
        netlink.set_up(ifname(link)?)?;
        Ok(())
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        if let Err(error) = Netns::delete(&self.name) {
            eprintln!("hostinject: {} is left: {error}", self.name.as_str());
        }
    }
}

/// A process that is killed with its lane, and whether it is the guest's agent.
struct Process(Child, bool);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

pub(crate) struct Lane {
    pub(crate) kind: Kind,
    // In the order in which they end.
    machine: Option<Machine>,
    processes: Vec<Process>,
    ports: Vec<GuestPort>,
    pub(crate) guest: Option<Space>,
    beside: Option<Space>,
    pub(crate) host: Space,
    /// Sockets of the lane.
    directory: tempfile::TempDir,
    prefix: String,
}

impl Lane {
    /// Makes it, and waits until a datagram has come back.
    pub(crate) fn start(kind: Kind, index: usize) -> Result<Self> {
        let prefix = format!("conet-b{}-{index}", std::process::id() % 100_000);
        let mut lane = Self {
            kind,
            machine: None,
            processes: Vec::new(),
            ports: Vec::new(),
            guest: None,
            beside: None,
            host: Space::new(&format!("{prefix}h"))?,
            directory: tempfile::Builder::new().prefix("conet-b").tempdir_in("/var/tmp")?,
            prefix,
        };
        lane.plumb()?;
        lane.wait().with_context(|| format!("{} carries nothing", kind.name()))?;
        Ok(lane)
    }

    fn plumb(&mut self) -> Result<()> {
        match self.kind {
            Kind::Netns => self.ours(PortKind::Veth, false)?,
            Kind::NetnsPair => self.ours(PortKind::Veth, true)?,
            Kind::Tap => self.ours(PortKind::Tap, false)?,
            Kind::UmlVhost | Kind::UmlBess | Kind::QemuVhost | Kind::QemuStream => {
                self.ours(PortKind::Vhost, false)?;
                machines::start(self)?;
            }
            Kind::Bridge => self.bridge(false)?,
            Kind::BridgePair => self.bridge(true)?,
            Kind::Replica => self.replica()?,
            Kind::UmlTap | Kind::UmlRaw | Kind::UmlBound => machines::start(self)?,
            Kind::Passt | Kind::PasstUml | Kind::Pasta | Kind::Slirp => peers::start(self)?,
        }
        if self.machine.is_none() {
            self.agent()?;
        }
        Ok(())
    }

    /// A port of ours; a machine's is without its machine yet.
    fn ours(&mut self, kind: PortKind, is_pair: bool) -> Result<()> {
        let mut guests = vec![(format!("{}g", self.prefix), "guest", GUEST)];
        if is_pair {
            guests.push((format!("{}n", self.prefix), "beside", BESIDE));
        }
        for (name, link, address) in guests {
            let name = NetnsName::new(&name).context("no name for a guest")?;
            let spec = GuestSpec {
                name: name.clone(),
                host_link: ifname(link)?,
                guest_link: ifname("eth0")?,
                addresses: vec![IpAddr::V4(address)],
                gateways: vec![IpAddr::V4(HOST)],
                prefix: 24,
                dns: vec![],
                rates: Rates::default(),
                mtu: MTU,
                mac: None,
                kind,
                server: Some(self.server()?),
                queues: 1,
            };
            let port = self.host.netns.run(|| GuestPort::attach(spec))??;
            if port.netns().is_some() {
                let space = Space { netns: Netns::open(&name)?, name };
                if address == GUEST { self.guest = Some(space) } else { self.beside = Some(space) }
            }
            self.ports.push(port);
        }
        Ok(())
    }

    /// What serves machines' ports: this very program.
    pub(crate) fn server(&self) -> Result<ServerSpec> {
        let program = std::env::current_exe()?;
        let command = vec![program.into(), "--role".into(), "server".into()];
        Ok(ServerSpec { directory: self.directory.path().to_owned(), command })
    }

    /// The socket of a machine's port.
    pub(crate) fn socket(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn vhost_socket(&self) -> Result<std::path::PathBuf> {
        let port = self.ports.first().context("a machine without a port")?;
        Ok(self.server()?.socket(port.spec().name.as_str()))
    }

    /// An empty namespace for a guest of somebody else's.
    pub(crate) fn empty_guest(&mut self) -> Result<&Space> {
        Ok(self.guest.insert(Space::new(&format!("{}g", self.prefix))?))
    }

    /// A way for forwarded ports, and a default route, which some ask for.
    pub(crate) fn lan(&self) -> Result<()> {
        let mut netlink = self.host.netlink()?;
        netlink.add_veth(&Veth {
            name: ifname("lan0")?,
            peer: ifname("lan1")?,
            peer_netns: None,
            mtu: None,
            mac: None,
            peer_mac: None,
        })?;
        netlink.set_up(ifname("lan1")?)?;
        self.host.address("lan0", LAN)?;
        netlink.add_route(&Route::default_via(IpAddr::from([192, 0, 2, 254])))?;
        Ok(())
    }

    fn bridge(&mut self, is_pair: bool) -> Result<()> {
        let mut netlink = self.host.netlink()?;
        netlink.add_bridge(ifname("br0")?)?;
        self.host.address("br0", HOST)?;
        self.empty_guest()?;
        if is_pair {
            self.beside = Some(Space::new(&format!("{}n", self.prefix))?);
        }
        let guests = [(&self.guest, "guest", GUEST), (&self.beside, "beside", BESIDE)];
        for (space, link, address) in guests {
            let Some(space) = space else { continue };
            self.veth(link, space)?;
            netlink.set_master(ifname(link)?, Some(ifname("br0")?))?;
            netlink.set_up(ifname(link)?)?;
            space.address("eth0", address)?;
        }
        Ok(())
    }

    fn veth(&self, link: &str, space: &Space) -> Result<()> {
        self.host.netlink()?.add_veth(&Veth {
            name: ifname(link)?,
            peer: ifname("eth0")?,
            peer_netns: Some(&space.netns),
            mtu: None,
            mac: None,
            peer_mac: None,
        })?;
        Ok(())
    }

    fn replica(&mut self) -> Result<()> {
        self.empty_guest()?;
        let socket = self.socket("monitor");
        for (part, is_guest, device) in [("monitor", true, "eth0"), ("net", false, "guest")] {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["--role", "replica", part, device]).arg(&socket);
            self.spawn(command, is_guest)?;
        }
        for (space, link, address) in
            [(Some(&self.host), "guest", HOST), (self.guest.as_ref(), "eth0", GUEST)]
        {
            let space = space.context("a replica without a guest")?;
            appears(space, link)?;
            space.address(link, address)?;
        }
        Ok(())
    }

    fn agent(&mut self) -> Result<()> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--role", "agent"]);
        self.spawn(command, true)?;
        if let Some(agent) = self.processes.last_mut() {
            agent.1 = true;
        }
        Ok(())
    }

    /// Starts a process of the lane, in the namespace of host or guest.
    pub(crate) fn spawn(&mut self, mut command: Command, in_guest: bool) -> Result<()> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let space = if in_guest { self.guest.as_ref() } else { Some(&self.host) };
        let space = space.context("a guest that is no namespace")?;
        let name = command.get_program().to_owned();
        let child = space.netns.run(move || command.spawn())?;
        self.processes.push(Process(child.with_context(|| name.display().to_string())?, false));
        Ok(())
    }

    /// Starts a machine in the host's namespace, and waits until its agent is there.
    pub(crate) fn boot(&mut self, start: impl FnOnce() -> Machine + Send) -> Result<()> {
        let mut machine = self.host.netns.run(start)?;
        let ready = machine.says(crate::agent::READY);
        self.machine = Some(machine);
        match ready {
            Ok(_) => Ok(()),
            Err(said) => bail!("its machine does not come up: {said}"),
        }
    }

    fn wait(&self) -> Result<()> {
        let began = Instant::now();
        // An error: nobody listens yet.
        let answered = || traffic::echo(self, 1, Duration::from_millis(300));
        while !answered().is_ok_and(|times| !times.is_empty()) {
            ensure!(began.elapsed() < PATIENCE, "no answer in {PATIENCE:?}");
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Runs where the client is.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let client = self.beside.as_ref().unwrap_or(&self.host);
        Ok(client.netns.run(work)?)
    }

    /// Where the agent is reached.
    pub(crate) fn far(&self) -> SocketAddr {
        (if self.kind.has_address() { GUEST } else { LAN }, PORT).into()
    }

    /// Every process of the lane, its machine's own ones included.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let mut roots: Vec<_> = self.processes.iter().map(|process| process.0.id()).collect();
        roots.extend(self.machine.as_ref().map(Machine::id));
        roots.extend(serving(self.directory.path()));
        with_descendants(roots)
    }

    /// The threads between host and guest; none where that is the kernel alone.
    pub(crate) fn between(&self) -> Vec<u32> {
        let own = std::process::id();
        let is_pump = |tid: &u32| {
            let name = fs::read_to_string(format!("/proc/{own}/task/{tid}/comm"));
            name.is_ok_and(|name| name.trim() == "conet-tap")
        };
        if self.kind == Kind::Tap {
            // The only guest by TAP of this process.
            return process::threads(own).into_iter().filter(is_pump).collect();
        }
        let others = self.processes.iter().filter(|process| !process.1);
        let mut roots: Vec<_> = others.map(|process| process.0.id()).collect();
        roots.extend(serving(self.directory.path()));
        with_descendants(roots).into_iter().flat_map(process::threads).collect()
    }

    /// The threads of the machine, where the guest is one.
    pub(crate) fn machine_threads(&self) -> Vec<u32> {
        let root = self.machine.as_ref().map(Machine::id);
        with_descendants(root.into_iter().collect())
            .into_iter()
            .flat_map(process::threads)
            .collect()
    }

    /// Of the names that this lane may give.
    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Keeps everybody of the lane, and this process, on one processor until the guard is
    /// dropped: a round trip is then that of the path, and not of waking another processor.
    pub(crate) fn on_one_processor(&self) -> Pinned {
        self.pinned(&[])
    }

    /// Keeps the guest on processor 1, and what is between and this process on 0. Left to
    /// itself, a machine and who serves it are on the same one now and then, for seconds.
    pub(crate) fn with_guest_apart(&self) -> Pinned {
        let agents = self.processes.iter().filter(|process| process.1);
        let agents = with_descendants(agents.map(|process| process.0.id()).collect());
        let mut guest = self.machine_threads();
        guest.extend(agents.into_iter().flat_map(process::threads));
        self.pinned(&guest)
    }

    /// Puts these threads on processor 1, all others on 0.
    fn pinned(&self, apart: &[u32]) -> Pinned {
        let mut threads: Vec<_> = self.processes().into_iter().flat_map(process::threads).collect();
        threads.extend(process::threads(std::process::id()));
        let only = |processor| {
            let mut one = CpuSet::new();
            one.set(processor);
            one
        };
        let before = sched_getaffinity(None).unwrap_or(only(0));
        set_affinity(&threads, &only(0));
        // Where there is one processor, that is refused.
        set_affinity(apart, &only(1));
        Pinned { threads, before }
    }

    /// Processor time of all of them so far.
    pub(crate) fn cpu(&self) -> Duration {
        // One that has ended meanwhile has spent nothing since.
        let spent = self.processes().into_iter().map(process::cpu_of);
        spent.map(|time| time.unwrap_or_default()).sum()
    }
}

/// See [`Lane::on_one_processor`], [`Lane::with_guest_apart`].
pub(crate) struct Pinned {
    threads: Vec<u32>,
    before: CpuSet,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        set_affinity(&self.threads, &self.before);
    }
}

/// A thread that has ended meanwhile is nowhere.
fn set_affinity(threads: &[u32], cpus: &CpuSet) {
    for tid in threads {
        let pid = i32::try_from(*tid).ok().and_then(Pid::from_raw);
        sched_setaffinity(pid, cpus).ok();
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        drop(self.machine.take());
        self.processes.clear();
        for port in self.ports.drain(..) {
            if let Err(error) = port.detach() {
                eprintln!("hostinject: a port of {} is left: {error}", self.kind.name());
            }
        }
    }
}

/// Waits for a link that somebody else makes.
pub(crate) fn appears(space: &Space, link: &str) -> Result<()> {
    let (mut netlink, began) = (space.netlink()?, Instant::now());
    while netlink.link(ifname(link)?)?.is_none() {
        ensure!(began.elapsed() < PATIENCE, "no link {link} appears");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The servers of ports whose sockets are in a directory.
fn serving(directory: &Path) -> Vec<u32> {
    let directory = directory.to_string_lossy().into_owned();
    let is_one = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains("\0server\0") && line.contains(&directory)
    };
    process::all().into_iter().map(|(pid, _)| pid).filter(is_one).collect()
}

fn with_descendants(roots: Vec<u32>) -> Vec<u32> {
    let all = process::all();
    let mut found = roots;
    let mut at = 0;
    while at < found.len() {
        let parent = found[at];
        for (pid, its) in &all {
            if *its == parent && !found.contains(pid) {
                found.push(*pid);
            }
        }
        at += 1;
    }
    found
}
