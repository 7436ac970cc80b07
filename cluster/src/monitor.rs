//! The monitor: reads slots and heartbeats every heartbeat, learns who lives, and starts recoveries.

use std::sync::Arc;

use blockdev::BlockDevice;
use tokio::time::{Instant, sleep_until};

use crate::ClusterError;
use crate::format::{SlotBlock, SlotState};
use crate::node::{Shared, State};
use crate::watch::{Round, Verdict, Watches};

pub(crate) async fn run(shared: Arc<Shared>) {
    let mut watches = Watches::default();
    loop {
        let started = Instant::now();
        match Round::read(&*shared.dev, &shared.layout).await {
            Ok(round) => look(&shared, &mut watches, &round).await,
            Err(e) => {
                tracing::warn!(node = %shared.me, "slots and heartbeats: {e}");
                watches.restart();
            }
        }
        tokio::select! {
            biased;
            _ = shared.not_live() => return,
            () = sleep_until((started + shared.timeouts.heartbeat()).max(Instant::now())) => {}
        }
    }
}

async fn look(shared: &Arc<Shared>, watches: &mut Watches, round: &Round) {
    for (block, slot) in round.slots.iter().zip(0..) {
        match block {
            Ok(block) => {
                // A journal that cannot be replayed stays so; a block is as good as it reads now.
                shared.stuck.lock().retain(|s, e| *s != slot || matches!(e, ClusterError::Recovery { .. }));
                if block.slot == shared.me.slot {
                    let ours = block.state == SlotState::Live && block.incarnation == shared.me.incarnation;
                    if !ours && *shared.state.borrow() == State::Live {
                        shared.lapse("another node took over this slot");
                        return;
                    }
                }
                shared.learn(block.clone());
            }
            Err(e) => {
                if shared.stuck.lock().insert(slot, e.clone()).is_none() {
                    tracing::error!(node = %shared.me, "{e}: locks of its node stay taken");
                }
            }
        }
    }
    if !watches.accept(round, &shared.timeouts) {
        return;
    }
    for block in round.slots.iter().flatten() {
        if block.slot != shared.me.slot && eligible(shared, watches, block, round).await {
            crate::recovery::start(shared, block.clone());
            watches.forget(block.slot);
        }
    }
}

/// Whether the slot's incarnation died and nobody alive sees to it.
async fn eligible(shared: &Arc<Shared>, watches: &mut Watches, block: &SlotBlock, round: &Round) -> bool {
    if shared.recovering.borrow().contains(&block.slot) {
        return false;
    }
    match block.state {
        SlotState::Free => {
            watches.forget(block.slot);
            false
        }
        // The recoverer died in turn: it was fenced when its own incarnation was ended.
        SlotState::Recovering { by } => by == shared.me || shared.table.lock().ended(by),
        SlotState::Live | SlotState::Adopting { .. } => {
            let dev: &dyn BlockDevice = &*shared.dev;
            watches.judge(dev, &shared.timeouts, block, round, None).await == Verdict::Dead
        }
    }
}
