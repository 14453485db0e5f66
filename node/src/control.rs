//! The daemon's end of the control socket.
//!
//! ```text
//! accept ─► read a line ─► (caller, request) to the daemon
//!                              │ answers now, or keeps a Responder
//!           write lines ◄──────┘ which any thread may use
//! ```
//!
//! All sockets are non-blocking and belong to the control thread. A connection
//! has one request under way; the next is read when it is answered, so a client
//! that only sends is held back by the kernel's buffer. Memory per connection is
//! bounded by one request and `MAX_OUTPUT`; connections by `MAX_CONNECTIONS`
//! and, per user, by `MAX_PER_USER`, so that one user cannot lock others out.
//!
//! What it is not: it does not know what a request means.
//!
//! Invariant: each request is answered exactly once; a [`Responder`] that is
//! dropped unused answers that the request failed.

mod connection;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use conet_wire::control::{Failure, Progress, Request, Response};
use mio::event::Event;
use mio::net::UnixListener;
use mio::{Interest, Registry, Token, Waker};

use crate::caller::{Caller, group_id};
use connection::Connection;

/// Most connections at a time.
const MAX_CONNECTIONS: usize = 256;
/// Most connections of one user at a time, root excepted.
const MAX_PER_USER: usize = 32;
/// Most bytes of answers that wait for a client to read them; one that reads no
/// faster is cut off.
const MAX_OUTPUT: usize = 4 << 20;
/// Most connections accepted before others are served again.
const ACCEPT_BATCH: usize = 16;

/// A response on its way to the control thread.
type Line = (Token, Response);

/// Answers one request, from whichever thread, as often as there is progress and
/// once at the end.
#[derive(Debug)]
pub struct Responder {
    connection: Token,
    lines: Sender<Line>,
    waker: Arc<Waker>,
    answered: bool,
}

impl Responder {
    /// Tells how far the request has come.
    pub fn progress(&self, phase: &str, detail: impl Into<String>) {
        let progress = Progress { phase: phase.to_owned(), detail: detail.into() };
        self.send(Response::Progress(progress));
    }

    /// Answers the request.
    pub fn answer(mut self, answer: Result<Response, Failure>) {
        self.answered = true;
        self.send(answer.unwrap_or_else(Response::Error));
    }

    fn send(&self, response: Response) {
        // The control thread is gone when the daemon ends: nobody is left to tell.
        if self.lines.send((self.connection, response)).is_ok()
            && let Err(error) = self.waker.wake()
        {
            tracing::warn!(%error, "cannot wake the control thread; the answer waits");
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if !self.answered {
            self.send(Response::Error(Failure::new(
                "failed",
                "the request was given up",
                "see the daemon's log",
            )));
        }
    }
}

/// The listening socket and its connections.
#[derive(Debug)]
pub(crate) struct ControlServer {
    listener: UnixListener,
    listen_token: Token,
    path: PathBuf,
    group: Option<u32>,
    connections: HashMap<Token, Connection>,
    next: usize,
    lines: (Sender<Line>, Receiver<Line>),
    waker: Arc<Waker>,
}

impl ControlServer {
    /// Binds the socket, open to all, in place of one that a dead daemon left.
    /// The caller holds the state directory's lock: no other daemon lives.
    ///
    /// `tokens` are the mio tokens that it may use, one for the listener and from
    /// it upwards for connections.
    ///
    /// # Errors
    ///
    /// Those of `bind(2)` and `chmod(2)`.
    pub(crate) fn bind(
        path: &Path,
        registry: &Registry,
        tokens: usize,
        waker: Arc<Waker>,
    ) -> io::Result<Self> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
        let listen_token = Token(tokens);
        registry.register(&mut listener, listen_token, Interest::READABLE)?;
        Ok(Self {
            listener,
            listen_token,
            path: path.to_owned(),
            // Without the file there is no group, and root alone administers.
            group: fs::read_to_string("/etc/group").ok().as_deref().and_then(group_id),
            connections: HashMap::new(),
            next: tokens + 1,
            lines: channel(),
            waker,
        })
    }

    /// Whether an event of this token is for the server.
    pub(crate) fn owns(&self, token: Token) -> bool {
        token.0 >= self.listen_token.0
    }

    /// Takes an event; gives the request that it completed, if it did.
    pub(crate) fn handle_event(
        &mut self,
        registry: &Registry,
        event: &Event,
    ) -> Option<(Caller, Request, Responder)> {
        if event.token() == self.listen_token {
            self.accept(registry);
            return None;
        }
        self.drive(registry, event.token())
    }

    /// Sends what [`Responder`]s have said since; gives the requests that could
    /// be read because an earlier one was answered.
    pub(crate) fn handle_responses(
        &mut self,
        registry: &Registry,
    ) -> Vec<(Caller, Request, Responder)> {
        let mut requests = Vec::new();
        while let Ok((token, response)) = self.lines.1.try_recv() {
            // The client may have gone meanwhile.
            let Some(connection) = self.connections.get_mut(&token) else { continue };
            connection.push(&response, MAX_OUTPUT);
            requests.extend(self.drive(registry, token));
        }
        requests
    }

    fn accept(&mut self, registry: &Registry) {
        for _ in 0..ACCEPT_BATCH {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = self.admit(registry, stream) {
                        tracing::debug!(%error, "a control connection was turned away");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a control connection");
                    return;
                }
            }
        }
        // Edge-triggered: what still waits makes no event of its own.
        if let Err(error) =
            registry.reregister(&mut self.listener, self.listen_token, Interest::READABLE)
        {
            tracing::warn!(%error, "cannot watch the control socket");
        }
    }

    fn admit(&mut self, registry: &Registry, mut stream: mio::net::UnixStream) -> io::Result<()> {
        let caller = Caller::of(&stream, self.group)?;
        let same = self.connections.values().filter(|other| other.caller.uid == caller.uid);
        let crowd = caller.uid != 0 && same.count() >= MAX_PER_USER;
        if crowd || self.connections.len() >= MAX_CONNECTIONS {
            return Err(io::Error::other("too many connections"));
        }
        let token = Token(self.next);
        // At a thousand million connections a second, some centuries.
        self.next += 1;
        registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        self.connections.insert(token, Connection::new(stream, caller));
        Ok(())
    }

    /// Writes and reads what can be, and drops the connection at its end.
    fn drive(&mut self, registry: &Registry, token: Token) -> Option<(Caller, Request, Responder)> {
        let connection = self.connections.get_mut(&token)?;
        let request = connection.drive(MAX_OUTPUT);
        let caller = connection.caller;
        if connection.is_over()
            && let Some(mut connection) = self.connections.remove(&token)
            && let Err(error) = registry.deregister(&mut connection.stream)
        {
            tracing::debug!(%error, "a control connection was not watched");
        }
        let request = request?;
        let responder = Responder {
            connection: token,
            lines: self.lines.0.clone(),
            waker: Arc::clone(&self.waker),
            answered: false,
        };
        Some((caller, request, responder))
    }

    /// Sends what still waits, as far as clients take it, and removes the socket.
    pub(crate) fn close(mut self, registry: &Registry) {
        let _too_late = self.handle_responses(registry);
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, "the control socket was not there any more");
        }
    }
}
