//! Replay of a journal that is damaged, or whose locks are: what fits, a block at a time. Only a repair that may lose something does
//! this, and corrects what does not fit together afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use blockdev::{BlockDevice, IoClass};
use cluster::{LockId, NodeId, Tenure};
use parking_lot::Mutex;

use crate::BLOCK_SIZE;
use crate::block::{self, BlockHeader};
use crate::replay::{ReplayReport, TenureSource, one_in_place, place, replayed, scan, scan_without_header};
use crate::types::{Region, Result};

/// What a journal that cannot be replayed as a whole came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Salvage {
    pub records: usize,
    pub blocks_written: usize,
    /// What was taken for granted, a line each.
    pub assumed: Vec<String>,
    /// What was given up, a line each.
    pub given_up: Vec<String>,
}

/// As [`replay`](crate::replay()), but what cannot be replayed is left out, so blocks that belong together may end up of different
/// age. Records are looked for if no header leads to them. A lock whose block is damaged counts as held in the newest tenure
/// that the journal has of it, if what lies in a block's place is the owner's, or nothing. An error means that nothing could be
/// used, or that the device failed.
pub async fn salvage(
    dev: &Arc<dyn BlockDevice>,
    region: Region,
    dead: NodeId,
    locks: &dyn TenureSource,
) -> Result<Salvage> {
    let mut done = Salvage::default();
    let scan = match scan(dev, region, dead).await {
        Ok(s) => s,
        Err(e) => {
            let found = scan_without_header(dev, region, dead).await?;
            if found.records.is_empty() {
                return Err(e);
            }
            done.assumed.push(format!("{} records found without a header", found.records.len()));
            found
        }
    };
    done.records = scan.records.len();
    let newest = scan.records.iter().flat_map(|r| r.locks.iter().copied()).collect();
    let lenient = Lenient { inner: locks, newest, damaged: Mutex::new(BTreeMap::new()) };
    let counted = scan.counted(region, dead, &lenient, &mut ReplayReport::default()).await?;
    let damaged = lenient.damaged.into_inner();
    let mut images = Vec::new();
    for (number, changes) in counted {
        let unsure: BTreeSet<LockId> = changes.iter().map(|c| c.lock).filter(|l| damaged.contains_key(l)).collect();
        let mut taken = false;
        for lock in unsure {
            taken |= others(dev, region, number, lock).await?;
        }
        if taken {
            done.given_up.push(format!("block {number}: something else may be there by now"));
            continue;
        }
        match one_in_place(dev, number).await.and_then(|image| replayed(image, region, number, &changes)) {
            Ok(Some(image)) => images.push((number, Arc::new(image))),
            Ok(None) => {}
            Err(e) => done.given_up.push(e.to_string()),
        }
    }
    done.assumed.extend(damaged.into_values().map(|why| format!("{why}: taken as held until the node died")));
    place(dev, &images).await?;
    done.blocks_written = images.len();
    Ok(done)
}

/// Whether what lies in a block's place may be somebody else's than the owner's of this lock.
async fn others(dev: &Arc<dyn BlockDevice>, region: Region, number: u64, lock: LockId) -> Result<bool> {
    if number >= dev.geometry().size / BLOCK_SIZE as u64 {
        return Ok(true);
    }
    let b = dev.read(IoClass::Meta, number * BLOCK_SIZE as u64, BLOCK_SIZE).await?;
    let torn = BlockHeader::decode(&b).is_ok_and(|h| h.volume == region.volume && h.block == number && h.owner == lock);
    Ok(!torn && block::verify(&b, region.volume, number, lock).is_err() && b.iter().any(|x| *x != 0))
}

/// Takes a lock that cannot be asked for as held.
struct Lenient<'a> {
    inner: &'a dyn TenureSource,
    newest: BTreeMap<LockId, Tenure>,
    damaged: Mutex<BTreeMap<LockId, String>>,
}

#[async_trait]
impl TenureSource for Lenient<'_> {
    async fn exclusive_tenure(&self, lock: LockId, holder: NodeId) -> std::result::Result<Option<Tenure>, String> {
        Ok(match self.inner.exclusive_tenure(lock, holder).await {
            Ok(t) => t,
            Err(e) => {
                self.damaged.lock().insert(lock, e);
                self.newest.get(&lock).copied()
            }
        })
    }
}
