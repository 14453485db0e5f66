//! A server on a thread and clients that behave, and that do not.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use conet_wire::control::{How, MAX_REQUEST};
use mio::{Events, Poll};
use tempfile::TempDir;

use super::*;
use crate::client::{Client, ClientError};

const WAKE: Token = Token(0);
const CONTROL: usize = 1;

/// A server that answers `status` by a failure of the caller's uid, keeps
/// `migrate` busy on another thread, drops `why`, and answers the rest.
struct Served {
    dir: TempDir,
    stop: Arc<AtomicBool>,
    waker: Arc<Waker>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Served {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut poll = Poll::new().unwrap();
        let waker = Arc::new(Waker::new(poll.registry(), WAKE).unwrap());
        let path = dir.path().join("s");
        let server =
            ControlServer::bind(&path, poll.registry(), CONTROL, Arc::clone(&waker)).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || serve(&mut poll, server, &stopped));
        Self { dir, stop, waker, thread: Some(thread) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn client(&self) -> Client {
        let mut client = Client::connect(&self.path()).unwrap();
        client.set_timeout(Some(Duration::from_secs(5))).unwrap();
        client
    }

    fn raw(&self) -> BufReader<UnixStream> {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        BufReader::new(stream)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.waker.wake().unwrap();
        self.thread.take().unwrap().join().unwrap();
        assert!(!self.path().exists(), "the socket is removed");
    }
}

fn serve(poll: &mut Poll, mut server: ControlServer, stop: &AtomicBool) {
    let mut events = Events::with_capacity(64);
    while !stop.load(Ordering::Relaxed) {
        poll.poll(&mut events, None).unwrap();
        let mut requests = Vec::new();
        for event in &events {
            if server.owns(event.token()) {
                requests.extend(server.handle_event(poll.registry(), event));
            }
        }
        loop {
            for (caller, request, responder) in requests.drain(..) {
                answer(caller, &request, responder);
            }
            requests.extend(server.handle_responses(poll.registry()));
            if requests.is_empty() {
                break;
            }
        }
    }
    server.close(poll.registry());
}

fn answer(caller: Caller, request: &Request, responder: Responder) {
    match request {
        Request::Status {} => {
            let uid = caller.uid.to_string();
            responder.answer(Err(Failure::new("uid", uid, "none")));
        }
        Request::Migrate { .. } => {
            std::thread::spawn(move || {
                responder.progress("copy", "1");
                std::thread::sleep(Duration::from_millis(50));
                responder.progress("copy", "2");
                responder.answer(Ok(Response::Done {}));
            });
        }
        Request::Why { .. } => drop(responder),
        _ => responder.answer(Ok(Response::Done {})),
    }
}

#[test]
fn the_caller_is_known_and_a_failure_is_an_error() {
    let served = Served::start();
    let error = served.client().ask(&Request::Status {}).unwrap_err();
    let ClientError::Failure(failure) = error else { panic!("{error}") };
    assert_eq!(failure.message, rustix::process::geteuid().as_raw().to_string());
}

#[test]
fn a_long_request_tells_its_progress_and_holds_up_nobody() {
    let served = Served::start();
    let mut slow = served.client();
    let thread = std::thread::spawn(move || {
        let mut told = Vec::new();
        let request = Request::Migrate { pid: 1, to: "b".into(), how: How::Precopy };
        let answer = slow.ask_telling(&request, &mut |progress| told.push(progress.detail.clone()));
        (answer.unwrap(), told)
    });
    for _ in 0..20 {
        assert_eq!(served.client().ask(&Request::Ps {}).unwrap(), Response::Done {});
    }
    let (answer, told) = thread.join().unwrap();
    assert_eq!((answer, told), (Response::Done {}, vec!["1".to_owned(), "2".to_owned()]));
}

#[test]
fn a_request_that_is_given_up_is_answered() {
    let served = Served::start();
    let error = served.client().ask(&Request::Why { pid: 1 }).unwrap_err();
    assert_eq!(error.to_string(), "the request was given up; see the daemon's log");
}

#[test]
fn requests_sent_at_once_are_answered_in_order() {
    let served = Served::start();
    let mut raw = served.raw();
    let lines =
        b"{\"request\":\"migrate\",\"pid\":1,\"to\":\"b\"}\n{\"request\":\"ps\"}\nnonsense\n";
    raw.get_mut().write_all(lines).unwrap();
    raw.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
    let mut answers = Vec::new();
    for line in raw.lines() {
        answers.push(Response::parse(line.unwrap().as_bytes()).unwrap());
    }
    assert_eq!(answers.len(), 5);
    assert!(matches!(answers[..2], [Response::Progress(_), Response::Progress(_)]));
    assert_eq!(answers[2..4], [Response::Done {}, Response::Done {}]);
    let Response::Error(failure) = &answers[4] else { panic!("{answers:?}") };
    assert_eq!(failure.code, "bad-request");
}

#[test]
fn a_line_without_end_is_refused_and_ends_the_connection() {
    let served = Served::start();
    let mut raw = served.raw();
    raw.get_mut().write_all(&vec![b'x'; MAX_REQUEST + 1]).unwrap();
    let mut text = String::new();
    // The rest of what was sent may still be unread: the kernel then says so
    // after the answer.
    raw.read_line(&mut text).unwrap();
    assert!(text.contains("bad-request"), "{text}");
    let mut rest = Vec::new();
    assert!(raw.read_to_end(&mut rest).is_err() || rest.is_empty());
}

#[test]
fn a_client_that_goes_away_harms_nobody() {
    let served = Served::start();
    for _ in 0..50 {
        let mut raw = served.raw();
        raw.get_mut().write_all(b"{\"request\":\"migrate\",\"pid\":1,\"to\":\"b\"}\n").unwrap();
        drop(raw);
    }
    assert_eq!(served.client().ask(&Request::Ps {}).unwrap(), Response::Done {});
}

#[test]
fn a_dead_daemons_socket_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let poll = Poll::new().unwrap();
    let waker = Arc::new(Waker::new(poll.registry(), WAKE).unwrap());
    let server = ControlServer::bind(&path, poll.registry(), CONTROL, waker).unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o666);
    server.close(poll.registry());
    assert!(!path.exists());
}
