//! Making a lab: namespaces and LAN, hosts, daemons, until all see each other.
//!
//! ```text
//! bridge ─► per host: netns, veth, holder ─► per host: daemon ─► each answers ─► each sees its peers
//! ```
//!
//! A lab is up whole or not at all: whatever fails, or a Ctrl-C, removes it.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use conet_netsys::{IfName, Netlink, Netns};
use conet_node::client::{Client, ClientError};
use conet_node::config::Mode;
use conet_wire::control::{Request, Response, Status};

use crate::holder::{Plan, READY};
use crate::names::{HostId, LAN, MAX_GUESTS, MAX_HOSTS};
use crate::state::{HostState, LabLock, LabState};
use crate::{LabError, down, plan};
use conet_node::procfs::ProcessRef;

/// The running program, whichever name it has in whichever mount namespace.
const SELF: &str = "/proc/self/exe";
/// How long a daemon may take to answer: some hundred times what it takes.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// How long the daemons may take to find each other.
const PEERS_LIMIT: Duration = Duration::from_secs(20);
/// How often a wait looks again.
const POLL: Duration = Duration::from_millis(20);

/// What lab to make.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Hosts, 1 to [`MAX_HOSTS`].
    pub hosts: u8,
    /// Guests of each host, 0 to [`MAX_GUESTS`].
    pub guests: u8,
    /// Whether guests have IPv6 addresses as well.
    pub ipv6: bool,
    /// How packets between hosts travel.
    pub mode: Mode,
}

/// Whom the making of a lab talks to, and listens to.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// Told of each step.
    pub progress: &'a dyn Fn(&str),
    /// Set from outside to stop.
    pub interrupted: &'a AtomicBool,
}

impl std::fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("interrupted", &self.interrupted).finish_non_exhaustive()
    }
}

impl Watch<'_> {
    pub(crate) fn check(&self) -> Result<(), LabError> {
        if self.interrupted.load(Ordering::Relaxed) { Err(LabError::Interrupted) } else { Ok(()) }
    }
}

/// Makes a lab, and returns when all daemons answer and see their peers.
///
/// The caller must be the `conet` program: it runs itself again, as `conet lab
/// hold` and `conet lab daemon`.
///
/// # Errors
///
/// [`LabError`]; then nothing of the lab is left, save where a lab was up before.
pub fn up(options: &Options, watch: Watch<'_>) -> Result<LabState, LabError> {
    in_range("--hosts", options.hosts, 1, MAX_HOSTS)?;
    in_range("--guests", options.guests, 0, MAX_GUESTS)?;
    let lock = LabLock::take()?;
    // /sys may show another namespace's links; netlink shows ours.
    if LabState::load().is_ok() || Netlink::open()?.link(IfName::new(LAN)?)?.is_some() {
        return Err(LabError::AlreadyUp);
    }
    match build(options, watch) {
        Ok(state) => Ok(state),
        Err(error) => {
            // The first failure is the one to tell; what cannot be removed now,
            // `conet lab down` names again.
            (watch.progress)("removing what there is");
            drop(down::remove_all(lock));
            Err(error)
        }
    }
}

fn in_range(what: &'static str, number: u8, least: u8, most: u8) -> Result<(), LabError> {
    if (least..=most).contains(&number) {
        Ok(())
    } else {
        Err(LabError::Range { what, least, most })
    }
}

fn build(options: &Options, watch: Watch<'_>) -> Result<LabState, LabError> {
    let mut state = LabState::new(options.mode, options.guests);
    state.save()?;
    let mut netlink = Netlink::open()?;
    crate::lan::make_bridge(&mut netlink)?;
    for (host, plan) in plan::plans(options)? {
        watch.check()?;
        (watch.progress)(&format!("making {host}"));
        let netns = Netns::create(&host.netns()?)?;
        crate::lan::join(&mut netlink, host, &netns)?;
        let holder = start_holder(&plan)?;
        state.hosts.push(HostState {
            number: host.number(),
            name: plan.name,
            holder,
            daemon: None,
        });
        state.save()?;
    }
    start_daemons(&mut state, watch)?;
    Ok(state)
}

/// Starts a holder and waits until it says that the host is there.
fn start_holder(plan: &Plan) -> Result<ProcessRef, LabError> {
    let failed = |said: String| LabError::Holder { name: plan.name.clone(), said };
    let mut child = Command::new(SELF)
        .args(["lab", "hold"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(LabError::step("start a lab host"))?;
    let holder = ProcessRef::of(child.id());
    let text = serde_json::to_vec(plan).map_err(|error| failed(error.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&text).map_err(LabError::step("describe a lab host"))?;
    }
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout)
            .read_line(&mut line)
            .map_err(LabError::step("wait for a lab host"))?;
    }
    match holder {
        Some(holder) if line.trim_end() == READY => Ok(holder),
        _ => Err(failed(last_words(&mut child))),
    }
}

/// What a child that ended wrote last on its standard error.
fn last_words(child: &mut Child) -> String {
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        // What cannot be read is not told; the exit status is.
        stderr.read_to_string(&mut said).ok();
    }
    match (said.trim().lines().last(), child.wait()) {
        (Some(line), _) => line.to_owned(),
        (None, Ok(status)) => format!("it ended with {status}"),
        (None, Err(error)) => format!("it ended ({error})"),
    }
}

/// Starts the daemons of all hosts and waits until each sees its peers.
fn start_daemons(state: &mut LabState, watch: Watch<'_>) -> Result<(), LabError> {
    for index in 0..state.hosts.len() {
        watch.check()?;
        (watch.progress)(&format!("starting the daemon of {}", state.hosts[index].name));
        let daemon = start_daemon(&state.hosts[index])?;
        state.hosts[index].daemon = Some(daemon);
        state.save()?;
    }
    for host in &state.hosts {
        wait_answer(host, watch)?;
    }
    (watch.progress)("waiting until the daemons see each other");
    let wanted = u32::try_from(state.hosts.len()).unwrap_or(u32::MAX).saturating_sub(1);
    for host in &state.hosts {
        wait_peers(host, wanted, watch)?;
    }
    Ok(())
}

/// Starts a host's daemon; it need not answer yet.
fn start_daemon(host: &HostState) -> Result<ProcessRef, LabError> {
    let path = host.log();
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(LabError::step_on("open the log", &path))?;
    let copy = log.try_clone().map_err(LabError::step_on("open the log", &path))?;
    let child = Command::new(SELF)
        .args(["lab", "daemon", &host.name])
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(copy)
        .spawn()
        .map_err(LabError::step("start a daemon"))?;
    ProcessRef::of(child.id()).ok_or_else(|| daemon_failed(host))
}

/// Asks a host's daemon what it is.
///
/// # Errors
///
/// [`ClientError`].
pub fn ask_status(host: &HostState) -> Result<Status, ClientError> {
    let socket = host.path(&plan::socket().to_string_lossy());
    let mut client = Client::connect(&socket)?;
    client.set_timeout(Some(Duration::from_secs(2)))?;
    match client.ask(&Request::Status {})? {
        Response::Status(status) => Ok(status),
        _ => Err(ClientError::Unexpected),
    }
}

fn wait_answer(host: &HostState, watch: Watch<'_>) -> Result<(), LabError> {
    let deadline = Instant::now() + ANSWER_LIMIT;
    loop {
        watch.check()?;
        if ask_status(host).is_ok() {
            return Ok(());
        }
        let alive = host.daemon.is_some_and(ProcessRef::is_alive);
        if !alive || Instant::now() >= deadline {
            return Err(daemon_failed(host));
        }
        std::thread::sleep(POLL);
    }
}

fn wait_peers(host: &HostState, wanted: u32, watch: Watch<'_>) -> Result<(), LabError> {
    let deadline = Instant::now() + PEERS_LIMIT;
    loop {
        watch.check()?;
        let seen = ask_status(host).map_or(0, |status| status.peers_up);
        if seen >= wanted {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(LabError::Apart {
                name: host.name.clone(),
                seen,
                wanted,
                seconds: PEERS_LIMIT.as_secs(),
                log: host.log(),
            });
        }
        std::thread::sleep(POLL);
    }
}

fn daemon_failed(host: &HostState) -> LabError {
    let log = host.log();
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    let said = text.trim().lines().last().unwrap_or("it wrote nothing").to_owned();
    LabError::Daemon { name: host.name.clone(), said, log }
}

/// Ends a host's daemon, if one runs, and starts it anew; what it hosts is left
/// alone. Returns when it answers and sees its peers.
///
/// # Errors
///
/// [`LabError`].
pub fn restart(name: &str, watch: Watch<'_>) -> Result<(), LabError> {
    let lock = LabLock::take()?;
    let mut state = LabState::load()?;
    let host = state.host(name)?;
    let index = usize::from(host.number) - 1;
    if !host.holder.is_alive() {
        return Err(LabError::HostGone { name: name.to_owned() });
    }
    if let Some(daemon) = host.daemon {
        down::end(daemon)?;
    }
    let daemon = start_daemon(host)?;
    state.hosts[index].daemon = Some(daemon);
    state.save()?;
    drop(lock);
    let host = &state.hosts[index];
    wait_answer(host, watch)?;
    let running = state.hosts.iter().filter(|host| host.daemon.is_some_and(ProcessRef::is_alive));
    let others = u32::try_from(running.count()).unwrap_or(u32::MAX).saturating_sub(1);
    wait_peers(host, others, watch)
}

/// The hosts of a lab, for whoever measures between them.
pub(crate) fn host_ids(state: &LabState) -> Vec<HostId> {
    HostId::all(MAX_HOSTS).take(state.hosts.len()).collect()
}
