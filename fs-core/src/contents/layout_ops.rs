//! Changing a file's size and allocation: truncate, fallocate, and finding data and holes.

use cluster::Mode;

use super::file::SIZE_MAX;
use super::flush::Pages;
use crate::alloc::Purpose;
use crate::contents::extents::Mapped;
use crate::domain::PAGE;
use crate::error::{FsError, Result};
use crate::format::item::{ExtentItem, FLAG_INLINE, INLINE_MAX, Inode, Key, Kind, ino_domain, ino_local};
use crate::ops::later;
use crate::txn::{Plan, Txn};
use crate::types::{Fallocate, Whence};
use crate::volume::{Leased, Volume};

impl Volume {
    pub async fn fallocate(&self, ino: u64, offset: u64, len: u64, how: Fallocate) -> Result<Leased<()>> {
        let end = offset.checked_add(len).filter(|e| *e <= SIZE_MAX).ok_or(FsError::TooBig)?;
        if len == 0 || (how.punch_hole && !how.keep_size) {
            return Err(FsError::Invalid);
        }
        let purpose = if how.punch_hole { Purpose::Reclaim } else { Purpose::Grow };
        let mut plan = Plan::write(&[ino_domain(ino)], purpose).with_pages_of(ino);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = fallocate(&mut tx, ino, offset, end, how).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    /// The next data or hole at or after `offset`.
    pub async fn seek(&self, ino: u64, offset: u64, whence: Whence) -> Result<u64> {
        let dirty = self.domain(ino_domain(ino)).file(ino_local(ino), |f| f.dirty()).unwrap_or(false);
        if dirty {
            // Extents tell the truth only about what has been flushed.
            self.flush_file(ino).await?;
        }
        let mut plan = Plan::read(&[ino_domain(ino)]);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = seek(&mut tx, ino, offset, whence).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done.value);
            }
        }
    }
}

impl Txn<'_> {
    /// Sets the size of a regular file. Contents in memory have been flushed to this operation or are flushed now.
    pub async fn truncate(&mut self, ino: u64, size: u64) -> Result<()> {
        if size > SIZE_MAX {
            return Err(FsError::TooBig);
        }
        self.flush_contents(ino).await?;
        let mut inode = self.inode(ino).await?;
        match (inode.is_file(), inode.is_dir()) {
            (true, _) => {}
            (_, true) => return Err(FsError::IsDir),
            _ => return Err(FsError::Invalid),
        }
        if size < inode.size {
            self.shrink(ino, &mut inode, size).await?;
        } else {
            let pages = self.pages_of_growth(ino, &inode, size).await?;
            inode.size = size;
            self.store_pages(ino, &mut inode, pages).await?;
        }
        let now = self.vol.now();
        inode.mtime = later(now, inode.mtime);
        inode.ctime = later(now, inode.ctime);
        self.put_inode(ino, &inode).await
    }

    async fn shrink(&mut self, ino: u64, inode: &mut Inode, size: u64) -> Result<()> {
        let (id, local) = (ino_domain(ino), ino_local(ino));
        if inode.is_inline() {
            let key = Key::new(local, Kind::Inline, 0);
            let mut contents = self.get(id, &key).await?.unwrap_or_default();
            contents.truncate(size as usize);
            self.put(id, &key, &contents).await?;
        } else {
            let freed = self.punch(ino, size.div_ceil(PAGE), u64::MAX / PAGE).await?;
            inode.blocks = inode.blocks.saturating_sub(freed);
        }
        inode.size = size;
        let domain = self.domain(id, Mode::Exclusive)?.clone();
        self.on_install(move || domain.with_file(local, |f| f.pages.retain(|n, _| *n < size.div_ceil(PAGE))));
        Ok(())
    }

    /// Inline contents move to a block of their own.
    async fn leave_tree(&mut self, ino: u64, inode: &mut Inode) -> Result<()> {
        if !inode.is_inline() {
            return Ok(());
        }
        let page = self.load_page(ino, inode, 0).await?;
        self.del(ino_domain(ino), &Key::new(ino_local(ino), Kind::Inline, 0)).await?;
        inode.flags &= !FLAG_INLINE;
        if inode.size > 0 {
            let block = self.take_blocks(1, None, Purpose::Commit)?.start;
            let item = ExtentItem { start: block, len: 1, unwritten: true };
            self.map(ino, Mapped { at: 0, item }).await?;
            inode.blocks += 1;
            self.store_pages(ino, inode, Pages::from([(0, page.into())])).await?;
        }
        Ok(())
    }

    /// Writes zeros to bytes `from..to`, which lie in one page, if the page has a block.
    async fn zero_part(&mut self, ino: u64, inode: &mut Inode, from: u64, to: u64) -> Result<Pages> {
        let page = from / PAGE;
        if from >= to || self.extents(ino, page, page + 1).await?.is_empty() {
            return Ok(Pages::new());
        }
        let mut buf = self.load_page(ino, inode, page).await?;
        buf[(from - page * PAGE) as usize..(to - page * PAGE) as usize].fill(0);
        Ok(Pages::from([(page, buf.into())]))
    }
}

async fn fallocate(tx: &mut Txn<'_>, ino: u64, offset: u64, end: u64, how: Fallocate) -> Result<()> {
    tx.flush_contents(ino).await?;
    let mut inode = tx.inode(ino).await?;
    if !inode.is_file() {
        return Err(FsError::Invalid);
    }
    let new_size = if how.keep_size { inode.size } else { inode.size.max(end) };
    let stays_inline = inode.is_inline() && how.punch_hole && inode.size <= INLINE_MAX as u64;
    if stays_inline {
        punch_inline(tx, ino, offset, end).await?;
    } else {
        tx.leave_tree(ino, &mut inode).await?;
        let zeroed = if how.punch_hole || how.zero_range {
            punch_range(tx, ino, &mut inode, offset, end).await?
        } else {
            Pages::new()
        };
        if !how.punch_hole {
            allocate(tx, ino, &mut inode, offset / PAGE, end.div_ceil(PAGE)).await?;
        }
        // Of a page that is due for both reasons, the zeroed one holds: growth would read it as it was before.
        let mut pages = tx.pages_of_growth(ino, &inode, new_size).await?;
        pages.extend(zeroed);
        inode.size = new_size;
        tx.store_pages(ino, &mut inode, pages).await?;
    }
    let now = tx.vol.now();
    inode.mtime = later(now, inode.mtime);
    inode.ctime = later(now, inode.ctime);
    tx.put_inode(ino, &inode).await
}

async fn punch_inline(tx: &mut Txn<'_>, ino: u64, offset: u64, end: u64) -> Result<()> {
    let key = Key::new(ino_local(ino), Kind::Inline, 0);
    let mut contents = tx.get(ino_domain(ino), &key).await?.unwrap_or_default();
    // Growth leaves the end of the contents unwritten: it reads as zeros.
    let stored = contents.len() as u64;
    let (from, to) = (offset.min(stored) as usize, end.min(stored) as usize);
    if let Some(part) = contents.get_mut(from..to) {
        part.fill(0);
    }
    tx.put(ino_domain(ino), &key, &contents).await
}

/// Whole pages lose their blocks; the ragged ends, with zeros, are returned.
async fn punch_range(tx: &mut Txn<'_>, ino: u64, inode: &mut Inode, offset: u64, end: u64) -> Result<Pages> {
    let (first, last) = (offset.div_ceil(PAGE), end / PAGE);
    if first < last {
        let freed = tx.punch(ino, first, last).await?;
        inode.blocks = inode.blocks.saturating_sub(freed);
        let domain = tx.domain(ino_domain(ino), Mode::Exclusive)?.clone();
        let local = ino_local(ino);
        tx.on_install(move || domain.with_file(local, |f| f.pages.retain(|n, _| !(first..last).contains(n))));
    }
    let end = end.min(inode.size);
    let mut pages = Pages::new();
    if first > last {
        pages.extend(tx.zero_part(ino, inode, offset, end).await?);
    } else {
        pages.extend(tx.zero_part(ino, inode, offset, (first * PAGE).min(end)).await?);
        pages.extend(tx.zero_part(ino, inode, last * PAGE, end).await?);
    }
    Ok(pages)
}

/// Gives holes between two pages blocks that read as zeros.
async fn allocate(tx: &mut Txn<'_>, ino: u64, inode: &mut Inode, from: u64, to: u64) -> Result<()> {
    let mut at = from;
    let existing = tx.extents(ino, from, to).await?;
    for (hole_end, next) in existing.iter().map(|m| (m.at.min(to), m.end())).chain([(to, to)]) {
        while at < hole_end {
            let e = tx.take_blocks(hole_end - at, None, Purpose::Grow)?;
            let item = ExtentItem { start: e.start, len: e.len as u32, unwritten: true };
            tx.map(ino, Mapped { at, item }).await?;
            inode.blocks += e.len;
            at += e.len;
        }
        at = at.max(next);
    }
    Ok(())
}

async fn seek(tx: &mut Txn<'_>, ino: u64, offset: u64, whence: Whence) -> Result<u64> {
    let inode = tx.live_inode(ino).await?;
    if offset >= inode.size {
        return Err(FsError::NoSuchOffset);
    }
    if inode.is_inline() {
        return Ok(if whence == Whence::Data { offset } else { inode.size });
    }
    let mut hole = offset;
    for m in tx.extents(ino, offset / PAGE, inode.size.div_ceil(PAGE)).await? {
        if m.item.unwritten {
            continue;
        }
        match whence {
            Whence::Data => return Ok(offset.max(m.at * PAGE)),
            Whence::Hole if m.at * PAGE > hole => break,
            Whence::Hole => hole = hole.max(m.end() * PAGE),
        }
    }
    match whence {
        Whence::Data => Err(FsError::NoSuchOffset),
        Whence::Hole => Ok(hole.min(inode.size)),
    }
}
