//! Replaying a dead node's journal.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use blockdev::{BlockDevice, IoClass};
use cluster::{LockBlock, LockId, Mode, NodeId, Recoverer, SlotState, Tenure};
use journal::TenureSource;
use parking_lot::Mutex;

use crate::error::FsError;
use crate::format::layout::VolumeLayout;
use crate::volume::{MountError, read_superblock};

/// Works on the device alone, so that a node can recover before it has joined.
pub struct JournalRecoverer {
    device: Mutex<Arc<dyn BlockDevice>>,
    layout: VolumeLayout,
}

impl JournalRecoverer {
    pub fn new(device: Arc<dyn BlockDevice>, layout: VolumeLayout) -> Self {
        Self { device: Mutex::new(device), layout }
    }

    fn device(&self) -> Arc<dyn BlockDevice> {
        self.device.lock().clone()
    }
}

#[async_trait]
impl Recoverer for JournalRecoverer {
    fn attach(&self, guarded: Arc<dyn BlockDevice>) {
        *self.device.lock() = guarded;
    }

    async fn replay(&self, dead: NodeId) -> Result<(), String> {
        let region = self.layout.journal(dead.slot);
        // The volume may have grown, and the dead node may have used what this host has not seen yet.
        self.device().look_at_size().await.map_err(|e| e.to_string())?;
        let report = journal::replay(&self.device(), region, dead, self).await.map_err(|e| e.to_string())?;
        tracing::info!(%dead, ?report, "journal replayed");
        Ok(())
    }
}

/// Reads the lock blocks as they are: the dead node's locks stay in them until its incarnation ends (I5).
#[async_trait]
impl TenureSource for JournalRecoverer {
    async fn exclusive_tenure(&self, lock: LockId, holder: NodeId) -> Result<Option<Tenure>, String> {
        let layout = self.layout.cluster();
        let Some(at) = layout.lock_block(lock) else { return Ok(None) };
        let sector = self.device().read(IoClass::Lock, at, layout.stride as usize).await.map_err(|e| e.to_string())?;
        let block = LockBlock::decode(&sector, layout.volume, lock).map_err(|e| format!("{lock}: {e}"))?;
        Ok(block.held_by(holder).filter(|m| *m == Mode::Exclusive).map(|_| block.tenure))
    }
}

/// For a read-only mount: an error if a dead node's journal waits to be replayed and no living node is there to do it. Where the
/// device cannot tell who lives, heartbeats are watched for two and a half of their intervals.
pub async fn refuse_unclean(device: &dyn BlockDevice) -> std::result::Result<(), MountError> {
    let sb = read_superblock(device).await?;
    let watch = Duration::from_millis(u64::from(sb.timeouts.heartbeat_ms) * 5 / 2);
    let slots = cluster::read_slots(device, &sb.layout().cluster(), watch).await.map_err(FsError::from)?;
    if slots.iter().any(|s| s.alive == Some(true)) {
        return Ok(());
    }
    let dead = slots.into_iter().find_map(|s| s.block.ok().filter(|b| b.state != SlotState::Free));
    dead.map_or(Ok(()), |b| Err(MountError::Unclean { slot: b.slot, host: b.host_name }))
}
