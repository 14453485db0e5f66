//! The keys about what guests share with their host: its address and its ports.

use std::net::IpAddr;

use conet_hostinject::HostPorts;

use super::Config;
use super::error::{ConfigError, Problem, Suggestion};
use super::reader::{Located, Section};
use crate::colinux::{By, Line, Redirection};
use crate::forward::{A_FORWARD, A_HOST_PORT, Forward, HostPort, Which, check};

/// `host_ports`: what guests reach of the host itself.
pub(super) fn host_ports(section: &mut Section<'_>) -> Result<HostPorts, ConfigError> {
    const KEY: &str = "host_ports";
    let listed = section.list::<HostPort>(KEY, A_HOST_PORT)?;
    let mut some = Vec::with_capacity(listed.len());
    for Located { value, line } in &listed {
        match value {
            HostPort::Some(ports) => some.push(*ports),
            HostPort::All if listed.len() == 1 => return Ok(HostPorts::All),
            HostPort::All => {
                let expected = "[\"all\"] alone, or ports";
                let problem = Problem::Value { value: "all".to_owned(), expected };
                return Err(section.wrong(*line, KEY, problem));
            }
        }
    }
    Ok(HostPorts::Only(some))
}

/// The ports that lines of coLinux's lead to their guests, as forwards beside the others.
pub(super) fn redirections(section: &Section<'_>, config: &mut Config) -> Result<(), ConfigError> {
    let Some(guest) = config.guests.last() else { return Ok(()) };
    let Some(Line { by: By::Slirp(ports), .. }) = &guest.line else { return Ok(()) };
    let wrong = |problem: Problem| section.wrong(section.line, "line", problem);
    if !ports.is_empty() && !guest.addresses.iter().any(IpAddr::is_ipv4) {
        return Err(wrong(Problem::NoIpv4 { guest: guest.name.clone() }));
    }
    let name = guest.name.clone();
    for Redirection { transport, host, guest, count } in ports.clone() {
        let forward = Forward {
            transport: Some(transport),
            bind: None,
            ports: Which::Fixed { first: host, last: host + (count - 1), to_first: guest },
            guest: name.clone(),
        };
        check(&forward, &config.node, config.forwards.iter())
            .map_err(|problem| wrong(problem.into()))?;
        config.forwards.push(forward);
    }
    Ok(())
}

/// `forwards`, when the guests are known.
pub(super) fn forwards(section: &mut Section<'_>, config: &mut Config) -> Result<(), ConfigError> {
    const KEY: &str = "forwards";
    for Located { value: forward, line } in section.list::<Forward>(KEY, A_FORWARD)? {
        let guest = config.guests.iter().find(|guest| guest.name == forward.guest);
        if guest.is_some_and(|guest| !guest.addresses.iter().any(IpAddr::is_ipv4)) {
            return Err(section.wrong(line, KEY, Problem::NoIpv4 { guest: forward.guest }));
        }
        if guest.is_none() {
            let known = config.guests.iter().map(|guest| guest.name.as_str());
            let suggestion = Suggestion::of(&forward.guest, known);
            let problem = Problem::UnknownGuest { name: forward.guest, suggestion };
            return Err(section.wrong(line, KEY, problem));
        }
        check(&forward, &config.node, config.forwards.iter())
            .map_err(|problem| section.wrong(line, KEY, problem))?;
        config.forwards.push(forward);
    }
    Ok(())
}
