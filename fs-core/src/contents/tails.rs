//! The ends of files that this node wrote lately: who appends to a file, an mbox say, needs what its last block has already.

use std::num::NonZeroUsize;
use std::sync::Arc;

use blockdev::AlignedBuf;
use cluster::{Mode, Tenure};
use lru::LruCache;
use parking_lot::Mutex;

use super::flush::Pages;
use crate::domain::PAGE;
use crate::error::Result;
use crate::format::item::{Inode, ino_domain};
use crate::txn::Txn;

/// Files of which it is kept: a page each.
const FILES: NonZeroUsize = NonZeroUsize::MIN.saturating_add(255);

/// The page that a file ended in when it was last written, not in full.
struct Tail {
    page: u64,
    /// Of the file's domain, held exclusively: under another one, other nodes may have written since (I1).
    tenure: Tenure,
    buf: Arc<AlignedBuf>,
}

/// By inode number.
pub struct Tails(Mutex<LruCache<u64, Tail>>);

impl Default for Tails {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(FILES)))
    }
}

impl Txn<'_> {
    /// Pages of a file are stored, which has the size that `inode` says from now on. Its last one is kept.
    pub(super) fn keep_tail(&mut self, ino: u64, inode: &Inode, stored: &Pages) -> Result<()> {
        let (page, tenure) = (inode.size / PAGE, self.tenure(ino_domain(ino))?);
        let last = stored.get(&page).filter(|_| !inode.size.is_multiple_of(PAGE)).cloned();
        let stored: Vec<u64> = stored.keys().copied().collect();
        let tails = self.vol.tails.clone();
        self.on_install(move || {
            let mut tails = tails.0.lock();
            if let Some(buf) = last {
                tails.put(ino, Tail { page, tenure, buf });
            } else if tails.peek(&ino).is_some_and(|t| stored.contains(&t.page)) {
                tails.pop(&ino);
            }
        });
        Ok(())
    }

    /// Pages `from..to` of a file are taken from it.
    pub(super) fn forget_tail(&mut self, ino: u64, from: u64, to: u64) {
        let tails = self.vol.tails.clone();
        self.on_install(move || {
            let mut tails = tails.0.lock();
            if tails.peek(&ino).is_some_and(|t| (from..to).contains(&t.page)) {
                tails.pop(&ino);
            }
        });
    }

    /// A page as it was last stored, if it is kept.
    pub(super) fn kept_tail(&self, ino: u64, page: u64) -> Result<Option<Arc<AlignedBuf>>> {
        let domain = self.domain(ino_domain(ino), Mode::Shared)?;
        let grant = domain.hold.grant().filter(|g| g.mode == Mode::Exclusive);
        let mut tails = self.vol.tails.0.lock();
        let kept = tails.get(&ino).filter(|t| t.page == page && grant.is_some_and(|g| g.tenure == t.tenure));
        Ok(kept.map(|t| t.buf.clone()))
    }
}
