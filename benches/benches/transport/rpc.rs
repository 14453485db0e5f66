//! tarpc over TCP with bincode, each side on a tokio of one thread.

use anyhow::Result;
use bytes::Bytes;
use futures_util::StreamExt as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};
use tarpc::serde_transport::Transport;
use tarpc::server::{BaseChannel, Channel as _};
use tarpc::tokio_serde::formats::Bincode;
use tarpc::{client, context};

use crate::measure::{Place, Turn, answer_length, pin};
use crate::quic::runtime;

const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const PATIENCE: Duration = Duration::from_secs(20);

#[tarpc::service]
trait Bounce {
    /// Answers with the beginning of the payload.
    async fn bounce(payload: Bytes) -> Bytes;
}

#[derive(Clone)]
struct Server;

impl Bounce for Server {
    async fn bounce(self, _: context::Context, payload: Bytes) -> Bytes {
        payload.slice(..answer_length(payload.len()))
    }
}

/// Calls of `size` bytes.
pub(crate) fn tarpc(place: Place, size: usize, calls: usize) -> Result<Turn> {
    let (told, heard) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || -> Result<()> {
        pin(place.server);
        runtime()?.block_on(async move {
            let listener = tokio::net::TcpListener::bind(ANY).await?;
            told.send(listener.local_addr()?).ok();
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let transport = Transport::from((stream, Bincode::default()));
            let requests = BaseChannel::with_defaults(transport).execute(Server.serve());
            // Until the client has gone.
            requests.for_each(|answer| async { drop(tokio::spawn(answer)) }).await;
            Ok(())
        })
    });
    pin(place.client);
    let address = heard.recv()?;
    let runtime = runtime()?;
    let caller = runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let transport = Transport::from((stream, Bincode::default()));
        anyhow::Ok(BounceClient::new(client::Config::default(), transport).spawn())
    })?;
    let payload = Bytes::from(vec![7; size]);
    let turn = Turn::of(calls, || {
        let mut context = context::current();
        context.deadline = Instant::now() + PATIENCE;
        runtime.block_on(caller.bounce(context, payload.clone()))?;
        Ok(())
    });
    drop((caller, runtime));
    match thread.join() {
        Ok(result) => result?,
        Err(_) => anyhow::bail!("the server's thread has failed"),
    }
    turn
}
