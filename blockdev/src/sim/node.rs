//! One node's connection to the simulated device, and what can happen to it.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use async_trait::async_trait;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::request::{Reply, Req};
use super::state::{Step, clock};
use super::{NodeMode, OpKind, SimDisk};
use crate::{
    AlignedBuf, BlockDevice, Caw, DevError, DeviceStats, FenceKey, Fenced, Geometry, IoClass, Presence, Result, range,
};

/// The device as one incarnation of a node sees it; open another after a crash.
pub struct SimNode {
    disk: Arc<SimDisk>,
    id: usize,
    changed: Arc<Notify>,
    /// Of the device, as this node last saw it.
    size: AtomicU64,
    stats: DeviceStats,
}

impl Drop for SimNode {
    fn drop(&mut self) {
        // Its process has ended: as after a crash, nothing of it may arrive once it counts as gone.
        self.disk.state.lock().crash(self.id);
    }
}

/// Lets an operation whose caller was dropped take effect all the same.
struct Ticket<'a> {
    disk: &'a SimDisk,
    seq: u64,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.disk.state.lock().detach(self.seq);
    }
}

impl SimNode {
    pub(super) fn new(disk: Arc<SimDisk>, name: &str, raw: bool) -> Self {
        let mut state = disk.state.lock();
        let id = state.add_node(name, raw);
        let changed = state.nodes[id].changed.clone();
        drop(state);
        let size = AtomicU64::new(disk.geometry().size);
        Self { disk, id, changed, size, stats: DeviceStats::default() }
    }

    /// The device that this node is connected to.
    pub fn disk(&self) -> &Arc<SimDisk> {
        &self.disk
    }

    pub fn mode(&self) -> NodeMode {
        self.disk.state.lock().nodes[self.id].mode
    }

    /// The node dies: each write in flight arrives wholly, partly or not at all, and no operation of this node, in
    /// flight or later, ever returns. The device's cache keeps what it has.
    pub fn crash(&self) {
        self.disk.state.lock().crash(self.id);
    }

    /// Crashes at the `n`-th read, write, flush or compare-and-write from now (1 is the next): that operation is in
    /// flight when the node dies.
    pub fn crash_at(&self, n: u64) {
        self.disk.state.lock().crash_after(self.id, None, n);
    }

    /// As [`crash_at`](Self::crash_at), counting only one kind of operation.
    pub fn crash_at_kind(&self, kind: OpKind, n: u64) {
        self.disk.state.lock().crash_after(self.id, Some(kind), n);
    }

    /// Waits until the node has crashed.
    pub async fn crashed(&self) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.mode() == NodeMode::Crashed {
                return;
            }
            changed.await;
        }
    }

    /// Cuts the path to the device: operations return [`DevError::Unknown`] after the configured time and do not
    /// arrive, except that what was in flight may arrive, late too, unless the node is fenced first.
    pub fn cut(&self, cut: bool) {
        self.disk.state.lock().cut(self.id, cut);
    }

    /// All reads of this node fail with EIO from here on, or no longer; its writes work.
    pub fn fail_all_reads(&self, fail: bool) {
        self.disk.state.lock().nodes[self.id].reads_fail = fail;
    }

    /// Hangs the node: its operations wait until it is let go, and then proceed (or are refused, if it was fenced
    /// meanwhile). What was in flight takes effect in the meantime, late perhaps.
    pub fn hang(&self, hang: bool) {
        self.disk.state.lock().hang(self.id, hang);
    }

    /// Reads, writes, flushes and compare-and-writes issued: the range of [`crash_at`](Self::crash_at).
    pub fn issued(&self) -> u64 {
        self.disk.state.lock().nodes[self.id].issued.values().sum()
    }

    /// Operations of one kind issued.
    pub fn issued_of(&self, kind: OpKind) -> u64 {
        self.disk.state.lock().nodes[self.id].issued.get(&kind).copied().unwrap_or(0)
    }

    async fn run(&self, req: Req) -> Result<Reply> {
        let (epoch, limit) = {
            let state = self.disk.state.lock();
            (state.nodes[self.id].epoch, state.cfg.queue_limit)
        };
        let issued = clock().unwrap_or_else(Instant::now);
        let mut req = Some(req);
        let mut ticket: Option<Ticket<'_>> = None;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            let step = {
                let mut state = self.disk.state.lock();
                changed.as_mut().enable();
                let hung = state.nodes[self.id].mode == NodeMode::Hung && !state.nodes[self.id].raw;
                let too_late = !limit.is_zero() && ticket.is_none() && !hung && issued.elapsed() > limit;
                if too_late && let Some(req) = req.take() {
                    return Err(req.unknown());
                }
                let seq = match (&ticket, hung) {
                    (Some(ticket), _) => Some(ticket.seq),
                    (None, true) => None,
                    (None, false) => req.take().and_then(|req| state.submit(self.id, epoch, issued, req)),
                };
                match seq {
                    Some(seq) => {
                        if ticket.is_none() {
                            ticket = Some(Ticket { disk: &self.disk, seq });
                        }
                        state.step(seq)
                    }
                    None if hung => Step::Wait,
                    None => Step::Never,
                }
            };
            match step {
                Step::Ready(result) => return result,
                Step::Until(time) => tokio::time::sleep_until(time).await,
                Step::Wait => changed.await,
                Step::Never => std::future::pending::<()>().await,
            }
        }
    }

    fn check(&self, op: &'static str, offset: u64, lens: impl IntoIterator<Item = usize>) -> Result<usize> {
        let lens: Vec<usize> = lens.into_iter().collect();
        match range::check(op, &self.geometry(), offset, lens.iter().copied()) {
            Err(DevError::Range { .. }) => range::check(op, &self.measure(), offset, lens),
            checked => checked,
        }
    }

    fn measure(&self) -> Geometry {
        self.size.store(self.disk.geometry().size, Relaxed);
        self.geometry()
    }
}

/// A reply of the wrong kind would be a bug of the simulated device.
fn mixed_up<T>() -> Result<T> {
    unreachable!("the simulated device answered another question")
}

#[async_trait]
impl BlockDevice for SimNode {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.size.load(Relaxed), ..self.disk.geometry() }
    }

    async fn look_at_size(&self) -> Result<Geometry> {
        Ok(self.measure())
    }

    async fn readv(&self, class: IoClass, offset: u64, lens: &[usize]) -> Result<Vec<AlignedBuf>> {
        let total = self.check("read", offset, lens.iter().copied())?;
        self.stats.count_read(class, total);
        match self.run(Req::Read { offset, lens: lens.to_vec() }).await? {
            Reply::Bufs(bufs) => Ok(bufs),
            _ => mixed_up(),
        }
    }

    async fn writev(&self, class: IoClass, offset: u64, bufs: Vec<Arc<AlignedBuf>>, fua: bool) -> Result<()> {
        let total = self.check("write", offset, bufs.iter().map(|b| b.len()))?;
        self.stats.count_write(class, total);
        self.run(Req::Write { class, offset, bufs, fua }).await.map(|_| ())
    }

    async fn flush(&self, class: IoClass) -> Result<()> {
        self.stats.count_flush(class);
        self.run(Req::Flush { exempt: Default::default() }).await.map(|_| ())
    }

    async fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> Result<Caw> {
        let sector = self.disk.geometry().sector_size as usize;
        self.check("compare-and-write", offset, [new.len()])?;
        if expect.len() != sector || new.len() != sector {
            let (op, len, size) = ("compare-and-write", expect.len().max(new.len()), self.disk.geometry().size);
            return Err(DevError::Range { op, offset, len, size });
        }
        self.stats.count_compare_and_write(new.len());
        match self.run(Req::Caw { offset, expect: expect.to_vec(), new: new.to_vec() }).await? {
            Reply::Caw(caw) => Ok(caw),
            _ => mixed_up(),
        }
    }

    async fn register(&self, key: FenceKey) -> Result<()> {
        self.run(Req::Register(key)).await.map(|_| ())
    }

    async fn unregister(&self) -> Result<()> {
        self.run(Req::Unregister).await.map(|_| ())
    }

    async fn presence(&self, key: FenceKey) -> Result<Presence> {
        match self.run(Req::Presence(key)).await? {
            Reply::Presence(presence) => Ok(presence),
            _ => mixed_up(),
        }
    }

    async fn fence(&self, key: FenceKey) -> Result<Fenced> {
        match self.run(Req::Fence(key)).await? {
            Reply::Fenced(fenced) => Ok(fenced),
            _ => mixed_up(),
        }
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let (op, size) = ("discard", self.disk.geometry().size);
        let short = usize::try_from(len).map_err(|_| DevError::Range { op, offset, len: usize::MAX, size })?;
        self.check(op, offset, [short])?;
        self.run(Req::Discard { offset, len }).await.map(|_| ())
    }

    fn stats(&self) -> &DeviceStats {
        &self.stats
    }
}
