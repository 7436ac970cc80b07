//! Growing a volume whose device was enlarged.
//!
//! [`grow`] is done by a program of its own that joins for its time as a node does, so that a lease ends its writes if it hangs, and takes
//! the lock of domain 0, which is nobody's: who holds that may change the superblock. In this order:
//!
//! | step | after a crash in it |
//! |------|---------------------|
//! | headers and lock blocks of the new groups, which lie beyond the volume's end or in room that mkfs reserved; flush | the old volume |
//! | the superblock's copies, the new last block first; flush | the old volume; of the copies fsck says that they are ahead |
//! | the superblock, one sector; flush | the old volume or the new one |
//!
//! Nobody has to be told: where a block or a lock lies does not depend on the size, so a node that has not noticed finds whatever others
//! have put into the new part. It notices when it looks for space, or is asked how much there is ([`Volume::look_at_size`]). The last
//! group that the volume had may become longer: its header is brought up to date by who next changes it.

use std::sync::Arc;
use std::time::Duration;

use blockdev::{AlignedBuf, BlockDevice, DevError, IoClass};
use cluster::{ClusterError, LockId, LockValue, Mode, Node};
use tokio::task::JoinSet;

use crate::error::Result;
use crate::format::group::fresh_header;
use crate::format::layout::{BLOCK, NO_DOMAIN, VolumeLayout};
use crate::format::superblock::{RO_COMPAT_KNOWN, Superblock, SuperblockError};
use crate::recovery::JournalRecoverer;
use crate::visit;
use crate::volume::Volume;

/// Another program that has the lock does not take longer, unless it is at work on a very large device.
const LOCK_WAIT: Duration = Duration::from_secs(30);
/// Writes of headers under way at once.
const DEPTH: usize = 16;
/// Lock blocks written at once.
const PIECE: u64 = 2048;

/// What a volume became.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grown {
    /// Sizes in blocks.
    pub from: u64,
    pub to: u64,
    /// Blocks of the device that the volume cannot grow into, ever.
    pub beyond: u64,
    pub groups: u32,
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum GrowError {
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    #[error(transparent)]
    Device(#[from] DevError),
    #[error("the device has {have} bytes, its volume {need}: volumes do not shrink")]
    Smaller { have: u64, need: u64 },
    #[error("the volume has features that this clusterfs does not know ({0:#x}): upgrade this host's clusterfs")]
    Features(u64),
    #[error("another program is growing the volume, or died a moment ago while it did: try again in a few minutes")]
    UnderWay,
    #[error("growing takes one of the volume's slots for its time, and all {nodes} are in use: unmount one node first")]
    Full { nodes: u16 },
    #[error(transparent)]
    Cluster(ClusterError),
}

impl From<ClusterError> for GrowError {
    fn from(e: ClusterError) -> Self {
        match e {
            ClusterError::Full { nodes } => Self::Full { nodes },
            e => Self::Cluster(e),
        }
    }
}

async fn superblock(dev: &Arc<dyn BlockDevice>) -> std::result::Result<Superblock, GrowError> {
    Ok(Superblock::decode(&dev.read(IoClass::Meta, 0, BLOCK as usize).await?)?)
}

/// What the volume can become on its device, and its superblock then.
fn plan(sb: &Superblock, size: u64) -> std::result::Result<(Grown, Superblock), GrowError> {
    let need = sb.blocks * BLOCK;
    if size < need {
        return Err(GrowError::Smaller { have: size, need });
    }
    let unknown = sb.ro_compat & !RO_COMPAT_KNOWN;
    if unknown != 0 {
        return Err(GrowError::Features(unknown));
    }
    let l = sb.layout();
    let blocks = (size / BLOCK).min(l.max_blocks()).max(sb.blocks);
    let groups = l.groups_in(blocks);
    let grown = Grown { from: sb.blocks, to: blocks, beyond: size / BLOCK - blocks, groups };
    Ok((grown, Superblock { blocks, groups, generation: sb.generation + 1, ..sb.clone() }))
}

/// Grows a volume, mounted or not, to the size of its device. `seed` is any number that no other node has.
pub async fn grow(dev: &Arc<dyn BlockDevice>, seed: u64) -> std::result::Result<Grown, GrowError> {
    let size = dev.look_at_size().await?.size;
    let sb = superblock(dev).await?;
    let (grown, _) = plan(&sb, size)?;
    if grown.from == grown.to {
        return Ok(grown);
    }
    let recoverer = Arc::new(JournalRecoverer::new(dev.clone(), sb.layout()));
    let node = visit::join(dev, &sb, "clusterfs grow", recoverer, seed).await?;
    let done = joined(&node, size).await;
    // Frees the lock, too.
    let left = node.leave().await;
    let done = done?;
    left?;
    Ok(done)
}

async fn joined(node: &Arc<Node>, size: u64) -> std::result::Result<Grown, GrowError> {
    let waited = tokio::time::timeout(LOCK_WAIT, node.acquire(LockId::Domain(NO_DOMAIN), Mode::Exclusive)).await;
    waited.map_err(|_| GrowError::UnderWay)??;
    let dev = node.guarded_device();
    // Another one may have grown it meanwhile.
    let old = superblock(&dev).await?;
    let (grown, new) = plan(&old, size)?;
    if grown.from < grown.to {
        new_groups(&dev, &new.layout(), old.groups).await?;
        write(&dev, &new).await?;
    }
    Ok(grown)
}

/// Makes the groups from `first` on what they are in a new volume. Nobody looks at them before the superblock says that they are there.
async fn new_groups(dev: &Arc<dyn BlockDevice>, l: &VolumeLayout, first: u32) -> std::result::Result<(), DevError> {
    let mut writes: JoinSet<std::result::Result<(), DevError>> = JoinSet::new();
    for g in first..l.groups {
        if writes.len() >= DEPTH {
            ended(writes.join_next().await)?;
        }
        let (dev, at, header) = (dev.clone(), l.group_header(g) * BLOCK, fresh_header(l, g));
        writes.spawn(async move { dev.write(IoClass::Meta, at, Arc::new(header), false).await });
    }
    while let Some(done) = writes.join_next().await {
        ended(Some(done))?;
    }
    let areas = l.cluster();
    let stride = areas.stride as usize;
    for from in (u64::from(first)..u64::from(l.groups)).step_by(PIECE as usize) {
        let n = PIECE.min(u64::from(l.groups) - from);
        let mut piece = AlignedBuf::zeroed(n as usize * stride);
        for (g, sector) in (from as u32..).zip(piece.chunks_mut(stride)) {
            let blocks = l.group_extent(g).len;
            let value = LockValue { root: blocks, next_local: blocks, version: 0 };
            let block = cluster::initial_lock_block(&areas, LockId::Group(g), value);
            sector[..block.len()].copy_from_slice(&block);
        }
        dev.write(IoClass::Lock, areas.locks + from * areas.stride, Arc::new(piece), false).await?;
    }
    dev.flush(IoClass::Meta).await
}

fn ended(
    done: Option<std::result::Result<std::result::Result<(), DevError>, tokio::task::JoinError>>,
) -> std::result::Result<(), DevError> {
    match done {
        None => Ok(()),
        Some(Ok(done)) => done,
        Some(Err(e)) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        Some(Err(_)) => Err(DevError::Unknown { op: "write", offset: 0, len: 0 }),
    }
}

/// The copies first: then what a copy says is true whenever it is asked.
async fn write(dev: &Arc<dyn BlockDevice>, sb: &Superblock) -> std::result::Result<(), DevError> {
    let mut block = AlignedBuf::zeroed(BLOCK as usize);
    sb.encode(&mut block);
    let block = Arc::new(block);
    let [near, last] = sb.layout().superblock_copies();
    for copies in [&[last, near][..], &[0]] {
        for at in copies {
            dev.write(IoClass::Meta, at * BLOCK, block.clone(), false).await?;
        }
        dev.flush(IoClass::Meta).await?;
    }
    Ok(())
}

/// What a mounted volume knows of its size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    pub layout: VolumeLayout,
    generation: u64,
    /// The latest generation that was told to be larger than the device is on this host.
    told: u64,
}

impl Size {
    pub fn of(sb: &Superblock) -> Self {
        Self { layout: sb.layout(), generation: sb.generation, told: 0 }
    }
}

impl Volume {
    /// Where everything lies, in the volume as this node knows it.
    pub(crate) fn layout(&self) -> VolumeLayout {
        self.size.lock().layout
    }

    /// Notices that the volume has grown. A superblock that cannot be read as such says nothing: fsck is for that.
    pub(crate) async fn look_at_size(&self) -> Result<()> {
        let read = self.device.read(IoClass::Meta, 0, BLOCK as usize).await?;
        let Ok(sb) = Superblock::decode(&read) else { return Ok(()) };
        let newer = sb.generation > self.size.lock().generation && sb.volume_id() == self.superblock.volume_id();
        if !newer {
            return Ok(());
        }
        let (have, need) = (self.device.look_at_size().await?.size, sb.blocks * BLOCK);
        let mut size = self.size.lock();
        if sb.generation <= size.generation {
            return Ok(());
        }
        if have < need {
            if sb.generation > std::mem::replace(&mut size.told, sb.generation) {
                tracing::warn!(node = %self.node(), "the volume has grown to {need} bytes, this host's device has {have}: let the host look at it again");
            }
            return Ok(());
        }
        *size = Size { told: 0, ..Size::of(&sb) };
        self.alloc.grow(&size.layout);
        tracing::info!(node = %self.node(), bytes = need, "the volume has grown");
        Ok(())
    }
}
