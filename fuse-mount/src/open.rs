//! OPEN, CREATE and TMPFILE.

use std::sync::Arc;

use fs_core::{Attr, Caller, FsError, Inode, Leased, NewNode, SetAttr, Volume};
use fuse_session::Reply;
use fuse_session::abi::{FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE};

use crate::convert;
use crate::handler::{Job, fail};

type Result<T> = std::result::Result<T, FsError>;

/// An open that is taken back if nobody gets it.
struct Opened<'a> {
    volume: &'a Arc<Volume>,
    ino: u64,
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        let (volume, ino) = (self.volume.clone(), self.ino);
        tokio::spawn(async move { volume.release(ino).await });
    }
}

impl Job {
    /// `flags` are those of the answer.
    pub(crate) async fn open(&self, ino: u64, flags: u32, reply: Reply) {
        match self.volume.open(ino).await {
            Ok(held) => {
                self.known.open_check(ino);
                self.opened(ino, reply.open(self.pass.handle(), flags)).await;
                drop(held);
            }
            Err(e) => fail(&e, reply),
        }
    }

    /// The kernel did not take the open file: it will not release it either.
    async fn opened(&self, ino: u64, taken: bool) {
        if !taken {
            self.volume.release(ino).await;
        }
    }

    pub(crate) async fn create(&self, who: Caller, parent: u64, name: &[u8], flags: u32, new: NewNode, reply: Reply) {
        loop {
            match self.volume.mknod(who, parent, name, new, true).await {
                Err(FsError::Exists) if flags & libc::O_EXCL as u32 == 0 => {}
                made => return self.created(self.made_durable(made).await, flags, reply).await,
            }
            // Somebody else made it since the kernel looked.
            match self.open_existing(who, parent, name, flags).await {
                Err(FsError::NotFound | FsError::Stale) => {}
                // Told so, the kernel looks the name up again, and judges who may open what it finds.
                Ok(None) => {
                    let _taken = reply.err(libc::ESTALE);
                    return;
                }
                Ok(Some(opened)) => return self.created(Ok(opened), flags, reply).await,
                Err(e) => return fail(&e, reply),
            }
        }
    }

    /// As [`Job::durable`], of a file that was opened as it was made.
    async fn made_durable(&self, made: Result<Leased<Attr>>) -> Result<Leased<Attr>> {
        if !self.dirsync {
            return made;
        }
        let opened = made.as_ref().ok().map(|held| Opened { volume: &self.volume, ino: held.value.ino });
        let made = self.durable(made).await;
        if made.is_ok() {
            std::mem::forget(opened);
        }
        made
    }

    /// For a kernel that took the name to be free. None: it must see for itself.
    async fn open_existing(&self, who: Caller, parent: u64, name: &[u8], flags: u32) -> Result<Option<Leased<Attr>>> {
        let found = self.volume.lookup(parent, name).await?.value;
        let found = found.ok_or(FsError::NotFound)?;
        if !found.inode.is_file() {
            return Err(if found.inode.is_dir() { FsError::IsDir } else { FsError::Exists });
        }
        if !plainly_allowed(who, &found.inode, flags) {
            return Ok(None);
        }
        // No lease is kept over the next call: it would wait for a revocation that waits for this lease.
        drop(self.volume.open(found.ino).await?);
        let opened = Opened { volume: &self.volume, ino: found.ino };
        let held = if flags & libc::O_TRUNC as u32 != 0 {
            self.volume
                .setattr(found.ino, SetAttr { size: Some(0), kill_suid: who.uid != 0, ..SetAttr::default() })
                .await?
        } else {
            self.volume.getattr(found.ino).await?
        };
        std::mem::forget(opened);
        Ok(Some(held))
    }

    pub(crate) async fn created(&self, made: Result<Leased<Attr>>, flags: u32, reply: Reply) {
        match made {
            Ok(held) => {
                let e = convert::made(&held.value, held.cacheable);
                let mut taken = false;
                self.give_entry(&e, |e| {
                    taken = reply.create(e, self.pass.handle(), open_flags(flags));
                    taken
                });
                self.opened(held.value.ino, taken).await;
            }
            Err(e) => fail(&e, reply),
        }
    }
}

/// Pages stay valid over an open: a revocation drops them. Who may write goes around the page cache: a write through it
/// keeps its page locked until it is answered, which waits for the exclusive mode, while a revocation of the shared mode
/// waits for the page. It also lets us say where an append ends up, not the size that the kernel knows. Every close is to be
/// told: it ends the locks of its process.
pub(crate) fn open_flags(flags: u32) -> u32 {
    match (flags & libc::O_ACCMODE as u32) as i32 {
        libc::O_RDONLY => FOPEN_KEEP_CACHE,
        _ => FOPEN_KEEP_CACHE | FOPEN_DIRECT_IO,
    }
}

/// Whether root or the owner may open the file so, by its mode. Of all others we judge nothing: the kernel does, who knows
/// their groups and reads access lists.
fn plainly_allowed(who: Caller, inode: &Inode, flags: u32) -> bool {
    let access = match (flags & libc::O_ACCMODE as u32) as i32 {
        libc::O_RDONLY => 0o400,
        libc::O_WRONLY => 0o200,
        _ => 0o600,
    };
    let needs = access | if flags & libc::O_TRUNC as u32 != 0 { 0o200 } else { 0 };
    who.uid == 0 || (who.uid == inode.uid && inode.mode & needs == needs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_judges_all_but_the_plain_cases() {
        let inode = Inode { mode: 0o100640, uid: 7, gid: 8, ..Inode::default() };
        let may =
            |uid, mode, flags: i32| plainly_allowed(Caller { uid, gid: 8 }, &Inode { mode, ..inode }, flags as u32);
        assert!(may(0, 0o100000, libc::O_RDWR | libc::O_TRUNC));
        assert!(may(7, 0o100640, libc::O_RDWR) && may(7, 0o100400, libc::O_RDONLY) && may(7, 0o100200, libc::O_WRONLY));
        assert!(!may(7, 0o100400, libc::O_RDWR) && !may(7, 0o100400, libc::O_RDONLY | libc::O_TRUNC));
        assert!(!may(7, 0o100046, libc::O_WRONLY) && !may(9, 0o100666, libc::O_RDONLY));
    }
}
