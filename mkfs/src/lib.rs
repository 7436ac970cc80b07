//! mkfs.clusterfs as a library: makes an empty volume on a shared device.
//!
//! [`format`] refuses a device that holds something ([`signature`]) or on which nodes live, chooses the volume's numbers
//! ([`geometry`]) and writes every area ([`write`]). The old superblock is destroyed first and the new one written last, so
//! that an interrupted run leaves no volume rather than half of one. What only the host knows (mounts, loop devices) is
//! asked by [`in_use`], which the program calls before it opens the device.

pub mod geometry;
pub mod in_use;
pub mod signature;
pub mod size;
pub mod timeouts;
mod write;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use blockdev::{BlockDevice, DevError, IoClass};
use cluster::{ClusterError, Timeouts};
use fs_core::format::item::Time;
use fs_core::format::superblock::Superblock;

pub use geometry::DEFAULT_NODES;
pub use size::{Bytes, parse_size};
pub use timeouts::parse_duration;

/// How nodes change slot and lock blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locks {
    /// By the device's compare-and-write.
    CompareAndWrite,
    /// By reads and writes alone, for devices that have no compare-and-write: slower, equally safe.
    Plain,
}

/// What to make.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// At most 64 bytes.
    pub label: String,
    /// `None`: [`DEFAULT_NODES`].
    pub nodes: Option<u16>,
    /// Bytes per journal; `None`: by the size of the volume.
    pub journal_size: Option<u64>,
    /// Bytes to which the volume can grow; `None`: a multiple of its size.
    pub max_size: Option<u64>,
    /// `None`: random.
    pub uuid: Option<[u8; 16]>,
    /// Destroy what is on the device.
    pub force: bool,
    pub timeouts: Timeouts,
    pub locks: Locks,
    /// For the UUID (16 bytes) and the key of the hints (32 bytes): from the operating system, or from a test's seed.
    pub random: [u8; 48],
    /// Time of creation.
    pub now: Time,
}

impl FormatOptions {
    pub fn new(random: [u8; 48], now: Time) -> Self {
        Self {
            label: String::new(),
            nodes: None,
            journal_size: None,
            max_size: None,
            uuid: None,
            force: false,
            timeouts: Timeouts::default(),
            locks: Locks::CompareAndWrite,
            random,
            now,
        }
    }

    /// Everything random comes from `seed`: for tests and the simulator.
    pub fn seeded(seed: u64) -> Self {
        use rand::{RngExt, SeedableRng};
        let random = rand::rngs::StdRng::seed_from_u64(seed).random();
        Self::new(random, Time { secs: 1_700_000_000, nanos: 0 })
    }
}

/// How far writing has come, in steps of unequal size.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    pub what: &'static str,
    pub done: u64,
    pub total: u64,
}

/// A volume just made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    pub superblock: Superblock,
    /// Blocks that files can use.
    pub free_blocks: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum MkfsError {
    #[error("the device holds {}: use --force to destroy it", .0.join(", "))]
    Occupied(Vec<String>),
    #[error("the volume is in use by {}: unmount it there, or use --force to destroy it under them", .0.join(", "))]
    LiveNodes(Vec<String>),
    #[error("{0}")]
    InUse(String),
    #[error(
        "the volume on the device has this UUID's first half already: blocks left over from it would be taken for the new \
         volume's; choose another UUID"
    )]
    SameUuid,
    #[error(transparent)]
    Geometry(#[from] geometry::GeometryError),
    #[error("{what}: {source}")]
    Device { what: &'static str, source: DevError },
    #[error("reading the existing volume's slots: {0}")]
    Slots(ClusterError),
    #[error("the root directory cannot be made: {0}")]
    Root(String),
    #[error("the superblock just written does not read back ({0}): the device loses writes")]
    Verify(String),
}

/// Makes a volume on `dev`.
pub async fn format(
    dev: &Arc<dyn BlockDevice>,
    opts: &FormatOptions,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Made, MkfsError> {
    let g = dev.geometry();
    let superblock = geometry::superblock(g.size, g.sector_size, opts)?;
    let found = signature::probe(dev.as_ref()).await.map_err(|source| MkfsError::Device { what: "probing", source })?;
    let old = old_volume(dev).await?;
    if opts.uuid.is_some() && old.as_ref().is_some_and(|old| old.volume_id() == superblock.volume_id()) {
        return Err(MkfsError::SameUuid);
    }
    if !opts.force {
        // First, because it is the better reason.
        let live = match &old {
            Some(old) => live_nodes(dev, old).await?,
            None => Vec::new(),
        };
        if !live.is_empty() {
            return Err(MkfsError::LiveNodes(live));
        }
        if !found.is_empty() {
            let mut names: Vec<String> = found.iter().map(|f| f.name.to_owned()).collect();
            names.dedup();
            return Err(MkfsError::Occupied(names));
        }
    }
    // Dead nodes' registrations go; with --force so do those of living ones.
    dev.evict_others().await.map_err(|source| MkfsError::Device { what: "cutting off others", source })?;
    let wipe: Vec<u64> = found.iter().map(|f| f.offset).collect();
    write::volume(dev, &superblock, opts, &wipe, progress).await
}

/// The superblock of the volume that the device holds already.
async fn old_volume(dev: &Arc<dyn BlockDevice>) -> Result<Option<Superblock>, MkfsError> {
    let first = dev
        .read(IoClass::Meta, 0, 4096)
        .await
        .map_err(|source| MkfsError::Device { what: "reading the superblock", source })?;
    Ok(Superblock::decode(&first).ok())
}

/// Nodes that live on the old volume, in words, whether or not their slot blocks can be read.
async fn live_nodes(dev: &Arc<dyn BlockDevice>, old: &Superblock) -> Result<Vec<String>, MkfsError> {
    let layout = old.layout().cluster();
    // Not a volume that this device can hold: no node can have mounted it.
    if old.blocks > dev.geometry().size / 4096 || old.sector_size != dev.geometry().sector_size {
        return Ok(Vec::new());
    }
    let watch = Duration::from_millis(u64::from(old.timeouts.heartbeat_ms) * 5 / 2);
    let slots = cluster::read_slots(dev.as_ref(), &layout, watch).await.map_err(MkfsError::Slots)?;
    let mut live = Vec::new();
    for s in slots {
        if s.alive == Some(true) {
            let host = match &s.block {
                Ok(b) if !b.host_name.is_empty() => b.host_name.as_str(),
                _ => "an unnamed host",
            };
            live.push(format!("{host} (slot {})", s.slot));
        }
    }
    Ok(live)
}

/// A UUID as people write it.
pub fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut s = String::with_capacity(36);
    for (i, b) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            s.push('-');
        }
        s.push_str(&format!("{b:02x}"));
    }
    s
}

/// The reverse of [`uuid_text`], dashes optional.
pub fn parse_uuid(s: &str) -> Option<[u8; 16]> {
    let hex: Vec<u8> = s.bytes().filter(|b| *b != b'-').collect();
    if hex.len() != 32 || !hex.is_ascii() {
        return None;
    }
    let mut uuid = [0; 16];
    for (out, pair) in uuid.iter_mut().zip(hex.chunks(2)) {
        *out = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    (uuid != [0; 16]).then_some(uuid)
}

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sb = &self.superblock;
        writeln!(f, "UUID:     {}", uuid_text(&sb.uuid))?;
        if !sb.label.is_empty() {
            writeln!(f, "label:    {}", sb.label)?;
        }
        writeln!(f, "size:     {} ({} blocks of 4096 bytes)", Bytes(sb.blocks * 4096), sb.blocks)?;
        writeln!(f, "free:     {}", Bytes(self.free_blocks * 4096))?;
        writeln!(f, "nodes:    up to {}", sb.nodes)?;
        writeln!(f, "journals: {} of {}", sb.nodes, Bytes(sb.journal_blocks * 4096))?;
        writeln!(f, "groups:   {} of {}", sb.groups, Bytes(u64::from(sb.group_blocks) * 4096))?;
        if sb.plain_locks() {
            writeln!(f, "locks:    plain")?;
        }
        writeln!(f, "domains:  {}", sb.layout().domains())?;
        write!(f, "can grow: to {}", Bytes(sb.layout().max_blocks() * 4096))
    }
}

#[cfg(test)]
mod tests;
