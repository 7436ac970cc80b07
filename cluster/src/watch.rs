//! Judging from heartbeats and from the device which nodes are dead.
//!
//! What counts is how long a slot's heartbeat stayed unchanged between two successful reads of ours, on our own clock. A
//! read that failed or took longer than a heartbeat, or a long gap between rounds, restarts every window: nobody is
//! declared dead on evidence gathered while our own I/O stalled.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use blockdev::{AlignedBuf, BlockDevice, DevError, FenceKey, Fenced, FencingKind, Presence};
use tokio::time::{Duration, Instant};

use crate::format::{Heartbeat, SlotBlock};
use crate::node::{decode_slot, read_table};
use crate::one_host::Unseen;
use crate::{ClusterError, Layout, NodeId, Result, Slot, Timeouts, transitions};

/// All slot blocks and heartbeats, read one after the other.
pub(crate) struct Round {
    pub slots: Vec<Result<SlotBlock>>,
    pub heartbeats: Vec<AlignedBuf>,
    pub started: Instant,
    pub ended: Instant,
}

impl Round {
    pub async fn read(dev: &dyn BlockDevice, layout: &Layout) -> std::result::Result<Self, DevError> {
        let started = Instant::now();
        let slots = read_table(dev, layout, layout.slots).await?;
        let heartbeats = read_table(dev, layout, layout.heartbeats).await?;
        let slots = slots.iter().zip(0..).map(|(sector, slot)| decode_slot(layout, slot, sector)).collect();
        Ok(Self { slots, heartbeats, started, ended: Instant::now() })
    }

    pub fn never_recovered(&self, block: &SlotBlock) -> bool {
        transitions::never_recovered(block, |s| self.slots.get(usize::from(s)).and_then(|b| b.as_ref().ok()))
    }

    pub fn heartbeat(&self, slot: Slot) -> &[u8] {
        self.heartbeats.get(usize::from(slot)).map_or(&[], |b| b)
    }
}

impl Layout {
    /// The error of a slot whose recovery never ends.
    pub(crate) fn hopeless(&self, slot: Slot) -> ClusterError {
        let what = format!("block of slot {slot} (it is being recovered by a node that there is not)");
        ClusterError::Damaged { what, offset: self.slot_block(slot) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Its heartbeat changed, or its process is there.
    Alive,
    Undecided,
    /// It cannot write any more: it may be taken over.
    Dead,
    /// It beats, and its process is none of this host's, on a device that keeps no hosts apart.
    Elsewhere,
}

struct Window {
    evidence: [u8; 32],
    since: Instant,
    changed: bool,
    /// The device said that it cannot fence.
    cannot_fence: bool,
}

/// The windows of all slots.
#[derive(Default)]
pub(crate) struct Watches {
    windows: BTreeMap<Slot, Window>,
    unseen: BTreeMap<Slot, Unseen>,
    last: Option<Instant>,
}

impl Watches {
    pub fn restart(&mut self) {
        self.windows.clear();
        self.unseen.clear();
        self.last = None;
    }

    /// Whether a round may be judged by; restarts the windows if not.
    pub fn accept(&mut self, round: &Round, timeouts: &Timeouts) -> bool {
        let slow = round.ended - round.started > timeouts.heartbeat();
        let gap =
            self.last.is_some_and(|last| round.started.saturating_duration_since(last) > 3 * timeouts.heartbeat());
        if slow || gap {
            self.restart();
        }
        self.last = Some(round.ended);
        !slow
    }

    pub fn forget(&mut self, slot: Slot) {
        self.windows.remove(&slot);
        self.unseen.remove(&slot);
    }

    /// How long the slot has shown no life, up to the start of this round.
    fn unchanged(&mut self, block: &SlotBlock, round: &Round) -> &mut Window {
        let mut hash = blake3::Hasher::new();
        hash.update(&block.seq.to_le_bytes());
        hash.update(round.heartbeat(block.slot));
        let evidence = *hash.finalize().as_bytes();
        let fresh = Window { evidence, since: round.ended, changed: false, cannot_fence: false };
        let window = self.windows.entry(block.slot).or_insert(fresh);
        if window.evidence != evidence {
            *window = Window { evidence, since: round.ended, changed: true, cannot_fence: window.cannot_fence };
        }
        window
    }

    /// Judges the writer of a slot by an accepted round. Fences it where that makes the difference; `as_key` is the key
    /// to register first, for a node that has none yet.
    pub async fn judge(
        &mut self,
        dev: &dyn BlockDevice,
        timeouts: &Timeouts,
        block: &SlotBlock,
        round: &Round,
        as_key: Option<FenceKey>,
    ) -> Verdict {
        let Some(writer) = block.writer() else { return Verdict::Undecided };
        let mut present = false;
        if dev.geometry().fencing == FencingKind::ProcessLock {
            match dev.presence(writer.fence_key()).await {
                Ok(Presence::Gone) if dev.geometry().others_unseen => {
                    return match self.unseen.entry(block.slot) {
                        Entry::Occupied(mut known) => known.get_mut().judge(writer, round, timeouts),
                        Entry::Vacant(new) => {
                            new.insert(Unseen::new(writer));
                            Verdict::Undecided
                        }
                    };
                }
                Ok(Presence::Gone) => return Verdict::Dead,
                Ok(Presence::Present) => present = true,
                Ok(Presence::Unknown) => {}
                Err(e) => tracing::warn!(node = %writer, "presence: {e}"),
            }
            self.unseen.remove(&block.slot);
        }
        let window = self.unchanged(block, round);
        let unchanged = round.started.saturating_duration_since(window.since);
        if unchanged < timeouts.dead_after() {
            return if window.changed || present { Verdict::Alive } else { Verdict::Undecided };
        }
        if unchanged >= timeouts.dead_unfenced() {
            return Verdict::Dead;
        }
        if window.cannot_fence || dev.geometry().fencing == FencingKind::None {
            return Verdict::Undecided;
        }
        if let Some(key) = as_key
            && let Err(e) = dev.register(key).await
        {
            tracing::debug!(slot = block.slot, "register: {e}");
            return Verdict::Undecided;
        }
        match dev.fence(writer.fence_key()).await {
            Ok(Fenced::Done) => Verdict::Dead,
            Ok(Fenced::MustWait) => {
                let wait = timeouts.dead_unfenced().saturating_sub(unchanged);
                tracing::warn!(node = %writer, "silent and cannot be fenced: takeover in {} s", wait.as_secs());
                window.cannot_fence = true;
                Verdict::Undecided
            }
            Err(e) => {
                tracing::warn!(node = %writer, "fence: {e}");
                Verdict::Undecided
            }
        }
    }
}

/// A slot as tools see it.
#[derive(Clone, Debug)]
pub struct SlotInfo {
    pub slot: Slot,
    /// `Err`: the block is damaged.
    pub block: Result<SlotBlock>,
    /// Whether a node is using the slot; `None` if that could not be told in the time given.
    pub alive: Option<bool>,
    /// Counter of the last heartbeat, if readable.
    pub heartbeat: Option<u64>,
}

/// Whether the device knows that a node is there, or that it is not.
async fn present(dev: &dyn BlockDevice, layout: &Layout, node: NodeId) -> Result<Option<bool>> {
    // Process locks show the nodes of one host only.
    if layout.plain.is_some() {
        return Ok(None);
    }
    Ok(match dev.presence(node.fence_key()).await? {
        Presence::Gone if dev.geometry().others_unseen => None,
        Presence::Gone => Some(false),
        Presence::Present if dev.geometry().fencing == FencingKind::ProcessLock => Some(true),
        Presence::Present | Presence::Unknown => None,
    })
}

/// All slots, for status, mkfs and fsck. Where the device cannot tell whether a node is there, its heartbeat is watched
/// for up to `watch` (two heartbeats tell a healthy node).
pub async fn read_slots(dev: &dyn BlockDevice, layout: &Layout, watch: Duration) -> Result<Vec<SlotInfo>> {
    let first = Round::read(dev, layout).await?;
    let mut infos = Vec::new();
    for (slot, block) in (0..).zip(first.slots.iter()) {
        let alive = match block {
            Ok(block) => match block.writer() {
                Some(writer) => present(dev, layout, writer).await?,
                None => Some(false),
            },
            // Whoever wrote it last may still live.
            Err(_) => present(dev, layout, NodeId { slot, incarnation: 0 }).await?,
        };
        let heartbeat = Heartbeat::decode(first.heartbeat(slot), layout.volume, slot).ok().map(|h| h.counter);
        infos.push(SlotInfo { slot, block: block.clone(), alive, heartbeat });
    }
    if first.slots.iter().flatten().any(|b| first.never_recovered(b)) {
        // What the blocks name is to be read after them.
        let again = Round::read(dev, layout).await?;
        for (info, block) in infos.iter_mut().zip(&again.slots) {
            let same = |b: &SlotBlock| info.block.as_ref().is_ok_and(|known| known.seq == b.seq);
            if block.as_ref().is_ok_and(|b| same(b) && again.never_recovered(b)) {
                info.block = Err(layout.hopeless(info.slot));
            }
        }
    }
    let end = Instant::now() + watch;
    let pause = (watch / 8).max(Duration::from_millis(50));
    while infos.iter().any(|i| i.alive.is_none()) && Instant::now() + pause <= end {
        tokio::time::sleep(pause).await;
        let now = read_table(dev, layout, layout.heartbeats).await?;
        for (info, (old, new)) in infos.iter_mut().zip(first.heartbeats.iter().zip(now.iter())) {
            if info.alive.is_none() && old[..] != new[..] {
                info.alive = Some(true);
            }
        }
    }
    Ok(infos)
}
