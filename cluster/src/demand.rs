//! What other nodes want from this one: from their hints and doorbells to the client's demand.

use std::sync::Arc;

use tokio::time::{Duration, Instant, sleep_until};

use crate::node::Shared;
use crate::transitions::{conflicts, keeps};
use crate::{LockId, Mode, NodeId};

/// A demand that brought no release is repeated when the lock is asked for again after this long.
const REPEAT: Duration = Duration::from_secs(1);

enum Reaction {
    Nothing,
    Demand,
    /// The disk may say that we hold what we do not want.
    Settle,
}

impl Shared {
    /// `from` says that it wants `id`. Only a request to look: the lock block decides.
    pub fn asked_for(self: &Arc<Self>, id: LockId, wanted: Mode, from: NodeId) {
        if self.layout.lock_block(id).is_none() || self.may_release().is_err() {
            return;
        }
        let me = self.me;
        let reaction = self.with_local(id, |l| {
            let Some(held) = &l.held else {
                if l.waiting.is_some() {
                    // We may have been granted it without knowing yet.
                    l.early = l.early.max(Some(wanted));
                    l.wake.notify_one();
                    return Reaction::Nothing;
                }
                return if l.absent { Reaction::Nothing } else { Reaction::Settle };
            };
            l.stale = true;
            if !conflicts(held.grant.mode, wanted) {
                return Reaction::Settle;
            }
            // Two holders that both want more: who is ahead in the queue keeps what it holds.
            let ahead = l.waiting.is_some() && l.block.as_ref().is_some_and(|b| keeps(b, me, from));
            if ahead { Reaction::Nothing } else { Reaction::Demand }
        });
        match reaction {
            Reaction::Nothing => {}
            Reaction::Demand => self.demanded(id, wanted),
            Reaction::Settle => {
                if self.with_local(id, |l| std::mem::replace(&mut l.settling, true)) {
                    return;
                }
                let shared = self.clone();
                self.spawn(async move {
                    let result = shared.settle(id).await;
                    shared.with_local(id, |l| l.settling = false);
                    if let Err(e) = result {
                        tracing::warn!(node = %shared.me, "{id}: {e}");
                    }
                });
            }
        }
    }

    /// Another node asks to look.
    pub fn woken(&self, id: LockId) {
        if let (Some(client), true) = (self.client.get(), self.live().is_ok()) {
            client.woken(id);
        }
    }

    /// Tells the client, once the lock was held for the minimum time. Always from a task of its own: the caller may be the
    /// client's own acquire or release.
    pub fn demanded(self: &Arc<Self>, id: LockId, wanted: Mode) {
        let Some(client) = self.client.get().cloned() else { return };
        let now = Instant::now();
        let due = self.with_local(id, |l| {
            let held = l.held.as_mut().filter(|h| conflicts(h.grant.mode, wanted))?;
            let again = held.demanded.is_none_or(|(mode, at)| wanted > mode || now >= at + REPEAT);
            if !again {
                return None;
            }
            let at = (held.since + self.timeouts.min_hold()).max(now);
            held.demanded = Some((wanted, at));
            Some((held.since, at))
        });
        let Some((since, at)) = due else { return };
        let shared = self.clone();
        self.spawn(async move {
            sleep_until(at).await;
            let current = shared.with_local(id, |l| {
                l.held.as_ref().is_some_and(|h| h.since == since && h.demanded == Some((wanted, at)))
            });
            if current {
                shared.stats.demands.one();
                client.demand(id, wanted);
            }
        });
    }
}
