//! Replaying a dead node's journal.

use std::sync::Arc;

use async_trait::async_trait;
use blockdev::{BlockDevice, IoClass};
use cluster::{LockBlock, LockId, Mode, NodeId, Recoverer, Tenure};
use journal::TenureSource;
use parking_lot::Mutex;

use crate::format::layout::VolumeLayout;

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
