//! One control connection: bytes to requests, responses to bytes.

use std::io::{self, Read, Write};

use conet_wire::control::{Failure, MAX_REQUEST, Request, RequestError, Response};
use mio::net::UnixStream;

use crate::caller::Caller;

/// A client's connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) caller: Caller,
    input: Vec<u8>,
    output: Vec<u8>,
    /// A request is being carried out.
    busy: bool,
    /// The client sends no more.
    ended: bool,
    /// It can be neither read nor written.
    broken: bool,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, caller: Caller) -> Self {
        Self {
            stream,
            caller,
            input: Vec::new(),
            output: Vec::new(),
            busy: false,
            ended: false,
            broken: false,
        }
    }

    /// Queues a response; one that is the answer makes room for the next request.
    pub(super) fn push(&mut self, response: &Response, limit: usize) {
        if !matches!(response, Response::Progress(_)) {
            self.busy = false;
        }
        let line = response.to_line();
        // An answer alone is sent however long it is: it is the daemon's own.
        if !self.output.is_empty() && self.output.len() + line.len() > limit {
            self.broken = true;
        } else {
            self.output.extend_from_slice(&line);
        }
    }

    /// Writes what waits, then reads up to one request.
    pub(super) fn drive(&mut self, limit: usize) -> Option<Request> {
        self.write();
        while !self.busy && !self.broken {
            if let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                self.busy = true;
                match Request::parse(&line) {
                    Ok(request) => return Some(request),
                    Err(error) => self.refuse(error, limit),
                }
            } else if self.input.len() > MAX_REQUEST {
                // What follows is the rest of a line: there is no next request.
                self.busy = true;
                self.refuse(RequestError::TooLong, limit);
                self.input.clear();
                self.ended = true;
            } else if !self.read() {
                break;
            }
        }
        None
    }

    /// Whether nothing more can come of it.
    pub(super) fn is_over(&self) -> bool {
        self.broken || (self.ended && !self.busy && self.output.is_empty())
    }

    fn refuse(&mut self, error: RequestError, limit: usize) {
        let failure =
            Failure::new("bad-request", error.to_string(), "use the conet of the daemon's version");
        self.push(&Response::Error(failure), limit);
        self.write();
    }

    /// Reads once; whether there may be more.
    fn read(&mut self) -> bool {
        if self.ended {
            return false;
        }
        let mut buffer = [0; 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.ended = true;
                    return false;
                }
                Ok(length) => {
                    self.input.extend_from_slice(&buffer[..length]);
                    return true;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(_) => {
                    self.broken = true;
                    return false;
                }
            }
        }
    }

    fn write(&mut self) {
        let mut written = 0;
        while written < self.output.len() {
            match self.stream.write(&self.output[written..]) {
                Ok(0) => self.broken = true,
                Ok(length) => {
                    written += length;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.broken = true,
            }
            break;
        }
        self.output.drain(..written);
    }
}
