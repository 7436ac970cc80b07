//! Slots, and the journals of the nodes that died in them.
//!
//! A slot block that is damaged is written anew as that of a node that died, by compare-and-write from what was found. Journals
//! are replayed by [`cluster::Node`] as by any survivor, so under the dead node's slot and by one at a time; one that cannot
//! be replayed is salvaged, and emptied, at the same place.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use blockdev::{AlignedBuf, BlockDevice, IoClass};
use cluster::{Node, NodeId, Recoverer, Slot, SlotState};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::{Repair, RepairError, repaired};
use crate::check::ADVICE;
use crate::format::layout::{BLOCK, VolumeLayout};
use crate::format::superblock::Superblock;
use crate::recovery::JournalRecoverer;
use crate::visit;

/// For the replay itself, beyond the time in which a node is found dead.
const REPLAY_TIME: Duration = Duration::from_secs(120);

/// Writes damaged slot blocks anew; `lost` has each slot with the last incarnation that left a trace. Without `may_lose` only
/// those whose journals can be asked who wrote them last.
pub async fn slots(
    dev: &Arc<dyn BlockDevice>,
    lost: &[NodeId],
    may_lose: bool,
    seed: u64,
) -> Result<Vec<Repair>, RepairError> {
    let mut done = Vec::new();
    if lost.is_empty() {
        return Ok(done);
    }
    let layout = superblock(dev).await?.layout();
    for node in lost {
        if !may_lose && journal::last_opened_by(dev, layout.journal(node.slot)).await.is_err() {
            continue;
        }
        let nonce = seed ^ u64::from(node.slot);
        let cluster = layout.cluster();
        if cluster::rebuild_slot(dev.as_ref(), &cluster, node.slot, node.incarnation, nonce).await? {
            let text = match node.incarnation {
                0 => "written anew, for a slot that was never used".into(),
                _ => format!("written anew, after {node}"),
            };
            done.push(Repair { place: format!("slot {}", node.slot), text });
        }
    }
    Ok(done)
}

async fn superblock(dev: &Arc<dyn BlockDevice>) -> Result<Superblock, RepairError> {
    let first = dev.read(IoClass::Meta, 0, BLOCK as usize).await?;
    Ok(Superblock::decode(&first)?)
}

/// Replays the journals of `dead` and ends their incarnations: joins as a node does and waits until the recovery of all is
/// done. With `may_lose`, a journal that cannot be replayed is salvaged. `seed` must differ from that of any other node.
pub async fn recover(
    dev: &Arc<dyn BlockDevice>,
    dead: &[NodeId],
    may_lose: bool,
    seed: u64,
) -> Result<Vec<Repair>, RepairError> {
    if dead.is_empty() {
        return Ok(Vec::new());
    }
    let layout = superblock(dev).await?.layout();
    let salvager = Arc::new(Salvager {
        inner: JournalRecoverer::new(dev.clone(), layout),
        device: Mutex::new(dev.clone()),
        layout,
        done: Mutex::new(Vec::new()),
    });
    let recoverer: Arc<dyn Recoverer> = match may_lose {
        true => salvager.clone(),
        false => Arc::new(JournalRecoverer::new(dev.clone(), layout)),
    };
    let (node, sb) = join(dev, recoverer, seed).await?;
    let waited = ended(dev, &layout.cluster(), dead, &sb, &node).await;
    // The slot is given up whatever happened; if that fails too, the next node takes it over. Leaving would wait for a replay that
    // does not come to an end.
    let left = match &waited {
        Ok(()) => node.leave().await,
        Err(_) => Ok(()),
    };
    waited?;
    left?;
    let done = std::mem::take(&mut *salvager.done.lock());
    let whole = dead.iter().filter(|d| !done.iter().any(|(n, _)| n.slot == d.slot));
    let whole = whole.map(|d| repaired(format!("journal of {d}"), "replayed"));
    Ok(whole.chain(done.iter().map(|(_, r)| r.clone())).collect())
}

/// Replays what can be replayed of a journal, and empties it if it could not be replayed as a whole.
struct Salvager {
    inner: JournalRecoverer,
    device: Mutex<Arc<dyn BlockDevice>>,
    layout: VolumeLayout,
    done: Mutex<Vec<(NodeId, Repair)>>,
}

#[async_trait]
impl Recoverer for Salvager {
    fn attach(&self, guarded: Arc<dyn BlockDevice>) {
        *self.device.lock() = guarded.clone();
        self.inner.attach(guarded);
    }

    async fn replay(&self, dead: NodeId) -> Result<(), String> {
        let Err(why) = self.inner.replay(dead).await else { return Ok(()) };
        let why = why.trim_end_matches(ADVICE);
        let dev = self.device.lock().clone();
        let region = self.layout.journal(dead.slot);
        let place = format!("journal of {dead}");
        let mut done = Vec::new();
        match journal::salvage(&dev, region, dead, &self.inner).await {
            Ok(s) => {
                let text = format!("{} of its records replayed, though {why}", s.records);
                done.push(repaired(place.clone(), &text));
                let given_up = s.given_up.into_iter().map(|x| format!("given up: {x}"));
                done.extend(s.assumed.into_iter().chain(given_up).map(|x| repaired(place.clone(), &x)));
            }
            Err(_) => {
                let text =
                    format!("emptied ({why}): what its node had acknowledged shortly before it ended may be lost");
                done.push(repaired(place, &text));
            }
        }
        clear(&dev, &self.layout, dead.slot).await.map_err(|e| e.to_string())?;
        self.done.lock().extend(done.into_iter().map(|r| (dead, r)));
        Ok(())
    }
}

/// Empties a journal; nobody else may have its slot.
pub(super) async fn clear(dev: &Arc<dyn BlockDevice>, layout: &VolumeLayout, slot: Slot) -> Result<(), RepairError> {
    let region = layout.journal(slot);
    let header = AlignedBuf::copy_of(&journal::initial_header(region));
    dev.write(IoClass::Meta, region.offset, Arc::new(header), false).await?;
    Ok(dev.flush(IoClass::Meta).await?)
}

pub(super) async fn join(
    dev: &Arc<dyn BlockDevice>,
    recoverer: Arc<dyn Recoverer>,
    seed: u64,
) -> Result<(Arc<Node>, Superblock), RepairError> {
    let sb = superblock(dev).await?;
    let node = visit::join(dev, &sb, "fsck.clusterfs", recoverer, seed).await?;
    Ok((node, sb))
}

/// Waits until every one of `dead` has ended.
async fn ended(
    dev: &Arc<dyn BlockDevice>,
    layout: &cluster::Layout,
    dead: &[NodeId],
    sb: &Superblock,
    node: &Arc<Node>,
) -> Result<(), RepairError> {
    let end = Instant::now() + sb.timeouts.dead_unfenced() + 2 * sb.timeouts.dead_after() + REPLAY_TIME;
    loop {
        let mut left = None;
        for d in dead {
            let at = layout.slot_block(d.slot);
            let sector = dev.read(IoClass::Lock, at, layout.stride as usize).await?;
            let block = cluster::SlotBlock::decode(&sector, layout.volume, d.slot);
            let over = block.as_ref().is_ok_and(|b| b.last_ended >= d.incarnation || b.state == SlotState::Free);
            if !over {
                left = Some(*d);
            }
        }
        match left {
            None => return Ok(()),
            Some(d) if Instant::now() >= end || !node.is_live() => return Err(RepairError::NotRecovered(d)),
            Some(_) => tokio::time::sleep(sb.timeouts.heartbeat() / 4).await,
        }
    }
}

/// Zeroes the damaged cells of a volume with plain locks, which nobody uses: with them nobody could join to repair more.
pub async fn cells(dev: &Arc<dyn BlockDevice>) -> Result<Vec<Repair>, RepairError> {
    let layout = superblock(dev).await?.layout().cluster();
    let mut repairs = Vec::new();
    for at in cluster::damaged_cells(dev.as_ref(), &layout).await? {
        let lowered = Arc::new(AlignedBuf::zeroed(layout.stride as usize));
        dev.write(IoClass::Lock, at, lowered, false).await?;
        repairs.push(repaired(format!("cell at byte {at}"), "lowered"));
    }
    Ok(repairs)
}
