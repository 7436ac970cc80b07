//! The normal form of a state: states that differ only in names become one, so that fewer are explored.
//!
//! What a name is: the number of a host and of a slot, a nonce, and how large a sequence number is. Hosts and slots are
//! alike, as no rule prefers one (waiters are served by tickets); nonces are only compared with those of attempts under way;
//! sequence numbers, tenures and values only with each other within a block and with their successors, so what counts is their order
//! and whether one follows another (`close_up`; without it a protocol that goes round in a circle shows by having no end). Every mapping here is one of names, so a state and its normal form go on alike; where ties are
//! not told apart, more states than needed are explored and no error is made.

use std::collections::{BTreeMap, BTreeSet, hash_map::DefaultHasher};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::device::Record;
use super::world::{Host, World};
use crate::format::{LockBlock, SlotBlock, SlotState};
use crate::transitions::Event;
use crate::{LockValue, NodeId, Slot};

struct Names {
    /// New number of each host and slot.
    hosts: Vec<usize>,
    slots: Vec<Slot>,
    nonces: BTreeMap<u64, u64>,
    /// Of each lock and each slot's block.
    lock_seqs: Vec<BTreeMap<u64, u64>>,
    roots: Vec<BTreeMap<u64, u64>>,
    slot_seqs: Vec<BTreeMap<u64, u64>>,
}

pub(super) fn normal(w: World, close_up: bool) -> World {
    let hosts = order(w.hosts.len(), |h| host_key(&w, h));
    let slots = order(w.dev.slots.len(), |s| slot_key(&w, s, &hosts)).into_iter().map(|s| s as Slot).collect();
    let mut names = Names {
        hosts,
        slots,
        nonces: nonces(&w),
        lock_seqs: vec![BTreeMap::new(); w.dev.locks.len()],
        roots: vec![BTreeMap::new(); w.dev.locks.len()],
        slot_seqs: vec![BTreeMap::new(); w.dev.slots.len()],
    };
    names.count(&w, close_up);
    names.apply(w)
}

/// The place of each of `n` things when they are sorted by their keys.
fn order(n: usize, key: impl Fn(usize) -> u64) -> Vec<usize> {
    let mut sorted: Vec<_> = (0..n).map(|i| (key(i), i)).collect();
    sorted.sort_unstable();
    let mut place = vec![0; n];
    for (to, (_, from)) in sorted.into_iter().enumerate() {
        place[from] = to;
    }
    place
}

fn hash(of: impl Hash) -> u64 {
    let mut h = DefaultHasher::new();
    of.hash(&mut h);
    h.finish()
}

/// What tells hosts apart whatever they and their slots are called.
fn host_key(w: &World, host: usize) -> u64 {
    let h = &w.hosts[host];
    let slot = &w.dev.slots[usize::from(h.me.slot)];
    let mut key = DefaultHasher::new();
    (h.stage, h.joins, h.leaves, h.repairs, h.claimed.len(), h.me.incarnation).hash(&mut key);
    (std::mem::discriminant(&slot.state), slot.incarnation, slot.last_ended).hash(&mut key);
    for (lock, l) in h.locks.iter().enumerate() {
        let op = l.op.as_ref().map(|op| (op.kind, op.unknown, op.new.entry(h.me).copied()));
        (l.held, l.waiting, l.asks, l.demanded, l.stale, l.absent, op).hash(&mut key);
        (w.dev.locks[lock].entry(h.me), l.block.as_ref().map(|b| b.entry(h.me).copied())).hash(&mut key);
    }
    h.slot_op.as_ref().map(|op| (op.phase, op.unknown)).hash(&mut key);
    w.dev.in_flight.iter().filter(|o| o.host == host).count().hash(&mut key);
    key.finish()
}

/// The same for slots, given the hosts' order.
fn slot_key(w: &World, slot: usize, hosts: &[usize]) -> u64 {
    let b = &w.dev.slots[slot];
    let users: BTreeSet<_> = (0..w.hosts.len())
        .filter(|h| usize::from(w.hosts[*h].me.slot) == slot)
        .map(|h| (hosts[h], w.hosts[h].me.incarnation))
        .collect();
    let entries: Vec<_> = w.dev.locks.iter().map(|l| l.entries.get(&b.slot).copied()).collect();
    hash((users, std::mem::discriminant(&b.state), b.incarnation, b.last_ended, b.adopter, b.clean_ends, entries))
}

/// Of attempts under way; those of anything else are never compared with.
fn nonces(w: &World) -> BTreeMap<u64, u64> {
    let mut live = BTreeSet::new();
    live.extend(w.dev.in_flight.iter().map(|o| o.new.nonce()));
    for h in &w.hosts {
        live.extend(h.locks.iter().filter_map(|l| l.op.as_ref()).map(|op| op.new.nonce));
        live.extend(h.slot_op.iter().map(|op| op.new.nonce));
    }
    live.into_iter().map(|n| (n, n)).collect()
}

/// The same order; gaps of at most one number, if they are to be closed up.
fn renumber(numbers: &mut BTreeMap<u64, u64>, close_up: bool) {
    let (mut before, mut to) = (0, 0);
    for (from, new) in numbers.iter_mut() {
        let gap = from - before;
        to += if close_up { gap.min(2) } else { gap };
        before = *from;
        *new = to;
    }
}

impl Names {
    fn count(&mut self, w: &World, close_up: bool) {
        each_block(w, &mut |record| match record {
            Record::Lock(lock, b) => {
                self.lock_seqs[*lock].extend([b.seq, b.tenure, b.previous_tenure].map(|n| (n, 0)));
                self.roots[*lock].insert(b.value.root, 0);
            }
            Record::Slot(b) => {
                self.slot_seqs[usize::from(b.slot)].insert(b.seq, 0);
            }
        });
        for h in &w.hosts {
            for (lock, l) in h.locks.iter().enumerate() {
                self.roots[lock].insert(l.value.root, 0);
                if let Some(op) = &l.op
                    && let Event::Release { value: Some(v), .. } = op.event
                {
                    self.roots[lock].insert(v.root, 0);
                }
            }
        }
        for ((_, lock), tenure) in &w.ghost.records {
            self.lock_seqs[*lock].insert(*tenure, 0);
        }
        self.lock_seqs.iter_mut().chain(&mut self.roots).chain(&mut self.slot_seqs).for_each(|n| renumber(n, close_up));
        // Nonces by who made them, in the order of the new names.
        let mut used = BTreeMap::new();
        let mut named: Vec<_> = self.nonces.keys().copied().collect();
        named.sort_by_key(|n| (self.hosts[(n - 1) as usize / 16], *n));
        for n in named {
            let host = self.hosts[(n - 1) as usize / 16];
            let nth = used.entry(host).or_insert(0);
            self.nonces.insert(n, host as u64 * 16 + 1 + *nth);
            *nth += 1;
        }
    }

    fn slot(&self, slot: Slot) -> Slot {
        self.slots[usize::from(slot)]
    }

    fn node(&self, n: NodeId) -> NodeId {
        NodeId { slot: self.slot(n.slot), ..n }
    }

    fn nonce(&self, n: u64) -> u64 {
        self.nonces.get(&n).copied().unwrap_or(0)
    }

    fn value(&self, lock: usize, v: LockValue) -> LockValue {
        LockValue { root: self.roots[lock][&v.root], ..v }
    }

    fn slot_block(&self, b: &SlotBlock) -> SlotBlock {
        let state = match b.state {
            SlotState::Recovering { by } => SlotState::Recovering { by: self.node(by) },
            state => state,
        };
        let seq = self.slot_seqs[usize::from(b.slot)][&b.seq];
        SlotBlock { slot: self.slot(b.slot), seq, nonce: self.nonce(b.nonce), state, ..b.clone() }
    }

    fn lock_block(&self, lock: usize, b: &LockBlock) -> LockBlock {
        let seqs = &self.lock_seqs[lock];
        LockBlock {
            seq: seqs[&b.seq],
            tenure: seqs[&b.tenure],
            previous_tenure: seqs[&b.previous_tenure],
            nonce: self.nonce(b.nonce),
            value: self.value(lock, b.value),
            entries: b.entries.iter().map(|(s, e)| (self.slot(*s), *e)).collect(),
            ..b.clone()
        }
    }

    fn record(&self, r: &Record) -> Record {
        match r {
            Record::Slot(b) => Record::Slot(Arc::new(self.slot_block(b))),
            Record::Lock(l, b) => Record::Lock(*l, Arc::new(self.lock_block(*l, b))),
        }
    }

    fn host(&self, h: Host) -> Host {
        let slot = |b: &Arc<SlotBlock>| Arc::new(self.slot_block(b));
        let claimed = h.claimed.iter().map(|s| self.slot(*s)).collect();
        let mut h = Host { me: self.node(h.me), claimed, table: Arc::new(h.table.map(|b| self.slot_block(b))), ..h };
        for (lock, l) in h.locks.iter_mut().enumerate() {
            l.value = self.value(lock, l.value);
            l.block = l.block.as_ref().map(|b| Arc::new(self.lock_block(lock, b)));
            if let Some(op) = &mut l.op {
                op.new = Arc::new(self.lock_block(lock, &op.new));
                if let Event::Release { value: Some(v), .. } = &mut op.event {
                    *v = self.value(lock, *v);
                }
            }
        }
        if let Some(op) = &mut h.slot_op {
            (op.judged, op.expect, op.new) = (slot(&op.judged), slot(&op.expect), slot(&op.new));
        }
        h
    }

    fn apply(&self, mut w: World) -> World {
        let mut slots = w.dev.slots.clone();
        for b in &w.dev.slots {
            slots[usize::from(self.slot(b.slot))] = Arc::new(self.slot_block(b));
        }
        w.dev.slots = slots;
        for (lock, b) in w.dev.locks.iter_mut().enumerate() {
            *b = Arc::new(self.lock_block(lock, b));
        }
        for o in &mut w.dev.in_flight {
            (o.host, o.by) = (self.hosts[o.host], self.node(o.by));
            (o.expect, o.new) = (self.record(&o.expect), self.record(&o.new));
        }
        w.dev.in_flight.sort_by_key(|o| (o.host, o.new.nonce()));
        w.dev.registered = w.dev.registered.iter().map(|n| self.node(*n)).collect();
        let mut hosts: Vec<_> = w.hosts.into_iter().map(|h| self.host(h)).zip(&self.hosts).collect();
        hosts.sort_by_key(|(_, to)| **to);
        w.hosts = hosts.into_iter().map(|(h, _)| h).collect();
        let g = &mut w.ghost;
        g.dirty.values_mut().chain(g.writer.values_mut()).for_each(|n| *n = self.node(*n));
        let tenure = |lock: usize, t: u64| self.lock_seqs[lock][&t];
        g.records = g.records.iter().map(|((n, l), t)| ((self.node(*n), *l), tenure(*l, *t))).collect();
        g.used = g.used.iter().map(|n| self.node(*n)).collect();
        w
    }
}

/// Every block that anything in a state knows.
fn each_block(w: &World, see: &mut dyn FnMut(&Record)) {
    let mut slot = |b: &Arc<SlotBlock>| see(&Record::Slot(b.clone()));
    w.dev.slots.iter().for_each(&mut slot);
    for h in &w.hosts {
        h.table.each(|b| slot(&Arc::new(b.clone())));
        if let Some(op) = &h.slot_op {
            [&op.judged, &op.expect, &op.new].into_iter().for_each(&mut slot);
        }
    }
    for (lock, b) in w.dev.locks.iter().enumerate() {
        see(&Record::Lock(lock, b.clone()));
    }
    for h in &w.hosts {
        for (lock, l) in h.locks.iter().enumerate() {
            l.block.iter().chain(l.op.as_ref().map(|op| &op.new)).for_each(|b| see(&Record::Lock(lock, b.clone())));
        }
    }
    w.dev.in_flight.iter().flat_map(|o| [&o.expect, &o.new]).for_each(see);
}
