//! The embedded agent, as bytes.

include!(concat!(env!("OUT_DIR"), "/agent.rs"));

/// The agent's program file.
pub(crate) const ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/agent.elf"));

/// One segment of the program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// Where it goes.
    pub(crate) addr: u64,
    /// Its bytes; zero behind them.
    pub(crate) bytes: &'static [u8],
    /// Its length in memory.
    pub(crate) len: u64,
    /// `PROT_*` bits.
    pub(crate) prot: u32,
}

/// The program's segments, lowest first.
pub(crate) fn segments() -> impl Iterator<Item = Segment> {
    SEGMENTS.iter().map(|&(addr, offset, file_len, len, prot)| Segment {
        addr,
        bytes: &ELF[offset..offset + file_len],
        len,
        prot,
    })
}
