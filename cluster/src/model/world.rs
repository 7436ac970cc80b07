//! The state of the model and how it moves: hosts with their volatile memory around one device.
//!
//! What is decided about blocks is decided by the crate's own functions ([`crate::transitions`], [`SlotTable`]); here is the
//! order in which a node calls them, as in `locks.rs`, `demand.rs`, `join.rs`, `monitor.rs` and `recovery.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::device::{Device, Record, VOLUME, Write};
use super::{Broken, Config, Mutant};
use crate::format::{LockBlock, SlotBlock, SlotState};
use crate::table::{Life, SlotTable};
use crate::transitions::{self, Care, Event, care, conflicts, is_mine, keeps, step, surplus, unasked, wanted_from};
use crate::{LockValue, Mode, NodeId, Slot};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub dev: Device,
    pub hosts: Vec<Host>,
    /// Crashes and lapses that may still happen.
    pub crashes: u8,
    /// Compare-and-writes that may still end in an unknown outcome.
    pub unknowns: u8,
    pub abandons: u8,
    pub ghost: Ghost,
}

/// What no node knows; for the properties only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Ghost {
    /// Who changed what a lock covers without having it in its place yet.
    pub dirty: BTreeMap<usize, NodeId>,
    /// The latest exclusive holder of a lock.
    pub writer: BTreeMap<usize, NodeId>,
    /// The tenure of the latest journal record of a node under a lock.
    pub records: BTreeMap<(NodeId, usize), u64>,
    /// Under which identities slots were ever written for.
    pub used: BTreeSet<NodeId>,
    pub broken: Option<Broken>,
    pub handovers: bool,
    pub recovered: bool,
    pub adopted: bool,
    pub unknown_done: bool,
    pub alone: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    Out,
    Joining,
    Live,
    Leaving,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Host {
    pub stage: Stage,
    pub me: NodeId,
    pub joins: u8,
    pub leaves: u8,
    /// Repairs that may still be begun, and the slots that it has claimed for one.
    pub repairs: u8,
    pub claimed: BTreeSet<Slot>,
    pub table: Arc<SlotTable>,
    pub locks: Vec<Local>,
    pub slot_op: Option<SlotOp>,
}

/// What a host knows of one lock (`locks::Local`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Local {
    pub held: Option<Mode>,
    pub value: LockValue,
    pub waiting: Option<Mode>,
    pub block: Option<Arc<LockBlock>>,
    pub stale: bool,
    pub absent: bool,
    pub demanded: Option<Mode>,
    pub op: Option<LockOp>,
    /// Acquires that may still be begun.
    pub asks: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Ask(Mode),
    Release,
    Settle,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct LockOp {
    pub kind: Kind,
    pub event: Event,
    pub new: Arc<LockBlock>,
    /// The outcome is unknown: to be read again.
    pub unknown: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Phase {
    Claim,
    Adopt,
    AdoptReplay,
    Adopted,
    Recover,
    Replay,
    Recovered,
    Leave,
    /// Claims a free slot to have the volume to itself, and frees it again.
    ClaimAll,
    Unclaim,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct SlotOp {
    pub phase: Phase,
    pub judged: Arc<SlotBlock>,
    pub expect: Arc<SlotBlock>,
    pub new: Arc<SlotBlock>,
    pub unknown: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Join {
        host: usize,
        slot: usize,
    },
    Leave {
        host: usize,
    },
    /// Claims one more slot.
    Claim {
        host: usize,
        slot: usize,
    },
    Unclaim {
        host: usize,
        slot: usize,
    },
    /// Reads all slot blocks.
    Learn {
        host: usize,
    },
    Ask {
        host: usize,
        lock: usize,
        mode: Mode,
    },
    /// A waiter looks at the lock block.
    Poll {
        host: usize,
        lock: usize,
    },
    Abandon {
        host: usize,
        lock: usize,
    },
    Release {
        host: usize,
        lock: usize,
        to: Option<Mode>,
    },
    /// The client gives up what it was asked for.
    Yield {
        host: usize,
        lock: usize,
        to: Option<Mode>,
    },
    /// The hint or the doorbell of a waiter arrives.
    Doorbell {
        host: usize,
        lock: usize,
        from: usize,
    },
    Reread {
        host: usize,
        lock: usize,
    },
    RereadSlot {
        host: usize,
    },
    Deliver {
        write: usize,
    },
    Lose {
        write: usize,
    },
    Unknown {
        write: usize,
    },
    Judge {
        host: usize,
        slot: usize,
    },
    Replay {
        host: usize,
    },
    /// A crash; or the lease is over, which a node notices before others do.
    Crash {
        host: usize,
    },
}

impl Action {
    /// Whether it happens by itself in time, whatever users do and without faults.
    pub fn is_progress(&self) -> bool {
        use Action::{Abandon, Ask, Claim, Crash, Join, Leave, Release, Unknown};
        !matches!(
            self,
            Claim { .. }
                | Join { .. }
                | Leave { .. }
                | Ask { .. }
                | Abandon { .. }
                | Release { .. }
                | Unknown { .. }
                | Crash { .. }
        )
    }
}

impl World {
    pub fn new(cfg: &Config) -> Self {
        let local = Local { asks: cfg.asks, ..Local::default() };
        let host = |_| Host {
            stage: Stage::Out,
            me: NodeId { slot: 0, incarnation: 0 },
            joins: cfg.joins,
            leaves: cfg.leaves,
            repairs: cfg.repairs,
            claimed: BTreeSet::new(),
            table: Arc::default(),
            locks: vec![local.clone(); cfg.locks as usize],
            slot_op: None,
        };
        let mut w = Self {
            dev: Device::new(cfg.slots, cfg.locks),
            hosts: (0..cfg.hosts).map(host).collect(),
            crashes: cfg.crashes,
            unknowns: cfg.unknowns,
            abandons: cfg.abandons,
            ghost: Ghost::default(),
        };
        // The first ones are there from the start.
        for h in 0..cfg.hosts.min(usize::from(cfg.slots)).min(cfg.live) {
            w.join(cfg, h, h);
            w.deliver(cfg, 0);
        }
        for h in 0..cfg.hosts {
            if w.hosts[h].stage == Stage::Live {
                w.learn(h);
            }
        }
        w
    }

    /// Whether a node writes under this identity now.
    pub fn alive(&self, node: NodeId) -> bool {
        self.hosts.iter().any(|h| h.stage != Stage::Out && h.me == node)
    }

    /// The heartbeat stands still for long enough, and what the victim submitted is refused or over.
    fn may_take_over(&self, cfg: &Config, victim: NodeId) -> bool {
        if cfg.mutant == Some(Mutant::LeaseIgnored) {
            return true;
        }
        let quiet = cfg.fencing
            || cfg.mutant == Some(Mutant::TakeoverUnfenced)
            || self.dev.in_flight.iter().all(|w| w.by != victim);
        !self.alive(victim) && quiet
    }

    fn nonce(&self, host: usize) -> u64 {
        let used = |n: u64| {
            self.dev.in_flight.iter().any(|w| w.new.nonce() == n)
                || self.dev.slots.iter().any(|b| b.nonce == n)
                || self.dev.locks.iter().any(|b| b.nonce == n)
                || self.hosts[host].locks.iter().any(|l| l.op.as_ref().is_some_and(|op| op.new.nonce == n))
                || self.hosts[host].slot_op.as_ref().is_some_and(|op| op.new.nonce == n || op.judged.nonce == n)
        };
        let first = host as u64 * 16 + 1;
        (first..).find(|n| !used(*n)).unwrap()
    }

    /// Crash or lapse: all of its memory is gone, what it submitted may still arrive.
    fn end(&mut self, host: usize) {
        let h = &mut self.hosts[host];
        h.stage = Stage::Out;
        h.table = Arc::default();
        h.slot_op = None;
        h.claimed.clear();
        for l in &mut h.locks {
            *l = Local { asks: l.asks, ..Local::default() };
        }
    }

    fn learn(&mut self, host: usize) {
        let h = &mut self.hosts[host];
        let mine = &self.dev.slots[usize::from(h.me.slot)];
        if h.stage == Stage::Live
            && h.slot_op.as_ref().is_none_or(|op| op.phase != Phase::Leave)
            && !is_mine(mine, h.me)
        {
            self.end(host);
            return;
        }
        let table = Arc::make_mut(&mut h.table);
        for block in &self.dev.slots {
            table.learn((**block).clone());
        }
    }

    /// Whether a host has all other slots for itself.
    pub fn alone(&self, host: usize) -> bool {
        let h = &self.hosts[host];
        h.stage == Stage::Live && h.claimed.len() + 1 == self.dev.slots.len()
    }

    // Locks.

    fn apply(&mut self, cfg: &Config, host: usize, lock: usize, block: Arc<LockBlock>, event: Event, kind: Kind) {
        let nonce = self.nonce(host);
        let h = &mut self.hosts[host];
        let table = match cfg.mutant {
            Some(Mutant::PurgesTheLiving) => purging(&self.dev.slots, h.me),
            _ => (*h.table).clone(),
        };
        match step(&block, h.me, event, &table, nonce) {
            Err(transitions::Superseded) => self.end(host),
            Ok(None) => self.after(cfg, host, lock, block, event, kind),
            Ok(Some(change)) => {
                let new = Arc::new(change.block);
                h.locks[lock].op = Some(LockOp { kind, event, new: new.clone(), unknown: false });
                let by = h.me;
                let (expect, new) = (Record::Lock(lock, block), Record::Lock(lock, new));
                self.dev.submit(Write { host, by, expect, new });
            }
        }
    }

    /// The event is done, and `block` is what the disk then says.
    fn after(&mut self, cfg: &Config, host: usize, lock: usize, block: Arc<LockBlock>, event: Event, kind: Kind) {
        let h = &mut self.hosts[host];
        let me = h.me;
        let wanted = wanted_from(&block, me, &h.table);
        let l = &mut h.locks[lock];
        l.op = None;
        match kind {
            Kind::Ask(mode) => {
                if matches!(event, Event::Request(_))
                    && let Some(event) = unasked(&block, me, mode, l.held, false)
                {
                    return self.apply(cfg, host, lock, block, event, kind);
                }
                match block.grant(me).filter(|g| g.mode >= mode) {
                    Some(grant) => {
                        *l = Local {
                            held: Some(grant.mode),
                            value: grant.value,
                            demanded: wanted,
                            asks: l.asks,
                            ..Local::default()
                        };
                        l.block = Some(block);
                        if grant.mode == Mode::Exclusive {
                            let g = &mut self.ghost;
                            if g.dirty.get(&lock).is_none_or(|d| *d == me) {
                                g.dirty.insert(lock, me);
                            }
                            g.handovers |= g.writer.insert(lock, me).is_some_and(|before| before != me);
                            g.records.insert((me, lock), grant.tenure);
                        }
                    }
                    None => {
                        (l.stale, l.absent) = (false, false);
                        l.block = Some(block);
                        demand(l, wanted);
                    }
                }
            }
            Kind::Release => {
                if cfg.mutant == Some(Mutant::MemoryAfterDisk)
                    && let Event::Release { to, .. } = event
                {
                    l.held = to;
                }
                l.absent = block.entry(me).is_none_or(|e| e.held.is_none() && e.wanted.is_none());
                l.stale = false;
                l.block = (!l.absent).then_some(block);
                demand(l, wanted);
            }
            Kind::Settle => {
                l.absent = l.held.is_none();
                l.stale = false;
                l.block = l.held.is_some().then_some(block);
                demand(l, wanted);
            }
        }
    }

    fn missed(&mut self, cfg: &Config, host: usize, lock: usize, op: LockOp, found: Arc<LockBlock>) {
        if let Event::Request(mode) = op.event
            && found.held_by(self.hosts[host].me) >= Some(mode)
        {
            return self.after(cfg, host, lock, found, op.event, op.kind);
        }
        self.apply(cfg, host, lock, found, op.event, op.kind);
    }

    fn ask(&mut self, cfg: &Config, host: usize, lock: usize, mode: Mode, first: bool) {
        let on_disk = self.dev.locks[lock].clone();
        let me = self.hosts[host].me;
        let l = &mut self.hosts[host].locks[lock];
        l.absent = false;
        let known = l.block.clone().filter(|_| first && l.held.is_some() && !l.stale);
        let block = known.unwrap_or(on_disk);
        let (event, kind) = (Event::Request(mode), Kind::Ask(mode));
        match block.grant(me).filter(|g| g.mode >= mode) {
            Some(_) => self.after(cfg, host, lock, block, event, kind),
            None => self.apply(cfg, host, lock, block, event, kind),
        }
    }

    fn release(&mut self, cfg: &Config, host: usize, lock: usize, to: Option<Mode>) {
        let on_disk = self.dev.locks[lock].clone();
        let l = &mut self.hosts[host].locks[lock];
        let mut value = None;
        if l.held == Some(Mode::Exclusive) {
            // I3: everything is in its place before.
            self.ghost.dirty.remove(&lock);
            value = Some(LockValue { root: l.value.root + 1, ..l.value });
        }
        if cfg.mutant != Some(Mutant::MemoryAfterDisk) {
            l.held = to;
        }
        l.demanded = None;
        let block = l.block.clone().filter(|_| !l.stale).unwrap_or(on_disk);
        self.apply(cfg, host, lock, block, Event::Release { to, value, open: false, cleaned: 0 }, Kind::Release);
    }

    fn asked_for(&mut self, cfg: &Config, host: usize, lock: usize, wanted: Mode, from: NodeId) {
        let on_disk = self.dev.locks[lock].clone();
        let h = &mut self.hosts[host];
        let me = h.me;
        let l = &mut h.locks[lock];
        let settle = match l.held {
            None => l.waiting.is_none() && !l.absent,
            Some(held) => {
                l.stale = true;
                if conflicts(held, wanted) {
                    if !(l.waiting.is_some() && l.block.as_ref().is_some_and(|b| keeps(b, me, from))) {
                        demand(l, Some(wanted));
                    }
                    false
                } else {
                    l.waiting.is_none()
                }
            }
        };
        if settle
            && cfg.mutant != Some(Mutant::NeverSettles)
            && l.op.is_none()
            && let Some(event) = surplus(&on_disk, me, l.held, false)
        {
            self.apply(cfg, host, lock, on_disk, event, Kind::Settle);
        }
    }

    // Slots.

    fn change(&mut self, host: usize, phase: Phase, judged: Arc<SlotBlock>, expect: Arc<SlotBlock>, new: SlotBlock) {
        let new = Arc::new(new);
        self.hosts[host].slot_op =
            Some(SlotOp { phase, judged, expect: expect.clone(), new: new.clone(), unknown: false });
        let by = self.hosts[host].me;
        self.dev.submit(Write { host, by, expect: Record::Slot(expect), new: Record::Slot(new) });
    }

    fn join(&mut self, cfg: &Config, host: usize, slot: usize) -> bool {
        let block = self.dev.slots[slot].clone();
        let nonce = self.nonce(host);
        let mut me = NodeId { slot: block.slot, incarnation: transitions::next_life(&block) };
        let free = block.state == SlotState::Free;
        let mut new = match block.writer() {
            _ if free => transitions::claimed(&block, nonce),
            Some(writer) if self.dev.slots.iter().all(|b| b.state != SlotState::Free) => {
                if !self.may_take_over(cfg, writer) {
                    return false;
                }
                self.fence(cfg, writer);
                transitions::adopting(&block, nonce)
            }
            _ => return false,
        };
        if free && cfg.mutant == Some(Mutant::IncarnationReused) && block.incarnation > 0 {
            me.incarnation = block.incarnation;
            new.incarnation = me.incarnation;
            new.last_ended = me.incarnation - 1;
        }
        self.dev.registered.insert(me);
        let h = &mut self.hosts[host];
        h.joins -= 1;
        h.me = me;
        h.stage = Stage::Joining;
        h.table = Arc::default();
        self.change(host, if free { Phase::Claim } else { Phase::Adopt }, block.clone(), block, new);
        true
    }

    fn fence(&mut self, cfg: &Config, victim: NodeId) {
        if cfg.mutant != Some(Mutant::TakeoverUnfenced) {
            self.dev.registered.remove(&victim);
        }
    }

    fn judge(&mut self, cfg: &Config, host: usize, slot: usize) -> bool {
        let block = self.dev.slots[slot].clone();
        let h = &self.hosts[host];
        match care(&block, h.me, &h.table) {
            // Our own claim is no recovery that was forgotten.
            Care::Recover if h.claimed.contains(&block.slot) => return false,
            Care::Nothing => return false,
            Care::Recover => {}
            Care::Judge => {
                let Some(writer) = block.writer().filter(|w| *w != h.me && self.may_take_over(cfg, *w)) else {
                    return false;
                };
                self.fence(cfg, writer);
            }
        }
        let mut new = transitions::recovering(&block, self.hosts[host].me, self.nonce(host));
        if cfg.mutant == Some(Mutant::AdopterForgotten) {
            new.adopter = 0;
        }
        self.change(host, Phase::Recover, block.clone(), block, new);
        true
    }

    /// A change of a slot has its certain outcome.
    fn changed(&mut self, cfg: &Config, host: usize, found: Option<Arc<SlotBlock>>) {
        let Some(op) = self.hosts[host].slot_op.take() else { return };
        let me = self.hosts[host].me;
        if found.is_some() {
            match op.phase {
                Phase::Recover | Phase::ClaimAll => self.learn(host),
                Phase::Claim | Phase::Adopt => {
                    self.dev.registered.remove(&me);
                    self.hosts[host].joins += 1;
                    self.end(host);
                }
                Phase::AdoptReplay
                | Phase::Adopted
                | Phase::Replay
                | Phase::Recovered
                | Phase::Leave
                | Phase::Unclaim => {
                    self.end(host);
                }
            }
            return;
        }
        let next = match op.phase {
            Phase::Claim | Phase::Adopted => {
                self.hosts[host].stage = Stage::Live;
                let table = Arc::make_mut(&mut self.hosts[host].table);
                table.learn((*op.new).clone());
                self.ghost.adopted |= op.phase == Phase::Adopted;
                return;
            }
            Phase::Adopt => Phase::AdoptReplay,
            Phase::Recover => Phase::Replay,
            Phase::Leave => return self.end(host),
            Phase::ClaimAll => {
                self.hosts[host].claimed.insert(op.new.slot);
                self.ghost.alone |= self.alone(host);
                return;
            }
            Phase::Unclaim => {
                self.hosts[host].claimed.remove(&op.new.slot);
                return;
            }
            Phase::Recovered => {
                Arc::make_mut(&mut self.hosts[host].table).learn((*op.new).clone());
                self.ghost.recovered = true;
                return;
            }
            Phase::AdoptReplay | Phase::Replay => return,
        };
        self.hosts[host].slot_op = Some(SlotOp { phase: next, unknown: false, ..op });
        if cfg.mutant == Some(Mutant::EndsUnreplayed) {
            self.replayed(host);
        }
    }

    fn replayed(&mut self, host: usize) {
        let nonce = self.nonce(host);
        let Some(op) = self.hosts[host].slot_op.take() else { return };
        let me = self.hosts[host].me;
        match op.phase {
            Phase::AdoptReplay => {
                let new = transitions::adopted(&op.new, me.incarnation, nonce);
                self.change(host, Phase::Adopted, op.judged, op.new, new);
            }
            _ => {
                let new = transitions::recovered(&op.judged, &op.new, nonce);
                self.change(host, Phase::Recovered, op.judged, op.new, new);
            }
        }
    }

    /// The rule of I5, as the journal's replay has it.
    fn replay(&mut self, host: usize) {
        let Some(op) = &self.hosts[host].slot_op else { return };
        let dead = NodeId { slot: op.judged.slot, incarnation: op.judged.incarnation };
        let g = &mut self.ghost;
        for ((node, lock), tenure) in &g.records {
            let block = &self.dev.locks[*lock];
            let applies = block.held_by(dead) == Some(Mode::Exclusive) && block.tenure == *tenure;
            if *node == dead && applies && g.writer.get(lock) != Some(&dead) {
                g.broken = Some(Broken::OldRecordReplayed);
            }
            if *node == dead && !applies && g.dirty.get(lock) == Some(&dead) {
                g.broken = Some(Broken::RecordNotReplayed);
            }
        }
        g.dirty.retain(|_, d| *d != dead);
        g.records.retain(|(n, _), _| *n != dead);
        self.replayed(host);
    }

    // The device.

    fn deliver(&mut self, cfg: &Config, index: usize) {
        let w = self.dev.in_flight.remove(index);
        let found = self.dev.found(&w.expect);
        let refused = cfg.fencing && !self.dev.registered.contains(&w.by);
        let written = !refused && found == w.expect;
        if written {
            self.check_write(&w);
            self.dev.store(&w.new);
        }
        let h = &mut self.hosts[w.host];
        if h.stage == Stage::Out || h.me != w.by {
            return;
        }
        match &w.new {
            Record::Lock(lock, new) => {
                let asked = h.locks[*lock].op.clone();
                let Some(op) = asked.filter(|op| op.new == *new && !op.unknown) else { return };
                match found {
                    _ if refused => self.end(w.host),
                    Record::Lock(_, found) if !written => self.missed(cfg, w.host, *lock, op, found),
                    _ => self.after(cfg, w.host, *lock, op.new, op.event, op.kind),
                }
            }
            Record::Slot(new) => {
                let expects = h.slot_op.as_ref().is_some_and(|op| op.new == *new && !op.unknown);
                match found {
                    _ if !expects => {}
                    _ if refused => self.end(w.host),
                    Record::Slot(found) if !written => {
                        let ours = found.nonce == new.nonce;
                        self.changed(cfg, w.host, (!ours).then_some(found));
                    }
                    _ => self.changed(cfg, w.host, None),
                }
            }
        }
    }

    fn check_write(&mut self, w: &Write) {
        let mut truth = SlotTable::default();
        for b in &self.dev.slots {
            truth.learn((**b).clone());
        }
        let g = &mut self.ghost;
        if truth.life(w.by) == Life::EndedCrash {
            g.broken = Some(Broken::EndedWrite);
        }
        match (&w.expect, &w.new) {
            (Record::Lock(_, old), Record::Lock(_, new))
                if new.seq <= old.seq || new.tenure < old.tenure || new.value.root < old.value.root =>
            {
                g.broken = Some(Broken::Backwards);
            }
            (Record::Slot(old), Record::Slot(new)) => {
                if new.seq <= old.seq || new.incarnation < old.incarnation || new.last_ended < old.last_ended {
                    g.broken = Some(Broken::Backwards);
                }
                if let Some(writer) = new.writer()
                    && old.writer() != Some(writer)
                    && !g.used.insert(writer)
                {
                    g.broken = Some(Broken::IncarnationReused);
                }
            }
            _ => {}
        }
    }

    // All actions.

    /// Whether its host waits for the outcome; one that was reported as unknown it reads back instead.
    fn awaited(&self, w: &Write) -> bool {
        let h = &self.hosts[w.host];
        h.stage != Stage::Out
            && h.me == w.by
            && match &w.new {
                Record::Lock(l, new) => h.locks[*l].op.as_ref().is_some_and(|op| op.new == *new && !op.unknown),
                Record::Slot(new) => h.slot_op.as_ref().is_some_and(|op| op.new == *new && !op.unknown),
            }
    }

    pub fn actions(&self, cfg: &Config, out: &mut Vec<Action>) {
        for (i, w) in self.dev.in_flight.iter().enumerate() {
            out.push(Action::Deliver { write: i });
            let awaited = self.awaited(w);
            if !awaited {
                out.push(Action::Lose { write: i });
            } else if self.unknowns > 0 {
                out.push(Action::Unknown { write: i });
            }
        }
        for (host, h) in self.hosts.iter().enumerate() {
            if h.stage == Stage::Out {
                if h.joins > 0 {
                    out.extend((0..self.dev.slots.len()).map(|slot| Action::Join { host, slot }));
                }
                continue;
            }
            if self.crashes > 0 {
                out.push(Action::Crash { host });
            }
            match &h.slot_op {
                Some(op) if op.unknown => out.push(Action::RereadSlot { host }),
                Some(op) if matches!(op.phase, Phase::AdoptReplay | Phase::Replay) => out.push(Action::Replay { host }),
                None if h.stage == Stage::Live => {
                    out.extend((0..self.dev.slots.len()).map(|slot| Action::Judge { host, slot }));
                    if h.repairs > 0 {
                        out.extend((0..self.dev.slots.len()).map(|slot| Action::Claim { host, slot }));
                    }
                    out.extend(h.claimed.iter().map(|s| Action::Unclaim { host, slot: usize::from(*s) }));
                    if h.leaves > 0 && h.claimed.is_empty() {
                        out.push(Action::Leave { host });
                    }
                }
                _ => {}
            }
            if h.stage == Stage::Live {
                out.push(Action::Learn { host });
                for (lock, l) in h.locks.iter().enumerate() {
                    self.lock_actions(cfg, host, lock, l, out);
                }
            }
        }
    }

    fn lock_actions(&self, cfg: &Config, host: usize, lock: usize, l: &Local, out: &mut Vec<Action>) {
        if l.waiting.is_some() && self.abandons > 0 {
            out.push(Action::Abandon { host, lock });
        }
        if let Some(op) = &l.op {
            if op.unknown {
                out.push(Action::Reread { host, lock });
            }
            return;
        }
        if l.waiting.is_some() {
            out.push(Action::Poll { host, lock });
        } else if l.asks > 0 {
            let modes: &[Mode] = if cfg.shared { &[Mode::Shared, Mode::Exclusive] } else { &[Mode::Exclusive] };
            let more = modes.iter().filter(|m| l.held < Some(**m));
            out.extend(more.map(|mode| Action::Ask { host, lock, mode: *mode }));
        }
        if let Some(held) = l.held {
            match l.demanded {
                Some(wanted) => {
                    out.push(Action::Yield { host, lock, to: None });
                    if (wanted, held) == (Mode::Shared, Mode::Exclusive) {
                        out.push(Action::Yield { host, lock, to: Some(Mode::Shared) });
                    }
                }
                None => out.push(Action::Release { host, lock, to: None }),
            }
        }
        for (from, f) in self.hosts.iter().enumerate() {
            let waits = f.stage == Stage::Live && f.locks[lock].waiting.is_some();
            if from != host && waits && self.rings(from, lock, host).is_some() {
                out.push(Action::Doorbell { host, lock, from });
            }
        }
    }

    /// What a waiter asks of a host, by what it last read.
    fn rings(&self, from: usize, lock: usize, host: usize) -> Option<Mode> {
        let f = &self.hosts[from];
        let block = f.locks[lock].block.as_ref()?;
        let (wanted, nodes) = transitions::in_the_way(block, f.me)?;
        nodes.contains(&self.hosts[host].me).then_some(wanted)
    }

    /// The state after an action; `None` if it can not be done or changes nothing.
    pub fn next(&self, cfg: &Config, action: &Action) -> Option<World> {
        let mut w = self.clone();
        match *action {
            Action::Join { host, slot } => {
                w.join(cfg, host, slot).then_some(())?;
            }
            Action::Leave { host } => {
                let me = w.hosts[host].me;
                let block = w.dev.slots[usize::from(me.slot)].clone();
                let new = transitions::left(&block, me, w.nonce(host))?;
                let joins = w.hosts[host].joins;
                w.end(host);
                w.hosts[host].stage = Stage::Leaving;
                w.hosts[host].joins = joins;
                w.hosts[host].leaves -= 1;
                w.ghost.dirty.retain(|_, d| *d != me);
                w.ghost.records.retain(|(n, _), _| *n != me);
                w.change(host, Phase::Leave, block.clone(), block, new);
            }
            Action::Claim { host, slot } => {
                let (block, me) = (w.dev.slots[slot].clone(), w.hosts[host].me);
                let new = transitions::claimed_for_repair(&block, me, w.nonce(host))?;
                w.hosts[host].repairs -= 1;
                w.change(host, Phase::ClaimAll, block.clone(), block, new);
            }
            Action::Unclaim { host, slot } => {
                let (block, me) = (w.dev.slots[slot].clone(), w.hosts[host].me);
                let new = transitions::unclaimed(&block, me, w.nonce(host))?;
                w.change(host, Phase::Unclaim, block.clone(), block, new);
            }
            Action::Learn { host } => w.learn(host),
            Action::Ask { host, lock, mode } => {
                let l = &mut w.hosts[host].locks[lock];
                l.asks -= 1;
                l.waiting = Some(mode);
                w.ask(cfg, host, lock, mode, true);
            }
            Action::Poll { host, lock } => {
                let mode = w.hosts[host].locks[lock].waiting?;
                w.ask(cfg, host, lock, mode, false);
            }
            Action::Abandon { host, lock } => {
                w.abandons -= 1;
                w.hosts[host].locks[lock].waiting = None;
                w.hosts[host].locks[lock].op = None;
            }
            Action::Release { host, lock, to } | Action::Yield { host, lock, to } => w.release(cfg, host, lock, to),
            Action::Doorbell { host, lock, from } => {
                let wanted = w.rings(from, lock, host)?;
                let from = w.hosts[from].me;
                w.asked_for(cfg, host, lock, wanted, from);
            }
            Action::Reread { host, lock } => {
                let op = w.hosts[host].locks[lock].op.clone()?;
                let found = w.dev.locks[lock].clone();
                if found.nonce == op.new.nonce || cfg.mutant == Some(Mutant::UnknownIsDone) {
                    w.ghost.unknown_done = true;
                    w.after(cfg, host, lock, op.new, op.event, op.kind);
                } else {
                    w.missed(cfg, host, lock, op, found);
                }
            }
            Action::RereadSlot { host } => {
                let op = w.hosts[host].slot_op.clone()?;
                let found = w.dev.slots[usize::from(op.new.slot)].clone();
                if found == op.expect {
                    // The same attempt again.
                    let by = w.hosts[host].me;
                    let (expect, new) = (Record::Slot(op.expect.clone()), Record::Slot(op.new.clone()));
                    w.dev.submit(Write { host, by, expect, new });
                    w.hosts[host].slot_op = Some(SlotOp { unknown: false, ..op });
                } else {
                    let ours = found.nonce == op.new.nonce;
                    w.changed(cfg, host, (!ours).then_some(found));
                }
            }
            Action::Deliver { write } => w.deliver(cfg, write),
            Action::Lose { write } => {
                w.dev.in_flight.remove(write);
            }
            Action::Unknown { write } => {
                w.unknowns -= 1;
                let of = w.dev.in_flight.get(write)?.clone();
                let h = &mut w.hosts[of.host];
                match of.new {
                    Record::Lock(l, _) => h.locks[l].op.as_mut()?.unknown = true,
                    Record::Slot(_) => h.slot_op.as_mut()?.unknown = true,
                }
            }
            Action::Judge { host, slot } => {
                w.judge(cfg, host, slot).then_some(())?;
            }
            Action::Replay { host } => w.replay(host),
            Action::Crash { host } => {
                w.crashes -= 1;
                w.end(host);
            }
        }
        (w != *self).then_some(w)
    }
}

fn demand(l: &mut Local, wanted: Option<Mode>) {
    if let (Some(held), Some(wanted)) = (l.held, wanted)
        && conflicts(held, wanted)
    {
        l.demanded = l.demanded.max(Some(wanted));
    }
}

/// The table of a node that takes every other incarnation for ended.
fn purging(slots: &[Arc<SlotBlock>], me: NodeId) -> SlotTable {
    let mut table = SlotTable::default();
    for b in slots {
        let mut b = (**b).clone();
        assert_eq!(b.volume, VOLUME);
        if b.slot != me.slot {
            b.end(b.incarnation, false);
        }
        table.learn(b);
    }
    table
}
