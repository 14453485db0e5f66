//! Reading and writing of frozen sessions: numbers and byte strings in a row.
//!
//! Little-endian, no padding; a byte string has its length in front. An image is read
//! back by the same build or a later one, so its first field is a version.
//!
//! Invariants: reading never panics and takes no more memory than the image is long;
//! whatever is read is checked by who asks for it.

use alloc::vec::Vec;

/// Why bytes are no frozen session.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ImageError {
    /// They end too early.
    #[error("image is cut short")]
    Truncated,
    /// A field says what it cannot.
    #[error("image says what cannot be")]
    Malformed,
    /// Another version's.
    #[error("image of another version: {0}")]
    Version(u32),
    /// It was frozen by another node: the private key does not fit.
    #[error("image of another node's session")]
    Owner,
}

/// Writes one field after the other.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    pub(crate) bytes: Vec<u8>,
}

impl Writer {
    pub(crate) fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub(crate) fn bool(&mut self, value: bool) {
        self.u8(value.into());
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn count(&mut self, value: usize) {
        self.u32(u32::try_from(value).unwrap_or(u32::MAX));
    }

    pub(crate) fn fixed(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.fixed(bytes);
    }

    pub(crate) fn words(&mut self, words: &[u64]) {
        self.count(words.len());
        for word in words {
            self.u64(*word);
        }
    }

    pub(crate) fn option(&mut self, value: Option<u64>) {
        self.bool(value.is_some());
        if let Some(value) = value {
            self.u64(value);
        }
    }
}

/// Reads one field after the other.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn fixed<const N: usize>(&mut self) -> Result<[u8; N], ImageError> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(ImageError::Truncated)?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, ImageError> {
        self.fixed().map(|[byte]| byte)
    }

    pub(crate) fn bool(&mut self) -> Result<bool, ImageError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(ImageError::Malformed),
        }
    }

    pub(crate) fn u16(&mut self) -> Result<u16, ImageError> {
        self.fixed().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, ImageError> {
        self.fixed().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, ImageError> {
        self.fixed().map(u64::from_le_bytes)
    }

    /// How many things follow, each of `least` bytes or more.
    pub(crate) fn count(&mut self, least: usize) -> Result<usize, ImageError> {
        let count = self.u32()? as usize;
        if count > self.rest.len() / least.max(1) {
            return Err(ImageError::Truncated);
        }
        Ok(count)
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], ImageError> {
        let count = self.count(1)?;
        let (bytes, rest) = self.rest.split_at_checked(count).ok_or(ImageError::Truncated)?;
        self.rest = rest;
        Ok(bytes)
    }

    pub(crate) fn words(&mut self) -> Result<Vec<u64>, ImageError> {
        let count = self.count(8)?;
        (0..count).map(|_| self.u64()).collect()
    }

    pub(crate) fn option(&mut self) -> Result<Option<u64>, ImageError> {
        if self.bool()? { self.u64().map(Some) } else { Ok(None) }
    }

    pub(crate) const fn end(&self) -> Result<(), ImageError> {
        if self.rest.is_empty() { Ok(()) } else { Err(ImageError::Malformed) }
    }
}
