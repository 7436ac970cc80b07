//! Removing names, and what has no name any more: inodes, unnamed open files, domains.

use std::sync::Arc;

use cluster::{LockId, LockValue, Mode, Release, Tenure};

use super::entry::{check_name, later};
use crate::alloc::Purpose;
use crate::domain::Domain;
use crate::error::{FsError, Result};
use crate::format::item::{ExtentItem, INDEX_MAX, Inode, Key, Kind, ino, ino_domain, ino_local};
use crate::format::layout::{Extent, FIRST_SLOT_DOMAIN, ROOT_DOMAIN};
use crate::txn::{Plan, Txn};
use crate::volume::{Leased, Volume};

/// Items of one inode that one operation removes; a larger file becomes an orphan and goes in steps.
const ITEMS_AT_ONCE: usize = 256;

impl Volume {
    pub async fn unlink(&self, parent: u64, name: &[u8]) -> Result<Leased<()>> {
        check_name(name)?;
        let mut plan = Plan::write(&[ino_domain(parent)], Purpose::Reclaim);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = unlink(&mut tx, parent, name).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    pub async fn rmdir(&self, parent: u64, name: &[u8]) -> Result<Leased<()>> {
        check_name(name)?;
        let mut plan = Plan::write(&[ino_domain(parent)], Purpose::Reclaim);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = rmdir(&mut tx, parent, name).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    /// Frees the unnamed files of a domain that nobody has open, in steps.
    pub(crate) async fn reclaim_orphans(&self, id: u32) -> Result<()> {
        let mut after = 0;
        loop {
            let mut plan = Plan::write(&[id], Purpose::Reclaim);
            let more = loop {
                let mut tx = self.begin(&plan).await?;
                let r = reclaim_one(&mut tx, id, after).await;
                if let Some(done) = self.finish(tx, r, &mut plan).await? {
                    break done.value;
                }
            };
            match more {
                Some(next) => after = next,
                None => return Ok(()),
            }
        }
    }

    /// The lock block of a domain that is not used any more; its number can be taken again afterwards. It was freed under `tenure` of
    /// its group.
    pub(crate) async fn give_back_domain(&self, domain: &Arc<Domain>, next_local: Option<u64>, tenure: Option<Tenure>) {
        let _turn = domain.hold.turn.lock().await;
        domain.hold.begin_giving_up();
        domain.hold.serve_uncached().await;
        while domain.hold.block_or_touched().is_some() {}
        domain.hold.drained().await;
        // With all its blocks freed nothing in the journal is under this lock. The lock block must not forget where the
        // domain lies before its removal is durable (I11).
        if self.commit().await.is_err() {
            return;
        }
        if let Err(e) = self.journal.settle(domain.lock_id()).await {
            self.journal_failed(e);
            return;
        }
        let value = next_local.map(|next_local| LockValue { root: 0, next_local, version: 0 });
        let given = self.node.release(domain.lock_id(), Release { to: None, value, open: false, cleaned: true }).await;
        if let Err(e) = given {
            tracing::error!(node = %self.node(), lock = %domain.lock_id(), "cannot give up the lock of a freed domain: {e}");
            return;
        }
        self.store.forget(domain.lock_id());
        domain.locks.forget();
        domain.hold.lowered(None);
        while domain.hold.next_target().is_some() {}
        self.alloc.lock().domain_reusable(domain.id, tenure);
    }
}

async fn unlink(tx: &mut Txn<'_>, parent: u64, name: &[u8]) -> Result<()> {
    tx.directory(parent).await?;
    let found = tx.find(parent, name).await?.ok_or(FsError::NotFound)?;
    let target = found.entry.ino;
    tx.need_write(&[target])?;
    if tx.inode(target).await?.is_dir() {
        return Err(FsError::IsDir);
    }
    tx.del_entry(parent, &found).await?;
    tx.dir_changed(parent, -1, 0).await?;
    tx.drop_link(target).await
}

async fn rmdir(tx: &mut Txn<'_>, parent: u64, name: &[u8]) -> Result<()> {
    tx.directory(parent).await?;
    let found = tx.find(parent, name).await?.ok_or(FsError::NotFound)?;
    let target = found.entry.ino;
    tx.need_write(&[target])?;
    tx.check_empty_dir(target).await?;
    tx.del_entry(parent, &found).await?;
    tx.dir_changed(parent, -1, -1).await?;
    tx.drop_dir(target).await
}

/// Handles the first orphan behind `after`; returns where to go on.
async fn reclaim_one(tx: &mut Txn<'_>, id: u32, after: u64) -> Result<Option<u64>> {
    let from = Key::new(0, Kind::Orphan, after.saturating_add(1));
    let Some((key, _)) = tx.scan(id, from, Key::new(0, Kind::Orphan, u64::MAX), 1).await?.pop() else {
        return Ok(None);
    };
    let number = ino(id, key.offset);
    if tx.is_open(number)? {
        return Ok(Some(key.offset));
    }
    let inode = tx.inode(number).await?;
    match tx.free_inode(number, inode).await? {
        true => {
            tx.remove_orphan(number).await?;
            tx.drop_domain_if_empty(id).await?;
            Ok(Some(key.offset))
        }
        // More of it is left for another step.
        false => Ok(Some(after)),
    }
}

impl Txn<'_> {
    /// Whether any node has the inode open, as far as this node must assume.
    pub fn is_open(&self, number: u64) -> Result<bool> {
        let domain = self.domain(ino_domain(number), Mode::Exclusive)?;
        let elsewhere = domain.hold.grant().is_some_and(|g| g.open_elsewhere);
        Ok(elsewhere || domain.file(ino_local(number), |f| f.opens > 0).unwrap_or(false))
    }

    pub async fn check_empty_dir(&mut self, dir: u64) -> Result<()> {
        let inode = self.inode(dir).await?;
        if !inode.is_dir() {
            return Err(FsError::NotDir);
        }
        let local = ino_local(dir);
        let names = (Key::new(local, Kind::Dirent, INDEX_MAX + 1), Key::new(local, Kind::Dirent, u64::MAX));
        match self.scan(ino_domain(dir), names.0, names.1, 1).await?.is_empty() {
            true => Ok(()),
            false => Err(FsError::NotEmpty),
        }
    }

    /// A name of the file is gone; the last one takes the file with it unless it is open.
    pub async fn drop_link(&mut self, number: u64) -> Result<()> {
        if self.inode(number).await?.links > 1 || self.is_open(number)? {
            self.flush_contents(number).await?;
        }
        let mut inode = self.inode(number).await?;
        inode.links = inode.links.saturating_sub(1);
        inode.ctime = later(self.vol.now(), inode.ctime);
        if inode.links > 0 {
            return self.put_inode(number, &inode).await;
        }
        if self.is_open(number)? {
            self.put_inode(number, &inode).await?;
            return self.add_orphan(number).await;
        }
        if !self.free_inode(number, inode).await? {
            self.add_orphan(number).await?;
            self.reclaim_soon(ino_domain(number));
            return Ok(());
        }
        self.drop_domain_if_empty(ino_domain(number)).await
    }

    /// What one operation cannot remove goes in steps, in the background.
    fn reclaim_soon(&mut self, id: u32) {
        let vol = self.vol.me.clone();
        self.on_install(move || {
            let Some(vol) = vol.upgrade() else { return };
            tokio::spawn(async move {
                if let Err(e) = vol.reclaim_orphans(id).await
                    && !e.is_leaving()
                {
                    tracing::warn!(node = %vol.node(), domain = id, "an unlinked file stays for now: {e}");
                }
            });
        });
    }

    /// An empty directory lost its name.
    pub async fn drop_dir(&mut self, number: u64) -> Result<()> {
        let mut inode = self.inode(number).await?;
        if self.is_open(number)? {
            inode.links = 0;
            self.put_inode(number, &inode).await?;
            return self.add_orphan(number).await;
        }
        self.free_inode(number, inode).await?;
        self.drop_domain_if_empty(ino_domain(number)).await
    }

    /// Removes an inode's items and frees its blocks; false: some are left, and the inode with them.
    pub async fn free_inode(&mut self, number: u64, inode: Inode) -> Result<bool> {
        let (id, local) = (ino_domain(number), ino_local(number));
        let (from, to) = (Key { object: local, ..Key::MIN }, Key { object: local, ..Key::MAX });
        let items = self.del_range(id, from, to, ITEMS_AT_ONCE).await?;
        let mut inode = inode;
        for (key, value) in &items {
            if key.kind == Kind::Extent as u8 {
                let e = ExtentItem::decode(value).map_err(|e| FsError::format(LockId::Domain(id), e))?;
                self.free_blocks(Extent::new(e.start, e.len.into())).await?;
                inode.blocks = inode.blocks.saturating_sub(e.len.into());
            }
        }
        self.forget_contents(number)?;
        if items.len() == ITEMS_AT_ONCE {
            inode.links = 0;
            self.put_inode(number, &inode).await?;
            return Ok(false);
        }
        let header = self.header(id).await?;
        header.inodes = header.inodes.saturating_sub(1);
        Ok(true)
    }

    /// Contents in memory go with the inode.
    fn forget_contents(&mut self, number: u64) -> Result<()> {
        let domain = self.domain(ino_domain(number), Mode::Exclusive)?.clone();
        let (local, vol) = (ino_local(number), self.vol.me.clone());
        self.on_install(move || {
            let dropped = domain.with_file(local, |f| {
                f.live = None;
                let pages = f.pages.values().filter(|p| p.record.is_none()).count();
                f.pages.clear();
                (pages, std::mem::take(&mut f.reserved))
            });
            if let Some(vol) = vol.upgrade() {
                vol.contents_gone(dropped.0, dropped.1);
            }
        });
        Ok(())
    }

    pub async fn add_orphan(&mut self, number: u64) -> Result<()> {
        let id = ino_domain(number);
        self.put(id, &Key::new(0, Kind::Orphan, ino_local(number)), &[]).await?;
        self.header(id).await?.orphans += 1;
        self.note_unnamed(id).await
    }

    pub async fn remove_orphan(&mut self, number: u64) -> Result<()> {
        let id = ino_domain(number);
        if self.del(id, &Key::new(0, Kind::Orphan, ino_local(number))).await?.is_some() {
            let header = self.header(id).await?;
            header.orphans = header.orphans.saturating_sub(1);
        }
        Ok(())
    }

    /// A directory's domain lives until its last inode is gone; some may have moved elsewhere by rename.
    pub async fn drop_domain_if_empty(&mut self, id: u32) -> Result<()> {
        let fixed = id <= ROOT_DOMAIN || id < FIRST_SLOT_DOMAIN + u32::from(self.vol.layout().nodes);
        let header = *self.header(id).await?;
        if fixed || header.inodes > 0 || header.orphans > 0 {
            return Ok(());
        }
        let group = self.vol.layout().group_of_domain(id);
        if !self.hold_group(group) {
            return Err(FsError::NeedGroup(group));
        }
        let nodes = self.tree_nodes(id).await?;
        let Some((block, header)) = self.drop_header(id) else { return Err(FsError::NeedDomain(id)) };
        for n in nodes.into_iter().chain([block]) {
            self.revoke(n);
            self.free_blocks(Extent::new(n, 1)).await?;
        }
        if header.reserve_len > 0 {
            self.free_blocks(Extent::new(header.reserve_next, header.reserve_len.into())).await?;
        }
        self.free_domain_number(id);
        let domain = self.domain(id, Mode::Exclusive)?.clone();
        let vol = self.vol.me.clone();
        self.on_install(move || {
            domain.hold.emptied();
            let Some(vol) = vol.upgrade() else { return };
            let tenure = vol.alloc.lock().tenure_of_domain(id);
            tokio::spawn(async move { vol.give_back_domain(&domain, Some(header.next_local), tenure).await });
        });
        Ok(())
    }
}
