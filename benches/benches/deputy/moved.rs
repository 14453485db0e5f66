//! A second node on this machine, without its daemon: what deputy-link needs of one.
//!
//! The home daemon's look at the deputy, 20 times a second, is not there either.

use anyhow::{Context as _, Result, anyhow};
use conet_deputy_link::family::Line;
use conet_deputy_link::hosting::{self, HostError, Hosted, Hosting, Warden};
use conet_deputy_link::locks::Policy;
use conet_deputy_link::mover::How;
use conet_deputy_link::{LinkSecret, Ticket, life, mover};
use conet_transport::session::protect::{Cipher, Key, link_keys};
use rustix::process::Pid;
use std::net::{Ipv4Addr, TcpListener};
use std::thread;
use std::time::Duration;

const POLICY: Policy = Policy { allow_root: true, is_deputy: true, started: None };
/// Longer than home is silent in a move of any size here.
const PATIENCE: Duration = Duration::from_secs(30);
/// The host's user as whom programs run that are away; nobody has it.
const GUEST_UID: u32 = 0x7000_0001;
/// Each warden has one program here.
const STAY: Ticket = [1; 16];

/// The other node.
pub(crate) struct Node {
    directory: tempfile::TempDir,
    listener: TcpListener,
    generation: u8,
}

/// A program that is away.
pub(crate) struct Away {
    pub(crate) hosted: Hosted,
    pub(crate) moved: mover::Moved,
    warden: Warden,
}

fn secrets(cipher: Cipher, generation: u8) -> (LinkSecret, LinkSecret) {
    let keys = || link_keys(&Key::new([generation; 32]), b"bench");
    let (home, remote) = (keys(), keys());
    (
        LinkSecret { cipher, seal: home.home_to_remote, open: home.remote_to_home },
        LinkSecret { cipher, seal: remote.remote_to_home, open: remote.home_to_remote },
    )
}

impl Node {
    pub(crate) fn new() -> Result<Self> {
        let listener = life::listen((Ipv4Addr::LOCALHOST, 0).into())?;
        Ok(Self { directory: tempfile::tempdir()?, listener, generation: 0 })
    }

    /// Moves a program here.
    pub(crate) fn take(&mut self, pid: Pid, cipher: Cipher, how: How) -> Result<Away> {
        self.generation = self.generation.wrapping_add(1);
        let (home, remote) = secrets(cipher, self.generation);
        let socket = self.directory.path().join("warden");
        let stream = life::connect(self.listener.local_addr()?, PATIENCE)?;
        let (link, _) = self.listener.accept()?;
        // As both nodes do.
        life::keep_alive(&stream, PATIENCE)?;
        life::keep_alive(&link, PATIENCE)?;
        let warden_at = socket.clone();
        let host = thread::spawn(move || -> Result<Hosted, HostError> {
            let hosting = Hosting {
                pid: pid.as_raw_nonzero().get(),
                ticket: STAY,
                secret: &remote,
                uid: GUEST_UID,
                clock_skew: 0,
                follows: true,
                socket: &warden_at,
                patience: PATIENCE,
            };
            hosting::start(link, &hosting)
        });
        // Nobody listens: a program that makes a child comes home for it.
        let (_, line) = Line::new()?;
        let moved = mover::move_out(pid, stream, home, POLICY, how, &line);
        let hosted = host.join().map_err(|_| anyhow!("the hosting thread panicked"))?;
        let moved = moved.context("moving the program")?;
        let warden = Warden::connect(&socket).context("the warden's socket")?;
        Ok(Away { hosted: hosted.context("hosting the program")?, moved, warden })
    }
}

impl Away {
    pub(crate) fn bring_home(&self, pid: Pid) -> Result<mover::Returned> {
        let ring = || {
            // A program that has ended by itself has no warden any more.
            self.warden.ring(STAY).ok();
        };
        Ok(mover::bring_home(pid, ring)?)
    }
}
