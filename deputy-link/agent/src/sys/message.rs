//! Messages with descriptors and process ids beside them (man 7 unix, man 3 cmsg).

use super::call::{plain, raw};
use linux_raw_sys::general as nr;

const SOL_SOCKET: u32 = 1;
const SCM_RIGHTS: u32 = 1;
const SCM_CREDENTIALS: u32 = 2;
const SO_PASSCRED: u64 = 16;
const SO_RCVTIMEO: u64 = 20;
const MSG_CMSG_CLOEXEC: u32 = 0x4000_0000;
const MSG_NOSIGNAL: u64 = 0x4000;
/// Of `struct cmsghdr`.
const HEAD: usize = 16;
/// Room for two descriptors and one `struct ucred`.
const CONTROL: usize = 64;

/// `struct msghdr` with its one `struct iovec` behind.
#[repr(C)]
struct Header {
    name: u64,
    name_len: u64,
    vectors: u64,
    count: u64,
    control: u64,
    control_len: u64,
    flags: u64,
    at: u64,
    len: u64,
}

impl Header {
    const fn empty() -> Self {
        let none = 0;
        Self {
            name: none,
            name_len: none,
            vectors: none,
            count: 1,
            control: none,
            control_len: none,
            flags: none,
            at: none,
            len: none,
        }
    }

    fn prepare(&mut self, bytes: (u64, usize), control: (u64, usize)) {
        (self.at, self.len) = (bytes.0, bytes.1 as u64);
        self.vectors = core::ptr::from_ref(&self.at) as u64;
        (self.control, self.control_len) = (control.0, control.1 as u64);
    }
}

/// What came with a message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beside {
    /// Length of the message, or −errno.
    pub(crate) len: i64,
    /// Descriptors, −1 where none came.
    pub(crate) fds: [i32; 2],
    /// The sender's process id, 0 where it is not told.
    pub(crate) pid: i32,
}

#[repr(C, align(8))]
struct Control([u8; CONTROL]);

impl Control {
    fn put(&mut self, at: usize, kind: u32, words: &[i32]) -> usize {
        let len = HEAD + 4 * words.len();
        let bytes = &mut self.0[at..];
        bytes[..8].copy_from_slice(&(len as u64).to_le_bytes());
        bytes[8..12].copy_from_slice(&SOL_SOCKET.to_le_bytes());
        bytes[12..16].copy_from_slice(&kind.to_le_bytes());
        for (room, word) in bytes[HEAD..len].as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *room = word.to_le_bytes();
        }
        at + len.next_multiple_of(8)
    }

    /// Reads what the kernel has put into the first `len` bytes.
    fn read(&self, len: usize, beside: &mut Beside) {
        let mut at = 0;
        while let Some(rest) = self.0[..len.min(CONTROL)].get(at..)
            && rest.len() >= HEAD
        {
            let word =
                |i: usize| u32::from_le_bytes([rest[i], rest[i + 1], rest[i + 2], rest[i + 3]]);
            let total = (word(0) as usize).clamp(HEAD, rest.len());
            let mut data = rest[HEAD..total].as_chunks::<4>().0.iter().copied();
            match word(12) {
                SCM_RIGHTS => {
                    for (slot, fd) in beside.fds.iter_mut().zip(data) {
                        *slot = i32::from_le_bytes(fd);
                    }
                }
                SCM_CREDENTIALS => beside.pid = data.next().map_or(0, i32::from_le_bytes),
                _ => {}
            }
            at += total.next_multiple_of(8);
        }
    }
}

/// `recvmsg(2)`, made by `call`.
pub(crate) fn receive_message(
    number: i32,
    into: &mut [u8],
    flags: u32,
    call: impl Fn(u32, &[u64; 6]) -> i64,
) -> Beside {
    let mut control = Control([0; CONTROL]);
    let mut header = Header::empty();
    header
        .prepare((into.as_mut_ptr() as u64, into.len()), (control.0.as_mut_ptr() as u64, CONTROL));
    let at = core::ptr::from_mut(&mut header) as u64;
    let fd = u64::from(number.cast_unsigned());
    let len = call(nr::__NR_recvmsg, &[fd, at, u64::from(flags | MSG_CMSG_CLOEXEC), 0, 0, 0]);
    let mut beside = Beside { len, fds: [-1; 2], pid: 0 };
    if len >= 0 {
        // The kernel has written it behind the compiler's back.
        let filled = core::hint::black_box(&header).control_len;
        let control = core::hint::black_box(&control);
        control.read(usize::try_from(filled).unwrap_or(CONTROL), &mut beside);
    }
    beside
}

/// `recvmsg(2)`, ungated.
pub(crate) fn receive_beside(number: i32, into: &mut [u8], flags: u32) -> Beside {
    receive_message(number, into, flags, |number, args| plain(number, *args))
}

/// `sendmsg(2)` with descriptors, and the id of the process whom it concerns where that
/// is given: for a process that may name others, as the first of a namespace may.
pub(crate) fn send_beside(number: i32, bytes: &[u8], fds: &[i32], pid: Option<i32>) -> i64 {
    let mut control = Control([0; CONTROL]);
    let mut len = 0;
    if !fds.is_empty() {
        len = control.put(len, SCM_RIGHTS, fds);
    }
    if let Some(pid) = pid {
        len = control.put(len, SCM_CREDENTIALS, &[pid, 0, 0]);
    }
    let mut header = Header::empty();
    header.prepare((bytes.as_ptr() as u64, bytes.len()), (control.0.as_ptr() as u64, len));
    let fd = u64::from(number.cast_unsigned());
    let args = [fd, core::ptr::from_ref(&header) as u64, MSG_NOSIGNAL, 0, 0, 0];
    // SAFETY: the header names `bytes` and the control data, both readable.
    unsafe { raw(nr::__NR_sendmsg, args) }
}

/// A pair of connected sockets that keep message boundaries: near and far.
pub(crate) fn socket_pair() -> Option<[i32; 2]> {
    const AF_UNIX: u64 = 1;
    const SOCK_SEQPACKET_CLOEXEC: u64 = 5 | 0x8_0000;
    let mut pair = [-1i32; 2];
    let at = pair.as_mut_ptr() as u64;
    // SAFETY: the kernel writes two ints.
    let result =
        unsafe { raw(nr::__NR_socketpair, [AF_UNIX, SOCK_SEQPACKET_CLOEXEC, 0, at, 0, 0]) };
    (result == 0).then_some(core::hint::black_box(pair))
}

fn set_option(number: i32, option: u64, value: &[u8]) {
    let fd = u64::from(number.cast_unsigned());
    let (at, len) = (value.as_ptr() as u64, value.len() as u64);
    // SAFETY: the kernel reads `len` bytes.
    unsafe { raw(nr::__NR_setsockopt, [fd, u64::from(SOL_SOCKET), option, at, len, 0]) };
}

/// Has the kernel tell who sends to this socket.
pub(crate) fn ask_who_sends(number: i32) {
    set_option(number, SO_PASSCRED, &1u32.to_le_bytes());
}

/// Has receiving on this socket end with EAGAIN after so many seconds.
pub(crate) fn limit_receiving(number: i32, seconds: u64) {
    let mut time = [0; 16];
    time[..8].copy_from_slice(&seconds.to_le_bytes());
    set_option(number, SO_RCVTIMEO, &time);
}
