//! The command line's end of the control socket.
//!
//! Blocking, one request at a time; what the daemon's end does is in `control`.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use conet_wire::control::{Failure, MAX_RESPONSE, Progress, Request, Response, ResponseError};
use thiserror::Error;

use crate::config::{DEFAULT_STATE_DIR, SOCKET_NAME};

/// Environment variable that names the daemon's control socket.
pub const SOCKET_VARIABLE: &str = "CONET_SOCKET";

/// The socket that the environment names, or the usual one.
#[must_use]
pub fn socket_path() -> PathBuf {
    match std::env::var_os(SOCKET_VARIABLE) {
        Some(path) => path.into(),
        None => Path::new(DEFAULT_STATE_DIR).join(SOCKET_NAME),
    }
}

/// Why a daemon did not do what it was asked.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no conet daemon answers at {} ({source}); start it with: conet up", socket.display())]
    NoDaemon {
        /// The control socket.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It went away, or fell silent, before it had answered.
    #[error("the daemon at {} did not answer ({source}); see its log", socket.display())]
    Broken {
        /// The control socket.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Its answer is none.
    #[error(transparent)]
    Response(#[from] ResponseError),
    /// It answered that it could not or would not.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// It answered something else.
    #[error("the daemon answered something else; use the conet of the daemon's version")]
    Unexpected,
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    socket: PathBuf,
}

impl Client {
    /// Connects; answers are waited for without limit until [`Self::set_timeout`].
    ///
    /// # Errors
    ///
    /// [`ClientError::NoDaemon`].
    pub fn connect(socket: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(socket)
            .map_err(|source| ClientError::NoDaemon { socket: socket.to_owned(), source })?;
        Ok(Self { stream: BufReader::new(stream), socket: socket.to_owned() })
    }

    /// The longest wait for one line of an answer; `None` waits for ever.
    ///
    /// # Errors
    ///
    /// [`ClientError::Broken`], for a zero duration too.
    pub fn set_timeout(&mut self, limit: Option<Duration>) -> Result<(), ClientError> {
        self.stream.get_ref().set_read_timeout(limit).map_err(|source| self.broken(source))
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; [`ClientError::Failure`] is what the daemon answered.
    pub fn ask(&mut self, request: &Request) -> Result<Response, ClientError> {
        self.ask_telling(request, &mut |_| {})
    }

    /// As [`Self::ask`], and passes on what the daemon says meanwhile.
    ///
    /// # Errors
    ///
    /// As [`Self::ask`].
    pub fn ask_telling(
        &mut self,
        request: &Request,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Response, ClientError> {
        let sent = self.stream.get_mut().write_all(&request.to_line());
        sent.map_err(|source| self.broken(source))?;
        loop {
            match Response::parse(&self.line()?)? {
                Response::Progress(step) => progress(&step),
                Response::Error(failure) => return Err(failure.into()),
                response => return Ok(response),
            }
        }
    }

    fn line(&mut self) -> Result<Vec<u8>, ClientError> {
        let mut line = Vec::new();
        let limit = MAX_RESPONSE as u64 + 1;
        let read = self.stream.by_ref().take(limit).read_until(b'\n', &mut line);
        read.map_err(|source| self.broken(source))?;
        if line.ends_with(b"\n") {
            Ok(line)
        } else {
            Err(self.broken(io::ErrorKind::UnexpectedEof.into()))
        }
    }

    fn broken(&self, source: io::Error) -> ClientError {
        ClientError::Broken { socket: self.socket.clone(), source }
    }
}
