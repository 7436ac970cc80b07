//! Extended attributes: pieces in the domain's tree.

use cluster::LockId;

use super::entry::later;
use crate::acl;
use crate::alloc::Purpose;
use crate::error::{FsError, Result};
use crate::format::item::{
    Key, Kind, PIECE_MAX, decode_xattr_piece, encode_xattr_piece, ino_domain, ino_local, xattr_offset,
};
use crate::txn::{Plan, Txn};
use crate::types::XattrSet;
use crate::volume::{Leased, Volume};

/// Longest value in bytes, as on Linux.
const VALUE_LIMIT: usize = 65_536;
const NAME_LIMIT: usize = 255;

impl Volume {
    pub async fn getxattr(&self, ino: u64, name: &[u8]) -> Result<Leased<Vec<u8>>> {
        let mut plan = Plan::read(&[ino_domain(ino)]);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = tx.xattr(ino, name).await.and_then(|v| v.ok_or(FsError::NoAttr));
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    pub async fn setxattr(&self, ino: u64, name: &[u8], value: &[u8], how: XattrSet) -> Result<Leased<()>> {
        if name.is_empty() || name.len() > NAME_LIMIT || value.len() > VALUE_LIMIT {
            return Err(FsError::Range);
        }
        let mut plan = Plan::write(&[ino_domain(ino)], Purpose::Grow);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = setxattr(&mut tx, ino, name, value, how).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    pub async fn listxattr(&self, ino: u64) -> Result<Leased<Vec<Vec<u8>>>> {
        let mut plan = Plan::read(&[ino_domain(ino)]);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = listxattr(&mut tx, ino).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    pub async fn removexattr(&self, ino: u64, name: &[u8]) -> Result<Leased<()>> {
        let mut plan = Plan::write(&[ino_domain(ino)], Purpose::Reclaim);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = removexattr(&mut tx, ino, name).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }
}

fn range(ino: u64, name: &[u8]) -> (Key, Key) {
    let (local, at) = (ino_local(ino), xattr_offset(name));
    (Key::new(local, Kind::Xattr, at), Key::new(local, Kind::Xattr, at | 0xff))
}

impl Txn<'_> {
    /// The value of an attribute, if it is set.
    pub async fn xattr(&mut self, ino: u64, name: &[u8]) -> Result<Option<Vec<u8>>> {
        self.inode(ino).await?;
        let id = ino_domain(ino);
        let (from, to) = range(ino, name);
        let pieces = self.scan(id, from, to, 256).await?;
        let (mut value, mut count) = (Vec::new(), None);
        for (_, item) in &pieces {
            let (owner, n, part) = decode_xattr_piece(item).map_err(|e| FsError::format(LockId::Domain(id), e))?;
            if owner != name {
                return Ok(None);
            }
            count = Some(usize::from(n));
            value.extend_from_slice(part);
        }
        match count {
            None => Ok(None),
            Some(n) if n == pieces.len() => Ok(Some(value)),
            Some(_) => {
                Err(FsError::damaged(LockId::Domain(id), format!("an attribute of inode {ino:#x} is incomplete")))
            }
        }
    }

    /// Sets an attribute, whatever it was.
    pub async fn put_xattr(&mut self, ino: u64, name: &[u8], value: &[u8]) -> Result<()> {
        self.del_xattr(ino, name).await?;
        let (from, _) = range(ino, name);
        let pieces = value.len().div_ceil(PIECE_MAX).max(1);
        for i in 0..pieces {
            let part = &value[i * PIECE_MAX..value.len().min((i + 1) * PIECE_MAX)];
            let key = Key { offset: from.offset + i as u64, ..from };
            self.put(ino_domain(ino), &key, &encode_xattr_piece(name, pieces as u8, part)).await?;
        }
        Ok(())
    }

    /// Removes an attribute; false if it was not set.
    pub async fn del_xattr(&mut self, ino: u64, name: &[u8]) -> Result<bool> {
        let (from, to) = range(ino, name);
        Ok(!self.del_range(ino_domain(ino), from, to, 256).await?.is_empty())
    }

    async fn touch_ctime(&mut self, ino: u64) -> Result<()> {
        self.flush_contents(ino).await?;
        let mut inode = self.inode(ino).await?;
        inode.ctime = later(self.vol.now(), inode.ctime);
        self.put_inode(ino, &inode).await
    }
}

async fn setxattr(tx: &mut Txn<'_>, ino: u64, name: &[u8], value: &[u8], how: XattrSet) -> Result<()> {
    tx.need_write(&[ino])?;
    let exists = tx.xattr(ino, name).await?.is_some();
    match how {
        XattrSet::Create if exists => return Err(FsError::Exists),
        XattrSet::Replace if !exists => return Err(FsError::NoAttr),
        _ => {}
    }
    tx.touch_ctime(ino).await?;
    if name == acl::ACCESS {
        return acl::set_access(tx, ino, value).await;
    }
    if name == acl::DEFAULT && !tx.inode(ino).await?.is_dir() {
        return Err(FsError::Access);
    }
    tx.put_xattr(ino, name, value).await
}

async fn listxattr(tx: &mut Txn<'_>, ino: u64) -> Result<Vec<Vec<u8>>> {
    tx.inode(ino).await?;
    let (id, local) = (ino_domain(ino), ino_local(ino));
    let mut names: Vec<Vec<u8>> = Vec::new();
    let all = (Key::new(local, Kind::Xattr, 0), Key::new(local, Kind::Xattr, u64::MAX));
    for (key, item) in tx.scan(id, all.0, all.1, usize::MAX).await? {
        if key.offset & 0xff == 0 {
            let (name, _, _) = decode_xattr_piece(&item).map_err(|e| FsError::format(LockId::Domain(id), e))?;
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

async fn removexattr(tx: &mut Txn<'_>, ino: u64, name: &[u8]) -> Result<()> {
    tx.need_write(&[ino])?;
    tx.inode(ino).await?;
    if !tx.del_xattr(ino, name).await? {
        return Err(FsError::NoAttr);
    }
    tx.touch_ctime(ino).await
}
