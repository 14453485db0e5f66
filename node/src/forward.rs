//! Forwards: what somebody writes to have ports of the host lead to a guest.
//!
//! ```text
//! tcp:2222:web:22                 the host's port 2222 is web's port 22
//! udp:5000-5010:web               eleven ports, the same inside
//! tcp:192.0.2.1:8000-8009:web:80-89   at one of the host's addresses only
//! tcp:auto:web   auto:web         whatever web listens on (TCP; TCP and UDP)
//! ```
//!
//! What it is not: it knows neither guests nor sockets. A [`Forward`] has one text, so
//! the text names it.

mod check;

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use conet_hostinject::Ports;
use conet_netsys::Transport;
use thiserror::Error;

pub use check::{ForwardProblem, MAX_FORWARDS, check, own_ports};

/// Ports of the host that lead to a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// Its protocol; both, where there is none, which only `auto` can be.
    pub transport: Option<Transport>,
    /// The host's address; all of them where there is none.
    pub bind: Option<IpAddr>,
    /// Which.
    pub ports: Which,
    /// The guest's name.
    pub guest: String,
}

/// Which ports lead to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Those that the guest listens on, as long as it does.
    Auto,
    /// These.
    Fixed {
        /// The host's first port, not 0.
        first: u16,
        /// The host's last port.
        last: u16,
        /// The guest's port for the first one; the others follow.
        to_first: u16,
    },
}

/// A text that is no forward, or no port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("not {expected}")]
pub struct InvalidForward {
    expected: &'static str,
}

/// What a forward looks like.
pub const A_FORWARD: &str = "a forward, as in tcp:2222:web:22, udp:5000-5010:web, \
    tcp:192.0.2.1:80:web or auto:web";
/// What a port of the host's looks like.
pub const A_HOST_PORT: &str = "ports, as in tcp:8000 or udp:5000-5010";

impl Forward {
    /// Ports of the host that it takes, where they are fixed.
    #[must_use]
    pub fn fixed(&self) -> Option<Ports> {
        match (self.transport, self.ports) {
            (Some(transport), Which::Fixed { first, last, .. }) => {
                Some(Ports { transport, first, last })
            }
            _ => None,
        }
    }

    /// Whether packets to one port of the host could go by both.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let same_address = match (self.bind, other.bind) {
            (Some(one), Some(two)) => one == two,
            _ => true,
        };
        same_address
            && match (self.fixed(), other.fixed()) {
                (Some(one), Some(two)) => one.meets(two),
                // Two that follow one guest take the same ports; else the fixed ports
                // go first, and what is followed leaves them out.
                (None, None) => {
                    let both = self.transport.is_none() || other.transport.is_none();
                    self.guest == other.guest && (both || self.transport == other.transport)
                }
                _ => false,
            }
    }

    /// How many ports it takes that are others inside.
    #[must_use]
    pub fn changed_ports(&self) -> usize {
        match self.ports {
            Which::Fixed { first, to_first, .. } if first != to_first => {
                self.fixed().map_or(0, Ports::count)
            }
            _ => 0,
        }
    }
}

impl FromStr for Forward {
    type Err = InvalidForward;

    fn from_str(text: &str) -> Result<Self, InvalidForward> {
        let wrong = InvalidForward { expected: A_FORWARD };
        let (protocol, rest) = text.split_once(':').ok_or(wrong)?;
        if protocol == "auto" {
            let guest = guest_name(rest).ok_or(wrong)?;
            return Ok(Self { transport: None, bind: None, ports: Which::Auto, guest });
        }
        let transport = Some(transport(protocol).ok_or(wrong)?);
        let (bind, rest) = split_address(rest).ok_or(wrong)?;
        let (ports, rest) = rest.split_once(':').ok_or(wrong)?;
        let (guest, inside) = match rest.split_once(':') {
            Some((guest, inside)) => (guest, Some(inside)),
            None => (rest, None),
        };
        let guest = guest_name(guest).ok_or(wrong)?;
        if ports == "auto" {
            let ports = Which::Auto;
            return match inside {
                Some(_) => Err(wrong),
                None => Ok(Self { transport, bind, ports, guest }),
            };
        }
        let (first, last) = range(ports).ok_or(wrong)?;
        let (to_first, to_last) = match inside {
            Some(inside) => range(inside).ok_or(wrong)?,
            None => (first, last),
        };
        if last - first != to_last - to_first {
            return Err(InvalidForward {
                expected: "a forward with as many ports inside as outside",
            });
        }
        Ok(Self { transport, bind, ports: Which::Fixed { first, last, to_first }, guest })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(transport) = self.transport {
            write!(f, "{transport}:")?;
        }
        match self.bind {
            Some(IpAddr::V6(bind)) => write!(f, "[{bind}]:")?,
            Some(bind) => write!(f, "{bind}:")?,
            None => {}
        }
        match self.ports {
            Which::Auto => write!(f, "auto:{}", self.guest),
            Which::Fixed { first, last, to_first } => {
                write!(f, "{}:{}", Range(first, last), self.guest)?;
                if first == to_first {
                    return Ok(());
                }
                write!(f, ":{}", Range(to_first, to_first + (last - first)))
            }
        }
    }
}

/// Ports as they are written.
struct Range(u16, u16);

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self(first, last) if first == last => write!(f, "{first}"),
            Self(first, last) => write!(f, "{first}-{last}"),
        }
    }
}

/// What a list of the host's own ports may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostPort {
    /// Every port.
    All,
    /// These.
    Some(Ports),
}

impl FromStr for HostPort {
    type Err = InvalidForward;

    fn from_str(text: &str) -> Result<Self, InvalidForward> {
        if text == "all" {
            return Ok(Self::All);
        }
        let parse = || {
            let (protocol, ports) = text.split_once(':')?;
            let (first, last) = range(ports)?;
            Some(Self::Some(Ports { transport: transport(protocol)?, first, last }))
        };
        parse().ok_or(InvalidForward { expected: A_HOST_PORT })
    }
}

fn transport(text: &str) -> Option<Transport> {
    Transport::ALL.into_iter().find(|transport| transport.as_str() == text)
}

fn guest_name(text: &str) -> Option<String> {
    crate::config::is_name(text).then(|| text.to_owned())
}

/// An address with a colon behind, if the text begins with one. A guest cannot stand
/// here, so one that is named like an address is no matter.
fn split_address(text: &str) -> Option<(Option<IpAddr>, &str)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (address, rest) = rest.split_once("]:")?;
        return Some((Some(IpAddr::V6(address.parse().ok()?)), rest));
    }
    match text.split_once(':') {
        Some((address, rest)) if address.contains('.') => {
            Some((Some(IpAddr::V4(address.parse().ok()?)), rest))
        }
        _ => Some((None, text)),
    }
}

fn range(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    // `parse` would take a sign.
    let port = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?;
    let (first, last) = (port(first)?, port(last)?);
    (first != 0 && first <= last).then_some((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_forward_has_one_text() {
        for (text, canonical) in [
            ("tcp:2222:web:22", None),
            ("tcp:22:web:22", Some("tcp:22:web")),
            ("udp:5000-5010:web", None),
            ("udp:5000-5000:web", Some("udp:5000:web")),
            ("tcp:192.0.2.1:8000-8009:web:80-89", None),
            ("tcp:[2001:db8::1]:80:web", None),
            ("tcp:65535:10.0.0.1:1", None),
            ("auto:web", None),
            ("tcp:auto:web", None),
            ("udp:192.0.2.1:auto:22", None),
        ] {
            let forward: Forward = text.parse().unwrap();
            assert_eq!(forward.to_string(), canonical.unwrap_or(text));
            assert_eq!(forward.to_string().parse(), Ok(forward));
        }
    }

    #[test]
    fn what_is_none_is_refused() {
        for text in [
            "",
            "web",
            "tcp",
            "tcp:80",
            "sctp:80:web",
            "tcp:0:web",
            "tcp:80:",
            "tcp:80:-x",
            "tcp:+80:web",
            "tcp:90-80:web",
            "tcp:65536:web",
            "tcp:80-90:web:80",
            "tcp:80:web:80-90",
            "tcp:80:web:80:",
            "tcp:1.2.3:80:web",
            "tcp:[1.2.3.4]:80:web",
            "tcp:auto:web:80",
            "auto:",
            "auto:web:80",
            "tcp:80:we/b",
        ] {
            assert!(text.parse::<Forward>().is_err(), "{text}");
        }
        for text in ["", "tcp", "tcp:", "tcp:0", "icmp:1", "tcp:9-8", "ALL"] {
            assert!(text.parse::<HostPort>().is_err(), "{text}");
        }
    }

    #[test]
    fn overlaps_are_found() {
        for (one, two, overlaps) in [
            ("tcp:80:a", "tcp:80:b:81", true),
            ("tcp:80:a", "udp:80:a", false),
            ("tcp:80-90:a", "tcp:90-99:a", true),
            ("tcp:80-89:a", "tcp:90-99:a", false),
            ("tcp:192.0.2.1:80:a", "tcp:192.0.2.2:80:a", false),
            ("tcp:192.0.2.1:80:a", "tcp:80:a", true),
            ("auto:a", "tcp:auto:a", true),
            ("tcp:auto:a", "udp:auto:a", false),
            ("auto:a", "auto:b", false),
            ("auto:a", "tcp:80:a", false),
        ] {
            let (one, two): (Forward, Forward) = (one.parse().unwrap(), two.parse().unwrap());
            assert_eq!((one.overlaps(&two), two.overlaps(&one)), (overlaps, overlaps));
        }
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_has_one_form(text in "(tcp|udp|auto)?[:\\[\\]0-9a.-]{0,30}") {
            if let Ok(forward) = text.parse::<Forward>() {
                prop_assert_eq!(forward.to_string().parse::<Forward>(), Ok(forward));
            }
        }
    }
}
