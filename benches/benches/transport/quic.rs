//! QUIC: quinn-proto in a loop of its own that spins, and quinn on tokio.
//!
//! All calls of a turn go over one stream that stays open, which is the fastest that a
//! QUIC can do: a call of both has a length that is agreed, and opens nothing. The cipher
//! is AES-128-GCM. quinn-proto cannot leave packets unsealed without a TLS of one's own.

use anyhow::{Context as _, Result, bail};
use bytes::BytesMut;
use quinn_proto::{
    ClientConfig, Connection, ConnectionHandle, DatagramEvent, Dir, Endpoint, EndpointConfig,
    ReadError, ServerConfig, StreamId, VarInt, WriteError,
};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::measure::{Place, Turn, answer_length, pin};

const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// What is under way at most: a large call twice over.
const WINDOW: u32 = 16 << 20;

/// The server's and the client's half of one identity.
#[derive(Clone)]
pub(crate) struct Configs {
    server: ServerConfig,
    client: ClientConfig,
}

impl Configs {
    pub(crate) fn new() -> Result<Self> {
        use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
        let signed = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
        let certificate = signed.cert.der().clone();
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(signed.signing_key.serialize_der());
        let mut provider = rustls::crypto::ring::default_provider();
        provider.cipher_suites = vec![rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256];
        let provider = Arc::new(provider);
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate.clone())?;
        let client = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let server = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key.into())?;
        let mut transport = quinn_proto::TransportConfig::default();
        transport.stream_receive_window(VarInt::from_u32(WINDOW));
        transport.receive_window(VarInt::from_u32(WINDOW));
        transport.send_window(WINDOW.into());
        let transport = Arc::new(transport);
        let mut server = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server)?));
        server.transport_config(transport.clone());
        let mut client = ClientConfig::new(Arc::new(QuicClientConfig::try_from(client)?));
        client.transport_config(transport);
        Ok(Self { server, client })
    }
}

/// An endpoint, its only connection and its socket.
struct Loop {
    endpoint: Endpoint,
    connection: Option<(ConnectionHandle, Connection)>,
    socket: UdpSocket,
    incoming: Vec<u8>,
    out: Vec<u8>,
}

impl Loop {
    fn new(server: Option<ServerConfig>) -> Result<Self> {
        let socket = UdpSocket::bind(ANY)?;
        socket.set_nonblocking(true)?;
        let config = Arc::new(EndpointConfig::default());
        let endpoint = Endpoint::new(config, server.map(Arc::new), true, None);
        let (incoming, out) = (vec![0; 65_536], Vec::new());
        Ok(Self { endpoint, connection: None, socket, incoming, out })
    }

    /// Takes what is there, does what is due and sends what there is to send.
    fn turn(&mut self) -> Result<()> {
        let mut now = Instant::now();
        while let Ok((length, from)) = self.socket.recv_from(&mut self.incoming) {
            now = Instant::now();
            self.out.clear();
            let bytes = BytesMut::from(&self.incoming[..length]);
            match self.endpoint.handle(now, from, None, None, bytes, &mut self.out) {
                Some(DatagramEvent::ConnectionEvent(_, event)) => {
                    if let Some((_, connection)) = &mut self.connection {
                        connection.handle_event(event);
                    }
                }
                Some(DatagramEvent::NewConnection(incoming)) => {
                    let accepted = self.endpoint.accept(incoming, now, &mut self.out, None);
                    self.connection = Some(accepted.map_err(|error| error.cause)?);
                }
                Some(DatagramEvent::Response(transmit)) => {
                    self.socket.send_to(&self.out[..transmit.size], transmit.destination)?;
                }
                None => {}
            }
            if length < 1000 {
                // As ours: a small one seldom comes with others.
                break;
            }
        }
        let Some((handle, connection)) = &mut self.connection else { return Ok(()) };
        if connection.poll_timeout().is_some_and(|at| at <= now) {
            connection.handle_timeout(now);
        }
        while let Some(event) = connection.poll_endpoint_events() {
            if let Some(event) = self.endpoint.handle_event(*handle, event) {
                connection.handle_event(event);
            }
        }
        self.flush(now)
    }

    fn flush(&mut self, now: Instant) -> Result<()> {
        let Some((_, connection)) = &mut self.connection else { return Ok(()) };
        loop {
            self.out.clear();
            let Some(transmit) = connection.poll_transmit(now, 1, &mut self.out) else {
                return Ok(());
            };
            match self.socket.send_to(&self.out[..transmit.size], transmit.destination) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                other => drop(other?),
            }
        }
    }

    fn connection(&mut self) -> Result<&mut Connection> {
        let (_, connection) = self.connection.as_mut().context("no connection")?;
        while connection.poll().is_some() {}
        Ok(connection)
    }

    /// Writes what fits.
    fn write(&mut self, stream: StreamId, bytes: &[u8]) -> Result<usize> {
        match self.connection()?.send_stream(stream).write(bytes) {
            Ok(length) => Ok(length),
            Err(WriteError::Blocked) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads what has come; gives how much.
    fn read(&mut self, stream: StreamId) -> Result<usize> {
        let mut stream = self.connection()?.recv_stream(stream);
        let Ok(mut chunks) = stream.read(true) else { return Ok(0) };
        let mut length = 0;
        loop {
            match chunks.next(usize::MAX) {
                Ok(Some(chunk)) => length += chunk.bytes.len(),
                Ok(None) | Err(ReadError::Blocked) => break,
                Err(error) => bail!(error),
            }
        }
        let _must_send = chunks.finalize();
        Ok(length)
    }

    /// Answers calls of `size` bytes.
    fn serve(mut self, size: usize, stop: &AtomicBool) -> Result<()> {
        let (mut stream, mut missing) = (None, size);
        let answer = vec![7; answer_length(size)];
        while !stop.load(Ordering::Relaxed) {
            self.turn()?;
            if self.connection.is_none() {
                continue;
            }
            if stream.is_none() {
                stream = self.connection()?.streams().accept(Dir::Bi);
            }
            let Some(stream) = stream else { continue };
            let came = self.read(stream)?;
            missing -= came.min(missing);
            if missing == 0 {
                missing = size;
                self.write(stream, &answer)?;
            }
            if came > 0 {
                self.flush(Instant::now())?;
            }
        }
        Ok(())
    }
}

/// Calls over quinn-proto, both threads spinning.
pub(crate) fn proto(configs: &Configs, place: Place, size: usize, calls: usize) -> Result<Turn> {
    let (mut client, server) = (Loop::new(None)?, Loop::new(Some(configs.server.clone()))?);
    let address = server.socket.local_addr()?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let thread = std::thread::spawn(move || {
        pin(place.server);
        server.serve(size, &stopped)
    });
    pin(place.client);
    let config = configs.client.clone();
    client.connection =
        Some(client.endpoint.connect(Instant::now(), config, address, "localhost")?);
    while client.connection()?.is_handshaking() {
        client.turn()?;
    }
    let stream = client.connection()?.streams().open(Dir::Bi).context("no stream")?;
    let payload = vec![7; size];
    let turn = Turn::of(calls, || {
        let (mut written, mut missing) = (0, answer_length(size));
        while missing > 0 {
            if written < size {
                written += client.write(stream, &payload[written..])?;
                client.flush(Instant::now())?;
            }
            client.turn()?;
            missing -= client.read(stream)?.min(missing);
        }
        Ok(())
    });
    stop.store(true, Ordering::Relaxed);
    join(thread)?;
    turn
}

fn join(thread: JoinHandle<Result<()>>) -> Result<()> {
    match thread.join() {
        Ok(result) => result,
        Err(_) => bail!("the server's thread has failed"),
    }
}

/// The runtime of one thread, which is the fastest for one connection.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Calls over quinn, each side on a tokio of its own.
pub(crate) fn tokio(configs: &Configs, place: Place, size: usize, calls: usize) -> Result<Turn> {
    let (told, heard) = std::sync::mpsc::channel();
    let server = configs.server.clone();
    let thread = std::thread::spawn(move || -> Result<()> {
        pin(place.server);
        runtime()?.block_on(async move {
            let endpoint = quinn::Endpoint::server(server, ANY)?;
            told.send(endpoint.local_addr()?).ok();
            let connection = endpoint.accept().await.context("no connection")?.await?;
            let (mut send, mut receive) = connection.accept_bi().await?;
            let (mut bytes, answer) = (vec![0; size], vec![7; answer_length(size)]);
            while receive.read_exact(&mut bytes).await.is_ok() {
                send.write_all(&answer).await?;
            }
            Ok(())
        })
    });
    pin(place.client);
    let address = heard.recv()?;
    let runtime = runtime()?;
    let (endpoint, connection, mut send, mut receive) = runtime.block_on(async {
        let endpoint = quinn::Endpoint::client(ANY)?;
        let connecting = endpoint.connect_with(configs.client.clone(), address, "localhost")?;
        let connection = connecting.await?;
        let (send, receive) = connection.open_bi().await?;
        anyhow::Ok((endpoint, connection, send, receive))
    })?;
    let (payload, mut answer) = (vec![7; size], vec![0; answer_length(size)]);
    let turn = Turn::of(calls, || {
        runtime.block_on(async {
            send.write_all(&payload).await?;
            receive.read_exact(&mut answer).await?;
            Ok(())
        })
    });
    runtime.block_on(async {
        connection.close(VarInt::from_u32(0), b"");
        endpoint.wait_idle().await;
    });
    join(thread)?;
    turn
}
