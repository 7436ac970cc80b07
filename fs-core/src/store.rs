//! Verified metadata blocks in memory: the journal's dirty ones, a bounded cache of clean ones, and the device below.
//!
//! A cached block counts only in the epoch of its owner in which it was read: when a lock was lost and somebody else held
//! it exclusively meanwhile, the epoch is bumped and everything cached before is as if it were not there (I1).

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use blockdev::{BlockDevice, IoClass};
use cluster::LockId;
use journal::block::{self, BlockKind};
use journal::{BLOCK_SIZE, Block, Journal};
use lru::LruCache;
use parking_lot::Mutex;

use crate::error::{FsError, Result};
use crate::format::layout::BLOCK;

/// Longest single read when many blocks are wanted, and the widest gap of unwanted blocks read through to save a read.
const MAX_READ_BLOCKS: u64 = 256;
const MAX_GAP_BLOCKS: u64 = 16;
/// Reads in flight when many blocks are wanted.
const READS_IN_FLIGHT: usize = 8;

struct Cached {
    owner: LockId,
    epoch: u64,
    block: Arc<Block>,
}

struct Cache {
    blocks: LruCache<u64, Cached>,
    epochs: BTreeMap<LockId, u64>,
}

impl Cache {
    fn epoch(&self, owner: LockId) -> u64 {
        self.epochs.get(&owner).copied().unwrap_or(0)
    }
}

pub struct Store {
    device: Arc<dyn BlockDevice>,
    journal: Arc<Journal>,
    volume: u64,
    cache: Mutex<Cache>,
}

impl Store {
    pub fn new(device: Arc<dyn BlockDevice>, journal: Arc<Journal>, volume: u64, cache_bytes: usize) -> Self {
        let blocks = NonZeroUsize::new(cache_bytes / BLOCK_SIZE).unwrap_or(NonZeroUsize::MIN);
        let cache = Mutex::new(Cache { blocks: LruCache::new(blocks), epochs: BTreeMap::new() });
        Self { device, journal, volume, cache }
    }

    fn cached(&self, owner: LockId, number: u64) -> Option<Arc<Block>> {
        let mut c = self.cache.lock();
        let epoch = c.epoch(owner);
        if let Some(hit) = c.blocks.get(&number).filter(|hit| hit.owner == owner && hit.epoch == epoch) {
            return Some(hit.block.clone());
        }
        drop(c);
        self.journal.get(number)
    }

    /// Remembers the current content of a block.
    pub fn put(&self, owner: LockId, number: u64, block: Arc<Block>) {
        let mut c = self.cache.lock();
        let epoch = c.epoch(owner);
        c.blocks.put(number, Cached { owner, epoch, block });
    }

    /// Forgets a block that was freed.
    pub fn remove(&self, number: u64) {
        self.cache.lock().blocks.pop(&number);
    }

    /// Everything cached of `owner` is out of date.
    pub fn forget(&self, owner: LockId) {
        *self.cache.lock().epochs.entry(owner).or_default() += 1;
    }

    /// A metadata block of `owner`, whose lock the caller holds (I1).
    pub async fn read(&self, owner: LockId, number: u64, kind: BlockKind) -> Result<Arc<Block>> {
        if let Some(b) = self.cached(owner, number) {
            return Ok(b);
        }
        let at = self.offset(owner, number, 1).await?;
        let buf = self.device.read(IoClass::Meta, at, BLOCK_SIZE).await?;
        let block = Arc::new(buf);
        self.verify(owner, number, kind, &block)?;
        self.put(owner, number, block.clone());
        Ok(block)
    }

    /// Brings blocks into the cache with few large reads. Blocks that do not verify are left out: who needs one reads it
    /// by itself and gets the error.
    pub async fn prefetch(&self, owner: LockId, numbers: &[u64], kind: BlockKind) -> Result<()> {
        let mut wanted: Vec<u64> = numbers.iter().copied().filter(|n| self.cached(owner, *n).is_none()).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let mut reads = tokio::task::JoinSet::new();
        for run in runs(&wanted) {
            if reads.len() >= READS_IN_FLIGHT {
                self.take_read(owner, kind, reads.join_next().await)?;
            }
            let (first, last) = (run[0], run[run.len() - 1]);
            let len = last - first + 1;
            let at = self.offset(owner, first, len).await?;
            let (device, run) = (self.device.clone(), run.to_vec());
            reads.spawn(async move {
                let buf = device.read(IoClass::Meta, at, (len * BLOCK) as usize).await?;
                let take = |n: &u64| {
                    let from = ((n - first) * BLOCK) as usize;
                    (*n, Arc::new(Block::copy_of(&buf[from..from + BLOCK_SIZE])))
                };
                Ok::<_, blockdev::DevError>(run.iter().map(take).collect::<Vec<_>>())
            });
        }
        while let Some(done) = reads.join_next().await {
            self.take_read(owner, kind, Some(done))?;
        }
        Ok(())
    }

    #[allow(clippy::type_complexity)]
    fn take_read(
        &self,
        owner: LockId,
        kind: BlockKind,
        done: Option<std::result::Result<blockdev::Result<Vec<(u64, Arc<Block>)>>, tokio::task::JoinError>>,
    ) -> Result<()> {
        let Some(Ok(read)) = done else { return Ok(()) };
        for (number, block) in read? {
            if self.verify(owner, number, kind, &block).is_ok() {
                self.put(owner, number, block);
            }
        }
        Ok(())
    }

    async fn offset(&self, owner: LockId, number: u64, len: u64) -> Result<u64> {
        let end = number.checked_add(len).filter(|_| number > 0);
        let within = |size: u64| end.is_some_and(|end| end <= size / BLOCK);
        // What lies beyond the end may be there since the volume grew.
        if within(self.device.geometry().size) || within(self.device.look_at_size().await?.size) {
            return Ok(number * BLOCK);
        }
        Err(FsError::damaged(owner, format!("refers to block {number}, beyond the device")))
    }

    fn verify(&self, owner: LockId, number: u64, kind: BlockKind, b: &Block) -> Result<()> {
        let fail = |why| FsError::Block { block: number, owner, why };
        let header = block::verify(b, self.volume, number, owner).map_err(fail)?;
        if header.kind != kind {
            return Err(fail(block::BlockError::Kind(header.kind)));
        }
        Ok(())
    }
}

/// Splits sorted block numbers where a single read would be too long or would read too much for nothing.
fn runs(sorted: &[u64]) -> Vec<&[u64]> {
    let mut out = Vec::new();
    let mut start = 0;
    for i in 1..=sorted.len() {
        let split = i == sorted.len()
            || sorted[i] - sorted[i - 1] > MAX_GAP_BLOCKS
            || sorted[i] - sorted[start] >= MAX_READ_BLOCKS;
        if split && start < i {
            out.push(&sorted[start..i]);
            start = i;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_blocks_are_read_together_and_far_ones_apart() {
        let r = runs(&[1, 2, 10, 100, 101]);
        assert_eq!(r, vec![&[1, 2, 10][..], &[100, 101][..]]);
        let many: Vec<u64> = (0..600).collect();
        assert!(runs(&many).iter().all(|r| r.len() <= MAX_READ_BLOCKS as usize));
        assert_eq!(runs(&many).iter().map(|r| r.len()).sum::<usize>(), 600);
    }
}
