//! Addresses, MTU and routes of the adapter, by Windows' own program for that.
//!
//! The adapter is named by its number, so no name has to be quoted. All is stored for the
//! running system only (`store=active`), and goes with the adapter.
//!
//! Source: Microsoft Learn, "netsh interface ipv4", "netsh interface ipv6".

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use ipnet::IpNet;

/// Why an address, an MTU or a route was refused.
#[derive(Debug, thiserror::Error)]
pub enum NetshError {
    /// The program could not be run.
    #[error("cannot run {program}")]
    Run {
        /// Its path.
        program: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It has refused; what it says is in the system's language.
    #[error("netsh {arguments} failed: {said}")]
    Refused {
        /// What it was asked for.
        arguments: String,
        /// What it has said.
        said: String,
    },
}

/// One call: the arguments.
pub(super) type Arguments = Vec<String>;

fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ipv4" } else { "ipv6" }
}

/// The MTU, and the addresses.
pub(super) fn set_up(index: u32, mtu: u16, addresses: &[IpNet]) -> Vec<Arguments> {
    let mut calls = Vec::new();
    for family in ["ipv4", "ipv6"] {
        if addresses.iter().any(|net| self::family(net.addr()) == family) {
            let what =
                format!("interface {family} set subinterface {index} mtu={mtu} store=active");
            calls.push(words(&what));
        }
    }
    for net in addresses {
        let (family, address) = (family(net.addr()), net.addr());
        let what = match net {
            IpNet::V4(v4) => format!(
                "interface {family} add address name={index} address={address} mask={} \
                 store=active",
                v4.netmask()
            ),
            IpNet::V6(v6) => format!(
                "interface {family} add address interface={index} address={address}/{} \
                 store=active",
                v6.prefix_len()
            ),
        };
        calls.push(words(&what));
    }
    calls
}

/// A route through the adapter, to be made (`add`) or removed (`delete`).
pub(super) fn route(action: &str, index: u32, prefix: IpNet) -> Arguments {
    let family = family(prefix.addr());
    words(&format!(
        "interface {family} {action} route prefix={} interface={index} store=active",
        prefix.trunc()
    ))
}

fn words(text: &str) -> Arguments {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Runs it, and waits.
pub(super) fn run(arguments: &Arguments) -> Result<(), NetshError> {
    // By its whole path: never one that lies in the current directory.
    let root = std::env::var_os("SystemRoot").unwrap_or_else(|| "C:\\Windows".into());
    let program = PathBuf::from(root).join("System32").join("netsh.exe");
    let output = Command::new(&program).args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|source| NetshError::Run { program, source })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    Err(NetshError::Refused { arguments: arguments.join(" "), said })
}
