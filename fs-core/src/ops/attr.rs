//! Attributes of inodes, opening and closing, symlinks' targets.

use std::future::poll_fn;
use std::sync::atomic::Ordering;
use std::task::Poll;

use cluster::{LockId, Mode};

use super::entry::later;
use crate::acl;
use crate::alloc::Purpose;
use crate::domain::without_suid;
use crate::error::{FsError, Result};
use crate::format::item::{Key, Kind, ino_domain, ino_local};
use crate::txn::{Plan, Txn};
use crate::types::{Attr, SetAttr, SetTime};
use crate::volume::{Leased, Volume};

impl Volume {
    pub async fn getattr(&self, ino: u64) -> Result<Leased<Attr>> {
        let mut plan = Plan::read(&[ino_domain(ino)]);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = tx.live_inode(ino).await.map(|inode| Attr { ino, inode });
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    pub async fn setattr(&self, ino: u64, set: SetAttr) -> Result<Leased<Attr>> {
        let purpose = if set.size.is_some() { Purpose::Reclaim } else { Purpose::Commit };
        let mut plan = Plan::write(&[ino_domain(ino)], purpose);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = setattr(&mut tx, ino, &set).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    pub async fn readlink(&self, ino: u64) -> Result<Leased<Vec<u8>>> {
        let mut plan = Plan::read(&[ino_domain(ino)]);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = readlink(&mut tx, ino).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    /// Counts an open file.
    pub async fn open(&self, ino: u64) -> Result<Leased<()>> {
        let mut plan = Plan::read(&[ino_domain(ino)]);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = open(&mut tx, ino).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    /// Ends one open. What has no name any more is freed in the background.
    pub async fn release(&self, ino: u64) {
        let domain = self.domain(ino_domain(ino));
        let last = domain.with_file(ino_local(ino), |f| {
            f.opens = f.opens.saturating_sub(1);
            f.opens == 0
        });
        if !last || self.read_only {
            return;
        }
        let flagged = *domain.open_flagged.lock() && !domain.has_opens();
        if let Some(volume) = self.me.upgrade() {
            // Mostly there is nothing to do, and no other thread need be woken to find that out.
            let guard = self.closing.clone().read_owned().await;
            let mut closing = Box::pin(async move {
                volume.closed(ino, flagged).await;
                drop(guard);
            });
            if poll_fn(|cx| Poll::Ready(closing.as_mut().poll(cx))).await.is_pending() {
                tokio::spawn(closing);
            }
        }
    }

    /// After the last close of a file here: frees it if it is an orphan; tells the cluster that nothing is open any more.
    async fn closed(&self, ino: u64, flagged: bool) {
        let id = ino_domain(ino);
        let held = self.domain(id).hold.grant().is_some();
        if !held && !flagged {
            return;
        }
        let mut plan = Plan::read(&[id]);
        let orphans = loop {
            let Ok(mut tx) = self.begin(&plan).await else { return };
            let r = tx.header(id).await.map(|h| h.orphans);
            match self.finish(tx, r, &mut plan).await {
                Ok(Some(done)) => break done.value,
                Ok(None) => {}
                Err(_) => return,
            }
        };
        if orphans > 0
            && let Err(e) = self.reclaim_orphans(id).await
        {
            tracing::debug!(node = %self.node(), domain = id, "unnamed files stay for now: {e}");
        }
    }

    /// Contents in memory that nobody needs any more: bookkeeping.
    pub(crate) fn contents_gone(&self, pages: usize, reserved: u64) {
        self.dirty_bytes.fetch_sub(pages * crate::domain::PAGE as usize, Ordering::Relaxed);
        self.alloc.unreserve(reserved);
    }
}

async fn setattr(tx: &mut Txn<'_>, ino: u64, set: &SetAttr) -> Result<Attr> {
    let odd = |t: Option<SetTime>| matches!(t, Some(SetTime::To(t)) if t.nanos >= 1_000_000_000);
    if odd(set.atime) || odd(set.mtime) {
        return Err(FsError::Invalid);
    }
    tx.need_write(&[ino])?;
    tx.flush_contents(ino).await?;
    if let Some(size) = set.size {
        tx.truncate(ino, size).await?;
    }
    let mut inode = tx.inode(ino).await?;
    let now = tx.vol.now();
    if let Some(mode) = set.mode {
        inode.mode = (inode.mode & !0o7777) | (mode & 0o7777);
        acl::chmod(tx, ino, inode.mode).await?;
    }
    if let Some(uid) = set.uid {
        inode.uid = uid;
    }
    if let Some(gid) = set.gid {
        inode.gid = gid;
    }
    if set.kill_suid {
        inode.mode = without_suid(inode.mode);
    }
    let time = |t: SetTime| match t {
        SetTime::Now => now,
        SetTime::To(t) => t,
    };
    if let Some(t) = set.atime {
        inode.atime = time(t);
    }
    if let Some(t) = set.mtime {
        inode.mtime = time(t);
    }
    inode.ctime = later(now, inode.ctime);
    tx.put_inode(ino, &inode).await?;
    Ok(Attr { ino, inode })
}

async fn readlink(tx: &mut Txn<'_>, ino: u64) -> Result<Vec<u8>> {
    let inode = tx.inode(ino).await?;
    if !inode.is_symlink() {
        return Err(FsError::Invalid);
    }
    let (id, local) = (ino_domain(ino), ino_local(ino));
    let pieces = tx.scan(id, Key::new(local, Kind::Inline, 0), Key::new(local, Kind::Inline, u64::MAX), 16).await?;
    let target: Vec<u8> = pieces.into_iter().flat_map(|(_, v)| v).collect();
    if target.len() as u64 != inode.size {
        return Err(FsError::damaged(LockId::Domain(id), format!("symlink {ino:#x} has lost its target")));
    }
    Ok(target)
}

async fn open(tx: &mut Txn<'_>, ino: u64) -> Result<()> {
    tx.inode(ino).await?;
    let domain = tx.domain(ino_domain(ino), Mode::Shared)?.clone();
    tx.on_install(move || domain.with_file(ino_local(ino), |f| f.opens += 1));
    Ok(())
}
