//! The shared device that every node of a volume reads and writes.
//!
//! One trait, [`BlockDevice`], hides what is below: an image file ([`image`]), a disk on an iSCSI target ([`iscsi`]), a SCSI disk of the
//! host's kernel ([`kernel`]) or the simulated device of the tests ([`sim`]); [`open`] opens what a user names. Offsets and lengths
//! are in bytes and multiples of [`Geometry::sector_size`]. The trait promises only what a SCSI disk promises: a write is atomic per sector, unordered and volatile until [`BlockDevice::flush`]
//! returns, and compare-and-write of one sector is atomic against other compare-and-writes (not against plain writes,
//! hence I10). After [`DevError::Unknown`] the outcome must be read back before anything is decided (I9).

mod buf;
pub mod image;
pub mod iscsi;
mod kernel;
pub mod open;
mod range;
mod scsi;
pub mod sim;
mod stats;
mod sys;

use std::sync::Arc;

use async_trait::async_trait;

pub use buf::AlignedBuf;
pub use stats::{ClassStats, DeviceStats, StatsSnapshot};

/// What an I/O is for; counted apart, so that tests can assert budgets per purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IoClass {
    /// Superblock, trees, bitmaps: reads, and placing.
    Meta,
    /// File contents.
    Data,
    /// A node's journal.
    Journal,
    /// Lock blocks and slot blocks.
    Lock,
    /// Heartbeats, doorbells and the reading of other nodes' ones: the idle cost of being a member.
    Liveness,
}

/// How liveness of another node can be judged on this device and what fencing it offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FencingKind {
    /// OFD locks on the image file tell at once that a node's process is gone.
    ProcessLock,
    /// SCSI-3 persistent reservations: PREEMPT AND ABORT.
    Reservations,
    /// None: a takeover waits out the lease and the longest I/O queueing time.
    None,
}

#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Logical sector in bytes (512 or 4096): unit of atomic writes and of compare-and-write.
    pub sector_size: u32,
    /// Size of the device in bytes.
    pub size: u64,
    /// Whether completed writes may be lost before a flush.
    pub write_cache: bool,
    pub fencing: FencingKind,
    /// Other hosts may reach it, and [`BlockDevice::presence`] does not see their nodes: what it calls gone may live.
    pub others_unseen: bool,
}

/// Who may write: one mount. `slot` < number of nodes; `incarnation` as in the slot block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FenceKey {
    pub slot: u16,
    pub incarnation: u32,
}

/// The result of [`BlockDevice::compare_and_write`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caw {
    Written,
    /// The sector held something else: its content.
    Mismatch(Vec<u8>),
}

/// What the device knows of another node's ability to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// No write of that node can arrive any more (its process is gone).
    Gone,
    /// It still can write.
    Present,
    /// This device cannot tell.
    Unknown,
}

/// The result of [`BlockDevice::fence`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fenced {
    /// No write of the victim arrives after this.
    Done,
    /// This device cannot fence: wait out the lease and the queueing time.
    MustWait,
}

/// Who may write to a device with reservations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registrations {
    pub nodes: Vec<FenceKey>,
    /// Programs at work on the volume, or that died at it.
    pub tools: usize,
    /// Keys that are not of this filesystem.
    pub foreign: Vec<u64>,
    /// The type of the reservation in force.
    pub reservation: Option<&'static str>,
    /// The key that it was made with, if that is not of this filesystem.
    pub foreign_holder: Option<u64>,
}

/// What a device says of itself beyond its geometry, for programs that judge it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Abilities {
    /// Vendor, product, revision.
    pub product: String,
    /// Most blocks that it announces to compare and write at once; 0: none.
    pub announced_compare_and_write: u8,
    /// It announces compare-and-write and does not refuse the command.
    pub compare_and_write: bool,
    /// It knows writes that are durable when they are acknowledged.
    pub fua: bool,
    /// It answers questions about persistent reservations.
    pub reservations: bool,
    /// Registrations can outlive a power loss of the device.
    pub persists: bool,
    pub unmap: bool,
    /// Largest transfer that it announces, in bytes; 0: it names none.
    pub max_transfer: u64,
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum DevError {
    #[error("{op} of {len} bytes at offset {offset}: {source}")]
    Io { op: &'static str, offset: u64, len: usize, source: Arc<std::io::Error> },
    /// Timed out, aborted or cut off: it may or may not have happened (I9).
    #[error("{op} of {len} bytes at offset {offset}: outcome unknown")]
    Unknown { op: &'static str, offset: u64, len: usize },
    /// Another node fenced this one, or its lease lapsed (I12): nothing was written.
    #[error("this node is fenced from the device")]
    Fenced,
    #[error("{op} of {len} bytes at offset {offset} is misaligned or beyond the end of the device ({size} bytes)")]
    Range { op: &'static str, offset: u64, len: usize, size: u64 },
}

pub type Result<T> = std::result::Result<T, DevError>;

/// Whether this node may still write (I12). Asked again right before a write is submitted: a process that was stopped after
/// it had decided to write must not submit when it wakes up.
pub trait WritePermit: Send + Sync + 'static {
    fn valid(&self) -> bool;
}

/// The shared device, as one node sees it.
#[async_trait]
pub trait BlockDevice: Send + Sync + 'static {
    fn geometry(&self) -> Geometry;

    /// Asks again how large the device is: it may have been enlarged. So does every operation by itself that lies beyond the end.
    async fn look_at_size(&self) -> Result<Geometry>;

    /// Reads consecutive buffers of `lens` bytes each from `offset` in one device operation.
    async fn readv(&self, class: IoClass, offset: u64, lens: &[usize]) -> Result<Vec<AlignedBuf>>;

    /// Writes `bufs` consecutively from `offset` in one device operation. With `fua` it is durable on return.
    async fn writev(&self, class: IoClass, offset: u64, bufs: Vec<Arc<AlignedBuf>>, fua: bool) -> Result<()>;

    /// Makes every write that completed before this call durable.
    async fn flush(&self, class: IoClass) -> Result<()>;

    /// Replaces the sector at `offset` by `new` if it holds `expect`, atomically. Both are one sector long.
    async fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> Result<Caw>;

    /// Announces this mount as the owner of `key`; replaces an earlier key of this mount. From here on
    /// [`presence`](Self::presence) of that slot is `Present` for the others, and the node can be fenced.
    async fn register(&self, key: FenceKey) -> Result<()>;

    /// From here on writes are submitted while the permit is valid only, and are [`DevError::Fenced`] otherwise. Devices that
    /// submit in the same instant that they are called need not ask.
    fn set_permit(&self, _permit: Arc<dyn WritePermit>) {}

    /// Takes back [`register`](Self::register).
    async fn unregister(&self) -> Result<()>;

    /// Whether the owner of `key` can still write.
    async fn presence(&self, key: FenceKey) -> Result<Presence>;

    /// Cuts the owner of `key` off from writing, in-flight writes included.
    async fn fence(&self, key: FenceKey) -> Result<Fenced>;

    /// Cuts everybody else off from writing, whoever it is: for making a new volume. Needs a registration.
    async fn evict_others(&self) -> Result<()> {
        Ok(())
    }

    /// Who is registered; `None`: the device has no registrations.
    async fn registrations(&self) -> Result<Option<Registrations>> {
        Ok(None)
    }

    /// What the device itself says that it can do; `None`: what nodes need is done by the host's kernel, not by the device.
    fn abilities(&self) -> Option<Abilities> {
        None
    }

    /// Tells the device that the range is unused (an image file punches a hole). May do nothing.
    async fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// Counters of this node's I/O since it opened the device.
    fn stats(&self) -> &DeviceStats;

    /// One buffer of `len` bytes.
    async fn read(&self, class: IoClass, offset: u64, len: usize) -> Result<AlignedBuf> {
        let mut v = self.readv(class, offset, &[len]).await?;
        v.pop().ok_or(DevError::Range { op: "read", offset, len, size: self.geometry().size })
    }

    /// One buffer.
    async fn write(&self, class: IoClass, offset: u64, buf: Arc<AlignedBuf>, fua: bool) -> Result<()> {
        self.writev(class, offset, vec![buf], fua).await
    }
}
