//! What fsck changes on a volume that no node has mounted: a superblock or its copy that is damaged, the journals of
//! dead nodes, and with [`correct`] trees, lock blocks of domains and groups, and bitmaps.
//!
//! [`run`] does all of it, in the order that this needs. Superblock, slots and journals do not need the volume to themselves, so a
//! node that mounts at the same moment is no danger: the superblock is written only with what it held when the volume was
//! made; see [`members`] for the others. Everything else is changed under a claim of all slots.
//! The order of writes is [`build`]'s: after a crash in the middle another run does the rest.
//!
//! The items of damaged domains, and of those that the correction of their names touches, are in memory while they are corrected; of
//! all others one bit per block, the names that cross domains, and the directories.

mod beyond;
mod build;
mod load;
mod members;
mod names;
mod objects;
mod scan;
mod superblock;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use blockdev::{BlockDevice, DevError, IoClass};
use cluster::{ClusterError, LockId, Node, NodeId, Slot};

pub use members::{cells, recover, slots};
pub use superblock::superblock;

use crate::check::reader::Reader;
use crate::check::{ADVICE, CheckError, Notify, Options, Report, check_with};
use crate::format::layout::BLOCK;
use crate::format::superblock::{Superblock, SuperblockError};
use crate::recovery::JournalRecoverer;

/// Something that was put right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    pub place: String,
    pub text: String,
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.text)
    }
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum RepairError {
    #[error(transparent)]
    Device(#[from] DevError),
    #[error(transparent)]
    Check(#[from] CheckError),
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("{0}: its lock block cannot be read or written")]
    LockBlock(LockId),
    #[error("the block of slot {0} changed during the repair: run fsck.clusterfs again")]
    Slot(Slot),
    #[error("the volume has not enough free blocks to write its trees anew")]
    NoSpace,
    #[error("a tree cannot be written: {0}")]
    Build(String),
    #[error("the journal of {0} was not replayed in time: nothing of it is lost, run fsck.clusterfs again")]
    NotRecovered(NodeId),
}

fn repaired(place: String, text: &str) -> Repair {
    Repair { place, text: text.trim_end_matches(ADVICE).into() }
}

/// What a repair came to.
#[derive(Debug)]
pub struct Outcome {
    pub repairs: Vec<Repair>,
    /// What was left because it would cost something, or cannot be done.
    pub left: Vec<Repair>,
    /// What there is after it.
    pub report: Report,
}

/// Checks a volume, repairs what it finds, and checks it again. Without `may_lose` only what costs nothing is repaired. `seed` is
/// any number that no other node has.
pub async fn run(
    dev: &Arc<dyn BlockDevice>,
    may_lose: bool,
    options: Options,
    seed: u64,
    progress: Option<Notify<'_>>,
) -> Result<Outcome, RepairError> {
    // Also refuses a volume that is mounted, before anything is written.
    let mut report = check_with(dev, options, progress).await?;
    if report.read_only_features != 0 {
        return Err(CheckError::ReadOnlyFeatures { features: report.read_only_features }.into());
    }
    let mut repairs = Vec::new();
    let mut left = Vec::new();
    repairs.extend(superblock(dev, may_lose).await?);
    if report.truncated {
        left.push(repaired("device".into(), "was truncated: it must have its old size first"));
        return Ok(Outcome { repairs, left, report });
    }
    repairs.extend(cells(dev).await?);
    repairs.extend(slots(dev, &report.lost_slots, may_lose, seed).await?);
    if report.replayable || may_lose {
        repairs.extend(recover(dev, &report.dead, may_lose, seed.wrapping_add(1)).await?);
    }
    if !repairs.is_empty() {
        report = check_with(dev, options, progress).await?;
    }
    if !report.is_clean() {
        if !report.dead.is_empty() || !report.lost_slots.is_empty() {
            left.push(repaired("journals".into(), "are to be replayed first, which only -y can do"));
            return Ok(Outcome { repairs, left, report });
        }
        let damaged = std::mem::take(&mut report.damaged);
        let done = correct(dev, Some(damaged), may_lose, seed.wrapping_add(2), progress).await?;
        match done.refused {
            true => left = done.losses,
            false => repairs.extend(done.losses),
        }
        repairs.extend(done.repairs);
        report = check_with(dev, options, progress).await?;
    }
    Ok(Outcome { repairs, left, report })
}

/// What the correction of the trees came to.
#[derive(Debug, Default)]
pub struct Corrected {
    pub repairs: Vec<Repair>,
    /// What would lose something that cannot be read any more or makes no sense. If that was not allowed, nothing but journals that
    /// hold nothing was changed.
    pub losses: Vec<Repair>,
    pub refused: bool,
}

/// Corrects trees, names, counts, lock blocks and bitmaps. Claims the volume for itself; no node may have it mounted, dead nodes
/// must have been recovered. `damaged` are the domains that a check has found something in, if there was one; more may turn out
/// to be. Without `may_lose`, nothing is changed if anything would be lost.
pub async fn correct(
    dev: &Arc<dyn BlockDevice>,
    damaged: Option<BTreeSet<u32>>,
    may_lose: bool,
    seed: u64,
    progress: Option<Notify<'_>>,
) -> Result<Corrected, RepairError> {
    let first = dev.read(IoClass::Meta, 0, BLOCK as usize).await?;
    let layout = Superblock::decode(&first)?.layout();
    let (node, sb) = members::join(dev, Arc::new(JournalRecoverer::new(dev.clone(), layout)), seed).await?;
    let done = claimed(&node, &sb, damaged, may_lose, progress.unwrap_or(&|_| ())).await;
    let freed = node.unclaim_all().await;
    let left = node.leave().await;
    let done = done?;
    freed?;
    left?;
    Ok(done)
}

async fn claimed(
    node: &Arc<Node>,
    sb: &Superblock,
    damaged: Option<BTreeSet<u32>>,
    may_lose: bool,
    tell: Notify<'_>,
) -> Result<Corrected, RepairError> {
    match node.claim_all().await {
        Ok(()) => {}
        Err(ClusterError::Damaged { what, .. }) => {
            let losses = vec![repaired(what, "is damaged: without it the volume cannot be claimed for repair")];
            return Ok(Corrected { losses, refused: true, ..Corrected::default() });
        }
        Err(e) => return Err(e.into()),
    }
    let layout = sb.layout();
    let dev = node.guarded_device();
    let mut latest = BTreeMap::new();
    let mut emptied = Vec::new();
    for slot in 0..layout.nodes {
        let areas = layout.cluster();
        let sector = dev.read(IoClass::Lock, areas.slot_block(slot), areas.stride as usize).await?;
        let block = cluster::SlotBlock::decode(&sector, areas.volume, slot).map_err(|_| RepairError::Slot(slot))?;
        latest.insert(slot, block.incarnation);
        // Its nodes have all ended: there is nothing in it that was not placed.
        let region = layout.journal(slot);
        if journal::last_opened_by(&dev, region).await.is_err() {
            members::clear(&dev, &layout, slot).await?;
            emptied.push(repaired(format!("journal of slot {slot}"), "emptied: its nodes have ended, it held nothing"));
        }
    }
    let r = Reader {
        dev: dev.clone(),
        volume: layout.volume,
        blocks: layout.blocks,
        replayed: BTreeMap::new(),
        least_versions: BTreeMap::new(),
    };
    let mut damaged = match damaged {
        Some(d) => d,
        None => load::all_damaged(&r, layout, &latest, tell).await?,
    };
    let (v, plan, mut log) = loop {
        let mut log = Log::default();
        let mut v = load::load(&r, layout, &mut damaged, &latest, tell).await?;
        for (place, text) in std::mem::take(&mut v.damage) {
            log.lose(place, text);
        }
        objects::correct(&mut v, &mut log);
        let touched = names::correct(&mut v, &r, &mut log).await;
        if touched.is_subset(&damaged) {
            let plan = build::plan(&mut v, &mut log)?;
            break (v, plan, log);
        }
        // What it takes to correct these names is in domains that are whole: once more, with them.
        damaged.extend(touched);
    };
    let refused = !may_lose && !log.losses.is_empty();
    if !refused {
        build::write(&dev, &v, &plan, &latest, &mut log).await?;
    }
    let Log { mends, losses } = log;
    if !refused {
        emptied.extend(mends);
    }
    Ok(Corrected { repairs: emptied, losses, refused })
}

/// What is being corrected, and whether it costs anything.
#[derive(Default)]
struct Log {
    mends: Vec<Repair>,
    losses: Vec<Repair>,
}

impl Log {
    fn mend(&mut self, place: String, text: String) {
        self.mends.push(Repair { place, text });
    }

    fn lose(&mut self, place: String, text: String) {
        self.losses.push(Repair { place, text });
    }
}
