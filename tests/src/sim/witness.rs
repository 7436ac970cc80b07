//! Invariants that only the device can see, checked on every change of every node: I8, I10 and I12 as named in the design.

use std::collections::BTreeMap;
use std::time::Duration;

use blockdev::sim::{Audit, Change};
use cluster::{Layout, LockBlock, LockId, SlotBlock};
use parking_lot::Mutex;
use tokio::time::Instant;

pub struct Witness {
    layout: Layout,
    lease: Duration,
    /// Until when each node may write, by its heartbeats that arrived.
    leases: Mutex<BTreeMap<String, Instant>>,
}

impl Witness {
    pub fn new(layout: Layout, lease: Duration) -> Self {
        Self { layout, lease, leases: Mutex::default() }
    }

    fn is_heartbeat(&self, offset: u64) -> bool {
        (self.layout.heartbeats..self.layout.doorbells).contains(&offset)
    }

    /// A bid or a cell: written before the first heartbeat too, when a node that joins bids for its slot.
    fn is_bid_or_cell(&self, offset: u64) -> bool {
        let records = cluster::plain_records(self.layout.nodes) * self.layout.stride;
        self.layout.plain.is_some_and(|at| (at..at + records).contains(&offset))
    }

    fn end_of_locks(&self) -> u64 {
        self.layout.locks + (u64::from(self.layout.groups) + u64::from(self.layout.domains)) * self.layout.stride
    }

    /// The sequence numbers of a slot or lock block before and after a change. `None`: it has never been used.
    fn sequence(&self, offset: u64, old: &[u8], new: &[u8]) -> Result<(Option<u64>, u64), String> {
        let l = &self.layout;
        if offset < l.heartbeats {
            let slot = ((offset - l.slots) / l.stride) as u16;
            let of = |b: &[u8]| SlotBlock::decode(b, l.volume, slot).map(|b| b.seq);
            return Ok((of(old).ok(), of(new).map_err(|e| format!("slot {slot}: {e}"))?));
        }
        let index = ((offset - l.locks) / l.stride) as u32;
        let id = if index < l.groups { LockId::Group(index) } else { LockId::Domain(index - l.groups) };
        let of = |b: &[u8]| LockBlock::decode(b, l.volume, id).map(|b| b.seq);
        Ok((of(old).ok(), of(new).map_err(|e| format!("{id}: {e}"))?))
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
        let l = &self.layout;
        let end = c.offset + c.new.len().max(1) as u64;
        let shared = |from: u64, to: u64| c.offset < to && from < end;
        if !shared(l.slots, l.heartbeats) && !shared(l.locks, self.end_of_locks()) {
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
            domains: 4,
            plain: None,
        };
        Witness::new(layout, Duration::from_secs(6))
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
}
