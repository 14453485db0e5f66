//! A server against clients that do not keep to the rules.

use super::*;
use crate::session::payload::Data;
use alloc::vec;
use proptest::prelude::*;

const LIMITS: Limits = Limits {
    datagram: 1400,
    slots: 4,
    queued: 8,
    payload: 4096,
    assembling: 8192,
    unanswered: 1 << 20,
    unanswered_by_all: 1 << 20,
    keepalive: core::time::Duration::from_secs(1),
    dead_after: core::time::Duration::from_secs(5),
    rekey_after: core::time::Duration::from_secs(120),
    handshake_retry: core::time::Duration::from_millis(250),
};

const PEER: PublicKey = PublicKey([7; 32]);

fn head(slot: u16, sequence: u64, total: u32) -> SlotHead {
    SlotHead { slot, sequence, total }
}

fn said(server: &mut Server) -> Vec<Frame<'static>> {
    let mut buf = alloc::vec![0; LIMITS.datagram];
    let mut packet = Packet::new(&mut buf, LIMITS.datagram);
    for lane in Lane::ALL {
        assert!(server.emit(lane, &mut packet));
    }
    let length = packet.payload_len();
    let bytes: &'static [u8] = buf[conet_wire::session::HEADER..][..length].to_vec().leak();
    conet_wire::session::frame::Frames::new(bytes).map(|frame| frame.expect("ours")).collect()
}

/// A server, and what it asks for after each input.
struct Rig(Server);

impl Rig {
    fn new(limits: Limits) -> Self {
        Self(Server::new(limits))
    }

    fn asked(&mut self) -> Option<Event> {
        let asked = self.0.poll_event(PEER);
        assert!(self.0.asked.is_empty());
        asked
    }

    fn on_call(&mut self, head: SlotHead, data: &[u8]) -> Option<Event> {
        self.0.on_call(head, Marks::default(), data);
        self.asked()
    }

    fn on_piece(&mut self, head: SlotHead, at: usize, data: &[u8]) -> (bool, Option<Event>) {
        let taken = self.0.on_piece(head, Lane::Calls, at, Data::Here(data));
        (taken, self.asked())
    }

    fn on_cancel(&mut self, slot: u16, sequence: u64) -> Option<Event> {
        self.0.on_cancel(slot, sequence);
        self.asked()
    }
}

impl core::ops::Deref for Rig {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.0
    }
}

impl core::ops::DerefMut for Rig {
    fn deref_mut(&mut self) -> &mut Server {
        &mut self.0
    }
}

#[test]
fn slots_beyond_the_limit_do_not_exist() {
    let mut server = Rig::new(LIMITS);
    assert_eq!(server.on_call(head(4, 1, 0), &[]), None);
    assert_eq!(server.on_piece(head(u16::MAX, 1, 64), 0, &[0; 64]), (false, None));
    assert_eq!(server.on_cancel(4, 1), None);
    assert!(server.slots.len() <= LIMITS.slots);
    assert_eq!(server.executions, 0);
}

#[test]
fn calls_in_part_take_no_more_than_the_budget() {
    let mut server = Rig::new(LIMITS);
    assert_eq!(server.on_piece(head(0, 1, 4097), 0, &[0; 64]), (true, None), "too long");
    assert!(matches!(said(&mut server)[..], [Frame::Reply { status: Status::Refused, .. }]));
    assert!(server.on_piece(head(0, 2, 4096), 0, &[0; 64]).0);
    assert!(server.on_piece(head(1, 1, 4096), 0, &[0; 64]).0);
    assert!(!server.on_piece(head(2, 1, 64), 0, &[0; 64]).0, "budget");
    assert_eq!(server.refused_pieces, 1);
    // A newer call of the same slot gives the older one's memory back.
    assert!(server.on_piece(head(0, 3, 128), 0, &[0; 64]).0);
    assert_eq!(server.grants.used(), 4096 + 128);
    assert!(server.on_piece(head(0, 2, 4096), 64, &[0; 64]).0, "dropped, and not asked for again");
    assert_eq!(server.grants.used(), 4096 + 128);
    // So does completion, and so does a cancel.
    let (taken, asked) = server.on_piece(head(0, 3, 128), 64, &[1; 64]);
    assert!(taken && matches!(asked, Some(Event::Call { payload, .. }) if payload.len() == 128));
    assert_eq!(server.on_cancel(1, 1), None);
    assert_eq!(server.grants.used(), 0);
}

#[test]
fn the_total_may_not_change_on_the_way() {
    let mut server = Rig::new(LIMITS);
    assert!(server.on_piece(head(0, 1, 4096), 0, &[0; 64]).0);
    assert_eq!(server.on_piece(head(0, 1, 64), 0, &[0; 64]), (false, None));
    assert_eq!(server.on_piece(head(0, 1, 4096), 65, &[0; 64]), (false, None));
    assert_eq!(server.grants.used(), 4096);
}

#[test]
fn a_newer_call_does_not_push_out_a_running_one() {
    let mut server = Rig::new(LIMITS);
    let Some(Event::Call { id, .. }) = server.on_call(head(0, 1, 0), &[]) else { panic!("new") };
    assert_eq!(server.on_call(head(0, 2, 0), &[]), None);
    assert_eq!(server.on_piece(head(0, 2, 64), 0, &[0; 64]), (false, None));
    assert!(said(&mut server).is_empty());
    assert_eq!(server.reply(id, Status::Done, vec![0; 4097]), Err(ReplyError::TooLong));
    assert_eq!(server.reply(id, Status::Done, vec![5]), Ok(()));
    assert_eq!(server.reply(id, Status::Done, vec![5]), Err(ReplyError::Stale));
    let reply = Frame::Reply { head: head(0, 1, 1), status: Status::Done, data: &[5] };
    assert_eq!(said(&mut server), [reply]);
    assert_eq!(server.on_call(head(0, 1, 0), &[]), None);
    assert_eq!(said(&mut server), [reply], "the same again");
}

#[test]
fn a_cancel_that_comes_first_keeps_the_call_from_running() {
    let mut server = Rig::new(LIMITS);
    assert_eq!(server.on_cancel(0, 1), None);
    assert_eq!(server.on_call(head(0, 1, 0), &[]), None);
    let cancelled = Frame::Reply { head: head(0, 1, 0), status: Status::Cancelled, data: &[] };
    assert_eq!(said(&mut server), [cancelled]);
    assert_eq!(server.executions, 0);
}

/// Found by the property below: the memory of the newer call was lost count of.
#[test]
fn cancelling_an_ended_call_leaves_a_newer_one_alone() {
    let mut server = Rig::new(LIMITS);
    assert_eq!(server.on_cancel(0, 1), None);
    assert!(server.on_piece(head(0, 2, 128), 0, &[0; 64]).0);
    assert_eq!(server.on_cancel(0, 1), None);
    assert!(matches!(
        server.on_piece(head(0, 2, 128), 64, &[0; 64]),
        (true, Some(Event::Call { .. }))
    ));
    assert_eq!(server.grants.used(), 0);
}

#[test]
fn a_reply_to_an_earlier_life_goes_nowhere() {
    let mut server = Rig::new(LIMITS);
    server.on_peer_restart(7);
    let Some(Event::Call { id: old, .. }) = server.on_call(head(0, 1, 0), &[]) else {
        panic!("new")
    };
    server.on_peer_restart(8);
    let Some(Event::Call { id: new, .. }) = server.on_call(head(0, 1, 0), &[]) else {
        panic!("new")
    };
    assert_eq!(server.reply(old, Status::Done, vec![1]), Err(ReplyError::Stale));
    assert_eq!(server.reply(new, Status::Done, vec![2]), Ok(()));
}

proptest! {
    #[test]
    fn memory_stays_bounded_and_every_sequence_runs_once(
        steps in prop::collection::vec((0u8..5, 0u16..6, 0u64..6, 0u32..70, 0usize..70), 1..300),
    ) {
        let mut server = Rig::new(LIMITS);
        let mut ran = std::collections::HashSet::new();
        let mut running = Vec::new();
        for (step, slot, sequence, units, at) in steps {
            let total = units * 64;
            let asked = match step {
                0 => server.on_call(head(slot, sequence, total), &vec![0; total as usize]),
                1 | 2 => server.on_piece(head(slot, sequence, total), at * 64, &[0; 64]).1,
                3 => server.on_cancel(slot, sequence),
                _ => {
                    if let Some(id) = running.pop() {
                        prop_assert_eq!(server.reply(id, Status::Done, vec![0; at * 58]), Ok(()));
                    }
                    None
                }
            };
            if let Some(Event::Call { id, .. }) = asked {
                prop_assert!(ran.insert(id), "{:?} ran twice", id);
                running.push(id);
            }
            prop_assert!(server.grants.used() <= LIMITS.assembling);
            prop_assert!(server.slots.len() <= LIMITS.slots);
            let said: usize = server.outbox.len();
            prop_assert!(said <= LIMITS.slots);
            let held: usize = server.slots.iter().map(|slot| match &slot.state {
                State::Assembling { assembly, .. } => assembly.granted(),
                _ => 0,
            }).sum();
            prop_assert_eq!(held, server.grants.used());
        }
    }
}

/// Each of many calls waits for the one before it, and the first is cancelled: they all end,
/// by a loop. A recursion went as deep as the row is long, which its client chooses.
#[test]
fn a_row_as_long_as_there_are_slots_ends_without_recursion() {
    let limits = Limits { slots: 1 << 14, ..LIMITS };
    let mut server = Rig::new(limits);
    server.set_lanes(true);
    let last = u16::try_from(limits.slots - 1).expect("few enough");
    // From the end, so that none is told at once that the one before it has ended.
    for slot in (1..=last).rev() {
        let after = Some(After { slot: slot - 1, sequence: 1, anyhow: true });
        server.0.on_call(head(slot, 1, 1), Marks { lane: Lane::Calls, after }, b"x");
    }
    let waits = |slot: &&Slot| matches!(slot.state, State::Waiting { .. });
    assert_eq!(server.slots.iter().filter(waits).count(), usize::from(last));
    assert_eq!(server.on_cancel(0, 1), None);
    assert_eq!(server.slots.iter().filter(waits).count(), 0);
    assert_eq!(server.on_call(head(last, 2, 1), b"y").map(|_| ()), Some(()), "its slot is free");
}

/// Nothing can ever run there, so it would have waited until somebody cancelled it.
#[test]
fn a_call_that_waits_for_a_slot_that_cannot_be_is_aborted() {
    let mut server = Rig::new(LIMITS);
    server.set_lanes(true);
    let slot = u16::try_from(LIMITS.slots).expect("few");
    let after = Some(After { slot, sequence: 1, anyhow: true });
    server.0.on_call(head(0, 1, 1), Marks { lane: Lane::Calls, after }, b"x");
    let said = said(&mut server);
    assert!(matches!(said[..], [Frame::Reply { status: Status::Aborted, .. }]), "{said:?}");
}
