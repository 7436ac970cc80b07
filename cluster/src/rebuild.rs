//! Slot blocks that cannot be read any more: what is left on the device of the lives of their slots, and new blocks.
//!
//! A new block says that the latest life there is a trace of has died, so that the next survivor replays its journal: if it had
//! left in order, that finds nothing to do. No node may live in the slot; a node that joins meanwhile is in another one.

use blockdev::{BlockDevice, Caw, DevError, IoClass};

use crate::format::{Doorbell, Heartbeat, SlotBlock, SlotState};
use crate::node::{decode_slot, read_table};
use crate::{ClusterError, Incarnation, Layout, Result, Slot};

/// A new block's sequence number lies this far above any that counting by ones can have reached (I8); its nonce is new too, so
/// no compare-and-write that is still on its way can meet what it expects.
const BEYOND: u64 = 1 << 40;

/// The host name in a block that was written anew: a claimed slot has none, so there must be one.
const UNKNOWN_HOST: &str = "(unknown)";

/// Larger incarnations are damage, not age.
const SANE: Incarnation = Incarnation::MAX / 4;

/// The latest incarnation of a slot that heartbeats, doorbells and the other slots' blocks tell of; 0: none.
pub async fn traces(dev: &dyn BlockDevice, layout: &Layout, slot: Slot) -> std::result::Result<Incarnation, DevError> {
    let mut latest = 0;
    let beats = read_table(dev, layout, layout.heartbeats).await?;
    if let Some(h) = beats.get(usize::from(slot)).and_then(|b| Heartbeat::decode(b, layout.volume, slot).ok()) {
        latest = later(latest, h.node.incarnation);
    }
    for receiver in 0..layout.nodes {
        let row = read_table(dev, layout, layout.doorbell_row(receiver)).await?;
        if let Some(sent) = row.get(usize::from(slot)).and_then(|c| Doorbell::sent_by(c, layout.volume, slot)) {
            latest = later(latest, sent);
        }
    }
    let blocks = read_table(dev, layout, layout.slots).await?;
    for (other, sector) in (0..).zip(&blocks) {
        if let Ok(SlotBlock { state: SlotState::Recovering { by }, .. }) = decode_slot(layout, other, sector)
            && by.slot == slot
        {
            latest = later(latest, by.incarnation);
        }
    }
    Ok(latest)
}

fn later(latest: Incarnation, trace: Incarnation) -> Incarnation {
    if trace < SANE { latest.max(trace) } else { latest }
}

/// Writes a slot's block anew, after a life that has died. False if the block is not damaged (any more).
pub async fn rebuild_slot(
    dev: &dyn BlockDevice,
    layout: &Layout,
    slot: Slot,
    latest: Incarnation,
    nonce: u64,
) -> Result<bool> {
    let at = layout.slot_block(slot);
    let found = dev.read(IoClass::Lock, at, layout.stride as usize).await?;
    if decode_slot(layout, slot, &found).is_ok() {
        return Ok(false);
    }
    let latest = latest.min(SANE);
    let used = latest > 0;
    let block = SlotBlock {
        volume: layout.volume,
        slot,
        seq: BEYOND,
        nonce,
        state: if used { SlotState::Live } else { SlotState::Free },
        incarnation: latest,
        last_ended: latest.saturating_sub(1),
        clean_ends: 0,
        // A life may have begun and left no trace: its number is not used either.
        adopter: latest + 1,
        host_name: if used { UNKNOWN_HOST.into() } else { String::new() },
        address: Vec::new(),
    };
    let new = block.encode(layout.stride);
    let outcome = dev.compare_and_write(at, &found, &new).await;
    let written = match outcome {
        Ok(Caw::Written) => true,
        Ok(Caw::Mismatch(now)) => now == new,
        // Unknown is not failed (I9).
        Err(e) => match dev.read(IoClass::Lock, at, new.len()).await {
            Ok(now) if now[..] == new[..] => true,
            _ => return Err(e.into()),
        },
    };
    if !written {
        return Err(ClusterError::Damaged {
            what: format!("block of slot {slot}, which changes meanwhile,"),
            offset: at,
        });
    }
    dev.flush(IoClass::Lock).await?;
    Ok(true)
}
