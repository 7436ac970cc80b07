//! How a lock block moves: one pure function, the same for nodes, tests and model checks.
//!
//! [`step`] applies what a node wants to a block and returns the block to be written, if anything changes. Every step
//! first drops the entries of ended incarnations and last serves the waiters in the order of their tickets: all shared
//! ones up to the first exclusive one, or one exclusive one. So a release hands the lock over, a request is granted at
//! once where nobody is in the way or ahead, and any waiter's step gets a queue going again whose head had died.
//! `docs/LOCKS.md` has the state table.

use crate::format::{Entry, LockBlock, SlotBlock, SlotState};
use crate::table::{Life, SlotTable};
use crate::{Incarnation, LockValue, Mode, NodeId, Slot};

/// What a node wants to do to a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Hold it in this mode, or wait for it. Keeps an earlier ticket.
    Request(Mode),
    /// Lower to `to`, or give up. `cleaned`: the number of crashes that the holder was told of and saw to; those that
    /// became known later are left to the next one.
    Release { to: Option<Mode>, value: Option<LockValue>, open: bool, cleaned: u8 },
    /// Wait no longer.
    Cancel,
    /// Wait no longer and lower to `to` what was granted unasked; nobody saw to leftovers of a crash.
    GiveBack { to: Option<Mode>, open: bool },
    /// Take back that files are open.
    ClearOpen,
    /// An exclusive holder sets the value.
    SetValue(LockValue),
}

/// A block to be written in place of the one it was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub block: LockBlock,
    /// Who gets the lock by it, the actor included.
    pub granted: Vec<NodeId>,
}

/// The slot has gone on to a later incarnation: the actor has lapsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superseded;

pub fn conflicts(a: Mode, b: Mode) -> bool {
    a == Mode::Exclusive || b == Mode::Exclusive
}

/// What becomes of `block` when `me` does `event`; `None` if nothing changes.
///
/// # Panics
/// If the result breaks an invariant: that is a bug here, as blocks that break one are never decoded.
pub fn step(
    block: &LockBlock,
    me: NodeId,
    event: Event,
    table: &SlotTable,
    nonce: u64,
) -> Result<Option<Change>, Superseded> {
    let mut b = block.clone();
    purge(&mut b, table);
    let fresh_crashes = b.crashes - block.crashes;
    let old = b.entries.get(&me.slot).copied();
    if old.is_some_and(|e| e.incarnation > me.incarnation) || table.ended(me) {
        return Err(Superseded);
    }
    let fresh = Entry { incarnation: me.incarnation, held: None, wanted: None, ticket: 0, open: false };
    let mut e = old.filter(|e| e.incarnation == me.incarnation).unwrap_or(fresh);
    match event {
        Event::Request(mode) => {
            if e.held < Some(mode) {
                if e.wanted.is_none() {
                    e.ticket = u8::MAX;
                }
                e.wanted = Some(mode);
            }
        }
        Event::Release { to, value, open, cleaned } => {
            if e.held == Some(Mode::Exclusive) && to != Some(Mode::Exclusive) {
                b.value = value.unwrap_or(b.value);
                b.crashes = if cleaned >= b.crashes - fresh_crashes { fresh_crashes } else { b.crashes };
            }
            if e.held.is_some() {
                e.held = e.held.min(to);
                e.open = open && e.held.is_none();
            }
        }
        Event::Cancel => {
            e.wanted = None;
            e.ticket = 0;
        }
        Event::GiveBack { to, open } => {
            e.wanted = None;
            e.ticket = 0;
            if e.held.is_some() {
                e.held = e.held.min(to);
                e.open = open && e.held.is_none();
            }
        }
        Event::ClearOpen => e.open = false,
        Event::SetValue(value) => {
            if e.held == Some(Mode::Exclusive) {
                b.value = value;
            }
        }
    }
    if e.held.is_none() && e.wanted.is_none() && !e.open {
        b.entries.remove(&me.slot);
    } else {
        b.entries.insert(me.slot, e);
    }
    let granted = serve(&mut b);
    renumber(&mut b);
    if b == *block {
        return Ok(None);
    }
    b.seq += 1;
    b.nonce = nonce;
    if let Err(broken) = b.check() {
        panic!("lock {}: step {event:?} of {me} breaks an invariant: {broken}", b.id);
    }
    assert!(b.seq == block.seq + 1 && b.tenure >= block.tenure, "I8: {} moves backwards", b.id);
    Ok(Some(Change { block: b, granted }))
}

/// The block of a lock that had none: `me` holds it exclusively.
pub fn first(volume: u64, id: crate::LockId, me: NodeId, root: u64, nonce: u64) -> LockBlock {
    let mut b = LockBlock::unheld(volume, id, LockValue { root, next_local: 0, version: 0 });
    let e = Entry { incarnation: me.incarnation, held: Some(Mode::Exclusive), wanted: None, ticket: 0, open: false };
    b.entries.insert(me.slot, e);
    b.tenure = b.seq;
    b.nonce = nonce;
    b
}

/// Ending an incarnation freed its locks; here its entries go.
fn purge(b: &mut LockBlock, table: &SlotTable) {
    let mut crashes = b.crashes;
    b.entries.retain(|slot, e| {
        let life = table.life(NodeId { slot: *slot, incarnation: e.incarnation });
        // It may have had unnamed files open, in whatever mode it held the lock.
        let died = life == Life::EndedCrash && e.held.is_some();
        // Orphans that it kept open are nobody's now, however it ended.
        let orphans = life != Life::Current && e.open;
        crashes = crashes.saturating_add(u8::from(died || orphans));
        life == Life::Current
    });
    b.crashes = crashes;
}

/// Waiters in the order in which they are served.
fn queue(b: &LockBlock) -> Vec<(Slot, Mode)> {
    let mut waiting: Vec<_> = b.entries.iter().filter_map(|(s, e)| Some((e.ticket, *s, e.wanted?))).collect();
    waiting.sort_unstable_by_key(|(ticket, slot, _)| (*ticket, *slot));
    waiting.into_iter().map(|(_, slot, mode)| (slot, mode)).collect()
}

fn serve(b: &mut LockBlock) -> Vec<NodeId> {
    let mut granted = Vec::new();
    for (slot, wanted) in queue(b) {
        if b.entries.iter().any(|(s, e)| *s != slot && e.held.is_some_and(|held| conflicts(held, wanted))) {
            break;
        }
        if let Some(e) = b.entries.get_mut(&slot) {
            e.held = Some(wanted);
            e.wanted = None;
            e.ticket = 0;
            // While it holds the lock, what it has open is its own business.
            e.open = false;
            granted.push(NodeId { slot, incarnation: e.incarnation });
        }
        if wanted == Mode::Exclusive {
            b.previous_tenure = b.tenure;
            b.tenure = b.seq + 1;
            break;
        }
    }
    granted
}

fn renumber(b: &mut LockBlock) {
    for (i, (slot, _)) in queue(b).into_iter().enumerate() {
        if let Some(e) = b.entries.get_mut(&slot) {
            e.ticket = i as u8 + 1;
        }
    }
}

/// Whom a waiter has to tell, and what to ask for: the holders in the way of it or of anyone ahead of it, as one ahead may
/// have stopped asking.
pub fn in_the_way(b: &LockBlock, me: NodeId) -> Option<(Mode, Vec<NodeId>)> {
    let mine = b.entry(me)?;
    mine.wanted?;
    let wanted = b.entries.values().filter(|e| e.wanted.is_some() && e.ticket <= mine.ticket).filter_map(|e| e.wanted);
    let wanted = wanted.max()?;
    let holders =
        b.entries.iter().filter(|(s, e)| **s != me.slot && e.held.is_some_and(|held| conflicts(held, wanted)));
    Some((wanted, holders.map(|(s, e)| NodeId { slot: *s, incarnation: e.incarnation }).collect()))
}

/// The strongest mode that others wait for which needs `me` to give up or lower what it holds. Those behind `me` in the
/// queue do not count: they are served later (this decides between two shared holders that both want more).
pub fn wanted_from(b: &LockBlock, me: NodeId, table: &SlotTable) -> Option<Mode> {
    let mine = b.entry(me)?;
    let held = mine.held?;
    b.entries
        .iter()
        .filter(|(s, e)| **s != me.slot && (mine.wanted.is_none() || e.ticket < mine.ticket))
        .filter(|(s, e)| !table.ended(NodeId { slot: **s, incarnation: e.incarnation }))
        .filter_map(|(_, e)| e.wanted)
        .filter(|wanted| conflicts(held, *wanted))
        .max()
}

/// What a node that waits for `mode` does about a grant that it does not know of and that is not enough: held on disk but
/// not in memory (`known`), it would stop those ahead. `None`: nothing.
pub(crate) fn unasked(b: &LockBlock, me: NodeId, mode: Mode, known: Option<Mode>, open: bool) -> Option<Event> {
    let held = b.held_by(me)?;
    (held < mode && Some(held) > known).then_some(Event::Release { to: known, value: None, open, cleaned: 0 })
}

/// What a node that waits for nothing does where the disk says more than its memory (`held`); one event for both, as a want
/// may turn into a grant at any moment.
pub(crate) fn surplus(b: &LockBlock, me: NodeId, held: Option<Mode>, open: bool) -> Option<Event> {
    let e = b.entry(me)?;
    (e.held > held || e.wanted.is_some()).then_some(Event::GiveBack { to: held, open })
}

/// Of two holders that both want more, who is ahead in the queue keeps what it holds: whether `me`, waiting, is.
pub(crate) fn keeps(b: &LockBlock, me: NodeId, from: NodeId) -> bool {
    let ticket = |n| b.entry(n).filter(|e| e.wanted.is_some()).map(|e| e.ticket);
    let (mine, theirs) = (ticket(me), ticket(from));
    mine.is_some_and(|mine| theirs.is_none_or(|theirs| theirs > mine)) && in_the_way(b, me).is_some()
}

/// The incarnation in which a joining node would live in a slot (I8: one that was never used).
pub(crate) fn next_life(block: &SlotBlock) -> Incarnation {
    last_used(block) + 1
}

/// The latest incarnation of a slot that wrote or may have: that of an adopter that died never began, but its key was used.
/// Who recovers the slot after another recoverer died must know it still, so it is a field of its own.
pub(crate) fn last_used(block: &SlotBlock) -> Incarnation {
    let next = match block.state {
        SlotState::Adopting { next } => next,
        _ => 0,
    };
    block.incarnation.max(block.adopter).max(next)
}

/// A free slot becomes its claimer's.
pub(crate) fn claimed(block: &SlotBlock, nonce: u64) -> SlotBlock {
    let incarnation = next_life(block);
    SlotBlock { state: SlotState::Live, incarnation, ..block.successor(nonce) }
}

/// A dead node's slot, while the joining node that will live there replays its journal.
pub(crate) fn adopting(block: &SlotBlock, nonce: u64) -> SlotBlock {
    let next = next_life(block);
    SlotBlock { state: SlotState::Adopting { next }, adopter: next, ..block.successor(nonce) }
}

/// The journal is replayed: all before `incarnation` have ended and the adopter lives.
pub(crate) fn adopted(adopting: &SlotBlock, incarnation: Incarnation, nonce: u64) -> SlotBlock {
    let mut live = adopting.successor(nonce);
    live.end(incarnation - 1, false);
    SlotBlock { state: SlotState::Live, incarnation, ..live }
}

/// A dead node's slot, claimed by the survivor that replays its journal.
pub(crate) fn recovering(judged: &SlotBlock, by: NodeId, nonce: u64) -> SlotBlock {
    SlotBlock { state: SlotState::Recovering { by }, ..judged.successor(nonce) }
}

/// The journal of the slot that was `judged` dead is replayed: its incarnation ends.
pub(crate) fn recovered(judged: &SlotBlock, claimed: &SlotBlock, nonce: u64) -> SlotBlock {
    let last = last_used(judged);
    let mut ended = claimed.successor(nonce);
    ended.end(last, false);
    ended
}

/// A free slot, claimed by a node that needs the volume to itself: nobody lives in it, and the incarnation that this counts up
/// never writes. `None`: it is not free.
pub(crate) fn claimed_for_repair(block: &SlotBlock, by: NodeId, nonce: u64) -> Option<SlotBlock> {
    (block.state == SlotState::Free).then(|| {
        let new = block.successor(nonce);
        SlotBlock {
            state: SlotState::Recovering { by },
            incarnation: block.incarnation + 1,
            host_name: String::new(),
            address: Vec::new(),
            ..new
        }
    })
}

/// A slot that was claimed so, free again; `None` if it is not claimed any more.
pub(crate) fn unclaimed(block: &SlotBlock, by: NodeId, nonce: u64) -> Option<SlotBlock> {
    (block.state == SlotState::Recovering { by }).then(|| {
        let mut new = block.successor(nonce);
        new.end(block.incarnation, true);
        new
    })
}

/// Whether the slot is `me`'s, alive.
pub(crate) fn is_mine(block: &SlotBlock, me: NodeId) -> bool {
    block.slot == me.slot && block.state == SlotState::Live && block.incarnation == me.incarnation
}

/// The slot after its owner left cleanly; `None` if it is no longer the owner's.
pub(crate) fn left(block: &SlotBlock, me: NodeId, nonce: u64) -> Option<SlotBlock> {
    is_mine(block, me).then(|| {
        let mut new = block.successor(nonce);
        new.end(me.incarnation, true);
        new
    })
}

/// Whether the recovery that a block names never ends: by a life that its slot has not had, by one whose block cannot be
/// read, or by nodes that would have to be recovered by one another. Blocks never come to say that: they are damaged.
/// `others` gives the slots' blocks as they were read after `block`.
pub fn never_recovered<'a>(block: &'a SlotBlock, others: impl Fn(Slot) -> Option<&'a SlotBlock>) -> bool {
    let mut at = block;
    for _ in 0..crate::MAX_NODES {
        let SlotState::Recovering { by } = at.state else { return false };
        match others(by.slot) {
            Some(other) if by.incarnation <= other.last_ended => return false,
            Some(other) if by.incarnation <= last_used(other) => at = other,
            _ => return true,
        }
    }
    true
}

/// What a slot needs from a survivor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Care {
    Nothing,
    /// Find out whether its writer is dead.
    Judge,
    /// It is dead, and so is who began to recover it.
    Recover,
}

pub(crate) fn care(block: &SlotBlock, me: NodeId, table: &SlotTable) -> Care {
    match block.state {
        SlotState::Free => Care::Nothing,
        // The recoverer died in turn: it was fenced when its own incarnation was ended.
        SlotState::Recovering { by } if by == me || table.ended(by) => Care::Recover,
        SlotState::Recovering { .. } => Care::Nothing,
        SlotState::Live | SlotState::Adopting { .. } => Care::Judge,
    }
}
