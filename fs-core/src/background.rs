//! What a volume does by itself: writing out what has waited long enough, checkpoints, deferred frees.

use std::sync::Arc;
use std::time::Duration;

use crate::volume::Volume;

/// Contents and changes reach the disk after this long without an fsync.
const WRITE_BACK: Duration = Duration::from_secs(5);
/// Frees into groups of other nodes are gathered this long.
const DEFERRED: Duration = Duration::from_secs(30);

impl Volume {
    pub(crate) fn start_background(self: &Arc<Self>) {
        if self.read_only {
            return;
        }
        for job in [Job::WriteBack, Job::Deferred] {
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
    }

    async fn run(&self, job: Job) {
        let result = match job {
            Job::WriteBack => match self.flush_everything().await {
                Ok(()) => self.journal.checkpoint().await.map_err(|e| self.journal_failed(e)),
                e => e,
            },
            Job::Deferred => {
                self.free_unnamed_at_hand().await;
                self.reclaim_slot(self.own_domain()).await
            }
        };
        if let Err(e) = result
            && !e.is_leaving()
        {
            tracing::warn!(node = %self.node(), job = ?job, "{e}");
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Job {
    WriteBack,
    Deferred,
}

impl Job {
    fn interval(self) -> Duration {
        match self {
            Job::WriteBack => WRITE_BACK,
            Job::Deferred => DEFERRED,
        }
    }
}
