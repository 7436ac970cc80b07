//! What this node knows of the slots: which incarnations live and which have ended.
//!
//! The knowledge that an incarnation ended is monotone: slot blocks are taken in only if their sequence number is newer,
//! and ended incarnations never come back (I8). A stale table is therefore safe: it only makes a node wait longer.

use std::collections::BTreeMap;

use crate::format::{SlotBlock, SlotState};
use crate::transitions::last_used;
use crate::{Incarnation, NodeId, Slot};

/// What became of one incarnation, as far as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Not known to have ended: what its entries say counts.
    Current,
    EndedClean,
    EndedCrash,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct SlotTable {
    slots: BTreeMap<Slot, SlotBlock>,
}

impl SlotTable {
    /// Takes in a slot block; true if it tells something new.
    pub fn learn(&mut self, block: SlotBlock) -> bool {
        let news = self.slots.get(&block.slot).is_none_or(|known| known.seq < block.seq);
        if news {
            self.slots.insert(block.slot, block);
        }
        news
    }

    pub fn life(&self, node: NodeId) -> Life {
        let Some(block) = self.slots.get(&node.slot) else { return Life::Current };
        if node.incarnation > block.last_ended {
            return Life::Current;
        }
        // Further back than the history reaches: assume the worse.
        match block.clean_ends.checked_shr(block.last_ended - node.incarnation) {
            Some(ends) if ends & 1 == 1 => Life::EndedClean,
            _ => Life::EndedCrash,
        }
    }

    pub fn ended(&self, node: NodeId) -> bool {
        self.life(node) != Life::Current
    }

    /// Where a node receives hints; `None` while this table does not know that life of the slot.
    pub fn address(&self, node: NodeId) -> Option<&[u8]> {
        let block = self.slots.get(&node.slot)?;
        let known = block.state == SlotState::Live && block.incarnation == node.incarnation;
        (known && !block.address.is_empty()).then_some(&block.address)
    }

    /// The latest lives of slots that were used and are free.
    pub fn vacant(&self) -> Vec<NodeId> {
        let free = |b: &&SlotBlock| b.state == SlotState::Free && b.incarnation > 0;
        self.slots.values().filter(free).map(|b| NodeId { slot: b.slot, incarnation: b.incarnation }).collect()
    }

    /// Whether the latest life that ended in a slot where nobody but `me` lives ended by a crash.
    pub fn crashed_before(&self, me: NodeId) -> bool {
        let over = |b: &&SlotBlock| b.last_ended > 0 && (b.state == SlotState::Free || b.slot == me.slot);
        self.slots.values().filter(over).any(|b| b.clean_ends & 1 == 0)
    }

    #[cfg(test)]
    pub(crate) fn each(&self, see: impl FnMut(&SlotBlock)) {
        self.slots.values().for_each(see);
    }

    /// The same knowledge in other names.
    #[cfg(test)]
    pub(crate) fn map(&self, f: impl Fn(&SlotBlock) -> SlotBlock) -> Self {
        Self { slots: self.slots.values().map(f).map(|b| (b.slot, b)).collect() }
    }

    /// Whether the slot has had this life, as far as is known.
    pub(crate) fn may_have_lived(&self, node: NodeId) -> bool {
        self.slots.get(&node.slot).is_some_and(|b| node.incarnation <= last_used(b))
    }

    pub(crate) fn seq(&self, slot: Slot) -> Option<u64> {
        self.slots.get(&slot).map(|b| b.seq)
    }

    pub fn incarnation(&self, slot: Slot) -> Option<Incarnation> {
        self.slots.get(&slot).map(|b| b.incarnation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(seq: u64, state: SlotState, incarnation: u32, last_ended: u32, clean_ends: u64) -> SlotBlock {
        SlotBlock {
            volume: 1,
            slot: 0,
            seq,
            nonce: 0,
            state,
            incarnation,
            last_ended,
            clean_ends,
            adopter: 0,
            host_name: String::new(),
            address: vec![1],
        }
    }

    #[test]
    fn ended_knowledge_is_monotone() {
        let node = |incarnation| NodeId { slot: 0, incarnation };
        let mut t = SlotTable::default();
        assert_eq!(t.life(node(3)), Life::Current);
        assert!(t.learn(block(5, SlotState::Live, 4, 3, 0b10)));
        assert!(!t.learn(block(4, SlotState::Live, 3, 2, 0)));
        assert_eq!(
            [1, 2, 3, 4, 5].map(|i| t.life(node(i))),
            [Life::EndedCrash, Life::EndedClean, Life::EndedCrash, Life::Current, Life::Current]
        );
        assert_eq!(t.address(node(4)), Some(&[1][..]));
        assert_eq!(t.address(node(5)), None);
    }

    #[test]
    fn crashes_count_where_nobody_else_lives() {
        let mut t = SlotTable::default();
        assert!(!t.crashed_before(NodeId { slot: 0, incarnation: 1 }));
        assert!(t.learn(block(5, SlotState::Live, 4, 3, 0b10)));
        assert!(t.crashed_before(NodeId { slot: 0, incarnation: 4 }));
        assert!(!t.crashed_before(NodeId { slot: 1, incarnation: 1 }), "another lives there, and has looked");
        assert!(t.learn(block(6, SlotState::Free, 4, 4, 0b100)));
        assert!(t.crashed_before(NodeId { slot: 1, incarnation: 1 }));
        assert!(t.learn(block(7, SlotState::Free, 5, 5, 0b1001)));
        assert!(!t.crashed_before(NodeId { slot: 1, incarnation: 1 }));
    }
}
