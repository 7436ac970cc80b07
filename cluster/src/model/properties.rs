//! What must hold in every state.

use stateright::Property;

use super::device::Record;
use super::world::{Stage, World};
use super::{Broken, Config};
use crate::transitions::{conflicts, is_mine};

pub(super) fn all() -> Vec<Property<Config>> {
    vec![
        Property::always("I4: one writer", |_, w: &World| one_writer(w)),
        Property::always("a lock is held by the living only", |_, w: &World| held_by_the_living(w)),
        Property::always("memory never says more than the disk", |_, w: &World| memory_within_disk(w)),
        Property::always("nothing is used before it was replayed", |_, w: &World| replayed_before_use(w)),
        Property::always("one replay at a time", |_, w: &World| one_replay(w)),
        Property::always("no wake-up is lost", no_lost_wake_up),
        Property::always("I12: no write of an ended incarnation takes effect", |_, w| intact(w, Broken::EndedWrite)),
        Property::always("I8: nothing goes backwards", |_, w| intact(w, Broken::Backwards)),
        Property::always("I8: no incarnation comes back", |_, w| intact(w, Broken::IncarnationReused)),
        Property::always("I5: no record of an earlier tenure is replayed", |_, w| intact(w, Broken::OldRecordReplayed)),
        Property::always("I11: what was not in its place is replayed", |_, w| intact(w, Broken::RecordNotReplayed)),
        Property::always("I9: what is over has no effect any more", nothing_stray),
        Property::always("who claimed all slots is alone", |_, w: &World| claimer_alone(w)),
        Property::sometimes("a lock goes from node to node", |_, w: &World| w.ghost.handovers),
        Property::sometimes("a node is recovered", |_, w: &World| w.ghost.recovered),
        Property::sometimes("a slot is adopted", |_, w: &World| w.ghost.adopted),
        Property::sometimes("an unknown outcome was a success", |_, w: &World| w.ghost.unknown_done),
        Property::sometimes("a host has all slots", |_, w: &World| w.ghost.alone),
    ]
}

fn intact(w: &World, broken: Broken) -> bool {
    w.ghost.broken != Some(broken)
}

fn one_writer(w: &World) -> bool {
    let locks = w.dev.locks.len();
    (0..locks).all(|l| {
        let held: Vec<_> = w.hosts.iter().filter_map(|h| h.locks[l].held).collect();
        held.len() < 2 || held.iter().all(|m| !conflicts(*m, *m))
    })
}

/// The hosts that hold something, and which lock.
fn holds(w: &World) -> impl Iterator<Item = (&super::world::Host, usize)> {
    w.hosts.iter().flat_map(|h| (0..h.locks.len()).filter(|l| h.locks[*l].held.is_some()).map(move |l| (h, l)))
}

fn held_by_the_living(w: &World) -> bool {
    holds(w).all(|(h, _)| is_mine(&w.dev.slots[usize::from(h.me.slot)], h.me))
}

fn memory_within_disk(w: &World) -> bool {
    holds(w).all(|(h, l)| w.dev.locks[l].held_by(h.me) >= h.locks[l].held)
}

fn replayed_before_use(w: &World) -> bool {
    holds(w).all(|(h, l)| w.ghost.dirty.get(&l).is_none_or(|d| *d == h.me))
}

fn one_replay(w: &World) -> bool {
    use super::world::Phase::{AdoptReplay, Replay};
    let replaying = |h: &super::world::Host| {
        let op = h.slot_op.as_ref()?;
        (h.stage != Stage::Out && matches!(op.phase, AdoptReplay | Replay)).then_some(op.judged.slot)
    };
    let all: Vec<_> = w.hosts.iter().filter_map(replaying).collect();
    all.iter().enumerate().all(|(i, slot)| !all[..i].contains(slot))
}

/// When an operation of a living host is over, nothing that was submitted for it can be carried out later; while it is not, an earlier
/// attempt of it may be. The request of a wait that was given up can, and is settled.
fn nothing_stray(cfg: &Config, w: &World) -> bool {
    let open = w.dev.in_flight.iter().filter(|o| {
        let h = &w.hosts[o.host];
        let over = match &o.new {
            Record::Lock(l, _) => h.locks[*l].op.is_none(),
            Record::Slot(_) => h.slot_op.is_none(),
        };
        h.stage != Stage::Out && h.me == o.by && over
    });
    cfg.abandons > 0 || open.into_iter().all(|o| w.dev.found(&o.expect) != o.expect)
}

fn claimer_alone(w: &World) -> bool {
    let Some(claimer) = (0..w.hosts.len()).find(|h| w.alone(*h)) else { return true };
    w.hosts.iter().enumerate().all(|(i, h)| i == claimer || matches!(h.stage, Stage::Out | Stage::Joining))
        && w.hosts.iter().enumerate().all(|(i, h)| {
            i == claimer || h.slot_op.as_ref().is_none_or(|op| op.phase != super::world::Phase::AdoptReplay)
        })
}

/// Where nothing goes on by itself any more, nobody waits.
fn no_lost_wake_up(cfg: &Config, w: &World) -> bool {
    let waits = w.hosts.iter().any(|h| h.stage == Stage::Live && h.locks.iter().any(|l| l.waiting.is_some()));
    if !waits || w.ghost.broken.is_some() {
        return true;
    }
    let mut actions = Vec::new();
    w.actions(cfg, &mut actions);
    // Whether a cached block is to be read again changes nothing by itself.
    let fresh = |w: &World| {
        let mut w = w.clone();
        w.hosts.iter_mut().flat_map(|h| &mut h.locks).for_each(|l| l.stale = false);
        w
    };
    let now = fresh(w);
    actions.iter().any(|a| a.is_progress() && w.next(cfg, a).is_some_and(|next| fresh(&next) != now))
}
