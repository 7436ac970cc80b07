//! A device in memory: a volume that is shared by all cases, and over it what one case has written.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use blockdev::{
    AlignedBuf, BlockDevice, Caw, DevError, DeviceStats, FenceKey, Fenced, FencingKind, Geometry, IoClass, Presence,
    Result,
};
use parking_lot::Mutex;

const SECTOR: usize = 512;

pub struct Overlaid {
    base: Arc<Vec<u8>>,
    written: Mutex<BTreeMap<u64, [u8; SECTOR]>>,
    own: Mutex<Option<FenceKey>>,
    stats: DeviceStats,
}

impl Overlaid {
    pub fn new(base: Arc<Vec<u8>>) -> Self {
        Self { base, written: Mutex::default(), own: Mutex::default(), stats: DeviceStats::default() }
    }

    fn range(&self, op: &'static str, offset: u64, len: usize) -> Result<()> {
        let size = self.base.len() as u64;
        let end = offset.checked_add(len as u64);
        let aligned = offset.is_multiple_of(SECTOR as u64) && len.is_multiple_of(SECTOR);
        if aligned && end.is_some_and(|e| e <= size) { Ok(()) } else { Err(DevError::Range { op, offset, len, size }) }
    }

    /// The range lies within the volume.
    fn get(&self, offset: u64, out: &mut [u8]) {
        let at = offset as usize;
        out.copy_from_slice(&self.base[at..at + out.len()]);
        let first = offset / SECTOR as u64;
        for (n, s) in self.written.lock().range(first..first + (out.len() / SECTOR) as u64) {
            let to = (n - first) as usize * SECTOR;
            out[to..to + SECTOR].copy_from_slice(s);
        }
    }

    /// The volume with what was written.
    pub fn image(&self) -> Vec<u8> {
        let mut all = vec![0; self.base.len()];
        self.get(0, &mut all);
        all
    }

    pub fn put(&self, offset: u64, bytes: &[u8]) {
        let mut written = self.written.lock();
        for (i, s) in bytes.as_chunks::<SECTOR>().0.iter().enumerate() {
            written.insert(offset / SECTOR as u64 + i as u64, *s);
        }
    }
}

#[async_trait]
impl BlockDevice for Overlaid {
    fn geometry(&self) -> Geometry {
        let size = self.base.len() as u64;
        let fencing = FencingKind::ProcessLock;
        Geometry { sector_size: SECTOR as u32, size, write_cache: false, fencing, others_unseen: false }
    }

    async fn look_at_size(&self) -> Result<Geometry> {
        Ok(self.geometry())
    }

    async fn readv(&self, _: IoClass, offset: u64, lens: &[usize]) -> Result<Vec<AlignedBuf>> {
        self.range("read", offset, lens.iter().sum())?;
        let mut at = offset;
        let mut out = Vec::new();
        for len in lens {
            let mut b = AlignedBuf::zeroed(*len);
            self.get(at, &mut b);
            at += *len as u64;
            out.push(b);
        }
        Ok(out)
    }

    async fn writev(&self, _: IoClass, offset: u64, bufs: Vec<Arc<AlignedBuf>>, _fua: bool) -> Result<()> {
        self.range("write", offset, bufs.iter().map(|b| b.len()).sum())?;
        let mut at = offset;
        for b in bufs {
            self.put(at, &b);
            at += b.len() as u64;
        }
        Ok(())
    }

    async fn flush(&self, _: IoClass) -> Result<()> {
        Ok(())
    }

    async fn compare_and_write(&self, offset: u64, expect: &[u8], new: &[u8]) -> Result<Caw> {
        self.range("compare and write", offset, new.len())?;
        let mut now = vec![0; new.len()];
        self.get(offset, &mut now);
        if now != expect {
            return Ok(Caw::Mismatch(now));
        }
        self.put(offset, new);
        Ok(Caw::Written)
    }

    async fn register(&self, key: FenceKey) -> Result<()> {
        *self.own.lock() = Some(key);
        Ok(())
    }

    async fn unregister(&self) -> Result<()> {
        *self.own.lock() = None;
        Ok(())
    }

    /// Whoever wrote the volume is long gone.
    async fn presence(&self, key: FenceKey) -> Result<Presence> {
        let own = self.own.lock().is_some_and(|k| k.slot == key.slot);
        Ok(if own { Presence::Present } else { Presence::Gone })
    }

    async fn fence(&self, _: FenceKey) -> Result<Fenced> {
        Ok(Fenced::Done)
    }

    async fn discard(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn stats(&self) -> &DeviceStats {
        &self.stats
    }
}
