//! A lane: two namespaces on one wire, and a tunnel between them.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use conet_netsys::{IfName, IpNet, Netlink, Netns, NetnsName, Route, Veth};
use conet_tunnel::{Config, Mode, Offloads, PeerConfig, PrivateKey, Tunnel};
pub(crate) use conet_tunnel::{DEFAULT_MTU as MTU, DEFAULT_PORT as PORT};

use crate::bound;

/// What carries the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Bare,
    Ours(Mode, Offloads),
    /// The least that is possible: in user space and sealed, or in the kernel.
    Bound {
        in_kernel: bool,
    },
    WireGuardGo,
    BoringTun,
    GotaTun,
}

/// Everything but the kernel's own way for mode `ipip`.
const SOCKETS: Offloads = Offloads { kernel: false, ..Offloads::ALL };

impl Kind {
    pub(crate) const ALL: [Self; 13] = [
        Self::Bare,
        Self::Ours(Mode::WireGuard, Offloads::ALL),
        Self::Ours(Mode::IpUdp, Offloads::ALL),
        Self::Ours(Mode::IpIp, Offloads::ALL),
        Self::Ours(Mode::IpIp, SOCKETS),
        Self::Ours(Mode::WireGuard, Offloads::NONE),
        Self::Ours(Mode::IpUdp, Offloads::NONE),
        Self::Ours(Mode::IpIp, Offloads::NONE),
        Self::Bound { in_kernel: false },
        Self::Bound { in_kernel: true },
        Self::WireGuardGo,
        Self::BoringTun,
        Self::GotaTun,
    ];

    pub(crate) fn name(self) -> String {
        match self {
            Self::Bare => "bare".into(),
            Self::Ours(mode, Offloads::ALL) => mode.to_string(),
            Self::Ours(mode, SOCKETS) => format!("{mode}-sockets"),
            Self::Ours(mode, _) => format!("{mode}-plain"),
            Self::Bound { in_kernel: false } => "bound-sealed".into(),
            Self::Bound { in_kernel: true } => "bound-kernel".into(),
            Self::WireGuardGo => "wireguard-go".into(),
            Self::BoringTun => "boringtun-cli".into(),
            Self::GotaTun => "gotatun".into(),
        }
    }

    /// Whether it is somebody else's, which may be missing or fail.
    pub(crate) fn is_foreign(self) -> bool {
        matches!(self, Self::WireGuardGo | Self::BoringTun | Self::GotaTun)
    }

    /// Whether its handshakes cost something.
    pub(crate) fn has_handshakes(self) -> bool {
        !matches!(self, Self::Bare | Self::Bound { .. } | Self::Ours(Mode::IpUdp | Mode::IpIp, _))
    }

    /// The program of somebody else's, where it is installed.
    pub(crate) fn program(self) -> Option<PathBuf> {
        let named = match self {
            Self::WireGuardGo | Self::BoringTun | Self::GotaTun => self.name(),
            Self::Bare | Self::Ours(..) | Self::Bound { .. } => return None,
        };
        let lists = ["CONET_BENCH_PEERS", "PATH"].map(std::env::var_os);
        let mut places = lists.iter().flatten().flat_map(std::env::split_paths);
        places.find_map(|place| Some(place.join(&named)).filter(|path| path.is_file()))
    }

    /// What it says of itself, in one line.
    pub(crate) fn version(self) -> Option<String> {
        let output = Command::new(self.program()?).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().find(|line| !line.trim().is_empty()).map(|line| line.trim().to_owned())
    }
}

/// One end of a lane.
struct End {
    name: NetnsName,
    netns: Netns,
    process: Option<Child>,
}

impl Drop for End {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            // It may have ended by itself.
            drop(process.kill());
            drop(process.wait());
        }
        if let Err(error) = Netns::delete(&self.name) {
            eprintln!("tunnel: {} is left: {error}", self.name.as_str());
        }
    }
}

pub(crate) struct Lane {
    pub(crate) kind: Kind,
    ends: [End; 2],
}

pub(crate) fn ifname(name: &str) -> Result<IfName> {
    IfName::new(name).with_context(|| format!("{name} is no name of a link"))
}

pub(crate) fn net(text: &str) -> Result<IpNet> {
    text.parse().with_context(|| format!("{text} is no prefix"))
}

pub(crate) fn outer(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, n)
}

pub(crate) fn inner(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, n, 1)
}

pub(crate) fn key(n: u8) -> PrivateKey {
    PrivateKey::from_bytes([n; 32])
}

impl Lane {
    /// Makes it, and waits until a packet comes through.
    pub(crate) fn start(kind: Kind, index: usize) -> Result<Self> {
        let mut ends = Vec::new();
        for n in 0..2 {
            let name = format!("conet-b{}-{index}{n}", std::process::id() % 100_000);
            let name = NetnsName::new(&name).context("no name for a namespace")?;
            let netns = Netns::create(&name)?;
            ends.push(End { name, netns, process: None });
        }
        let Ok(ends) = <[End; 2]>::try_from(ends) else { bail!("two namespaces were made") };
        let mut lane = Self { kind, ends };
        lane.wire()?;
        for n in [1, 2] {
            lane.tunnel(n, index).with_context(|| format!("{} does not start", kind.name()))?;
        }
        lane.wait().with_context(|| format!("{} carries nothing", kind.name()))?;
        Ok(lane)
    }

    /// Runs in the namespace of an end, 1 or 2.
    pub(crate) fn run<T: Send>(&self, n: u8, work: impl FnOnce() -> T + Send) -> Result<T> {
        Ok(self.end(n).netns.run(work)?)
    }

    /// Where the far end is reached.
    pub(crate) fn far(&self) -> Ipv4Addr {
        if self.kind == Kind::Bare { outer(2) } else { inner(2) }
    }

    /// Processor time of both tunnels so far.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        let pids = self.ends.iter().flat_map(|end| &end.process).map(Child::id);
        pids.map(cpu_of).sum()
    }

    fn end(&self, n: u8) -> &End {
        &self.ends[usize::from(n != 1)]
    }

    fn wire(&self) -> Result<()> {
        let [one, two] = &self.ends;
        Netlink::open_in(&one.netns)?.add_veth(&Veth {
            name: ifname("eth0")?,
            peer: ifname("eth0")?,
            peer_netns: Some(&two.netns),
            mtu: None,
            mac: None,
            peer_mac: None,
        })?;
        for n in [1, 2] {
            let mut netlink = Netlink::open_in(&self.end(n).netns)?;
            netlink.add_address(ifname("eth0")?, net(&format!("{}/24", outer(n)))?)?;
            netlink.set_up(ifname("eth0")?)?;
            netlink.set_up(IfName::LOOPBACK)?;
        }
        Ok(())
    }

    fn tunnel(&mut self, n: u8, index: usize) -> Result<()> {
        let device = format!("cb{}-{index}{n}", std::process::id() % 100_000);
        let mut command = match self.kind {
            Kind::Bare => return Ok(()),
            Kind::Ours(mode, offloads) => {
                let mut command = Command::new(std::env::current_exe()?);
                let how = match offloads {
                    Offloads::ALL => "all",
                    SOCKETS => "sockets",
                    _ => "none",
                };
                command.args(["--role", &n.to_string(), mode.as_str(), how]);
                command
            }
            Kind::Bound { in_kernel } => {
                let mut command = Command::new(std::env::current_exe()?);
                let which = if in_kernel { "kernel" } else { "sealed" };
                command.args(["--role", &n.to_string(), "bound", which]);
                command
            }
            Kind::WireGuardGo | Kind::BoringTun | Kind::GotaTun => {
                let mut command = Command::new(self.kind.program().context("not installed")?);
                command.args(["-f", &device]).env("LOG_LEVEL", "error");
                if self.kind != Kind::WireGuardGo {
                    command.arg("--disable-drop-privileges");
                }
                command
            }
        };
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = self.run(n, move || command.spawn())??;
        self.ends[usize::from(n != 1)].process = Some(process);
        if self.kind.is_foreign() {
            self.configure(n, &device)?;
        }
        Ok(())
    }

    /// Gives somebody else's tunnel its keys by `wg`, and its device what it needs.
    fn configure(&self, n: u8, device: &str) -> Result<()> {
        let socket = PathBuf::from(format!("/var/run/wireguard/{device}.sock"));
        let began = Instant::now();
        while !socket.exists() {
            ensure!(began.elapsed() < Duration::from_secs(10), "no control socket");
            thread::sleep(Duration::from_millis(20));
        }
        let other = 3 - n;
        let mut keys = tempfile::NamedTempFile::new()?;
        writeln!(keys, "{}", private_text(n))?;
        let status = Command::new("wg")
            .args(["set", device, "listen-port", &PORT.to_string(), "private-key"])
            .arg(keys.path())
            .args(["peer", &key(other).public().to_string(), "endpoint"])
            .arg(SocketAddr::from((outer(other), PORT)).to_string())
            .args(["allowed-ips", &format!("10.77.{other}.0/24")])
            .status()?;
        ensure!(status.success(), "wg has failed");
        let mut netlink = Netlink::open_in(&self.end(n).netns)?;
        let device = ifname(device)?;
        netlink.add_address(device, net(&format!("{}/32", inner(n)))?)?;
        netlink.set_mtu(device, MTU.into())?;
        netlink.set_up(device)?;
        netlink.add_route(&Route::on_link(net(&format!("10.77.{other}.0/24"))?, device))?;
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        let began = Instant::now();
        // An error: the route is not there yet.
        let answered = || crate::traffic::ping(self, 1, Duration::from_millis(200));
        while !answered().is_ok_and(|times| !times.is_empty()) {
            ensure!(began.elapsed() < Duration::from_secs(20), "no answer in 20 s");
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        for end in &self.ends {
            // Killed daemons leave their control sockets.
            let own = format!("cb{}-", std::process::id() % 100_000);
            let sockets = fs::read_dir("/var/run/wireguard").into_iter().flatten().flatten();
            let dead = end.process.is_some() && self.kind.is_foreign();
            for socket in sockets.filter(|_| dead) {
                let suffix = end.name.as_str().rsplit('-').next().unwrap_or_default();
                if socket.file_name().to_string_lossy() == format!("{own}{suffix}.sock") {
                    drop(fs::remove_file(socket.path()));
                }
            }
        }
    }
}

/// A private key of equal bytes, as `wg` wants it.
fn private_text(n: u8) -> &'static str {
    match n {
        1 => "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=",
        _ => "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=",
    }
}

/// User and system time of a process, its ended threads included.
fn cpu_of(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("a tunnel has ended")?;
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    let field = |n: usize| after.split_whitespace().nth(n).and_then(|f| f.parse::<u64>().ok());
    // Fields 14 and 15 of proc_pid_stat(5); the first after the name is 3.
    let ticks = field(11).zip(field(12)).map(|(user, system)| user + system);
    let ticks = ticks.context("/proc/PID/stat is not as it is documented")?;
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

/// A tunnel of ours, until standard input ends.
pub(crate) fn serve(role: &[String]) -> Result<()> {
    let [n, mode, how] = role else { bail!("--role wants number, mode, offloads") };
    let n: u8 = n.parse()?;
    if mode == "bound" {
        return bound::serve(n, how == "kernel");
    }
    let modes = [Mode::WireGuard, Mode::IpUdp, Mode::IpIp];
    let mode = modes.into_iter().find(|known| known.as_str() == mode).context("no such mode")?;
    let other = 3 - n;
    let endpoint = SocketAddr::from((outer(other), PORT));
    let allowed = vec![net(&format!("10.77.{other}.0/24"))?];
    let peer = PeerConfig { mode, ..PeerConfig::new(key(other).public(), Some(endpoint), allowed) };
    let _tunnel = Tunnel::start(Config {
        device: ifname("conet0")?,
        private_key: key(n),
        listen: SocketAddr::from(([0, 0, 0, 0], PORT)),
        addresses: vec![IpNet::from(IpAddr::V4(inner(n)))],
        mtu: MTU,
        offloads: match how.as_str() {
            "all" => Offloads::ALL,
            "sockets" => SOCKETS,
            _ => Offloads::NONE,
        },
        peers: vec![peer],
    })?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
