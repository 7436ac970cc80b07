//! The shared device of the model: slot blocks, lock blocks, and compare-and-writes on their way to them.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::format::{LockBlock, SlotBlock};
use crate::{LockId, NodeId, Slot};

pub(super) const VOLUME: u64 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Record {
    Slot(Arc<SlotBlock>),
    Lock(usize, Arc<LockBlock>),
}

impl Record {
    pub fn nonce(&self) -> u64 {
        match self {
            Record::Slot(b) => b.nonce,
            Record::Lock(_, b) => b.nonce,
        }
    }
}

/// A compare-and-write that was submitted and has not been carried out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Write {
    pub host: usize,
    pub by: NodeId,
    pub expect: Record,
    pub new: Record,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Device {
    pub slots: Vec<Arc<SlotBlock>>,
    pub locks: Vec<Arc<LockBlock>>,
    /// Sorted by host and nonce: which came first does not matter, they arrive in any order.
    pub in_flight: Vec<Write>,
    /// Whose writes the device takes, with reservations.
    pub registered: BTreeSet<NodeId>,
}

impl Device {
    pub fn new(slots: Slot, locks: u32) -> Self {
        let layout = crate::Layout {
            volume: VOLUME,
            stride: 512,
            nodes: slots,
            slots: 0,
            heartbeats: 0,
            doorbells: 0,
            locks: 0,
            groups: 0,
            domain_locks: crate::DomainLocks { first: 0, per_group: locks, distance: 0 },
            plain: None,
        };
        let slot = |s| SlotBlock::decode(&crate::initial_slot_block(&layout, s), VOLUME, s).unwrap();
        let lock = |d| LockBlock::unheld(VOLUME, LockId::Domain(d), Default::default());
        Self {
            slots: (0..slots).map(|s| Arc::new(slot(s))).collect(),
            locks: (0..locks).map(|d| Arc::new(lock(d))).collect(),
            in_flight: Vec::new(),
            registered: BTreeSet::new(),
        }
    }

    pub fn submit(&mut self, w: Write) {
        if !self.in_flight.contains(&w) {
            self.in_flight.push(w);
            self.in_flight.sort_by_key(|w| (w.host, w.new.nonce()));
        }
    }

    /// What is in the place of `record`.
    pub fn found(&self, record: &Record) -> Record {
        match record {
            Record::Slot(b) => Record::Slot(self.slots[usize::from(b.slot)].clone()),
            Record::Lock(l, _) => Record::Lock(*l, self.locks[*l].clone()),
        }
    }

    /// Stores a record by way of its bytes, as they are on disk.
    pub fn store(&mut self, record: &Record) {
        match record {
            Record::Slot(b) => {
                let stored = SlotBlock::decode(&b.encode(512), VOLUME, b.slot).unwrap();
                assert_eq!(stored, **b);
                self.slots[usize::from(b.slot)] = b.clone();
            }
            Record::Lock(l, b) => {
                let stored = LockBlock::decode(&b.encode(512), VOLUME, b.id).unwrap();
                assert_eq!(stored, **b);
                self.locks[*l] = b.clone();
            }
        }
    }
}
