//! The claim of every free slot by one node, for work that needs the volume to itself: repair.
//!
//! A claimed slot looks like one whose node is being recovered by the claimer, so nothing about it is new to the others: who
//! wants to join finds no free slot, and if the claimer dies, its own incarnation is ended first and then the claimed slots are
//! taken over like any dead recoverer's victims. The incarnation that a claim counts up never wrote anything.

use blockdev::{BlockDevice, IoClass};

use crate::format::{SlotBlock, SlotState};
use crate::node::{Node, decode_slot};
use crate::{ClusterError, Result, Slot, transitions};

impl Node {
    /// Claims all other slots, which must be free. After an error nothing stays claimed, as far as the device can be
    /// written.
    pub async fn claim_all(&self) -> Result<()> {
        let mut claimed = Vec::new();
        let mut failed = None;
        for slot in (0..self.layout().nodes).filter(|s| *s != self.id().slot) {
            match self.claim(slot).await {
                Ok(()) => claimed.push(slot),
                Err(e) => {
                    failed = Some(e);
                    break;
                }
            }
        }
        let Some(e) = failed else { return Ok(()) };
        for slot in claimed {
            if let Err(e) = self.unclaim(slot).await {
                tracing::warn!(slot, "the claim of a slot cannot be taken back: {e}");
            }
        }
        Err(e)
    }

    /// Frees what [`claim_all`](Self::claim_all) claimed.
    pub async fn unclaim_all(&self) -> Result<()> {
        let mut result = Ok(());
        for slot in (0..self.layout().nodes).filter(|s| *s != self.id().slot) {
            let done = self.unclaim(slot).await;
            if result.is_ok() {
                result = done;
            }
        }
        result
    }

    async fn read_slot(&self, slot: Slot) -> Result<SlotBlock> {
        let s = &self.shared;
        let at = s.layout.slot_block(slot);
        let sector = s.dev.read(IoClass::Lock, at, s.layout.stride as usize).await?;
        decode_slot(&s.layout, slot, &sector)
    }

    async fn claim(&self, slot: Slot) -> Result<()> {
        let s = &self.shared;
        s.live()?;
        let block = self.read_slot(slot).await?;
        let Some(new) = transitions::claimed_for_repair(&block, s.me, s.nonce()) else {
            return Err(in_use(&block));
        };
        // Before the claim, so that our own monitor does not take the slot for one whose recovery we forgot.
        if !s.recovering.modify_if(|r| r.insert(slot)) {
            return Err(in_use(&block));
        }
        let result = match s.change_slot(&block, &new).await {
            Ok(None) => return Ok(()),
            Ok(Some(other)) => Err(in_use(&other)),
            Err(e) => Err(e),
        };
        s.recovering.modify(|r| {
            r.remove(&slot);
        });
        result
    }

    async fn unclaim(&self, slot: Slot) -> Result<()> {
        let s = &self.shared;
        let freed = async {
            let block = self.read_slot(slot).await?;
            let Some(new) = transitions::unclaimed(&block, s.me, s.nonce()) else { return Ok(()) };
            match s.change_slot(&block, &new).await? {
                None => Ok(()),
                Some(_) => Err(ClusterError::Lapsed),
            }
        }
        .await;
        s.recovering.modify(|r| {
            r.remove(&slot);
        });
        freed
    }
}

fn in_use(block: &SlotBlock) -> ClusterError {
    ClusterError::InUse { slot: block.slot, host: block.host_name.clone() }
}

/// The node that has claimed all slots beside its own, if one has.
pub(crate) fn claimer<'a>(blocks: impl Iterator<Item = &'a SlotBlock> + Clone) -> Option<Slot> {
    let by = blocks.clone().find_map(|b| match b.state {
        SlotState::Recovering { by } => Some(by),
        _ => None,
    })?;
    let mine = |b: &SlotBlock| match b.slot == by.slot {
        true => b.state == SlotState::Live && b.incarnation == by.incarnation,
        // A claimed slot names no host, a dead node's does.
        false => b.state == (SlotState::Recovering { by }) && b.host_name.is_empty(),
    };
    blocks.clone().all(mine).then_some(by.slot)
}
