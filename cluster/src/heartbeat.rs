//! The heartbeat task: renews the lease, and ends it in time.

use std::sync::Arc;

use blockdev::{AlignedBuf, BlockDevice, DevError, IoClass};
use tokio::time::{Duration, Instant, sleep_until};

use crate::format::Heartbeat;
use crate::lease::Lease;
use crate::{Layout, NodeId, Timeouts};

/// The writer of one node's heartbeat sector.
pub(crate) struct Pulse {
    /// Not behind the lease: this is what renews it.
    pub dev: Arc<dyn BlockDevice>,
    pub layout: Layout,
    pub timeouts: Timeouts,
    pub node: NodeId,
    pub nonce: u64,
    pub counter: u64,
    pub lease: Arc<Lease>,
}

impl Pulse {
    /// Writes the heartbeat once; on success the lease counts from before the write.
    pub async fn beat(&mut self) -> Result<(), DevError> {
        self.counter += 1;
        let record =
            Heartbeat { volume: self.layout.volume, node: self.node, counter: self.counter, nonce: self.nonce };
        let sector = Arc::new(AlignedBuf::copy_of(&record.encode(self.layout.stride)));
        let started = Instant::now();
        self.dev.write(IoClass::Liveness, self.layout.heartbeat(self.node.slot), sector, false).await?;
        // Too late is found by the caller: the deadline has passed.
        self.lease.renew(started + self.timeouts.lease());
        Ok(())
    }

    /// Beats until the lease is over; returns why.
    pub async fn run(&mut self) -> &'static str {
        let lease = self.lease.clone();
        let mut next = Instant::now() + self.timeouts.heartbeat();
        loop {
            let Some(deadline) = lease.until() else { return "there is no lease" };
            tokio::select! {
                biased;
                () = lease.ended() => return "the lease was ended",
                () = sleep_until(next.min(deadline)) => {}
            }
            if Instant::now() >= deadline {
                return "the heartbeat could not be renewed in time";
            }
            let started = Instant::now();
            tokio::select! {
                biased;
                () = lease.ended() => return "the lease was ended",
                result = self.beat() => match result {
                    Ok(()) => next = started + self.timeouts.heartbeat(),
                    Err(DevError::Fenced) => return "another node fenced this one",
                    Err(e) => {
                        tracing::warn!(node = %self.node, "heartbeat: {e}");
                        next = Instant::now() + (self.timeouts.heartbeat() / 4).max(Duration::from_millis(1));
                    }
                },
                () = sleep_until(deadline) => {}
            }
        }
    }
}
