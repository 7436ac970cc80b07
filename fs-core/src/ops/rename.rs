//! Renaming: within a directory, between directories and domains, replacing or exchanging.

use std::collections::BTreeSet;

use cluster::Mode;

use super::entry::{Found, check_name, later};
use crate::alloc::Purpose;
use crate::error::{FsError, Result};
use crate::format::item::{Inode, ino_domain};
use crate::format::layout::ROOT_DOMAIN;
use crate::txn::{Plan, Txn};
use crate::types::Rename;
use crate::volume::{Leased, ROOT_INO, Volume};

impl Volume {
    pub async fn rename(&self, from: u64, name: &[u8], to: u64, new_name: &[u8], how: Rename) -> Result<Leased<()>> {
        check_name(name)?;
        check_name(new_name)?;
        let mut plan = Plan::write(&[ino_domain(from), ino_domain(to)], Purpose::Commit);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = rename(&mut tx, from, name, to, new_name, how).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                let ino = done.value;
                return Ok(self.named(ino, done.map(|_| ())));
            }
        }
    }
}

struct Moving {
    found: Found,
    inode: Inode,
}

async fn moving(tx: &mut Txn<'_>, dir: u64, name: &[u8]) -> Result<Option<Moving>> {
    let Some(found) = tx.find(dir, name).await? else { return Ok(None) };
    tx.need_write(&[found.entry.ino])?;
    let inode = tx.inode(found.entry.ino).await?;
    Ok(Some(Moving { found, inode }))
}

/// Returns whom the name meant.
async fn rename(tx: &mut Txn<'_>, from: u64, name: &[u8], to: u64, new_name: &[u8], how: Rename) -> Result<u64> {
    tx.directory(from).await?;
    tx.directory(to).await?;
    let source = moving(tx, from, name).await?.ok_or(FsError::NotFound)?;
    let target = moving(tx, to, new_name).await?;
    if from != to {
        check_no_loop(tx, &source, to).await?;
        if let (Rename::Exchange, Some(t)) = (how, &target) {
            check_no_loop(tx, t, from).await?;
        }
    }
    let ino = source.found.entry.ino;
    match (how, target) {
        (Rename::NoReplace, Some(_)) => Err(FsError::Exists),
        (Rename::Exchange, None) => Err(FsError::NotFound),
        (Rename::Exchange, Some(target)) => exchange(tx, from, source, to, target).await,
        (_, Some(target)) if target.found.entry.ino == source.found.entry.ino => Ok(()),
        (_, target) => replace(tx, from, source, to, new_name, target).await,
    }?;
    Ok(ino)
}

/// A directory must not move below itself. Moves of directories between directories take turns in the whole cluster, by
/// holding the root's domain: two that are each legal could make a loop together.
async fn check_no_loop(tx: &mut Txn<'_>, source: &Moving, to: u64) -> Result<()> {
    if !source.inode.is_dir() {
        return Ok(());
    }
    tx.domain(ROOT_DOMAIN, Mode::Exclusive)?;
    let (mut at, mut seen) = (to, BTreeSet::new());
    while at != ROOT_INO {
        if at == source.found.entry.ino || !seen.insert(at) {
            return Err(FsError::Invalid);
        }
        tx.domain(ino_domain(at), Mode::Shared)?;
        at = tx.directory(at).await?.parent;
    }
    Ok(())
}

async fn replace(
    tx: &mut Txn<'_>,
    from: u64,
    source: Moving,
    to: u64,
    new_name: &[u8],
    target: Option<Moving>,
) -> Result<()> {
    let is_dir = source.inode.is_dir();
    let moved = i64::from(is_dir);
    if let Some(t) = &target {
        match (is_dir, t.inode.is_dir()) {
            (true, false) => return Err(FsError::NotDir),
            (false, true) => return Err(FsError::IsDir),
            (true, true) => tx.check_empty_dir(t.found.entry.ino).await?,
            _ => {}
        }
    }
    tx.flush_contents(source.found.entry.ino).await?;
    tx.del_entry(from, &source.found).await?;
    match &target {
        Some(t) => tx.replace_entry(to, &t.found, source.found.entry.ino, source.inode.mode).await?,
        None => tx.add_entry(to, new_name, source.found.entry.ino, source.inode.mode).await?,
    }
    let replaced_dir = target.as_ref().map_or(0, |t| i64::from(t.inode.is_dir()));
    let added = i64::from(target.is_none());
    if from == to {
        tx.dir_changed(from, added - 1, -replaced_dir).await?;
    } else {
        tx.dir_changed(from, -1, -moved).await?;
        tx.dir_changed(to, added, moved - replaced_dir).await?;
    }
    settle_moved(tx, source.found.entry.ino, to).await?;
    match target {
        Some(t) if t.inode.is_dir() => tx.drop_dir(t.found.entry.ino).await,
        Some(t) => tx.drop_link(t.found.entry.ino).await,
        None => Ok(()),
    }
}

async fn exchange(tx: &mut Txn<'_>, from: u64, source: Moving, to: u64, target: Moving) -> Result<()> {
    if source.found.entry.ino == target.found.entry.ino {
        return Ok(());
    }
    tx.flush_contents(source.found.entry.ino).await?;
    tx.flush_contents(target.found.entry.ino).await?;
    tx.replace_entry(from, &source.found, target.found.entry.ino, target.inode.mode).await?;
    tx.replace_entry(to, &target.found, source.found.entry.ino, source.inode.mode).await?;
    if from == to {
        tx.dir_changed(from, 0, 0).await?;
    } else {
        let to_gains = i64::from(source.inode.is_dir()) - i64::from(target.inode.is_dir());
        tx.dir_changed(from, 0, -to_gains).await?;
        tx.dir_changed(to, 0, to_gains).await?;
    }
    settle_moved(tx, source.found.entry.ino, to).await?;
    settle_moved(tx, target.found.entry.ino, from).await
}

/// The moved inode: its ctime, and of a directory its parent.
async fn settle_moved(tx: &mut Txn<'_>, number: u64, dir: u64) -> Result<()> {
    let mut inode = tx.inode(number).await?;
    inode.ctime = later(tx.vol.now(), inode.ctime);
    if inode.is_dir() {
        inode.parent = dir;
    }
    tx.put_inode(number, &inode).await
}
