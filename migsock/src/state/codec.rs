//! Numbers, addresses and byte strings of the saved layout.

use super::{MAX_QUEUE, StateError};
use crate::options::{SavedOption, by_id};
use std::net::{IpAddr, SocketAddr};

#[derive(Default)]
pub(super) struct Writer {
    pub(super) bytes: Vec<u8>,
}

impl Writer {
    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn u16(&mut self, number: u16) {
        self.put(&number.to_le_bytes());
    }

    pub(super) fn u32(&mut self, number: u32) {
        self.put(&number.to_le_bytes());
    }

    pub(super) fn short(&mut self, bytes: &[u8]) {
        self.put(&[u8::try_from(bytes.len()).unwrap_or(u8::MAX)]);
        self.put(bytes);
    }

    pub(super) fn long(&mut self, bytes: &[u8]) {
        self.u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.put(bytes);
    }

    pub(super) fn address(&mut self, address: SocketAddr) {
        let mut octets = [0; 16];
        let family = match address.ip() {
            IpAddr::V4(ip) => {
                octets[..4].copy_from_slice(&ip.octets());
                4
            }
            IpAddr::V6(ip) => {
                octets = ip.octets();
                6
            }
        };
        self.put(&[family, 0]);
        self.u16(address.port());
        self.put(&octets);
        self.u16(0);
    }
}

pub(super) struct Reader<'a> {
    pub(super) rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn take<const N: usize>(&mut self) -> Result<[u8; N], StateError> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(StateError::Truncated)?;
        self.rest = rest;
        Ok(*head)
    }

    fn bytes(&mut self, length: usize) -> Result<&'a [u8], StateError> {
        let (head, rest) = self.rest.split_at_checked(length).ok_or(StateError::Truncated)?;
        self.rest = rest;
        Ok(head)
    }

    pub(super) fn u16(&mut self) -> Result<u16, StateError> {
        self.take().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, StateError> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn short(&mut self) -> Result<&'a [u8], StateError> {
        let [length] = self.take()?;
        self.bytes(length.into())
    }

    pub(super) fn long(&mut self) -> Result<Vec<u8>, StateError> {
        let length = self.u32()? as usize;
        if length > MAX_QUEUE {
            return Err(StateError::Field("queue length"));
        }
        self.bytes(length).map(<[u8]>::to_vec)
    }

    pub(super) fn address(&mut self) -> Result<SocketAddr, StateError> {
        let [family, zero] = self.take()?;
        let port = self.u16()?;
        let octets: [u8; 16] = self.take()?;
        let (four, tail) = octets.split_first_chunk::<4>().ok_or(StateError::Truncated)?;
        let ip = match family {
            4 if tail.iter().all(|byte| *byte == 0) => IpAddr::from(*four),
            6 => IpAddr::from(octets),
            _ => return Err(StateError::Field("address")),
        };
        if zero != 0 || self.u16()? != 0 {
            return Err(StateError::Field("address"));
        }
        Ok(SocketAddr::new(ip, port))
    }

    /// Known options, each once, in rising order: one state has one form.
    pub(super) fn options(&mut self) -> Result<Vec<SavedOption>, StateError> {
        let wrong = StateError::Field("option");
        let [count] = self.take()?;
        let mut options: Vec<SavedOption> = Vec::new();
        for _ in 0..count {
            let [id] = self.take()?;
            let value = i64::from_le_bytes(self.take()?);
            let carried = by_id(id).ok_or(wrong)?;
            carried.shape.to_kernel(value).ok_or(wrong)?;
            if options.last().is_some_and(|last| last.id >= id) {
                return Err(wrong);
            }
            options.push(SavedOption { id, value });
        }
        Ok(options)
    }

    pub(super) const fn end(&self) -> Result<(), StateError> {
        if self.rest.is_empty() { Ok(()) } else { Err(StateError::Trailing) }
    }
}
