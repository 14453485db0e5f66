//! `conet up`, `down`, `status` and `peers`.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::Path;

use anyhow::Result;
use conet_node::client::{Client, ClientError};
use conet_node::config::Config;
use conet_node::daemon;
use conet_node::moving::Movers;
use conet_wire::control::{Peer, Request, Response, Status};
use serde_json::json;
use tracing_subscriber::EnvFilter;

use crate::cli::Output;
use crate::table;

/// Environment variable that says what the daemon logs, as in `debug` or
/// `conet_node=trace`.
const LOG_VARIABLE: &str = "CONET_LOG";

pub(super) fn up(config: &Path) -> Result<()> {
    let config = Config::load(config)?;
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    daemon::run(config, Movers::new)?;
    Ok(())
}

pub(super) fn down(client: &mut Client) -> Result<()> {
    match client.ask(&Request::Shutdown {})? {
        Response::Done {} => Ok(()),
        _ => Err(ClientError::Unexpected.into()),
    }
}

pub(super) fn status(client: &mut Client, output: Output) -> Result<()> {
    let Response::Status(status) = client.ask(&Request::Status {})? else {
        return Err(ClientError::Unexpected.into());
    };
    if output.json {
        return Ok(table::json(&serde_json::to_value(&status)?)?);
    }
    print_status(&status)
}

fn print_status(status: &Status) -> Result<()> {
    let rows = [
        ("node", status.name.clone()),
        ("version", status.version.clone()),
        ("daemon", format!("pid {}, up {}", status.pid, seconds(status.uptime_s))),
        ("public key", status.public_key.clone()),
        ("wireguard", status.wireguard_key.clone()),
        (
            "address",
            format!(
                "{} (sessions {}, WireGuard {})",
                status.address, status.port, status.wireguard_port
            ),
        ),
        ("overlay", {
            let shares =
                if status.shared_address { ", with this host's address outside" } else { "" };
            format!("{} on {}{shares}", status.overlay, status.device)
        }),
        ("peers", format!("{} of {} up", status.peers_up, status.peers)),
    ];
    for (name, value) in rows {
        table::line(&format!("{name:<12}{value}"))?;
    }
    if let Some(path) = &status.ipip {
        table::line(&format!("{:<12}by {path}", "ipip"))?;
    }
    if !status.drops.is_empty() {
        table::line(&format!("{:<12}{}", "drops", reasons(&status.drops)))?;
    }
    if status.guests.is_empty() {
        table::line("guests      none")?;
    }
    for guest in &status.guests {
        table::line(&format!("{:<12}{} {} ({})", "guest", guest.name, guest.address, guest.kind))?;
    }
    Ok(())
}

pub(super) fn peers(client: &mut Client, output: Output) -> Result<()> {
    let Response::Peers { peers } = client.ask(&Request::Peers {})? else {
        return Err(ClientError::Unexpected.into());
    };
    if output.json {
        return Ok(table::json(&json!({ "peers": peers }))?);
    }
    if peers.is_empty() {
        table::line("no peers; add a [[peer]] to conet.toml")?;
    }
    for peer in &peers {
        print_peer(peer)?;
    }
    Ok(())
}

fn print_peer(peer: &Peer) -> Result<()> {
    let state = if peer.up { "up" } else { "not heard of" };
    let grants = match (peer.guests_from, peer.host_for_us) {
        (false, false) => "tunnelling only",
        (true, false) => "its processes may run here",
        (false, true) => "it may run our processes",
        (true, true) => "processes may run on either",
    };
    let key = peer.public_key.as_ref().unwrap_or(&peer.wireguard_key);
    let mut rows = vec![
        ("key", key.clone()),
        ("state", format!("{state}, {}", table::or_dash(peer.version.as_ref()))),
        ("endpoint", {
            let by = if peer.carrier.as_deref() == Some("tcp") { ", by TCP" } else { "" };
            format!("{}{by}", table::or_dash(peer.endpoint.as_ref()))
        }),
        ("tunnel", {
            let kernel = if peer.in_kernel { ", in the kernel" } else { "" };
            format!("{} to {}{kernel}", peer.mode, table::or_dash(peer.tunnel_endpoint.as_ref()))
        }),
        ("allowed ips", peer.allowed_ips.join(", ")),
        ("transfer", format!("{} received, {} sent", bytes(peer.rx_bytes), bytes(peer.tx_bytes))),
        ("grants", grants.to_owned()),
    ];
    if peer.preshared_key {
        rows.push(("preshared", "(hidden)".to_owned()));
    }
    if let Some(seconds) = peer.keepalive_s {
        rows.push(("keepalive", format!("every {seconds} s")));
    }
    if let Some(mtu) = peer.path_mtu {
        rows.push(("path mtu", format!("{mtu} B")));
    }
    if !peer.drops.is_empty() {
        rows.push(("drops", reasons(&peer.drops)));
    }
    if let Some(rtt) = peer.rtt_us {
        rows.push(("round trip", format!("{rtt} µs")));
    }
    if let Some(age) = peer.latest_handshake_s {
        rows.push(("handshake", format!("{} ago", seconds(age))));
    }
    table::line(&format!("peer: {}", peer.name))?;
    for (name, value) in rows {
        table::line(&format!("  {name:<12}{value}"))?;
    }
    Ok(())
}

/// Reasons and how often, as in `bad_tag 3, replay 1`.
fn reasons(drops: &BTreeMap<String, u64>) -> String {
    let each: Vec<_> = drops.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    each.join(", ")
}

fn seconds(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

/// Bytes in the unit that leaves one to four digits before the point.
fn bytes(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match UNITS.iter().find(|(size, _)| bytes >= *size) {
        Some((size, unit)) => format!("{}.{:02} {unit}", bytes / size, bytes % size * 100 / size),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_readable() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(u64::MAX), "17179869183.99 GiB");
        assert_eq!(seconds(59), "59 s");
        assert_eq!(seconds(61), "1 min 1 s");
        assert_eq!(seconds(7260), "2 h 1 min");
    }
}
