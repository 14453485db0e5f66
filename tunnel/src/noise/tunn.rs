//! One peer's protocol state: its sessions, its handshake, its timers.
//!
//! Invariant: three sessions at most. `next` was answered but not yet used by the
//! peer; `current` seals; `previous` still opens what is on the way.
//!
//! Sources: whitepaper §6; Linux `timers.c`, `noise.c` (`add_new_keypair`).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use x25519_dalek::PublicKey;

use super::crypto::{Key, open_cookie};
use super::handshake::{self, Claim, Identity, Initiated, Remote, put_macs};
use super::session::Session;
use super::{
    COOKIE_AGE, COOKIE_LATENCY, COOKIE_REPLY, DATA_HEADER, INITIATION, INITIATION_GAP, JITTER_MS,
    KEEPALIVE_TIMEOUT, NoiseError, REJECT_AFTER_TIME, REKEY_ATTEMPTS, REKEY_TIMEOUT, RESPONSE, TAG,
    random, u32_at,
};

/// Packets that wait for a session (Linux MAX_STAGED_PACKETS).
const QUEUE: usize = 128;
/// Seconds that TAI64N counts from before 1970, and the leap seconds since then that
/// everybody takes: whitepaper §5.1.
const TAI64_BASE: u64 = (1 << 62) + 10;
/// Bits of a timestamp's nanoseconds that are left out, so that it tells little of
/// the clock: 2^24 ns, as in Linux.
const TIME_ROUNDING: u32 = 24;

/// A data message that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Opened {
    /// Bytes of the packet at `DATA_HEADER`; 0 for a keepalive.
    pub(crate) len: usize,
    /// The peer has used the session that we answered: what waits can be sent.
    pub(crate) confirmed: bool,
}

#[derive(Default)]
struct Timers {
    retry: Option<Instant>,
    keepalive: Option<Instant>,
    another_keepalive: bool,
    silence: Option<Instant>,
    persistent: Option<Instant>,
    forget: Option<Instant>,
}

pub(crate) struct Tunn {
    remote: Remote,
    slot: u32,
    number: u8,
    noise: u64,
    current: Option<Box<Session>>,
    previous: Option<Box<Session>>,
    next: Option<Box<Session>>,
    initiated: Option<Initiated>,
    /// Of the newest initiation that was answered.
    newest_time: [u8; 12],
    answered: Option<Instant>,
    initiated_at: Option<Instant>,
    established: Option<Instant>,
    attempts: u32,
    /// A new handshake was begun because the session is about to end.
    last_minute: bool,
    last_mac1: Option<(u32, [u8; 16])>,
    cookie: Option<(Instant, [u8; 16])>,
    persistent: Option<Duration>,
    timers: Timers,
    wants_initiation: bool,
    wants_keepalive: bool,
    queue: VecDeque<Vec<u8>>,
    lost: u64,
}

impl Tunn {
    /// A peer without sessions. `slot` has 24 bits and is part of our session
    /// numbers; `keepalive` is in seconds.
    pub(crate) fn new(
        us: &Identity,
        public: [u8; 32],
        preshared: Option<Key>,
        keepalive: Option<u16>,
        slot: u32,
        now: Instant,
    ) -> Self {
        let seed = random().unwrap_or_default();
        let mut tunn = Self {
            remote: Remote::new(us, PublicKey::from(public), preshared),
            slot,
            number: seed[0],
            noise: u64::from_le_bytes(seed),
            current: None,
            previous: None,
            next: None,
            initiated: None,
            newest_time: [0; 12],
            answered: None,
            initiated_at: None,
            established: None,
            attempts: 0,
            last_minute: false,
            last_mac1: None,
            cookie: None,
            persistent: None,
            timers: Timers::default(),
            wants_initiation: false,
            wants_keepalive: false,
            queue: VecDeque::new(),
            lost: 0,
        };
        tunn.set_keepalive(keepalive, now);
        tunn
    }

    /// Changes the seconds between keepalives; 0 is none. One is due at once, as
    /// Linux has it when the setting is made.
    pub(crate) fn set_keepalive(&mut self, seconds: Option<u16>, now: Instant) {
        let seconds = seconds.filter(|&seconds| seconds > 0);
        self.persistent = seconds.map(|seconds| Duration::from_secs(seconds.into()));
        self.timers.persistent = self.persistent.map(|_| now);
    }

    /// Changes the preshared key, from the next handshake on.
    pub(crate) fn set_preshared(&mut self, us: &Identity, preshared: Option<Key>) {
        self.remote = Remote::new(us, self.remote.public, preshared);
    }

    /// Whether packets can be sealed.
    pub(crate) fn is_ready(&self, now: Instant) -> bool {
        self.current.as_ref().is_some_and(|session| session.may_send(now))
    }

    /// Seals the packet of `len` bytes, padding included, at `DATA_HEADER` in
    /// `space`, which has `TAG` bytes more. Gives the datagram's length.
    ///
    /// # Errors
    /// [`NoiseError::NoSession`]: [`Tunn::enqueue`] it.
    pub(crate) fn seal(
        &mut self,
        now: Instant,
        space: &mut [u8],
        len: usize,
    ) -> Result<usize, NoiseError> {
        debug_assert!(space.len() >= DATA_HEADER + len + TAG);
        let session = self.current.as_mut().filter(|session| session.may_send(now));
        let session = session.ok_or(NoiseError::NoSession)?;
        let sealed = session.seal(space, len)?;
        let stale = session.is_stale(now);
        self.on_sent(now);
        if len > 0 && self.timers.silence.is_none() {
            self.timers.silence = Some(now + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + self.jitter());
        }
        if stale {
            self.initiate(now, false);
        }
        Ok(sealed)
    }

    /// Keeps a packet for the session to come, and asks for it.
    pub(crate) fn enqueue(&mut self, now: Instant, packet: &[u8]) {
        if self.queue.len() >= QUEUE {
            self.queue.pop_front();
            self.lost += 1;
        }
        self.queue.push_back(packet.to_vec());
        self.initiate(now, false);
    }

    /// A packet that waited for a session, in order.
    pub(crate) fn dequeue(&mut self) -> Option<Vec<u8>> {
        self.queue.pop_front()
    }

    /// Packets that were lost waiting since this was last asked.
    pub(crate) fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }

    /// Opens a data message in place.
    pub(crate) fn open(
        &mut self,
        now: Instant,
        receiver: u32,
        counter: u64,
        datagram: &mut [u8],
    ) -> Result<Opened, NoiseError> {
        let session = self.session_of(receiver).ok_or(NoiseError::NoSession)?;
        let len = session.open(now, counter, datagram)?;
        let confirmed = self.next.as_ref().is_some_and(|next| next.local == receiver);
        if confirmed {
            self.previous = self.current.take();
            self.current = self.next.take();
            self.on_complete(now);
        }
        self.on_received(now);
        if len > 0 {
            match self.timers.keepalive {
                None => self.timers.keepalive = Some(now + KEEPALIVE_TIMEOUT),
                Some(_) => self.timers.another_keepalive = true,
            }
        }
        self.renew_in_time(now);
        Ok(Opened { len, confirmed })
    }

    fn session_of(&mut self, local: u32) -> Option<&mut Session> {
        let sessions = [&mut self.current, &mut self.next, &mut self.previous];
        let sessions = sessions.into_iter().filter_map(|session| session.as_deref_mut());
        sessions.into_iter().find(|session| session.local == local)
    }

    /// Answers an initiation of this peer.
    pub(crate) fn respond(
        &mut self,
        now: Instant,
        claim: Claim,
        out: &mut [u8; RESPONSE],
    ) -> Result<(), NoiseError> {
        let (time, verified) = claim.verify(&self.remote)?;
        let flood = self.answered.is_some_and(|at| now < at + INITIATION_GAP);
        if time <= self.newest_time || flood {
            return Err(NoiseError::Handshake);
        }
        let local = self.new_number();
        let session = handshake::respond(&self.remote, verified, local, now, out)?;
        self.newest_time = time;
        self.answered = Some(now);
        self.next = Some(Box::new(session));
        self.previous = None;
        self.put_macs(now, local, out);
        self.on_derived(now);
        self.on_received(now);
        self.on_sent(now);
        Ok(())
    }

    /// Takes the response to our initiation.
    pub(crate) fn finish(
        &mut self,
        us: &Identity,
        now: Instant,
        message: &[u8; RESPONSE],
    ) -> Result<(), NoiseError> {
        let receiver = u32_at(message, 8);
        let initiated = self.initiated.as_ref().filter(|sent| sent.local == receiver);
        let initiated = initiated.ok_or(NoiseError::NoSession)?;
        let session = initiated.finish(us, &self.remote, now, message)?;
        self.initiated = None;
        self.previous = self.next.take().or_else(|| self.current.take());
        self.current = Some(Box::new(session));
        self.on_derived(now);
        self.on_received(now);
        self.on_complete(now);
        // The peer may use the session only when it has seen us use it.
        self.wants_keepalive = self.queue.is_empty();
        Ok(())
    }

    /// Takes a cookie for the next attempt.
    pub(crate) fn take_cookie(
        &mut self,
        now: Instant,
        message: &[u8; COOKIE_REPLY],
    ) -> Result<(), NoiseError> {
        let (number, mac1) = self.last_mac1.ok_or(NoiseError::Handshake)?;
        if u32_at(message, 4) != number {
            return Err(NoiseError::Handshake);
        }
        let (mut nonce, mut sealed) = ([0; 24], [0; 32]);
        nonce.copy_from_slice(&message[8..32]);
        sealed.copy_from_slice(&message[32..]);
        let cookie = open_cookie(&self.remote.cookie, &nonce, &mac1, &sealed)?;
        self.cookie = Some((now, cookie));
        // A second reply to the same message says nothing new.
        self.last_mac1 = None;
        Ok(())
    }

    /// Time since the newest session was established.
    pub(crate) fn handshake_age(&self, now: Instant) -> Option<Duration> {
        self.established.map(|at| now.saturating_duration_since(at))
    }

    /// When [`Tunn::handle_timeout`] has something to do.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let Timers { retry, keepalive, silence, persistent, forget, .. } = &self.timers;
        [retry, keepalive, silence, persistent, forget].into_iter().flatten().min().copied()
    }

    /// Does what is due; what has to be sent is then asked of
    /// [`Tunn::poll_message`].
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        let due = |timer: &mut Option<Instant>| timer.take_if(|at| *at <= now).is_some();
        if due(&mut self.timers.forget) {
            (self.current, self.previous, self.next) = (None, None, None);
            self.initiated = None;
            self.established = None;
        }
        if due(&mut self.timers.retry) {
            self.retry(now);
        }
        if due(&mut self.timers.keepalive) {
            self.wants_keepalive = true;
            if std::mem::take(&mut self.timers.another_keepalive) {
                self.timers.keepalive = Some(now + KEEPALIVE_TIMEOUT);
            }
        }
        if due(&mut self.timers.silence) {
            self.initiate(now, false);
        }
        if due(&mut self.timers.persistent) {
            self.timers.persistent = self.persistent.map(|every| now + every);
            self.wants_keepalive = true;
        }
    }

    /// Whether [`Tunn::poll_message`] has one.
    pub(crate) fn has_message(&self) -> bool {
        self.wants_initiation || self.wants_keepalive
    }

    /// Forgets what it wanted to send, where there is no way to.
    pub(crate) fn discard_messages(&mut self) {
        (self.wants_initiation, self.wants_keepalive) = (false, false);
    }

    /// Writes a message that is to be sent and gives its length; `unix` is the time of
    /// day.
    pub(crate) fn poll_message(
        &mut self,
        us: &Identity,
        now: Instant,
        unix: Duration,
        out: &mut [u8; INITIATION],
    ) -> Option<usize> {
        if std::mem::take(&mut self.wants_keepalive) {
            if self.is_ready(now) {
                return self.seal(now, out, 0).ok();
            }
            self.initiate(now, false);
        }
        if !std::mem::take(&mut self.wants_initiation) {
            return None;
        }
        let local = self.new_number();
        let made = handshake::initiate(us, &self.remote, local, timestamp(unix), out);
        self.initiated_at = Some(now);
        self.timers.retry = Some(now + REKEY_TIMEOUT + self.jitter());
        // Without randomness the next attempt may have some.
        self.initiated = Some(made.ok()?);
        self.put_macs(now, local, out);
        self.on_sent(now);
        Some(INITIATION)
    }

    /// Asks for a handshake, unless one was begun a moment ago.
    fn initiate(&mut self, now: Instant, is_retry: bool) {
        if !is_retry {
            self.attempts = 0;
        }
        let recent = self.initiated_at.is_some_and(|at| now < at + REKEY_TIMEOUT);
        self.wants_initiation |= !recent;
    }

    fn retry(&mut self, now: Instant) {
        if self.attempts >= REKEY_ATTEMPTS {
            self.timers.keepalive = None;
            self.lost += self.queue.len() as u64;
            self.queue.clear();
            self.timers.forget.get_or_insert(now + 3 * REJECT_AFTER_TIME);
            return;
        }
        self.attempts += 1;
        self.initiate(now, true);
    }

    /// Begins a handshake when the session that we began is about to end.
    fn renew_in_time(&mut self, now: Instant) {
        let limit = REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT;
        let ends = self.current.as_ref().is_some_and(|session| {
            session.initiator && now.saturating_duration_since(session.born) >= limit
        });
        if ends && !self.last_minute {
            self.last_minute = true;
            self.initiate(now, false);
        }
    }

    fn on_sent(&mut self, now: Instant) {
        self.timers.keepalive = None;
        self.timers.another_keepalive = false;
        self.timers.persistent = self.persistent.map(|every| now + every);
    }

    fn on_received(&mut self, now: Instant) {
        self.timers.silence = None;
        self.timers.persistent = self.persistent.map(|every| now + every);
    }

    fn on_derived(&mut self, now: Instant) {
        self.timers.forget = Some(now + 3 * REJECT_AFTER_TIME);
    }

    fn on_complete(&mut self, now: Instant) {
        self.timers.retry = None;
        self.wants_initiation = false;
        self.attempts = 0;
        self.last_minute = false;
        self.established = Some(now);
    }

    fn new_number(&mut self) -> u32 {
        self.number = self.number.wrapping_add(1);
        self.slot << 8 | u32::from(self.number)
    }

    fn put_macs(&mut self, now: Instant, number: u32, message: &mut [u8]) {
        let fresh = COOKIE_AGE - COOKIE_LATENCY;
        self.cookie = self.cookie.filter(|(at, _)| now.saturating_duration_since(*at) < fresh);
        let cookie = self.cookie.as_ref().map(|(_, cookie)| cookie);
        self.last_mac1 = Some((number, put_macs(&self.remote, cookie, message)));
    }

    /// Not secret, only different from peer to peer (splitmix64).
    fn jitter(&mut self) -> Duration {
        self.noise = self.noise.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.noise;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Duration::from_millis((mixed ^ mixed >> 31) % u64::from(JITTER_MS))
    }

    #[cfg(test)]
    pub(super) fn current_mut(&mut self) -> Option<&mut Session> {
        self.current.as_deref_mut()
    }

    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.queue.len()
    }
}

/// TAI64N: seconds and nanoseconds, big endian.
fn timestamp(unix: Duration) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&(TAI64_BASE + unix.as_secs()).to_be_bytes());
    let nanos = unix.subsec_nanos() >> TIME_ROUNDING << TIME_ROUNDING;
    bytes[8..].copy_from_slice(&nanos.to_be_bytes());
    bytes
}
