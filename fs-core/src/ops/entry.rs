//! Entries of a directory: finding, adding and removing a name in the directory's domain.

use cluster::{LockId, Mode};

use crate::error::{FsError, Result};
use crate::format::item::{Dirent, INDEX_MAX, Inode, Key, Kind, Time, ino_domain, ino_local, mode_bits, name_cookie};
use crate::txn::Txn;

/// Longest name in bytes.
pub const NAME_MAX: usize = 255;

/// A name and where it stands.
pub struct Found {
    pub cookie: u64,
    pub entry: Dirent,
}

/// Refuses names that cannot be: the kernel checks too, other callers may not.
pub fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_MAX {
        return Err(FsError::NameTooLong);
    }
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
        return Err(FsError::Invalid);
    }
    Ok(())
}

pub fn file_type(mode: u32) -> u8 {
    ((mode & mode_bits::S_IFMT) >> 12) as u8
}

fn keys(dir: u64, name: &[u8]) -> (Key, Key) {
    let (local, cookie) = (ino_local(dir), name_cookie(name));
    (Key::new(local, Kind::Dirent, cookie), Key::new(local, Kind::Dirent, cookie + INDEX_MAX))
}

impl Txn<'_> {
    /// The directory's inode; fails if it is not one or has been removed.
    pub async fn directory(&mut self, dir: u64) -> Result<Inode> {
        let inode = self.inode(dir).await?;
        match (inode.is_dir(), inode.links) {
            (false, _) => Err(FsError::NotDir),
            (true, 0) => Err(FsError::NotFound),
            _ => Ok(inode),
        }
    }

    pub async fn find(&mut self, dir: u64, name: &[u8]) -> Result<Option<Found>> {
        let id = ino_domain(dir);
        let (from, to) = keys(dir, name);
        for (key, value) in self.scan(id, from, to, usize::MAX).await? {
            let entry = Dirent::decode(&value).map_err(|e| FsError::format(LockId::Domain(id), e))?;
            if entry.name == name {
                return Ok(Some(Found { cookie: key.offset, entry }));
            }
        }
        Ok(None)
    }

    /// Adds a name that is not there yet.
    pub async fn add_entry(&mut self, dir: u64, name: &[u8], target: u64, mode: u32) -> Result<()> {
        let id = ino_domain(dir);
        let (from, to) = keys(dir, name);
        let taken = self.scan(id, from, to, usize::MAX).await?;
        let free =
            (from.offset..=to.offset).zip(taken.iter().map(|(k, _)| Some(k.offset)).chain(std::iter::repeat(None)));
        let cookie = free.into_iter().find(|(c, t)| Some(*c) != *t).map(|(c, _)| c).ok_or(FsError::NoSpace)?;
        let entry = Dirent { ino: target, file_type: file_type(mode), name: name.to_vec() };
        self.put(id, &Key::new(from.object, Kind::Dirent, cookie), &entry.encode()).await
    }

    /// Lets an existing name mean another inode.
    pub async fn replace_entry(&mut self, dir: u64, found: &Found, target: u64, mode: u32) -> Result<()> {
        let entry = Dirent { ino: target, file_type: file_type(mode), name: found.entry.name.clone() };
        self.put(ino_domain(dir), &Key::new(ino_local(dir), Kind::Dirent, found.cookie), &entry.encode()).await
    }

    pub async fn del_entry(&mut self, dir: u64, found: &Found) -> Result<()> {
        self.del(ino_domain(dir), &Key::new(ino_local(dir), Kind::Dirent, found.cookie)).await?;
        Ok(())
    }

    /// Writes a directory whose entries changed: by how many entries and subdirectories. Its times move on in any case:
    /// strictly, so that whoever compares them sees every change.
    pub async fn dir_changed(&mut self, dir: u64, entries: i64, subdirs: i64) -> Result<()> {
        let mut inode = self.directory(dir).await?;
        let now = self.vol.now();
        inode.mtime = later(now, inode.mtime);
        inode.ctime = later(now, inode.ctime);
        inode.size = inode.size.saturating_add_signed(entries);
        inode.subdirs = inode.subdirs.saturating_add_signed(subdirs as i32);
        inode.links = inode.links.saturating_add_signed(subdirs as i32);
        self.put_inode(dir, &inode).await
    }

    /// Refuses unless the domains of all these inodes are admitted for changing.
    pub fn need_write(&self, inodes: &[u64]) -> Result<()> {
        inodes.iter().try_for_each(|i| self.domain(ino_domain(*i), Mode::Exclusive).map(|_| ()))
    }
}

/// The time to stamp: now, but always after what was there.
pub fn later(now: Time, old: Time) -> Time {
    if now > old {
        return now;
    }
    match old.nanos {
        999_999_999 => Time { secs: old.secs + 1, nanos: 0 },
        n => Time { secs: old.secs, nanos: n + 1 },
    }
}
