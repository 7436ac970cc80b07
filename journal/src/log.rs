//! The journal of a live node: its state, and what the volume asks of it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Weak};

use blockdev::{AlignedBuf, BlockDevice, IoClass};
use cluster::{LockId, NodeId, Tenure};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::block::Block;
use crate::format::{HEADER_COPY, Header, RING_START};
use crate::running::Running;
use crate::types::{Install, JournalError, RecordNo, Region, Result, TxNo};

/// Dirty blocks in memory, running or logged, beyond which operations wait for a checkpoint (32 MiB, as much again while they are placed).
const DIRTY_MAX: usize = 8192;

/// Blocks that an operation changes, as a rule.
const OPERATION: u64 = 12;
/// Bytes of a record for a block that is logged whole.
const WHOLE: u64 = 4200;

/// Room in the running transaction for one operation, until it is installed or given up.
#[derive(Debug)]
pub struct Room {
    _permit: OwnedSemaphorePermit,
}

/// A block whose record is durable and that is not in its place yet.
pub(crate) struct Logged {
    pub lock: LockId,
    /// As sealed for its latest record.
    pub image: Arc<Block>,
    /// The oldest record whose change is not in place.
    pub first: RecordNo,
}

/// A record in the ring that replay may still need.
pub(crate) struct Live {
    pub number: RecordNo,
    pub offset: u64,
}

pub(crate) struct State {
    pub running: Running,
    /// Sealed blocks of the record that is being written.
    pub committing: BTreeMap<u64, (LockId, Arc<Block>)>,
    pub logged: BTreeMap<u64, Logged>,
    /// The next record, and the latest durable one.
    pub next: RecordNo,
    pub durable: RecordNo,
    /// The running transaction, and the latest durable one.
    pub tx: TxNo,
    pub tx_durable: TxNo,
    /// Where the next record goes, in the ring.
    pub head: u64,
    /// From the tail that is on disk to the newest.
    pub live: VecDeque<Live>,
    pub header: Header,
    /// Blocks under data sums of the newest record.
    pub last_sums: BTreeSet<u64>,
    /// Blocks whose placing is under way.
    pub being_placed: BTreeSet<u64>,
    /// Locks whose acquisition is durable, with the tenure.
    pub durable_locks: BTreeMap<LockId, Tenure>,
    pub failed: Option<String>,
    /// Nothing is written any more.
    pub closed: bool,
    pub stats: JournalStats,
}

/// Counters since the journal was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JournalStats {
    pub records: u64,
    pub record_bytes: u64,
    pub blocks_placed: u64,
    pub checkpoints: u64,
    /// Bytes of the ring in use, and its size.
    pub used: u64,
    pub size: u64,
}

pub struct Journal {
    pub(crate) dev: Arc<dyn BlockDevice>,
    pub(crate) region: Region,
    pub(crate) node: NodeId,
    pub(crate) sector: usize,
    pub(crate) state: Mutex<State>,
    /// One record is written at a time; who waits here finds its changes in the next one.
    /// Taken before `placing` where both are.
    pub(crate) committing: tokio::sync::Mutex<()>,
    /// Placings follow each other: an older image must not overtake a newer one. Who has it knows that none is in flight.
    pub(crate) placing: tokio::sync::Mutex<()>,
    /// Operations that may install at once.
    room: Arc<Semaphore>,
    pub(crate) me: Weak<Journal>,
}

/// Blocks that one record has room for, if all are logged whole.
fn largest(region: Region) -> u64 {
    (region.len - RING_START) / 2 / WHOLE
}

impl Journal {
    /// Starts the journal of a new incarnation. Earlier incarnations' records have been replayed or are not needed; their
    /// numbers are never used again (I8).
    pub async fn open(dev: Arc<dyn BlockDevice>, region: Region, node: NodeId) -> Result<Arc<Journal>> {
        let old = crate::replay::read_header(&dev, region).await?;
        let newest = crate::replay::newest_record(&dev, region, &old).await?;
        let header = Header {
            incarnation: node.incarnation,
            generation: old.generation + 1,
            tail: 0,
            tail_number: newest.max(old.tail_number) + 1,
        };
        let state = State {
            running: Running::default(),
            committing: BTreeMap::new(),
            logged: BTreeMap::new(),
            next: header.tail_number,
            durable: header.tail_number - 1,
            tx: 1,
            tx_durable: 0,
            head: 0,
            live: VecDeque::new(),
            header,
            last_sums: BTreeSet::new(),
            being_placed: BTreeSet::new(),
            durable_locks: BTreeMap::new(),
            failed: None,
            closed: false,
            stats: JournalStats::default(),
        };
        let sector = dev.geometry().sector_size as usize;
        let at_once = largest(region) / 2 / OPERATION;
        let journal = Arc::new_cyclic(|me| Journal {
            dev,
            region,
            node,
            sector,
            state: Mutex::new(state),
            committing: tokio::sync::Mutex::new(()),
            placing: tokio::sync::Mutex::new(()),
            room: Arc::new(Semaphore::new(at_once.max(1) as usize)),
            me: me.clone(),
        });
        journal.write_header(header).await?;
        Ok(journal)
    }

    pub(crate) fn ring(&self) -> u64 {
        self.region.len - RING_START
    }

    pub(crate) async fn write_header(&self, header: Header) -> Result<()> {
        let copy = (header.generation % 2) * HEADER_COPY as u64;
        let buf = Arc::new(AlignedBuf::copy_of(&header.encode(&self.region)));
        self.dev.write(IoClass::Journal, self.region.offset + copy, buf, false).await?;
        self.dev.flush(IoClass::Journal).await?;
        self.state.lock().header = header;
        Ok(())
    }

    /// Current content of a block that is not in its place, else `None`: then the device has it.
    pub fn get(&self, block: u64) -> Option<Arc<Block>> {
        let s = self.state.lock();
        if let Some(p) = s.running.changes.get(&block) {
            return Some(p.new.clone());
        }
        s.committing.get(&block).map(|(_, b)| b).or_else(|| s.logged.get(&block).map(|l| &l.image)).cloned()
    }

    /// Takes an operation's changes atomically into the running transaction; no I/O. Returns that transaction's number.
    pub fn install(&self, op: Install) -> TxNo {
        let mut s = self.state.lock();
        s.running.install(op);
        s.tx
    }

    /// Latest durable transaction.
    #[allow(clippy::misnamed_getters)]
    pub fn durable(&self) -> TxNo {
        self.state.lock().tx_durable
    }

    /// Transaction that what is installed now will be in.
    pub fn running(&self) -> TxNo {
        self.state.lock().tx
    }

    /// Whether anything under the lock is not in its place.
    pub fn is_pending(&self, lock: LockId) -> bool {
        let s = self.state.lock();
        s.running.touches(lock)
            || s.committing.values().any(|(l, _)| *l == lock)
            || s.logged.values().any(|l| l.lock == lock)
    }

    /// Locks with changes that no durable record has.
    pub fn not_durable(&self) -> BTreeSet<LockId> {
        let s = self.state.lock();
        let running = s.running.changes.values().map(|c| c.lock);
        running.chain(s.committing.values().map(|(l, _)| *l)).collect()
    }

    pub fn stats(&self) -> JournalStats {
        let s = self.state.lock();
        JournalStats { used: self.used(&s), size: self.ring(), ..s.stats }
    }

    pub(crate) fn used(&self, s: &State) -> u64 {
        match s.live.front() {
            None => 0,
            Some(l) if l.offset < s.head => s.head - l.offset,
            Some(l) => self.ring() - l.offset + s.head,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let s = self.state.lock();
        match &s.failed {
            Some(why) => Err(JournalError::Failed(why.clone())),
            None if s.closed => Err(JournalError::Closed),
            None => Ok(()),
        }
    }

    /// Waits while the log or the running transaction is too full for another operation.
    pub async fn throttle(&self) -> Result<()> {
        self.check()?;
        let (big, full) = {
            let s = self.state.lock();
            let big = s.running.changes.len() as u64 > largest(self.region) / 4 || s.running.revokes.len() > 4096;
            let dirty = s.running.changes.len() + s.logged.len();
            (big, dirty > DIRTY_MAX || self.used(&s) > self.ring() / 4 * 3)
        };
        if big {
            self.commit().await?;
        }
        if full {
            self.checkpoint().await?;
        }
        Ok(())
    }

    /// Room for an operation that is about to be worked out: a record takes half of the ring at most, and it takes whatever has been
    /// installed. Half of that is for what has been, the other half for those who have room. Who waits here may have locks:
    /// those who have room have theirs.
    pub async fn room(&self) -> Result<Room> {
        // Never closed.
        let permit = self.room.clone().acquire_owned().await.map_err(|_| JournalError::Closed)?;
        if self.state.lock().running.changes.len() as u64 > largest(self.region) / 2 {
            self.commit().await?;
        }
        Ok(Room { _permit: permit })
    }

    /// Runs `work` in a task of its own: a caller that goes away must not leave writes in flight that nobody waits for, or
    /// a record half written.
    pub(crate) async fn detached<T, F>(&self, work: impl FnOnce(Arc<Journal>) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let Some(me) = self.me.upgrade() else { return Err(JournalError::Failed("closed".into())) };
        match tokio::spawn(work(me)).await {
            Ok(result) => result,
            Err(e) => Err(self.fail(JournalError::Failed(format!("its task ended: {e}")))),
        }
    }

    /// After an error whose outcome is unknown nothing can be made durable any more (I9).
    pub(crate) fn fail(&self, e: JournalError) -> JournalError {
        self.state.lock().failed.get_or_insert_with(|| e.to_string());
        e
    }
}
