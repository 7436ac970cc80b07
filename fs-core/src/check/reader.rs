//! Large reads of the volume as it is after the replay of what dead nodes left in their journals.

use std::collections::BTreeMap;
use std::sync::Arc;

use blockdev::{BlockDevice, IoClass};
use cluster::LockId;
use journal::block::{self, BlockError, BlockKind};
use journal::{BLOCK_SIZE, Block};
use tokio::task::JoinSet;

use crate::error::{FsError, Result};
use crate::format::layout::BLOCK;
use crate::tree::NodeRead;

/// Longest read, and the widest gap that is read through to save a read.
const MAX_READ_BLOCKS: u64 = 256;
const MAX_GAP_BLOCKS: u64 = 16;
const READS_IN_FLIGHT: usize = 8;

/// A block, or why it could not be read.
pub(crate) type Read = std::result::Result<Arc<Block>, String>;

pub(crate) struct Reader {
    pub dev: Arc<dyn BlockDevice>,
    pub volume: u64,
    pub blocks: u64,
    /// Blocks that the replay of the journals would place.
    pub replayed: BTreeMap<u64, Arc<Block>>,
    /// Versions that the headers of domains have at least, as their lock blocks say.
    pub least_versions: BTreeMap<u32, u64>,
}

impl Reader {
    /// Reads blocks, in as few and large reads as their places allow; each number given is answered.
    pub async fn many(&self, numbers: &[u64]) -> BTreeMap<u64, Read> {
        let mut out = BTreeMap::new();
        let mut wanted = Vec::new();
        for n in numbers {
            if *n == 0 || *n >= self.blocks {
                out.insert(*n, Err("lies beyond the volume".to_string()));
            } else if let Some(b) = self.replayed.get(n) {
                out.insert(*n, Ok(b.clone()));
            } else {
                wanted.push(*n);
            }
        }
        wanted.sort_unstable();
        wanted.dedup();
        let mut reads = JoinSet::new();
        let mut done = Vec::new();
        for run in runs(&wanted) {
            if reads.len() >= READS_IN_FLIGHT {
                done.extend(reads.join_next().await);
            }
            reads.spawn(read_run(self.dev.clone(), run.to_vec()));
        }
        while let Some(d) = reads.join_next().await {
            done.push(d);
        }
        for d in done.into_iter().flatten() {
            out.extend(d);
        }
        for n in &wanted {
            out.entry(*n).or_insert_with(|| Err("could not be read".to_string()));
        }
        out
    }

    /// Reads a run of blocks only to see whether they can be read; names those that cannot.
    pub async fn unreadable(&self, first: u64, len: u64, bad: &mut (dyn FnMut(u64, String) + Send)) {
        let mut pieces = JoinSet::new();
        let mut at = first;
        while at < first + len || !pieces.is_empty() {
            if at < first + len && pieces.len() < READS_IN_FLIGHT {
                let n = MAX_READ_BLOCKS.min(first + len - at);
                pieces.spawn(read_run(self.dev.clone(), (at..at + n).collect()));
                at += n;
                continue;
            }
            if let Some(Ok(read)) = pieces.join_next().await {
                for (block, r) in read {
                    if let Err(e) = r {
                        bad(block, e);
                    }
                }
            }
        }
    }

    pub async fn one(&self, number: u64) -> Read {
        self.many(&[number]).await.remove(&number).unwrap_or_else(|| Err("could not be read".into()))
    }

    /// Verifies what [`journal::block`] puts at the start of every metadata block.
    pub fn verify(
        &self,
        number: u64,
        b: &Block,
        owner: LockId,
        kind: BlockKind,
    ) -> std::result::Result<(), BlockError> {
        let h = block::verify(b, self.volume, number, owner)?;
        if h.kind == kind { Ok(()) } else { Err(BlockError::Kind(h.kind)) }
    }
}

/// One read; if it fails, block by block, so that one bad sector costs one block.
async fn read_run(dev: Arc<dyn BlockDevice>, run: Vec<u64>) -> Vec<(u64, Read)> {
    let (Some(first), Some(last)) = (run.first().copied(), run.last().copied()) else { return Vec::new() };
    let len = ((last - first + 1) * BLOCK) as usize;
    let mut out = Vec::with_capacity(run.len());
    match dev.read(IoClass::Meta, first * BLOCK, len).await {
        Ok(buf) => {
            for n in run {
                let from = ((n - first) * BLOCK) as usize;
                let block = buf.get(from..from + BLOCK_SIZE).map(|b| Arc::new(Block::copy_of(b)));
                out.push((n, block.ok_or_else(|| "could not be read".to_string())));
            }
        }
        Err(_) => {
            for n in run {
                let r = dev.read(IoClass::Meta, n * BLOCK, BLOCK_SIZE).await;
                out.push((n, r.map(Arc::new).map_err(|e| e.to_string())));
            }
        }
    }
    out
}

/// Splits sorted block numbers where one read would be too long or would read too much for nothing.
fn runs(sorted: &[u64]) -> Vec<&[u64]> {
    let mut out = Vec::new();
    let mut rest = sorted;
    while let Some(first) = rest.first() {
        let near = |w: &[u64]| w[1] - w[0] <= MAX_GAP_BLOCKS && w[1] - first < MAX_READ_BLOCKS;
        let n = 1 + rest.windows(2).take_while(|w| near(w)).count();
        let (run, more) = rest.split_at(n);
        out.push(run);
        rest = more;
    }
    out
}

/// A domain's tree, for single look-ups.
pub(super) struct DomainNodes<'a> {
    pub reader: &'a Reader,
    pub domain: u32,
}

impl NodeRead for DomainNodes<'_> {
    fn damaged(&self, block: u64, why: &str) -> FsError {
        FsError::damaged(LockId::Domain(self.domain), format!("block {block}: {why}"))
    }

    async fn node(&self, block: u64) -> Result<Arc<Block>> {
        let b = self.reader.one(block).await.map_err(|e| self.damaged(block, &e))?;
        let owner = LockId::Domain(self.domain);
        self.reader.verify(block, &b, owner, BlockKind::TreeNode).map_err(|why| FsError::Block {
            block,
            owner,
            why,
        })?;
        Ok(b)
    }

    async fn prefetch(&self, _blocks: &[u64]) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_long_but_bounded() {
        assert_eq!(runs(&[1, 2, 10, 100, 101]), vec![&[1, 2, 10][..], &[100, 101][..]]);
        let many: Vec<u64> = (0..600).collect();
        let r = runs(&many);
        assert_eq!(r.iter().map(|r| r.len()).collect::<Vec<_>>(), [256, 256, 88]);
        assert!(runs(&[]).is_empty());
    }
}
