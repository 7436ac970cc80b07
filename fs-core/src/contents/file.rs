//! Reading, writing and syncing a file.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockdev::{AlignedBuf, IoClass};
use cluster::{LockId, Mode};

use super::flush::{PAGE_BYTES, Pages};
use crate::alloc::Purpose;
use crate::domain::{Live, PAGE, Page};
use crate::error::{FsError, Result};
use crate::format::item::{INLINE_MAX, Inode, Key, Kind, Time, ino_domain, ino_local};
use crate::format::layout::BLOCK;
use crate::ops::later;
use crate::txn::{Plan, Txn};
use crate::types::{Atime, WriteOptions};
use crate::volume::{Leased, Volume};

/// Largest file: extents count pages in 63 bits of a signed offset.
pub const SIZE_MAX: u64 = i64::MAX as u64;
/// relatime renews an access time that is older than this, in seconds.
const ATIME_AGE: i64 = 24 * 3600;

impl Volume {
    /// Short only at the end of the file.
    pub async fn read(&self, ino: u64, offset: u64, len: u32) -> Result<Leased<Vec<u8>>> {
        let mut plan = Plan::read(&[ino_domain(ino)]).with_pages_of(ino);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = read(&mut tx, ino, offset, len).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    /// Returns the offset at which the data went (differs from `offset` for appends).
    pub async fn write(&self, ino: u64, offset: u64, data: &[u8], how: WriteOptions) -> Result<Leased<u64>> {
        self.limit_dirty().await?;
        let mut plan = Plan::write(&[ino_domain(ino)], Purpose::Grow).with_pages_of(ino);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = write(&mut tx, ino, offset, data, how).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    /// Durable on return: file or directory, and every change of names and inodes that this node made before. Contents that
    /// this node wrote went out when it gave the domain up, as did changes of other nodes.
    pub async fn fsync(&self, ino: u64, _data_only: bool) -> Result<()> {
        self.check()?;
        self.flush_mapped(ino).await?;
        let domain = self.domain(ino_domain(ino));
        let exclusive = domain.hold.grant().is_some_and(|g| g.mode == Mode::Exclusive);
        if exclusive && domain.file(ino_local(ino), |f| f.dirty()).unwrap_or(false) {
            self.flush_file(ino).await?;
        }
        self.commit().await?;
        self.synced.lock().put(ino, ());
        Ok(())
    }

    /// Notes whether the name that a file got by rename or link is the first since an fsync of it.
    pub(crate) fn named<T>(&self, ino: u64, done: Leased<T>) -> Leased<T> {
        Leased { names_synced: self.synced.lock().pop(&ino).is_some(), ..done }
    }

    /// Before the result of an operation that [names a synced file](Leased::names_synced) is told. Its lease may be kept over this: a
    /// revocation has to wait for the commit anyway, and the commit for nothing but the device.
    pub async fn commit_name(&self) -> Result<()> {
        self.commit().await.map(drop)
    }

    /// Everything durable.
    pub async fn sync(&self) -> Result<()> {
        self.carry_out_all_mapped().await?;
        self.flush_everything().await
    }
}

async fn regular(tx: &mut Txn<'_>, ino: u64) -> Result<Inode> {
    let inode = tx.live_inode(ino).await?;
    match (inode.is_file(), inode.is_dir()) {
        (true, _) => Ok(inode),
        (_, true) => Err(FsError::IsDir),
        _ => Err(FsError::Invalid),
    }
}

async fn read(tx: &mut Txn<'_>, ino: u64, offset: u64, len: u32) -> Result<Vec<u8>> {
    let inode = regular(tx, ino).await?;
    let end = offset.saturating_add(len.into()).min(inode.size);
    if offset >= end {
        return Ok(Vec::new());
    }
    note_access(tx, ino, &inode)?;
    let mut out = tx.read_range(ino, &inode, offset, (end - offset) as usize).await?;
    tx.domain(ino_domain(ino), Mode::Shared)?.mapped.overlay(ino_local(ino), offset, &mut out);
    Ok(out)
}

/// relatime, where it costs no lock: the new time goes to the tree in the background.
fn note_access(tx: &Txn<'_>, ino: u64, inode: &Inode) -> Result<()> {
    let vol = tx.vol;
    let domain = tx.domain(ino_domain(ino), Mode::Shared)?;
    let exclusive = domain.hold.grant().is_some_and(|g| g.mode == Mode::Exclusive);
    if vol.atime == Atime::Never || vol.read_only || !exclusive {
        return Ok(());
    }
    let now = vol.now();
    let stale = access_is_old(inode, now);
    if stale && let Some(vol) = vol.me.upgrade() {
        tokio::spawn(async move { vol.set_atime(ino, now).await });
    }
    Ok(())
}

impl Volume {
    async fn set_atime(&self, ino: u64, now: Time) {
        let mut plan = Plan::write(&[ino_domain(ino)], Purpose::Reclaim);
        loop {
            let Ok(mut tx) = self.begin(&plan).await else { return };
            let r = set_atime(&mut tx, ino, now).await;
            match self.finish(tx, r, &mut plan).await {
                Ok(None) => {}
                // Best effort: the file may be gone.
                _ => return,
            }
        }
    }
}

fn access_is_old(inode: &Inode, now: Time) -> bool {
    inode.atime <= inode.mtime || inode.atime <= inode.ctime || now.secs - inode.atime.secs > ATIME_AGE
}

async fn set_atime(tx: &mut Txn<'_>, ino: u64, now: Time) -> Result<()> {
    let mut inode = tx.inode(ino).await?;
    // Another read may have renewed it meanwhile.
    if inode.atime < now && access_is_old(&tx.live_inode(ino).await?, now) {
        inode.atime = now;
        tx.put_inode(ino, &inode).await?;
    }
    Ok(())
}

impl Txn<'_> {
    /// Bytes of a file; the range lies within its size. Memory first, then the tree or the device, holes as zeros.
    pub async fn read_range(&mut self, ino: u64, inode: &Inode, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut out = vec![0; len];
        let (first, last) = (offset / PAGE, (offset + len as u64 - 1) / PAGE);
        let in_memory: Pages = self
            .domain(ino_domain(ino), Mode::Shared)?
            .file(ino_local(ino), |f| f.pages.range(first..=last).map(|(n, p)| (*n, p.buf.clone())).collect())
            .unwrap_or_default();
        if in_memory.len() as u64 <= last - first {
            self.read_stored(ino, inode, offset, &mut out).await?;
        }
        for (page, buf) in &in_memory {
            copy_overlap(&mut out, offset, page * PAGE, buf);
        }
        Ok(out)
    }

    async fn read_stored(&mut self, ino: u64, inode: &Inode, offset: u64, out: &mut [u8]) -> Result<()> {
        if inode.is_inline() {
            let key = Key::new(ino_local(ino), Kind::Inline, 0);
            let contents = self.get(ino_domain(ino), &key).await?.unwrap_or_default();
            copy_overlap(out, offset, 0, &contents);
            return Ok(());
        }
        let end = offset + out.len() as u64;
        for m in self.extents(ino, offset / PAGE, end.div_ceil(PAGE)).await? {
            if m.item.unwritten {
                continue;
            }
            let part = m.clip(offset / PAGE, end.div_ceil(PAGE));
            self.check_data_blocks(ino, part.item.start, part.item.len)?;
            let bytes = part.item.len as usize * PAGE_BYTES;
            let buf = self.vol.device.read(IoClass::Data, part.item.start * BLOCK, bytes).await?;
            copy_overlap(out, offset, part.at * PAGE, &buf);
        }
        Ok(())
    }

    /// A damaged extent must not let a file show the volume's own structures.
    fn check_data_blocks(&self, ino: u64, start: u64, len: u32) -> Result<()> {
        let layout = self.vol.layout();
        let group = layout.group_of(start);
        if group.is_none() || group != layout.group_of(start + u64::from(len) - 1) {
            let owner = LockId::Domain(ino_domain(ino));
            return Err(FsError::damaged(
                owner,
                format!("inode {ino:#x} refers to blocks {start}+{len} outside the groups"),
            ));
        }
        Ok(())
    }

    /// A page as users see it, zero beyond the size.
    pub async fn load_page(&mut self, ino: u64, inode: &Inode, page: u64) -> Result<AlignedBuf> {
        let mut buf = AlignedBuf::zeroed(PAGE_BYTES);
        let end = ((page + 1) * PAGE).min(inode.size);
        if end > page * PAGE {
            let len = (end - page * PAGE) as usize;
            let written =
                self.domain(ino_domain(ino), Mode::Shared)?.file(ino_local(ino), |f| f.pages.contains_key(&page));
            match self.kept_tail(ino, page)?.filter(|_| written != Some(true) && !inode.is_inline()) {
                Some(kept) => buf[..len].copy_from_slice(&kept[..len]),
                None => buf[..len].copy_from_slice(&self.read_range(ino, inode, page * PAGE, len).await?),
            }
        }
        Ok(buf)
    }

    /// The pages that must be rewritten when a file grows to `end` bytes: the rest of its last page becomes visible, and
    /// contents leave the tree when they get too long for it.
    pub async fn pages_of_growth(&mut self, ino: u64, inode: &Inode, end: u64) -> Result<Pages> {
        let mut pages = Pages::new();
        if end <= inode.size || inode.size == 0 {
            return Ok(pages);
        }
        let leaves_tree = inode.is_inline() && end > INLINE_MAX as u64;
        let tail = inode.size / PAGE;
        let tail_shows = !inode.is_inline() && !inode.size.is_multiple_of(PAGE);
        if leaves_tree {
            pages.insert(0, Arc::new(self.load_page(ino, inode, 0).await?));
        } else if tail_shows && !self.extents(ino, tail, tail + 1).await?.is_empty() {
            pages.insert(tail, Arc::new(self.load_page(ino, inode, tail).await?));
        }
        Ok(pages)
    }
}

/// Copies what a piece of the file at byte `at` has of the range that `out` stands for at byte `offset`.
pub(super) fn copy_overlap(out: &mut [u8], offset: u64, at: u64, piece: &[u8]) {
    let from = offset.max(at);
    let to = (offset + out.len() as u64).min(at + piece.len() as u64);
    if from < to {
        let n = (to - from) as usize;
        let (o, p) = ((from - offset) as usize, (from - at) as usize);
        out[o..o + n].copy_from_slice(&piece[p..p + n]);
    }
}

pub(super) async fn write(tx: &mut Txn<'_>, ino: u64, offset: u64, data: &[u8], how: WriteOptions) -> Result<u64> {
    let local = ino_local(ino);
    let domain = tx.domain(ino_domain(ino), Mode::Exclusive)?.clone();
    let inode = regular(tx, ino).await?;
    let at = if how.append { inode.size } else { offset };
    let room = if how.within_size { inode.size.saturating_sub(at) } else { u64::MAX };
    let data = &data[..data.len().min(room.try_into().unwrap_or(usize::MAX))];
    let end = at.checked_add(data.len() as u64).filter(|e| *e <= SIZE_MAX).ok_or(FsError::TooBig)?;
    if data.is_empty() {
        return Ok(at);
    }
    let mut pages = tx.pages_of_growth(ino, &inode, end).await?;
    for page in at / PAGE..=(end - 1) / PAGE {
        let start = page * PAGE;
        let whole = at <= start && end >= start + PAGE;
        let mut buf = match (whole, pages.remove(&page)) {
            (true, _) => AlignedBuf::zeroed(PAGE_BYTES),
            (_, Some(grown)) => Arc::unwrap_or_clone(grown),
            _ => tx.load_page(ino, &inode, page).await?,
        };
        copy_overlap(&mut buf, start, at, data);
        pages.insert(page, Arc::new(buf));
    }
    let clean =
        domain.file(local, |f| pages.keys().filter(|n| f.pages.get(n).is_none_or(|p| p.record.is_some())).count());
    let newly_dirty = clean.unwrap_or(pages.len());
    if !tx.vol.alloc.reserve(newly_dirty as u64) {
        return Err(FsError::NeedSpace(newly_dirty as u64));
    }
    let now = tx.vol.now();
    let live = Live {
        size: inode.size.max(end),
        mtime: later(now, inode.mtime),
        ctime: later(now, inode.ctime),
        clear_suid: how.kill_suid || domain.file(local, |f| f.live.is_some_and(|l| l.clear_suid)).unwrap_or(false),
    };
    tx.vol.dirty_bytes.fetch_add(newly_dirty * PAGE_BYTES, Ordering::Relaxed);
    tx.on_install(move || {
        domain.with_file(local, |f| {
            f.reserved += newly_dirty as u64;
            f.live = Some(live);
            f.pages.extend(pages.into_iter().map(|(n, buf)| (n, Page { buf, record: None })));
        });
    });
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_copied_and_the_rest_left() {
        let mut out = [9u8; 6];
        copy_overlap(&mut out, 10, 12, &[1, 2]);
        assert_eq!(out, [9, 9, 1, 2, 9, 9]);
        copy_overlap(&mut out, 10, 8, &[3, 3, 3]);
        assert_eq!(out, [3, 9, 1, 2, 9, 9]);
        copy_overlap(&mut out, 10, 15, &[4, 5]);
        assert_eq!(out, [3, 9, 1, 2, 9, 4]);
        copy_overlap(&mut out, 10, 16, &[7]);
        assert_eq!(out, [3, 9, 1, 2, 9, 4]);
    }
}
