//! How long the sectors of each slot have stood still, as in [`crate::watch`]: between two successful reads, on our own clock, and
//! only while our own reads were neither slow nor far apart.

use std::collections::BTreeMap;

use blockdev::Result;
use tokio::time::{Duration, Instant};

use super::Core;
use crate::Slot;

#[derive(Default)]
pub(super) struct Silence {
    windows: BTreeMap<Slot, ([u8; 32], Instant)>,
    last: Option<Instant>,
    /// What the last look found.
    found: BTreeMap<Slot, Duration>,
}

impl Silence {
    /// Looks, at most twice per heartbeat.
    pub async fn look(&mut self, core: &Core) -> Result<BTreeMap<Slot, Duration>> {
        let beat = core.timeouts.heartbeat();
        if self.last.is_some_and(|last| super::since(last) < beat / 2) {
            return Ok(self.found.clone());
        }
        let started = Instant::now();
        let slots = core.table(core.layout.slots).await?;
        let beats = core.table(core.layout.heartbeats).await?;
        let bids = core.table(core.area).await?;
        let ended = Instant::now();
        let gap = self.last.is_some_and(|last| started.saturating_duration_since(last) > 3 * beat);
        if gap || ended - started > beat {
            self.windows.clear();
        }
        self.last = Some(ended);
        self.found.clear();
        for (slot, ((a, b), c)) in (0..).zip(slots.iter().zip(&beats).zip(&bids)) {
            let mut hash = blake3::Hasher::new();
            hash.update(a).update(b).update(c);
            let evidence = *hash.finalize().as_bytes();
            let window = self.windows.entry(slot).or_insert((evidence, ended));
            if window.0 != evidence {
                *window = (evidence, ended);
            }
            self.found.insert(slot, started.saturating_duration_since(window.1));
        }
        Ok(self.found.clone())
    }
}
