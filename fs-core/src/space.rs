//! Getting hold of groups with free space, the volume's free space as a whole, and frees into groups that others hold.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use blockdev::IoClass;
use cluster::{LockBlock, LockId, Mode, NodeId};
use journal::block;
use tokio::time::Instant;

use crate::alloc::Purpose;
use crate::error::{FsError, Result};
use crate::format::group::GroupHeader;
use crate::format::item::{Key, Kind};
use crate::format::layout::{BLOCK, Extent, slot_domain};
use crate::hold::Hold;
use crate::txn::{Kept, Plan, Txn};
use crate::types::StatFs;
use crate::volume::Volume;

/// So often the frees of slots that nobody lives in are looked for while the volume is full.
const FOR_THE_GONE: Duration = Duration::from_secs(30);
/// Deferred frees that one operation carries out.
const FREES_AT_ONCE: usize = 64;
/// How long a node steps back, per attempt and slot number, when it lost the group that it needs beside a domain.
const MAKE_WAY: Duration = Duration::from_millis(50);
const MAKE_WAY_MOST: Duration = Duration::from_secs(2);
/// So often the owner of a slot tries at once: somebody else may be its owner on the next mount.
const OWNERS_ATTEMPTS: u32 = 20;
/// So often an operation that lost the group it had found looks for one again at once.
const QUICK_TRIES: u32 = 2;
/// So often at most: others may always have taken what it needs.
const TRIES_MOST: u32 = 64;
/// How long a group is kept for an operation that waits for its domains, per try.
const KEEP: Duration = Duration::from_millis(200);
const KEEP_MOST: u32 = 10;
/// Lock blocks read at once when groups are looked over.
const SURVEY_BYTES: u64 = 1 << 20;

/// What the lock block of a group that this node does not hold says.
struct Candidate {
    group: u32,
    free: u64,
    /// Another node holds it: its count is from when it was last given up.
    taken: bool,
}

/// Where the space is that an operation needs.
enum Found {
    /// On this node, kept for it or not.
    Here(Option<Kept>),
    /// In a group that has to go to another node first.
    Leaving(Arc<Hold>),
}

impl Volume {
    /// Gets a group with free blocks for an operation that ran out of them.
    pub(crate) async fn find_space(&self, blocks: u64, plan: &Plan) -> Result<Option<Kept>> {
        match self.search(blocks, plan).await {
            Ok(Found::Here(kept)) => Ok(kept),
            Ok(Found::Leaving(hold)) => {
                // Not for ever: what the group's way out waits for may be waiting for this operation.
                let _ = tokio::time::timeout(KEEP * KEEP_MOST, hold.given_up()).await;
                Ok(None)
            }
            // By itself nobody comes back for what the gone have deferred. Boxed: its own operations may look for space, too.
            Err(FsError::NoSpace) if plan.purpose != Purpose::Reclaim && Box::pin(self.free_for_the_gone()).await? => {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    async fn search(&self, blocks: u64, plan: &Plan) -> Result<Found> {
        let _one = self.searching.lock().await;
        if self.enough(blocks, plan.purpose) && plan.space_tries <= 2 {
            return Ok(Found::Here(None));
        }
        // Blocks freed a moment ago count once the record of the free is durable.
        let before = self.alloc.free(None);
        self.commit().await?;
        if self.alloc.free(None) > before && self.enough(blocks, plan.purpose) && plan.space_tries <= 4 {
            return Ok(Found::Here(None));
        }
        if plan.space_tries > TRIES_MOST {
            return Err(FsError::NoSpace);
        }
        let lost_before = plan.space_tries > QUICK_TRIES;
        // What makes the volume fuller needs all of its blocks at once: who has not found them on a whole round goes no further rounds.
        let (wanted, least) = match plan.purpose {
            Purpose::Grow if lost_before => (blocks, blocks),
            _ => (blocks.min(64), 1),
        };
        // What is here may be lost again if it is not kept.
        let here = if lost_before && self.enough(blocks, plan.purpose) { self.alloc.emptiest() } else { None };
        let others = self.candidates().await?.into_iter().filter(|c| c.free > 0 || c.taken).map(|c| c.group);
        let mut leaving = None;
        for group in here.into_iter().chain(others) {
            let hold = self.group_hold(group);
            let ticket = self.enter(&hold, Mode::Exclusive).await?;
            if lost_before && plan.purpose == Purpose::Grow && !ticket.cacheable() {
                // It is on its way to another node: to keep it here is of no use, as nobody is promised anything of it any more.
                leaving = Some(hold);
                continue;
            }
            let free = self.alloc.held().into_iter().find(|(g, _)| *g == group).map_or(0, |(_, f)| f);
            if self.alloc.usable(free, plan.purpose) > 0 && self.enough(wanted, plan.purpose) {
                // Others that need it and the same domain would take it while this operation waits for the domain, and
                // this node the domain from them, for ever.
                let time = KEEP * plan.space_tries.min(KEEP_MOST);
                return Ok(Found::Here(lost_before.then(|| Kept::for_a_time(ticket, time))));
            }
        }
        match leaving {
            Some(hold) => Ok(Found::Leaving(hold)),
            None if self.enough(least, plan.purpose) => Ok(Found::Here(None)),
            None => Err(FsError::NoSpace),
        }
    }

    fn enough(&self, blocks: u64, purpose: Purpose) -> bool {
        if purpose == Purpose::Grow {
            return self.alloc.unpromised() >= blocks.max(1);
        }
        let usable: u64 = self.alloc.held().iter().map(|(_, f)| self.alloc.usable(*f, purpose)).sum();
        usable >= blocks.max(1)
    }

    /// Gets a group with a free domain number; false if there is none in the whole volume.
    pub(crate) async fn find_domain_number(&self) -> Result<bool> {
        let _one = self.searching.lock().await;
        if let Some(group) = self.alloc.group_with_domain() {
            // It may be on its way to another node: then there is something to wait for.
            drop(self.enter(&self.group_hold(group), Mode::Exclusive).await?);
            return Ok(true);
        }
        for c in self.candidates().await? {
            let _ticket = self.enter(&self.group_hold(c.group), Mode::Exclusive).await?;
            if self.alloc.group_with_domain().is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The groups that this node does not hold, or not for long: free ones first, fullest last; nodes start at different places.
    async fn candidates(&self) -> Result<Vec<Candidate>> {
        let mut all: Vec<Candidate> = self.survey().await?.into_iter().filter(|c| !self.alloc.keeps(c.group)).collect();
        let layout = self.layout();
        let groups = u64::from(layout.groups);
        let start = u64::from(self.node().slot) * groups / u64::from(layout.nodes);
        all.sort_by_key(|c| (c.taken, c.free == 0, (u64::from(c.group) + groups - start) % groups));
        Ok(all)
    }

    /// Reads the lock blocks of all groups, also of those that the volume got since somebody last looked.
    async fn survey(&self) -> Result<Vec<Candidate>> {
        self.look_at_size().await?;
        let volume = self.layout();
        let layout = volume.cluster();
        let mut out = Vec::new();
        let per_read = (SURVEY_BYTES / layout.stride) as u32;
        let mut first = 0;
        while first < volume.groups {
            let n = per_read.min(volume.groups - first);
            let Some(at) = layout.lock_block(LockId::Group(first)) else { break };
            let len = u64::from(n) * layout.stride;
            let sectors = self.device.read(IoClass::Lock, at, len as usize).await?;
            for (i, sector) in sectors.chunks(layout.stride as usize).enumerate() {
                let group = first + i as u32;
                let id = LockId::Group(group);
                let block = LockBlock::decode(sector, layout.volume, id).map_err(|e| FsError::damaged(id, e))?;
                // What the volume grew by since the group was last given up is free.
                let more = volume.group_extent(group).len.saturating_sub(block.value.next_local);
                let free = block.value.root + more;
                out.push(Candidate { group, free, taken: block.exclusive_holder().is_some() });
            }
            first += n;
        }
        Ok(out)
    }

    pub async fn statfs(&self) -> Result<StatFs> {
        self.check()?;
        let held = self.alloc.held();
        let mine: BTreeSet<u32> = held.iter().map(|(g, _)| *g).collect();
        let mut free: u64 = held.iter().map(|(_, f)| f).sum();
        for c in self.survey().await?.iter().filter(|c| !mine.contains(&c.group)) {
            free += if c.taken { self.placed_free(c.group).await?.unwrap_or(c.free) } else { c.free };
        }
        let free = free.saturating_sub(self.alloc.reserved());
        let layout = self.layout();
        let blocks = (0..layout.groups).map(|g| layout.group_extent(g).len).sum();
        // Inodes cost bytes, not places: as many more as fit into the free blocks, eight to a block.
        Ok(StatFs { blocks, free, files: blocks * 8, files_free: free * 8, block_size: 4096, name_max: 255 })
    }

    /// Places the headers of this node's groups, where they have changed: [`Volume::statfs`] of other nodes reads them.
    pub(crate) async fn show_free_space(&self) -> Result<()> {
        let groups = |lock| matches!(lock, LockId::Group(_));
        self.journal.place_logged(groups).await.map_err(|e| self.journal_failed(e))
    }

    /// Free blocks of a group that another node holds, or held when it ended, as the header in its place says: newer than
    /// the lock block's count, which is from when the group was last given up. Nothing but a figure for users: the lock is not held.
    async fn placed_free(&self, group: u32) -> Result<Option<u64>> {
        let layout = self.layout();
        let number = layout.group_header(group);
        let read = self.device.read(IoClass::Meta, number * BLOCK, BLOCK as usize).await?;
        let sound = block::verify(&read, layout.volume, number, LockId::Group(group)).is_ok();
        Ok(sound.then(|| GroupHeader::decode(&read).ok()).flatten().map(|h| {
            // Of a group that has not changed since the volume grew the header does not count all.
            h.grown_to(layout.group_extent(group).len).free_blocks
        }))
    }

    // ---- frees into groups that others hold --------------------------------------------------------------------

    /// Carries out the frees that wait in a slot's domain.
    pub(crate) async fn reclaim_slot(&self, domain: u32) -> Result<()> {
        loop {
            let mut plan = Plan::write(&[domain], Purpose::Reclaim);
            let waiting = loop {
                let mut tx = self.begin(&plan).await?;
                let r = deferred(&mut tx, domain, 0, FREES_AT_ONCE).await;
                if let Some(done) = self.finish(tx, r, &mut plan).await? {
                    break done.value;
                }
            };
            let Some(first) = waiting.first() else { return Ok(()) };
            let Some(group) = self.layout().group_of(first.start) else {
                return Err(FsError::damaged(LockId::Domain(domain), "a deferred free outside the groups"));
            };
            drop(self.enter(&self.group_hold(group), Mode::Exclusive).await?);
            let mut plan = Plan::write(&[domain], Purpose::Reclaim);
            let mut lost = 0;
            loop {
                let mut tx = self.begin(&plan).await?;
                let r = carry_out(&mut tx, domain, group).await;
                if matches!(r, Err(FsError::NeedGroup(_))) {
                    // Before it asks again: while this node waits, others may have both.
                    drop(tx);
                    self.make_way(domain, lost).await;
                    drop(self.enter(&self.group_hold(group), Mode::Exclusive).await?);
                    lost += 1;
                    continue;
                }
                if self.finish(tx, r, &mut plan).await?.is_some() {
                    break;
                }
            }
        }
    }

    /// The frees of a slot need its domain and a group together, and neither is kept while waiting for the other. The one who
    /// recovered the slot and the one who lives in it now could take one from the other for ever: all but the owner
    /// wait, each a different time, longer with every attempt.
    async fn make_way(&self, domain: u32, attempt: u32) {
        if domain == self.own_domain() && attempt < OWNERS_ATTEMPTS {
            return;
        }
        self.step_back(attempt + 1).await;
    }

    /// Different nodes wait for different times.
    async fn step_back(&self, times: u32) {
        let step = MAKE_WAY * (u32::from(self.node().slot) + 1);
        tokio::time::sleep((step * times).min(MAKE_WAY_MOST)).await;
    }

    /// Carries out the frees of slots that nobody lives in: where who recovered them ended before it could, or was read-only, or what an
    /// unmount did last deferred more. False: it was done a moment ago.
    async fn free_for_the_gone(&self) -> Result<bool> {
        {
            let mut last = self.freed_for_the_gone.lock();
            if last.is_some_and(|at| at.elapsed() < FOR_THE_GONE) {
                return Ok(false);
            }
            *last = Some(Instant::now());
        }
        for NodeId { slot, .. } in self.node.vacant_slots() {
            let domain = slot_domain(slot);
            if let Err(e) = self.reclaim_slot(domain).await {
                self.check()?;
                tracing::warn!(node = %self.node(), slot, "cannot carry out the frees of a slot that nobody lives in: {e}");
            }
            self.give_up(LockId::Domain(domain)).await;
        }
        // They count once their records are durable.
        self.commit().await?;
        Ok(true)
    }

    /// Deferred frees of this slot, also of its earlier incarnations. What cannot be done now is done by a later mount.
    pub(crate) async fn clean_own_slot(&self) {
        if self.read_only {
            return;
        }
        if let Err(e) = self.reclaim_slot(self.own_domain()).await {
            tracing::warn!(node = %self.node(), "cannot carry out deferred frees: {e}");
        }
    }
}

async fn deferred(tx: &mut Txn<'_>, domain: u32, from: u64, limit: usize) -> Result<Vec<Extent>> {
    let items = tx.kept_for_slot(domain, Kind::DeferredFree, from, limit).await?;
    items
        .into_iter()
        .map(|(key, value)| {
            let len = value.as_slice().try_into().map(u64::from_le_bytes);
            let len = len.map_err(|_| FsError::damaged(LockId::Domain(domain), "a deferred free of the wrong size"))?;
            Ok(Extent::new(key.offset, len))
        })
        .collect()
}

/// Frees what waits for one group that this node holds now.
async fn carry_out(tx: &mut Txn<'_>, domain: u32, group: u32) -> Result<()> {
    if !tx.hold_group(group) {
        return Err(FsError::NeedGroup(group));
    }
    let layout = tx.vol.layout();
    for e in deferred(tx, domain, layout.group_extent(group).start, FREES_AT_ONCE).await? {
        if layout.group_of(e.start) != Some(group) {
            break;
        }
        tx.del(domain, &Key::new(0, Kind::DeferredFree, e.start)).await?;
        tx.free_blocks(e).await?;
    }
    Ok(())
}
