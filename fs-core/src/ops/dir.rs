//! Looking names up and listing directories.

use std::collections::BTreeSet;

use cluster::{LockId, Mode};

use super::entry::{NAME_MAX, check_name};
use crate::error::{FsError, Result};
use crate::format::item::{Dirent, INDEX_MAX, INODE_SIZE, Inode, Key, Kind, ino_domain, ino_local};
use crate::txn::{Plan, Txn};
use crate::types::{Attr, DirEntry};
use crate::volume::{Leased, Volume};

/// A listing with attributes reads the whole tree in bulk if the directory has more entries than this.
const BULK_ENTRIES: u64 = 64;

impl Volume {
    /// `None`: there is no such name (may be cached as such).
    pub async fn lookup(&self, parent: u64, name: &[u8]) -> Result<Leased<Option<Attr>>> {
        if name.len() > NAME_MAX {
            return Err(FsError::NameTooLong);
        }
        let mut plan = Plan::read(&[ino_domain(parent)]);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = lookup(&mut tx, parent, name).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    /// Up to `max` entries behind cookie `after` (0: from the start). "." and ".." are not among them.
    pub async fn readdir(&self, ino: u64, after: u64, max: usize, plus: bool) -> Result<Leased<Vec<DirEntry>>> {
        let mut plan = Plan::read(&[ino_domain(ino)]);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = readdir(&mut tx, ino, after, max, plus).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    /// The parent of a directory (for "..").
    pub async fn parent(&self, ino: u64) -> Result<u64> {
        let mut plan = Plan::read(&[ino_domain(ino)]);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = tx.directory(ino).await.map(|i| i.parent);
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done.value);
            }
        }
    }
}

async fn lookup(tx: &mut Txn<'_>, parent: u64, name: &[u8]) -> Result<Option<Attr>> {
    check_name(name)?;
    tx.directory(parent).await?;
    let Some(found) = tx.find(parent, name).await? else { return Ok(None) };
    let ino = found.entry.ino;
    tx.domain(ino_domain(ino), Mode::Shared)?;
    Ok(Some(Attr { ino, inode: tx.live_inode(ino).await? }))
}

async fn readdir(tx: &mut Txn<'_>, ino: u64, after: u64, max: usize, plus: bool) -> Result<Vec<DirEntry>> {
    let id = ino_domain(ino);
    let inode = tx.inode(ino).await?;
    if !inode.is_dir() {
        return Err(FsError::NotDir);
    }
    // Cookies of names start above INDEX_MAX: the smaller ones are the kernel's "." and "..".
    let from = Key::new(ino_local(ino), Kind::Dirent, after.saturating_add(1).max(INDEX_MAX + 1));
    let to = Key::new(ino_local(ino), Kind::Dirent, u64::MAX);
    if after <= INDEX_MAX && inode.size > BULK_ENTRIES {
        tx.warm(id, &if plus { Key::MIN } else { from }, &if plus { Key::MAX } else { to }).await?;
    }
    let mut entries = Vec::new();
    for (key, value) in tx.scan(id, from, to, max).await? {
        let e = Dirent::decode(&value).map_err(|e| FsError::format(LockId::Domain(id), e))?;
        entries.push(DirEntry { ino: e.ino, file_type: e.file_type, name: e.name, cookie: key.offset, attr: None });
    }
    if plus {
        add_attributes(tx, id, &mut entries).await?;
    }
    Ok(entries)
}

/// Attributes of the entries whose inodes live in the listed domain; those of others would cost a lock each.
async fn add_attributes(tx: &mut Txn<'_>, id: u32, entries: &mut [DirEntry]) -> Result<()> {
    let own: BTreeSet<u64> = entries.iter().map(|e| e.ino).filter(|i| ino_domain(*i) == id).collect();
    for e in entries.iter_mut().filter(|e| own.contains(&e.ino)) {
        let key = Key::new(ino_local(e.ino), Kind::Inode, 0);
        let Some(item) = tx.get(id, &key).await?.filter(|i| i.len() == INODE_SIZE) else { continue };
        let mut inode = Inode::decode(&item).map_err(|e| FsError::format(LockId::Domain(id), e))?;
        tx.domain(id, Mode::Shared)?.overlay(ino_local(e.ino), &mut inode);
        e.attr = Some(Attr { ino: e.ino, inode });
    }
    Ok(())
}
