//! Devices that other hosts may reach although only the locks of this host's kernel keep nodes apart on them: kernel block
//! devices that are no shared SCSI disks. Several hosts on one would be its end, so whoever joins makes sure to be alone:
//!
//! 1. Before a slot is claimed: no node beats whose process this host does not see.
//! 2. After it: again, for those who looked before they could see us; and our own slot's block and heartbeat stay ours, for
//!    those who claimed the same slot. Of two hosts that join at the same time at least one sees the other, as the second claim
//!    comes before the second look of its own, and both beat from their claims on. They may both go.
//! 3. From then on with each look of the monitor: a node that is not seen and beats ends this membership (I12), and what is not
//!    seen is not dead before it was silent for a while.
//!
//! A node of this host that dies is not seen from then on, and may have written a heartbeat just before: what counts are
//! heartbeats that differ between two reads that both began when it was not seen.

use blockdev::{BlockDevice, FencingKind, IoClass, Presence};
use tokio::time::{Duration, Instant};

use crate::format::{Heartbeat, SlotBlock};
use crate::node::{decode_slot, read_table};
use crate::watch::{Round, Verdict};
use crate::{ClusterError, Layout, NodeId, Result, Timeouts};

/// Whether it is such a device.
pub(crate) fn applies(dev: &dyn BlockDevice) -> bool {
    let g = dev.geometry();
    g.fencing == FencingKind::ProcessLock && g.others_unseen
}

/// How long a node that lives may seem silent.
fn silence(timeouts: &Timeouts) -> Duration {
    timeouts.heartbeat() * 5 / 2
}

/// A node whose process this host does not see.
pub(crate) struct Unseen {
    writer: NodeId,
    /// Its heartbeat, read when it was not seen any more, and since when it is the same.
    beat: Option<(Vec<u8>, Instant)>,
}

impl Unseen {
    pub fn new(writer: NodeId) -> Self {
        Self { writer, beat: None }
    }

    /// By a round after which it was not seen.
    pub fn judge(&mut self, writer: NodeId, round: &Round, timeouts: &Timeouts) -> Verdict {
        if self.writer != writer {
            *self = Self::new(writer);
            return Verdict::Undecided;
        }
        let now = round.heartbeat(writer.slot);
        match &self.beat {
            // What was read before is from before it was found not to be seen.
            None => self.beat = Some((now.to_vec(), round.ended)),
            Some((beat, _)) if beat[..] != *now => return Verdict::Elsewhere,
            Some((_, since)) if round.started.saturating_duration_since(*since) >= silence(timeouts) => {
                return Verdict::Dead;
            }
            Some(_) => {}
        }
        Verdict::Undecided
    }
}

/// Whether no node beats that is not seen.
async fn alone(dev: &dyn BlockDevice, layout: &Layout, timeouts: &Timeouts) -> Result<()> {
    let mut unseen: Vec<SlotBlock> = Vec::new();
    for block in Round::read(dev, layout).await?.slots.into_iter().flatten() {
        if let Some(writer) = block.writer()
            && dev.presence(writer.fence_key()).await? == Presence::Gone
        {
            unseen.push(block);
        }
    }
    let first = read_table(dev, layout, layout.heartbeats).await?;
    let end = Instant::now() + silence(timeouts);
    while !unseen.is_empty() && Instant::now() < end {
        tokio::time::sleep(timeouts.heartbeat() / 4).await;
        let now = read_table(dev, layout, layout.heartbeats).await?;
        let beat = |of: &[blockdev::AlignedBuf], block: &SlotBlock| {
            let slot = block.writer().map_or(block.slot, |w| w.slot);
            of.get(usize::from(slot)).map(|b| b.to_vec())
        };
        if let Some(block) = unseen.iter().find(|block| beat(&now, block) != beat(&first, block)) {
            return Err(ClusterError::OtherHost { host: block.host_name.clone() });
        }
    }
    Ok(())
}

/// The first look.
pub(crate) async fn refuse_others(dev: &dyn BlockDevice, layout: &Layout, timeouts: &Timeouts) -> Result<()> {
    if applies(dev) { alone(dev, layout, timeouts).await } else { Ok(()) }
}

/// Whether another node of this host lives: it has made sure that the host is alone.
pub(crate) async fn others_of_this_host(dev: &dyn BlockDevice, round: &Round, me: NodeId) -> Result<bool> {
    for writer in round.slots.iter().flatten().filter_map(SlotBlock::writer).filter(|w| w.slot != me.slot) {
        if dev.presence(writer.fence_key()).await? == Presence::Present {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The second look, by who has claimed a slot with `mine` and beats there with `nonce`.
pub(crate) async fn prove_alone(
    dev: &dyn BlockDevice,
    layout: &Layout,
    timeouts: &Timeouts,
    mine: &SlotBlock,
    nonce: u64,
) -> Result<()> {
    // Who saw the slots as they were before our claim has made its own by now.
    tokio::time::sleep(timeouts.heartbeat() / 2).await;
    let (others, own) = tokio::join!(alone(dev, layout, timeouts), slot_stays(dev, layout, timeouts, mine, nonce));
    own.and(others)
}

/// Compare-and-write does not exclude other hosts there: two may have claimed one slot.
async fn slot_stays(
    dev: &dyn BlockDevice,
    layout: &Layout,
    timeouts: &Timeouts,
    mine: &SlotBlock,
    nonce: u64,
) -> Result<()> {
    let end = Instant::now() + silence(timeouts);
    while Instant::now() < end {
        tokio::time::sleep(timeouts.heartbeat() / 16).await;
        let len = layout.stride as usize;
        let block = dev.read(IoClass::Lock, layout.slot_block(mine.slot), len).await?;
        let block = decode_slot(layout, mine.slot, &block)?;
        let beat = dev.read(IoClass::Liveness, layout.heartbeat(mine.slot), len).await?;
        let ours = Heartbeat::decode(&beat, layout.volume, mine.slot).is_ok_and(|b| b.nonce == nonce);
        if block != *mine || !ours {
            return Err(ClusterError::OtherHost { host: block.host_name });
        }
    }
    Ok(())
}
