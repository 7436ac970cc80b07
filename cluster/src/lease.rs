//! The lease: how long this node may still write, and the device that refuses writes after it (I12).
//!
//! Every heartbeat that reached the device extends the lease to the time *before* it was submitted plus
//! [`Timeouts::lease`](crate::Timeouts::lease). Another node has to see the heartbeat unchanged for longer than that, so the
//! lease is over before anyone may take over. Once over it never comes back: the node rejoins with a new incarnation.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use async_trait::async_trait;
use blockdev::{
    AlignedBuf, BlockDevice, Caw, DevError, DeviceStats, FenceKey, Fenced, Geometry, IoClass, Presence, Result,
    WritePermit,
};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::watched::Watched;

pub(crate) struct Lease {
    until: Mutex<Option<Instant>>,
    over: Watched<bool>,
    in_flight: AtomicU64,
    /// Writes whose outcome nobody waited for, or which ended as unknown: they may still arrive.
    stray: AtomicBool,
}

impl Lease {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            until: Mutex::new(None),
            over: Watched::new(false),
            in_flight: AtomicU64::new(0),
            stray: AtomicBool::new(false),
        })
    }

    pub fn valid(&self) -> bool {
        !*self.over.borrow() && self.until.lock().is_some_and(|until| Instant::now() < until)
    }

    pub fn until(&self) -> Option<Instant> {
        *self.until.lock()
    }

    /// False if it was over already.
    pub fn renew(&self, until: Instant) -> bool {
        if *self.over.borrow() {
            return false;
        }
        let mut current = self.until.lock();
        if current.is_some_and(|current| Instant::now() >= current) {
            return false;
        }
        *current = Some(until);
        true
    }

    pub fn end(&self) {
        self.over.replace(true);
    }

    /// Waits until the lease was ended (not until it runs out).
    pub async fn ended(&self) {
        self.over.wait_for(|over| *over).await;
    }

    /// Every write that this node waited for has ended.
    pub fn idle(&self) -> bool {
        self.in_flight.load(SeqCst) == 0
    }

    /// No write of this node can arrive any more, as far as it can tell itself.
    pub fn quiet(&self) -> bool {
        self.idle() && !self.stray.load(SeqCst)
    }
}

impl WritePermit for Lease {
    fn valid(&self) -> bool {
        self.valid()
    }
}

/// The device behind the lease.
pub(crate) struct Guarded {
    pub inner: Arc<dyn BlockDevice>,
    pub lease: Arc<Lease>,
    /// When the latest read that succeeded began.
    pub readable: Mutex<Instant>,
}

/// Counts one write in flight, also one whose future is dropped.
struct InFlight<'a> {
    lease: &'a Lease,
    done: bool,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.lease.stray.store(true, SeqCst);
        }
        self.lease.in_flight.fetch_sub(1, SeqCst);
    }
}

impl Guarded {
    pub fn new(inner: Arc<dyn BlockDevice>, lease: Arc<Lease>) -> Self {
        Self { inner, lease, readable: Mutex::new(Instant::now()) }
    }

    async fn write_op<T>(&self, op: impl Future<Output = Result<T>>) -> Result<T> {
        if !self.lease.valid() {
            return Err(DevError::Fenced);
        }
        self.lease.in_flight.fetch_add(1, SeqCst);
        let mut flight = InFlight { lease: &self.lease, done: false };
        let result = op.await;
        flight.done = !matches!(result, Err(DevError::Unknown { .. }));
        if matches!(result, Err(DevError::Fenced)) {
            self.lease.end();
        }
        result
    }
}

#[async_trait]
impl BlockDevice for Guarded {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    async fn look_at_size(&self) -> Result<Geometry> {
        self.inner.look_at_size().await
    }

    async fn readv(&self, class: IoClass, offset: u64, lens: &[usize]) -> Result<Vec<AlignedBuf>> {
        let began = Instant::now();
        let read = self.inner.readv(class, offset, lens).await?;
        *self.readable.lock() = began;
        Ok(read)
    }

    async fn writev(&self, class: IoClass, offset: u64, bufs: Vec<Arc<AlignedBuf>>, fua: bool) -> Result<()> {
        self.write_op(self.inner.writev(class, offset, bufs, fua)).await
    }

    async fn flush(&self, class: IoClass) -> Result<()> {
        self.write_op(self.inner.flush(class)).await
    }

    async fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> Result<Caw> {
        self.write_op(self.inner.compare_and_write(offset, expect, new)).await
    }

    async fn register(&self, key: FenceKey) -> Result<()> {
        self.inner.register(key).await
    }

    fn set_permit(&self, permit: Arc<dyn WritePermit>) {
        self.inner.set_permit(permit);
    }

    async fn unregister(&self) -> Result<()> {
        self.inner.unregister().await
    }

    async fn presence(&self, key: FenceKey) -> Result<Presence> {
        self.inner.presence(key).await
    }

    async fn fence(&self, key: FenceKey) -> Result<Fenced> {
        self.write_op(self.inner.fence(key)).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_op(self.inner.discard(offset, len)).await
    }

    fn stats(&self) -> &DeviceStats {
        self.inner.stats()
    }
}
