//! This node's side of the lock blocks: acquiring, waiting, releasing, and what it remembers of them.
//!
//! Memory never claims more than the disk: a lock enters memory after the disk granted it and leaves memory before the
//! disk is asked to take it back. Where the disk says more than memory (an abandoned wait was served, a release was
//! interrupted), the next demand settles it ([`Shared::settle`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use blockdev::{BlockDevice, Caw, DevError, IoClass};
use tokio::sync::Notify;
use tokio::time::{Duration, Instant, sleep};

use crate::format::FormatError;
use crate::node::{Shared, decode_slot};
use crate::transitions::{self, Event, Superseded, in_the_way, step, surplus, unasked, wanted_from};
use crate::{ClusterError, Grant, LockBlock, LockId, LockValue, Mode, NodeId, Release, Result};

/// Bounds of a single operation against a sector that keeps failing.
const READ_TRIES: u32 = 5;
/// Waiters never sleep longer than this between two looks at the lock block.
const LONGEST_WAIT: Duration = Duration::from_millis(200);
/// A waiter rings the doorbell again after this many looks at the lock block that showed no change of holders.
const RING_AGAIN: u32 = 3;
/// Locks remembered although not held; beyond this the idle ones are forgotten.
const REMEMBERED: usize = 8192;

/// What this node knows of one lock.
#[derive(Default)]
pub(crate) struct Local {
    pub held: Option<Held>,
    /// An acquire is in flight in this mode.
    pub waiting: Option<Mode>,
    pub wake: Arc<Notify>,
    /// Serialises our compare-and-writes of this lock block.
    pub op: Arc<tokio::sync::Mutex<()>>,
    /// The block as we last saw it, while we hold it or wait.
    pub block: Option<LockBlock>,
    /// Somebody wants the lock: the block has changed since.
    pub stale: bool,
    /// Our last word on disk was that we neither hold nor want it.
    pub absent: bool,
    /// Asked for while our acquire was in flight.
    pub early: Option<Mode>,
    /// We said at the last release that files are open.
    pub open: bool,
    pub settling: bool,
}

pub(crate) struct Held {
    pub grant: Grant,
    /// The crashes that the grant told of.
    pub crashes: u8,
    pub since: Instant,
    /// What the client was last asked for, and when.
    pub demanded: Option<(Mode, Instant)>,
}

/// Ends the in-memory wait however the acquire ends.
struct Waiting<'a> {
    shared: &'a Shared,
    id: LockId,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(l) = self.shared.locks.lock().get_mut(&self.id) {
            l.waiting = None;
        }
        self.shared.unring(self.id);
    }
}

enum Asked {
    Granted(Grant),
    Waits(LockBlock),
}

impl Shared {
    pub fn with_local<T>(&self, id: LockId, f: impl FnOnce(&mut Local) -> T) -> T {
        let mut locks = self.locks.lock();
        if locks.len() >= REMEMBERED && !locks.contains_key(&id) {
            forget_idle(&mut locks);
        }
        f(locks.entry(id).or_default())
    }

    fn offset(&self, id: LockId) -> Result<u64> {
        self.layout.lock_block(id).ok_or(ClusterError::NoSuchLock(id))
    }

    fn decode_lock(&self, id: LockId, offset: u64, sector: &[u8]) -> Result<LockBlock> {
        LockBlock::decode(sector, self.layout.volume, id).map_err(|e| damaged(id, offset, e))
    }

    pub async fn read_block(&self, id: LockId) -> Result<LockBlock> {
        let offset = self.offset(id)?;
        let sector = self.read_sector(offset).await?;
        self.decode_lock(id, offset, &sector)
    }

    async fn read_sector(&self, offset: u64) -> Result<Vec<u8>> {
        let mut tries = 0;
        loop {
            match self.dev.read(IoClass::Lock, offset, self.layout.stride as usize).await {
                Ok(sector) => return Ok(sector.to_vec()),
                Err(e) => {
                    tries += 1;
                    // An unknown outcome means that the device is away: the lease bounds the wait.
                    let away = matches!(e, DevError::Unknown { .. });
                    if !(away || matches!(e, DevError::Io { .. }) && tries < READ_TRIES) {
                        return Err(self.device_error(e));
                    }
                    self.may_release()?;
                    sleep(self.timeouts.doorbell()).await;
                }
            }
        }
    }

    /// One compare-and-write whose outcome is certain (I9). `Ok(None)`: done. `Ok(Some)`: what is there instead.
    async fn swap(&self, offset: u64, expect: &[u8], new: &LockBlock) -> Result<Option<Vec<u8>>> {
        let sector = new.encode(self.layout.stride);
        let found = match self.dev.compare_and_write(offset, expect, &sector).await {
            Ok(Caw::Written) => return Ok(None),
            Ok(Caw::Mismatch(found)) => {
                self.stats.miscompares.one();
                found
            }
            Err(e @ (DevError::Unknown { .. } | DevError::Io { .. })) => {
                tracing::warn!(node = %self.me, "{}: {e}", new.id);
                sleep(self.timeouts.doorbell()).await;
                self.read_sector(offset).await?
            }
            Err(e) => return Err(self.device_error(e)),
        };
        // Our own nonce is there: it happened. If another change came after ours its content tells.
        let ours = LockBlock::decode(&found, self.layout.volume, new.id).is_ok_and(|b| b.nonce == new.nonce);
        Ok((!ours).then_some(found))
    }

    fn step(&self, block: &LockBlock, event: Event) -> Result<Option<transitions::Change>> {
        let nonce = self.nonce();
        let result = step(block, self.me, event, &self.table.lock(), nonce);
        result.map_err(|Superseded| {
            self.lapse("another node took over this slot");
            self.ended()
        })
    }

    /// Applies `event` to the lock block, starting from `block`, until it is done or changes nothing. Returns the block
    /// as it then is.
    async fn apply(&self, id: LockId, mut block: LockBlock, event: Event) -> Result<LockBlock> {
        let offset = self.offset(id)?;
        let mut misses = 0;
        loop {
            let Some(change) = self.step(&block, event)? else { return Ok(block) };
            match self.swap(offset, &block.encode(self.layout.stride), &change.block).await? {
                None => {
                    self.announce(id, &change.granted);
                    return Ok(change.block);
                }
                Some(found) => {
                    block = self.decode_lock(id, offset, &found)?;
                    // A request that another node has served meanwhile needs nothing more.
                    if let Event::Request(mode) = event
                        && block.held_by(self.me) >= Some(mode)
                    {
                        return Ok(block);
                    }
                    self.back_off(&mut misses).await?;
                }
            }
        }
    }

    async fn back_off(&self, misses: &mut u32) -> Result<()> {
        *misses += 1;
        if *misses > 2 {
            self.may_release()?;
            sleep(self.jitter(Duration::from_millis(u64::from((*misses).min(8))))).await;
        }
        Ok(())
    }

    fn announce(&self, id: LockId, granted: &[NodeId]) {
        for node in granted.iter().filter(|n| **n != self.me) {
            self.stats.handovers.one();
            self.hint_granted(*node, id);
        }
    }

    /// Puts a grant that the disk shows into memory, and passes on who waits already.
    fn granted(self: &Arc<Self>, id: LockId, block: LockBlock, grant: Grant) -> Result<Grant> {
        self.live()?;
        let wanted = wanted_from(&block, self.me, &self.table.lock());
        let early = self.with_local(id, |l| {
            l.held = Some(Held { grant, crashes: block.crashes, since: Instant::now(), demanded: None });
            l.block = Some(block);
            l.absent = false;
            l.open = false;
            let early = l.early.take();
            l.stale = early.is_some();
            early
        });
        self.stats.acquires.one();
        if let Some(wanted) = wanted.max(early) {
            self.demanded(id, wanted);
        }
        Ok(grant)
    }

    pub async fn acquire(self: &Arc<Self>, id: LockId, mode: Mode) -> Result<Grant> {
        self.live()?;
        self.offset(id)?;
        let (held, op, wake) = self.with_local(id, |l| {
            let held = l.held.as_ref().map(|h| h.grant).filter(|g| g.mode >= mode);
            if held.is_none() {
                l.waiting = Some(mode);
                l.early = None;
            }
            (held, l.op.clone(), l.wake.clone())
        });
        if let Some(grant) = held {
            return Ok(grant);
        }
        let _waiting = Waiting { shared: self, id };
        let mut block = match self.ask(id, mode, &op, true).await? {
            Asked::Granted(grant) => return Ok(grant),
            Asked::Waits(block) => block,
        };
        self.stats.waits.one();
        let mut known = *self.table_version.borrow();
        let mut interval = self.timeouts.doorbell();
        let longest = (4 * interval).min(LONGEST_WAIT).max(interval);
        let mut rung = self.tell(id, &block, false);
        let mut polls = 0;
        loop {
            let timer = tokio::select! {
                biased;
                why = self.not_live() => return Err(why),
                () = wake.notified() => false,
                now = self.table_version.wait_for(|v| *v != known) => {
                    known = now;
                    false
                }
                () = sleep(interval) => true,
            };
            match self.ask(id, mode, &op, false).await? {
                Asked::Granted(grant) => return Ok(grant),
                Asked::Waits(now) => {
                    self.can_end(&now).await?;
                    if holders(&now) != holders(&block) {
                        rung = self.tell(id, &now, false);
                        interval = self.timeouts.doorbell();
                        polls = 0;
                    } else if timer {
                        polls += 1;
                        // The hint was lost perhaps, or the cell overwritten before it was read.
                        if !rung || polls % RING_AGAIN == 0 {
                            rung = self.tell(id, &now, true);
                        }
                        interval = (interval * 3 / 2).min(longest);
                    }
                    block = now;
                }
            }
        }
    }

    /// Waiting makes no sense while the lock is a node's that can neither give it up nor be recovered.
    async fn can_end(&self, block: &LockBlock) -> Result<()> {
        let holders = holders(block);
        for node in &holders {
            if let Some(e) = self.stuck.lock().get(&node.slot) {
                return Err(e.clone());
            }
            if self.table.lock().may_have_lived(*node) {
                continue;
            }
            // A life that began after our last look, or one that never was: its slot block was written before this block.
            let there = match node.slot < self.layout.nodes {
                true => {
                    let sector = self.read_sector(self.layout.slot_block(node.slot)).await?;
                    let found = decode_slot(&self.layout, node.slot, &sector)?;
                    self.learn(found);
                    self.table.lock().may_have_lived(*node)
                }
                false => false,
            };
            if !there {
                let what = format!("lock block of {} (held by {node}, a life that its slot has not had)", block.id);
                return Err(ClusterError::Damaged { what, offset: self.offset(block.id)? });
            }
        }
        Ok(())
    }

    /// Makes the request on disk, or looks what became of it.
    async fn ask(self: &Arc<Self>, id: LockId, mode: Mode, op: &tokio::sync::Mutex<()>, first: bool) -> Result<Asked> {
        let _op = op.lock().await;
        self.live()?;
        let known = self.with_local(id, |l| {
            // Abandoned from here on, the request may be on disk all the same.
            l.absent = false;
            l.block.clone().filter(|_| first && l.held.is_some() && !l.stale)
        });
        let block = match known {
            Some(block) => block,
            None => self.read_block(id).await?,
        };
        let block = match block.grant(self.me).filter(|g| g.mode >= mode) {
            Some(_) => block,
            None => self.apply(id, block, Event::Request(mode)).await?,
        };
        // An earlier wait was abandoned and served: held on disk but unknown here, it would stop those ahead of us.
        let known = self.with_local(id, |l| l.held.as_ref().map(|h| h.grant.mode));
        let open = self.with_local(id, |l| l.open);
        let block = match unasked(&block, self.me, mode, known, open) {
            Some(event) => {
                self.stats.unwanted.one();
                self.apply(id, block, event).await?
            }
            None => block,
        };
        match block.grant(self.me).filter(|g| g.mode >= mode) {
            Some(grant) => self.granted(id, block, grant).map(Asked::Granted),
            None => {
                let wanted = wanted_from(&block, self.me, &self.table.lock());
                let held = self.with_local(id, |l| {
                    l.block = Some(block.clone());
                    l.stale = false;
                    l.absent = false;
                    l.held.is_some()
                });
                // An upgrade behind somebody who may have stopped asking: what we hold is in its way.
                if let (true, Some(wanted)) = (held, wanted) {
                    self.demanded(id, wanted);
                }
                Ok(Asked::Waits(block))
            }
        }
    }

    pub async fn release(self: &Arc<Self>, id: LockId, how: Release) -> Result<()> {
        self.may_release()?;
        let op = self.with_local(id, |l| l.op.clone());
        let _op = op.lock().await;
        let event = self.with_local(id, |l| {
            let held = l.held.as_mut()?;
            let to = how.to.min(Some(held.grant.mode));
            if to == Some(held.grant.mode) {
                return None;
            }
            let cleaned = if how.cleaned { held.crashes } else { 0 };
            let event = Event::Release { to, value: how.value, open: how.open, cleaned };
            match to {
                Some(to) => {
                    held.grant.mode = to;
                    held.grant.previous_tenure = held.grant.tenure;
                    held.demanded = None;
                }
                None => {
                    l.held = None;
                    l.open = how.open;
                }
            }
            Some(event)
        });
        let Some(event) = event else { return Ok(()) };
        self.put_down(id, event).await
    }

    /// The disk's part of a release; memory has let go already.
    async fn put_down(self: &Arc<Self>, id: LockId, event: Event) -> Result<()> {
        // Not using the known block when somebody marked it since saves a compare-and-write.
        let known = self.with_local(id, |l| l.block.clone().filter(|_| !l.stale));
        let block = match known {
            Some(block) => block,
            None => self.read_block(id).await?,
        };
        let block = self.apply(id, block, event).await?;
        self.stats.releases.one();
        let wanted = wanted_from(&block, self.me, &self.table.lock());
        let still = self.with_local(id, |l| {
            let entry = block.entry(self.me).copied();
            l.absent = entry.is_none_or(|e| e.held.is_none() && e.wanted.is_none());
            l.stale = false;
            l.block = (!l.absent).then_some(block);
            l.held.is_some()
        });
        if let (true, Some(wanted)) = (still, wanted) {
            self.demanded(id, wanted);
        }
        Ok(())
    }

    pub async fn create(self: &Arc<Self>, id: LockId, value: LockValue) -> Result<Grant> {
        self.live()?;
        let offset = self.offset(id)?;
        let op = self.with_local(id, |l| l.op.clone());
        {
            let _op = op.lock().await;
            self.with_local(id, |l| l.absent = false);
            let mut sector = self.read_sector(offset).await?;
            let mut misses = 0;
            while LockBlock::decode(&sector, self.layout.volume, id).is_err() {
                let new = transitions::first(self.layout.volume, id, self.me, value.root, self.nonce());
                match self.swap(offset, &sector, &new).await? {
                    None => {
                        let grant = new.grant(self.me).ok_or(ClusterError::Lapsed)?;
                        return self.granted(id, new, grant);
                    }
                    Some(found) => sector = found,
                }
                self.back_off(&mut misses).await?;
            }
        }
        self.acquire(id, Mode::Exclusive).await?;
        let _op = op.lock().await;
        let (block, held) = self.with_local(id, |l| {
            (l.block.clone().filter(|_| !l.stale), l.held.as_ref().is_some_and(|h| h.grant.mode == Mode::Exclusive))
        });
        if !held {
            return Err(ClusterError::Lapsed);
        }
        let block = match block {
            Some(block) => block,
            None => self.read_block(id).await?,
        };
        let value = LockValue { next_local: block.value.next_local, ..value };
        let block = self.apply(id, block, Event::SetValue(value)).await?;
        self.live()?;
        self.with_local(id, |l| {
            l.block = Some(block);
            l.held.as_mut().map(|h| {
                h.grant.value = value;
                h.grant
            })
        })
        .ok_or(ClusterError::Lapsed)
    }

    pub async fn clear_open(self: &Arc<Self>, id: LockId) -> Result<()> {
        self.live()?;
        let op = self.with_local(id, |l| l.op.clone());
        let _op = op.lock().await;
        if self.with_local(id, |l| !std::mem::take(&mut l.open) || l.held.is_some()) {
            return Ok(());
        }
        let block = self.read_block(id).await?;
        // Granted meanwhile: then the entry says nothing of open files.
        if block.held_by(self.me).is_none() {
            self.apply(id, block, Event::ClearOpen).await?;
        }
        Ok(())
    }

    /// Makes the disk say no more than memory.
    pub async fn settle(self: &Arc<Self>, id: LockId) -> Result<()> {
        let op = self.with_local(id, |l| l.op.clone());
        let _op = op.lock().await;
        self.may_release()?;
        let block = self.read_block(id).await?;
        let (held, waiting, open) =
            self.with_local(id, |l| (l.held.as_ref().map(|h| h.grant.mode), l.waiting.is_some(), l.open));
        if waiting {
            return Ok(());
        }
        let Some(event) = surplus(&block, self.me, held, open) else {
            // Not remembered as absent: the request of an abandoned wait may still be on its way to the device, and only
            // another change of the block outruns it.
            return Ok(());
        };
        tracing::debug!(node = %self.me, "{id}: giving up what nobody here wants any more");
        self.stats.unwanted.one();
        let block = self.apply(id, block, event).await?;
        let wanted = wanted_from(&block, self.me, &self.table.lock());
        self.with_local(id, |l| {
            l.absent = held.is_none();
            l.stale = false;
            l.block = held.is_some().then_some(block);
        });
        if let Some(wanted) = wanted {
            self.demanded(id, wanted);
        }
        Ok(())
    }
}

fn damaged(id: LockId, offset: u64, e: FormatError) -> ClusterError {
    ClusterError::Damaged { what: format!("lock block of {id} ({e})"), offset }
}

fn holders(block: &LockBlock) -> Vec<NodeId> {
    let me_too = block.entries.iter().filter(|(_, e)| e.held.is_some());
    me_too.map(|(slot, e)| NodeId { slot: *slot, incarnation: e.incarnation }).collect()
}

fn forget_idle(locks: &mut BTreeMap<LockId, Local>) {
    locks
        .retain(|_, l| l.held.is_some() || l.waiting.is_some() || l.open || l.settling || Arc::strong_count(&l.op) > 1);
}

impl Shared {
    /// Tells those in the way of our waiting entry. With `ring` the doorbell too; without it only where no hint can be
    /// expected to arrive. True if all doorbells were rung that need to be.
    fn tell(self: &Arc<Self>, id: LockId, block: &LockBlock, ring: bool) -> bool {
        let Some((wanted, nodes)) = in_the_way(block, self.me) else { return true };
        let mut all = true;
        for node in nodes {
            if ring {
                self.doubt_hints(node);
            }
            let hinted = self.hint_demand(node, id, wanted);
            let now = ring || !hinted;
            all &= now;
            if now {
                self.ring(node, id, wanted);
            }
        }
        all
    }
}
