//! A call's arguments into a request; a reply into the program's memory.
//!
//! Runs in the agent, between trap and send, so it allocates nothing and copies
//! every byte once. It touches the program's memory only through [`Memory`],
//! whose real form survives bad pointers; a fault becomes `EFAULT` for the
//! program, as the kernel would have it.
//!
//! Layout of what is written: [`conet_wire::link`].

use conet_wire::link::{
    CHUNK, Desc, MAX_DESCS, MAX_FRAME, PLACE_BUFFER, PLACE_NONE, ReplyHead, Request, direction,
    mode, output_len, padded,
};
use linux_raw_sys::errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::table::{self, Buffer, Class, Len};

/// An access to the program's memory failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// The program's memory.
pub trait Memory {
    /// Copies from `addr` on.
    ///
    /// # Errors
    /// [`Fault`] when any byte cannot be read.
    fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), Fault>;

    /// Copies to `addr` on.
    ///
    /// # Errors
    /// [`Fault`] when any byte cannot be written.
    fn write(&mut self, addr: u64, from: &[u8]) -> Result<(), Fault>;
}

/// Why a call is not forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotForwarded {
    /// The program gets this error number, positive.
    Errno(u32),
    /// It must run at home.
    GoHome,
}

impl From<Fault> for NotForwarded {
    fn from(_: Fault) -> Self {
        Self::Errno(errno::EFAULT)
    }
}

/// The program's signals, as far as forwarding must know.
#[derive(Clone, Copy, Debug, Default)]
pub struct Signals {
    /// Blocked by the program.
    pub blocked: u64,
    /// Handled by the program; always blocked at home, since handlers run only
    /// where the program is.
    pub handled: u64,
}

/// Where the outputs of a call belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outputs {
    /// At each buffer's address.
    Plain,
    /// The one output is scattered over this vector.
    Scatter { vector: u64, count: u64 },
    /// Into the `struct msghdr` at this address.
    Message { header: u64, vector: u64, count: u64 },
}

/// A request that has been written, and what its reply needs.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Bytes of the body, [`Request`] included.
    pub len: usize,
    /// The request as sent.
    pub request: Request,
    descs: [Desc; MAX_DESCS],
    outputs: Outputs,
}

/// Builds requests into a frame body.
struct Builder<'a, M> {
    memory: &'a M,
    body: &'a mut [u8],
    request: Request,
    descs: [Desc; MAX_DESCS],
    count: usize,
    /// Where each input comes from until it is copied.
    sources: [Source; MAX_DESCS],
}

#[derive(Clone, Copy)]
enum Source {
    Program(u64),
    Gather { vector: u64, count: u64 },
    Bytes([u8; 56]),
}

impl<M: Memory> Builder<'_, M> {
    fn add(&mut self, desc: Desc, source: Source) -> Result<usize, NotForwarded> {
        let at = self.count;
        if desc.len as usize > CHUNK {
            return Err(NotForwarded::GoHome);
        }
        *self.descs.get_mut(at).ok_or(NotForwarded::GoHome)? = desc;
        self.sources[at] = source;
        self.count += 1;
        Ok(at)
    }

    fn word(&self, addr: u64) -> Result<u64, Fault> {
        let mut bytes = [0; 8];
        self.memory.read(addr, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn half(&self, addr: u64) -> Result<u32, Fault> {
        let mut bytes = [0; 4];
        self.memory.read(addr, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn buffers(&mut self, buffers: &[Buffer], signals: Signals) -> Result<(), NotForwarded> {
        for buffer in buffers {
            let addr = self.request.args[usize::from(buffer.arg)];
            if addr != 0 {
                self.buffer(buffer, addr, signals)?;
            }
        }
        Ok(())
    }

    fn buffer(&mut self, b: &Buffer, addr: u64, signals: Signals) -> Result<(), NotForwarded> {
        let mut source = Source::Program(addr);
        let len = match b.len {
            Len::Fixed(len) => u64::from(len),
            Len::Arg(k) => {
                let arg = &mut self.request.args[usize::from(k)];
                *arg = (*arg).min(CHUNK as u64);
                *arg
            }
            Len::Times(k, size) => {
                // The kernel takes these counts as int.
                (self.request.args[usize::from(k)] & 0xffff_ffff).saturating_mul(u64::from(size))
            }
            Len::At(k) => match self.request.args[usize::from(k)] {
                0 => 0,
                at => u64::from(self.half(at)?),
            },
            Len::Text => self.text_len(addr)?,
            Len::FdSet => (self.request.args[0] & 0xffff_ffff).div_ceil(64).saturating_mul(8),
            Len::Mask => {
                source = Source::Bytes(first_word(self.mask(addr, signals)?));
                8
            }
            Len::MaskPair => return self.mask_pair(b, addr, signals),
        };
        let len = u32::try_from(len).map_err(|_| NotForwarded::GoHome)?;
        let mut way = 0;
        if b.input {
            way |= direction::IN;
        }
        if b.output {
            way |= direction::OUT;
        }
        let desc = Desc {
            addr,
            len,
            place: b.arg,
            direction: way,
            mode: b.mode,
            unit: b.unit,
            ..Desc::default()
        };
        self.add(desc, source).map(|_| ())
    }

    /// The mask for the time of a call, with handled signals kept out. A handled
    /// signal that only this mask would let in can be delivered at home alone.
    fn mask(&self, addr: u64, signals: Signals) -> Result<u64, NotForwarded> {
        let mask = self.word(addr)?;
        if signals.handled & signals.blocked & !mask != 0 {
            return Err(NotForwarded::GoHome);
        }
        Ok(mask | signals.handled)
    }

    fn mask_pair(&mut self, b: &Buffer, addr: u64, signals: Signals) -> Result<(), NotForwarded> {
        let mask_at = self.word(addr)?;
        let mut pair = [0; 56];
        pair[8] = 8;
        let desc =
            Desc { addr, len: 16, place: b.arg, direction: direction::IN, ..Desc::default() };
        let holder = self.add(desc, Source::Bytes(pair))?;
        if mask_at != 0 {
            let mask = self.mask(mask_at, signals)?;
            let desc = Desc { addr: mask_at, place: buffer_place(holder), len: 8, ..desc };
            self.add(desc, Source::Bytes(first_word(mask)))?;
        }
        Ok(())
    }

    fn text_len(&self, addr: u64) -> Result<u64, NotForwarded> {
        const PATH_MAX: u64 = 4096;
        let mut done = 0u64;
        let mut piece = [0u8; 64];
        while done < PATH_MAX {
            let from = addr.wrapping_add(done);
            // Never across a page: what follows the NUL may not be readable.
            let room = usize::try_from(4096 - from % 4096).unwrap_or(64).min(piece.len());
            let piece = &mut piece[..room];
            self.memory.read(from, piece)?;
            if let Some(end) = piece.iter().position(|&b| b == 0) {
                return Ok(done + end as u64 + 1);
            }
            done += room as u64;
        }
        Err(NotForwarded::Errno(errno::ENAMETOOLONG))
    }

    fn vector_len(&self, vector: u64, count: u64) -> Result<u64, NotForwarded> {
        const UIO_MAXIOV: u64 = 1024;
        if count > UIO_MAXIOV {
            return Err(NotForwarded::Errno(errno::EINVAL));
        }
        let mut total = 0u64;
        for i in 0..count {
            total = total.saturating_add(self.word(vector.wrapping_add(16 * i + 8))?);
        }
        Ok(total.min(CHUNK as u64))
    }

    fn vector(&mut self, plain: u32, write: bool) -> Result<Outputs, NotForwarded> {
        let [_, vector, count, ..] = self.request.args;
        let count = count & 0xffff_ffff;
        let total = self.vector_len(vector, count)?;
        self.request.nr = plain;
        self.request.args[2] = total;
        let desc = Desc {
            len: u32::try_from(total).map_err(|_| NotForwarded::GoHome)?,
            place: 1,
            direction: if write { direction::IN } else { direction::OUT },
            mode: mode::BY_RESULT,
            unit: 1,
            ..Desc::default()
        };
        self.add(desc, Source::Gather { vector, count })?;
        Ok(if write { Outputs::Plain } else { Outputs::Scatter { vector, count } })
    }

    /// Rebuilds `struct msghdr` (56 bytes: name, namelen, iov, iovlen, control,
    /// controllen, flags) around one contiguous buffer.
    fn message(&mut self, send: bool) -> Result<Outputs, NotForwarded> {
        let header = self.request.args[1];
        let mut bytes = [0u8; 56];
        self.memory.read(header, &mut bytes)?;
        let word = |at: usize| {
            let mut w = [0; 8];
            w.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(w)
        };
        let (name, name_len) = (word(0), word(8) & 0xffff_ffff);
        let (vector, count) = (word(16), word(24));
        let (control, control_len) = (word(32), word(40));
        let total = self.vector_len(vector, count)?;
        bytes[24..32].copy_from_slice(&1u64.to_le_bytes());
        let way = if send { direction::IN } else { direction::OUT };
        let part = |len: u64, place: u8, offset: u32, way: u8| -> Result<Desc, NotForwarded> {
            let len = u32::try_from(len).map_err(|_| NotForwarded::GoHome)?;
            Ok(Desc { len, place, offset, direction: way, ..Desc::default() })
        };
        let head = self.add(
            part(56, 1, 0, if send { way } else { direction::IN | direction::OUT })?,
            Source::Bytes(bytes),
        )?;
        if name != 0 {
            self.add(part(name_len, buffer_place(head), 0, way)?, Source::Program(name))?;
        }
        let mut one = [0u8; 56];
        one[8..16].copy_from_slice(&total.to_le_bytes());
        let list =
            self.add(part(16, buffer_place(head), 16, direction::IN)?, Source::Bytes(one))?;
        let data =
            Desc { mode: mode::BY_RESULT, unit: 1, ..part(total, buffer_place(list), 0, way)? };
        self.add(data, Source::Gather { vector, count })?;
        if control != 0 && control_len != 0 {
            let place = buffer_place(head);
            self.add(part(control_len, place, 32, way)?, Source::Program(control))?;
        }
        Ok(if send { Outputs::Plain } else { Outputs::Message { header, vector, count } })
    }

    /// Writes request, buffers and inputs.
    fn finish(self, outputs: Outputs) -> Result<Plan, NotForwarded> {
        let Self { memory, body, mut request, descs, count, sources } = self;
        request.descs = u32::try_from(count).map_err(|_| NotForwarded::GoHome)?;
        let mut at = 0;
        put(body, &mut at, request.as_bytes())?;
        let mut replied = 0;
        for desc in &descs[..count] {
            put(body, &mut at, desc.as_bytes())?;
            replied += padded(desc.len as usize);
        }
        if replied > MAX_FRAME - 64 {
            return Err(NotForwarded::GoHome);
        }
        for (desc, source) in descs[..count].iter().zip(&sources) {
            if desc.direction & direction::IN == 0 {
                continue;
            }
            let len = desc.len as usize;
            let room = body.get_mut(at..at + padded(len)).ok_or(NotForwarded::GoHome)?;
            let (into, padding) = room.split_at_mut(len);
            padding.fill(0);
            match *source {
                Source::Program(addr) => memory.read(addr, into)?,
                Source::Gather { vector, count } => gather(memory, vector, count, into)?,
                Source::Bytes(ref bytes) => {
                    into.copy_from_slice(bytes.get(..len).ok_or(NotForwarded::GoHome)?);
                }
            }
            at += padded(len);
        }
        Ok(Plan { len: at, request, descs, outputs })
    }
}

/// Writes the body of a [`conet_wire::link::kind::CALL`] frame for a call of `class`.
///
/// # Errors
/// [`NotForwarded`] says what happens instead.
pub fn request(
    class: Class,
    number: u32,
    args: &[u64; 6],
    signals: Signals,
    memory: &impl Memory,
    body: &mut [u8],
) -> Result<Plan, NotForwarded> {
    let mut builder = Builder {
        memory,
        body,
        request: Request { nr: number, descs: 0, args: *args, took: 0 },
        descs: [Desc::default(); MAX_DESCS],
        count: 0,
        sources: [Source::Program(0); MAX_DESCS],
    };
    let outputs = match class {
        Class::Forward(buffers) => builder.buffers(buffers, signals).map(|()| Outputs::Plain)?,
        Class::Ioctl => builder.listed(table::IOCTLS, args[1] & 0xffff_ffff, signals)?,
        Class::Fcntl => builder.listed(table::FCNTLS, args[1] & 0xffff_ffff, signals)?,
        Class::Prctl => builder.listed(table::PRCTLS, args[0] & 0xffff_ffff, signals)?,
        Class::Vector { plain, write } => builder.vector(plain, write)?,
        Class::Message { send } => builder.message(send)?,
        Class::Local(_) => return Err(NotForwarded::GoHome),
    };
    builder.finish(outputs)
}

impl<M: Memory> Builder<'_, M> {
    fn listed(
        &mut self,
        list: &'static [(u32, &'static [Buffer])],
        key: u64,
        signals: Signals,
    ) -> Result<Outputs, NotForwarded> {
        let buffers = table::lookup_in(list, key).ok_or(NotForwarded::GoHome)?;
        self.buffers(buffers, signals)?;
        Ok(Outputs::Plain)
    }
}

impl Plan {
    /// A request with buffers that its caller chose, written into `body`.
    ///
    /// For calls whose buffers do not lie in the program's arguments.
    ///
    /// # Errors
    /// [`NotForwarded::GoHome`] when `body` is too short.
    pub fn with(
        request: Request,
        buffers: &[Desc],
        inputs: &[&[u8]],
        body: &mut [u8],
    ) -> Result<Self, NotForwarded> {
        let mut descs = [Desc::default(); MAX_DESCS];
        let room = descs.get_mut(..buffers.len()).ok_or(NotForwarded::GoHome)?;
        room.copy_from_slice(buffers);
        let count = u32::try_from(buffers.len()).map_err(|_| NotForwarded::GoHome)?;
        let request = Request { descs: count, ..request };
        let mut at = 0;
        put(body, &mut at, request.as_bytes())?;
        for desc in buffers {
            put(body, &mut at, desc.as_bytes())?;
        }
        for bytes in inputs {
            put(body, &mut at, bytes)?;
            at = padded(at);
        }
        Ok(Self { len: at, request, descs, outputs: Outputs::Plain })
    }

    /// Stores the outputs of a [`conet_wire::link::kind::REPLY`] body and gives
    /// the call's result, `−EFAULT` if the program's buffers cannot take them.
    ///
    /// # Errors
    /// [`Fault`] when the reply itself is malformed: the peer's fault.
    pub fn store(&self, reply: &[u8], memory: &mut impl Memory) -> Result<i64, Fault> {
        let (head, data) = ReplyHead::read_from_prefix(reply).map_err(|_| Fault)?;
        let result = head.result;
        let mut at = 0;
        let mut parts: [&[u8]; MAX_DESCS] = [&[]; MAX_DESCS];
        for (part, desc) in parts.iter_mut().zip(self.descs()) {
            let len = output_len(desc, result);
            if len > 0 {
                *part = data.get(at..at + len).ok_or(Fault)?;
                at += padded(len);
            }
        }
        let stored = match self.outputs {
            Outputs::Plain => self.store_plain(&parts, memory),
            Outputs::Scatter { vector, count } => scatter(memory, vector, count, parts[0]),
            Outputs::Message { header, vector, count } => {
                self.store_message(&parts, header, (vector, count), result, memory)
            }
        };
        Ok(if stored.is_err() { -i64::from(errno::EFAULT) } else { result })
    }

    fn descs(&self) -> &[Desc] {
        self.descs.get(..self.request.descs as usize).unwrap_or(&[])
    }

    fn store_plain(
        &self,
        parts: &[&[u8]; MAX_DESCS],
        memory: &mut impl Memory,
    ) -> Result<(), Fault> {
        for (part, desc) in parts.iter().zip(self.descs()) {
            if !part.is_empty() && desc.place != PLACE_NONE {
                memory.write(desc.addr, part)?;
            }
        }
        Ok(())
    }

    fn store_message(
        &self,
        parts: &[&[u8]; MAX_DESCS],
        header: u64,
        (vector, count): (u64, u64),
        result: i64,
        memory: &mut impl Memory,
    ) -> Result<(), Fault> {
        if result < 0 {
            return Ok(());
        }
        let mut old = [0u8; 56];
        memory.read(header, &mut old)?;
        let new: &[u8; 56] = parts[0].try_into().map_err(|_| Fault)?;
        let old_word = |at: usize| {
            let mut w = [0; 8];
            w.copy_from_slice(&old[at..at + 8]);
            u64::from_le_bytes(w)
        };
        for (part, desc) in parts.iter().zip(self.descs()).skip(1) {
            if part.is_empty() {
                continue;
            }
            if desc.mode == mode::BY_RESULT {
                scatter(memory, vector, count, part)?;
            } else if desc.place == PLACE_BUFFER && desc.offset == 0 {
                memory.write(old_word(0), part)?;
            } else if desc.place == PLACE_BUFFER && desc.offset == 32 {
                memory.write(old_word(32), part)?;
            }
        }
        memory.write(header.wrapping_add(8), &new[8..12])?;
        memory.write(header.wrapping_add(40), &new[40..52])
    }
}

const fn buffer_place(index: usize) -> u8 {
    #[allow(clippy::cast_possible_truncation, reason = "index < MAX_DESCS")]
    {
        PLACE_BUFFER + index as u8
    }
}

fn first_word(word: u64) -> [u8; 56] {
    let mut bytes = [0; 56];
    bytes[..8].copy_from_slice(&word.to_le_bytes());
    bytes
}

fn put(body: &mut [u8], at: &mut usize, bytes: &[u8]) -> Result<(), NotForwarded> {
    body.get_mut(*at..*at + bytes.len()).ok_or(NotForwarded::GoHome)?.copy_from_slice(bytes);
    *at += bytes.len();
    Ok(())
}

fn segment(memory: &impl Memory, vector: u64, index: u64) -> Result<(u64, usize), Fault> {
    let mut pair = [0u8; 16];
    memory.read(vector.wrapping_add(16 * index), &mut pair)?;
    let pair = u128::from_le_bytes(pair);
    #[allow(clippy::cast_possible_truncation, reason = "the two halves of the pair")]
    Ok((pair as u64, usize::try_from((pair >> 64) as u64).unwrap_or(usize::MAX)))
}

fn gather(memory: &impl Memory, vector: u64, count: u64, into: &mut [u8]) -> Result<(), Fault> {
    let mut rest = into;
    for i in 0..count {
        let (addr, len) = segment(memory, vector, i)?;
        let (here, tail) = rest.split_at_mut(len.min(rest.len()));
        if !here.is_empty() {
            memory.read(addr, here)?;
        }
        rest = tail;
    }
    Ok(())
}

fn scatter(memory: &mut impl Memory, vector: u64, count: u64, from: &[u8]) -> Result<(), Fault> {
    let mut rest = from;
    for i in 0..count {
        let (addr, len) = segment(memory, vector, i)?;
        let (here, tail) = rest.split_at(len.min(rest.len()));
        if !here.is_empty() {
            memory.write(addr, here)?;
        }
        rest = tail;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
