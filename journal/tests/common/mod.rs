//! A simulated device with one journal region, and shorthands for installs.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use blockdev::sim::{SimConfig, SimDisk, SimNode};
use blockdev::{AlignedBuf, BlockDevice};
use cluster::{LockId, NodeId, Tenure};
use journal::block::{self, BlockHeader, BlockKind};
use journal::*;

pub const VOLUME: u64 = 0x1234_5678_9abc_def0;
pub const MIB: u64 = 1 << 20;
pub const REGION: Region = Region { slot: 3, offset: MIB, len: MIB, volume: VOLUME };
/// First block that tests may use.
pub const FIRST: u64 = 2 * MIB / 4096;
pub const A: LockId = LockId::Domain(10);
pub const B: LockId = LockId::Domain(11);
pub const G: LockId = LockId::Group(0);

pub fn node(incarnation: u32) -> NodeId {
    NodeId { slot: REGION.slot, incarnation }
}

/// What the dead node still holds, by lock.
#[derive(Clone, Default)]
pub struct Held(pub BTreeMap<LockId, Tenure>);

impl Held {
    pub fn of(locks: &[(LockId, Tenure)]) -> Self {
        Self(locks.iter().copied().collect())
    }
}

#[async_trait]
impl TenureSource for Held {
    async fn exclusive_tenure(&self, lock: LockId, _: NodeId) -> std::result::Result<Option<Tenure>, String> {
        Ok(self.0.get(&lock).copied())
    }
}

pub fn disk(seed: u64) -> Arc<SimDisk> {
    let disk = SimDisk::new(SimConfig::new(8 * MIB, seed));
    disk.write_raw(REGION.offset, &initial_header(REGION));
    disk
}

pub async fn open(disk: &Arc<SimDisk>, incarnation: u32) -> (Arc<SimNode>, Arc<Journal>) {
    let dev = disk.open("writer");
    let journal = Journal::open(dev.clone(), REGION, node(incarnation)).await.unwrap();
    (dev, journal)
}

/// A block with `text` at byte `at`, else zero.
pub fn content(owner: LockId, number: u64, at: usize, text: &[u8]) -> Arc<Block> {
    let mut b = Block::zeroed(BLOCK_SIZE);
    BlockHeader { kind: BlockKind::TreeNode, owner, volume: VOLUME, block: number, version: 0, tenure: 0, record: 0 }
        .encode(&mut b);
    b[at..at + text.len()].copy_from_slice(text);
    Arc::new(b)
}

pub fn edit(old: &Arc<Block>, at: usize, text: &[u8]) -> Arc<Block> {
    let mut b = Block::clone(old);
    b[at..at + text.len()].copy_from_slice(text);
    Arc::new(b)
}

pub fn change(block: u64, lock: LockId, tenure: Tenure, new: Arc<Block>, old: Option<Arc<Block>>) -> Change {
    Change { block, lock, tenure, new, old }
}

pub fn changes(changes: Vec<Change>) -> Install {
    Install { changes, ..Install::default() }
}

pub fn page(byte: u8) -> Arc<AlignedBuf> {
    let mut b = AlignedBuf::zeroed(BLOCK_SIZE);
    b.fill(byte);
    Arc::new(b)
}

pub fn data(block: u64, byte: u8, fresh: bool) -> DataWrite {
    DataWrite { block, bufs: vec![page(byte)], fresh }
}

/// The verified content of a block on the disk, without its header.
pub fn placed(disk: &Arc<SimDisk>, block: u64, owner: LockId) -> Option<Vec<u8>> {
    let b = disk.read_raw(block * 4096, 4096);
    block::verify(&b, VOLUME, block, owner).ok()?;
    Some(b[64..].to_vec())
}

/// Everybody dies and the device forgets what it need not remember.
pub fn lights_out(disk: &Arc<SimDisk>) {
    disk.crash_all();
    disk.power_loss();
}

pub async fn recover(disk: &Arc<SimDisk>, dead: u32, held: &Held) -> Result<ReplayReport> {
    let dev: Arc<dyn BlockDevice> = disk.open("recoverer");
    replay(&dev, REGION, node(dead), held).await
}
