//! Making names: files, directories, symlinks, links, unnamed files.

use std::sync::Arc;

use cluster::{LockId, LockValue, Mode};

use super::entry::{check_name, later};
use crate::acl;
use crate::alloc::Purpose;
use crate::domain::Domain;
use crate::error::{FsError, Result};
use crate::format::domain::DomainHeader;
use crate::format::item::{DIR_LOCAL, Inode, Key, Kind, PIECE_MAX, ino, ino_domain, ino_local, mode_bits};
use crate::format::layout::ROOT_DOMAIN;
use crate::hold::{Entry, Ticket};
use crate::txn::{Plan, Txn};
use crate::types::{Attr, Caller, NewNode};
use crate::volume::{Leased, Volume};

/// Most links of a file.
pub const LINK_MAX: u32 = 65_000;
/// Longest target of a symlink.
pub const SYMLINK_MAX: usize = 4095;

/// What to make, beyond mode and owner.
#[derive(Clone, Copy)]
enum Contents<'a> {
    None,
    Symlink(&'a [u8]),
}

/// A domain made for a directory that is about to be created; given back if the operation is not installed.
struct SpareDomain {
    domain: Arc<Domain>,
    ticket: Ticket,
    number: u32,
}

impl Volume {
    /// Regular files, fifos, sockets, device nodes. `open`: also counts one open (release it).
    pub async fn mknod(&self, who: Caller, parent: u64, name: &[u8], new: NewNode, open: bool) -> Result<Leased<Attr>> {
        use mode_bits::{S_IFBLK, S_IFCHR, S_IFIFO, S_IFREG, S_IFSOCK};
        of_kind(new.mode, &[0, S_IFREG, S_IFIFO, S_IFSOCK, S_IFCHR, S_IFBLK])?;
        self.create(who, parent, name, new, Contents::None, open).await
    }

    pub async fn symlink(&self, who: Caller, parent: u64, name: &[u8], target: &[u8]) -> Result<Leased<Attr>> {
        if target.is_empty() || target.len() > SYMLINK_MAX {
            return Err(if target.is_empty() { FsError::NotFound } else { FsError::NameTooLong });
        }
        let new = NewNode { mode: mode_bits::S_IFLNK | 0o777, umask: 0, rdev: 0 };
        self.create(who, parent, name, new, Contents::Symlink(target), false).await
    }

    async fn create(
        &self,
        who: Caller,
        parent: u64,
        name: &[u8],
        new: NewNode,
        contents: Contents<'_>,
        open: bool,
    ) -> Result<Leased<Attr>> {
        check_name(name)?;
        let mut plan = Plan::write(&[ino_domain(parent)], Purpose::Grow);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = create(&mut tx, who, parent, name, new, contents, open).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    /// O_TMPFILE: an open file without a name, in the parent's domain.
    pub async fn tmpfile(&self, who: Caller, parent: u64, new: NewNode) -> Result<Leased<Attr>> {
        of_kind(new.mode, &[0, mode_bits::S_IFREG])?;
        let mut plan = Plan::write(&[ino_domain(parent)], Purpose::Grow);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = tmpfile(&mut tx, who, parent, new).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    pub async fn link(&self, target: u64, parent: u64, name: &[u8]) -> Result<Leased<Attr>> {
        check_name(name)?;
        let mut plan = Plan::write(&[ino_domain(target), ino_domain(parent)], Purpose::Grow);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = link(&mut tx, target, parent, name).await;
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(self.named(target, done));
            }
        }
    }

    pub async fn mkdir(&self, who: Caller, parent: u64, name: &[u8], new: NewNode) -> Result<Leased<Attr>> {
        check_name(name)?;
        let new = NewNode { mode: (new.mode & 0o7777) | mode_bits::S_IFDIR, ..new };
        let mut plan = Plan::write(&[ino_domain(parent)], Purpose::Grow);
        let mut own = !shares_parent(parent, name);
        loop {
            let mut tx = self.begin(&plan).await?;
            let r = match own {
                true => self.mkdir_with_domain(&mut tx, who, parent, name, new).await,
                false => create(&mut tx, who, parent, name, new, Contents::None, false).await,
            };
            if own && matches!(r, Err(FsError::NoDomain)) {
                // Domains run out: the directory shares its parent's.
                drop(tx);
                own = self.find_domain_number().await?;
                continue;
            }
            if matches!(r, Err(FsError::DomainBusy)) {
                // Its number stays taken until its lock has been given back, so the next try gets another one.
                drop(tx);
                continue;
            }
            if let Some(done) = self.finish(tx, r, &mut plan).await? {
                return Ok(done);
            }
        }
    }

    async fn mkdir_with_domain(
        &self,
        tx: &mut Txn<'_>,
        who: Caller,
        parent: u64,
        name: &[u8],
        new: NewNode,
    ) -> Result<Attr> {
        if tx.find(parent, name).await?.is_some() {
            return Err(FsError::Exists);
        }
        let dir = tx.directory(parent).await?;
        let number = tx.take_domain_number().ok_or(FsError::NoDomain)?;
        let header_block = tx.take_blocks(1, None, Purpose::Grow)?.start;
        // Before its lock is taken: the operation may be dropped meanwhile.
        tx.own_spare(self.domain(number));
        let spare = self.spare_domain(number, header_block).await?;
        make_directory(tx, spare, header_block, who, parent, name, new, &dir).await
    }

    /// Takes the lock of a domain number that nobody uses.
    async fn spare_domain(&self, number: u32, header_block: u64) -> Result<SpareDomain> {
        let domain = self.domain(number);
        let _turn = domain.hold.turn.lock().await;
        let value = LockValue { root: header_block, next_local: 0, version: 0 };
        let grant = self.node.create(LockId::Domain(number), value).await?;
        self.store.forget(domain.lock_id());
        *domain.cached_tenure.lock() = Some(grant.tenure);
        *domain.open_flagged.lock() = false;
        *domain.leftovers.lock() = None;
        *domain.changed_to.lock() = None;
        let demanded = domain.hold.granted(grant);
        let entry = domain.hold.try_enter(Mode::Exclusive);
        if let (true, Some(volume)) = (demanded, self.me.upgrade()) {
            // Somebody here or elsewhere still asks for the inode that the number meant before.
            let hold = domain.hold.clone();
            tokio::spawn(async move { volume.revoke(hold).await });
        }
        match entry {
            Entry::Admitted(ticket) => Ok(SpareDomain { domain: domain.clone(), ticket, number }),
            _ => Err(FsError::DomainBusy),
        }
    }
}

/// A mode of other bits would not be one on disk.
fn of_kind(mode: u32, kinds: &[u32]) -> Result<()> {
    let known = kinds.contains(&(mode & mode_bits::S_IFMT)) && mode <= mode_bits::S_IFMT | 0o7777;
    known.then_some(()).ok_or(FsError::Invalid)
}

/// A Maildir's parts share its domain, so that one lock covers a mailbox. The root is no Maildir.
fn shares_parent(parent: u64, name: &[u8]) -> bool {
    ino_domain(parent) != ROOT_DOMAIN && matches!(name, b"new" | b"cur" | b"tmp")
}

/// A new inode as its directory and the caller shape it; the parent's default ACL counts.
fn new_inode(tx: &Txn<'_>, who: Caller, dir: &Inode, new: NewNode) -> Inode {
    let now = tx.vol.now();
    let setgid = dir.mode & 0o2000 != 0;
    let mut mode = if new.mode & mode_bits::S_IFMT == 0 { new.mode | mode_bits::S_IFREG } else { new.mode };
    let is_dir = mode & mode_bits::S_IFMT == mode_bits::S_IFDIR;
    if setgid && is_dir {
        mode |= 0o2000;
    }
    Inode {
        mode,
        uid: who.uid,
        gid: if setgid { dir.gid } else { who.gid },
        links: if is_dir { 2 } else { 1 },
        rdev: new.rdev,
        atime: now,
        mtime: now,
        ctime: now,
        btime: now,
        ..Inode::default()
    }
}

async fn create(
    tx: &mut Txn<'_>,
    who: Caller,
    parent: u64,
    name: &[u8],
    new: NewNode,
    contents: Contents<'_>,
    open: bool,
) -> Result<Attr> {
    let dir = tx.directory(parent).await?;
    if tx.find(parent, name).await?.is_some() {
        return Err(FsError::Exists);
    }
    let id = ino_domain(parent);
    let number = tx.new_ino(id).await?;
    let mut inode = new_inode(tx, who, &dir, new);
    inode.generation = tx.tenure(id)?;
    if inode.is_dir() {
        inode.parent = parent;
    }
    acl::inherit(tx, parent, number, &mut inode, new.umask).await?;
    if let Contents::Symlink(target) = contents {
        inode.size = target.len() as u64;
        for (i, piece) in target.chunks(PIECE_MAX).enumerate() {
            tx.put(id, &Key::new(ino_local(number), Kind::Inline, i as u64), piece).await?;
        }
    }
    tx.put_inode(number, &inode).await?;
    tx.add_entry(parent, name, number, inode.mode).await?;
    tx.dir_changed(parent, 1, i64::from(inode.is_dir())).await?;
    if open {
        count_open_when_installed(tx, number)?;
    }
    Ok(Attr { ino: number, inode })
}

async fn tmpfile(tx: &mut Txn<'_>, who: Caller, parent: u64, new: NewNode) -> Result<Attr> {
    let dir = tx.directory(parent).await?;
    let id = ino_domain(parent);
    let number = tx.new_ino(id).await?;
    let mut inode = new_inode(tx, who, &dir, new);
    inode.generation = tx.tenure(id)?;
    inode.links = 0;
    acl::inherit(tx, parent, number, &mut inode, new.umask).await?;
    tx.put_inode(number, &inode).await?;
    tx.add_orphan(number).await?;
    count_open_when_installed(tx, number)?;
    Ok(Attr { ino: number, inode })
}

async fn link(tx: &mut Txn<'_>, target: u64, parent: u64, name: &[u8]) -> Result<Attr> {
    tx.need_write(&[target, parent])?;
    tx.directory(parent).await?;
    tx.flush_contents(target).await?;
    let mut inode = tx.inode(target).await?;
    if inode.is_dir() {
        return Err(FsError::NotPermitted);
    }
    if inode.links >= LINK_MAX {
        return Err(FsError::TooManyLinks);
    }
    if tx.find(parent, name).await?.is_some() {
        return Err(FsError::Exists);
    }
    if inode.links == 0 {
        tx.remove_orphan(target).await?;
    }
    inode.links += 1;
    inode.ctime = later(tx.vol.now(), inode.ctime);
    tx.put_inode(target, &inode).await?;
    tx.add_entry(parent, name, target, inode.mode).await?;
    tx.dir_changed(parent, 1, 0).await?;
    Ok(Attr { ino: target, inode: tx.live_inode(target).await? })
}

#[allow(clippy::too_many_arguments)]
async fn make_directory(
    tx: &mut Txn<'_>,
    spare: SpareDomain,
    header_block: u64,
    who: Caller,
    parent: u64,
    name: &[u8],
    new: NewNode,
    dir: &Inode,
) -> Result<Attr> {
    let grant = spare.domain.hold.grant().ok_or(FsError::DomainBusy)?;
    let next_local = grant.value.next_local.max(DIR_LOCAL + 1);
    let version = DomainHeader::first_version(grant.tenure);
    let header = DomainHeader { next_local, inodes: 1, version, ..DomainHeader::default() };
    tx.add_domain(spare.domain, spare.ticket, header_block, header)?;
    let number = ino(spare.number, DIR_LOCAL);
    let mut inode = new_inode(tx, who, dir, new);
    inode.parent = parent;
    inode.generation = grant.tenure;
    acl::inherit(tx, parent, number, &mut inode, new.umask).await?;
    tx.put_inode(number, &inode).await?;
    tx.add_entry(parent, name, number, inode.mode).await?;
    tx.dir_changed(parent, 1, 1).await?;
    Ok(Attr { ino: number, inode })
}

fn count_open_when_installed(tx: &mut Txn<'_>, number: u64) -> Result<()> {
    let domain = tx.domain(ino_domain(number), Mode::Exclusive)?.clone();
    tx.on_install(move || domain.with_file(ino_local(number), |f| f.opens += 1));
    Ok(())
}
