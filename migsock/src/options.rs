//! The socket options that a connection takes along.
//!
//! One table; the numbers in its first column are part of the saved layout and
//! never reused. Each option is one number: a flag, a count, or seconds and
//! microseconds put together.
//!
//! Buffer sizes, `SO_REUSEADDR` and `SO_PEEK_OFF` are not here: repair mode itself
//! changes or needs them, so save and restore treat them by hand.

use crate::kernel::Opt;

/// How an option's value looks to the kernel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Shape {
    /// An `int`.
    Int,
    /// `struct linger`: two ints; seconds, or −1 for off.
    Linger,
    /// `struct timeval`, in microseconds.
    Time,
}

/// One carried option.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Carried {
    /// Its number in the saved layout.
    pub id: u8,
    /// Its name in the manual pages.
    pub name: &'static str,
    pub(crate) option: Opt,
    pub(crate) shape: Shape,
}

const fn int(id: u8, name: &'static str, level: i32, number: i32) -> Carried {
    Carried { id, name, option: Opt { level, name: number }, shape: Shape::Int }
}

const SOCKET: i32 = libc::SOL_SOCKET;
const TCP: i32 = libc::IPPROTO_TCP;
const IP: i32 = libc::IPPROTO_IP;
const IPV6: i32 = libc::IPPROTO_IPV6;

/// Every option that is carried; `socket(7)`, `tcp(7)`, `ip(7)`, `ipv6(7)`.
pub const CARRIED: &[Carried] = &[
    int(1, "SO_REUSEPORT", SOCKET, libc::SO_REUSEPORT),
    int(2, "SO_KEEPALIVE", SOCKET, libc::SO_KEEPALIVE),
    int(3, "SO_OOBINLINE", SOCKET, libc::SO_OOBINLINE),
    int(4, "SO_PRIORITY", SOCKET, libc::SO_PRIORITY),
    int(5, "SO_MARK", SOCKET, libc::SO_MARK),
    int(6, "SO_RCVLOWAT", SOCKET, libc::SO_RCVLOWAT),
    Carried {
        id: 7,
        name: "SO_LINGER",
        option: Opt { level: SOCKET, name: libc::SO_LINGER },
        shape: Shape::Linger,
    },
    Carried {
        id: 8,
        name: "SO_RCVTIMEO",
        option: Opt { level: SOCKET, name: libc::SO_RCVTIMEO },
        shape: Shape::Time,
    },
    Carried {
        id: 9,
        name: "SO_SNDTIMEO",
        option: Opt { level: SOCKET, name: libc::SO_SNDTIMEO },
        shape: Shape::Time,
    },
    int(10, "TCP_NODELAY", TCP, libc::TCP_NODELAY),
    int(11, "TCP_CORK", TCP, libc::TCP_CORK),
    int(12, "TCP_KEEPIDLE", TCP, libc::TCP_KEEPIDLE),
    int(13, "TCP_KEEPINTVL", TCP, libc::TCP_KEEPINTVL),
    int(14, "TCP_KEEPCNT", TCP, libc::TCP_KEEPCNT),
    int(15, "TCP_USER_TIMEOUT", TCP, libc::TCP_USER_TIMEOUT),
    int(16, "TCP_NOTSENT_LOWAT", TCP, libc::TCP_NOTSENT_LOWAT),
    int(17, "IP_TOS", IP, libc::IP_TOS),
    int(18, "IP_TTL", IP, libc::IP_TTL),
    int(19, "IP_MTU_DISCOVER", IP, libc::IP_MTU_DISCOVER),
    int(20, "IPV6_TCLASS", IPV6, libc::IPV6_TCLASS),
    int(21, "IPV6_UNICAST_HOPS", IPV6, libc::IPV6_UNICAST_HOPS),
];

/// The value of one option at the moment of saving.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SavedOption {
    /// Which; see [`CARRIED`].
    pub id: u8,
    /// Its value; units as in the manual, times in microseconds, −1 for no linger.
    pub value: i64,
}

/// The row of an option.
#[must_use]
pub fn by_id(id: u8) -> Option<&'static Carried> {
    CARRIED.iter().find(|carried| carried.id == id)
}

impl Shape {
    /// The kernel's bytes of `value`; `None` if it has none.
    pub(crate) fn to_kernel(self, value: i64) -> Option<Vec<u8>> {
        match self {
            Self::Int => i32::try_from(value).ok().map(|value| value.to_ne_bytes().to_vec()),
            Self::Linger => {
                let seconds = i32::try_from(value).ok().filter(|seconds| *seconds >= -1)?;
                let on = i32::from(seconds >= 0);
                Some([on.to_ne_bytes(), seconds.max(0).to_ne_bytes()].concat())
            }
            Self::Time => {
                let value = u64::try_from(value).ok()?;
                Some(
                    [(value / 1_000_000).to_ne_bytes(), (value % 1_000_000).to_ne_bytes()].concat(),
                )
            }
        }
    }

    /// The value of the kernel's bytes.
    pub(crate) fn parse(self, bytes: &[u8]) -> Option<i64> {
        match self {
            Self::Int => bytes.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes).into()),
            Self::Linger => {
                let (on, rest) = bytes.split_first_chunk()?;
                let seconds = i32::from_ne_bytes(*rest.first_chunk()?);
                Some(if i32::from_ne_bytes(*on) == 0 { -1 } else { seconds.into() })
            }
            Self::Time => {
                let (seconds, rest) = bytes.split_first_chunk()?;
                let micros = i64::from_ne_bytes(*rest.first_chunk()?);
                i64::from_ne_bytes(*seconds).checked_mul(1_000_000)?.checked_add(micros)
            }
        }
    }

    /// Bytes of the kernel's form.
    pub(crate) const fn length(self) -> usize {
        match self {
            Self::Int => 4,
            Self::Linger => 8,
            Self::Time => 16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn numbers_are_unique() {
        let ids: BTreeSet<u8> = CARRIED.iter().map(|carried| carried.id).collect();
        assert_eq!(ids.len(), CARRIED.len());
        assert!(CARRIED.iter().all(|carried| by_id(carried.id) == Some(carried)));
    }

    #[test]
    fn values_survive_the_kernels_form() {
        for (shape, values) in [
            (Shape::Int, &[0, 1, -1, i64::from(i32::MAX)][..]),
            (Shape::Linger, &[-1, 0, 7]),
            (Shape::Time, &[0, 1, 1_500_000]),
        ] {
            for &value in values {
                let bytes = shape.to_kernel(value).expect("in range");
                assert_eq!(bytes.len(), shape.length());
                assert_eq!(shape.parse(&bytes), Some(value));
                assert_eq!(shape.parse(&bytes[1..]), None);
            }
        }
        assert_eq!(Shape::Int.to_kernel(i64::MAX), None);
        assert_eq!(Shape::Time.to_kernel(-1), None);
        assert_eq!(Shape::Linger.to_kernel(-2), None);
    }
}
