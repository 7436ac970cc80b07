//! Membership and locks of a volume's nodes, kept on the shared device itself: slots, heartbeats, incarnations,
//! lock blocks, handover, doorbells and network hints.
//!
//! A volume joins with [`Node::join`], acquires locks with [`Node::acquire`], is told by its [`LockClient`] when another
//! node wants one, and gives it up with [`Node::release`].

mod claim;
mod demand;
mod doorbell;
mod format;
mod heartbeat;
mod hints;
mod join;
mod layout;
mod lease;
mod locks;
#[cfg(test)]
mod model;
mod monitor;
mod node;
mod one_host;
mod plain;
mod rebuild;
mod recovery;
pub mod simnet;
mod stats;
mod table;
#[cfg(test)]
mod tests;
mod timeouts;
pub mod transitions;
mod types;
pub mod udp;
mod watch;
mod watched;

use std::sync::Arc;

use async_trait::async_trait;
use blockdev::{BlockDevice, DevError};

pub use format::{
    Entry, FormatError, LastEnd, LockBlock, SlotBlock, SlotState, initial_lock_block, initial_slot_block,
};
pub use layout::{DomainLocks, Layout, plain_records};
pub use node::Node;
pub use plain::damaged_cells;
pub use rebuild::{rebuild_slot, traces};
pub use stats::LockStats;
pub use table::{Life, SlotTable};
pub use timeouts::Timeouts;
pub use types::*;
pub use watch::{SlotInfo, read_slots};

#[derive(Debug, Clone, thiserror::Error)]
pub enum ClusterError {
    #[error(transparent)]
    Device(#[from] DevError),
    #[error(
        "all {nodes} node slots of the volume are in use: unmount a node, or make the volume anew with a larger --nodes"
    )]
    Full { nodes: u16 },
    #[error("{what} at offset {offset} is damaged: run fsck.clusterfs")]
    Damaged { what: String, offset: u64 },
    #[error("slot {slot} is in use by {}", if host.is_empty() { "a node without a host name" } else { host.as_str() })]
    InUse { slot: Slot, host: String },
    #[error("the volume is being repaired by {host} (slot {slot}): mount it when that is done")]
    Claimed { slot: Slot, host: String },
    #[error(
        "{} has it mounted, or another host: this kind of device cannot keep hosts apart (see docs/SAN.md). Name an iSCSI disk as \
         iscsi://HOST/TARGET/LUN, make the volume with mkfs.clusterfs --locks=plain, or use one host",
        if host.is_empty() { "a host without a name" } else { host.as_str() }
    )]
    OtherHost { host: String },
    #[error("the volume has no {0}")]
    NoSuchLock(LockId),
    #[error("this node lost its lease and is no longer a member of the volume")]
    Lapsed,
    #[error("this node is leaving the volume")]
    Leaving,
    #[error("the journal of slot {slot} cannot be replayed, and what its node held cannot be used: {reason}")]
    Recovery { slot: Slot, reason: String },
}

pub type Result<T> = std::result::Result<T, ClusterError>;

/// Replays a dead node's journal. Called under the slot's own lock, after fencing, before the incarnation ends; may be
/// called again for the same node if the recoverer dies in the middle, so it is idempotent.
#[async_trait]
pub trait Recoverer: Send + Sync + 'static {
    /// The device to replay with: it refuses writes once this node lapsed (I12). Called before the first replay.
    fn attach(&self, _guarded: Arc<dyn BlockDevice>) {}
    async fn replay(&self, dead: NodeId) -> std::result::Result<(), String>;
}

/// The user of the locks: told what the others want. Calls return at once; work is spawned.
pub trait LockClient: Send + Sync + 'static {
    /// Another node wants `id` in `wanted`; end by [`Node::release`]. Called once per grant, after the minimum hold time,
    /// again if the want grows from shared to exclusive, and about every second while nothing happens. May arrive before
    /// the task that acquired the lock has run on. Unknown or already released locks are ignored.
    fn demand(&self, id: LockId, wanted: Mode);
    /// The incarnation ended after a crash: its journal is replayed and its locks are free. Called on the recoverer.
    fn recovered(&self, dead: NodeId);
    /// Another node, that holds `id` or has held it, asks to look at what it changed there (see [`Node::wake`]).
    fn woken(&self, _id: LockId) {}
    /// Something became known of the slots: an incarnation may have ended.
    fn slots_changed(&self) {}
    /// This node lapsed or was fenced: every lock is lost, nothing may be written any more (I12).
    fn lapsed(&self);
}

/// Sends and receives hints. Hints may be lost, delayed, doubled: they only save waiting for the doorbell (section 2.3).
/// Below it is UDP, or the simulator's network.
#[async_trait]
pub trait HintNet: Send + Sync + 'static {
    /// Where others reach this node, stored in its slot block; at most 64 bytes.
    fn address(&self) -> Vec<u8>;
    /// Best effort; never blocks.
    fn send(&self, to: &[u8], datagram: Vec<u8>);
    /// The next datagram received; at most 1200 bytes.
    async fn recv(&self) -> Vec<u8>;
}

/// Everything a node needs from outside.
pub struct JoinConfig {
    pub device: Arc<dyn BlockDevice>,
    pub layout: Layout,
    pub timeouts: Timeouts,
    /// Key of the hints' authentication, from the superblock: only who reads the LUN knows it.
    pub hint_key: [u8; 32],
    /// `None`: hints off.
    pub net: Option<Arc<dyn HintNet>>,
    /// Shown by `clusterfs status`, at most 64 bytes of UTF-8.
    pub host_name: String,
    pub recoverer: Arc<dyn Recoverer>,
    /// Seed of the nonces that tell this mount's attempts apart (I9). From the OS in production, from the seed in the simulator.
    pub seed: u64,
}
