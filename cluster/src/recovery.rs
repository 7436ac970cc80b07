//! Recovery of a dead node: claim its slot, replay its journal, end its incarnation.
//!
//! The victim is fenced, or its lease and the queueing time are over, before this starts ([`crate::watch`]). The claim is a
//! compare-and-write of the slot block from exactly what was judged, so of several survivors one replays, and a victim
//! that beats us to its own block (leaving, or a new life) is left alone. If the recoverer dies, its own incarnation is
//! ended first, and then its victims are taken over by others: a replay may run again, but never two at a time.

use std::sync::Arc;

use crate::format::SlotBlock;
use crate::node::{Shared, State};
use crate::{ClusterError, NodeId, Result, transitions};

/// After so many failures those who wait for the dead node's locks get an error.
const GIVE_UP_WAITING: u32 = 3;

/// Starts the recovery of the incarnation in `block` as a task.
pub(crate) fn start(shared: &Arc<Shared>, block: SlotBlock) {
    let slot = block.slot;
    // Leaving waits for this to be empty: nothing may be added after it looked.
    if shared.state.borrow().ne(&State::Live) || !shared.recovering.modify_if(|r| r.insert(slot)) {
        return;
    }
    let task = shared.clone();
    shared.spawn(async move {
        if let Err(e) = recover(&task, block).await {
            tracing::warn!(node = %task.me, slot, "recovery: {e}");
        }
        task.recovering.modify(|r| {
            r.remove(&slot);
        });
    });
}

async fn recover(shared: &Arc<Shared>, block: SlotBlock) -> Result<()> {
    let dead = NodeId { slot: block.slot, incarnation: block.incarnation };
    let claimed = transitions::recovering(&block, shared.me, shared.nonce());
    if let Some(other) = shared.change_slot(&block, &claimed).await? {
        shared.learn(other);
        return Ok(());
    }
    shared.learn(claimed.clone());
    tracing::info!(node = %shared.me, "recovering {dead}: replaying its journal");
    let mut failures = 0;
    while let Err(reason) = shared.recoverer.replay(dead).await {
        failures += 1;
        if failures == GIVE_UP_WAITING {
            let why = ClusterError::Recovery { slot: dead.slot, reason: reason.clone() };
            shared.stuck.lock().insert(dead.slot, why);
        }
        tracing::error!(node = %shared.me, "journal of {dead}: {reason}; its locks stay taken until it can be replayed");
        tokio::select! {
            biased;
            // Others take over once our incarnation has ended.
            why = shared.not_live() => return Err(why),
            () = tokio::time::sleep(2 * shared.timeouts.heartbeat()) => {}
        }
    }
    shared.stuck.lock().remove(&dead.slot);
    let ended = transitions::recovered(&block, &claimed, shared.nonce());
    if let Some(other) = shared.change_slot(&claimed, &ended).await? {
        shared.learn(other);
        shared.lapse("another node took over our recovery");
        return Ok(());
    }
    shared.learn(ended);
    shared.stats.recoveries.one();
    tracing::info!(node = %shared.me, "recovered {dead}");
    if let Some(client) = shared.client.get() {
        client.recovered(dead);
    }
    Ok(())
}
