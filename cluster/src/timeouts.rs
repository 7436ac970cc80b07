//! Every timeout of the cluster, derived from a few constants that the superblock stores, so that all nodes agree.

use std::time::Duration;

/// Stored in the superblock, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// A node writes its heartbeat, and reads the others', this often.
    pub heartbeat_ms: u32,
    /// A node that has not renewed its heartbeat for this long stops submitting writes (I12).
    pub lease_ms: u32,
    /// Longest time an initiator may queue a write before it reaches the device or fails. Added to the lease before a
    /// takeover where the device cannot fence.
    pub queue_ms: u32,
    /// Shortest time a node keeps a lock that it got, against bouncing.
    pub min_hold_ms: u32,
    /// A node polls its doorbell row this often; a waiter re-reads the lock block at least this often.
    pub doorbell_ms: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { heartbeat_ms: 1000, lease_ms: 6000, queue_ms: 120_000, min_hold_ms: 5, doorbell_ms: 40 }
    }
}

impl Timeouts {
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms.into())
    }
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms.into())
    }
    /// How long a record must stay unchanged, between two successful reads, before its node may be taken over by
    /// fencing. One lease for the victim to stop by itself plus two heartbeats for clock rate and read granularity.
    pub fn dead_after(&self) -> Duration {
        self.lease() + 2 * self.heartbeat()
    }
    /// The same without any fencing.
    pub fn dead_unfenced(&self) -> Duration {
        self.dead_after() + Duration::from_millis(self.queue_ms.into())
    }
    pub fn min_hold(&self) -> Duration {
        Duration::from_millis(self.min_hold_ms.into())
    }
    pub fn doorbell(&self) -> Duration {
        Duration::from_millis(self.doorbell_ms.into())
    }
}
