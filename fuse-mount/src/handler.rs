//! Requests of the kernel to operations of the volume. One that has to wait (for a lock, the device, a commit) becomes a
//! task of its own, so that none keeps another from being served. What the volume returns is held until the reply has been written: a
//! revocation waits for that, and nothing stale is cached afterwards.

use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use fs_core::{Attr, Caller, Fallocate, FsError, Leased, NewNode, ROOT_INO, Rename, Volume};
use fs_core::{Whence, WriteOptions, XattrSet};
use fuse_session::abi::{WRITE_CACHE, WRITE_KILL_SUIDGID};
use fuse_session::{EntryOut, Forget, Handler, InitConfig, InitFlags, InitRequest, Negotiated, Op, Reply, Request};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::convert::{self, to_ino, valid};
use crate::counters::Counters;
use crate::errno::{errno, is_fault};
use crate::file_locks::{self, LockRequest};
use crate::interrupt::{Interrupt, manner};
use crate::kernel_cache::KnownInodes;
use crate::listing;
use crate::membership::{Membership, Pass, epoch_of};
use crate::open::open_flags;
use crate::report::{self, Reporter};

const XATTR_SPACES: [&[u8]; 4] = [b"user.", b"trusted.", b"security.", b"system.posix_acl_"];

/// Serves one mount.
pub struct Server {
    pub membership: Arc<Membership>,
    pub known: Arc<KnownInodes>,
    pub counters: Arc<Counters>,
    pub reporter: Arc<Reporter>,
    pub runtime: Handle,
    /// Whether to ask for requests through io_uring.
    pub io_uring: bool,
    /// Changes of directories are durable before they are told.
    pub dirsync: bool,
    /// Told when the kernel has begun to use the mount.
    pub ready: Arc<Notify>,
}

impl Handler for Server {
    fn init(&self, _offer: &InitRequest) -> InitConfig {
        // Not ATOMIC_O_TRUNC: the kernel would have us empty a running program before it says ETXTBSY.
        let flags = InitFlags::ASYNC_READ
            | InitFlags::BIG_WRITES
            | InitFlags::MAX_PAGES
            // Always with attributes, which lie beside the names: left to itself the kernel asks so for the first batch
            // only, and looks the other names up one by one when they are used.
            | InitFlags::DO_READDIRPLUS
            | InitFlags::PARALLEL_DIROPS
            | InitFlags::POSIX_ACL
            | InitFlags::DONT_MASK
            | InitFlags::CACHE_SYMLINKS
            | InitFlags::HANDLE_KILLPRIV_V2
            | InitFlags::DIRECT_IO_ALLOW_MMAP
            | InitFlags::POSIX_LOCKS
            | InitFlags::FLOCK_LOCKS
            | InitFlags::INIT_EXT;
        let flags = if self.io_uring { flags | InitFlags::OVER_IO_URING } else { flags };
        InitConfig { flags, ..InitConfig::default() }
    }

    fn initialized(&self, holds: &Negotiated) {
        if self.io_uring {
            let used = holds.flags.contains(InitFlags::OVER_IO_URING);
            tracing::info!("requests come through {}", if used { "io_uring" } else { "/dev/fuse: no io_uring" });
        }
        self.ready.notify_one();
    }

    fn request(&self, request: Request, reply: Reply) {
        self.counters.count(&request.op);
        let Some(reply) = self.known.helper.answer(&request, reply) else { return };
        if let Some(size) = report::pid_asked(&request) {
            reply.xattr(size, std::process::id().to_string().as_bytes());
            return;
        }
        let (membership, known, reporter) = (self.membership.clone(), self.known.clone(), self.reporter.clone());
        let dirsync = self.dirsync;
        let (since, manner, thread) = (Instant::now(), manner(&request.op), request.pid);
        let (interrupt, interrupts) = (Interrupt::default(), reply.interrupt_handle());
        let interrupted = interrupt.clone();
        let mut serving = Box::pin(async move {
            match membership.admit(&request.op, &interrupted).await {
                Ok(pass) if report::is_asked(&request) => reporter.answer(&pass.volume, &request, reply).await,
                Ok(pass) => {
                    Job { volume: pass.volume.clone(), known, dirsync, pass }.serve(request, reply, &interrupted).await
                }
                Err(errno) => drop(reply.err(errno)),
            }
        });
        // Most requests need nothing but memory: they are answered here, without waking another thread.
        let _spawns_work = self.runtime.enter();
        if serving.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            if let Some(interrupts) = interrupts {
                interrupt.listen(&interrupts);
            }
            self.runtime.spawn(async move {
                tokio::select! {
                    biased;
                    () = serving => {}
                    // Dropped where it waits: nothing is done, and the reply says EINTR.
                    () = interrupt.gives_up(manner, thread, since) => {}
                }
            });
        }
    }

    fn forget(&self, forgets: Vec<Forget>) {
        for f in forgets {
            self.known.forgotten(to_ino(f.nodeid), f.nlookup);
        }
    }
}

/// What serving one request needs.
pub(crate) struct Job {
    pub volume: Arc<Volume>,
    pub known: Arc<KnownInodes>,
    /// Changes of directories are durable before they are told.
    pub dirsync: bool,
    /// Last: the membership ends when all that was done in it has been let go.
    pub pass: Pass,
}

type Result<T> = std::result::Result<T, FsError>;

impl Job {
    async fn serve(self, q: Request, reply: Reply, interrupt: &Interrupt) {
        let ino = to_ino(q.nodeid);
        let who = Caller { uid: q.uid, gid: q.gid };
        let v = &self.volume;
        if self.means_stale(ino, &q.op) {
            let ends = matches!(q.op, Op::Release { .. } | Op::Releasedir { .. });
            let _taken = if ends { reply.ok() } else { reply.err(libc::ESTALE) };
            return;
        }
        if self.pass.membership.losses.lost_lock(&q.op, ino) {
            reply.err(libc::EIO);
            return;
        }
        self.pass.membership.losses.note(&q.op, ino, q.pid);
        match q.op {
            Op::Lookup { name } => self.lookup(ino, &name, reply).await,
            Op::Getattr { .. } => self.attr(self.attr_in_step(ino).await, reply),
            Op::Statx { .. } => self.statx(self.attr_in_step(ino).await, reply),
            Op::Setattr(set) => {
                // See convert::made.
                let set = v.setattr(ino, convert::set_attr(&set)).await;
                self.attributes(set, reply, |reply, held| reply.attr(Duration::ZERO, &convert::attr(&held.value)));
            }
            Op::Readlink => answer(v.readlink(ino).await, reply, |r, target| r.readlink(target)),
            Op::Symlink { name, target } => {
                self.entry(self.durable(v.symlink(who, ino, &name, &target).await).await, reply)
            }
            Op::Mknod { name, mode, rdev, umask } => {
                let new = NewNode { mode, umask, rdev: rdev.into() };
                self.entry(self.durable(v.mknod(who, ino, &name, new, false).await).await, reply);
            }
            Op::Mkdir { name, mode, umask } => {
                let new = NewNode { mode, umask, rdev: 0 };
                self.entry(self.durable(v.mkdir(who, ino, &name, new).await).await, reply);
            }
            Op::Unlink { name } => done(self.durable(v.unlink(ino, &name).await).await, reply),
            Op::Rmdir { name } => done(self.durable(v.rmdir(ino, &name).await).await, reply),
            Op::Rename { name, newdir, newname, flags } => match rename_kind(flags) {
                Some(how) => {
                    let renamed = v.rename(ino, &name, to_ino(newdir), &newname, how).await;
                    done(self.durable(renamed).await, reply);
                }
                None => fail(&FsError::Invalid, reply),
            },
            Op::Link { oldnode, newname } => {
                let linked = v.link(to_ino(oldnode), ino, &newname).await;
                self.entry(self.durable(linked).await, reply);
            }
            Op::Open { flags, .. } => self.open(ino, open_flags(flags), reply).await,
            Op::Create { name, flags, mode, umask, .. } => {
                self.create(who, ino, &name, flags, NewNode { mode, umask, rdev: 0 }, reply).await;
            }
            Op::Tmpfile { flags, mode, umask, .. } => {
                let made = v.tmpfile(who, ino, NewNode { mode, umask, rdev: 0 }).await;
                self.created(made, flags, reply).await;
            }
            Op::Read { offset, size, lock_owner, .. } => {
                // Before it is read: a write that comes in between must find it. Only reads around the cache have an owner.
                if lock_owner.is_none() {
                    self.known.pages_given(ino);
                }
                answer(v.read(ino, offset, size).await, reply, |r, data| r.data(data));
            }
            Op::Write { offset, write_flags, data, .. } if write_flags & WRITE_CACHE != 0 => {
                let len = data.len() as u32;
                match v.write_mapped(ino, offset, data.to_vec()) {
                    Ok(()) => drop(reply.write(len)),
                    Err(e) => fail(&e, reply),
                }
            }
            Op::Write { offset, write_flags, flags, data, .. } => {
                let how = WriteOptions {
                    append: flags & libc::O_APPEND as u32 != 0,
                    kill_suid: write_flags & WRITE_KILL_SUIDGID != 0,
                    within_size: false,
                };
                self.write(ino, offset, &data, how, flags & libc::O_DSYNC as u32 != 0, reply).await;
            }
            Op::Statfs => match v.statfs().await {
                Ok(s) => drop(reply.statfs(&convert::statfs(&s))),
                Err(e) => fail(&e, reply),
            },
            Op::Release { fh, flock_release, .. } => {
                file_locks::released(v, &self.pass.membership.locked_through, ino, fh, flock_release).await;
                v.release(ino).await;
                reply.ok();
            }
            Op::Releasedir { .. } => {
                v.release(ino).await;
                reply.ok();
            }
            Op::Fsync { fh, datasync } | Op::Fsyncdir { fh, datasync } => {
                self.fsync(ino, fh, datasync, q.pid, reply).await
            }
            Op::Syncfs => plain(v.sync().await, reply),
            Op::Flush { lock_owner, .. } => {
                self.pass.membership.locked_through.closed(ino, lock_owner);
                file_locks::closed(v, ino, lock_owner).await;
                tokio::select! {
                    biased;
                    flushed = v.flush_mapped(ino) => plain(flushed, reply),
                    () = interrupt.came() => drop(reply.err(libc::EINTR)),
                }
            }
            Op::Getlk { fh, owner, lock, flock } => {
                self.getlk(LockRequest { ino, handle: fh, owner, lock, flock }, reply).await;
            }
            Op::Setlk { fh, owner, lock, flock } => {
                let q = LockRequest { ino, handle: fh, owner, lock, flock };
                self.setlk(q, false, reply, interrupt).await;
            }
            Op::Setlkw { fh, owner, lock, flock } => {
                let q = LockRequest { ino, handle: fh, owner, lock, flock };
                self.setlk(q, true, reply, interrupt).await;
            }
            Op::Opendir { .. } => self.open(ino, 0, reply).await,
            Op::Readdir { offset, size, .. } => listing::readdir(&self, ino, offset, size, reply).await,
            Op::Readdirplus { offset, size, .. } => listing::readdirplus(&self, ino, offset, size, reply).await,
            Op::Setxattr { name, value, flags, .. } => match xattr_kind(flags) {
                Some(how) if stored(&name) => done(v.setxattr(ino, &name, &value, how).await, reply),
                Some(_) => fail(&FsError::NotSupported, reply),
                None => fail(&FsError::Invalid, reply),
            },
            Op::Getxattr { name, size } if stored(&name) => {
                answer(v.getxattr(ino, &name).await, reply, |r, value| r.xattr(size, value));
            }
            Op::Getxattr { .. } => fail(&FsError::NotSupported, reply),
            Op::Listxattr { size } => {
                let names = v.listxattr(ino).await.map(|l| l.map(|names| listed(&names)));
                answer(names, reply, |r, names| r.xattr(size, names));
            }
            Op::Removexattr { name } if stored(&name) => done(v.removexattr(ino, &name).await, reply),
            Op::Removexattr { .. } => fail(&FsError::NotSupported, reply),
            Op::Fallocate { offset, length, mode, .. } => match fallocate_kind(mode) {
                Some(how) => done(v.fallocate(ino, offset, length, how).await, reply),
                None => fail(&FsError::NotSupported, reply),
            },
            Op::Lseek { offset, whence, .. } => self.seek(ino, offset, whence, reply).await,
            // The kernel does these by itself when told that we do not.
            _ => drop(reply.err(libc::ENOSYS)),
        }
    }

    fn means_stale(&self, ino: u64, op: &Op) -> bool {
        let second = match op {
            Op::Rename { newdir, .. } => Some(*newdir),
            Op::Link { oldnode, .. } => Some(*oldnode),
            _ => None,
        };
        self.known.is_stale(ino) || second.is_some_and(|nodeid| self.known.is_stale(to_ino(nodeid)))
    }

    async fn lookup(&self, parent: u64, name: &[u8], reply: Reply) {
        let found = match self.volume.lookup(parent, name).await {
            Ok(held) => match held.value.as_ref().filter(|a| self.must_learn(a)).map(|a| a.ino) {
                Some(ino) => {
                    drop(held);
                    self.look_up_grown(parent, name, ino).await
                }
                None => Ok(held),
            },
            e => e,
        };
        match found {
            Ok(held) => self.looked_up(held, reply),
            Err(e) => fail(&e, reply),
        }
    }

    /// The name meant a file that has grown, and does so or means another by now.
    async fn look_up_grown(&self, parent: u64, name: &[u8], ino: u64) -> Result<Leased<Option<Attr>>> {
        // No lease is kept over the next call: it would wait for a revocation that waits for this lease.
        let learned = self.attr_in_step(ino).await.map(|held| held.value);
        let again = self.volume.lookup(parent, name).await?;
        let grows = again.value.as_ref().is_some_and(|a| a.ino == ino && self.must_learn(a));
        Ok(match learned {
            Ok(learned) if grows => Leased::past(Some(learned)),
            _ => again,
        })
    }

    fn looked_up(&self, held: Leased<Option<Attr>>, reply: Reply) {
        match &held.value {
            Some(a) => self.give_entry(&convert::entry(a, held.cacheable), |e| reply.entry(e)),
            None => drop(reply.entry(&EntryOut::negative(valid(held.cacheable)))),
        }
    }

    /// Counts the entry before the kernel has it: a revocation in between must find it.
    pub(crate) fn give_entry(&self, e: &EntryOut, send: impl FnOnce(&EntryOut) -> bool) {
        let ino = to_ino(e.nodeid);
        self.known.looked_up(ino, e.generation, e.attr.size);
        if !send(e) {
            self.known.forgotten(ino, 1);
        }
    }

    /// The name of a file that was synced is durable before it is told; with `dirsync` every change of a directory is.
    pub(crate) async fn durable<T>(&self, changed: Result<Leased<T>>) -> Result<Leased<T>> {
        if changed.as_ref().is_ok_and(|held| held.names_synced || self.dirsync) {
            self.volume.commit_name().await?;
        }
        changed
    }

    fn entry(&self, made: Result<Leased<Attr>>, reply: Reply) {
        match made {
            Ok(held) => self.give_entry(&convert::made(&held.value, held.cacheable), |e| reply.entry(e)),
            Err(e) => fail(&e, reply),
        }
    }

    fn attr(&self, got: Result<Leased<Attr>>, reply: Reply) {
        self.attributes(got, reply, |reply, held| reply.attr(valid(held.cacheable), &convert::attr(&held.value)));
    }

    /// What the kernel asks for when somebody wants the time of birth.
    fn statx(&self, got: Result<Leased<Attr>>, reply: Reply) {
        self.attributes(got, reply, |reply, held| reply.statx(valid(held.cacheable), &convert::statx(&held.value)));
    }

    fn attributes(&self, got: Result<Leased<Attr>>, reply: Reply, send: impl FnOnce(Reply, &Leased<Attr>) -> bool) {
        match got {
            // The directory that the kernel means is gone, its domain's number means another one.
            Ok(held) if !self.known.attributes_given(held.value.ino, held.value.inode.generation) => {
                let _taken = reply.err(libc::ESTALE);
            }
            Ok(held) => {
                send(reply, &held);
            }
            Err(e) => fail(&e, reply),
        }
    }

    /// `durable`: O_SYNC, O_DSYNC, and the flags of pwritev2 that mean the same (O_SYNC includes O_DSYNC). The kernel sends no
    /// fsync after a write around its page cache, it leaves that to us.
    async fn write(&self, ino: u64, offset: u64, data: &[u8], how: WriteOptions, durable: bool, reply: Reply) {
        let held = match self.volume.write(ino, offset, data, how).await {
            Ok(held) => held,
            Err(e) => return fail(&e, reply),
        };
        // The kernel dropped the pages of the range before it asked: what was read in since is old. And it filed an append
        // under the end of the file as it knew it.
        let pages = match held.value == offset {
            true => self.known.may_have_pages(ino).then_some((offset as i64, data.len() as i64)),
            false => Some((0, 0)),
        };
        let mut held = Some(held);
        if durable || pages.is_some() {
            // No lease is kept over these: a sync may wait for a revocation, as may a READ that keeps a page locked, and the
            // revocation waits for the lease.
            held = None;
        }
        if let Some((first, len)) = pages {
            self.drop_pages(ino, first, len).await;
        }
        if durable && let Err(e) = self.volume.fsync(ino, true).await {
            return fail(&e, reply);
        }
        // After that: whoever waits for the writer finds what was written.
        reply.write(data.len() as u32);
        drop(held);
    }

    async fn fsync(&self, ino: u64, handle: u64, data_only: bool, thread: u32, reply: Reply) {
        let losses = &self.pass.membership.losses;
        if losses.tell(ino, epoch_of(handle), thread) {
            reply.err(libc::EIO);
            return;
        }
        // The kernel tells us nothing of sync and syncfs: fsync of the root does what they should.
        let result = match ino {
            ROOT_INO => self.volume.sync().await,
            _ => self.volume.fsync(ino, data_only).await,
        };
        if result.is_ok() {
            losses.durable(ino, thread);
        }
        plain(result, reply);
    }

    async fn seek(&self, ino: u64, offset: u64, whence: u32, reply: Reply) {
        let whence = match whence as i32 {
            libc::SEEK_DATA => Whence::Data,
            libc::SEEK_HOLE => Whence::Hole,
            _ => return fail(&FsError::Invalid, reply),
        };
        match self.volume.seek(ino, offset, whence).await {
            Ok(at) => drop(reply.lseek(at)),
            Err(e) => fail(&e, reply),
        }
    }
}

pub(crate) fn fail(e: &FsError, reply: Reply) {
    if is_fault(e) {
        tracing::error!("{e}");
    }
    reply.err(errno(e));
}

/// Answers with what the lease holds, then lets it go.
fn answer<T>(got: Result<Leased<T>>, reply: Reply, send: impl FnOnce(Reply, &T) -> bool) {
    match got {
        Ok(held) => drop(send(reply, &held.value)),
        Err(e) => fail(&e, reply),
    }
}

fn done(r: Result<Leased<()>>, reply: Reply) {
    answer(r, reply, |reply, ()| reply.ok());
}

pub(crate) fn plain(r: Result<()>, reply: Reply) {
    match r {
        Ok(()) => drop(reply.ok()),
        Err(e) => fail(&e, reply),
    }
}

fn rename_kind(flags: u32) -> Option<Rename> {
    match flags {
        0 => Some(Rename::Replace),
        libc::RENAME_NOREPLACE => Some(Rename::NoReplace),
        libc::RENAME_EXCHANGE => Some(Rename::Exchange),
        _ => None,
    }
}

fn xattr_kind(flags: u32) -> Option<XattrSet> {
    match flags as i32 {
        0 => Some(XattrSet::Any),
        libc::XATTR_CREATE => Some(XattrSet::Create),
        libc::XATTR_REPLACE => Some(XattrSet::Replace),
        _ => None,
    }
}

fn fallocate_kind(mode: u32) -> Option<Fallocate> {
    let (keep, punch, zero) =
        (libc::FALLOC_FL_KEEP_SIZE as u32, libc::FALLOC_FL_PUNCH_HOLE as u32, libc::FALLOC_FL_ZERO_RANGE as u32);
    (mode & !(keep | punch | zero) == 0).then_some(Fallocate {
        keep_size: mode & keep != 0,
        punch_hole: mode & punch != 0,
        zero_range: mode & zero != 0,
    })
}

fn stored(name: &[u8]) -> bool {
    XATTR_SPACES.iter().any(|s| name.starts_with(s)) && !name.starts_with(report::RESERVED)
}

fn listed(names: &[Vec<u8>]) -> Vec<u8> {
    names.iter().flat_map(|n| n.iter().copied().chain([0])).collect()
}
