//! Invariants that only the device can see, checked on every change of every node: I3, I4, I5, I8, I10 and I12 as named in the design.

use std::collections::BTreeMap;
use std::time::Duration;

use blockdev::sim::{Audit, Change};
use cluster::{Layout, LockBlock, LockId, NodeId, SlotBlock, Tenure};
use fs_core::format::layout::BLOCK;
use journal::block::{BlockHeader, BlockKind};
use parking_lot::Mutex;
use tokio::time::Instant;

pub struct Witness {
    layout: Layout,
    lease: Duration,
    /// Until when each node may write, by its heartbeats that arrived.
    leases: Mutex<BTreeMap<String, Instant>>,
    /// Where the groups begin: metadata in their places are from here on.
    places: u64,
    /// Of each lock that has been taken: its tenure, and who holds it exclusively.
    locks: Mutex<BTreeMap<LockId, (Tenure, Option<NodeId>)>>,
}

impl Witness {
    pub fn new(layout: Layout, places: u64, lease: Duration) -> Self {
        Self { layout, lease, leases: Mutex::default(), places, locks: Mutex::default() }
    }

    /// A metadata block goes to its place while its lock is held exclusively in the tenure in which it changed, by who changed it or by
    /// one that ended and is not over yet (I3, I4, I5); and what is there is not newer (I8).
    fn placed(&self, node: &str, block: &[u8], at: u64, old: &[u8]) -> Result<(), String> {
        let own = |h: &BlockHeader| h.volume == self.layout.volume && h.block * BLOCK == at;
        let Some(h) = BlockHeader::decode(block).ok().filter(own) else { return Ok(()) };
        let (number, owner) = (h.block, h.owner);
        // Headers of groups that the volume does not have yet: it is about to grow.
        let fresh = h.kind == BlockKind::GroupHeader && (h.tenure, h.record) == (0, 0);
        match self.locks.lock().get(&owner) {
            Some((tenure, Some(_))) if *tenure == h.tenure => {}
            None if fresh => {}
            is => {
                let was = format!("I3: {node} places block {number} of {owner}, changed in tenure {}", h.tenure);
                return Err(format!("{was}; the lock's tenure and exclusive holder are {is:?}"));
            }
        }
        match BlockHeader::decode(old).ok().filter(own).filter(|o| o.owner == owner) {
            Some(o) if (o.tenure, o.record) > (h.tenure, h.record) => Err(format!(
                "I8: {node} places block {number} of {owner} as of {:?} over {:?} (tenure, record)",
                (h.tenure, h.record),
                (o.tenure, o.record)
            )),
            _ => Ok(()),
        }
    }

    fn is_heartbeat(&self, offset: u64) -> bool {
        (self.layout.heartbeats..self.layout.doorbells).contains(&offset)
    }

    /// A bid or a cell: written before the first heartbeat too, when a node that joins bids for its slot.
    fn is_bid_or_cell(&self, offset: u64) -> bool {
        let records = cluster::plain_records(self.layout.nodes) * self.layout.stride;
        self.layout.plain.is_some_and(|at| (at..at + records).contains(&offset))
    }

    /// The first lock block of a group that has never been used, of a volume that is about to grow: nobody knows of it yet.
    fn of_new_groups(&self, c: &Change<'_>) -> bool {
        let sector = self.layout.stride as usize;
        (c.offset..).step_by(sector).zip(c.new.chunks(sector)).all(|(at, new)| match self.layout.lock_at(at) {
            Some(id @ LockId::Group(_)) => {
                let first = LockBlock::decode(new, self.layout.volume, id).is_ok_and(|b| b.seq == 1 && b.tenure == 0);
                first && !self.locks.lock().contains_key(&id)
            }
            _ => false,
        })
    }

    /// The sequence numbers of a slot or lock block before and after a change, of which note is taken. `None`: it has never been used.
    fn sequence(&self, offset: u64, old: &[u8], new: &[u8]) -> Result<(Option<u64>, u64), String> {
        let l = &self.layout;
        if offset < l.heartbeats {
            let slot = ((offset - l.slots) / l.stride) as u16;
            let of = |b: &[u8]| SlotBlock::decode(b, l.volume, slot).map(|b| b.seq);
            return Ok((of(old).ok(), of(new).map_err(|e| format!("slot {slot}: {e}"))?));
        }
        let Some(id) = l.lock_at(offset) else { return Err(format!("no lock at {offset}")) };
        let of = |b: &[u8]| LockBlock::decode(b, l.volume, id);
        let (old, new) = (of(old).ok(), of(new).map_err(|e| format!("{id}: {e}"))?);
        self.locks.lock().insert(id, (new.tenure, new.exclusive_holder()));
        Ok((old.map(|b| b.seq), new.seq))
    }
}

impl Audit for Witness {
    fn submitted(&self, c: &Change<'_>) -> Result<(), String> {
        if self.is_heartbeat(c.offset) || self.is_bid_or_cell(c.offset) {
            return Ok(());
        }
        match self.leases.lock().get(c.node) {
            Some(until) if c.issued <= *until => Ok(()),
            Some(until) => {
                let late = (c.issued - *until).as_millis();
                Err(format!("I12: {} writes at {} {late} ms after its lease", c.node, c.offset))
            }
            None => Err(format!("I12: {} writes at {} before its first heartbeat", c.node, c.offset)),
        }
    }

    fn arrives(&self, c: &Change<'_>, old: &[u8]) -> Result<(), String> {
        if self.is_heartbeat(c.offset) {
            let until = c.issued + self.lease;
            let mut leases = self.leases.lock();
            let of = leases.entry(c.node.to_owned()).or_insert(until);
            *of = (*of).max(until);
            return Ok(());
        }
        // Of changes of lock blocks that fail half way nothing is told: without compare-and-write there are such.
        let lock = self.layout.lock_at(c.offset).is_some();
        if c.offset >= self.places && !lock && c.offset.is_multiple_of(BLOCK) && self.layout.plain.is_none() {
            let blocks = c.new.chunks(BLOCK as usize).zip(old.chunks(BLOCK as usize));
            return (0..)
                .zip(blocks)
                .try_for_each(|(i, (new, old))| self.placed(c.node, new, c.offset + i * BLOCK, old));
        }
        let l = &self.layout;
        let end = c.offset + c.new.len().max(1) as u64;
        let shared = |from: u64, to: u64| c.offset < to && from < end;
        let locks = l.lock_at(c.offset).is_some() || l.lock_at(end - 1).is_some();
        if !shared(l.slots, l.heartbeats) && !locks {
            return Ok(());
        }
        if !c.compared && self.of_new_groups(c) {
            return Ok(());
        }
        // Without compare-and-write, that each change follows the one before is all that can be seen.
        if !c.compared && l.plain.is_none() {
            return Err(format!("I10: {} writes at {} without comparing", c.node, c.offset));
        }
        match self.sequence(c.offset, old, c.new)? {
            (Some(was), is) if is != was + 1 => {
                Err(format!("I8: {} changes the sector at {} from sequence {was} to {is}", c.node, c.offset))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cluster::DomainLocks;

    fn witness() -> Witness {
        let layout = Layout {
            volume: 7,
            stride: 512,
            nodes: 2,
            slots: 4096,
            heartbeats: 5120,
            doorbells: 6144,
            locks: 8192,
            groups: 2,
            domain_locks: DomainLocks { first: 8192 + 2 * 512, per_group: 2, distance: 2 * 512 },
            plain: None,
        };
        Witness::new(layout, 1 << 20, Duration::from_secs(6))
    }

    #[test]
    fn writes_after_the_lease_and_plain_writes_to_locks_are_told() {
        let (w, t) = (witness(), Instant::now());
        let change = |at: u64, after: u64, compared| Change {
            node: "h",
            issued: t + Duration::from_secs(after),
            offset: at,
            compared,
            new: &[0; 512],
        };
        assert!(w.submitted(&change(1 << 20, 0, false)).is_err(), "no heartbeat yet");
        w.arrives(&change(5120, 0, false), &[0; 512]).unwrap();
        w.submitted(&change(1 << 20, 6, false)).unwrap();
        assert!(w.submitted(&change(1 << 20, 7, false)).unwrap_err().starts_with("I12"));
        assert!(w.arrives(&change(8192, 1, false), &[0; 512]).unwrap_err().starts_with("I10"));
        assert!(w.arrives(&change(8192, 1, true), &[0; 512]).is_err(), "not a lock block");
    }

    #[test]
    fn sequence_numbers_grow_by_one() {
        let (w, id) = (witness(), LockId::Group(1));
        let block = |seq| LockBlock { seq, ..LockBlock::unheld(7, id, Default::default()) }.encode(512);
        let arrives = |old: &[u8], new: &[u8]| {
            let change = Change { node: "h", issued: Instant::now(), offset: 8192 + 512, compared: true, new };
            w.arrives(&change, old)
        };
        arrives(&block(4), &block(5)).unwrap();
        assert!(arrives(&block(5), &block(5)).unwrap_err().starts_with("I8"));
        assert!(arrives(&block(5), &block(4)).unwrap_err().starts_with("I8"));
    }

    #[test]
    fn metadata_are_placed_under_their_lock_and_forwards() {
        let (w, id) = (witness(), LockId::Domain(1));
        let arrives = |offset, new: &[u8], old: &[u8]| {
            w.arrives(&Change { node: "h", issued: Instant::now(), offset, compared: true, new }, old)
        };
        let at = (1 << 20) + 4096;
        let image = |tenure, record| {
            let mut b = vec![0; 4096];
            let kind = journal::block::BlockKind::TreeNode;
            BlockHeader { kind, owner: id, volume: 7, block: at / 4096, version: 0, tenure, record }.encode(&mut b);
            b
        };
        let place = |new: &[u8], old: &[u8]| arrives(at, new, old);
        assert!(place(&image(1, 1), &[0; 4096]).unwrap_err().starts_with("I3"), "never taken");
        let unheld = LockBlock::unheld(7, id, Default::default());
        let held = |tenure, held| {
            let entry = cluster::Entry { incarnation: 1, held, wanted: None, ticket: 0, open: false };
            let lock = LockBlock { seq: tenure, tenure, entries: [(0, entry)].into(), ..unheld.clone() };
            arrives(8192 + 3 * 512, &lock.encode(512), &[0; 512]).unwrap();
        };
        held(5, Some(cluster::Mode::Exclusive));
        place(&image(5, 2), &image(4, 9)).unwrap();
        assert!(place(&image(5, 2), &image(5, 3)).unwrap_err().starts_with("I8"));
        assert!(place(&image(4, 2), &[0; 4096]).unwrap_err().starts_with("I3"), "of an earlier tenure");
        held(5, Some(cluster::Mode::Shared));
        assert!(place(&image(5, 2), &[0; 4096]).unwrap_err().starts_with("I3"), "given up");
    }
}
