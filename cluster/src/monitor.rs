//! The monitor: reads slots and heartbeats every heartbeat, learns who lives, and starts recoveries.

use std::sync::Arc;

use blockdev::BlockDevice;
use tokio::time::{Instant, sleep_until};

use crate::format::{SlotBlock, SlotState};
use crate::node::{Shared, State};
use crate::transitions::{Care, care, is_mine};
use crate::watch::{Round, Verdict, Watches};
use crate::{ClusterError, Slot};

pub(crate) async fn run(shared: Arc<Shared>) {
    let mut watches = Watches::default();
    loop {
        let started = Instant::now();
        match Round::read(&*shared.dev, &shared.layout).await {
            Ok(round) => look(&shared, &mut watches, &round).await,
            Err(e) => {
                tracing::warn!(node = %shared.me, "slots and heartbeats: {e}");
                watches.restart();
                if shared.dev.readable.lock().elapsed() > shared.timeouts.lease() {
                    // It sees nobody's demands and cannot give up what it holds: the others need not wait for it any longer.
                    shared.lapse("nothing could be read for as long as a lease");
                }
            }
        }
        if let Some(plain) = &shared.plain {
            plain.watch().await;
        }
        tokio::select! {
            biased;
            _ = shared.not_live() => return,
            () = sleep_until((started + shared.timeouts.heartbeat()).max(Instant::now())) => {}
        }
    }
}

async fn look(shared: &Arc<Shared>, watches: &mut Watches, round: &Round) {
    // Known from an earlier round: what they name was read again since.
    let known = |b: &SlotBlock| shared.table.lock().seq(b.slot) == Some(b.seq);
    let hopeless: Vec<Slot> =
        round.slots.iter().flatten().filter(|b| known(b) && round.never_recovered(b)).map(|b| b.slot).collect();
    for (block, slot) in round.slots.iter().zip(0..) {
        match block {
            Ok(block) => {
                // A journal that cannot be replayed stays so; a block is as good as it reads now.
                let damaged = hopeless.contains(&slot).then(|| shared.layout.hopeless(slot));
                shared.stick(slot, damaged);
                if block.slot == shared.me.slot {
                    let ours = is_mine(block, shared.me);
                    if !ours && *shared.state.borrow() == State::Live {
                        shared.lapse("another node took over this slot");
                        return;
                    }
                }
                shared.learn(block.clone());
            }
            Err(e) => {
                shared.stick(slot, Some(e.clone()));
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

impl Shared {
    /// What keeps the locks of a slot's node from being freed, as its block reads now; a journal that cannot be replayed
    /// stays so.
    fn stick(&self, slot: Slot, why: Option<ClusterError>) {
        let mut stuck = self.stuck.lock();
        match why {
            Some(e) => {
                if stuck.insert(slot, e.clone()).is_none() {
                    tracing::error!(node = %self.me, "{e}: locks of its node stay taken");
                }
            }
            None => stuck.retain(|s, e| *s != slot || matches!(e, ClusterError::Recovery { .. })),
        }
    }
}

/// Whether the slot's incarnation died and nobody alive sees to it.
async fn eligible(shared: &Arc<Shared>, watches: &mut Watches, block: &SlotBlock, round: &Round) -> bool {
    if shared.recovering.borrow().contains(&block.slot) {
        return false;
    }
    if block.state == SlotState::Free {
        watches.forget(block.slot);
    }
    let care = care(block, shared.me, &shared.table.lock());
    match care {
        Care::Nothing => false,
        Care::Recover => true,
        Care::Judge => {
            let dev: &dyn BlockDevice = &*shared.dev;
            let verdict = watches.judge(dev, &shared.timeouts, block, round, None).await;
            if verdict == Verdict::Elsewhere {
                let host = &block.host_name;
                shared.lapse(&format!("another host ({host}) uses the device, and nothing keeps hosts apart on it"));
            }
            let dead = verdict == Verdict::Dead;
            if let (true, Some(plain), Some(writer)) = (dead, &shared.plain, block.writer()) {
                plain.found_dead(writer);
            }
            dead
        }
    }
}
