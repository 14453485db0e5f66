//! Lanes: the processes of one way to make a call, started once and measured in turn.
//!
//! A lane's processes are pinned from outside before each batch, so the same processes
//! serve both placements: all on one processor, or the program (with its tracer) on one
//! and who makes its calls on the other.

use crate::moved::{Away, Node};
use crate::peers::conn::Wait;
use crate::work::{Batch, Op};
use anyhow::{Context as _, Result, ensure};
use conet_deputy_link::mover::How;
use conet_deputy_link::{mover, phase};
use conet_transport::session::protect::Cipher;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};
use std::io::{Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Processors of a lane's two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    pub(crate) caller: usize,
    pub(crate) server: usize,
}

impl Placement {
    pub(crate) fn name(self) -> &'static str {
        if self.caller == self.server { "same cpu" } else { "across cpus" }
    }

    pub(crate) fn pin(self) -> String {
        format!("program cpu{}, server cpu{}", self.caller, self.server)
    }
}

/// A way to make a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The program at home, as it was started.
    Native,
    /// At home, under a filter that looks at local calls and lets them through.
    Filtered,
    /// At home, local calls trapped and made by the handler.
    Trapped,
    /// At home, with a patched vDSO that adds an offset.
    Clocks,
    /// Moved by conet.
    Moved(Cipher),
    /// See [`crate::peers`].
    Tcp(Wait),
    Bound {
        sealed: bool,
        wait: Wait,
    },
    PtraceInject,
    PtraceForward,
    SeccompNotify,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Filtered => "bound_filter",
            Self::Trapped => "bound_trap",
            Self::Clocks => "bound_vdso",
            Self::Moved(Cipher::Plain) => "plain",
            Self::Moved(Cipher::Aes128Gcm) => "aes-128-gcm",
            Self::Moved(Cipher::ChaCha20Poly1305) => "chacha20-poly1305",
            Self::Tcp(Wait::Block) => "tcp_nodelay",
            Self::Tcp(Wait::Spin) => "tcp_nodelay_spin",
            Self::Bound { sealed: true, wait: Wait::Block } => "bound",
            Self::Bound { sealed: true, wait: Wait::Spin } => "bound_spin",
            Self::Bound { sealed: false, wait: Wait::Block } => "bound_plain",
            Self::Bound { sealed: false, wait: Wait::Spin } => "bound_plain_spin",
            Self::PtraceInject => "ptrace_inject",
            Self::PtraceForward => "ptrace_forward",
            Self::SeccompNotify => "seccomp_notify",
        }
    }

    /// Whether it is worth measuring there: two that spin on one processor wait for
    /// each other's time slices.
    pub(crate) fn is_for(self, placement: Placement) -> bool {
        let spins = matches!(self, Self::Tcp(Wait::Spin) | Self::Bound { wait: Wait::Spin, .. });
        !spins || placement.caller != placement.server
    }
}

/// A role of this executable as a process; ends with this object.
pub(crate) struct Role {
    child: Child,
    pub(crate) hello: u64,
}

impl Role {
    pub(crate) fn start(args: &[&str]) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("--role")
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a role of this executable")?;
        let hello = word(&mut child).with_context(|| format!("role {}", args.join(" ")));
        let mut role = Self { child, hello: 0 };
        role.hello = hello?;
        Ok(role)
    }

    pub(crate) fn word(&mut self) -> Result<u64> {
        word(&mut self.child)
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn pid(&self) -> Result<Pid> {
        as_pid(self.id().into())
    }

    /// Has a batch done; how long it took.
    pub(crate) fn run(&mut self, batch: Batch) -> Result<Duration> {
        self.begin(batch)?;
        self.end(batch)
    }

    /// Has a batch begun.
    pub(crate) fn begin(&mut self, batch: Batch) -> Result<()> {
        Ok(self.child.stdin.as_mut().context("no input")?.write_all(&batch.emit())?)
    }

    /// How long the batch took that was begun.
    pub(crate) fn end(&mut self, batch: Batch) -> Result<Duration> {
        let ns = self.word().with_context(|| format!("{} ended", batch.op.name()))?;
        Ok(Duration::from_nanos(ns))
    }
}

fn word(child: &mut Child) -> Result<u64> {
    let mut bytes = [0; 8];
    child.stdout.as_mut().context("no output")?.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

impl Drop for Role {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn how(wait: Wait) -> &'static str {
    match wait {
        Wait::Block => "block",
        Wait::Spin => "spin",
    }
}

fn as_pid(id: u64) -> Result<Pid> {
    Pid::from_raw(i32::try_from(id)?).context("process 0")
}

/// The processes of one kind.
pub(crate) struct Lane {
    pub(crate) kind: Kind,
    program: Role,
    /// Processes that run when the program does not; kept for their ends.
    _others: Vec<Role>,
    away: Option<(Node, Away)>,
    callers: Vec<Pid>,
    servers: Vec<Pid>,
}

impl Lane {
    pub(crate) fn start(kind: Kind) -> Result<Self> {
        Self::begin(kind).with_context(|| format!("cannot start {}", kind.name()))
    }

    fn begin(kind: Kind) -> Result<Self> {
        match kind {
            Kind::Native => Self::with(kind, &["program"], vec![]),
            Kind::Filtered => Self::with(kind, &["program-filtered"], vec![]),
            Kind::Trapped => Self::with(kind, &["program-trapped"], vec![]),
            Kind::Clocks => Self::with(kind, &["program-clocks"], vec![]),
            Kind::Moved(cipher) => {
                let mut lane = Self::with(kind, &["program"], vec![])?;
                let mut node = Node::new()?;
                let away = node.take(lane.program.pid()?, cipher, How::default())?;
                lane.callers = vec![as_pid(away.hosted.remote_pid.into())?];
                lane.servers = vec![lane.program.pid()?];
                lane.away = Some((node, away));
                Ok(lane)
            }
            Kind::Tcp(wait) => {
                let server = Role::start(&["serve-tcp"])?;
                Self::with(kind, &["tcp", &server.hello.to_string(), how(wait)], vec![server])
            }
            Kind::Bound { sealed, wait } => {
                let seal = if sealed { "sealed" } else { "plain" };
                let server = Role::start(&["serve-bound", seal])?;
                let port = server.hello.to_string();
                Self::with(kind, &["program-bound", &port, seal, how(wait)], vec![server])
            }
            Kind::PtraceInject => {
                let mut lane = Self::with(kind, &["inject"], vec![])?;
                lane.servers = vec![as_pid(lane.program.hello)?];
                Ok(lane)
            }
            Kind::PtraceForward => {
                let mut home = Role::start(&["serve-inject"])?;
                let port = home.word()?;
                let used = as_pid(home.hello)?;
                let mut lane = Self::with(kind, &["program-traced"], vec![home])?;
                let pid = lane.program.id().to_string();
                let tracer = Role::start(&["trace", &pid, &port.to_string()])?;
                lane.servers.push(used);
                lane.callers.push(tracer.pid()?);
                lane._others.push(tracer);
                Ok(lane)
            }
            Kind::SeccompNotify => {
                let mut lane = Self::with(kind, &["program-notified"], vec![])?;
                let (pid, fd) = (lane.program.id().to_string(), lane.program.hello.to_string());
                let supervisor = Role::start(&["supervise", &pid, &fd])?;
                lane.servers.push(supervisor.pid()?);
                lane._others.push(supervisor);
                Ok(lane)
            }
        }
    }

    /// A program, and `servers` that make its calls.
    fn with(kind: Kind, args: &[&str], servers: Vec<Role>) -> Result<Self> {
        let program = Role::start(args)?;
        let callers = vec![program.pid()?];
        let pids = servers.iter().map(Role::pid).collect::<Result<_>>()?;
        Ok(Self { kind, program, _others: servers, away: None, callers, servers: pids })
    }

    fn pin(&self, placement: Placement) -> Result<()> {
        let sides = [(&self.callers, placement.caller), (&self.servers, placement.server)];
        for (pids, processor) in sides {
            let mut set = CpuSet::new();
            set.set(processor);
            for pid in pids {
                sched_setaffinity(Some(*pid), &set)
                    .with_context(|| format!("pinning a process of {}", self.kind.name()))?;
            }
        }
        Ok(())
    }

    /// Has a batch done there; how long it took.
    pub(crate) fn run(&mut self, op: Op, count: u64, placement: Placement) -> Result<Duration> {
        self.pin(placement)?;
        let ran = self.program.run(Batch { op, count });
        let took = ran.with_context(|| format!("{}: {}", self.kind.name(), op.name()))?;
        self.check_away(op)?;
        Ok(took)
    }

    /// A program that has come home by itself would be measured as the fastest.
    fn check_away(&self, op: Op) -> Result<()> {
        if self.away.is_some() {
            let status = mover::status(self.program.pid()?)?;
            let (phase, reason, detail) = (status.phase, status.reason, status.detail);
            let went = || format!("{} took it home (reason {reason}, {detail})", op.name());
            ensure!(phase == phase::SERVING, went());
        }
        Ok(())
    }
}
