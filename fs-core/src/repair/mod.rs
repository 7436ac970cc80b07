//! What fsck changes on a volume that no node has mounted: a superblock or its copy that is damaged, and the journals of
//! dead nodes.
//!
//! Nothing here needs the volume to itself, so a node that mounts at the same moment is no danger: the superblock is
//! written only with what it held when the volume was made, and journals are replayed by [`cluster::Node`] as by any
//! survivor, under the dead node's slot, so by one at a time. A crash in the middle leaves what was there, to be done again.

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use blockdev::{AlignedBuf, BlockDevice, DevError, IoClass};
use cluster::{ClusterError, JoinConfig, LockClient, LockId, Mode, Node, NodeId, SlotState};
use tokio::time::Instant;

use crate::format::layout::BLOCK;
use crate::format::superblock::{MAGIC, Superblock, SuperblockError};
use crate::recovery::JournalRecoverer;

/// For the replay itself, beyond the time in which a node is found dead.
const REPLAY_TIME: Duration = Duration::from_secs(120);

/// Something that was put right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    pub place: String,
    pub text: String,
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.text)
    }
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum RepairError {
    #[error(transparent)]
    Device(#[from] DevError),
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("the journal of {0} was not replayed in time: nothing of it is lost, run fsck.clusterfs again")]
    NotRecovered(NodeId),
}

/// Writes the superblock from its copy, or the copy from the superblock. With `absent`, a superblock that is all zeros is
/// written too: the volume may have been destroyed on purpose, so only who asks for that gets it back.
pub async fn superblock(dev: &Arc<dyn BlockDevice>, absent: bool) -> Result<Option<Repair>, RepairError> {
    let last = (dev.geometry().size / BLOCK).saturating_sub(1);
    let first = dev.read(IoClass::Meta, 0, BLOCK as usize).await?;
    let found = match Superblock::decode(&first) {
        Ok(sb) => {
            let at = sb.layout().backup_superblock();
            if at > last {
                // Truncated: there is no place for the copy.
                return Ok(None);
            }
            // A copy that cannot be read is written anew: that is what makes a drive replace a bad sector.
            let copy = dev.read(IoClass::Meta, at * BLOCK, BLOCK as usize).await;
            if copy.is_ok_and(|c| Superblock::decode(&c).is_ok_and(|c| c == sb)) {
                return Ok(None);
            }
            write(dev, at, &sb).await?;
            return Ok(Some(repaired(format!("copy of the superblock, block {at}"), "written from the superblock")));
        }
        Err(e @ SuperblockError::Newer { .. }) => return Err(e.into()),
        Err(e) => e,
    };
    // Anything else in block 0 is somebody else's.
    let ours = first[..8] == MAGIC || (absent && first.iter().all(|b| *b == 0));
    let copy = dev.read(IoClass::Meta, last * BLOCK, BLOCK as usize).await?;
    match Superblock::decode(&copy) {
        // A copy of a volume of another size is left over from an earlier one.
        Ok(sb) if ours && sb.layout().backup_superblock() == last => {
            write(dev, 0, &sb).await?;
            Ok(Some(repaired("superblock, block 0".into(), &format!("written from its copy in block {last}"))))
        }
        _ => Err(found.into()),
    }
}

fn repaired(place: String, text: &str) -> Repair {
    Repair { place, text: text.into() }
}

async fn write(dev: &Arc<dyn BlockDevice>, block: u64, sb: &Superblock) -> Result<(), DevError> {
    let mut b = AlignedBuf::zeroed(BLOCK as usize);
    sb.encode(&mut b);
    dev.write(IoClass::Meta, block * BLOCK, Arc::new(b), false).await?;
    dev.flush(IoClass::Meta).await
}

/// Holds no locks, so nobody wants anything of it.
struct NoLocks;

impl LockClient for NoLocks {
    fn demand(&self, _: LockId, _: Mode) {}
    fn recovered(&self, _: NodeId) {}
    fn lapsed(&self) {}
}

/// Replays the journals of `dead`, which the check has shown to be readable, and ends their incarnations: joins as a node
/// does and waits until the recovery of all is done. `seed` must differ from that of any other node.
pub async fn recover(dev: &Arc<dyn BlockDevice>, dead: &[NodeId], seed: u64) -> Result<Vec<Repair>, RepairError> {
    if dead.is_empty() {
        return Ok(Vec::new());
    }
    let first = dev.read(IoClass::Meta, 0, BLOCK as usize).await?;
    let sb = Superblock::decode(&first)?;
    let layout = sb.layout();
    let node = Node::join(JoinConfig {
        device: dev.clone(),
        layout: layout.cluster(),
        timeouts: sb.timeouts,
        hint_key: sb.hint_key,
        net: None,
        host_name: "fsck.clusterfs".into(),
        recoverer: Arc::new(JournalRecoverer::new(dev.clone(), layout)),
        seed,
    })
    .await?;
    node.start(Arc::new(NoLocks));
    let waited = ended(dev, &layout.cluster(), dead, &sb, &node).await;
    // The slot is given up whatever happened; if that fails too, the next node takes it over.
    let left = node.leave().await;
    let done = waited?;
    left?;
    Ok(done)
}

/// Waits until every one of `dead` has ended.
async fn ended(
    dev: &Arc<dyn BlockDevice>,
    layout: &cluster::Layout,
    dead: &[NodeId],
    sb: &Superblock,
    node: &Arc<Node>,
) -> Result<Vec<Repair>, RepairError> {
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
            None => return Ok(dead.iter().map(|d| repaired(format!("journal of {d}"), "replayed")).collect()),
            Some(d) if Instant::now() >= end || !node.is_live() => return Err(RepairError::NotRecovered(d)),
            Some(_) => tokio::time::sleep(sb.timeouts.heartbeat() / 4).await,
        }
    }
}
