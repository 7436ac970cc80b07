//! The pure transitions, alone: random walks, and every reachable state of a small cluster.

use std::collections::{BTreeSet, VecDeque};

use proptest::prelude::*;

use crate::transitions::{Event, Superseded, first, in_the_way, step, wanted_from};
use crate::*;

const ID: LockId = LockId::Domain(1);

fn node(slot: Slot) -> NodeId {
    NodeId { slot, incarnation: 1 }
}

fn unheld() -> LockBlock {
    LockBlock::unheld(7, ID, LockValue::default())
}

fn slot_block(slot: Slot, ended: Option<bool>) -> SlotBlock {
    SlotBlock {
        volume: 7,
        slot,
        seq: 2 + u64::from(ended.is_some()),
        nonce: 0,
        state: if ended.is_some() { SlotState::Free } else { SlotState::Live },
        incarnation: 1,
        last_ended: u32::from(ended.is_some()),
        clean_ends: u64::from(ended == Some(true)),
        adopter: 0,
        host_name: String::new(),
        address: vec![],
    }
}

fn apply(block: &mut LockBlock, slot: Slot, event: Event, table: &SlotTable) -> Vec<NodeId> {
    match step(block, node(slot), event, table, 1).unwrap() {
        Some(change) => {
            *block = change.block;
            change.granted
        }
        None => vec![],
    }
}

fn release(to: Option<Mode>, open: bool) -> Event {
    Event::Release { to, value: None, open, cleaned: 255 }
}

#[test]
fn waiters_are_served_in_turn_and_readers_together() {
    let table = SlotTable::default();
    let mut b = unheld();
    assert_eq!(apply(&mut b, 0, Event::Request(Mode::Exclusive), &table), [node(0)]);
    for (slot, mode) in
        [(1, Mode::Shared), (2, Mode::Shared), (3, Mode::Exclusive), (4, Mode::Shared), (5, Mode::Exclusive)]
    {
        assert_eq!(apply(&mut b, slot, Event::Request(mode), &table), []);
    }
    assert_eq!(in_the_way(&b, node(2)), Some((Mode::Shared, vec![node(0)])));
    assert_eq!(in_the_way(&b, node(4)), Some((Mode::Exclusive, vec![node(0)])));
    assert_eq!(apply(&mut b, 0, release(Some(Mode::Shared), false), &table), [node(1), node(2)]);
    assert_eq!(wanted_from(&b, node(0), &table), Some(Mode::Exclusive));
    // A new reader does not overtake the writer that waits.
    assert_eq!(apply(&mut b, 6, Event::Request(Mode::Shared), &table), []);
    assert_eq!(apply(&mut b, 1, release(None, false), &table), []);
    assert_eq!(apply(&mut b, 2, release(None, false), &table), []);
    let before = b.tenure;
    assert_eq!(apply(&mut b, 0, release(None, false), &table), [node(3)]);
    assert_eq!((b.previous_tenure, b.tenure), (before, b.seq));
    // The one that stops waiting lets the others through.
    assert_eq!(apply(&mut b, 5, Event::Cancel, &table), []);
    assert_eq!(apply(&mut b, 3, release(None, false), &table), [node(4), node(6)]);
}

#[test]
fn two_holders_that_both_want_more() {
    let table = SlotTable::default();
    let mut b = unheld();
    for mode in [Mode::Shared, Mode::Exclusive] {
        apply(&mut b, 0, Event::Request(mode), &table);
        apply(&mut b, 1, Event::Request(mode), &table);
    }
    assert_eq!(wanted_from(&b, node(0), &table), None, "it is ahead: it keeps what it holds");
    assert_eq!(wanted_from(&b, node(1), &table), Some(Mode::Exclusive));
    assert_eq!(apply(&mut b, 1, release(None, false), &table), [node(0)]);
    assert_eq!(apply(&mut b, 0, release(None, false), &table), [node(1)]);
}

#[test]
fn a_dead_holder_is_dropped_and_remembered() {
    for clean in [false, true] {
        let mut table = SlotTable::default();
        let mut b = unheld();
        apply(&mut b, 0, Event::Request(Mode::Exclusive), &table);
        apply(&mut b, 1, Event::Request(Mode::Shared), &table);
        table.learn(slot_block(0, Some(clean)));
        assert_eq!(step(&b, node(0), release(None, false), &table, 1), Err(Superseded));
        // Any step of anyone serves the queue.
        assert_eq!(apply(&mut b, 2, Event::Request(Mode::Exclusive), &table), [node(1)]);
        assert_eq!(b.grant(node(1)).unwrap().after_crash, !clean);
        // A reader cannot clean up: the next writer is told as well, and after it nobody.
        assert_eq!(apply(&mut b, 1, release(None, false), &table), [node(2)]);
        assert_eq!(b.grant(node(2)).unwrap().after_crash, !clean);
        apply(&mut b, 2, release(None, false), &table);
        apply(&mut b, 1, Event::Request(Mode::Exclusive), &table);
        assert!(!b.grant(node(1)).unwrap().after_crash);
    }
}

#[test]
fn a_crash_that_the_holder_was_not_told_of_is_left_to_the_next() {
    for purged_by_another in [false, true] {
        let mut table = SlotTable::default();
        let mut b = unheld();
        apply(&mut b, 0, Event::Request(Mode::Shared), &table);
        apply(&mut b, 0, release(None, true), &table);
        apply(&mut b, 1, Event::Request(Mode::Exclusive), &table);
        let told = b.crashes;
        assert!(!b.grant(node(1)).unwrap().after_crash);
        table.learn(slot_block(0, Some(false)));
        if purged_by_another {
            apply(&mut b, 2, Event::Request(Mode::Exclusive), &table);
        }
        let end = Event::Release { to: None, value: None, open: false, cleaned: told };
        apply(&mut b, 1, end, &table);
        apply(&mut b, 2, Event::Request(Mode::Exclusive), &table);
        assert!(b.grant(node(2)).unwrap().after_crash);
        let end = Event::Release { to: None, value: None, open: false, cleaned: b.crashes };
        apply(&mut b, 2, end, &table);
        assert_eq!(b.crashes, 0);
    }
}

#[test]
fn open_files_are_told_until_taken_back() {
    let mut table = SlotTable::default();
    let mut b = unheld();
    apply(&mut b, 0, Event::Request(Mode::Shared), &table);
    apply(&mut b, 0, release(None, true), &table);
    apply(&mut b, 1, Event::Request(Mode::Exclusive), &table);
    assert!(b.grant(node(1)).unwrap().open_elsewhere);
    apply(&mut b, 0, Event::ClearOpen, &table);
    assert!(!b.grant(node(1)).unwrap().open_elsewhere);
    assert!(b.entry(node(0)).is_none());
    // Whoever ends with files open leaves orphans behind.
    apply(&mut b, 1, release(None, true), &table);
    table.learn(slot_block(1, Some(true)));
    apply(&mut b, 0, Event::Request(Mode::Exclusive), &table);
    let grant = b.grant(node(0)).unwrap();
    assert!(!grant.open_elsewhere && grant.after_crash);
}

#[test]
fn a_value_is_set_by_exclusive_holders_only() {
    let table = SlotTable::default();
    let mut b = first(7, ID, node(0), 40, 1);
    assert_eq!(b.check(), Ok(()));
    assert_eq!(b.value, LockValue { root: 40, next_local: 0, version: 0 });
    let value = LockValue { root: 1, next_local: 2, version: 0 };
    apply(&mut b, 0, Event::Release { to: Some(Mode::Shared), value: Some(value), open: false, cleaned: 255 }, &table);
    assert_eq!(b.value, value);
    let other = LockValue { root: 9, next_local: 9, version: 0 };
    apply(&mut b, 0, Event::SetValue(other), &table);
    apply(&mut b, 0, Event::Release { to: None, value: Some(other), open: false, cleaned: 255 }, &table);
    assert_eq!(b.value, value);
}

fn events() -> Vec<Event> {
    vec![
        Event::Request(Mode::Shared),
        Event::Request(Mode::Exclusive),
        release(None, false),
        release(None, true),
        release(Some(Mode::Shared), false),
        Event::Cancel,
        Event::GiveBack { to: None, open: false },
        Event::ClearOpen,
    ]
}

/// Every state that three nodes can bring a lock into, apart from its counters: `step` checks I4 and the order of
/// waiters on each, and here no state may leave a waiter behind whom nobody is in the way of.
#[test]
fn every_state_of_three_nodes() {
    let table = SlotTable::default();
    let key = |b: &LockBlock| LockBlock { seq: 9, tenure: 0, previous_tenure: 0, ..b.clone() }.encode(512);
    let mut seen = BTreeSet::from([key(&unheld())]);
    let mut queue = VecDeque::from([unheld()]);
    while let Some(b) = queue.pop_front() {
        for slot in 0..3 {
            if b.entry(node(slot)).is_some_and(|e| e.wanted.is_some()) {
                let (_, holders) = in_the_way(&b, node(slot)).unwrap();
                let itself = wanted_from(&b, node(slot), &table).is_some();
                assert!(itself || !holders.is_empty(), "nobody to ask, but waiting: {b:?}");
            }
            for event in events() {
                let Some(change) = step(&b, node(slot), event, &table, 0).unwrap() else { continue };
                if seen.insert(key(&change.block)) {
                    queue.push_back(change.block);
                }
            }
        }
    }
    assert!(seen.len() > 300, "{}", seen.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Random walks with nodes that end: counters only grow, encoding is faithful, entries of the ended go at the
    /// next step, and nobody is granted twice or while in conflict (checked by `step`).
    #[test]
    fn random_walks(steps in prop::collection::vec((0..8u16, 0..8usize, 0..40u8), 1..120)) {
        let mut table = SlotTable::default();
        let mut b = unheld();
        let events = events();
        for (slot, event, end) in steps {
            if end == 0 {
                table.learn(slot_block(slot, Some(event % 2 == 0)));
                continue;
            }
            let change = match step(&b, node(slot), events[event], &table, 3) {
                Err(Superseded) => { prop_assert!(table.ended(node(slot))); continue }
                Ok(change) => change,
            };
            let Some(change) = change else { continue };
            let new = change.block;
            prop_assert_eq!(new.seq, b.seq + 1);
            let exclusive = change.granted.iter().any(|n| new.held_by(*n) == Some(Mode::Exclusive));
            prop_assert_eq!(new.tenure, if exclusive { new.seq } else { b.tenure });
            prop_assert_eq!(new.previous_tenure, if exclusive { b.tenure } else { b.previous_tenure });
            for granted in &change.granted {
                prop_assert!(!table.ended(*granted));
                prop_assert!(new.held_by(*granted) > b.held_by(*granted));
            }
            let dead = new.entries.iter().any(|(s, e)| table.ended(NodeId { slot: *s, incarnation: e.incarnation }));
            prop_assert!(!dead);
            prop_assert_eq!(LockBlock::decode(&new.encode(512), 7, ID), Ok(new.clone()));
            b = new;
        }
    }
}

/// Found by the model check: the incarnation of a dead adopter was forgotten with its recoverer, and given out again.
#[test]
fn an_adopters_incarnation_is_not_used_again_whoever_recovers() {
    use crate::transitions::{adopting, claimed, recovered, recovering};
    let adopting = adopting(&slot_block(0, None), 1);
    assert_eq!(adopting.state, SlotState::Adopting { next: 2 });
    let by_one = recovering(&adopting, node(1), 2);
    // It dies; another one goes on.
    let by_two = recovering(&by_one, node(2), 3);
    let free = recovered(&by_one, &by_two, 4);
    assert_eq!((free.state, free.last_ended), (SlotState::Free, 2));
    assert_eq!(claimed(&free, 5).incarnation, 3);
}
