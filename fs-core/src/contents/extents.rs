//! The extents of a file in its domain's tree.

use cluster::LockId;

use crate::error::{FsError, Result};
use crate::format::item::{ExtentItem, Key, Kind, ino_domain, ino_local};
use crate::format::layout::Extent;
use crate::txn::Txn;

/// An extent at its place in the file, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    pub at: u64,
    pub item: ExtentItem,
}

impl Mapped {
    pub fn end(&self) -> u64 {
        self.at + u64::from(self.item.len)
    }

    /// The part between two pages; the range must overlap.
    pub fn clip(&self, from: u64, to: u64) -> Mapped {
        let (at, end) = (self.at.max(from), self.end().min(to));
        let item = ExtentItem { start: self.item.start + (at - self.at), len: (end - at) as u32, ..self.item };
        Mapped { at, item }
    }
}

/// Extents that one scan gives at most.
const SCAN: usize = 512;

impl Txn<'_> {
    /// The extents that overlap pages `from..to`, ascending.
    pub async fn extents(&mut self, ino: u64, from: u64, to: u64) -> Result<Vec<Mapped>> {
        let (id, local) = (ino_domain(ino), ino_local(ino));
        let mut found = Vec::new();
        if let Some((key, value)) = self.last_at_or_before(id, &Key::new(local, Kind::Extent, from)).await?
            && key.object == local
            && key.kind == Kind::Extent as u8
        {
            let m = mapped(id, &key, &value)?;
            if m.end() > from {
                found.push(m);
            }
        }
        let mut next = found.last().map_or(from, Mapped::end);
        while next < to {
            let last = Key::new(local, Kind::Extent, to - 1);
            let items = self.scan(id, Key::new(local, Kind::Extent, next), last, SCAN).await?;
            let more = items.len() == SCAN;
            for (key, value) in items {
                let m = mapped(id, &key, &value)?;
                if m.at < next {
                    return Err(FsError::damaged(LockId::Domain(id), format!("extents of inode {ino:#x} overlap")));
                }
                next = m.end();
                found.push(m);
            }
            if !more {
                break;
            }
        }
        Ok(found)
    }

    /// Maps pages that are a hole so far; grows the extent before if the blocks follow on.
    pub async fn map(&mut self, ino: u64, new: Mapped) -> Result<()> {
        let (id, local) = (ino_domain(ino), ino_local(ino));
        if new.at > 0
            && let Some(before) = self.extents(ino, new.at - 1, new.at).await?.pop()
            && let Some(len) = self.joined(&before, &new)
        {
            let item = ExtentItem { len, ..before.item };
            return self.put(id, &Key::new(local, Kind::Extent, before.at), &item.encode()).await;
        }
        self.put(id, &Key::new(local, Kind::Extent, new.at), &new.item.encode()).await
    }

    /// Length of both as one extent, if they can be one: an extent stays within a group.
    fn joined(&self, a: &Mapped, b: &Mapped) -> Option<u32> {
        let follows = a.end() == b.at && a.item.start + u64::from(a.item.len) == b.item.start;
        let alike = a.item.unwritten == b.item.unwritten;
        let same_group = self.vol.layout().group_of(a.item.start) == self.vol.layout().group_of(b.item.start);
        (follows && alike && same_group).then(|| a.item.len.checked_add(b.item.len)).flatten()
    }

    /// Takes pages `from..to` out of the mapping and returns what was mapped there.
    pub async fn unmap(&mut self, ino: u64, from: u64, to: u64) -> Result<Vec<Mapped>> {
        let (id, local) = (ino_domain(ino), ino_local(ino));
        let mut out = Vec::new();
        self.forget_tail(ino, from, to);
        for m in self.extents(ino, from, to).await? {
            self.del(id, &Key::new(local, Kind::Extent, m.at)).await?;
            for keep in [(m.at, from), (to, m.end())] {
                if keep.0 < keep.1 && keep.0.max(m.at) < keep.1.min(m.end()) {
                    let part = m.clip(keep.0, keep.1);
                    self.put(id, &Key::new(local, Kind::Extent, part.at), &part.item.encode()).await?;
                }
            }
            out.push(m.clip(from, to));
        }
        Ok(out)
    }

    /// Unmaps pages and frees their blocks; returns how many.
    pub async fn punch(&mut self, ino: u64, from: u64, to: u64) -> Result<u64> {
        let mut freed = 0;
        for m in self.unmap(ino, from, to).await? {
            let len = u64::from(m.item.len);
            self.free_blocks(Extent::new(m.item.start, len)).await?;
            freed += len;
        }
        Ok(freed)
    }
}

fn mapped(id: u32, key: &Key, value: &[u8]) -> Result<Mapped> {
    let item = ExtentItem::decode(value).map_err(|e| FsError::format(LockId::Domain(id), e))?;
    Ok(Mapped { at: key.offset, item })
}
