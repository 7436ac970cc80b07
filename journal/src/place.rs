//! Placing logged blocks, and moving the tail.

use std::sync::Arc;

use blockdev::{BlockDevice, IoClass};
use cluster::LockId;
use tokio::task::JoinSet;

use crate::BLOCK_SIZE;
use crate::block::{Block, BlockHeader};
use crate::commit::{Empty, joined};
use crate::format::Header;
use crate::log::{Journal, State};
use crate::types::{JournalError, Result};

/// Longest single write when placing, in blocks.
const WRITE_MAX: usize = 256;
const WRITES_IN_FLIGHT: usize = 8;

impl Journal {
    /// Commits and places everything under a lock: afterwards it may be given up (I3). Nothing is installed under it
    /// meanwhile.
    pub async fn settle(&self, lock: LockId) -> Result<()> {
        self.commit_if(|s| s.running.touches(lock) || s.committing.values().any(|(l, _)| *l == lock)).await?;
        self.detached(|me| async move { me.place_for_release(lock).await }).await?;
        self.state.lock().durable_locks.remove(&lock);
        debug_assert!(!self.is_pending(lock), "I3: {lock} has changes that are not in place");
        Ok(())
    }

    /// Places what the lock covers. Where the newest record carries data sums, an empty one goes out under the same flush:
    /// whoever gets the lock may overwrite that data, and replay would drop the record, and with it what it holds of locks
    /// that this node keeps (I11).
    async fn place_for_release(&self, lock: LockId) -> Result<()> {
        self.check()?;
        let summed = || !self.state.lock().last_sums.is_empty();
        if summed() {
            let _one = self.committing.lock().await;
            self.check()?;
            if summed() {
                let number = self.state.lock().next;
                let empty = self.empty(number).await.map_err(|e| self.fail(e))?;
                self.place(|l| l == lock, Some(&empty)).await?;
                self.empty_logged(&empty);
                return Ok(());
            }
        }
        self.place(|l| l == lock, None).await
    }

    /// The same for everything, for good: the journal is empty on disk and stays so. What is installed later, by work that
    /// has not heard of the end yet, is never durable: after a clean end nobody would replay its record.
    pub async fn close(&self) -> Result<()> {
        let work = |me: Arc<Journal>| async move {
            let _one = me.committing.lock().await;
            me.check()?;
            if !me.state.lock().running.is_empty() {
                me.write_next().await.map_err(|e| me.fail(e))?;
            }
            me.place(|_| true, None).await?;
            me.trim().await?;
            me.state.lock().closed = true;
            Ok(())
        };
        self.detached(work).await
    }

    /// Places everything once half of the ring is in use, so that its space can be used again and replay stays short.
    pub async fn checkpoint(&self) -> Result<()> {
        self.check()?;
        let due = {
            let s = self.state.lock();
            self.used(&s) > self.ring() / 2 || s.logged.len() > 8192
        };
        if !due {
            return Ok(());
        }
        let work = |me: Arc<Journal>| async move {
            me.place(|_| true, None).await?;
            me.trim().await?;
            me.state.lock().stats.checkpoints += 1;
            Ok(())
        };
        self.detached(work).await
    }

    /// Places what is logged under some locks, for others to read who do not have those.
    pub async fn place_logged(&self, wanted: fn(LockId) -> bool) -> Result<()> {
        self.detached(move |me| async move { me.place(wanted, None).await }).await
    }

    async fn commit_if(&self, wanted: impl Fn(&State) -> bool) -> Result<()> {
        let needed = wanted(&self.state.lock());
        if needed {
            self.commit().await?;
        }
        Ok(())
    }

    /// Writes logged blocks to their places, durably, and `with` under the same flush. Never what is not logged yet (I2).
    /// Also with nothing to write it waits for the placing under way: that may be of blocks which have been freed since and
    /// whose group is about to be given up.
    async fn place(&self, wanted: impl Fn(LockId) -> bool, with: Option<&Empty>) -> Result<()> {
        self.check()?;
        let _one = self.placing.lock().await;
        let blocks: Vec<(u64, Arc<Block>)> = {
            let mut s = self.state.lock();
            let durable = s.durable;
            let due = s.logged.iter().filter(|(_, l)| wanted(l.lock)).map(|(b, l)| (*b, l.image.clone()));
            let due: Vec<_> = due.collect();
            for (b, image) in &due {
                let record = BlockHeader::decode(image).map_or(0, |h| h.record);
                assert!(record <= durable, "I2: block {b} of record {record} is placed before that is durable");
            }
            s.being_placed = due.iter().map(|(b, _)| *b).collect();
            due
        };
        if blocks.is_empty() && with.is_none() {
            return Ok(());
        }
        self.write_places(&blocks, with).await.map_err(|e| self.fail(e))?;
        let mut s = self.state.lock();
        s.being_placed.clear();
        for (b, image) in &blocks {
            if s.logged.get(b).is_some_and(|l| Arc::ptr_eq(&l.image, image)) {
                s.logged.remove(b);
            }
        }
        s.stats.blocks_placed += blocks.len() as u64;
        Ok(())
    }

    async fn write_places(&self, blocks: &[(u64, Arc<Block>)], with: Option<&Empty>) -> Result<()> {
        let record = async {
            match with {
                Some(e) => self.write_record(e.offset, &e.bytes).await,
                None => Ok(()),
            }
        };
        let (placed, recorded) = tokio::join!(write_blocks(&self.dev, blocks), record);
        placed.and(recorded)?;
        Ok(self.dev.flush(IoClass::Meta).await?)
    }

    /// Moves the tail on disk to the oldest record that is still needed.
    async fn trim(&self) -> Result<()> {
        let _one = self.placing.lock().await;
        let header = {
            let s = self.state.lock();
            if s.live.is_empty() {
                return Ok(());
            }
            let oldest = s.logged.values().map(|l| l.first).min().unwrap_or(s.durable + 1);
            let next = s.live.iter().find(|l| l.number >= oldest);
            let (tail, tail_number) = next.map_or((s.head % self.ring(), s.durable + 1), |l| (l.offset, l.number));
            Header { tail, tail_number, generation: s.header.generation + 1, ..s.header }
        };
        self.write_header(header).await.map_err(|e| self.fail(e))?;
        let mut s = self.state.lock();
        while s.live.front().is_some_and(|l| l.number < header.tail_number) {
            s.live.pop_front();
        }
        Ok(())
    }

    /// A place in the ring for `len` bytes in one piece; makes room if there is none.
    pub(crate) async fn make_room(&self, len: u64) -> Result<u64> {
        if len > self.ring() / 2 {
            return Err(JournalError::TooLarge { bytes: len, limit: self.ring() / 2 });
        }
        for attempt in 0..3 {
            if let Some(at) = self.fits(len) {
                return Ok(at);
            }
            if attempt > 0 {
                self.place(|_| true, None).await?;
            }
            self.trim().await?;
        }
        self.fits(len).ok_or(JournalError::TooLarge { bytes: len, limit: self.ring() / 2 })
    }

    fn fits(&self, len: u64) -> Option<u64> {
        let s = self.state.lock();
        let ring = self.ring();
        let Some(front) = s.live.front().map(|l| l.offset) else {
            return Some(if s.head + len <= ring { s.head } else { 0 });
        };
        if s.head > front {
            if s.head + len <= ring {
                return Some(s.head);
            }
            return (len < front).then_some(0);
        }
        (s.head + len < front).then_some(s.head)
    }
}

/// Writes blocks to their places, consecutive ones together, several writes at a time. None is in flight when it returns.
pub(crate) async fn write_blocks(dev: &Arc<dyn BlockDevice>, blocks: &[(u64, Arc<Block>)]) -> Result<()> {
    let mut writes = JoinSet::new();
    let mut result = Ok(());
    let mut rest = blocks;
    while let Some(((first, _), _)) = rest.split_first() {
        let same = rest.iter().zip(*first..).take(WRITE_MAX).take_while(|((b, _), n)| b == n).count();
        let (run, tail) = rest.split_at(same);
        rest = tail;
        let (dev, bufs) = (dev.clone(), run.iter().map(|(_, b)| b.clone()).collect());
        let at = first * BLOCK_SIZE as u64;
        if writes.len() >= WRITES_IN_FLIGHT {
            result = result.and(joined(writes.join_next().await));
        }
        writes.spawn(async move { dev.writev(IoClass::Meta, at, bufs, false).await });
    }
    while let Some(done) = writes.join_next().await {
        result = result.and(joined(Some(done)));
    }
    result
}
