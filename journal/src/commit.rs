//! Group commit: everything installed so far in one record.
//!
//! Contents of files go out with it. Blocks that nothing committed refers to (*fresh*) may be written at the same time as
//! the record, which carries their checksums: one flush makes both durable, and replay drops the newest record if its data
//! did not arrive. Only the newest: when a record is written, all earlier ones are durable, and it says so. Contents that
//! overwrite blocks in use cannot be treated so, and neither can large amounts: they are written and flushed before the record.
//! And a block under the checksum of the newest record must not be overwritten: replay would take that record for one whose
//! data did not arrive. An empty record in between makes it not the newest any more. The same goes for blocks that another
//! node may overwrite once it has the lock: `settle` writes the empty record then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use blockdev::{AlignedBuf, IoClass};
use cluster::LockId;
use tokio::task::JoinSet;

use crate::BLOCK_SIZE;
use crate::block::{self, Block};
use crate::diff::diff;
use crate::format::{DataSum, Delta, Record};
use crate::log::{Journal, Live, Logged};
use crate::running::Running;
use crate::types::{JournalError, RecordNo, Result, TxNo};

/// Most file contents that one record carries checksums of, in blocks (1 MiB).
pub(crate) const SUMMED_MAX: usize = 256;
/// Longest single write of file contents, in blocks (1 MiB).
const WRITE_MAX: usize = 256;
const WRITES_IN_FLIGHT: usize = 8;

/// An empty record ready to be written.
pub(crate) struct Empty {
    record: Record,
    pub offset: u64,
    pub bytes: Vec<u8>,
}

type Sealed = BTreeMap<u64, (LockId, Arc<Block>)>;

impl Journal {
    /// Makes everything installed so far durable. Concurrent callers share a record. Returns the latest durable transaction.
    pub async fn commit(&self) -> Result<TxNo> {
        self.check()?;
        let target = {
            let s = self.state.lock();
            if s.running.is_empty() { s.tx - 1 } else { s.tx }
        };
        if self.durable() >= target {
            return Ok(self.durable());
        }
        let work = |me: Arc<Journal>| async move {
            let _one = me.committing.lock().await;
            if me.durable() < target {
                me.check()?;
                me.write_next().await.map_err(|e| me.fail(e))?;
            }
            Ok(me.durable())
        };
        self.detached(work).await
    }

    /// Writes the running transaction; `committing` is held.
    pub(crate) async fn write_next(&self) -> Result<()> {
        let (tx, tx_number, mut number) = {
            let mut s = self.state.lock();
            s.tx += 1;
            let tx = std::mem::take(&mut s.running);
            // Readers find the blocks here until the record is durable; sealed ones take their place below.
            s.committing = tx.changes.iter().map(|(b, p)| (*b, (p.lock, p.new.clone()))).collect();
            (tx, s.tx - 1, s.next)
        };
        let (overwrites_summed, being_placed) = {
            let s = self.state.lock();
            let any = |set: &BTreeSet<u64>| tx.data.keys().any(|b| set.contains(b));
            (any(&s.last_sums), any(&s.being_placed))
        };
        if being_placed {
            // From its former life: that write must not land on the new contents.
            drop(self.placing.lock().await);
        }
        // Fresh blocks too: freed by the very record that wrote them, they may have been allocated again.
        if overwrites_summed {
            self.write_empty(number).await?;
            number += 1;
        }
        let (mut record, sealed) = encode_changes(&tx, number);
        self.make_locks_durable(&record).await?;
        self.state.lock().committing = sealed.clone();
        let summed = tx.data.len() <= SUMMED_MAX && tx.data.values().all(|(_, fresh)| *fresh);
        let runs = tx.data_runs(WRITE_MAX);
        if summed {
            record.sums = runs.iter().map(|(first, bufs)| data_sum(*first, bufs)).collect();
        } else {
            self.write_data(runs.clone()).await?;
            self.dev.flush(IoClass::Data).await?;
        }
        let bytes = record.encode(&self.region, self.node, self.sector);
        let offset = self.make_room(bytes.len() as u64).await?;
        if summed {
            let (data, log) = tokio::join!(self.write_data(runs), self.write_record(offset, &bytes));
            data.and(log)?;
        } else {
            self.write_record(offset, &bytes).await?;
        }
        self.dev.flush(IoClass::Journal).await?;
        let revoked: Vec<u64> = tx.revokes.into_iter().collect();
        self.logged(number, offset, bytes.len() as u64, &revoked, sealed, &record);
        let mut s = self.state.lock();
        s.committing.clear();
        s.tx_durable = tx_number;
        Ok(())
    }

    /// Replay leaves out what was changed under a lock that the dead node does not hold (I5). Where a loss of power can undo
    /// the compare-and-write that took a lock, it must not undo it for part of a record that itself survives (I11): the first
    /// record under a lock is written when that is durable.
    async fn make_locks_durable(&self, record: &Record) -> Result<()> {
        let new = {
            let s = self.state.lock();
            record.locks.iter().any(|(lock, tenure)| s.durable_locks.get(lock) != Some(tenure))
        };
        if new && self.dev.geometry().write_cache {
            self.dev.flush(IoClass::Lock).await?;
        }
        self.state.lock().durable_locks.extend(record.locks.iter().copied());
        Ok(())
    }

    /// Makes the newest record an older one.
    async fn write_empty(&self, number: RecordNo) -> Result<()> {
        let empty = self.empty(number).await?;
        self.write_record(empty.offset, &empty.bytes).await?;
        self.dev.flush(IoClass::Journal).await?;
        self.empty_logged(&empty);
        Ok(())
    }

    /// An empty record with its place in the ring; `committing` is held.
    pub(crate) async fn empty(&self, number: RecordNo) -> Result<Empty> {
        let record = Record { number, durable_before: number - 1, ..Record::default() };
        let bytes = record.encode(&self.region, self.node, self.sector);
        let offset = self.make_room(bytes.len() as u64).await?;
        Ok(Empty { record, offset, bytes })
    }

    /// It is durable.
    pub(crate) fn empty_logged(&self, e: &Empty) {
        self.logged(e.record.number, e.offset, e.bytes.len() as u64, &[], Sealed::new(), &e.record);
    }

    pub(crate) async fn write_record(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let at = self.region.offset + crate::format::RING_START + offset;
        let buf = Arc::new(AlignedBuf::copy_of(bytes));
        Ok(self.dev.write(IoClass::Journal, at, buf, false).await?)
    }

    async fn write_data(&self, runs: Vec<(u64, Vec<Arc<AlignedBuf>>)>) -> Result<()> {
        let write = |first: u64, bufs| {
            let dev = self.dev.clone();
            async move { dev.writev(IoClass::Data, first * BLOCK_SIZE as u64, bufs, false).await }
        };
        let mut runs = runs.into_iter();
        if runs.len() == 1
            && let Some((first, bufs)) = runs.next()
        {
            return Ok(write(first, bufs).await?);
        }
        let mut writes = JoinSet::new();
        let mut result = Ok(());
        for (first, bufs) in runs {
            if writes.len() >= WRITES_IN_FLIGHT {
                result = result.and(joined(writes.join_next().await));
            }
            writes.spawn(write(first, bufs));
        }
        // All of them, also after an error: none stays in flight.
        while let Some(done) = writes.join_next().await {
            result = result.and(joined(Some(done)));
        }
        result
    }

    fn logged(&self, number: RecordNo, offset: u64, len: u64, revoked: &[u64], sealed: Sealed, record: &Record) {
        let mut s = self.state.lock();
        assert_eq!(s.durable + 1, number, "records become durable in order");
        s.durable = number;
        s.next = number + 1;
        s.head = offset + len;
        s.live.push_back(Live { number, offset });
        s.last_sums = record.sums.iter().flat_map(|d| d.block..d.block + u64::from(d.blocks)).collect();
        for b in revoked {
            s.logged.remove(b);
        }
        for (b, (lock, image)) in sealed {
            let first = s.logged.get(&b).map_or(number, |l| l.first);
            s.logged.insert(b, Logged { lock, image, first });
        }
        s.stats.records += 1;
        s.stats.record_bytes += len;
    }
}

pub(crate) fn joined(done: Option<std::result::Result<blockdev::Result<()>, tokio::task::JoinError>>) -> Result<()> {
    match done {
        Some(Ok(r)) => Ok(r?),
        Some(Err(e)) => Err(JournalError::Failed(e.to_string())),
        None => Ok(()),
    }
}

fn data_sum(first: u64, bufs: &[Arc<AlignedBuf>]) -> DataSum {
    let mut h = blake3::Hasher::new();
    for b in bufs {
        h.update(b);
    }
    let mut sum = [0; 16];
    sum.copy_from_slice(&h.finalize().as_bytes()[..16]);
    DataSum { block: first, blocks: bufs.len() as u32, sum }
}

fn encode_changes(tx: &Running, number: RecordNo) -> (Record, Sealed) {
    let mut record = Record { number, durable_before: number - 1, revokes: tx.revoked_runs(), ..Record::default() };
    let mut locks: BTreeMap<LockId, u16> = BTreeMap::new();
    let mut sealed = Sealed::new();
    for (block, p) in &tx.changes {
        let lock = *locks.entry(p.lock).or_insert_with(|| {
            record.locks.push((p.lock, p.tenure));
            (record.locks.len() - 1) as u16
        });
        let mut image = (*p.new).clone();
        block::seal(&mut image, p.tenure, number);
        let mut sum = [0; 8];
        sum.copy_from_slice(&image[48..56]);
        let ranges = diff(p.base.as_ref().map(|b| &b[..]), &image);
        record.changes.push(Delta { lock, block: *block, whole: p.base.is_none(), sum, ranges });
        sealed.insert(*block, (p.lock, Arc::new(image)));
    }
    (record, sealed)
}
