//! What a volume does by itself: writing out what has waited long enough, checkpoints, deferred frees.

use std::sync::Arc;
use std::time::Duration;

use blockdev::DevError;

use crate::error::Result;
use crate::format::layout::BLOCK;
use crate::volume::Volume;

/// Contents and changes reach the disk after this long without an fsync.
const WRITE_BACK: Duration = Duration::from_secs(5);
/// Frees into groups of other nodes are gathered this long.
const DEFERRED: Duration = Duration::from_secs(30);
/// Freed blocks may be used again this long before the device is told to forget them.
const DISCARD: Duration = Duration::from_secs(10);

impl Volume {
    pub(crate) fn start_background(self: &Arc<Self>) {
        if self.read_only {
            return;
        }
        for job in [Job::WriteBack, Job::Deferred] {
            self.start(job);
        }
    }

    /// From now on the device is told which blocks hold nothing any more, if it takes that.
    pub fn discard_freed_blocks(&self) {
        if !self.read_only {
            self.alloc.gather_freed();
            self.start(Job::Discard);
        }
    }

    fn start(&self, job: Job) {
        let (weak, mut stop) = (self.me.clone(), self.stop.subscribe());
        let unmount_waits = self.closing.clone().try_read_owned();
        tokio::spawn(async move {
            if let (Job::Deferred, Some(volume)) = (job, weak.upgrade()) {
                volume.unnamed_from_before().await;
                volume.clean_own_slot().await;
            }
            drop(unmount_waits);
            loop {
                tokio::select! {
                    biased;
                    _ = stop.changed() => return,
                    () = tokio::time::sleep(job.interval()) => {}
                }
                let Some(volume) = weak.upgrade() else { return };
                if volume.check().is_err() {
                    return;
                }
                volume.run(job).await;
            }
        });
    }

    async fn write_back(&self) -> Result<()> {
        self.flush_everything().await?;
        self.journal.checkpoint().await.map_err(|e| self.journal_failed(e))?;
        self.show_free_space().await
    }

    async fn run(&self, job: Job) {
        let result = match job {
            Job::WriteBack => self.write_back().await,
            Job::Deferred => {
                self.free_unnamed_at_hand().await;
                self.reclaim_slot(self.own_domain()).await
            }
            Job::Discard => self.discard().await,
        };
        if let Err(e) = result
            && !e.is_leaving()
        {
            tracing::warn!(node = %self.node(), job = ?job, "{e}");
        }
    }
}

impl Volume {
    /// Discards what has been freed so far. A device that does not take it is not asked again.
    pub(crate) async fn discard(&self) -> Result<()> {
        self.reap();
        while let Some((run, _group)) = self.alloc.next_discard() {
            let done = self.device.discard(run.start * BLOCK, run.len * BLOCK).await;
            self.alloc.discarded(run);
            match done {
                Ok(()) => {}
                Err(DevError::Fenced) => return self.check(),
                Err(e) => {
                    self.alloc.gather_no_more();
                    tracing::warn!(node = %self.node(), "freed blocks are not discarded from now on: {e}");
                }
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
enum Job {
    WriteBack,
    Deferred,
    Discard,
}

impl Job {
    fn interval(self) -> Duration {
        match self {
            Job::WriteBack => WRITE_BACK,
            Job::Deferred => DEFERRED,
            Job::Discard => DISCARD,
        }
    }
}
