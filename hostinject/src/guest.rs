//! Guests that are network namespaces, whatever plumbs them to their host.
//!
//! `attach` is a list of statements that are made true, each only if it is not
//! true yet. So it is at once the way to make a guest, to take over one that
//! runs, and to mend one whose making was cut short by a crash. A failure removes
//! what this call itself has made.
//!
//! What keeps a guest from using addresses that are not its own: the port of one by TAP
//! or of a machine, and for all the host's [`crate::RuleTable`], which knows both
//! families and what is whose. Where nobody has put that in force, a guest by veth has
//! the host's strict reverse-path check (RFC 3704 §2.2) alone, which drops IPv4 packets
//! whose source is not routed back to that guest; it is weakened to *loose* when the host's
//! `net.ipv4.conf.all.rp_filter` is 2, and IPv6 has none.
//!
//! Sources: `network_namespaces(7)`, kernel
//! `Documentation/networking/ip-sysctl.rst`.

mod gate;

use std::net::IpAddr;

use std::cell::Cell;
use std::io;

use conet_dataplane::DropCounts;
use conet_netsys::{
    IfName, IpNet, MacAddr, NameError, NetError, Netlink, Netns, NetnsName, Route, RouteScope,
    Sysctl,
};

pub use gate::GateError;

use crate::gate::Rates;
use crate::services::Lease;
use crate::tap::Pump;
use crate::vhost::{Server, ServerSpec, ServerStatus, VhostSpec};
use crate::{leave, tap, veth, vhost};

/// How a guest's packets reach the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PortKind {
    /// Through a veth pair, within the kernel.
    #[default]
    Veth,
    /// Through a TAP device and a thread of this process.
    Tap,
    /// Not a namespace but a virtual machine, by vhost-user and a process of its own.
    Vhost,
}

/// What a guest is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestSpec {
    /// Name of the guest's namespace.
    pub name: NetnsName,
    /// Name of the link at the host's end.
    pub host_link: IfName,
    /// Name of the link at the guest's end.
    pub guest_link: IfName,
    /// The guest's addresses, at least one.
    pub addresses: Vec<IpAddr>,
    /// The host's addresses as the guest sees them: one of each family that the
    /// guest has.
    pub gateways: Vec<IpAddr>,
    /// Bits of the netmask that a guest is told that asks by DHCP, 0 to 32.
    pub prefix: u8,
    /// Resolvers that a guest is told that asks.
    pub dns: Vec<IpAddr>,
    /// How fast it may send and receive; by [`PortKind::Veth`] there is nobody to see to it.
    pub rates: Rates,
    /// Largest packet in bytes; that of the tunnel's device, so that the guest
    /// never sends what would not fit.
    pub mtu: u16,
    /// The guest's Ethernet address; random when absent.
    pub mac: Option<MacAddr>,
    /// How its packets reach the host.
    pub kind: PortKind,
    /// Where a machine's port is served; needed for [`PortKind::Vhost`] alone.
    pub server: Option<ServerSpec>,
    /// Pairs of queues of a machine's card: 1 to [`vhost::MAX_QUEUES`].
    pub queues: u16,
}

impl GuestSpec {
    /// A guest with one address behind one gateway, links named as the guest on
    /// the host and `eth0` inside.
    ///
    /// # Errors
    /// [`NameError::TooLong`] when the name does not fit an interface (15 bytes).
    pub fn new(
        name: NetnsName,
        address: IpAddr,
        gateway: IpAddr,
        mtu: u16,
    ) -> Result<Self, NameError> {
        Ok(Self {
            host_link: IfName::new(name.as_str())?,
            guest_link: IfName::new("eth0")?,
            name,
            addresses: vec![address],
            gateways: vec![gateway],
            prefix: 32,
            dns: Vec::new(),
            rates: Rates::default(),
            mtu,
            mac: None,
            kind: PortKind::Veth,
            server: None,
            queues: 1,
        })
    }

    /// What the guest is told when it asks.
    pub(crate) fn lease(&self) -> Lease {
        Lease {
            addresses: self.addresses.clone(),
            gateways: self.gateways.clone(),
            prefix: self.prefix,
            dns: self.dns.clone(),
            mtu: self.mtu,
        }
    }

    fn has_v6(&self) -> bool {
        self.addresses.iter().any(IpAddr::is_ipv6)
    }
}

/// Why a guest could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The kernel refused something.
    #[error("guest {name}")]
    Net {
        /// The guest.
        name: NetnsName,
        /// What it refused.
        source: NetError,
    },
    /// The specification names no address.
    #[error("guest {name} has no address; give it one")]
    NoAddress {
        /// The guest.
        name: NetnsName,
    },
    /// No gateway of the family of one of the addresses.
    #[error("guest {name} has address {address} but no gateway of that family; give it one")]
    NoGateway {
        /// The guest.
        name: NetnsName,
        /// The address.
        address: IpAddr,
    },
    /// Something else bears the name that the host's end should have.
    #[error("guest {name}: link {link} is in use for something else; choose another name")]
    LinkTaken {
        /// The guest.
        name: NetnsName,
        /// The link.
        link: IfName,
    },
    /// What was to be made is there already.
    #[error("there is already a {what} named {name}; choose another name, or remove that first")]
    Exists {
        /// The guest.
        name: NetnsName,
        /// A network namespace or a link.
        what: &'static str,
    },
    /// A TUN or TAP device could not be made.
    #[error("guest {name}: no device {link}; is /dev/net/tun there?")]
    Device {
        /// The guest.
        name: NetnsName,
        /// The device.
        link: IfName,
        /// What the kernel said.
        source: io::Error,
    },
    /// A machine's port has nowhere to be served.
    #[error("guest {name} is a machine, and nothing was said about its server")]
    NoServer {
        /// The guest.
        name: NetnsName,
    },
    /// A machine's port is not served.
    #[error("guest {name}: the server of its port does not start")]
    Server {
        /// The guest.
        name: NetnsName,
        /// Why.
        source: io::Error,
    },
    /// The thread of a TAP port could not be started.
    #[error("guest {name}: no thread for its port")]
    Thread {
        /// The guest.
        name: NetnsName,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A guest that is connected to its host.
#[derive(Debug)]
#[must_use = "a guest stays when its port is dropped; detach it to remove it"]
pub struct GuestPort {
    spec: Box<GuestSpec>,
    host: Netlink,
    adopted: bool,
    end: GuestEnd,
}

/// The guest's side of a port.
#[derive(Debug)]
enum GuestEnd {
    /// A namespace; where its port is a TAP device, the link is gone without the pump.
    Namespace(Netns, Option<Pump>),
    /// A machine, by the process that serves it.
    Machine(Server),
}

impl GuestPort {
    /// Makes the guest, or takes over the one that is there, in the network
    /// namespace of the calling thread as its host.
    ///
    /// # Errors
    /// [`AttachError`]; then nothing remains that this call has made.
    pub fn attach(spec: GuestSpec) -> Result<Self, AttachError> {
        check(&spec)?;
        if spec.kind == PortKind::Vhost {
            return Self::attach_machine(spec);
        }
        let name = &spec.name;
        let fail = |source| AttachError::Net { name: spec.name.clone(), source };
        let (netns, found) = open_or_create(name).map_err(fail)?;
        // A link of that name that this call has not made is somebody else's.
        let linked = Cell::new(false);
        let undo = |error| {
            // The first failure is the one to report.
            if linked.get() {
                drop(Netlink::open().and_then(|mut host| host.delete_link(spec.host_link)));
            }
            if !found {
                drop(Netns::delete(&spec.name));
            }
            error
        };
        let mut host = Netlink::open().map_err(fail).map_err(undo)?;
        let mut guest = Netlink::open_in(&netns).map_err(fail).map_err(undo)?;
        let (paired, devices) = match spec.kind {
            PortKind::Veth => {
                (veth::pair(&spec, &netns, &mut host, &mut guest).map_err(undo)?, None)
            }
            // A machine was attached above.
            PortKind::Tap | PortKind::Vhost => {
                veth::unpair(&spec, &mut host, &mut guest).map_err(undo)?;
                let devices = tap::Devices::open(&spec, &netns, &mut host, &mut guest);
                (false, Some(devices.map_err(undo)?))
            }
        };
        linked.set(!paired);
        set_guest(&spec, &netns, &mut guest).map_err(fail).map_err(undo)?;
        set_host(&spec, &mut host).map_err(fail).map_err(undo)?;
        let pump = match devices {
            Some(devices) => Some(devices.start(&spec).map_err(undo)?),
            None => None,
        };
        let end = GuestEnd::Namespace(netns, pump);
        Ok(Self { spec: Box::new(spec), host, adopted: found && paired, end })
    }

    /// Takes over the server that runs, or starts one.
    fn attach_machine(spec: GuestSpec) -> Result<Self, AttachError> {
        let fail = |source| AttachError::Net { name: spec.name.clone(), source };
        let none = || AttachError::NoServer { name: spec.name.clone() };
        let at = spec.server.as_ref().ok_or_else(none)?;
        let mut host = Netlink::open().map_err(fail)?;
        let link = host.link(spec.host_link).map_err(fail)?;
        let served = VhostSpec {
            mac: spec.mac.unwrap_or_else(|| machine_mac(&spec.addresses)),
            lease: spec.lease(),
            queues: spec.queues,
        };
        let found = Server::find(at, spec.name.as_str(), &served);
        let mut adopted = false;
        let server = match (found, link.is_some()) {
            (Some((server, true)), true) => {
                adopted = true;
                server
            }
            (None, true) => {
                return Err(AttachError::LinkTaken { name: spec.name, link: spec.host_link });
            }
            // It has lost its device, or the guest's addresses are others now.
            (found, _) => {
                found
                    .map_or(Ok(()), |(server, _)| server.end())
                    .map_err(|source| AttachError::Server { name: spec.name.clone(), source })?;
                host.delete_link(spec.host_link).map_err(fail)?;
                serve(&spec, at, &served)?
            }
        };
        if let Err(source) = server.set_rates(spec.rates) {
            if !adopted {
                server.end().ok();
            }
            return Err(AttachError::Server { name: spec.name, source });
        }
        if let Err(source) = set_host(&spec, &mut host) {
            if !adopted {
                server.end().ok();
            }
            return Err(AttachError::Net { name: spec.name, source });
        }
        Ok(Self { spec: Box::new(spec), host, adopted, end: GuestEnd::Machine(server) })
    }

    /// Makes the guest where neither a namespace nor a link of its names is there:
    /// nothing that somebody else made is taken over or replaced.
    ///
    /// # Errors
    /// [`AttachError::Exists`], or as [`GuestPort::attach`].
    pub fn create(spec: GuestSpec) -> Result<Self, AttachError> {
        let fail = |source| AttachError::Net { name: spec.name.clone(), source };
        let exists = |what| AttachError::Exists { name: spec.name.clone(), what };
        if Netns::list().map_err(fail)?.contains(&spec.name) {
            return Err(exists("network namespace"));
        }
        let mut host = Netlink::open().map_err(fail)?;
        if host.link(spec.host_link).map_err(fail)?.is_some() {
            return Err(exists("link"));
        }
        Self::attach(spec)
    }

    /// What the guest is.
    pub fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    /// The guest's namespace; a machine has none.
    pub fn netns(&self) -> Option<&Netns> {
        match &self.end {
            GuestEnd::Namespace(netns, _) => Some(netns),
            GuestEnd::Machine(_) => None,
        }
    }

    /// What the server of a machine's port says; none where there is none to ask.
    pub fn server(&self) -> Option<ServerStatus> {
        match &self.end {
            GuestEnd::Namespace(..) => None,
            GuestEnd::Machine(server) => server.status().ok(),
        }
    }

    /// Whether the guest was already there and connected when it was attached.
    pub fn is_adopted(&self) -> bool {
        self.adopted
    }

    /// Whether packets can pass: the link is there, up, and so is its other end.
    ///
    /// # Errors
    /// As the kernel refuses.
    pub fn is_up(&mut self) -> Result<bool, NetError> {
        let runs = match &self.end {
            GuestEnd::Namespace(_, pump) => pump.as_ref().is_none_or(Pump::is_running),
            GuestEnd::Machine(server) => server.status().is_ok(),
        };
        let link = self.host.link(self.spec.host_link)?;
        Ok(runs && link.is_some_and(|link| link.up && link.running))
    }

    /// Removes the guest's link, routes and name. A process that still runs
    /// inside keeps a namespace without a name and without a way out.
    ///
    /// Called from the host's namespace it does not wait until the kernel has freed the link,
    /// 20 to 80 ms later.
    ///
    /// # Errors
    /// As the kernel refuses.
    pub fn detach(self) -> Result<(), NetError> {
        let (link, mut host) = (self.spec.host_link, self.host);
        match self.end {
            GuestEnd::Namespace(_, pump) => {
                // Holds the devices of a TAP port.
                if let Some(pump) = pump {
                    leave::drop_holder(link, &mut host, pump)?;
                }
                leave::delete(link, host)?;
                Netns::delete(&self.spec.name).map(|_| ())
            }
            GuestEnd::Machine(server) => {
                // The device goes with its last descriptor; so does the server, without it.
                server.end().ok();
                leave::delete(link, host).map(|_| ())
            }
        }
    }

    /// What the port has dropped, by reason; the kernel counts a veth's itself.
    pub fn drops(&self) -> DropCounts {
        match &self.end {
            GuestEnd::Namespace(_, pump) => {
                pump.as_ref().map_or_else(DropCounts::default, Pump::drops)
            }
            GuestEnd::Machine(_) => self.server().unwrap_or_default().drops,
        }
    }

    /// Removes what is left of a guest, whatever that is; says whether there was
    /// anything. For guests whose port is lost, after a crash.
    ///
    /// # Errors
    /// As the kernel refuses.
    pub fn remove(name: &NetnsName, host_link: IfName) -> Result<bool, NetError> {
        let linked = leave::delete(host_link, Netlink::open()?)?;
        let named = Netns::delete(name)?;
        Ok(linked || named)
    }
}

/// Starts a server with a device that is made here.
fn serve(spec: &GuestSpec, at: &ServerSpec, served: &VhostSpec) -> Result<Server, AttachError> {
    let (name, link) = (spec.name.clone(), spec.host_link);
    let device = vhost::open_device(link, spec.queues).map_err(|source| AttachError::Device {
        name: name.clone(),
        link,
        source,
    })?;
    Server::start(at, spec.name.as_str(), &device, served)
        .map_err(|source| AttachError::Server { name, source })
}

/// The Ethernet address of a machine's card, where none is given: the same each time, so
/// that a machine that was configured for it knows its card again. Locally administered.
#[must_use]
pub fn machine_mac(addresses: &[IpAddr]) -> MacAddr {
    let mut mac = [0x02, 0, 0, 0, 0, 0];
    match addresses.first() {
        Some(IpAddr::V4(address)) => mac[2..].copy_from_slice(&address.octets()),
        Some(IpAddr::V6(address)) => mac[2..].copy_from_slice(&address.octets()[12..]),
        None => {}
    }
    MacAddr(mac)
}

fn check(spec: &GuestSpec) -> Result<(), AttachError> {
    if spec.addresses.is_empty() {
        return Err(AttachError::NoAddress { name: spec.name.clone() });
    }
    for &address in &spec.addresses {
        if !spec.gateways.iter().any(|gateway| gateway.is_ipv4() == address.is_ipv4()) {
            return Err(AttachError::NoGateway { name: spec.name.clone(), address });
        }
    }
    Ok(())
}

/// Says whether the namespace was there before.
fn open_or_create(name: &NetnsName) -> Result<(Netns, bool), NetError> {
    match Netns::open(name) {
        Ok(netns) => Ok((netns, true)),
        Err(NetError::NotANamespace { .. }) => {
            Netns::delete(name)?;
            Ok((Netns::create(name)?, false))
        }
        Err(e) if e.is_missing() => Ok((Netns::create(name)?, false)),
        Err(e) => Err(e),
    }
}

fn set_guest(spec: &GuestSpec, netns: &Netns, guest: &mut Netlink) -> Result<(), NetError> {
    netns.run(|| switch_ipv6(spec, spec.guest_link))??;
    set_link(guest, spec.guest_link, spec.mtu, spec.mac)?;
    set_addresses(guest, spec.guest_link, &spec.addresses)?;
    guest.set_up(IfName::LOOPBACK)?;
    guest.set_up(spec.guest_link)?;
    for &gateway in &spec.gateways {
        if !spec.addresses.iter().any(|a| a.is_ipv4() == gateway.is_ipv4()) {
            continue;
        }
        guest.replace_route(&Route::on_link(IpNet::from(gateway), spec.guest_link))?;
        let default = Route::default_via(gateway);
        guest.replace_route(&Route { link: Some(spec.guest_link), onlink: true, ..default })?;
    }
    Ok(())
}

fn set_host(spec: &GuestSpec, host: &mut Netlink) -> Result<(), NetError> {
    switch_ipv6(spec, spec.host_link)?;
    // Before the link is up: no packet passes unchecked.
    Sysctl::RpFilter(Some(spec.host_link)).write("1")?;
    // Guests share the link's far side with nobody; there is no better way to
    // tell them.
    Sysctl::SendRedirects(Some(spec.host_link)).write("0")?;
    set_link(host, spec.host_link, spec.mtu, None)?;
    set_addresses(host, spec.host_link, &spec.gateways)?;
    host.set_up(spec.host_link)?;
    for &address in &spec.addresses {
        let source = spec.gateways.iter().copied().find(|g| g.is_ipv4() == address.is_ipv4());
        let route = Route::on_link(IpNet::from(address), spec.host_link);
        host.replace_route(&Route { source, scope: RouteScope::Link, ..route })?;
    }
    Sysctl::Ipv4Forward.write("1")?;
    if spec.has_v6() && Sysctl::Ipv6Forward.read()? == "0" {
        keep_routers(host)?;
        Sysctl::Ipv6Forward.write("1")?;
    }
    Ok(())
}

/// A kernel that begins to forward forgets the routers that it has heard of, and its own
/// way out with them; it does not on links where it is told to listen to them all the same.
fn keep_routers(host: &mut Netlink) -> Result<(), NetError> {
    for link in host.links()? {
        let listens = Sysctl::AcceptRa(Some(link.name));
        // Of links that were there a moment ago, and have IPv6.
        if listens.read().is_ok_and(|value| value == "1") {
            listens.write("2")?;
        }
    }
    Ok(())
}

/// Without IPv6 addresses a link is silent in IPv6: no solicitations into the
/// tunnel, and no link-local way around the gateway. A kernel without IPv6 lacks
/// the switch, which is as good.
///
/// With them nobody looks whether an address is another's: there are two on the link, and
/// which has which is settled. So addresses are there at once, and a guest that answers for
/// its gateway's takes nothing away.
fn switch_ipv6(spec: &GuestSpec, link: IfName) -> Result<(), NetError> {
    let value = if spec.has_v6() { "0" } else { "1" };
    match Sysctl::DisableIpv6(Some(link)).write(value) {
        Err(e) if e.is_missing() && !spec.has_v6() => Ok(()),
        Ok(()) if spec.has_v6() => Sysctl::AcceptDad(Some(link)).write("0"),
        other => other,
    }
}

fn set_link(
    netlink: &mut Netlink,
    name: IfName,
    mtu: u16,
    mac: Option<MacAddr>,
) -> Result<(), NetError> {
    let link = netlink.link(name)?;
    if link.as_ref().is_none_or(|link| link.mtu != u32::from(mtu)) {
        netlink.set_mtu(name, u32::from(mtu))?;
    }
    match mac {
        Some(mac) if link.is_none_or(|link| link.mac != Some(mac)) => netlink.set_mac(name, mac),
        _ => Ok(()),
    }
}

/// The link has these addresses and no other global one.
fn set_addresses(netlink: &mut Netlink, link: IfName, wanted: &[IpAddr]) -> Result<(), NetError> {
    let present = netlink.addresses(Some(link))?;
    for entry in &present {
        let ip = entry.net.addr();
        let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
        if !(link_local || wanted.contains(&ip) && entry.net == IpNet::from(ip)) {
            netlink.delete_address(link, entry.net)?;
        }
    }
    for net in wanted.iter().map(|&ip| IpNet::from(ip)) {
        if !present.iter().any(|entry| entry.net == net) {
            netlink.add_address(link, net)?;
        }
    }
    Ok(())
}
