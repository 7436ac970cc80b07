//! Compare-and-write of one sector for devices that have only reads and writes.
//!
//! [`PlainLocks`] wraps such a device. Around each compare-and-write it excludes the other nodes, then reads, compares and
//! writes. Sectors are spread over [`ROWS`] rows; a row has a cell per slot, written by the slot's node alone.
//!
//! | state of a node in a row | its cell | leaves it |
//! |---|---|---|
//! | out | lowered | by raising its cell |
//! | asking | raised | a row read after that shows no other raised cell: in. A lower slot raised: back. Else it reads again |
//! | back | lowered | no lower slot is raised: raises its cell again |
//! | in | raised | by lowering its cell, after the sector was read, compared and written |
//!
//! Of two nodes that raise their cells and then read the row, the later one sees the other: never are two in (I4). This is the
//! one-bit algorithm (J. E. Burns 1978; L. Lamport, *The mutual exclusion problem II*, 1986), which steps back for lower slots so
//! that nobody waits in a circle.
//!
//! A raised cell stops counting when its node is known to be dead: its incarnation ended, or another node is recovering it, or its
//! sectors stood still for [`Timeouts::dead_unfenced`], so that nothing it wrote can still arrive. A crash inside thus
//! stops the others no longer than any takeover does.
//!
//! Late writes (I9): a cell or sector write of unknown outcome is waited for, by reading back; if it does not show, the node
//! writes nothing by this way any more, its cell stays raised, and it lapses (I12).

mod bid;
mod rules;
mod silence;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use async_trait::async_trait;
use blockdev::{
    AlignedBuf, BlockDevice, Caw, DevError, DeviceStats, FenceKey, Fenced, FencingKind, Geometry, IoClass, Presence,
    Result, WritePermit,
};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{Duration, Instant, sleep};

use crate::format::{Cell, CellState, SlotState};
use crate::node::decode_slot;
use crate::{Incarnation, Layout, NodeId, Slot, Timeouts};

use bid::Identity;
pub(crate) use rules::{Next, may_raise, next};
use silence::Silence;

/// Rows of cells. Nodes that change sectors of different rows do not meet.
pub const ROWS: u64 = 16;
/// First pause between two readings of a row.
const PAUSE: Duration = Duration::from_millis(1);

/// The device with a compare-and-write of our own. Cheap to clone.
#[derive(Clone)]
pub(crate) struct PlainLocks(Arc<Core>);

pub(crate) struct Core {
    inner: Arc<dyn BlockDevice>,
    layout: Layout,
    /// Byte offset of the bids; the rows follow.
    area: u64,
    timeouts: Timeouts,
    nonce: u64,
    counter: AtomicU64,
    identity: Mutex<Option<Identity>>,
    /// The bids by which we had slots.
    won: Mutex<BTreeMap<Slot, Vec<u8>>>,
    permit: Mutex<Option<Arc<dyn WritePermit>>>,
    /// The latest incarnations that are dead although their slots' blocks do not say so.
    dead: Mutex<BTreeMap<Slot, Incarnation>>,
    silence: tokio::sync::Mutex<Silence>,
    /// A write has gone astray: nothing more is changed.
    broken: AtomicBool,
    /// Our own changes of each row, one at a time.
    rows: Vec<tokio::sync::Mutex<()>>,
    /// Shared by all changes, alone for that of our own slot's block: an incarnation ends after its changes have.
    changes: tokio::sync::RwLock<()>,
}

impl PlainLocks {
    pub fn new(inner: Arc<dyn BlockDevice>, layout: Layout, area: u64, timeouts: Timeouts, nonce: u64) -> Self {
        Self(Arc::new(Core {
            inner,
            layout,
            area,
            timeouts,
            nonce,
            counter: AtomicU64::new(0),
            identity: Mutex::default(),
            won: Mutex::default(),
            permit: Mutex::default(),
            dead: Mutex::default(),
            silence: tokio::sync::Mutex::default(),
            broken: AtomicBool::new(false),
            rows: (0..ROWS).map(|_| tokio::sync::Mutex::default()).collect(),
            changes: tokio::sync::RwLock::default(),
        }))
    }

    /// Looks who stands still. Called every heartbeat, so that whoever dies is waited out from then on, and not from when its cell is
    /// first met: 3 reads.
    pub async fn watch(&self) {
        if let Err(e) = self.0.silence.lock().await.look(&self.0).await {
            tracing::debug!("bids: {e}");
        }
    }

    /// The writer of a slot was found dead: nothing of it can arrive any more.
    pub fn found_dead(&self, node: NodeId) {
        let mut dead = self.0.dead.lock();
        let latest = dead.entry(node.slot).or_insert(node.incarnation);
        *latest = node.incarnation.max(*latest);
    }
}

impl Core {
    fn row_of(&self, offset: u64) -> u64 {
        // Neighbours in different rows.
        offset / self.layout.stride % ROWS
    }

    fn bid_at(&self, slot: Slot) -> u64 {
        self.area + u64::from(slot) * self.layout.stride
    }

    fn row_at(&self, row: u64) -> u64 {
        self.area + (1 + row) * u64::from(self.layout.nodes) * self.layout.stride
    }

    fn permitted(&self) -> bool {
        self.permit.lock().as_ref().is_none_or(|p| p.valid()) && !self.broken.load(SeqCst)
    }

    fn cell(&self, node: NodeId, state: CellState) -> Vec<u8> {
        let counter = self.counter.fetch_add(1, SeqCst) + 1;
        Cell { volume: self.layout.volume, node, state, counter, nonce: self.nonce }.encode(self.layout.stride)
    }

    async fn table(&self, at: u64) -> Result<Vec<AlignedBuf>> {
        let lens = vec![self.layout.stride as usize; usize::from(self.layout.nodes)];
        self.inner.readv(IoClass::Lock, at, &lens).await
    }

    /// Writes a sector so that its outcome is known; `Unknown` means that it is not and never will be.
    async fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        if !self.permitted() {
            return Err(DevError::Fenced);
        }
        let written = self.inner.write(IoClass::Lock, at, Arc::new(AlignedBuf::copy_of(bytes)), false).await;
        let Err(unknown @ DevError::Unknown { .. }) = written else { return written };
        while self.permitted() {
            match self.inner.read(IoClass::Lock, at, bytes.len()).await {
                Ok(found) if found[..] == *bytes => return Ok(()),
                _ => sleep(self.timeouts.doorbell()).await,
            }
        }
        self.broken.store(true, SeqCst);
        Err(unknown)
    }

    /// Raises or lowers our cell.
    async fn set(&self, row: u64, me: NodeId, state: CellState) -> Result<()> {
        let at = self.row_at(row) + u64::from(me.slot) * self.layout.stride;
        let cell = self.cell(me, state);
        loop {
            match self.write(at, &cell).await {
                // Whoever is left raised stands in the others' way.
                Err(DevError::Io { .. }) if state == CellState::Lowered => sleep(self.timeouts.doorbell()).await,
                // What it was about may have been done, but this node is at its end.
                Err(DevError::Unknown { .. }) => return Err(DevError::Fenced),
                done => return done,
            }
        }
    }

    /// The other slots whose raised cells count.
    async fn raised(&self, row: u64, me: NodeId) -> Result<Vec<Slot>> {
        let at = self.row_at(row);
        let mut raised = Vec::new();
        for (slot, sector) in (0..).zip(self.table(at).await?) {
            let cell = Cell::decode(&sector, self.layout.volume, slot).map_err(|e| self.damaged(at, slot, e))?;
            raised.extend(cell.filter(|c| c.state == CellState::Raised && slot != me.slot));
        }
        if raised.is_empty() {
            return Ok(Vec::new());
        }
        let slots = self.table(self.layout.slots).await?;
        let counts = |c: &Cell| {
            let over = match slots.get(usize::from(c.node.slot)).map(|s| decode_slot(&self.layout, c.node.slot, s)) {
                Some(Ok(b)) => match b.state {
                    // Who recovers or adopts a slot has made sure that its node is dead.
                    SlotState::Recovering { .. } => c.node.incarnation <= b.incarnation.max(b.adopter),
                    SlotState::Adopting { .. } => c.node.incarnation <= b.incarnation,
                    SlotState::Free | SlotState::Live => c.node.incarnation <= b.last_ended,
                },
                _ => false,
            };
            let dead = self.dead.lock().get(&c.node.slot).is_some_and(|latest| c.node.incarnation <= *latest);
            !over && !dead
        };
        raised.retain(counts);
        if !raised.is_empty() {
            let silent = self.silence.lock().await.look(self).await?;
            raised.retain(|c| silent.get(&c.node.slot).is_none_or(|s| *s < self.timeouts.dead_unfenced()));
        }
        Ok(raised.into_iter().map(|c| c.node.slot).collect())
    }

    fn damaged(&self, table: u64, slot: Slot, e: crate::FormatError) -> DevError {
        let offset = table + u64::from(slot) * self.layout.stride;
        let text = format!("cell of slot {slot} is damaged ({e}): run fsck.clusterfs");
        let source = Arc::new(std::io::Error::new(std::io::ErrorKind::InvalidData, text));
        DevError::Io { op: "lock", offset, len: self.layout.stride as usize, source }
    }

    /// Returns when our cell is raised and no other node can be in.
    async fn enter(&self, row: u64, me: NodeId) -> Result<()> {
        let mut pause = PAUSE;
        loop {
            self.set(row, me, CellState::Raised).await?;
            let mut next = next(me.slot, self.raised(row, me).await?);
            while next == Next::Wait {
                self.wait(&mut pause).await?;
                next = rules::next(me.slot, self.raised(row, me).await?);
            }
            if next == Next::Enter {
                return Ok(());
            }
            self.set(row, me, CellState::Lowered).await?;
            loop {
                self.wait(&mut pause).await?;
                if may_raise(me.slot, self.raised(row, me).await?) {
                    break;
                }
            }
        }
    }

    async fn wait(&self, pause: &mut Duration) -> Result<()> {
        if !self.permitted() {
            return Err(DevError::Fenced);
        }
        sleep(*pause).await;
        *pause = (*pause * 2).min(self.timeouts.doorbell());
        Ok(())
    }

    async fn change(&self, offset: u64, expect: &[u8], new: &[u8]) -> Result<Caw> {
        let found = self.inner.read(IoClass::Lock, offset, expect.len()).await?;
        if found[..] != *expect {
            return Ok(Caw::Mismatch(found.to_vec()));
        }
        self.write(offset, new).await.map(|()| Caw::Written)
    }

    async fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8], tell: oneshot::Sender<Result<Caw>>) {
        let me = match self.me() {
            Ok(me) => me,
            Err(e) => return drop(tell.send(Err(e))),
        };
        let own = offset == self.layout.slot_block(me.slot);
        let (mut shared, mut alone) = (None, None);
        match own {
            true => alone = Some(self.changes.write().await),
            false => shared = Some(self.changes.read().await),
        }
        let row = self.row_of(offset);
        let _one_at_a_time = self.rows[row as usize].lock().await;
        let result = match self.enter(row, me).await {
            Ok(()) => self.change(offset, expect, new).await,
            Err(e) => Err(e),
        };
        // A write that may still arrive: the others wait until we are dead.
        let astray = matches!(result, Err(DevError::Unknown { .. }));
        let _ = tell.send(result);
        if !astray && let Err(e) = self.set(row, me, CellState::Lowered).await {
            tracing::warn!(node = %me, "a cell stays raised: {e}");
            self.broken.store(true, SeqCst);
        }
        drop((shared.take(), alone.take()));
    }
}

#[async_trait]
impl BlockDevice for PlainLocks {
    /// Process locks show the processes of one host only: other hosts' nodes are waited out.
    fn geometry(&self) -> Geometry {
        Geometry { fencing: FencingKind::None, ..self.0.inner.geometry() }
    }

    async fn look_at_size(&self) -> Result<Geometry> {
        self.0.inner.look_at_size().await?;
        Ok(self.geometry())
    }

    async fn readv(&self, class: IoClass, offset: u64, lens: &[usize]) -> Result<Vec<AlignedBuf>> {
        self.0.inner.readv(class, offset, lens).await
    }

    async fn writev(&self, class: IoClass, offset: u64, bufs: Vec<Arc<AlignedBuf>>, fua: bool) -> Result<()> {
        self.0.inner.writev(class, offset, bufs, fua).await
    }

    async fn flush(&self, class: IoClass) -> Result<()> {
        self.0.inner.flush(class).await
    }

    /// Goes on to its end although the caller may stop waiting: half of it would leave others standing.
    async fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> Result<Caw> {
        let (core, expect, new) = (self.0.clone(), expect.to_vec(), new.to_vec());
        let len = new.len();
        let (tell, told) = oneshot::channel();
        tokio::spawn(async move { core.compare_and_write(offset, &expect, &new, tell).await });
        told.await.unwrap_or(Err(DevError::Unknown { op: "compare-and-write", offset, len }))
    }

    /// Bids for the slot; busy if another node does, or cannot be told from one that does.
    async fn register(&self, key: FenceKey) -> Result<()> {
        self.0.inner.register(key).await?;
        let node = NodeId { slot: key.slot, incarnation: key.incarnation };
        let won = self.0.bid(node).await;
        if won.is_err() {
            self.0.inner.unregister().await?;
        }
        won
    }

    fn set_permit(&self, permit: Arc<dyn WritePermit>) {
        *self.0.permit.lock() = Some(permit.clone());
        self.0.inner.set_permit(permit);
    }

    async fn unregister(&self) -> Result<()> {
        // The next owner of our cells must find nothing of ours under way.
        let _all_done = self.0.changes.write().await;
        *self.0.identity.lock() = None;
        self.0.inner.unregister().await
    }

    async fn presence(&self, _: FenceKey) -> Result<Presence> {
        Ok(Presence::Unknown)
    }

    async fn fence(&self, _: FenceKey) -> Result<Fenced> {
        Ok(Fenced::MustWait)
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.0.inner.discard(offset, len).await
    }

    fn stats(&self) -> &DeviceStats {
        self.0.inner.stats()
    }
}

/// Byte offsets of the cells that cannot be read as such: a node would refuse to change anything by way of their rows. On a volume
/// that no node uses they may be zeroed, which is lowered.
pub async fn damaged_cells(dev: &dyn BlockDevice, layout: &Layout) -> Result<Vec<u64>> {
    let mut damaged = Vec::new();
    let Some(area) = layout.plain else { return Ok(damaged) };
    let lens = vec![layout.stride as usize; usize::from(layout.nodes)];
    for table in 0..=ROWS {
        let at = area + table * u64::from(layout.nodes) * layout.stride;
        for (slot, sector) in (0..).zip(dev.readv(IoClass::Lock, at, &lens).await?) {
            if Cell::decode(&sector, layout.volume, slot).is_err() {
                damaged.push(at + u64::from(slot) * layout.stride);
            }
        }
    }
    Ok(damaged)
}

fn since(at: Instant) -> Duration {
    Instant::now().saturating_duration_since(at)
}
