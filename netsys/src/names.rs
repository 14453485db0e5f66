//! Names that the kernel accepts, checked once.
//!
//! A name that exists as one of these types has the right length and holds no
//! byte that could leave its directory (`/run/netns`, `/proc/sys/net/...`), so
//! the code that builds paths needs no further check.
//!
//! Sources: `dev_valid_name` in Linux `net/core/dev.c` for interfaces;
//! iproute2 `ip/ipnetns.c` `invalid_name` for namespaces.

use std::fmt;
use std::str::FromStr;

/// Longest interface name in bytes: IFNAMSIZ − 1 (`linux/if.h`).
const IF_NAME_MAX: usize = 15;
/// Longest namespace name in bytes: NAME_MAX (`linux/limits.h`).
const NETNS_NAME_MAX: usize = 255;

/// Why a name was refused; the caller's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The name has no byte.
    #[error("an empty name")]
    Empty,
    /// The name exceeds what the kernel stores.
    #[error("a name of {len} bytes where at most {max} fit")]
    TooLong {
        /// Bytes given.
        len: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// `.` and `..` mean directories.
    #[error("'.' and '..' are directories, not names")]
    Dots,
    /// A byte that the kernel or a path would misread.
    #[error("byte {0:#04x} may not stand in a name")]
    Byte(u8),
    /// Not six hexadecimal octets with colons between them.
    #[error("a MAC address is six hexadecimal octets with colons between them")]
    Mac,
}

/// Name of a network interface, 1 to 15 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName {
    bytes: [u8; IF_NAME_MAX],
    len: u8,
}

impl IfName {
    /// The loopback interface, present in every namespace.
    pub const LOOPBACK: IfName =
        IfName { bytes: [b'l', b'o', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], len: 2 };

    /// Checks `name`.
    ///
    /// # Errors
    /// [`NameError`] when the kernel would refuse it.
    pub fn new(name: &str) -> Result<Self, NameError> {
        check(name, IF_NAME_MAX)?;
        // ':' is an alias mark to the kernel, '%' a pattern that it fills in.
        if let Some(byte) = name.bytes().find(|b| matches!(b, b':' | b'%')) {
            return Err(NameError::Byte(byte));
        }
        let mut bytes = [0; IF_NAME_MAX];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        let len = u8::try_from(name.len()).map_err(|_| NameError::Empty)?;
        Ok(Self { bytes, len })
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        // Built from a `str` cut at its end, so this is always text.
        std::str::from_utf8(&self.bytes[..usize::from(self.len)]).unwrap_or_default()
    }
}

impl FromStr for IfName {
    type Err = NameError;

    fn from_str(s: &str) -> Result<Self, NameError> {
        Self::new(s)
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// Name of a namespace under `/run/netns`, 1 to 255 bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetnsName(Box<str>);

impl NetnsName {
    /// Checks `name`.
    ///
    /// # Errors
    /// [`NameError`] when it is empty, too long, or would leave the directory.
    pub fn new(name: &str) -> Result<Self, NameError> {
        check(name, NETNS_NAME_MAX)?;
        Ok(Self(name.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NetnsName {
    type Err = NameError;

    fn from_str(s: &str) -> Result<Self, NameError> {
        Self::new(s)
    }
}

impl fmt::Display for NetnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Ethernet address, six octets in network order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl FromStr for MacAddr {
    type Err = NameError;

    fn from_str(s: &str) -> Result<Self, NameError> {
        let mut octets = [0; 6];
        let mut parts = s.split(':');
        for octet in &mut octets {
            let part = parts.next().filter(|p| (1..=2).contains(&p.len())).ok_or(NameError::Mac)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| NameError::Mac)?;
        }
        match parts.next() {
            None => Ok(Self(octets)),
            Some(_) => Err(NameError::Mac),
        }
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn check(name: &str, max: usize) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > max {
        return Err(NameError::TooLong { len: name.len(), max });
    }
    if matches!(name, "." | "..") {
        return Err(NameError::Dots);
    }
    match name.bytes().find(|&b| b == b'/' || b <= b' ' || b == 0x7f) {
        Some(byte) => Err(NameError::Byte(byte)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_leave_their_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "../x", "a b", "a\0", "a\n", "sixteen-bytes-ab"] {
            assert!(IfName::new(bad).is_err(), "{bad:?}");
        }
        assert_eq!(IfName::new("a:1"), Err(NameError::Byte(b':')));
        assert_eq!(IfName::new("fifteen-bytes-a").map(|n| n.to_string()).unwrap().len(), 15);
        assert_eq!(IfName::LOOPBACK, "lo".parse().unwrap());
        assert_eq!(NetnsName::new("conet-h1-g1").unwrap().as_str(), "conet-h1-g1");
        assert_eq!(NetnsName::new("../etc"), Err(NameError::Byte(b'/')));
    }

    #[test]
    fn mac_addresses_round_trip() {
        let mac: MacAddr = "02:00:0a:4d:01:02".parse().unwrap();
        assert_eq!(mac, MacAddr([2, 0, 10, 77, 1, 2]));
        assert_eq!(mac.to_string(), "02:00:0a:4d:01:02");
        for bad in
            ["", "02:00:0a:4d:01", "02:00:0a:4d:01:02:03", "02:00:0a:4d:01:xx", "+2:0:0:0:0:0:"]
        {
            assert_eq!(bad.parse::<MacAddr>(), Err(NameError::Mac), "{bad}");
        }
    }
}
