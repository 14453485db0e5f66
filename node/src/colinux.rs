//! A line of coLinux's configuration about a card, as its own program reads it.
//!
//! ```text
//! eth0=tuntap[,NAME[,MAC[,HOST]]]                       HOST is read and used by nobody
//! eth0=pcap-bridge,NAME[,MAC[,promisc|nopromisc]]       so is ndis-bridge
//! eth0=slirp[,MAC[,tcp|udp:PORT:PORT[:COUNT][/…]]]      ports of the host's, of the guest's
//! ```
//!
//! A name may stand in quotation marks, for a comma in it. Two of them behind each other
//! are one of the name's; no connection of Windows' has one in it, and no name here.
//!
//! What it is not: coLinux. That needs a Windows of 32 bits, where no daemon of conet's
//! runs; what the line says of the *card* (its number, its Ethernet address, slirp's
//! ports) is what a guest by TAP is given on Linux, in place of it. What the line says of
//! the *host* (which adapter, who sees whose frames) is kept for who asks for the line, and
//! has no meaning here: conet takes the adapter's place.
//!
//! Sources: coLinux 0.8, `src/colinux/user/config.c`, `user/slirp/co_slirp.c`.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use conet_netsys::{MacAddr, Transport};
use thiserror::Error;

/// Cards of a coLinux machine (`CO_MODULE_MAX_CONET`).
const MAX_CARDS: u8 = 16;
/// Longest name of an adapter: its field is 128 bytes with a zero behind.
const MAX_NAME: usize = 127;

/// What a line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The card's number: it is `eth` and this.
    pub card: u8,
    /// Its Ethernet address; coLinux made one up where there was none.
    pub mac: Option<MacAddr>,
    /// How it reached its host.
    pub by: By,
}

/// How a card reached its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum By {
    /// The TAP driver's adapter of a name, or the first one.
    Tap {
        /// The adapter, as Windows names the connection.
        adapter: Option<String>,
        /// An address that coLinux left alone.
        host: Option<Ipv4Addr>,
    },
    /// A bridge to the adapter of a name.
    Bridge {
        /// Whose: WinPcap's, or the NDIS driver's.
        driver: Driver,
        /// The adapter.
        adapter: String,
        /// Whether it saw all frames, where that is said.
        promiscuous: Option<bool>,
    },
    /// A network in user mode.
    Slirp(Vec<Redirection>),
}

/// Whose bridge it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// WinPcap's.
    Pcap,
    /// An intermediate driver of Windows'.
    Ndis,
}

/// Ports of the host's that led to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Redirection {
    /// TCP or UDP.
    pub transport: Transport,
    /// The host's first port, not 0.
    pub host: u16,
    /// The guest's port for that, not 0.
    pub guest: u16,
    /// How many ports, at least one; none is beyond 65535.
    pub count: u16,
}

/// Why a text is no such line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum LineError {
    /// Something else than a card.
    #[error("not a line about a card; write it as in eth0=tuntap,\"TAP\",00:ff:12:34:56:78")]
    Card,
    /// A card that no machine has.
    #[error("coLinux has cards eth0 to eth15; take one of them")]
    Number,
    /// No way that coLinux had.
    #[error("names no way of coLinux's; write tuntap, slirp, pcap-bridge or ndis-bridge")]
    Way,
    /// Not six bytes, or a group's.
    #[error("its Ethernet address is none; write one card's, as in 00:ff:12:34:56:78, or none")]
    Mac,
    /// A bridge to nothing, or a name that does not fit.
    #[error(
        "its adapter's name has not 1 to 127 bytes, or a quotation mark; write it, as in pcap-bridge,\"LAN\""
    )]
    Adapter,
    /// Not the word that a bridge takes.
    #[error("a bridge is promisc or nopromisc; write one of them, or nothing")]
    Promiscuous,
    /// Not an address.
    #[error("the host's address is none; write one, or nothing: coLinux did not use it")]
    Host,
    /// No ports.
    #[error("its redirections are none; write them as in tcp:2222:22/udp:5000:5000:10")]
    Redirection,
    /// More than the way takes.
    #[error("something stands behind what this way takes; leave it out")]
    Behind,
    /// An opening mark alone.
    #[error("a quotation mark is not closed; close it")]
    Quote,
}

impl FromStr for Line {
    type Err = LineError;

    fn from_str(text: &str) -> Result<Self, LineError> {
        let (card, what) = text.trim().split_once('=').ok_or(LineError::Card)?;
        let card = card.strip_prefix("eth").ok_or(LineError::Card)?;
        let is_number = !card.is_empty() && card.bytes().all(|byte| byte.is_ascii_digit());
        let card = is_number.then(|| card.parse::<u8>().ok());
        let card = card.ok_or(LineError::Card)?.filter(|card| *card < MAX_CARDS);
        let card = card.ok_or(LineError::Number)?;
        let mut fields = split(what)?.into_iter();
        let way = fields.next().unwrap_or_default();
        let mut next = || fields.next().filter(|field| !field.is_empty());
        let (mac, by) = match way.as_str() {
            "tuntap" => {
                let adapter = next().map(named).transpose()?;
                let mac = next();
                let host = next().map(|host| host.parse().map_err(|_| LineError::Host));
                (mac, By::Tap { adapter, host: host.transpose()? })
            }
            "pcap-bridge" | "ndis-bridge" => {
                let driver = if way == "pcap-bridge" { Driver::Pcap } else { Driver::Ndis };
                let adapter = named(next().ok_or(LineError::Adapter)?)?;
                let mac = next();
                let promiscuous = match next().as_deref() {
                    None => None,
                    Some("promisc") => Some(true),
                    Some("nopromisc") => Some(false),
                    Some(_) => return Err(LineError::Promiscuous),
                };
                (mac, By::Bridge { driver, adapter, promiscuous })
            }
            "slirp" => {
                let mac = next();
                let ports = next().unwrap_or_default();
                let ports = ports.split('/').filter(|one| !one.is_empty()).map(str::parse);
                (mac, By::Slirp(ports.collect::<Result<_, _>>()?))
            }
            _ => return Err(LineError::Way),
        };
        if fields.any(|field| !field.is_empty()) {
            return Err(LineError::Behind);
        }
        let mac = mac.map(|mac| mac.parse::<MacAddr>().map_err(|_| LineError::Mac)).transpose()?;
        if mac.is_some_and(|mac| mac.0[0] & 1 != 0 || mac.0 == [0; 6]) {
            return Err(LineError::Mac);
        }
        Ok(Self { card, mac, by })
    }
}

/// What stands between commas.
fn split(text: &str) -> Result<Vec<String>, LineError> {
    let mut fields = vec![String::new()];
    let mut in_quotes = false;
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let field = fields.last_mut().ok_or(LineError::Card)?;
        match letter {
            '"' if letters.next_if_eq(&'"').is_some() => field.push('"'),
            '"' => in_quotes = !in_quotes,
            ',' if !in_quotes => fields.push(String::new()),
            letter => field.push(letter),
        }
    }
    if in_quotes { Err(LineError::Quote) } else { Ok(fields) }
}

fn named(adapter: String) -> Result<String, LineError> {
    let is_strange = |letter: char| letter.is_control() || letter == '"';
    let is_one = (1..=MAX_NAME).contains(&adapter.len()) && !adapter.contains(is_strange);
    if is_one { Ok(adapter) } else { Err(LineError::Adapter) }
}

impl FromStr for Redirection {
    type Err = LineError;

    fn from_str(text: &str) -> Result<Self, LineError> {
        let wrong = LineError::Redirection;
        let mut words = text.split(':');
        let transport = words.next();
        let is_named =
            |one: &Transport| transport.is_some_and(|name| name.eq_ignore_ascii_case(one.as_str()));
        let transport = Transport::ALL.into_iter().find(is_named);
        let mut port = || {
            let word = words.next()?;
            // `parse` would take a sign.
            let is_number = word.bytes().all(|byte| byte.is_ascii_digit());
            Some(word.parse::<u16>().ok().filter(|port| is_number && *port != 0))
        };
        let (host, guest) = (port().flatten().ok_or(wrong)?, port().flatten().ok_or(wrong)?);
        let count = port().map_or(Some(1), |count| count).ok_or(wrong)?;
        let is_whole = words.next().is_none() && host.max(guest).checked_add(count - 1).is_some();
        let transport = transport.filter(|_| is_whole).ok_or(wrong)?;
        Ok(Self { transport, host, guest, count })
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "eth{}=", self.card)?;
        let mac = self.mac.map(|mac| mac.to_string()).unwrap_or_default();
        let quoted = |name: &str| format!("\"{name}\"");
        let fields = match &self.by {
            By::Tap { adapter, host } => {
                let adapter = adapter.as_deref().map(quoted).unwrap_or_default();
                let host = host.map(|host| host.to_string()).unwrap_or_default();
                ["tuntap".to_owned(), adapter, mac, host]
            }
            By::Bridge { driver, adapter, promiscuous } => {
                let way = if *driver == Driver::Pcap { "pcap-bridge" } else { "ndis-bridge" };
                let promiscuous = match promiscuous {
                    None => "",
                    Some(true) => "promisc",
                    Some(false) => "nopromisc",
                };
                [way.to_owned(), quoted(adapter), mac, promiscuous.to_owned()]
            }
            By::Slirp(ports) => {
                let ports: Vec<_> = ports.iter().map(ToString::to_string).collect();
                ["slirp".to_owned(), mac, ports.join("/"), String::new()]
            }
        };
        f.write_str(fields.join(",").trim_end_matches(','))
    }
}

impl fmt::Display for Redirection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.transport, self.host, self.guest)?;
        if self.count == 1 { Ok(()) } else { write!(f, ":{}", self.count) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_are_read_as_colinux_reads_them() {
        let mac = Some("00:11:22:33:44:55".parse().unwrap());
        let tap = |name: &str| By::Tap { adapter: Some(name.to_owned()), host: None };
        let bridge = |driver, promiscuous| By::Bridge {
            driver,
            adapter: "Local Area Connection".to_owned(),
            promiscuous,
        };
        let one = |transport, host, guest, count| Redirection { transport, host, guest, count };
        let ports = vec![one(Transport::Tcp, 2222, 22, 1), one(Transport::Udp, 5000, 6000, 10)];
        for (text, card, mac, by, shown) in [
            ("eth0=tuntap", 0, None, By::Tap { adapter: None, host: None }, None),
            ("eth0=tuntap,,00:11:22:33:44:55", 0, mac, By::Tap { adapter: None, host: None }, None),
            (
                "eth1=tuntap,\"LAN-Connection 14\",00:11:22:33:44:55",
                1,
                mac,
                tap("LAN-Connection 14"),
                None,
            ),
            ("eth0=tuntap,TAP", 0, None, tap("TAP"), Some("eth0=tuntap,\"TAP\"")),
            ("eth0=tuntap,\"a, b\"", 0, None, tap("a, b"), None),
            (
                "eth0=tuntap,,,192.168.0.1",
                0,
                None,
                By::Tap { adapter: None, host: Some(Ipv4Addr::new(192, 168, 0, 1)) },
                None,
            ),
            (
                "eth15=pcap-bridge,\"Local Area Connection\"",
                15,
                None,
                bridge(Driver::Pcap, None),
                None,
            ),
            (
                " eth0=ndis-bridge,Local Area Connection,00:11:22:33:44:55,nopromisc\n",
                0,
                mac,
                bridge(Driver::Ndis, Some(false)),
                Some("eth0=ndis-bridge,\"Local Area Connection\",00:11:22:33:44:55,nopromisc"),
            ),
            ("eth0=slirp", 0, None, By::Slirp(vec![]), None),
            ("eth0=slirp,,tcp:2222:22/udp:5000:6000:10", 0, None, By::Slirp(ports), None),
        ] {
            let line: Line = text.parse().unwrap();
            assert_eq!(line, Line { card, mac, by }, "{text}");
            assert_eq!(line.to_string(), shown.unwrap_or(text));
        }
    }

    #[test]
    fn what_is_no_line_is_told() {
        for (text, error) in [
            ("", LineError::Card),
            ("mem=64", LineError::Card),
            ("eth=tuntap", LineError::Card),
            ("eth+1=tuntap", LineError::Card),
            ("eth16=tuntap", LineError::Number),
            ("eth999=tuntap", LineError::Number),
            ("eth0=", LineError::Way),
            ("eth0=vde", LineError::Way),
            ("eth0=tuntap,TAP,00:11:22:33:44", LineError::Mac),
            ("eth0=tuntap,TAP,01:00:5e:00:00:01", LineError::Mac),
            ("eth0=tuntap,TAP,00:00:00:00:00:00", LineError::Mac),
            ("eth0=tuntap,\"TAP", LineError::Quote),
            ("eth0=tuntap,TAP,,here", LineError::Host),
            ("eth0=tuntap,TAP,,,more", LineError::Behind),
            ("eth0=pcap-bridge", LineError::Adapter),
            ("eth0=pcap-bridge,\"\"", LineError::Adapter),
            ("eth0=tuntap,a\"\"b", LineError::Adapter),
            ("eth0=pcap-bridge,LAN,,some", LineError::Promiscuous),
            ("eth0=slirp,,tcp:22", LineError::Redirection),
            ("eth0=slirp,,icmp:1:1", LineError::Redirection),
            ("eth0=slirp,,tcp:0:22", LineError::Redirection),
            ("eth0=slirp,,tcp:65535:22:2", LineError::Redirection),
            ("eth0=slirp,,tcp:1:2:3:4", LineError::Redirection),
            ("eth0=slirp,,tcp:+1:2", LineError::Redirection),
        ] {
            assert_eq!(text.parse::<Line>(), Err(error), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_has_one_form(
            way in "(tuntap|slirp|pcap-bridge|ndis-bridge)",
            rest in "(,[a-z0-9:/. \"]{0,12}){0,4}",
        ) {
            if let Ok(line) = format!("eth0={way}{rest}").parse::<Line>() {
                prop_assert_eq!(line.to_string().parse::<Line>(), Ok(line));
            }
        }
    }
}
