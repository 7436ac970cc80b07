//! The running transaction: what operations have installed since the last commit began.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use blockdev::AlignedBuf;
use cluster::{LockId, Tenure};

use crate::BLOCK_SIZE;
use crate::block::Block;
use crate::types::{Change, DataWrite, Install};

/// A block changed since its last record.
pub struct Pending {
    pub lock: LockId,
    pub tenure: Tenure,
    pub new: Arc<Block>,
    /// What the device or the last record has; `None`: allocated since, logged whole.
    pub base: Option<Arc<Block>>,
}

#[derive(Default)]
pub struct Running {
    pub changes: BTreeMap<u64, Pending>,
    pub revokes: BTreeSet<u64>,
    /// Per block the latest contents, and whether nothing committed refers to the block.
    pub data: BTreeMap<u64, (Arc<AlignedBuf>, bool)>,
}

impl Running {
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.revokes.is_empty() && self.data.is_empty()
    }

    pub fn touches(&self, lock: LockId) -> bool {
        self.changes.values().any(|c| c.lock == lock)
    }

    pub fn install(&mut self, op: Install) {
        for (first, count) in op.revokes {
            for b in first..first + count {
                self.changes.remove(&b);
                self.revokes.insert(b);
            }
        }
        for c in op.changes {
            self.change(c);
        }
        for w in op.data {
            self.write(w);
        }
    }

    fn change(&mut self, c: Change) {
        // Used again in the transaction that freed it: the revoke stays, for the older records of the former life (I6), and
        // what they left is not the base of the new one.
        let old = c.old.filter(|_| !self.revokes.contains(&c.block));
        match self.changes.get_mut(&c.block) {
            Some(p) => {
                p.new = c.new;
                p.lock = c.lock;
                p.tenure = c.tenure;
                if old.is_none() {
                    p.base = None;
                }
            }
            None => {
                self.changes.insert(c.block, Pending { lock: c.lock, tenure: c.tenure, new: c.new, base: old });
            }
        }
    }

    fn write(&mut self, w: DataWrite) {
        let mut block = w.block;
        for buf in w.bufs {
            if buf.len() == BLOCK_SIZE {
                self.write_block(block, buf, w.fresh);
                block += 1;
                continue;
            }
            for part in buf.chunks(BLOCK_SIZE) {
                self.write_block(block, Arc::new(AlignedBuf::copy_of(part)), w.fresh);
                block += 1;
            }
        }
    }

    /// What the transaction wrote first decides whether something committed refers to the block.
    fn write_block(&mut self, block: u64, buf: Arc<AlignedBuf>, fresh: bool) {
        let fresh = self.data.get(&block).map_or(fresh, |(_, first)| *first);
        self.data.insert(block, (buf, fresh));
    }

    /// Data in device order, joined where it is consecutive, at most `most` blocks each.
    pub fn data_runs(&self, most: usize) -> Vec<(u64, Vec<Arc<AlignedBuf>>)> {
        let mut runs: Vec<(u64, Vec<Arc<AlignedBuf>>)> = Vec::new();
        for (block, (buf, _)) in &self.data {
            match runs.last_mut() {
                Some((first, bufs)) if *first + bufs.len() as u64 == *block && bufs.len() < most => {
                    bufs.push(buf.clone())
                }
                _ => runs.push((*block, vec![buf.clone()])),
            }
        }
        runs
    }

    pub fn revoked_runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for b in &self.revokes {
            match runs.last_mut() {
                Some((first, n)) if *first + *n == *b => *n += 1,
                _ => runs.push((*b, 1)),
            }
        }
        runs
    }
}
