//! From pages in memory to extents, and into the running transaction.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockdev::AlignedBuf;
use cluster::Mode;
use journal::DataWrite;

use super::extents::Mapped;
use crate::alloc::Purpose;
use crate::domain::{Domain, PAGE, without_suid};
use crate::error::{FsError, Result};
use crate::format::item::{ExtentItem, FLAG_INLINE, INLINE_MAX, Inode, Key, Kind, ino, ino_domain, ino_local};
use crate::txn::{Plan, Txn};
use crate::volume::Volume;

pub type Pages = BTreeMap<u64, Arc<AlignedBuf>>;

impl Txn<'_> {
    /// Hands the file's contents in memory, and the attributes that belong to them, to this operation.
    pub async fn flush_contents(&mut self, number: u64) -> Result<()> {
        let local = ino_local(number);
        let domain = self.domain(ino_domain(number), Mode::Exclusive)?.clone();
        let dirty = domain.file(local, |f| {
            let pages: Pages =
                f.pages.iter().filter(|(_, p)| p.record.is_none()).map(|(n, p)| (*n, p.buf.clone())).collect();
            f.live.map(|live| (live, pages))
        });
        let Some((live, pages)) = dirty.flatten() else { return Ok(()) };
        let mut inode = self.inode(number).await?;
        inode.size = live.size;
        inode.mtime = live.mtime;
        inode.ctime = live.ctime;
        if live.clear_suid {
            inode.mode = without_suid(inode.mode);
        }
        let count = pages.len();
        self.store_pages(number, &mut inode, pages).await?;
        self.put_inode(number, &inode).await?;
        let vol = self.vol.me.clone();
        self.on_install(move || {
            let reserved = domain.with_file(local, |f| {
                f.live = None;
                // An inline file's page is in the tree now.
                f.pages.retain(|_, p| p.record.is_some());
                std::mem::take(&mut f.reserved)
            });
            if let Some(vol) = vol.upgrade() {
                vol.contents_gone(count, reserved);
            }
        });
        Ok(())
    }

    /// Writes whole pages of a file: inline, in place, or to new blocks. `inode` has the new size; the caller writes it.
    pub async fn store_pages(&mut self, number: u64, inode: &mut Inode, pages: Pages) -> Result<()> {
        let (id, local) = (ino_domain(number), ino_local(number));
        let piece = Key::new(local, Kind::Inline, 0);
        if inode.size <= INLINE_MAX as u64 && inode.blocks == 0 {
            if let Some(page) = pages.get(&0) {
                self.put(id, &piece, &page[..inode.size as usize]).await?;
                inode.flags |= FLAG_INLINE;
            }
            return Ok(());
        }
        if inode.is_inline() {
            self.del(id, &piece).await?;
            inode.flags &= !FLAG_INLINE;
        }
        let numbers: Vec<u64> = pages.keys().copied().collect();
        for run in numbers.chunk_by(|a, b| a + 1 == *b) {
            self.store_run(number, inode, run[0], run[run.len() - 1] + 1, &pages).await?;
        }
        self.keep_tail(number, inode, &pages)?;
        let domain = self.domain(id, Mode::Exclusive)?.clone();
        self.sent_pages(domain, local, pages.into_iter().collect());
        Ok(())
    }

    async fn store_run(&mut self, number: u64, inode: &mut Inode, from: u64, to: u64, pages: &Pages) -> Result<()> {
        let mut at = from;
        for m in self.extents(number, from, to).await? {
            self.fill_hole(number, inode, at, m.at.min(to), pages).await?;
            let part = m.clip(from, to);
            if part.item.unwritten {
                self.unmap(number, part.at, part.end()).await?;
                let item = ExtentItem { unwritten: false, ..part.item };
                self.map(number, Mapped { item, ..part }).await?;
            }
            self.send(part.item.start, part.at, part.end(), pages, part.item.unwritten);
            at = part.end();
        }
        self.fill_hole(number, inode, at, to, pages).await
    }

    async fn fill_hole(&mut self, number: u64, inode: &mut Inode, from: u64, to: u64, pages: &Pages) -> Result<()> {
        let mut at = from;
        while at < to {
            let goal = match at {
                0 => None,
                _ => self.extents(number, at - 1, at).await?.pop().map(|m| m.item.start + u64::from(m.item.len)),
            };
            let e = self.take_blocks(to - at, goal, Purpose::Commit)?;
            let item = ExtentItem { start: e.start, len: e.len as u32, unwritten: false };
            self.map(number, Mapped { at, item }).await?;
            inode.blocks += e.len;
            self.send(e.start, at, at + e.len, pages, true);
            at += e.len;
        }
        Ok(())
    }

    fn send(&mut self, block: u64, from: u64, to: u64, pages: &Pages, fresh: bool) {
        let bufs: Vec<_> = pages.range(from..to).map(|(_, b)| b.clone()).collect();
        debug_assert_eq!(bufs.len() as u64, to - from, "every page of the run is at hand");
        self.write_data(DataWrite { block, bufs, fresh });
    }
}

impl Volume {
    /// Flushes one file as an operation of its own.
    pub(crate) async fn flush_file(&self, number: u64) -> Result<()> {
        let mut plan = Plan::write(&[ino_domain(number)], Purpose::Commit);
        loop {
            let mut tx = self.begin_unordered(&plan).await?;
            let r = tx.flush_contents(number).await;
            if self.finish(tx, r, &mut plan).await?.is_some() {
                return Ok(());
            }
        }
    }

    /// Flushes everything of a domain whose operations a revocation has blocked.
    pub(crate) async fn flush_domain(&self, domain: &Arc<Domain>) -> Result<()> {
        for local in domain.dirty_files() {
            let mut plan = Plan::write(&[domain.id], Purpose::Commit);
            loop {
                let mut tx = Txn::within_revocation(self, domain.clone(), &plan).await?;
                let r = tx.flush_contents(ino(domain.id, local)).await;
                if self.finish(tx, r, &mut plan).await?.is_some() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Flushes and commits everything in memory.
    pub(crate) async fn flush_everything(&self) -> Result<()> {
        let domains: Vec<_> = self.domains.lock().values().cloned().collect();
        for d in domains {
            for local in d.dirty_files() {
                match self.flush_file(ino(d.id, local)).await {
                    Ok(()) | Err(FsError::Stale) => {}
                    Err(e) => return Err(e),
                }
            }
        }
        self.commit().await.map(|_| ())
    }

    /// A writer that fills memory faster than the device takes it waits here.
    pub(crate) async fn limit_dirty(&self) -> Result<()> {
        if self.dirty_bytes.load(Ordering::Relaxed) <= self.dirty_limit {
            return Ok(());
        }
        let _one = self.flushing.lock().await;
        if self.dirty_bytes.load(Ordering::Relaxed) > self.dirty_limit {
            self.flush_everything().await?;
        }
        Ok(())
    }
}

/// Bytes of a page.
pub const PAGE_BYTES: usize = PAGE as usize;

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use blockdev::BlockDevice;
    use blockdev::sim::{SimConfig, SimDisk};

    use super::*;
    use crate::format::item::Time;
    use crate::types::*;

    struct NoClock;

    impl WallClock for NoClock {
        fn now(&self) -> Time {
            Time { secs: 1, nanos: 0 }
        }
    }

    /// A volume that fails in the middle of a revocation: what is left to be written back gets an error, and does not turn in a circle.
    #[test]
    fn a_revocation_ends_with_its_volume() {
        let (done, ended) = channel();
        std::thread::spawn(move || {
            let rt = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
            let result = rt.expect("a runtime").block_on(async {
                let disk = SimDisk::new(SimConfig::new(64 << 20, 7));
                let raw: Arc<dyn BlockDevice> = disk.open_raw();
                mkfs::format(&raw, &mkfs::FormatOptions::seeded(7), &mut |_| {}).await.expect("mkfs");
                let volume = Volume::mount(MountConfig {
                    device: disk.open("a"),
                    net: None,
                    clock: Arc::new(NoClock),
                    kernel: Arc::new(NoKernelCache),
                    host_name: "a".into(),
                    seed: 1,
                    read_only: false,
                    atime: Atime::Never,
                    cache_bytes: 1 << 20,
                    dirty_bytes: 1 << 20,
                });
                let volume = volume.await.expect("mount");
                let new = NewNode { mode: 0o100644, umask: 0, rdev: 0 };
                let made = volume.mknod(Caller::default(), crate::ROOT_INO, b"f", new, false).await.expect("create");
                let file = made.map(|m| m.ino).value;
                volume.write(file, 0, &[1; 9000], WriteOptions::default()).await.expect("write");
                volume.abandon();
                volume.flush_domain(&volume.domain(ino_domain(file))).await
            });
            let _ = done.send(result.is_err());
        });
        assert_eq!(ended.recv_timeout(Duration::from_secs(60)), Ok(true));
    }
}
